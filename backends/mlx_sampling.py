"""Sampling in batches with a key-value cache: each prompt is read once, its n answers are decoded together.

A token is the inverse CDF, in vocabulary order, of the tempered distribution at one uniform of the answer's own
stream. mlx-lm's generator draws otherwise and drops the stop token, so only its caches are used, all in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from spa_lite import keys as streams
from spa_lite.backend import Sampling
from spa_lite.backends.decoding import CDF_BLOCK, Decoding
from spa_lite.backends.mlx_model import Net
from spa_lite.backends.mlx_scoring import token_logprobs
from spa_lite.records import Ids

PREFILL = 2048
"""Prompt tokens read at a time: a GPU that also drives a screen stops kernels that take seconds."""

Way = Literal["padded", "equal", "none"]
"""How prompts share a batch: padded on the left; of equal length only; or without a cache, all tokens every step."""


class Decoder(Decoding):
    """One batch of prompts and their answers while they are being written."""

    def __init__(
        self,
        net: Net,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        way: Way = "padded",
    ) -> None:
        super().__init__(prompts, keys, sampling, stop_ids, net.context)
        self.net = net
        self.stops = mx.array(sorted(stop_ids) or [-1])
        ids = mx.array([(0,) * (self.width - len(prompt)) + tuple(prompt) for prompt in prompts])
        copies = mx.repeat(mx.arange(len(prompts)), self.n)
        self.cache = _new_cache(net, prompts, way)
        self.logits = net.head(self._read(ids)[:, -1])[copies]
        _pick(self.cache, copies)
        self.context_ids = ids[copies]
        self.limit = mx.array(self.limits)
        self.done = mx.zeros(len(self.rows), dtype=mx.bool_)
        self.tokens = mx.zeros((len(self.rows), 0), dtype=mx.int32)
        self.logps = mx.zeros((len(self.rows), 0))
        self.uniforms = mx.zeros((len(self.rows), streams.BLOCK))

    def _read(self, ids: mx.array) -> mx.array:
        """Hidden states [prompts, some, width] of the last piece of the prompts; the cache holds the rest."""
        if self.cache is None:
            return self.net.hidden(ids)
        size = max(1, PREFILL // ids.shape[0])
        for start in range(0, ids.shape[1], size):
            hidden = self.net.hidden(ids[:, start : start + size], self.cache)
            mx.eval(hidden)
        return hidden

    def advance(self, start: int, steps: int) -> list[bool]:
        """Write `steps` tokens of every answer; say which answers have ended."""
        tokens, logps = [], []
        for step in range(start, start + steps):
            if step % streams.BLOCK == 0 and self.sampling.temperature > 0:
                block = [streams.uniforms(self.keys[place], step // streams.BLOCK) for place in self.rows]
                self.uniforms = mx.array(np.stack(block))
            token = draw(self.logits, self.sampling, self.uniforms[:, step % streams.BLOCK])
            tokens.append(token)
            logps.append(token_logprobs(self.logits, token))
            ended = (token[:, None] == self.stops).any(axis=-1) | (self.limit <= step + 1)
            self.done = self.done | ended
            if step + 1 < self.length:
                self._feed(token)
            # The device works on this step while the host prepares the next; nothing is waited for.
            mx.async_eval(tokens[-1], logps[-1], self.done)
        self.tokens = mx.concatenate([self.tokens, mx.stack(tokens, axis=1).astype(mx.int32)], axis=1)
        self.logps = mx.concatenate([self.logps, mx.stack(logps, axis=1)], axis=1)
        return list(self.done.tolist())

    def _feed(self, token: mx.array) -> None:
        """Logits after one more token."""
        if self.cache is None:
            self.context_ids = mx.concatenate([self.context_ids, token[:, None].astype(self.context_ids.dtype)], axis=1)
            hidden = self.net.hidden(self.context_ids)
        else:
            hidden = self.net.hidden(token[:, None], self.cache)
        self.logits = self.net.head(hidden[:, -1])

    def fetch(self, over: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids and log-probs of these answers."""
        index = mx.array(over)
        return self.tokens[index].tolist(), self.logps[index].tolist()

    def select(self, live: Sequence[int]) -> None:
        """Go on with these answers only."""
        index = mx.array(live, dtype=mx.int32)
        for name in ("logits", "context_ids", "limit", "done", "tokens", "logps", "uniforms"):
            setattr(self, name, getattr(self, name)[index])
        _pick(self.cache, index)


def _new_cache(net: Net, prompts: Sequence[Ids], way: Way) -> list[Any] | None:
    """An empty cache per layer for all prompts."""
    if way == "none":
        return None
    if way == "equal":
        return list(make_prompt_cache(net.model))
    width = max(len(prompt) for prompt in prompts)
    single = [make_prompt_cache(net.model) for _ in prompts]
    layers = [layer[0].merge(list(layer)) for layer in zip(*single, strict=True)]
    for layer in layers:
        layer.prepare(left_padding=[width - len(prompt) for prompt in prompts])
    return layers


def _pick(cache: list[Any] | None, index: mx.array) -> None:
    """Keep these sequences, each as often as it is named."""
    for layer in cache or ():
        layer.state = type(layer.state)(
            value[index] if isinstance(value, mx.array) and value.ndim else value for value in layer.state
        )


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
    """The fastest way whose logits, one step after two prompts, are those of a forward without a cache."""
    prompts = [(1, 2, 3), (3, 2)]
    sampling = Sampling(temperature=0.0, max_tokens=2)
    expected = [_after(net, [prompt], sampling, "none") for prompt in prompts]
    if _near(net, lambda: _after(net, prompts, sampling, "padded"), mx.concatenate(expected)):
        return "padded"
    twice = mx.concatenate(expected[:1] * 2)
    return "equal" if _near(net, lambda: _after(net, prompts[:1] * 2, sampling, "equal"), twice) else "none"


def _after(net: Net, prompts: Sequence[Ids], sampling: Sampling, way: Way) -> mx.array:
    """Logits after the prompts and one more token."""
    decoder = Decoder(net, prompts, [[b"\0" * 16]] * len(prompts), sampling, frozenset(), way)
    decoder._feed(mx.array([1] * len(prompts)))
    return decoder.logits


def _near(net: Net, compute: Any, expected: mx.array) -> bool:
    try:
        found = compute()
        mx.eval(found)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, NotImplementedError):
        return False
    loose = 1e-3 if net.dtype == mx.float32 else 0.15
    return bool(mx.allclose(found, expected, rtol=loose, atol=loose))
