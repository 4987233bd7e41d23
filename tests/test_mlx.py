"""What only the MLX backend promises: its numerics against naive code, its programs, quantised bases, refusals."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pytest.importorskip("torch", reason="the tiny models are made with PyTorch, which is not installed")

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from spa_lite import keys
from spa_lite.backend import INIT, POLICY, PREVIOUS, Batch, Batching, Lora, ModelSettings, Optimizer, Outcome, Sampling
from spa_lite.backends import mlx_checks, mlx_device, mlx_head, mlx_sampling, mlx_scoring, mlx_training
from spa_lite.backends.decoding import CDF_BLOCK
from spa_lite.backends.mlx import MlxBackend
from spa_lite.backends.packing import pack
from spa_lite.errors import BackendError, ModelError
from spa_lite.objective import Dpo
from spa_lite.records import Row
from tests.contract import LORA, OPTIMIZER, Mixed, draw, names, pairs, prompts, score, sums, texts
from tests.tiny import NARROW, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, its norms random too."""
    return make_model(tmp_path_factory.mktemp("llama"), "llama", uneven=True, **NARROW)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen-2, which has biases; wide enough to be quantised."""
    return make_model(tmp_path_factory.mktemp("qwen2"), "qwen2", uneven=True)


def settings(folder: Path, **more: Any) -> ModelSettings:
    """Settings for the CPU."""
    return ModelSettings(**{"model": str(folder), "device": "cpu"} | more)


def moved(folder: Path, steps: int = 2, lora: Lora = LORA, **more: Any) -> MlxBackend:
    """A backend whose policy has made a few steps away from PREVIOUS."""
    backend = MlxBackend(settings(folder, **more))
    backend.bind(POLICY, None, lora)
    backend.snapshot()
    backend.start_training(OPTIMIZER)
    for _ in range(steps):
        backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    return backend


@pytest.fixture(scope="module")
def backend(folder: Path) -> MlxBackend:
    """One such backend for tests that change nothing."""
    return moved(folder)


def base_bytes(backend: MlxBackend) -> bytes:
    """Digest of all weights but the adapters'."""
    digest = hashlib.sha256()
    for name, array in tree_flatten(backend.net.model.parameters()):
        if "lora_" not in name:
            digest.update(name.encode() + np.array(array).tobytes())
    return digest.digest()


def training(backend: MlxBackend) -> mlx_training.Training:
    """The optimizer under way."""
    assert isinstance(backend._training, mlx_training.Training)
    return backend._training


# Drawing


def test_draws_on_four_probabilities() -> None:
    """Worked by hand: 0.1, 0.2, 0.3, 0.4."""
    logits = mx.repeat(mx.log(mx.array([[0.1, 0.2, 0.3, 0.4]])), 6, axis=0)
    uniforms = mx.array([0.05, 0.15, 0.31, 0.59, 0.61, 0.99])
    assert mlx_sampling.draw(logits, Sampling(1.0), uniforms).tolist() == [0, 1, 2, 2, 3, 3]
    # Temperature 0.5 squares them: 1, 4, 9, 16 of 30, cumulative 0.033, 0.167, 0.467, 1.
    assert mlx_sampling.draw(logits, Sampling(0.5), uniforms).tolist() == [1, 1, 2, 3, 3, 3]
    # The nucleus of 0.6 is {3, 2}, renormalised to 3/7 and 4/7 in vocabulary order: cumulative 0, 0, 0.429, 1.
    assert mlx_sampling.draw(logits, Sampling(1.0, 0.6), uniforms).tolist() == [2, 2, 2, 3, 3, 3]
    assert mlx_sampling.draw(logits, Sampling(1.0, 0.4), uniforms).tolist() == [3] * 6
    assert mlx_sampling.draw(logits, Sampling(0.0), uniforms).tolist() == [3] * 6


@pytest.mark.parametrize("size", [4, 384, 5000])
def test_a_nucleus_breaks_ties_by_the_lower_id(size: int) -> None:
    kept = np.array(mlx_sampling.nucleus(mx.full((2, size), 1 / size), 0.5)) > 0
    assert (kept == (np.arange(size) < kept[0].sum())).all()
    assert abs(kept[0].sum() - size / 2) <= 1


@pytest.mark.parametrize("size", [5, 256, 257, 5000])
def test_the_blocked_cdf_is_the_plain_one(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = rng.random((400, size)) * (rng.random((400, size)) < 0.3)
    weights[:, size // 2] += 1e-3
    uniforms = rng.random(400)
    cumulative = weights.cumsum(axis=1)
    target = uniforms * cumulative[:, -1]
    clear = np.abs(cumulative - target[:, None]).min(axis=1) > 1e-5 * cumulative[:, -1]
    expected = np.array([np.searchsorted(row, u, side="right") for row, u in zip(cumulative, target, strict=True)])
    found = np.array(
        mlx_sampling.inverse_cdf(mx.array(weights.astype(np.float32)), mx.array(uniforms.astype(np.float32)))
    )
    assert clear.sum() > 300
    assert (found == expected)[clear].all()
    assert (weights[np.arange(400), found] > 0).all(), "a token of no weight is never drawn"


@pytest.mark.parametrize("uniform", [1e-7, 1 - 1e-7])
def test_the_ends_of_the_unit_interval_are_safe(uniform: float) -> None:
    weights = np.zeros((1, 600), dtype=np.float32)
    weights[0, [3, 300, 550]] = [0.2, 0.3, 0.5]
    found = mlx_sampling.inverse_cdf(mx.array(weights), mx.array([uniform]))
    assert found.item() == (3 if uniform < 0.5 else 550)


def test_rounding_at_a_border_draws_no_weightless_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some devices a running sum rounds otherwise than a sum: then the target may lie beyond a block's tokens."""
    real = mx.cumsum

    def rougher(values: Any, axis: int) -> Any:
        return real(values, axis=axis) * (1 - 1e-6 * (values.shape[axis] == CDF_BLOCK))

    monkeypatch.setattr(mx, "cumsum", rougher)
    places = np.arange(1000) % CDF_BLOCK
    weights = (np.random.default_rng(0).random((50, 1000)) * ((places > 2) & (places < 200))).astype(np.float32)
    for border in (256, 512, 768, 1000):
        share = weights[:, :border].sum(axis=1) / weights.sum(axis=1)
        found = np.array(mlx_sampling.inverse_cdf(mx.array(weights), mx.array(share * np.float32(1 - 1e-7))))
        assert (weights[np.arange(50), found] > 0).all()


# Log-probabilities


@pytest.mark.parametrize(("vocabulary", "likely"), [(5000, 0.999), (32000, 0.99)])
def test_likely_tokens_keep_their_digits(vocabulary: int, likely: float) -> None:
    """MLX's own log-sum-exp adds one by one on the CPU, so that a likely token swallows the rest."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.5, (200, vocabulary)).astype(np.float32)
    lines, top = np.arange(200), rng.integers(0, vocabulary, 200)
    others = np.exp(logits.astype(np.float64)).sum(1) - np.exp(logits[lines, top].astype(np.float64))
    logits[lines, top] = np.log(others * likely / (1 - likely))
    exact = logits.astype(np.float64)
    expected = exact[lines, top] - np.log(np.exp(exact).sum(1))
    with mx.stream(mx.cpu):
        ours = mlx_scoring.to_numpy(mlx_head.token_logprobs(mx.array(logits), mx.array(top)))
        theirs = np.array(mx.array(logits[lines, top]) - mx.logsumexp(mx.array(logits), axis=-1), dtype=np.float64)
    assert abs((ours - expected).mean()) < 3e-7
    assert abs((theirs - expected).mean()) > 1e-6, "if not, mx.logsumexp would do"


def test_low_precision_models_are_scored_in_float32(folder: Path) -> None:
    """bfloat16 holds 8 bits: sums of bfloat16 log-probs would lie on a coarse grid."""
    low, high = moved(folder, dtype="bfloat16"), moved(folder, dtype="float32")
    assert (low.description["dtype"], low.description["bits"]) == ("bfloat16", 16)
    assert (high.description["dtype"], high.description["bits"]) == ("float32", 32)
    held = low.adapters.held[low._roles[POLICY] or ""]
    assert all(array.dtype == mx.float32 for array in held.tree.values())
    values = np.array(
        [value for some in score(low, pairs(low), per_token=True) for one in some for value in one.per_token or ()]
    )
    coarse = np.array(mx.array(values.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))
    assert (values != coarse).mean() > 0.9
    assert sums(low, pairs(low)) == pytest.approx(sums(high, pairs(high)), rel=0.1)
    drawn = draw(low, prompts(low), names(4, 2), Sampling(1.0, 1.0, 20))
    rows = [Row(prompt=p, responses=tuple(c.ids for c in some)) for p, some in zip(prompts(low), drawn, strict=True)]
    recorded = [value for some in drawn for c in some for value in c.logprobs]
    again = [value for some in score(low, rows, per_token=True) for one in some for value in one.per_token or ()]
    assert np.abs(np.array(recorded) - np.array(again)).mean() < 0.05


# Caches, pieces and tiles: other ways to the same numbers


def test_every_way_to_share_a_batch_gives_the_same_text(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, key, sampling = prompts(backend), names(4, 2), Sampling(1.0, 1.0, 24)
    expected = texts(draw(backend, asked, key, sampling))
    assert backend.description["prompts_share_a_batch"] == "padded"
    for way in ("equal", "none"):
        monkeypatch.setattr(backend, "_way", way)
        assert texts(draw(backend, asked, key, sampling)) == expected
        assert backend.description["prompts_share_a_batch"] == way
        assert [len({len(asked[i]) for i in group}) for group in backend._groups(asked, sampling)] == [1, 1, 1]


def test_a_cache_that_does_not_work_is_noticed(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(kind: Any) -> None:
        real = kind.update_and_fetch

        def update_and_fetch(self: Any, keys_: Any, values: Any) -> Any:
            found, rest = real(self, keys_, values)
            return found * 0.5, rest

        monkeypatch.setattr(kind, "update_and_fetch", update_and_fetch)

    assert mlx_sampling.best_way(backend.net) == "padded"
    forgetful(cache.BatchKVCache)
    assert mlx_sampling.best_way(backend.net) == "equal"
    forgetful(cache.KVCache)
    assert mlx_sampling.best_way(backend.net) == "none"


def test_a_cache_that_cannot_be_padded_is_noticed(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache.KVCache, "merge")
    assert mlx_sampling.best_way(backend.net) == "equal"


def test_prompts_may_be_read_in_pieces(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, key, sampling = prompts(backend), names(4, 2), Sampling(1.0, 1.0, 24)
    expected = texts(draw(backend, asked, key, sampling))
    sizes: list[int] = []
    real = backend.net.hidden

    def hidden(ids: Any, cache: Any = None) -> Any:
        sizes.append(ids.shape[1])
        return real(ids, cache)

    monkeypatch.setattr(backend.net, "hidden", hidden)
    monkeypatch.setattr(mlx_sampling, "PREFILL", 20)  # five tokens of each of the four prompts
    assert texts(draw(backend, asked, key, sampling)) == expected
    assert max(sizes) == 5


@pytest.mark.parametrize("architecture", ["llama", "gemma2-full"])
def test_a_model_run_whole_gives_the_same_numbers(architecture: str, tmp_path: Path) -> None:
    """The slow way for models whose logits are not head(body(ids))."""
    make_model(tmp_path, architecture, **NARROW)
    halves, whole = moved(tmp_path, 0), moved(tmp_path, 0)
    assert not halves.net.whole
    whole.net.whole = True
    for _ in range(2):
        left = halves.dpo_step(pairs(halves), Mixed(0.5), 1e-2)
        right = whole.dpo_step(pairs(whole), Mixed(0.5), 1e-2)
        assert right.loss == pytest.approx(left.loss, abs=1e-5)
        assert right.grad_norm == pytest.approx(left.grad_norm, rel=1e-3)
    found = [texts(draw(one, prompts(one), names(4, 2), Sampling(1.0, 1.0, 20))) for one in (halves, whole)]
    assert found[0] == found[1]


def test_a_head_that_leaves_something_out_is_noticed(tmp_path: Path) -> None:
    """Gemma-2's soft cap, hidden from the code that looks for it."""
    net = MlxBackend(settings(make_model(tmp_path, "gemma2-full"))).net
    probe = mx.array([[1, 5, 2, 7, 3]])
    expected = net.model(probe)
    assert net._halves_agree(probe, expected)
    net._cap = None
    assert not net._halves_agree(probe, expected)


def seen(backend: MlxBackend) -> tuple[Any, Any, Any]:
    """Loss, gradient and log-probs after a step on eight rows."""
    rows = pairs(backend, 8)
    stats = backend.dpo_step(rows, Mixed(0.5), 1e-2)
    return stats.loss, stats.grad_norm, sums(backend, rows)


def test_tiles_and_checkpointing_change_memory_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointing = Batching(checkpointed=1)
    plain = seen(moved(folder))
    found = [seen(moved(folder, batching=checkpointing)), seen(moved(folder, batching=checkpointing))]
    found.append(seen(moved(folder)))  # the blocks' class is patched for good by now, but switched off
    monkeypatch.setitem(mlx_head.TILE_NUMBERS, "cpu", 1)  # the smallest tiles: 16 positions
    monkeypatch.setattr(mlx_scoring, "FORWARD", 40)
    tiled = moved(folder)
    assert len(list(mlx_head.tiles(sum(len(one) for row in pairs(tiled, 8) for one in row.responses), tiled.net))) > 3
    found += [seen(tiled), seen(moved(folder, batching=checkpointing))]
    for loss, norm, after in found:
        assert loss == pytest.approx(plain[0], abs=1e-5)
        assert norm == pytest.approx(plain[1], rel=1e-3)
        assert after == pytest.approx(plain[2], abs=2e-3)


def peak(work: Callable[[], Any]) -> int:
    """Bytes that MLX held at most."""
    mx.clear_cache()
    mx.reset_peak_memory()
    work()
    return int(mx.get_peak_memory())


def test_tiles_save_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: MLX would work on all of them at once and hold all their logits."""
    make_model(tmp_path, "smollm2", vocab_size=4096, **NARROW)
    ids = tuple(int(token) for token in np.random.default_rng(0).integers(6, 300, 120))
    rows = [Row(prompt=ids[:10], responses=(ids[10:], ids[:10:-1]))] * 2

    def peaks() -> tuple[int, int]:
        backend = moved(tmp_path, 0)
        return peak(lambda: sums(backend, rows)), peak(lambda: backend.dpo_step(rows, Mixed(0.5), 1e-3))

    whole = peaks()
    monkeypatch.setitem(mlx_head.TILE_NUMBERS, "cpu", 2**16)
    tiled = peaks()
    assert tiled[0] < whole[0] / 3
    assert tiled[1] < whole[1] / 4


def test_checkpointing_saves_memory(tmp_path: Path) -> None:
    make_model(tmp_path, "smollm2", num_hidden_layers=8, **NARROW)
    ids = tuple(int(token) for token in np.random.default_rng(0).integers(6, 300, 120))
    rows = [Row(prompt=ids[:10], responses=(ids[10:], ids[:10:-1]))] * 2
    plain, again = (moved(tmp_path, 0, batching=Batching(checkpointed=layers)) for layers in (0, 8))
    assert peak(lambda: again.dpo_step(rows, Dpo(0.5), 1e-3)) < peak(lambda: plain.dpo_step(rows, Dpo(0.5), 1e-3)) / 1.5


def test_checkpointing_makes_the_blocks_again(folder: Path) -> None:
    """As many as are asked for, however often; and none for a backend that does not ask."""
    calls = []

    class Counted(nn.Module):  # type: ignore[misc]  # what is skipped is Any
        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.array(3.0)

        def __call__(self, x: Any) -> Any:
            calls.append(1)
            return x * self.weight

    class Model:
        layers = (Counted(), Counted())

    def gradient(layers: int) -> tuple[float, int]:
        calls.clear()
        with mlx_training.checkpointed(Model, layers):
            found = mx.grad(lambda x: Model.layers[1](Model.layers[0](x)))(mx.array(2.0))
        return found.item(), len(calls)

    assert gradient(0) == (9.0, 2)
    assert [gradient(2) for _ in range(3)] == [(9.0, 4)] * 3
    assert gradient(1) == (9.0, 3)
    assert gradient(0) == (9.0, 2)


def test_a_head_may_be_adapted_if_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one tile or several: a head that is trained must not lose its gradient when logits are made again."""
    found = []
    for numbers in (2**20, 1):
        monkeypatch.setitem(mlx_head.TILE_NUMBERS, "cpu", numbers)
        backend = moved(folder, 0, Lora(rank=2, alpha=8.0, targets=("lm_head", "q_proj")))
        steps = [backend.dpo_step(pairs(backend), Mixed(0.5), 1e-2) for _ in range(3)]
        assert steps[-1].loss < 0.68
        rows = pairs(backend)
        assert sums(backend, rows, PREVIOUS) == pytest.approx(sums(backend, rows, INIT), abs=1e-6)
        tree = backend.adapters.held[backend._roles[POLICY] or ""].tree
        assert np.abs(np.array(tree["lm_head.lora_b"])).max() > 0.01
        found.append([step.grad_norm for step in steps])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


# Training


def naive_step(folder: Path, policy: Path, previous: Path, rows: list[Row], optimizer: Optimizer) -> tuple[float, ...]:
    """Loss, gradient norm and log-probs after one DPO step, as anybody would write it: full logits, no tricks."""
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": LORA.rank, "scale": LORA.alpha / LORA.rank, "dropout": 0.0})

    def wear(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        weights = [
            (
                key.removeprefix("base_model.model.").replace(f"lora_{side}.weight", f"lora_{side.lower()}"),
                mx.array(t.T),
            )
            for key, t in tensors.items()
            for side in "AB"
            if f"lora_{side}" in key
        ]
        model.load_weights(weights, strict=False)

    def total(row: Row, side: int) -> Any:
        ids = mx.array([*row.prompt, *row.responses[side]])
        logps = nn.log_softmax(model(ids[None])[0, :-1], axis=-1)
        return mx.take_along_axis(logps, ids[1:, None], axis=1)[len(row.prompt) - 1 :].sum()

    def mean_loss(_: Any) -> Any:
        losses = []
        for row, (one, two) in zip(rows, reference, strict=True):
            losses.append(-nn.log_sigmoid(0.3 * ((total(row, 0) - one) - (total(row, 1) - two))))
        return mx.stack(losses).mean()

    wear(previous)
    reference = [[total(row, side).item() for side in (0, 1)] for row in rows]
    wear(policy)
    loss, gradient = nn.value_and_grad(model, mean_loss)(model)
    gradient, norm = optim.clip_grad_norm(gradient, optimizer.max_grad_norm)
    betas = [optimizer.beta1, optimizer.beta2]
    adamw = optim.AdamW(1e-2, betas, optimizer.eps, optimizer.weight_decay, bias_correction=True)
    adamw.update(model, gradient)
    return loss.item(), norm.item(), *(total(row, side).item() for row in rows for side in (0, 1))


def test_a_step_is_that_of_naive_code(folder: Path, tmp_path: Path) -> None:
    backend = moved(folder)
    backend.save(tmp_path / "policy")
    backend.save(tmp_path / "previous", PREVIOUS)
    rows = pairs(backend)
    optimizer = Optimizer(eps=1e-4, weight_decay=0.1, max_grad_norm=0.2)
    backend.start_training(optimizer)
    stats = backend.dpo_step(rows, Dpo(0.3), 1e-2)
    loss, norm, *after = naive_step(folder, tmp_path / "policy", tmp_path / "previous", rows, optimizer)
    assert norm > 0.2, "the gradient is clipped"
    assert stats.loss == pytest.approx(loss, abs=1e-5)
    assert stats.grad_norm == pytest.approx(norm, rel=1e-4)
    assert sums(backend, rows) == pytest.approx(after, abs=1e-3)


def test_coefficients_that_come_too_late_are_given_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has read the placeholders before they are written: the gradient is then computed anew."""
    expected, found = moved(folder), moved(folder)
    real = mlx_training.write
    lost: list[Any] = []

    def forgetful(target: Any, values: Any) -> None:
        if not lost:
            lost.append(target)
        else:
            real(target, values)

    rows = pairs(expected, 8)
    left = expected.dpo_step(rows, Mixed(0.5), 1e-2)
    monkeypatch.setattr(mlx_training, "write", forgetful)
    right = found.dpo_step(rows, Mixed(0.5), 1e-2)
    assert np.isnan(np.array(lost[0])).all(), "the placeholders are not numbers"
    assert not right.skipped
    assert right.loss == left.loss
    assert right.grad_norm == pytest.approx(left.grad_norm, rel=1e-6)
    assert sums(found, rows) == pytest.approx(sums(expected, rows), abs=1e-5)


@pytest.mark.parametrize("coefficient", [np.inf, -np.inf, 1e39])
def test_coefficients_that_are_no_float32_skip_the_step(coefficient: float, folder: Path) -> None:
    """The last is finite, but not in the float32 of the device."""

    class Steep:
        reference, extrapolation, sequential = True, 0.0, False

        def __call__(self, batch: Batch) -> Outcome:
            return Outcome(np.ones(batch.row[-1] + 1), np.full(len(batch.row), coefficient))

    backend = moved(folder)
    rows = pairs(backend)
    before = sums(backend, rows)
    with np.errstate(over="ignore"):
        stats = backend.dpo_step(rows, Steep(), 1e-2)
    assert stats.skipped
    assert (sums(backend, rows) == before).all()
    assert not backend.dpo_step(rows, Dpo(0.5), 1e-2).skipped


def test_few_programs_are_made_for_many_lengths(folder: Path) -> None:
    """What is compiled depends on rounded sizes, so that rows of forty lengths share a handful of programs."""
    backend = moved(folder, 0)
    rng = np.random.default_rng(0)
    for size in range(10, 50):
        ids = tuple(int(token) for token in rng.integers(6, 300, size))
        cut = size // 2
        backend.dpo_step([Row(prompt=ids[:cut], responses=(ids[cut:], ids[cut:-2]))], Dpo(0.5), 1e-3)
    assert len(training(backend).programs) == 1
    assert training(backend).traces <= 12, "of forty lengths"
    before = training(backend).traces
    backend.dpo_step([Row(prompt=ids[:cut], responses=(ids[cut:], ids[cut:-2]))], Dpo(0.5), 1e-3)
    assert training(backend).traces == before, "a known shape is not traced again"


def test_rounding_wastes_little() -> None:
    sizes = [mlx_training.rounded(size) for size in range(1, 5000)]
    assert sizes == sorted(sizes)
    assert all(size <= found and found % 8 == 0 for size, found in enumerate(sizes, 1))
    assert all(found <= max(size + 7, size * 9 / 8) for size, found in enumerate(sizes, 1))
    for power in range(4, 12):
        assert len({found for found in sizes if 2**power < found <= 2 ** (power + 1)}) <= 8
    assert mlx_training.rounded(0) == 8


def test_padding_of_a_program_has_no_weight(backend: MlxBackend) -> None:
    packed = pack(pairs(backend, 2))
    ids, positions, segments, places, targets = mlx_training.padded(packed)
    assert ids.shape[1] % 8 == len(places) % 8 == len(targets) % 8 == 0
    count, width = len(packed.targets), packed.ids.shape[1]
    assert (ids.flat[places[:count]] == packed.ids.flat[packed.places]).all(), "the same places on longer lines"
    assert (positions.flat[places[:count]] == packed.positions.flat[packed.places]).all()
    assert (targets[:count] == packed.targets).all()
    assert not ids[:, width:].any()
    assert (segments[:, width:] == -1).all()


def test_only_the_adapter_is_trainable(biased: Path) -> None:
    """On a plain base, and on one that is quantised on the way, where MLX would leave its biases unfrozen."""
    for four_bit in (False, True):
        backend = MlxBackend(settings(biased, load_in_4bit=four_bit))
        assert tree_flatten(backend.net.model.trainable_parameters()) == []
        backend.bind(POLICY, None, LORA)
        backend._enter(POLICY)
        found = dict(tree_flatten(backend.net.model.trainable_parameters()))
        assert {name.rpartition(".")[2] for name in found} == {"lora_a", "lora_b"}
        size = sum(array.size for array in found.values())
        per_layer = 3 * (64 + 96) + 2 * (64 + 64) + 2 * (64 + 32)
        assert size == backend.description["adapter_parameters"] == 2 * LORA.rank * per_layer
        assert not backend.net.model.training


def quantised(folder: Path, target: Path, bits: int) -> Path:
    """The model as mlx-lm quantises it, in groups of 32."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    model, config = load_model(folder)
    model, config = quantize_model(model, json.loads((folder / "config.json").read_text()), 32, bits)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "4 bits on the way"])
def test_adapters_are_trained_on_quantised_bases(kind: str, biased: Path, tmp_path: Path) -> None:
    on_the_way = kind == "4 bits on the way"
    model = biased if on_the_way else quantised(biased, tmp_path / "model", int(kind[0]))
    backend = moved(model, 0, load_in_4bit=on_the_way)
    assert backend.description["bits"] == int(kind[0])
    assert backend.description["parameters"] == MlxBackend(settings(biased)).description["parameters"]
    layers = backend.net.model.model.layers
    assert isinstance(layers[0].self_attn.q_proj.linear, nn.QuantizedLinear)
    before = base_bytes(backend)
    backend._enter(POLICY)
    assert all("lora_" in name for name, _ in tree_flatten(backend.net.model.trainable_parameters()))
    rows = pairs(backend)
    losses = [backend.dpo_step(rows, Mixed(0.5), 1e-2).loss for _ in range(4)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert base_bytes(backend) == before
    assert sums(backend, rows, PREVIOUS) == pytest.approx(sums(backend, rows, INIT), abs=1e-6)
    drawn = draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 12))
    asked = [Row(prompt=p, responses=tuple(c.ids for c in s)) for p, s in zip(prompts(backend), drawn, strict=True)]
    recorded = [value for some in drawn for c in some for value in c.logprobs]
    again = [value for some in score(backend, asked, per_token=True) for one in some for value in one.per_token or ()]
    assert again == pytest.approx(recorded, abs=1e-4)
    backend.save(tmp_path / "adapter")
    plain = MlxBackend(settings(biased))
    plain.bind(POLICY, tmp_path / "adapter")
    # Coarse, since these bases differ by their rounding: an adapter is not bound to one precision.
    assert np.abs(sums(plain, rows) - sums(backend, rows)).mean() < (1.0 if backend.description["bits"] == 8 else 8.0)


def test_four_bits_are_not_made_of_eight(biased: Path, tmp_path: Path) -> None:
    model = quantised(biased, tmp_path / "model", 8)
    with pytest.raises(BackendError, match="comes in 8 bits: leave --load-in-4bit out"):
        MlxBackend(settings(model, load_in_4bit=True))
    four = MlxBackend(settings(quantised(biased, tmp_path / "four", 4), load_in_4bit=True))
    assert four.description["bits"] == 4


def test_a_damaged_optimizer_is_refused(folder: Path, tmp_path: Path) -> None:
    backend = moved(folder)
    backend.save(tmp_path)
    state = load_file(tmp_path / "optimizer.safetensors")
    other = {key: value[:, :3] if value.ndim == 2 else value for key, value in state.items()}
    metadata = {"adamw": "{}"}
    for damage in (
        lambda path: path.write_bytes(b"nothing"),
        lambda path: save_file(other, path, metadata),
        lambda path: save_file({}, path),
        lambda path: save_file(state, path, {"adamw": '{"speed": 3}'}),
        lambda path: save_file(dict(list(state.items())[:4]), path, metadata),
    ):
        damage(tmp_path / "optimizer.safetensors")
        with pytest.raises(ModelError, match=r"optimizer\.safetensors is damaged or belongs to another adapter"):
            backend.restore(tmp_path)


def test_training_ends_when_the_policy_is_bound_anew(folder: Path) -> None:
    backend = moved(folder)
    backend.bind(POLICY, None, LORA)
    with pytest.raises(BackendError, match="start_training"):
        backend.dpo_step(pairs(backend), Dpo(0.1), 1e-2)


# Adapters


def test_a_fresh_adapter_comes_from_the_named_streams(backend: MlxBackend) -> None:
    backend.bind("fresh", None, Lora(rank=3, alpha=6.0, targets=("q_proj", "mlp.down_proj"), seed=11))
    held = backend.adapters.held[backend._roles["fresh"] or ""]
    modules = {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")}
    assert {key.rpartition(".")[0] for key in held.tree} == set(held.scales) == modules
    assert set(held.scales.values()) == {2.0}
    for key, array in held.tree.items():
        module, _, side = key.rpartition(".")
        if side == "lora_a":
            expected = keys.lora_a(11, module, 3, array.shape[0])
            assert (expected == np.array(array).T).all()
        else:
            assert not np.array(array).any()
    backend.unbind("fresh")


def test_all_linear_leaves_the_head_alone(backend: MlxBackend) -> None:
    adapted = {key.split(".")[-2] for key in backend.adapters.held[backend._roles[POLICY] or ""].tree}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_unknown_target_lists_the_known(backend: MlxBackend) -> None:
    with pytest.raises(ModelError, match=r"'c_attn'.*down_proj.*q_proj"):
        backend.bind("x", None, Lora(targets=("c_attn",)))


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["v_proj", "o_proj"], "use_rslora": True},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0},
        {"r": 2, "target_modules": r".*\.1\..*(up|down)_proj"},
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ],
    ids=["rslora", "last block", "first block", "pattern", "excluded"],
)
def test_adapters_that_peft_makes_mean_the_same_here(
    config: dict[str, Any], folder: Path, backend: MlxBackend, tmp_path: Path
) -> None:
    import torch

    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from spa_lite.backends.quiet import quiet

    ids = pairs(backend)[0].prompt
    with quiet(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(folder)
        base = model(input_ids=torch.tensor([ids])).logits.numpy()
        model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config))
        model.save_pretrained(tmp_path / "peft")
        expected = model(input_ids=torch.tensor([ids])).logits.numpy()
    backend.bind("theirs", tmp_path / "peft")
    backend._enter("theirs")
    assert np.abs(np.array(backend.net.model(mx.array([ids]))) - expected).max() < 1e-4
    assert np.abs(expected - base).max() > 1e-2
    backend.save(tmp_path / "again", "theirs")
    backend.bind("theirs", tmp_path / "again")
    backend._enter("theirs")
    assert np.abs(np.array(backend.net.model(mx.array([ids]))) - expected).max() < 1e-4
    backend.unbind("theirs")


Damage = Callable[[dict[str, Any], dict[str, Any]], Any]


def damaged(folder: Path, change: Damage) -> Path:
    """Rewrite an adapter folder after changing its config and tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def drop(part: str) -> Damage:
    """Leave out every tensor whose key holds this."""
    return lambda _, tensors: [tensors.pop(key) for key in list(tensors) if part in key]


DAMAGE: dict[str, tuple[Damage, str]] = {
    "a tensor too few": (lambda _, tensors: tensors.popitem(), "without its lora_"),
    "a layer too few": (drop("layers.1.self_attn.v_proj"), "v_proj.lora_A.weight: it is not in the file"),
    "a tensor too many": (
        lambda _, tensors: tensors.update(extra=np.zeros(2, np.float32)),
        "extra, which is no matrix",
    ),
    "a module too many": (
        lambda _, tensors: tensors.update({key.replace("layers.1", "layers.7"): t for key, t in tensors.items()}),
        "layers.7.*the base has no place for it",
    ),
    "a module unnamed": (
        lambda config, _: config["target_modules"].remove("v_proj"),
        "target_modules does not name it",
    ),
    "another shape": (
        lambda _, tensors: tensors.update(
            {k: v[:, :16].copy() for k, v in tensors.items() if k.endswith("q_proj.lora_A.weight")}
        ),
        r"\[4, 16\] where the base needs \[4, 32\]",
    ),
    "another rank": (lambda config, _: config.update(r=8), r"where the base needs \[8, "),
    "other modules": (lambda config, _: config.update(target_modules=["c_attn"]), "target_modules does not name it"),
    "whole modules": (lambda config, _: config.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda config, _: config.update(bias="all"), "bias"),
    "another method": (lambda config, _: config.update(peft_type="IA3"), "IA3"),
    "a changed base": (lambda config, _: config.update(init_lora_weights="pissa"), "pissa"),
    "directions": (lambda config, _: config.update(use_dora=True), "use_dora.*the mlx backend.*plain LoRA"),
    "ranks": (lambda config, _: config.update(rank_pattern={"q_proj": 2}), "rank_pattern.*plain LoRA"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused(kind: str, backend: MlxBackend, tmp_path: Path) -> None:
    backend.save(tmp_path)
    change, message = DAMAGE[kind]
    expected = sums(backend, pairs(backend))
    held = set(backend.adapters.held)
    with pytest.raises(ModelError, match=message) as caught:
        backend.bind("x", damaged(tmp_path, change))
    assert len(str(caught.value).splitlines()) == 1
    assert "x" not in backend._roles
    assert set(backend.adapters.held) == held
    assert (sums(backend, pairs(backend)) == expected).all(), "the other roles are unharmed"


def test_a_pickle_is_never_read(backend: MlxBackend, tmp_path: Path) -> None:
    backend.save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        backend.bind("x", tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ModelError, match="damaged"):
        backend.bind("x", tmp_path)


def test_roles_share_one_base(backend: MlxBackend) -> None:
    """A role costs its adapter and nothing else; and the base under an adapter is the base, bit for bit."""
    parts = [array for name, array in tree_flatten(backend.net.model.parameters()) if "lora_" not in name]
    assert sum(array.size for array in parts) == backend.description["parameters"]
    fresh = MlxBackend(backend.settings)
    rows = pairs(backend)
    assert (sums(backend, rows, INIT) == sums(fresh, rows, INIT)).all()


# Loading


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backend = moved(folder)
    backend.save(tmp_path)
    backend.restore(tmp_path)
    draw(backend, prompts(backend), names(4, 1), Sampling(1.0, 1.0, 5))
    assert capfd.readouterr() == ("", "")


def test_the_random_state_of_the_program_is_left_alone(folder: Path) -> None:
    mx.random.seed(5)
    mx.random.uniform()
    np.random.seed(5)  # noqa: NPY002 - somebody else's program may use it

    def state() -> Any:
        return mx.random.state[0].tolist(), np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002

    before = state()
    backend = moved(folder)
    draw(backend, prompts(backend), names(4, 1), Sampling(1.0, 1.0, 5))
    mlx_device.gigaflops.cache_clear()
    mlx_device.gigaflops()
    assert state() == before


def test_models_that_cannot_be_loaded_say_why(folder: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], Any]) -> str:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        return str(copy)

    cases = [
        (str(tmp_path / "absent"), "there is no model folder"),
        ("./absent", "there is no model folder"),
        ("nobody/no-such-model", "cannot be had from the hub"),
        (broken("bare", lambda f: (f / "model.safetensors").unlink()), "no .*safetensors"),
        (broken("renamed", lambda f: (f / "model.safetensors").rename(f / "w.safetensors")), "weights of .*renamed"),
        (broken("cut", lambda f: (f / "model.safetensors").write_bytes(b"x" * 100)), "weights of .*cut"),
        (broken("unconfigured", lambda f: (f / "config.json").unlink()), "no config.json"),
        (broken("misconfigured", lambda f: (f / "config.json").write_text("{")), "config of .*misconfigured"),
        (broken("mute", lambda f: (f / "tokenizer.json").write_text("{")), "tokenizer"),
        (broken("untemplated", lambda f: (f / "chat_template.jinja").unlink()), "--template plain"),
    ]
    for model, message in cases:
        with pytest.raises(ModelError, match=message) as caught:
            MlxBackend(ModelSettings(model=model, device="cpu"))
        assert len(str(caught.value).splitlines()) == 1


def test_weights_that_are_missing_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "holed")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "holed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holed.*Missing.*model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        MlxBackend(settings(tmp_path / "holed"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "abacus"}, "no device 'abacus': use auto, cpu or gpu"),
        ({"device": "cuda"}, "no device 'cuda'"),
        ({"device": "gpu"}, "sees no Apple GPU; use cpu"),
        ({"dtype": "float8"}, "no dtype 'float8'"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    folder: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "is_available", lambda device: False)
    with pytest.raises(BackendError, match=message):
        MlxBackend(settings(folder, **change))


def test_the_fingerprint_follows_weights_and_template(folder: Path, tmp_path: Path, backend: MlxBackend) -> None:
    other = MlxBackend(settings(make_model(tmp_path / "other", "llama", 1, **NARROW)))
    plain = MlxBackend(settings(folder, template="plain"))
    same = MlxBackend(settings(Path(shutil.copytree(folder, tmp_path / "copy"))))
    assert len({backend.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    assert same.fingerprint == backend.fingerprint, "it is the content that counts, not the place"


# The machine


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Linux machine without an Apple GPU."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)


@pytest.mark.usefixtures("linux")
def test_a_slow_matrix_library_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_device, "Path", lambda _: tmp_path)
    monkeypatch.setattr(mlx_device, "gigaflops", lambda: mlx_device.SLOW_BLAS - 1)
    (said,) = mlx_device.advice()
    assert "apt install libopenblas0-pthread" in said
    assert "LD_PRELOAD=PATH/libopenblas.so.0 spa-lite" in said
    library = tmp_path / "x86_64-linux-gnu" / "openblas-pthread" / "libopenblas.so.0"
    library.parent.mkdir(parents=True)
    library.touch()
    (said,) = mlx_device.advice()
    assert "apt" not in said
    assert f"LD_PRELOAD={library} spa-lite" in said
    monkeypatch.setattr(mlx_device, "gigaflops", lambda: mlx_device.SLOW_BLAS + 1)
    assert mlx_device.advice() == ()


def test_other_machines_are_given_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_device, "gigaflops", lambda: 1.0)
    for platform, device in (("darwin", mx.cpu), ("linux", mx.gpu)):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        assert mlx_device.advice() == ()


def test_the_speed_is_measured_once() -> None:
    mlx_device.gigaflops.cache_clear()
    assert 0.01 < mlx_device.gigaflops() == mlx_device.gigaflops()


@pytest.mark.parametrize("metal", [True, False])
def test_memory_is_limited_where_it_is_shared_with_the_screen(metal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, int] = {}
    size = 48 * 2**30
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "set_default_device", lambda device: None)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": size})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limits.update(wired=limit))
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: limits.update(cache=limit))
    for wanted in ("auto", "gpu"):
        limits.clear()
        assert mlx_device.pick_device(wanted) == "gpu"
        assert limits == ({"wired": size * 3 // 4, "cache": size // 10} if metal else {})

    def refuse(limit: int) -> None:
        raise ValueError("needs macOS 15")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    assert mlx_device.pick_device("gpu") == "gpu"
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    limits.clear()
    assert mlx_device.pick_device("cpu") == "cpu"
    assert limits == {}, "on the CPU nothing is limited"


def test_what_was_not_checked_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    backend = MlxBackend(settings(folder))
    monkeypatch.setattr(mlx_checks, "advice", lambda: ("slow",))
    found = {name: (held, seen) for name, held, seen in backend.machine_checks()}
    assert found["the CPU's matrix library"] == (None, "slow")
    assert [held for held, seen in found.values() if "not tried" in seen] == [None, None]
    monkeypatch.setattr(mlx_checks, "advice", tuple)
    _, held, said = next(backend.machine_checks())
    assert held is True
    assert "GFLOP/s" in said


def test_two_devices_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU with itself, and with one whose log-probs are off."""
    backend = MlxBackend(settings(folder))
    before = mx.default_device()
    assert [held for _, held, _ in mlx_checks.agreement(backend, mx.cpu, mx.cpu)] == [True] * 3
    assert mlx_checks.longest(backend.net)[1] is True
    real, calls = mlx_checks._on, []

    def other(device: Any, backend: Any) -> Any:
        calls.append(device)
        if len(calls) == 2:
            head = backend.net.head
            monkeypatch.setattr(backend.net, "head", lambda hidden: head(hidden) * 1.5)
        return real(device, backend)

    monkeypatch.setattr(mlx_checks, "_on", other)
    assert [held for _, held, _ in mlx_checks.agreement(backend, mx.cpu, mx.cpu)] == [False] * 3
    assert mx.default_device() == before
