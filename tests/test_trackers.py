"""`--report-to`: which numbers leave a run, under which names, at which step, and that nothing else does.

The real libraries run where they are installed, offline; what is asked of wandb and trackio is also held by stand-ins.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import math
import os
import sqlite3
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite.cli import trackers
from spa_lite.cli.trackers import TRACKERS, flat, identity, masked, tracked
from spa_lite.errors import BackendError, BackendMissing, RecipeError
from spa_lite.events import Event, Report, silent


@pytest.fixture(autouse=True)
def users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's environment; what a library sets there is taken back."""
    for name in [n for n in os.environ if n.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    for name in ("WANDB_ERROR_REPORTING", "WANDB_DISABLE_GIT"):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)


def first_attempt(report: Report) -> None:
    """A run that dies in the second step of round 1."""
    report(Event("init measure", 1, 1, "stage", metrics={"length": 24.0, "win_rate": None}))
    for step, loss in ((1, 0.7), (2, 0.6)):
        report(Event("seed", step, 2, "steps", metrics=line(step, loss)))
    report(Event("rounds/0 seed", 1, 1, "stage", metrics={"steps": 2, "loss": 0.65}))
    report(Event("round 1 judge", 1, 1, "pairs"))
    report(Event("round 1 train", 1, 2, "steps", metrics=line(1, 0.5)))


def second_attempt(report: Report) -> None:
    """The same run once more: what was finished reports its summary only."""
    report(Event("init measure", 1, 1, "stage", metrics={"length": 24.0, "win_rate": None}))
    report(Event("rounds/0 seed", 1, 1, "stage", metrics={"steps": 2, "loss": 0.65}))
    for step, loss in ((1, 0.5), (2, 0.4)):
        report(Event("round 1 train", step, 2, "steps", metrics=line(step, loss)))
    report(Event("rounds/1 train", 1, 1, "stage", metrics={"steps": 2, "loss": 0.45}))
    won = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 40}
    report(Event("rounds/1 measure", 1, 1, "stage", metrics={"win_rate": won, "by": "gold"}))


def line(step: int, loss: float) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    nothing = {"tau": None, "margin": math.nan}
    return {"step": step, "loss": loss, "skipped": False, "ids": ["private"], "flagged": ["private"], **nothing}


class Remembers:
    """A tracker that keeps what it is given, and fails where it is told to."""

    hint = "in memory"

    def __init__(self, folder: Path, settings: Any) -> None:
        self.settings, self.logged, self.closed = settings, list[tuple[int, dict[str, float]]](), 0
        self.fail_at: int | None = None

    def log(self, values: Any, step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("no way to https://me:hunter2@host/\nmore")
        self.logged.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Remembers]:
    """Two trackers in the place of the real ones; they are in here when they are started."""
    made: dict[str, Remembers] = {}

    def start(name: str) -> Callable[[Path, Any], Remembers]:
        return lambda folder, settings: made.setdefault(name, Remembers(folder, settings))

    monkeypatch.setattr(trackers, "TRACKERS", {"json": start("json"), "csv": start("csv")})
    return made


def test_without_names_it_is_the_report_itself(tmp_path: Path) -> None:
    """No file, no import."""
    before = set(sys.modules)
    with tracked(silent, [], tmp_path / "run", {}) as report:
        assert report is silent
    assert not (tmp_path / "run").exists()
    assert not {"tensorboard", "wandb", "trackio"} & (set(sys.modules) - before)


def test_numbers_and_only_numbers_at_the_step_of_the_run(table: dict[str, Remembers], tmp_path: Path) -> None:
    """Names, x axis, and that a run which goes on goes on where it was."""
    seen: list[Event] = []
    with tracked(seen.append, ["json"], tmp_path, {}) as report:
        first_attempt(report)
    assert [event.stage for event in seen if event.unit] == [
        "init measure", "seed", "seed", "rounds/0 seed", "round 1 judge", "round 1 train",
    ]  # fmt: skip
    assert table.pop("json").logged == [
        (0, {"init/length": 24.0, "over the run/length": 24.0}),
        (1, {"seed/loss": 0.7, "seed/skipped": 0.0}),
        (2, {"seed/loss": 0.6, "seed/skipped": 0.0}),
        (2, {"round 0/seed/steps": 2.0, "round 0/seed/loss": 0.65}),
        (3, {"round 1 train/loss": 0.5, "round 1 train/skipped": 0.0}),
    ]
    with tracked(silent, ["json"], tmp_path, {}) as report:
        second_attempt(report)
    assert [step for step, _ in table["json"].logged] == [0, 2, 3, 4, 4, 4]
    measured = table["json"].logged[-1][1]
    assert measured == {
        f"{chart}{part}": value
        for chart in ("round 1/win_rate", "over the run/win_rate")
        for part, value in (("", 0.6), ("/low", 0.5), ("/high", 0.7), ("/n", 40.0))
    }


def test_flat_takes_finite_numbers_of_any_make() -> None:
    """NumPy's too; a list is no number, whatever is in it."""
    given = {"a": np.float32(0.5), "b": {"c": np.int64(3), "d": math.inf, "e": "1"}, "f": [1.0], "g": np.array(1.0)}
    assert flat(given, "x") == {"x/a": 0.5, "x/b/c": 3.0}


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(table: dict[str, Remembers], tmp_path: Path) -> None:
    """One note, without the password in its message; the other tracker gets everything."""
    notes: list[str] = []
    with tracked(
        lambda e: notes.append(f"{e.stage}: {e.note}") if e.note else None, ["json", "csv", "json"], tmp_path, {}
    ) as r:
        table["json"].fail_at = 2
        first_attempt(r)
    assert [step for step, _ in table["json"].logged] == [0, 1]
    assert [step for step, _ in table["csv"].logged] == [0, 1, 2, 2, 3]
    assert notes[2:] == [
        "json: dropped, because it failed (ConnectionError: no way to https://***@host/); the run goes on without it"
    ]
    assert (table["json"].closed, table["csv"].closed) == (1, 1)


def test_trackers_are_closed_when_the_run_fails(table: dict[str, Remembers], tmp_path: Path) -> None:
    """And one that cannot be closed hides neither the error nor the other tracker."""

    def no() -> None:
        raise OSError("disk full")

    def run(report: Report) -> None:
        with tracked(report, ["json", "csv"], tmp_path, {}):
            table["json"].close = no  # type: ignore[method-assign]
            raise KeyboardInterrupt

    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(lambda event: notes.append(event.note))
    assert table["csv"].closed == 1
    assert notes[2:] == ["its last numbers may be missing (OSError: disk full)"]


def test_unknown_names_and_missing_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is a sentence with its mend, before anything is started."""
    with pytest.raises(RecipeError, match=r"no tracker 'tensorbord' \(nearest: 'tensorboard'; known: .*wandb, trackio"):
        trackers.check(["tensorbord"])
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        wanted = rf"needs {name}, not installed here: pip install 'spa-lite\[{name}\]'"
        with pytest.raises(BackendMissing, match=wanted), tracked(silent, [name], tmp_path / "run", {}):
            pass
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_stops_the_run_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Remembers], tmp_path: Path
) -> None:
    """It was asked for; those already started are closed."""

    def refuse(folder: Path, settings: Any) -> Remembers:
        raise ValueError("no account")

    monkeypatch.setitem(trackers.TRACKERS, "csv", refuse)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    with (
        pytest.raises(BackendError, match=r"--report-to csv did not start \(ValueError: no account\)"),
        tracked(silent, ["json", "csv"], tmp_path, {}),
    ):
        pass
    assert table["json"].closed == 1


def test_secrets_in_settings_are_masked(table: dict[str, Remembers], tmp_path: Path) -> None:
    """Tokens, user and password in a URL, keys in a query; paths and numbers stay."""
    given = {
        "inputs": {"model": "/home/me/models/hf_small", "seed_pairs": "https://me:pa55@host/x.jsonl?Token=abc&page=2"},
        "lora": {"targets": ["q_proj", "hf_" + "aB3" * 11]},
        "max_tokens": 64,
        "api_key": "plain",
        "note": f"sk-{'x' * 20} and Bearer abc.def",
        "where": Path("runs/a"),
        "rate": None,
    }
    with tracked(silent, ["json"], tmp_path, given):
        pass
    assert table["json"].settings == {
        "inputs": {"model": "/home/me/models/hf_small", "seed_pairs": "https://***@host/x.jsonl?Token=***&page=2"},
        "lora": {"targets": ["q_proj", "***"]},
        "max_tokens": 64,
        "api_key": "***",
        "note": "*** and Bearer ***",
        "where": "runs/a",
        "rate": None,
    }
    assert masked("user@host and https://host/a@b") == "user@host and https://host/a@b"


def test_the_id_of_a_run_is_kept_in_its_folder(tmp_path: Path) -> None:
    """The same when the run goes on or moves, another in a fresh folder of the same name."""
    one, other = tmp_path / "a" / "my run", tmp_path / "b" / "my run"
    for folder in (one, other):
        folder.mkdir(parents=True)
    first = identity(one)
    assert first.startswith("my-run-")
    assert identity(one) == first != identity(other)
    assert identity(one.rename(tmp_path / "elsewhere")) == first


# -- the contracts with wandb and trackio, held by stand-ins ----------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> list[tuple[str, Any]]:
    """A module of that name whose `init` gives a run; returns the list of calls."""
    calls: list[tuple[str, Any]] = []

    class Run:
        url = None

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (values, step)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**given: Any) -> Run:
        print("* a banner on standard output")
        calls.append(("init", given))
        return Run()

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update({"init": init, "finish": lambda: calls.append(("finish", None)), **members})
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_wandb_is_offline_resumes_and_captures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The arguments of init in two attempts, the steps, the end."""
    calls = stand_in(monkeypatch, "wandb", Settings=lambda **given: given)
    for attempt in (first_attempt, second_attempt):
        with tracked(silent, ["wandb"], tmp_path / "run", {"seed": 1}) as report:
            attempt(report)
    first, second = (given for what, given in calls if what == "init")
    assert first == second
    assert first["mode"] == "offline"
    assert (os.environ["WANDB_ERROR_REPORTING"], os.environ["WANDB_DISABLE_GIT"]) == ("false", "true")
    assert first["id"] == identity(tmp_path / "run")
    wanted = {"project": "spa-lite", "name": "run", "resume": "allow", "dir": str(tmp_path / "run")}
    assert wanted.items() <= first.items()
    assert first["config"] == {"seed": 1}
    off = {"console": "off", "silent": True, "disable_code": True, "disable_git": True, "save_code": False}
    assert off.items() <= first["settings"].items()
    assert not [name for name in first if "key" in name or "entity" in name]
    assert calls[5][1] == ({"round 1 train/loss": 0.5, "round 1 train/skipped": 0.0}, 3)
    assert [what for what, _ in calls if what == "finish"] == ["finish"] * 2


@pytest.mark.parametrize(("chosen", "mode"), [("online", "online"), ("disabled", "disabled"), ("", "offline")])
def test_wandb_mode_is_the_users_if_they_set_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: str, mode: str
) -> None:
    """An empty variable is none."""
    monkeypatch.setenv("WANDB_MODE", chosen)
    calls = stand_in(monkeypatch, "wandb", Settings=dict)
    with tracked(silent, ["wandb"], tmp_path, {}):
        pass
    assert calls[0][1]["mode"] == mode


@pytest.mark.parametrize("space", ["", "me/space"])
def test_trackio_stays_here_unless_a_space_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], space: str
) -> None:
    """No Space by argument, no hub in `init` of a local run, nothing on standard output, steps as they are."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TRACKIO_SPACE_ID", space)
    offline: list[bool] = []
    calls = stand_in(monkeypatch, "trackio", TRACKIO_DIR=tmp_path)
    real: Any = sys.modules["trackio"].init

    def init(**given: Any) -> Any:
        offline.append(constants.HF_HUB_OFFLINE)
        return real(**given)

    monkeypatch.setattr(sys.modules["trackio"], "init", init)
    with tracked(silent, ["trackio"], tmp_path, {"seed": 1}) as report:
        first_attempt(report)
    assert offline == [not space]
    assert constants.HF_HUB_OFFLINE is False
    assert calls[0][1] == {
        "project": "spa-lite",
        "name": identity(tmp_path),
        "resume": "allow",
        "config": {"seed": 1},
        "embed": False,
        "auto_log_cpu": False,
        "auto_log_gpu": False,
    }
    assert calls[-2][1] == ({"round 1 train/loss": 0.5, "round 1 train/skipped": 0.0}, 3)
    assert calls[-1] == ("finish", None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("own", [None, "elsewhere"])
def test_trackio_is_imported_with_its_folder_in_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str | None
) -> None:
    """TRACKIO_DIR is set for the import only; the user's own wins."""
    if own:
        monkeypatch.setenv("TRACKIO_DIR", own)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    (tmp_path / "trackio.py").write_text("import os\nTRACKIO_DIR = os.environ['TRACKIO_DIR']\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = trackers._import_trackio(tmp_path / "run")
    del sys.modules["trackio"]
    wanted = own or str(tmp_path / "run" / "trackio")
    assert wanted == found.TRACKIO_DIR
    assert os.environ.get("TRACKIO_DIR") == own


# -- the libraries themselves -----------------------------------------------------------------------------------


def both_attempts(name: str, folder: Path) -> None:
    for attempt in (first_attempt, second_attempt):
        with tracked(silent, [name], folder, {"seed": 1, "lora": {"targets": ["q"]}}) as report:
            attempt(report)


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    """With its own reader, one chart over both attempts."""
    pytest.importorskip("tensorboard", reason="needs the extra: pip install 'spa-lite[tensorboard]'")
    both_attempts("tensorboard", tmp_path)
    files = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = files.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert {(e.step, round(e.value, 6)) for e in reader.Scalars("round 1 train/loss")} == {(3, 0.5), (4, 0.4)}
    assert [(e.step, round(e.value, 6)) for e in reader.Scalars("seed/loss")] == [(1, 0.7), (2, 0.6)]
    assert [(e.step, round(e.value, 6)) for e in reader.Scalars("round 1/win_rate/high")] == [(4, 0.7)]
    assert all(b"private" not in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def test_trackio_keeps_one_run_over_both_attempts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a database in the run folder; a token that lies around is not used."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read once per process
    monkeypatch.setenv("HF_TOKEN", "hf_aaaaaaaaaaaaaaaaaaaaaaaa")
    trackio = pytest.importorskip("trackio", reason="needs the extra: pip install 'spa-lite[trackio]'")
    both_attempts("trackio", tmp_path)
    (database,) = Path(trackio.TRACKIO_DIR).glob("*.db")
    with sqlite3.connect(database) as db:
        rows = db.execute("SELECT step, run_name, metrics FROM metrics WHERE run_name = ?", [identity(tmp_path)])
        found = [(step, name, str(metrics)) for step, name, metrics in rows]
        (runs,) = db.execute("SELECT count(DISTINCT run_id) FROM metrics WHERE run_name = ?", [identity(tmp_path)])
    db.close()
    assert [step for step, _, _ in found] == [0, 1, 2, 2, 3, 0, 2, 3, 4, 4, 4]
    assert runs == (1,)
    assert '"round 1/win_rate":0.6' in found[-1][2]
    assert b"private" not in database.read_bytes()
    assert capsys.readouterr().out == ""


def test_wandb_writes_offline_runs_of_one_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but the numbers and the settings: no requirements, no metadata, no code, no output."""
    wandb = pytest.importorskip("wandb", reason="needs the extra: pip install 'spa-lite[wandb]'")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    try:
        both_attempts("wandb", tmp_path / "run")
    finally:
        wandb.teardown()
    attempts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert {path.name.split("-", 3)[3] for path in attempts} == {identity(tmp_path / "run")}
    kept = {path.name for folder in attempts for path in folder.rglob("*") if path.is_file()}
    assert {name for name in kept if not name.startswith("debug")} == {f"run-{identity(tmp_path / 'run')}.wandb"}
    logged = b"".join(path.read_bytes() for folder in attempts for path in folder.glob("*.wandb"))
    assert b"round 1/win_rate" in logged
    assert b"private" not in logged
