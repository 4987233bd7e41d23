"""How well a judge agrees with gold labels, beside simple baselines, and whether its probabilities mean what they say.

A tally only counts, so that a file of any length needs little memory and an interrupted one goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from spa_lite.intervals import mcnemar, wilson

BINS = 10
GROUPS = 1000
"""Subsets that are told apart; what comes after them is counted as `OTHERS`."""
OTHERS = "(others)"
STEPS = 100
"""Margins are counted in steps of 1/100 of a power of ten, from which the deciles are taken."""
SMALLEST, LARGEST = -12 * STEPS, 12 * STEPS


class Seen(NamedTuple):
    """What one judged record adds to the tally.

    `right` and `baselines` are 1, 0, or the share of a tie that is right; None without gold. `p` is the judge's
    probability of its own label (pairs only), `margin` the distance of its numbers for best and worst.
    `orders`: for each pair of answers that was compared both ways, whether both ways agree; `firsts`: for each
    comparison that could be read, 1 if the answer shown first won, 0.5 at a tie.
    """

    margin: float
    tie: bool
    close: bool
    right: float | None = None
    chance: float = 0.5
    p: float | None = None
    baselines: Mapping[str, float] = MappingProxyType({})
    group: str | None = None
    orders: tuple[bool, ...] = ()
    firsts: tuple[float, ...] = ()
    unread: int = 0


class Share(msgspec.Struct):
    """Hits of n."""

    hits: float = 0.0
    n: int = 0

    def add(self, hit: float) -> None:
        """One more."""
        self.hits += hit
        self.n += 1

    def summary(self) -> dict[str, float] | None:
        """The share with its Wilson interval; None of nothing."""
        interval = wilson(self.hits, self.n)
        return interval.to_dict() if interval else None


class Bin(msgspec.Struct):
    """Labels of like confidence: how many, how many of them right, and their summed confidence."""

    n: int = 0
    hits: float = 0.0
    p: float = 0.0


class Apart(msgspec.Struct):
    """Records on which only the judge was right, and only the baseline."""

    judge: int = 0
    baseline: int = 0


class Tally(msgspec.Struct):
    """Counts over all records so far."""

    records: int = 0
    ties: int = 0
    close: int = 0
    unread: int = 0
    judge: Share = msgspec.field(default_factory=Share)
    chance: Share = msgspec.field(default_factory=Share)
    baselines: dict[str, Share] = {}
    apart: dict[str, Apart] = {}
    groups: dict[str, Share] = {}
    orders: Share = msgspec.field(default_factory=Share)
    firsts: Share = msgspec.field(default_factory=Share)
    bins: list[Bin] = msgspec.field(default_factory=lambda: [Bin() for _ in range(BINS)])
    brier: float = 0.0
    margins: dict[int, Share] = {}

    def add(self, seen: Seen) -> None:
        """One more record."""
        self.records += 1
        self.ties += seen.tie
        self.close += seen.close
        self.unread += seen.unread
        for agree in seen.orders:
            self.orders.add(agree)
        for first in seen.firsts:
            self.firsts.add(first)
        if seen.right is None:
            return
        self.judge.add(seen.right)
        self.chance.add(seen.chance)
        self.margins.setdefault(_step(seen.margin), Share()).add(seen.right)
        for name, right in seen.baselines.items():
            self.baselines.setdefault(name, Share()).add(right)
            apart = self.apart.setdefault(name, Apart())
            apart.judge += (seen.right, right) == (1, 0)
            apart.baseline += (seen.right, right) == (0, 1)
        if seen.group is not None:
            known = seen.group in self.groups or len(self.groups) < GROUPS
            self.groups.setdefault(seen.group if known else OTHERS, Share()).add(seen.right)
        if seen.p is not None:
            self._calibrate(seen.p, seen.right)

    def _calibrate(self, p: float, right: float) -> None:
        bin_ = self.bins[min(int((p - 0.5) * 2 * BINS), BINS - 1)]
        bin_.n, bin_.hits, bin_.p = bin_.n + 1, bin_.hits + right, bin_.p + p
        self.brier += right * (1 - p) ** 2 + (1 - right) * p**2

    def summary(self) -> dict[str, Any]:
        """Everything as plain values; what there was nothing of is None or empty."""
        return {
            "records": self.records,
            "ties": self.ties,
            "close": self.close,
            "unread": self.unread,
            "accuracy": self.judge.summary(),
            "guessing": self.chance.hits / self.chance.n if self.chance.n else None,
            "baselines": {name: self._beside(name, share) for name, share in self.baselines.items()},
            "groups": {name: share.summary() for name, share in sorted(self.groups.items())},
            "calibration": self.calibration(),
            "deciles": deciles(self.margins),
            "order_agreement": self.orders.summary(),
            "first_position": self.firsts.summary(),
        }

    def _beside(self, name: str, share: Share) -> dict[str, Any]:
        apart = self.apart[name]
        return {
            "accuracy": share.summary(),
            "only_judge_right": apart.judge,
            "only_baseline_right": apart.baseline,
            "mcnemar_p": mcnemar(apart.judge, apart.baseline),
        }

    def calibration(self) -> dict[str, Any] | None:
        """Reliability bins, expected calibration error and Brier score of the label's probability; None without any."""
        n = sum(b.n for b in self.bins)
        if not n:
            return None
        bins = [
            {
                "low": 0.5 + i / (2 * BINS),
                "high": 0.5 + (i + 1) / (2 * BINS),
                "n": b.n,
                "confidence": b.p / b.n if b.n else None,
                "accuracy": b.hits / b.n if b.n else None,
            }
            for i, b in enumerate(self.bins)
        ]
        error = sum(abs(b.hits - b.p) for b in self.bins) / n
        return {"n": n, "bins": bins, "ece": error, "brier": self.brier / n}


def share_of_best(values: Sequence[float], best: int) -> float:
    """1 if the highest value is that of the best answer, 0 if it is another's; at a tie of k for the highest, 1/k."""
    top = max(values)
    return 1 / sum(v == top for v in values) if values[best] == top else 0.0


def deciles(margins: dict[int, Share]) -> list[dict[str, float]]:
    """Accuracy of each tenth of the records, the least certain first; a step that two tenths share is divided."""
    total = sum(share.n for share in margins.values())
    if total < BINS:
        return []
    found: list[dict[str, float]] = []
    ordered = iter(sorted(margins.items()))
    step, left, rate = 0, 0.0, 0.0
    for _ in range(BINS):
        room, hits = total / BINS, 0.0
        while room > 1e-9 * total:
            if left <= 0:
                step, share = next(ordered, (step, Share(rate * room, 1)))
                left, rate = float(share.n), share.hits / share.n
            took = min(room, left)
            hits, room, left = hits + took * rate, room - took, left - took
        found.append({"up_to": 10 ** ((step + 1) / STEPS), "n": total / BINS, "accuracy": hits / (total / BINS)})
    return found


def _step(margin: float) -> int:
    """The step that a margin's size lies in."""
    size = abs(margin)
    return SMALLEST if size == 0 else max(SMALLEST, min(LARGEST, math.floor(STEPS * math.log10(size))))
