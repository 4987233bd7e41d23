"""Batch sizes that fit: halved where memory runs out, and remembered in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from spa_lite.backend import Backend, Batching
from spa_lite.errors import OutOfMemory, RunError
from spa_lite.files import read_json, write_json
from spa_lite.recipe import Recipe

T = TypeVar("T")
Size = Literal["sample", "score", "micro"]
NAME = "batching.json"


def batching_of(recipe: Recipe) -> Batching:
    """The batch sizes that a recipe asks for."""
    b = recipe.batching
    return Batching(b.sample, b.score, b.micro, b.gradient_checkpointing)


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


class Remembered:
    """The batch sizes of a run: as the recipe asks, unless memory taught better. A new wish of the user's wins."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = folder / NAME, asked
        self.used: dict[str, Any] = {}
        try:
            stored = read_json(self.path) if self.path.exists() else {}
        except RunError:
            stored = {}
        if stored.get("asked") == asked:
            self.used = stored["used"]

    def apply(self, sizes: Batching) -> Batching:
        """Batch sizes with what is remembered in their place."""
        return replace(sizes, **{name: value for name, value in self.used.items() if hasattr(sizes, name)})

    def notice(self, sizes: Batching) -> str:
        """Write down sizes that changed. Returns a sentence about them, or nothing."""
        if self.used == asdict(sizes):
            return ""
        before, self.used = self.used, asdict(sizes)
        write_json(self.path, {"asked": self.asked, "used": self.used})
        less = [f"{name} {before[name]} -> {n}" for name, n in self.used.items() if before and before[name] != n]
        return f"memory ran out, so batches are smaller from here on: {', '.join(less)}" if less else ""
