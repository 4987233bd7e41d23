"""The MLX backend against the PyTorch backend, shape by shape: the same folder must give the same numbers.

Where mlx-lm and transformers read a model differently, the difference is mended or the model refused.
"""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
pytest.importorskip("mlx_lm")

from mlx_lm.utils import load_model
from safetensors.numpy import load_file

from spa_lite.backend import INIT, POLICY, PREVIOUS, ModelSettings, Sampling
from spa_lite.backends import load
from spa_lite.errors import ModelError
from spa_lite.objective import Dpo
from spa_lite.records import Row
from tests.contract import LORA, OPTIMIZER, Mixed, draw, names, pairs, prompts, score, sums, texts
from tests.tiny import YARN, make_model

SHAPES = ("llama3", "qwen2", "mistral-full", "gemma2-full", "phi3", "smollm2", "qwen3", "yarn")
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
RATE = 1e-2


class Two(NamedTuple):
    """One model in both frameworks."""

    torch: Any
    mlx: Any


def both(folder: Path) -> Two:
    """The model of a folder in both frameworks, float32 on the CPU."""
    torch.set_num_threads(1)  # for matrices this small a second thread only waits
    return Two(*(load(name, ModelSettings(model=str(folder), device="cpu")) for name in ("torch", "mlx")))


@pytest.fixture(scope="module", params=SHAPES)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Two:
    """A model of each shape; its norms and biases are random too."""
    return both(make_model(tmp_path_factory.mktemp(request.param), request.param, uneven=True))


@pytest.fixture(scope="module")
def saved(two: Two, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each has saved after two steps: NAME/policy with its optimizer, and NAME/previous."""
    folder = tmp_path_factory.mktemp("saved")
    for backend in two:
        backend.bind(POLICY, None, LORA)
        backend.snapshot()
        backend.start_training(OPTIMIZER)
        for _ in range(2):
            backend.dpo_step(pairs(backend), Dpo(0.5), RATE)
        backend.save(folder / backend.name / "policy")
        backend.save(folder / backend.name / "previous", PREVIOUS)
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the config.json of a model."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def long_row(backend: Any, size: int) -> Row:
    """A row whose longer response ends after exactly `size` tokens."""
    ids = (pairs(backend)[0].prompt * size)[:size]
    return Row(prompt=ids[: size - 6], responses=(ids[size - 6 :], (7, 300)))


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """The same tensors, up to rounding."""
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert (tensor.shape, tensor.dtype) == (right[key].shape, right[key].dtype)
        np.testing.assert_allclose(tensor, right[key], rtol=0, atol=tolerance, err_msg=key)


# What must agree on every shape


def test_both_read_the_same_model(two: Two, tmp_path: Path) -> None:
    left, right = two
    assert left.fingerprint == right.fingerprint
    assert left.context == right.context == 256
    assert right.description["limits"] == "none"
    assert prompts(left) == prompts(right)
    assert left.tokenizer.stop_ids == right.tokenizer.stop_ids
    rows = [*pairs(left), long_row(left, 256)]
    assert sums(right, rows, INIT) == pytest.approx(sums(left, rows, INIT), abs=1e-4)
    for backend in (left, right):
        backend.bind("fresh", None, LORA)
        backend.save(tmp_path / backend.name, "fresh")
        backend.unbind("fresh")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("torch", "mlx"))
    assert one == other, "the same fresh adapter"


def test_an_adapter_means_the_same_to_both(two: Two, saved: Path) -> None:
    """Trained and saved by one, bound by the other."""
    rows = pairs(two.torch)
    base = sums(two.torch, rows, INIT)
    for maker in two:
        for backend in two:
            backend.bind("x", saved / maker.name / "policy")
        left, right = ([one for some in score(backend, rows, "x", per_token=True) for one in some] for backend in two)
        assert [one.logp for one in right] == pytest.approx([one.logp for one in left], abs=1e-4)
        for one, other in zip(left, right, strict=True):
            assert other.per_token == pytest.approx(one.per_token, abs=3e-5)
        assert np.abs(np.array([one.logp for one in left]) - base).max() > 0.1, "it does something"
        for backend in two:
            backend.unbind("x")


@pytest.mark.parametrize("sampling", [Sampling(0.7, 1.0, 24), Sampling(1.0, 0.9, 24)], ids=["cooler", "nucleus"])
def test_both_write_the_same_answers(two: Two, saved: Path, sampling: Sampling) -> None:
    for backend in two:
        backend.bind(POLICY, saved / "torch" / "policy")
    drawn = [draw(backend, prompts(backend), names(4, 4), sampling) for backend in two]
    left, right = ([one for some in texts(found) for one in some] for found in drawn)
    assert {ended for _, ended in left} == {"eos", "cap"}
    # One may differ: where a uniform lies on a step of the distribution, rounding decides.
    assert sum(one == other for one, other in zip(left, right, strict=True)) >= 15
    for some, others in zip(*drawn, strict=True):
        for one, other in zip(some, others, strict=True):
            if one.ids == other.ids:
                assert other.text == one.text
                assert other.logprobs == pytest.approx(one.logprobs, abs=3e-5)


@pytest.mark.parametrize(("maker", "objective"), [("torch", Dpo), ("mlx", Mixed)], ids=["dpo", "extrapolated"])
def test_a_step_is_the_same_on_both(two: Two, saved: Path, maker: str, objective: Any, tmp_path: Path) -> None:
    """From the same adapters and the same optimizer state, which one has saved and the other restores."""
    seen, asked = [], []
    for backend in two:
        backend.restore(saved / maker / "policy")
        backend.bind(PREVIOUS, saved / maker / "previous")
        asked.append(objective(0.5))
        seen.append(backend.dpo_step(pairs(backend), asked[-1], RATE))
        backend.save(tmp_path / backend.name)
    left, right = seen
    assert right.loss == pytest.approx(left.loss, abs=1e-5)
    assert right.grad_norm == pytest.approx(left.grad_norm, rel=1e-4)
    assert (right.tokens, right.skipped) == (left.tokens, False)
    if objective is Mixed:
        assert asked[1].seen[0].extrapolated == pytest.approx(asked[0].seen[0].extrapolated, abs=1e-4)
    assert_close(tmp_path / "torch/adapter_model.safetensors", tmp_path / "mlx/adapter_model.safetensors", 1e-4)
    assert_close(tmp_path / "torch/optimizer.safetensors", tmp_path / "mlx/optimizer.safetensors", 1e-5)
    before = load_file(saved / maker / "policy" / "adapter_model.safetensors")
    after = load_file(tmp_path / "mlx" / "adapter_model.safetensors")
    assert all(np.abs(after[key] - before[key]).max() > 1e-3 for key in before), "every tensor moves"


# Where mlx-lm alone would read the model in another way


def off(folder: Path, rows: list[Row], expected: Any) -> float:
    """How far mlx-lm alone, as anybody would load it, is from the log-probs of rows' first responses, in nats."""
    try:
        model, _ = load_model(folder)
    except (TypeError, AssertionError):
        return float("inf")
    found = []
    for row in rows:
        ids = mx.array([[*row.prompt, *row.responses[0]]])
        logps = np.array(nn.log_softmax(model(ids)[0, len(row.prompt) - 1 : -1], axis=-1))
        found.append(logps[np.arange(len(row.responses[0])), row.responses[0]].sum())
    return float(np.abs(np.array(found) - expected[::2]).max())


Change = Callable[[dict[str, Any]], Any]


def without(*keys: str) -> Change:
    """Leave these out of config.json."""
    return lambda config: [config.pop(key) for key in keys]


def nulls(*keys: str) -> Change:
    """Set these to null in config.json."""
    return lambda config: config.update(dict.fromkeys(keys))


MENDED: dict[str, tuple[str, dict[str, Any], Change | None]] = {
    "llama3 scaling": ("llama3", {}, None),
    "yarn": ("yarn", {}, None),
    "yarn with an attention factor": ("yarn", {"rope_parameters": YARN | {"attention_factor": 1.3}}, None),
    "yarn with mscale alone": ("yarn", {"rope_parameters": YARN | {"mscale": 2.0}}, None),
    "yarn with mscale_all_dim alone": ("yarn", {"rope_parameters": YARN | {"mscale_all_dim": 0.7}}, None),
    "yarn with both": ("yarn", {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}}, None),
    "yarn with a null": ("yarn", {"rope_parameters": YARN | {"beta_fast": None, "beta_slow": 2}}, None),
    "linear scaling": ("smollm2", {"rope_parameters": LINEAR}, None),
    "another theta": ("qwen2", {}, None),
    "partial rotation": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, None),
    "a head of its own, unsaid": ("mistral-full", {}, without("tie_word_embeddings", "head_dim")),
    "gemma2's defaults, unsaid": (
        "gemma2-full",
        {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        without("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps"),
    ),
    "as many keys as queries, null": ("qwen2", {"num_key_value_heads": 4}, nulls("num_key_value_heads")),
    "windows that transformers' llama has not": (
        "llama3",
        {},
        lambda config: config.update(layer_types=["full_attention", "sliding_attention"], sliding_window=6),
    ),
}
"""What mlx-lm alone gets wrong by more than a tenth of a nat, or cannot load: shape, settings, change of the file."""


@pytest.mark.parametrize("case", MENDED)
def test_what_mlx_lm_reads_otherwise_is_mended(case: str, tmp_path: Path) -> None:
    shape, settings, change = MENDED[case]
    folder = make_model(tmp_path, shape, uneven=True, **settings)
    if change is not None:
        edited(folder, change)
    left, right = both(folder)
    rows = [*pairs(left), long_row(left, 200)]
    expected = sums(left, rows, INIT)
    assert right.context == left.context
    assert sums(right, rows, INIT) == pytest.approx(expected, abs=1e-4)
    assert off(folder, rows, expected) > 0.1


def test_both_spellings_of_rotary_scaling_are_read(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters, transformers 4 wrote rope_theta and rope_scaling."""

    def older(config: dict[str, Any]) -> None:
        scaling = config.pop("rope_parameters")
        config.update(rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)

    found = []
    for name, change in (("newer", None), ("older", older)):
        folder = make_model(tmp_path / name, "llama3")
        if change is not None:
            edited(folder, change)
        backend = load("mlx", ModelSettings(model=str(folder), device="cpu"))
        found.append(sums(backend, pairs(backend), INIT))
    assert (found[0] == found[1]).all()


# Where a limit makes both agree


LIMITED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "mistral": ("mistral", {}, 12, "no sliding window"),
    "mistral, wider": ("mistral-full", {"sliding_window": 48}, 48, "no sliding window"),
    "gemma2": ("gemma2", {}, 12, "no sliding window"),
    "gemma2, wider": ("gemma2-full", {"sliding_window": 48}, 48, "no sliding window"),
    "phi3 with a window": ("phi3", {"sliding_window": 48}, 48, "no sliding window"),
    "qwen2 with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
        48,
        "no sliding window",
    ),
    "phi3 with longrope": (
        "phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
        64,
        "short texts only",
    ),
    "llama with longrope": (
        "llama3",
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}},
        64,
        "short texts only",
    ),
}


@pytest.mark.parametrize("case", LIMITED)
def test_sequences_end_where_mlx_lm_would_go_its_own_way(case: str, tmp_path: Path) -> None:
    shape, settings, limit, note = LIMITED[case]
    left, right = both(make_model(tmp_path, shape, uneven=True, **settings))
    assert (left.context, right.context) == (256, limit)
    assert note in right.description["limits"]
    assert any(note in advice for advice in right.advice)
    rows = [long_row(left, size) for size in (limit - 3, limit)]
    assert sums(right, rows, INIT) == pytest.approx(sums(left, rows, INIT), abs=1e-4)
    (asked,) = prompts(right)[1:2]
    (drawn,) = draw(right, [asked], names(1, 2), Sampling(1.0, 1.0, 64))
    (theirs,) = draw(left, [asked], names(1, 2), Sampling(1.0, 1.0, limit - len(asked)))
    assert texts([drawn]) == texts([theirs])
    with pytest.raises(ModelError, match=f"has {limit + 1} tokens; this model takes {limit}"):
        sums(right, [long_row(right, limit + 1)], INIT)
    right.context = 256
    beyond = [long_row(left, 200)]
    assert np.abs(sums(right, beyond, INIT) - sums(left, beyond, INIT)).max() > 0.1, "the limit is needed"


def test_a_window_that_no_layer_has_limits_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2}
    backend = load("mlx", ModelSettings(model=str(make_model(tmp_path, "qwen2", **settings)), device="cpu"))
    assert backend.context == 256
    assert backend.description["limits"] == "none"


# What cannot be mended


TANH: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 256}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown architecture": ("gpt_neo", {}, "mlx-lm has no architecture 'gpt_neo'.*--backend torch"),
    "another config": ("gpt2", {}, "mlx-lm needs n_ctx in the config.*--backend torch"),
    "exact gelu": ("gpt_neox", {}, r"gpt_neox has no gelu \(it computes gelu_pytorch_tanh\).*--backend torch"),
    "llama with gelu": ("llama3", {"hidden_act": "gelu"}, r"llama has no gelu \(it computes silu\).*--backend torch"),
    "gemma2 with silu": ("gemma2-full", {"hidden_activation": "silu"}, "gemma2 has no silu.*--backend torch"),
    "gemma2 without caps": ("gemma2-full", {"attn_logit_softcapping": None}, "soft cap.*--backend torch"),
    "gemma2 without a cap": ("gemma2-full", {"final_logit_softcapping": None}, "soft cap.*--backend torch"),
    "gemma2 with scaling": (
        "gemma2-full",
        {"rope_parameters": LINEAR},
        "gemma2 has no rotary scaling.*--backend torch",
    ),
    "gpt_neox with scaling": ("gpt_neox", TANH | {"rope_parameters": LINEAR}, "no rotary scaling.*--backend torch"),
    "yarn's fractional borders": (
        "yarn",
        {"rope_parameters": YARN | {"truncate": False}},
        "no YaRN with fractional borders.*--backend torch",
    ),
    "longrope's own strength": (
        "phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE | {"attention_factor": 1.4}},
        "no attention factor in longrope.*--backend torch",
    ),
    "longrope's own factor": (
        "llama3",
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64, "factor": 9.0}},
        "no attention factor in longrope.*--backend torch",
    ),
    "biases that it has not": ("qwen3", {"attention_bias": True}, r"not in model: model\.layers\.0\.self_attn\.k_proj"),
    "a head of gemma2's own": ("gemma2-full", {"tie_word_embeddings": False}, "not in model: lm_head.weight"),
    "wider heads": ("qwen2", {"head_dim": 32}, "Expected shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_lm_cannot_compute_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    shape, settings, message = REFUSED[case]
    folder = make_model(tmp_path, shape, **settings)
    with pytest.raises(ModelError, match=message) as caught:
        load("mlx", ModelSettings(model=str(folder), device="cpu"))
    assert len(str(caught.value).splitlines()) == 1


def test_gpt_neox_is_the_same_where_its_activation_is(tmp_path: Path) -> None:
    """Run whole, since its head is inside its body; its layers have names of mlx-lm's own."""
    left, right = both(make_model(tmp_path, "gpt_neox", uneven=True, **TANH))
    rows = [*pairs(left), long_row(left, 200)]
    assert sums(right, rows, INIT) == pytest.approx(sums(left, rows, INIT), abs=1e-4)
    assert right.net.whole
    assert "fit no other program" in right.description["limits"]


def test_an_architecture_that_was_never_compared_says_so(tmp_path: Path) -> None:
    """It has the defaults of transformers all the same; Granite also scales its logits."""
    left, right = both(make_model(tmp_path, "granite", uneven=True))
    assert "mlx-lm's granite was never compared" in right.description["limits"]
    assert right.context == 256
    assert not right.net.whole
    assert sums(right, pairs(left), INIT) == pytest.approx(sums(left, pairs(left), INIT), abs=1e-4)
