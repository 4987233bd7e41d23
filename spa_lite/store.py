"""A run is a folder of finished stages. A stage is done when its marker, written last, exists.

Its key is a digest of canonical JSON: what kind of stage it is, the settings that matter to it, and the keys
or digests of its inputs. A finished stage is never computed again; one whose key no longer fits is never
misread: the difference is named.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from spa_lite.errors import RunError, StaleRun

VERSION = 1
"""Raised by hand whenever a stage computes something else from the same key."""


def digest(value: Any) -> str:
    """Hex digest of a value's canonical JSON (sorted keys)."""
    return hashlib.blake2b(msgspec.json.encode(value, order="sorted"), digest_size=16).hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises RunError naming the file if it is not whole."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise RunError(f"{path} is damaged ({error}); delete it and run the same command again") from None


@dataclass(frozen=True)
class Stage:
    """One piece of a run: where it lies, what it is, and all that its result depends on."""

    folder: str  # inside the run, e.g. "rounds/1"
    kind: str  # seed, sample, judge, train, measure
    outputs: tuple[str, ...]  # files and folders it writes, inside `folder`
    settings: dict[str, Any]
    inputs: dict[str, str]  # name -> key of the stage, or digest of the data, that it reads

    @property
    def key(self) -> str:
        """Content key of the stage's result."""
        return digest([VERSION, self.kind, self.settings, self.inputs])

    @property
    def title(self) -> str:
        """Name for people: `rounds/1 train`."""
        return f"{self.folder} {self.kind}"


class Run:
    """A run folder. Raises RunError if it cannot be made or written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed: list[str] = []
        self.reused: list[str] = []
        self.makers: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None

    def path(self, stage: Stage, name: str = "") -> Path:
        """A path inside a stage's folder."""
        return self.folder / stage.folder / name

    def once(
        self, stage: Stage, work: Callable[[Path], dict[str, Any]], made_by: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The stage's summary: read if the stage is finished, else computed by `work(folder)` and marked as done.

        `made_by` says on what it is computed now; it is recorded and not part of the key, so a run goes on elsewhere.
        Raises StaleRun if a finished stage of that name was made from other settings or inputs.
        """
        marker = self.path(stage, f"{stage.kind}.done.json")
        if marker.exists():
            done = read_json(marker)
            if done.get("key") == stage.key:
                self.reused.append(stage.title)
                self.makers[stage.title] = done.get("made_by") or {}
                return dict(done["summary"])
            raise StaleRun(self._difference(stage, done))
        self._clear(stage)
        with self._errors(stage), timed(self.path(stage, "timings.json"), stage.kind):
            summary = work(self.path(stage))
            write_json(
                marker,
                {
                    "key": stage.key,
                    "settings": stage.settings,
                    "inputs": stage.inputs,
                    "made_by": made_by or {},
                    "summary": summary,
                },
            )
        self.computed.append(stage.title)
        self.makers[stage.title] = made_by or {}
        return dict(msgspec.json.decode(msgspec.json.encode(summary)))

    def _clear(self, stage: Stage) -> None:
        """Remove what an interrupted attempt left, and make the stage's folder."""
        self.path(stage).mkdir(parents=True, exist_ok=True)
        for name in stage.outputs:
            target = self.path(stage, name)
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    @contextmanager
    def _errors(self, stage: Stage) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{stage.title}: {error.strerror or error} ({error.filename or self.folder}); make room or fix the "
                "permission and run the same command again: finished stages are kept"
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

    def seconds(self, folder: str) -> dict[str, float]:
        """Seconds per stage kind, from the file that holds nothing else: results stay free of clocks."""
        path = self.folder / folder / "timings.json"
        return dict(read_json(path)) if path.exists() else {}


@contextmanager
def timed(path: Path, kind: str) -> Iterator[None]:
    """Record how long a stage took."""
    start = time.monotonic()
    yield
    seconds = read_json(path) if path.exists() else {}
    write_json(path, seconds | {kind: round(time.monotonic() - start, 3)})
