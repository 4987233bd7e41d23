"""Log-probabilities of given answers: the body over padded batches, the head over answer positions only, in tiles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from spa_lite.backend import Floats
from spa_lite.backends.packing import Packed
from spa_lite.backends.torch_model import Net
from spa_lite.objective import extrapolate

TILE_NUMBERS = 2**25
"""Float32 logits made at a time (128 MiB): no tensor of [batch, time, vocabulary] exists."""


def response_states(net: Net, packed: Packed) -> Tensor:
    """What the head reads at the N response positions, [N, width]."""
    hidden = net.hidden(net.tensor(packed.ids))
    return hidden.flatten(0, 1).index_select(0, net.tensor(packed.places))


def token_logprobs(net: Net, states: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [N] of each target token, float32, differentiable in `states`.

    One tile keeps its logits for the backward pass; several tiles make theirs again, so that memory stays flat.
    """
    size = tile_size(net)
    if len(targets) <= size:
        return _tile(net, states, targets)
    parts = []
    for some, ids in zip(states.split(size), targets.split(size), strict=True):
        if some.requires_grad:
            parts.append(checkpoint(_tile, net, some, ids, use_reentrant=False))
        else:
            parts.append(_tile(net, some, ids))
    return torch.cat(parts)


def extrapolated_logprobs(logits: Tensor, reference: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Log-probability [N] under the logits (1 + strength) * policy - strength * reference (Eq. 11), renormalised."""
    return -cross_entropy(extrapolate(logits, reference, strength), targets, reduction="none")


def tile_size(net: Net) -> int:
    """Positions per tile."""
    return max(16, TILE_NUMBERS // net.vocab)


def to_numpy(values: Tensor) -> Floats:
    """Float64 on the host."""
    return values.detach().cpu().numpy().astype(np.float64)


def _tile(net: Net, states: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(net.head(states), targets, reduction="none")
