"""What memory a run will need before anything is loaded, from a model's shape (the time: `spa_lite.effort`).

A shape is read from `config.json` alone. The memory of a stage is what its backend holds at its worst moment; the
formulas follow the code in `backends/`, and `benchmarks/bench_memory.py` compares them with what was measured.
Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from spa_lite import guards
from spa_lite.backend import Activations, Backend, Batching
from spa_lite.recipe import Recipe
from spa_lite.records import Row
from spa_lite.shape import Shape

GIB = 2**30

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Place:
    """What a model runs on, as its backend's description says."""

    backend: str
    device: str
    dtype: str
    bits: int

    @classmethod
    def of(cls, backend: Backend) -> Place:
        """That of a backend, loaded or only outlined."""
        used = backend.description
        return cls(backend.name, str(used["device"]), str(used["dtype"]), int(used["bits"]))

    @property
    def kind(self) -> Literal["cpu", "apple", "cuda"]:
        """The kind of device."""
        return "cpu" if self.device == "cpu" else "cuda" if self.device.startswith("cuda") else "apple"

    @property
    def habits(self) -> Habits:
        """Those of PyTorch for backends that are not known."""
        if self.backend == "mlx":
            return MLX
        return {"cpu": TORCH_CPU, "cuda": TORCH_CUDA, "apple": TORCH}[self.kind]


@dataclass(frozen=True)
class Habits:
    """How a framework spends memory. Measured on the Linux CPU; for CUDA, MPS and Metal not yet."""

    runtime: int  # Python and its libraries; on CUDA the context
    tile: int  # numbers in a tile of logits, unless its least rows have more
    rows: int  # tokens in a tile at least
    copies: float  # of a tile, in a training step that extrapolates; half as many in scoring
    read: int  # prompt tokens read at a time
    room: int  # places by which a key-value cache grows
    cache: float = 1.0  # times the size of the cache, when it grows
    slack: float = 1.1  # times what is held at once is what the allocator takes
    heap: bool = False  # arrays of up to 32 MiB lie on glibc's heap

    def tile_bytes(self, vocabulary: int = 0) -> float:
        """What a full tile takes in a training step; without the vocabulary where it is of the usual size."""
        return 4 * self.copies * max(self.tile, self.rows * vocabulary)


MLX = Habits(int(0.36 * GIB), 2**22, 16, 4, 2**11, 256, cache=1.5, slack=1.0)
TORCH = Habits(int(0.42 * GIB), 2**22, 64, 4, 2**40, 64)
TORCH_CUDA = replace(TORCH, tile=2**26)
TORCH_CPU = replace(TORCH, heap=True)
MAPPED = 2**25
"""glibc gives larger arrays pages of their own, and takes them back at once."""
HEAP = (1.4, 2.4, 1.4)
"""Times what is kept, one layer at work, and a tile of logits: what a training step takes of a heap that is in pieces.
Fitted to training steps of Llamas of 3 to 30 layers."""
HOLES = 0.5
"""Share of what a layer keeps that a checkpointed one leaves as a hole: its input, which is kept, is in the way of the
next one's work."""
ARRAYS = 7
"""What a layer keeps is about so many times its largest array."""
HEAP_FORWARD = 1.6
"""Times what a layer takes in a forward pass without gradients: what that takes of a heap that is in pieces."""


@dataclass(frozen=True)
class Longest:
    """The longest texts of a run, in tokens: a prompt, a sampled answer, a labelled pair's prompt with an answer, and
    the longest line of such a pair with both (0: not known). `responses`: how many are trained on beside each other."""

    prompt: int
    answer: int
    pair: int
    labelled: int = 0
    responses: int = 2

    @property
    def single(self) -> int:
        """A prompt with an answer."""
        return max(self.prompt + self.answer, self.pair)

    @property
    def row(self) -> int:
        """A prompt with its answers on one line, as it is trained on (`tokens_of`)."""
        return self.line(self.responses)

    def line(self, responses: int) -> int:
        """The same with so many sampled answers; labelled ones are two."""
        sampled = self.prompt + responses * max(0, self.answer - 1)
        return max(sampled, self.labelled or 2 * self.pair - self.prompt - 2)

    def part(self, share: int) -> Longest:
        """Texts that are so many times shorter."""
        prompt, answer, pair, labelled = (
            ceil(size / share) for size in (self.prompt, self.answer, self.pair, self.labelled)
        )
        return Longest(prompt, answer, pair, labelled, self.responses)


def longest_of(recipe: Recipe, shape: Shape) -> Longest:
    """What the recipe's limits and the model's context allow. Real data are mostly shorter."""
    prompt = min(recipe.lengths.max_prompt_length, shape.context - 1)
    answer = min(recipe.sampling.max_tokens, shape.context - prompt)
    pair = min(recipe.lengths.max_length, shape.context) if guards.needs_pairs(recipe) else prompt + answer
    return Longest(prompt, answer, pair, responses=responses_of(recipe))


def responses_of(recipe: Recipe) -> int:
    """Answers of a row that is trained on: chosen, rejected, and for a loss that is optimistic a third."""
    return 3 if recipe.rounds and recipe.loss.optimism else 2


def longest_of_rows(rows: Sequence[Row]) -> Longest:
    """Those of rows that are trained on as they are; nothing is sampled."""
    prompt = max((len(row.prompt) for row in rows), default=1)
    pair = max((len(row.prompt) + len(answer) for row in rows for answer in row.responses), default=1)
    return Longest(prompt, 0, pair, max(map(tokens_of, rows), default=1))


def tokens_of(row: Row) -> int:
    """Tokens of a row on one line; what comes last in a response is predicted, but predicts nothing."""
    return len(row.prompt) + sum(max(0, len(response) - 1) for response in row.responses)


@dataclass(frozen=True)
class Memory:
    """Bytes of a run, by what holds them. Stages share the first three; `peak` is the largest stage."""

    runtime: int
    base: int
    adapters: int  # policy, previous, and pi_init where it is an adapter
    optimizer: int  # AdamW's two moments and the gradient
    activations: int  # of a training forward: what is kept for the backward pass, and one layer at work in it
    logits: int  # a tile of logits
    cache: int  # keys and values of a sampling batch
    decoding: int  # what reading its prompts, or a step's logits, take beyond that
    scoring: int  # a scoring batch

    @property
    def fixed(self) -> int:
        """What every stage holds."""
        return self.runtime + self.base + self.adapters

    @property
    def stages(self) -> dict[str, int]:
        """The peak of each kind of stage: train (the seed stage too), sample, judge."""
        return {
            "train": self.fixed + self.optimizer + self.activations + self.logits,
            "sample": self.fixed + self.cache + self.decoding,
            "judge": self.fixed + self.scoring,
        }

    @property
    def peak(self) -> int:
        """The largest stage."""
        return max(self.stages.values())


def memory(shape: Shape, recipe: Recipe, sizes: Batching, place: Place, longest: Longest | None = None) -> Memory:
    """Bytes that a run takes: on CUDA of the GPU's memory, elsewhere of the machine's.

    `sizes`: the batch sizes, as `spa_lite.fit` chooses them. `longest`: of the data, where known.
    """
    case = Case(shape, recipe, place, longest or longest_of(recipe, shape))
    step = held(case.activations, case.together(sizes.micro_tokens), sizes.checkpointed, place)
    cache, decoding = case.sampling(sizes.sample)
    return Memory(
        runtime=place.habits.runtime,
        base=case.base,
        adapters=case.adapters,
        optimizer=case.optimizer,
        activations=max(0, int(step - case.tile)),
        logits=int(case.tile),
        cache=int(cache),
        decoding=int(decoding),
        scoring=int(case.scoring(sizes.score_tokens)),
    )


def held(kept: Activations, tokens: int, checkpointed: int, place: Place) -> float:
    """Bytes that a training step takes at its worst moment for a forward of so many tokens.

    The first layers are the checkpointed ones. When the backward pass comes to them it is done with all others, so one
    at a time stands in their place.
    """
    k, times, way = min(checkpointed, kept.layers), tokens / kept.tokens, place.habits
    whole = max(kept.layers - k, min(k, 1))
    tile = min(kept.rest, way.tile_bytes())
    stays = times * (k * kept.checkpointed + whole * kept.layer + kept.rest - tile)
    on_heap = way.heap and times * kept.layer < ARRAYS * MAPPED
    keeps, works, tiles = HEAP if on_heap else (way.slack, way.slack, 1.0)
    backward = keeps * stays + works * times * kept.work + tiles * min(times * tile, way.tile_bytes())
    return max(backward, stays + HOLES * k * times * kept.layer) if on_heap else backward


@dataclass(frozen=True)
class Case:
    """One model, recipe and place; each method gives the bytes of something."""

    shape: Shape
    recipe: Recipe
    place: Place
    longest: Longest

    @property
    def width(self) -> int:
        """Bytes per weight."""
        return WIDTH.get(self.place.dtype, 4)

    @property
    def number(self) -> float:
        """Bytes per number in activations: with MLX in 16 bits the adapters and a part of the work are in float32."""
        return 3 if self.width == 2 and self.place.backend == "mlx" else self.width

    @property
    def base(self) -> int:
        """The frozen weights. Below 16 bits, groups of 64 share a scale; PyTorch leaves embedding and head alone."""
        s, bits = self.shape, self.place.bits
        if bits >= 16:
            return s.parameters * self.width
        if self.place.backend == "mlx":
            return int(s.parameters * (bits / 8 + 2 * self.width / 64))
        return int(s.body * (bits + 0.127) / 8 + (s.embedding + s.head) * self.width)

    @property
    def adapter(self) -> int:
        """One adapter: float32 everywhere."""
        return 4 * self.shape.adapter(self.recipe.lora.rank, self.recipe.lora.targets)

    @property
    def adapters(self) -> int:
        """Policy, previous, and pi_init where it is an adapter."""
        return (3 if self.recipe.inputs.init_adapter else 2) * self.adapter

    @property
    def optimizer(self) -> int:
        """AdamW's two moments, and the gradient; MLX adds the micro-batches' gradients up beside it."""
        return (4 if self.place.backend == "mlx" else 3) * self.adapter

    @property
    def fixed(self) -> int:
        """What every stage holds."""
        return self.place.habits.runtime + self.base + self.adapters

    @property
    def line(self) -> int:
        """Tokens that the longest row takes: of one line, or of two where that would be longer than the context."""
        return self._line(self.longest.responses)

    @property
    def judged(self) -> int:
        """The same of a prompt with all the answers that are judged."""
        return self._line(max(2, guards.answers_per_prompt(self.recipe)))

    def _line(self, responses: int) -> int:
        found = self.longest.line(responses)
        return found if found <= self.shape.context else responses * self.longest.single

    @property
    def tile(self) -> float:
        """What a tile of logits takes in a training step."""
        way, answers = self.place.habits, self.line - self.longest.prompt
        return min(way.tile_bytes(self.shape.vocabulary), 4 * way.copies * answers * self.shape.vocabulary)

    def together(self, tokens: int) -> int:
        """Tokens of a training forward: one row at least, and no more than a step has."""
        most = max(self.recipe.train.batch_size, self.recipe.seed_dpo.batch_size) * self.line
        return max(self.line, min(tokens, most))

    @property
    def activations(self) -> Activations:
        """What a training step holds for the longest row, as `Backend.activations` would measure it."""
        s, tokens, mlx = self.shape, self.line, self.place.backend == "mlx"
        if mlx:
            scores = s.heads * tokens**2
            kept = (5 * s.intermediate + 8 * s.hidden) * tokens + scores
            again, work = 3.5 * s.hidden * tokens, 18 * (s.hidden + s.intermediate) * tokens + 3 * scores
        else:
            norms = (4 if self.width > 2 else 6) * s.hidden  # they work in float32
            inner = (4 if s.gated else 3) * s.intermediate + self.recipe.lora.rank * len(s.linear)
            # On the CPU each response attends on its own; elsewhere keys and values are repeated, and masked.
            attention = 3 * s.queries + 3 * s.keys if self.place.kind == "cpu" else 5 * s.queries + tokens
            scores = s.heads * tokens**2 if self.place.device == "mps" else 0
            kept = (norms + attention + inner) * tokens + scores
            again, work = s.hidden * tokens, kept
        states = 4 * (tokens - self.longest.prompt) * s.hidden + 2 * tokens * s.hidden
        return Activations(
            tokens=tokens,
            layers=s.layers,
            layer=int(self.number * kept),
            checkpointed=int(self.number * again),
            work=int(self.number * work),
            rest=int(self.number * states + self.tile),
        )

    def sampling(self, prompts: int) -> tuple[float, float]:
        """The cache, and what reading the prompts or the logits of a step take beyond it: of the kind of texts that
        takes most."""
        return max((self._decoding(prompts, *texts) for texts in self.drawn), key=sum)

    @property
    def drawn(self) -> list[tuple[int, int, int]]:
        """(prompt, answers, tokens of an answer) of every kind of text that is drawn."""
        r, prompt, answer = self.recipe, self.longest.prompt, self.longest.answer
        found = [(prompt, r.sampling.n if "sample" in r.candidates.kinds else 1, answer)]
        if "improve" in r.candidates.kinds:
            found.append((prompt + answer, 1, answer))
        if guards.is_written(r):
            found.append((r.lengths.max_prompt_length, 1, r.prompts.max_tokens))
        return found

    def _decoding(self, prompts: int, prompt: int, n: int, answer: int) -> tuple[float, float]:
        s, way = self.shape, self.place.habits
        room = -(-(prompt + answer) // way.room) * way.room
        cache = 2 * s.layers * s.keys * self.width * prompts * n * room
        reading = min(prompts * prompt, max(way.read, prompts))
        step = 4 * 5 * prompts * n * s.vocabulary
        beyond = max(self.forward(prompt) * reading - cache * (1 - 1 / n), step)
        return self.without_gradients(way.cache * cache, reading), self.without_gradients(beyond, reading)

    def scoring(self, tokens: int) -> float:
        """A forward of so many tokens without gradients, of one row at least, then the head over its answers."""
        tokens = max(tokens, self.judged)
        work = max(self.without_gradients(self.forward(self.judged) * tokens, tokens), self.tile / 2)
        return work + self.number * self.shape.hidden * tokens

    def forward(self, keys: int) -> float:
        """Bytes per token of a layer without gradients; only MLX's CPU version makes attention scores."""
        s = self.shape
        scores = 2 * s.heads * keys if self.place.backend == "mlx" and self.place.device == "cpu" else 0
        return self.number * (3 * s.intermediate + 4 * s.hidden + s.queries + 2 * s.keys + scores)

    def without_gradients(self, size: float, tokens: int) -> float:
        """What the process takes to hold so many bytes in a forward of so many tokens."""
        way = self.place.habits
        on_heap = way.heap and self.number * tokens * self.shape.intermediate < MAPPED
        return size * (HEAP_FORWARD if on_heap else way.slack)
