"""Axes `loss`, `noise`, `reference` and `carry` as a stage: training on the pairs of a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa_lite import carry, pairing, rescore, states
from spa_lite.errors import DataError
from spa_lite.events import Event
from spa_lite.noise import objective_of
from spa_lite.stages.workbench import Policy, Workbench, read_judgements, read_samples
from spa_lite.store import Stage
from spa_lite.train import Example, Plan, pairs_of, reference_of, round_plan, train


class Training(Workbench):
    """The policy of each round."""

    def train(self, i: int, judgements: Stage, policy: Policy) -> Policy:
        """pi_i: SPA's is refined DPO on the round's pairs, from pi_{i-1}, reference pi_{i-1} (Eq. 10 to 12)."""
        name, r = f"round {i} train", self.recipe
        earlier = [self.stage_of(k, "judge") for k in carry.rounds_trained_on(r, i)[:-1]]
        start = policy if r.carry.start == "prev" else self.init
        reference = self.init if reference_of(r) == "init" else policy

        def work(part: Path) -> dict[str, Any]:
            own = read_judgements(self.run.path(judgements, "judgements.jsonl"))
            pairs = self._carried(earlier) + pairs_of(own, r, self._kept(i))
            if not pairs:
                raise DataError(f"round {i}: {nothing_left(pairing.left_out(own, r))}")
            told = pairing.left_out(own, r)
            if sentence := pairing.sentence(told, len(own)):
                self.report(Event(name, note=sentence))
            backend = self._train_from(start, reference)
            plan = round_plan(r, len(pairs), i)
            self._say_if_late(plan, i)
            loss, saved = objective_of(r, i, plan), self._checkpoints(part, name)
            return train(backend, pairs, loss, plan, r, saved, self.report, name, i) | {"left_out": told}

        inputs = {"judgements": judgements.key, "policy": policy.key, "round": str(i)}
        inputs |= {stage.folder: stage.key for stage in earlier}
        if "init" in {reference_of(r), r.carry.start}:
            inputs |= {"pi_init": self.init.key}
        if states.wanted(r, i):
            inputs["samples"] = self.stage_of(i, "sample").key
        size = judgements.size + sum(stage.size for stage in earlier)
        stage = self._stage(f"rounds/{i}", "train", ("adapter", "metrics.jsonl"), inputs, size)
        return self._policy(self._once(stage, work))

    def _carried(self, stages: Sequence[Stage]) -> list[Example]:
        """Pairs of earlier rounds. What was known of them under PREVIOUS was known of an earlier one."""
        return [
            replace(example, id=f"{stage.folder}/{example.id}")
            for stage in stages
            for example in pairs_of(read_judgements(self.run.path(stage, "judgements.jsonl")), self.recipe, fresh=False)
        ]

    def _kept(self, i: int) -> states.Reader | None:
        """The states of round i's samples, if they were kept and are what the judge saw."""
        if not states.wanted(self.recipe, i):
            return None
        judged = self.summaries[f"rounds/{i}"]["judge"]
        if rescore.drifted(judged["rescore"]):
            self.report(Event(f"round {i} train", note="the sampler's states are not used: its log-probs drifted"))
            return None
        place = self.run.path(self.stage_of(i, "sample"))
        return states.Reader(place / states.NAME, read_samples(place / "samples.jsonl"))

    def _say_if_late(self, plan: Plan, i: int) -> None:
        """Say once that refinement starts later than its warm-up, because the window is not full by then."""
        if self.recipe.noise.by != "quantile":
            return
        r = self.recipe.refine
        first = math.ceil(r.window / plan.batch_size)
        if i > 1 or not r.alpha or r.before_full == "zero" or first <= r.warmup * plan.steps:
            return
        when = (
            f"starts at step {first + 1} of {plan.steps}"
            if first < plan.steps
            else "never starts in a round this small"
        )
        note = f"refinement {when}: its threshold needs {r.window} margins (refine.window)"
        self.report(Event(f"round {i} train", note=note))


def nothing_left(left_out: dict[str, int]) -> str:
    """Why a round has no pair to train on, and the mend."""
    if set(left_out) <= {"identical"}:
        return "every pair holds two identical answers, so there is nothing to learn; raise --temp"
    told = pairing.sentence(left_out, sum(left_out.values()))
    return f"no pair is left to train on ({told}); lower --min-gap, leave out --drop-ties, or raise --temp"
