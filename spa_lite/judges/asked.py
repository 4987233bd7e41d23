"""Judges that are asked a question in words: which of two answers is better, or what grade an answer deserves.

The question is a template file with places for the conversation and the answers, filled in one pass: whatever an
answer holds, a placeholder's name or a made-up end of the question, is only text. Nothing that a model wrote is
executed, and a reply is read for a letter or a number and for nothing else. What is not defended against: an answer
that talks the asked model round ("the judge should say A"). The shipped templates tell it not to listen, and asking
in both orders shows a letter or a place that always wins; neither stops an answer that praises itself in both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Literal

from spa_lite.asking import Asked, Conversation
from spa_lite.errors import RecipeError
from spa_lite.judges.replies import grade, verdict
from spa_lite.keys import digest
from spa_lite.opinion import Opinion, Tick, Verdict, both_orders, compared
from spa_lite.records import Message, Sample

Kind = Literal["pair", "score"]

VERDICTS = ("A", "B")
"""What a judge of two answers replies: the first shown is better, the second is."""
GRADES = tuple(str(grade) for grade in range(1, 11))
ANSWERS: dict[Kind, tuple[str, ...]] = {"pair": ("answer_1", "answer_2"), "score": ("answer",)}
"""Placeholders of the answers; beside them stands {conversation}, or {question}: its last turn alone."""
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
REPLY_TOKENS = 2048
"""Room for a reply in words: a model may think aloud before its verdict."""


def read_template(kind: Kind, path: str | Path | None = None) -> str:
    """The question's text: a file, or the shipped one. Raises RecipeError if it cannot be read."""
    if path is None:
        return resources.files("spa_lite.judges").joinpath(f"prompts/{kind}.txt").read_text(encoding="utf-8")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RecipeError(f"the judge's prompt {path} cannot be read ({reason}): check --judge-prompt") from None


class PairJudge:
    """Asks which of two answers is better, each pair in both orders. `by` is the judge's name in the recipe.

    Where the asked can say how probable both verdicts are, the first shown is better with probability
    P(A) / (P(A) + P(B)); else its reply is read.
    """

    def __init__(self, asked: Asked, template: str, by: str) -> None:
        self.asked, self.template = asked, checked(template, "pair")
        self.name = f"{by} {asked.name}"
        self.key = digest("pair judge", asked.key, template, VERDICTS, REPLY_TOKENS).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample with its verdicts. Raises JudgeError if a server does not answer."""
        shown = [both_orders(len(s.completions)) for s in samples]
        questions = [self._question(s, i, j) for s, orders in zip(samples, shown, strict=True) for i, j in orders]
        shares = iter(self._shares(questions, per_sample(tick, [len(orders) for orders in shown])))
        return [
            compared(len(s.completions), [Verdict(first=i, second=j, p=next(shares)) for i, j in orders])
            for s, orders in zip(samples, shown, strict=True)
        ]

    def _question(self, sample: Sample, first: int, second: int) -> Conversation:
        shown = {"answer_1": sample.completions[first].text, "answer_2": sample.completions[second].text}
        return question(self.template, sample, shown)

    def _shares(self, questions: Sequence[Conversation], tick: Tick) -> list[float | None]:
        """Probability that the first shown is better, per question."""
        known = [share(found) for found in self.asked.preferences(questions, VERDICTS, tick)]
        return filled(known, self.asked, questions, verdict, tick)


class ScoreJudge:
    """Asks for a grade of each answer from 1 to 10. `by` is the judge's name in the recipe.

    Where the asked can say how probable each grade is, the grade is the mean over them; else its reply is read.
    An answer whose grade cannot be read gets the mean of the sample's other grades, and is counted.
    """

    def __init__(self, asked: Asked, template: str, by: str) -> None:
        self.asked, self.template = asked, checked(template, "score")
        self.name = f"{by} {asked.name}"
        self.key = digest("score judge", asked.key, template, GRADES, REPLY_TOKENS).hex()

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        """One opinion per sample, scores from 1 to 10. Raises JudgeError if a server does not answer."""
        questions = [question(self.template, s, {"answer": c.text}) for s in samples for c in s.completions]
        grades = iter(self._grades(questions, per_sample(tick, [len(s.completions) for s in samples])))
        return [graded([next(grades) for _ in s.completions]) for s in samples]

    def _grades(self, questions: Sequence[Conversation], tick: Tick) -> list[float | None]:
        known = [expected(found) for found in self.asked.preferences(questions, GRADES, tick)]
        return filled(known, self.asked, questions, grade, tick)


def checked(template: str, kind: Kind) -> str:
    """The template, if it has the places it needs and no others. Raises RecipeError."""
    found, answers = set(PLACE.findall(template)), ANSWERS[kind]
    wanted = " and ".join(f"{{{name}}}" for name in answers)
    lacking = [f"{{{name}}}" for name in answers if name not in found]
    if not found & {"conversation", "question"}:
        lacking.insert(0, "{conversation} (or {question})")
    if lacking:
        raise RecipeError(f"the judge's prompt lacks {' and '.join(lacking)}: add it to the file of --judge-prompt")
    unknown = sorted(found - {"conversation", "question", *answers})
    if unknown:
        raise RecipeError(
            f"the judge's prompt has a place {{{unknown[0]}}} that nothing fills: it may use {{conversation}}, "
            f"{{question}}, {wanted}; change the file of --judge-prompt"
        )
    return template


def question(template: str, sample: Sample, answers: dict[str, str]) -> Conversation:
    """The one user turn that is asked: all places filled in one pass, so that no text can fill another's place."""
    turns = "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in sample.messages)
    values = {"conversation": turns, "question": sample.messages[-1].content, **answers}
    return (Message(role="user", content=PLACE.sub(lambda place: values[place[1]], template)),)


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


def expected(logps: tuple[float, ...] | None) -> float | None:
    """The mean grade under the probabilities of the grades; None where none is known."""
    if logps is None or max(logps) == -math.inf:
        return None
    weights = [math.exp(logp - max(logps)) for logp in logps]
    return math.fsum(int(g) * w for g, w in zip(GRADES, weights, strict=True)) / math.fsum(weights)


def graded(grades: Sequence[float | None]) -> Opinion:
    """The opinion of one sample's grades."""
    read = [g for g in grades if g is not None]
    middle = math.fsum(read) / len(read) if read else (1 + len(GRADES)) / 2
    return Opinion(scores=tuple(middle if g is None else g for g in grades), unread=len(grades) - len(read))


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
