"""How long a run will take, from its arithmetic: what every stage passes through the model, and what a machine does per
second. Everything is in bytes, FLOP and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa_lite import carry, guards
from spa_lite.backend import Batching
from spa_lite.estimate import Longest, longest_of
from spa_lite.recipe import Recipe
from spa_lite.shape import Shape
from spa_lite.train import reference_of

SPEED_SECONDS = 0.3
EFFICIENCY = 0.5
"""Share of a matrix product's speed that whole stages reach: seven runs on a CPU reached 0.3 to 0.8."""
RESCORED = {"always": 1.0, "check": 0.02, "never": 0.0}
"""Share of the sampled answers that the judge scores under the policy again, by `judge.rescore`."""
REPLY = 150
"""Tokens of a grade with its reasons (self-rubric): a guess."""


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic of one stage."""

    flop: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Speed:
    """What a machine does per second: FLOP of matrix products, and bytes read."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Passes:
    """What it takes to pass texts through a model. A token costs two FLOP per parameter that it passes, and attention
    two per layer, width and place. `width`: bytes per weight."""

    shape: Shape
    sizes: Batching
    width: int

    @property
    def read(self) -> float:
        """Bytes of the weights, read once."""
        return self.shape.parameters * self.width

    def forward(
        self,
        rows: float,
        prompt: int,
        n: int,
        answer: int,
        at_once: int,
        times: float = 1,
        head: float | None = None,
    ) -> Work:
        """A pass over rows of a prompt with n answers. `head`: how often the head is passed, if not as often."""
        s, line = self.shape, prompt + n * answer
        body = 2 * s.body * line + 2 * s.layers * s.queries * (prompt**2 + n * answer * (2 * prompt + answer))
        heads = 2 * s.vocabulary * s.hidden * n * answer
        flop = rows * (times * body + (times if head is None else head) * heads)
        return Work(flop, times * self.read * rows * line / max(line, at_once))

    def scoring(self, rows: float, prompt: int, n: int, answer: int, times: float = 1) -> Work:
        """Log-probabilities of answers."""
        return self.forward(rows, prompt, n, answer, self.sizes.score_tokens, times)

    def training(self, rows: float, prompt: int, n: int, answer: int, reference: float) -> Work:
        """Policy and the gradient of what flows, some layers once more, and (a share of the steps) the reference."""
        again = min(1.0, self.sizes.checkpointed / self.shape.layers)
        return self.forward(rows, prompt, n, answer, self.sizes.micro_tokens, 2 + again + reference, 2 + reference)

    def decode(self, count: float, prompt: int, n: int, answer: int) -> Work:
        """n answers to each of so many prompts, token by token."""
        s, sizes = self.shape, self.sizes
        steps, tokens = count / max(1, sizes.sample) * answer, count * n * answer
        attention = 4 * s.layers * s.queries * (prompt + answer / 2)
        places = 2 * s.layers * s.keys * self.width * (prompt + answer / 2)
        reading = self.forward(count, prompt, 1, 0, sizes.sample * prompt)
        return reading + Work(
            tokens * (2 * (s.body + s.vocabulary * s.hidden) + attention), steps * self.read + tokens * places
        )


def work(
    shape: Shape,
    recipe: Recipe,
    sizes: Batching,
    prompts: int,
    pairs: int,
    held_out: int,
    *,
    longest: Longest | None = None,
    width: int = 4,
    answered: int = 0,
) -> dict[str, Work]:
    """Work of a whole run by kind of stage, in the order of a round.

    `prompts`: over all rounds, given or written; `pairs`: labelled; `held_out`: labelled pairs that are measured after
    every stage, `answered`: prompts that are answered there. `longest` should be typical lengths here: what a run takes
    grows with the mean, not the maximum. A judge that is a model of its own (reward-model, openai) is not in it.
    """
    r, longest = recipe, longest or longest_of(recipe, shape)
    prompt, answer = longest.prompt, longest.answer
    human = max(1, (longest.row - prompt) // 2)  # tokens of an answer of a labelled pair
    passes, asked = Passes(shape, sizes, width), prompts if r.rounds else 0
    nothing = Work(0.0, 0.0)

    def taught(rows: float, prompt: int, answer: int) -> Work:
        """SFT on so many answers."""
        return passes.training(rows * r.sft.epochs, prompt, 1, answer, 0)

    seed, written, told = nothing, nothing, nothing
    if not r.inputs.no_seed_pairs and r.seed_dpo.by == "dpo":
        seed = passes.training(pairs * r.seed_dpo.epochs, prompt, 2, human, 1)
    elif not r.inputs.no_seed_pairs and r.seed_dpo.by == "sft":
        seed = taught(pairs, prompt, human)
    if guards.is_written(r):
        control = r.rounds * r.prompts.control if r.prompts.source == "persona" else 0
        written = passes.decode(asked + min(control, asked), prompt, 1, r.prompts.max_tokens)
        told = taught(pairs, prompt, min(prompt, r.prompts.max_tokens)) if r.prompts.generator else nothing
    improver = nothing
    if asked and "improve" in r.candidates.kinds:
        drafts = passes.decode(pairs * r.rounds, prompt, 1, answer)
        improver = drafts + taught(pairs * r.rounds, prompt + answer, human)
    responses = 3 if r.loss.optimism else 2
    return {
        "seed": seed,
        "generator": told,
        "prompts": written,
        "improver": improver,
        "sample": _sampling(passes, r, asked, prompt, answer),
        "judge": _judging(passes, r, asked, prompt, answer),
        "train": passes.training(rows_trained_on(r, asked), prompt, responses, answer, reference_passes(r)),
        "measure": passes.scoring(held_out, prompt, 2, human, 2 * measured(r))
        + passes.decode(answered * (measured(r) + 1), prompt, 1, answer),
    }


def _sampling(passes: Passes, recipe: Recipe, asked: float, prompt: int, answer: int) -> Work:
    """The candidates that a model answers. An improvement is a draft, and an answer to a prompt with that draft."""
    total = Work(0.0, 0.0)
    for kind in recipe.candidates.kinds:
        if kind not in {"gold", "pair"}:
            total += passes.decode(asked, prompt, recipe.sampling.n if kind == "sample" else 1, answer)
        if kind == "improve":
            total += passes.decode(asked, prompt + answer, 1, answer)
    return total


def _judging(passes: Passes, recipe: Recipe, asked: float, prompt: int, answer: int) -> Work:
    """Log-probabilities of all candidates under policy and reference, and the questions of a judge that is asked."""
    r, n = recipe, guards.answers_per_prompt(recipe)
    known = set(r.candidates.kinds) <= {"sample", "greedy"}  # what was not drawn from the policy is scored under it
    own = RESCORED[r.judge.rescore] if known else 1.0
    itself = guards.starts_at_init(r) and not r.inputs.init_model and r.rounds > 0
    other = 0.0 if r.judge.reference == "none" else 1 - 1 / r.rounds if itself else 1.0
    total = passes.scoring(asked, prompt, n, answer, own + other)
    orders = n * (n - 1) / 2 * (2 if r.judge.swap else 1)
    for by in {r.judge.by, r.pairing.gap_judge}:
        if by == "self-pair":
            total += passes.scoring(asked * orders, prompt + 2 * answer, 1, 1)
        elif by == "self-score":
            total += passes.scoring(asked * n, prompt + answer, 1, 1)
        elif by == "self-rubric":
            reply = REPLY if r.inputs.model else 1  # the built-in model was taught to say a number
            total += passes.decode(asked * n, prompt + answer, r.judge.tries, reply)
    return total


def rows_trained_on(recipe: Recipe, asked: float) -> float:
    """Pairs that pass through training over all rounds, those of earlier rounds again: every pair is taken to be used,
    and every round to be of the same size."""
    piles = sum(len(carry.rounds_trained_on(recipe, i)) for i in range(1, recipe.rounds + 1))
    return recipe.train.epochs * asked * piles / max(1, recipe.rounds)


def measured(recipe: Recipe) -> int:
    """How many policies are measured beside pi_init."""
    start = 0 if guards.starts_at_init(recipe) and not recipe.inputs.init_model else 1
    return start + recipe.rounds if recipe.measure.every == "round" else 1


def reference_passes(recipe: Recipe) -> float:
    """Share of a round's steps that pass the reference: all, unless the judge's sums are the reference's. Then it is
    needed by those that extrapolate, unless its states are kept on disk."""
    r, compares = recipe, reference_of(recipe)
    if compares == "none":
        return 0.0
    if compares == "init" or r.loss.optimism or (r.carry.data != "fresh" and r.rounds > 1):
        return 1.0
    if r.noise.by != "quantile" or not r.refine.alpha or not r.refine.lambda_ or r.train.cache_reference:
        return 0.0
    return 1 - r.refine.warmup


def seconds(done: Work, speed: Speed) -> float:
    """Seconds for some work: its arithmetic or its reading, whichever takes longer. Good to a factor of two or so.

    With the speed that `cpu_speed` found, real runs took 0.6 to 1.2 times the result, and one sampling run 1.7 times:
    training, sampling and scoring with Llamas of 25 and 55 M parameters (one thread, float32, PyTorch and MLX). No GPU
    was measured.
    """
    return max(done.flop / (EFFICIENCY * speed.flop), done.bytes / speed.bytes)


def cpu_speed() -> Speed:
    """This CPU's speed in float32, as NumPy's matrix product and a large sum find it, in under half a second.

    It uses as many threads as NumPy does, which may not be as many as the backend. `seconds` says how good it is.
    """
    a = np.ones((512, 512), dtype=np.float32)
    b = np.empty(2**23, dtype=np.float32)
    b.fill(1)
    flop = _rate(lambda: a @ a, 2 * 512**3)
    return Speed(flop, _rate(b.sum, b.nbytes))


def _rate(call: Callable[[], Any], amount: float) -> float:
    """The best rate of a call, tried for a moment, the first time not counted."""
    call()
    best, end = 0.0, time.perf_counter() + SPEED_SECONDS / 2
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = max(best, amount / (time.perf_counter() - start))
    return best
