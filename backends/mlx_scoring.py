"""Log-probabilities of given answers: the body over lines of like length, the head over answer positions only."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from spa_lite.backend import Floats
from spa_lite.backends.mlx_head import logprobs, tiles
from spa_lite.backends.mlx_model import Net
from spa_lite.backends.packing import Packed, pack
from spa_lite.records import Row

FORWARD = 2**14
"""Tokens, padding included, that go through the body at a time: a row's many answers may be more than a batch."""


def row_logprobs(net: Net, rows: Sequence[Row]) -> Floats:
    """Log-prob of each response token, [N] float64, evaluated piece by piece so that memory stays flat."""
    packed = pack(rows, net.lines_for(rows))
    many, wide = packed.ids.shape
    found = [np.zeros(0)]
    for start in range(0, many, max(1, FORWARD // wide)):
        states, targets = _piece(net, packed, start, min(start + max(1, FORWARD // wide), many))
        mx.eval(states)
        for tile in tiles(len(states), net):
            found.append(to_numpy(logprobs(net, net.head, states[tile], targets[tile])))
    return np.concatenate(found)


def _piece(net: Net, packed: Packed, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """States and targets of some of the lines."""
    wide = packed.ids.shape[1]
    first, last = np.searchsorted(packed.places, [start * wide, stop * wide])
    lines = [array[start:stop] for array in (packed.ids, packed.positions, packed.segments)]
    lines.append(packed.places[first:last] - start * wide)
    return net.states([mx.array(a) for a in lines], packed.branching), mx.array(packed.targets[first:last])


def to_numpy(values: mx.array) -> Floats:
    """Float64 on the host."""
    return np.array(values, dtype=np.float64)
