"""Finished stages of the runs at hand, by key: what any run has computed, no other one computes again.

The run folders themselves are the library. A stage is found by its marker, and its files are shared into the run that
needs them, so that every run folder stays whole.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from spa_lite.errors import RunError
from spa_lite.files import read_json

MARKERS = ("init/*.done.json", "rounds/*/*.done.json")
RUNS = ("*", "*/cells/*")
"""Where runs lie below a folder of runs: by themselves, or as cells of a study."""


def numerics(made_by: Mapping[str, Any]) -> str:
    """What arithmetic a result comes from: `torch/cpu/float32/32`. Other batch shapes differ by rounding only."""
    device = str(made_by.get("device", "")).partition(":")[0]
    return "/".join(
        [str(made_by.get("backend", "")), device, str(made_by.get("dtype", "")), str(made_by.get("bits", ""))]
    )


class Done(msgspec.Struct):
    """What a marker must hold to be believed."""

    key: str
    made_by: dict[str, Any]
    checksums: dict[str, str]
    summary: dict[str, Any]
    reads: dict[str, str]
    inputs: dict[str, str] = {}
    settings: dict[str, Any] = {}
    size: int = 0

    @property
    def stays_inside(self) -> bool:
        """Whether it names files of its own folder only: a run folder may come from anywhere."""
        paths = [PurePosixPath(name) for name in self.checksums]
        return not any(path.is_absolute() or ".." in path.parts for path in paths)


def read_marker(marker: Path) -> dict[str, Any] | None:
    """What a marker says; None if it is damaged, or names files outside its folder."""
    try:
        done = read_json(marker)
        return dict(done) if msgspec.convert(done, Done).stays_inside else None
    except (RunError, OSError, msgspec.ValidationError):
        return None


@dataclass(frozen=True)
class Book:
    """A finished stage: the run it belongs to, its folder, its kind and its marker."""

    run: Path
    folder: Path
    kind: str
    done: dict[str, Any]

    @property
    def title(self) -> str:
        """Name for people: `rounds/1 train`."""
        return f"{self.folder.relative_to(self.run).as_posix()} {self.kind}"

    @cached_property
    def spent(self) -> dict[str, float] | None:
        """Seconds and CPU seconds it took; None where it was not computed but taken from elsewhere."""
        path = self.folder / "timings.json"
        try:
            return dict(read_json(path)).get(self.kind) if path.exists() else None
        except RunError:
            return None


class Library:
    """All finished stages below some folders of runs. Read once; a run adds what it finishes."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.books: dict[tuple[str, str], Book] = {}
        for root in dict.fromkeys(root.resolve() for root in roots if root.is_dir()):
            for run in runs_in(root):
                for marker in markers_of(run):
                    self.add(run, marker)

    def add(self, run: Path, marker: Path) -> None:
        """Note a finished stage. One that was computed on two machines, or cannot be read, is left out."""
        book = read_book(run, marker)
        if book and not book.done.get("begun_by"):
            place = (book.done["key"], numerics(book.done["made_by"]))
            if place not in self.books or self.books[place].spent is None:
                self.books[place] = book

    def pace(self, kind: str, model: str, made_by: Mapping[str, Any]) -> float | None:
        """Seconds per prompt or pair that stages of this kind took with this model, as measured; None if none was."""
        like = [
            book.spent["seconds"] / book.done["size"]
            for (_, arithmetic), book in self.books.items()
            if book.kind == kind
            and arithmetic == numerics(made_by)
            and book.done.get("inputs", {}).get("model") == model
            and book.done.get("size")
            and book.spent
        ]
        return statistics.median(like) if like else None

    def find(self, key: str, made_by: Mapping[str, Any]) -> Book | None:
        """The stage of that key, computed with the arithmetic of `made_by`."""
        book = self.books.get((key, numerics(made_by)))
        return book if book and book.folder.exists() else None


def runs_in(root: Path) -> Iterator[Path]:
    """Run folders below a folder of runs that belong to this user: a stranger's results are not taken for one's own."""
    for pattern in RUNS:
        for head in sorted(root.glob(f"{pattern}/run.json")):
            with suppress(FileNotFoundError):  # somebody removed it just now
                if head.stat().st_uid == os.getuid():
                    yield head.parent


def markers_of(run: Path) -> Iterator[Path]:
    """Markers of a run's finished stages."""
    for pattern in MARKERS:
        yield from sorted(run.glob(pattern))


def read_book(run: Path, marker: Path) -> Book | None:
    """A finished stage; None if its marker cannot be read."""
    done = read_marker(marker)
    if done is None:
        return None
    return Book(run, marker.parent, marker.name.removesuffix(".done.json"), done)
