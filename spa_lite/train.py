"""Step (c) of a round, and the seed stage: the one training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spa_lite.backend import Backend, Known, Objective, Optimizer, StepStats
from spa_lite.checkpoint import Checkpoints
from spa_lite.errors import TrainingDiverged
from spa_lite.events import Event, Report, silent
from spa_lite.fit import halving
from spa_lite.interrupt import deferred
from spa_lite.keys import shuffled
from spa_lite.recipe import Recipe
from spa_lite.records import Judgement, Row
from spa_lite.states import Reader

PATIENCE = 3
"""Non-finite steps in a row that stop a run."""


class TrainObjective(Objective, Protocol):
    """An objective that is told when an optimizer step ends, and remembers things from step to step."""

    def end_step(self, stats: StepStats) -> None:
        """Called after each optimizer step, with what it reported of all its rows, in row order."""
        ...

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers between two steps, as plain values."""
        ...

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to what it remembered then."""
        ...


@dataclass(frozen=True)
class Example:
    """One pair of a training stage, and what is known of both responses under PREVIOUS (the judge's policy): sums in
    nats, and the states that the sampler kept."""

    id: str
    row: Row
    reference: tuple[float, float] | None = None
    states: tuple[NDArray[Any], NDArray[Any]] | None = None


@dataclass(frozen=True)
class Plan:
    """How long and how fast: epochs, pairs per step, peak learning rate."""

    epochs: int
    batch_size: int
    learning_rate: float
    rows: int
    max_steps: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps; the last batch of an epoch may be smaller."""
        steps = self.epochs * math.ceil(self.rows / self.batch_size)
        return min(steps, self.max_steps) if self.max_steps else steps

    @property
    def sizes(self) -> list[int]:
        """Pairs of each optimizer step."""
        epoch = [min(self.batch_size, self.rows - start) for start in range(0, self.rows, self.batch_size)]
        return (self.epochs * epoch)[: self.steps]


def seed_plan(recipe: Recipe, rows: int) -> Plan:
    """The seed stage: DPO on the human pairs."""
    s = recipe.seed_dpo
    return Plan(s.epochs, s.batch_size, s.learning_rate, rows, recipe.train.max_steps)


def round_plan(recipe: Recipe, rows: int) -> Plan:
    """A round: one pass over its own pairs."""
    t = recipe.train
    return Plan(t.epochs, t.batch_size, t.learning_rate, rows, t.max_steps)


def optimizer_of(recipe: Recipe) -> Optimizer:
    """The optimizer of every training stage."""
    return Optimizer(weight_decay=recipe.train.weight_decay, max_grad_norm=recipe.train.max_grad_norm)


def learning_rate(step: int, plan: Plan, recipe: Recipe) -> float:
    """Linear warm-up over a share of the steps, then cosine to zero or constant. `step` counts from 0."""
    warmup = recipe.train.warmup * plan.steps
    if step + 1 <= warmup:
        return plan.learning_rate * (step + 1) / warmup
    if recipe.train.schedule == "constant":
        return plan.learning_rate
    progress = (step - warmup) / max(1.0, plan.steps - warmup)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def train(
    backend: Backend,
    pairs: Sequence[Example],
    objective: TrainObjective,
    plan: Plan,
    recipe: Recipe,
    saved: Checkpoints,
    report: Report = silent,
    stage: str = "train",
    round_: int = 0,
) -> dict[str, Any]:
    """Train POLICY, whose training has started, on pairs whose chosen answer comes first, from the last checkpoint on.
    Returns a summary.

    Raises TrainingDiverged after PATIENCE non-finite steps in a row (each of them is skipped and counted). The first
    Ctrl-C ends it after a checkpoint.
    """
    at, lines = saved.resume(backend)
    if at.step:
        objective.remember(at.objective)
    note = f"going on after step {at.step}" if at.step else ""
    report(Event(stage, at.step, plan.steps, "steps", note, begins=True))
    tokens = 0
    with deferred(lambda: report(Event(stage, note="stopping after this step; once more stops at once"))) as stopped:
        for epoch, batch in islice(batches(pairs, plan, recipe, stage, round_), at.step, plan.steps):
            sizes = backend.batching
            rate = learning_rate(at.step, plan, recipe)
            stats = optimizer_step(backend, batch, objective, rate)
            objective.end_step(stats)
            tokens += stats.tokens
            at.step, at.skipped = at.step + 1, at.skipped + stats.skipped
            at.streak = at.streak + 1 if stats.skipped else 0
            lines.append(step_line(at.step, epoch, rate, [example.id for example in batch], stats))
            saved.log(lines[-1])
            ending = stopped() or at.step == plan.steps
            if ending or saved.due(at.step) or backend.batching != sizes:
                at.objective = objective.memory
                saved.save(backend, at)
            note = f"skipped a non-finite step ({at.skipped} so far)" if at.streak else ""
            report(Event(stage, at.step, plan.steps, "steps", note, metrics=lines[-1], tokens=tokens))
            if at.streak == PATIENCE:
                raise TrainingDiverged(
                    f"{stage}: loss or gradient was not finite {PATIENCE} steps in a row (step {at.step} of "
                    f"{plan.steps}); lower the learning rate or check the data; finished stages are kept"
                )
            if ending:
                break
    saved.finish(backend)
    return summarise(lines, at.skipped)


def batches(
    pairs: Sequence[Example], plan: Plan, recipe: Recipe, stage: str, round_: int
) -> Iterator[tuple[int, list[Example]]]:
    """Yield (epoch, pairs of one optimizer step); every epoch in an order of its own."""
    for epoch in range(plan.epochs):
        order = shuffled(len(pairs), recipe.seed, stage, round_, epoch)
        for start in range(0, len(pairs), plan.batch_size):
            yield epoch, [pairs[i] for i in order[start : start + plan.batch_size]]


def optimizer_step(backend: Backend, batch: Sequence[Example], objective: TrainObjective, rate: float) -> StepStats:
    """One step, with what is known of the reference; in smaller micro-batches where memory runs out."""
    before, rows = objective.memory, [example.row for example in batch]

    def step() -> StepStats:
        objective.remember(before)
        return backend.dpo_step(rows, objective, rate, known_of(batch))

    return halving(backend, "micro_tokens", step, rows)


def known_of(batch: Sequence[Example]) -> Known | None:
    """What is known of a batch under PREVIOUS, in row order: nothing unless all sums are, no states unless all are."""
    sums = [value for example in batch for value in example.reference or ()]
    states = tuple(kept for example in batch for kept in example.states or ())
    if len(sums) < 2 * len(batch):
        return None
    return Known(np.array(sums), states if len(states) == 2 * len(batch) else None)


def step_line(step: int, epoch: int, rate: float, ids: Sequence[str], stats: StepStats) -> dict[str, Any]:
    """One line of metrics.jsonl. Reward names follow TRL: beta times the log-ratio; here without beta, in nats."""
    chosen, rejected = stats.logp[0::2], stats.logp[1::2]
    ref_chosen, ref_rejected = stats.reference[0::2], stats.reference[1::2]
    margins = stats.metrics.get("margin", np.zeros(0))
    extrapolated = stats.metrics.get("extrapolated_margin", np.zeros(0))
    softened = stats.metrics.get("softened", np.zeros(len(ids)))
    taus = stats.metrics.get("tau", np.full(1, np.nan))
    return {
        "step": step,
        "epoch": epoch,
        "learning_rate": rate,
        "loss": finite(stats.loss),
        "grad_norm": finite(stats.grad_norm),
        "skipped": stats.skipped,
        "margin": finite(np.mean(margins)) if len(margins) else None,
        "accuracy": finite(np.mean(margins > 0)) if len(margins) else None,
        "logp_chosen": finite(np.mean(chosen)),
        "logp_rejected": finite(np.mean(rejected)),
        "logratio_chosen": finite(np.mean(chosen - ref_chosen)),
        "logratio_rejected": finite(np.mean(rejected - ref_rejected)),
        "tau": finite(taus[0]) if len(taus) else None,
        "tokens": stats.tokens,
        "ids": list(ids),
        "margins": [finite(m) for m in margins],
        "extrapolated_margins": [finite(m) for m in extrapolated],
        "flagged": [i for i, z in zip(ids, softened, strict=True) if z > 0],
    }


def finite(value: Any) -> float | None:
    """A number JSON can hold, or None."""
    return float(value) if np.isfinite(value) else None


def summarise(lines: Sequence[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """What a training stage leaves behind: loss at the end (mean of the last quarter), displacement, flags."""
    last = lines[-max(1, len(lines) // 4) :]

    def tail(name: str) -> float | None:
        values = [line[name] for line in last if line[name] is not None]
        return float(np.mean(values)) if values else None

    seen = sum(len(line["ids"]) for line in lines)
    flagged = [i for line in lines for i in line["flagged"]]
    return {
        "steps": len(lines),
        "skipped": skipped,
        "first_loss": lines[0]["loss"] if lines else None,
        "loss": tail("loss"),
        "accuracy": tail("accuracy"),
        "logratio_chosen": tail("logratio_chosen"),
        "logratio_rejected": tail("logratio_rejected"),
        "pairs_seen": seen,
        "flagged": len(flagged),
        "flagged_share": len(flagged) / seen if seen else 0.0,
        "tokens": sum(line["tokens"] for line in lines),
    }


def pairs_of(judgements: Sequence[Judgement], recipe: Recipe, kept: Reader | None = None) -> list[Example]:
    """Training pairs of judgements; identical answers are dropped if the recipe says so.

    The judge's policy is the DPO reference of the round, so its sums are the reference's. `kept` are the states of the
    samples that were judged.
    """
    return [
        Example(
            j.id,
            j.row,
            (j.chosen.policy, j.rejected.policy),
            (kept.of(index, j.chosen.ids), kept.of(index, j.rejected.ids)) if kept else None,
        )
        for index, j in enumerate(judgements)
        if recipe.judge.identical == "keep" or j.a.ids != j.b.ids
    ]
