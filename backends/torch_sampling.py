"""Drawing tokens, and the plain way of decoding: a batch padded on the left, with a cache that grows, or with none.

A token is the inverse CDF, in vocabulary order, of the tempered distribution at one uniform of the answer's
own stream. So an answer depends on its prompt, key and role alone; how answers are batched only rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from spa_lite.backend import Sampling
from spa_lite.backends.decoding import CDF_BLOCK, Decoding, Uniforms, Written
from spa_lite.backends.torch_cache import new_cache
from spa_lite.backends.torch_model import Net
from spa_lite.records import Ids

WRONG = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, NotImplementedError, IndexError)
"""What a model raises that cannot be decoded in some way."""


class Decoder(Decoding):
    """Prompts that are read together, once, padded on the left."""

    def __init__(
        self,
        net: Net,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        keep: bool = False,
        cached: bool = True,
    ) -> None:
        super().__init__(prompts, keys, sampling, stop_ids, net.context, keep=keep)
        self.net, self.cached = net, cached

    @torch.inference_mode()
    def admit(self, prompts: Sequence[int]) -> None:
        """Fill the cache with every prompt, then repeat it n times."""
        some = [self.prompts[index] for index in prompts]
        lengths = [len(prompt) for prompt in some]
        self.width, length = max(lengths), max(self.limits[index] for index in prompts)
        self.padded = min(lengths) < self.width
        ids = self.net.tensor([(0,) * (self.width - len(prompt)) + tuple(prompt) for prompt in some])
        room = self.net.tensor([[0] * (self.width - size) + [1] * (size + length) for size in lengths])
        self.cache = new_cache(self.net.text) if self.cached else None
        mask = room[:, : self.width]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.net.hidden(ids, mask if self.padded else None, positions, self.cache)
        self.states = hidden[:, -1].repeat_interleave(self.n, dim=0)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(self.n)
        self.ids = ids.repeat_interleave(self.n, dim=0)
        self.room = room.repeat_interleave(self.n, dim=0)
        self.position = self.net.tensor(lengths).repeat_interleave(self.n)

    @torch.inference_mode()
    def advance(self, uniforms: Uniforms, final: bool) -> Written:
        """Write `steps` tokens of every answer."""
        tokens, logprobs, states = [], [], []
        steps = uniforms.shape[1]
        device = self.net.tensor(uniforms, torch.float32)
        for step in range(steps):
            states.append(self.states)
            token, logprob = draw_scored(self.net.head(self.states), self.sampling, device[:, step])
            tokens.append(token)
            logprobs.append(logprob)
            if not (final and step == steps - 1):
                self.states = self.feed(token)
        kept = to_host(torch.stack(states, dim=1)) if self.keep else None
        return Written(torch.stack(tokens, dim=1).cpu().numpy(), torch.stack(logprobs, dim=1).cpu().numpy(), kept)

    def feed(self, token: Tensor) -> Tensor:
        """What the head reads after one more token."""
        self.width += 1
        mask = self.room[:, : self.width] if self.padded else None
        last = self.net.context - 1
        if self.cache is not None:
            hidden = self.net.hidden(token[:, None], mask, self.position.clamp(max=last)[:, None], self.cache)
        else:
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            positions = (self.room[:, : self.width].cumsum(-1) - 1).clamp(min=0, max=last)
            hidden = self.net.hidden(self.ids, mask, positions)
        self.position = self.position + 1
        return hidden[:, -1]

    @torch.inference_mode()
    def select(self, live: Sequence[int]) -> None:
        """Go on with these answers only."""
        index = self.net.tensor(live)
        for name in ("states", "room", "position", "ids"):
            setattr(self, name, getattr(self, name)[index])
        if self.cache is not None:
            self.cache.batch_select_indices(index)


def to_host(states: Tensor) -> NDArray[Any]:
    """Numbers in their own precision; bfloat16, which NumPy lacks, as uint16."""
    states = states.cpu()
    found: NDArray[Any] = (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()
    return found


def draw_scored(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of float32 logits [rows, vocabulary], given one uniform in (0, 1) per row, and its log-prob at
    temperature 1 (nats)."""
    if sampling.temperature == 1:
        probabilities = torch.softmax(logits, dim=-1)
        token = _draw(probabilities, sampling, uniform)
        return token, probabilities.gather(1, token[:, None])[:, 0].log()
    token = draw(logits, sampling, uniform)
    return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The token alone."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return _draw(torch.softmax(logits / sampling.temperature, dim=-1), sampling, uniform)


def _draw(probabilities: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    return inverse_cdf(nucleus(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities, uniform)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most probable tokens whose mass reaches `top_p` (ties: the lower id first)."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, index, ordered * (before < top_p))


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds uniform * total; weights [rows, vocabulary] need no normalising."""
    rows, size = weights.shape
    if size % CDF_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % CDF_BLOCK))
    blocks = weights.view(rows, -1, CDF_BLOCK)
    totals = blocks.sum(-1).cumsum(-1)
    target = uniform[:, None] * totals[:, -1:]
    block = (totals <= target).sum(-1, keepdim=True).clamp(max=totals.shape[1] - 1)
    before = torch.where(block > 0, totals.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, CDF_BLOCK))[:, 0].cumsum(-1)
    # Rounding may leave the rest of the target just beyond the block: then its last token of any weight is meant.
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-23))
    within = (inside <= rest).sum(-1, keepdim=True)
    return (block * CDF_BLOCK + within)[:, 0]


PROBE: tuple[Ids, ...] = ((3, 2), tuple(range(1, 12)))
"""Two prompts of unlike length, on which a way of decoding is tried."""


@torch.inference_mode()
def cache_works(net: Net) -> bool:
    """Whether one step on a key-value cache, after a padded prompt, gives the logits of a forward without one."""
    try:
        return near(net, _after(net, True), _after(net, False))
    except WRONG:
        return False


@torch.inference_mode()
def expected_states(net: Net) -> Tensor:
    """What the head reads after the prompts of the probe and token 1, without a cache: [prompts, width]."""
    return _after(net, False)


def near(net: Net, found: Tensor, expected: Tensor) -> bool:
    """Whether states give the logits that were expected."""
    loose = 1e-3 if net.model.dtype == torch.float32 else 0.15
    return torch.allclose(net.head(found), net.head(expected), rtol=loose, atol=loose)


def _after(net: Net, cached: bool) -> Tensor:
    keys: Any = [[b"\0" * 16]] * len(PROBE)
    decoder = Decoder(net, PROBE, keys, Sampling(max_tokens=2), frozenset(), cached=cached)
    decoder.admit(range(len(PROBE)))
    return decoder.feed(net.tensor([1] * len(PROBE)))
