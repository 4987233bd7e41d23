"""Log-probabilities of given answers: the body over padded batches, the head over answer positions only, in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from spa_lite.backend import Floats
from spa_lite.backends.torch_model import Net
from spa_lite.objective import extrapolate
from spa_lite.records import Ids, Row

TILE_NUMBERS = 2**25
"""Float32 logits made at a time (128 MiB): no tensor of [batch, time, vocabulary] exists."""


@dataclass(frozen=True)
class Packed:
    """The responses of some rows as one right-padded batch. R responses, N response tokens in all.

    Attention is causal, so padding on the right changes nothing before it and needs no mask.
    """

    ids: Tensor  # [R, longest]
    places: Tensor  # [N] flat index of the position that predicts each response token
    targets: Tensor  # [N] the response tokens
    owner: np.ndarray[tuple[int], np.dtype[np.int64]]  # [N] response of each token
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]]  # [R] response tokens
    row: np.ndarray[tuple[int], np.dtype[np.int64]]  # [R] row of each response

    def sums(self, per_token: Floats) -> Floats:
        """Per-response sums [R] of a per-token array [N], float64."""
        return np.bincount(self.owner, weights=per_token, minlength=len(self.lengths)).astype(np.float64)


def pack(net: Net, rows: Sequence[Row]) -> Packed:
    """Lay out rows for one forward pass."""
    pairs = [(index, row.prompt, response) for index, row in enumerate(rows) for response in row.responses]
    width = max(len(prompt) + len(response) for _, prompt, response in pairs)
    ids: list[Ids] = []
    places: list[int] = []
    targets: list[int] = []
    for line, (_, prompt, response) in enumerate(pairs):
        ids.append((*prompt, *response) + (0,) * (width - len(prompt) - len(response)))
        first = line * width + len(prompt) - 1
        places.extend(range(first, first + len(response)))
        targets.extend(response)
    lengths = np.array([len(response) for _, _, response in pairs], dtype=np.int64)
    return Packed(
        ids=net.tensor(ids),
        places=net.tensor(places),
        targets=net.tensor(targets),
        owner=np.repeat(np.arange(len(pairs)), lengths),
        lengths=lengths,
        row=np.array([index for index, _, _ in pairs], dtype=np.int64),
    )


def response_states(net: Net, packed: Packed) -> Tensor:
    """What the head reads at the N response positions, [N, width]."""
    hidden = net.hidden(packed.ids)
    return hidden.flatten(0, 1).index_select(0, packed.places)


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
