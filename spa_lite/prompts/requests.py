"""What the writer of prompts is asked: conversations drawn by (seed, round), never by what was drawn before.

    persona    what would this person ask?         one prompt per persona (SAO 2510.06652, after Persona-Hub 2406.20094)
    fewshot    write one like these examples       (Self-Instruct 2212.10560, Self-Rewarding 2401.10020)
    keywords   write one about these words         (SynPO 2410.06961)
    bare       write one                           the control: what the others are better than

The built-in model of the lesson is asked in the wordings that it was taught; any other with a text file, whose place is
filled in one pass, so that whatever a persona or an example holds is only text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from spa_lite import keys
from spa_lite.data import conversation_key
from spa_lite.errors import RecipeError
from spa_lite.prompts.cleaning import RULE
from spa_lite.prompts.keywords import drawn, recognised
from spa_lite.prompts.material import PLACE, Material
from spa_lite.recipe import Recipe
from spa_lite.records import Message, Prompt

T = TypeVar("T")


def asked(
    recipe: Recipe,
    material: Material,
    labelled: Sequence[Prompt],
    round_: int,
    lesson: bool,
    count: int,
) -> list[Prompt]:
    """`count` requests for a prompt; `extra` says what each was made of. The same arguments give the same requests.

    Raises RecipeError where the labelled prompts do not suffice.
    """
    stream = ("requests", material.source, recipe.seed, round_)
    found: Iterator[Request]
    if material.source == "persona":
        found = ((ask_as(material, who), {"persona": who}) for who in in_turn(material.personas, *stream))
    elif material.source == "fewshot":
        found = _from_examples(material, different(labelled), recipe.prompts.examples, lesson, stream)
    elif material.source == "keywords":
        found = _from_keywords(material, different(labelled), lesson, stream)
    else:
        found = itertools.repeat((ask_freely(material), {}))
    return [
        Prompt(id=f"r{round_}-{material.source}-{number}", messages=messages, extra=extra)
        for number, (messages, extra) in zip(range(count), found, strict=False)
    ]


Request = tuple[tuple[Message, ...], dict[str, Any]]
"""What is asked, and what it was made of."""


def _from_examples(
    material: Material, labelled: Sequence[Prompt], count: int, lesson: bool, stream: tuple[object, ...]
) -> Iterator[Request]:
    """Each request shows `count` labelled prompts; in the lesson all of one family, as its model was taught."""
    shelves: dict[str, list[str]] = {}
    for prompt in labelled:
        family = recognised(prompt).get("family", "") if lesson else ""
        shelves.setdefault(family, []).append(prompt.messages[-1].content)
    texts = [text for shelf in shelves.values() if len(shelf) >= count for text in shelf]
    if not texts:
        raise RecipeError(
            f"prompts=fewshot shows {count} labelled prompts as examples and there are {len(labelled)}"
            f"{' (of each family fewer than that)' if lesson and labelled else ''}: "
            "give more with --seed-pairs, or lower --examples"
        )
    home = {text: shelf for shelf in shelves.values() for text in shelf}
    for number in itertools.count():
        rng = keys.generator(keys.digest(*stream, number))
        shelf = home[texts[rng.integers(len(texts))]]
        shown = [shelf[i] for i in rng.permutation(len(shelf))[:count]]
        yield ask_like(material, shown), {"examples": shown}


def _from_keywords(
    material: Material, labelled: Sequence[Prompt], lesson: bool, stream: tuple[object, ...]
) -> Iterator[Request]:
    if material.keywords:
        groups: Iterator[list[str]] = map(list, in_turn(material.keywords, *stream))
    elif not labelled:
        raise RecipeError(
            "prompts=keywords takes its words from labelled prompts and there are none: give --seed-pairs or --keywords"
        )
    else:
        numbered = enumerate(in_turn(range(len(labelled)), *stream))
        groups = (
            drawn(labelled, own, lesson, keys.generator(keys.digest(*stream, number))) for number, own in numbered
        )
    for group in groups:
        yield ask_for_keywords(material, group), {"keywords": group}


def in_turn(items: Sequence[T], *stream: object) -> Iterator[T]:
    """The items without end in a random order, a new one each time all have had their turn."""
    for lap in itertools.count():
        for index in keys.shuffled(len(items), *stream, lap):
            yield items[index]


def different(labelled: Sequence[Prompt]) -> list[Prompt]:
    """A prompt with several pairs counts once."""
    return list({conversation_key(prompt.messages): prompt for prompt in labelled}.values())


# --- the words ---------------------------------------------------------------------------------------------------


def ask_as(material: Material, persona: str) -> tuple[Message, ...]:
    """What would this person ask?"""
    if material.template is None:
        from spa_lite.lesson import skills

        return (Message(role="system", content=skills.persona(persona)), *_turn(skills.ask_for_task()))
    return _turn(_filled(material.template, {"persona": persona}))


def ask_like(material: Material, examples: Sequence[str]) -> tuple[Message, ...]:
    """Write one like these."""
    if material.template is None:
        from spa_lite.lesson import skills

        return _turn(skills.ask_for_task_like(examples))
    return _turn(_filled(material.template, {"examples": f"\n{RULE}\n".join(examples)}))


def ask_for_keywords(material: Material, keywords: Sequence[str]) -> tuple[Message, ...]:
    """Write one about these."""
    if material.template is None:
        from spa_lite.lesson import skills

        return _turn(skills.ask_for_task_from_keywords(keywords))
    return _turn(_filled(material.template, {"keywords": ", ".join(keywords)}))


def ask_freely(material: Material) -> tuple[Message, ...]:
    """Write one."""
    if material.template is None:
        from spa_lite.lesson import skills

        return _turn(skills.ask_for_task())
    return _turn(material.template)


def _turn(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def _filled(template: str, values: dict[str, str]) -> str:
    """All places filled in one pass: a text that looks like a place stays as it is."""
    return PLACE.sub(lambda place: values[place[1]], template)
