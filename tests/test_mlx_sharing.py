"""MLX: a prompt computed once, slopes from the head's tiles, what is known used as it is; each equals the plain way."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pytest.importorskip("torch", reason="the tiny models are made with PyTorch, which is not installed")

from mlx_lm.models.cache import RotatingKVCache

from spa_lite.backend import POLICY, PREVIOUS, Batching, Floats, Known, Lora, ModelSettings, Optimizer, Sampling
from spa_lite.backends import mlx_head, mlx_lines
from spa_lite.backends.mlx import MlxBackend
from spa_lite.backends.mlx_lines import Placed, View, longest_line
from spa_lite.backends.packing import pack, together
from spa_lite.objective import Dpo, extrapolate
from spa_lite.records import Row
from tests.contract import LORA, OPTIMIZER, Mixed, draw, names, prompts, score, sums, texts
from tests.tiny import NARROW, make_model

SHAPES = ("llama3", "qwen2", "mistral-full", "gemma2-full", "phi3", "smollm2", "qwen3", "yarn", "granite")


def moved(folder: Path, lora: Lora = LORA, **batching: Any) -> MlxBackend:
    """A backend whose policy and PREVIOUS both differ from the base, and from each other."""
    backend = MlxBackend(ModelSettings(model=str(folder), device="cpu", batching=Batching(**batching)))
    backend.bind(POLICY, None, lora)
    backend.start_training(OPTIMIZER)
    for _ in range(2):
        backend.dpo_step(rows_of(4), Dpo(0.5), 1e-2)
        backend.snapshot()
        backend.dpo_step(rows_of(2), Dpo(0.5), 1e-2)
    return backend


def rows_of(count: int, prompt: int = 14, answer: int = 7, sides: int = 2) -> list[Row]:
    """Rows of mixed lengths, the same ones every time."""
    rng = np.random.default_rng(count)

    def some(most: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(6, 300, rng.integers(1, most + 1)))

    return [Row(prompt=some(prompt), responses=tuple(some(answer) for _ in range(sides))) for _ in range(count)]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> MlxBackend:
    """A tiny Llama."""
    return moved(make_model(tmp_path_factory.mktemp("llama"), "llama", uneven=True, **NARROW))


def gradient_of(backend: MlxBackend, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The gradient that a step would move with; nothing moves."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(backend._training, "_move", lambda total, *_: found.update(total))
    act()
    monkeypatch.undo()
    return {key: np.array(array) for key, array in found.items()}


def laid(backend: MlxBackend, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of up to so many tokens, whatever is less work."""
    monkeypatch.setattr(backend.net, "lines_for", lambda rows: shared)


def passes_of(backend: MlxBackend, patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that will hold the shapes of the ids of every forward pass (of a compiled one when it is traced)."""
    sizes: list[tuple[int, ...]] = []
    real = backend.net.hidden

    def hidden(ids: Any, cache: Any = None) -> Any:
        sizes.append(ids.shape)
        return real(ids, cache)

    patch.setattr(backend.net, "hidden", hidden)
    return sizes


# A prompt once


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_once_is_a_prompt_twice(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and gradients, with one, two and three answers to a prompt, padded beside each other."""
    backend = moved(make_model(tmp_path, shape, uneven=True, **NARROW))
    assert backend.description["prompt"] == "once per row"
    rows = [*rows_of(3), *rows_of(2, sides=3), *rows_of(1, sides=1)]
    seen = []
    for shared in (0, backend.net.shared):
        laid(backend, shared, monkeypatch)
        logps = [one.per_token for some in score(backend, rows, per_token=True) for one in some]
        monkeypatch.undo()
        objective = Mixed(0.5)

        def step(shared: int = shared, objective: Mixed = objective) -> None:
            laid(backend, shared, monkeypatch)
            backend.dpo_step(rows_of(5), objective, 1e-2)

        gradient = gradient_of(backend, step, monkeypatch)
        seen.append((logps, gradient, np.sort(np.concatenate([batch.extrapolated for batch in objective.seen]))))
    (logps, gradient, mixed), (others, other, again) = seen
    for one, two in zip(logps, others, strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    assert again == pytest.approx(mixed, abs=3e-5)
    assert gradient.keys() == other.keys()
    for key in gradient:
        np.testing.assert_allclose(other[key], gradient[key], rtol=0, atol=1e-5, err_msg=key)
    assert max(np.abs(array).max() for array in gradient.values()) > 1e-2


def test_a_shared_line_computes_its_prompt_once(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(prompt=tuple(range(6, 46)), responses=((7, 8, 9), (10, 11, 12, 13), (14, 15)))
    sizes = passes_of(backend, monkeypatch)
    sums(backend, [row])
    assert sizes == [(1, together(row))] == [(1, 40 + 2 + 3 + 1)]
    monkeypatch.setattr(backend.net, "lines_for", lambda rows: 0)
    sums(backend, [row])
    assert sizes[1:] == [(3, 43)]


def test_what_is_less_work_is_taken(backend: MlxBackend) -> None:
    """Attention grows with the square of a line: a short prompt is not worth a long one."""
    long, short = tuple(range(6, 106)), (7, 8)
    assert backend.net.lines_for([Row(prompt=long, responses=(short, short))]) == backend.net.shared == 512
    assert backend.net.lines_for([Row(prompt=short, responses=(long, long))]) == 0


def test_a_model_that_cannot_branch_is_noticed(
    backend: MlxBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It falls back, says so, and is left as it was."""
    rows = rows_of(4)
    expected = sums(backend, rows, PREVIOUS)

    def plain(self: Any, *_: Any, **__: Any) -> str:
        return "causal"

    def fixed(self: Any, x: Any, offset: Any = 0) -> Any:
        return self.rope(x)

    for kind, name, wrong in ((View, "make_mask", plain), (Placed, "__call__", fixed)):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, wrong)
            other = MlxBackend(backend.settings)
        assert other.net.shared == 0
        assert other.description["prompt"].startswith("once per response (mlx-lm's version")
        assert not any(isinstance(module, Placed) for _, module in other.net.model.named_modules())
        backend.save(tmp_path / name, PREVIOUS)
        other.bind(PREVIOUS, tmp_path / name)
        assert sums(other, rows, PREVIOUS) == pytest.approx(expected, abs=1e-4)


def test_a_line_is_no_longer_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_lines, "make_prompt_cache", lambda _: [RotatingKVCache(max_size=48)])
    assert longest_line(None, 256) == 48
    monkeypatch.setattr(mlx_lines, "make_prompt_cache", lambda _: [])
    assert longest_line(None, 256) == 512


# The head


def test_slopes_are_the_derivative(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one tile or several, by the definition of the softmax: W[target] minus the mean row of W."""
    rng = np.random.default_rng(0)
    states = mx.array(rng.normal(size=(40, 32)).astype(np.float32))
    targets = mx.array(rng.integers(0, 384, 40))
    logits = backend.net.head(states)
    weights = np.array(backend.net.model.lm_head.weight)
    expected = weights[np.array(targets)] - np.array(mx.softmax(logits, axis=-1)) @ weights
    for numbers in (2**20, 1):
        monkeypatch.setitem(mlx_head.TILE_NUMBERS, "cpu", numbers)
        logp, slopes = mlx_head.read(backend.net, backend.net.head, states, targets, None, None)
        np.testing.assert_allclose(np.array(slopes), expected, atol=1e-5)
        np.testing.assert_allclose(np.array(logp), np.array(mlx_head.token_logprobs(logits, targets)), atol=1e-6)


@pytest.mark.parametrize("strength", [0.125, 0.5, 3.0])
def test_states_may_be_mixed_in_place_of_logits(backend: MlxBackend, strength: float) -> None:
    rng = np.random.default_rng(0)
    own, theirs = (mx.array(rng.normal(size=(20, 32)).astype(np.float32)) for _ in range(2))
    targets, head = mx.array(rng.integers(0, 384, 20)), backend.net.head
    expected = mlx_head.token_logprobs(extrapolate(head(own), head(theirs), strength), targets)
    for mixable in (True, False):
        reference = mlx_head.Reference(head, False, strength, mixable)
        mixed = mlx_head.read(backend.net, head, own, targets, theirs, reference)[2]
        np.testing.assert_allclose(np.array(mixed), np.array(expected), atol=2e-5)


@pytest.mark.parametrize(
    ("logp", "strength", "heads"), [(False, 0.0, 1), (True, 0.0, 2), (False, 0.5, 2), (True, 0.5, 2)]
)
def test_no_logits_are_made_twice(backend: MlxBackend, logp: bool, strength: float, heads: int) -> None:
    """One product with the head per tile and model: the mix needs none of its own beside the reference's."""
    calls: list[int] = []

    def head(some: Any) -> Any:
        calls.append(len(some))
        return backend.net.head(some)

    own, targets = mx.zeros((20, 32)), mx.zeros(20, dtype=mx.int32)
    reference = mlx_head.Reference(head, logp, strength, True) if logp or strength else None
    found = mlx_head.read(backend.net, head, own, targets, own, reference)
    assert calls == [20] * heads
    assert len(found) == 2 + logp + (strength > 0)


# What is known


def states_of(backend: MlxBackend, rows: Sequence[Row], role: str) -> Known:
    """Sums and states of rows, as the sampler would have kept them."""
    expected = sums(backend, rows, role)
    backend._enter(role)
    packed = pack(rows)
    lines = [mx.array(array) for array in (packed.ids, packed.positions, packed.segments, packed.places)]
    states = np.array(backend.net.states(lines, False))
    return Known(expected, tuple(np.split(states, packed.lengths.cumsum()[:-1])))


@pytest.mark.parametrize(
    ("given", "extrapolation", "passes"),
    [("none", 0.0, 2), ("sums", 0.0, 1), ("none", 0.5, 2), ("sums", 0.5, 2), ("states", 0.5, 1)],
)
def test_what_is_known_saves_a_pass_and_changes_nothing(
    given: str, extrapolation: float, passes: int, backend: MlxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(6)
    whole = states_of(backend, rows, PREVIOUS)
    known = {"none": None, "sums": Known(whole.sums), "states": whole}[given]
    losses, gradients, mixed, ran = [], [], [], []
    for some in (None, known):
        backend.start_training(Optimizer())  # with no compiled program
        objective = Mixed(extrapolation)

        def step(some: Known | None = some, objective: Mixed = objective) -> None:
            sizes = passes_of(backend, monkeypatch)
            stats = backend.dpo_step(rows, objective, 1e-2, some)
            assert stats.reference == pytest.approx(whole.sums, abs=1e-4)
            losses.append(stats.loss)
            ran.append(len(sizes))

        gradients.append(gradient_of(backend, step, monkeypatch))
        mixed.append(np.concatenate([batch.extrapolated for batch in objective.seen]))
    assert ran[1] == passes
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert mixed[1] == pytest.approx(mixed[0], abs=1e-4)
    for key, array in gradients[0].items():
        np.testing.assert_allclose(gradients[1][key], array, rtol=0, atol=1e-5)


def test_known_sums_are_the_reference_even_when_extrapolating(backend: MlxBackend) -> None:
    rows = rows_of(3)
    wrong: Floats = sums(backend, rows, PREVIOUS) + np.arange(6)
    objective = Mixed(0.5)
    backend.dpo_step(rows, objective, 0.0, Known(wrong))
    assert sorted(np.concatenate([batch.reference for batch in objective.seen])) == sorted(wrong)


# Sampling


def test_slots_are_refilled(backend: MlxBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two prompts, the others come in as answers end: the same texts, in fewer steps than in turns."""
    asked, key, sampling = prompts(backend) * 2, names(8, 2), Sampling(1.0, 1.0, 40)
    whole = draw(backend, asked, key, sampling)
    sizes, before = passes_of(backend, monkeypatch), backend.batching

    def steps() -> list[int]:
        return [rows for rows, time in sizes if time == 1]

    backend.batching = Batching(sample=2)
    assert texts(draw(backend, asked, key, sampling)) == texts(whole)
    refilled = steps()
    sizes.clear()
    for start in range(0, 8, 2):
        draw(backend, asked[start : start + 2], key[start : start + 2], sampling)
    backend.batching = before
    assert max(refilled) == 4
    assert len(refilled) < len(steps())


def test_states_are_kept_as_the_head_read_them(backend: MlxBackend) -> None:
    kept: dict[tuple[int, int], Any] = {}

    def keep(prompt: int, answer: int, states: Any) -> None:
        kept[prompt, answer] = states

    found = dict(backend.sample(prompts(backend), 2, Sampling(1.0, 1.0, 20), names(4, 2), POLICY, keep))
    backend._enter(POLICY)
    assert kept.keys() == {(index, k) for index in range(4) for k in range(2)}
    for (index, k), states in kept.items():
        completion = found[index][k]
        assert states.shape == (len(completion.ids), 32)
        again = mlx_head.token_logprobs(backend.net.head(mx.array(states)), mx.array(completion.ids))
        assert np.array(again) == pytest.approx(completion.logprobs, abs=1e-5)


# Memory


def test_what_a_step_keeps_is_measured(tmp_path: Path) -> None:
    """And foretells the peak of a step with some of the layers checkpointed."""
    backend = moved(make_model(tmp_path, "llama", num_hidden_layers=8, vocab_size=512, **NARROW))
    before = {key: np.array(array) for key, array in backend.adapters.held[backend._roles[POLICY] or ""].tree.items()}
    row = Row(prompt=tuple(range(6, 106)), responses=(tuple(range(6, 66)), tuple(range(100, 170))))
    kept = backend.activations(row)
    assert kept is not None
    assert (kept.layers, kept.work) == (8, 0)
    assert kept.checkpointed == kept.tokens * 32 * 4 < kept.layer / 5
    after = backend.adapters.held[backend._roles[POLICY] or ""].tree
    assert all((np.array(after[key]) == array).all() for key, array in before.items()), "nothing moved"
    for layers in (0, 4, 8):
        backend.batching = Batching(checkpointed=layers)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        backend.dpo_step([row], Mixed(0.5), 0.0)
        told = layers * kept.checkpointed + max(8 - layers, min(layers, 1)) * kept.layer + kept.rest
        assert told == pytest.approx(mx.get_peak_memory() - held, rel=0.2)
