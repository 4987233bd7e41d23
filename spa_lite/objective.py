"""The objective, written once for any array namespace `xp` (NumPy, torch, mlx), with the paper's equation numbers.

Everything is in terms of the *margin* of a pair: beta times the difference of the two log-ratios. All
log-probabilities are sums over response tokens, in nats. The functions at the top are pure and
differentiable; the classes at the bottom hold the little state that training needs (which step it is, which
margins were seen lately) and hand backends a loss and its derivative, so that no backend knows a loss.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from spa_lite.backend import Batch, Floats, Outcome, StepStats
from spa_lite.errors import RecipeError

if TYPE_CHECKING:
    from spa_lite.train import Example

Rule = Literal["paper", "official"]
BeforeFull = Literal["off", "zero"]


def margin(chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, beta: float) -> Any:
    """beta * [log pi(yw)/ref(yw) - log pi(yl)/ref(yl)], the argument of the sigmoid in Eq. 5 and Eq. 7."""
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


def log_sigmoid(x: Any, xp: Any = np) -> Any:
    """log(sigmoid(x)), finite for any finite x."""
    return -xp.logaddexp(-x, x * 0.0)


def preference(margin_: Any, xp: Any = np) -> Any:
    """p(yw beats yl) = sigmoid(margin): Eq. 5 with the DPO reference, Eq. 7 with pi_init."""
    return xp.exp(log_sigmoid(margin_, xp))


def dpo_loss(margin_: Any, xp: Any = np) -> Any:
    """-log p(yw beats yl): Eq. 6, the loss of the seed stage."""
    return -log_sigmoid(margin_, xp)


def refined_loss(margin_: Any, noisy: Any, alpha: float, xp: Any = np) -> Any:
    """Eq. 10: a flagged pair (noisy = 1) becomes a soft target of (1 - alpha, alpha). `noisy` is 0.0 or 1.0."""
    doubt = alpha * noisy
    return -(1.0 - doubt) * log_sigmoid(margin_, xp) - doubt * log_sigmoid(-margin_, xp)


def refined_slope(margin_: Any, noisy: Any, alpha: float, xp: Any = np) -> Any:
    """d refined_loss / d margin = sigmoid(margin) - (1 - alpha * noisy). No gradient flows through the flag."""
    return preference(margin_, xp) - (1.0 - alpha * noisy)


def extrapolate(policy_logits: Any, reference_logits: Any, lambda_: float) -> Any:
    """Eq. 11: per-token logits of a simulated, more aligned model. Needs a softmax over the vocabulary afterwards."""
    return (1.0 + lambda_) * policy_logits - lambda_ * reference_logits


def percentile_threshold(margins: Sequence[float], K: float) -> float:
    """The K-quantile with linear interpolation (Eq. 9: a pair is noisy if its margin is strictly below)."""
    return float(np.quantile(np.asarray(margins, dtype=np.float64), K))


def official_threshold(margins: Sequence[float], K: float) -> float:
    """The released code's rank rule: mean of the entries int(n*K) and int(n*K)+1, 0-based, of n ascending margins.

    One rank above the percentile: with K = 0.1 and n = 50 it lets 12 % through. Raises RecipeError where the
    released code would index past its window.
    """
    rank = int(len(margins) * K)
    if rank + 1 >= len(margins):
        raise RecipeError(
            f"refine.K={K:g} leaves the official rule no entry above rank {rank} of {len(margins)}; "
            "lower refine.K below 0.98 or use refine.rule=paper"
        )
    ordered = sorted(margins)
    return (ordered[rank] + ordered[rank + 1]) / 2


class Window:
    """The last `size` extrapolated margins, in data order, and the threshold tau they give.

    `before_full` says what tau is until the window is full: "off" gives none (nothing is flagged), "zero"
    gives 0, as the released code does.
    """

    def __init__(self, rule: Rule = "paper", K: float = 0.1, size: int = 50, before_full: BeforeFull = "off") -> None:
        self.rule, self.K, self.before_full = rule, K, before_full
        self.margins: deque[float] = deque(maxlen=size)

    @property
    def tau(self) -> float | None:
        """The threshold now; None while there is none."""
        if len(self.margins) < (self.margins.maxlen or 0):
            return 0.0 if self.before_full == "zero" else None
        rule = percentile_threshold if self.rule == "paper" else official_threshold
        return rule(list(self.margins), self.K)

    def noisy(self, margins: Floats, tau: float | None) -> Floats:
        """1.0 where a pair is taken for noise. At equality the paper says clean, the released code noisy."""
        if tau is None:
            return np.zeros_like(margins)
        flags = margins < tau if self.rule == "paper" else ~(margins > tau)
        return flags.astype(np.float64)

    def push(self, margins: Iterable[float]) -> None:
        """Add margins, oldest first; those that are not finite are left out."""
        self.margins.extend(float(m) for m in margins if math.isfinite(m))


def pair_places(batch: Batch) -> NDArray[np.int64]:
    """Where the chosen response of each row stands among all [rows]; the rejected one follows it, and then perhaps a
    third. Raises RecipeError unless every row holds two responses or three."""
    counts = np.bincount(batch.row)
    if not np.isin(counts, (2, 3)).all():
        raise RecipeError("a loss of pairs needs rows of two responses (a third may follow), chosen first")
    return np.cumsum(counts) - counts


def pair_coefficients(slope: Floats, beta: float) -> Floats:
    """d loss / d logp [responses] from d loss / d margin [rows]: +beta for the chosen, -beta for the rejected."""
    return np.stack([beta * slope, -beta * slope], axis=1).reshape(-1)


class PairLoss(Protocol):
    """A loss of pairs, chosen first: what `Plain` and `Refined` are made of. `spa_lite.losses` has them."""

    @property
    def reference(self) -> bool:
        """Whether log-probabilities under PREVIOUS are needed."""
        ...

    def margins(self, batch: Batch, logp: Floats) -> Floats:
        """Margins [rows] of rows whose responses have these log-probabilities [responses]."""
        ...

    def __call__(self, batch: Batch, doubt: Floats) -> tuple[Floats, Floats]:
        """Loss [rows], and d loss / d logp [responses]. `doubt` [rows]: how likely each label is taken to be wrong."""
        ...

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Look at the rows of an optimizer step."""
        ...

    def end_step(self, stats: StepStats) -> None:
        """Look at what came of it."""
        ...

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers between two steps, as plain values."""
        ...

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to what it remembered then."""
        ...


class Forgetful:
    """What looks at each batch alone: nothing is known beforehand, and nothing remembered."""

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Nothing to look at."""

    def end_step(self, stats: StepStats) -> None:
        """Nothing to count."""

    @property
    def memory(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """Nothing to go back to."""


class Plain:
    """A loss of pairs as it is; every label is taken to be wrong with probability `doubt`."""

    extrapolation = 0.0
    sequential = False

    def __init__(self, loss: PairLoss, doubt: float = 0.0) -> None:
        self.loss, self.reference, self.doubt = loss, loss.reference, doubt

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Hand the rows of a step on."""
        self.loss.begin_step(batch)

    def __call__(self, batch: Batch) -> Outcome:
        """Loss and coefficients of a batch of pairs."""
        m = self.loss.margins(batch, batch.logp)
        loss, coefficients = self.loss(batch, np.full_like(m, self.doubt))
        return Outcome(loss, coefficients, {"margin": m})

    def end_step(self, stats: StepStats) -> None:
        """Hand on what came of a step."""
        self.loss.end_step(stats)

    @property
    def memory(self) -> dict[str, Any]:
        """What the loss remembers."""
        return self.loss.memory

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to it."""
        self.loss.remember(memory)


class Dpo(Plain):
    """Plain DPO (Eq. 6) with reference PREVIOUS."""

    def __init__(self, beta: float = 0.1) -> None:
        from spa_lite.losses import dpo  # made of the functions above

        super().__init__(dpo(beta))


def first_watched(sizes: Sequence[int], window: int, warmup: float) -> int:
    """The first optimizer step (from 0) whose extrapolated margins can matter; `sizes` are the pairs of each step.

    That is the first of the last warm-up steps that together hold at least `window` pairs: with their margins the
    window is, when the warm-up is over, what it would be with those of all. Margins that are not finite never enter a
    window, so with such ones among these pairs it is shorter by as many, and full that much later.
    """
    step = next((step for step in range(len(sizes)) if step >= warmup * len(sizes)), len(sizes))
    if step == len(sizes):
        return step  # nothing is refined at all
    while step and window > 0:
        step -= 1
        window -= sizes[step]
    return step


class Refined:
    """A refined loss of pairs (of DPO: Eq. 10) with decoupled noise detection (Eq. 11, 12) and warm-up.

    The loss uses the policy's margin; only the flag uses the extrapolated one. Rule `paper`: tau is set once
    per optimizer step from earlier steps. Rule `official`: pair by pair. `total_steps` counts optimizer
    steps; refinement is off while completed steps < warmup * total_steps. Before step `first` (see `first_watched`)
    no margin is extrapolated, or looked at.
    """

    def __init__(
        self,
        loss: PairLoss,
        alpha: float,
        lambda_: float,
        window: Window,
        warmup: float,
        total_steps: int,
        first: int = 0,
    ) -> None:
        self.loss, self.alpha, self.lambda_, self.reference = loss, alpha, lambda_, loss.reference
        self.window, self.warmup, self.total_steps, self.first = window, warmup, total_steps, first
        self.step = 0

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Hand the rows of a step on."""
        self.loss.begin_step(batch)

    @property
    def sequential(self) -> bool:
        """The released rule looks at pairs one by one, in order."""
        return self.window.rule == "official"

    @property
    def watching(self) -> bool:
        """Whether the margins of this step can matter to a flag, now or later."""
        return self.alpha > 0 and self.step >= self.first

    @property
    def extrapolation(self) -> float:
        """lambda of Eq. 11, or 0 where no flag depends on this step."""
        return self.lambda_ if self.watching else 0.0

    @property
    def active(self) -> bool:
        """Whether this step refines: the warm-up is over."""
        return self.alpha > 0 and self.step >= self.warmup * self.total_steps

    def __call__(self, batch: Batch) -> Outcome:
        """Loss and coefficients of a batch of pairs: in any order, or (rule `official`) in data order."""
        m = self.loss.margins(batch, batch.logp)
        simulated = self._simulated(batch, m)
        noisy, taus = self._detect(simulated)
        alpha = self.alpha if self.active else 0.0
        loss, coefficients = self.loss(batch, alpha * noisy)
        return Outcome(
            loss,
            coefficients,
            {
                "margin": m,
                "extrapolated_margin": simulated,
                "noisy": noisy,
                "softened": noisy * (alpha > 0),  # flagged pairs whose target was really smoothed
                "tau": taus,
            },
        )

    def _simulated(self, batch: Batch, margins: Floats) -> Floats:
        """Extrapolated margins [rows]: the margins themselves where lambda is 0, nan where nobody looks at them."""
        if len(batch.extrapolated):
            return self.loss.margins(batch, batch.extrapolated)
        return margins if self.watching else np.full_like(margins, np.nan)

    def _detect(self, simulated: Floats) -> tuple[Floats, Floats]:
        """Flags and the tau each pair was compared with (nan: none). A pair never sees its own margin."""
        noisy, taus = np.zeros_like(simulated), np.full_like(simulated, np.nan)
        if not self.watching:
            return noisy, taus
        size = 1 if self.sequential else max(1, len(simulated))
        for start in range(0, len(simulated), size):
            some, tau = slice(start, start + size), self.window.tau
            noisy[some] = self.window.noisy(simulated[some], tau)
            taus[some] = np.nan if tau is None else tau
            if self.sequential:
                self.window.push(simulated[some])
        return noisy, taus

    def end_step(self, stats: StepStats) -> None:
        """Count the optimizer step, skipped or not; under rule `paper` its margins enter the window now."""
        if self.watching and not self.sequential:
            self.window.push(stats.metrics["extrapolated_margin"])
        self.loss.end_step(stats)
        self.step += 1

    @property
    def memory(self) -> dict[str, Any]:
        """Step and window between two steps: a checkpoint holds them, and what the loss remembers."""
        return {"step": self.step, "margins": list(self.window.margins), **self.loss.memory}

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to a step; margins of a step that was not finished are forgotten."""
        self.step = memory["step"]
        self.window.margins.clear()
        self.window.push(memory["margins"])
        self.loss.remember(memory)
