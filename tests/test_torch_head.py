"""The head in tiles against full logits and autograd: every kind of head, and how much memory it takes."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.utils._python_dispatch import TorchDispatchMode

from spa_lite.backends import torch_head
from spa_lite.backends.torch_head import Reference, read, token_logprobs
from spa_lite.backends.torch_model import Net
from spa_lite.estimate import TORCH_CPU
from tests.tiny import make_config

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied": ("qwen2", {}),
    "soft-capped": ("gemma2", {}),
    "scaled": ("granite", {}),
    "biased": ("phi", {}),
    "quantised": ("llama", {}),
}


class Other(torch.nn.Linear):  # type: ignore[misc,name-defined]
    """A linear layer that is not known as one: as a quantised head, whose weights only it can read."""


def net_of(kind: str) -> Net:
    """A random model with that head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    architecture, changes = HEADS[kind]
    if architecture == "phi":
        config = AutoConfig.for_model(
            "phi", vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
        )
    else:
        config = make_config(architecture, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    if architecture == "phi":
        model.lm_head.bias.normal_()
    if kind == "quantised":
        model.lm_head.__class__ = Other
    return Net(model, torch.device("cpu"))


def naive(net: Net, states: Any, targets: Any, reference: Any, strength: float) -> tuple[Any, Any, Any]:
    """Full logits by the model's own head, as its own forward finishes them."""
    text = net.text

    def logits(some: Any) -> Any:
        made = net.model.get_output_embeddings()(some) / getattr(text, "logits_scaling", 1.0)
        cap = getattr(text, "final_logit_softcapping", None)
        return made if cap is None else cap * torch.tanh(made / cap)

    own, theirs = logits(states), logits(reference)
    mixed = (1 + strength) * own - strength * theirs
    first, second, third = (some.log_softmax(-1).gather(1, targets[:, None])[:, 0] for some in (own, theirs, mixed))
    return first, second, third


@pytest.mark.parametrize("rows", [3, 7, 100], ids=lambda rows: f"tiles-of-{rows}")
@pytest.mark.parametrize("kind", HEADS)
def test_tiles_are_full_logits_and_autograd(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of(kind)
    monkeypatch.setattr(torch_head, "tile_size", lambda net: rows)
    states, other = torch.randn(2, 20, net.text.hidden_size)
    targets, weight, strength = torch.randint(0, net.vocab, (20,)), torch.randn(20), 0.7
    states.requires_grad_()
    expected = naive(net, states, targets, other, strength)
    (expected[0] * weight).sum().backward()
    gradient, states.grad = states.grad, None
    for wanted in (True, False):
        found = read(net, states, targets, Reference(other, wanted, strength), lambda role: None)
        assert torch.allclose(found.logp, expected[0], atol=1e-5)
        assert torch.allclose(found.extrapolated, expected[2], atol=1e-5)
        if wanted:
            assert torch.allclose(found.reference, expected[1], atol=1e-5)
        assert not found.extrapolated.requires_grad
        (found.logp * weight).sum().backward()
        assert torch.allclose(states.grad, gradient, atol=1e-5)
        states.grad = None
    found = read(net, states, targets, None, lambda role: None)
    assert torch.allclose(found.logp, expected[0], atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(token_logprobs(net, states, targets), expected[0], atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "rows"), [(256, 2**14), (2**15, 128), (2**17, 64), (2**20, 64)])
def test_a_tile_has_rows_enough_for_any_vocabulary(vocabulary: int, rows: int) -> None:
    """On the CPU; and the estimate of memory knows it."""
    net: Any = SimpleNamespace(device=torch.device("cpu"), vocab=vocabulary)
    assert torch_head.tile_size(net) == rows
    assert TORCH_CPU.tile_bytes(vocabulary) == 4 * TORCH_CPU.copies * rows * vocabulary


def test_no_response_is_no_tile() -> None:
    net = net_of("plain")
    states = torch.zeros(0, net.text.hidden_size, requires_grad=True)
    found = read(net, states, torch.zeros(0, dtype=torch.long), None, lambda role: None)
    found.logp.sum().backward()
    assert found.logp.shape == (0,)


def test_bfloat16_states_keep_float32_log_probs() -> None:
    net = net_of("plain")
    states = torch.randn(9, net.text.hidden_size)
    targets = torch.arange(9)
    expected = token_logprobs(net, states.bfloat16().float(), targets)
    net.model.bfloat16()
    low = states.bfloat16().requires_grad_()
    found = read(net, low, targets, Reference(low.detach(), True, 0.5), lambda role: None)
    assert found.logp.dtype == torch.float32
    assert torch.allclose(found.logp, expected, atol=0.05)
    assert torch.allclose(found.extrapolated, found.logp, atol=1e-4)
    found.logp.sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):  # type: ignore[misc]
    """Remembers the most numbers that any one array had."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for some in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(some, torch.Tensor):
                self.most = max(self.most, some.numel())
        return found


@pytest.mark.parametrize("wanted", [True, False])
def test_no_array_grows_with_length_times_vocabulary(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of("plain")
    monkeypatch.setattr(torch_head, "tile_size", lambda net: 8)
    seen = []
    for length in (40, 400):
        states = torch.randn(length, net.text.hidden_size, requires_grad=True)
        with Largest() as largest:
            beside = Reference(states.detach(), wanted, 0.5)
            found = read(net, states, torch.zeros(length, dtype=torch.long), beside, lambda role: None)
            found.logp.sum().backward()
        seen.append(largest.most)
    width = net.text.hidden_size
    assert seen == [max(8 * net.vocab, width * net.vocab, length * width) for length in (40, 400)]
