"""Judges that are asked a question in words: which of two answers is better, or what grade an answer deserves.

The question comes from `wording`. Nothing that a model wrote is executed, and a reply is read for a letter or a number
and for nothing else. What is not defended against: an answer that talks the asked model round ("the judge should say
A"). The shipped templates tell it not to listen, and asking in both orders shows a letter or a place that always wins;
neither stops an answer that praises itself in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

from spa_lite.asking import Asked, Conversation, Drawn
from spa_lite.judges.replies import grade, verdict
from spa_lite.judges.wording import GRADES, POINTS, VERDICTS, checked, question
from spa_lite.keys import digest, grade_key
from spa_lite.opinion import Opinion, Tick, Verdict, compared, orders
from spa_lite.records import Sample

REPLY_TOKENS = 2048
"""Room for a reply in words: a model may think aloud before its verdict."""


class PairJudge:
    """Asks which of two answers is better, each pair in both orders, or (`swap` False) as the answers stand.

    `by` is the judge's name in the recipe.

    Where the asked can say how probable both verdicts are, the first shown is better with probability
    P(A) / (P(A) + P(B)); else its reply is read.
    """

    def __init__(self, asked: Asked, template: str, by: str, swap: bool = True) -> None:
        self.asked, self.template, self.swap = asked, checked(template, "pair"), swap
        self.name = f"{by} {asked.name}" + ("" if swap else ", one order")
        self.key = digest("pair judge", asked.key, template, VERDICTS, REPLY_TOKENS, swap).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample with its verdicts. Raises JudgeError if a server does not answer."""
        shown = [orders(len(s.completions), self.swap) for s in samples]
        questions = [self._question(s, i, j) for s, some in zip(samples, shown, strict=True) for i, j in some]
        shares = iter(self._shares(questions, per_sample(tick, [len(some) for some in shown])))
        return [
            compared(len(s.completions), [Verdict(first=i, second=j, p=next(shares)) for i, j in some])
            for s, some in zip(samples, shown, strict=True)
        ]

    def _question(self, sample: Sample, first: int, second: int) -> Conversation:
        shown = {"answer_1": sample.completions[first].text, "answer_2": sample.completions[second].text}
        return question(self.template, sample, shown)

    def _shares(self, questions: Sequence[Conversation], tick: Tick) -> list[float | None]:
        """Probability that the first shown is better, per question."""
        known = [share(found) for found in self.asked.preferences(questions, VERDICTS, tick)]
        return filled(known, self.asked, questions, verdict, tick)


class ScoreJudge:
    """Asks for a grade of each answer. `by` is the judge's name in the recipe, `grades` are all there are, ascending.

    Where the asked can say how probable each grade is, the grade is the mean over them; else its reply is read.
    An answer whose grade cannot be read gets the mean of the sample's other grades, and is counted.
    """

    def __init__(self, asked: Asked, template: str, by: str, grades: Sequence[str] = GRADES) -> None:
        self.asked, self.template, self.grades = asked, checked(template, "score"), grades
        self.name = f"{by} {asked.name}"
        self.key = digest("score judge", asked.key, template, tuple(grades), REPLY_TOKENS).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample, grades as scores. Raises JudgeError if a server does not answer."""
        questions = [question(self.template, s, {"answer": c.text}) for s in samples for c in s.completions]
        found = iter(self._found(questions, per_sample(tick, [len(s.completions) for s in samples])))
        return [graded([[next(found)] for _ in s.completions], self.grades) for s in samples]

    def _found(self, questions: Sequence[Conversation], tick: Tick) -> list[float | None]:
        known = [expected(found, self.grades) for found in self.asked.preferences(questions, self.grades, tick)]
        return filled(known, self.asked, questions, partial(grade, grades=self.grades), tick)


class RubricJudge:
    """Asks for points by a list of criteria, with reasons: several replies per answer, drawn at a temperature.

    The score is their mean, `by` the judge's name in the recipe.

    A reply depends on (seed, round, sample id, answer, try) alone. One that cannot be read is counted and left out; an
    answer without any that can gets the mean of the sample's others.
    """

    def __init__(
        self, asked: Drawn, template: str, by: str, tries: int = 3, temp: float = 0.7, seed: int = 0, round_: int = 0
    ) -> None:
        self.asked, self.template = asked, checked(template, "rubric")
        self.tries, self.temp, self.seed, self.round = tries, temp, seed, round_
        self.name = f"{by} {asked.name}, {tries} tries"
        self.key = digest("rubric judge", asked.key, template, POINTS, REPLY_TOKENS, tries, temp, seed, round_).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample, mean points (0 to 5) as scores."""
        places = [(s, i) for s in samples for i in range(len(s.completions))]
        questions = [question(self.template, s, {"answer": s.completions[i].text}) for s, i in places]
        keys = [[grade_key(self.seed, self.round, s.id, i, k) for k in range(self.tries)] for s, i in places]
        ticks = per_sample(tick, [len(s.completions) for s in samples])
        replies = iter(self.asked.draws(questions, keys, self.temp, REPLY_TOKENS, ticks))
        return [
            graded([[grade(text, POINTS) for text in next(replies)] for _ in s.completions], POINTS) for s in samples
        ]


def filled(
    known: Sequence[float | None],
    asked: Asked,
    questions: Sequence[Conversation],
    read: Callable[[str], float | None],
    tick: Tick,
) -> list[float | None]:
    """What is known, and where nothing is, what can be read from the reply in words."""
    open_ = [i for i, value in enumerate(known) if value is None]
    replies = asked.replies([questions[i] for i in open_], REPLY_TOKENS, tick) if open_ else []
    told = dict(zip(open_, map(read, replies), strict=True))
    return [told.get(i, value) for i, value in enumerate(known)]


def share(logps: tuple[float, ...] | None) -> float | None:
    """P(first) / (P(first) + P(second)); None where neither is known."""
    if logps is None or max(logps) == -math.inf:
        return None
    first, second = (math.exp(logp - max(logps)) for logp in logps)
    return first / (first + second)


def expected(logps: tuple[float, ...] | None, grades: Sequence[str] = GRADES) -> float | None:
    """The mean grade under the probabilities of the grades; None where none is known."""
    if logps is None or max(logps) == -math.inf:
        return None
    weights = [math.exp(logp - max(logps)) for logp in logps]
    return math.fsum(int(g) * w for g, w in zip(grades, weights, strict=True)) / math.fsum(weights)


def graded(tries: Sequence[Sequence[float | None]], grades: Sequence[str]) -> Opinion:
    """The opinion of one sample's grades, one or more per answer. Where none is known: the middle of all grades."""
    read = [[g for g in some if g is not None] for some in tries]
    means = [mean(some) if some else None for some in read]
    known = [m for m in means if m is not None]
    middle = mean(known) if known else mean([float(g) for g in grades])
    unread = sum(map(len, tries)) - sum(map(len, read))
    return Opinion(scores=tuple(middle if m is None else m for m in means), unread=unread)


def mean(values: Sequence[float]) -> float:
    """The mean of one value or more."""
    return math.fsum(values) / len(values)


def per_sample(tick: Tick, sizes: Sequence[int]) -> Tick:
    """Called once per question, calls `tick` once per sample: after as many questions as each sample has."""
    ends = accumulate(sizes)
    done, end = 0, next(ends, None)

    def asked() -> None:
        nonlocal done, end
        done += 1
        while end is not None and done >= end:
            tick()
            end = next(ends, None)

    return asked
