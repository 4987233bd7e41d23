"""An adapter merged into its base: what is computed, what survives, what others make of the folder, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa_lite.backends import adapter_files, merging, weights
from spa_lite.backends.adapter_files import PREFIX, Stored
from spa_lite.backends.merging import Merged, Survival, merge
from spa_lite.errors import BackendMissing, ModelError
from tests.tiny import LLAMA3, VOCABULARY, make_model

torch = pytest.importorskip("torch")

Floats = NDArray[np.float32]
LESSON, SEED = Path("spa_lite/lesson/model"), Path("spa_lite/lesson/seed_adapter")
Q, DOWN, HEAD = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in two shards, its rotary settings in the newer spelling alone."""
    folder = make_model(tmp_path_factory.mktemp("base") / "model", uneven=True, rope_parameters=LLAMA3)
    return sharded(folder)


def sharded(folder: Path) -> Path:
    """Its weights in two files with an index."""
    plain = safetensors.load_file(folder / "model.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(plain))}
    for file in set(places.values()):
        safetensors.save_file({name: plain[name] for name in plain if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    return folder


def plain_of(folder: Path) -> dict[str, Floats]:
    """All weights of a folder as float32."""
    return {name: weight.whole() for path in weights.files_of(folder) for name, weight in weights.read(path).items()}


def adapter(model: Path, names: list[str], seed: int = 0, size: float = 0.1, rank: int = 2, **config: Any) -> Stored:
    """A random adapter on some of a model's layers."""
    rng, tensors, found = np.random.default_rng(seed), {}, plain_of(model)
    for name in names:
        rows, columns = found[f"{name}.weight" if f"{name}.weight" in found else merging.EMBEDDING].shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (size * rng.standard_normal((rows, rank))).astype(np.float32)
    return Stored({"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": sorted(names)} | config, tensors)


def update(stored: Stored, module: str) -> Floats:
    """What an adapter adds to a module, written plainly."""
    a, b = (stored.tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
    return np.asarray(np.float32(adapter_files.scale_of(stored.config)) * b @ a)


IDS = np.random.default_rng(0).integers(3, 360, 60).tolist()


def torch_scores(folder: Path, stored: Stored | None = None) -> Floats:
    """Log-probs [60, V] by transformers, through PEFT if there is an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if stored:
        place = folder.parent / "peft"
        adapter_files.write_peft(place, stored.config, stored.tensors, str(folder))
        model = PeftModel.from_pretrained(model, str(place))
        shutil.rmtree(place)
    with torch.no_grad():
        return np.asarray(torch.log_softmax(model.eval()(torch.tensor([IDS])).logits[0], -1).numpy())


# What is computed


def test_the_sum_is_taken_in_float32_and_rounded_once(base: Path, tmp_path: Path) -> None:
    stored = adapter(base, [Q, DOWN, HEAD])
    done = merge(base, stored, tmp_path / "out", "bfloat16")
    before, after = plain_of(base), plain_of(tmp_path / "out")
    assert list(after) == list(before)
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        whole = weight + update(stored, module) if module in (Q, DOWN, HEAD) else weight
        assert np.array_equal(after[name], torch.from_numpy(whole).bfloat16().float().numpy()), name
    assert (done.dtype, done.modules) == ("bfloat16", 3)
    assert done.bytes == 2 * sum(weight.size for weight in before.values())


def test_keep_is_the_bases_own_dtype_bit_by_bit(tmp_path: Path) -> None:
    """The lesson's weights are in 16 bits; what no adapter touches stays as it is."""
    stored = adapter(LESSON, [Q])
    done = merge(LESSON, stored, tmp_path / "out")
    assert done.dtype == "float16"
    before, after = (safetensors.load_file(f / "model.safetensors") for f in (LESSON, tmp_path / "out"))
    same = [name for name in before if np.array_equal(before[name], after[name])]
    assert sorted(set(before) - set(same)) == [f"{Q}.weight"]
    assert after[f"{Q}.weight"].dtype == np.float16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32", "what it is loaded in"


def test_the_folder_is_whole(base: Path, tmp_path: Path) -> None:
    """Shards and index as the base has them, everything else copied, the dtype said in both spellings."""
    source = tmp_path / "base"
    shutil.copytree(base, source)
    (source / "LICENSE.txt").write_text("as you like")
    (source / "adapter_config.json").write_text("{}")
    (source / "weights.bin").write_bytes(b"a pickle")
    done = merge(source, adapter(source, [Q]), tmp_path / "out", "float16")
    assert {p.name for p in source.iterdir()} - {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "weights.bin",
    }
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.bytes
    assert index["weight_map"] == json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index["weight_map"].items():
        assert name in safetensors.load_file(tmp_path / "out" / file)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_pieces_of_any_size_give_the_same_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = adapter(base, [Q, DOWN])
    one = merge(base, stored, tmp_path / "one", "bfloat16")
    monkeypatch.setattr(weights, "PIECE", 200)
    other = merge(base, stored, tmp_path / "other", "bfloat16")
    assert one.survived.share == pytest.approx(other.survived.share, rel=1e-12)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert np.allclose(plain_of(tmp_path / "one")[f"{Q}.weight"], plain_of(tmp_path / "other")[f"{Q}.weight"])
        assert path.stat().st_size == (tmp_path / "other" / path.name).stat().st_size


@given(st.lists(st.floats(width=32), min_size=1, max_size=30))
def test_rounding_to_bfloat16_is_torchs(numbers: list[float]) -> None:
    values = np.array(numbers, dtype=np.float32)
    ours = weights.as_float32(weights.rounded(values, "BF16"), "BF16")
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


# What survives


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_what_survives_is_counted_directly(base: Path, tmp_path: Path, dtype: Any, size: float) -> None:
    """On a base that lies in 16 bits already, as real ones do: a small update is rounded away."""
    half = tmp_path / "half"
    merge(base, adapter(base, [Q], size=0.0), half, dtype)
    stored = adapter(half, [Q, DOWN], size=size)
    done = merge(half, stored, tmp_path / "out", dtype)
    before, after = plain_of(half), plain_of(tmp_path / "out")
    wanted = {module: update(stored, module).ravel().astype(np.float64) for module in (Q, DOWN)}
    real = {m: (after[f"{m}.weight"] - before[f"{m}.weight"]).ravel().astype(np.float64) for m in wanted}
    shares = {module: real[module] @ wanted[module] / (wanted[module] @ wanted[module]) for module in wanted}
    all_real, all_wanted = (np.concatenate([some[module] for module in wanted]) for some in (real, wanted))
    assert done.survived.share == pytest.approx(all_real @ all_wanted / (all_wanted @ all_wanted), rel=1e-9)
    norms = np.linalg.norm(all_real) * np.linalg.norm(all_wanted)
    assert done.survived.cosine == pytest.approx(all_real @ all_wanted / norms if norms else 0.0, rel=1e-9)
    assert done.worst == min(shares, key=lambda module: shares[module])
    assert done.at_worst.share == pytest.approx(min(shares.values()), rel=1e-9)
    if size == 1e-5:
        assert done.survived.share < (0.3 if dtype == "bfloat16" else 0.999)


def test_an_adapter_of_no_effect_survives_whole(base: Path, tmp_path: Path) -> None:
    done = merge(base, adapter(base, [Q], size=0.0), tmp_path / "out", "float32")
    assert done.survived == done.at_worst == Survival(1.0, 1.0)


# What others make of it


@pytest.mark.parametrize("names", [[Q, DOWN], [Q, DOWN, HEAD]])
def test_transformers_scores_it_as_base_and_adapter(names: list[str], base: Path, tmp_path: Path) -> None:
    stored = adapter(base, names)
    merge(base, stored, tmp_path / "out", "float32")
    merged = torch_scores(tmp_path / "out")
    np.testing.assert_allclose(merged, torch_scores(base, stored), atol=2e-5)
    assert np.abs(merged - torch_scores(base)).max() > 0.1


@pytest.mark.parametrize("held", [False, True])
def test_a_tied_head_is_untied(held: bool, tmp_path: Path) -> None:
    """The adapter changes what is written, not what is read. Some folders hold a head that is not read."""
    folder = make_model(tmp_path / "tied", "smollm2")
    if held:
        plain = plain_of(folder)
        safetensors.save_file(plain | {f"{HEAD}.weight": plain[merging.EMBEDDING] * 2}, folder / "model.safetensors")
    stored = adapter(folder, [HEAD, Q])
    merge(folder, stored, tmp_path / "out", "float32")
    np.testing.assert_allclose(torch_scores(tmp_path / "out"), torch_scores(folder, stored), atol=2e-5)
    before, after = plain_of(folder), plain_of(tmp_path / "out")
    assert np.array_equal(after[merging.EMBEDDING], before[merging.EMBEDDING])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("stripped", [False, True])
def test_conv1d_layers_are_transposed(stripped: bool, tmp_path: Path) -> None:
    """GPT-2, whose folders leave `transformer.` out or not; among its layers a square one, too."""
    folder = make_model(tmp_path / "gpt2", "gpt2")
    rng, tensors = np.random.default_rng(0), {}
    for name, wide, high in (("attn.c_attn", 64, 192), ("attn.c_proj", 64, 64), ("mlp.c_proj", 256, 64)):
        key = f"{PREFIX}transformer.h.1.{name}.lora_"
        tensors[f"{key}A.weight"] = rng.standard_normal((2, wide)).astype(np.float32)
        tensors[f"{key}B.weight"] = 0.1 * rng.standard_normal((high, 2)).astype(np.float32)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"]}
    stored = Stored(config | {"fan_in_fan_out": True, "layers_to_transform": [1], "layers_pattern": "h"}, tensors)
    wanted = torch_scores(folder, stored)
    if stripped:
        plain = {name.removeprefix("transformer."): weight for name, weight in plain_of(folder).items()}
        safetensors.save_file(plain, folder / "model.safetensors")
    merge(folder, stored, tmp_path / "out", "float32")
    np.testing.assert_allclose(torch_scores(tmp_path / "out"), wanted, atol=2e-5)


def mlx_lm() -> Any:
    """mlx-lm, where MLX works."""
    pytest.importorskip("mlx.core", reason="mlx is not installed here", exc_type=ImportError)
    return pytest.importorskip("mlx_lm", reason="mlx-lm is not installed here", exc_type=ImportError)


def mlx_scores(folder: Path) -> Floats:
    """Log-probs [60, V] by mlx-lm alone."""
    load = mlx_lm().load
    import mlx.core as mx

    model = load(str(folder))[0]
    logits = np.array(model(mx.array([IDS]))[0].astype(mx.float32)).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), dtype=np.float32)


def test_mlx_lm_scores_it_as_base_and_adapter(base: Path, tmp_path: Path) -> None:
    """With Llama-3's rotary scaling, which mlx-lm reads in the older spelling alone."""
    mlx_lm()
    stored = adapter(base, [Q, DOWN])
    merge(base, stored, tmp_path / "out", "float32")
    np.testing.assert_allclose(mlx_scores(tmp_path / "out"), torch_scores(base, stored), atol=5e-5)


# 4 bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_base_in_mlxs_bits_is_dequantised(bits: int, tmp_path: Path) -> None:
    """As MLX itself multiplies the codes out; one layer with bits of its own, norms as they are."""
    convert = mlx_lm().convert
    import mlx.core as mx

    source, folder = make_model(tmp_path / "source"), tmp_path / "mlx"
    special = {"group_size": 32, "bits": 8 if bits != 8 else 4}
    convert(
        str(source),
        str(folder),
        quantize=True,
        q_group_size=64,
        q_bits=bits,
        quant_predicate=lambda path, module: special if path.endswith("1.mlp.up_proj") else "norm" not in path,
    )
    stored = adapter(source, [Q])
    done = merge(folder, stored, tmp_path / "out", "float32")
    coded, after = mx.load(str(folder / "model.safetensors")), plain_of(tmp_path / "out")
    assert set(after) == set(plain_of(source))
    for name, weight in after.items():
        module = name.removesuffix(".weight")
        wanted = np.array(coded[name]) if f"{module}.scales" not in coded else None
        if wanted is None:
            how = special if module.endswith("1.mlp.up_proj") else {"group_size": 64, "bits": bits}
            wanted = np.array(mx.dequantize(coded[name], coded[f"{module}.scales"], coded[f"{module}.biases"], **how))
        if module == Q:
            wanted = wanted + update(stored, Q)
        np.testing.assert_allclose(weight, wanted, atol=1e-6)
    assert done.survived.cosine > 0.999
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert torch_scores(tmp_path / "out").shape == (60, VOCABULARY)


def test_what_4_bits_keep_is_counted_directly(tmp_path: Path) -> None:
    mlx_lm()
    import mlx.core as mx

    folder = make_model(tmp_path / "model")
    stored = adapter(folder, [Q, HEAD], size=0.02)
    merge(folder, stored, tmp_path / "merged", "float32")
    found = merging.survival_in_4bit(folder, tmp_path / "merged")
    before, after = plain_of(folder), plain_of(tmp_path / "merged")

    def in_4_bits(weight: Floats) -> Floats:
        return np.array(mx.dequantize(*mx.quantize(mx.array(weight), group_size=64, bits=4), group_size=64, bits=4))

    names = [f"{name}.weight" for name in (Q, HEAD)]
    real = np.concatenate([(in_4_bits(after[n]) - in_4_bits(before[n])).ravel() for n in names]).astype(np.float64)
    wanted = np.concatenate([(after[n] - before[n]).ravel() for n in names]).astype(np.float64)
    assert found.share == pytest.approx(real @ wanted / (wanted @ wanted), rel=1e-6)
    assert found.cosine == pytest.approx(real @ wanted / np.linalg.norm(real) / np.linalg.norm(wanted), rel=1e-6)
    assert 0.5 < found.cosine < 0.96
    assert merging.survival_in_4bit(folder, folder) == Survival(1.0, 1.0)


def test_a_folder_in_4_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """mlx-lm loads it; nothing is printed; a folder that is there already is refused."""
    mlx_lm()
    folder = make_model(tmp_path / "model")
    merge(folder, adapter(folder, [Q]), tmp_path / "merged", "float32")
    capfd.readouterr()
    merging.to_4bit(tmp_path / "merged", tmp_path / "small")
    assert capfd.readouterr().out == ""
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["quantization"]["bits"] == 4
    there = np.abs(mlx_scores(tmp_path / "small") - torch_scores(tmp_path / "merged"))
    assert 0.01 < there.mean() < 1
    with pytest.raises(ModelError, match=r"mlx-lm cannot write .* in 4 bits: Cannot save"):
        merging.to_4bit(tmp_path / "merged", tmp_path / "small")


def test_without_mlx_there_are_no_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlx.core", None)
    for call in (merging.to_4bit, merging.survival_in_4bit):
        with pytest.raises(BackendMissing, match="mlx-lm, which is not installed: pip install"):
            call(tmp_path, tmp_path / "out")


# Chains


def test_adapters_side_by_side_are_added_up(base: Path, tmp_path: Path) -> None:
    one, other = adapter(base, [Q, DOWN]), adapter(base, [Q, HEAD], seed=1, rank=4)
    done = merge(base, one, tmp_path / "out", "float32", under=[other])
    before, after = plain_of(base), plain_of(tmp_path / "out")
    np.testing.assert_allclose(
        after[f"{Q}.weight"], before[f"{Q}.weight"] + update(one, Q) + update(other, Q), atol=1e-6
    )
    np.testing.assert_allclose(after[f"{HEAD}.weight"], before[f"{HEAD}.weight"] + update(other, HEAD), atol=1e-6)
    assert done.modules == 3


def test_an_adapter_and_what_it_continues_are_not_added_up(base: Path, tmp_path: Path) -> None:
    """A policy of ours holds pi_init already: with it, pi_init would count twice."""
    init = adapter(base, [Q, DOWN])
    rng = np.random.default_rng(5)
    moved = {k: (v + 0.05 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in init.tensors.items()}
    policy = Stored(init.config, moved, "the policy")
    with pytest.raises(
        ModelError, match=r"the policy and the adapter are one adapter at two times .*merge the later one"
    ):
        merge(base, policy, tmp_path / "out", under=[init])
    assert not (tmp_path / "out").exists()


# What is refused


def refused(model: Path, stored: Stored, out: Path, said: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=said):
        merge(model, stored, out, **options)


def test_adapters_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "out", adapter(base, [Q])
    other = {key.replace("layers.1", "layers.7"): value for key, value in good.tensors.items()}
    refused(
        base, Stored(good.config, other), out, r"does not fit .*model.layers.7.self_attn.q_proj, which the base does"
    )
    narrow = {key: value[:, :32].copy() if "lora_A" in key else value for key, value in good.tensors.items()}
    refused(base, Stored(good.config, narrow), out, r"its .*q_proj is \[64, 32\], the base's \[64, 64\]")
    refused(base, Stored(good.config | {"use_dora": True}, good.tensors), out, "uses use_dora")
    broken = {key: value * np.nan for key, value in good.tensors.items()}
    refused(base, Stored(good.config, broken), out, "numbers in .*q_proj that are not finite")
    refused(base, Stored(good.config, {}), out, "holds no tensor at all")
    refused(base, good, base, "would be written over itself")
    huge = {key: value * 1e4 for key, value in good.tensors.items()}
    refused(base, Stored(good.config, huge), out, "too large for float16: take bfloat16", dtype="float16")


def test_bases_that_are_quantised(base: Path, tmp_path: Path) -> None:
    stored = adapter(base, [Q])
    cases: dict[str, Callable[[dict[str, Any]], Any]] = {
        "is quantised by gptq": lambda config: config.update(quantization_config={"quant_method": "gptq"}),
        "is quantised by bitsandbytes": lambda config: config.update(
            quantization_config={"quant_method": "bitsandbytes"}
        ),
    }
    for number, (said, change) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        shutil.copytree(base, folder)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        refused(folder, stored, tmp_path / "out", f"{said}: give --model the same model in 16 or 32 bits")


def test_affine_codes_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    stored = adapter(folder, [Q])
    plain = safetensors.load_file(folder / "model.safetensors")
    plain[f"{Q}.scales"] = np.ones((64, 1), dtype=np.float32)
    safetensors.save_file(plain, folder / "model.safetensors")
    refused(folder, stored, tmp_path / "out", "quantised weights, but its config.json does not say how")
    config = json.loads((folder / "config.json").read_text())
    affine = r"; only MLX's affine 2, 4 and 8 bits"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 4}, f"lacks {Q}.biases, which its codes need"),
        ({"bits": 3, "group_size": 64}, rf"in 3 bits \(affine\){affine}"),
        ({"bits": 4, "mode": "mxfp4"}, rf"in 4 bits \(mxfp4\){affine}"),
    ]
    for how, said in cases:
        (folder / "config.json").write_text(json.dumps(config | {"quantization": how}))
        refused(folder, stored, tmp_path / "out", said)


def test_the_seed_adapter_in_16_bits(tmp_path: Path) -> None:
    """Nearly all of a seed stage's change survives, because it is large: what `export` says of it."""
    stored = adapter_files.read(SEED, safetensors.load_file)
    found: dict[str, Merged] = {
        dtype: merge(LESSON, stored, tmp_path / dtype, dtype) for dtype in ("float32", "float16", "bfloat16")
    }
    assert found["float32"].survived.cosine > 0.999999
    assert found["float16"].survived.cosine == pytest.approx(0.99979, abs=2e-5)
    assert found["bfloat16"].survived.cosine == pytest.approx(0.98663, abs=2e-5)
    assert {done.modules for done in found.values()} == {28}
