"""What is done about wrong labels: every loss with every answer to them, and what each example brings."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from spa_lite.backend import Batch, Floats, StepStats
from spa_lite.errors import RecipeError
from spa_lite.losses import KINDS, NEEDS_REFERENCE
from spa_lite.noise import objective_of, unbiased, weights_of
from spa_lite.recipe import Recipe, build
from spa_lite.records import Judgement, Row, Side
from spa_lite.train import Example, Plan, TrainObjective, known_of, pairs_of, round_plan, step_line, summarise

PLAN = Plan(1, 4, 1e-3, 8)
NOISE = ("none", "smooth", "robust", "quantile", "perpair", "weight")
ALWAYS: dict[str, Any] = {"refine.window": 2, "refine.warmup": 0.0, "refine.before_full": "zero", "refine.alpha": 0.3}
"""Refinement from the first step on."""


def recipe_of(**settings: Any) -> Recipe:
    """The default recipe with other settings, `__` for the dot."""
    return build({"always": ALWAYS, "test": {path.replace("__", "."): value for path, value in settings.items()}})[0]


def example(name: str = "x", responses: int = 2, **more: Any) -> Example:
    """A row of responses of 3, 4, ... tokens."""
    row = Row(prompt=(1,), responses=tuple((2,) * (3 + k) for k in range(responses)))
    return Example(name, row, **more)


EXAMPLES = [example(doubt=0.05 * k, weight=0.5 + 0.25 * k) for k in range(4)]


def batch_of(logp: Floats, kind: str = "dpo", index: Sequence[int] = range(4)) -> Batch:
    """Pairs with these log-probabilities."""
    rng = np.random.default_rng(1)
    reference = -5 - 10 * rng.random(len(logp)) if kind in NEEDS_REFERENCE else np.zeros(0)
    tokens = np.arange(3, 3 + len(logp))
    return Batch(logp, reference, np.zeros(0), tokens, np.arange(len(logp)) // 2, np.array(index))


def of(recipe: Recipe, examples: Sequence[Example] = EXAMPLES) -> TrainObjective:
    """The objective of a first step on those examples."""
    made = objective_of(recipe, 1, PLAN)
    made.begin_step(examples)
    return made


LOGP = -6 - 9 * np.random.default_rng(0).random(8)


@pytest.mark.parametrize(("kind", "noise"), list(itertools.product(KINDS, NOISE)))
def test_coefficients_are_derivatives(kind: str, noise: str) -> None:
    """Of every loss with every answer to noise, by each of the log-probabilities."""
    recipe = recipe_of(loss__kind=kind, noise__by=noise, refine__lambda=0.0)

    def seen(logp: Floats) -> tuple[Floats, Floats]:
        outcome = of(recipe)(batch_of(logp, kind))
        return outcome.loss, outcome.coefficients

    _, coefficients = seen(LOGP)
    for r in range(8):
        up, down = (seen(LOGP + step * np.eye(8)[r])[0].sum() for step in (1e-5, -1e-5))
        assert coefficients[r] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-7 * (1 + abs(up)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_each_answer_to_noise_makes_of_a_loss(kind: str) -> None:
    """Row by row: the loss of the label, and of the label turned round."""
    batch = batch_of(LOGP, kind)
    right = objective_of(recipe_of(loss__kind=kind, noise__by="none"), 1, PLAN)
    loss = right.loss  # type: ignore[attr-defined]
    clean, wrong = (loss(batch, np.full(4, doubt))[0] for doubt in (0.0, 1.0))

    def found(noise: str) -> Floats:
        made = of(recipe_of(loss__kind=kind, noise__by=noise, noise__epsilon=0.2, refine__lambda=0.0))
        return made(batch).loss

    doubts, weights = 0.05 * np.arange(4), 0.5 + 0.25 * np.arange(4)
    assert found("none").tolist() == clean.tolist()
    assert found("smooth") == pytest.approx(0.8 * clean + 0.2 * wrong)
    assert found("robust") == pytest.approx((0.8 * clean - 0.2 * wrong) / 0.6)
    for noise in ("perpair", "weight"):
        assert found(noise) == pytest.approx(weights * ((1 - doubts) * clean + doubts * wrong))
    flagged = loss.margins(batch, batch.logp) < 0  # the threshold while the window is empty
    assert found("quantile") == pytest.approx(np.where(flagged, 0.7 * clean + 0.3 * wrong, clean))


def test_examples_are_found_by_their_place() -> None:
    """A micro-batch may hold any rows of the step, in any order."""
    made, batch = of(recipe_of(noise__by="weight")), batch_of(LOGP)
    order = [2, 0, 3, 1]
    flat = [2 * k + side for k in order for side in (0, 1)]
    some = replace(
        batch,
        logp=batch.logp[flat],
        reference=batch.reference[flat],
        tokens=batch.tokens[flat],
        index=np.array(order),
    )
    whole, shuffled = made(batch), made(some)
    assert (shuffled.loss == whole.loss[order]).all()
    assert (shuffled.coefficients == whole.coefficients[flat]).all()


def test_the_default_is_refined_dpo_and_without_alpha_plain() -> None:
    assert of(recipe_of()).memory == {"step": 0, "margins": []}
    assert of(recipe_of(refine__alpha=0.0)).memory == {}


@pytest.mark.parametrize("noise", NOISE)
def test_settings_of_the_noise_matter_where_they_are_read(noise: str) -> None:
    def seen(**settings: Any) -> list[float]:
        made = of(recipe_of(noise__by=noise, refine__lambda=0.0, **settings))
        found: list[float] = made(batch_of(LOGP)).loss.tolist()
        return found

    assert (seen(noise__epsilon=0.3) != seen()) == (noise in {"smooth", "robust"})
    assert (seen(refine__alpha=0.5) != seen()) == (noise == "quantile")


def test_robust_is_what_undoes_the_noise() -> None:
    """Over labels of which epsilon are wrong, its mean is the loss of right labels."""
    right, wrong, epsilon = 0.3, 1.1, 0.2
    q = unbiased(epsilon)
    seen = ((1 - q) * right + q * wrong, (1 - q) * wrong + q * right)
    assert (1 - epsilon) * seen[0] + epsilon * seen[1] == pytest.approx(right)


# --- what judgements bring --------------------------------------------------------------------------------------------


def judged(name: str, confidence: float | None, same: bool = False, third: tuple[int, ...] = ()) -> Judgement:
    """A judgement whose second answer won."""
    a, b = (
        Side(text="", ids=ids, ended="eos", policy=policy, reference=-9.0)
        for ids, policy in (((3, 4), -4.0), ((3, 4) if same else (5,), -2.0))
    )
    return Judgement(
        id=name, messages=(), prompt_ids=(1,), a=a, b=b, logratio_a=0.0, logratio_b=0.0, margin=0.0, p=0.5, label="b",
        tie=False, tokens_a=2, tokens_b=1, confidence=confidence, third=third,
    )  # fmt: skip


PILE = [judged("one", 0.9), judged("same", 0.6, same=True), judged("none", None), judged("two", 0.75)]


def test_doubt_and_weight_come_from_the_judges_confidence() -> None:
    def brought(noise: str) -> list[tuple[str, float, float]]:
        return [(e.id, round(e.doubt, 9), round(e.weight, 9)) for e in pairs_of(PILE, recipe_of(noise__by=noise))]

    assert brought("perpair") == [("one", 0.1, 1.0), ("none", 0.0, 1.0), ("two", 0.25, 1.0)]
    assert brought("weight") == [("one", 0.0, 0.8), ("none", 0.0, 1.0), ("two", 0.0, 0.5)]
    assert brought("quantile") == [("one", 0.0, 1.0), ("none", 0.0, 1.0), ("two", 0.0, 1.0)]


def test_sums_are_known_where_the_reference_is_the_policy_that_answered() -> None:
    def known(**settings: Any) -> Any:
        return pairs_of(PILE[:1], recipe_of(**settings))[0].reference

    assert known() == known(train__reference="prev") == (-2.0, -4.0)
    assert known(train__reference="init") is None
    assert known(loss__kind="simpo") is None
    assert pairs_of(PILE[:1], recipe_of(), fresh=False)[0].reference is None
    three = pairs_of([judged("x", None, third=(7, 8))], recipe_of())[0]
    assert three.row.responses == ((5,), (3, 4), (7, 8))
    assert three.reference is None


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_weights_of_a_function_of_ones_own(mine: ModuleType) -> None:
    """It sees the judgements that are trained on."""
    mine.weigh = lambda judgements: [len(j.id) for j in judgements]  # type: ignore[attr-defined]
    found = pairs_of(PILE, recipe_of(noise__by="weight", noise__weight="mine:weigh"))
    assert [(e.id, e.weight) for e in found] == [("one", 3.0), ("none", 4.0), ("two", 3.0)]


@pytest.mark.parametrize(
    ("name", "gives", "message"),
    [
        ("mine", None, "neither confidence nor module:function"),
        ("absent:f", None, "cannot be imported"),
        ("mine:absent", None, "cannot be imported"),
        ("mine:__name__", None, "is no function"),
        ("mine:f", [1.0], "1 weights for 4 judgements"),
        ("mine:f", [1.0, 1.0, 1.0, -1.0], "-1 for 'two'"),
        ("mine:f", [1.0, float("nan"), 1.0, 1.0], "nan for 'same'"),
        ("mine:f", 3.0, "no list of numbers"),
        ("mine:f", ["a"] * 4, "no list of numbers"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(mine: ModuleType, name: str, gives: Any, message: str) -> None:
    mine.f = lambda judgements: gives  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=message) as caught:
        weights_of(PILE, recipe_of(noise__by="weight", noise__weight=name))
    assert len(str(caught.value).splitlines()) == 1


# --- rows of one, two and three responses -----------------------------------------------------------------------------


def stats_of(batch: Sequence[Example], reference: bool = True) -> StepStats:
    """What a step reports of rows whose responses have the log-probabilities -1, -2, ... and log-ratios 1, 2, ..."""
    count = sum(len(e.row.responses) for e in batch)
    logp = -np.arange(1.0, count + 1)
    return StepStats(
        0.5, 1.0, False, 9, logp, 2 * logp if reference else np.zeros(0), {"margin": np.array([1.0, -1.0])}
    )


SIDES = ("logp_chosen", "logp_rejected", "logratio_chosen", "logratio_rejected")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([example(), example()], (-2.0, -3.0, 2.0, 3.0)),
        ([example(responses=3), example(responses=3)], (-2.5, -3.5, 2.5, 3.5)),
        ([example(responses=3), example()], (-2.5, -3.5, 2.5, 3.5)),
        ([example(responses=1), example(responses=1)], (-1.5, None, 1.5, None)),
        ([example(responses=1, desirable=True), example(responses=1, desirable=False)], (-1.0, -2.0, 1.0, 2.0)),
        ([example(responses=1, desirable=False)] * 2, (None, -1.5, None, 1.5)),
    ],
)
def test_the_log_has_both_sides_where_there_are_two(batch: list[Example], expected: tuple[Any, ...]) -> None:
    line = step_line(1, 0, 0.1, batch, stats_of(batch))
    assert tuple(line[name] for name in SIDES) == expected
    blind = step_line(1, 0, 0.1, batch, stats_of(batch, reference=False))
    assert tuple(blind[name] for name in SIDES) == (*expected[:2], None, None)
    done = summarise([line, blind], 0)
    assert done["logratio_rejected"] is None
    assert done["pairs_seen"] == 4


def test_the_reference_is_known_if_it_is_of_every_response() -> None:
    pair, alone = example(reference=(1.0, 2.0)), example(responses=1, reference=(3.0,))
    three = example(responses=3)
    known = known_of([pair, alone])
    assert known is not None
    assert known.sums.tolist() == [1.0, 2.0, 3.0]
    assert known_of([pair, three]) is None
    states = (np.zeros((3, 1)), np.zeros((4, 1)))
    assert (known_of([replace(pair, states=states)]) or known).states is not None
    assert (known_of([replace(pair, states=states), alone]) or known).states is None


def test_learning_rates_of_the_rounds() -> None:
    recipe = recipe_of(train__round_rates=[1e-3, 1e-4])
    assert [round_plan(recipe, 8, i).learning_rate for i in (1, 2, 3)] == [1e-3, 1e-4, 1e-4]
