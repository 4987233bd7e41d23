"""What teaches a writer to use keywords: SynPO's prompt generator (2410.06961), trained by SFT."""

from __future__ import annotations

from collections.abc import Sequence

from spa_lite import keys
from spa_lite.prompts.keywords import drawn
from spa_lite.prompts.material import Material
from spa_lite.prompts.requests import ask_for_keywords, different
from spa_lite.recipe import Recipe
from spa_lite.records import Message, Prompt


def generator_examples(
    recipe: Recipe, material: Material, labelled: Sequence[Prompt], lesson: bool
) -> list[tuple[tuple[Message, ...], str]]:
    """(request with a prompt's own keywords and a foreign one, that prompt), one per labelled prompt.

    In the lesson the keywords are the prompt's own two, as its model was taught. Deterministic in recipe.seed.
    """
    prompts = different(labelled)
    examples = []
    for own, prompt in enumerate(prompts):
        rng = keys.generator(keys.digest("generator", recipe.seed, own))
        # A prompt of the lesson with itself for company gives its own item and its own name.
        found = drawn([prompt], 0, lesson, rng) if lesson else drawn(prompts, own, lesson, rng)
        examples.append((ask_for_keywords(material, found), prompt.messages[-1].content))
    return examples
