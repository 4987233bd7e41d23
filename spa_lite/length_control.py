"""Win rate with length held equal: would the answers still win if they were as long as those they are compared with?

A logistic model says how the chance of winning depends on the difference in length,

    P(win) = sigmoid(a * tanh(length difference / its sd) + b * difficulty + c),

and the length-controlled win rate is the mean over prompts of its prediction at difference 0 (Dubois et al., 2024).
Half wins and probabilities are soft labels. The interval is a bootstrap over prompts in which everything, the sd too,
is fitted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa_lite.intervals import Floats, Interval, percentile, resampled

RIDGE = 1e-3
"""Half of this times the squared coefficients is the penalty: it only keeps separable data finite."""

MOST_STEPS = 60
TOLERANCE = 1e-8

NO_DIFFICULTY = "LC (no difficulty)"
DIFFICULTY = "LC (with difficulty)"
FEW, LEAST = 100, 10
"""Below 100 prompts the fit says little, and that is said; below 10 there is none."""

ALIKE = 0.05
"""Where the tanh of the formula varies by less than this share of its mean there is no fit."""


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate in [0, 1], the name it must be printed under, and what must be said beside it.

    `interval` is None where there is nothing to fit; `note` then says why. The coefficients are those of the formula.
    """

    interval: Interval | None
    name: str
    note: str = ""
    length: float = 0.0
    difficulty: float = 0.0
    intercept: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Rows of other models that only tie the coefficients of length and difficulty: they have no intercept.

    `length` is in standard deviations, the answer's minus the reference's. Each counts `weight` of a prompt.
    """

    wins: Floats
    length: Floats
    difficulty: Floats
    weight: float = 0.1


def length_controlled(
    wins: Sequence[float],
    length_difference: Sequence[float],
    difficulty: Sequence[float] | None = None,
    seed: int = 0,
    *,
    rows: Rows | None = None,
    resamples: int = 1000,
) -> LengthControlled:
    """The length-controlled win rate of one win in [0, 1] per prompt.

    `length_difference` is the answer's length minus the reference's, in any unit; `difficulty` one number per prompt. A
    prompt with a value that is not finite is left out and counted in the note. `rows` need `difficulty`.
    """
    name = NO_DIFFICULTY if difficulty is None else DIFFICULTY
    columns = np.array([wins, length_difference, *([] if difficulty is None else [difficulty])], dtype=np.float64)
    finite = np.isfinite(columns).all(axis=0)
    y, delta, *hard = columns[:, finite]
    notes = [f"{int((~finite).sum())} prompts without a finite value are left out"] if not finite.all() else []
    why = _nothing_to_fit(y, delta) or ("" if rows else _always_longer(delta))
    if why:
        return LengthControlled(None, name, "; ".join([why, *notes]))
    if len(y) < FEW:
        notes.append(f"from fewer than {FEW} prompts, so the fit says little")
    data = _Data(y, delta, hard[0] if hard else None, rows)
    (value,), start = data.fit(np.arange(len(y))[None])
    refits = [data.fit(drawn, start)[0] for drawn in resampled(len(y), seed, resamples)]
    interval = percentile(float(value), np.concatenate(refits), len(y))
    length, *b, intercept = (float(c) for c in start[0])
    return LengthControlled(interval, name, "; ".join(notes), length, b[0] if b else 0.0, intercept)


def fit(y: Floats, features: Sequence[Floats], weights: Floats, start: Floats | None = None) -> Floats:
    """Coefficients [fits, features] of weighted logistic regressions on soft labels, all at once, by Newton's method.

    `y` and each feature are [fits, rows], `weights` [rows], `start` [1 or fits, features]. A step changes no
    coefficient by more than 2, so that it cannot overshoot on separable data.
    """
    beta = np.zeros((len(y), len(features))) if start is None else np.repeat(start, len(y) // len(start), axis=0)
    for _ in range(MOST_STEPS):
        p = _sigmoid(_logit(beta, features))
        residual, curvature = weights * (y - p), weights * p * (1 - p)
        gradient = np.stack([_dots(residual, f) for f in features], axis=1) - RIDGE * beta
        curved = [curvature * f for f in features]
        hessian = np.stack([np.stack([_dots(c, f) for f in features], axis=1) for c in curved], axis=1)
        step = np.linalg.solve(hessian + RIDGE * np.eye(len(features)), gradient[..., None])[..., 0]
        beta += np.clip(step, -2, 2)
        if np.abs(step).max() < TOLERANCE:
            break
    return beta


@dataclass(frozen=True)
class _Data:
    """What is fitted: one value of each per prompt, and the rows of other models."""

    wins: Floats
    delta: Floats
    difficulty: Floats | None
    rows: Rows | None

    def fit(self, drawn: NDArray[np.int64], start: Floats | None = None) -> tuple[Floats, Floats]:
        """Length-controlled win rates [fits] and coefficients [fits, features] of the drawn prompts [fits, prompts]."""
        delta = self.delta[drawn]
        # A resample may hold prompts of one difference only.
        length = np.tanh(delta / np.maximum(delta.std(axis=1, ddof=1, keepdims=True), 1e-12))
        hard = [] if self.difficulty is None else [self.difficulty[drawn]]
        features = [length, *hard, np.ones(drawn.shape)]
        beta = fit(*_tied(self.wins[drawn], features, self.rows), start)
        controlled = _sigmoid(_logit(beta[:, 1:], features[1:]))
        return controlled.mean(axis=1), beta


def _tied(y: Floats, features: list[Floats], rows: Rows | None) -> tuple[Floats, list[Floats], Floats]:
    """The arguments of `fit` with the rows of other models behind the prompts."""
    if rows is None:
        return y, features, np.ones(y.shape[1])
    others = [np.tanh(rows.length), rows.difficulty, np.zeros(len(rows.wins))]

    def join(own: Floats, other: Floats) -> Floats:
        return np.concatenate([own, np.broadcast_to(other, (len(own), len(other)))], axis=1)

    weights = np.concatenate([np.ones(y.shape[1]), np.full(len(rows.wins), rows.weight)])
    return join(y, rows.wins), [join(f, o) for f, o in zip(features, others, strict=True)], weights


def _logit(beta: Floats, features: Sequence[Floats]) -> Floats:
    logit: Floats = np.add.reduce([b[:, None] * f for b, f in zip(beta.T, features, strict=True)])
    return logit


def _dots(a: Floats, b: Floats) -> Floats:
    """Row by row dot products of [fits, rows]."""
    dots: Floats = np.einsum("ij,ij->i", a, b)
    return dots


def _nothing_to_fit(y: Floats, delta: Floats) -> str:
    if len(y) < LEAST:
        return f"no length control from {len(y)} prompts"
    if y.min() == y.max():
        return f"every prompt has the same outcome ({y[0]:g}), so length explains nothing"
    if delta.min() == delta.max():
        return "the difference in length is the same on every prompt, so it cannot be controlled for"
    return ""


def _always_longer(delta: Floats) -> str:
    """Where the curve is flat for all prompts, length and intercept are one, and the penalty alone would part them."""
    length = np.tanh(delta / delta.std(ddof=1))
    if length.std() >= ALIKE * abs(length.mean()):
        return ""
    return "one side is longer by much the same on every prompt, so length cannot be controlled for"


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
