"""The start of a run: what makes pi_0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spa_lite import objective, sft
from spa_lite.records import Row
from spa_lite.stages.workbench import Policy, Workbench, folder_digest
from spa_lite.store import digest
from spa_lite.train import Example, seed_plan, train


class Start(Workbench):
    """pi_0."""

    def first_policy(self) -> Policy:
        """pi_0: trained on the labelled pairs, or the adapter the user gave, or pi_init itself."""
        if self.data.seed_pairs and self.recipe.seed_dpo.by != "none":
            return self.seed_dpo() if self.recipe.seed_dpo.by == "dpo" else self.seed_sft()
        adapter = self.models.policy_adapter
        return Policy(adapter, digest(["given", folder_digest(adapter)])) if adapter else self.init

    def seed_dpo(self) -> Policy:
        """Plain DPO on the seed pairs, from pi_init, reference pi_init (Eq. 6)."""
        pairs = [Example(pair.id, row) for pair, row in self.data.seed_pairs]

        def work(part: Path) -> dict[str, Any]:
            backend = self._train_from(self.init)
            plan, loss = seed_plan(self.recipe, len(pairs)), objective.Dpo(self.recipe.loss.beta)
            return train(backend, pairs, loss, plan, self.recipe, self._checkpoints(part, "seed"), self.report, "seed")

        return self._seeded(work, digest([[p.id, p.row] for p in pairs]))

    def seed_sft(self) -> Policy:
        """Supervised fine-tuning on the chosen answers of the seed pairs, from pi_init."""
        rows = [Example(pair.id, chosen_alone(row)) for pair, row in self.data.seed_pairs]

        def work(part: Path) -> dict[str, Any]:
            backend = self._train_from(self.init)
            return sft.teach(backend, rows, self.recipe, self._checkpoints(part, "seed"), self.report, "seed")

        return self._seeded(work, digest([[p.id, p.row] for p in rows]))

    def _seeded(self, work: Callable[[Path], dict[str, Any]], pairs: str) -> Policy:
        inputs = {"pi_init": self.init.key, "seed pairs": pairs}
        size = len(self.data.seed_pairs)
        return self._policy(
            self._once(self._stage("rounds/0", "seed", ("adapter", "metrics.jsonl"), inputs, size), work)
        )


def chosen_alone(row: Row) -> Row:
    """A labelled pair's row with the chosen answer alone."""
    return Row(prompt=row.prompt, responses=row.responses[:1])
