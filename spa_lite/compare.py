"""What a study found: statistics over the seeds of each cell, paired with the base cell, as CSV and JSON.

A cell is one combination of settings, the base cell the recipe as given. The same seed means the same data and the
same random numbers in every cell, so cells are compared seed by seed: a paired t-test on the differences.

What that covers is how a result varies from seed to seed: the draw of seed pairs and prompts, sampling, training. What
it does not cover: held-out items that are the same for every seed (their draw is in nobody's interval), other models,
other data. Few seeds have little power: with three, a difference must be about 2.5 times its own standard deviation to
reach p < 0.05, so "no difference seen" is not "no difference". The t-test takes differences as roughly normal, which
few seeds cannot show. Every cell against the base is one more chance to be lucky: p_holm is corrected for the number
of cells compared (Holm, 1979), within one measure; nothing corrects for looking at many measures.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from spa_lite.errors import RunError
from spa_lite.files import write_atomic, write_json

if TYPE_CHECKING:
    pass

MEASURES = {
    "win_rate": "share of held-out prompts on which the answer has the higher gold score than pi_init's; ties half",
    "pair_accuracy": "share of held-out labelled pairs on which the implicit reward prefers the labelled choice",
    "gold_score": "mean gold score of the answers to the held-out prompts",
    "gold_CRITERION": "mean of one criterion of the gold score over the same answers",
    "label_accuracy": "share of self-labels that agree with gold, pairs of equal gold left out; mean over the rounds",
    "flagged_share": "share of the training pairs that were taken for noise; mean over the rounds",
    "flagged_wrong_share": "share of the flagged pairs that really had the wrong label; all rounds together",
    "wrong_share": "share of all self-labelled pairs that really had the wrong label; all rounds together",
    "length": "mean tokens of an answer: to the held-out prompts where there are any, else of the last round's samples",
    "sampled_tokens": "tokens that the model wrote for the rounds: answers, and prompts where it writes those, too",
    "seconds": "time of all stages but measuring, whenever and by whichever run they were computed",
    "loss": "mean training loss over the last quarter of the steps; only comparable where the loss is the same",
}
"""Name of a measure -> what it is. All are of the final policy unless the meaning says otherwise; shares lie in [0, 1].

`win_rate`, `pair_accuracy` and `label_accuracy` also come per round, as `win_rate_round_2`; round 0 is pi_0."""

HEADLINES = ("win_rate", "pair_accuracy")
"""What a study is about: the first of them that every successful run has."""


@dataclass(frozen=True)
class Outcome:
    """What became of one cell for one seed. `rows` are those of summary.json; None if the run failed, and `error` why.

    `changes` are the settings in which the cell differs from the recipe as given, the same for each of its seeds.
    """

    cell: str
    seed: int
    changes: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] | None
    error: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `sd` (ddof 1) is None for one seed; the 95 % interval (Student t, not cut to [0, 1]) is None
    for one seed and where all values are equal: no variation seen is not certainty."""

    values: Mapping[int, float]  # seed -> value, in order of the seeds
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Estimate):
    """Cell minus base over the seeds that both have. `p` of the paired t-test is None where the interval is."""

    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Cell:
    """One cell: its settings, what failed (seed -> sentence), and per measure its estimate and difference to the base.

    `differences` is empty for the base cell, and where no seed has the measure in both cells.
    """

    name: str
    changes: Mapping[str, Any]
    folders: Mapping[int, str]  # seed -> run folder
    failed: Mapping[int, str]
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Difference]


@dataclass(frozen=True)
class Comparison:
    """The statistics of a study. The base cell comes first, the others in natural order of their names."""

    about: Mapping[str, Any]
    base: str
    headline: str
    comparisons: int  # tests of the headline measure that the Holm correction is for
    measures: tuple[str, ...]  # all that any run has, in the order of MEASURES
    cells: tuple[Cell, ...]


# -- numbers of one run --------------------------------------------------------------------------------------------


def measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of one run, by the names of `MEASURES`; what a run does not have is left out."""
    rounds = [row for row in rows if row.get("judged")]
    starts = [row for row in rows if not row.get("judged")][-1:]  # pi_0, and the last row of a run without rounds
    last = rows[-1] if rows else {}
    flags = [row["flags"] for row in rounds if row.get("flags")]
    found: dict[str, Any] = {name: _value(last.get(name)) for name in HEADLINES}
    found |= {f"gold_{criterion}": mean for criterion, mean in (last.get("gold") or {}).items()}
    found["label_accuracy"] = _mean([_labels(row) for row in rounds])
    found["flagged_share"] = _mean([row["trained"].get("flagged_share") for row in rounds])
    found["flagged_wrong_share"] = _ratio(flags, "flagged_wrong", "flagged")
    found["wrong_share"] = _ratio(flags, "wrong", "pairs")
    found["length"] = last.get("length") or (last.get("judged") or {}).get("mean_tokens")
    found["sampled_tokens"] = sum(made.get("tokens", 0) for row in rounds for made in _written(row)) or None
    found["seconds"] = _seconds(rows)
    found["loss"] = (last.get("trained") or {}).get("loss")
    for i, row in enumerate([*starts, *rounds], start=0 if starts else 1):
        found |= {f"{name}_round_{i}": _value(row.get(name)) for name in HEADLINES}
        found[f"label_accuracy_round_{i}"] = _labels(row)
    numbers = {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
    return dict(sorted(numbers.items(), key=lambda item: _place(item[0])))


def meaning(name: str) -> str:
    """What a measure is, in one sentence."""
    stem, _, i = name.partition("_round_")
    sentence = MEASURES.get(stem) or MEASURES["gold_CRITERION"]
    return f"{sentence.removesuffix('; mean over the rounds')}; round {i}" if i else sentence


def _value(interval: Mapping[str, float] | None) -> float | None:
    return interval["value"] if interval else None


def _labels(row: Mapping[str, Any]) -> float | None:
    return _value((row.get("label_accuracy") or {}).get("score"))


def _written(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The summaries of a round's stages that write."""
    return [row[name] for name in ("prompted", "sampled") if row.get(name)]


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """By the clocks of the stages, where the rows have them."""
    spent = [stage["seconds"] for row in rows for kind, stage in row.get("spent", {}).items() if kind != "measure"]
    return sum(spent) if spent else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _ratio(counts: Sequence[Mapping[str, float]], part: str, whole: str) -> float | None:
    total = sum(count[whole] for count in counts)
    return sum(count[part] for count in counts) / total if total else None


def _place(name: str) -> tuple[int, list[tuple[float, str]]]:
    """Where a measure stands among the others."""
    stem, _, i = name.partition("_round_")
    known = list(MEASURES)
    return known.index(stem if stem in MEASURES else "gold_CRITERION") + (len(known) if i else 0), natural(name)


def natural(text: str) -> list[tuple[float, str]]:
    """Sort key: numbers by their value, so that `lr=5e-4` comes before `lr=1e-3` and round 2 before round 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [(float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts)] + [(math.inf, text)]


# -- statistics ----------------------------------------------------------------------------------------------------


def compare(outcomes: Sequence[Outcome], base: str, about: Mapping[str, Any]) -> Comparison:
    """The statistics of all outcomes, in whatever order they come.

    Raises RunError if the base cell is not among them, or a cell has two outcomes for one seed.
    """
    piles: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        pile = piles.setdefault(outcome.cell, {})
        if outcome.seed in pile:
            raise RunError(f"cell {outcome.cell!r} has two results for seed {outcome.seed}; give every seed once")
        pile[outcome.seed] = outcome
    if base not in piles:
        raise RunError(f"the base cell {base!r} is not among the results; name one of: {', '.join(sorted(piles))}")
    names = sorted(piles, key=lambda name: (name != base, natural(name)))
    values = {name: _by_measure(piles[name]) for name in names}
    cells = [_cell(name, piles[name], values[name], {} if name == base else values[base]) for name in names]
    found = sorted({measure for cell in cells for measure in cell.estimates}, key=_place)
    cells = _corrected(cells, found)
    successes = sum(o.rows is not None for o in outcomes)
    everywhere = [h for h in HEADLINES if sum(len(values[name].get(h, {})) for name in names) == successes]
    headline = everywhere[0] if everywhere else HEADLINES[-1]
    tests = sum(_p(cell, headline) is not None for cell in cells)
    return Comparison(dict(about), base, headline, tests, tuple(found), tuple(cells))


def _by_measure(pile: Mapping[int, Outcome]) -> dict[str, dict[int, float]]:
    """Measure -> seed -> value, seeds in order."""
    found: dict[str, dict[int, float]] = {}
    for seed in sorted(pile):
        for name, value in measures(pile[seed].rows or ()).items():
            found.setdefault(name, {})[seed] = value
    return found


def _cell(
    name: str, pile: Mapping[int, Outcome], ours: Mapping[str, Mapping[int, float]], base: Mapping[str, Any]
) -> Cell:
    seeds = sorted(pile)
    return Cell(
        name=name,
        changes=dict(pile[seeds[0]].changes),
        folders={seed: pile[seed].folder for seed in seeds},
        failed={seed: pile[seed].error or "no reason given" for seed in seeds if pile[seed].rows is None},
        estimates={m: estimate(values) for m, values in ours.items()},
        differences={m: difference(values, base[m]) for m, values in ours.items() if values.keys() & base.get(m, {})},
    )


def estimate(values: Mapping[int, float]) -> Estimate:
    """Mean, standard deviation and interval of at least one value per seed."""
    numbers = np.array(list(values.values()))
    mean, n = float(numbers.mean()), len(numbers)
    sd = float(numbers.std(ddof=1)) if n > 1 else None
    if sd is None or not _varies(numbers, numbers):
        return Estimate(values, mean, sd, None, None)
    from scipy import stats

    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Estimate(values, mean, sd, mean - half, mean + half)


def difference(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Ours minus base over their common seeds (at least one), with a paired t-test; `p_holm` is None for now."""
    common = [seed for seed in ours if seed in base]
    both = np.array([[ours[seed], base[seed]] for seed in common])
    change = both[:, 0] - both[:, 1]
    found = estimate(dict(zip(common, change.tolist(), strict=True)))
    p = None
    if _varies(change, both):
        from scipy import stats

        p = float(stats.ttest_rel(both[:, 0], both[:, 1]).pvalue)
    else:
        found = replace(found, low=None, high=None)
    return Difference(found.values, found.mean, found.sd, found.low, found.high, p, None)


def _varies(numbers: np.ndarray, scale: np.ndarray) -> bool:
    """Whether numbers made from those of `scale` differ by more than rounding."""
    return len(numbers) > 1 and bool(np.ptp(numbers) > 1e-12 * np.abs(scale).max())


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values (S. Holm, 1979): the k-th smallest of m times m - k + 1, never falling, at most 1."""
    adjusted, worst = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = worst
    return adjusted


def _p(cell: Cell, measure: str) -> float | None:
    found = cell.differences.get(measure)
    return found.p if found else None


def _corrected(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """The cells with p_holm, corrected within each measure for the cells that were tested."""
    tested = {m: {cell.name: p for cell in cells if (p := _p(cell, m)) is not None} for m in names}
    adjusted = {m: holm(ps) for m, ps in tested.items()}
    return [
        replace(
            cell,
            differences={m: replace(d, p_holm=adjusted[m].get(cell.name)) for m, d in cell.differences.items()},
        )
        for cell in cells
    ]


# -- files ---------------------------------------------------------------------------------------------------------


def write_results(folder: Path, outcomes: Sequence[Outcome], base: str, about: Mapping[str, Any]) -> Comparison:
    """Write results.csv, results.json and the plots into a folder that exists; return what they show.

    `about` says what was studied, in plain JSON values. Its "name" is the title, and "given" the values that the base
    recipe has for the settings that were varied. The same outcomes give the same bytes. Raises RunError as `compare`.
    """
    from spa_lite.plots import plots

    comparison = compare(outcomes, base, about)
    write_atomic(folder / "results.csv", table_csv(comparison).encode())
    write_json(folder / "results.json", to_dict(comparison))
    plots(folder, comparison)
    return comparison


def table_csv(comparison: Comparison) -> str:
    """One line per cell and seed. Empty: no value, or a setting the cell does not change and `about` does not tell.

    Text that a spreadsheet could take for a formula begins with an apostrophe.
    """
    settings = sorted({setting for cell in comparison.cells for setting in cell.changes})
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write([csv_field(name) for name in ["cell", "base", "seed", *settings, *comparison.measures, "error", "folder"]])
    for cell in comparison.cells:
        for seed, place in cell.folders.items():
            own = {**comparison.about.get("given", {}), **cell.changes}
            changed = [csv_field(own[setting]) if setting in own else "" for setting in settings]
            numbers = [cell.estimates[m].values.get(seed) if m in cell.estimates else None for m in comparison.measures]
            base = "yes" if cell.name == comparison.base else "no"
            end = [csv_field(cell.failed.get(seed, "")), csv_field(place)]
            write([csv_field(cell.name), base, seed, *changed, *numbers, *end])
    return text.getvalue()


def csv_field(value: Any) -> Any:
    """A setting or a text as a CSV field: numbers as they are, the rest as JSON or guarded text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"'{text}" if text.lstrip()[:1] in {"=", "+", "-", "@"} or text[:1] in {"\t", "\r", "\n"} else text


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values for JSON, always in the same order."""
    return {
        "study": comparison.about,
        "base": comparison.base,
        "headline": comparison.headline,
        "comparisons": comparison.comparisons,
        "intervals": "95 %, Student t over seeds; differences are cell minus base, paired by seed",
        "measures": {name: meaning(name) for name in comparison.measures},
        "cells": [
            {
                "cell": cell.name,
                "settings": cell.changes,
                "runs": {str(seed): place for seed, place in cell.folders.items()},
                "errors": {str(seed): error for seed, error in cell.failed.items()},
                "measures": {
                    m: _plain(cell.estimates[m])
                    | ({"difference": _plain(cell.differences[m])} if m in cell.differences else {})
                    for m in comparison.measures
                    if m in cell.estimates
                },
            }
            for cell in comparison.cells
        ],
    }


def _plain(found: Estimate) -> dict[str, Any]:
    return {"n": len(found.values), **msgspec.to_builtins(found, str_keys=True)}
