"""What a training step and a scoring compute, counted: forward passes, tokens, head products, operations.

Counts do not depend on how busy a machine is, so they are asserted exactly, against formulas of the model's shape.
"""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spa_lite.backend import POLICY, PREVIOUS, Batching, Known, ModelSettings, Optimizer
from spa_lite.backends import torch_head
from spa_lite.backends.packing import apart, batches, together
from spa_lite.backends.torch import TorchBackend
from spa_lite.backends.torch_scoring import lay_out, response_states
from spa_lite.objective import Dpo
from spa_lite.records import Row
from tests.contract import LORA, Mixed, sums
from tests.tiny import make_model

PRODUCTS = {"mm", "addmm", "addmm_"}
MAPPING = {torch.ops.aten.addmm_: lambda _, left, right, **more: 2 * left[0] * left[1] * right[1]}
ROWS = [
    Row(prompt=tuple(range(5, 5 + size)), responses=(tuple(range(9, 9 + one)), tuple(range(30, 30 + two))))
    for size, one, two in ((12, 9, 14), (20, 6, 7), (8, 30, 3), (20, 8, 5))
]
RESPONSE_TOKENS = sum(len(response) for row in ROWS for response in row.responses)


@dataclass
class Counted:
    """What was seen at work."""

    bodies: list[int] = field(default_factory=list)  # tokens of each forward pass through the layers, padding included
    heads: list[int] = field(default_factory=list)  # tokens of each product with the head
    products: int = 0  # floating-point operations of matrix products, attention's left out


@contextmanager
def counting(backend: TorchBackend) -> Iterator[Counted]:
    """Count inside the block."""
    found, model = Counted(), backend.net.model
    hooks = [
        model.base_model.layers[0].register_forward_pre_hook(
            lambda _, given: found.bodies.append(given[0][..., 0].numel())
        ),
        model.get_output_embeddings().register_forward_pre_hook(lambda _, given: found.heads.append(len(given[0]))),
    ]
    try:
        with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
    counts = counter.get_flop_counts()["Global"]
    found.products = sum(flops for kind, flops in counts.items() if str(kind).partition(".")[2] in PRODUCTS)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> TorchBackend:
    """A tiny Llama in training, all rows in one micro-batch, its reference another adapter."""
    torch.set_num_threads(1)
    made = TorchBackend(ModelSettings(model=str(make_model(tmp_path_factory.mktemp("llama"))), device="cpu"))
    made.bind(POLICY, None, LORA)
    made.snapshot()
    made.start_training(Optimizer())
    made.dpo_step(ROWS, Dpo(), 1e-3)
    return made


def linears(backend: TorchBackend) -> tuple[list[tuple[int, int]], int]:
    """(Inputs, outputs) of each adapted linear layer, and the rank."""
    config = backend.net.model.config
    wide, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    few = wide * config.num_key_value_heads // heads
    layer = [(wide, wide), (wide, few), (wide, few), (wide, wide), (wide, inner), (wide, inner), (inner, wide)]
    return layer * config.num_hidden_layers, LORA.rank


def forward(backend: TorchBackend) -> int:
    """Operations of one forward pass per token: each layer's product, and the adapter's two."""
    layers, rank = linears(backend)
    return sum(2 * (a * b + rank * (a + b)) for a, b in layers)


def backward(backend: TorchBackend) -> tuple[int, int]:
    """Operations of the backward pass per token: by the input, and by the adapter's own two matrices.

    No product by the frozen weights' own gradient; and the embedding below the first layer wants none, which saves its
    first three layers (query, key, value) the gradient by their input.
    """
    layers, rank = linears(backend)
    inputs = sum(2 * (a * b + rank * a) for a, b in layers[3:])
    return inputs + sum(2 * rank * b for _, b in layers), sum(2 * rank * (a + b) for a, b in layers)


def head(backend: TorchBackend) -> int:
    """Operations of one product with the head, per token."""
    return 2 * backend.net.vocab * int(backend.net.model.config.hidden_size)


def tokens(rows: Sequence[Row]) -> int:
    """Of one batch: each prompt once, each response without its last token, all as long as the longest."""
    return len(rows) * max(together(row) for row in rows)


STEPS: dict[str, tuple[float, Callable[[Known], Known | None], int, int]] = {
    "plain, reference known": (0.0, lambda known: replace(known, states=None), 1, 2),
    "plain, reference computed": (0.0, lambda known: None, 2, 3),
    "extrapolated, reference computed": (0.5, lambda known: None, 2, 3),
    "extrapolated, sums known": (0.5, lambda known: replace(known, states=None), 2, 3),
    "extrapolated, sums and states known": (0.5, lambda known: known, 1, 3),
}
"""lambda, what is known, forward passes through the body, head products per response token (one for the gradient)."""


TILES = {step: 2 if step == "plain, reference known" else 4 for step in STEPS}
"""Tensors as wide as the vocabulary that are made for each tile."""


def known_of(backend: TorchBackend) -> Known:
    """Sums and states of the reference."""
    backend._enter(PREVIOUS)
    laid = lay_out(backend.net, ROWS)
    with torch.no_grad():
        states = response_states(backend.net, laid).numpy()
    return Known(sums(backend, ROWS, PREVIOUS), tuple(np.split(states, laid.packed.lengths.cumsum()[:-1])))


@pytest.mark.parametrize("step", STEPS)
def test_a_step_computes_nothing_twice(step: str, backend: TorchBackend) -> None:
    extrapolation, what, bodies, products = STEPS[step]
    known = what(known_of(backend))
    with counting(backend) as counted:
        stats = backend.dpo_step(ROWS, Mixed(extrapolation), 0.0, known)
    assert counted.bodies == [tokens(ROWS)] * bodies
    assert counted.heads == [RESPONSE_TOKENS] * (products - 1), "the gradient's product is no call of the module"
    gradient, own = backward(backend)
    expected = tokens(ROWS) * (bodies * forward(backend) + gradient + own)
    assert counted.products == expected + products * RESPONSE_TOKENS * head(backend)
    assert stats.tokens == RESPONSE_TOKENS


def test_checkpointed_layers_run_once_more(backend: TorchBackend) -> None:
    usual = backend.batching
    layers = int(backend.net.model.config.num_hidden_layers)
    found = []
    for some in (0, 1, layers):
        backend.batching = replace(usual, checkpointed=some)
        with counting(backend) as counted:
            backend.dpo_step(ROWS, Mixed(0.0), 0.0, Known(np.zeros(8)))
        found.append(counted.products)
    backend.batching = usual
    layer = forward(backend) // layers - 2 * LORA.rank * backend.net.model.config.hidden_size
    assert found[1] - found[0] == tokens(ROWS) * layer, "all but the last product, whose result nothing needs"
    assert found[2] - found[0] == tokens(ROWS) * layer * layers


def test_scoring_is_one_forward_pass(backend: TorchBackend) -> None:
    with counting(backend) as counted:
        sums(backend, ROWS)
    assert (counted.bodies, counted.heads) == ([tokens(ROWS)], [RESPONSE_TOKENS])
    assert counted.products == tokens(ROWS) * forward(backend) + RESPONSE_TOKENS * head(backend)


class Allocations(TorchDispatchMode):  # type: ignore[misc]
    """The bytes of every new tensor that is as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; what does not lie in a tensor that it was given is new."""
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[-1] == self.vocabulary:
                self.made += [leaf.numel() * leaf.element_size()] * (leaf.untyped_storage().data_ptr() not in given)
        return out


@pytest.mark.parametrize(("step", "tensors"), TILES.items())
@pytest.mark.parametrize("tile", [10**6, 16])
def test_logits_that_are_made(
    step: str, tensors: int, tile: int, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many tensors a tile, each of them float32 and no larger than a tile: none of [batch, time, vocabulary]."""
    vocabulary = backend.net.vocab
    monkeypatch.setattr(torch_head, "tile_size", lambda net: tile)
    extrapolation, what, _, _ = STEPS[step]
    known = what(known_of(backend))
    with Allocations(vocabulary) as seen:
        backend.dpo_step(ROWS, Mixed(extrapolation), 0.0, known)
    tiles = [min(tile, RESPONSE_TOKENS - start) for start in range(0, RESPONSE_TOKENS, tile)]
    assert sorted(seen.made) == sorted(4 * vocabulary * size for size in tiles for _ in range(tensors))


def test_tokens_computed_per_useful_token(backend: TorchBackend) -> None:
    """Sorted lines with the prompt once waste less than half of what a line per response, in data order, does."""
    usual, rows = backend.batching, ROWS * 2
    backend.batching = Batching(micro_tokens=100, score_tokens=100)
    useful = sum(together(row) for row in rows)
    with counting(backend) as counted:
        backend.dpo_step(rows, Mixed(0.0), 0.0, Known(np.zeros(16)))
    with counting(backend) as scored:
        sums(backend, rows)
    backend.batching = usual
    expected = [tokens([rows[index] for index in some]) for some in batches(rows, 100, backend.net.shared)]
    assert counted.bodies == scored.bodies == expected
    assert (useful, sum(expected)) == (268, 270)
    naive = sum(2 * max(map(apart, rows[at : at + 2])) * 2 for at in range(0, len(rows), 2))
    assert naive == 504


def test_the_probe_counts_and_changes_nothing(backend: TorchBackend) -> None:
    before = sums(backend, ROWS)
    found = [backend.activations(row) for row in (ROWS[0], ROWS[0], ROWS[2])]
    assert found[0] == found[1]
    one, other = found[0], found[2]
    assert one is not None
    assert other is not None
    assert (one.tokens, one.layers) == (together(ROWS[0]), 2)
    assert one.checkpointed == 4 * one.tokens * backend.net.model.config.hidden_size
    assert one.layer > 10 * one.checkpointed
    assert one.layer / one.tokens == pytest.approx(other.layer / other.tokens, rel=0.2)
    assert (sums(backend, ROWS) == before).all()
    assert all(parameter.grad is None for parameter in backend.net.model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in backend.net.model.base_model.layers)
