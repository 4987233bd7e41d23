"""Axis: which of the judged answers make a training pair, and which pairs are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from spa_lite.recipe import Recipe
from spa_lite.records import Judgement


def why_not(judgement: Judgement, recipe: Recipe) -> str:
    """Why a pair is not trained on: identical, tie, gap; nothing if it is."""
    p = recipe.pairing
    if recipe.judge.identical == "drop" and judgement.a.ids == judgement.b.ids:
        return "identical"
    if p.drop_ties and judgement.tie:
        return "tie"
    if p.min_gap and (judgement.gap is None or judgement.gap < p.min_gap):
        return "gap"
    return ""


def left_out(judgements: Sequence[Judgement], recipe: Recipe) -> dict[str, int]:
    """How many pairs are not trained on, by reason."""
    return dict(Counter(filter(None, (why_not(j, recipe) for j in judgements))))


def sentence(counts: dict[str, int], of: int) -> str:
    """The same in words; nothing if all are trained on."""
    words = {
        "identical": "hold the same answer twice",
        "tie": "are ties (pairing.drop_ties)",
        "gap": "are closer than pairing.min_gap",
    }
    told = ", ".join(f"{counts[reason]} {words[reason]}" for reason in words if counts.get(reason))
    return f"of {of} pairs not trained on: {told}" if told else ""
