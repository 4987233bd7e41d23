"""`eval` on labelled pairs that nobody trained on: every stage of a run, or a policy against its init."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spa_lite import data, encode, prepare
from spa_lite.cli import render
from spa_lite.cli.eval_sides import described, opened, stages_of
from spa_lite.cli.eval_work import Work, circumstances
from spa_lite.cli.policy import limits
from spa_lite.errors import DataError, RecipeError
from spa_lite.held_out import PairMeasures, longer_wins, measure_stages
from spa_lite.lesson import source
from spa_lite.recipe import Recipe
from spa_lite.records import Pair
from spa_lite.store import digest


def held_out(work: Work) -> dict[str, Any]:
    """Accuracy, margins and rewards of every stage."""
    r, stages = work.recipe, stages_of(work)
    pairs = held_out_pairs(r)[: r.measure.pairs]
    models = opened(work, r, None)
    encoded, report = encode.encode_pairs(
        pairs, models.backend.tokenizer, context=models.backend.context, **limits(r, models.backend)
    )
    for line in report.lines()[1:]:
        render.note(f"held-out pairs: {line}")
    if not encoded:
        raise DataError(f"none of the {len(pairs)} held-out pairs can be used; give others with --held-out")
    rows = [row for _, row in encoded]
    adapters = [(stage.name, stage.adapter) for stage in stages]
    measured = measure_stages(models, adapters, rows, r, work.out / "sums", work.report)
    return {
        "kind": "held-out pairs",
        "title": "held-out pairs",
        "n": len(rows),
        "beta": r.loss.beta,
        "longer_wins": longer_wins([[len(ids) for ids in row.responses] for row in rows]).to_dict(),
        "stages": {name: m.to_dict() for name, m in measured.items()},
        "sides": [described(work, stage) for stage in stages],
        "data": digest(rows),
        "warnings": displaced(measured),
        "made_by": models.made_by,
        "fingerprint": models.fingerprint,
        **circumstances(work),
    }


def held_out_pairs(r: Recipe) -> list[Pair]:
    """The pairs that a run with these settings holds out. Raises RecipeError if there are none."""
    if not (r.inputs.held_out or r.inputs.seed_pairs):
        if not prepare.is_lesson(r) and r.inputs.model is not None:
            raise RecipeError("no labelled pairs to measure on: give --held-out FILE")
        return source.pairs(r.lesson.split, r.lesson.held_out, 1)
    pairs, told = data.read_pairs(r.inputs.held_out or str(r.inputs.seed_pairs), skip_bad=r.inputs.skip_bad)
    for line in told.lines()[1:]:
        render.note(line)
    return pairs if r.inputs.held_out else data.hold_out(pairs, seed=r.seed)[1]


def displaced(measured: Mapping[str, PairMeasures]) -> list[str]:
    """Stages at which the margin grew although both answers became less likely."""
    return [
        f"{name}: preferred answers lost probability, too (displacement): their reward is {m.chosen:.2f}"
        for name, m in measured.items()
        if m.chosen < 0 and m.margin > 0
    ]
