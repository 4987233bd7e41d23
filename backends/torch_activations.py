"""What one forward pass keeps for its backward pass, in bytes, layer by layer: counted where autograd saves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from spa_lite.backend import Activations
from spa_lite.backends.torch_head import read, tile_size
from spa_lite.backends.torch_model import Net
from spa_lite.backends.torch_scoring import Laid, response_states

TILES = 4
"""Arrays of a tile's size, float32, that are alive at once: logits of two models, their log-softmax, and its work."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that can be checkpointed, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def measure(net: Net, laid: Laid) -> Activations:
    """Run the adapter in use forward on these lines, count, and forget."""
    layers = layers_of(net.model)
    ledger = _Ledger(
        {tensor.untyped_storage().data_ptr() for tensor in (*net.model.parameters(), *net.model.buffers())}
    )
    with ledger.watching(layers), torch.enable_grad():
        found = read(net, response_states(net, laid), laid.targets, None, lambda role: None)
    del found
    kept = [ledger.kept.get(index, 0) for index in range(len(layers))]
    most = max(kept, default=0)
    tile = TILES * 4 * net.vocab * min(tile_size(net), len(laid.targets))
    return Activations(
        tokens=laid.ids.numel(),
        layers=len(layers),
        layer=most,
        checkpointed=max(ledger.inputs, default=0),
        work=most,
        rest=ledger.kept.get(None, 0) + tile,
    )


class _Ledger:
    """Bytes saved for the backward pass, each storage once, by the layer at work (None: outside of them)."""

    def __init__(self, weights: set[int]) -> None:
        self.seen, self.kept, self.inputs = weights, dict[int | None, int](), list[int]()
        self.at: int | None = None

    @contextmanager
    def watching(self, layers: list[nn.Module]) -> Iterator[None]:
        """Count inside the block."""
        handles = [layer.register_forward_pre_hook(self._entered(index)) for index, layer in enumerate(layers)]
        handles += [layer.register_forward_hook(self._left) for layer in layers]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, index: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.at = index
            self.inputs.append(sum(some.nbytes for some in inputs[:1] if isinstance(some, Tensor)))

        return hook

    def _left(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.at = None

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.kept[self.at] = self.kept.get(self.at, 0) + storage.nbytes()
        return tensor
