"""Decoding in slots: one step function over tensors that never move, so that a CUDA graph can replay it.

A slot holds an answer's keys and values, from its prompt on, and has a length of its own: so an answer that ends leaves
its slot to another one at once. On the CPU the same function runs as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spa_lite.backend import Sampling
from spa_lite.backends import memory
from spa_lite.backends.decoding import LOOK, Decoding, Uniforms, Written
from spa_lite.backends.torch_cache import SlotCache, plain_layers
from spa_lite.backends.torch_model import Net
from spa_lite.backends.torch_sampling import PROBE, WRONG, cache_works, draw_scored, expected_states, near, to_host
from spa_lite.records import Ids

Way = Literal["slots", "padded", "none"]
"""How answers share a batch: each in a slot; padded on the left; or without a cache, all tokens at every step."""
Step = Callable[[], None]

PREFILL = 8192
"""Prompt tokens, padding included, read at a time."""
NEAR = 2
"""Steps between two looks where nothing is waited for: answers that have ended leave the sooner."""
ROUND = 64
"""Slots are a multiple of this long, and attention looks at a multiple of it."""
BUCKETS = 8
"""A graph is captured for a multiple of an eighth of the slots, and for a multiple of 4 * ROUND places."""


class Graphs:
    """CUDA graphs of the step, one per shape. What a graph reads must lie where it lay: `enter` says what that is."""

    def __init__(self, capture: Callable[[Step], Step]) -> None:
        self.capture = capture
        self.reads: Hashable = None
        self.failed = ""  # why none could be captured: from then on steps run as they are
        self._known: dict[Hashable, Step | None] = {}

    def enter(self, reads: Hashable) -> None:
        """Forget all graphs if they read something else, or if the same lies elsewhere."""
        if reads != self.reads:
            self.reads = reads
            self._known.clear()

    def run(self, shape: Hashable, step: Step, times: int) -> None:
        """Run a step some times. The first time a shape is seen it runs as it is, which warms everything up."""
        replay = self._known.get(shape, step) or self._captured(shape, step)
        self._known.setdefault(shape, None)
        for _ in range(times):
            replay()

    def _captured(self, shape: Hashable, step: Step) -> Step:
        if self.failed:
            return step
        try:
            self._known[shape] = self.capture(step)
        except RuntimeError as error:
            if memory.ran_out(error):
                raise
            self.failed = " ".join(str(error).split())[:120]
            self._known.clear()
        return self._known.get(shape) or step


class Capture:
    """Capturing a step: its kernels are recorded, not run. All graphs share one pool, as only one runs at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        replay: Step = graph.replay
        return replay


class Slots:
    """`count` slots of `length` tokens, and what a step reads and writes of each: tensors that stay where they are."""

    def __init__(self, net: Net, count: int, length: int, keep: bool) -> None:
        self.net, self.count, self.length, self.keep = net, count, length, keep
        self.user: Callable[[], object] = lambda: None  # the decoder that writes here, while it lives
        self.cache = SlotCache(plain_layers(net.text), count, length)
        width = net.vocab if net.whole else net.model.get_output_embeddings().weight.shape[-1]
        self.lengths = self._zeros(torch.long)  # tokens in the cache
        self.states = self._zeros(net.model.dtype, width)  # what the head reads next
        self.uniforms = self._zeros(torch.float32, LOOK)
        self.tokens = self._zeros(torch.long, LOOK)
        self.logprobs = self._zeros(torch.float32, LOOK)
        self.kept = self._zeros(net.model.dtype, LOOK, width) if keep else None
        self.column = torch.zeros(1, dtype=torch.long, device=net.device)  # of these four: the step at work

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros((self.count, *shape), dtype=dtype, device=self.net.device)

    def fit(self, count: int, length: int, keep: bool) -> bool:
        """Whether these slots are free, and can be taken for others."""
        return self.user() is None and (self.count, self.keep) == (count, keep) and self.length >= length

    def read(self, prompts: Sequence[Ids], into: Sequence[Sequence[int]]) -> None:
        """Read prompts of like length, each once, into several slots."""
        longest, slots = max(len(prompt) for prompt in prompts), self.net.tensor(into)
        # Padding on the right is seen by no token before it, and is overwritten as the answer grows.
        ids = self.net.tensor([tuple(prompt) + (0,) * (longest - len(prompt)) for prompt in prompts])
        sizes = self.net.tensor([len(prompt) for prompt in prompts])
        self.cache.read(slots)
        hidden = self.net.hidden(ids, None, torch.arange(longest, device=self.net.device)[None], self.cache)
        last = hidden[torch.arange(len(prompts), device=self.net.device), sizes - 1]
        self.lengths[slots], self.states[slots] = sizes[:, None], last[:, None]

    def move(self, source: Sequence[int], target: Sequence[int], width: int) -> None:
        """Copy some slots to others."""
        old, new = self.net.tensor(source), self.net.tensor(target)
        self.cache.move(old, new, width)
        self.lengths[new], self.states[new] = self.lengths[old], self.states[old]

    def step(self, rows: int, width: int, sampling: Sampling, feed: bool = True) -> None:
        """Write one token to each of the first `rows` slots, none of which holds more than `width` tokens."""
        column = self.column.expand(rows, 1)
        states = self.states[:rows]
        token, logprob = draw_scored(self.net.head(states), sampling, self.uniforms[:rows].gather(1, column)[:, 0])
        self.tokens[:rows].scatter_(1, column, token[:, None])
        self.logprobs[:rows].scatter_(1, column, logprob[:, None])
        if self.kept is not None:
            self.kept[:rows].index_copy_(1, self.column, states[:, None])
        self.column += 1
        if feed:
            self.feed(token, width)

    def feed(self, token: Tensor, width: int) -> None:
        """Read one more token [rows] of the first slots."""
        rows = len(token)
        at = self.lengths[:rows].clamp(max=self.length - 1)  # who is beyond its limit overwrites its own last place
        self.cache.extend(at, width)
        mask = (torch.arange(width, device=self.net.device) <= at[:, None])[:, None, None]
        if self.net.attention == "eager":  # adds its mask
            mask = torch.where(mask, 0.0, torch.finfo(self.states.dtype).min).to(self.states.dtype)
        positions = at.clamp(max=self.net.context - 1)[:, None]
        self.states[:rows] = self.net.hidden(token[:, None], mask, positions, self.cache)[:, -1]
        self.lengths[:rows] += 1


class SlotDecoder(Decoding):
    """Any number of prompts, as many at once as there are slots for."""

    cheap_to_select = True

    def __init__(
        self,
        slots: Slots,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        graphs: Graphs | None = None,
        reads: Callable[[], Hashable] = lambda: None,
    ) -> None:
        """`reads` says where the adapter in use lies, which graphs read there."""
        super().__init__(prompts, keys, sampling, stop_ids, slots.net.context, slots.count, slots.keep)
        self.static, self.graphs, self.reads = slots, graphs, reads
        self.look = NEAR if slots.net.device.type == "cpu" and graphs is None else LOOK
        self.where: list[int] = []  # the slot of each row
        slots.user = weakref.ref(self)

    @torch.inference_mode()
    def admit(self, prompts: Sequence[int]) -> None:
        """Read prompts into free slots, the first ones."""
        free = iter(sorted({*range(self.static.count)} - {*self.where}))
        into = [[next(free) for _ in range(self.n)] for _ in prompts]
        size = max(1, PREFILL // max(len(self.prompts[index]) for index in prompts))
        for start in range(0, len(prompts), size):
            some = [self.prompts[index] for index in prompts[start : start + size]]
            self.static.read(some, into[start : start + size])
        self.where += [slot for slots in into for slot in slots]

    @torch.inference_mode()
    def advance(self, uniforms: Uniforms, final: bool) -> Written:
        """Write some tokens to every slot in use, and to those that fill up a bucket."""
        static, steps = self.static, uniforms.shape[1]
        longest = max(len(self.prompts[row.place // self.n]) + row.steps for row in self.rows)
        rows, width = self._bucket(len(self.rows)), min(static.length, _up(longest + steps, self._grain()))
        self._close_up(rows, longest)
        given = np.zeros((rows, LOOK), np.float32)
        given[self.where, :steps] = uniforms
        static.uniforms[:rows] = torch.from_numpy(given).to(static.uniforms.device, non_blocking=True)
        static.column.zero_()
        if self.graphs is None:
            for step in range(steps):
                static.step(rows, width, self.sampling, feed=not final or step + 1 < steps)
        else:
            self.graphs.enter((static, self.reads()))
            shape = rows, width, self.sampling
            self.graphs.run(shape, partial(static.step, *shape), steps)
        kept = None if static.kept is None else to_host(static.kept[:rows, :steps])[self.where]
        tokens, logprobs = static.tokens[:rows, :steps].cpu().numpy(), static.logprobs[:rows, :steps].cpu().numpy()
        return Written(tokens[self.where], logprobs[self.where], kept)

    def select(self, live: Sequence[int]) -> None:
        """Leave the slots of all others free."""
        self.where = [self.where[index] for index in live]

    def _close_up(self, rows: int, width: int) -> None:
        """Move who is beyond the first `rows` slots into gaps there."""
        beyond = [index for index, slot in enumerate(self.where) if slot >= rows]
        if beyond:
            gaps = sorted({*range(rows)} - {*self.where})[: len(beyond)]
            self.static.move([self.where[index] for index in beyond], gaps, width)
            for index, gap in zip(beyond, gaps, strict=True):
                self.where[index] = gap

    def _bucket(self, rows: int) -> int:
        if self.graphs is None:
            return rows
        return min(self.static.count, _up(rows, max(1, self.static.count // BUCKETS)))

    def _grain(self) -> int:
        return ROUND // 2 if self.graphs is None else 4 * ROUND


def slots_needed(net: Net, prompts: Sequence[Ids], sampling: Sampling) -> int:
    """How long slots must be for these prompts and their answers."""
    return _up(max(min(len(prompt) + sampling.max_tokens, net.context) for prompt in prompts), ROUND)


def best_way(net: Net) -> Way:
    """The fastest way that gives, one step after two prompts, the logits of a forward without a cache."""
    return "slots" if slots_work(net) else "padded" if cache_works(net) else "none"


@torch.inference_mode()
def slots_work(net: Net) -> bool:
    """Whether a step in slots, after prompts of unlike length, gives the logits of a forward without a cache."""
    try:
        if not (plain_layers(net.text) and getattr(net.model, "_supports_attention_backend", False)):
            return False
        slots = Slots(net, len(PROBE) + 1, ROUND, keep=False)
        slots.read(PROBE, [[slot + 1] for slot in range(len(PROBE))])
        slots.move([len(PROBE)], [0], ROUND)
        slots.feed(net.tensor([1] * len(PROBE)), ROUND)
        return near(net, slots.states[: len(PROBE)].flip(0), expected_states(net))
    except WRONG:
        return False


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
