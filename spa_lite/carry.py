"""Axis: what a round takes over from those before it: where its training starts, and older pairs (SPIN, SynPO)."""

from __future__ import annotations

from spa_lite.recipe import Recipe


def rounds_trained_on(recipe: Recipe, round_: int) -> list[int]:
    """The rounds whose pairs are trained on in a round, oldest first, its own last."""
    first = {"fresh": round_, "window2": max(1, round_ - 1), "all": 1}[recipe.carry.data]
    return list(range(first, round_ + 1))


def of_round(values: list[float] | None, round_: int, otherwise: float) -> float:
    """The value of a round from a list with one per round, the last one from then on."""
    return values[min(round_, len(values)) - 1] if values else otherwise
