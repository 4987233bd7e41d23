"""Memory that runs out becomes one sentence, and leaves a backend as it was; batch sizes may change between calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite import backends
from spa_lite.backend import INIT, POLICY, Backend, ModelSettings, Sampling
from spa_lite.backends import memory
from spa_lite.errors import OutOfMemory
from spa_lite.estimate import Case, Place, longest_of_rows, tokens_of
from spa_lite.objective import Dpo
from spa_lite.recipe import build
from spa_lite.records import Row
from tests.contract import LORA, OPTIMIZER, draw, names, pairs, prompts, sums
from tests.tiny import make_model

FRAMEWORKS = [name for name in ("torch", "mlx") if not backends.missing(name)]
SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
    "MPS backend out of memory (MPS allocated: 8.1 GB, other allocations: 384.00 KB, max allowed: 9.07 GB).",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[malloc] Unable to allocate 1099511627776 bytes.",
    "[metal::malloc] Attempting to allocate 9663676416 bytes which is greater than the maximum allowed buffer size",
    "[METAL] Command buffer execution failed: Insufficient Memory (8:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
)


@pytest.mark.parametrize("said", SAID)
def test_what_frameworks_say_is_understood(said: str) -> None:
    assert memory.ran_out(RuntimeError(said))
    assert not memory.ran_out(ValueError(said))


def test_other_errors_are_not_about_memory() -> None:
    assert memory.ran_out(MemoryError())
    assert not memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    plain = memory.free()
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert memory.free() == 900_000 < plain
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() > 900_000


def test_the_peak_is_in_bytes() -> None:
    assert 2**24 < memory.peak() < 2**42


@pytest.fixture(scope="module", params=FRAMEWORKS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """A backend with a small model."""
    folder = make_model(tmp_path_factory.mktemp("model"), "smollm2")
    found = backends.load(request.param, ModelSettings(str(folder), device="cpu"))
    found.bind(INIT)
    return found


def ready(backend: Backend) -> Backend:
    """The same with a policy in training, one step away from PREVIOUS; two pairs of four at a time."""
    two = 2 * max(map(tokens_of, pairs(backend)))
    backend.batching = replace(backend.batching, micro_tokens=two, sample=4, score_tokens=two)
    backend.bind(POLICY, None, LORA)
    backend.snapshot()
    backend.start_training(OPTIMIZER)
    backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    return backend


def failing(after: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works some times and then runs out of memory."""
    calls = []

    def call(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError(SAID[1] if len(calls) % 2 else SAID[4])
        return real(*args, **more)

    return call


def state(backend: Any, folder: Path) -> dict[str, bytes]:
    """Adapter and optimizer, as they are saved."""
    backend.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 1], ids=["first micro-batch", "second micro-batch"])
def test_a_step_that_runs_out_leaves_no_trace(
    backend: Any, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(backend)
    before, expected = state(backend, tmp_path / "a"), sums(backend, pairs(backend))
    with monkeypatch.context() as patch:
        patch.setattr(backend._training, "_accumulate", failing(after, backend._training._accumulate))
        with pytest.raises(OutOfMemory, match=r"\d+ tokens were trained on together: lower --micro-tokens"):
            backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    assert state(backend, tmp_path / "b") == before
    np.testing.assert_array_equal(sums(backend, pairs(backend)), expected)
    assert same_step(backend, before, tmp_path)


def test_a_move_that_runs_out_half_way_is_undone(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(backend)
    before = state(backend, tmp_path / "a")
    with monkeypatch.context() as patch:
        if backend.name == "torch":
            import torch

            patch.setattr(torch.Tensor, "addcdiv_", failing(1, torch.Tensor.addcdiv_))
        else:
            patch.setattr(backend._training.adamw, "apply_single", failing(1, backend._training.adamw.apply_single))
        with pytest.raises(OutOfMemory):
            backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    assert state(backend, tmp_path / "b") == before
    assert same_step(backend, before, tmp_path)


def same_step(backend: Any, before: dict[str, bytes], folder: Path) -> bool:
    """Whether the next step, with other micro-batches, is the one a restored backend takes."""
    backend.batching = replace(backend.batching, micro_tokens=1)
    backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    after = state(backend, folder / "after")
    (folder / "again").mkdir()
    for name, content in before.items():
        (folder / "again" / name).write_bytes(content)
    backend.restore(folder / "again")
    backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    return state(backend, folder / "restored") == after


def test_sampling_that_runs_out_can_be_tried_again(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(backend)
    expected = draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 8))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_decoder", failing(0, backend._decoder))
        with pytest.raises(OutOfMemory, match=r"4 prompts were answered together: lower --sample-batch"):
            draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 8))
    with monkeypatch.context() as patch:
        patch.setattr(backend.net, "head", failing(2, backend.net.head))
        with pytest.raises(OutOfMemory):
            draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 8))
    assert draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 8)) == expected


def test_scoring_that_runs_out_can_be_tried_again(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(backend)
    expected = sums(backend, pairs(backend))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_token_logprobs", failing(1, backend._token_logprobs))
        with pytest.raises(OutOfMemory, match=r"2 rows were scored together: lower --score-tokens"):
            sums(backend, pairs(backend))
    np.testing.assert_array_equal(sums(backend, pairs(backend)), expected)


def test_other_errors_come_through(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(backend, "_token_logprobs", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        sums(backend, pairs(backend))


def test_a_real_allocation_that_is_too_large_is_out_of_memory(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name != "torch":
        pytest.skip("MLX on the CPU ends the process")
    import torch

    monkeypatch.setattr(backend, "_token_logprobs", lambda rows: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(OutOfMemory):
        sums(backend, pairs(backend))


def test_what_a_step_keeps_is_measured_without_a_trace(backend: Any, tmp_path: Path) -> None:
    """A row of twice the length keeps more, and nothing is different afterwards."""
    ready(backend)
    before = state(backend, tmp_path / "a")
    short, long = (Row(prompt=(5,) * n, responses=((6,) * n, (7,) * n)) for n in (20, 40))
    one, two = backend.activations(short), backend.activations(long)
    assert one.layers == two.layers == backend.shape.layers
    assert (one.tokens, two.tokens) >= (tokens_of(short), tokens_of(long))
    assert 1.5 * one.layer < two.layer
    assert 0 < one.checkpointed < one.layer
    assert state(backend, tmp_path / "b") == before


def test_the_formula_says_what_is_measured(backend: Any) -> None:
    """Of one layer of a small Llama, within a fifth."""
    if backend.name != "torch":
        pytest.skip("MLX tells peaks, of which a small model's are not made of layers")
    ready(backend)
    row = Row(prompt=(5,) * 60, responses=((6,) * 31, (7,) * 31))
    recipe = build({"test": {"lora.rank": LORA.rank}})[0]
    case = Case(backend.shape, recipe, Place.of(backend), longest_of_rows([row]))
    kept, said = backend.activations(row), case.activations
    assert said.tokens == kept.tokens == 120
    assert said.layer == pytest.approx(kept.layer, rel=0.2)
    assert said.checkpointed == kept.checkpointed
