"""Every loss by hand, beside TRL's values, against finite differences, and the same for any array namespace."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.backend import POLICY, Backend, Batch, Lora, ModelSettings, Optimizer, StepStats
from spa_lite.backends import load
from spa_lite.checkpoint import Checkpoints
from spa_lite.errors import RecipeError
from spa_lite.events import Event
from spa_lite.losses import KINDS, NEEDS_REFERENCE, USES, Loss, Response, pair_loss, settings_in
from spa_lite.noise import objective_of, unbiased
from spa_lite.objective import Plain, refined_loss
from spa_lite.recipe import LossSettings, Noise, Recipe, Refine
from spa_lite.records import Message, Row
from spa_lite.train import Example, Plan, train
from tests.small import BAD, GOOD, lines

W = Response(np.array([-12.0]), np.array([-13.0]), np.array([6.0]))
L = Response(np.array([-20.0]), np.array([-18.0]), np.array([8.0]))
"""log-ratios +1 and -2: DPO's margin at beta 0.1 is 0.3."""
DEFAULT, USUAL = Recipe(), LossSettings()

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "trl_losses.json").read_text())["cases"]
"""Losses on eight pairs, from TRL's own functions (version in the file)."""


def recipe_of(**settings: Any) -> Recipe:
    """The default recipe with other settings of the loss."""
    return replace(DEFAULT, loss=replace(USUAL, **settings))


def loss_of(kind: str, **settings: Any) -> Loss:
    """The function of a loss."""
    return pair_loss(recipe_of(kind=kind, **settings)).loss


def value(kind: str, doubt: float = 0.0, **settings: Any) -> float:
    """The loss of that pair under its usual numbers, some of them changed."""
    return float(loss_of(kind, **settings)(W, L, doubt, np).loss[0])


def ell(m: float) -> float:
    """-log sigmoid(m)."""
    return math.log1p(math.exp(-m))


def sigma(m: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-m))


def odds(mean: float) -> float:
    """Log-odds of a mean token log-probability."""
    return mean - math.log(1 - math.exp(mean))


BY_HAND = [
    ("dpo", ell(0.3), ell(-0.3)),
    ("hinge", 0.7, 1.3),
    ("ipo", (1 / 6 + 2 / 8 - 5) ** 2, (1 / 6 + 2 / 8 + 5) ** 2),
    ("dpo-norm", ell(5 * (1 / 6 + 2 / 8)), ell(-5 * (1 / 6 + 2 / 8))),
    ("dpop", ell(0.3), ell(0.1 * (-3 - 50 * 2))),  # the chosen answer did not lose, the other one did
    ("apo-zero", 1 - sigma(0.1) + sigma(-0.2), 1 - sigma(-0.2) + sigma(0.1)),
    ("sppo", (1 - 500) ** 2 + (-2 + 500) ** 2, (-2 - 500) ** 2 + (1 + 500) ** 2),
    ("kto", 1 - sigma(0.1) + 1 - sigma(0.2), 1 - sigma(-0.2) + 1 - sigma(-0.1)),
    ("simpo", ell(10 * (-2 + 2.5) - 3), ell(3 - 10 * (-2 + 2.5))),
    ("cpo", ell(0.1 * 8) + 2, ell(-0.1 * 8) + 2),
    ("orpo", 0.1 * ell(odds(-2) - odds(-2.5)) + 2, 0.1 * ell(odds(-2.5) - odds(-2)) + 2),
]
"""The loss of the pair, and of the pair with a label known to be wrong."""


@pytest.mark.parametrize(("kind", "right", "wrong"), BY_HAND)
def test_a_pair_by_hand(kind: str, right: float, wrong: float) -> None:
    """In doubt it is the expected loss; robust, the combination whose expectation is the loss of right labels."""
    assert value(kind) == pytest.approx(right, rel=1e-12)
    assert value(kind, 1.0) == pytest.approx(wrong, rel=1e-12)
    assert value(kind, 0.1) == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-12)
    nll = KINDS[kind].nll * 2  # no doubt reaches it
    robust = (0.9 * (right - nll) - 0.1 * (wrong - nll)) / 0.8 + nll
    assert value(kind, unbiased(0.1)) == pytest.approx(robust, rel=1e-12)


@pytest.mark.parametrize(("kind", "margin"), [("dpo", 0.3), ("simpo", 5.0), ("dpop", 0.3), ("cpo", 0.8), ("kto", 0.3)])
def test_a_margin_says_who_is_ahead(kind: str, margin: float) -> None:
    """Neither SimPO's target nor DPOP's penalty is in it: accuracy is the share of positive ones."""
    assert float(loss_of(kind)(W, L, 0.0, np).margin[0]) == pytest.approx(margin)
    assert float(loss_of(kind)(L, W, 0.0, np).margin[0]) == pytest.approx(-margin)


def test_every_loss_is_here() -> None:
    assert set(KINDS) == {kind for kind, *_ in BY_HAND}
    assert set(KINDS) == set(get_args(get_type_hints(LossSettings)["kind"]))


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{k}-{case['loss']}" for k, case in enumerate(GOLDEN)])
def test_what_trl_computes(case: dict[str, Any]) -> None:
    sides = [
        Response(*(np.array([float(case[name])]) for name in (side, f"ref_{side}", f"{side}_tokens")))
        for side in ("chosen", "rejected")
    ]
    numbers, robust = dict(case["settings"]), case["loss"] == "robust"
    kind = "dpo" if robust else case["loss"]
    epsilon = numbers.pop("epsilon", 0.0)
    own = numbers.pop("beta", None) or numbers.pop("weight")  # ORPO's weight is TRL's beta
    numbers |= {KINDS[kind].reads[0]: own}
    pairs = pair_loss(recipe_of(kind=kind, **numbers))
    pairs.remember({"kl": max(0.0, own * case.get("kl", 0.0))})  # TRL's is not multiplied by beta yet
    found = pairs.loss(sides[0], sides[1], unbiased(epsilon) if robust else epsilon, np)
    tolerance = 1e-6 if "float32" in case["theirs"] else 1e-10
    assert float(found.loss[0]) == pytest.approx(case["value"], rel=tolerance)


def test_what_pulls_a_lost_answer_back() -> None:
    """DPOP's penalty counts where the chosen answer is less likely than under the reference."""
    lost = Response(np.array([-15.0]), W.reference, W.tokens)  # log-ratio -2
    found = loss_of("dpop")(lost, L, 0.0, np)
    assert float(found.loss[0]) == pytest.approx(ell(0.1 * (-2 + 2 - 50 * 2)), rel=1e-12)


def test_dpo_with_nll() -> None:
    assert value("dpo", nll=1.0) == pytest.approx(ell(0.3) + 12 / 6)
    assert value("cpo", nll=0.0) == pytest.approx(ell(0.8))


def test_the_refined_loss_is_cdpo_pair_by_pair() -> None:
    m = 0.1 * ((W.logp - W.reference) - (L.logp - L.reference))
    assert value("dpo", 0.2) == float(refined_loss(m, np.ones(1), 0.2)[0])


finite = st.floats(-40, -0.2)
pair = st.tuples(finite, finite, finite, finite, st.integers(1, 40), st.integers(1, 40))


@pytest.mark.parametrize("kind", list(KINDS))
@given(numbers=pair, beta=st.floats(0.01, 3), doubt=st.floats(-0.5, 1), nll=st.floats(0, 2), more=st.floats(0.1, 3))
def test_slopes_are_derivatives(
    kind: str, numbers: tuple[float, ...], beta: float, doubt: float, nll: float, more: float
) -> None:
    """Also in doubt, and where that is negative (robust)."""
    w, lo, rw, rl, nw, nl = (np.array([float(x)]) for x in numbers)
    loss = loss_of(kind, nll=nll, gamma=more, dpop_weight=more, **{KINDS[kind].reads[0]: beta})
    found = loss(Response(w, rw, nw), Response(lo, rl, nl), doubt, np)
    step = 1e-5
    for which, slope in (("w", found.chosen), ("l", found.rejected)):
        moved = [
            loss(
                Response(w + step * sign * (which == "w"), rw, nw),
                Response(lo + step * sign * (which == "l"), rl, nl),
                doubt,
                np,
            )
            for sign in (1, -1)
        ]
        kink = kind == "hinge" and min(abs(abs(float(m.margin[0])) - 1) for m in moved) < 1e-3 * beta
        kink = kink or (kind == "dpop" and min(abs(float((w - rw)[0])), abs(float((lo - rl)[0]))) < 1e-3)
        measured = float((moved[0].loss - moved[1].loss)[0]) / (2 * step)
        assert kink or float(slope[0]) == pytest.approx(measured, rel=1e-4, abs=1e-5 * (1 + abs(float(found.loss[0]))))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - NEEDS_REFERENCE))
def test_without_a_reference_none_is_looked_at(kind: str) -> None:
    blind = [Response(y.logp, np.array([np.nan]), y.tokens) for y in (W, L)]
    assert np.isfinite(loss_of(kind)(blind[0], blind[1], 0.1, np).loss).all()


@pytest.mark.parametrize("doubt", [0.0, 0.1, unbiased(0.1)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_torch_gives_the_same(kind: str, doubt: float) -> None:
    """Values, and what its own differentiation finds."""
    torch = pytest.importorskip("torch")
    sides = [Response(*(torch.tensor(part, requires_grad=True) for part in y)) for y in (W, L)]
    found, expected = (loss_of(kind)(some[0], some[1], doubt, xp) for some, xp in ((sides, torch), ((W, L), np)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-9)
    slopes = torch.autograd.grad(found.loss.sum(), [sides[0].logp, sides[1].logp])
    np.testing.assert_allclose(
        [float(s) for s in slopes], [float(expected.chosen[0]), float(expected.rejected[0])], rtol=1e-9
    )


@pytest.mark.parametrize("doubt", [0.0, 0.1, unbiased(0.1)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_mlx_gives_the_same(kind: str, doubt: float) -> None:
    mx = pytest.importorskip("mlx.core")
    sides = [Response(*(mx.array(part.astype(np.float32)) for part in y)) for y in (W, L)]
    found, expected = (loss_of(kind)(some[0], some[1], doubt, xp) for some, xp in ((sides, mx), ((W, L), np)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(ours), theirs, rtol=1e-5)


# --- as training takes them -------------------------------------------------------------------------------------------

THIRD = (-7.0, -6.5, 4)


def batch_of(kind: str, responses: int = 2, desirable: bool = False) -> Batch:
    """The pair and the pair exchanged, as flat arrays; with a third response, or the first alone, if asked for."""
    rows = [[W, L], [L, W]]
    flat = [
        (float(y.logp[0]), float(y.reference[0]), int(y.tokens[0])) if isinstance(y, Response) else y
        for row in rows
        for y in [*row, THIRD][:responses]
    ]
    logp, reference, tokens = (np.array(column) for column in zip(*flat, strict=True))
    if kind not in NEEDS_REFERENCE:
        reference = np.zeros(0)
    return Batch(logp, reference, np.zeros(0), tokens, np.repeat(np.arange(2), responses), np.arange(2))


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_sees_flat_arrays(kind: str) -> None:
    """The derivatives of all responses in order; each pair has its own doubt; a third response is left alone."""
    pairs, function = pair_loss(recipe_of(kind=kind)), loss_of(kind)
    doubts = np.array([0.0, 0.4])
    expected = [function(W, L, 0.0, np), function(L, W, 0.4, np)]
    for responses in (2, 3):
        batch = batch_of(kind, responses)
        loss, coefficients = pairs(batch, doubts)
        assert loss == pytest.approx([float(one.loss[0]) for one in expected])
        assert pairs.margins(batch, batch.logp) == pytest.approx([float(one.margin[0]) for one in expected])
        by_row = coefficients.reshape(2, responses)
        assert by_row[:, 0] == pytest.approx([float(one.chosen[0]) for one in expected])
        assert by_row[:, 1] == pytest.approx([float(one.rejected[0]) for one in expected])
        assert (by_row[:, 2:] == 0).all()


def test_rows_of_one_response_are_no_pairs() -> None:
    with pytest.raises(RecipeError, match="two responses"):
        pair_loss(recipe_of())(batch_of("dpo", 1), np.zeros(2))


@pytest.mark.parametrize("kind", sorted(NEEDS_REFERENCE))
def test_optimism(kind: str) -> None:
    """alpha * beta * (log pi - log ref) of the third response, as SELM's code has it, beta the loss's own."""
    plain, hopeful = pair_loss(recipe_of(kind=kind)), pair_loss(recipe_of(kind=kind, optimism=0.5))
    batch, none = batch_of(kind, 3), np.zeros(2)
    beta = getattr(USUAL, KINDS[kind].reads[0])
    (before, those), (loss, these) = plain(batch, none), hopeful(batch, none)
    assert loss - before == pytest.approx([0.5 * beta * (-7.0 + 6.5)] * 2)
    assert these - those == pytest.approx([0, 0, 0.5 * beta] * 2)
    with pytest.raises(RecipeError, match="optimism needs rows of three responses"):
        hopeful(batch_of(kind, 2), none)


OTHER: dict[str, Any] = {
    "beta": 0.7,
    "simpo_beta": 2.0,
    "gamma": 0.5,
    "norm_beta": 1.0,
    "tau": 0.3,
    "sppo_beta": 0.01,
    "orpo_weight": 0.5,
    "dpop_weight": 5.0,
    "nll": 0.3,
    "optimism": 0.2,
    "round_betas": [0.3],
}
"""Another value of every setting of the loss."""


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loss_reads_what_it_says_it_reads(kind: str) -> None:
    """Every setting that USES names changes it, and no other does."""
    assert {"kind", *OTHER} == set(LossSettings.__annotations__)
    batch = batch_of(kind, 3)

    def seen(**settings: Any) -> tuple[list[float], list[float]]:
        pairs = pair_loss(recipe_of(kind=kind, **settings), 1)
        lost = replace(batch, logp=batch.logp - 2.0)  # so that DPOP's penalty counts
        loss, coefficients = pairs(lost, np.full(2, 0.1))
        return loss.tolist(), coefficients.tolist()

    changing = {f"loss.{name}" for name, other in OTHER.items() if seen(**{name: other}) != seen()}
    assert changing == set(USES[kind])


def test_betas_of_the_rounds() -> None:
    """From round 1 on, the last from then on; the seed stage, the judge and other settings keep their own."""
    r = recipe_of(kind="simpo", round_betas=[2.0, 3.0])
    assert [settings_in(r, i).simpo_beta for i in (0, 1, 2, 3)] == [10.0, 2.0, 3.0, 3.0]
    assert {settings_in(r, i).beta for i in (0, 1, 2)} == {0.1}


# --- KTO --------------------------------------------------------------------------------------------------------------


def stats_of(logp: list[float], reference: list[float], skipped: bool = False) -> StepStats:
    """What a step saw."""
    return StepStats(0.0, 0.0, skipped, 0, np.array(logp), np.array(reference))


def test_kto_remembers_how_far_the_policy_is() -> None:
    """beta times the mean log-ratio of the step before, if that is positive; a skipped step teaches nothing."""
    loss = Plain(pair_loss(recipe_of(kind="kto", beta=0.5)))
    assert loss.memory == {"kl": 0.0}
    loss.end_step(stats_of([-1.0, -2.0], [-3.0, -4.0]))
    assert loss.memory == {"kl": 1.0}
    loss.end_step(stats_of([math.nan, -2.0], [-3.0, -4.0]))
    loss.end_step(stats_of([0.0, 0.0], [-9.0, -9.0], skipped=True))
    assert loss.memory == {"kl": 1.0}
    batch = batch_of("kto")
    found = loss(batch).loss
    assert found[0] == pytest.approx(1 - sigma(0.5 - 1) + 1 - sigma(1 + 1))
    other = Plain(pair_loss(recipe_of(kind="kto", beta=0.5)))
    assert other(batch).loss[0] != found[0]
    other.remember(loss.memory)
    assert other(batch).loss[0] == found[0]
    loss.end_step(stats_of([-5.0], [-3.0]))
    assert loss.memory == {"kl": 0.0}


def test_kto_of_single_answers() -> None:
    """Each on its own side of the estimate; labels are found by place, whichever rows a micro-batch holds."""
    loss = pair_loss(recipe_of(kind="kto", nll=0.5))
    loss.remember({"kl": 0.25})
    row = Row(prompt=(1,), responses=((2,),))
    loss.begin_step([Example("x", row, desirable=label) for label in (True, True, False)])
    batch = replace(batch_of("kto", 1), index=np.array([2, 0]))
    value, slope = loss(batch, np.zeros(2))
    assert value == pytest.approx([1 - sigma(0.25 - 0.1), 1 - sigma(-0.2 - 0.25) + 0.5 * 20 / 8])
    assert loss.margins(batch, batch.logp) == pytest.approx([0.25 - 0.1, -0.2 - 0.25])
    for k in range(2):
        moved = [loss(replace(batch, logp=batch.logp + h * np.eye(2)[k]), np.zeros(2))[0][k] for h in (1e-5, -1e-5)]
        assert slope[k] == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)
    wrong, _ = loss(batch, np.ones(2))
    assert wrong == pytest.approx([1 - sigma(0.1 - 0.25), 1 - sigma(0.25 + 0.2) + 0.5 * 20 / 8])
    loss.begin_step([Example("x", row)] * 3)
    with pytest.raises(RecipeError, match="needs a label"):
        loss(batch, np.zeros(2))


# --- a few steps of the toy -------------------------------------------------------------------------------------------


def rows_of(backend: Backend, count: int = 12, responses: int = 2) -> list[Example]:
    """Good and bad answers of the small world, then another good one; of single answers every other one is good."""
    examples = []
    for i in range(count):
        talk = (Message(role="user", content=f"say {i}"),)
        texts = [GOOD[i % 5] + " " + GOOD[i % 3], BAD[i % 5], GOOD[(i + 1) % 5]]
        alone = responses == 1
        some = texts[i % 2 : i % 2 + 1] if alone else texts[:responses]
        ids = tuple(backend.tokenizer.encode_answer(talk, text) for text in some)
        row = Row(prompt=backend.tokenizer.encode_prompt(talk), responses=ids)
        examples.append(Example(f"x{i}", row, desirable=i % 2 == 0 if alone else None))
    return examples


class Cut(Exception):
    """An interruption."""


def trained(folder: Path, recipe: Recipe, responses: int = 2, until: int | None = None) -> dict[str, Any]:
    """Twelve steps on the toy; going on where the folder holds a checkpoint; cut off after step `until`."""

    def report(event: Event) -> None:
        if until is not None and event.done == until:
            raise Cut

    backend = load("toy", ModelSettings(model="toy"))
    backend.bind(POLICY, None, Lora())
    backend.snapshot()
    backend.start_training(Optimizer())
    rows, plan = rows_of(backend, responses=responses), Plan(4, 4, 0.05, 12)
    saved = Checkpoints(folder, steps=2)
    return train(backend, rows, objective_of(recipe, 1, plan), plan, recipe, saved, report)


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_lowers_the_loss(kind: str, tmp_path: Path) -> None:
    summary = trained(tmp_path, replace(recipe_of(kind=kind), noise=Noise(by="none")))
    assert summary["loss"] < summary["first_loss"]
    margins = [line["margin"] for line in lines(tmp_path / "metrics.jsonl")]
    assert margins[-1] > margins[0]
    assert (summary["logratio_rejected"] is None) == (kind not in NEEDS_REFERENCE)


def test_training_lowers_the_loss_of_single_answers(tmp_path: Path) -> None:
    summary = trained(tmp_path, replace(recipe_of(kind="kto"), noise=Noise(by="none")), responses=1)
    assert summary["loss"] < summary["first_loss"]
    assert summary["logratio_chosen"] > 0 > summary["logratio_rejected"]


def test_optimism_makes_the_third_answer_less_likely(tmp_path: Path) -> None:
    """Beside a pair that pulls the same way, less of it is left."""
    ends = []
    for optimism in (0.0, 3.0):
        folder = tmp_path / str(optimism)
        folder.mkdir()
        trained(folder, replace(recipe_of(optimism=optimism), noise=Noise(by="none")), responses=3)
        backend = load("toy", ModelSettings(model="toy"))
        backend.bind(POLICY, folder / "adapter")
        rows = [Row(prompt=e.row.prompt, responses=e.row.responses[2:]) for e in rows_of(backend, responses=3)]
        ends.append(sum(score.logp for _, (score,) in backend.logprob(rows, POLICY)))
    assert ends[1] < ends[0]


@pytest.mark.parametrize("noise", ["none", "quantile"])
@pytest.mark.parametrize("responses", [1, 2])
def test_kto_goes_on_where_it_was(tmp_path: Path, responses: int, noise: Literal["none", "quantile"]) -> None:
    """Cut off between two checkpoints, it ends as if nothing had happened: its estimate is in the checkpoint."""
    recipe = replace(recipe_of(kind="kto", beta=0.5), noise=Noise(by=noise), refine=Refine(window=4, lambda_=0.0))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = trained(whole, recipe, responses)
    with pytest.raises(Cut):
        trained(cut, recipe, responses, until=7)
    assert trained(cut, recipe, responses) == expected
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
