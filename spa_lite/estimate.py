"""What a run will need before anything is loaded: memory from a model's shape, time from its arithmetic.

A shape is read from `config.json` alone. The memory of a stage is what its backend holds at its worst moment; the
formulas follow the code in `backends/`, and `benchmarks/bench_memory.py` compares them with what was measured.
Everything is in bytes, FLOP and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spa_lite.recipe import Recipe
from spa_lite.records import Row
from spa_lite.shape import Shape

GIB = 2**30

# -- memory ----------------------------------------------------------------------------------------------------------

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
CHUNK = 256
"""Prompts that reach a backend at a time (`spa_lite.sample`)."""


@dataclass(frozen=True)
class Habits:
    """How a framework spends memory. Measured on the Linux CPU; for CUDA, MPS and Metal not yet."""

    runtime: int  # Python and its libraries; on CUDA the context
    tile: int  # numbers in a tile of logits
    copies: float  # of a tile of logits in a training step, when all fit one tile
    tiled_copies: float  # the same when there are several
    read: int  # prompt tokens read at a time
    room: int  # places by which a key-value cache grows
    cache: float = 1.0  # times the size of the cache, when it grows
    slack: float = 1.1  # times what is held at once is what the allocator takes
    heap: bool = False  # arrays of up to 32 MiB lie on glibc's heap


MLX = Habits(int(0.36 * GIB), 2**23, 9, 25, 2**11, 256, cache=1.5, slack=1.0)
TORCH = Habits(int(0.42 * GIB), 2**25, 6, 6, 2**40, 64)
TORCH_CPU = replace(TORCH, heap=True)
MAPPED = 2**25
"""glibc gives larger arrays pages of their own, and takes them back at once."""
HEAP = (2.0, 3.3, 1.4)
"""Times what is kept, one layer at work, and a tile of logits: what a training step takes of a heap that is in pieces.
Fitted to training steps of Llamas, a Qwen2 and a GPT-2 of 3 to 48 layers; two other shapes came within 5 %."""
HEAP_HOLES = 0.7
"""Share of a layer's work in a forward that the next layer cannot use: what is kept between them is in the way."""
HEAP_FORWARD = 1.6
"""The same without gradients."""


def habits(backend: str, device: str) -> Habits:
    """Those of a backend on a device; of PyTorch for backends that are not known."""
    return MLX if backend == "mlx" else TORCH_CPU if device == "cpu" else TORCH


@dataclass(frozen=True)
class Longest:
    """The longest texts of a run, in tokens: a prompt, a sampled answer, a labelled pair's prompt with an answer."""

    prompt: int
    answer: int
    pair: int


def longest_of(recipe: Recipe, shape: Shape) -> Longest:
    """What the recipe's limits and the model's context allow. Real data are mostly shorter."""
    prompt = min(recipe.lengths.max_prompt_length, shape.context - 1)
    answer = min(recipe.sampling.max_tokens, shape.context - prompt)
    has_pairs = not recipe.inputs.no_seed_pairs
    return Longest(prompt, answer, min(recipe.lengths.max_length, shape.context) if has_pairs else prompt + answer)


def longest_of_rows(rows: Sequence[Row]) -> Longest:
    """Those of rows that are trained on as they are."""
    answers = [(len(row.prompt), len(answer)) for row in rows for answer in row.responses]
    prompts, responses = (max((pair[i] for pair in answers), default=1) for i in (0, 1))
    return Longest(prompts, responses, max((sum(pair) for pair in answers), default=1))


@dataclass(frozen=True)
class Memory:
    """Bytes of a run, by what holds them. Stages share the first three; `peak` is the largest stage."""

    runtime: int
    base: int
    adapters: int  # policy, previous, and pi_init where it is an adapter
    optimizer: int  # AdamW's two moments and the gradient
    activations: int  # of a training micro-batch: what is kept for the backward pass, and one layer at work in it
    logits: int  # what a tile of logits takes beyond that
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


def memory(
    shape: Shape,
    recipe: Recipe,
    *,
    backend: str,
    device: str,
    dtype: str,
    bits: int,
    longest: Longest | None = None,
) -> Memory:
    """Bytes that a run takes: on CUDA of the GPU's memory, elsewhere of the machine's.

    `device`, `dtype` and `bits` are those of a backend's description. `longest`: of the data, where known.
    A micro-batch that is not set yet counts as 1: see `micro_batch`.
    """
    way, width = habits(backend, device), WIDTH.get(dtype, 4)
    longest = longest or longest_of(recipe, shape)
    case = _Case(shape, recipe, longest, way, backend, device, width)
    adapter = 4 * shape.adapter(recipe.lora.rank, recipe.lora.targets)
    activations, logits = case.training()
    cache, decoding = case.sampling()
    return Memory(
        runtime=way.runtime,
        base=_base_bytes(shape, backend, width, bits),
        adapters=(3 if recipe.inputs.init_adapter else 2) * adapter,
        optimizer=(4 if backend == "mlx" else 3) * adapter,
        activations=int(activations),
        logits=int(logits),
        cache=int(cache),
        decoding=int(decoding),
        scoring=int(case.scoring()),
    )


@dataclass(frozen=True)
class _Case:
    """One model, recipe and framework; each method gives the bytes of one kind of stage."""

    shape: Shape
    recipe: Recipe
    longest: Longest
    way: Habits
    backend: str
    device: str
    width: int  # bytes per weight

    @property
    def number(self) -> float:
        """Bytes per number in activations: in 16 bits the adapters and a part of the work are in float32."""
        return self.width if self.width != 2 else 3 if self.backend == "mlx" else 3.75

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that is scored or trained on."""
        return max(self.longest.prompt + self.longest.answer, self.longest.pair)

    @property
    def answer(self) -> int:
        """Tokens of the longest response."""
        return max(self.longest.answer, self.longest.pair - self.longest.prompt)

    def training(self) -> tuple[float, float]:
        """Activations of a micro-batch, and what a tile of logits takes beyond them. A pair is two sequences."""
        s, way, b, r = self.shape, self.way, self.recipe.batching, self.recipe
        sequences = 2 * min(b.micro or 1, max(r.train.batch_size, r.seed_dpo.batch_size))
        tokens, numbers = sequences * self.length, sequences * self.answer * s.vocabulary
        scores = sequences * s.heads * self.length**2
        if self.backend == "mlx":
            saved = (5 * s.intermediate + 8 * s.hidden) * tokens + scores
            kept = 3.5 * s.hidden * tokens if b.gradient_checkpointing else saved
            layer = 18 * (s.hidden + s.intermediate) * tokens + 3 * scores
        else:
            width = 4 * s.hidden + 2 * s.queries + 2 * s.keys + (4 if s.gated else 3) * s.intermediate
            saved = width * tokens + (scores if self.device == "mps" else 0)
            kept = s.hidden * tokens if b.gradient_checkpointing else saved
            layer = (saved if b.gradient_checkpointing else 0) + (2 * s.intermediate + s.hidden) * tokens
        copies = way.copies if numbers <= way.tile else way.tiled_copies
        tile = 4 * copies * min(numbers, way.tile)
        if self.on_heap(tokens):  # where the layers worked before, the logits find no room
            return self.on_pieces(self.number * kept * s.layers, self.number * layer, tile, tokens)
        activations = way.slack * self.number * (kept * s.layers + layer)
        return activations, way.slack * max(0, tile - self.number * layer)

    def on_pieces(self, kept: float, layer: float, tile: float, tokens: int) -> tuple[float, float]:
        """`training` where arrays share glibc's heap. After a checkpointed forward the backend trims that."""
        mapped = tile >= self.way.copies * MAPPED
        keeps, works, tiles = HEAP
        tile *= 1 if mapped else tiles
        # Mapped tiles come and go, and half of them have gone when the layers' gradients are made.
        backward = tile / 2 if mapped and self.recipe.batching.gradient_checkpointing else tile
        holes = HEAP_HOLES * self.forward(self.length) * tokens * self.shape.layers
        peak = max(kept + holes, kept + tile, keeps * kept + works * layer + backward)
        return peak - tile, tile

    def sampling(self) -> tuple[float, float]:
        """The cache, and what reading the prompts or the logits of a step take beyond it."""
        s, n, prompts = self.shape, self.recipe.sampling.n, min(self.recipe.batching.sample, CHUNK)
        room = -(-(self.longest.prompt + self.longest.answer) // self.way.room) * self.way.room
        cache = 2 * s.layers * s.keys * self.width * prompts * n * room
        reading = min(prompts * self.longest.prompt, max(self.way.read, prompts))
        step = 4 * 5 * prompts * n * s.vocabulary
        beyond = max(self.forward(self.longest.prompt) * reading - cache * (1 - 1 / n), step)
        return self.held(self.way.cache * cache, reading), self.held(beyond, reading)

    def scoring(self) -> float:
        """A batch: as many rows together as hold `batching.score` pairs."""
        s, sequences = self.shape, 2 * self.recipe.batching.score
        tokens = sequences * self.length
        at_once = min(tokens, 2**14) if self.backend == "mlx" else tokens
        tile = 4 * self.way.copies / 3 * min(sequences * self.answer * s.vocabulary, self.way.tile)
        work = max(self.held(self.forward(self.length) * at_once, at_once), self.way.slack * tile)
        return work + self.number * s.hidden * tokens

    def forward(self, keys: int) -> float:
        """Bytes per token of a layer without gradients; only MLX's CPU version makes attention scores."""
        s = self.shape
        scores = 2 * s.heads * keys if self.backend == "mlx" and self.device == "cpu" else 0
        return self.number * (3 * s.intermediate + 4 * s.hidden + s.queries + 2 * s.keys + scores)

    def on_heap(self, tokens: int) -> bool:
        """Whether the arrays of a forward of so many tokens share glibc's heap."""
        return self.way.heap and self.number * tokens * self.shape.intermediate < MAPPED

    def held(self, size: float, tokens: int) -> float:
        """What the process takes to hold so many bytes without gradients."""
        return size * (HEAP_FORWARD if self.on_heap(tokens) else self.way.slack)


def _base_bytes(shape: Shape, backend: str, width: int, bits: int) -> int:
    """The frozen weights. Below 16 bits, groups of 64 share a scale; PyTorch leaves embedding and head as they are."""
    if bits >= 16:
        return shape.parameters * width
    if backend == "mlx":
        return int(shape.parameters * (bits / 8 + 2 * width / 64))
    return int(shape.body * (bits + 0.127) / 8 + (shape.embedding + shape.head) * width)


def micro_batch(
    shape: Shape,
    recipe: Recipe,
    free: int,
    *,
    backend: str,
    device: str,
    dtype: str,
    bits: int,
    longest: Longest | None = None,
    loaded: bool = False,
) -> int:
    """Pairs per forward of a training step: the largest power of two whose peak fits into 80 % of `free` bytes.

    At least 1, and not above the pairs of a step. `loaded`: the model was in memory already when `free` was measured.
    """
    best = size = 1
    while size <= max(recipe.train.batch_size, recipe.seed_dpo.batch_size):
        tried = replace(recipe, batching=replace(recipe.batching, micro=size))
        need = memory(shape, tried, backend=backend, device=device, dtype=dtype, bits=bits, longest=longest)
        if need.stages["train"] - (need.runtime + need.base if loaded else 0) > 0.8 * free:
            break
        best, size = size, 2 * size
    return best


# -- time ------------------------------------------------------------------------------------------------------------

SPEED_SECONDS = 0.3
EFFICIENCY = 0.5
"""Share of a matrix product's speed that whole stages reach: seven runs on a CPU reached 0.3 to 0.8."""


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


def work(
    shape: Shape,
    recipe: Recipe,
    prompts: int,
    pairs: int,
    held_out: int,
    *,
    longest: Longest | None = None,
    width: int = 4,
) -> dict[str, Work]:
    """Work of a whole run by kind of stage: seed, sample, judge, train, measure.

    `prompts`: over all rounds; `pairs`: labelled; `held_out`: labelled pairs that are measured after every stage.
    `longest` should be typical lengths here: what a run takes grows with the mean, not the maximum. `width`: bytes
    per weight. A token costs two FLOP per parameter that it passes, and attention two per layer, width and place.
    """
    longest = longest or longest_of(recipe, shape)
    sampled, pair = longest.prompt + longest.answer, longest.pair
    n, read = recipe.sampling.n, shape.parameters * width
    seed_pairs = 0 if recipe.inputs.no_seed_pairs else pairs * recipe.seed_dpo.epochs
    trained = prompts * recipe.train.epochs if recipe.rounds else 0
    again = 1 if recipe.batching.gradient_checkpointing else 0
    passes = 3 + again  # reference, policy, the gradient of the activations; and the policy once more

    def forward(sequences: float, length: int, answer: int, batch: int, times: float = 1) -> Work:
        one = 2 * shape.body * length + 2 * shape.vocabulary * shape.hidden * answer
        one += 2 * shape.layers * shape.queries * length**2
        return Work(times * sequences * one, times * read * sequences / max(1, batch))

    def decode(count: int) -> Work:
        steps = count / min(max(1, recipe.batching.sample), CHUNK) * longest.answer
        attention = 4 * shape.layers * shape.queries * (longest.prompt + longest.answer / 2)
        tokens = count * n * longest.answer
        reading = forward(count, longest.prompt, 1, recipe.batching.sample)
        places = 2 * shape.layers * shape.keys * width * (longest.prompt + longest.answer / 2)
        return reading + Work(
            tokens * (2 * (shape.body + shape.vocabulary * shape.hidden) + attention), steps * read + tokens * places
        )

    answer = max(1, pair - longest.prompt)
    stages = recipe.rounds + 1
    return {
        "seed": forward(2 * seed_pairs, pair, answer, 2 * (recipe.batching.micro or 1), passes),
        "sample": decode(prompts if recipe.rounds else 0),
        "judge": forward(n * (prompts if recipe.rounds else 0), sampled, longest.answer, 2 * recipe.batching.score, 2),
        "train": forward(2 * trained, sampled, longest.answer, 2 * (recipe.batching.micro or 1), passes),
        "measure": forward(2 * held_out, pair, answer, 2 * recipe.batching.score, 2 * stages),
    }


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
