"""Whether a model's own answers collapse: how diverse, how repetitive, how long and how often cut they are.

A policy that learns from its own judgements can drift into answers that are all alike, go in circles, or grow
without end. None of these shows in the loss. Each is a number here, to be compared with the round before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from spa_lite.intervals import wilson
from spa_lite.keys import digest
from spa_lite.records import Completion, Sample

WINDOW = 1000
"""Tokens per window of the distinct-n measures. Distinct-n of a whole text falls with its length, so it would fall in a
round that is merely larger; the mean over windows of one size does not."""
LONG = 4
"""Repeats inside an answer are of this many tokens in a row."""
LOOP = 0.5
"""An answer goes in circles if more than this share of its n-grams was there before."""

HIGH = {
    "empty": (0.01, 0.01, "of the answers are empty"),
    "truncated": (0.2, 0.05, "of the answers were cut by --max-tokens"),
    "looping": (0.05, 0.02, "of the answers go in circles"),
    "identical_pairs": (0.2, 0.05, "of the pairs of answers to one prompt are the same text"),
    "shared": (0.5, 0.2, "of the prompts got an answer that another prompt got, too"),
}
"""A share above the first number is worth a warning, and so is one that rose since the round before by more than the
second, and by more than chance would let it."""
GROWTH = 1.25
"""Mean length against the round before."""
FALL = 0.85
"""Distinct-n against the round before."""


@dataclass(frozen=True)
class Findings:
    """Measures of one round's answers: shares in [0, 1], lengths in tokens (words where there are no ids).

    `distinct_1` and `distinct_2` are different n-grams over all n-grams, the mean over windows of `window` tokens;
    `repeat_4` is the mean over answers of the share of 4-grams that were in the answer before. `identical_pairs` is of
    all pairs of answers to one prompt, `shared` of all prompts, the other shares of all answers.
    """

    prompts: int = 0
    answers: int = 0
    window: int = 0
    mean_length: float = 0.0
    distinct_1: float = 0.0
    distinct_2: float = 0.0
    repeat_4: float = 0.0
    looping: float = 0.0
    truncated: float = 0.0
    empty: float = 0.0
    identical_pairs: float = 0.0
    shared: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return dict(vars(self))

    def warnings(self, previous: Mapping[str, Any] | None = None) -> list[str]:
        """What looks like collapse, a sentence each; `previous` is `to_dict()` of the round before."""
        if not self.answers:
            return ["there are no answers at all"]
        before = previous if previous and previous.get("answers") else None
        found = [self._share(name, before) for name in HIGH]
        if before:
            found += [self._growth(before), *(self._fall(name, before) for name in ("distinct_1", "distinct_2"))]
        return [sentence for sentence in found if sentence]

    def _share(self, name: str, before: Mapping[str, Any] | None) -> str | None:
        """A share that is high, or that rose."""
        limit, rise, words = HIGH[name]
        now, old = getattr(self, name), _number(before, name)
        interval = wilson(now * self.prompts, self.prompts)
        rose = old is not None and interval is not None and now > old + rise and interval.low > old
        if now <= limit and not rose:
            return None
        then = "" if old is None else f" (the round before: {100 * old:.1f} %)"
        return f"{100 * now:.1f} % {words}{then}"

    def _growth(self, before: Mapping[str, Any]) -> str | None:
        old = _number(before, "mean_length")
        if not old or self.mean_length <= GROWTH * old:
            return None
        return f"answers grew from {old:.1f} to {self.mean_length:.1f} tokens since the round before"

    def _fall(self, name: str, before: Mapping[str, Any]) -> str | None:
        old = _number(before, name)
        now = getattr(self, name)
        if not old or before.get("window") != self.window or now >= FALL * old:
            return None
        return f"answers grow alike: {name.replace('_', '-')} fell from {old:.3f} to {now:.3f} since the round before"


def _number(found: Mapping[str, Any] | None, name: str) -> float | None:
    """A measure of an older round, which may have been made before there was such a measure."""
    value = found.get(name) if found else None
    return float(value) if isinstance(value, int | float) else None


def lint_samples(samples: Iterable[Sample]) -> Findings:
    """Measure the answers of one round. One pass; of each answer only a digest is kept."""
    tally = Tally()
    for sample in samples:
        tally.add(sample)
    return tally.findings()


@dataclass
class Tally:
    """Counts over the answers seen so far: `add` each sample, then ask for the `findings`."""

    prompts: int = 0
    answers: int = 0
    tokens: int = 0
    pairs: int = 0
    identical: int = 0
    truncated: int = 0
    empty: int = 0
    looping: int = 0
    repeats: float = 0.0
    first_prompt: dict[bytes, int] = field(default_factory=dict)  # answer -> the prompt that got it first
    sharing: set[int] = field(default_factory=set)  # prompts whose answer another prompt got, too
    windows: _Windows = field(default_factory=lambda: _Windows())

    def add(self, sample: Sample) -> None:
        """Count the answers to one prompt."""
        answers = [pieces(completion) for completion in sample.completions]
        for completion, tokens in zip(sample.completions, answers, strict=True):
            repeated = repeats(tokens, LONG)
            self.tokens += len(tokens)
            self.truncated += completion.ended == "cap"
            self.empty += not completion.text.strip()
            self.repeats += repeated
            self.looping += repeated > LOOP
            self.windows.add(tokens)
        texts = Counter(completion.text.strip() for completion in sample.completions)
        for text in texts:
            first = self.first_prompt.setdefault(digest(text), self.prompts)
            if first != self.prompts:
                self.sharing |= {first, self.prompts}
        self.answers += len(answers)
        self.pairs += len(answers) * (len(answers) - 1) // 2
        self.identical += sum(count * (count - 1) // 2 for count in texts.values())
        self.prompts += 1

    def findings(self) -> Findings:
        """The measures of all that was added."""
        if not self.answers:
            return Findings(prompts=self.prompts)
        of, (distinct_1, distinct_2) = self.answers, self.windows.means()
        return Findings(
            prompts=self.prompts,
            answers=of,
            window=WINDOW if self.windows.count else min(self.tokens, WINDOW),
            mean_length=self.tokens / of,
            distinct_1=distinct_1,
            distinct_2=distinct_2,
            repeat_4=self.repeats / of,
            looping=self.looping / of,
            truncated=self.truncated / of,
            empty=self.empty / of,
            identical_pairs=self.identical / self.pairs if self.pairs else 0.0,
            shared=len(self.sharing) / self.prompts,
        )


class _Windows:
    """Distinct-1 and distinct-2 (Li et al., 2016) by windows of WINDOW tokens over all answers in a row.

    No bigram spans two answers. A last window that is not full counts only if there is no full one.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums = [0.0, 0.0]
        self._begin()

    def add(self, tokens: Sequence[Hashable]) -> None:
        start = 0
        while start < len(tokens):
            part = tokens[start : start + WINDOW - self._filled]
            self._ones.update(part)
            self._twos.update(pairwise(part))
            self._filled += len(part)
            self._bigrams += len(part) - 1
            start += len(part)
            if self._filled == WINDOW:
                self._sums = [total + share for total, share in zip(self._sums, self._shares(), strict=True)]
                self.count += 1
                self._begin()

    def means(self) -> tuple[float, float]:
        if not self.count:
            return self._shares()
        return self._sums[0] / self.count, self._sums[1] / self.count

    def _begin(self) -> None:
        self._ones: set[Hashable] = set()
        self._twos: set[tuple[Hashable, Hashable]] = set()
        self._filled = self._bigrams = 0

    def _shares(self) -> tuple[float, float]:
        return len(self._ones) / max(self._filled, 1), len(self._twos) / max(self._bigrams, 1)


def pieces(completion: Completion) -> Sequence[Hashable]:
    """The answer's token ids without the end-of-turn token; its words where there are no ids."""
    ids = completion.ids
    return (ids[:-1] if completion.ended == "eos" else ids) if ids else completion.text.split()


def repeats(tokens: Sequence[Hashable], n: int) -> float:
    """Share of n-grams that were there before in the same answer (Welleck et al., 2020); 0 of a shorter answer."""
    count = len(tokens) - n + 1
    return 1 - len(set(ngrams(tokens, n))) / count if count > 0 else 0.0


def ngrams(tokens: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    """All runs of n tokens in a row."""
    return zip(*(tokens[start:] for start in range(n)), strict=False)
