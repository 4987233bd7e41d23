"""Removing runs, and cleaning up what nobody needs any more: leftovers of interrupted work, and copies of one result.

A run that somebody works on is never touched, and nothing that spa-lite did not write is deleted.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_lite import files, lock
from spa_lite.checkpoint import KEPT
from spa_lite.errors import RunError
from spa_lite.inventory import (
    STUDY,
    Id,
    Part,
    Place,
    Reading,
    Size,
    checkpoints,
    places,
    read,
    runs_of,
    size_of,
    user_of,
    walk,
)
from spa_lite.library import Book, numerics
from spa_lite.store import HEAD

PLOTS = ("cells", "grid", "rounds")
TRACKED = ("tensorboard", "wandb", "trackio", "tracker-id")
WRITTEN = {
    "run": ("init", "rounds", "adapter", "summary.json", "timings.json", "batching.json", "recipe.yaml",
            "report", "eval", "compare", *TRACKED, ".writable", ".*.tmp", lock.NAME, HEAD),
    "study": ("cells", "results.csv", "results.json", "results.md",
              *(f"{name}.{kind}" for name in PLOTS for kind in ("svg", "png")), "report", *TRACKED, ".*.tmp",
              lock.NAME, STUDY),
}  # fmt: skip
"""What spa-lite writes into a folder, in the order it is removed: what makes it a run or a study goes last."""
YOUNG = 24 * 3600.0
"""Seconds. Nothing says whether the folder that `spa-lite train` works in is in use; one that is older is not."""


def belongings(place: Place) -> list[Path]:
    """All that spa-lite wrote into a run or a study, what makes it one last. Other files in there are not named."""
    inner = [path for cell in place.cells for path in belongings(cell)]
    own = [path for pattern in WRITTEN[place.kind] for path in sorted(place.folder.glob(pattern))]
    return inner + [path for path in own if path.name != "cells"]


def remove(place: Place) -> list[str]:
    """Delete what spa-lite wrote into a run or a study. Returns the names of files of others, which stay.

    Raises RunError if somebody works on it, if it is a link, or if a file cannot be deleted.
    """
    for one in (place, *place.cells):
        if one.folder.is_symlink():
            where = one.folder.resolve()
            raise RunError(f"{one.name} is a link to {where}; name that folder, or delete the link yourself")
    for cell in place.cells:
        remove(cell)
    try:
        with lock.locked(place.folder):
            for path in belongings(Place(place.name, place.folder, place.kind)):
                delete(path)
        for folder in (place.folder / "cells", place.folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise RunError(
            f"cannot delete {error.filename or place.folder}: {error.strerror}; fix the permission and run the same "
            "command again"
        ) from None
    left = [path for path, _ in walk(place.folder)] if place.folder.exists() else []
    return sorted({path.relative_to(place.folder).as_posix() for path in left})


def delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- what nobody needs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leftover:
    """Something that is of no use any more. `run` is None where it lies in no run."""

    path: Path
    why: str
    run: Place | None
    size: Size

    @property
    def bytes(self) -> int:
        """What is freed with it."""
        return self.size.own


@dataclass(frozen=True)
class Duplicate:
    """A finished stage whose files are copies of those of the same stage elsewhere. `links`: (file to keep, copy)."""

    title: str
    run: Place
    like: str
    bytes: int
    links: tuple[tuple[File, File], ...]


@dataclass(frozen=True)
class File:
    """A file and what it was when it was read."""

    path: Path
    run: Place
    title: str
    status: os.stat_result

    @property
    def inode(self) -> tuple[int, int]:
        """Two names with the same one are the same file."""
        return self.status.st_dev, self.status.st_ino

    def unchanged(self, now: os.stat_result) -> bool:
        """Whether this still is the file that was read."""
        same = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        return all(getattr(now, name) == getattr(self.status, name) for name in same)


@dataclass(frozen=True)
class Rubbish:
    """All that nobody needs below a root, and (name, why) of the runs that were left alone."""

    leftovers: list[Leftover]
    duplicates: list[Duplicate]
    skipped: list[tuple[str, str]]

    @property
    def bytes(self) -> int:
        """What is freed if all of it goes."""
        return sum(item.bytes for item in self.leftovers) + sum(item.bytes for item in self.duplicates)


def rubbish(root: Path, now: float | None = None) -> Rubbish:
    """Look for what nobody needs. Runs in use, of other versions, of other users or with a damaged head are skipped.

    Files that may be duplicates are read whole and compared with the checksums of their stages.
    """
    usable, skipped = [], []
    for place in runs_of(places(root)):
        reading = read(place)
        why = _untouchable(reading)
        if why:
            skipped.append((place.name, why))
        else:
            usable.append(reading)
    finished = {
        i: reading.place.name for reading in usable for i, title in reading.ids.items() if _whole(reading, title)
    }
    found = [item for reading in usable for item in leftovers(reading, finished)]
    found += abandoned(root, time.time() if now is None else now)
    return Rubbish(found, duplicates(usable), skipped)


def _untouchable(reading: Reading) -> str:
    place = reading.place
    if reading.version:
        return "has another format"
    if hasattr(os, "getuid") and place.folder.stat().st_uid != os.getuid():
        return "belongs to another user"
    if reading.headless:
        return f"{HEAD} is damaged"
    if place.folder.is_symlink():
        return "is a link"
    if not os.access(place.folder, os.W_OK):
        return "cannot be written to"
    who = user_of(place)
    return f"is in use by {who}" if who else ""


def _whole(reading: Reading, title: str) -> bool:
    """Whether another run may take the stage: computed in one go, and all its files are there."""
    book = reading.books[title]
    return not book.done.get("begun_by") and all((book.folder / name).is_file() for name in book.done["checksums"])


def leftovers(reading: Reading, finished: Mapping[Id, str]) -> list[Leftover]:
    """What interrupted and repaired work left in a run. `finished`: where the finished stages of all runs are."""
    folder = reading.place.folder
    found = {part.folder: why for part in reading.parts.values() if (why := _useless(reading, part, finished))}
    for part in reading.parts.values():
        found |= dict.fromkeys(part.folder.glob("checkpoints/.new"), "a checkpoint that was never whole")
        found |= dict.fromkeys(checkpoints(part.folder)[:-KEPT], f"older than the last {KEPT} checkpoints")
    inside = [folder / name for name in ("init", "rounds", "adapter")]
    below = [path for top in inside if not top.is_symlink() for path in top.rglob("*")]
    found |= {path: "was damaged and has been set aside" for path in below if path.name.endswith(".damaged")}
    hidden = [path for path in [*below, *folder.glob(".*")] if path.name.startswith(".") and not path.is_dir()]
    found |= {path: "was being written" for path in hidden if path.name.endswith(".tmp") or path.name == ".writable"}
    found |= {path: "was being written" for path in hidden if path.parent == folder / "adapter"}
    outermost = [path for path in sorted(found) if not any(parent in found for parent in path.parents)]
    own = [path for path in outermost if path.resolve().is_relative_to(folder.resolve())]
    return [Leftover(path, found[path], reading.place, size_of([path])) for path in own]


def _useless(reading: Reading, part: Part, finished: Mapping[Id, str]) -> str:
    """Why unfinished work will never be gone on with; empty if it may be."""
    if (part.folder / "done.json").exists():
        return ""  # all of it is there and only waits to get its names
    if part.title in reading.books:
        return "unfinished work on a stage that is finished"
    if part.begun is None:
        return "unfinished work that does not say what it belongs to"
    elsewhere = finished.get((part.begun.key, numerics(part.begun.made_by)))
    return f"unfinished work on a stage that {elsewhere} has finished" if elsewhere else ""


def abandoned(root: Path, now: float) -> list[Leftover]:
    """Folders that `spa-lite train` worked in when it was killed."""
    found = []
    for path in sorted(root.glob("*/.train*")):
        size = size_of([path])
        old = now - max(size.touched, path.lstat().st_mtime) > YOUNG
        if old and path.is_dir() and not path.is_symlink() and not path.parent.is_symlink():
            found.append(Leftover(path, "left by a training that was killed", None, size))
    return found


def duplicates(readings: Sequence[Reading]) -> list[Duplicate]:
    """Files of the same stage that are separate copies although they could be one file under several names."""
    groups: dict[tuple[Any, ...], list[File]] = defaultdict(list)
    digests: dict[tuple[int, int], str] = {}
    for reading in readings:
        for (key, made), title in reading.ids.items():
            book = reading.books[title]
            for name, checksum in book.done["checksums"].items():
                for path in [book.folder / name, *_at_the_top(reading, book, name)]:
                    file = _regular(path, reading.place, title)
                    if file:
                        groups[key, made, name, checksum, file.status.st_dev].append(file)
    found: dict[tuple[str, str, str], list[tuple[File, File]]] = defaultdict(list)
    for (_, _, _, checksum, _), group in groups.items():
        if len({file.inode for file in group}) > 1:
            for kept, copy in _copies([file for file in group if _digest(file, digests) == checksum]):
                found[copy.run.name, copy.title, kept.run.name].append((kept, copy))
    return [
        Duplicate(title, links[0][1].run, like, _freed(links), tuple(links))
        for (_, title, like), links in sorted(found.items())
    ]


def _at_the_top(reading: Reading, book: Book, name: str) -> list[Path]:
    """The file of the final adapter that may be this one of a stage."""
    last = next((title for title in reversed(reading.books) if title.endswith((" train", " seed"))), None)
    return [reading.place.folder / name] if book.title == last and name.startswith("adapter/") else []


def _regular(path: Path, run: Place, title: str) -> File | None:
    """A file of a run that may become a link: it lies inside the run, and holds something."""
    try:
        status = path.lstat()
        inside = path.resolve().is_relative_to(run.folder.resolve())
    except OSError:
        return None
    return File(path, run, title, status) if inside and stat.S_ISREG(status.st_mode) and status.st_size else None


def _digest(file: File, known: dict[tuple[int, int], str]) -> str:
    if file.inode not in known:
        try:
            known[file.inode] = files.digest_file(file.path)
        except OSError:
            known[file.inode] = ""
    return known[file.inode]


def _copies(group: Sequence[File]) -> Iterator[tuple[File, File]]:
    """(file to keep, copy) of equal files. A copy that has more names elsewhere stays: nothing would be freed."""
    if not group:
        return
    kept = max(group, key=lambda file: (file.status.st_nlink, -file.status.st_mtime))
    for file in group:
        names = sum(other.inode == file.inode for other in group)
        if file.inode != kept.inode and names >= file.status.st_nlink:
            yield kept, file


def _freed(links: Iterable[tuple[File, File]]) -> int:
    return sum({copy.inode: copy.status.st_size for _, copy in links}.values())


def clean(found: Rubbish) -> tuple[int, list[str]]:
    """Remove leftovers and make links of duplicates. Returns the bytes freed, and sentences about what was not done.

    A run is locked while it is changed, and what has changed since it was looked at stays. An interruption leaves every
    file whole.
    """
    freed, failed = 0, []
    items: list[Leftover | Duplicate] = [*found.leftovers, *found.duplicates]
    for item in items:
        try:
            with lock.locked(item.run.folder) if item.run else nullcontext():
                _do(item)
            freed += item.bytes
        except RunError as error:
            failed.append(str(error))
        except OSError as error:
            reason = error.strerror or error
            failed.append(
                f"{item.path} cannot be deleted ({reason})"
                if isinstance(item, Leftover)
                else f"{item.title} of {item.run.name} stays a copy, because no hard link can be made ({reason})"
            )
    return freed, failed


def _do(item: Leftover | Duplicate) -> None:
    if isinstance(item, Duplicate):
        for kept, copy in item.links:
            _link(kept, copy)
    elif size_of([item.path]) == item.size:
        delete(item.path)
    else:
        raise RunError(f"{item.path} has changed meanwhile and stays as it is")


def _link(kept: File, copy: File) -> None:
    """Make a copy a second name of the file that is kept. The new name is whole before it takes the old one's place."""
    temporary = copy.path.with_name(f".{copy.path.name}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(kept.path, temporary)
    if kept.unchanged(temporary.lstat()) and copy.unchanged(copy.path.lstat()):
        files.move(temporary, copy.path)
    else:
        temporary.unlink()
        raise RunError(f"{copy.path} or {kept.path} has changed meanwhile; both stay as they are")
