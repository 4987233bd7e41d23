"""Whether alignment has cost knowledge: word problems in GSM8K's form, and multiple choice, before and after.

A quick check on the user's own files, not a leaderboard's number: no worked examples are put before a question, which
is asked through the model's chat template. Both measures are deterministic. Two models that answered the same questions
are compared question by question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from spa_lite import intervals
from spa_lite.asking import without_thinking
from spa_lite.backend import POLICY, Backend, Sampling
from spa_lite.benches import shared
from spa_lite.benches.shared import Kept, Reply
from spa_lite.errors import DataError
from spa_lite.events import per_unit
from spa_lite.judge import scorer
from spa_lite.keys import digest
from spa_lite.opinion import Tick
from spa_lite.records import Ids, Message, Prompt, Record, Row
from spa_lite.sources import BadRecord, Fields, Source

MAX_TOKENS = 512
INSTRUCTION = "\n\nWork it out step by step. End with the answer, as a plain number, on a line of its own."
"""What a model is told beside a word problem."""

By = Literal["sum", "per_character", "per_token"]
"""How the log-probability of a choice's text is compared with the others': as it is, or divided by its length."""
RULES: tuple[By, ...] = get_args(By)


class Outcome(Record, frozen=True, kw_only=True):
    """What came of one question. `right` is None if it did not fit into the model's context and was skipped.

    `unread`: the reply holds no number, which counts as wrong. `cut`: the reply hit its length cap.
    """

    id: str
    right: bool | None
    unread: bool = False
    cut: bool = False


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Share of right answers with its Wilson interval (None of nothing), and what is missing."""
    asked = [outcome.right for outcome in outcomes if outcome.right is not None]
    accuracy = intervals.wilson(sum(asked), len(asked))
    return {
        "accuracy": accuracy.to_dict() if accuracy else None,
        "right": sum(asked),
        "asked": len(asked),
        "skipped": len(outcomes) - len(asked),
        "unread": sum(outcome.unread for outcome in outcomes),
        "cut": sum(outcome.cut for outcome in outcomes),
    }


def compare(before: Sequence[Outcome], after: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """The difference that alignment made, on the questions that both answered, joined by question.

    `difference` is after minus before, with a bootstrap over questions; `p` is of McNemar's test. `left_out` counts
    questions that only one of the two was asked. Raises DataError if they have no question in common.
    """
    first, second = _asked(before), _asked(after)
    common = [name for name in first if name in second]
    if not common:
        raise DataError(
            "there is no question that both models were asked; give both the same file, of questions that fit"
        )
    old, new = [first[name] for name in common], [second[name] for name in common]
    difference = intervals.difference(new, old, seed)
    gained = sum(b and not a for a, b in zip(old, new, strict=True))
    lost = sum(a and not b for a, b in zip(old, new, strict=True))
    p = intervals.mcnemar(gained, lost)
    return {
        "questions": len(common),
        "left_out": len(first.keys() ^ second.keys()),
        "before": sum(old) / len(old),
        "after": sum(new) / len(new),
        "difference": difference.to_dict() if difference else None,
        "gained": gained,
        "lost": lost,
        "p": 1.0 if p is None else p,
    }


def _asked(outcomes: Iterable[Outcome]) -> dict[str, bool]:
    return {outcome.id: outcome.right for outcome in outcomes if outcome.right is not None}


# --- word problems ---------------------------------------------------------------------------------------------


class Problem(Record, frozen=True, kw_only=True):
    """A word problem and the number that solves it."""

    id: str
    question: str
    number: Decimal


def read_problems(source: Source) -> list[Problem]:
    """Lines with `question` and `answer`, whose last number after `####` is the solution. Raises DataError."""
    names: Counter[str] = Counter()

    def parse(fields: Fields) -> Problem:
        question, answer = _text(fields, "question"), _text(fields, "answer")
        _, found, end = answer.rpartition("####")
        number = last_number(end) if found else None
        if number is None:
            raise BadRecord("missing", "`answer` has no number after ####; end it with a line like #### 42")
        return Problem(id=_name(names, question), question=question, number=number)

    return shared.items(source, parse)


def solve(
    backend: Backend,
    problems: Sequence[Problem],
    *,
    model: str,
    cache: Path | None = None,
    role: str = POLICY,
    max_tokens: int = MAX_TOKENS,
    tick: Tick = lambda: None,
) -> list[Outcome]:
    """Greedy solutions, right if the last number of the reply is the problem's.

    `model` names what is bound to `role` beside the base (a digest of the adapter), so that replies in `cache` are only
    taken for that model. `tick` is called once per problem.
    """
    prompts = [Prompt(id=problem.id, messages=_ask(problem.question + INSTRUCTION)) for problem in problems]
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens)
    replies = shared.generate(backend, prompts, greedy, 0, model=model, role=role, kept=Kept(cache), tick=tick)
    return [_solved(problem, reply) for problem, reply in zip(problems, replies, strict=True)]


def _solved(problem: Problem, reply: Reply | None) -> Outcome:
    if reply is None:
        return Outcome(id=problem.id, right=None)
    number = last_number(without_thinking(reply.text))
    return Outcome(id=problem.id, right=number == problem.number, unread=number is None, cut=reply.cut)


_SIGNED = re.compile(r"((?<![\w)\]}])[-−])?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
"""A number: thousands may be set apart by commas, a minus counts where it cannot be a hyphen or a subtraction."""


def last_number(text: str) -> Decimal | None:
    """The last number in a text; "1,250", "$1250" and "1250.00" are the same. None if there is none."""
    found = list(_SIGNED.finditer(text))
    if not found:
        return None
    minus, digits = found[-1].groups()
    number = Decimal(digits.replace(",", ""))
    return number.copy_negate() if minus else number  # `-number` would round


# --- multiple choice -------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Choices(Record, frozen=True, kw_only=True):
    """A question with its possible answers, one of which (`answer`, from 0) is right."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int


class Scored(Record, frozen=True, kw_only=True):
    """Log-probability (nats) and tokens of each choice's text; nothing if the question did not fit."""

    choices: Choices
    logp: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    def picked(self, by: By) -> int | None:
        """The most probable choice; None at a tie, and where nothing is known."""
        lengths = {
            "sum": [1] * len(self.logp),
            "per_character": map(len, self.choices.choices),
            "per_token": self.tokens,
        }
        values = [logp / length for logp, length in zip(self.logp, lengths[by], strict=False)]
        best = [i for i, value in enumerate(values) if value == max(values)]
        return best[0] if len(best) == 1 else None


def read_choices(source: Source) -> list[Choices]:
    """Lines with `question`, `choices` and `answer`: an index from 0, or a letter. Raises DataError.

    The usual shapes of MMLU (a list of texts) and ARC (`choices` with `text` and `label`, `answerKey`) are read.
    """
    names: Counter[str] = Counter()

    def parse(fields: Fields) -> Choices:
        inner = fields["question"] if isinstance(fields.get("question"), dict) else fields
        question = _text(inner, "stem" if inner is not fields else "question")
        texts, labels = _texts(inner.get("choices"))
        given = fields.get("answer", fields.get("answerKey"))
        answer = _index(given, labels)
        return Choices(id=_name(names, question, *texts), question=question, choices=tuple(texts), answer=answer)

    return shared.items(source, parse)


class _Labelled(msgspec.Struct):
    text: str
    label: str


class _Columns(msgspec.Struct):
    text: list[str]
    label: list[str]


def _texts(value: object) -> tuple[list[str], list[str]]:
    """The choices and their labels: A, B, ... where the file gives none."""
    if value is None:
        raise BadRecord("missing", "`choices` is missing; add a list of texts")
    if isinstance(value, dict):
        columns = msgspec.convert(value, _Columns)
        texts, labels = columns.text, columns.label
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        both = msgspec.convert(value, list[_Labelled])
        texts, labels = [one.text for one in both], [one.label for one in both]
    else:
        texts = msgspec.convert(value, list[str])
        labels = list(LETTERS[: len(texts)])
    if len(texts) < 2 or len(labels) != len(texts) or not all(text.strip() for text in texts):
        raise BadRecord("type", f"`choices` must be 2 to {len(LETTERS)} texts, none empty, each with its label")
    if len(set(texts)) < len(texts):
        raise BadRecord("same", "two of the `choices` are the same; change one or drop the question")
    return texts, labels


def _index(answer: object, labels: Sequence[str]) -> int:
    """Which choice is right."""
    if type(answer) is int and 0 <= answer < len(labels):
        return answer
    if isinstance(answer, str) and answer.strip() in labels:
        return labels.index(answer.strip())
    known = f"a number from 0 to {len(labels) - 1} or one of {', '.join(labels)}"
    raise BadRecord("type", f"`answer` is {str(answer)[:40]!r}; write {known}")


def choose(
    backend: Backend, questions: Sequence[Choices], *, role: str = POLICY, tick: Tick = lambda: None
) -> list[Scored]:
    """Score the text of every choice as the answer to its question, without its end of turn. Nothing is generated.

    A question of which one choice does not fit into the context is skipped. `tick` is called once per question.
    """
    rows = [_row(backend, question) for question in questions]
    fitting = [i for i, row in enumerate(rows) if _fits(row, backend.context)]
    for _ in range(len(rows) - len(fitting)):
        tick()
    found = scorer(backend, role, per_unit(tick))([rows[i] for i in fitting]) if fitting else []
    sums = dict(zip(fitting, found, strict=True))
    return [
        Scored(choices=question, logp=sums[i], tokens=tuple(map(len, rows[i].responses)))
        if i in sums
        else Scored(choices=question)
        for i, question in enumerate(questions)
    ]


def outcomes(scored: Sequence[Scored], by: By) -> list[Outcome]:
    """Right or wrong by one of RULES; a tie is wrong."""
    return [Outcome(id=s.choices.id, right=s.picked(by) == s.choices.answer if s.logp else None) for s in scored]


def _row(backend: Backend, question: Choices) -> Row:
    messages, tokenizer = _ask(question.question), backend.tokenizer

    def ids(choice: str) -> Ids:
        return tuple(tokenizer.encode_answer(messages, choice)[:-1])

    return Row(prompt=tokenizer.encode_prompt(messages), responses=tuple(map(ids, question.choices)))


def _fits(row: Row, context: int) -> bool:
    """Whether every choice has a token, and room for all of them."""
    lengths = [len(response) for response in row.responses]
    return min(lengths) > 0 and len(row.prompt) + max(lengths) <= context


# --- both ------------------------------------------------------------------------------------------------------


def _ask(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("missing", f"`{name}` is no text; add it")
    return value


def _name(names: Counter[str], *parts: str) -> str:
    """A name by content, so that two models are compared on the same question; repeats are numbered."""
    name = digest("question", *parts).hex()[:16]
    names[name] += 1
    return name if names[name] == 1 else f"{name}-{names[name]}"
