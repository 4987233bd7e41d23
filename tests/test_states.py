"""The sampler's hidden states on the disk: a run that uses them is the run that computes them again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from spa_lite import states
from spa_lite.backend import PREVIOUS, Known
from spa_lite.errors import RecipeError, RunError
from spa_lite.events import Event
from spa_lite.records import Completion, Ids, Sample
from spa_lite.shape import Shape
from spa_lite.stages.workbench import read_judgements, read_samples
from tests.small import load, results, run_small, small_recipe, write_data

CACHED: dict[str, Any] = {"train.cache_reference": True}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Pairs and prompts of the small world."""
    return write_data(tmp_path)


class Passes:
    """A backend that writes down what each step was told of its reference."""

    def __init__(self, inner: Any, told: list[Known | None]) -> None:
        self.__dict__.update(_inner=inner, told=told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def dpo_step(self, rows: Any, objective: Any, rate: float, known: Known | None = None) -> Any:
        """A step."""
        self.told.append(known)
        return self._inner.dpo_step(rows, objective, rate, known)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling.n": 4, "train.epochs": 2},
        {"sampling.max_tokens": 2},  # many pairs of identical answers, which are dropped
        {"refine.rule": "official", "refine.before_full": "zero", "judge.identical": "keep"},
        {"judge.by": "longest", "judge.rescore": "always"},
    ],
    ids=str,
)
def test_a_cached_reference_changes_no_result(tmp_path: Path, files: dict[str, str], changes: dict[str, Any]) -> None:
    """Each step of a round is told sums and states, and comes out as the step that makes a reference pass."""
    told: list[Known | None] = []
    recipe = small_recipe(files, changes | CACHED)
    run_small(tmp_path / "cached", recipe, lambda backend: Passes(backend, told))
    run_small(tmp_path / "plain", small_recipe(files, changes))
    assert results(tmp_path / "cached") == results(tmp_path / "plain")
    assert not (tmp_path / "plain/rounds/1/states.bin").exists()
    rounds = [known for known in told if known]
    assert rounds
    assert all(known.states is not None for known in rounds)
    assert None in told, "the seed stage knows nothing"
    _, again = run_small(tmp_path / "cached", recipe)
    assert not again.computed


def test_the_file_holds_what_previous_computes(tmp_path: Path, files: dict[str, str]) -> None:
    """In the order of the samples; the toy's states are its logits."""
    recipe = small_recipe(files, CACHED | {"rounds": 1})
    run_small(tmp_path / "run", recipe)
    place = tmp_path / "run/rounds/1"
    reader = states.Reader(place / states.NAME, read_samples(place / "samples.jsonl"))
    backend: Any = load(recipe)
    backend.bind(PREVIOUS, tmp_path / "run/rounds/0/adapter")
    logits = backend.logits(PREVIOUS)
    for index, j in enumerate(read_judgements(place / "judgements.jsonl")):
        for side in (j.a, j.b):
            found = reader.of(index, side.ids)
            assert (found == logits[[j.prompt_ids[-1], *side.ids[:-1]]]).all()


def test_a_damaged_file_is_sampled_anew(tmp_path: Path, files: dict[str, str]) -> None:
    """As any output of a stage that is finished."""
    recipe = small_recipe(files, CACHED | {"rounds": 1})
    run_small(tmp_path / "run", recipe)
    expected, path = results(tmp_path / "run"), tmp_path / "run/rounds/1/states.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\0" * 8)
    notes: list[Event] = []
    _, run = run_small(tmp_path / "run", recipe, report=notes.append)
    assert "rounds/1 sample" in run.computed
    assert any("states.bin is damaged" in event.note for event in notes)
    assert path.read_bytes() == content
    assert results(tmp_path / "run") == expected


def test_nothing_is_kept_that_nobody_reads(tmp_path: Path, files: dict[str, str]) -> None:
    """Without extrapolation the sums are enough."""
    for changes in ({"refine.alpha": 0.0}, {"refine.lambda": 0.0}):
        folder = tmp_path / str(changes)
        run_small(folder, small_recipe(files, CACHED | changes | {"rounds": 1}))
        assert not (folder / "rounds/1/states.bin").exists()


def test_states_of_a_sampler_that_drifts_are_not_used(tmp_path: Path, files: dict[str, str]) -> None:
    """What the check says of its log-probs holds for them, too."""

    class Off(Passes):
        def sample(self, *args: Any) -> Any:
            for index, some in self._inner.sample(*args):
                changed = (msgspec.structs.replace(c, logprobs=tuple(x + 0.1 for x in c.logprobs)) for c in some)
                yield index, tuple(changed)

    told: list[Known | None] = []
    notes: list[Event] = []
    recipe = small_recipe(files, CACHED | {"rounds": 1})
    run_small(tmp_path / "run", recipe, lambda backend: Off(backend, told), notes.append)
    rounds = [known for known in told if known]
    assert rounds
    assert all(known.states is None for known in rounds)
    assert any("states are not used" in event.note for event in notes)


def test_tokens_that_are_not_sampled_have_no_states(files: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"--cache-reference"):
        small_recipe(files, CACHED | {"sampling.append_eos": True})


# --- size -------------------------------------------------------------------------------------------------------------

SHAPE = Shape("llama", 2, 2048, 8192, 32, 8, 64, 1000, True, True, 4096)


def test_the_size_is_told_and_must_fit(tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """4 KiB per token of a model as wide as Llama's of 1B, in 16 bits."""
    recipe = small_recipe(files, CACHED | {"sampling.max_tokens": 250})
    assert states.cache_bytes(recipe, SHAPE, "bfloat16", 10_000) == 64 + 10_000 * 2 * 250 * 4096
    assert states.cache_bytes(recipe, SHAPE, "float32", 1) == 64 + 2 * 250 * 8192
    assert states.cache_bytes(small_recipe(files), SHAPE, "float32", 1) == 0
    assert states.cache_bytes(recipe, None, "float32", 1) == 0

    backend: Any = SimpleNamespace(shape=SHAPE, description={"dtype": "bfloat16"})
    assert "at most 2.0 MB" in states.room(recipe, backend, 1, 1, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(RunError, match=r"may take 20\.5 GB .* has 1\.0 MB free; make room, or leave out"):
        states.room(recipe, backend, 10_000, 1, tmp_path)


# --- the file ---------------------------------------------------------------------------------------------------------


def sample(*answers: Ids) -> Sample:
    """A sample of these answers."""
    made = tuple(Completion(ids=ids, text="", ended="eos") for ids in answers)
    return Sample(id="s", messages=(), prompt_ids=(1,), completions=made)


def kept(ids: Ids, dtype: Any = np.float32) -> Any:
    """States of an answer, three wide."""
    return np.outer(np.array(ids), [1, 2, 3]).astype(dtype)


CHUNKS = [[sample((1, 2), (3,)), sample((), (4, 5, 6))], [sample((7,), (7,))]]


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_states_come_in_any_order_and_lie_in_that_of_the_samples(
    tmp_path: Path, dtype: Any, order: tuple[int, ...]
) -> None:
    """A chunk that is begun again replaces itself; a reader finds an answer by its ids."""
    path, every = tmp_path / states.NAME, [s for chunk in CHUNKS for s in chunk]
    writer = states.Writer(path, [])
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for attempt in (2, 4):
        writer.begin(2)
        for place in order[:attempt]:
            index, number = places[place]
            writer(index, number, kept(CHUNKS[0][index].completions[number].ids, dtype).reshape(-1, 3))
    writer.end()
    writer = states.Writer(path, CHUNKS[0])
    assert writer.whole
    writer.begin(2)
    for number in (1, 0):
        writer(0, number, kept((7,), dtype))
    writer.end()
    reader = states.Reader(path, every)
    for index, one in enumerate(every):
        for completion in one.completions:
            found = reader.of(index, completion.ids)
            assert found.dtype == dtype
            assert np.array_equal(found, kept(completion.ids, dtype).reshape(-1, 3))


def test_what_lies_behind_the_samples_is_cut_off(tmp_path: Path) -> None:
    """A chunk whose lines were not written is written again; a file that is too short is no file."""
    path = tmp_path / states.NAME
    writer = states.Writer(path, [])
    for chunk in CHUNKS:
        writer.begin(2)
        for index, one in enumerate(chunk):
            for number, completion in enumerate(one.completions):
                writer(index, number, kept(completion.ids).reshape(-1, 3))
        writer.end()
    whole = path.read_bytes()
    assert states.Writer(path, CHUNKS[0]).whole
    assert path.read_bytes() == whole[: states.HEADER + 6 * 12]
    with pytest.raises(RunError, match=r"states\.bin does not hold the states of its samples"):
        states.Reader(path, [s for chunk in CHUNKS for s in chunk])
    path.write_bytes(whole[: states.HEADER + 5])
    assert not states.Writer(path, CHUNKS[0]).whole
    path.unlink()
    assert not states.Writer(path, CHUNKS[0]).whole


def test_samples_without_a_token_have_a_file_without_a_state(tmp_path: Path) -> None:
    path = tmp_path / states.NAME
    writer = states.Writer(path, [])
    writer.begin(1)
    writer.end()
    empty = sample(())
    assert states.Writer(path, [empty]).whole
    assert len(states.Reader(path, [empty]).of(0, ())) == 0
