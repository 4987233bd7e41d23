"""An outline says of a model what the loaded backend says, without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from spa_lite import backends
from spa_lite.backend import POLICY, ModelSettings, Optimizer, Sampling
from spa_lite.backends.outline import outline
from spa_lite.errors import BackendError, ModelError
from spa_lite.objective import Dpo
from tests.contract import conversation
from tests.tiny import make_model

FRAMEWORKS = [name for name in ("torch", "mlx") if not backends.missing(name)]
CASES = [
    (name, kind)
    for name in FRAMEWORKS
    for kind in ("llama", "gemma2-full", "gpt2", "mistral")
    if (name, kind) != ("mlx", "gpt2")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per architecture."""
    place = tmp_path_factory.mktemp("models")
    return {kind: make_model(place / kind, kind) for kind in {kind for _, kind in CASES}}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_says_what_the_loaded_backend_says(models: dict[str, Path], name: str, kind: str) -> None:
    settings = ModelSettings(str(models[kind]), device="cpu", system="Be brief." if kind == "llama" else None)
    plan, real = outline(name, settings), backends.load(name, settings)
    assert plan.name == real.name
    assert plan.fingerprint == real.fingerprint
    assert plan.context == real.context
    assert plan.can_train == real.can_train
    assert getattr(plan, "vocabulary") == getattr(real, "vocabulary")  # noqa: B009 - no part of the contract
    for key in ("device", "dtype", "bits"):
        assert plan.description[key] == real.description[key], key
    assert plan.description["parameters"] == pytest.approx(real.description["parameters"], rel=0.05)
    assert plan.tokenizer.stop_ids == real.tokenizer.stop_ids
    asked = conversation("a heron?")
    assert plan.tokenizer.encode_prompt(asked) == real.tokenizer.encode_prompt(asked)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wanted_precision_is_kept(models: dict[str, Path], name: str, dtype: str) -> None:
    settings = ModelSettings(str(models["llama"]), device="cpu", dtype=dtype)
    found = outline(name, settings).description
    assert (found["dtype"], found["bits"]) == (dtype, 32 if dtype == "float32" else 16)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_config_alone_gives_the_shape(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copy(models["llama"] / "config.json", tmp_path)
    plan: Any = outline(name, ModelSettings(str(tmp_path), device="cpu"))
    assert (plan.shape.layers, plan.shape.hidden, plan.context) == (2, 64, 256)
    assert plan.free_memory() > 2**20
    with pytest.raises(ModelError, match="tokenizer"):
        _ = plan.tokenizer
    with pytest.raises(ModelError, match="fingerprint"):
        _ = plan.fingerprint


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_shard_is_no_fingerprint(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(ModelError, match="no weights"):
        _ = outline(name, ModelSettings(str(folder), device="cpu")).fingerprint


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_verb_is_refused(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    plan = outline(name, ModelSettings(str(models["llama"]), device="cpu"))
    for call in (
        lambda: plan.bind(POLICY),
        lambda: plan.sample([(1,)], 1, Sampling(), [[b""]]),
        lambda: plan.logprob([], POLICY),
        lambda: plan.start_training(Optimizer()),
        lambda: plan.dpo_step([], Dpo(0.1), 1e-3),
        plan.snapshot,
        lambda: plan.save(tmp_path),
        lambda: plan.restore(tmp_path),
        lambda: plan.unbind(POLICY),
    ):
        with pytest.raises(BackendError, match="only outlined"):
            call()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_hub_name_is_looked_up_in_the_cache_alone(name: str) -> None:
    with pytest.raises(ModelError, match=r"hf download somebody/some-model config\.json"):
        outline(name, ModelSettings("somebody/some-model", device="cpu"))
    with pytest.raises(ModelError, match="no folder"):
        outline(name, ModelSettings("./nowhere/at/all", device="cpu"))


def test_the_toy_is_its_own_outline() -> None:
    settings = ModelSettings("toy")
    assert outline("toy", settings).fingerprint == backends.load("toy", settings).fingerprint
