"""A run is a folder of finished stages. A stage is done when its marker, written last, exists.

Its key is a digest of canonical JSON: what kind of stage it is, the settings that matter to it, and the keys
or digests of its inputs. A finished stage is never computed again, in this run or in any other one at hand; one
whose key no longer fits is never misread: the difference is named. Work on a stage lies in `<kind>.part/` until all
of it is there, and goes on from there after an interruption.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import files
from spa_lite.errors import RunError, StaleRun
from spa_lite.events import Event, Report, silent
from spa_lite.files import read_json, write_json
from spa_lite.library import Library, read_marker
from spa_lite.lock import locked
from spa_lite.recipe import Recipe, write_recipe
from spa_lite.throughput import Pace, Went, rates

VERSION = 3
"""Raised by hand whenever a stage computes something else from the same key."""
FORMAT = 2
"""Of a run folder. Raised by hand whenever older folders must not be read as they are."""
HEAD = "run.json"


def digest(value: Any) -> str:
    """Hex digest of a value's canonical JSON (sorted keys)."""
    return files.digest_bytes(msgspec.json.encode(value, order="sorted"))


@dataclass(frozen=True)
class Stage:
    """One piece of a run: where it lies, what it is, and all that its result depends on."""

    folder: str  # inside the run, e.g. "rounds/1"
    kind: str  # seed, sample, judge, train, measure
    outputs: tuple[str, ...]  # files and folders it may write, inside `folder`
    settings: dict[str, Any]
    inputs: dict[str, str]  # name -> key of the stage, or digest of the data, that it reads
    size: int = 0  # prompts or pairs it works on, for estimates

    @property
    def key(self) -> str:
        """Content key of the stage's result."""
        return digest([VERSION, self.kind, self.settings, self.inputs])

    @property
    def title(self) -> str:
        """Name for people: `rounds/1 train`."""
        return self.kind if self.folder == "." else f"{self.folder} {self.kind}"


class Run:
    """A run folder. `library` is where finished stages of other runs may be found. Without `head` it is not marked as
    a run of the method: a folder for a stage of its own.

    Raises RunError if the folder cannot be made or written, or belongs to another version of the program.
    """

    def __init__(self, folder: Path, library: Library | None = None, head: bool = True) -> None:
        self.folder, self.library, self.head = folder, library, head
        self.computed: list[str] = []
        self.reused: list[str] = []
        self.borrowed: dict[str, Path] = {}  # title of a stage -> the run it was taken from
        self.makers: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}  # title of a stage -> its key
        self.report: Report = silent
        self.meter: Callable[[], int | None] = lambda: None  # the most bytes taken since it was asked last
        self.floor: Callable[[Stage, str, Went], float | None] = lambda *_: None  # the least seconds of what was done
        self._pace = Pace(time.perf_counter)
        self._contents: dict[str, str] = {}  # key of a stage -> digest of what came out
        self._make()

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # here and below another process may be doing the same
            check_format(self.folder)
            if self.head:
                self._say_format(self.folder / HEAD)
        except OSError as error:
            raise RunError(
                f"cannot write to {self.folder}: {error.strerror}; choose another folder with --out"
            ) from None

    def _say_format(self, head: Path) -> None:
        try:
            if not head.exists():
                write_json(head, {"format": FORMAT})
        except FileNotFoundError:  # it was moved to its place by the other process
            if not head.exists():
                raise

    def path(self, stage: Stage, name: str = "") -> Path:
        """A path inside a stage's folder."""
        return self.folder / stage.folder / name

    def part(self, stage: Stage) -> Path:
        """Where the unfinished work on a stage lies."""
        return self.path(stage, f"{stage.kind}.part")

    def marker(self, stage: Stage) -> Path:
        """The file that says that a stage is done."""
        return self.path(stage, f"{stage.kind}.done.json")

    @contextmanager
    def locked(self, recipe: Recipe) -> Iterator[None]:
        """Nobody else works on the run inside the block; recipe.yaml says how. Raises RunError saying who does.

        At the end the recipe is written once more: settings that no finished stage depends on may have changed.
        """
        with self._errors("the run folder"), locked(self.folder):
            if not (self.folder / "recipe.yaml").exists():
                write_recipe(self.folder, recipe)
            yield
            write_recipe(self.folder, recipe)

    def heard(self, report: Report) -> Report:
        """A report that the run listens to, for the tokens per second of its stages."""

        def hear(event: Event) -> None:
            self._pace.hear(event)
            report(event)

        return hear

    # -- one stage ---------------------------------------------------------------------------------------------

    def once(
        self, stage: Stage, work: Callable[[Path], dict[str, Any]], made_by: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The stage's summary: read if it is finished here or in another run, else computed and marked as done.

        `work(folder)` leaves its outputs in a folder of unfinished work, where it may find what an interrupted attempt
        left. `made_by` says on what it is computed now; it is recorded and not part of the key, so a run goes on
        elsewhere. Raises StaleRun if a finished stage of that name was made from other settings or inputs.
        """
        made_by = made_by or {}
        self.keys[stage.title] = stage.key
        with self._errors(stage.title):
            done = self._finished(stage)
            if done:
                self.reused.append(stage.title)
            else:
                done = self._borrow(stage, made_by)
            if not done:
                done = self._compute(stage, work, made_by)
                self.computed.append(stage.title)
        self._contents[stage.key] = digest(done["checksums"])
        self.makers[stage.title] = done.get("made_by") or {}
        if done.get("begun_by"):
            self.makers[f"{stage.title} (first part)"] = done["begun_by"]
        return dict(done["summary"])

    def _finished(self, stage: Stage) -> dict[str, Any] | None:
        """The marker of a stage that is done, whose files are what they were, and whose inputs did not change."""
        part = self.part(stage)
        if (read_marker(part / "done.json") or {}).get("key") == stage.key:
            self._publish(stage)
        done = self.marked(stage)
        if done is None:
            return None
        if not done:
            self._set_aside(stage, self.marker(stage))
            return None
        found = files.checksums(self.path(stage), stage.outputs)
        wrong = [name for name, checksum in done["checksums"].items() if found.get(name) != checksum]
        if wrong:
            self._set_aside(stage, self.path(stage, wrong[0]))
            return None
        if not self._read_the_same(stage, done):
            self._say(stage, "is computed again, because what it reads came out otherwise than before")
            return None
        shutil.rmtree(part, ignore_errors=True)
        return done

    def marked(self, stage: Stage) -> dict[str, Any] | None:
        """What the stage's marker says; nothing if it is damaged, None if there is none.

        Raises StaleRun if it was made from other settings or inputs.
        """
        if not self.marker(stage).exists():
            return None
        done = read_marker(self.marker(stage))
        if done is None:
            return {}
        if done["key"] != stage.key:
            raise StaleRun(self._difference(stage, done))
        return done

    def _reads(self, stage: Stage) -> dict[str, str]:
        """What came out of the stages that a stage reads, by the names of its inputs."""
        return {name: self._contents[key] for name, key in stage.inputs.items() if key in self._contents}

    def _read_the_same(self, stage: Stage, done: dict[str, Any]) -> bool:
        """Whether a result was made from the very bytes that lie here: a repaired stage may come out otherwise."""
        return bool(done["reads"] == self._reads(stage))

    def _set_aside(self, stage: Stage, path: Path) -> None:
        """Name a damaged file and set it aside; the stage is then computed again."""
        self._say(stage, f"{path} is damaged or missing (its checksum differs), so the stage is computed again")
        if path.exists():
            files.move(path, path.with_name(f"{path.name}.damaged"))
        self.marker(stage).unlink(missing_ok=True)

    def _borrow(self, stage: Stage, made_by: dict[str, Any]) -> dict[str, Any] | None:
        """The same stage of another run, computed with the same kind of arithmetic; its files are shared."""
        book = self.library.find(stage.key, made_by) if self.library else None
        if book is None or book.run.resolve() == self.folder.resolve() or not self._read_the_same(stage, book.done):
            return None
        part = self.part(stage)  # without begun.json: what lies here is another run's and must not be gone on with
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in book.done["checksums"]:
            files.share(book.folder / name, part / name)
        if files.checksums(part, book.done["checksums"]) != book.done["checksums"]:
            shutil.rmtree(part)
            return None
        files.sync_tree(part)
        write_json(part / "done.json", book.done)
        self._publish(stage)
        self.borrowed[stage.title] = book.run
        return book.done

    def _compute(self, stage: Stage, work: Callable[[Path], dict[str, Any]], made_by: dict[str, Any]) -> dict[str, Any]:
        part = self._begin(stage, made_by)
        begun_by = read_json(part / "begun.json")["made_by"]
        self._pace = Pace(time.perf_counter)
        with measured(part / "spent.json", self.meter) as spent:
            summary = work(part)
        fast = rates(self._pace, lambda done, went: self.floor(stage, done, went))
        done = {
            "key": stage.key,
            "settings": stage.settings,
            "inputs": stage.inputs,
            "size": stage.size,
            "made_by": made_by,
            **({"begun_by": begun_by} if begun_by != made_by else {}),
            "reads": self._reads(stage),
            "checksums": files.checksums(part, stage.outputs),
            "summary": summary,
        }
        write_json(self.path(stage, "timings.json"), self.spent(stage.folder) | {stage.kind: spent | fast})
        files.sync_tree(part)
        write_json(part / "done.json", done)
        self._publish(stage)
        if self.library:
            self.library.add(self.folder, self.marker(stage))
        return dict(msgspec.json.decode(msgspec.json.encode(done)))

    def _begin(self, stage: Stage, made_by: dict[str, Any]) -> Path:
        """The folder of unfinished work: what an attempt at the same stage left, or an empty one."""
        part = self.part(stage)
        begun = part / "begun.json"
        try:
            same = begun.exists() and read_json(begun)["key"] == stage.key
        except RunError:
            same = False
        if not same:
            if begun.exists():
                self._say(stage, "was begun with other settings or data; that part is computed anew")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_json(begun, {"key": stage.key, "size": stage.size, "made_by": made_by})
        return part

    def _publish(self, stage: Stage) -> None:
        """Give finished work its names in the run, the marker last. May be repeated after an interruption."""
        part = self.part(stage)
        for name in stage.outputs:
            if (part / name).exists():
                files.move(part / name, self.path(stage, name))
        files.move(part / "done.json", self.marker(stage))
        shutil.rmtree(part)

    def _say(self, stage: Stage, what: str) -> None:
        self.report(Event(stage.title, note=what))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{what}: {error.strerror or error} ({error.filename or self.folder}); make room or fix the "
                "permission and run the same command again: everything so far is kept"
            ) from error

    def _difference(self, stage: Stage, done: dict[str, Any]) -> str:
        """Which setting or input of a finished stage has changed."""
        for name, before in done.get("settings", {}).items():
            if name in stage.settings and stage.settings[name] != before:
                return (
                    f"{name} was {before!r} when stage {stage.title!r} of {self.folder} was finished and is now "
                    f"{stage.settings[name]!r}; use another --out, or --fresh to start over"
                )
        changed = [n for n, before in done.get("inputs", {}).items() if stage.inputs.get(n) != before]
        what = ", ".join(changed) or "the version of spa-lite"
        return (
            f"{what} changed since stage {stage.title!r} of {self.folder} was finished; "
            "use another --out, or --fresh to start over"
        )

    def spent(self, folder: str) -> dict[str, dict[str, float]]:
        """Seconds, CPU seconds, peak bytes and throughput per stage kind, from a file of its own: results stay free of
        clocks."""
        path = self.folder / folder / "timings.json"
        try:
            return dict(read_json(path)) if path.exists() else {}
        except RunError:
            return {}


def check_format(folder: Path) -> None:
    """Raise RunError if a run folder was made by a version that names or means its files otherwise."""
    head = folder / HEAD
    markers = [*folder.glob("*/*.done.json"), *folder.glob("rounds/*/*.done.json")]
    found = dict(read_json(head)).get("format") if head.exists() else 1 if markers else FORMAT
    if found == FORMAT:
        return
    age = "an older" if isinstance(found, int) and found < FORMAT else "a newer"
    raise RunError(
        f"{folder} was made by {age} version of spa-lite (format {found}, this one reads {FORMAT}); "
        "use that version for it, or another --out"
    )


@contextmanager
def measured(path: Path, meter: Callable[[], int | None]) -> Iterator[dict[str, float]]:
    """Measure seconds, CPU seconds and, where `meter` knows, the peak memory (bytes) of a block, together with those of
    interrupted attempts (kept at `path`)."""
    try:
        before = dict(read_json(path)) if path.exists() else {}
    except RunError:
        before = {}
    wall, cpu = time.monotonic(), time.process_time()
    meter()
    spent: dict[str, float] = {}
    try:
        yield spent
    finally:
        spent["seconds"] = round(before.get("seconds", 0.0) + time.monotonic() - wall, 3)
        spent["cpu"] = round(before.get("cpu", 0.0) + time.process_time() - cpu, 3)
        peak = meter()
        if peak is not None:
            spent["peak"] = max(before.get("peak", 0), peak)
        write_json(path, spent)
