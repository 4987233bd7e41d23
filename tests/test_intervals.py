"""Intervals against other people's, and against how often they hold the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spa_lite.intervals import (
    Interval,
    bootstrap,
    cluster_bootstrap,
    coverage,
    difference,
    mcnemar,
    prompts_needed,
    share,
    wilson,
)
from spa_lite.keys import digest, generator


@settings(max_examples=30)
@given(st.integers(1, 900), st.data())
def test_wilson_equals_scipys(n: int, data: st.DataObject) -> None:
    """For any count of any number."""
    hits = data.draw(st.integers(0, n))
    found, other = wilson(hits, n), stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1e-9)
    assert found.holds(hits / n)


def test_nothing_and_everything_won_lie_inside() -> None:
    """0 of 12 gives a low end of exactly 0, not of 3e-17."""
    for n in range(1, 200):
        none, all_ = wilson(0, n), wilson(n, n)
        assert none is not None
        assert all_ is not None
        assert (none.low, all_.high) == (0.0, 1.0)


def test_bootstrap_equals_scipys() -> None:
    """To within what chance allows: the standard error of such a percentile is about 1 % of the width."""
    values = np.random.default_rng(0).beta(0.5, 1, 200)
    found = bootstrap(values, 3, resamples=10_000)
    other = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1), vectorized=True
    ).confidence_interval
    assert found is not None
    width = found.high - found.low
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.05 * width)
    assert found.value == pytest.approx(float(values.mean()))


def test_a_seed_gives_one_interval() -> None:
    """Again the same, with another seed another; and the one of resamples that are drawn one after the other."""
    wins = [1.0, 0.5, 0.0] * 30
    found = bootstrap(wins, 1)
    assert found == bootstrap(wins, 1) != bootstrap(wins, 2)
    rng = generator(digest("bootstrap", 1))
    means = [np.array(wins)[rng.integers(0, 90, 90)].mean() for _ in range(2000)]
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-15)


def test_clusters_are_drawn_whole() -> None:
    """Two equal grades per question are no more than one; taking them for two makes the interval too narrow."""
    once = list(np.random.default_rng(0).normal(size=60))
    twice, names = [v for v in once for _ in range(2)], [f"q{i}" for i in range(60) for _ in range(2)]
    clustered, single = cluster_bootstrap(twice, names, 0), bootstrap(once, 0)
    apart = bootstrap(twice, 0)
    assert clustered is not None
    assert single is not None
    assert apart is not None
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high))
    assert clustered.n == 60
    assert apart.high - apart.low < 0.8 * (clustered.high - clustered.low)


def test_uneven_clusters_keep_the_mean_of_all_values() -> None:
    """The mean is over values, not over means of clusters."""
    found = cluster_bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], 0)
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (0.75, 0.0, 1.0, 2)


def test_share_takes_the_interval_that_fits() -> None:
    """Wilson's for few, for 0/1 data and for one value; else the bootstrap."""
    assert share([0.5, 1.0, 0.0]) == wilson(1.5, 3)
    assert share([1.0, 0.0] * 100) == wilson(100, 200)
    assert share([0.5] * 100) == wilson(50, 100)
    mixed = [1.0, 0.5, 0.0] * 20
    assert share(mixed, 4) == bootstrap(mixed, 4) != wilson(30, 60)
    assert share([]) is None


def test_what_cannot_be_measured_is_refused() -> None:
    """A share beyond 1, and a value that is no number."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        share([0.5, 1.5])
    for measure in (share, lambda values: bootstrap(values, 0)):
        with pytest.raises(ValueError, match="finite"):
            measure([0.5, math.nan])


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    """What both models share drops out: 40 of 400 items changed, which the bootstrap sees."""
    before = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    after = np.where(np.arange(400) < 40, 1 - before, before)
    found, single = difference(after, before, 0), share(list(before))
    assert found is not None
    assert single is not None
    assert found == bootstrap(after - before, 0)
    assert found.high - found.low < 0.7 * (single.high - single.low)


def test_no_change_on_few_items_is_no_proof_of_none() -> None:
    """A bootstrap of equal values has no width; Bonett and Price's interval, worked out by hand, has."""
    same = difference([1.0, 0.0] * 4, [1.0, 0.0] * 4, 0)
    half = 1.959963984540054 * math.sqrt(0.2 / 10)
    assert same is not None
    assert (same.value, same.low, same.high) == pytest.approx((0, -half, half))
    assert same.n == 8
    two = difference([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0)
    half = 1.959963984540054 * math.sqrt((3 / 6 + 1 / 6 - (2 / 6) ** 2) / 6)
    assert two is not None
    assert (two.value, two.low, two.high) == pytest.approx((0.5, 2 / 6 - half, 2 / 6 + half))
    assert difference([], [], 0) is None
    rare = (difference(*drawn_twice(trial, 50), trial) for trial in range(200))
    held = coverage(rare, 0.02)
    assert held is not None
    assert held.value > 0.94


def drawn_twice(trial: int, n: int) -> tuple[list[float], list[float]]:
    """Answers after and before: 3 % gained, 1 % lost."""
    change = np.random.default_rng(trial).choice([1.0, -1.0, 0.0], n, p=[0.03, 0.01, 0.96])
    return list(np.maximum(change, 0)), list(np.maximum(-change, 0))


@settings(max_examples=30)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test_of_what_changed(gained: int, lost: int) -> None:
    """As scipy has it."""
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else None
    assert mcnemar(gained, lost) == (expected if expected is None else pytest.approx(expected))


def test_prompts_needed_give_the_power_asked_for() -> None:
    """783 prompts for 55 % of wins: as many simulated comparisons see it in 80 of 100 cases. The textbook's numbers."""
    n = prompts_needed(0.05, math.sqrt(0.55 * 0.45))
    assert n == 783
    assert [prompts_needed(p - 0.5, math.sqrt(p * (1 - p))) for p in (0.6, 0.65)] == [194, 85]
    means = np.random.default_rng(0).binomial(n, 0.55, 20_000) / n
    seen = np.abs(means - 0.5) > 1.96 * np.sqrt(means * (1 - means) / n)
    assert float(seen.mean()) == pytest.approx(0.8, abs=0.015)
    assert prompts_needed(0.0, 0.5) is None
    assert prompts_needed(-0.05, math.sqrt(0.55 * 0.45)) == n


def test_all_won_does_not_ask_for_one_prompt() -> None:
    """Three wins of three are compatible with 50 %; four are not."""
    n = prompts_needed(0.5, 0.0)
    assert n == 4
    for wins, seen in ((3, False), (4, True)):
        found = wilson(wins, wins)
        assert found is not None
        assert (not found.holds(0.5)) == seen


def test_intervals_hold_the_truth_as_often_as_is_said() -> None:
    """Half-point scores of 100 prompts: 300 data sets. `benchmarks/coverage.py` does it at length."""

    def intervals() -> Iterator[Interval | None]:
        for trial in range(300):
            rng = np.random.default_rng(trial)
            yield bootstrap(rng.choice([1.0, 0.5, 0.0], size=100, p=[0.5, 0.2, 0.3]), trial, resamples=400)

    held = coverage(intervals(), 0.6)
    assert held is not None
    assert 0.91 <= held.value <= 0.98
    assert coverage([None, Interval(0.5, 0.4, 0.6, 9)], 0.45) == wilson(1, 2)
