"""MT-Bench's files: questions, judge prompts and reference answers, as FastChat writes them. None is shipped.

A checksum says whether a file is the published one. Where the user brings no judge prompts, ours are used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from spa_lite.benches import shared
from spa_lite.errors import DataError
from spa_lite.records import Message, Record
from spa_lite.sources import BadRecord, Fields, Source

OFFICIAL = {
    "questions": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "prompts": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    "references": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
}
"""SHA-256 of FastChat's question.jsonl, judge_prompts.jsonl and reference_answer/gpt-4.jsonl."""

Origin = Literal["official", "custom", "own", "none"]
"""Of a file: the published one, the user's, ours (judge prompts), not given (references)."""
Turn = Literal[1, 2]
Way = tuple[Turn, bool]
"""(turn that is graded, whether a reference answer is shown)."""


class Question(Record, frozen=True, kw_only=True):
    """Two user turns."""

    question_id: str
    category: str
    turns: tuple[str, str]

    def __post_init__(self) -> None:
        if not all(turn.strip() for turn in self.turns):
            raise ValueError("one of the two turns is empty")


class Template(Record, frozen=True, kw_only=True):
    """What a judge is asked, with places for questions and answers. One line of judge_prompts.jsonl."""

    prompt_template: str
    system_prompt: str = ""

    def messages(self, texts: Mapping[str, str]) -> tuple[Message, ...]:
        """The conversation for the judge. Places are filled in one pass: what an answer holds is only text."""

        def place(found: re.Match[str]) -> str:
            return texts[found[1]] if found[1] else found[0][0]

        user = Message(role="user", content=PLACE.sub(place, self.prompt_template))
        return (Message(role="system", content=self.system_prompt), user) if self.system_prompt.strip() else (user,)


class Files(Record, frozen=True, kw_only=True):
    """Where each file comes from."""

    questions: Origin
    prompts: Origin
    references: Origin


class Bench(Record, frozen=True, kw_only=True):
    """The questions, what the judge is asked, and the reference answers by question."""

    questions: tuple[Question, ...]
    prompts: dict[Way, Template]
    references: dict[str, tuple[str, str]]
    files: Files


PLACE = re.compile(r"\{(\w+)\}|\{\{|\}\}")
"""A place, or a doubled brace, which stands for one brace, as in Python's format strings."""
TEXTS = frozenset(f"{kind}_{turn}" for kind in ("question", "answer", "ref_answer") for turn in (1, 2))
PLACES = TEXTS | {"question", "answer"}
WAYS: dict[Way, str] = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
"""The names of the four prompts in judge_prompts.jsonl."""
NEEDED: dict[Way, frozenset[str]] = {
    (1, False): frozenset({"question", "answer"}),
    (1, True): frozenset({"question", "answer", "ref_answer_1"}),
    (2, False): frozenset({"question_2", "answer_2"}),
    (2, True): frozenset({"question_2", "answer_2", "ref_answer_2"}),
}


def read(questions: Source, prompts: Source | None = None, references: Source | None = None) -> Bench:
    """The user's files: FastChat's question.jsonl and, where given, judge_prompts.jsonl and the reference answers.

    Raises DataError, naming file and line, for a damaged or incomplete one.
    """
    return Bench(
        questions=tuple(read_questions(questions)),
        prompts=own_prompts() if prompts is None else read_prompts(prompts),
        references={} if references is None else read_references(references),
        files=Files(
            questions=origin("questions", questions),
            prompts="own" if prompts is None else origin("prompts", prompts),
            references="none" if references is None else origin("references", references),
        ),
    )


def origin(kind: str, source: Source) -> Origin:
    """Whether a file is the published one, byte by byte."""
    path = Path(source)
    if not path.is_file():
        return "custom"
    with path.open("rb") as file:
        return "official" if hashlib.file_digest(file, "sha256").hexdigest() == OFFICIAL[kind] else "custom"


def read_questions(source: Source) -> list[Question]:
    """Lines with `question_id`, `category` and two `turns`. Raises DataError, for a repeated id as well."""
    seen: set[str] = set()

    def parse(fields: Fields) -> Question:
        question = msgspec.convert(_named(fields), Question)
        if question.question_id in seen:
            raise BadRecord("id", f"question_id {question.question_id} was there before; give each question its own")
        seen.add(question.question_id)
        return question

    return shared.items(source, parse)


class _NamedTemplate(Template, frozen=True, kw_only=True):
    name: str
    output_format: str = "[[rating]]"


def read_prompts(source: Source) -> dict[Way, Template]:
    """The four single-answer prompts of a judge_prompts.jsonl; those for pairs are not needed.

    Raises DataError if one is missing, or lacks a place for what it is about.
    """
    ways = {name: way for way, name in WAYS.items()}

    def parse(fields: Fields) -> tuple[Way, Template] | None:
        if fields.get("name") not in ways:
            return None
        found = msgspec.convert(fields, _NamedTemplate)
        way = ways[found.name]
        places = {place for place in PLACE.findall(found.prompt_template) if place}
        if missing := sorted(NEEDED[way] - places):
            raise BadRecord("missing", f"the prompt {found.name} has no place for {{{missing[0]}}}; add it")
        if unknown := sorted(places - PLACES):
            raise BadRecord("type", f"the prompt {found.name} has the unknown place {{{unknown[0]}}}; remove it")
        if found.output_format != "[[rating]]":
            raise BadRecord("type", f"the prompt {found.name} asks for {found.output_format}; only [[rating]] is read")
        return way, Template(prompt_template=found.prompt_template, system_prompt=found.system_prompt)

    found = dict(item for item in shared.items(source, parse) if item)
    for way, name in WAYS.items():
        if way not in found:
            raise DataError(f"{source}: there is no prompt named {name}; get FastChat's judge_prompts.jsonl again")
    return found


def own_prompts() -> dict[Way, Template]:
    """What the judge is asked where the user brings no prompts."""
    folder = resources.files("spa_lite.judges")

    def text(turn: Turn, reference: bool) -> str:
        name = f"mt_bench_{turn}{'_reference' if reference else ''}.txt"
        return folder.joinpath(f"prompts/{name}").read_text(encoding="utf-8")

    return {way: Template(prompt_template=text(*way)) for way in WAYS}


class _Choice(Record, frozen=True, kw_only=True):
    turns: tuple[str | int | float, str | int | float]


class _Reference(Record, frozen=True, kw_only=True):
    question_id: str
    choices: Annotated[tuple[_Choice, ...], msgspec.Meta(min_length=1)]


def read_references(source: Source) -> dict[str, tuple[str, str]]:
    """Two reference answers by question, from an answer file of FastChat's. Raises DataError."""
    lines = shared.items(source, lambda fields: msgspec.convert(_named(fields), _Reference))
    both = {line.question_id: line.choices[0].turns for line in lines}
    return {name: (str(first), str(second)) for name, (first, second) in both.items()}


def _named(fields: Fields) -> Fields:
    """The fields with `question_id` as text: files write a number or a text."""
    given = fields.get("question_id")
    return fields | {"question_id": str(given)} if type(given) is int else fields
