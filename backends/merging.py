"""An adapter merged into its base, in NumPy, and what of it survives the rounding.

A 16-bit weight has 8 or 11 significant bits, and an update by DPO is small: much of it can fall below half a step and
be rounded away. So whatever is merged is measured: the change that was wanted against the change that became real.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spa_lite.backends import adapter_files, weights
from spa_lite.backends.adapter_files import Stored
from spa_lite.backends.model_folder import INDEX
from spa_lite.backends.weights import Array, Weight
from spa_lite.errors import BackendMissing, ModelError

Dtype = Literal["float32", "bfloat16", "float16", "keep"]
Floats = NDArray[np.float32]

COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*")
"""What is copied beside the weights: tokenizer, template, generation config, a model's own code, its licence."""
NOT_COPIED = ("config.json", INDEX, adapter_files.CONFIG, "export.json")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TRANSPOSED = {("gpt2", name) for name in ("c_attn", "c_proj", "c_fc")}
"""GPT-2's Conv1D layers, which hold their weights [in, out]."""
CONTINUED = 0.5
"""Cosine of two adapters' A above which one went on from the other: independent ones have about 0."""
CODES = {2: 16, 4: 8, 8: 4}
"""Bits of an affine code, and how many codes MLX packs into 32 bits."""


@dataclass(frozen=True)
class Survival:
    """What became real of a wanted change, over all numbers that it touches.

    `share` is <real, wanted> / <wanted, wanted>: 1 if all of it arrived, 0 if it was rounded away. `cosine` falls, too,
    with everything else that rounding did.
    """

    share: float
    cosine: float


@dataclass(frozen=True)
class Merged:
    """What a merge did. `dtype` is that of the merged weights; `worst` is the module with the least surviving share."""

    dtype: str
    modules: int
    survived: Survival
    worst: str
    at_worst: Survival
    bytes: int


class Sums(NamedTuple):
    """<real, wanted>, <wanted, wanted> and <real, real> of a change."""

    both: float = 0.0
    wanted: float = 0.0
    real: float = 0.0

    def __add__(self, other: Any) -> Sums:
        return Sums(self.both + other.both, self.wanted + other.wanted, self.real + other.real)

    def survival(self) -> Survival:
        """Of a change that is nothing, all survives, if nothing became real."""
        if not self.wanted:
            return Survival(1.0, 0.0 if self.real else 1.0)
        product = math.sqrt(self.wanted) * math.sqrt(self.real)
        return Survival(self.both / self.wanted, self.both / product if product else 0.0)


def sums(real: Array, wanted: Array) -> Sums:
    """The sums of two arrays of one shape, in float64."""
    a, b = real.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    return Sums(float(a @ b), float(b @ b), float(a @ a))


def merge(model: Path, stored: Stored, out: Path, dtype: Dtype = "keep", under: Sequence[Stored] = ()) -> Merged:
    """Write base + adapter as a plain model folder `out`, shard by shard as the base has them.

    Each weight is float32(W) + sum of scale · B A, in float32, rounded once to `dtype` (`keep`: the base's own). A base
    in MLX's affine 2, 4 or 8 bits is dequantised first.

    `under` are adapters that work on the base *beside* this one. A policy of ours is not so: it began as a copy of
    pi_init (`--init-adapter`) and contains it, so it is merged alone, and an adapter that it continues is refused here.

    Raises ModelError where the adapter does not fit, the base cannot be read, or numbers do not fit into `dtype`.
    """
    config = weights.read_json(model / "config.json")
    updates = _updates([stored, *under])
    files = {path.name: weights.read(path) for path in weights.files_of(model)}
    base = _dequantised(model, config, {name: weight for held in files.values() for name, weight in held.items()})
    own_head = HEAD in base or EMBEDDING not in base  # transformers reads it even if the config says that it is tied
    if not own_head:
        base[HEAD] = base[EMBEDDING]
    changes = _placed(stored.name, model, config, base, updates)
    if not own_head and HEAD not in changes:
        del base[HEAD]
    if out.resolve() == model.resolve():
        raise ModelError(f"{model} would be written over itself: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    taken = {name: _dtype(weight, dtype) for name, weight in base.items()}
    shards = {file: [name for name in held if name in base] for file, held in files.items()}
    shards[next(iter(shards))] += [name for name in base if not any(name in held for held in files.values())]
    found: dict[str, Sums] = dict.fromkeys(changes, Sums())

    def pieces(name: str) -> Iterator[Array]:
        weight, change = base[name], changes.get(name)
        for piece in weight.pieces():
            before = weight.rows(piece)
            wanted = change(piece) if change else None
            after = before if wanted is None else before + wanted
            written = weights.fits(name, after, weights.rounded(after, taken[name]), taken[name])
            if wanted is not None:
                found[name] += sums(weights.as_float32(written, taken[name]) - before, wanted)
            yield written

    size = 0
    for file, names in shards.items():
        plan = {name: (taken[name], base[name].shape) for name in names}
        size += weights.write(out / file, plan, pieces)
    _write_rest(model, out, config, shards, size, dtype, HEAD in changes)
    worst = min(found, key=lambda name: found[name].survival().share)
    return Merged(
        dtype="/".join(sorted({weights.WORDS[taken[name]] for name in changes})),
        modules=len(changes),
        survived=_total(found).survival(),
        worst=worst.removesuffix(".weight"),
        at_worst=found[worst].survival(),
        bytes=size,
    )


def _total(found: Mapping[str, Sums]) -> Sums:
    return sum(found.values(), start=Sums())


# The adapters


def _updates(adapters: Sequence[Stored]) -> dict[str, list[tuple[Floats, Floats]]]:
    """Module -> pairs (scale · B, A) whose products are to be added up."""
    found: dict[str, list[tuple[Floats, Floats]]] = {}
    for one, other in itertools.combinations(adapters, 2):
        _check_apart(one, other)
    for stored in adapters:
        adapter_files.check_plain(stored, "a merged model")
        scale = np.float32(adapter_files.scale_of(stored.config))
        for module, (a, b) in adapter_files.modules(stored).items():
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ModelError(f"{stored.name} has numbers in {module} that are not finite: train or save it again")
            pair = (scale * np.asarray(b, dtype=np.float32), np.asarray(a, dtype=np.float32))
            found.setdefault(module, []).append(pair)
    return found


def _check_apart(one: Stored, other: Stored) -> None:
    """Refuse two adapters of which one went on from the other: it holds it, and both together would count it twice."""
    a, b = adapter_files.modules(one), adapter_files.modules(other)
    shared = [name for name in a if name in b and a[name][0].shape == b[name][0].shape]
    total = _total({name: sums(a[name][0], b[name][0]) for name in shared})
    if shared and total.survival().cosine > CONTINUED:
        raise ModelError(
            f"{one.name} and {other.name} are one adapter at two times (their A point the same way), and the later one"
            " contains the earlier: merge the later one alone"
        )


def _placed(
    adapter: str,
    model: Path,
    config: Mapping[str, Any],
    base: Mapping[str, Weight],
    updates: Mapping[str, list[tuple[Floats, Floats]]],
) -> dict[str, Callable[[slice], Floats]]:
    """Tensor name -> what is added to some of its rows. Raises ModelError if the adapter does not fit the base."""
    found: dict[str, Callable[[slice], Floats]] = {}
    for module, pairs in updates.items():
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")  # some folders leave "transformer." out
        name = next((name for name in names if name in base), None)
        if name is None:
            raise ModelError(f"{adapter} does not fit {model}: it adapts {module}, which the base does not have")
        if (config.get("model_type"), module.rpartition(".")[2]) in TRANSPOSED:
            pairs = [(a.T, b.T) for b, a in pairs]
        shape = base[name].shape
        for left, right in pairs:
            if (left.shape[0], right.shape[1]) != shape:
                wanted = [left.shape[0], right.shape[1]]
                raise ModelError(f"{adapter} does not fit {model}: its {module} is {wanted}, the base's {list(shape)}")
        found[name] = lambda piece, pairs=pairs: sum(left[piece] @ right for left, right in pairs)  # type: ignore[misc]
    return found


# The base


def _dequantised(model: Path, config: Mapping[str, Any], base: dict[str, Weight]) -> dict[str, Weight]:
    """The base in numbers: MLX's affine codes are multiplied out, everything else that is no float is refused."""
    other = config.get("quantization_config")
    how = config.get("quantization")
    if other and other != how:
        method = other.get("quant_method", "some way") if isinstance(other, dict) else "some way"
        raise ModelError(f"{model} is quantised by {method}: give --model the same model in 16 or 32 bits")
    coded = [name for name in base if f"{name.removesuffix('.weight')}.scales" in base and name.endswith(".weight")]
    if not coded:
        return base
    if not isinstance(how, dict):
        raise ModelError(f"{model} has quantised weights, but its config.json does not say how: download it again")
    found = dict(base)
    for name in coded:
        module = name.removesuffix(".weight")
        parts = [found.pop(key) for key in (name, f"{module}.scales", f"{module}.biases") if key in found]
        own = how.get(module)
        found[name] = _affine(model, module, parts, {**how, **(own if isinstance(own, dict) else {})})
    return {name: found[name] for name in base if name in found}


def _affine(model: Path, module: str, parts: Sequence[Weight], how: Mapping[str, Any]) -> Weight:
    """MLX's affine codes as numbers: each group of `group_size` codes in a row has a scale and a bias."""
    bits, group = how.get("bits", 4), how.get("group_size", 64)
    if how.get("mode", "affine") != "affine" or bits not in CODES:
        raise ModelError(
            f"{model} holds {module} in {bits} bits ({how.get('mode', 'affine')}); only MLX's affine 2, 4 and 8 bits"
            " are read here: give --model the same model in 16 or 32 bits"
        )
    if len(parts) < 3:
        raise ModelError(f"{model} lacks {module}.biases, which its codes need: download it again")
    codes, scales, biases = parts
    shape = (*codes.shape[:-1], codes.shape[-1] * CODES[bits])
    shifts = np.arange(CODES[bits], dtype=np.uint32) * np.uint32(bits)

    def rows(piece: slice) -> Floats:
        numbers = (codes.rows(piece)[..., None] >> shifts) & np.uint32(2**bits - 1)
        grouped = numbers.astype(np.float32).reshape(*numbers.shape[:-2], -1, group)
        whole = grouped * scales.rows(piece)[..., None] + biases.rows(piece)[..., None]
        return whole.reshape(*numbers.shape[:-2], -1)

    return Weight(shape, scales.dtype, rows)


def _dtype(weight: Weight, wanted: Dtype) -> str:
    """In which of safetensors' dtypes a weight is written."""
    if wanted == "keep" or weight.dtype not in weights.FLOATING:
        return weight.dtype
    return next(name for name, word in weights.WORDS.items() if word == wanted)


# What lies beside the weights


def _write_rest(
    model: Path,
    out: Path,
    config: dict[str, Any],
    shards: Mapping[str, Sequence[str]],
    size: int,
    dtype: Dtype,
    untied: bool,
) -> None:
    """Config, index and copies of everything else that makes a model folder."""
    config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    config = _older_rope(config) | config
    if dtype != "keep":
        config |= {"dtype": dtype, "torch_dtype": dtype}
    if untied:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (model / INDEX).is_file():
        places = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in sorted({path for pattern in COPIED for path in model.glob(pattern)}):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, out / path.name)


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers 4 and mlx-lm spell it: mlx-lm falls back to theta 10000 without."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return theta if rope["rope_type"] == "default" else {**theta, "rope_scaling": scaling}


# 4 bits, with MLX

GROUP, BITS = 64, 4


def survival_in_4bit(base: Path, merged: Path) -> Survival:
    """What of the change from base to merged is left when both are in MLX's 4 bits.

    Wanted is W_merged - W_base; real is Q(W_merged) - Q(W_base), where Q rounds to 4 bits and back: the base in 4 bits
    is what would run otherwise. Raises BackendMissing where MLX is not installed.
    """
    mx = _mlx()
    config, theirs = weights.read_json(base / "config.json"), _all(base)
    before, after = _dequantised(base, config, theirs), _all(merged)
    found = Sums()
    for name, weight in after.items():
        if len(weight.shape) != 2 or weight.shape[1] % GROUP or weight.dtype not in weights.FLOATING:
            continue
        for piece in weight.pieces():
            one, other = before[name if name in before else EMBEDDING].rows(piece), weight.rows(piece)
            if not np.array_equal(one, other):
                real = _in_4bit(mx, other) - _in_4bit(mx, one)
                found += sums(real, other - one)
    return found.survival()


def to_4bit(merged: Path, out: Path) -> None:
    """Write a merged folder in MLX's 4 bits, as `mlx_lm.convert` does. `out` must not exist yet."""
    _mlx()
    from mlx_lm import convert

    from spa_lite.backends.quiet import quiet

    try:
        with quiet(), redirect_stdout(StringIO()):
            convert(str(merged), str(out), quantize=True, q_group_size=GROUP, q_bits=BITS)
    except Exception as error:  # an architecture that mlx-lm lacks, or a folder that it does not like
        raise ModelError(f"mlx-lm cannot write {merged} in 4 bits: {adapter_files.first_line(error)}") from error


def _mlx() -> Any:
    try:
        import mlx.core as mx
        import mlx_lm  # noqa: F401
    except ImportError:
        lacks = "4 bits are written by mlx-lm, which is not installed: pip install 'spa-lite[mlx]'"
        raise BackendMissing(lacks) from None
    return mx


def _all(folder: Path) -> dict[str, Weight]:
    return {name: weight for path in weights.files_of(folder) for name, weight in weights.read(path).items()}


def _in_4bit(mx: Any, rows: Floats) -> Floats:
    """Rows rounded to 4 bits and back."""
    codes = mx.quantize(mx.array(rows), group_size=GROUP, bits=BITS)
    return np.array(mx.dequantize(*codes, group_size=GROUP, bits=BITS), dtype=np.float32)
