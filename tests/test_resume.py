"""Interrupted = uninterrupted: killed anywhere, stopped by a signal or a full disk, a run ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spa_lite import files, judge
from spa_lite.errors import OutOfMemory, RunError
from spa_lite.events import Event, Report, silent
from spa_lite.interrupt import deferred, raised
from spa_lite.recipe import Recipe
from spa_lite.store import Run
from tests.crash import CHUNK, contents, recipe_of
from tests.small import run_small
from tests.tiny import make_model

STAGES = {"seed", "sample", "judge", "train", "measure"}


def crashes(folder: Path, kind: str, points: str) -> dict[str, Any]:
    """What tests/crash.py found."""
    command = [sys.executable, "-m", "tests.crash", str(folder), kind, points]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def check(found: dict[str, Any], wanted: int) -> None:
    """Every kill was one, every run was finished afterwards, and no file differs."""
    assert len(found["points"]) >= wanted
    wrong = [p for p in found["points"] if p["died"] != -signal.SIGKILL or p["ended"] != 0 or p["wrong"]]
    assert not wrong


def test_killed_anywhere(tmp_path: Path) -> None:
    """SIGKILL at 56 instants, in every kind of stage, before, within and after writes and renames."""
    found = crashes(tmp_path, "toy", "56")
    check(found, 56)
    places = " ".join(p["place"] for p in found["points"])
    assert all(f"{kind}.part" in places for kind in STAGES), places
    assert all(when in places for when in ("in the middle of writing", "before moving", "after moving", "at "))


@pytest.mark.long
def test_killed_everywhere(tmp_path: Path) -> None:
    """The same at every instant there is."""
    found = crashes(tmp_path, "toy", "all")
    check(found, found["instants"])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_killed_with_a_real_model(tmp_path: Path, backend: str) -> None:
    """Adapter tensors included."""
    pytest.importorskip("torch" if backend == "torch" else "mlx.core")
    make_model(tmp_path / "model")
    (tmp_path / "runs").mkdir()
    check(crashes(tmp_path / "runs", f"{backend}:{tmp_path / 'model'}", "6"), 6)


# --- stopped in a process, at places of our choice --------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Journals that take a few rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "CHUNK", CHUNK)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, dict[str, bytes]]:
    """A folder with data, the recipe, and what an undisturbed run gives."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = recipe_of("toy", folder, {})
    run_small(folder / "run", recipe)
    return folder, recipe, contents(folder / "run")


class Disk:
    """Stands in for os.write; full after so many writes."""

    def __init__(self, room: int = 10**9) -> None:
        self.room, self.written, self._write = room, 0, os.write

    def __call__(self, descriptor: int, content: Any) -> int:
        """Write, or fail as a full disk does."""
        self.written += 1
        if self.written > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, content)


def at(stage: str, done: int, act: Callable[[], None]) -> Report:
    """Do something at one event of progress."""

    def report(event: Event) -> None:
        if (event.stage, event.done, event.unit != "stage") == (stage, done, True):
            act()

    return report


def stop() -> None:
    """What Ctrl-C does where nothing is kept first."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["seed", "round 1 train"])
def test_the_first_signal_ends_a_training_after_a_checkpoint(tmp_path: Path, whole: Any, stage: str) -> None:
    """No step is lost, and the signal then takes its course."""
    _, recipe, expected = whole
    notes: list[str] = []

    def report(event: Event) -> None:
        notes.append(event.note)
        at(stage, 1, lambda: os.kill(os.getpid(), signal.SIGINT))(event)

    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "run", recipe, report=report)
    assert any("once more stops at once" in note for note in notes)
    [saved] = (tmp_path / "run/rounds").rglob("checkpoints/[0-9]*")
    assert saved.name == "00000002", "the step that was under way is finished and kept"
    log: list[str] = []
    run_small(tmp_path / "run", recipe, report=lambda event: log.append(event.note))
    assert "going on after step 2" in log
    assert contents(tmp_path / "run") == expected


def test_a_second_signal_stops_at_once(tmp_path: Path, whole: Any) -> None:
    """Even there nothing finished is lost."""
    _, recipe, expected = whole

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "run", recipe, report=at("round 1 train", 3, twice))
    run_small(tmp_path / "run", recipe)
    assert contents(tmp_path / "run") == expected


def test_signals_keep_their_number() -> None:
    """SIGTERM ends with its own exit code; afterwards the handlers are what they were."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), raised() as caught, deferred() as stopped:  # noqa: PT012
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
    assert caught == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_at_any_write(tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names the stage and the cause; with room again the run goes on. At twelve places."""
    _, recipe, expected = whole
    monkeypatch.setattr("os.write", roomy := Disk())
    run_small(tmp_path / "counted", recipe)
    for room in range(0, roomy.written, roomy.written // 11):
        monkeypatch.setattr("os.write", Disk(room))
        with pytest.raises(RunError, match=r"No space left on device"):
            run_small(tmp_path / f"run-{room}", recipe)
        monkeypatch.setattr("os.write", roomy)
        run_small(tmp_path / f"run-{room}", recipe)
        assert contents(tmp_path / f"run-{room}") == expected


@pytest.mark.parametrize(("every", "wanted"), [(0, {2, 5}), (3, {2, 3, 5}), (1, {1, 2, 3, 4, 5})])
def test_how_often_checkpoints_are_written_changes_no_result(
    tmp_path: Path, whole: Any, every: int, wanted: set[int]
) -> None:
    """Every so many steps, and after the last one: of 2 in the seed stage, of 5 in the round."""
    folder, _, expected = whole
    recipe = recipe_of("toy", folder, {"train.save_every": every})
    saved: set[str] = set()
    run_small(tmp_path / "run", recipe, report=lambda event: saved.update(names(tmp_path / "run")))
    assert {int(name) for name in saved} == wanted
    result = contents(tmp_path / "run")
    assert {n: c for n, c in result.items() if n != "recipe.yaml"} == {
        n: c for n, c in expected.items() if n != "recipe.yaml"
    }


def names(run: Path) -> list[str]:
    """Checkpoints there are now."""
    return [p.name for p in run.rglob("checkpoints/[0-9]*")]


def test_checkpoints_by_the_clock_and_only_the_last_two(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is set back does no harm: it is not the one that is asked."""
    folder, _, expected = whole
    recipe = recipe_of("toy", folder, {"train.save_every": 0, "train.save_minutes": 0.001})
    ticks, seen = iter(range(10**6)), list[list[str]]()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr("time.time", lambda: -float(next(ticks)))
    run_small(tmp_path / "run", recipe, report=lambda event: seen.append(names(tmp_path / "run")))
    assert max(len(found) for found in seen) == 2
    assert ["00000002", "00000003"] in [sorted(found) for found in seen]
    assert (
        contents(tmp_path / "run")["adapter/adapter_model.safetensors"] == expected["adapter/adapter_model.safetensors"]
    )


@pytest.mark.parametrize("newest", ["adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_costs_a_few_steps(tmp_path: Path, whole: Any, newest: str) -> None:
    """The one before takes its place, and that is said."""
    _, recipe, expected = whole

    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "run", recipe, report=at("round 1 train", 4, stop))
    kept = sorted((tmp_path / "run/rounds/1/train.part/checkpoints").glob("[0-9]*"))
    assert [p.name for p in kept] == ["00000002", "00000004"]
    damaged = kept[-1] / newest
    damaged.write_bytes(damaged.read_bytes()[:-3])
    notes: list[str] = []
    run_small(tmp_path / "run", recipe, report=lambda event: notes.append(event.note))
    assert "checkpoint 4 is damaged; going on without it" in notes
    assert "going on after step 2" in notes
    assert contents(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("name", "stage", "done"),
    [
        ("samples.jsonl", "round 1 sample", 12),
        ("states.bin", "round 1 sample", 12),
        ("check.jsonl", "round 1 judge check", 6),
        ("policy.jsonl", "round 1 judge", 6),
        ("reference.jsonl", "round 1 judge reference", 6),
    ],
)
def test_a_damaged_journal_begins_anew(tmp_path: Path, whole: Any, name: str, stage: str, done: int) -> None:
    """A block that is not what was written is not trusted, nor is anything before it."""
    folder, recipe, expected = whole
    if name == "policy.jsonl":  # else the sums are those that the sampler recorded
        recipe = recipe_of("toy", folder, {"judge.rescore": "always"})
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "run", recipe, report=at(stage, done, stop))
    [part] = (tmp_path / "run/rounds/1").glob(f"*.part/{name}")
    assert files.size_of(part)
    part.write_bytes(part.read_bytes()[:-1] if name == "states.bin" else b"X" + part.read_bytes()[1:])
    run_small(tmp_path / "run", recipe)
    found = contents(tmp_path / "run")
    different = {path for path in found if found[path] != expected.get(path)}
    told = (".json", ".yaml") if name == "policy.jsonl" else ()  # these say how the sums came about
    assert not [path for path in different if not path.endswith(told)]


def test_what_is_done_in_a_stage_is_not_done_again(tmp_path: Path, whole: Any) -> None:
    """Chunks of answers before the interruption are read, not sampled."""
    _, recipe, _ = whole

    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "run", recipe, report=at("round 1 sample", 12, stop))
    seen: list[int] = []
    run_small(tmp_path / "run", recipe, report=lambda e: seen.append(e.done) if e.stage == "round 1 sample" else None)
    assert min(seen) == 8, "the first chunk of eight was kept"


# --- memory -----------------------------------------------------------------------------------------------------------


class Small:
    """A backend with little memory: more than so many prompts, or tokens, at a time do not fit."""

    def __init__(self, inner: Any, most: int, tokens: int) -> None:
        self.__dict__.update(_inner=inner, most=most, tokens=tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def _fits(self, size: int, most: int) -> None:
        if size > most:
            raise OutOfMemory("memory ran out: lower the batch")

    def sample(self, *args: Any) -> Any:
        """Sampling in batches."""
        self._fits(self.batching.sample, self.most)
        return self._inner.sample(*args)

    def logprob(self, *args: Any) -> Any:
        """Scoring in batches."""
        self._fits(self.batching.score_tokens, self.tokens)
        return self._inner.logprob(*args)

    def dpo_step(self, rows: Any, objective: Any, *args: Any) -> Any:
        """The objective has seen half of the step when memory runs out."""
        if self.batching.micro_tokens > self.tokens:
            self._inner.dpo_step(rows, objective, 0.0, None)
        self._fits(self.batching.micro_tokens, self.tokens)
        return self._inner.dpo_step(rows, objective, *args)


def test_batches_are_halved_where_memory_runs_out(tmp_path: Path, whole: Any) -> None:
    """Said once each, remembered in the run folder, and the same result: these sizes change nothing but rounding."""
    _, recipe, expected = whole
    notes: list[str] = []

    run_small(tmp_path / "run", recipe, lambda backend: Small(backend, 1, 50), lambda event: notes.append(event.note))
    said = [note for note in notes if "memory ran out" in note]
    assert len(said) == 3
    assert "micro_tokens 64 -> " in " ".join(said)
    kept = json.loads((tmp_path / "run/batching.json").read_text())
    assert kept["asked"]["micro_tokens"] == 64
    assert kept["used"]["sample"] == 1
    assert 0 < kept["used"]["micro_tokens"] <= 50
    assert 0 < kept["used"]["score_tokens"] <= 50
    assert texts(contents(tmp_path / "run")) == texts(expected)
    _, again = run_small(tmp_path / "run", recipe)
    assert not again.computed


def texts(found: dict[str, bytes]) -> list[list[str]]:
    """The answers of round 1."""
    lines = found["rounds/1/samples.jsonl"].splitlines()
    return [[c["text"] for c in json.loads(line)["completions"]] for line in lines]


def test_one_at_a_time_that_does_not_fit_is_said(tmp_path: Path, whole: Any) -> None:
    """There is nothing left to halve."""
    _, recipe, _ = whole
    with pytest.raises(OutOfMemory, match="memory ran out"):
        run_small(tmp_path / "run", recipe, lambda backend: Small(backend, 0, 0))


# --- real models, in one process --------------------------------------------------------------------------------------

STOPS = [("seed", 2), ("round 1 sample", 12), ("round 1 judge reference", 12), ("round 1 train", 3)]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_real_model_goes_on_to_the_same_bytes(tmp_path: Path, backend: str) -> None:
    """Stopped in four places, one after the other."""
    pytest.importorskip("torch" if backend == "torch" else "mlx.core")
    make_model(tmp_path / "model")
    recipe = recipe_of(f"{backend}:{tmp_path / 'model'}", tmp_path, {})
    run_small(tmp_path / "whole", recipe)

    for place in STOPS:
        with pytest.raises(KeyboardInterrupt):
            run_small(tmp_path / "run", recipe, report=at(*place, stop))
    run_small(tmp_path / "run", recipe, report=silent)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_moved_run_goes_on(tmp_path: Path, whole: Any) -> None:
    """A run folder can be copied to another place whole."""
    _, recipe, expected = whole

    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "run", recipe, report=at("round 1 judge reference", 12, stop))
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    _, run = run_small(tmp_path / "elsewhere", recipe)
    assert len(run.reused) == 4
    assert contents(tmp_path / "elsewhere") == expected
    assert isinstance(run, Run)
