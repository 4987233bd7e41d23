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
from spa_lite.carry import of_round
from spa_lite.checkpoint import Checkpoints
from spa_lite.errors import TrainingDiverged
from spa_lite.events import Event, Report, silent
from spa_lite.fit import halving
from spa_lite.interrupt import deferred
from spa_lite.keys import shuffled
from spa_lite.losses import NEEDS_REFERENCE
from spa_lite.noise import doubts_of, weights_of
from spa_lite.pairing import why_not
from spa_lite.recipe import Recipe
from spa_lite.records import Judgement, Row
from spa_lite.states import Reader

PATIENCE = 3
"""Non-finite steps in a row that stop a run."""


class TrainObjective(Objective, Protocol):
    """An objective that is told when an optimizer step begins and ends, and remembers things from step to step."""

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Called before each optimizer step with its rows, whose places there are `Batch.index`."""
        ...

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
    """One row of a training stage, chosen response first, and what is known of all its responses under PREVIOUS: sums
    in nats, and the states that the sampler kept."""

    id: str
    row: Row
    reference: tuple[float, ...] | None = None
    states: tuple[NDArray[Any], ...] | None = None
    doubt: float = 0.0  # probability that the label is wrong
    weight: float = 1.0  # how much the row counts
    desirable: bool | None = None  # of a response alone


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


def round_plan(recipe: Recipe, rows: int, round_: int) -> Plan:
    """A round: one pass over its pairs."""
    t = recipe.train
    return Plan(t.epochs, t.batch_size, of_round(t.round_rates, round_, t.learning_rate), rows, t.max_steps)


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
            lines.append(step_line(at.step, epoch, rate, batch, stats))
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
    objective.begin_step(batch)

    def step() -> StepStats:
        objective.remember(before)
        return backend.dpo_step(rows, objective, rate, known_of(batch))

    return halving(backend, "micro_tokens", step, rows)


def known_of(batch: Sequence[Example]) -> Known | None:
    """What is known of a batch under PREVIOUS, in row order: nothing unless all sums are, no states unless all are."""
    responses = sum(len(example.row.responses) for example in batch)
    sums = [value for example in batch for value in example.reference or ()]
    states = tuple(kept for example in batch for kept in example.states or ())
    if len(sums) < responses:
        return None
    return Known(np.array(sums), states if len(states) == responses else None)


def sides(batch: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Places of the chosen and of the rejected responses among all of a batch. A response alone is chosen unless it is
    undesirable; one of a pair is chosen if it comes first."""
    chosen: list[int] = []
    rejected: list[int] = []
    place = 0
    for example in batch:
        (rejected if example.desirable is False else chosen).append(place)
        if len(example.row.responses) > 1:
            rejected.append(place + 1)
        place += len(example.row.responses)
    return chosen, rejected


def step_line(step: int, epoch: int, rate: float, batch: Sequence[Example], stats: StepStats) -> dict[str, Any]:
    """One line of metrics.jsonl. Reward names follow TRL: beta times the log-ratio; here without beta, in nats."""
    ids, (chosen, rejected) = [example.id for example in batch], sides(batch)
    ratios = stats.logp - stats.reference if len(stats.reference) else np.full_like(stats.logp, np.nan)
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
        "margin": mean(margins),
        "accuracy": mean(margins > 0),
        "logp_chosen": mean(stats.logp[chosen]),
        "logp_rejected": mean(stats.logp[rejected]),
        "logratio_chosen": mean(ratios[chosen]),
        "logratio_rejected": mean(ratios[rejected]),
        "tau": finite(taus[0]) if len(taus) else None,
        "tokens": stats.tokens,
        "ids": ids,
        "margins": [finite(m) for m in margins],
        "extrapolated_margins": [finite(m) for m in extrapolated],
        "flagged": [i for i, z in zip(ids, softened, strict=True) if z > 0],
    }


def mean(values: NDArray[Any]) -> float | None:
    """Their mean; None of no values, or where it is not finite."""
    return finite(np.mean(values)) if len(values) else None


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


def pairs_of(
    judgements: Sequence[Judgement], recipe: Recipe, kept: Reader | None = None, fresh: bool = True
) -> list[Example]:
    """Training pairs of judgements, without those that `pairing` leaves out. With a third answer a row has a third
    response.

    The judge's policy is the reference of a round that compares with the policy that answered, so its sums are the
    reference's, if the judgements are `fresh`: the round's own. `kept` are the states of the samples that were judged.
    """
    found = [(n, j) for n, j in enumerate(judgements) if not why_not(j, recipe)]
    trained = [j for _, j in found]
    known = fresh and reference_of(recipe) == "prev"
    told = zip(found, doubts_of(trained, recipe), weights_of(trained, recipe), strict=True)
    return [
        Example(
            j.id,
            j.row,
            (j.chosen.policy, j.rejected.policy) if known and not j.third else None,
            (kept.of(n, j.chosen.ids), kept.of(n, j.rejected.ids)) if kept else None,
            doubt,
            weight,
        )
        for (n, j), doubt, weight in told
    ]


def reference_of(recipe: Recipe) -> str:
    """What the loss of a round compares with: prev, init or none."""
    if recipe.train.reference != "auto":
        return recipe.train.reference
    return "prev" if recipe.loss.kind in NEEDS_REFERENCE else "none"
