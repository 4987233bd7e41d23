"""Key-value caches: one with room to grow (transformers' own copies everything at every token), one of fixed slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Places added at a time."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [batch, heads, length, width], as views of buffers that are longer."""

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states behind the old ones and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            grown = _longer(key_states, end + ROOM), _longer(value_states, end + ROOM)
            if start:
                grown[0][:, :, :start], grown[1][:, :, :start] = self.keys, self.values
            self._buffers = grown
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._buffers = None


def new_cache(config: Any) -> DynamicCache:
    """A cache for a model of this config; layers of other kinds (sliding windows, ...) stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class Turn:
    """What the next forward pass does, for all layers. They hold this and not their cache, which holds them: a cycle
    would keep the buffers of a finished sampler until Python looks for cycles, which large tensors do not bring about.
    """

    slots: int
    length: int
    into: Tensor | None = None
    where: Any = None
    width: int = 0


class SlotCache(Cache):
    """Keys and values [slots, heads, length, width] of every layer, taken once. Each slot has a length of its own.

    Before a forward pass one says what it does: `read` prompts into slots, or `extend` the first slots by one token.
    """

    layers: list[Any]

    def __init__(self, layers: int, slots: int, length: int) -> None:
        self.turn = Turn(slots, length)
        super().__init__(layers=[SlotLayer(self.turn) for _ in range(layers)])

    def read(self, into: Tensor) -> None:
        """The next forward reads prompts, padded on the right, each into the slots [prompts, copies] of its row."""
        self.turn.into = into

    def extend(self, at: Tensor, width: int) -> None:
        """The next forwards write one token of the first len(at) slots at these places, and see `width` places."""
        self.turn.into, self.turn.width = None, width
        self.turn.where = torch.arange(len(at), device=at.device), slice(None), at

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first places of some slots to others."""
        for layer in self.layers:
            for buffer in layer.buffers or ():
                buffer[target, :, :width] = buffer[source, :, :width]


class SlotLayer(DynamicLayer):
    """One layer of it."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn = turn
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states [rows, heads, time, width] to their slots; return what these rows may look at."""
        if self.buffers is None:
            self.buffers = self._zeros(key_states), self._zeros(value_states)
        keys, values = self.buffers
        if self.turn.into is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[self.turn.into, :, : states.shape[2]] = states[:, None]
            return key_states, value_states
        where, rows, width = self.turn.where, len(key_states), self.turn.width
        keys[where], values[where] = key_states[:, :, 0], value_states[:, :, 0]
        return keys[:rows, :, :width], values[:rows, :, :width]

    def get_seq_length(self) -> int:
        """For a prompt, which is read into empty slots; positions and mask of all else are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The same."""
        return query_length, 0

    def _zeros(self, states: Tensor) -> Tensor:
        # Zeros: what a mask hides is multiplied by 0, and must be finite.
        shape = self.turn.slots, states.shape[1], self.turn.length, states.shape[3]
        return torch.zeros(shape, dtype=states.dtype, device=states.device)


def plain_layers(config: Any) -> int:
    """How many layers a model of this config has, if all keep all keys and values; else 0."""
    layers = DynamicCache(config=config).layers
    return len(layers) if all(type(layer) is DynamicLayer for layer in layers) else 0


def _longer(states: Tensor, length: int) -> Tensor:
    batch, heads, _, width = states.shape
    return torch.empty((batch, heads, length, width), dtype=states.dtype, device=states.device)
