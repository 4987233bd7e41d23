"""Sizes read from a configuration are those of the model that transformers makes of it; estimates behave."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from spa_lite.backend import Batching
from spa_lite.effort import Speed, cpu_speed, seconds, work
from spa_lite.errors import ModelError
from spa_lite.estimate import (
    GIB,
    Case,
    Longest,
    Place,
    held,
    longest_of,
    longest_of_rows,
    memory,
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
TORCH = Place("torch", "cpu", "float32", 32)
CUDA = Place("torch", "cuda", "bfloat16", 16)
PLACES = (TORCH, CUDA, Place("mlx", "cpu", "float32", 32), Place("mlx", "gpu", "bfloat16", 16))


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
    four = memory(shape, laptop(), Batching(16, 2048, 1), Place("mlx", "gpu", "bfloat16", 4))
    assert four.base == pytest.approx(8.03e9 * 4.5 / 8, rel=1e-3)
    assert 8 * GIB < four.peak < 32 * GIB


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.backend} {place.device}")
def test_more_of_anything_takes_more(place: Place) -> None:
    shape, recipe = shape_of(LLAMA_8B), laptop()
    sizes = Batching(16, 2048, 2048)
    base = memory(shape, recipe, sizes, place)
    assert base.peak == max(base.stages.values())
    longer = memory(shape, recipe, sizes, place, Longest(512, 400, 1024))
    assert longer.cache > base.cache
    more = memory(shape, recipe, Batching(32, 16384, 8192), place)
    assert more.activations > 3 * base.activations
    assert more.stages["sample"] > base.stages["sample"]
    assert more.scoring > base.scoring
    again = [memory(shape, recipe, replace(sizes, checkpointed=k), place).activations for k in range(33)]
    assert all(one > two for one, two in pairwise(again[:32]))
    assert again[31] < again[32] < again[30], "the last layer is at work alone anyway"
    assert base.activations > 3 * again[31]
    adapter = memory(shape, laptop(**{"inputs.init_adapter": "x"}), sizes, place)
    assert adapter.adapters == 1.5 * base.adapters
    larger = memory(shape, laptop(**{"lora.rank": 16}), sizes, place)
    assert larger.optimizer == 2 * base.optimizer


def test_a_step_takes_no_more_than_its_pairs_have() -> None:
    """And no less than one."""
    shape, recipe = shape_of(LLAMA_8B), laptop(**{"train.batch_size": 2, "seed_dpo.batch_size": 2})
    case = Case(shape, recipe, CUDA, Longest(100, 51, 151))
    assert case.line == 200
    assert [case.together(tokens) for tokens in (1, 200, 300, 400, 16384)] == [200, 200, 300, 400, 400]
    assert held(case.activations, 400, 0, CUDA) > 1.9 * (held(case.activations, 200, 0, CUDA) - case.tile)


def test_a_row_longer_than_the_context_is_two_lines() -> None:
    """Each with its prompt."""
    case = Case(replace(shape_of(LLAMA_8B), context=1000), laptop(), TORCH, Longest(600, 300, 900))
    assert case.longest.row == 600 + 2 * 299
    assert case.line == 2 * 900


NAMES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SMALL_30M, SMALL_55M, SMALL_135M = (
    (8, 384, 6, 2, 1024, 16384),
    (3, 1024, 16, 16, 2816, 8192),
    (30, 576, 9, 3, 1536, 49152),
)


@pytest.mark.parametrize(
    ("sizes", "tokens", "checkpointed", "measured"),
    [
        (SMALL_30M, 512, 0, 767),
        (SMALL_30M, 2048, 0, 1320),
        (SMALL_30M, 2048, 4, 968),
        (SMALL_30M, 2048, 7, 803),
        (SMALL_55M, 1024, 0, 1220),  # three wide layers: one at work is much
        (SMALL_135M, 1024, 0, 2958),  # what is kept
        (SMALL_135M, 1024, 15, 2148),
        (SMALL_135M, 1024, 29, 1735),  # holes in the heap
    ],
)
def test_a_training_step_takes_what_was_measured(
    sizes: tuple[int, ...], tokens: int, checkpointed: int, measured: int
) -> None:
    """MiB of the process, from `benchmarks/bench_memory.py`."""
    tied = {"vocab_size": sizes[5], "tie_word_embeddings": sizes == SMALL_135M}
    shape = shape_of(LLAMA_8B | dict(zip(NAMES, sizes, strict=False)) | tied)
    lengths = {"lengths.max_prompt_length": 128, "lengths.max_length": 192, "sampling.max_tokens": 64}
    found = memory(shape, laptop(**lengths), Batching(16, 4096, tokens, checkpointed), TORCH)
    assert found.stages["train"] / 2**20 == pytest.approx(measured, rel=0.15)


def test_lengths_end_at_the_context() -> None:
    shape = replace(shape_of(LLAMA_8B), context=600)
    assert longest_of(laptop(), shape) == Longest(512, 88, 600)


def test_work_grows_with_the_data_and_seconds_with_the_work() -> None:
    shape, recipe, sizes = shape_of(LLAMA_8B), laptop(), Batching()
    done = work(shape, recipe, sizes, prompts=100, pairs=50, held_out=20)
    twice = work(shape, recipe, sizes, prompts=200, pairs=50, held_out=20)
    assert {name for name in done if twice[name].flop > 1.9 * done[name].flop} == {"sample", "judge", "train"}
    assert work(shape, laptop(rounds=0), sizes, prompts=100, pairs=50, held_out=20)["sample"].flop == 0
    # Reading a prompt of 512 tokens is 2 FLOP per parameter and token, and attention.
    tokens = 100 * 512 + 200 * 200
    assert done["sample"].flop == pytest.approx(2 * tokens * shape.parameters, rel=0.2)
    total = done["train"] + done["judge"]
    assert seconds(total, Speed(1e12, 1e30)) == pytest.approx(2 * total.flop / 1e12)
    assert seconds(total, Speed(1e30, 1e9)) == pytest.approx(total.bytes / 1e9)


@pytest.mark.parametrize(
    ("changes", "sizes", "kind", "ratio"),
    [
        ({"judge.rescore": "always"}, Batching(), "judge", 2 / 1.02),
        ({"judge.rescore": "never"}, Batching(), "judge", 1 / 1.02),
        (
            {"judge.reference": "none", "judge.rescore": "always", "judge.by": "likelihood"},
            Batching(),
            "judge",
            1 / 1.02,
        ),
        # Policy, its gradient, and in nine steps of ten the reference; a checkpointed body is passed once more.
        ({"refine.alpha": 0.0}, Batching(), "train", 2 / 2.9),
        ({"train.cache_reference": True}, Batching(), "train", 2 / 2.9),
        ({}, Batching(checkpointed=16), "train", 3.4 / 2.9),
        ({}, Batching(checkpointed=32), "seed", 4 / 3),
    ],
)
def test_what_is_not_computed_takes_no_time(changes: dict[str, Any], sizes: Batching, kind: str, ratio: float) -> None:
    """Passes over the rows of a stage, against those of the defaults. The head's share is small, and passed less often
    than the body."""
    shape = replace(shape_of(LLAMA_8B), vocabulary=1)
    usual, other = (
        work(shape, recipe, some, prompts=100, pairs=50, held_out=20)[kind].flop
        for recipe, some in (
            (laptop(**{"refine.warmup": 0.1}), Batching()),
            (laptop(**{"refine.warmup": 0.1} | changes), sizes),
        )
    )
    assert other / usual == pytest.approx(ratio, rel=1e-3)


def test_more_tokens_at_a_time_read_the_weights_less_often() -> None:
    """Down to once per forward of the rows there are."""
    shape, recipe = shape_of(LLAMA_8B), laptop()
    small, large = (
        work(shape, recipe, Batching(score_tokens=tokens, micro_tokens=tokens), prompts=100, pairs=50, held_out=20)
        for tokens in (4096, 8192)
    )
    for kind in ("judge", "train", "seed", "measure"):
        assert small[kind].bytes == pytest.approx(2 * large[kind].bytes)
        assert small[kind].flop == large[kind].flop


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
    """Prompt, prompt with answer, and with both: each the longest there is, of different rows if need be."""
    rows = [Row(prompt=(1,) * 9, responses=((1,), (1, 1))), Row(prompt=(1, 1), responses=((1,) * 6, (1,)))]
    assert longest_of_rows(rows) == Longest(prompt=9, answer=0, pair=11, labelled=10)
    assert longest_of_rows(rows).row == 10
    assert longest_of_rows([]) == Longest(1, 0, 1, 1)
    assert Longest(prompt=9, answer=6, pair=11, labelled=10).row == 9 + 5 + 5
    assert Longest(prompt=9, answer=0, pair=15).row == 9 + 5 + 5, "where both answers may be as long as the longest"
    assert (Longest(9, 6, 11, 10).single, Longest(9, 2, 14, 10).single) == (15, 14)
