"""Which of two models answers better: from a judge's opinions on both answers to each prompt, to numbers.

Side a is the first answer of every sample, side b the second. A prompt is worth 1 to a if a won, 0 if b won, 0.5 for a
tie. A judge that compares has seen each pair in both orders: the prompt is then worth the mean of the two votes, so
that a judge who always prefers the first shown gives everybody 50 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spa_lite import intervals
from spa_lite.errors import DataError
from spa_lite.intervals import Interval
from spa_lite.length_control import LengthControlled, length_controlled
from spa_lite.opinion import Opinion
from spa_lite.records import Sample

USABLE = 0.6
"""Order agreement below which a judge's preference says more about the order than about the answers."""


@dataclass(frozen=True)
class Orders:
    """What showing each pair in both orders tells of the judge. `unread` counts replies that could not be read."""

    agreement: Interval | None  # same winner in both orders, of the different answers read in both
    first: Interval | None  # the first shown wins, ties half, of the readable replies
    replies: int
    unread: int

    @property
    def usable(self) -> bool:
        """Whether the orders agree often enough for the judge to be believed."""
        return self.agreement is not None and self.agreement.value >= USABLE


@dataclass(frozen=True)
class HeadToHead:
    """Side a against side b by one judge. `wins` has one value in [0, 1] per prompt, all shares are a's.

    `orders` is None for a judge that gives each answer a number of its own: it has no order. Lengths are in characters.
    """

    wins: list[float] = field(repr=False)
    win_rate: Interval
    decisive: Interval | None
    length_controlled: LengthControlled
    orders: Orders | None
    ties: int
    identical: int  # of the ties: both answers are the same text
    length_a: float
    length_b: float
    prompts_needed: int | None

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.wins)

    @property
    def warnings(self) -> list[str]:
        """What speaks against believing the numbers."""
        if self.orders is None or self.orders.usable:
            return []
        seen = self.orders.agreement
        said = f"its two orders agree on {100 * seen.value:.0f} % of the prompts" if seen else "no reply could be read"
        return [f"judge unusable: {said} (below {100 * USABLE:.0f} % its preference is mostly the order)"]

    @property
    def verdict(self) -> str:
        """`a`, `b`, or nothing where the interval holds 50 % or the judge is unusable."""
        if self.warnings or self.win_rate.holds(0.5):
            return ""
        return "a" if self.win_rate.value > 0.5 else "b"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        lc = self.length_controlled
        return {
            "n": self.n,
            "win_rate": self.win_rate.to_dict(),
            "decisive": self.decisive.to_dict() if self.decisive else None,
            "ties": self.ties,
            "identical": self.identical,
            "length_controlled": {
                "name": lc.name,
                "interval": lc.interval.to_dict() if lc.interval else None,
                "note": lc.note,
            },
            "orders": None if self.orders is None else _orders_dict(self.orders),
            "length_a": self.length_a,
            "length_b": self.length_b,
            "prompts_needed": self.prompts_needed,
            "usable": not self.warnings,
            "verdict": self.verdict,
            "warnings": self.warnings,
        }


def head_to_head(
    samples: Sequence[Sample], opinions: Sequence[Opinion], seed: int = 0, difficulty: Sequence[float] | None = None
) -> HeadToHead:
    """Compare first answers with second ones. `difficulty`, one number per prompt, enters the length control.

    Raises DataError for no samples, or one without two answers.
    """
    if not samples:
        raise DataError("there is no prompt that both sides answered, so there is nothing to compare")
    for sample in samples:
        if len(sample.completions) != 2:
            raise DataError(f"prompt {sample.id} has {len(sample.completions)} answers; a comparison needs two")
    differ = [s.completions[0].text != s.completions[1].text for s in samples]
    wins = [worth(opinion) if d else 0.5 for opinion, d in zip(opinions, differ, strict=True)]
    lengths = np.array([[len(c.text) for c in sample.completions] for sample in samples], dtype=np.float64)
    rate = intervals.share(wins, seed)
    assert rate is not None
    return HeadToHead(
        wins=wins,
        win_rate=rate,
        decisive=intervals.share([float(w > 0.5) for w in wins if w != 0.5], seed),
        length_controlled=length_controlled(wins, list(lengths[:, 0] - lengths[:, 1]), difficulty, seed),
        orders=_orders(opinions, differ),
        ties=wins.count(0.5),
        identical=differ.count(False),
        length_a=float(lengths[:, 0].mean()),
        length_b=float(lengths[:, 1].mean()),
        prompts_needed=intervals.prompts_needed(rate.value - 0.5, float(np.std(wins))),
    )


def worth(opinion: Opinion) -> float:
    """What a prompt is worth to answer 0 of two: 1 won, 0 lost; of a judge that compares, the mean of its votes.

    A reply that could not be read is half a vote for each.
    """
    if not opinion.verdicts:
        return vote(opinion.scores[0], opinion.scores[1])
    votes = [0.5 if v.p is None else vote(v.p, 0.5) for v in opinion.verdicts]
    own = [x if v.first == 0 else 1 - x for v, x in zip(opinion.verdicts, votes, strict=True)]
    return sum(own) / len(own)


def vote(own: float, other: float) -> float:
    """1 if the first number is larger, 0 if the second is, 0.5 if they are equal."""
    return 1.0 if own > other else 0.0 if own < other else 0.5


def _orders(opinions: Sequence[Opinion], differ: Sequence[bool]) -> Orders | None:
    verdicts = [v for opinion in opinions for v in opinion.verdicts]
    if not verdicts:
        return None
    agree = []
    for opinion, answers_differ in zip(opinions, differ, strict=True):
        read = {v.first: vote(v.p, 0.5) for v in opinion.verdicts if v.p is not None}
        if len(read) == 2 and answers_differ:  # two answers that are the same have no winner to agree on
            agree.append(float(read[0] == 1 - read[1]))
    firsts = [vote(v.p, 0.5) for v in verdicts if v.p is not None]
    unread = sum(v.p is None for v in verdicts)
    return Orders(intervals.share(agree), intervals.share(firsts), len(verdicts), unread)


def _orders_dict(orders: Orders) -> dict[str, Any]:
    return {
        "agreement": orders.agreement.to_dict() if orders.agreement else None,
        "first": orders.first.to_dict() if orders.first else None,
        "replies": orders.replies,
        "unread": orders.unread,
    }
