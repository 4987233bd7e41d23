"""The words of --lora-targets mean the same layers in every framework."""

from __future__ import annotations

from pathlib import Path

import pytest

from spa_lite import backends
from spa_lite.backend import POLICY, Lora, ModelSettings
from spa_lite.backends.targets import choose_layers, short_names
from spa_lite.errors import ModelError
from tests.tiny import make_model

LAYERS = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_the_head_is_adapted_only_if_it_is_named() -> None:
    assert choose_layers(LAYERS, "lm_head", ["all-linear"]) == LAYERS[1:]
    assert choose_layers(LAYERS, "lm_head", ["all-linear", "lm_head"]) == LAYERS
    assert choose_layers(LAYERS, "lm_head", ["mlp.up_proj"]) == [LAYERS[1], LAYERS[3]]


def test_names_are_short_where_that_is_exact() -> None:
    assert short_names(LAYERS, [LAYERS[1], LAYERS[3]]) == ["up_proj"]
    assert short_names(LAYERS, [LAYERS[3]]) == [LAYERS[3]]


@pytest.mark.parametrize("targets", [("lm_head",), ("all-linear", "no_such_layer")])
def test_a_target_that_no_layer_has_is_refused(targets: tuple[str, ...], tmp_path: Path) -> None:
    """MLX has no head where the embedding is the head: it must not train nothing in silence."""
    with pytest.raises(ModelError, match=targets[-1]):
        choose_layers(LAYERS[1:], None, targets)
    pytest.importorskip("torch", reason="tiny models are made with PyTorch")
    if backends.missing("mlx"):
        pytest.skip("mlx is not installed")
    backend = backends.load("mlx", ModelSettings(str(make_model(tmp_path, "smollm2")), device="cpu"))
    with pytest.raises(ModelError, match=f"no linear layer of this model is named '{targets[-1]}'"):
        backend.bind(POLICY, None, Lora(targets=targets))
