"""Sampling in batches with a key-value cache: each prompt is read once, its n answers are decoded together.

A token is the inverse CDF, in vocabulary order, of the tempered distribution at one uniform of the answer's own
stream. mlx-lm's generator draws otherwise and drops the stop token, so only its caches are used, all in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from spa_lite.backend import Sampling
from spa_lite.backends.decoding import CDF_BLOCK, Decoding, Uniforms, Written
from spa_lite.backends.mlx_head import pick, weigh
from spa_lite.backends.mlx_model import UNLIKE, Net
from spa_lite.records import Ids

PREFILL = 2048
"""Prompt tokens read at a time: a GPU that also drives a screen stops kernels that take seconds."""

Way = Literal["padded", "equal", "none"]
"""How prompts share a batch: padded on the left; of equal length only; or without a cache, all tokens every step.
Only the first lets prompts in while others are being answered."""


class Decoder(Decoding):
    """Prompts and their answers while they are being written, one row of every array for each answer."""

    def __init__(
        self,
        net: Net,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        way: Way = "padded",
        slots: int | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__(prompts, keys, sampling, stop_ids, net.context, slots if way == "padded" else None, keep)
        self.net, self.way = net, way
        self.cache: list[Any] = []
        self.states = mx.zeros((0, 0))  # [rows, width] what the head reads for the next token
        self.ids = mx.zeros((0, 0))  # [rows, time] for the way without a cache

    def admit(self, prompts: Sequence[int]) -> None:
        """Read prompts together, once, then make n rows of each."""
        some = [self.prompts[index] for index in prompts]
        width = max(map(len, some))
        ids = mx.array([(0,) * (width - len(prompt)) + tuple(prompt) for prompt in some])
        cache = _new_cache(self.net, some, self.way)
        states = self._read(ids, cache)
        copies = mx.repeat(mx.arange(len(some)), self.n)
        _pick(cache, copies)
        if not len(self.states):
            self.states, self.cache, self.ids = states[copies], cache, ids[copies]
            return
        self.states = mx.concatenate([self.states, states[copies]])
        for layer, more in zip(self.cache, cache, strict=True):
            layer.extend(more)

    def _read(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """What the head reads after the prompts, [prompts, width]; the cache is filled piece by piece."""
        size = max(1, PREFILL // ids.shape[0]) if cache else ids.shape[1]
        for start in range(0, ids.shape[1], size):
            hidden = self.net.hidden(ids[:, start : start + size], cache or None)
            mx.eval(hidden)
        return hidden[:, -1]

    def advance(self, uniforms: Uniforms, final: bool) -> Written:
        """Write a token per column of `uniforms` to every row. The host waits for the last one only."""
        tokens, logprobs, states = [], [], []
        columns = mx.array(uniforms)
        for step in range(uniforms.shape[1]):
            states.append(self.states)
            token, logprob = draw_scored(self.net.head(self.states), self.sampling, columns[:, step])
            tokens.append(token)
            logprobs.append(logprob)
            if not (final and step == uniforms.shape[1] - 1):
                self._feed(token)
            # The device works on this step while the host prepares the next.
            mx.async_eval(token, logprob, self.states)
        kept = to_host(mx.stack(states, axis=1)) if self.keep else None
        return Written(np.array(mx.stack(tokens, axis=1)), np.array(mx.stack(logprobs, axis=1)), kept)

    def _feed(self, token: mx.array) -> None:
        """States after one more token."""
        if self.way == "none":
            self.ids = mx.concatenate([self.ids, token[:, None].astype(self.ids.dtype)], axis=1)
        ids = self.ids if self.way == "none" else token[:, None]
        self.states = self.net.hidden(ids, self.cache or None)[:, -1]

    def select(self, live: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = mx.array(live, dtype=mx.int32)
        self.states, self.ids = self.states[index], self.ids[index] if self.way == "none" else self.ids
        if live:
            _pick(self.cache, index)


def _new_cache(net: Net, prompts: Sequence[Ids], way: Way) -> list[Any]:
    """An empty cache per layer for all prompts; none at all for the way without."""
    if way == "none":
        return []
    if way == "equal":
        return list(make_prompt_cache(net.model))
    width = max(len(prompt) for prompt in prompts)
    single = [make_prompt_cache(net.model) for _ in prompts]
    layers = [layer[0].merge(list(layer)) for layer in zip(*single, strict=True)]
    for layer in layers:
        layer.prepare(left_padding=[width - len(prompt) for prompt in prompts])
    return layers


def _pick(cache: list[Any], index: mx.array) -> None:
    """Keep these sequences, each as often as it is named."""
    for layer in cache:
        if hasattr(layer, "filter"):
            layer.filter(index)  # drops the padding that no row needs any more, too
        else:
            layer.state = type(layer.state)(
                value[index] if isinstance(value, mx.array) and value.ndim else value for value in layer.state
            )


def to_host(states: mx.array) -> NDArray[Any]:
    """Numbers in their own precision; bfloat16, which NumPy lacks, as uint16."""
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states)


def draw_scored(logits: mx.array, sampling: Sampling, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """What `draw` draws, and its log-probs at temperature 1 (nats). Exponentials are made once where once will do."""
    shifted, weights, total = weigh(logits)
    plain = sampling.temperature == 1 and sampling.top_p == 1
    token = inverse_cdf(weights, uniform) if plain else draw(logits, sampling, uniform)
    return token, pick(shifted, token) - mx.log(total)


def draw(logits: mx.array, sampling: Sampling, uniform: mx.array) -> mx.array:
    """One token per row of float32 logits [rows, vocabulary], given one uniform in (0, 1) per row."""
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1)
    probabilities = mx.softmax(logits / sampling.temperature, axis=-1)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    return inverse_cdf(probabilities, uniform)


def nucleus(probabilities: mx.array, top_p: float) -> mx.array:
    """Zero all but the fewest most probable tokens whose mass reaches `top_p` (ties: the lower id first)."""
    index = mx.argsort(-probabilities, axis=-1)
    ordered = mx.take_along_axis(probabilities, index, axis=-1)
    before = mx.cumsum(ordered, axis=-1) - ordered
    return mx.put_along_axis(mx.zeros_like(probabilities), index, ordered * (before < top_p), axis=-1)


def inverse_cdf(weights: mx.array, uniform: mx.array) -> mx.array:
    """First index whose cumulative weight exceeds uniform * total; weights [rows, vocabulary] need no normalising."""
    rows, size = weights.shape
    blocks = mx.pad(weights, [(0, 0), (0, -size % CDF_BLOCK)]).reshape(rows, -1, CDF_BLOCK)
    totals = mx.cumsum(blocks.sum(axis=-1), axis=-1)
    target = uniform[:, None] * totals[:, -1:]
    block = mx.minimum((totals <= target).sum(axis=-1, keepdims=True), totals.shape[1] - 1)
    before = mx.where(block > 0, mx.take_along_axis(totals, mx.maximum(block - 1, 0), axis=1), 0.0)
    inside = mx.cumsum(mx.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0], axis=-1)
    # Rounding may leave the rest of the target just beyond the block: then its last token of any weight is meant.
    rest = mx.minimum(target - before, inside[:, -1:] * (1 - 2**-23))
    within = (inside <= rest).sum(axis=-1, keepdims=True)
    return (block * CDF_BLOCK + within)[:, 0]


def best_way(net: Net) -> Way:
    """The fastest way whose logits, after prompts that came in one after the other, are those without a cache."""
    prompts = [(1, 2, 3), (3, 2)]
    expected = [
        net.head(net.hidden(mx.array([[*prompt, *fed]]))[:, -1])
        for prompt, fed in zip(prompts, ((1, 1), (1,)), strict=True)
    ]
    if _near(net, lambda: _in_turn(net, prompts), mx.concatenate(expected)):
        return "padded"
    return "equal" if _near(net, lambda: _together(net, prompts[0]), mx.concatenate(expected[:1] * 2)) else "none"


def _decoder(net: Net, prompts: Sequence[Ids], way: Way) -> Decoder:
    return Decoder(net, prompts, [[b"\0" * 16]] * len(prompts), Sampling(max_tokens=3), frozenset(), way)


def _in_turn(net: Net, prompts: Sequence[Ids]) -> mx.array:
    """Logits after token 1 twice for the first prompt, and once for the second, which comes in later."""
    decoder = _decoder(net, [prompts[0], *prompts], "padded")
    decoder.admit([0, 1])
    decoder._feed(mx.array([2, 1]))
    decoder.admit([2])
    decoder.select([1, 2])
    decoder._feed(mx.array([1, 1]))
    return net.head(decoder.states)


def _together(net: Net, prompt: Ids) -> mx.array:
    """Logits after token 1 twice for a prompt that is there twice."""
    decoder = _decoder(net, [prompt] * 3, "equal")
    decoder.admit([0, 1, 2])
    decoder.select([1, 2])
    for _ in range(2):
        decoder._feed(mx.array([1, 1]))
    return net.head(decoder.states)


def _near(net: Net, compute: Callable[[], mx.array], expected: mx.array) -> bool:
    try:
        found = compute()
        mx.eval(found)
    except UNLIKE:
        return False
    loose = 1e-3 if net.dtype == mx.float32 else 0.15
    return bool(mx.allclose(found, expected, rtol=loose, atol=loose))
