"""How the method tells what it is doing: one function that takes one kind of event. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """`done` of `total` units of a stage; `note` is a sentence worth showing once."""

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""
    note: str = ""


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Report to nobody."""
