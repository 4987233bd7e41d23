"""Axes `judge` and `pairing` as a stage: which of the answers is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext as alone
from pathlib import Path
from typing import Any

from spa_lite import evaluate, rescore
from spa_lite.backend import POLICY
from spa_lite.errors import ModelError
from spa_lite.events import Event, Tick
from spa_lite.journal import Journal
from spa_lite.judge import Scorer, Sums, asked, counts, decide, no_reference, rows_of
from spa_lite.judges import TABLE, depends, gap_of, open_judge
from spa_lite.opinion import Opinion, tallied
from spa_lite.recipe import Recipe
from spa_lite.records import Row, Sample
from spa_lite.stages.workbench import Policy, Workbench, folder_digest, read_samples
from spa_lite.store import Stage


class Judging(Workbench):
    """The judgements of each round."""

    def judge(self, i: int, samples: Stage, policy: Policy, lagged: Policy | None) -> Stage:
        """Label the answers: SPA by the implicit reward of pi_{i-1} against pi_init (or what judge.reference says)."""
        name = f"round {i} judge"
        reference, reference_key = self._judge_reference(policy, lagged)
        gap = gap_of(self.recipe)
        itself = reference_key == policy.key  # pi_init against pi_init: one pass gives both sums

        def work(part: Path) -> dict[str, Any]:
            self._bind(policy.adapter, lagged)
            pile = list(read_samples(self.run.path(samples, "samples.jsonl")))
            rows, check = rows_of(pile), rescore.Check(pile, self.recipe, i)

            def sums() -> list[Sums]:
                self._bind(policy.adapter, lagged)  # another model may have taken its place
                return self._sums(
                    part / "policy.jsonl", rows, lambda tick: alone(self.models.scorer(POLICY, tick)), name
                )

            again = self._values(part / "check.jsonl", [rows[k] for k in check.chosen], f"{name} check")
            own = sums() if check.sums is None or check.drifts(again) else check.sums
            opinions, gaps = (
                self._asked(part / file, r, pile, i, f"{name} {file}") if r else None
                for r, file in ((self.recipe, "opinions"), (gap, "gaps"))
            )
            other = own if itself else self._sums(part / "reference.jsonl", rows, reference, f"{name} reference")
            if opinions is None and self.recipe.judge.adapter:
                opinions = self._labels(pile, self._by_adapter(part, rows, name), other)
            elif opinions is None:
                few = [other[k] for k in check.chosen]
                recorded, scored = check.recorded, rescore.sums_of(again)
                if check.flip(self._labels(check.picked, recorded, few), self._labels(check.picked, scored, few)):
                    own = sums()
                    other = own if itself else other
                opinions = self._labels(pile, own, other)
            if gap and gaps is None:
                gaps = self._labels(pile, own, other, gap)
            each = zip(pile, own, other, opinions, gaps or opinions, strict=True)
            judged = [decide(one, p, r, opinion, self.recipe, scores) for one, p, r, opinion, scores in each]
            Journal(part / "judgements.jsonl").append(judged)
            self.report(Event(name, note=rescore.sentence(check.to_dict())))
            return counts(judged) | tallied(opinions) | {"rescore": check.to_dict()}

        inputs = {"samples": samples.key, "policy": policy.key, "reference": reference_key, "round": str(i)}
        inputs |= depends(self.recipe)
        if self.recipe.judge.by == "implicit" and self.recipe.judge.adapter:
            inputs["judge adapter"] = str(folder_digest(self.models.judge_adapter))
        stage = self._stage(f"rounds/{i}", "judge", ("judgements.jsonl",), inputs, samples.size)
        return self._once(stage, work)

    def _asked(self, path: Path, recipe: Recipe, pile: Sequence[Sample], i: int, name: str) -> list[Opinion] | None:
        """Opinions of a judge that needs no sums, asked before others are scored: it may be a whole other model, which
        takes the policy's place. None of one that does."""
        if TABLE[recipe.judge.by].sums:
            return None
        gold = evaluate.gold_of(self.data.gold) if self.data.gold else None
        loader, replies = self.models.load_classifier, path.with_name("replies")
        judge = open_judge(recipe, self.models, loader, gold=gold, round_=i, cache=replies)
        return asked(path.with_suffix(".jsonl"), judge, pile, self.report, name)

    def _labels(
        self, pile: Sequence[Sample], own: Sequence[Sums], other: Sequence[Sums], recipe: Recipe | None = None
    ) -> list[Opinion]:
        """Opinions of a judge that needs nothing but sums under the policy and the reference."""
        scorers = (lambda _: list(own), lambda _: list(other))
        return open_judge(recipe or self.recipe, self.models, sums=scorers)(pile)

    def _by_adapter(self, part: Path, rows: Sequence[Row], name: str) -> list[Sums]:
        """Sums under the adapter that judges in the policy's place."""
        self.models.backend.bind("judge", self.models.judge_adapter)
        return self._sums(
            part / "judge.jsonl", rows, lambda tick: alone(self.models.scorer("judge", tick)), f"{name} adapter"
        )

    def _judge_reference(
        self, policy: Policy, lagged: Policy | None
    ) -> tuple[Callable[[Tick], AbstractContextManager[Scorer]], str]:
        """What opens the scorer of the judge's reference, and that reference's key."""
        which = self.recipe.judge.reference
        if which == "none":
            return lambda tick: alone(no_reference), "none"
        if which == "lagged" and lagged:
            return lambda tick: alone(self.models.scorer("lagged", tick)), lagged.key
        if self.models.has_other_reference:
            return self._init_scorer, self.models.reference_fingerprint
        if policy.key == self.init.key and self.recipe.judge.by == "implicit" and not self.recipe.judge.adapter:
            raise ModelError("the judge's policy equals its reference; give --adapter-path or --init-model")
        return self._init_scorer, self.init.key
