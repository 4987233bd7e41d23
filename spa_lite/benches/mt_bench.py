"""MT-Bench (Zheng et al., 2023): two-turn questions in categories, each answer graded from 1 to 10 by a judge.

A score is named after what it was made with: questions, judge prompts, reference answers, judge. Where this differs
from FastChat's own program: a verdict is the last `[[n]]` of a reply, not the first, and never that of a draft inside
a reasoning block; it lies in 1 ... 10; a reply without one is asked for once more, and counted if that fails;
intervals are over questions, not over single grades.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from spa_lite.asking import Asked, without_thinking
from spa_lite.backend import POLICY, Backend, Sampling
from spa_lite.benches import shared
from spa_lite.benches.mt_bench_files import Files, Question, Template, Turn, Way
from spa_lite.benches.shared import Kept, Reply
from spa_lite.intervals import cluster_bootstrap
from spa_lite.opinion import Tick
from spa_lite.recipe import Recipe
from spa_lite.records import Message, Prompt, Record

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""The benchmark's temperature of each category; another category gets OTHERWISE."""
OTHERWISE = 0.7
WITH_REFERENCE = frozenset({"math", "reasoning", "coding"})
"""Categories whose answers are compared with a reference answer."""

TURNS: tuple[Turn, Turn] = (1, 2)
MAX_TOKENS = 1024
JUDGE_TOKENS = 2048
REMINDER = "\n\nEnd your reply with the grade alone on a line: a whole number from 1 to 10 in double square brackets."

# --- answers ---------------------------------------------------------------------------------------------------


class Answered(Record, frozen=True, kw_only=True):
    """A model's answers to a question: both, or as many as fitted into its context."""

    question: Question
    replies: tuple[Reply, ...]


def answer_questions(
    backend: Backend,
    questions: Sequence[Question],
    recipe: Recipe,
    *,
    model: str,
    cache: Path | None = None,
    role: str = POLICY,
    max_tokens: int = MAX_TOKENS,
    tick: Tick = lambda: None,
) -> list[Answered]:
    """Both turns of every question, the second after the model's own first answer, at the category's temperature.

    An answer depends on (recipe.seed, question, turn) alone. `model` names what is bound to `role` beside the base (a
    digest of the adapter), so that replies in `cache` are only taken for that model. `tick` is called once per turn.
    """
    kept = Kept(cache)

    def turn(number: Turn, prompts: Sequence[tuple[Question, tuple[Message, ...]]]) -> dict[str, Reply | None]:
        found: dict[str, Reply | None] = {}
        for temperature in sorted({temperature_of(question) for question, _ in prompts}):
            some = [(q, messages) for q, messages in prompts if temperature_of(q) == temperature]
            replies = shared.generate(
                backend,
                [Prompt(id=f"mt-bench {q.question_id} turn {number}", messages=messages) for q, messages in some],
                Sampling(temperature=temperature, top_p=1.0, max_tokens=max_tokens),
                recipe.seed,
                model=model,
                role=role,
                kept=kept,
                tick=tick,
            )
            found |= {q.question_id: reply for (q, _), reply in zip(some, replies, strict=True)}
        return found

    first = turn(1, [(question, (_user(question.turns[0]),)) for question in questions])
    second = turn(2, [(q, _second(q, reply)) for q in questions if (reply := first[q.question_id]) is not None])
    for _ in range(len(questions) - len(second)):
        tick()
    both = [(question, (first[question.question_id], second.get(question.question_id))) for question in questions]
    return [Answered(question=q, replies=tuple(r for r in replies if r is not None)) for q, replies in both]


def temperature_of(question: Question) -> float:
    """The temperature at which a question is answered."""
    return TEMPERATURES.get(question.category, OTHERWISE)


def _second(question: Question, reply: Reply) -> tuple[Message, ...]:
    return (_user(question.turns[0]), Message(role="assistant", content=reply.text.strip()), _user(question.turns[1]))


def _user(text: str) -> Message:
    return Message(role="user", content=text)


# --- grades ----------------------------------------------------------------------------------------------------


class Grade(Record, frozen=True, kw_only=True):
    """What a judge gave one answer. `rating` is None for the fates other than "graded".

    "unread": two replies without a grade. "no reply": the judge had none, as where the question is too long for it.
    "skipped": there was no answer, because the conversation did not fit into the model's context. `reference`: whether
    the judge saw a reference answer; None where the category wants none.
    """

    question_id: str
    category: str
    turn: Turn
    judge: str
    fate: Literal["graded", "unread", "no reply", "skipped"]
    rating: float | None = None
    reply: str = ""
    retried: bool = False
    cut: bool = False
    reference: bool | None = None


def grade(
    answers: Sequence[Answered],
    asked: Asked,
    prompts: Mapping[Way, Template],
    references: Mapping[str, tuple[str, str]] | None = None,
    *,
    cache: Path | None = None,
    max_tokens: int = JUDGE_TOKENS,
    tick: Tick = lambda: None,
) -> list[Grade]:
    """Two grades per question, in order: turn 1, then turn 2.

    Where a category wants a reference answer and `references` has none for that turn, the general prompt is used.
    A reply without a grade is asked for once more, with a reminder. Replies in `cache` are not asked for again.
    `tick` is called once per grade.
    """
    kept = Kept(cache)
    turns = [_Turn(answered, turn, references or {}) for answered in answers for turn in TURNS]
    questions = {
        i: prompts[turn.turn, bool(turn.reference)].messages(turn.texts)
        for i, turn in enumerate(turns)
        if turn.answered
    }
    for _ in range(len(turns) - len(questions)):
        tick()
    first = dict(zip(questions, shared.ask(asked, list(questions.values()), max_tokens, kept, tick), strict=True))
    again = {i: _reminded(questions[i]) for i, reply in first.items() if reply and rating_of(reply) is None}
    second = dict(zip(again, shared.ask(asked, list(again.values()), max_tokens, kept), strict=True))
    return [turn.graded(asked.name, second.get(i) or first.get(i, ""), i in second) for i, turn in enumerate(turns)]


class _Turn:
    """One answer that is to be graded: the second, with all that was said before, or the first."""

    def __init__(self, answered: Answered, turn: Turn, references: Mapping[str, tuple[str, str]]) -> None:
        self.turn, self.question = turn, answered.question
        self.answered = len(answered.replies) >= turn
        self.cut = self.answered and answered.replies[turn - 1].cut
        shown = references.get(self.question.question_id, ("", ""))
        wanted = self.question.category in WITH_REFERENCE
        self.reference = bool(shown[turn - 1].strip()) if wanted else None
        said = [reply.text for reply in answered.replies]
        kinds = {"question": self.question.turns, "answer": (*said, "", "")[:2], "ref_answer": shown}
        self.texts = {f"{kind}_{i}": text for kind, texts in kinds.items() for i, text in enumerate(texts, 1)}
        self.texts |= {"question": self.texts["question_1"], "answer": self.texts["answer_1"]}

    def graded(self, judge: str, reply: str, retried: bool) -> Grade:
        rating = rating_of(reply)
        missing: Literal["skipped", "no reply", "unread"] = "unread" if reply else "no reply"
        return Grade(
            question_id=self.question.question_id,
            category=self.question.category,
            turn=self.turn,
            judge=judge,
            fate="graded" if rating is not None else missing if self.answered else "skipped",
            rating=rating,
            reply=reply,
            retried=retried,
            cut=self.cut,
            reference=self.reference,
        )


def _reminded(messages: Sequence[Message]) -> tuple[Message, ...]:
    """At temperature 0 the same question has the same reply, so the second one differs."""
    return (*messages[:-1], _user(messages[-1].content + REMINDER))


_VERDICT = re.compile(r"\[\[([^\[\]]*)\]\]")
_NUMBER = re.compile(r"[0-9]{1,2}(?:\.[0-9]+)?")


def rating_of(reply: str) -> float | None:
    """The grade in a judge's reply: the last `[[n]]`, n from 1 to 10. None if there is no such last one."""
    verdicts = _VERDICT.findall(without_thinking(reply))
    found = verdicts[-1].strip() if verdicts else ""
    rating = float(found) if _NUMBER.fullmatch(found) else 0.0
    return rating if 1 <= rating <= 10 else None


# --- scores ----------------------------------------------------------------------------------------------------


def summarise(grades: Sequence[Grade], seed: int, files: Files | None = None) -> dict[str, Any]:
    """Mean grade of each turn, of both, and by category, with a bootstrap over the questions; and what is missing."""
    fates = [grade.fate for grade in grades]
    judges = sorted({grade.judge for grade in grades})
    return {
        "name": name(files, ", ".join(judges)),
        "judge": ", ".join(judges),
        "files": msgspec.to_builtins(files),
        "questions": len({grade.question_id for grade in grades}),
        "turn_1": _mean([g for g in grades if g.turn == 1], seed),
        "turn_2": _mean([g for g in grades if g.turn == 2], seed),
        "average": _mean(grades, seed),
        "categories": {
            category: _mean([g for g in grades if g.category == category], seed)
            for category in dict.fromkeys(g.category for g in grades)
        },
        "graded": fates.count("graded"),
        "unread": fates.count("unread"),
        "no_reply": fates.count("no reply"),
        "skipped": fates.count("skipped"),
        "retried": sum(grade.retried for grade in grades),
        "cut": sum(grade.cut for grade in grades),
        "without_reference": sum(grade.reference is False for grade in grades),
    }


def name(files: Files | None, judge: str) -> str:
    """What a score may be called: by its questions, prompts, references and judge."""
    said = ["MT-Bench questions" if files and files.questions == "official" else "custom questions"]
    if files:
        said.append({"official": "official prompts", "custom": "custom prompts"}.get(files.prompts, "own prompt"))
        said += {"custom": ["custom references"], "none": ["no references"]}.get(files.references, [])
    return ", ".join([*said, f"judge {judge}"])


def _mean(grades: Sequence[Grade], seed: int) -> dict[str, float] | None:
    """Mean of what was graded, with its interval; both grades of a question stay together. None of nothing."""
    known = [(grade.rating, grade.question_id) for grade in grades if grade.rating is not None]
    found = cluster_bootstrap([rating for rating, _ in known], [where for _, where in known], seed)
    return found.to_dict() if found else None
