"""The table of pieces is that of the settings, and a recipe's one line says what it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spa_lite.axes import PIECES, WHERE, one_line, values
from spa_lite.recipe import AXES, build, layers_of, shipped

LINES = {
    "dpo": "pairs | pair | label | two | dpo(0.01) | ref init | one round",
    "iterative-dpo": "dpo seed | pool | sample(2, 0.7) | reward-model | two | dpo(0.1) | ref prev | prev, fresh",
    "sao": "persona(0.6) | sample(2, 0.6) | self-pair(swap) | two | simpo(10, 3) | ref none | one round",
    "self-rewarding": "sft seed | fewshot(8, 0.6, 0.9) by init | sample(4, 0.7, 0.9) | self-rubric(3) | "
    "best-worst of 4 + drop-ties | dpo(0.1) | ref prev | prev, fresh",
    "selm": "pairs | pair + greedy | reward-model | best-worst of 3 | dpo(0.01) + optimism(0.001) | ref prev | "
    "prev, fresh",
    "simpo-onpolicy": "pool | sample(5, 0.8, 0.95) | reward-model | best-worst of 5 | simpo(10, 3) | ref none | "
    "one round",
    "spa": "dpo seed | pool | sample(2, 0.7) | implicit(init) | two | dpo(0.1) | quantile(0.1, 0.1, 0.2) | ref prev | "
    "prev, fresh",
    "spa-noseed": "pool | sample(2, 0.7) | implicit(init) | two | dpo(0.1) | quantile(0.1, 0.1, 0.2) | ref prev | "
    "prev, fresh",
    "spa-official": "dpo seed | pool | sample(2, 0.7) | implicit(init) | two | dpo(0.1) | quantile(0.1, 0.1, 0.2) | "
    "ref prev | prev, fresh",
    "spin": "gold | gold + sample(1, 1) | order(gold > sample) | two | dpo(0.1/0.1/0.1/5) | ref prev | prev, window2",
    "synpo": "taught keywords(0.7) by init | improve(0.7) + init(0.7) | order(improve > init) | "
    "two + min-gap(0.02, reward-model) | simpo(10, 1.6) | ref none | init, all",
}


def test_every_value_of_every_axis_is_told_of() -> None:
    """None is missing, none is made up, and each has a sentence and a source."""
    assert WHERE.keys() == PIECES.keys() >= AXES.keys()
    for axis, pieces in PIECES.items():
        assert tuple(pieces) == values(axis), axis
        for piece in pieces.values():
            assert piece.what.endswith(".")
            assert piece.source


@pytest.mark.parametrize("name", shipped("recipe"))
def test_a_recipe_as_one_line(name: str) -> None:
    assert one_line(build(layers_of(name, "paper"))[0]) == LINES[name]


def test_the_page_has_the_lines() -> None:
    """docs/recipes.md shows every recipe's line as the program has it, and has a row for each in both tables."""
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- one line each -->\n```text\n(.*?)```", page, re.DOTALL)
    assert shown
    assert dict(line.split(maxsplit=1) for line in shown[1].splitlines()) == LINES
    for name in LINES:
        assert page.count(f"\n| `{name}` |") == 2


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"loss": "orpo"}, "two | orpo(0.1) | quantile(0.1, 0.1, 0.2) | ref none"),
    ({"loss": "simpo", "loss.round_betas": [2, 4]}, "simpo(2/4, 3)"),
    ({"loss.nll": 0.5, "noise": "smooth"}, "dpo(0.1) + nll(0.5) | smooth(0.1) |"),
    ({"refine.alpha": 0}, "dpo(0.1) | ref prev"),
    ({"judge.length_penalty": 0.01, "judge.reference": "none"}, "implicit(none) - 0.01 a token |"),
    ({"judge": "self-pair", "judge.swap": False}, "| self-pair | two |"),
    ({"noise": "weight"}, "weight(confidence)"),
    ({"rounds": 1, "carry.start": "init"}, "init, one round"),
]


@pytest.mark.parametrize(("changes", "part"), CHANGED)
def test_the_line_follows_the_settings(changes: dict[str, Any], part: str) -> None:
    assert part in one_line(build({"changes": changes})[0])


def test_a_run_of_the_seed_stage_alone() -> None:
    assert one_line(build({"changes": {"rounds": 0}})[0]) == "dpo seed"
