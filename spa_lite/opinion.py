"""What a judge makes of the answers to a prompt, whoever the judge is: the one small interface of all judges.

A judge sees samples (a prompt with two or more answers, as text and as token ids) and has an opinion on each. Some
give every answer a number, some compare two answers at a time, in both orders unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from spa_lite.objective import preference
from spa_lite.records import Record, Sample

Tick = Callable[[], None]
"""Called once per sample that is done."""


class Verdict(Record, frozen=True, kw_only=True):
    """One comparison: the answers with indices `first` and `second`, shown in this order.

    `p` is the probability that the first shown is the better one (1, 0.5 or 0 where the judge only says which), None
    if its reply could not be read.
    """

    first: int
    second: int
    p: float | None


class Opinion(Record, frozen=True, kw_only=True):
    """`scores` has one number per answer, higher is better.

    `odds` says that differences of scores are log-odds (nats), so that they make a probability. A judge that compares
    leaves its `verdicts`, one or two orders of every pair; the score of an answer is then its mean probability of
    winning. `unread` counts replies that could not be read.
    """

    scores: tuple[float, ...]
    odds: bool = False
    verdicts: tuple[Verdict, ...] = ()
    unread: int = 0

    def p(self, i: int, j: int) -> float | None:
        """Probability that answer i is better than answer j; None from a judge that gives none."""
        seen = [
            v.p if v.first == i else 1 - v.p for v in self.verdicts if {v.first, v.second} == {i, j} and v.p is not None
        ]
        if seen:
            return sum(seen) / len(seen)
        return float(preference(self.scores[i] - self.scores[j])) if self.odds else None

    @property
    def agreeing(self) -> tuple[bool, ...]:
        """For each pair of answers whose both orders could be read: whether the same answer won (or neither, twice)."""
        read = {(v.first, v.second): v.p for v in self.verdicts}
        return tuple(
            (there > 0.5) == (back < 0.5) and (there < 0.5) == (back > 0.5)
            for (i, j), there in read.items()
            if i < j and there is not None and (back := read.get((j, i))) is not None
        )


class Judge(Protocol):
    """A judge of samples."""

    @property
    def name(self) -> str:
        """Who judges, to stand beside every number: `implicit`, `openai gpt-4.1 at http://...`. Holds no secret."""
        ...

    @property
    def key(self) -> str:
        """Digest of all that its opinions depend on beside the samples: model, prompt, settings."""
        ...

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample, in order. Raises SpaError (JudgeError for a server) where it cannot judge."""
        ...


def compared(n: int, verdicts: Sequence[Verdict]) -> Opinion:
    """The opinion of a judge that compares two answers at a time: an answer's score is its mean probability of winning.

    An unread verdict counts 0.5.
    """
    wins: list[list[float]] = [[] for _ in range(n)]
    for v in verdicts:
        p = 0.5 if v.p is None else v.p
        wins[v.first].append(p)
        wins[v.second].append(1 - p)
    scores = tuple(math.fsum(w) / len(w) if w else 0.5 for w in wins)
    return Opinion(scores=scores, verdicts=tuple(verdicts), unread=sum(v.p is None for v in verdicts))


def orders(n: int, swap: bool = True) -> list[tuple[int, int]]:
    """(first, second) of every comparison of n answers: each pair in both orders, or (`swap` False) as they stand."""
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    return [order for i, j in pairs for order in ((i, j), (j, i))] if swap else pairs


def tallied(opinions: Sequence[Opinion]) -> dict[str, float]:
    """What a pile of opinions says of its judge: how many replies could not be read (`unread`); of the pairs that were
    read in both orders (`both_orders`) in how many these `disagree`, and the share. Without such pairs, `unread` alone.
    """
    found: dict[str, float] = {"unread": sum(opinion.unread for opinion in opinions)}
    agreeing = [same for opinion in opinions for same in opinion.agreeing]
    if agreeing:
        disagree = agreeing.count(False)
        found |= {"both_orders": len(agreeing), "disagree": disagree, "disagree_share": disagree / len(agreeing)}
    return found
