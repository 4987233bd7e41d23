"""One pair explained: what each token earned, every term of the loss with its number, and why it was flagged or not.

The arithmetic is that of `spa_lite.objective`; nothing here has a formula of its own. Where the numbers come from, a
run or any two models, is `spa_lite.explain_sources`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from spa_lite import objective
from spa_lite.carry import of_round
from spa_lite.credit import Credit
from spa_lite.figures import visible
from spa_lite.recipe import Recipe, for_round
from spa_lite.records import Ended, Message, Record


class Answer(Record, frozen=True, kw_only=True):
    """One of the two answers: its sums (nats, no beta) and the credit of its tokens, which may be unknown (empty)."""

    letter: str
    text: str
    ended: Ended
    tokens: int
    policy: float
    reference: float
    credits: tuple[Credit, ...] = ()

    @property
    def logratio(self) -> float:
        """log pi/pi_ref of the answer."""
        return self.policy - self.reference

    @property
    def running(self) -> list[float]:
        """The log-ratio so far, from before the first token on: one more than there are tokens."""
        return list(accumulate((c.logratio for c in self.credits), initial=0.0))


class Term(Record, frozen=True, kw_only=True):
    """One number of the method beside its formula. A term of each answer has two values, one of the pair `value`."""

    name: str
    formula: str
    where: str
    chosen: float | None = None
    rejected: float | None = None
    value: float | None = None
    digits: int = 4

    def shown(self, which: str) -> str:
        """One of the values as text, or a dash; a small one with its power of ten."""
        value = getattr(self, which)
        if value is None:
            return "–"
        return f"{value:.1e}" if 0 < abs(value) < 10.0**-self.digits else f"{value:.{self.digits}f}"


class Trained(Record, frozen=True, kw_only=True):
    """What training made of the pair, or would. None is not known, or not there.

    `window` counts the margins that the threshold stands on; `softened` says that the target was really changed.
    """

    margin: float | None = None
    extrapolated: float | None = None
    tau: float | None = None
    window: int = 0
    softened: bool | None = None
    step: int | None = None
    steps: int | None = None


class Explanation(Record, frozen=True, kw_only=True):
    """Everything there is to show of one pair. `policy` and `reference` say in words whose probabilities these are."""

    source: str
    row: int
    id: str
    messages: tuple[Message, ...]
    policy: str
    reference: str
    labelled_by: str
    chosen: Answer
    rejected: Answer
    judged: tuple[Term, ...]
    trained: tuple[Term, ...]
    flagged: bool | None
    why: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The log-ratio (nats) of full colour: 95 % of the tokens have less."""
        sizes = [abs(c.logratio) for answer in (self.chosen, self.rejected) for c in answer.credits]
        return float(np.quantile(sizes, 0.95)) if sizes else 0.0

    def telling(self, count: int = 8) -> list[tuple[str, int, Credit]]:
        """The tokens that moved the margin most: (chosen or rejected, place from 1, credit)."""
        found = [(name, place, one) for name, answer in _answers(self) for place, one in enumerate(answer.credits, 1)]
        return sorted(found, key=lambda item: -abs(item[2].logratio))[:count]


# --- terms and words ----------------------------------------------------------------------------------------------


def judged_terms(chosen: Answer, rejected: Answer, beta: float) -> tuple[Term, ...]:
    """From log-probabilities to the judge's probability."""
    m = float(objective.margin(chosen.policy, rejected.policy, chosen.reference, rejected.reference, beta))
    return (
        _both("log π(y|x)", "Σ log π(yₜ | x, y₁…yₜ₋₁)", "sum over tokens", chosen.policy, rejected.policy),
        _both(
            "log π_ref(y|x)", "the same under the reference", "sum over tokens", chosen.reference, rejected.reference
        ),
        _both("log-ratio r", "log π(y|x) − log π_ref(y|x)", "Eq. 7", chosen.logratio, rejected.logratio),
        _both("implicit reward", f"β r, β = {beta:g}", "Eq. 7", beta * chosen.logratio, beta * rejected.logratio),
        Term(name="margin m", formula="β (r_w − r_l)", where="Eq. 7", value=m),
        Term(name="p(y_w ≻ y_l)", formula="σ(m)", where="Eq. 7", value=float(objective.preference(np.float64(m)))),
    )


def _both(name: str, formula: str, where: str, chosen: float, rejected: float) -> Term:
    return Term(name=name, formula=formula, where=where, chosen=chosen, rejected=rejected)


def trained_terms(seen: Trained, recipe: Recipe, round_: int) -> tuple[Term, ...]:
    """From the margin in training to the gradient. A term whose number is not known has no value."""
    f, m = recipe.refine, None if seen.margin is None else np.float64(seen.margin)
    if not is_dpo(recipe):
        return (_pair("margin m", f"as loss={recipe.loss.kind} has it", "docs/losses.md", seen.margin),)
    beta = of_round(recipe.loss.round_betas, round_, recipe.loss.beta)
    lambda_, z = for_round(recipe, round_), noisy(seen, recipe)
    doubt = None if seen.softened is None else float(seen.softened)
    slope = None if m is None or doubt is None else np.array([objective.refined_slope(m, doubt, f.alpha)])
    pull = None if slope is None else objective.pair_coefficients(slope, beta)
    loss = None if m is None or doubt is None else float(objective.refined_loss(m, doubt, f.alpha))
    terms = (
        _pair("margin m", "β (log π_θ/π_ref(y_w) − log π_θ/π_ref(y_l))", "Eq. 5", seen.margin),
        _pair("p_θ(y_w ≻ y_l)", "σ(m)", "Eq. 5", None if m is None else float(objective.preference(m))),
        _pair("DPO loss", "−log σ(m)", "Eq. 6", None if m is None else float(objective.dpo_loss(m))),
        _pair("extrapolated margin m*", f"m of (1+λ) h_θ − λ h_ref, λ = {lambda_:g}", "Eq. 11", seen.extrapolated),
        _pair("threshold τ", _threshold_in_words(recipe), "Eq. 9", seen.tau),
        _pair("flag z", "1 if m* < τ" if f.rule == "paper" else "1 unless m* > τ", "Eq. 9, 12", z, digits=0),
        _pair("refined loss", f"−(1−αz) log σ(m) − αz log σ(−m), α = {f.alpha:g}", "Eq. 10", loss),
        _pair("d loss / d m", "σ(m) − (1 − αz)", "Eq. 10", None if slope is None else float(slope[0])),
        Term(
            name="d loss / d log π_θ(y)",
            formula="±β d loss / d m",
            where="Eq. 10",
            chosen=None if pull is None else float(pull[0]),
            rejected=None if pull is None else float(pull[1]),
        ),
    )  # fmt: skip
    of_flags = {"extrapolated margin m*", "threshold τ", "flag z", "refined loss"}
    return terms if refines(recipe) else tuple(term for term in terms if term.name not in of_flags)


def is_dpo(recipe: Recipe) -> bool:
    """Whether a round trains by DPO, refined or plain: what the terms here tell of."""
    x = recipe.loss
    return x.kind == "dpo" and not (x.nll or x.optimism) and recipe.noise.by in {"quantile", "none"}


def refines(recipe: Recipe) -> bool:
    """Whether pairs may be flagged as noise."""
    return recipe.noise.by == "quantile"


def _pair(name: str, formula: str, where: str, value: float | None, digits: int = 4) -> Term:
    return Term(name=name, formula=formula, where=where, value=value, digits=digits)


def _threshold_in_words(recipe: Recipe) -> str:
    f = recipe.refine
    rank = f"quantile K = {f.K:g}" if f.rule == "paper" else f"two entries from rank {f.K:g} × {f.window} on, mean"
    return f"{rank} of the last {f.window} m*"


def noisy(seen: Trained, recipe: Recipe) -> float | None:
    """z of Eq. 9: whether the pair is taken for noise, warm-up or not. None where that cannot be known."""
    if not recipe.refine.alpha or not refines(recipe):
        return 0.0
    if seen.softened:
        return 1.0
    if seen.extrapolated is None:
        return 0.0 if seen.step is not None and seen.tau is None else None
    window = objective.Window(recipe.refine.rule, recipe.refine.K, recipe.refine.window)
    return float(window.noisy(np.array([seen.extrapolated]), seen.tau)[0])


def reasons(seen: Trained, recipe: Recipe) -> tuple[str, ...]:
    """Why the pair was flagged or not, in sentences."""
    f, z, would = recipe.refine, noisy(seen, recipe), seen.step is None
    if not refines(recipe):
        other = "" if is_dpo(recipe) else f" The terms of loss={recipe.loss.kind} are in docs/losses.md."
        return (f"Not flagged: with noise={recipe.noise.by} no pair is.{other}",)
    if not f.alpha:
        return ("Not flagged: refinement is off (refine.alpha = 0).",)
    if seen.tau is None and seen.extrapolated is None and seen.step is None:
        return ("Whether it would be flagged is not known: there is no extrapolated margin.",)
    if seen.tau is None and seen.extrapolated is None and seen.margin is not None:
        return (
            f"Not flagged: this was in the warm-up, the first {f.warmup:.0%} of the steps, and before its last steps, "
            "whose margins fill the window.",
        )
    if seen.tau is None:
        return (
            f"Not flagged: the window is not full, so nothing is flagged. A threshold needs {f.window} margins, and "
            f"{seen.window} came before this pair.",
        )
    if seen.extrapolated is None:
        verdict = "Flagged: the run" if seen.softened else "Not flagged: the run"
        return (f"{verdict} says so, but it kept no margins per pair: it was made by an older version.",)
    kept = (
        f"its extrapolated margin {seen.extrapolated:.4f} is {'below' if z else 'not below'} the threshold "
        f"{seen.tau:.4f} ({_threshold_in_words(recipe)})."
    )
    if not z:
        return (f"Not flagged: {kept}",)
    p = float(objective.preference(np.float64(seen.extrapolated)))
    doubt = f"A simulated, more aligned model gives this label a probability of {p:.4f} only."
    if seen.softened:
        was = "would be" if would else "was"
        return (
            f"{'It would be flagged' if would else 'Flagged'}: {kept}",
            doubt,
            f"So its target {was} softened from (1, 0) to ({1 - f.alpha:g}, {f.alpha:g}): its loss is the clean "
            "one plus α m, and it pulls less on the answers.",
        )
    return (
        f"Taken for noise, but not softened: {kept}",
        f"Step {seen.step} of {seen.steps} lies in the warm-up (the first {f.warmup:.0%} of the steps), in which no "
        "target is softened.",
    )


# --- as a page ----------------------------------------------------------------------------------------------------


def html(explanation: Explanation) -> str:
    """The explanation as one page that needs nothing else: no network, no scripts. All text is escaped, and its control
    characters are shown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def plain(value: Any) -> Any:
        is_text = isinstance(value, str) and not hasattr(value, "__html__")  # what a macro made is a page already
        return visible(value, keep="\n\t\u00a0") if is_text else value

    loader = PackageLoader("spa_lite", "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=plain, trim_blocks=True)
    return pages.get_template("explain.html").render(e=explanation, lines=running_lines(explanation)).lstrip()


def running_lines(explanation: Explanation) -> dict[str, Any]:
    """The running sums as points of a 100 x 100 box that both answers share, and the values at its edges."""
    sums = {name: answer.running for name, answer in _answers(explanation)}
    values = [value for line in sums.values() for value in line]
    low, high = min(values), max(values)
    longest, room = max(len(line) for line in sums.values()) - 1, (high - low) or 1.0

    def points(line: list[float]) -> str:
        return " ".join(
            f"{100 * i / max(1, longest):.2f},{100 * (high - value) / room:.2f}" for i, value in enumerate(line)
        )

    drawn = {name: points(line) for name, line in sums.items()}
    return {"points": drawn, "low": low, "high": high, "zero": 100 * high / room, "tokens": longest}


def _answers(explanation: Explanation) -> list[tuple[str, Answer]]:
    return [("chosen", explanation.chosen), ("rejected", explanation.rejected)]
