"""What a judge in words is asked, and what it may reply: a file's question, a shipped one, or, where the built-in model
judges, the words that it was taught.

A question is a template with places for the conversation and the answers, filled in one pass: whatever an answer holds,
a placeholder's name or a made-up end of the question, is only text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from spa_lite.asking import Conversation
from spa_lite.errors import RecipeError
from spa_lite.keys import digest
from spa_lite.lesson import skills
from spa_lite.recipe import Recipe
from spa_lite.records import Message, Sample

Kind = Literal["pair", "score", "rubric"]
"""Which of two answers is better; what grade is an answer worth; the same by points, with reasons."""

VERDICTS = ("A", "B")
"""What a judge of two answers replies: the first shown is better, the second is."""
GRADES = tuple(str(grade) for grade in range(1, 11))
POINTS = tuple(str(points) for points in range(6))
"""Grades by points: one for each of five criteria, or none."""
SHIPPED: dict[Kind, tuple[str, ...]] = {"pair": VERDICTS, "score": GRADES, "rubric": POINTS}
"""What is replied to the shipped questions, and to those of a file."""
ANSWERS: dict[Kind, tuple[str, ...]] = {"pair": ("answer_1", "answer_2"), "score": ("answer",), "rubric": ("answer",)}
"""Placeholders of the answers; beside them stands {conversation}, or {question}: its last turn alone."""
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Wording:
    """A question and what its replies may be: verdicts, or grades in ascending order."""

    template: str
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        """Digest of both."""
        return digest("wording", self.template, *self.options).hex()


def wording(kind: Kind, recipe: Recipe) -> Wording:
    """What a recipe's judge asks. Raises RecipeError if the file of --judge-prompt cannot be read or does not fit."""
    path, asked = recipe.judge.prompt, recipe.judge.by
    if path is None and recipe.inputs.model is None and asked != "openai":
        return taught(kind)
    return Wording(checked(read_template(kind, path), kind), SHIPPED[kind])


def taught(kind: Kind) -> Wording:
    """What the built-in model was taught to be asked. Its grades, with reasons or without, go from 0 to 5."""
    if kind == "pair":
        return Wording(skills.ask_to_choose("{question}", "{answer_1}", "{answer_2}"), VERDICTS)
    grades = tuple(str(grade) for grade in range(skills.TOP_GRADE + 1))
    return Wording(skills.ask_for_grade("{question}", "{answer}"), grades)


def read_template(kind: Kind, path: str | Path | None = None) -> str:
    """The question's text: a file, or the shipped one. Raises RecipeError if it cannot be read."""
    if path is None:
        return resources.files("spa_lite.judges").joinpath(f"prompts/{kind}.txt").read_text(encoding="utf-8")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RecipeError(f"the judge's prompt {path} cannot be read ({reason}): check --judge-prompt") from None


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
