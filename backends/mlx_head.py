"""The head in tiles of positions: log-probabilities and their derivatives, made together. No logits outlive a tile.

d logp / d state of a token needs nothing from the loss, which multiplies it by one number per response. So it is formed
where the logits are, and [N, width] is kept in place of [N, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from spa_lite.backends.mlx_device import device_in_use
from spa_lite.backends.mlx_model import Net
from spa_lite.objective import extrapolate

TILE_NUMBERS = {"cpu": 2**20, "gpu": 2**23}
"""Float32 logits made at a time: no array of [batch, time, vocabulary] exists. Some ten arrays of this size do. On a
CPU smaller ones are no slower; a GPU wants a hundred positions of a large vocabulary to be busy."""
SUM_BLOCK = 32

Head = Callable[[mx.array], mx.array]
"""Float32 logits [N, vocabulary] of states [N, width], under one adapter."""


@dataclass(frozen=True)
class Reference:
    """What is wanted of the reference, beside the policy."""

    head: Head
    logp: bool  # its own log-probs
    strength: float  # lambda of Eq. 11; 0: nothing extrapolated
    mixable: bool  # both heads are the same matrix, and nothing is done to the logits: then states may be mixed


def weigh(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Logits [N, vocabulary] under their maximum, the exponentials of that, and the sums [N] of these.

    Not `mx.logsumexp`: on the CPU it adds one by one, so that a likely token swallows what all the unlikely ones
    add up to (3e-6 nats per token, always to the same side). Sums of blocks lose a twentieth of that.
    """
    shifted = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = mx.exp(shifted)
    blocks = mx.pad(weights, [(0, 0), (0, -logits.shape[-1] % SUM_BLOCK)]).reshape(len(logits), -1, SUM_BLOCK)
    return shifted, weights, blocks.sum(axis=-1).sum(axis=-1)


def pick(values: mx.array, targets: mx.array) -> mx.array:
    """The value [N] at each row's target."""
    return mx.take_along_axis(values, targets[:, None], axis=-1)[:, 0]


def token_logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    """Log-probability [N] of each target under float32 logits [N, vocabulary]."""
    shifted, _, total = weigh(logits)
    return pick(shifted, targets) - mx.log(total)


def logprobs_and_slopes(head: Head, states: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Log-prob [N] of each target, its derivative by the state [N, width], and the logits they came from."""

    def read(some: mx.array) -> list[mx.array]:
        logits = head(some)
        return [token_logprobs(logits, targets), mx.stop_gradient(logits)]

    # Behind a stopped gradient nothing asks for the second cotangent.
    (logp, logits), (slopes,) = mx.vjp(read, [states], [mx.ones(len(targets)), mx.zeros(())])
    return logp, slopes, logits


def read(
    net: Net, head: Head, own: mx.array, targets: mx.array, theirs: mx.array | None, reference: Reference | None
) -> list[mx.array]:
    """Log-probs [N] and slopes [N, width]; then, if asked for, log-probs of the reference and of the mix."""

    def tile(own: mx.array, targets: mx.array, theirs: mx.array | None = None) -> list[mx.array]:
        logp, slopes, logits = logprobs_and_slopes(head, own, targets)
        return [logp, slopes, *beside(logits, own, targets, theirs, reference)]

    return in_turn(net, tile, own, targets, *([] if theirs is None else [theirs]))


def beside(
    logits: mx.array, own: mx.array, targets: mx.array, theirs: mx.array | None, reference: Reference | None
) -> Iterator[mx.array]:
    """Log-probs [N] of the reference and of the extrapolated model (Eq. 11), whichever are asked for.

    The mix needs no third product with the head: it is that of the logits where both are there, else of the states.
    """
    if reference is None or theirs is None:
        return
    strength = reference.strength
    if reference.mixable and not reference.logp:
        mixed = extrapolate(own.astype(mx.float32), theirs.astype(mx.float32), strength).astype(own.dtype)
        yield token_logprobs(reference.head(mixed), targets)
        return
    expected = reference.head(theirs)
    if reference.logp:
        yield token_logprobs(expected, targets)
    if strength > 0:
        yield token_logprobs(extrapolate(logits, expected, strength), targets)


def logprobs(net: Net, head: Head, states: mx.array, targets: mx.array) -> mx.array:
    """Log-prob [N] of each target, nothing else."""
    return in_turn(net, lambda some, those: [token_logprobs(head(some), those)], states, targets)[0]


def in_turn(net: Net, compute: Callable[..., Sequence[mx.array]], *arrays: mx.array) -> list[mx.array]:
    """`compute` over tiles of the first axis of the arrays, one after the other, its results put together.

    Each tile waits for the one before: MLX would work on all at once, and hold the logits of all.
    """
    done: list[Sequence[mx.array]] = []
    for part in tiles(len(arrays[0]), net):
        first, *others = (array[part] for array in arrays)
        done.append(compute(mx.depends(first, done[-1]) if done else first, *others))
    return list(done[0]) if len(done) == 1 else [mx.concatenate(parts) for parts in zip(*done, strict=True)]


def tiles(count: int, net: Net) -> Iterator[slice]:
    """Slices of `count` positions, each as many as one tile holds."""
    size = max(16, TILE_NUMBERS[device_in_use()] // net.vocab)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
