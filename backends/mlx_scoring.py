"""Log-probabilities of given answers: the body over padded batches, the head over answer positions only, in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from spa_lite.backend import Floats
from spa_lite.backends.mlx_model import Net
from spa_lite.backends.packing import Packed
from spa_lite.objective import extrapolate

TILE_NUMBERS = 2**23
"""Float32 logits made at a time (32 MiB): no array of [batch, time, vocabulary] exists."""
SUM_BLOCK = 32
FORWARD = 2**14
"""Tokens, padding included, that go through the body at a time."""


def logprobs(net: Net, packed: Packed) -> Floats:
    """Log-prob of each response token, [N] float64, evaluated piece by piece so that memory stays flat."""
    responses = max(1, FORWARD // packed.ids.shape[1])
    ends = np.concatenate([[0], packed.lengths.cumsum()])
    found = [np.zeros(0)]
    for start in range(0, len(packed.lengths), responses):
        stop = min(start + responses, len(packed.lengths))
        first, last = int(ends[start]), int(ends[stop])
        places = mx.array(packed.places[first:last] - start * packed.ids.shape[1])
        states = response_states(net, mx.array(packed.ids[start:stop]), places)
        mx.eval(states)
        for tile in tiles(last - first, net):
            targets = mx.array(packed.targets[first:last][tile])
            found.append(to_numpy(token_logprobs(net.head(states[tile]), targets)))
    return np.concatenate(found)


def response_states(net: Net, ids: mx.array, places: mx.array) -> mx.array:
    """What the head reads at the response positions, [N, width]; `places` are flat indices into ids [R, time]."""
    hidden = net.hidden(ids)
    return hidden.reshape(-1, hidden.shape[-1])[places]


def token_logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    """Log-probability [N] of each target under float32 logits [N, vocabulary].

    Not `mx.logsumexp`: on the CPU it adds one by one, so that a likely token swallows what all the unlikely ones
    add up to (3e-6 nats per token, always to the same side). Sums of blocks lose a twentieth of that.
    """
    shifted = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = mx.pad(mx.exp(shifted), [(0, 0), (0, -logits.shape[-1] % SUM_BLOCK)])
    total = weights.reshape(len(logits), -1, SUM_BLOCK).sum(axis=-1).sum(axis=-1)
    return mx.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0] - mx.log(total)


def extrapolated_logprobs(logits: mx.array, reference: mx.array, targets: mx.array, strength: float) -> mx.array:
    """Log-probability [N] under the logits (1 + strength) * policy - strength * reference (Eq. 11), renormalised."""
    return token_logprobs(extrapolate(logits, reference, strength), targets)


def tiled(net: Net, compute: Callable[..., mx.array], *arrays: mx.array, again: bool = True) -> mx.array:
    """`compute` over tiles of the first axis, one after the other; `again` for the backward pass, tile by tile.

    What is made again gives a gradient to the first of `arrays` alone: not for a head that is itself trained.
    """
    parts = list(tiles(len(arrays[0]), net))
    if len(parts) == 1 or not again:
        return compute(*arrays)

    def in_turn(of: Callable[..., mx.array], first: mx.array, start: mx.array) -> mx.array:
        # Each waits for the one before: MLX would work on all tiles at once, and hold the logits of all.
        done = [start]
        for part in parts:
            done.append(of(mx.depends(first[part], done[-1]), part))
        return mx.concatenate(done[1:])

    @mx.custom_function
    def whole(first: mx.array, *others: mx.array) -> mx.array:
        return in_turn(lambda piece, part: compute(piece, *(array[part] for array in others)), first, first)

    @whole.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        first, *others = primals

        def gradient(piece: mx.array, part: slice) -> mx.array:
            rest = [array[part] for array in others]
            return mx.vjp(lambda some: compute(some, *rest), [piece], [cotangent[part]])[1][0]

        return in_turn(gradient, first, output), *map(mx.zeros_like, others)

    return whole(*arrays)


def tiles(count: int, net: Net) -> Iterator[slice]:
    """Slices of `count` positions, each as many as one tile holds."""
    size = max(16, TILE_NUMBERS // net.vocab)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def to_numpy(values: mx.array) -> Floats:
    """Float64 on the host."""
    return np.array(values, dtype=np.float64)
