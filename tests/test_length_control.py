"""Length control against other solvers, and on data where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from spa_lite.intervals import Floats, coverage, resampled
from spa_lite.length_control import NO_DIFFICULTY, RIDGE, LengthControlled, Rows, length_controlled


def drawn(n: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Soft wins, differences in length and difficulties: longer answers win more, and are usual."""
    rng = np.random.default_rng(seed)
    delta, hard = rng.normal(200, 150, n), rng.normal(size=n)
    p = 1 / (1 + np.exp(-(1.5 * np.tanh(delta / 150) + 0.8 * hard - 1)))
    return rng.beta(2 * p, 2 * (1 - p)), delta, hard


def others(n: int) -> Rows:
    """Rows of other models."""
    rng = np.random.default_rng(9)
    return Rows(rng.uniform(size=n), rng.normal(size=n), rng.normal(size=n))


def minimised(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Coefficients by somebody else's minimiser, on the penalised likelihood written down anew."""

    def loss(beta: Floats) -> float:
        logit = x @ beta
        nll = weights * (np.logaddexp(0, logit) - y * logit)
        return float(nll.sum() + 0.5 * RIDGE * (beta**2).sum())

    found: Floats = optimize.minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-7}).x
    return found


def test_without_difficulty_it_is_the_logistic_curve_at_length_zero() -> None:
    """As scipy finds it, and far from the raw win rate where length wins."""
    y, delta, _ = drawn(400)
    found = length_controlled(list(y), list(delta), resamples=10)
    x = np.stack([np.tanh(delta / delta.std(ddof=1)), np.ones(400)], axis=1)
    a, c = minimised(x, y, np.ones(400))
    assert found.interval is not None
    assert (found.length, found.intercept) == pytest.approx((a, c), abs=1e-5)
    assert found.interval.value == pytest.approx(1 / (1 + math.exp(-c)), abs=1e-6)
    assert found.name == NO_DIFFICULTY
    assert y.mean() - found.interval.value > 0.1


def test_with_difficulty_and_the_rows_of_other_models() -> None:
    """The rows count 0.1 and have no intercept; the rate is the mean over the prompts alone."""
    y, delta, hard = drawn(300)
    rows = others(500)
    found = length_controlled(list(y), list(delta), list(hard), rows=rows, resamples=10)
    own = np.stack([np.tanh(delta / delta.std(ddof=1)), hard, np.ones(300)], axis=1)
    tied = np.stack([np.tanh(rows.length), rows.difficulty, np.zeros(500)], axis=1)
    weights = np.concatenate([np.ones(300), np.full(500, 0.1)])
    a, b, c = minimised(np.concatenate([own, tied]), np.concatenate([y, rows.wins]), weights)
    assert found.interval is not None
    assert (found.length, found.difficulty, found.intercept) == pytest.approx((a, b, c), abs=1e-5)
    assert found.interval.value == pytest.approx(float(np.mean(1 / (1 + np.exp(-(b * hard + c))))), abs=1e-6)
    assert found.name != NO_DIFFICULTY


def test_scikit_learn_finds_the_same() -> None:
    """Soft labels as two weighted rows each, as AlpacaEval writes them."""
    linear: Any = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    y, delta, _ = drawn(200)
    found = length_controlled(list(y), list(delta), resamples=10)
    x = np.stack([np.tanh(delta / delta.std(ddof=1)), np.ones(200)], axis=1)
    model = linear.LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.concatenate([x, x]), [1] * 200 + [0] * 200, sample_weight=np.concatenate([y, 1 - y]))
    assert (found.length, found.intercept) == pytest.approx(tuple(model.coef_[0]), abs=1e-5)


def test_the_interval_is_a_bootstrap_with_everything_fitted_anew() -> None:
    """The same resamples, one after the other by the other solver, the sd of each its own."""
    y, delta, _ = drawn(60)
    found = length_controlled(list(y), list(delta), seed=5, resamples=20)
    rates = []
    for block in resampled(60, 5, 20):
        for chosen in block:
            x = np.stack([np.tanh(delta[chosen] / delta[chosen].std(ddof=1)), np.ones(60)], axis=1)
            rates.append(1 / (1 + math.exp(-minimised(x, y[chosen], np.ones(60))[1])))
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        tuple(np.quantile(rates, [0.025, 0.975])), abs=1e-5
    )
    assert "fewer than 100" in found.note


def test_the_sign_and_the_unit_of_length_do_not_matter() -> None:
    """Characters or thousands of tokens, ours minus theirs or theirs minus ours."""
    y, delta, _ = drawn(120)
    one = length_controlled(list(y), list(delta), resamples=10).interval
    two = length_controlled(list(y), list(-delta / 4000), resamples=10).interval
    assert one is not None
    assert two is not None
    assert (one.value, one.low, one.high) == pytest.approx((two.value, two.low, two.high))


@pytest.mark.parametrize(
    ("wins", "delta", "said"),
    [
        ([], [], "0 prompts"),
        ([1.0], [3.0], "1 prompts"),
        ([1.0] * 50, list(range(50)), "same outcome"),
        ([1.0, 0.0] * 25, [7.0] * 50, "same on every prompt"),
        ([1.0, 1.0, 0.0] * 20, list(range(500, 560)), "longer by much the same"),
        ([math.nan] * 50, list(range(50)), "50 prompts without a finite value"),
    ],
)
def test_what_cannot_be_fitted_is_said(wins: list[float], delta: list[float], said: str) -> None:
    """A sentence and no number."""
    found = length_controlled(wins, delta)
    assert found.interval is None
    assert said in found.note


def test_one_answer_far_longer_than_all_others_is_no_reason_not_to_fit() -> None:
    """Length then explains next to nothing."""
    wins = [1.0, 1.0, 0.0, 1.0] * 200
    found = length_controlled(wins, [0.0] * 799 + [1e9]).interval
    assert found is not None
    assert found.value == pytest.approx(0.75, abs=0.01)


def test_a_missing_value_is_left_out_and_counted() -> None:
    """The rest is fitted as if it had not been there."""
    y, delta, _ = drawn(150)
    whole = length_controlled(list(y), list(delta), resamples=10)
    holed = length_controlled([*y, math.nan, 1.0], [*delta, 0.0, math.inf], resamples=10)
    assert holed.interval == whole.interval
    assert holed.note.startswith("2 prompts without a finite value")


@pytest.mark.parametrize("side", [1, -1])
def test_wins_that_length_explains_wholly_stay_finite(side: int) -> None:
    """The longer always wins, or always loses: separable, and still a number in the middle."""
    delta = np.concatenate([np.arange(1, 31), -np.arange(1, 31)]).astype(float)
    found = length_controlled(list((side * delta > 0).astype(float)), list(delta))
    assert found.interval is not None
    assert found.interval.value == pytest.approx(0.5, abs=1e-6)
    assert 0 < found.interval.low < found.interval.high < 1


def test_all_but_one_won() -> None:
    """Resamples without the loss are separable; the interval ends at 1."""
    found = length_controlled([1.0] * 99 + [0.0], list(range(100)))
    assert isinstance(found, LengthControlled)
    assert found.interval is not None
    assert 0.9 < found.interval.low < found.interval.value < found.interval.high <= 1


def test_the_interval_holds_the_truth() -> None:
    """80 data sets of 100 prompts. `benchmarks/coverage.py` does it at length."""

    def one(trial: int) -> LengthControlled:
        rng = np.random.default_rng([3, trial])
        delta = rng.normal(1, 1, 100)
        p = 1 / (1 + np.exp(-(1.2 * np.tanh(delta) - 0.6)))
        return length_controlled(list(rng.binomial(2, p) / 2), list(delta), seed=trial, resamples=200)

    held = coverage((one(trial).interval for trial in range(80)), 1 / (1 + math.exp(0.6)))
    assert held is not None
    assert 0.86 <= held.value <= 0.99
