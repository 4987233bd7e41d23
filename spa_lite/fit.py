"""Batch sizes that fit: halved where memory runs out, and remembered in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from spa_lite.backend import Backend, Batching
from spa_lite.errors import ModelError, OutOfMemory, RunError
from spa_lite.estimate import Longest, micro_batch
from spa_lite.files import read_json, write_json
from spa_lite.recipe import Recipe

T = TypeVar("T")
Size = Literal["sample", "score", "micro"]
NAME = "batching.json"


def batching_of(recipe: Recipe, micro: int | None = None) -> Batching:
    """The batch sizes that a recipe asks for. `micro` is for one that leaves the micro-batch open."""
    b = recipe.batching
    return Batching(b.sample, b.score, b.micro or micro or Batching.micro, b.gradient_checkpointing)


def micro_that_fits(recipe: Recipe, backend: Backend, longest: Longest) -> int:
    """Pairs per forward of a training step that fit into the memory that is free now, by estimate.

    The usual number where a backend needs no memory to speak of, or its model's config does not say how large it is.
    """
    free, used = backend.free_memory(), backend.description
    try:
        shape = backend.shape
    except ModelError:
        shape = None
    if shape is None or free is None:
        return Batching.micro
    return micro_batch(
        shape,
        recipe,
        free,
        backend=backend.name,
        device=str(used["device"]),
        dtype=str(used["dtype"]),
        bits=int(used["bits"]),
        longest=longest,
        loaded=True,
    )


def halving(backend: Backend, size: Size, work: Callable[[], T]) -> T:
    """Do work. Where memory runs out, halve that batch size of the backend, for good, and do it again.

    Raises OutOfMemory if even one at a time does not fit.
    """
    while True:
        try:
            return work()
        except OutOfMemory:
            now = getattr(backend.batching, size)
            if now == 1:
                raise
            backend.batching = replace(backend.batching, **{size: now // 2})


class Stored(msgspec.Struct):
    """`batching.json`."""

    asked: dict[str, Any] = {}
    used: Batching | None = None


class Remembered:
    """The batch sizes of a run: as the recipe asks, unless memory taught better. A new wish of the user's wins."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = folder / NAME, asked
        self.used: dict[str, Any] = {}
        try:
            stored = msgspec.convert(read_json(self.path), Stored) if self.path.exists() else Stored()
        except (RunError, msgspec.ValidationError):
            stored = Stored()
        if stored.used and stored.asked == asked:
            self.used = asdict(stored.used)

    def apply(self, recipe: Recipe, micro: Callable[[], int]) -> Batching:
        """The batch sizes to use: what is remembered, else what the recipe asks for, else `micro`."""
        if self.used:
            return msgspec.convert(self.used, Batching)
        return batching_of(recipe, None if recipe.batching.micro else micro())

    def notice(self, sizes: Batching) -> str:
        """Write down sizes that changed. Returns a sentence about them, or nothing."""
        if self.used == asdict(sizes):
            return ""
        before, self.used = self.used, asdict(sizes)
        write_json(self.path, {"asked": self.asked, "used": self.used})
        less = [f"{name} {before[name]} -> {n}" for name, n in self.used.items() if before and before[name] != n]
        return f"memory ran out, so batches are smaller from here on: {', '.join(less)}" if less else ""
