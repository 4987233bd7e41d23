"""Judges that ask a sequence classifier: a reward model, or an encoder that reads both answers at once.

What the classifier is and where it runs is a backend's business: see `spa_lite.backends.classifiers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from spa_lite.keys import digest
from spa_lite.objective import preference
from spa_lite.opinion import Opinion, Tick, Verdict, compared, orders
from spa_lite.records import Message, Sample

Question = tuple[Sequence[Message], str, str]
"""A conversation that ends with a user turn, and the two answers in the order in which they are shown."""


class Classifier(Protocol):
    """A model with one output per text. `compares` says which of the two verbs it has."""

    @property
    def name(self) -> str:
        """What stands beside every number."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer and how texts are rendered."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it reads two answers at once; otherwise it rewards one."""
        ...

    @property
    def cut(self) -> int:
        """How many texts so far were too long for it and lost a part."""
        ...

    def tokens(self, text: str) -> int:
        """Length of a text in its own tokens."""
        ...

    def scores(self, conversations: Sequence[Sequence[Message]], tick: Tick = lambda: None) -> list[float]:
        """The reward of each conversation's last turn, an answer. `tick` is called once per conversation."""
        ...

    def comparisons(self, questions: Sequence[Question], tick: Tick = lambda: None) -> list[float]:
        """The log-odds (nats) that the answer shown first is better. `tick` is called once per question."""
        ...


class RewardJudge:
    """Each answer alone gets a reward, less `length_penalty` for each of its tokens (Eq. 13). Differences of rewards
    are log-odds, as in the model of Bradley and Terry that reward models are trained with.

    Tokens are those of the sample; of the classifier where the sample is text only.
    """

    def __init__(self, classifier: Classifier, length_penalty: float = 0.0) -> None:
        self.classifier, self.length_penalty = classifier, length_penalty

    @property
    def name(self) -> str:
        """`reward-model`, which one, and the penalty if there is one."""
        penalty = f" - {self.length_penalty:g} per token" if self.length_penalty else ""
        return f"reward-model {self.classifier.name}{penalty}"

    @property
    def key(self) -> str:
        """Digest of the classifier and the penalty."""
        return digest("reward", self.classifier.fingerprint, self.length_penalty).hex()

    @property
    def notes(self) -> list[str]:
        """What a user should hear about these opinions."""
        return _cut(self.classifier)

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One reward per answer."""
        told = [
            (*sample.messages, Message(role="assistant", content=answer.text))
            for sample in samples
            for answer in sample.completions
        ]
        rewards = iter(self.classifier.scores(told, _per_sample(tick, [len(s.completions) for s in samples])))
        return [Opinion(scores=tuple(self._penalised(sample, rewards)), odds=True) for sample in samples]

    def _penalised(self, sample: Sample, rewards: Iterator[float]) -> Iterator[float]:
        for answer in sample.completions:
            reward = next(rewards)
            if self.length_penalty:
                reward -= self.length_penalty * (len(answer.ids) or self.classifier.tokens(answer.text))
            yield reward


class PairEncoderJudge:
    """Two answers at a time, every pair in both orders, so that the place of an answer cannot decide."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @property
    def name(self) -> str:
        """`reward-model` and which one."""
        return f"reward-model {self.classifier.name}"

    @property
    def key(self) -> str:
        """Digest of the classifier."""
        return digest("pair encoder", self.classifier.fingerprint).hex()

    @property
    def notes(self) -> list[str]:
        """What a user should hear about these opinions."""
        return _cut(self.classifier)

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """A verdict per order of each pair of answers."""
        shown = [orders(len(sample.completions)) for sample in samples]
        asked: list[Question] = [
            (sample.messages, sample.completions[first].text, sample.completions[second].text)
            for sample, some in zip(samples, shown, strict=True)
            for first, second in some
        ]
        odds = iter(self.classifier.comparisons(asked, _per_sample(tick, [len(some) for some in shown])))
        return [
            compared(
                len(sample.completions),
                [Verdict(first=first, second=second, p=_share(next(odds))) for first, second in some],
            )
            for sample, some in zip(samples, shown, strict=True)
        ]


def _per_sample(tick: Tick, sizes: Sequence[int]) -> Callable[[], None]:
    """A tick per text that ticks once per sample: texts are read in order of length, so samples end in any order."""
    ends, done = list(accumulate(sizes))[::-1], 0

    def one() -> None:
        nonlocal done
        done += 1
        while ends and ends[-1] <= done:
            ends.pop()
            tick()

    return one


def _cut(classifier: Classifier) -> list[str]:
    return [f"{classifier.cut} texts were too long for {classifier.name} and lost a part"] if classifier.cut else []


def _share(log_odds: float) -> float:
    return float(preference(np.float64(log_odds)))
