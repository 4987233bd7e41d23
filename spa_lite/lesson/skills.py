"""Other things the lesson model learns to do: write tasks, choose between answers, grade one, improve one.

Recipes beyond SPA need them (a model that writes its own prompts, judges in words, or rewrites an answer). Each skill
is a function that makes one training conversation from a task; `conversation` mixes them with plain answering. The
request texts are functions of their own, so that a recipe can ask exactly what the model was taught.

Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .world import NAMES, Task, family_tasks, gold, gold_score, pair, split_of, write

Message = dict[str, str]

PLAIN_SYSTEM = ("You are a helpful assistant.", "Answer the question.", "You answer short questions.")
TOP_GRADE = 5


def turns(user: str, assistant: str, system: str | None = None) -> list[Message]:
    """A conversation of one exchange, as chat messages."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


# --- what to ask -----------------------------------------------------------------------------------------------------


def ask_for_task() -> str:
    return "Write a task."


def ask_for_task_from_keywords(keywords: Sequence[str]) -> str:
    return f"Write a task with these words: {', '.join(keywords)}."


def ask_for_task_like(examples: Sequence[str]) -> str:
    return "Write a task like these:\n" + "\n".join(examples)


def persona(name: str) -> str:
    """A system turn: whoever writes the task speaks for this person."""
    return f"You are {name}."


def ask_to_choose(prompt: str, first: str, second: str) -> str:
    return f"Task: {prompt}\nA: {first}\nB: {second}\nWhich answer is better, A or B?"


def ask_for_grade(prompt: str, answer: str) -> str:
    return f"Task: {prompt}\nAnswer: {answer}\nGrade the answer from 0 to {TOP_GRADE}."


def ask_to_improve(prompt: str, answer: str) -> str:
    return f"Task: {prompt}\nAnswer: {answer}\nWrite a better answer."


# --- one training conversation of each skill -------------------------------------------------------------------------


def answering(task: Task, rng: random.Random) -> list[Message]:
    """Plain answering by a writer of unknown care; a system turn sometimes, which changes nothing."""
    system = rng.choice(PLAIN_SYSTEM) if rng.random() < 0.1 else None
    return turns(task.text, write(task, rng), system)


def writing_freely(task: Task, rng: random.Random) -> list[Message]:
    return turns(ask_for_task(), task.text)


def writing_for_persona(task: Task, rng: random.Random) -> list[Message]:
    """The persona's name is the name in the task."""
    return turns(ask_for_task(), task.text, persona(task.facts["name"]))


def writing_from_keywords(task: Task, rng: random.Random) -> list[Message]:
    keywords = [task.facts["name"], task.facts["item"]]
    rng.shuffle(keywords)
    return turns(ask_for_task_from_keywords(keywords), task.text)


def writing_from_examples(task: Task, rng: random.Random) -> list[Message]:
    """Two tasks of the same family are shown."""
    return turns(ask_for_task_like([train_task(rng, task.family).text for _ in range(2)]), task.text)


def choosing(task: Task, rng: random.Random) -> list[Message]:
    first, second = pair(task, rng)
    better = "A" if gold_score(gold(task, first)) > gold_score(gold(task, second)) else "B"
    return turns(ask_to_choose(task.text, first, second), better)


def grading(task: Task, rng: random.Random) -> list[Message]:
    answer = write(task, rng)
    return turns(ask_for_grade(task.text, answer), str(round(TOP_GRADE * gold_score(gold(task, answer)))))


def improving(task: Task, rng: random.Random) -> list[Message]:
    """The better answer is a perfectly careful writer's."""
    return turns(ask_to_improve(task.text, write(task, rng)), write(task, rng, care=1.0))


SKILLS: dict[str, Callable[[Task, random.Random], list[Message]]] = {
    "answering": answering,
    "writing freely": writing_freely,
    "writing for a persona": writing_for_persona,
    "writing from keywords": writing_from_keywords,
    "writing from examples": writing_from_examples,
    "choosing": choosing,
    "grading": grading,
    "improving": improving,
}

# How often each skill is practised. Plain answering is the model's main work.
SHARES: dict[str, float] = {
    "answering": 0.80,
    "writing freely": 0.02,
    "writing for a persona": 0.02,
    "writing from keywords": 0.02,
    "writing from examples": 0.02,
    "choosing": 0.05,
    "grading": 0.04,
    "improving": 0.03,
}


def train_task(rng: random.Random, family: str) -> Task:
    """Any task of a family from the split the model is built on."""
    members = family_tasks(family)
    while True:
        task = rng.choice(members)
        if split_of(task.text) == "train":
            return task


def conversation(tasks: Sequence[Task], rng: random.Random) -> list[Message]:
    """One training conversation: a random task, a random skill."""
    skill = rng.choices(list(SHARES), list(SHARES.values()))[0]
    return SKILLS[skill](rng.choice(tasks), rng)


__all__ = [name for name in dir() if name.startswith("ask_")] + ["NAMES", "SKILLS", "conversation", "persona", "turns"]
