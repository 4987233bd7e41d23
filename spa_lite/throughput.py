"""How fast it goes: useful tokens per second, counted from events, in progress lines, timings.json and tables.

Useful are the tokens of answers: sampled, scored or trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from spa_lite.events import Event

DOING = {"prompts": "sampled", "pairs": "scored", "steps": "trained"}
"""What happens to tokens where a stage counts these units."""
KINDS = ("seed", "generator", "prompts", "improver", "sample", "judge", "train", "measure")
"""Kinds of stages, in the order of a round. Most recipes have some of them only."""


@dataclass
class Went:
    """What this process did of one kind, and the seconds that it was at it."""

    units: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def units_per_second(self) -> float:
        """0 while nothing is known."""
        return self.units / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The same of useful tokens."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Pace:
    """Listens to events. Time between two events of a stage with the same unit belongs to the work between them.

    Where nobody said that work begins, it began at the event before, whatever that was, with one unit.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.monotonic
        self._seen: dict[tuple[str, str], tuple[float, int, int]] = {}  # when; done and tokens then
        self.went: dict[tuple[str, str], Went] = {}  # by stage and unit
        self.now = self._clock()

    def hear(self, event: Event) -> Went:
        """Take an event; returns all that was done of its kind."""
        before, self.now = self.now, self._clock()
        key = event.stage, event.unit
        then, done, tokens = self._seen.get(key, (before, event.done - 1, 0))
        self._seen[key] = self.now, event.done, event.tokens
        went = self.went.setdefault(key, Went())
        if not event.begins and event.done >= done and event.tokens >= tokens:
            went.units += event.done - done
            went.tokens += event.tokens - tokens
            went.seconds += self.now - then
        return went

    def done(self) -> dict[str, Went]:
        """All that had tokens, by what was done to them."""
        found: dict[str, Went] = {}
        for (_, unit), went in self.went.items():
            if unit in DOING and went.tokens:
                of = found.setdefault(DOING[unit], Went())
                of.units += went.units
                of.tokens += went.tokens
                of.seconds += went.seconds
        return found


def rates(pace: Pace, floor: Callable[[str, Went], float | None]) -> dict[str, float]:
    """The fields of a stage in timings.json: tokens, seconds, tokens per second and share of the floor.

    `floor` gives the least seconds of what was done, None where they are not known.
    """
    found: dict[str, float] = {}
    for done, went in pace.done().items():
        found[f"{done}_tokens"] = went.tokens
        found[f"{done}_seconds"] = round(went.seconds, 3)
        found[f"{done}_tokens_per_second"] = round(went.tokens_per_second, 1)
        least = floor(done, went)
        if least is not None and went.seconds > 0:
            found[f"{done}_share_of_floor"] = round(least / went.seconds, 4)
    return found


@dataclass(frozen=True)
class Total:
    """One kind of stage over a whole run. `share` of the floor is None unless it is known for every stage of it."""

    kind: str
    done: str  # sampled, scored or trained
    tokens: float
    seconds: float
    share: float | None

    @property
    def per_second(self) -> float | None:
        """Useful tokens per second; None where no time was taken."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def totals(spent: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Total]:
    """Sums over stages (each: kind -> fields of timings.json), in the order of a round."""
    return list(_totals(spent))


def _totals(spent: Sequence[Mapping[str, Mapping[str, float]]]) -> Iterator[Total]:
    for kind in KINDS:
        for done in DOING.values():
            them = [stage[kind] for stage in spent if stage.get(kind, {}).get(f"{done}_tokens")]
            if not them:
                continue
            tokens, seconds = (sum(one.get(f"{done}_{what}", 0.0) for one in them) for what in ("tokens", "seconds"))
            known = [one for one in them if f"{done}_share_of_floor" in one]
            least = sum(one[f"{done}_share_of_floor"] * one.get(f"{done}_seconds", 0.0) for one in known)
            yield Total(kind, done, tokens, seconds, least / seconds if known == them and seconds > 0 else None)
