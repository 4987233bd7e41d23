"""How the method tells what it is doing: one function that takes one kind of event. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """`done` of `total` units of a stage (0: nobody knows how many); `note` is a sentence worth showing once.

    `tokens` are the useful ones so far: of answers that this process sampled, scored or trained on; prompts, padding
    and what was done before it are not among them. An event that `begins` only says that work starts, behind `done`.

    `metrics` are what was measured there, by name: with unit "steps" the line of metrics.jsonl of optimizer step
    `done`, with unit "stage" the summary of a stage that is finished, be it now or in an earlier attempt at the run.
    """

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""
    note: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    begins: bool = False


Report = Callable[[Event], None]


class Tick(Protocol):
    """Called once per unit that is done, with the useful tokens it was."""

    def __call__(self, tokens: int = 0) -> None:
        """One more."""


def unheard(tokens: int = 0) -> None:
    """A tick for nobody."""


def per_unit(tick: Callable[[], None]) -> Tick:
    """A tick of those who count units and no tokens."""
    return lambda tokens=0: tick()


def ticking(report: Report, stage: str, total: int, unit: str, start: int = 0) -> Tick:
    """A function to call once per unit of a stage; what is done again, in smaller batches, counts no further.

    Make it when the work begins, behind whatever is loaded for it: rates count from here.
    """
    done, useful = start, 0

    def tick(tokens: int = 0) -> None:
        nonlocal done, useful
        done, useful = min(done + 1, total), useful + tokens
        report(Event(stage, done, total, unit, tokens=useful))

    report(Event(stage, start, total, unit, begins=True))
    return tick


def silent(event: Event) -> None:
    """Report to nobody."""
