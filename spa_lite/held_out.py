"""Labelled pairs that nobody trained on: how often, and by how much, each stage prefers what the person preferred.

The reward of an answer is beta times log pi/pi_init, summed over its tokens (Eq. 7 without its partition term); the
margin of a pair is the chosen answer's reward minus the rejected one's. Chosen and rejected rewards are kept apart: a
margin can grow although both answers lose probability (displacement).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spa_lite import intervals, judge, objective
from spa_lite.backend import POLICY
from spa_lite.events import Report, silent, ticking
from spa_lite.intervals import Floats, Interval
from spa_lite.judge import Scorer, resumed
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.records import Row
from spa_lite.stages.workbench import folder_digest
from spa_lite.store import digest

Sums = Sequence[Sequence[float]]
"""Per pair, log-probability (nats) of the chosen and of the rejected answer, summed over the tokens."""

Sizes = Sequence[Sequence[int]]
"""Per pair, number of tokens of the chosen and of the rejected answer."""


@dataclass(frozen=True)
class PairMeasures:
    """What one stage makes of the pairs. Rewards and margins are in nats times beta; shares count ties half.

    `hits` has 1, 0.5 or 0 per pair. `to_before` is the change of accuracy against the stage before, on the same pairs.
    """

    hits: list[float]
    accuracy: Interval
    likelihood: Interval  # the same by log pi alone
    per_token: Interval  # the same by log pi per token
    to_before: Interval | None
    margin: float
    margin_median: float
    positive: float  # share of pairs with a margin above 0
    chosen: float
    rejected: float
    length_correlation: float | None  # of the margin with the difference of lengths; None where one never varies
    brier: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the single pairs."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "hits"}
        return {name: v.to_dict() if isinstance(v, Interval) else v for name, v in found.items()}


def measure_stages(
    models: Models,
    stages: Sequence[tuple[str, Path | None]],
    rows: Sequence[Row],
    recipe: Recipe,
    folder: Path,
    report: Report = silent,
) -> dict[str, PairMeasures]:
    """Measures of every stage (name, adapter), in order. Sums are kept in `folder`, so that none is computed twice."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [[len(ids) for ids in row.responses] for row in rows]

    def sums(name: str, adapter: Path | None, other: bool = False) -> Sums:
        def opened(done: int) -> AbstractContextManager[Scorer]:
            tick = ticking(report, f"{name} pairs", len(rows), "pairs", done)
            if other:
                return models.other_scorer(tick)
            models.backend.bind(POLICY, adapter)
            return nullcontext(models.scorer(POLICY, tick))

        whose = models.reference_fingerprint if other else [models.fingerprint, folder_digest(adapter)]
        path = folder / f"{digest([whose, models.made_by, rows])[:16]}.jsonl"
        return resumed(path, rows, opened, judge.Sums)

    reference = sums("pi_init", models.init_adapter, models.has_other_reference)
    found: dict[str, PairMeasures] = {}
    before: PairMeasures | None = None
    for name, adapter in stages:
        own = reference if adapter == models.init_adapter and not models.has_other_reference else sums(name, adapter)
        before = found[name] = pair_measures(own, reference, sizes, recipe.loss.beta, before, recipe.seed)
    return found


def pair_measures(
    policy: Sums, reference: Sums, sizes: Sizes, beta: float, before: PairMeasures | None = None, seed: int = 0
) -> PairMeasures:
    """Measures of one stage from its sums and those of pi_init, of which there is at least one.

    For pi_init itself, `policy` is `reference`: its accuracy is 50 % by definition.
    """
    own, other, tokens = (np.array(x, dtype=np.float64) for x in (policy, reference, sizes))
    rewards = beta * (own - other)
    margins = rewards[:, 0] - rewards[:, 1]
    hits = _hits(margins)
    per_token = own / tokens
    half = intervals.Interval(0.5, 0.5, 0.5, len(hits))  # pi_init against itself: no chance is involved
    return PairMeasures(
        hits=hits,
        accuracy=half if policy is reference else _wilson(hits),
        likelihood=_wilson(_hits(own[:, 0] - own[:, 1])),
        per_token=_wilson(_hits(per_token[:, 0] - per_token[:, 1])),
        to_before=intervals.difference(hits, before.hits, seed) if before else None,
        margin=float(margins.mean()),
        margin_median=float(np.median(margins)),
        positive=float((margins > 0).mean()),
        chosen=float(rewards[:, 0].mean()),
        rejected=float(rewards[:, 1].mean()),
        length_correlation=_correlation(margins, tokens[:, 0] - tokens[:, 1]),
        brier=float(((1 - objective.preference(margins)) ** 2).mean()),
    )


def longer_wins(sizes: Sizes) -> Interval:
    """How often the person preferred the answer with more tokens, ties half: what a judge of length alone would get."""
    return _wilson(_hits(np.array([chosen - rejected for chosen, rejected in sizes], dtype=np.float64)))


def _hits(margins: Floats) -> list[float]:
    return [float(h) for h in np.where(margins == 0, 0.5, margins > 0)]


def _wilson(hits: Sequence[float]) -> Interval:
    found = intervals.wilson(sum(hits), len(hits))
    assert found is not None
    return found


def _correlation(x: Floats, y: Floats) -> float | None:
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
