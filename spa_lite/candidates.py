"""Axis: the answers to a prompt that are judged. What each kind is, and how those of a prompt come together.

sample   n answers of the policy (SPA: two)          gold     the good answer of a demonstration, or what people chose
greedy   the policy's answer at temperature 0        pair     both labelled answers, the chosen one first
init     a sample of pi_init                         improve  the policy's answer, rewritten by an improver (SynPO)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import msgspec

from spa_lite.backend import Sampling
from spa_lite.recipe import Recipe
from spa_lite.records import Completion, Kind, Sample
from spa_lite.sample import Encoded

Drawn = Mapping[str, Mapping[str, Sample]]
"""Kind -> id of a prompt -> a Sample with the answers of that kind."""

STREAMS = {"sample": 0, "draft": 1 << 20, "improve": 2 << 20, "init": 3 << 20, "greedy": 0}
"""Where the indices of the random streams of each kind begin, so that no two kinds share one."""


def sampling_of(recipe: Recipe, kind: str) -> Sampling:
    """How the answers of a kind are drawn."""
    s = recipe.sampling
    return Sampling(0.0 if kind == "greedy" else s.temp, s.top_p, s.max_tokens)


def drawn(recipe: Recipe) -> list[str]:
    """The kinds that a model answers, in the order of the recipe."""
    return [kind for kind in recipe.candidates.kinds if kind not in {"gold", "pair"}]


def together(
    prompts: Sequence[Encoded], found: Drawn, human: Mapping[str, Sequence[Completion]], recipe: Recipe
) -> list[Sample]:
    """One Sample per prompt with all its candidates, in the order of `candidates.kinds`; none for a prompt that lacks a
    kind (a draft too long to be improved).

    `human` has the good answer of a prompt, or the chosen and the rejected one, by the prompt's id.
    """
    return [
        Sample(
            id=prompt.id,
            messages=prompt.messages,
            prompt_ids=ids,
            completions=tuple(c for kind in recipe.candidates.kinds for c in _of(kind, prompt.id, found, human)),
            extra=prompt.extra,
        )
        for prompt, ids in prompts
        if all(prompt.id in samples for samples in found.values())
    ]


def _of(kind: str, prompt: str, found: Drawn, human: Mapping[str, Sequence[Completion]]) -> list[Completion]:
    if kind == "gold":
        return [marked(human[prompt][0], "gold")]
    if kind == "pair":
        names: tuple[Kind, Kind] = ("chosen", "rejected")
        return [marked(answer, name) for answer, name in zip(human[prompt], names, strict=True)]
    return [marked(answer, cast(Kind, kind)) for answer in found[kind][prompt].completions]


def marked(answer: Completion, kind: Kind) -> Completion:
    """An answer with its kind. Only answers of the policy itself keep their log-probabilities: the others were not
    drawn from it, or not for this prompt."""
    known = answer.logprobs if kind in {"sample", "greedy"} else ()
    return msgspec.structs.replace(answer, kind=kind, logprobs=known)
