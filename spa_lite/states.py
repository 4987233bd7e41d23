"""The sampler's hidden states on the disk, so that a training step which extrapolates needs no reference pass.

One raw file beside `samples.jsonl`: a header, and then, in the order of the samples and of their answers, what the
model's head read at each sampled token. Where an answer's states lie follows from the lengths of all answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from spa_lite import files
from spa_lite.backend import Backend
from spa_lite.errors import ModelError, RunError
from spa_lite.recipe import Recipe, for_round
from spa_lite.records import Ids, Sample
from spa_lite.shape import Shape

NAME = "states.bin"
HEADER = 64
"""Bytes before the first state; the header is JSON and spaces."""
States = NDArray[Any]
"""[tokens, width]. bfloat16, which NumPy lacks, as uint16."""


def wanted(recipe: Recipe, round_: int) -> bool:
    """Whether the states of a round are kept: only where its training extrapolates are they of use."""
    refined = recipe.noise.by == "quantile" and recipe.refine.alpha > 0
    return recipe.train.cache_reference and refined and for_round(recipe, round_) > 0


def cache_bytes(recipe: Recipe, shape: Shape | None, dtype: str, prompts: int, round_: int = 1) -> int:
    """The most bytes that the states of a round take, with every answer of full length; 0 if none are kept, or if the
    model's shape is not known. `dtype` is the backend's, such as `bfloat16`."""
    if shape is None or not wanted(recipe, round_):
        return 0
    tokens = prompts * recipe.sampling.n * recipe.sampling.max_tokens
    return HEADER + tokens * shape.hidden * int(dtype[-2:]) // 8


def room(recipe: Recipe, backend: Backend, prompts: int, round_: int, folder: Path) -> str:
    """A sentence about the size of the states that are about to be kept in a folder; nothing if it is not known.

    Raises RunError if the disk has less room than they may need.
    """
    try:
        shape = backend.shape
    except ModelError:
        shape = None
    need = cache_bytes(recipe, shape, str(backend.description["dtype"]), prompts, round_)
    if not need:
        return ""
    free = shutil.disk_usage(folder).free + files.size_of(folder / NAME)
    if need > free:
        raise RunError(
            f"the sampler's states of {prompts} prompts may take {_gb(need)} and the disk of {folder} has {_gb(free)} "
            "free; make room, or leave out --cache-reference"
        )
    return f"the sampler's states are kept in {NAME}: at most {_gb(need)} (--cache-reference)"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Writer:
    """Appends the states of chunks of samples to a file; a `Keep` for `Backend.sample`.

    States come in the order in which answers end and are written in that of the samples; only those that wait for an
    earlier answer are held. `done` are the samples that the file holds already: what lies behind theirs is cut off.
    """

    def __init__(self, path: Path, done: Iterable[Sample]) -> None:
        self.path = path
        width, dtype = _header(path) or (0, np.dtype(np.uint8))
        tokens = sum(len(ids) for sample in done for ids in _answers(sample))
        self._end = self._start = HEADER + tokens * width * dtype.itemsize if width else 0
        self.whole = tokens == 0 or (width > 0 and self._end <= files.size_of(path))
        self._answers = 1
        self._waiting: dict[tuple[int, int], bytes] = {}
        self._next = (0, 0)
        if self.whole:
            files.write(path, b"", at=self._end, durable=False)

    def begin(self, answers: int) -> None:
        """A chunk of samples with so many answers each begins, or begins again."""
        self._answers, self._next, self._end = answers, (0, 0), self._start
        self._waiting.clear()

    def __call__(self, index: int, number: int, states: States) -> None:
        """Keep the states of answer `number` to prompt `index` of the chunk."""
        if not self._end:
            self._write(_make_header(states))
            self._start = self._end
        self._waiting[index, number] = np.ascontiguousarray(states).tobytes()
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            index, number = self._next
            self._next = (index, number + 1) if number + 1 < self._answers else (index + 1, 0)
        if ready:
            self._write(b"".join(ready))

    def end(self) -> None:
        """The chunk is done: its states are on the disk when this returns, before its lines are."""
        assert not self._waiting, "a backend kept no states of an answer"
        self._write(b"", durable=True)
        self._start = self._end

    def _write(self, content: bytes, durable: bool = False) -> None:
        files.write(self.path, content, at=self._end, durable=durable)
        self._end += len(content)


class Reader:
    """The states of all answers to a round's samples, mapped from the disk. Raises RunError if the file is damaged."""

    def __init__(self, path: Path, samples: Iterable[Sample]) -> None:
        self._places: list[dict[Ids, slice]] = []
        tokens = 0
        for sample in samples:
            places: dict[Ids, slice] = {}
            for ids in _answers(sample):
                places[ids] = slice(tokens, tokens + len(ids))
                tokens += len(ids)
            self._places.append(places)
        width, dtype = _header(path) or (0, np.dtype(np.uint8))
        if files.size_of(path) != (HEADER + tokens * width * dtype.itemsize if width else 0) or (tokens and not width):
            raise RunError(f"{path} does not hold the states of its samples; delete it and run the same command again")
        flat: States = np.memmap(path, dtype, "r", HEADER) if tokens else np.zeros(0, dtype)
        self._states = flat.reshape(-1, max(1, width))

    def of(self, index: int, ids: Ids) -> States:
        """States [tokens, width] of an answer to the sample of that index. Answers of the same ids have the same."""
        return self._states[self._places[index][ids]]


def _answers(sample: Sample) -> Iterator[Ids]:
    return (completion.ids for completion in sample.completions)


def _make_header(states: States) -> bytes:
    told = msgspec.json.encode({"dtype": states.dtype.newbyteorder("<").str, "width": states.shape[1]})
    return told.ljust(HEADER - 1) + b"\n"


def _header(path: Path) -> tuple[int, np.dtype[Any]] | None:
    """Width and type of the states in a file; None if it has no header."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        start = file.read(HEADER)
    try:
        found = msgspec.json.decode(start) if len(start) == HEADER else None
        return (int(found["width"]), np.dtype(found["dtype"])) if found else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
