"""Words that a new prompt is to be about, and what teaches a writer to use them (SynPO, 2410.06961)."""

# ruff: noqa: SIM905  (a word list reads best as one string)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spa_lite.prompts.rouge import words
from spa_lite.records import Prompt

OWN, FOREIGN = 2, 1
"""Keywords of a prompt itself, and of another one: the writer learns to leave out what does not fit."""

SMALL_WORDS = frozenset(
    "a about after all also am an and any are as at be because been before between both but by can could did do does "
    "down each every explain few for from further get give had has have help her here him his how i if in into is it "
    "its let like make many may me might more most much must my need no not now of off on once one only or other our "
    "out over own please same she should show so some such tell than that the their them then there these they this "
    "those through to too under until up us use using very want was we were what when where which while who whom why "
    "will with without would write you your yours".split()
)
"""Words that a prompt is never about."""


def keywords_of(text: str) -> list[str]:
    """The different words that a text may be about, in their order; all its words where these are fewer than two."""
    found = list(dict.fromkeys(words(text)))
    telling = [word for word in found if word not in SMALL_WORDS and (len(word) > 2 or not word.isascii())]
    return telling if len(telling) >= OWN else found


def drawn(labelled: Sequence[Prompt], own: int, lesson: bool, rng: np.random.Generator) -> list[str]:
    """Keywords of the prompt numbered `own`, mixed with one of another, in random order.

    For tasks of the lesson these are two, as its model was taught: what the one is about, and who asks the other.
    """
    other = (own + int(rng.integers(1, len(labelled)))) % len(labelled) if len(labelled) > 1 else own
    facts = [recognised(labelled[at]) for at in (own, other)] if lesson else []
    if facts and all(facts):
        found = [str(fact[name]) for fact, name in zip(facts, ("item", "name"), strict=True)]
    else:
        found = _picked(labelled[own], OWN, rng) + _picked(labelled[other], FOREIGN, rng)
    return [found[i] for i in rng.permutation(len(found))]


def _picked(prompt: Prompt, count: int, rng: np.random.Generator) -> list[str]:
    found = keywords_of(prompt.messages[-1].content)
    return [found[i] for i in rng.permutation(len(found))[:count]]


def recognised(prompt: Prompt) -> dict[str, Any]:
    """Facts and family of a prompt that is a task of the lesson's world; nothing of any other."""
    from spa_lite.lesson import source

    found = (source.recognised(prompt.messages[-1].content) or {}).get("lesson", {})
    return {"family": found["family"], **found["facts"]} if found else {}
