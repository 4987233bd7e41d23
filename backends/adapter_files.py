"""Adapter folders, PEFT's and mlx-lm's, read into one form and written from it. Knows no framework.

| in     | PEFT                                                | mlx-lm                   |
| ------ | --------------------------------------------------- | ------------------------ |
| file   | `adapter_model.safetensors`                         | `adapters.safetensors`   |
| A      | `base_model.model.` + M + `.lora_A.weight` [r, in]  | M + `.lora_a` [in, r]    |
| B      | `base_model.model.` + M + `.lora_B.weight` [out, r] | M + `.lora_b` [r, out]   |
| effect | W x + alpha / r · B A x                             | W x + scale · (x a) b    |

M is the same dotted module name on both sides. The one form is PEFT's. Of arrays only `.T` and `.shape` are asked,
so they may be torch's, NumPy's or mlx's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy as safetensors
from numpy.typing import NDArray

from spa_lite.errors import ModelError

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS, PICKLE = "adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
LEAF = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
BLOCK = re.compile(r".*?\.\d+\.")

MLX_KEYS = {"fine_tune_type", "lora_parameters"}
"""What tells mlx-lm's adapter_config.json from PEFT's, which has `peft_type`."""

EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
"""Last parts of the names of embeddings: mlx-lm adapts them too, and PEFT writes those tensors in another way."""

WHOLE_WEIGHTS = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
"""PEFT settings that hold or move whole weights of the base, which all roles share."""

VARIANTS = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""PEFT settings by which an adapter does something else than W x + s · B A x with one s and one rank."""


@dataclass(frozen=True)
class Stored:
    """An adapter as PEFT holds it: the fields of a LoraConfig, and tensors by PEFT key. `name` is for messages."""

    config: dict[str, Any]
    tensors: dict[str, Any]
    name: str = "the adapter"


def read(folder: Path, load: Callable[[Path], Mapping[str, Any]]) -> Stored:
    """The adapter in a folder of either format. `load` reads a safetensors file into arrays of any framework.

    Refuses what is damaged, what changes the base that all roles share, and what has no exact counterpart in PEFT.
    """
    config = _read_config(folder)
    if "peft_type" not in config and MLX_KEYS & config.keys():
        return _from_mlx_lm(folder, config, load)
    _check_peft(folder, config)
    return Stored(config, _load(folder / PEFT_WEIGHTS, load), str(folder))


def scale_of(config: Mapping[str, Any]) -> float:
    """What B A x is multiplied with (where no `alpha_pattern` says otherwise)."""
    rank = config.get("r", 8)
    return float(config.get("lora_alpha", 8) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def modules(stored: Stored) -> dict[str, tuple[Any, Any]]:
    """Module name -> (A [r, in], B [out, r]), sorted. Raises ModelError if a tensor is anything else, or alone."""
    halves: dict[str, dict[str, Any]] = {}
    for key in sorted(stored.tensors):
        found, tensor = MATRIX.fullmatch(key), stored.tensors[key]
        if not found:
            raise ModelError(f"{stored.name} holds {key}, which is no matrix of plain LoRA on a linear layer")
        halves.setdefault(found["module"], {})[found["side"]] = tensor
    if not halves:
        raise ModelError(f"{stored.name} holds no tensor at all: save it again")
    return {module: _pair(stored.name, module, sides) for module, sides in halves.items()}


def _pair(name: str, module: str, sides: Mapping[str, Any]) -> tuple[Any, Any]:
    if len(sides) < 2:
        lone, lacking = ("A", "B") if "A" in sides else ("B", "A")
        raise ModelError(f"{name} holds lora_{lone} of {module} without its lora_{lacking}: save it again")
    a, b = sides["A"], sides["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} make no product B A")
    return a, b


def check_plain(stored: Stored, reader: str) -> None:
    """Refuse what only PEFT can do with an adapter; `reader` is who cannot, for the message."""
    used = [name for name in VARIANTS if stored.config.get(name)]
    if used:
        raise ModelError(f"{stored.name} uses {', '.join(used)}, which {reader} cannot hold: use plain LoRA instead")


# Writing: the same adapter gives the same bytes


def write_peft(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]], base_name: str
) -> None:
    """Write an adapter as PEFT does: the fields of a LoraConfig, and float32 tensors by PEFT key."""
    fixed = {"base_model_name_or_path": base_name, "inference_mode": True}
    _write(folder, {**config, **fixed}, PEFT_WEIGHTS, tensors, "pt")


def write_mlx_lm(folder: Path, stored: Stored) -> None:
    """Write an adapter (NumPy, float32) such that `mlx_lm.load(model, adapter_path=folder)` applies exactly it.

    mlx-lm looks for `keys` among the names inside the last `num_layers` blocks, and among the full names of the whole
    model. Full names never occur inside a block, so they say exactly which modules are meant, whatever set that is.
    """
    check_plain(stored, "mlx-lm's format")
    pairs, rank = modules(stored), stored.config.get("r", 8)
    mixed = [module for module, (a, _) in pairs.items() if a.shape[0] != rank]
    if mixed:
        raise ModelError(
            f"{stored.name} has rank {rank}, but {pairs[mixed[0]][0].shape[0]} in {mixed[0]}: mlx-lm's format holds"
            " one rank for all"
        )
    if stored.config.get("fan_in_fan_out") or any(module.startswith("gpt_neox.") for module in pairs):
        raise ModelError(f"{stored.name}: mlx-lm names the layers of GPT-2 and GPT-NeoX otherwise; write it as peft")
    config = {
        "fine_tune_type": "lora",
        "num_layers": len({found[0] for module in pairs if (found := BLOCK.match(module))}),
        "lora_parameters": {"rank": rank, "scale": scale_of(stored.config), "dropout": 0.0, "keys": sorted(pairs)},
    }
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{module}.lora_a": a.T, f"{module}.lora_b": b.T}
    _write(folder, config, MLX_WEIGHTS, tensors, "mlx")


def _write(folder: Path, config: Any, weights: str, tensors: Mapping[str, NDArray[np.float32]], label: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(_plain(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    arrays = {key: np.ascontiguousarray(tensors[key], dtype=np.float32) for key in sorted(tensors)}
    (folder / weights).write_bytes(safetensors.save(arrays, metadata={"format": label}))


def _plain(value: Any) -> Any:
    """JSON types only; sets sorted, so that equal settings give equal bytes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(getattr(value, "value", value))


# Reading


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} is no adapter folder: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _load(path: Path, load: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors of a file; safetensors only."""
    if not path.is_file() and (path.parent / PICKLE).is_file():
        raise ModelError(f"{path.parent / PICKLE} is a pickle, which can run code when read: save it as {path.name}")
    if not path.is_file():
        raise ModelError(f"{path.parent} is no adapter folder: it has no {path.name}")
    try:
        return dict(load(path))
    except Exception as error:  # every framework raises its own kind
        raise ModelError(f"{path} is damaged: {first_line(error)}") from error


def _check_peft(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} holds a {config.get('peft_type')} adapter; only LORA adapters can be used")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not _is_number(alpha):
        raise ModelError(f"{folder / CONFIG} needs a whole number r above 0 and a number lora_alpha: save it again")
    held = [name for name in WHOLE_WEIGHTS if config.get(name)]
    held += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights")
    held += [f"init_lora_weights={start}"] if isinstance(start, str) and start not in ("gaussian", "orthogonal") else []
    if held:
        raise ModelError(f"{folder} uses {', '.join(held)}, which changes the base all roles share: use plain LoRA")


def _from_mlx_lm(folder: Path, config: Mapping[str, Any], load: Callable[[Path], Mapping[str, Any]]) -> Stored:
    kind, shape = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora":
        raise ModelError(f"{folder} holds what mlx-lm calls {kind}; only its lora adapters can be used")
    if not isinstance(shape, dict) or not _is_number(shape.get("scale")):
        raise ModelError(f"{folder / CONFIG} has no number lora_parameters.scale: say how strong the adapter is")
    rank, tensors = shape.get("rank"), _peft_keys(folder, _load(folder / MLX_WEIGHTS, load))
    pairs = modules(Stored({}, tensors, str(folder)))
    for module, (a, _) in pairs.items():
        if a.shape[0] != rank:
            raise ModelError(f"{folder / CONFIG} says rank {rank}, but the tensors of {module} have {a.shape[0]}")
    converted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _alpha(shape["scale"], shape["rank"]),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(pairs),  # full names: exact, whatever blocks are adapted
    }
    return Stored(converted, tensors, str(folder))


def _peft_keys(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm's tensors under PEFT's keys and in PEFT's shape; linear layers only."""
    found = {}
    for key, tensor in tensors.items():
        leaf = LEAF.fullmatch(key)
        if not leaf or leaf["module"].rpartition(".")[2] in EMBEDDINGS or len(tensor.shape) != 2:
            raise ModelError(f"{folder} adapts {key} {list(tensor.shape)}; only adapters of linear layers can be used")
        found[f"{PREFIX}{leaf['module']}.lora_{leaf['side'].upper()}.weight"] = tensor.T
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _alpha(scale: float, rank: int) -> float:
    """The alpha of that scale: a whole number where one gives exactly this scale, so that alpha survives the way."""
    whole = round(scale * rank)
    return whole if whole / rank == scale else scale * rank


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
