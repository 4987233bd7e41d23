"""Sampled log-probs in the judge's place: a forward pass over the answers that need not be made.

The sampler knows the log-probability of each token that it draws. Where it is the judge's policy, their sums are the
numerator of the reward, and DPO's reference. A forward pass over whole answers rounds otherwise than sampling them
token by token, in 16 bits more so. So a few pairs are scored again, and all of them where that makes a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spa_lite.judge import Sums, Tokens, best_and_worst
from spa_lite.keys import shuffled
from spa_lite.opinion import Opinion
from spa_lite.recipe import Recipe
from spa_lite.records import Sample

SHARE, FEWEST = 0.02, 8
"""How many pairs are scored again: this share of them, this many at least."""
DRIFT, FLIPS = 0.02, 0.01
"""What is let pass: nats per token (mean), and share of labels. Of fewer than 100 pairs no label may flip."""


class Check:
    """Whether the log-probs that a round's samples brought are used, and how that came about.

    `sums` [samples][answers] are what was recorded (nats), None where it is not to be used from the start. `chosen` are
    the indices of samples to score again: they are drawn by a key, for the first ones may be alike.
    """

    def __init__(self, samples: Sequence[Sample], recipe: Recipe, round_: int) -> None:
        way = recipe.judge.rescore
        self.samples, self.tie = samples, recipe.judge.tie
        self.sums = None if way == "always" else recorded(samples)
        self.why = ""
        if self.sums is None:
            self.why = f"judge.rescore={way}" if way == "always" else "not every token was sampled"
        checked = way == "check" and self.sums is not None
        count = min(len(samples), max(FEWEST, math.ceil(SHARE * len(samples)))) if checked else 0
        self.chosen: list[int] = sorted(shuffled(len(samples), "rescore", recipe.seed, round_)[:count].tolist())
        self.mean: float | None = None
        self.largest: float | None = None
        self.flips: int | None = None

    @property
    def recorded(self) -> list[Sums]:
        """What was recorded of the samples to score again."""
        return [self.sums[k] for k in self.chosen] if self.sums else []

    @property
    def picked(self) -> list[Sample]:
        """The samples to score again."""
        return [self.samples[k] for k in self.chosen]

    def drifts(self, again: Sequence[Tokens]) -> bool:
        """Whether the log-probs [chosen][answers][tokens] scored again are too far, in the mean, from the recorded."""
        pairs = [(c.logprobs, v) for s, some in zip(self.picked, again, strict=True) for c, v in _zip(s, some)]
        off = np.abs(np.concatenate([np.subtract(*pair) for pair in pairs] or [np.zeros(0)]))
        if self.chosen:
            self.mean, self.largest = (float(off.mean()), float(off.max())) if len(off) else (0.0, 0.0)
        if drifted(self.to_dict()):
            self.why = f"their mean drift is {self.mean:.2g} nats per token, more than {DRIFT:g}"
        return bool(self.why)

    def flip(self, before: Sequence[Opinion], after: Sequence[Opinion]) -> bool:
        """Whether the sums scored again are needed because of labels: too many of the chosen get another one, by
        opinions on the recorded and on the new sums. Answers that are the same ids may change places."""
        pairs = list(zip(self.picked, before, after, strict=True))
        self.flips = sum(self._label(s, one) != self._label(s, other) for s, one, other in pairs) if pairs else None
        if self.why or not self.flips or self.flips <= FLIPS * len(pairs):
            return False
        self.why = f"{self.flips} of {len(pairs)} labels flip, more than {100 * FLIPS:g} %"
        return True

    def _label(self, sample: Sample, opinion: Opinion) -> tuple[Any, ...]:
        return tuple(sample.completions[k].ids for k in best_and_worst(opinion.scores, self.tie))

    def to_dict(self) -> dict[str, Any]:
        """As the stage's summary holds it."""
        return {
            "pairs": len(self.samples),
            "checked": len(self.chosen),
            "mean_drift": self.mean,
            "largest_drift": self.largest,
            "flips": self.flips,
            "rescored": len(self.samples) if self.why else len(self.chosen),
            "why": self.why,
        }


def drifted(found: dict[str, Any]) -> bool:
    """Whether, by what `to_dict` says, the sampler was farther off than may be."""
    return found["mean_drift"] is not None and not found["mean_drift"] <= DRIFT


def sentence(found: dict[str, Any]) -> str:
    """What `to_dict` says, in words."""
    if found["why"]:
        return f"sampled log-probs are not used: {found['why']}; all {found['pairs']} pairs were scored again"
    if not found["checked"]:
        return "sampled log-probs are used unseen (judge.rescore=never)"
    flips = "" if found["flips"] is None else f", {found['flips']} labels flip"
    drift = f"{found['mean_drift']:.2g} nats per token off (largest {found['largest_drift']:.2g})"
    return f"sampled log-probs are used: {found['checked']} of {found['pairs']} pairs scored again are {drift}{flips}"


def recorded(samples: Sequence[Sample]) -> list[Sums] | None:
    """Sums (nats) of what the sampler recorded, per sample and answer; None unless it did so for every token."""
    if any(len(c.logprobs) != len(c.ids) for s in samples for c in s.completions):
        return None
    return [tuple(math.fsum(c.logprobs) for c in s.completions) for s in samples]


def sums_of(values: Sequence[Tokens]) -> list[Sums]:
    """Sums of log-probs per token."""
    return [tuple(math.fsum(v) for v in some) for some in values]


def _zip(sample: Sample, values: Tokens) -> Any:
    return zip(sample.completions, values, strict=True)
