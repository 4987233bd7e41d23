"""SPA on one page: Algorithm 1 of the paper. Read this first.

    pi_0   = DPO(pi_init, seed pairs)                              reference pi_init           (Eq. 6)
    for i = 1 .. T:
        y1, y2 ~ pi_{i-1}( . | x)          for x in X_i            two answers per prompt
        y1 beats y2 if its implicit reward log pi_{i-1}/pi_init is higher                      (Eq. 7, 8)
        pi_i = refined DPO from pi_{i-1}   on those pairs          reference pi_{i-1}          (Eq. 10-12)

Nothing is replayed between rounds; optimizer and schedule restart. The paper trains all weights, we train a
LoRA adapter; the three roles are three states of one frozen base: INIT (adapter off), PREVIOUS (frozen copy),
POLICY (trained).
"""

from __future__ import annotations

from typing import Any

from spa_lite.events import Report, silent
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.stages import Data, Policy, Workshop, summarise_run
from spa_lite.store import Run


def align(models: Models, recipe: Recipe, data: Data, run: Run, report: Report = silent) -> dict[str, Any]:
    """Align a model. Returns the summary (a row per stage); the adapter of each round lies in the run folder.

    An interrupted run goes on where it was, and what another run has computed is taken from there.
    """
    with run.locked(recipe):
        shop = Workshop(models, recipe, data, run, run.heard(report))
        return summarise_run(shop, spa(shop))


def spa(shop: Workshop) -> Policy:
    """Algorithm 1. Each line is a stage of the run, computed once."""
    shop.measure("init", policy=None)

    policy = shop.seed_dpo() if shop.data.seed_pairs else shop.given_policy()
    shop.measure("rounds/0", policy)

    earlier = [policy]
    for i in range(1, shop.recipe.rounds + 1):
        samples = shop.sample(i, policy)
        judgements = shop.judge(i, samples, policy, lagged=earlier[-2] if i > 1 else None)
        policy = shop.train(i, judgements, policy)
        shop.measure(f"rounds/{i}", policy)
        if shop.enough(i, policy):
            break
        earlier.append(policy)

    return policy
