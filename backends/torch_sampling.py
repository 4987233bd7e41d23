"""Sampling in batches with a key-value cache: each prompt is read once, its n answers are decoded together.

A token is the inverse CDF, in vocabulary order, of the tempered distribution at one uniform of the answer's
own stream. So an answer depends on its prompt, key and role alone; how answers are batched only rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spa_lite import keys as streams
from spa_lite.backend import Sampling
from spa_lite.backends.decoding import CDF_BLOCK, Decoding
from spa_lite.backends.torch_cache import new_cache
from spa_lite.backends.torch_model import Net
from spa_lite.records import Ids


class Decoder(Decoding):
    """One batch of prompts and their answers while they are being written."""

    def __init__(
        self,
        net: Net,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        cached: bool = True,
    ) -> None:
        super().__init__(prompts, keys, sampling, stop_ids, net.context)
        self.net, self.cached = net, cached
        self.padded = any(len(prompt) < self.width for prompt in prompts)
        self.stops = net.tensor(sorted(stop_ids))
        self._read_prompts(prompts)

    @torch.inference_mode()
    def _read_prompts(self, prompts: Sequence[Ids]) -> None:
        """Fill the cache with every prompt (padded on the left), then repeat it n times."""
        lengths = [len(prompt) for prompt in prompts]
        ids = self.net.tensor([(0,) * (self.width - len(prompt)) + tuple(prompt) for prompt in prompts])
        room = self.net.tensor([[0] * (self.width - size) + [1] * (size + self.length) for size in lengths])
        self.cache = new_cache(self.net.model.config.get_text_config()) if self.cached else None
        mask = room[:, : self.width]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.net.hidden(ids, mask if self.padded else None, positions, self.cache)
        self.logits = self.net.head(hidden[:, -1]).repeat_interleave(self.n, dim=0)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(self.n)
        else:
            self.context_ids = ids.repeat_interleave(self.n, dim=0)
        self.room = room.repeat_interleave(self.n, dim=0)
        self.position = self.net.tensor(lengths).repeat_interleave(self.n)
        self.limit = self.net.tensor(self.limits)
        self.done = torch.zeros_like(self.limit, dtype=torch.bool)
        self.tokens = torch.zeros((len(self.rows), self.length), dtype=torch.long, device=self.net.device)
        self.logps = torch.zeros(self.tokens.shape, dtype=torch.float32, device=self.net.device)
        self.uniforms = torch.zeros((len(self.rows), streams.BLOCK), device=self.net.device)

    @torch.inference_mode()
    def advance(self, start: int, steps: int) -> list[bool]:
        """Write `steps` tokens of every answer; say which answers have ended."""
        for step in range(start, start + steps):
            if step % streams.BLOCK == 0 and self.sampling.temperature > 0:
                block = [streams.uniforms(self.keys[place], step // streams.BLOCK) for place in self.rows]
                self.uniforms = self.net.tensor(np.stack(block), torch.float32)
            token = draw(self.logits, self.sampling, self.uniforms[:, step % streams.BLOCK])
            chosen = self.logits.gather(1, token[:, None])[:, 0]
            self.tokens[:, step] = token
            self.logps[:, step] = chosen - self.logits.logsumexp(-1)
            self.done |= torch.isin(token, self.stops) | (self.limit <= step + 1)
            if step + 1 < self.length:
                self._feed(token, step)
        return [bool(end) for end in self.done.tolist()]

    def _feed(self, token: Tensor, step: int) -> None:
        """Logits after one more token."""
        mask = self.room[:, : self.width + step + 1] if self.padded else None
        if self.cache is not None:
            position = self.position.clamp(max=self.net.context - 1)[:, None]
            hidden = self.net.hidden(token[:, None], mask, position, self.cache)
        else:
            self.context_ids = torch.cat([self.context_ids, token[:, None]], dim=1)
            positions = (self.room[:, : self.width + step + 1].cumsum(-1) - 1).clamp(min=0, max=self.net.context - 1)
            hidden = self.net.hidden(self.context_ids, mask, positions)
        self.logits = self.net.head(hidden[:, -1])
        self.position = self.position + 1

    def fetch(self, over: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids and log-probs of these answers."""
        index = self.net.tensor(over)
        return self.tokens[index].tolist(), self.logps[index].tolist()

    @torch.inference_mode()
    def select(self, live: Sequence[int]) -> None:
        """Go on with these answers only."""
        index = self.net.tensor(live)
        for name in ("logits", "room", "position", "limit", "done", "tokens", "logps", "uniforms"):
            setattr(self, name, getattr(self, name)[index])
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        else:
            self.context_ids = self.context_ids[index]


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token per row of float32 logits [rows, vocabulary], given one uniform in (0, 1) per row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    return inverse_cdf(probabilities, uniform)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most probable tokens whose mass reaches `top_p` (ties: the lower id first)."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, index, ordered * (before < top_p))


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds uniform * total; weights [rows, vocabulary] need no normalising."""
    rows, size = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -size % CDF_BLOCK)).view(rows, -1, CDF_BLOCK)
    totals = blocks.sum(-1).cumsum(-1)
    target = uniform[:, None] * totals[:, -1:]
    block = (totals <= target).sum(-1, keepdim=True).clamp(max=totals.shape[1] - 1)
    before = torch.where(block > 0, totals.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, CDF_BLOCK))[:, 0].cumsum(-1)
    # Rounding may leave the rest of the target just beyond the block: then its last token of any weight is meant.
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-23))
    within = (inside <= rest).sum(-1, keepdim=True)
    return (block * CDF_BLOCK + within)[:, 0]


@torch.inference_mode()
def cache_works(net: Net) -> bool:
    """Whether one step on a key-value cache, after a padded prompt, gives the logits of a forward without one."""
    prompts = [(1, 2, 3), (3, 2)]
    sampling = Sampling(temperature=0.0, max_tokens=2)
    keys: Any = [[b"\0" * 16]] * 2
    try:
        with_cache = Decoder(net, prompts, keys, sampling, frozenset())
        without = Decoder(net, prompts, keys, sampling, frozenset(), cached=False)
        token = net.tensor([1, 1])
        with_cache._feed(token, 0)
        without._feed(token, 0)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, NotImplementedError):
        return False
    loose = 1e-3 if net.model.dtype == torch.float32 else 0.15
    return torch.allclose(with_cache.logits, without.logits, rtol=loose, atol=loose)
