"""The objective against the authors' own numbers, finite differences, and properties that need no numbers.

`golden/spa_official.json` was obtained by running the functions of kingdy2002/SPA at commit 38553eb, unmodified,
in float64. `normative` cases must match; `code_only` ones must match under the released code's settings.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite import objective
from spa_lite.backend import Batch, Outcome, StepStats
from spa_lite.errors import RecipeError
from spa_lite.judge import best_and_worst
from spa_lite.losses import dpo
from spa_lite.objective import Dpo, Refined, Window
from spa_lite.train import Plan

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "spa_official.json").read_text())["cases"]


def cases(kind: str) -> pytest.MarkDecorator:
    """All cases of a kind, as test parameters."""
    found = [c for c in CASES if c["kind"] == kind]
    assert found, kind
    return pytest.mark.parametrize("case", found, ids=[c["id"] for c in found])


def batch_of(logp: Any, reference: Any, extrapolated: Any = ()) -> Batch:
    """Chosen and rejected sums, interleaved."""
    flat = np.asarray(logp, dtype=np.float64)
    rows = np.repeat(np.arange(len(flat) // 2), 2)
    return Batch(
        flat,
        np.asarray(reference, dtype=np.float64),
        np.asarray(extrapolated, dtype=np.float64),
        np.ones(len(flat), dtype=np.int64),
        rows,
        np.arange(len(flat) // 2),
    )


def end_step(loss: Refined, *outcomes: Outcome) -> None:
    """End an optimizer step that saw these micro-batches."""
    names = outcomes[0].metrics if outcomes else ()
    metrics = {name: np.concatenate([outcome.metrics[name] for outcome in outcomes]) for name in names}
    loss.end_step(StepStats(0.0, 0.0, False, 0, np.zeros(0), np.zeros(0), metrics))


def interleave(chosen: Any, rejected: Any) -> np.ndarray:
    """[c0, r0, c1, r1, ...]."""
    return np.stack([np.asarray(chosen, float), np.asarray(rejected, float)], axis=1).reshape(-1)


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Assert equality to an absolute tolerance."""
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=0, atol=tolerance)


class FixedTau(Window):
    """A window whose threshold is given, for cases that hand one over."""

    def __init__(self, tau: float, rule: Any) -> None:
        super().__init__(rule=rule)
        self.given = tau

    @property
    def tau(self) -> float | None:
        """The given threshold."""
        return self.given


# --- golden numbers ---------------------------------------------------------------------------------------------------


@cases("loss")
def test_golden_losses_rewards_and_gradients(case: dict[str, Any]) -> None:
    """Loss, rewards, extrapolated margin and the gradient with respect to both policy sums."""
    i, p, expected = case["inputs"], case["params"], case["expected"]
    batch = batch_of(
        interleave(i["policy_chosen_logps"], i["policy_rejected_logps"]),
        interleave(i["reference_chosen_logps"], i["reference_rejected_logps"]),
        interleave(i["mix_chosen_logps"], i["mix_rejected_logps"]),
    )
    if p["loss"] == "dpo":
        loss: Any = Dpo(p["beta"])
    else:
        rule = "official" if case["status"] == "code_only" else "paper"
        loss = Refined(dpo(p["beta"]), p["alpha"], 0.5, FixedTau(p["threshold"], rule), 0.2, p["max_steps"])
        loss.step = p["global_step"]
    outcome = loss(batch)
    close(outcome.loss, expected["losses"])
    if "grad_sum_wrt_policy_chosen" in expected:
        close(outcome.coefficients[0::2], expected["grad_sum_wrt_policy_chosen"])
        close(outcome.coefficients[1::2], expected["grad_sum_wrt_policy_rejected"])
    if p["loss"] == "refined":
        close(outcome.metrics["extrapolated_margin"], expected["mix_margin"])


@cases("warmup")
def test_golden_warmup(case: dict[str, Any]) -> None:
    """The first optimizer step with refinement, for 17 run lengths."""
    for total, first in zip(case["inputs"]["max_steps"], case["expected"]["first_active_global_step"], strict=True):
        loss = Refined(dpo(0.1), 0.1, 0.5, Window(), case["params"]["fraction"], total)
        while not loss.active:
            loss.step += 1
        assert loss.step == first


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-softmax in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    normalised: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def bigram_logp(weights: np.ndarray, prompt: list[int], response: list[int]) -> float:
    """Summed log-probability of a response under logits[t] = weights[token t]."""
    before = [prompt[-1], *response[:-1]]
    return float(log_softmax(weights)[before, response].sum())


def bigram_gradient(weights: np.ndarray, pair: dict[str, list[int]], coefficients: np.ndarray) -> np.ndarray:
    """d sum(coefficient * logp) / d weights: one-hot minus softmax at every row that predicted a token."""
    gradient = np.zeros_like(weights)
    for coefficient, response in zip(coefficients, (pair["chosen"], pair["rejected"]), strict=True):
        for before, token in zip([pair["prompt"][-1], *response[:-1]], response, strict=True):
            gradient[before] -= coefficient * np.exp(log_softmax(weights)[before])
            gradient[before, token] += coefficient
    return gradient


@cases("extrapolation")
def test_golden_extrapolation(case: dict[str, Any]) -> None:
    """A bigram model: mixed logits, renormalised, give the margin that decides the flag."""
    i, p = case["inputs"], case["params"]
    policy, reference = np.array(i["policy_W"]), np.array(i["reference_W"])
    mixed = objective.extrapolate(policy, reference, p["lambda"])
    rule = "official" if case["status"] == "code_only" else "paper"
    for pair, expected in zip(i["pairs"], case["expected"]["per_pair"], strict=True):
        sums = [
            [bigram_logp(w, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
            for w in (policy, reference, mixed)
        ]
        loss = Refined(
            dpo(p["beta"]), p["alpha"], p["lambda"], FixedTau(p["threshold"], rule), 0.2, p.get("max_steps", 100)
        )
        loss.step = p.get("global_step", 50)
        outcome = loss(batch_of(*sums))
        close(outcome.loss, [expected["loss"]])
        close(outcome.metrics["margin"], [expected["margin"]])
        close(outcome.metrics["extrapolated_margin"], [expected["mix_margin"]])
        if "policy_chosen_logp" in expected:
            close(sums[0], [expected["policy_chosen_logp"], expected["policy_rejected_logp"]])
            close(outcome.metrics["noisy"], [float(expected["noisy"])])
            close(bigram_gradient(policy, pair, outcome.coefficients), expected["grad_W"])


@cases("judge_bigram")
def test_golden_judgement(case: dict[str, Any]) -> None:
    """Raw rewards and p(y1 beats y2), with an exact tie among them."""
    i = case["inputs"]
    policy, init = np.array(i["policy_W"]), np.array(i["init_W"])
    for pair, expected in zip(i["pairs"], case["expected"]["per_pair"], strict=True):
        answers = (pair["y1"], pair["y2"])
        rewards = [bigram_logp(policy, pair["prompt"], y) - bigram_logp(init, pair["prompt"], y) for y in answers]
        close(rewards, [expected["reward_first"], expected["reward_second"]])
        p = objective.preference(np.float64(objective.margin(rewards[0], rewards[1], 0.0, 0.0, case["params"]["beta"])))
        close(p, expected["p_first_preferred"])
        assert best_and_worst(rewards, "a")[0] == expected["official_chosen"]


@cases("label_building")
def test_golden_labels(case: dict[str, Any]) -> None:
    """Best against worst after a stable descending sort; the odd-count bug is not copied."""
    responses, rewards = case["inputs"]["responses"], case["inputs"]["rewards"]
    best, worst = best_and_worst(rewards, "a")
    if case["status"] == "bug":
        assert responses[best] == "c", "the best of three answers must win"
    else:
        assert (responses[best], responses[worst]) == (case["expected"]["chosen"], case["expected"]["rejected"])


@cases("threshold")
def test_golden_threshold(case: dict[str, Any]) -> None:
    """Both rules on the same windows; K where the released code would crash is refused."""
    K, margins, expected = case["params"]["K"], case["inputs"]["margins"], case["expected"]
    window = Window("official", K, case["params"]["window"], "zero")
    window.push(margins)
    if case["status"] == "bug":
        with pytest.raises(RecipeError, match=r"0\.98"):
            _ = window.tau
        return
    close(window.tau, expected["official_threshold"])
    if expected["percentile_numpy_linear"] is not None:
        paper = Window("paper", K, case["params"]["window"])
        paper.push(margins)
        close(paper.tau, expected["percentile_numpy_linear"])


@cases("stream")
def test_golden_stream(case: dict[str, Any]) -> None:
    """Micro-step by micro-step under the released rule: tau used, alpha in effect, flag, loss."""
    i, p, expected = case["inputs"], case["params"], case["expected"]
    window = Window("official", p["K"], p["window"], "zero")
    loss = Refined(dpo(p["beta"]), p["alpha"], 0.5, window, p["warmup"], p["max_steps"])
    found: dict[str, list[float]] = {"tau": [], "noisy": [], "loss": [], "active": []}
    for t, (own, mix) in enumerate(zip(i["policy_logratio_diff"], i["mix_logratio_diff"], strict=True), start=1):
        found["active"].append(p["alpha"] * loss.active)
        outcome = loss(batch_of([own, 0.0], [0.0, 0.0], [mix, 0.0]))
        found["loss"] += outcome.loss.tolist()
        found["tau"] += outcome.metrics["tau"].tolist()
        found["noisy"] += outcome.metrics["noisy"].tolist()
        if t % p["grad_accum"] == 0:
            end_step(loss)
    close(found["active"], expected["alpha_in_effect"])
    close(found["tau"], expected["threshold_used"])
    close(found["noisy"], expected["noisy"])
    close(found["loss"], expected["loss"])


@cases("sequence_logps")
def test_golden_sequence_logps(case: dict[str, Any]) -> None:
    """Position t predicts label t+1, masked labels do not count, sums and never means."""
    if case["params"]["reduce"] != "sum":
        pytest.skip("the mean is documented, not offered: SPA sums everywhere")
    logits, labels = np.array(case["inputs"]["logits"]), np.array(case["inputs"]["labels"])
    picked = np.take_along_axis(log_softmax(logits)[:, :-1], np.maximum(labels, 0)[:, 1:, None], -1)[..., 0]
    close((picked * (labels[:, 1:] != -100)).sum(1), case["expected"]["logps"])


@cases("threshold_feed")
def test_window_holds_margins_not_means(case: dict[str, Any]) -> None:
    """The released code feeds micro-batch means to its window; ours holds one margin per pair."""
    margins = [0.3, -0.2, 0.1]
    loss = Refined(dpo(1.0), 0.1, 0.5, Window(size=3), 0.0, 10)
    end_step(loss, loss(batch_of(interleave(margins, [0.0] * 3), [0.0] * 6)))
    assert list(loss.window.margins) == pytest.approx(margins)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_hand_values() -> None:
    """Numbers a reader can check: beta 0.1, policy (-40, -42), reference (-41, -41.5)."""
    m = objective.margin(-40.0, -42.0, -41.0, -41.5, 0.1)
    assert m == pytest.approx(0.15)
    assert objective.dpo_loss(np.float64(m)) == pytest.approx(0.620957, abs=1e-6)
    flagged = objective.refined_loss(np.float64(m), 1.0, 0.1)
    assert flagged == pytest.approx(0.635957, abs=1e-6)
    assert flagged - objective.dpo_loss(np.float64(m)) == pytest.approx(0.1 * m), "flagging adds alpha * margin"


def test_a_flagged_pair_rests_at_log_nine() -> None:
    """With alpha = 0.1 the slope of a flagged pair is zero at log(0.9 / 0.1)."""
    assert objective.refined_slope(np.float64(math.log(9)), 1.0, 0.1) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("m", [-1e4, -50.0, 0.0, 50.0, 1e4])
def test_finite_far_out(m: float) -> None:
    """No overflow at margins of 1e4, loss or slope."""
    with np.errstate(all="raise", under="ignore"):
        for noisy in (0.0, 1.0):
            assert np.isfinite(objective.refined_loss(np.float64(m), noisy, 0.1))
            assert np.isfinite(objective.refined_slope(np.float64(m), noisy, 0.1))


def test_tie_rules() -> None:
    """Eq. 8 gives a tie to the second answer; the released code's stable sort to the first."""
    assert best_and_worst([0.5, 0.5], "b") == (1, 0)
    assert best_and_worst([0.5, 0.5], "a") == (0, 1)


def test_equality_with_the_threshold() -> None:
    """p < tau is strict in the paper; the released code flags equality too."""
    m = np.array([0.25])
    assert Window("paper").noisy(m, 0.25)[0] == 0.0
    assert Window("official").noisy(m, 0.25)[0] == 1.0


def test_before_the_window_is_full() -> None:
    """`off` flags nothing; `zero` compares with 0."""
    off, zero = Window(before_full="off"), Window(before_full="zero")
    assert off.tau is None
    assert zero.tau == 0.0
    assert off.noisy(np.array([-1.0]), off.tau)[0] == 0.0


# --- properties -------------------------------------------------------------------------------------------------------

sums = st.floats(-500, 0)
numbers = st.lists(st.tuples(sums, sums, sums, sums), min_size=1, max_size=8)


def of_rows(rows: list[tuple[float, float, float, float]]) -> Batch:
    """Rows of (chosen, rejected, reference chosen, reference rejected)."""
    table = np.array(rows)
    return batch_of(interleave(table[:, 0], table[:, 1]), interleave(table[:, 2], table[:, 3]))


@given(numbers)
def test_without_refinement_it_is_dpo_bit_for_bit(rows: list[tuple[float, float, float, float]]) -> None:
    """(a) alpha = 0, or before the warm-up is over."""
    plain = Dpo(0.1)(of_rows(rows))
    for loss in (
        Refined(dpo(0.1), 0.0, 0.5, FixedTau(1e9, "paper"), 0.0, 10),
        Refined(dpo(0.1), 0.1, 0.5, FixedTau(1e9, "paper"), 0.5, 10),
    ):
        refined = loss(of_rows(rows))
        assert (refined.loss == plain.loss).all()
        assert (refined.coefficients == plain.coefficients).all()


@given(numbers)
def test_lambda_zero_extrapolates_nothing(rows: list[tuple[float, float, float, float]]) -> None:
    """(b) Without extrapolated sums the flag uses the margin itself."""
    outcome = Refined(dpo(0.1), 0.1, 0.0, Window(), 0.0, 10)(of_rows(rows))
    assert (outcome.metrics["margin"] == outcome.metrics["extrapolated_margin"]).all()


@given(st.lists(st.tuples(sums, sums), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 2))
def test_at_the_reference_the_loss_is_ln_2(rows: list[tuple[float, float]], alpha: float, lambda_: float) -> None:
    """(c) policy = reference: every margin is 0, whatever alpha and lambda are."""
    flat = interleave([c for c, _ in rows], [r for _, r in rows])
    outcome = Refined(dpo(0.1), alpha, lambda_, FixedTau(1.0, "paper"), 0.0, 10)(batch_of(flat, flat, flat))
    close(outcome.loss, [math.log(2)] * len(rows))


@given(sums, sums, sums, sums, st.floats(0.01, 10))
def test_swapping_flips_the_preference(a: float, b: float, ra: float, rb: float, beta: float) -> None:
    """(d) p(a beats b) = 1 - p(b beats a), and (e) the winner does not depend on beta."""
    forward, backward = objective.margin(a, b, ra, rb, beta), objective.margin(b, a, rb, ra, beta)
    assert objective.preference(np.float64(forward)) == pytest.approx(1 - objective.preference(np.float64(backward)))
    if forward != 0:
        assert best_and_worst([a - ra, b - rb], "b")[0] == (0 if forward > 0 else 1)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(-100, 100))
def test_extrapolation_ignores_a_constant(logits: list[float], constant: float) -> None:
    """(f) Adding a constant to all logits of a position changes nothing, if the mixture is renormalised."""
    policy, reference = np.array([logits]), np.array([logits[::-1]])
    plain = log_softmax(objective.extrapolate(policy, reference, 0.5))
    shifted = log_softmax(objective.extrapolate(policy + constant, reference - constant, 0.5))
    close(plain, shifted, 1e-9)
    log_mixed = log_softmax(objective.extrapolate(log_softmax(policy), log_softmax(reference), 0.5))
    close(plain, log_mixed, 1e-9)


@given(st.lists(st.floats(-3, 3), min_size=60, max_size=90), st.sampled_from(["paper", "official"]))
def test_a_flag_never_depends_on_its_own_margin(margins: list[float], rule: Any) -> None:
    """(h) tau at step n is made of earlier margins only."""

    def taus(values: list[float]) -> list[float]:
        loss = Refined(dpo(1.0), 0.1, 0.5, Window(rule, 0.1, 50, "zero"), 0.0, 100)
        seen = []
        for value in values:
            outcome = loss(batch_of([value, 0.0], [0.0, 0.0]))
            seen.append(float(outcome.metrics["tau"][0]))
            end_step(loss, outcome)
        return seen

    assert taus(margins) == taus([*margins[:-1], 1e3])


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_flags_do_not_depend_on_micro_batches(rule: Any) -> None:
    """The same pairs in the same order, handed over in pieces of any size."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(12, 8))

    def flags(piece: int) -> list[float]:
        loss = Refined(dpo(1.0), 0.1, 0.0, Window(rule, 0.2, 20, "zero"), 0.0, 12)
        found: list[float] = []
        for margins in steps:
            parts = [margins[start : start + piece] for start in range(0, len(margins), piece)]
            outcomes = [loss(batch_of(interleave(p, np.zeros(len(p))), np.zeros(2 * len(p)))) for p in parts]
            found += [flag for outcome in outcomes for flag in outcome.metrics["noisy"].tolist()]
            end_step(loss, *outcomes)
        return found

    assert flags(1) == flags(3) == flags(8)
    assert 0 < sum(flags(8)) < 96


def test_finite_differences() -> None:
    """Coefficients are the derivative of the loss."""
    rng = np.random.default_rng(1)
    logp, reference = -rng.random(12) * 20, -rng.random(12) * 20

    def losses(x: np.ndarray) -> Any:
        loss = Refined(dpo(0.3), 0.2, 0.5, FixedTau(0.1, "paper"), 0.0, 10)
        return loss(batch_of(x, reference))

    exact = losses(logp).coefficients
    for r in range(len(logp)):
        step = np.zeros(len(logp))
        step[r] = 1e-6
        numeric = (losses(logp + step).loss.sum() - losses(logp - step).loss.sum()) / 2e-6
        assert exact[r] == pytest.approx(numeric, abs=1e-7)


def test_torch_agrees_with_numpy() -> None:
    """The same text under another namespace: values and gradients."""
    torch = pytest.importorskip("torch")
    margins = np.array([-1e4, -3.0, -0.1, 0.0, 0.2, 5.0, 1e4])
    noisy = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    x = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    loss = objective.refined_loss(x, torch.tensor(noisy), 0.1, torch)
    loss.sum().backward()
    close(loss.detach().numpy(), objective.refined_loss(margins, noisy, 0.1))
    close(x.grad.numpy(), objective.refined_slope(margins, noisy, 0.1))


def test_rows_without_a_rejected_response_are_refused() -> None:
    """A pair loss names what it needs."""
    rows, places = np.array([0, 0, 1]), np.arange(2)
    with pytest.raises(RecipeError, match="two responses"):
        Dpo()(Batch(np.zeros(3), np.zeros(3), np.zeros(0), np.ones(3, dtype=np.int64), rows, places))


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_what_an_objective_remembers_is_all_there_is(rule: Any) -> None:
    """Between two steps: an objective that goes back to it decides as if it had never been away."""

    def objective() -> Refined:
        return Refined(dpo(0.1), 0.3, 0.0, Window(rule, 0.3, 4, "zero"), 0.2, 10)

    rng = np.random.default_rng(0)
    batches = [batch_of(*rng.normal(size=(2, 6))) for _ in range(6)]
    whole, first = objective(), objective()
    for batch in batches[:3]:
        for one in (whole, first):
            end_step(one, one(batch))
    memory = msgspec.json.decode(msgspec.json.encode(first.memory))
    first(batches[5])  # a step that was broken off, and is forgotten
    for again in (first, objective()):
        again.remember(memory)
        assert again.memory == memory
    again = objective()
    again.remember(memory)
    for batch in batches[3:]:
        expected, found = whole(batch), again(batch)
        assert (found.coefficients == expected.coefficients).all()
        assert np.array_equal(found.metrics["tau"], expected.metrics["tau"], equal_nan=True)
        end_step(whole, expected)
        end_step(again, found)
    assert expected.metrics["noisy"].any()


# --- steps whose margins cannot matter --------------------------------------------------------------------------------

plans = st.builds(
    Plan,
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 7),
    learning_rate=st.just(1.0),
    rows=st.integers(1, 20),
    max_steps=st.none() | st.integers(1, 12),
)


@given(
    plans,
    st.integers(2, 12),
    st.floats(0, 1),
    st.sampled_from(["paper", "official"]),
    st.sampled_from(["off", "zero"]),
    st.integers(0, 99),
)
def test_margins_that_cannot_matter_are_not_needed(
    plan: Plan, size: int, warmup: float, rule: Any, before_full: Any, seed: int
) -> None:
    """Flags, thresholds and coefficients of active steps are those of a training that extrapolates in every step."""
    first = objective.first_watched(plan.sizes, size, warmup)
    every, few = (
        Refined(dpo(1.0), 0.2, 0.5, Window(rule, 0.3, size, before_full), warmup, plan.steps, start)
        for start in (0, first)
    )
    rng, counted = np.random.default_rng(seed), 0
    for pairs in plan.sizes:
        logp, mixed, reference = rng.normal(size=(3, 2 * pairs))
        found = []
        for loss in (every, few):
            found.append(loss(batch_of(logp, reference, mixed if loss.extrapolation else ())))
        expected, outcome = found
        assert np.array_equal(outcome.coefficients, expected.coefficients)
        assert np.array_equal(outcome.metrics["softened"], expected.metrics["softened"])
        if every.active:
            assert few.extrapolation == 0.5
            assert np.array_equal(outcome.metrics["tau"], expected.metrics["tau"], equal_nan=True)
        elif not few.watching:
            assert np.isnan(outcome.metrics["extrapolated_margin"]).all()
            assert not outcome.metrics["noisy"].any()
        else:
            counted += pairs
        for loss, one in zip((every, few), found, strict=True):
            end_step(loss, one)
    ready = [step for step in range(plan.steps) if step >= warmup * plan.steps]
    before = sum(plan.sizes[: ready[0]]) if ready else 0
    last = plan.sizes[first] if first < plan.steps else 0
    assert counted >= min(size, before)
    assert counted < size + last, "no more than needed"


def test_without_an_active_step_nothing_is_extrapolated() -> None:
    """A warm-up as long as the training."""
    assert objective.first_watched([4, 4, 4], 50, 1.0) == 3
    assert objective.first_watched([4, 4, 2, 4, 4, 2], 5, 0.5) == 1, "the short batch of an epoch counts as it is"
    assert objective.first_watched([4, 4, 4], 50, 0.0) == 0
