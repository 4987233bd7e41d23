"""The weights of a model folder read and written piece by piece in NumPy, so that a large model needs little memory.

NumPy has no bfloat16: its numbers are the upper halves of float32's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_lite.backends.model_folder import INDEX, weights_in
from spa_lite.errors import ModelError

Array = NDArray[Any]

FLOATING = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
WHOLE = {"BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""safetensors' names of dtypes, and what configs call them."""
PIECE = 2**24
"""Numbers that are worked on at a time."""


@dataclass(frozen=True)
class Weight:
    """A stored tensor: `rows(piece)` reads some of its rows, floating ones of any dtype as float32."""

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[slice], Array]

    def pieces(self) -> Iterator[slice]:
        """Rows that are read together, from first to last."""
        height = self.shape[0] if self.shape else 1
        step = max(1, PIECE * height // max(1, math.prod(self.shape)))
        return (slice(start, min(start + step, height)) for start in range(0, height, step))

    def whole(self) -> Array:
        """All of it."""
        return self.rows(slice(None)).reshape(self.shape)


def files_of(folder: Path) -> list[Path]:
    """The weight files of a model folder. Raises ModelError if there are none, or if one that the index names lacks."""
    found = weights_in(folder)
    if not found:
        raise ModelError(f"{folder} lacks weights (*.safetensors, all that {INDEX} names): download or save it again")
    if (folder / INDEX).is_file():
        named = set(read_json(folder / INDEX)["weight_map"].values())
        return [path for path in found if path.name in named]
    return [path for path in found if path.name == "model.safetensors"] or found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} is no whole model folder: it has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): download or save it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def read(path: Path) -> dict[str, Weight]:
    """The tensors of a safetensors file by name, as they lie there. Numbers are read when they are asked for."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length if length <= path.stat().st_size else 0))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        return {name: _weight(path, 8 + length, name, entry) for name, entry in ordered}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{path} is damaged ({str(error)[:200]}): download or save it again") from error


def _weight(path: Path, start: int, name: str, entry: Mapping[str, Any]) -> Weight:
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    kind = FLOATING.get(dtype) or WHOLE.get(dtype)
    if kind is None:
        raise ModelError(f"{path} holds {name} as {dtype}, which is not read here: save the model in 16 or 32 bits")
    if math.prod(shape) * np.dtype(kind).itemsize != last - first or start + last > path.stat().st_size:
        raise ModelError(f"{path} is damaged ({name} is cut short): download or save it again")

    def rows(piece: slice) -> Array:
        if not last - first:
            return np.zeros(shape, dtype=np.float32)
        stored = np.memmap(path, dtype=kind, mode="r", offset=start + first, shape=shape or (1,))[piece]
        return as_float32(stored, dtype) if dtype in FLOATING else np.array(stored)

    return Weight(shape, dtype, rows)


def as_float32(stored: Array, dtype: str) -> NDArray[np.float32]:
    """Stored numbers as float32: exactly, but for float64."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """Float32 numbers as they are stored in that dtype: to the nearest, ties to even. Others stay as they are."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
    if dtype in FLOATING:
        with np.errstate(over="ignore"):
            return values.astype(FLOATING[dtype])
    return values


def fits(name: str, before: Array, after: Array, dtype: str) -> Array:
    """`after`, which is `before` stored in that dtype; ModelError if numbers became too large for it."""
    if dtype in FLOATING and not np.array_equal(np.isfinite(as_float32(after, dtype)), np.isfinite(before)):
        raise ModelError(f"{name} has numbers too large for {WORDS[dtype]}: take bfloat16 or float32")
    return after


def write(path: Path, plan: Mapping[str, tuple[str, tuple[int, ...]]], pieces: Callable[[str], Iterable[Array]]) -> int:
    """Write a safetensors file: `plan` says dtype and shape of each tensor, `pieces` its rows. Returns their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in plan.items():
        size = math.prod(shape) * np.dtype(FLOATING.get(dtype) or WHOLE[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    start = json.dumps(header, separators=(",", ":")).encode()
    start += b" " * (-len(start) % 8)
    with path.open("wb") as file:
        file.write(len(start).to_bytes(8, "little") + start)
        for name in plan:
            for piece in pieces(name):
                file.write(np.ascontiguousarray(piece).data)
    return at
