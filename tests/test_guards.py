"""Pieces of a recipe that contradict each other are refused before any work, with the mend in the sentence."""

from __future__ import annotations

from typing import Any

import pytest

from spa_lite import guards, prepare
from spa_lite.errors import RecipeError
from spa_lite.recipe import Recipe, build, layers_of, shipped

PLAIN: dict[str, Any] = {"noise": "none"}
UNSEEDED: dict[str, Any] = {"seed_dpo.by": "none", "judge": "longest"}


def recipe_with(changes: dict[str, Any], name: str = "spa") -> Recipe:
    """A shipped recipe on the lesson with changes."""
    return build(layers_of(name, "lesson") | {"test": changes})[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed_dpo.by": "none"}, "every reward is 0.*--adapter-path"),
    ({"inputs.no_seed_pairs": True}, "every reward is 0.*--init-model"),
    (UNSEEDED | {"pairing.gap_judge": "implicit", "pairing.min_gap": 1.0}, "every reward is 0"),
    ({"reference": "none"}, "loss=dpo compares with a reference"),
    ({"loss": "simpo", "reference": "prev", "noise": "none"}, "loss=simpo has no reference"),
    ({"loss": "orpo", "reference": "init", "noise": "none"}, "loss=orpo has no reference"),
    ({"judge": "order"}, "judge=order ranks kinds of candidates, and there is only sample"),
    ({"judge": "label"}, "judge=label knows nothing of candidates=sample"),
    ({"candidates": ["gold", "sample"]}, "candidates=gold needs prompts with a good answer"),
    ({"candidates": ["pair"]}, "candidates=pair needs labelled prompts"),
    ({"sampling.n": 1}, "one answer per prompt.*raise --n"),
    ({"sampling.n": 3, "pairing": "two"}, "pairing=two needs two answers per prompt and there are 3"),
    ({"candidates": ["sample", "sample"]}, "names a kind twice"),
    ({"sampling.temp": 0.0}, "raise --temp"),
    ({"pairing.gap_judge": "likelihood"}, "min_gap, which is 0"),
    (
        {"judge": "order", "candidates": ["init", "greedy"], "pairing.min_gap": 0.1},
        "min_gap needs scores, and judge=order gives ranks",
    ),
    ({"loss.optimism": 0.1, "candidates": ["pair"], "prompts": "pairs"}, "add greedy to the candidates"),
    ({"loss.optimism": 0.1, "loss": "simpo", "noise": "none"}, "loss=simpo has none"),
    ({"judge": "random", "noise": "perpair"}, "noise=perpair needs a judge that is more or less sure"),
    ({"judge": "longest", "noise": "weight"}, "noise=weight needs a judge"),
    ({"prompts.count": 10}, "prompts.count is for prompts that are written"),
    ({"prompts.personas": "x.txt"}, "prompts.personas is for prompts=persona"),
    ({"prompts.keywords": "x.txt"}, "prompts.keywords is for prompts=keywords"),
    ({"prompts.template": "x.txt"}, "prompts.template is for"),
    ({"prompts.generator": True}, "teaches a writer of keywords"),
    ({"inputs.gold": "x.jsonl"}, "--gold is for prompts=gold"),
    (
        {"inputs.no_seed_pairs": True, "inputs.adapter_path": "lesson", "prompts": "pairs"},
        "prompts=pairs needs labelled pairs",
    ),
    ({"train.cache_reference": True, "carry": "all"}, "train.cache_reference"),
    ({"train.cache_reference": True, "noise": "none"}, "train.cache_reference"),
    ({"train.cache_reference": True, "start": "init"}, "train.cache_reference"),
    ({"sampling.by": "gguf:x.gguf", "candidates": ["sample", "greedy"]}, "--sampler draws plain answers"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_contradictions_are_refused(changes: dict[str, Any], told: str) -> None:
    """Each names the pieces; what is refused for `spa` is refused by what a run reads first, too."""
    recipe = recipe_with(changes)
    with pytest.raises(RecipeError, match=told):
        guards.check(recipe)
    with pytest.raises(RecipeError):
        prepare.read(recipe)


def test_without_rounds_only_the_seed_stage_counts() -> None:
    """Pieces of rounds that never come contradict nothing."""
    guards.check(recipe_with({"rounds": 0, "judge": "order", "reference": "none"}))


@pytest.mark.parametrize("name", sorted(shipped("recipe")))
def test_shipped_recipes_hold(name: str) -> None:
    """Every one passes its guards on the lesson, where whatever it needs is there."""
    prepare.check_start(recipe_with({}, name))


@pytest.mark.parametrize("judge", ["self-pair", "implicit", "gold", "random"])
def test_sao_with_another_judge_is_a_complete_ablation(judge: str) -> None:
    """`--recipe sao --set judge=...` needs nothing else on the lesson."""
    prepare.check_start(recipe_with({"judge": judge}, "sao"))


def test_what_a_recipe_needs() -> None:
    """Labelled pairs and a pool are asked for only where something reads them."""
    assert "seed stage" in guards.needs_pairs(recipe_with({}))
    assert not guards.needs_pairs(recipe_with({}, "sao"))
    assert not guards.needs_pairs(recipe_with({}, "simpo-onpolicy"))
    assert guards.needs_pairs(recipe_with({}, "spin")) == "prompts=gold"
    assert not guards.needs_pairs(recipe_with({"inputs.gold": "x.jsonl"}, "spin"))
    assert "keywords" in guards.needs_pairs(recipe_with({}, "synpo"))
    assert "improve" in guards.needs_pairs(recipe_with(UNSEEDED | {"candidates": ["improve", "init"]}))
    assert [guards.needs_pool(recipe_with({}, name)) for name in ("spa", "sao", "dpo")] == [True, False, False]
    counted = [guards.answers_per_prompt(recipe_with({}, name)) for name in ("spa", "selm", "synpo", "spin", "dpo")]
    assert counted == [2, 3, 2, 2, 2]
