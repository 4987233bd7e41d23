"""Judges that know the better answer by where it comes from, and ask nobody: by the order of candidates, by a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spa_lite.errors import RecipeError
from spa_lite.keys import digest
from spa_lite.opinion import Opinion, Tick
from spa_lite.records import Completion, Sample

LABELLED = ("chosen", "rejected")
"""Kinds of answers that a person compared, the better one first: what `pair` stands for among candidates."""


def ranking(candidates: Sequence[str]) -> tuple[str, ...]:
    """Kinds of answers, best first: those of `candidates.kinds`, each once."""
    kinds = [kind for name in candidates for kind in (LABELLED if name == "pair" else (name,))]
    return tuple(dict.fromkeys(kinds))


class Order:
    """An answer is worth as much as its kind: the one named first is the best. Two answers of a kind tie.

    Raises RecipeError where fewer than two kinds are named, and for an answer of a kind that is not.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.kinds = ranking(candidates)
        if len(self.kinds) < 2:
            raise RecipeError(
                f"judge.by=order ranks kinds of candidates, and {self.kinds[0]} is the only one; "
                "name two or more in candidates.kinds, the best first"
            )
        self.name = f"order {' > '.join(self.kinds)}"
        self.key = digest("order", *self.kinds).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """Scores are -rank: 0 for the best kind, -1 for the next."""
        return _opinions(samples, self._score, tick)

    def _score(self, sample: Sample, answer: Completion) -> float:
        if answer.kind not in self.kinds:
            raise RecipeError(
                f"judge.by=order ranks {', '.join(self.kinds)}, and prompt {sample.id} has an answer of kind "
                f"{answer.kind}; name it in candidates.kinds"
            )
        return float(-self.kinds.index(answer.kind))


class Label:
    """What a person chose beats what that person rejected. Raises RecipeError for any other answer."""

    name, key = "label", digest("label").hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """Scores are 1 for a chosen answer and 0 for a rejected one."""
        return _opinions(samples, self._score, tick)

    def _score(self, sample: Sample, answer: Completion) -> float:
        if answer.kind not in LABELLED:
            raise RecipeError(
                f"judge.by=label knows labelled answers only, and prompt {sample.id} has one of kind {answer.kind}; "
                "choose another --judge"
            )
        return float(answer.kind == LABELLED[0])


def _opinions(samples: Sequence[Sample], score: Callable[[Sample, Completion], float], tick: Tick) -> list[Opinion]:
    found = []
    for sample in samples:
        found.append(Opinion(scores=tuple(score(sample, answer) for answer in sample.completions)))
        tick()
    return found
