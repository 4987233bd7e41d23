"""Adapter folders of PEFT and mlx-lm: read, written, turned into each other, and every refusal."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa_lite.backend import POLICY, ModelSettings
from spa_lite.backends import adapter_files
from spa_lite.backends.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, PREFIX, Stored, modules, read, scale_of
from spa_lite.errors import ModelError
from tests.test_imports import FRAMEWORKS, imports
from tests.tiny import make_model

Floats = NDArray[np.float32]

Q, UP, HEAD = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"


def load(path: Path) -> dict[str, Floats]:
    """A safetensors file as NumPy arrays."""
    return safetensors.load_file(path)


def adapter(names: list[str], rank: int = 2, seed: int = 0, **config: Any) -> Stored:
    """A random adapter on layers of 5 inputs and 3 outputs."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in names:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.standard_normal((rank, 5)).astype(np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.standard_normal((3, rank)).astype(np.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": sorted(names)} | config
    return Stored(config, tensors)


def same(one: Stored, other: Stored) -> bool:
    """Whether both hold the same tensors, bit by bit."""
    return one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(one.tensors[key], other.tensors[key]) for key in one.tensors
    )


def written(folder: Path, stored: Stored, base: str = "base") -> Path:
    """A PEFT folder of an adapter."""
    adapter_files.write_peft(folder, stored.config, stored.tensors, base)
    return folder


def written_mlx(folder: Path, stored: Stored) -> Path:
    """An mlx-lm folder of an adapter."""
    adapter_files.write_mlx_lm(folder, stored)
    return folder


# Round trips


NAMES = st.lists(st.from_regex(r"(model\.layers\.[0-9]{1,2}\.)?[a-z_]{1,8}\.[a-z]{1,6}_proj", fullmatch=True),
                 min_size=1, max_size=5, unique=True)  # fmt: skip


@given(names=NAMES, rank=st.integers(1, 65), alpha=st.integers(1, 300) | st.floats(0.01, 300), rslora=st.booleans())
def test_peft_to_mlx_lm_to_peft_is_exact(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], rank: int, alpha: float, rslora: bool
) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    before = adapter(names, rank, lora_alpha=alpha, use_rslora=rslora)
    peft = read(written(folder / "peft", before), load)
    mlx = read(written_mlx(folder / "mlx", peft), load)
    after = read(written(folder / "back", mlx), load)
    assert same(before, peft)
    assert same(before, mlx)
    assert same(before, after)
    assert scale_of(after.config) == pytest.approx(scale_of(before.config), rel=1e-15)
    assert after.config["target_modules"] == sorted(names)
    if isinstance(alpha, int) and not rslora:
        assert after.config["lora_alpha"] == alpha
        assert scale_of(after.config) == scale_of(before.config)
    again = written_mlx(folder / "again", after)
    for name in ("adapter_config.json", MLX_WEIGHTS):
        if name == MLX_WEIGHTS or (isinstance(alpha, int) and not rslora):
            assert (again / name).read_bytes() == (folder / "mlx" / name).read_bytes()


def test_what_is_written(tmp_path: Path) -> None:
    """File names, keys, shapes and the configuration, as mlx-lm writes them itself."""
    stored = adapter([Q, UP, HEAD], lora_alpha=3, lora_dropout=0.1, somebody="else")
    folder = written_mlx(tmp_path, stored)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapters.safetensors"}
    text = (folder / "adapter_config.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": [HEAD, UP, Q]},
    }
    tensors = load(folder / "adapters.safetensors")
    assert sorted(tensors) == sorted(f"{name}.lora_{side}" for name in (Q, UP, HEAD) for side in "ab")
    assert tensors[f"{Q}.lora_a"].shape == (5, 2)
    assert tensors[f"{Q}.lora_b"].shape == (2, 3)
    assert np.array_equal(tensors[f"{Q}.lora_a"], stored.tensors[f"{PREFIX}{Q}.lora_A.weight"].T)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of tensors, and of what is in a set."""
    one = adapter([Q, UP, HEAD])
    config = dict(reversed(one.config.items())) | {"target_modules": {HEAD, Q, UP}}
    other = Stored(config, dict(reversed(one.tensors.items())))
    for write, weights in ((written, PEFT_WEIGHTS), (written_mlx, MLX_WEIGHTS)):
        folders = [write(tmp_path / f"{write.__name__}{i}", stored) for i, stored in enumerate((one, other))]
        for name in ("adapter_config.json", weights):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_scale() -> None:
    assert scale_of({"r": 4, "lora_alpha": 6}) == 1.5
    assert scale_of({"r": 4, "lora_alpha": 6, "use_rslora": True}) == 3.0
    assert scale_of({}) == 1.0, "PEFT's own defaults"


def test_modules_come_in_pairs() -> None:
    found = modules(adapter([Q, UP]))
    assert list(found) == [UP, Q]
    assert [tuple(half.shape) for half in found[Q]] == [(2, 5), (3, 2)]


def test_no_framework_is_imported() -> None:
    path = Path(adapter_files.__file__)
    found = {name.partition(".")[0] for name, _, _ in imports("spa_lite.backends.adapter_files", path)}
    assert found & FRAMEWORKS == set()


# Refusals


def change_config(folder: Path, **changes: Any) -> None:
    """Put other values into adapter_config.json; None takes a key out."""
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Floats]], Any]) -> None:
    """Change the tensors of the folder's only safetensors file."""
    (path,) = folder.glob("*.safetensors")
    tensors = load(path)
    change(tensors)
    path.write_bytes(safetensors.save(tensors))


def shape(**changes: Any) -> dict[str, Any]:
    """`lora_parameters` with changes; None takes a key out."""
    found = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": [Q]} | changes
    return {key: value for key, value in found.items() if value is not None}


def renamed(old: str, new: str) -> Callable[[Path], Any]:
    """Tensors of one module moved to another name."""
    return lambda folder: change_tensors(
        folder, lambda t: t.update({k.replace(old, new): t.pop(k) for k in list(t) if old in k})
    )


DAMAGED_MLX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (lambda f: change_config(f, fine_tune_type="dora"), "dora; only its lora adapters"),
    "full": (lambda f: change_config(f, fine_tune_type="full", lora_parameters=None), "full; only its lora adapters"),
    "no scale": (lambda f: change_config(f, lora_parameters=shape(scale=None, alpha=4)), "lora_parameters.scale"),
    "scale in words": (lambda f: change_config(f, lora_parameters=shape(scale="2")), "lora_parameters.scale"),
    "no shape": (lambda f: change_config(f, lora_parameters=None), "lora_parameters.scale"),
    "another rank": (lambda f: change_config(f, lora_parameters=shape(rank=3)), "says rank 3, but .*q_proj have 2"),
    "no rank": (lambda f: change_config(f, lora_parameters=shape(rank=None)), "says rank None"),
    "embeddings": (renamed(Q, "model.embed_tokens"), "adapts model.embed_tokens.lora_a .*linear layers"),
    "wte": (renamed(Q, "model.wte"), "adapts model.wte.lora_a .*linear layers"),
    "experts": (
        lambda f: change_tensors(f, lambda t: t.update({k: np.stack([v, v]) for k, v in t.items()})),
        r"\[2, .*linear layers",
    ),
    "a half": (lambda f: change_tensors(f, lambda t: t.pop(f"{Q}.lora_b")), f"lora_A of {Q} without its lora_B"),
    "the other half": (
        lambda f: change_tensors(f, lambda t: t.pop(f"{Q}.lora_a")),
        f"lora_B of {Q} without its lora_A",
    ),
    "a magnitude": (
        lambda f: change_tensors(f, lambda t: t.update({f"{Q}.m": np.ones(3, np.float32)})),
        "adapts .*q_proj.m",
    ),
    "nothing": (lambda f: change_tensors(f, lambda t: t.clear()), "no tensor at all"),
    "no file": (lambda f: (f / MLX_WEIGHTS).unlink(), "no adapter folder: it has no adapters.safetensors"),
    "a cut file": (lambda f: (f / MLX_WEIGHTS).write_bytes(b"x" * 99), "adapters.safetensors is damaged: "),
}


@pytest.mark.parametrize("kind", DAMAGED_MLX)
def test_mlx_lm_folders_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGED_MLX[kind]
    written_mlx(tmp_path, adapter([Q]))
    assert len(modules(read(tmp_path, load))) == 1
    change(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, load)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)


def test_mlx_lm_folders_may_leave_the_type_out(tmp_path: Path) -> None:
    """Early versions did not write it, and none need `keys` to be named."""
    written_mlx(tmp_path, adapter([Q]))
    change_config(tmp_path, fine_tune_type=None, lora_parameters=shape(keys=None))
    assert scale_of(read(tmp_path, load).config) == 2.0


DAMAGED_PEFT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter folder: it has no adapter_config.json"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
    "no text": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{"), "adapter_config.json is not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object, not a list"),
    "another method": (lambda f: change_config(f, peft_type="IA3"), "holds a IA3 adapter"),
    "no method": (lambda f: change_config(f, peft_type=None), "holds a None adapter"),
    "whole modules": (lambda f: change_config(f, modules_to_save=["lm_head"]), "modules_to_save.*plain LoRA"),
    "tokens": (lambda f: change_config(f, trainable_token_indices=[1]), "trainable_token_indices.*plain LoRA"),
    "biases": (lambda f: change_config(f, bias="all"), "bias.*plain LoRA"),
    "a changed base": (lambda f: change_config(f, init_lora_weights="pissa"), "pissa.*plain LoRA"),
    "no rank": (lambda f: change_config(f, r=0), "whole number r above 0"),
    "no alpha": (lambda f: change_config(f, lora_alpha="much"), "a number lora_alpha"),
    "a pickle": (
        lambda f: (f / PEFT_WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin is a pickle.*save it as adapter_model.safetensors",
    ),
    "no file": (lambda f: (f / PEFT_WEIGHTS).unlink(), "no adapter folder: it has no adapter_model.safetensors"),
    "a cut file": (lambda f: (f / PEFT_WEIGHTS).write_bytes(b"x" * 99), "adapter_model.safetensors is damaged: "),
}


@pytest.mark.parametrize("kind", DAMAGED_PEFT)
def test_peft_folders_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGED_PEFT[kind]
    change(written(tmp_path, adapter([Q])))
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, load)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)


def without(stored: Stored, *endings: str) -> Stored:
    """The adapter without the tensors whose key ends so."""
    return Stored(stored.config, {k: v for k, v in stored.tensors.items() if not k.endswith(endings)})


NOT_FOR_MLX_LM: dict[str, tuple[Stored, str]] = {
    "ranks": (adapter([Q], rank_pattern={"q_proj": 4}), "rank_pattern.*mlx-lm's format"),
    "alphas": (adapter([Q], alpha_pattern={"q_proj": 4}), "alpha_pattern.*mlx-lm's format"),
    "dora": (adapter([Q], use_dora=True), "use_dora.*mlx-lm's format"),
    "alora": (adapter([Q], alora_invocation_tokens=[3]), "alora_invocation_tokens.*mlx-lm's format"),
    "mixed ranks": (
        Stored(adapter([Q]).config, adapter([Q]).tensors | adapter([UP], rank=3).tensors),
        "has rank 2, but 3 in model.layers.0.mlp.up_proj",
    ),
    "conv1d": (adapter(["transformer.h.0.attn.c_attn"], fan_in_fan_out=True), "GPT-2"),
    "neox": (adapter(["gpt_neox.layers.0.attention.dense"]), "GPT-NeoX"),
    "a half": (without(adapter([Q]), "lora_B.weight"), f"lora_A of {Q} without its lora_B"),
    "a bias": (
        Stored(adapter([Q]).config, adapter([Q]).tensors | {f"{PREFIX}{Q}.lora_B.bias": np.ones(3)}),
        "lora_B.bias, which is no matrix of plain LoRA",
    ),
    "nothing": (adapter([]), "no tensor at all"),
    "no product": (
        Stored(adapter([Q]).config, adapter([Q]).tensors | {f"{PREFIX}{Q}.lora_B.weight": np.ones((3, 4))}),
        r"lora_A \[2, 5\] and lora_B \[3, 4\]",
    ),
}


@pytest.mark.parametrize("kind", NOT_FOR_MLX_LM)
def test_what_mlx_lm_cannot_say_is_refused(kind: str, tmp_path: Path) -> None:
    stored, message = NOT_FOR_MLX_LM[kind]
    with pytest.raises(ModelError, match=message) as caught:
        adapter_files.write_mlx_lm(tmp_path / "out", stored)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


# In real models

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")),
    reason="torch, transformers or peft is not installed",
)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETS: dict[str, dict[str, Any]] = {
    "all linear layers": {"r": 3, "lora_alpha": 7, "target_modules": list(ALL)},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "the first block": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0]},
    "the last block": {"r": 4, "lora_alpha": 3, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "one here, one there": {
        "r": 2,
        "lora_alpha": 9,
        "target_modules": ["layers.0.self_attn.k_proj", "layers.1.mlp.gate_proj"],
    },
    "head and one more": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
    "the head alone": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    pytest.importorskip("torch")
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def torch_backend(llama: Path) -> Any:
    """It in PyTorch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from spa_lite.backends.torch import TorchBackend

    torch.set_num_threads(1)
    return TorchBackend(ModelSettings(model=str(llama), device="cpu"))


@pytest.fixture
def mlx_lm() -> Any:
    """mlx-lm, where it is installed and finds its library."""
    pytest.importorskip("mlx.core", reason="mlx is not installed here", exc_type=ImportError)
    return pytest.importorskip("mlx_lm", reason="mlx-lm is not installed here", exc_type=ImportError)


IDS = [1, *range(30, 200, 3)]


def torch_logits(backend: Any, folder: Path | None) -> NDArray[np.float32]:
    """Logits of the backend's model under an adapter."""
    import torch

    backend.bind(POLICY, folder)
    backend._enter(POLICY)
    with torch.no_grad():
        found: NDArray[np.float32] = backend.net.model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return found


def mlx_logits(mlx_lm: Any, model: Path, folder: Path | None) -> NDArray[np.float32]:
    """Logits as anybody's program with mlx-lm sees them."""
    import mlx.core as mx

    loaded = mlx_lm.load(str(model), adapter_path=str(folder) if folder else None)[0]
    return np.array(loaded(mx.array([IDS]))[0].astype(mx.float32))


def random_peft(backend: Any, model: Path, folder: Path, **config: Any) -> Path:
    """A PEFT folder written by PEFT itself, with random A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from spa_lite.backends.quiet import quiet

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
        peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


@needs_torch
@pytest.mark.parametrize("kind", SETS)
def test_mlx_lm_applies_what_we_write(kind: str, llama: Path, torch_backend: Any, mlx_lm: Any, tmp_path: Path) -> None:
    """Any set of modules: exactly those are adapted, and the logits are those of torch and PEFT."""
    random_peft(torch_backend, llama, tmp_path / "peft", **SETS[kind])
    expected, base = torch_logits(torch_backend, tmp_path / "peft"), torch_logits(torch_backend, None)
    torch_backend.bind(POLICY, tmp_path / "peft")
    torch_backend.save(tmp_path / "saved")
    adapter_files.write_mlx_lm(tmp_path / "mlx", read(tmp_path / "saved", load))
    found = mlx_logits(mlx_lm, llama, tmp_path / "mlx")
    assert np.abs(expected - base).max() > 0.1, "the adapter does something"
    assert np.abs(mlx_logits(mlx_lm, llama, None) - base).max() < 1e-4
    assert np.abs(found - expected).max() < 1e-4
    assert np.array_equal(torch_logits(torch_backend, tmp_path / "mlx"), expected), "and torch reads it back exactly"


@needs_torch
@pytest.mark.parametrize("layers", [1, 2])
def test_an_adapter_of_mlx_lm_is_read(
    layers: int, llama: Path, torch_backend: Any, mlx_lm: Any, tmp_path: Path
) -> None:
    """Made, saved and described by mlx-lm's own code."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    model = mlx_lm.load(str(llama))[0]
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.05, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    model.freeze()
    linear_to_lora_layers(model, layers, parameters)
    mx.random.seed(5)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.1, model.trainable_parameters()))
    model.eval()
    expected = np.array(model(mx.array([IDS]))[0].astype(mx.float32))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    arguments = {"model": "x", "fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters, "lr": 1.0}
    save_config(arguments, tmp_path / "adapter_config.json")
    assert np.abs(torch_logits(torch_backend, tmp_path) - expected).max() < 1e-4
    assert np.abs(torch_logits(torch_backend, None) - expected).max() > 0.1
    in_mlx: Any = mx.load
    assert len(modules(read(tmp_path, in_mlx))) == 2 * layers, "mlx arrays will do as well"


@needs_torch
def test_our_bytes_are_those_of_torch(llama: Path, torch_backend: Any, tmp_path: Path) -> None:
    """`safetensors.torch` and `safetensors.numpy` write the same file."""
    import torch
    from safetensors.torch import load_file, save

    random_peft(torch_backend, llama, tmp_path / "peft", **SETS["all linear layers"])
    torch_backend.bind(POLICY, tmp_path / "peft")
    torch_backend.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / PEFT_WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    expected = save(dict(sorted(tensors.items())), metadata={"format": "pt"})
    assert (tmp_path / "saved" / PEFT_WEIGHTS).read_bytes() == expected
    theirs = load_file(tmp_path / "peft" / PEFT_WEIGHTS)
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[key], tensors[key]) for key in tensors)
    config = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    assert (config["inference_mode"], config["r"], config["lora_alpha"]) == (True, 3, 7)


@needs_torch
def test_richer_peft_adapters_still_work_in_torch(llama: Path, torch_backend: Any, tmp_path: Path) -> None:
    """DoRA and patterns of ranks are read and kept; only mlx-lm's format refuses them."""
    richer: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 20}},
    }
    for name, more in richer.items():
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | more
        random_peft(torch_backend, llama, tmp_path / name, **config)
        expected = torch_logits(torch_backend, tmp_path / name)
        torch_backend.save(tmp_path / f"{name} again")
        assert np.array_equal(torch_logits(torch_backend, tmp_path / f"{name} again"), expected)
        with pytest.raises(ModelError, match="mlx-lm's format"):
            adapter_files.write_mlx_lm(tmp_path / "no", read(tmp_path / name, load))


@needs_torch
def test_an_adapter_of_another_base_is_refused(torch_backend: Any, tmp_path: Path) -> None:
    """mlx-lm folders too, naming the folder."""
    for name, message in ((Q, "where the base needs"), ("model.layers.7.self_attn.q_proj", "does not fit")):
        folder = written_mlx(tmp_path / name, adapter([name]))
        with pytest.raises(ModelError, match=message) as caught:
            torch_backend.bind("x", folder)
        assert str(folder) in str(caught.value)
        assert "x" not in torch_backend._roles


@needs_torch
def test_a_configuration_that_peft_refuses_is_one_sentence(llama: Path, torch_backend: Any, tmp_path: Path) -> None:
    random_peft(torch_backend, llama, tmp_path, **SETS["the head alone"])
    change_config(tmp_path, task_type="COOKING")
    with pytest.raises(ModelError, match=r"configuration of .* cannot be used") as caught:
        torch_backend.bind("x", tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    change_config(tmp_path, task_type="CAUSAL_LM", a_field_of_tomorrow=1, runtime_config={})
    torch_backend.bind("x", tmp_path)
    torch_backend.unbind("x")
