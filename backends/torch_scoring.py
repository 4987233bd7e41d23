"""Rows through the body of the model: what the head then reads at response positions. And plain scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spa_lite.backend import Floats
from spa_lite.backends.packing import Packed, pack
from spa_lite.backends.torch_head import token_logprobs
from spa_lite.backends.torch_model import Net
from spa_lite.records import Row


@dataclass(frozen=True)
class Laid:
    """Packed rows on the device, for as many passes as are needed."""

    packed: Packed
    ids: Tensor  # [L, W]
    positions: Tensor | None  # [L, W]
    mask: Tensor | None  # [L, 1, W, W]; none where attention is plainly causal
    places: Tensor  # [N]
    targets: Tensor  # [N]


def lay_out(net: Net, rows: Sequence[Row]) -> Laid:
    """Rows packed, and brought to the device."""
    packed = pack(rows, net.shared)
    if packed.branching and packed.ids.shape[1] > net.shared:
        packed = pack(rows)  # a line beyond the window is among them, and no mask may stand in the window's place
    if packed.branching and net.device.type == "cuda":
        packed = widened(packed, -packed.ids.shape[1] % 8)  # masked attention wants whole eights there
    return Laid(
        packed,
        net.tensor(packed.ids),
        net.tensor(packed.positions) if packed.branching else None,
        net.mask(packed),
        net.tensor(packed.places),
        net.tensor(packed.targets),
    )


def widened(packed: Packed, more: int) -> Packed:
    """The same lines with more padding."""
    wide = ((0, 0), (0, more))
    return replace(
        packed,
        ids=np.pad(packed.ids, wide),
        positions=np.pad(packed.positions, wide),
        segments=np.pad(packed.segments, wide, constant_values=-1),
        places=packed.places + packed.places // packed.ids.shape[1] * more,
    )


def response_states(net: Net, laid: Laid) -> Tensor:
    """What the head reads at the N response positions, [N, width]."""
    hidden = net.hidden(laid.ids, laid.mask, laid.positions)
    return hidden.flatten(0, 1).index_select(0, laid.places)


@torch.inference_mode()
def score(net: Net, rows: Sequence[Row]) -> Floats:
    """Log-probabilities [N] of all response tokens under the adapter in use."""
    laid = lay_out(net, rows)
    return to_numpy(token_logprobs(net, response_states(net, laid), laid.targets))


def to_numpy(values: Tensor) -> Floats:
    """Float64 on the host."""
    return values.detach().cpu().numpy().astype(np.float64)
