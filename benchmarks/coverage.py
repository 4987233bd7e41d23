"""How often the 95 % intervals that are printed hold the truth: a simulation.

    python benchmarks/coverage.py [--trials 2000] [--table benchmarks/results/coverage.md]

Each row draws data from a population whose truth is known, many times over, and counts. Wilson's on 0/1 data is
computed and not simulated. A last column says how well the simulation knows the coverage (Wilson, 95 %).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from spa_lite.intervals import (
    RESAMPLES,
    Floats,
    Interval,
    bootstrap,
    cluster_bootstrap,
    coverage,
    difference,
    share,
    wilson,
)
from spa_lite.length_control import Rows, length_controlled

SIZES = (25, 50, 100, 400, 805)
LC_SIZES = (50, 100, 400, 805)
LC_RESAMPLES = 400
QUESTIONS, CATEGORY = 80, 10
SHORT = 0.93
LENGTH, DIFFICULTY, INTERCEPT = 1.2, 0.8, -0.6
"""Coefficients of the model that wins are drawn from."""

Draw = Callable[[np.random.Generator], Interval | None]
Population = Callable[[np.random.Generator, int], Floats]
Row = tuple[str, str, int, Interval]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    text = "\n".join(table(options.trials)) + "\n"
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")


def table(trials: int) -> Iterator[str]:
    """Lines of Markdown."""
    yield "# Coverage of the 95 % intervals\n"
    yield (
        f"`python benchmarks/coverage.py --trials {trials}`. Share of data sets, drawn from a population whose truth "
        f"is known, whose interval holds it. Bootstraps draw {RESAMPLES:,} resamples, those of length control "
        f"{LC_RESAMPLES}, in {trials // 4} trials.\n"
    )
    yield "| interval | data | n | coverage % | known within |"
    yield "| --- | --- | ---: | ---: | --- |"
    short = []
    for interval, data, n, held in rows(trials):
        within = "exact" if held.n == 0 else f"[{100 * held.low:.1f}, {100 * held.high:.1f}]"
        yield f"| {interval} | {data} | {n} | {100 * held.value:.1f} | {within} |"
        if held.value < SHORT:
            short.append(f"{interval}, {data}, n = {n} ({100 * held.value:.1f})")
    yield f"\nBelow {100 * SHORT:.0f} %: {'; '.join(short) or 'none'}."


def rows(trials: int) -> Iterator[Row]:
    """All rows."""
    for p in (0.5, 0.7, 0.95):
        for n in SIZES:
            yield "Wilson", f"won or lost, win rate {p:g}", n, exact(n, p)
    shares: list[tuple[str, Population, float]] = [
        ("won, tied or lost, win rate 0.6", halves, 0.6),
        ("soft preferences, win rate 0.33", partial(soft, 0.3, 0.6), 1 / 3),
        ("soft preferences, win rate 0.05", partial(soft, 0.05, 0.95), 0.05),
    ]
    for data, population, truth in shares:
        for n in SIZES:
            yield "bootstrap", data, n, simulate(partial(bootstrapped, population, n), truth, trials)
        for n in SIZES[:3]:
            yield "as printed", data, n, simulate(partial(printed, population, n), truth, trials)
    for gained, lost in ((0.08, 0.03), (0.02, 0.01)):
        for n in SIZES:
            draw = partial(paired, n=n, gained=gained, lost=lost)
            yield "paired difference", f"{gained:.0%} gained, {lost:.0%} lost", n, simulate(draw, gained - lost, trials)
    for clustered, name in ((True, "bootstrap over questions"), (False, "bootstrap over grades (not used)")):
        for n in (QUESTIONS, CATEGORY) if clustered else (QUESTIONS,):
            draw = partial(grades, n=n, clustered=clustered)
            yield name, f"{n} questions, two grades each, correlation 0.5", n, simulate(draw, 0.0, trials)
    for n in LC_SIZES:
        held = simulate(partial(controlled, n=n), sigmoid(INTERCEPT), trials // 4)
        yield "LC (no difficulty)", "answers 1 sd longer", n, held
    for n in LC_SIZES:
        held = simulate(partial(controlled, n=n, linear=True), sigmoid(INTERCEPT), trials // 4)
        yield "LC (no difficulty)", "answers 1 sd longer, effect of length not tanh but linear", n, held
    truth = float(np.mean([sigmoid(DIFFICULTY * d + INTERCEPT) for d in np.random.default_rng(1).normal(size=200_000)]))
    held = simulate(with_difficulty, truth, trials // 4)
    yield "LC with difficulty and other models' rows", "answers 1 sd longer", SIZES[-1], held


def simulate(draw: Draw, truth: float, trials: int) -> Interval:
    """Share of trials whose interval holds the truth."""
    held = coverage((draw(np.random.default_rng([7, trial])) for trial in range(trials)), truth)
    assert held is not None
    return held


def exact(n: int, p: float) -> Interval:
    """Coverage of Wilson's interval by the binomial distribution; its `n` of 0 says that nothing was drawn."""
    held = 0.0
    for k in range(n + 1):
        found = wilson(k, n)
        if found is not None and found.holds(p):
            log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            held += math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))
    return Interval(held, held, held, 0)


def bootstrapped(population: Population, n: int, rng: np.random.Generator) -> Interval | None:
    """The bootstrap, whatever n is."""
    return bootstrap(population(rng, n), seed_of(rng))


def printed(population: Population, n: int, rng: np.random.Generator) -> Interval | None:
    """What is printed for a share."""
    return share(list(population(rng, n)), seed_of(rng))


def seed_of(rng: np.random.Generator) -> int:
    """Another one for every data set: the same resamples everywhere would err the same way everywhere."""
    return int(rng.integers(2**31))


def halves(rng: np.random.Generator, n: int) -> Floats:
    """1 with probability 0.5, 0.5 with 0.2, 0 with 0.3."""
    return rng.choice([1.0, 0.5, 0.0], size=n, p=[0.5, 0.2, 0.3])


def soft(a: float, b: float, rng: np.random.Generator, n: int) -> Floats:
    """Preferences that are mostly near 0 or 1, as a judge's probabilities are."""
    return rng.beta(a, b, size=n)


def paired(rng: np.random.Generator, n: int, gained: float, lost: float) -> Interval | None:
    """Questions that are right after a change, wrong before it, or the other way round; most stay as they are."""
    change = rng.choice([1.0, -1.0, 0.0], size=n, p=[gained, lost, 1 - gained - lost])
    return difference(np.maximum(change, 0), np.maximum(-change, 0), seed_of(rng))


def grades(rng: np.random.Generator, n: int, clustered: bool) -> Interval | None:
    """The mean grade of two turns of each question; sd 2.5, correlation 0.5."""
    sd = 2.5 / math.sqrt(2)
    values = (rng.normal(0, sd, (n, 1)) + rng.normal(0, sd, (n, 2))).ravel()
    names = np.repeat(np.arange(n), 2) if clustered else np.arange(2 * n)
    return cluster_bootstrap(list(values), list(names), seed_of(rng))


def controlled(rng: np.random.Generator, n: int, linear: bool = False) -> Interval | None:
    """Length control where both orders are asked and longer answers win more."""
    delta = rng.normal(1, 1, n)
    effect = delta if linear else np.tanh(delta)
    wins = rng.binomial(2, 1 / (1 + np.exp(-(LENGTH * effect + INTERCEPT)))) / 2
    return length_controlled(list(wins), list(delta), seed=seed_of(rng), resamples=LC_RESAMPLES).interval


def with_difficulty(rng: np.random.Generator) -> Interval | None:
    """As AlpacaEval's: known difficulties, and two other models on the same prompts at weight 0.1 each."""
    n = SIZES[-1]
    hard, delta = rng.normal(size=n), rng.normal(1, 1, n)
    y = soft_wins(rng, LENGTH * np.tanh(delta) + DIFFICULTY * hard + INTERCEPT)
    length, twice = np.concatenate([rng.normal(-2, 1, n), rng.normal(2, 1, n)]), np.tile(hard, 2)
    others = Rows(soft_wins(rng, LENGTH * np.tanh(length) + DIFFICULTY * twice), length, twice)
    return length_controlled(
        list(y), list(delta), list(hard), seed_of(rng), rows=others, resamples=LC_RESAMPLES
    ).interval


def soft_wins(rng: np.random.Generator, logit: Floats) -> Floats:
    """Probabilities whose mean is the sigmoid of the logit."""
    p = 1 / (1 + np.exp(-logit))
    return rng.beta(p, 1 - p)


def sigmoid(x: float) -> float:
    """Of one number."""
    return 1 / (1 + math.exp(-x))


if __name__ == "__main__":
    main()
