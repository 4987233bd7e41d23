"""What lies below a folder of runs: which runs and studies, how far they are, how large, and what they share.

Everything is read from the folders themselves, and nothing is changed. A file that is damaged is named, never trusted.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from spa_lite import carry, files, guards, lock
from spa_lite.errors import RecipeError, RunError
from spa_lite.journal import Mark
from spa_lite.library import Book, Done, markers_of, numerics, read_book
from spa_lite.recipe import Recipe, build, layers_of, load_layer, read_yaml, settings_of, shipped
from spa_lite.sft import sft_plan
from spa_lite.store import HEAD, check_format
from spa_lite.throughput import KINDS
from spa_lite.train import round_plan, seed_plan

STUDY = "study.json"
PARTS = ("init/*.part", "rounds/*/*.part")

T = TypeVar("T")
Id = tuple[str, str]
"""Key and arithmetic: stages with the same one have the same result."""


@dataclass(frozen=True)
class Place:
    """A run folder, or the folder of a study with its cells. `name` is its path below the root."""

    name: str
    folder: Path
    kind: str = "run"
    cells: tuple[Place, ...] = ()

    @property
    def runs(self) -> tuple[Place, ...]:
        """Its run folders: itself, or its cells."""
        return self.cells if self.kind == "study" else (self,)


def places(root: Path) -> list[Place]:
    """The runs and studies below a folder, by name. A link to one that is there anyway is left out."""
    found = [place for child in _folders(root) if (place := place_of(child, child.name))]
    own = {place.folder.resolve() for place in found if not place.folder.is_symlink()}
    return [place for place in found if not (place.folder.is_symlink() and place.folder.resolve() in own)]


def place_of(folder: Path, name: str) -> Place | None:
    """A folder as a run or a study; None if it is neither."""
    if (folder / STUDY).is_file():
        below = [(cell, f"{name}/cells/{cell.name}") for cell in _folders(folder / "cells")]
        return Place(name, folder, "study", tuple(Place(title, cell) for cell, title in below if is_run(cell)))
    return Place(name, folder) if is_run(folder) else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: its head is there, or (older formats) a marker. One that cannot be entered is none."""
    try:
        return (folder / HEAD).is_file() or any(markers_of(folder))
    except OSError:
        return False


def runs_of(all_places: Iterable[Place]) -> list[Place]:
    """All run folders, those of studies included."""
    return [run for place in all_places for run in place.runs]


def resolve(word: str, root: Path) -> Place:
    """The run or study a user means: a path, a name below the root, or the beginning of one name alone.

    Raises RunError naming what it could be instead.
    """
    everything = places(root)
    known = {place.name: place for top in everything for place in (top, *top.cells)}
    if word in known:
        return known[word]
    path = Path(word)
    if path.is_dir():
        place = place_of(path, word.rstrip("/"))
        if place:
            return place
        raise RunError(f"{word} is neither a run nor a study (it has no {HEAD} or {STUDY}); spa-lite runs lists them")
    begins = [place for name, place in known.items() if name.startswith(word)]
    begins = [place for place in begins if place in everything] or begins
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise RunError(f"{word!r} begins {len(begins)} names ({', '.join(p.name for p in begins)}); write more of it")
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"spa-lite runs lists those below {root}"
    raise RunError(f"there is no run {word!r}; {hint}")


def user_of(place: Place) -> str | None:
    """Who works on a run, or on a study or one of its cells; None if nobody does."""
    for folder in dict.fromkeys([place.folder, *[run.folder for run in place.runs]]):
        note = folder / lock.NAME
        who = lock.holder(folder) if note.exists() and note.stat().st_size else None  # it is empty between two runs
        if who:
            return who
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


# -- sizes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Bytes of some files; how many of them are freed if they go (no other name keeps them); the newest change."""

    total: int
    own: int
    touched: float


def size_of(paths: Iterable[Path]) -> Size:
    """Size of all files at and below some paths, each counted once however many names it has."""
    names = {path: status for top in paths for path, status in walk(top)}
    count: dict[tuple[int, int], int] = defaultdict(int)
    known: dict[tuple[int, int], os.stat_result] = {}
    for status in names.values():
        inode = (status.st_dev, status.st_ino)
        count[inode] += 1
        known[inode] = status
    return Size(
        sum(status.st_size for status in known.values()),
        sum(status.st_size for inode, status in known.items() if count[inode] >= status.st_nlink),
        max((status.st_mtime for path, status in names.items() if path.name != lock.NAME), default=0.0),
    )


def walk(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files at or below a path with what the system knows of them. Links are not followed."""
    below = [Path(folder) / name for folder, _, found in os.walk(top) for name in found]
    for path in below or [top]:
        try:
            status = path.lstat()
        except OSError:  # gone since it was listed: somebody works there
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield path, status


# -- reading a run -------------------------------------------------------------------------------------------------


class Row(msgspec.Struct):
    """What is shown of a row of summary.json."""

    win_rate: dict[str, float] | None = None
    pair_accuracy: dict[str, float] | None = None


class Summary(msgspec.Struct):
    """What is shown of summary.json."""

    rows: list[Row]
    stopped: str | None = None


class Begun(msgspec.Struct):
    """begun.json of unfinished work."""

    key: str
    made_by: dict[str, Any] = {}
    size: int | None = None


@dataclass(frozen=True)
class Part:
    """Unfinished work: whole lines per journal, or the step of the last checkpoint; of how many, where known."""

    title: str
    folder: Path
    begun: Begun | None
    lines: dict[str, int]
    step: int | None
    of: int | None


@dataclass
class Reading:
    """What the files of one run say. `version` is a sentence if it has another format; then nothing else is read."""

    place: Place
    version: str = ""
    headless: bool = False  # run.json is damaged
    recipe: Recipe | None = None
    headline: tuple[str, dict[str, float]] | None = None  # measure, interval
    summarised: bool = False
    stopped: str = ""  # the round after which a stop rule ended it
    books: dict[str, Book] = field(default_factory=dict)  # title -> finished stage, in the order of the method
    parts: dict[str, Part] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def ids(self) -> dict[Id, str]:
        """Identity -> title of every finished stage."""
        return {identity(book): title for title, book in self.books.items()}

    @property
    def expected(self) -> list[str]:
        """Titles of all stages of its recipe, in order; of those that are there if the recipe cannot be read."""
        if self.recipe is None:
            return list(self.books)
        titles = list(titles_of(self.recipe))
        if not self.stopped:
            return titles
        ended = int(self.stopped.removeprefix("round "))
        later = tuple(f"rounds/{i} " for i in range(ended + 1, self.recipe.rounds + 1))
        return [title for title in titles if not title.startswith(later)]

    @property
    def next(self) -> str:
        """Title of the first stage that is not done; empty if all are."""
        return next((title for title in self.expected if title not in self.books), "")


def titles_of(recipe: Recipe) -> Iterator[str]:
    """Titles of all stages of a run that no stop rule ends, in the order of the method."""
    r = recipe
    given = guards.starts_at_init(r) and not r.inputs.init_model  # then pi_0 is pi_init, and measured already
    written = guards.is_written(r)
    kinds = {
        "prompts": written,
        "improver": "improve" in r.candidates.kinds,
        "sample": True,
        "judge": True,
        "train": True,
    }
    yield "init measure"
    if guards.has_seed_stage(r):
        yield "rounds/0 seed"
    if not given and (r.measure.every == "round" or not r.rounds):
        yield "rounds/0 measure"
    for i in range(1, r.rounds + 1):
        if i == 1 and written and r.prompts.generator:
            yield "rounds/0 generator"
        yield from (f"rounds/{i} {kind}" for kind, there in kinds.items() if there)
        if r.measure.every == "round" or i == r.rounds:
            yield f"rounds/{i} measure"


def identity(book: Book) -> Id:
    """What makes two finished stages the same one."""
    return book.done["key"], numerics(book.done["made_by"])


def read(place: Place) -> Reading:
    """Read a run folder. Damaged files are named in `problems`; only an OSError of the folder itself is raised."""
    folder, found = place.folder, Reading(place)
    head = folder / HEAD
    if head.exists() and _try(found, head, dict[str, Any]) is None:
        found.headless = True
        return found
    try:
        check_format(folder)
    except RunError as error:
        found.version = str(error)
        return found
    if (folder / "recipe.yaml").exists():
        try:
            found.recipe = build({str(folder / "recipe.yaml"): read_yaml(folder / "recipe.yaml")})[0]
        except RecipeError as error:
            found.problems.append(str(error))
    if (folder / "summary.json").exists():
        summary = _try(found, folder / "summary.json", Summary)
        found.summarised = summary is not None
        found.stopped = (summary.stopped or "") if summary else ""
        found.headline = headline(summary.rows[-1]) if summary and summary.rows else None
    books = [book for marker in markers_of(folder) if (book := _book(found, marker))]
    found.books = {book.title: book for book in sorted(books, key=_order)}
    parts = [path for pattern in PARTS for path in folder.glob(pattern) if path.is_dir()]
    for part in sorted(parts):
        record = _part(found, part)
        found.parts[record.title] = record
    return found


def headline(row: Row) -> tuple[str, dict[str, float]] | None:
    """The measure that says how good a policy is, and its interval in [0, 1]: the win rate where truth is known."""
    for name, interval in (("win_rate", row.win_rate), ("pair_accuracy", row.pair_accuracy)):
        if interval and {"value", "low", "high"} <= set(interval):
            return name, interval
    return None


def _try(found: Reading, path: Path, type_: type[T]) -> T | None:
    """A JSON file of a known shape; else None, and it is named among the problems."""
    try:
        return msgspec.convert(files.read_json(path), type_)
    except (RunError, OSError, msgspec.ValidationError, RecursionError):
        found.problems.append(f"{path.relative_to(found.place.folder).as_posix()} is damaged")
        return None


def _book(found: Reading, marker: Path) -> Book | None:
    done = _try(found, marker, Done)
    if done is not None and not done.stays_inside:
        found.problems.append(f"{marker.relative_to(found.place.folder).as_posix()} names files outside its folder")
    return read_book(found.place.folder, marker)


def _order(book: Book) -> tuple[int, int]:
    round_ = book.folder.name
    known = KINDS.index(book.kind) if book.kind in KINDS else len(KINDS)
    return (int(round_) if round_.isdecimal() else -1), known


def spent(book: Book) -> dict[str, float]:
    """Seconds and CPU seconds of a stage; empty where it was taken from elsewhere."""
    try:
        return msgspec.convert(files.read_json(book.folder / "timings.json"), dict[str, dict[str, float]])[book.kind]
    except (RunError, OSError, msgspec.ValidationError, KeyError):
        return {}


def _part(found: Reading, folder: Path) -> Part:
    kind = folder.name.removesuffix(".part")
    at = folder.parent.relative_to(found.place.folder).as_posix()
    begun = _try(found, folder / "begun.json", Begun) if (folder / "begun.json").exists() else None
    lines = {path.name.removesuffix(".mark"): _lines(path) for path in sorted(folder.glob("*.jsonl.mark"))}
    steps = [int(path.name) for path in checkpoints(folder)]
    size = begun.size if begun else None
    return Part(f"{at} {kind}", folder, begun, lines, max(steps, default=None), _goal(found, at, kind, size))


def _lines(mark: Path) -> int:
    try:
        return msgspec.json.decode(mark.read_bytes(), type=Mark).lines
    except (OSError, msgspec.DecodeError):
        return 0


def _goal(found: Reading, at: str, kind: str, size: int | None) -> int | None:
    """Lines or optimizer steps of a whole stage, as far as the stages before it tell."""
    before = {"sample": "prompts", "judge": "sample"}.get(kind, "")
    if made := found.books.get(f"{at} {before}"):  # of written prompts more were asked for than there are
        return int(made.done["summary"].get("prompts") or 0) or size
    if kind == "train" and found.recipe:
        pairs = _pairs(found, found.recipe, int(at.rpartition("/")[2]))
        return round_plan(found.recipe, pairs, int(at.rpartition("/")[2])).steps if pairs else None
    if kind in {"seed", "generator", "improver"}:
        plan = seed_plan if kind == "seed" and found.recipe and found.recipe.seed_dpo.by == "dpo" else sft_plan
        return plan(found.recipe, size).steps if found.recipe and size else None
    return size


def _pairs(found: Reading, recipe: Recipe, round_: int) -> int | None:
    """Pairs that a round trains on, those of earlier rounds included, if the judging told."""
    total = 0
    for i in carry.rounds_trained_on(recipe, round_):
        book = found.books.get(f"rounds/{i} judge")
        counts = [book.done["summary"].get(name) for name in ("pairs", "identical", "ties")] if book else []
        if recipe.pairing.min_gap or not counts or not all(isinstance(count, int) for count in counts):
            return None
        pairs, same, ties = counts
        if recipe.pairing.drop_ties and ties:
            return None  # some of them may be identical
        total += pairs - (same if recipe.judge.identical == "drop" else 0)
    return total


def checkpoints(part: Path) -> list[Path]:
    """Whole checkpoints of a training stage, oldest first."""
    return sorted(
        path for path in part.glob("checkpoints/[0-9]*") if path.name.isdecimal() and (path / "state.json").exists()
    )


def differences(reading: Reading) -> dict[str, tuple[Any, Any]]:
    """Settings of a run that are not as its recipe and scale have them: path -> (value, theirs)."""
    if reading.recipe is None:
        return {}
    kinds: dict[Literal["recipe", "scale"], str] = {"recipe": reading.recipe.name, "scale": reading.recipe.scale}
    layers: dict[str, Mapping[str, Any]] = {}
    for kind, name in kinds.items():
        if name in shipped(kind):  # one of the user's own may lie anywhere by now
            layers[f"{kind} {name}"] = load_layer(kind, name)
    if len(layers) == len(kinds):
        layers |= layers_of(reading.recipe.name, reading.recipe.scale)
    mine, theirs = settings_of(reading.recipe), settings_of(build(layers)[0])
    changed = [path for path in mine if mine[path] != theirs[path] and path not in {"name", "scale"}]
    return {path: (mine[path], theirs[path]) for path in changed}


def damaged(reading: Reading) -> list[str]:
    """Which files of a run cannot be read, and which results are not what their marker says."""
    wrong = list(reading.problems)
    for book in reading.books.values():
        for name, checksum in book.done["checksums"].items():
            path = book.folder / name
            about = path.relative_to(reading.place.folder).as_posix()
            try:
                if files.digest_file(path) != checksum:
                    wrong.append(f"{about} is damaged (its checksum differs)")
            except FileNotFoundError:
                wrong.append(f"{about} is missing")
            except OSError as error:
                wrong.append(f"{about} cannot be read ({error.strerror})")
    return wrong


# -- an overview ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overview:
    """One line of the list: a run, or a study as a whole. `state` is one word, `where` says at which stage."""

    name: str
    kind: str
    recipe: str
    scale: str
    model: str | None
    state: str  # finished, stopped, running, damaged, other version; of a study: how many of which
    where: Part | str | None
    by: str | None
    stages: int
    of: int
    headline: tuple[str, dict[str, float]] | None
    size: Size
    shares: dict[str, int]
    cells: int
    problems: list[str]


def overview(listed: Sequence[Place]) -> list[Overview]:
    """What there is to say about runs and studies, last touched first. They are compared with each other."""
    readings = {place.name: [read(run) for run in place.runs] for place in listed}
    ids = {name: {i for reading in found for i in reading.ids} for name, found in readings.items()}
    lines = [_overview(place, readings[place.name], ids) for place in listed]
    return sorted(lines, key=lambda line: -line.size.touched)


def _overview(place: Place, found: list[Reading], ids: Mapping[str, set[Id]]) -> Overview:
    mine = ids[place.name]
    shares = {name: len(mine & theirs) for name, theirs in ids.items() if name != place.name and mine & theirs}
    who = user_of(place)
    states = [state_of(reading, who if place.kind == "run" else user_of(reading.place)) for reading in found]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    alone = found[0] if place.kind == "run" else None
    where: Part | str | None = None
    if alone and states[0] in {"stopped", "running"}:
        where = alone.parts.get(alone.next) or alone.next or "summary.json"
    return Overview(
        name=place.name,
        kind=place.kind,
        recipe=_common(r.recipe.name for r in found if r.recipe),
        scale=_common(r.recipe.scale for r in found if r.recipe),
        model=_common(r.recipe.inputs.model or "" for r in found if r.recipe) or None,
        state=states[0] if alone else ", ".join(f"{n} {state}" for state, n in counts.items()),
        where=where,
        by=who,
        stages=sum(len(reading.books) for reading in found),
        of=sum(len(reading.expected) for reading in found),
        headline=alone.headline if alone else None,
        size=size_of([place.folder]),
        shares=dict(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))),
        cells=len(place.cells),
        problems=[alone.version]
        if alone and alone.version
        else [_named(r, p, place) for r in found for p in r.problems],
    )


def state_of(reading: Reading, who: str | None) -> str:
    """finished, stopped, running (if somebody works on it), damaged or other version."""
    if reading.version:
        return "other version"
    if who:
        return "running"
    if reading.headless:
        return "damaged"
    return "finished" if reading.summarised and not reading.next else "stopped"


def _named(reading: Reading, problem: str, place: Place) -> str:
    return problem if place.kind == "run" else f"{reading.place.folder.name}: {problem}"


def _common(values: Iterable[str]) -> str:
    """The one value that all have; else how many there are."""
    different = sorted(set(values))
    return different[0] if len(different) == 1 else f"{len(different)} different" if different else ""


def sharing(reading: Reading, others: Iterable[Reading]) -> dict[str, list[str]]:
    """Title of a finished stage -> names of the other runs that have it, too."""
    mine = reading.ids
    found: dict[str, list[str]] = {title: [] for title in reading.books}
    for other in others:
        if other.place.folder.resolve() != reading.place.folder.resolve():
            for both in mine.keys() & other.ids.keys():
                found[mine[both]].append(other.place.name)
    return found
