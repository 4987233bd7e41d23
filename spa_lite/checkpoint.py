"""A training stage that goes on after its last checkpoint: adapter, optimizer, position, thresholds, log.

A checkpoint is a folder with a number, moved into place whole. The last two are kept, so that a damaged one
costs a few steps and not the stage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import files
from spa_lite.backend import Backend
from spa_lite.errors import RunError
from spa_lite.journal import Journal, Mark, whole

STATE = "state.json"
KEPT = 2


class Position(msgspec.Struct):
    """Where a training stage is. `objective` is what the objective remembers between steps."""

    step: int = 0
    skipped: int = 0
    streak: int = 0
    objective: dict[str, Any] = {}


class Saved(msgspec.Struct, frozen=True):
    """`state.json` of a checkpoint."""

    position: Position
    log: Mark
    checksums: dict[str, str]


class Checkpoints:
    """Checkpoints and step log of one training stage, in the folder of its unfinished work.

    One is due every `steps` optimizer steps and every `minutes` of a clock that never goes back.
    """

    def __init__(
        self, folder: Path, steps: int = 0, minutes: float = 0.0, tell: Callable[[str], None] = lambda note: None
    ) -> None:
        self.folder, self.steps, self.minutes, self.tell = folder / "checkpoints", steps, minutes, tell
        self._log_path = folder / "metrics.jsonl"
        self._last = time.monotonic()

    def resume(self, backend: Backend) -> tuple[Position, list[dict[str, Any]]]:
        """Bring the backend to the newest whole checkpoint; return its position and the log up to there.

        Without one, position 0 and an empty log: the backend is as it was.
        """
        for place in sorted(self.folder.glob("[0-9]*"), reverse=True):
            saved = self._read(place)
            content = whole(self._log_path, saved.log) if saved else None
            if saved and content is not None:
                backend.restore(place)
                self._log = Journal(self._log_path, content)
                return saved.position, [msgspec.json.decode(line) for line in self._log.kept]
            self.tell(f"checkpoint {int(place.name)} is damaged; going on without it")
            shutil.rmtree(place)
        self._log = Journal(self._log_path)
        return Position(), []

    def log(self, line: dict[str, Any]) -> None:
        """One more step."""
        self._log.append([line], durable=False)

    def due(self, step: int) -> bool:
        """Whether it is time for another one."""
        minutes = (time.monotonic() - self._last) / 60
        return bool(self.steps and step % self.steps == 0) or bool(self.minutes and minutes >= self.minutes)

    def save(self, backend: Backend, position: Position) -> None:
        """Write one, whole or not at all, and forget all but the last two."""
        new = self.folder / ".new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        backend.save(new)
        files.sync(self._log_path)
        checksums = files.checksums(new, sorted(path.name for path in new.iterdir()))
        files.write_json(new / STATE, Saved(position, self._log.mark, checksums))
        files.sync_tree(new)
        files.move(new, self.folder / f"{position.step:08d}")
        for old in sorted(self.folder.glob("[0-9]*"))[:-KEPT]:
            shutil.rmtree(old)
        self._last = time.monotonic()

    def finish(self, backend: Backend) -> None:
        """The stage's result: the adapter without its optimizer, which restarts every round. Checkpoints end here."""
        files.sync(self._log_path)
        backend.save(self.folder.parent / "adapter", optimizer=False)

    def _read(self, place: Path) -> Saved | None:
        """The state of a checkpoint; None unless all its files are what they were."""
        try:
            saved = msgspec.convert(files.read_json(place / STATE), Saved)
            found = files.checksums(place, saved.checksums)
        except (OSError, RunError, msgspec.ValidationError):
            return None
        return saved if found == saved.checksums else None
