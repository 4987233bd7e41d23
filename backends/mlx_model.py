"""Loading a model with mlx-lm, with the answers transformers would give, and the two halves of its forward pass."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, get_total_parameters, load_model
from transformers import AutoConfig, AutoTokenizer

from spa_lite.backend import ModelSettings
from spa_lite.backends.mlx_device import DTYPES, device_in_use, free_memory, pick_device, same_random_state
from spa_lite.backends.mlx_lines import AXES, longest_line, placed, views
from spa_lite.backends.model_folder import (
    Known,
    check_name,
    context_of,
    digest_weights,
    eos_ids,
    fetch,
    fetched,
    generation_of,
    offline,
    weights_in,
)
from spa_lite.backends.packing import lines, pack, width
from spa_lite.backends.quiet import quiet
from spa_lite.errors import BackendError, ModelError
from spa_lite.records import Row

GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
COMPARED = {
    "llama": ("silu",),
    "mistral": ("silu",),
    "qwen2": ("silu",),
    "qwen3": ("silu",),
    "phi3": ("silu",),
    "gemma2": GELU_TANH,
    "gpt_neox": GELU_TANH,
}
"""Architectures whose log-probs our tests compare with PyTorch's, and the activation that mlx-lm gives each of them."""
UNLIKE = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError, NotImplementedError)
"""What a model raises that is not built as expected."""
SCORE = {"cpu": 6.0, "gpu": 1.5}
"""What an attention score costs, over what its matrix products do. MLX's exponential on a CPU takes 20 ns a number."""


@dataclass(frozen=True)
class Loaded:
    """What came out of a model folder or a hub name."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    config: dict[str, Any]
    parameters: int
    dtype: Any
    bits: int
    context: int
    notes: tuple[str, ...]
    weights_digest: str


def load(settings: ModelSettings) -> Loaded:
    """Model and tokenizer in evaluation mode, the base frozen. Safetensors only, never pickle."""
    device = pick_device(settings.device)
    name = check_name(settings.model)
    folder = fetched(name, code=settings.trust_remote_code)
    trust = {"trust_remote_code": settings.trust_remote_code}
    read = _read_config(name, folder, trust)
    full = read.full
    with quiet():
        tokenizer = fetch(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(folder, **trust))
    with same_random_state():
        model, config = fetch(name, "weights", lambda: _load(folder, read.changes, trust))
    context, notes = _context(model, read)
    dtype = _set_dtype(model, settings.dtype, device)
    bits = _bits(model, config, settings.load_in_4bit, dtype)
    model.eval()
    # After quantising, which leaves biases unfrozen, and before any adapter is put in: what is not frozen is trained.
    model.freeze()
    fetch(name, "weights", lambda: _read(model))
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        eos_ids=eos_ids(_Fields(full), generation_of(folder)),
        config=full,
        parameters=get_total_parameters(model),
        dtype=dtype,
        bits=bits,
        context=context,
        notes=notes,
        weights_digest=digest_weights(folder),
    )


def known(settings: ModelSettings, folder: Path) -> Known:
    """What `load` would say of the model in a folder. No weight is read, and none need be there."""
    device, name = pick_device(settings.device), settings.model
    read = _read_config(name, folder, offline(settings))
    trust = {"trust_remote_code": settings.trust_remote_code}
    with same_random_state():
        model, config = fetch(name, "config", lambda: _load(folder, read.changes, trust, strict=False))
    said = DTYPES.get(str(read.full.get("dtype")), mx.float32)
    dtype = _pick_dtype(settings.dtype, device, lambda: _own_dtype(model) if weights_in(folder) else said)
    return Known(
        config=read.full,
        device=device,
        dtype=str(dtype).removeprefix("mlx.core."),
        bits=_bits_wanted(config.get("quantization"), settings.load_in_4bit, dtype),
        context=_context(model, read)[0],
        eos_ids=eos_ids(_Fields(read.full), generation_of(folder)),
        free_memory=lambda: free_memory(device),
    )


@dataclass(frozen=True)
class _Read:
    """A config.json: as it lies there, with transformers' defaults, and what mlx-lm must be told besides."""

    raw: dict[str, Any]
    full: dict[str, Any]
    changes: dict[str, Any]
    notes: tuple[str, ...]
    limit: int | None


def _read_config(name: str, folder: Path, trust: Mapping[str, Any]) -> _Read:
    raw = fetch(name, "config", lambda: json.loads((folder / "config.json").read_text()))
    with quiet():
        config = _transformers_config(folder, raw, trust)
    full = raw | (config.to_dict() if config is not None else {})
    changes, notes, limit = agreed_config(name, raw, full)
    return _Read(raw, full, changes, tuple(notes), limit)


def _context(model: Any, read: _Read) -> tuple[int, tuple[str, ...]]:
    """The longest sequence in which mlx-lm computes what transformers does; all notes."""
    context, notes = context_of(_Fields(read.full.get("text_config") or read.full)), read.notes
    window = _window_not_kept(model, read.full | read.changes)
    if window and window < context:
        notes = (*notes, f"mlx-lm has no sliding window for this architecture: sequences end at {window} tokens")
    return min(filter(None, (context, window, read.limit))), notes


def _load(folder: Path, changes: dict[str, Any], trust: Mapping[str, Any], strict: bool = True) -> Any:
    """Model and config. MLX names the weights that are missing in the second line of what it says."""
    try:
        return load_model(folder, lazy=True, strict=strict, model_config=changes, **trust)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error


def agreed_config(
    name: str, raw: Mapping[str, Any], full: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], int | None]:
    """Changes to config.json with which mlx-lm computes what transformers does; notes; a limit on the context.

    `raw` is the file, `full` the same with transformers' defaults. Raises ModelError where no change can do it.
    mlx-lm takes its own default for what the file leaves out, and knows only the older spelling of rotary scaling:
    with the newer one it falls back to theta 10000 in silence, and log-probs are off by a nat.
    """
    kind = raw.get("model_type", "unknown")
    fields = _fields_of(name, raw)
    changes = {key: value for key, value in full.items() if raw.get(key) is None}
    notes: list[str] = []
    limit = None
    rope = full.get("rope_parameters")
    rope = rope if isinstance(rope, dict) and "rope_type" in rope else {"rope_type": "default"}
    for lack in _lacks(kind, fields, full, rope):
        raise ModelError(f"mlx-lm's {kind} has no {lack}, which {name} needs: use --backend torch")
    if len(rope) > 1:
        changes |= _older_rope(kind, full, rope)
    if rope["rope_type"] == "longrope":
        # mlx-lm takes the factors for long texts at every length; up to this one, transformers takes the short.
        limit = rope["original_max_position_embeddings"]
        changes["rope_scaling"]["long_factor"] = rope["short_factor"]
        notes.append(f"rotary factors for short texts only: sequences end at {limit} tokens")
    if kind == "llama":
        changes |= {"layer_types": None, "sliding_window": None}  # transformers' llama attends to everything
    if kind == "gpt_neox":
        notes.append(f"mlx-lm names the layers of {kind} in its own way: adapters made here fit no other program")
    if kind not in COMPARED:
        notes.append(f"mlx-lm's {kind} was never compared with transformers' here")
    lacking = sorted(field for field, needed in fields.items() if needed and field not in {**raw, **changes})
    if lacking:
        raise ModelError(f"mlx-lm needs {', '.join(lacking)} in the config of {name}: use --backend torch")
    return changes, notes, limit


def _lacks(kind: str, fields: Collection[str], full: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[str]:
    """What the model needs and mlx-lm's version of its architecture would leave out, most of it in silence."""
    if rope["rope_type"] != "default" and not {"rope_scaling", "rope_parameters"} & set(fields):
        yield "rotary scaling"
    if kind not in COMPARED:
        return
    wanted = full.get("hidden_activation") or full.get("hidden_act")
    if wanted and wanted not in COMPARED[kind]:
        yield f"{wanted} (it computes {COMPARED[kind][0]})"
    if kind == "gemma2" and None in (full.get("attn_logit_softcapping"), full.get("final_logit_softcapping")):
        yield "way to leave a soft cap out"
    if rope.get("truncate") is False:
        yield "YaRN with fractional borders"
    plain = {key: value for key, value in rope.items() if key not in ("attention_factor", "factor")}
    if not _is_yarn(rope) and abs(_strength(full, rope) - _strength(full, plain)) > 1e-6:
        yield f"attention factor in {rope['rope_type']} scaling"


def _is_yarn(rope: Mapping[str, Any]) -> bool:
    return bool(rope["rope_type"] == "yarn" and (rope.get("factor") or 1) > 1)


def _strength(full: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """What transformers multiplies rotated queries and keys with."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if _is_yarn(rope):
        grown = 0.1 * math.log(rope["factor"])
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            return float((rope["mscale"] * grown + 1) / (rope["mscale_all_dim"] * grown + 1))
        return grown + 1
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or full["max_position_embeddings"] / original
        return math.sqrt(1 + math.log(max(1.0, factor)) / math.log(original))
    return 1.0


def _older_rope(kind: str, full: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers 4 and mlx-lm spell it."""
    theta, part = rope.get("rope_theta", 10000.0), rope.get("partial_rotary_factor")
    changes: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if rope["rope_type"] != "default":
        elsewhere = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in rope.items() if value is not None and key not in elsewhere}
        changes["rope_scaling"] = scaling | {"type": rope["rope_type"]}
    if kind in COMPARED and _is_yarn(rope):
        # mlx-lm has no attention_factor, but this makes it compute the same.
        mscale = (_strength(full, rope) - 1) / (0.1 * math.log(rope["factor"]))
        changes["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": 0}
    if part is not None:
        changes["partial_rotary_factor"] = part
    if kind == "gpt_neox":
        changes |= {"rotary_emb_base": theta, "rotary_pct": part}
    return changes


def _fields_of(name: str, raw: Mapping[str, Any]) -> dict[str, bool]:
    """What mlx-lm reads of this architecture's config, and whether it must be there. Asks for its private table."""
    if raw.get("model_file"):
        return {"rope_scaling": False}  # the model brings its own code; mlx-lm refuses it unless it is trusted
    try:
        _, arguments = _get_classes(dict(raw))
    except (ValueError, KeyError) as error:
        kind = raw.get("model_type", "unknown")
        raise ModelError(f"mlx-lm has no architecture {kind!r}, which {name} needs: use --backend torch") from error
    missing = dataclasses.MISSING
    return {
        field.name: field.default is missing and field.default_factory is missing
        for field in dataclasses.fields(arguments)
    }


def _transformers_config(folder: Path, raw: Mapping[str, Any], trust: Mapping[str, Any]) -> Any:
    """The config as transformers reads it; None for an architecture that only mlx-lm has."""
    try:
        return AutoConfig.from_pretrained(folder, **trust)
    except (ValueError, KeyError, OSError) as error:
        if "trust_remote_code" in str(error) or "auto_map" in raw:
            fetch(str(folder), "config", lambda: AutoConfig.from_pretrained(folder, **trust))
        return None


class _Fields:
    """A mapping read by attribute; what it lacks is None."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self._values.get(name)


def _window_not_kept(model: Any, full: Mapping[str, Any]) -> int | None:
    """The sliding window that the model was trained with, where mlx-lm's version of it attends to everything."""
    window, layers = full.get("sliding_window"), full.get("layer_types")
    if not window or full.get("use_sliding_window") is False or (layers and "sliding_attention" not in layers):
        return None
    kept = any("Rotating" in type(cache).__name__ for cache in make_prompt_cache(model))
    return None if kept else int(window)


def _set_dtype(model: Any, wanted: str, device: str) -> Any:
    """Put all weights into one precision."""
    dtype = _pick_dtype(wanted, device, lambda: _own_dtype(model))
    model.set_dtype(dtype)
    return dtype


def _pick_dtype(wanted: str, device: str, own: Callable[[], Any]) -> Any:
    """auto: float32 on the CPU, where half precision is far slower; the file's own on the GPU."""
    if wanted not in ("auto", *DTYPES):
        raise BackendError(f"there is no dtype {wanted!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[wanted] if wanted != "auto" else mx.float32 if device == "cpu" else own()


def _own_dtype(model: Any) -> Any:
    """The precision of most of a model's arrays."""
    floating = [value.dtype for _, value in tree_flatten(model.parameters()) if mx.issubdtype(value.dtype, mx.floating)]
    return max(set(floating), key=floating.count)


def _bits(model: Any, config: Mapping[str, Any], load_in_4bit: bool, dtype: Any) -> int:
    """Bits per weight of the linear layers; quantises a plain model if that was asked for."""
    quantized = config.get("quantization")
    bits = _bits_wanted(quantized, load_in_4bit, dtype)
    if load_in_4bit and not quantized:
        nn.quantize(model, bits=4, class_predicate=_four_bit)
    return bits


def _bits_wanted(quantized: Mapping[str, Any] | None, load_in_4bit: bool, dtype: Any) -> int:
    bits = int(quantized["bits"]) if quantized else 4 if load_in_4bit else int(dtype.size * 8)
    if load_in_4bit and bits != 4:
        raise BackendError(f"this model comes in {bits} bits: leave --load-in-4bit out, or take its plain version")
    return bits


def _read(model: Any) -> None:
    """Read the weights at last, one by one: a plain model that is quantised never lies in memory whole."""
    for _, value in tree_flatten(model.parameters()):
        mx.eval(value)


def _four_bit(_: str, module: Any) -> bool | dict[str, int]:
    """Groups of 64 weights share a scale, 32 where 64 does not divide a row; other layers stay as they are."""
    if not hasattr(module, "to_quantized"):
        return False
    for size in (64, 32):
        if module.weight.shape[-1] % size == 0:
            return {"group_size": size, "bits": 4}
    return False


class Net:
    """The forward pass in two halves, so that logits are made only where they are wanted.

    `hidden` gives what the head reads, [batch, time, width]; `head` turns any rows of it into float32 logits.
    A model whose logits are not its head of its body's output (checked once on a few tokens) is run whole:
    then "hidden" is already the logits and `head` changes nothing. `whole` says so.

    `shared` is the longest line on which a prompt may stand once for all its responses; `alone` says why it is 0.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.context, self.dtype = loaded.model, loaded.context, loaded.dtype
        text = loaded.config.get("text_config") or loaded.config
        self._multiply = float(text.get("logit_scale") or 1.0) / float(text.get("logits_scaling") or 1.0)
        self._cap = text.get("final_logit_softcapping")
        probe = mx.array([[1, 5, 2, 7, 3]])
        expected = self.model(probe).astype(mx.float32)
        self.vocab = int(expected.shape[-1])
        self.whole = False
        self.whole = not self._halves_agree(probe, expected)
        self._axes = 0
        self.shared, self.alone = self._sharing()
        self.width = int(text.get("hidden_size") or expected.shape[-1])
        self._breadth = get_total_parameters(self.model.layers[0]) / (2 * self.width * SCORE[device_in_use()])

    @property
    def linear(self) -> bool:
        """Whether logits are linear in what the head reads, up to a constant."""
        return not self.whole and self._cap is None

    def hidden(self, ids: mx.array, cache: Any = None) -> mx.array:
        """What the head reads, [batch, time, width], for ids [batch, time]. There is no mask: pad on the right."""
        return self.model(ids, cache=cache) if self.whole else self.model.model(ids, cache=cache)

    def states(self, lines: Sequence[mx.array], branching: bool) -> mx.array:
        """What the head reads at the places [N, width], for ids, positions, segments and places as in `Packed`."""
        ids, positions, segments, places = lines
        hidden = self.hidden(ids, views(self.model, self._axes, positions, segments) if branching else None)
        return hidden.reshape(-1, hidden.shape[-1])[places]

    def lines_for(self, rows: Sequence[Row]) -> int:
        """`shared` if these rows are less work with each prompt once, else 0: attention grows with a line's square."""
        return min((self.shared, 0), key=lambda shared: sum(self._work(row, shared) for row in rows))

    def _work(self, row: Row, shared: int) -> float:
        wide = width(row, shared)
        return lines(row, shared) * wide * (wide + self._breadth)

    def head(self, hidden: mx.array) -> mx.array:
        """Float32 logits [..., vocabulary] of rows of `hidden`."""
        if self.whole:
            return hidden.astype(mx.float32)
        tied = "lm_head" not in self.model
        logits = self.model.model.embed_tokens.as_linear(hidden) if tied else self.model.lm_head(hidden)
        logits = logits.astype(mx.float32)
        if self._multiply != 1.0:
            logits = logits * self._multiply
        if self._cap is not None:
            logits = mx.tanh(logits / self._cap) * self._cap
        return logits

    def _halves_agree(self, probe: mx.array, expected: mx.array) -> bool:
        try:
            mine = self.head(self.hidden(probe))
        except (AttributeError, TypeError, ValueError, KeyError):
            return False
        if mine.shape != expected.shape:
            return False
        # Loose on purpose: a head that leaves something out is off by far more than rounding.
        return bool(mx.abs(mine - expected).max() <= 1e-2 * mx.abs(expected).max())

    def _sharing(self) -> tuple[int, str]:
        """The longest line that may branch, or 0 and the reason: tried on three lines of which no two are alike."""
        rows = [
            Row(prompt=(1, 5, 2), responses=((7, 3, 4), (2, 6))),
            Row(prompt=(3, 2), responses=((5, 1, 4, 6, 2), (7, 3))),
            Row(prompt=(2,), responses=((6, 1), (3, 7, 5))),
        ]
        try:
            apart = self._packed_states(rows, 0)
            mx.eval(apart)
            with placed(self.model):
                for self._axes in AXES:
                    if self._near(lambda: self._packed_states(rows, 16), apart):
                        return longest_line(self.model, self.context), ""
                raise BackendError("mlx-lm's version of it follows no mask or no positions")
        except (BackendError, *UNLIKE) as error:
            return 0, " ".join(str(error).split())[:80]

    def _packed_states(self, rows: Sequence[Row], shared: int) -> mx.array:
        packed = pack(rows, shared)
        arrays = packed.ids, packed.positions, packed.segments, packed.places
        return self.states([mx.array(array) for array in arrays], packed.branching)

    def _near(self, compute: Callable[[], mx.array], expected: mx.array) -> bool:
        try:
            found = compute()
        except UNLIKE:
            return False
        loose = 1e-3 if self.dtype == mx.float32 else 0.05
        return bool(mx.abs(found - expected).max() <= loose * mx.abs(expected).max())
