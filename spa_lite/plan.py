"""What a run would do: the method itself, walked through without doing the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spa_lite.library import Library
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.spa import spa
from spa_lite.stages import Workshop
from spa_lite.stages.workbench import Data
from spa_lite.store import Run, Stage

State = Literal["done", "reuse", "shared", "compute"]
"""Finished in its own folder; finished in another run; computed by an earlier job of the study; to be computed."""


@dataclass(frozen=True)
class Planned:
    """One stage of one job."""

    stage: Stage
    state: State
    made_by: Mapping[str, Any]

    def seconds(self, library: Library) -> float | None:
        """Estimate of what is left of it, from what like stages took; None while none was measured."""
        if self.state != "compute" or library.find(self.stage.key, self.made_by):
            return 0.0
        pace = library.pace(self.stage.kind, self.stage.inputs["model"], self.made_by)
        return None if pace is None else pace * self.stage.size


class Outlook(Run):
    """A run that computes nothing and notes what it would do. `seen` are keys that earlier jobs compute."""

    def __init__(self, folder: Path, library: Library, seen: set[str]) -> None:
        self.planned: list[Planned] = []
        self._seen = seen
        super().__init__(folder, library)

    def _make(self) -> None:
        """Nothing is written."""

    def once(
        self, stage: Stage, work: Callable[[Path], dict[str, Any]], made_by: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Note the stage. Raises StaleRun as the run itself would."""
        assert self.library is not None
        if stage.key in {planned.stage.key for planned in self.planned}:
            return {}  # what several rounds use is made once
        state: State = "compute"
        done = self.marked(stage)
        if done:
            state = "done"
        elif stage.key in self._seen:
            state = "shared"
        elif self.library.find(stage.key, made_by or {}):
            state = "reuse"
        self._seen.add(stage.key)
        self.planned.append(Planned(stage, state, made_by or {}))
        return dict(done["summary"]) if done else {}


def plan(models: Models, recipe: Recipe, data: Data, folder: Path, library: Library, seen: set[str]) -> list[Planned]:
    """What a run will do, stage by stage. Raises StaleRun where its folder holds something else."""
    outlook = Outlook(folder, library, seen)
    spa(Workshop(models, recipe, data, outlook))
    return outlook.planned
