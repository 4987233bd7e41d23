"""Supervised fine-tuning: the step of every other stage, with other coefficients, on rows of one answer.

The loss of a row is -log pi(y|x) / |y|, and that of a batch the mean over its rows: every answer weighs the same,
however long it is. TRL's trainer takes the mean over all tokens of a batch, so that a long answer weighs more. The
prompt's tokens are never learned: they are no part of the response that a backend scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from spa_lite.backend import Backend, Batch, Outcome
from spa_lite.checkpoint import Checkpoints
from spa_lite.data import conversation_key
from spa_lite.encode import EncodeReport, encode_answers
from spa_lite.errors import RecipeError
from spa_lite.events import Report, Tick, silent, unheard
from spa_lite.judge import scored
from spa_lite.keys import digest
from spa_lite.objective import Forgetful
from spa_lite.recipe import Recipe
from spa_lite.records import Message, Row
from spa_lite.train import Example, Plan, train


class Sft(Forgetful):
    """Negative log-likelihood per token of the one answer of each row: c = -1 / |y|. It needs no reference, and
    remembers nothing."""

    reference, extrapolation, sequential = False, 0.0, False

    def __call__(self, batch: Batch) -> Outcome:
        """Loss [rows] in nats per token, and coefficients [rows]. Raises RecipeError for rows of several answers."""
        if len(batch.row) != len(np.unique(batch.row)):
            raise RecipeError("supervised fine-tuning needs rows of exactly one answer")
        return Outcome(-batch.logp / batch.tokens, -1.0 / batch.tokens)


def sft_plan(recipe: Recipe, rows: int) -> Plan:
    """How long and how fast: the settings sft.*."""
    return Plan(recipe.sft.epochs, recipe.sft.batch_size, recipe.sft.learning_rate, rows, recipe.train.max_steps)


def teach(
    backend: Backend,
    examples: Sequence[Example],
    recipe: Recipe,
    saved: Checkpoints,
    report: Report = silent,
    stage: str = "sft",
    round_: int = 0,
) -> dict[str, Any]:
    """Train POLICY, whose training has started, on rows of one answer each, from the last checkpoint on. Returns a
    summary; raises as `train` does."""
    return train(backend, examples, Sft(), sft_plan(recipe, len(examples)), recipe, saved, report, stage, round_)


def rows_of(
    answers: Iterable[tuple[Sequence[Message], str]],
    backend: Backend,
    recipe: Recipe,
    ids: Sequence[str] | None = None,
) -> tuple[list[Example], EncodeReport]:
    """Conversations and the answer to each as rows to train on, each answer closed by an end of turn; what is too long
    or empty is left out or cut, and counted. Without `ids`, an example is named by its text."""
    counts: Counter[str] = Counter()
    examples = []
    for index, (messages, answer) in enumerate(answers):
        row = encode_answers(
            tuple(messages),
            (answer,),
            backend.tokenizer,
            counts,
            max_prompt_length=recipe.lengths.max_prompt_length,
            max_length=min(recipe.lengths.max_length, backend.context),
            long_prompts=recipe.lengths.long_prompts,
        )
        if row:
            name = ids[index] if ids else digest("demonstration", conversation_key(messages), answer).hex()[:16]
            examples.append(Example(name, row))
    return examples, EncodeReport(kept=len(examples), **counts)


class Likelihood(msgspec.Struct, frozen=True):
    """How likely answers are: nats per token over all their tokens, and e to that."""

    answers: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """Between how many tokens the model wavers, on the mean."""
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, float]:
        """As it stands in sft.json."""
        return {"answers": self.answers, "tokens": self.tokens, "loss": self.loss, "perplexity": self.perplexity}


def likelihood(backend: Backend, rows: Sequence[Row], role: str, tick: Tick = unheard) -> Likelihood:
    """How likely a role finds the answers of rows (at least one)."""
    scores = [score for row in scored(backend, rows, role, tick) for score in row]
    tokens = sum(score.tokens for score in scores)
    return Likelihood(len(scores), tokens, -math.fsum(score.logp for score in scores) / tokens)
