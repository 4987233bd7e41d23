"""The floor: the time that some work takes at least, however good the program.

That is what its fewest operations or its fewest bytes take, whichever is longer, at rates measured on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from spa_lite import guards
from spa_lite.backend import Backend
from spa_lite.effort import Speed, Work
from spa_lite.errors import ModelError
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.records import Row
from spa_lite.shape import Shape
from spa_lite.stages.workbench import Data
from spa_lite.store import Stage
from spa_lite.throughput import Went


@dataclass(frozen=True)
class Sizes:
    """What the floor depends on besides the model: mean tokens of a prompt and of its answers, and what is together."""

    prompt: float
    answer: float
    answers: int  # per prompt
    slots: int  # answers decoded together
    forward: int  # tokens per forward when scoring or training


@dataclass(frozen=True)
class Weights:
    """Bytes that one forward reads, and bytes per number of keys and values."""

    read: float
    number: int

    @classmethod
    def of(cls, shape: Shape, description: Mapping[str, Any]) -> Weights:
        """Those of a loaded model: below 16 bits the layers are packed, embedding and head are not."""
        bits, number = int(description.get("bits") or 16), 4 if description.get("dtype") == "float32" else 2
        head = shape.vocabulary * shape.hidden * number
        return cls(shape.body * (number if bits >= 16 else bits / 8) + head, number)


def fewest(shape: Shape, weights: Weights, done: str, sizes: Sizes) -> list[Work]:
    """The least work for one prompt and its answers, phase after phase: every token computed once, nothing padded.

    A token passes two FLOP per parameter, and attention four per layer, width of the queries and place that is seen;
    the head reads answers only. Training is a forward and the gradient of what flows, without a reference; the
    weights are read once per forward, or per decoded step of all slots.
    """
    p, a, n = sizes.prompt, sizes.answer, sizes.answers
    seeing = 4 * shape.layers * shape.queries
    head = 2 * shape.vocabulary * shape.hidden * n * a
    if done == "sampled":
        reading = Work(2 * shape.body * p + seeing * p * p / 2, weights.read * p / max(p, sizes.forward))
        places = n * a * (p + a / 2)
        keys = 2 * shape.layers * shape.keys * weights.number * places
        steps = Work(2 * shape.body * n * a + head + seeing * places, weights.read * n * a / sizes.slots + keys)
        return [reading, steps]
    line = p + n * a
    linear, attention = 2 * shape.body * line + head, seeing * (p * p / 2 + n * a * (p + a / 2))
    read = weights.read * line / max(line, sizes.forward)
    once, twice = (1, 1) if done == "scored" else (2, 3)  # attention has two products, and four in its gradient
    return [Work(once * linear + twice * attention, once * read)]


def floor_seconds(work: Sequence[Work], speed: Speed) -> float:
    """The time no program needs less than."""
    return sum(max(phase.flop / speed.flop, phase.bytes / speed.bytes) for phase in work)


class Floor:
    """The floor of what a run does. `measure` finds a backend's speed, and is asked once, behind the first stage."""

    def __init__(self, models: Models, recipe: Recipe, data: Data, measure: Callable[[Backend], Speed | None]) -> None:
        self._models, self._recipe, self._data, self._measure = models, recipe, data, measure
        self._speed: Speed | None = None
        self._asked = False

    def seconds(self, stage: Stage, done: str, went: Went) -> float | None:
        """Of what a stage did; None where model, speed or lengths are not known, another model did it, or texts of
        several kinds went through."""
        backend, shape = self._models.loaded, None
        with suppress(ModelError):  # a config that does not say it
            shape = backend.shape if backend else None
        if backend is None or shape is None or (done == "scored" and self._models.has_other_reference):
            return None
        speed, sizes = self._rates(backend), self._sizes(stage, done, went, backend)
        if speed is None or sizes is None:
            return None
        work = fewest(shape, Weights.of(shape, backend.description), done, sizes)
        return floor_seconds(work, speed) * went.tokens / (sizes.answer * sizes.answers)

    def _rates(self, backend: Backend) -> Speed | None:
        if not self._asked:
            self._asked, self._speed = True, self._measure(backend)
        return self._speed

    def _sizes(self, stage: Stage, done: str, went: Went, backend: Backend) -> Sizes | None:
        """Mean lengths: prompts from the data, answers from the tokens that went through."""
        prompts = [len(ids) for ids in self._prompts(stage, done)]
        if not prompts or not went.units:
            return None
        r, b = self._recipe, backend.batching
        judged = guards.answers_per_prompt(r)
        n = judged if stage.kind in {"sample", "judge"} else 1 if done == "sampled" else 2
        rows, tokens = went.units, b.score_tokens
        if done == "trained":
            plan = r.seed_dpo if stage.kind == "seed" else r.train
            rows, tokens = min(rows * plan.batch_size, max(1, stage.size) * plan.epochs), b.micro_tokens
        return Sizes(fmean(prompts), went.tokens / (rows * n), n, min(b.sample, len(prompts)) * n, tokens)

    def _prompts(self, stage: Stage, done: str) -> list[Sequence[int]]:
        """Prompts of what a stage did; none where they are not known, or its texts are of several kinds."""
        r, one = self._recipe, self._recipe.candidates.kinds == ["sample"]
        if stage.kind == "measure":
            found = self._data.held_out_pairs if done == "scored" else self._data.held_out_prompts
            return [row.prompt if isinstance(row, Row) else row for _, row in found]
        if stage.kind == "seed" and r.seed_dpo.by == "dpo":
            return [row.prompt for _, row in self._data.seed_pairs]
        plain = {"sample": one, "judge": True, "train": not r.loss.optimism and r.loss.kind != "kto"}
        if not plain.get(stage.kind) or not self._data.rounds:
            return []
        return [ids for _, ids in self._data.rounds[int(stage.folder.rpartition("/")[2]) - 1]]
