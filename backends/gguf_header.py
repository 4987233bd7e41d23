"""What a GGUF file says of itself: its settings and the table of its tensors. No weights are read.

gguf's own reader makes an array of every token and merge, which takes 19 s for a vocabulary of 147,000.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spa_lite.errors import ModelError

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""GGUF's types of values, as NumPy names them."""
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One entry of the table."""

    kind: str  # F32, F16, Q8_0, ...
    shape: tuple[int, ...]  # as NumPy has it: [outputs, inputs] of a matrix


@dataclass(frozen=True)
class Header:
    """Settings by key, and tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model."""
        return str(self.values.get("general.architecture", "unknown"))

    def setting(self, name: str) -> Any:
        """A setting of the architecture, such as `block_count`; None if the file has none."""
        return self.values.get(f"{self.architecture}.{name}")

    def token(self, name: str) -> Any:
        """A setting of the tokenizer, such as `eos_token_id`; None if the file has none."""
        return self.values.get(f"tokenizer.ggml.{name}")

    @cached_property
    def kind(self) -> str:
        """What most of the matrices' numbers are: F32, F16, Q8_0, ..."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                counts[tensor.kind] = counts.get(tensor.kind, 0) + int(np.prod(tensor.shape))
        return max(counts, key=lambda kind: counts[kind], default="F32")

    @property
    def bits(self) -> int:
        """Bits of one of these numbers, rounded."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return round(8 * size / block)

    @property
    def config(self) -> dict[str, Any]:
        """The sizes under transformers' names, as `spa_lite.shape` reads them."""
        names = {
            "num_hidden_layers": "block_count",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "max_position_embeddings": "context_length",
            "num_experts": "expert_count",
        }
        found = {theirs: self.setting(ours) for theirs, ours in names.items() if self.setting(ours) is not None}
        vocabulary = len(self.token("tokens") or ()) or self.setting("vocab_size")
        tied = "output.weight" not in self.tensors
        return found | {"model_type": self.architecture, "vocab_size": vocabulary, "tie_word_embeddings": tied}


def read_header(path: Path) -> Header:
    """Read settings and table. Raises ModelError unless the file is a GGUF file, and whole."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it does not begin as one")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).header()
        except (struct.error, ValueError, KeyError, IndexError, MemoryError, OverflowError) as error:
            raise ModelError(f"{path} is damaged or cut short ({error}): download or write it again") from error


class _Reader:
    """A place in a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def header(self) -> Header:
        version = self.number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are known")
        tensors, settings = self.number("<Q"), self.number("<Q")
        values = {}
        for _ in range(settings):
            key = self.text()
            values[key] = self.value(self.number("<I"))
        table = {}
        ends = [0]
        for _ in range(tensors):
            name, tensor, end = self.tensor()
            table[name] = tensor
            ends.append(end)
        space = int(values.get("general.alignment", 32))
        begins = -(-self.at // space) * space
        if tensors and begins + max(ends) > len(self.data):
            raise ValueError(f"{begins + max(ends) - len(self.data)} bytes are missing")
        return Header(values, table)

    def number(self, form: str) -> int:
        (found,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(found)

    def text(self) -> str:
        size = self.number("<Q")
        if size > len(self.data) - self.at:
            raise ValueError("a text runs beyond the end")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            of, size = self.number("<I"), self.number("<Q")
            return [self.text() for _ in range(size)] if of == STRING else self.numbers(of, size)
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: int, size: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        if size > len(self.data) // dtype.itemsize:
            raise ValueError("an array runs beyond the end")
        found = np.frombuffer(self.data[self.at : self.at + size * dtype.itemsize], dtype, size).tolist()
        self.at += size * dtype.itemsize
        return list(found)

    def tensor(self) -> tuple[str, Tensor, int]:
        """Name, entry, and the first byte after its numbers, counted from the begin of all."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text()
        shape = tuple(self.number("<Q") for _ in range(self.number("<I")))
        kind, offset = GGMLQuantizationType(self.number("<I")), self.number("<Q")
        block, size = GGML_QUANT_SIZES[kind]
        return name, Tensor(kind.name, shape[::-1]), offset + int(np.prod(shape, dtype=object)) // block * size
