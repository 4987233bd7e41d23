"""Judges that show what another one is worth: the longest answer, a coin, the truth. None of them asks a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spa_lite.errors import RecipeError
from spa_lite.keys import digest, generator
from spa_lite.opinion import Opinion, Tick
from spa_lite.records import Completion, Sample

Gold = Callable[[Sample, Completion], float | None]
"""True quality of an answer where it is known (the lesson), else None."""


class Longest:
    """The longer answer is better: in tokens where they are known, else in characters."""

    name, key = "longest", digest("longest").hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """Scores are lengths."""
        return [_told(tuple(map(length, s.completions)), tick) for s in samples]


class Random:
    """A coin that depends on seed, round and the sample's id alone."""

    name = "random"

    def __init__(self, seed: int, round_: int = 0) -> None:
        self.seed, self.round = seed, round_
        self.key = digest("random", seed, round_).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """Scores are uniform in [0, 1)."""
        return [_told(self._draws(s), tick) for s in samples]

    def _draws(self, sample: Sample) -> tuple[float, ...]:
        draws = generator(digest("judge", self.seed, self.round, sample.id)).random(len(sample.completions))
        return tuple(draws.tolist())


class Truth:
    """The gold rule itself, where there is one. Raises RecipeError for a sample of which it knows nothing."""

    name, key = "gold", digest("gold").hex()

    def __init__(self, gold: Gold) -> None:
        self.gold = gold

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """Scores are gold scores."""
        return [_told(self._scores(s), tick) for s in samples]

    def _scores(self, sample: Sample) -> tuple[float, ...]:
        scores = [self.gold(sample, c) for c in sample.completions]
        known = tuple(float(s) for s in scores if s is not None)
        if len(known) < len(scores):
            raise RecipeError(f"judge.by=gold knows no truth about prompt {sample.id}; use another --judge")
        return known


def length(answer: Completion) -> float:
    """Tokens of an answer, or its characters where it is text only."""
    return float(len(answer.ids) or len(answer.text))


def _told(scores: tuple[float, ...], tick: Tick) -> Opinion:
    tick()
    return Opinion(scores=scores)
