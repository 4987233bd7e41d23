"""How the method tells what it is doing: one function that takes one kind of event. Nothing here prints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """`done` of `total` units of a stage (0: nobody knows how many); `note` is a sentence worth showing once.

    `metrics` are what was measured there, by name: with unit "steps" the line of metrics.jsonl of optimizer step
    `done`, with unit "stage" the summary of a stage that is finished, be it now or in an earlier attempt at the run.
    """

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""
    note: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


Report = Callable[[Event], None]


def ticking(report: Report, stage: str, total: int, unit: str, start: int = 0) -> Callable[[], None]:
    """A function to call once per unit of a stage; what is done again, in smaller batches, counts no further."""
    done = itertools.count(start + 1)
    return lambda: report(Event(stage, min(next(done), total), total, unit))


def silent(event: Event) -> None:
    """Report to nobody."""
