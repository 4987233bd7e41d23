"""The method on one page: SPA, Algorithm 1 of the paper, and its siblings. Read this first.

    pi_0 = DPO(pi_init, seed pairs)                                reference pi_init           (Eq. 6)
    for i = 1 .. T:
        X_i    = prompts                                           a share of those given
        y1, y2 ~ pi_{i-1}( . | x)          for x in X_i            two answers per prompt
        y1 beats y2 if its implicit reward log pi_{i-1}/pi_init is higher                      (Eq. 7, 8)
        pi_i   = refined DPO from pi_{i-1} on those pairs          reference pi_{i-1}          (Eq. 10-12)

That is SPA. Each line is an axis (`spa_lite.axes`), and other methods choose otherwise on some of them: SAO lets the
model write X_i and judge in words, SPIN lets good answers beat its own. Nothing is replayed between rounds unless
`carry` says so; optimizer and schedule restart. The papers train all weights, we train a LoRA adapter; the three roles
are three states of one frozen base: INIT (adapter off), PREVIOUS (frozen copy), POLICY (trained).
"""

from __future__ import annotations

from typing import Any

from spa_lite.events import Report, silent
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.stages import Workshop
from spa_lite.stages.workbench import Data, Policy
from spa_lite.store import Run
from spa_lite.summary import summarise_run


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

    policy = shop.first_policy()
    shop.measure("rounds/0", policy)

    earlier = [policy]
    for i in range(1, shop.recipe.rounds + 1):
        prompts = shop.prompts(i, policy)
        samples = shop.sample(i, prompts, policy)
        judgements = shop.judge(i, samples, policy, lagged=earlier[-2] if i > 1 else None)
        policy = shop.train(i, judgements, policy)
        shop.measure(f"rounds/{i}", policy)
        if shop.enough(i, policy):
            break
        earlier.append(policy)

    return policy
