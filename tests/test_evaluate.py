"""Measures against numbers one can check elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.evaluate import gold_means, label_agreement, wilson, win_rate, wrong_flags
from spa_lite.records import Completion, Judgement, Sample, Side


def test_wilson_textbook_values() -> None:
    """8 of 10: [0.490, 0.943]; 0 of 10: [0, 0.278]."""
    eight, none = wilson(8, 10), wilson(0, 10)
    assert eight is not None
    assert none is not None
    assert (round(eight.low, 3), round(eight.high, 3)) == (0.490, 0.943)
    assert (none.low, round(none.high, 3)) == (0.0, 0.278)
    assert wilson(0, 0) is None


def test_win_rate_counts_ties_half() -> None:
    """Two wins, one tie, one loss."""
    rate = win_rate([1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.5, 1.0], seed=0, resamples=500)
    assert rate.value == 0.625
    assert rate.low < 0.625 < rate.high
    assert rate == win_rate([1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.5, 1.0], seed=0, resamples=500)
    assert rate != win_rate([1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.5, 1.0], seed=0, resamples=30)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_win_rates_of_both_sides_add_up(scores: list[tuple[float, float]]) -> None:
    """A beats B as often as B loses to A."""
    a, b = [s for s, _ in scores], [s for _, s in scores]
    assert win_rate(a, b, 0, 10).value == pytest.approx(1 - win_rate(b, a, 0, 10).value)


def rule(extra: Mapping[str, Any], text: str, ended: bool) -> dict[str, float]:
    """Length is quality; a capped answer has no ending."""
    size = len(text) / 10
    return {"size": size, "ending": float(ended), "score": (size + ended) / 2}


def judged(name: str, a: str, b: str, label: Any, ended_b: Any = "eos") -> Judgement:
    """A judgement of two texts."""
    ends: list[Any] = ["eos", ended_b]
    sides = [Side(text=t, ids=(1,), ended=e, policy=0.0, reference=0.0) for t, e in zip((a, b), ends, strict=True)]
    return Judgement(
        id=name, messages=(), prompt_ids=(1,), a=sides[0], b=sides[1], logratio_a=0, logratio_b=0, margin=0, p=0.5,
        label=label, tie=False, tokens_a=1, tokens_b=1,
    )  # fmt: skip


def test_label_agreement_per_criterion() -> None:
    """Pairs of equal gold do not count."""
    pile = [judged("1", "long", "x", "a"), judged("2", "long", "x", "b"), judged("3", "x", "y", "a")]
    found = label_agreement(pile, rule)
    assert (found["score"].value, found["score"].n) == (0.5, 2)
    assert "ending" not in found
    capped = label_agreement([judged("1", "x", "y", "a", "cap")], rule)
    assert capped["ending"].value == 1.0


def test_wrong_flags() -> None:
    """How many of the flagged pairs are mislabelled, and how many of all."""
    pile = [judged("1", "long", "x", "a"), judged("2", "long", "x", "b"), judged("3", "x", "long", "a")]
    assert wrong_flags(pile, ["1", "2"], rule) == {"flagged": 2, "flagged_wrong": 1, "wrong": 2, "pairs": 3}


def test_gold_means() -> None:
    """Means over first answers, and a score for each."""
    answers: list[tuple[str, Any]] = [("xx", "eos"), ("xxxx", "cap")]
    samples = [
        Sample(id=t, messages=(), prompt_ids=(1,), completions=(Completion(ids=(1,), text=t, ended=e),))
        for t, e in answers
    ]
    means, scores = gold_means(samples, rule)
    assert means["size"] == pytest.approx(0.3)
    assert scores == [pytest.approx(0.6), pytest.approx(0.2)]
