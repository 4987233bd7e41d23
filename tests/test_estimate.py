"""Sizes read from a configuration are those of the model that transformers makes of it; estimates behave."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from spa_lite.errors import ModelError
from spa_lite.estimate import (
    GIB,
    Longest,
    Speed,
    cpu_speed,
    longest_of,
    longest_of_rows,
    memory,
    micro_batch,
    seconds,
    work,
)
from spa_lite.recipe import Recipe, build, load_layer
from spa_lite.records import Row
from spa_lite.shape import Shape, shape_of

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "granite"), SIZES | {"intermediate_size": 640}),
    "gpt_neox": {key: value for key, value in SIZES.items() if "key_value" not in key} | {"intermediate_size": 1024},
    "qwen3": SIZES | {"intermediate_size": 640, "head_dim": 64},
    "gemma2": SIZES | {"intermediate_size": 640, "head_dim": 64},
    "gemma3_text": SIZES | {"intermediate_size": 640, "head_dim": 64},
    "phi3": SIZES | {"intermediate_size": 640},
    "phi": SIZES | {"intermediate_size": 1024},
    "starcoder2": SIZES | {"intermediate_size": 1024},
    "gpt2": {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 512},
    "gpt_neo": {
        "hidden_size": 256,
        "num_layers": 3,
        "num_heads": 8,
        "max_position_embeddings": 512,
        "attention_types": [[["global"], 3]],
    },
}
TORCH: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "float32", "bits": 32}
CUDA: dict[str, Any] = {"backend": "torch", "device": "cuda", "dtype": "bfloat16", "bits": 16}


def laptop(**changes: Any) -> Recipe:
    """The scale `laptop` with changes."""
    return build({"scale": load_layer("scale", "laptop"), "test": changes})[0]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("full", [True, False], ids=["all defaults written", "as in a file"])
def test_parameters_are_those_of_the_model(kind: str, full: bool) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=2048, pad_token_id=0, **SMALL[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    said = config.to_dict()
    shape = shape_of(
        said if full else {k: v for k, v in said.items() if k in SMALL[kind] or k in ("model_type", "vocab_size")}
    )
    assert shape.parameters == pytest.approx(count, rel=0.006)
    lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert shape.adapter(8) == lora


def test_a_nested_text_config_is_read() -> None:
    assert shape_of({"model_type": "some_vlm", "text_config": LLAMA_8B}) == shape_of(LLAMA_8B)


@pytest.mark.parametrize(
    "lacking", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_what_is_missing_is_named(lacking: str) -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key != lacking}
    with pytest.raises(ModelError, match=lacking):
        shape_of(config)


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="mixture of experts"):
        shape_of(LLAMA_8B | {"num_local_experts": 8})


def test_targets_are_named_as_layers_are() -> None:
    shape = shape_of(LLAMA_8B)
    assert shape.adapter(2, ["q_proj"]) == 2 * 32 * (4096 + 4096)
    assert shape.adapter(2, ["lm_head"]) == 2 * (4096 + 128256)
    with pytest.raises(ModelError, match="c_attn"):
        shape.adapter(2, ["c_attn"])
    with pytest.raises(ModelError, match="lm_head"):
        replace(shape, tied=True).adapter(2, ["lm_head"])


def test_an_8b_model_in_four_bits_is_about_as_large_as_its_file() -> None:
    shape = shape_of(LLAMA_8B)
    assert shape.parameters == pytest.approx(8.03e9, rel=1e-3)
    four = memory(shape, laptop(), backend="mlx", device="gpu", dtype="bfloat16", bits=4)
    assert four.base == pytest.approx(8.03e9 * 4.5 / 8, rel=1e-3)
    assert 8 * GIB < four.peak < 16 * GIB


@pytest.mark.parametrize("where", [TORCH, CUDA, TORCH | {"backend": "mlx"}, CUDA | {"backend": "mlx", "device": "gpu"}])
def test_more_of_anything_takes_more(where: dict[str, Any]) -> None:
    shape, recipe = shape_of(LLAMA_8B), laptop()
    base = memory(shape, recipe, **where)
    assert base.peak == max(base.stages.values())
    longer = memory(shape, recipe, longest=Longest(512, 400, 1024), **where)
    assert longer.cache > base.cache
    recipe = laptop(**{"batching.micro": 2})
    base = memory(shape, recipe, **where)
    wider = laptop(**{"batching.micro": 4, "batching.sample": 32, "batching.score": 16})
    more = memory(shape, wider, **where)
    assert more.activations > 1.5 * base.activations
    assert more.stages["sample"] > base.stages["sample"]
    assert more.scoring >= base.scoring
    kept = memory(shape, laptop(**{"batching.gradient_checkpointing": False, "batching.micro": 2}), **where)
    assert kept.activations > 3 * base.activations
    adapter = memory(shape, laptop(**{"inputs.init_adapter": "x", "batching.micro": 2}), **where)
    assert adapter.adapters == 1.5 * base.adapters


LAYERS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@pytest.mark.parametrize(
    ("sizes", "vocabulary", "tied", "checkpointed", "measured"),
    [
        ((30, 576, 9, 3, 1536), 49152, True, True, 1577),  # the peak is a forward of many layers
        ((16, 512, 8, 2, 1408), 100000, True, True, 1418),  # logits (a Qwen2 of this shape)
        ((11, 640, 10, 5, 1792), 32000, False, True, 1285),  # gradients
        ((11, 640, 10, 5, 1792), 32000, False, False, 1917),  # what is kept for them
    ],
)
def test_a_training_step_takes_what_was_measured(
    sizes: tuple[int, ...], vocabulary: int, tied: bool, checkpointed: bool, measured: int
) -> None:
    config = LLAMA_8B | dict(zip(LAYERS, sizes, strict=True))
    shape = shape_of(config | {"vocab_size": vocabulary, "tie_word_embeddings": tied})
    lengths = {"lengths.max_prompt_length": 128, "lengths.max_length": 192, "sampling.max_tokens": 64}
    recipe = laptop(**lengths, **{"batching.micro": 2, "batching.gradient_checkpointing": checkpointed})
    assert memory(shape, recipe, **TORCH).stages["train"] / 2**20 == pytest.approx(measured, rel=0.15)


def test_lengths_end_at_the_context() -> None:
    shape = replace(shape_of(LLAMA_8B), context=600)
    assert longest_of(laptop(), shape) == Longest(512, 88, 600)


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    shape, recipe = shape_of(LLAMA_8B), laptop()

    def need(size: int) -> int:
        return memory(shape, laptop(**{"batching.micro": size}), **CUDA).stages["train"]

    for size in (1, 2, 4, 8):
        assert micro_batch(shape, recipe, int(need(size) / 0.8) + 2, **CUDA) == size
    assert micro_batch(shape, recipe, 2**50, **CUDA) == 16
    assert micro_batch(shape, recipe, 0, **CUDA) == 1
    # What the model itself takes is no longer asked for once it is there.
    assert micro_batch(shape, recipe, int(need(4) / 0.8) - 2**30, loaded=True, **CUDA) >= 4


def test_work_grows_with_the_data_and_seconds_with_the_work() -> None:
    shape, recipe = shape_of(LLAMA_8B), laptop()
    done = work(shape, recipe, prompts=100, pairs=50, held_out=20)
    twice = work(shape, recipe, prompts=200, pairs=50, held_out=20)
    assert {name for name in done if twice[name].flop > 1.9 * done[name].flop} == {"sample", "judge", "train"}
    assert work(shape, laptop(rounds=0), prompts=100, pairs=50, held_out=20)["sample"].flop == 0
    # Reading a prompt of 512 tokens is 2 FLOP per parameter and token, and attention.
    tokens = 100 * 512 + 200 * 200
    assert done["sample"].flop == pytest.approx(2 * tokens * shape.parameters, rel=0.2)
    total = done["train"] + done["judge"]
    assert seconds(total, Speed(1e12, 1e30)) == pytest.approx(2 * total.flop / 1e12)
    assert seconds(total, Speed(1e30, 1e9)) == pytest.approx(total.bytes / 1e9)


def test_the_speed_of_the_cpu_is_found_quickly() -> None:
    start = time.perf_counter()
    speed = cpu_speed()
    assert time.perf_counter() - start < 2  # half a second, on a machine that does nothing else
    assert speed.flop > 1e8
    assert speed.bytes > 1e7


def test_a_shape_is_plain() -> None:
    assert isinstance(hash(shape_of(LLAMA_8B)), int)
    assert isinstance(shape_of(LLAMA_8B), Shape)


def test_the_longest_of_rows() -> None:
    """Prompt, answer, and prompt with answer: each the longest there is, of different rows if need be."""
    rows = [Row(prompt=(1,) * 9, responses=((1,), (1, 1))), Row(prompt=(1, 1), responses=((1,) * 6, (1,)))]
    assert longest_of_rows(rows) == Longest(prompt=9, answer=6, pair=11)
    assert longest_of_rows([]) == Longest(1, 1, 1)
