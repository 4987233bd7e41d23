"""What is measured of a policy on held-out prompts and pairs, and the table of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext as alone
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import evaluate, objective, rounds, stop
from spa_lite.backend import POLICY, Backend, Sampling
from spa_lite.events import Event
from spa_lite.files import lines_of
from spa_lite.stages.workbench import Policy, Workbench, read_judgements, read_samples
from spa_lite.store import digest


class Measuring(Workbench):
    """Measures of every policy."""

    def measure(self, folder: str, policy: Policy | None) -> None:
        """Held-out measures of a policy (None: pi_init): gold of its answers where known, accuracy on human pairs."""
        if policy == self.init and not self.models.has_other_reference:
            return  # it is measured already
        if policy and self.recipe.measure.every == "end" and folder != f"rounds/{self.recipe.rounds}":
            return
        self._measure(folder, policy)

    def enough(self, i: int, policy: Policy) -> bool:
        """Whether a stop rule ends the run after round i; what is measured at the end is measured then."""
        found = stop.signs(self.rows, self.recipe)
        if not found or self.recipe.stop.action == "warn" or i == self.recipe.rounds:
            return False
        self.stopped = f"round {i}"
        self.report(Event(f"round {i}", note=f"stopping here (stop.action=stop): {'; '.join(found)}"))
        self._measure(f"rounds/{i}", policy)
        return True

    def _measure(self, folder: str, policy: Policy | None) -> None:
        who = policy or self.init
        baseline, name = self._baseline() if policy else None, f"{self.row_name(folder)} measure"
        prompts, pairs = self.data.held_out_prompts, self.data.held_out_pairs

        def work(part: Path) -> dict[str, Any]:
            backend = self._bind(who.adapter)
            found: dict[str, Any] = {}
            if self.data.gold and prompts:
                found |= self._gold_measures(backend, part, baseline, name)
            if pairs:
                found |= self._pair_measures(who, part, name)
            if policy and self.data.gold and (self.run.folder / folder / "judgements.jsonl").exists():
                found |= self._label_measures(self.run.folder / folder)
            return found

        inputs = {
            "policy": who.key,
            "held out": digest([prompts, [row for _, row in pairs], self.data.gold is not None]),
        }
        if self.models.has_other_reference:
            inputs["reference"] = self.models.reference_fingerprint
        self._once(self._stage(folder, "measure", ("answers.jsonl",), inputs, len(prompts) + len(pairs)), work)

    def _gold_measures(self, backend: Backend, part: Path, baseline: list[float] | None, name: str) -> dict[str, Any]:
        """One answer per held-out prompt (same keys for every policy), its gold, and the win rate against pi_init."""
        rule = self.data.gold
        assert rule is not None
        temp = self.recipe.measure.temp
        how = None if temp is None else Sampling(temp, 1.0, self.recipe.sampling.max_tokens)
        self._answer(backend, part / "answers.jsonl", self.data.held_out_prompts, 0, name, n=1, sampling=how)
        answers = list(read_samples(part / "answers.jsonl"))
        means, scores = evaluate.gold_means(answers, rule)
        found: dict[str, Any] = {"gold": means, "length": _mean([len(a.completions[0].ids) for a in answers])}
        if baseline is not None:
            rate = evaluate.win_rate(scores, baseline, self.recipe.seed, self.recipe.measure.bootstrap)
            found["win_rate"] = rate.to_dict()
        return found

    def _baseline(self) -> list[float] | None:
        """Gold scores of pi_init's answers, from its own measure stage."""
        path = self.run.folder / "init" / "answers.jsonl"
        if self.data.gold is None or not path.exists():
            return None
        return evaluate.gold_means(list(read_samples(path)), self.data.gold)[1]

    def _pair_measures(self, who: Policy, part: Path, name: str) -> dict[str, Any]:
        """How often the policy's implicit reward prefers the human's choice on held-out pairs."""
        models, rows = self.models, [row for _, row in self.data.held_out_pairs]
        if who == self.init and not models.has_other_reference:
            half = evaluate.Interval(0.5, 0.5, 0.5, len(rows))  # pi_init against itself prefers neither answer
            return {"pair_accuracy": half.to_dict(), "pair_margin_nats": 0.0}
        own = self._sums(part / "policy.jsonl", rows, lambda tick: alone(models.scorer(POLICY, tick)), name)
        other = self._sums(part / "reference.jsonl", rows, self._init_scorer, f"{name} reference")
        margins = [objective.margin(yw, yl, rw, rl, 1.0) for (yw, yl), (rw, rl) in zip(own, other, strict=True)]
        accuracy = evaluate.pair_accuracy(margins)
        return {"pair_accuracy": accuracy.to_dict() if accuracy else None, "pair_margin_nats": _mean(margins)}

    def _label_measures(self, place: Path) -> dict[str, Any]:
        """Share of the round's self-labels that agree with gold, and how many of the flagged were truly wrong."""
        assert self.data.gold is not None
        judgements = read_judgements(place / "judgements.jsonl")
        agreement = evaluate.label_agreement(judgements, self.data.gold)
        lines = [msgspec.json.decode(line) for line in lines_of(place / "metrics.jsonl")]
        flagged = [i for line in lines for i in line["flagged"]]
        return {
            "label_accuracy": {name: interval.to_dict() for name, interval in agreement.items()},
            "flags": evaluate.wrong_flags(judgements, flagged, self.data.gold),
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table so far: a row per folder of stages, with all that their summaries say."""
        rows = []
        for folder, kinds in self.summaries.items():
            row = {"stage": self.row_name(folder), "folder": folder, **kinds.get("measure", {})}
            row |= {"judged": kinds.get("judge"), "sampled": kinds.get("sample"), "prompted": kinds.get("prompts")}
            rows.append(row | {"trained": kinds.get("train") or kinds.get("seed") or kinds.get("generator") or {}})
        return rows

    def row_name(self, folder: str) -> str:
        """What people call the stage whose result lies in that folder."""
        return rounds.row_name(self.recipe, folder)


def _mean(values: Sequence[float]) -> float | None:
    return float(sum(values) / len(values)) if values else None
