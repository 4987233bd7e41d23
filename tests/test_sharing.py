"""A prompt computed once for all its responses gives what a line for each response gives: numbers and gradients."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from spa_lite.backend import POLICY, PREVIOUS, Batching, ModelSettings
from spa_lite.backends.packing import pack, together
from spa_lite.backends.torch import TorchBackend
from spa_lite.backends.torch_attention import LONG
from spa_lite.backends.torch_scoring import lay_out, response_states
from spa_lite.objective import Dpo
from spa_lite.records import Row
from tests.contract import LORA, OPTIMIZER, Linear, Mixed, pairs, sums
from tests.tiny import ARCHITECTURES, make_model

SHAPES = (*ARCHITECTURES, "qwen3", "granite", "yarn")
SHORT = Row(prompt=(5, 9, 3), responses=((8, 4, 7), (6, 7, 2, 3, 9), (11,)))
"""Short enough for the windows of twelve."""


def loaded(folder: Path, **more: Any) -> TorchBackend:
    """A backend whose policy and reference differ."""
    torch.set_num_threads(1)
    backend = TorchBackend(ModelSettings(**{"model": str(folder), "device": "cpu"} | more))
    if backend.net.split_from is not None:
        backend.net.split_from = 0  # short lines, too
    backend.bind(POLICY, None, LORA)
    backend.start_training(OPTIMIZER)
    backend.dpo_step(pairs(backend), Linear([0.1, -0.1] * 4, reference=False), 1e-2)
    backend.snapshot()
    backend.start_training(OPTIMIZER)
    backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    return backend


def gradients(backend: TorchBackend, rows: list[Row]) -> Any:
    """Log-probs, and the gradient of the adapter as the optimizer gets it."""
    training: Any = backend._training
    seen: dict[str, Any] = {}

    def look() -> float:
        seen.update({key: tensor.grad.clone() for key, tensor in training.parameters.items()})
        return float("nan")  # a step that is not finite is not made

    training._clip, before = look, training._clip
    weights = [(-1) ** index * (1 + index) for index in range(sum(len(row.responses) for row in rows))]
    stats = backend.dpo_step(rows, Linear(weights, reference=True, extrapolation=0.5, sequential=True), 1e-2)
    training._clip = before
    return stats, seen


@pytest.mark.parametrize("architecture", SHAPES)
def test_shared_prompts_give_the_numbers_and_gradients_of_separate_ones(architecture: str, tmp_path: Path) -> None:
    backend = loaded(make_model(tmp_path, architecture))
    net, limit = backend.net, backend.net.shared
    assert backend.description["prompt"] == "once per row"
    assert limit >= together(SHORT)
    assert lay_out(net, [SHORT]).packed.branching
    assert not lay_out(net, [SHORT, Row(prompt=(5,) * limit, responses=((1, 2), (3,)))]).packed.branching
    for rows in ([SHORT], [SHORT, *pairs(backend)]):
        net.shared = limit
        shared, its = gradients(backend, rows)
        net.shared = 0
        apart, others = gradients(backend, rows)
        np.testing.assert_allclose(shared.logp, apart.logp, atol=1e-4)
        np.testing.assert_allclose(shared.reference, apart.reference, atol=1e-4)
        assert np.abs(shared.logp - shared.reference).max() > 1e-2, "else an adapter switch could go unnoticed"
        assert its.keys() == others.keys()
        for key, gradient in its.items():
            assert (gradient - others[key]).abs().max() <= 1e-5 * max(1.0, float(others[key].abs().max())), key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_masks_hide_the_same(attention: str, tmp_path: Path) -> None:
    """On a CPU, a third way: the further responses by themselves."""
    backend = loaded(make_model(tmp_path))
    rows = [SHORT, *pairs(backend)]
    assert backend.net.split_from == 0
    expected, its = gradients(backend, rows)
    backend.net.model.set_attn_implementation(attention)
    backend.net.split_from, backend.net.attention = None, attention
    assert backend.net._why_apart() == ""
    found, others = gradients(backend, rows)
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-4)
    assert max(float((its[key] - others[key]).abs().max()) for key in its) < 1e-4


def test_only_long_lines_are_taken_apart(tmp_path: Path) -> None:
    """Where the many small calls cost less than the square."""
    net = TorchBackend(ModelSettings(model=str(make_model(tmp_path)), device="cpu")).net
    assert net.split_from == LONG
    for size, parts in ((LONG // 2, True), (LONG // 2 - 9, False)):
        row = Row(prompt=(5, 9), responses=((8,) * size, (7,) * size))
        mask = net.mask(pack([row], together(row)))
        assert hasattr(mask, "parts") == parts


def test_padding_to_whole_eights_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    from spa_lite.backends import torch_scoring

    backend = loaded(make_model(tmp_path))
    laid = lay_out(backend.net, [SHORT])
    wide = torch_scoring.widened(laid.packed, 5)
    assert wide.ids.shape[1] == laid.packed.ids.shape[1] + 5
    net = backend.net
    other = replace(
        laid,
        packed=wide,
        ids=net.tensor(wide.ids),
        positions=net.tensor(wide.positions),
        mask=net.mask(wide),
        places=net.tensor(wide.places),
    )
    with torch.no_grad():
        assert torch.allclose(response_states(net, laid), response_states(net, other), atol=1e-5)


def test_a_model_that_sees_more_than_its_mask_falls_back_and_says_so(tmp_path: Path) -> None:
    backend = loaded(make_model(tmp_path))
    net = backend.net
    rows = [SHORT, *pairs(backend)]
    expected = sums(backend, rows)
    net.split_from = None
    real = net.model.base_model.forward
    net.model.base_model.forward = lambda **inputs: real(**inputs | {"attention_mask": None})
    assert net._why_apart() == "the model sees more than its mask"
    net.shared, net.apart = 0, net._why_apart()
    assert backend.description["prompt"] == "once per response (the model sees more than its mask)"
    np.testing.assert_allclose(sums(backend, rows), expected, atol=1e-4)


def test_a_model_without_positions_falls_back(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from spa_lite.backends.torch_model import Net

    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    net = Net(AutoModelForCausalLM.from_config(config).eval(), torch.device("cpu"))
    assert (net.shared, net.apart) == (0, "the model takes no positions")


def test_bfloat16_shares_too(tmp_path: Path) -> None:
    backend = loaded(make_model(tmp_path), dtype="bfloat16", batching=Batching(score_tokens=64))
    assert backend.net.shared
    rows = pairs(backend)
    shared = sums(backend, rows)
    backend.net.shared = 0
    np.testing.assert_allclose(shared, sums(backend, rows), rtol=0.02)
    assert np.abs(sums(backend, rows) - sums(backend, rows, PREVIOUS)).min() > 1e-3
    assert backend.dpo_step(rows, Mixed(0.5), 1e-3).skipped is False
