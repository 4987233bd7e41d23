"""How answers are decoded together: refilled slots, and the ways of PyTorch, which must all write the same."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from spa_lite import keys
from spa_lite.backend import POLICY, Batching, ModelSettings, Sampling
from spa_lite.backends import torch_cache, torch_decode, torch_sampling
from spa_lite.backends.decoding import Answer, Decoding, Uniforms, Written
from spa_lite.backends.torch import TorchBackend
from spa_lite.backends.torch_decode import Graphs
from spa_lite.records import Completion, Ids
from tests.contract import LORA, draw, names, pairs, prompts, texts
from tests.tiny import make_model

STOP = frozenset({0, 1})
SAMPLING = Sampling(1.0, 1.0, 30)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """For matrices this small a second thread only waits."""
    torch.set_num_threads(1)


# The loop, in a framework whose model is a table


class Dice(Decoding):
    """Draws token int(60 u); the log-prob is -u and the state (prompt length, step). Remembers what it was asked."""

    def __init__(self, *given: Any, cheap: bool, **more: Any) -> None:
        super().__init__(*given, **more)
        self.cheap_to_select = cheap
        self.log: list[tuple[str, int]] = []
        self.mine: list[tuple[int, int]] = []  # (prompt length, steps) of each row

    def admit(self, prompts: Sequence[int]) -> None:
        self.log.append(("admit", len(prompts)))
        self.mine += [(len(self.prompts[index]), 0) for index in prompts for _ in range(self.n)]

    def advance(self, uniforms: Uniforms, final: bool) -> Written:
        rows, steps = uniforms.shape
        self.log.append(("advance", rows))
        states = np.array([[(size, start + step) for step in range(steps)] for size, start in self.mine])
        self.mine = [(size, start + steps) for size, start in self.mine]
        return Written((uniforms * 60).astype(np.int64), -uniforms, states if self.keep else None)

    def select(self, live: Sequence[int]) -> None:
        self.mine = [self.mine[index] for index in live]


def dice(slots: int | None, cheap: bool = True, limit: int = 40, keep: bool = False) -> Dice:
    """Nine prompts of 3 to 11 tokens, two answers each, in a context of 50."""
    asked = [(7,) * (3 + (5 * index) % 9) for index in range(9)]
    return Dice(asked, names(9, 2), Sampling(1.0, 1.0, limit), STOP, 50, slots, keep, cheap=cheap)


def written(decoding: Decoding) -> dict[int, Answer]:
    """All answers by their place."""
    found = dict(decoding.answers(lambda: None))
    assert len(found) == decoding.n * len(decoding.prompts)
    return found


def test_an_answer_is_its_streams_up_to_a_stop_or_the_limit() -> None:
    decoding = dice(None)
    found = written(decoding)
    for place, answer in found.items():
        stream = keys.uniforms(names(9, 2)[place // 2][place % 2], 0)[: decoding.limits[place // 2]]
        tokens = [int(60 * u) for u in stream]
        end = next((index + 1 for index, token in enumerate(tokens) if token in STOP), None)
        assert answer == (tuple(tokens[:end]), tuple((-stream[:end]).tolist()), end is not None, None)
    assert {answer.ended for answer in found.values()} == {True, False}


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 6, 7, 18, 100])
def test_refilling_changes_no_answer(slots: int, cheap: bool) -> None:
    decoding = dice(slots, cheap)
    assert written(decoding) == written(dice(None, False))
    assert max(rows for what, rows in decoding.log if what == "advance") <= max(2, slots)
    assert sum(count for what, count in decoding.log if what == "admit") == 9


def test_states_follow_their_answer_through_refills() -> None:
    decoding = dice(6, keep=True)
    for place, answer in written(decoding).items():
        size = len(decoding.prompts[place // 2])
        assert answer.states is not None
        assert answer.states.tolist() == [[size, step] for step in range(len(answer.ids))]


def test_a_tight_context_ends_an_answer() -> None:
    found = written(dice(4, limit=48))
    lengths = {place: 3 + (5 * (place // 2)) % 9 for place in found}
    capped = {place: len(answer.ids) for place, answer in found.items() if not answer.ended}
    assert capped
    assert all(size == min(48, 50 - lengths[place]) for place, size in capped.items())


# PyTorch


def new(folder: Path, sample: int = 64, **more: Any) -> TorchBackend:
    """A backend whose policy has an adapter that does something."""
    given: dict[str, Any] = {"device": "cpu", "batching": Batching(sample=sample)} | more
    backend = TorchBackend(ModelSettings(str(folder), **given))
    backend.bind(POLICY, None, LORA)
    push(backend)
    return backend


def push(backend: TorchBackend) -> None:
    """Move the policy's adapter, in place."""
    name = backend._adapter(POLICY)
    assert name is not None
    with torch.no_grad():
        for index, tensor in enumerate(backend.adapters.tensors(name).values()):
            tensor += 0.05 * torch.sin(torch.arange(tensor.numel(), device=tensor.device) + index).view(tensor.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


def many(backend: TorchBackend) -> list[Ids]:
    """Twelve prompts of unlike length."""
    some = prompts(backend)
    return [ids + tuple(range(10, 10 + index)) for index in range(3) for ids in some]


class Answers(list[Completion]):
    """Equal if the ids are, and the log-probs but for rounding."""

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Answers)
        assert len(self) == len(other)
        return all(
            one.ids == two.ids and one.ended == two.ended and one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
            for one, two in zip(self, other, strict=True)
        )


def answered(backend: TorchBackend, sampling: Sampling = SAMPLING) -> Answers:
    """Two answers for each of many prompts."""
    asked = many(backend)
    found = dict(backend.sample(asked, 2, sampling, names(len(asked), 2)))
    return Answers(answer for index in range(len(asked)) for answer in found[index])


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        *((architecture, "slots") for architecture in ("llama", "qwen2", "gpt_neox", "gpt2", "phi3")),
        *((architecture, "padded") for architecture in ("gemma2", "mistral", "gpt_neo")),
    ],
)
def test_all_ways_write_the_same(architecture: str, way: str, tmp_path: Path) -> None:
    backend = new(make_model(tmp_path, architecture))
    expected = answered(backend)
    assert backend.description["key_value_cache"] == way
    for other in ("padded", "none"):
        backend._way = other
        assert answered(backend) == expected
        assert backend.description["key_value_cache"] == other


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(0.7, 0.9, 30), Sampling(0.0, 1.0, 30)])
def test_refilled_slots_write_the_same_as_one_prompt_at_a_time(folder: Path, sampling: Sampling) -> None:
    backend = new(folder)
    expected = answered(backend, sampling)
    for sample in (1, 3, 5):
        backend.batching = Batching(sample=sample)
        assert answered(backend, sampling) == expected


def test_the_text_of_a_slot_does_not_depend_on_who_had_it_before(folder: Path) -> None:
    """Prompts near the end of the context, then short ones, in the same slots."""
    backend = new(folder, sample=1)
    long = [tuple(range(3, 250)), (5, 9)]
    key = names(2, 2)
    both = texts(draw(backend, long, key, SAMPLING))
    assert both == [
        *texts(draw(backend, long[:1], key[:1], SAMPLING)),
        *texts(draw(backend, long[1:], key[1:], SAMPLING)),
    ]


@pytest.mark.parametrize("way", ["slots", "padded"])
@pytest.mark.parametrize("sample", [2, 64])
def test_kept_states_give_the_log_probs_through_the_head(folder: Path, way: Any, sample: int) -> None:
    backend = new(folder, sample)
    backend._way = way
    asked, kept = many(backend), {}

    def keep(prompt: int, number: int, states: Any) -> None:
        kept[prompt, number] = states

    for index, answers in backend.sample(asked, 2, SAMPLING, names(len(asked), 2), keep=keep):
        for number, answer in enumerate(answers):
            states = torch.from_numpy(kept.pop((index, number)))
            assert states.shape == (len(answer.ids), 64)
            found = backend.net.head(states).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            assert found.tolist() == pytest.approx(answer.logprobs, abs=1e-4)
    assert not kept


def test_kept_states_in_bfloat16_come_as_their_bits() -> None:
    states = torch.tensor([[1.0, -2.5]], dtype=torch.bfloat16)
    host = torch_sampling.to_host(states)
    assert host.dtype == np.uint16
    assert torch.equal(torch.from_numpy(host).view(torch.bfloat16), states)


def test_on_a_cpu_only_few_slots_are_refilled(folder: Path) -> None:
    backend = new(folder)
    asked = [(5,) * (1 + index % 7) for index in range(40)]
    sizes = {}
    for sample in (15, 16):
        backend.batching = Batching(sample=sample)
        sizes[sample] = [len(group) for group in backend._groups(asked, SAMPLING)]
    assert sizes == {15: [40], 16: [16, 16, 8]}


def test_two_samplers_may_take_turns(folder: Path) -> None:
    backend = new(folder, sample=2)
    asked, key = many(backend), names(12, 2)
    first, second = (backend.sample(asked, 2, SAMPLING, key) for _ in range(2))
    found = [(one, two) for one, two in zip(first, second, strict=True)]
    assert len(found) == 12
    assert all(one == two for one, two in found)


@pytest.mark.parametrize("way", ["slots", "padded"])
def test_what_a_sampler_held_is_freed_at_once(way: Any, folder: Path) -> None:
    """Not when Python next looks for cycles, which large tensors do not bring about."""
    backend = new(folder)
    answered(backend, SAMPLING)
    backend._way = way
    gc.disable()
    try:
        with torch.inference_mode():
            before = {id(found) for found in gc.get_objects() if type(found) is torch.Tensor}
            answered(backend, SAMPLING)
            assert not [f for f in gc.get_objects() if type(f) is torch.Tensor and id(f) not in before]
    finally:
        gc.enable()


class Forgetful(torch_cache.SlotLayer):
    """Halves what it was given."""

    def update(self, *given: Any, **more: Any) -> Any:
        seen, values = super().update(*given, **more)
        return seen * 0.5, values


class Dull(torch_cache.RoomyLayer):
    """The same for the other cache."""

    def update(self, *given: Any, **more: Any) -> Any:
        seen, values = super().update(*given, **more)
        return seen * 0.5, values


def test_a_model_that_cannot_use_a_cache_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = new(folder).net
    assert torch_decode.best_way(net) == "slots"
    monkeypatch.setattr(torch_cache, "SlotLayer", Forgetful)
    assert torch_decode.best_way(net) == "padded"
    monkeypatch.setattr(torch_cache, "RoomyLayer", Dull)
    assert torch_decode.best_way(net) == "none"


# What a call costs, in counts


def counted(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, asked: Sequence[Ids]) -> dict[str, int]:
    """Forward passes and their rows, tokens of prompts and of answers."""
    found = {"reads": 0, "read": 0, "steps": 0, "rows": 0}
    hidden = backend.net.hidden

    def counting(ids: Any, *given: Any) -> Any:
        reading = ids.shape[1] > 1
        found["reads" if reading else "steps"] += 1
        found["read" if reading else "rows"] += ids.numel()
        return hidden(ids, *given)

    monkeypatch.setattr(backend.net, "hidden", counting)
    answers = [answer for _, some in backend.sample(asked, 2, SAMPLING, names(len(asked), 2)) for answer in some]
    return found | {"prompt": sum(map(len, asked)), "useful": sum(len(answer.ids) for answer in answers)}


def test_what_a_call_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 prompts of 8 tokens, 8 slots: prompts once, few rows beyond the useful ones, few passes beyond the least."""
    backend = new(folder, sample=4)
    backend._way = "slots"
    asked = [tuple(range(20 + index, 28 + index)) for index in range(16)]
    assert counted(backend, monkeypatch, asked) == {
        "reads": 13,
        "read": 128,
        "steps": 83,
        "rows": 481,
        "prompt": 128,
        "useful": 468,
    }


def test_an_answer_of_one_token_costs_no_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = new(folder)
    backend._way = "slots"
    monkeypatch.setattr("tests.test_sampling.SAMPLING", Sampling(1.0, 1.0, 1))
    assert counted(backend, monkeypatch, [(5, 6, 7), (8, 9)])["steps"] == 0


# Graphs, with a stand-in for what captures them


class Recorder:
    """Captures a step like CUDA: it does not run, and is run as often as it is replayed."""

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.captured, self.replayed = broken, 0, 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode():
                step()

        return replay


@pytest.fixture
def graphed(folder: Path) -> tuple[TorchBackend, Recorder]:
    """A backend that replays."""
    backend, recorder = new(folder, sample=3), Recorder()
    backend._graphs = Graphs(recorder)
    return backend, recorder


def test_replayed_steps_write_the_same(graphed: tuple[TorchBackend, Recorder], folder: Path) -> None:
    backend, recorder = graphed
    assert answered(backend) == answered(new(folder))
    assert 0 < recorder.captured < recorder.replayed
    assert backend.description["decoding"] == "CUDA graph"
    assert answered(backend) == answered(new(folder))
    captured = recorder.captured
    assert answered(backend) == answered(new(folder))
    assert recorder.captured == captured  # the same slots, the same graphs


def test_a_graph_reads_an_adapter_where_it_lay(graphed: tuple[TorchBackend, Recorder], folder: Path) -> None:
    backend, recorder = graphed
    before, plain = answered(backend), new(folder)
    assert answered(backend) == before  # a shape is captured when it is seen again
    captured = recorder.captured
    push(backend)  # in place, as an optimizer does: the graphs see it
    push(plain)
    assert answered(backend) == answered(plain) != before
    assert recorder.captured == captured
    backend.bind(POLICY, None, LORA)  # elsewhere: they would not
    plain.bind(POLICY, None, LORA)
    assert answered(backend) == answered(plain) != before
    assert recorder.captured > captured


def test_slots_are_gone_while_rows_are_scored(graphed: tuple[TorchBackend, Recorder]) -> None:
    backend, _ = graphed
    answered(backend)
    held = [weakref.ref(backend._slots)]
    list(backend.logprob(pairs(backend), POLICY))
    assert [one() for one in held] == [None]


def test_a_graph_that_cannot_be_captured_is_done_without_and_said(folder: Path) -> None:
    backend, recorder = new(folder, sample=3), Recorder(broken=True)
    backend._graphs = Graphs(recorder)
    assert answered(backend) == answered(new(folder))
    assert recorder.captured == 1
    assert "operation not permitted" in backend.description["decoding"]


@pytest.mark.gpu
def test_gpu_captured_steps_write_what_plain_ones_write(folder: Path) -> None:
    backend = new(folder, sample=3, device="cuda", dtype="float32")
    expected = answered(backend)
    assert backend.description["decoding"] == "CUDA graph"
    assert backend._graphs is not None
    assert not backend._graphs.failed
    assert any(backend._graphs._known.values())
    push(backend)
    moved = answered(backend)
    backend._forget_slots()
    backend._graphs = None
    assert answered(backend) == moved != expected
