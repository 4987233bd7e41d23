"""How the runs of a comparison are told apart: colour, dashes, marker, and what the legend says.

Up to `FEW` runs have a colour each. Of more, those that differ in their seed alone are a group and share one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spa_lite.figures import COLOURS
from spa_lite.report.collect import Told
from spa_lite.report.tables import plain

FEW = 6
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*X"


@dataclass(frozen=True)
class Look:
    """Of one line. `entry` is its text in the legend; empty if another line of its group stands there."""

    colour: str
    dash: str
    marker: str
    entry: str


def look(i: int, entry: str) -> Look:
    """The i-th of several lines: colours first, then dashes."""
    dash = DASHES[(i // len(COLOURS)) % len(DASHES)]
    return Look(COLOURS[i % len(COLOURS)], dash, MARKERS[i % len(MARKERS)], entry)


def looks(runs: Sequence[Told]) -> dict[str, Look]:
    """Name of a run -> its look."""
    if len(runs) <= FEW:
        return {run.name: look(i, run.name) for i, run in enumerate(runs)}
    found = {}
    for i, (name, members) in enumerate(groups(runs)):
        for run in members:
            found[run.name] = look(i, name if run is members[0] else "")
    return found


def groups(runs: Sequence[Told]) -> list[tuple[str, list[Told]]]:
    """(name, runs): runs whose settings are the same but for the seed, in the order they come."""
    found: dict[str, list[Told]] = {}
    for run in runs:
        same = "\n".join(f"{path}={plain(value)}" for path, value in run.settings.items() if path != "seed")
        found.setdefault(same or run.name, []).append(run)
    return [(_name(members), members) for members in found.values()]


def some(runs: Sequence[Told], count: int = FEW) -> list[Told]:
    """A few runs where not all can be shown: one of each group."""
    first = [members[0] for _, members in groups(runs)]
    return list(runs if len(runs) <= count or len(first) == 1 else first)[:count]


def _name(members: Sequence[Told]) -> str:
    if len(members) == 1:
        return members[0].name
    stems = {re.sub(r"[-_. ]*(seed[-_. ]*)?\d+$", "", run.name) for run in members}
    return f"{stems.pop() if len(stems) == 1 else members[0].name} ({len(members)} seeds)"
