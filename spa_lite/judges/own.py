"""The model's own probabilities as the judge: the implicit reward of the paper (Eq. 7), and the likelihood beside it.

Both are made from scorers, so that the sums may come from a model, or from a file where another pass put them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spa_lite.judge import Scorer, no_reference, rows_of
from spa_lite.keys import digest
from spa_lite.opinion import Judge, Opinion, Tick
from spa_lite.records import Sample


class Implicit:
    """beta * log pi/pi_ref of an answer, less `length_penalty` for each of its tokens (Eq. 13), in nats.

    `model` tells the digest of what the scorers score with; it is asked only if somebody asks for `key`.
    """

    by = "implicit"

    def __init__(
        self,
        policy: Scorer,
        reference: Scorer,
        beta: float,
        length_penalty: float = 0.0,
        model: Callable[[], str] = lambda: "",
    ) -> None:
        self.policy, self.reference = policy, reference
        self.beta, self.length_penalty, self._model = beta, length_penalty, model

    @property
    def name(self) -> str:
        """`implicit`, and the penalty if there is one."""
        return self.by + (f" - {self.length_penalty:g} per token" if self.length_penalty else "")

    @property
    def key(self) -> str:
        """Digest of beta, the penalty and the model."""
        return digest(self.by, self.beta, self.length_penalty, self._model()).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """Rewards, whose differences are log-odds (Eq. 7)."""
        rows = rows_of(samples)
        opinions = []
        for row, own, other in zip(rows, self.policy(rows), self.reference(rows), strict=True):
            terms = zip(own, other, row.responses, strict=True)
            opinions.append(Opinion(scores=tuple(self._reward(*term) for term in terms), odds=True))
            tick()
        return opinions

    def _reward(self, policy: float, reference: float, ids: Sequence[int]) -> float:
        reward = self.beta * (policy - reference)
        return reward - self.length_penalty * len(ids) if self.length_penalty else reward


class Likelihood(Implicit):
    """beta * log pi of an answer, less the penalty: what is left of the reward without a reference."""

    by = "likelihood"

    def __init__(
        self, policy: Scorer, beta: float, length_penalty: float = 0.0, model: Callable[[], str] = lambda: ""
    ) -> None:
        super().__init__(policy, no_reference, beta, length_penalty, model)


class Penalised:
    """Another judge's scores, less `length_penalty` for each token of an answer."""

    def __init__(self, judge: Judge, length_penalty: float) -> None:
        self.judge, self.length_penalty = judge, length_penalty
        self.name = f"{judge.name} - {length_penalty:g} per token"
        self.key = digest("penalised", judge.key, length_penalty).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample."""
        return [
            Opinion(
                scores=tuple(
                    score - self.length_penalty * len(c.ids)
                    for score, c in zip(opinion.scores, sample.completions, strict=True)
                ),
                odds=opinion.odds,
                unread=opinion.unread,
            )
            for sample, opinion in zip(samples, self.judge(samples, tick), strict=True)
        ]
