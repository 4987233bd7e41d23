"""Axis `noise`: what is done about labels that may be wrong. What training minimises is made here.

Every loss can be doubted: a label that is wrong with probability q gives (1 - q) L + q L', L' the loss of the pair with
its label turned round.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spa_lite.backend import Batch, Outcome
from spa_lite.errors import RecipeError
from spa_lite.losses import pair_loss
from spa_lite.objective import PairLoss, Plain, Refined, Window, first_watched
from spa_lite.recipe import Recipe, for_round
from spa_lite.records import Judgement

if TYPE_CHECKING:
    from spa_lite.train import Example, Plan, TrainObjective


def objective_of(recipe: Recipe, round_: int, plan: Plan) -> TrainObjective:
    """What a round minimises: the recipe's loss, with what the recipe does about wrong labels."""
    loss, n, r = pair_loss(recipe, round_), recipe.noise, recipe.refine
    if n.by == "smooth":
        return Plain(loss, n.epsilon)
    if n.by == "robust":
        return Plain(loss, unbiased(n.epsilon))
    if n.by in {"perpair", "weight"}:
        return Told(loss)
    if n.by == "none" or not r.alpha:
        return Plain(loss)
    window = Window(r.rule, r.K, r.window, r.before_full)
    first = first_watched(plan.sizes, r.window, r.warmup)
    return Refined(loss, r.alpha, for_round(recipe, round_), window, r.warmup, plan.steps, first)


def unbiased(epsilon: float) -> float:
    """The doubt under which the expected loss of labels wrong with probability `epsilon` is that of right ones.

    [(1 - epsilon) L - epsilon L'] / (1 - 2 epsilon), robust DPO's loss (2403.00409, Eq. 12), is (1 - q) L + q L' with
    this q, which is negative.
    """
    return -epsilon / (1.0 - 2.0 * epsilon)


class Told(Plain):
    """A loss of pairs with the doubt and the weight that each example brings."""

    def __init__(self, loss: PairLoss) -> None:
        super().__init__(loss)
        self.doubts, self.weights = np.zeros(0), np.ones(0)

    def begin_step(self, batch: Sequence[Example]) -> None:
        """What the examples of the step bring."""
        super().begin_step(batch)
        self.doubts = np.array([example.doubt for example in batch])
        self.weights = np.array([example.weight for example in batch])

    def __call__(self, batch: Batch) -> Outcome:
        """Loss and coefficients of a batch of pairs."""
        doubt, weight = self.doubts[batch.index], self.weights[batch.index]
        loss, coefficients = self.loss(batch, doubt)
        margins = self.loss.margins(batch, batch.logp)
        return Outcome(weight * loss, weight[batch.row] * coefficients, {"margin": margins})


def doubts_of(judgements: Sequence[Judgement], recipe: Recipe) -> list[float]:
    """How likely each label is wrong: with `perpair` what the judge leaves to certainty, else 0."""
    if recipe.noise.by != "perpair":
        return [0.0] * len(judgements)
    return [0.0 if j.confidence is None else 1.0 - j.confidence for j in judgements]


def weights_of(judgements: Sequence[Judgement], recipe: Recipe) -> list[float]:
    """How much each pair counts: 1 but with `weight`, where it is |2p - 1| of the judge's confidence p (1 where it has
    none), or what a function of the user's gives. Raises RecipeError if that does not give a usable number for each."""
    if recipe.noise.by != "weight":
        return [1.0] * len(judgements)
    name = recipe.noise.weight
    if name == "confidence":
        return [1.0 if j.confidence is None else abs(2.0 * j.confidence - 1.0) for j in judgements]
    given, told = function_of(name)(list(judgements)), f"noise.weight={name} gave"
    try:
        weights = [float(weight) for weight in given]
    except (TypeError, ValueError):
        raise RecipeError(f"{told} no list of numbers; let it return one for each judgement") from None
    if len(weights) != len(judgements):
        raise RecipeError(f"{told} {len(weights)} weights for {len(judgements)} judgements; let it return one for each")
    for judgement, weight in zip(judgements, weights, strict=True):
        if not (np.isfinite(weight) and weight >= 0):
            raise RecipeError(f"{told} {weight:g} for {judgement.id!r}; weights are finite numbers, 0 or more")
    return weights


def function_of(name: str) -> Callable[[list[Judgement]], Any]:
    """The function that `module:function` names. Raises RecipeError."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise RecipeError(f"noise.weight={name!r} is neither confidence nor module:function; write one of them")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"noise.weight={name} cannot be imported: {error}; check the name and PYTHONPATH") from error
    if not callable(found):
        raise RecipeError(f"noise.weight={name} is no function; name one that takes a list of judgements")
    function: Callable[[list[Judgement]], Any] = found
    return function
