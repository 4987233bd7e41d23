"""The lesson as data for the method: prompts and pairs as records, and the gold rule as a measure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from spa_lite.lesson.world import Task, by_text, gold, gold_score, pair, tasks, write
from spa_lite.records import Demonstration, Message, Pair, Prompt

Split = Literal["tune", "heldout"]


def _extra(task: Task) -> dict[str, Any]:
    return {"lesson": {"family": task.family, "facts": dict(task.facts)}}


def _messages(task: Task) -> tuple[Message, ...]:
    return (Message(role="user", content=task.text),)


def to_prompt(task: Task, split: str, index: int) -> Prompt:
    """A task as a prompt record; what the gold rule needs travels in `extra`."""
    return Prompt(id=f"{split}-{index}", messages=_messages(task), extra=_extra(task))


def prompts(split: Literal["rounds", "tune", "heldout"], count: int, seed: int) -> list[Prompt]:
    """Unlabelled prompts of a split."""
    return [to_prompt(task, split, i) for i, task in enumerate(tasks(split, count, seed))]


def recognised(text: str) -> dict[str, Any] | None:
    """What `rule` needs to know of a prompt that is a task of this world to the letter; None of any other."""
    task = by_text().get(text)
    return None if task is None else _extra(task)


def pairs(split: Literal["seed", "tune", "heldout"], count: int, seed: int) -> list[Pair]:
    """Answers of two writers per task, the one with the higher gold score preferred."""
    rng = random.Random(f"pairs {split} {seed}")
    return [_labelled(task, pair(task, rng), f"{split}-pair-{i}") for i, task in enumerate(tasks(split, count, seed))]


def demonstrations(count: int, seed: int) -> list[Demonstration]:
    """Answers of careful writers to the tasks of the seed split."""
    rng = random.Random(f"demonstrations {seed}")
    return [
        Demonstration(id=f"seed-{i}", messages=_messages(task), answer=write(task, rng, care=1.0), extra=_extra(task))
        for i, task in enumerate(tasks("seed", count, seed))
    ]


def _labelled(task: Task, answers: Sequence[str], identifier: str) -> Pair:
    chosen, rejected = sorted(answers, key=lambda text: -gold_score(gold(task, text)))
    return Pair(id=identifier, messages=_messages(task), chosen=chosen, rejected=rejected, extra=_extra(task))


def rule(extra: Mapping[str, Any], text: str, ended: bool) -> dict[str, float] | None:
    """The gold rule as `evaluate` calls it: criteria and their weighted "score"; None outside the lesson."""
    lesson = extra.get("lesson")
    if not isinstance(lesson, Mapping):
        return None
    criteria = gold(lesson["facts"], text, ended)
    return {**criteria, "score": gold_score(criteria)}
