"""Axis `loss`: preference losses, each once, for any array namespace `xp` (NumPy, torch, mlx).

Most are made of a *score* s of each response and a *link* phi of the difference between two (a margin):

    m = beta * (s(chosen) - s(rejected))
    L = (1 - doubt) * phi(m - gamma) + doubt * phi(gamma - m)  +  nll * -log pi(chosen) / |chosen|

the others look at each response by itself, and in doubt they are taken with chosen and rejected exchanged. A loss gives
its value per pair and its derivative by the log-probability of either response; a test compares every derivative with
finite differences. Log-probabilities are sums over response tokens, in nats; lengths are in tokens, the end of turn
included. docs/losses.md has the formulas, sources and defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spa_lite.backend import Batch, Floats, StepStats
from spa_lite.errors import RecipeError
from spa_lite.objective import Forgetful, log_sigmoid, pair_places, refined_loss, refined_slope

if TYPE_CHECKING:
    from spa_lite.recipe import LossSettings, Recipe
    from spa_lite.train import Example

Valued = tuple[Any, Any]
"""A value and its derivative."""


class Response(NamedTuple):
    """One side of some pairs: log-probabilities under policy and reference, and lengths, each [rows]."""

    logp: Any
    reference: Any
    tokens: Any


class Slopes(NamedTuple):
    """A loss per pair [rows], its derivatives by log pi(chosen) and log pi(rejected), and the margin between them,
    positive where the chosen answer is ahead: a target (gamma) or a penalty is no part of it."""

    loss: Any
    chosen: Any
    rejected: Any
    margin: Any


Loss = Callable[[Response, Response, Any, Any], Slopes]
"""Of (chosen, rejected, doubt, xp). `doubt`, [rows] or one number, is the probability that a label is wrong."""
Score = Callable[[Response, Any], Valued]
Link = Callable[[Any, Any, Any], Valued]
"""Of (margin, doubt, xp)."""


# --- scores -----------------------------------------------------------------------------------------------------------


def ratio(y: Response, xp: Any) -> Valued:
    """log pi / ref: DPO (2305.18290)."""
    return y.logp - y.reference, xp.ones_like(y.logp)


def mean_ratio(y: Response, xp: Any) -> Valued:
    """The same per token: length-normalised DPO (Tulu 3, 2411.15124), and IPO as it is used."""
    return (y.logp - y.reference) / y.tokens, 1.0 / y.tokens


def likelihood(y: Response, xp: Any) -> Valued:
    """log pi, without a reference: CPO (2401.08417)."""
    return y.logp, xp.ones_like(y.logp)


def mean_likelihood(y: Response, xp: Any) -> Valued:
    """The same per token: SimPO (2405.14734)."""
    return y.logp / y.tokens, 1.0 / y.tokens


def log_odds(y: Response, xp: Any) -> Valued:
    """log p / (1 - p), p the geometric mean of the token probabilities: ORPO (2403.07691, Eq. 4)."""
    mean = y.logp / y.tokens
    rest = -xp.expm1(mean)
    return mean - xp.log(rest), 1.0 / (rest * y.tokens)


# --- links ------------------------------------------------------------------------------------------------------------


def logistic(m: Any, doubt: Any, xp: Any) -> Valued:
    """-log sigmoid(m); in doubt that is cDPO's, which the refined loss (Eq. 10) is pair by pair."""
    return refined_loss(m, doubt, 1.0, xp), refined_slope(m, doubt, 1.0, xp)


def doubted(link: Callable[[Any, Any], Valued]) -> Link:
    """The expected value of a link where labels may be wrong."""

    def expected(m: Any, doubt: Any, xp: Any) -> Valued:
        (right, falling), (wrong, rising) = link(m, xp), link(-m, xp)
        return (1.0 - doubt) * right + doubt * wrong, (1.0 - doubt) * falling - doubt * rising

    return expected


@doubted
def hinge(m: Any, xp: Any) -> Valued:
    """max(0, 1 - m): SLiC's, on DPO's score (2309.06657)."""
    zero = m * 0.0
    return xp.maximum(1.0 - m, zero), xp.where(m < 1.0, zero - 1.0, zero)


def squared(tau: float) -> Link:
    """(m / tau - 1 / (2 tau))^2 of m = tau * (difference): IPO (2310.12036, Eq. 17)."""

    @doubted
    def link(m: Any, xp: Any) -> Valued:
        off = (m - 0.5) / tau
        return off * off, 2.0 * off / tau

    return link


@doubted
def utility(h: Any, xp: Any) -> Valued:
    """1 - sigmoid(h): KTO's loss of one response that is h better (or, undesirable, worse) than usual."""
    p = xp.exp(log_sigmoid(h, xp))
    return 1.0 - p, -p * (1.0 - p)


# --- losses -----------------------------------------------------------------------------------------------------------


def of_difference(score: Score, link: Link, beta: float, gamma: float = 0.0) -> Loss:
    """The losses that see nothing but the difference of two scores."""

    def loss(chosen: Response, rejected: Response, doubt: Any, xp: Any) -> Slopes:
        (best, up), (worst, down) = score(chosen, xp), score(rejected, xp)
        m = beta * (best - worst)
        value, slope = link(m - gamma, doubt, xp)
        return Slopes(value, beta * slope * up, -beta * slope * down, m)

    return loss


def exchanged(loss: Callable[[Response, Response, Any], Slopes]) -> Loss:
    """A loss that sees more than a difference; where the label is wrong, it is that of the two exchanged."""

    def expected(chosen: Response, rejected: Response, doubt: Any, xp: Any) -> Slopes:
        right, wrong = loss(chosen, rejected, xp), loss(rejected, chosen, xp)
        sure = 1.0 - doubt
        return Slopes(
            sure * right.loss + doubt * wrong.loss,
            sure * right.chosen + doubt * wrong.rejected,
            sure * right.rejected + doubt * wrong.chosen,
            right.margin,
        )

    return expected


def orpo(weight: float) -> Loss:
    """weight * -log sigmoid(log-odds ratio); its other half is the negative log-likelihood (`loss.nll` = 1)."""
    plain = of_difference(log_odds, logistic, 1.0)

    def loss(chosen: Response, rejected: Response, doubt: Any, xp: Any) -> Slopes:
        found = plain(chosen, rejected, doubt, xp)
        return Slopes(weight * found.loss, weight * found.chosen, weight * found.rejected, found.margin)

    return loss


def apo_zero(beta: float) -> Loss:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): APO-zero (2408.06266, Eq. 7)."""

    @exchanged
    def loss(chosen: Response, rejected: Response, xp: Any) -> Slopes:
        (best, up), (worst, down) = ratio(chosen, xp), ratio(rejected, xp)
        p, q = (xp.exp(log_sigmoid(beta * r, xp)) for r in (best, worst))
        return Slopes(1.0 - p + q, -beta * p * (1.0 - p) * up, beta * q * (1.0 - q) * down, beta * (best - worst))

    return loss


def sppo(beta: float) -> Loss:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: SPPO with hard labels (2405.00675, Eq. 4.7)."""

    @exchanged
    def loss(chosen: Response, rejected: Response, xp: Any) -> Slopes:
        (best, up), (worst, down) = ratio(chosen, xp), ratio(rejected, xp)
        one, two = best - 0.5 / beta, worst + 0.5 / beta
        return Slopes(one * one + two * two, 2.0 * one * up, 2.0 * two * down, beta * (best - worst))

    return loss


def dpop(beta: float, weight: float) -> Loss:
    """-log sigmoid(beta (r_w - r_l - weight * max(0, -r_w))): DPO-positive (2402.13228, Eq. 3)."""

    @exchanged
    def loss(chosen: Response, rejected: Response, xp: Any) -> Slopes:
        (best, up), (worst, down) = ratio(chosen, xp), ratio(rejected, xp)
        lost = xp.where(best < 0.0, best * 0.0 + 1.0, best * 0.0)
        value, slope = logistic(beta * (best - worst + weight * lost * best), 0.0, xp)
        pull = beta * slope * (1.0 + weight * lost)
        return Slopes(value, pull * up, -beta * slope * down, beta * (best - worst))

    return loss


def kto(beta: float, kl: Callable[[], float] = lambda: 0.0) -> Loss:
    """1 - sigmoid(beta r_w - kl) + 1 - sigmoid(kl - beta r_l): KTO (2402.01306) of a pair taken apart, with
    equal weights. `kl` gives beta times an estimate of KL(policy, reference), without gradient."""

    def loss(chosen: Response, rejected: Response, doubt: Any, xp: Any) -> Slopes:
        (best, up), (worst, down), usual = ratio(chosen, xp), ratio(rejected, xp), kl()
        one, rising = utility(beta * best - usual, doubt, xp)
        two, falling = utility(usual - beta * worst, doubt, xp)
        return Slopes(one + two, beta * rising * up, -beta * falling * down, beta * (best - worst))

    return loss


def with_nll(loss: Loss, weight: float) -> Loss:
    """A loss with the chosen answer's negative log-likelihood per token beside it: DPO + NLL (2404.19733). Doubt does
    not reach that term."""
    if not weight:
        return loss

    def both(chosen: Response, rejected: Response, doubt: Any, xp: Any) -> Slopes:
        found, (value, slope) = loss(chosen, rejected, doubt, xp), mean_likelihood(chosen, xp)
        return found._replace(loss=found.loss - weight * value, chosen=found.chosen - weight * slope)

    return both


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One loss: how it is made, the settings `loss.*` that it reads (its beta first), whether it needs a reference, and
    the weight of its likelihood term where the recipe leaves that to it."""

    make: Callable[[LossSettings], Loss]
    reads: tuple[str, ...]
    reference: bool = True
    nll: float = 0.0


KINDS = {
    "dpo": Kind(lambda s: of_difference(ratio, logistic, s.beta), ("beta",)),
    "ipo": Kind(lambda s: of_difference(mean_ratio, squared(s.tau), s.tau), ("tau",)),
    "hinge": Kind(lambda s: of_difference(ratio, hinge, s.beta), ("beta",)),
    "dpo-norm": Kind(lambda s: of_difference(mean_ratio, logistic, s.norm_beta), ("norm_beta",)),
    "dpop": Kind(lambda s: dpop(s.beta, s.dpop_weight), ("beta", "dpop_weight")),
    "apo-zero": Kind(lambda s: apo_zero(s.beta), ("beta",)),
    "kto": Kind(lambda s: kto(s.beta), ("beta",)),
    "sppo": Kind(lambda s: sppo(s.sppo_beta), ("sppo_beta",)),
    "simpo": Kind(
        lambda s: of_difference(mean_likelihood, logistic, s.simpo_beta, s.gamma), ("simpo_beta", "gamma"), False
    ),
    "cpo": Kind(lambda s: of_difference(likelihood, logistic, s.beta), ("beta",), False, nll=1.0),
    "orpo": Kind(lambda s: orpo(s.orpo_weight), ("orpo_weight",), False, nll=1.0),
}
"""Every loss by the name that a recipe gives it."""

NEEDS_REFERENCE = frozenset(name for name, kind in KINDS.items() if kind.reference)
"""The losses that compare the policy with something. Only they can be optimistic."""

USES: dict[str, tuple[str, ...]] = {
    name: tuple(
        f"loss.{field}"
        for field in (*kind.reads, "nll", "round_betas", *(("optimism",) if name in NEEDS_REFERENCE else ()))
    )
    for name, kind in KINDS.items()
}
"""The settings of the group `loss` that change anything under each loss, beside its name."""


def pair_loss(recipe: Recipe, round_: int = 0) -> Pairs:
    """The loss that a recipe asks for in a round, counted from 1; 0: before the rounds."""
    s = settings_in(recipe, round_)
    kind = KINDS[s.kind]
    nll = kind.nll if s.nll is None else s.nll
    optimism = s.optimism * getattr(s, kind.reads[0]) if kind.reference else 0.0
    if s.kind == "kto":
        return Kto(s.beta, nll, optimism)
    return Pairs(with_nll(kind.make(s), nll), kind.reference, optimism)


def settings_in(recipe: Recipe, round_: int) -> LossSettings:
    """The group `loss` as it is in a round: `round_betas` takes the place of the loss's own beta."""
    s, betas = recipe.loss, recipe.loss.round_betas
    if not betas or not round_:
        return s
    now: dict[str, Any] = {KINDS[s.kind].reads[0]: betas[min(round_, len(betas)) - 1]}
    return replace(s, **now)


def dpo(beta: float) -> Pairs:
    """Plain DPO."""
    return Pairs(of_difference(ratio, logistic, beta))


class Pairs(Forgetful):
    """A loss as training takes it: of flat arrays over responses, chosen first, then rejected, then perhaps a third.

    `optimism`, alpha * beta of SELM (2405.19332), takes likelihood off the third: + optimism * log pi / ref.
    """

    def __init__(self, loss: Loss, reference: bool = True, optimism: float = 0.0) -> None:
        self.loss, self.reference, self.optimism = loss, reference, optimism

    def margins(self, batch: Batch, logp: Floats) -> Floats:
        """beta times the differences of scores."""
        return np.asarray(self._slopes(batch, logp, 0.0).margin, dtype=np.float64)

    def __call__(self, batch: Batch, doubt: Floats) -> tuple[Floats, Floats]:
        """Loss [rows] and d loss / d logp [responses]."""
        chosen, found = pair_places(batch), self._slopes(batch, batch.logp, doubt)
        coefficients = np.zeros_like(batch.logp)
        coefficients[chosen], coefficients[chosen + 1] = found.chosen, found.rejected
        if not self.optimism:
            return np.asarray(found.loss), coefficients
        if len(batch.row) != 3 * len(chosen):
            raise RecipeError("loss.optimism needs rows of three responses: judge with it set, or leave it out")
        third = chosen + 2
        coefficients[third] = self.optimism
        return found.loss + self.optimism * (batch.logp[third] - batch.reference[third]), coefficients

    def _slopes(self, batch: Batch, logp: Floats, doubt: Any) -> Slopes:
        reference = batch.reference if self.reference else np.full_like(logp, np.nan)
        first = pair_places(batch)
        chosen, rejected = (Response(logp[k], reference[k], batch.tokens[k]) for k in (first, first + 1))
        return self.loss(chosen, rejected, doubt, np)


class Kto(Pairs):
    """KTO, of pairs taken apart or of single answers that are desirable or not.

    Its estimate of KL(policy, reference) is one step old: beta times the mean log-ratio of all responses of the step
    before, or 0 where that is negative. (The paper scores answers to other prompts for it, which costs a pass more.)
    """

    def __init__(self, beta: float, nll: float = 0.0, optimism: float = 0.0) -> None:
        super().__init__(with_nll(kto(beta, lambda: self.kl), nll), True, optimism)
        self.beta, self.nll, self.kl = beta, nll, 0.0
        self.desirable: Sequence[bool | None] = ()

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Which answers are desirable, where they come alone."""
        self.desirable = [example.desirable for example in batch]

    def end_step(self, stats: StepStats) -> None:
        """The estimate of the next step. A step that was skipped leaves it as it is."""
        mean = self.beta * float(np.mean(stats.logp - stats.reference))
        if not stats.skipped and np.isfinite(mean):
            self.kl = max(0.0, mean)

    @property
    def memory(self) -> dict[str, Any]:
        """The estimate."""
        return {"kl": self.kl}

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to it."""
        self.kl = memory["kl"]

    def margins(self, batch: Batch, logp: Floats) -> Floats:
        """beta times the difference of log-ratios; of a single answer, by how much it is on its own side of `kl`."""
        return super().margins(batch, logp) if _paired(batch) else self._sign(batch) * self._above(batch, logp)

    def __call__(self, batch: Batch, doubt: Floats) -> tuple[Floats, Floats]:
        """Loss [rows] and d loss / d logp [responses]."""
        if _paired(batch):
            return super().__call__(batch, doubt)
        sign = self._sign(batch)
        loss, slope = utility(sign * self._above(batch, batch.logp), doubt, np)
        likely = self.nll * (sign > 0) / batch.tokens
        return loss - likely * batch.logp, self.beta * sign * slope - likely

    def _above(self, batch: Batch, logp: Floats) -> Floats:
        return self.beta * (logp - batch.reference) - self.kl

    def _sign(self, batch: Batch) -> Floats:
        labels = [self.desirable[place] for place in batch.index] if self.desirable else [None]
        if None in labels:
            raise RecipeError("kto of single answers needs a label for each: give records of prompt, completion, label")
        return np.array([1.0 if label else -1.0 for label in labels])


def _paired(batch: Batch) -> bool:
    return len(batch.row) > len(batch.index)
