"""How sure a measured number is: 95 % intervals, paired tests, and how many items a difference needs to be seen.

Every interval is over the items that were drawn by chance (prompts, questions, pairs), never over single judgements of
one item. The bootstraps are percentile bootstraps (Efron, 1979), deterministic by seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from spa_lite.keys import digest, generator

Z95 = 1.959963984540054
RESAMPLES = 2000
FEW = 50
RARE = 20
"""Below this many items, or of them wins, losses or changes, there is a formula: a bootstrap of fewer is too narrow."""

MANY = 1000
"""From so many items on, that fell either way, a normal approximation serves."""

Floats = NDArray[np.float64]

_CELLS = 100_000
"""How many items are drawn at a time."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def holds(self, truth: float) -> bool:
        """Whether `truth` lies inside."""
        return self.low <= truth <= self.high


def wilson(hits: float, n: int) -> Interval | None:
    """Wilson score interval of a share (E. B. Wilson, 1927); None of nothing."""
    if n == 0:
        return None
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # The share itself lies inside; at 0 and 1 rounding alone would put it outside.
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def share(values: Sequence[float], seed: int = 0) -> Interval | None:
    """Mean of values in [0, 1], one per item (1 won, 0.5 tied, 0 lost), with its interval; None of nothing.

    Wilson's for fewer than 50 items, for fewer than 20 wins or losses (near 0 and 1 a bootstrap is too narrow), for
    pure 0/1 data and where all are equal; else a bootstrap over the items. Of values between 0 and 1 Wilson's is rather
    too wide than too narrow. Raises ValueError for a value outside [0, 1].
    """
    found = _finite(values)
    if not len(found):
        return None
    if found.min() < 0 or found.max() > 1:
        raise ValueError("a share is of values between 0 and 1")
    rare = min(found.sum(), len(found) - found.sum()) < RARE
    if len(found) < FEW or rare or bool(np.isin(found, (0.0, 1.0)).all()) or found.min() == found.max():
        return wilson(float(found.sum()), len(found))
    return bootstrap(found, seed)


def bootstrap(values: Sequence[float] | Floats, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Mean of one value per item, with a percentile bootstrap over the items; None of nothing.

    Raises ValueError for a value that is not finite.
    """
    found = _finite(values)
    if not len(found):
        return None
    means = [found[drawn].mean(axis=1) for drawn in resampled(len(found), seed, resamples)]
    return percentile(float(found.mean()), np.concatenate(means), len(found))


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], seed: int, resamples: int = RESAMPLES
) -> Interval | None:
    """Mean of all values, with a bootstrap over whole clusters (`clusters[i]` names the one of `values[i]`).

    For several measurements of one item, as the two turns of a question. `n` counts the clusters. None of nothing.
    Raises ValueError for a value that is not finite.
    """
    found = _finite(values)
    if not len(found):
        return None
    number = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    where = [number[name] for name in clusters]
    n = len(number)
    sums, sizes = np.bincount(where, weights=found, minlength=n), np.bincount(where, minlength=n)
    means = [sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) for drawn in resampled(n, seed, resamples)]
    return percentile(float(found.mean()), np.concatenate(means), n)


def difference(
    after: Sequence[float] | Floats, before: Sequence[float] | Floats, seed: int, resamples: int = RESAMPLES
) -> Interval | None:
    """Mean of `after - before`, item by item on the same items, of values in [0, 1]; None of nothing.

    A bootstrap over the items. Below 50 items, where fewer than 20 changed and where all changed alike a bootstrap is
    too narrow, down to no width at all: there it is the interval of Bonett and Price (2012), Wald's with one more item
    that was won and one that was lost.
    """
    change = _finite(np.subtract(after, before, dtype=np.float64))
    n = len(change)
    if not n:
        return None
    if n >= FEW and np.count_nonzero(change) >= RARE and change.min() < change.max():
        return bootstrap(change, seed, resamples)
    more = np.append(change, [1.0, -1.0])
    centre, half = float(more.mean()), Z95 * float(more.std()) / math.sqrt(n + 2)
    return Interval(float(change.mean()), max(-1.0, centre - half), min(1.0, centre + half), n)


def mcnemar(gained: int, lost: int) -> float | None:
    """McNemar's test: two-sided p of two judgements of the same items being right equally often; None if they never
    differ.

    `gained` and `lost` count the items on which only the one, only the other is right. Under the null hypothesis each
    fell either way with probability 0.5: exact, or (from 1,000 such items on) the normal approximation.
    """
    n, fewer = gained + lost, min(gained, lost)
    if n == 0:
        return None
    if n < MANY:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2.0**n)
    return math.erfc(max(0.0, abs(gained - lost) - 1) / math.sqrt(2 * n))


def prompts_needed(effect: float, sd: float, power: float = 0.8) -> int | None:
    """How many items a two-sided test at 5 % needs to see a mean of `effect` with the given power; None for no effect.

    `sd` is the standard deviation of one item's value. For a win rate the effect is its distance from 0.5; for a
    difference of two models on the same prompts `sd` is that of the differences. Normal approximation; the test itself
    reckons with the spread around no effect, so that nobody is told to ask one prompt because all were won.
    """
    if effect == 0 or not math.isfinite(effect):
        return None
    spread = Z95 * math.hypot(sd, effect) + NormalDist().inv_cdf(power) * sd
    return math.ceil((spread / effect) ** 2)


def coverage(intervals: Iterable[Interval | None], truth: float) -> Interval | None:
    """Share of the intervals that hold the truth, with Wilson's interval. A missing one does not hold it."""
    held = [found is not None and found.holds(truth) for found in intervals]
    return wilson(sum(held), len(held))


def resampled(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Which of n items each resample draws, with replacement, in blocks [some resamples, n]: small ones are fast."""
    rng, rows = generator(digest("bootstrap", seed)), max(1, _CELLS // n)
    for done in range(0, resamples, rows):
        yield rng.integers(0, n, (min(rows, resamples - done), n))


def percentile(value: float, resamples: Floats, n: int) -> Interval:
    """The interval from the 2.5th to the 97.5th percentile of what the resamples gave."""
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Interval(value, float(low), float(high), n)


def _finite(values: Sequence[float] | Floats) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError("an interval needs finite values")
    return found
