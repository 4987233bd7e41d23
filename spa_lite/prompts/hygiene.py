"""What is kept of the prompts that a model wrote, and what is counted on the way: nothing is dropped unsaid."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from typing import NamedTuple

from spa_lite.data import conversation_key
from spa_lite.prompts.cleaning import cleaned
from spa_lite.prompts.rouge import too_similar, words
from spa_lite.recipe import Recipe
from spa_lite.records import Completion, Message, Prompt, Record, Sample

FEWEST_WORDS, MOST_WORDS = 4, 150
NOT_FOR_TEXT = re.compile(
    r"\b(?:images?|pictures?|photos?|photographs?|graphs?|plots?|charts?|diagrams?|flowcharts?|maps?|files?|videos?"
    r"|audio|recordings?|attached|attachments?|screenshots?|draw|sketch)\b",
    re.IGNORECASE,
)
"""What a model that reads and writes text alone cannot see or make."""


class Counts(Record, frozen=True, kw_only=True):
    """What became of the answers: `asked` is the sum of `kept`, `unreadable`, `filtered`, `held_out` and `similar`."""

    asked: int = 0
    kept: int = 0
    unreadable: int = 0
    """Without a word, or cut off at the cap."""
    filtered: int = 0
    """Of source fewshot: not a task for a text model, by Self-Instruct's filters."""
    held_out: int = 0
    """The same as a held-out or a labelled prompt."""
    similar: int = 0
    """Too similar to an earlier one, of this round or before."""
    repeated: float = 0.0
    """Share of the readable ones whose words are those of an earlier one of this round."""
    unknown: int = 0
    """In the lesson: kept, but no task of the world, so that gold cannot measure answers to it."""


class Written(NamedTuple):
    """The prompts that are kept, and what was counted."""

    prompts: list[Prompt]
    counts: Counts


def written(
    answers: Sequence[Sample],
    earlier: Sequence[str],
    banned: Collection[bytes],
    recipe: Recipe,
    lesson: bool,
) -> Written:
    """Prompts of one user turn each from the answers to `requests.asked`; their ids are those of the requests.

    `earlier` are the texts of earlier rounds, `banned` the `data.conversation_key`s of prompts that nothing may be
    trained on twice or at all. `extra` keeps what the request was made of and, in the lesson, the facts of the task.
    """
    found = [_prompt(answer, number, one) for answer in answers for number, one in enumerate(answer.completions)]
    readable = [prompt for prompt in found if prompt is not None]
    fit = [p for p in readable if recipe.prompts.source != "fewshot" or suits(text_of(p))]
    allowed = [p for p in fit if conversation_key(p.messages) not in banned]
    similar = too_similar(list(map(text_of, allowed)), earlier, recipe.prompts.similarity)
    kept = [p for p, drop in zip(allowed, similar, strict=True) if not drop]
    if lesson:
        kept = list(map(_recognised, kept))
    counts = Counts(
        asked=len(found),
        kept=len(kept),
        unreadable=len(found) - len(readable),
        filtered=len(readable) - len(fit),
        held_out=len(fit) - len(allowed),
        similar=len(allowed) - len(kept),
        repeated=repetition(list(map(text_of, readable))),
        unknown=sum("lesson" not in p.extra for p in kept) if lesson else 0,
    )
    return Written(kept, counts)


def repetition(texts: Sequence[str]) -> float:
    """Share of the texts whose words are exactly those of an earlier one, in [0, 1]; 0 for none.

    It grows with the number of texts: compare rates of as many.
    """
    return 1 - len(set(map(words, texts))) / len(texts) if texts else 0.0


def texts_of(answers: Sequence[Sample]) -> list[str]:
    """The readable texts among the answers, before anything is dropped: what `repetition` is measured on."""
    return [text for answer in answers for one in answer.completions if (text := readable_text(one))]


def readable_text(completion: Completion) -> str:
    """The prompt in an answer; empty where it was cut off or has no words."""
    text = cleaned(completion.text) if completion.ended != "cap" else ""
    return text if words(text) else ""


def suits(text: str) -> bool:
    """Whether a text passes Self-Instruct's filters: of a sensible length, a task that text can serve, well begun."""
    return (
        FEWEST_WORDS <= len(words(text)) <= MOST_WORDS
        and not NOT_FOR_TEXT.search(text)
        and text[0] not in string.punctuation
    )


def text_of(prompt: Prompt) -> str:
    """What the last turn says."""
    return prompt.messages[-1].content


def _prompt(answer: Sample, number: int, completion: Completion) -> Prompt | None:
    text = readable_text(completion)
    if not text:
        return None
    name = answer.id if len(answer.completions) == 1 else f"{answer.id}-{number}"
    return Prompt(id=name, messages=(Message(role="user", content=text),), extra=answer.extra)


def _recognised(prompt: Prompt) -> Prompt:
    """The prompt with what the gold rule needs, if it is a task of the lesson's world."""
    from spa_lite.lesson.source import recognised

    return Prompt(id=prompt.id, messages=prompt.messages, extra=prompt.extra | (recognised(text_of(prompt)) or {}))
