"""Figures of training, step by step: how far answers move, the loss, the noise threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spa_lite.figures import COLOURS, short
from spa_lite.report.collect import Told
from spa_lite.report.drawing import (
    Drawn,
    Table,
    axes_of,
    by_stage,
    by_step,
    dotted,
    legend_of,
    lines_height,
    patch,
    per_step,
    stack,
    stages_of,
    step_line,
    without,
)
from spa_lite.report.looks import FEW, looks
from spa_lite.train import reference_of

SIDES = (("chosen", "logratio_chosen", COLOURS[0], "-"), ("rejected", "logratio_rejected", COLOURS[1], "--"))
MEANING = "Below 0, good answers lose probability, too (displacement)."
FROM_ZERO = "It starts at 0 in every stage. "
LN_2 = {"dpo", "dpo-norm", "dpop"}
"""Losses that are ln 2 where policy and reference agree."""


def moved(runs: Sequence[Told]) -> str:
    """What the log-ratios of the chosen and the rejected answers are, in words."""
    fixed = any(run.recipe and reference_of(run.recipe) == "init" for run in runs)
    reference = "the reference" if len(runs) > 1 and fixed else "π_init" if fixed else "π_previous"
    return f"mean log π/{reference} of the chosen and of the rejected answers, summed over tokens, nats"


def begins_equal(runs: Sequence[Told]) -> bool:
    """Whether policy and reference agree when a stage begins: it starts from its reference."""
    return all(
        run.recipe is None or (run.recipe.carry.start == "prev" and reference_of(run.recipe) == "prev") for run in runs
    )


def begins_at_ln_2(runs: Sequence[Told]) -> bool:
    """Whether every stage's loss does so."""
    return begins_equal(runs) and all(
        run.recipe is None
        or (
            run.recipe.loss.kind in LN_2
            and not (run.recipe.loss.nll or run.recipe.loss.optimism)
            and run.recipe.seed_dpo.by != "sft"
        )
        for run in runs
    )


def displacement(runs: Sequence[Told]) -> Drawn | None:
    """Log-ratios of chosen and rejected answers while training."""
    return _moved_by_step(runs) if len(runs) == 1 else _moved_by_stage(runs)


def _moved_by_step(runs: Sequence[Told]) -> Drawn | None:
    names = ("logratio_chosen", "logratio_rejected", "logp_chosen", "logp_rejected")
    table = [  # steps on single answers (SFT) have none that is rejected
        row for row in per_step(runs, names) if row["logp_rejected"] is not None or row["logratio_rejected"] is not None
    ]
    if not table:
        return None
    compared = any(row["logratio_chosen"] is not None for row in table)
    figure, axes = axes_of(2.9)
    by_step(axes, table)
    for side, name, colour, dash in SIDES:
        step_line(axes, table, name if compared else f"logp_{side}", label=side, color=colour, linestyle=dash)
    axes.set_ylabel(f"log-{'ratio' if compared else 'probability'}, nats per answer")
    legend_of(figure, axes)
    caption = (
        "Mean log-probability of the chosen and of the rejected answers, summed over tokens, nats, in each step's "
        "batch. The loss has no reference, so there is no log-ratio."
    )
    if compared:
        dotted(axes, 0)
        begin = FROM_ZERO if begins_equal(runs) else ""
        caption = f"How far training moves the answers: {moved(runs)}, in each step's batch. {begin}{MEANING}"
    return Drawn("displacement", "Chosen and rejected, apart", caption, without(table, "x"), figure)


def _moved_by_stage(runs: Sequence[Told]) -> Drawn | None:
    """Of several runs, where each stage ended: chosen above, rejected below."""
    table = [
        {"run": run.name, "stage": stage.name, "answers": side, "value": trained[name]}
        for run in runs
        for stage in run.stages
        if (trained := stage.row.get("trained") or {})
        for side, name, _, _ in SIDES
        if trained.get(name) is not None
    ]
    if not table:
        return None
    series = looks(runs)
    figure, grid = stack(2, 1.5, 0.7 + lines_height(series))
    for (side, *_), axes in zip(SIDES, grid, strict=True):
        by_stage(axes, runs, [row for row in table if row["answers"] == side], "run", series)
        dotted(axes, 0)
        axes.set_title(side, loc="left")
        axes.set_ylabel("nats")
    legend_of(figure, grid[0])
    caption = (
        f"How far training moved the answers in each stage: {moved(runs)}, mean over the last quarter of its steps. "
        f"{FROM_ZERO if begins_equal(runs) else ''}{MEANING}"
    )
    if (count := len({row["run"] for row in table})) < len(runs):
        caption += f" {count} of the {len(runs)} runs ({', '.join(dict.fromkeys(str(row['run']) for row in table))}): "
        caption += "the losses of the others have no reference."
    return Drawn("displacement", "Chosen and rejected, apart", caption, table, figure)


def loss(runs: Sequence[Told]) -> Drawn | None:
    """Training loss per step."""
    table = per_step(runs, ("loss",))
    if not table:
        return None
    series = looks(runs)
    figure, axes = axes_of(2.8 + lines_height(series))
    by_step(axes, table)
    _line_per_run(axes, runs, table, "loss")
    axes.set_ylabel("loss")
    legend_of(figure, axes)
    kinds = sorted({run.recipe.loss.kind for run in runs if run.recipe and run.recipe.rounds})
    named = f" ({', '.join(kinds)})" if kinds else ""
    caption = f"Training loss per optimizer step{named}."
    if begins_at_ln_2(runs):
        dotted(axes, math.log(2))
        caption += " Every stage starts at ln 2 = 0.693 (dotted): policy and reference agree."
    elif len(kinds) > 1:
        caption += " The values of different losses cannot be compared."
    return Drawn("loss", "Loss", caption, without(table, "x"), figure)


def threshold(runs: Sequence[Told]) -> Drawn | None:
    """The noise threshold over the steps; of one run with the margins that it is held against."""
    table = per_step(runs, ("tau",), rounds_only=True)
    if not any(row["tau"] is not None for row in table) or len(runs) > FEW:
        return None
    spread = len(runs) == 1 and _add_quantiles(runs[0], table)
    figure, axes = axes_of(2.9 + (lines_height(looks(runs)) if len(runs) > 1 else 0.1))
    by_step(axes, table)
    if spread:
        for part in stages_of(table):
            known = [row for row in part if row["q50"] is not None]
            xs, low, high = ([row[key] for row in known] for key in ("x", "q05", "q95"))
            axes.fill_between(xs, low, high, color=COLOURS[5], alpha=0.35, linewidth=0)
        step_line(axes, table, "q50", color=COLOURS[0], label="median margin")
    if len(runs) == 1:
        step_line(axes, table, "tau", color=COLOURS[1], linewidth=2.0, label="threshold τ")
    else:
        _line_per_run(axes, runs, table, "tau")
    dotted(axes, 0)
    axes.set_ylabel("margin")
    legend_of(figure, axes, [("5 to 95 % of the margins", patch(COLOURS[5], 0.35))] if spread else [])
    caption = (
        "The noise threshold τ (Eq. 9, 12) over the steps of the rounds. A pair whose extrapolated margin (Eq. 11) "
        "lies below it is flagged. It begins when its window is full."
    )
    more = " Beside it the extrapolated margins of each step's pairs." if spread else ""
    return Drawn("threshold", "Noise threshold", caption + more, without(table, "x"), figure)


def _line_per_run(axes: Any, runs: Sequence[Told], table: Table, name: str) -> None:
    for run, how in looks(runs).items():
        rows = [row for row in table if row["run"] == run]
        step_line(axes, rows, name, color=how.colour, linestyle=how.dash, label=short(how.entry) if how.entry else "_")


def _add_quantiles(run: Told, table: Table) -> bool:
    """Put quantiles of each step's extrapolated margins into the table, if the run recorded them."""
    steps = {(s.name, step.get("step")): step.get("extrapolated_margins") for s in run.rounds for step in s.steps}
    if not any(steps.values()):
        return False
    for row in table:
        values = [value for value in steps.get((row["stage"], row["step"])) or [] if value is not None]
        found = np.quantile(values, [0.05, 0.5, 0.95]).tolist() if values else [None] * 3
        row |= dict(zip(("q05", "q50", "q95"), found, strict=True))
    return True
