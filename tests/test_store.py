"""A run folder: the marker comes last, a finished stage is never computed again, a changed one is never misread."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spa_lite import store
from spa_lite.errors import RunError, StaleRun
from spa_lite.files import move, read_json, write_atomic, write_json
from spa_lite.journal import Marked
from spa_lite.library import Library
from spa_lite.lock import holder, locked
from spa_lite.store import Run, Stage, digest

STAGE = Stage("rounds/1", "sample", ("samples.jsonl",), {"sampling.n": 2}, {"policy": "k0"})
HERE = {"backend": "torch", "device": "cpu", "dtype": "float32", "bits": 32}


def work(calls: list[str], text: str = "answer", fail: bool = False) -> Any:
    """Work that writes a file, and may die before it is done."""

    def do(folder: Path) -> dict[str, Any]:
        calls.append(text)
        (folder / "samples.jsonl").write_text(text)
        if fail:
            raise KeyboardInterrupt
        return {"n": 1}

    return do


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    """Its summary is read the second time."""
    calls: list[str] = []
    for _ in range(2):
        assert Run(tmp_path).once(STAGE, work(calls)) == {"n": 1}
    assert calls == ["answer"]


def test_an_interrupted_stage_is_done_again_from_nothing(tmp_path: Path) -> None:
    """Without a marker what it left is removed, and it runs once more: executions are counted."""
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).once(STAGE, work(calls, "half", fail=True))
    assert not (tmp_path / "rounds/1/sample.done.json").exists()
    Run(tmp_path).once(STAGE, work(calls, "whole"))
    Run(tmp_path).once(STAGE, work(calls, "again"))
    assert calls == ["half", "whole"]
    assert (tmp_path / "rounds/1/samples.jsonl").read_text() == "whole"


def test_a_changed_stage_names_what_changed(tmp_path: Path) -> None:
    """Settings by value, inputs by name; nothing is deleted."""
    Run(tmp_path).once(STAGE, work([]))
    with pytest.raises(StaleRun, match=r"sampling\.n was 2 .*'rounds/1 sample'.* now 3"):
        Run(tmp_path).once(replace(STAGE, settings={"sampling.n": 3}), work([]))
    with pytest.raises(StaleRun, match="policy changed"):
        Run(tmp_path).once(replace(STAGE, inputs={"policy": "k1"}), work([]))
    assert (tmp_path / "rounds/1/samples.jsonl").exists()


def test_keys_depend_on_content_alone(tmp_path: Path) -> None:
    """Not on the order of a dictionary, not on where the run lies."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert STAGE.key == replace(STAGE, outputs=()).key
    assert STAGE.key != replace(STAGE, kind="judge").key


def test_clocks_stay_out_of_results(tmp_path: Path) -> None:
    """Seconds are in a file of their own."""
    run = Run(tmp_path)
    run.once(STAGE, work([]))
    assert "sample" in run.spent("rounds/1")
    assert "seconds" not in json.dumps(read_json(tmp_path / "rounds/1/sample.done.json"))


def test_a_damaged_marker_is_named_and_its_stage_computed_again(tmp_path: Path) -> None:
    """It is neither trusted nor a traceback."""
    Run(tmp_path).once(STAGE, work([]))
    (tmp_path / "rounds/1/sample.done.json").write_text('{"key": ')
    run, notes, calls = watched(tmp_path)
    assert run.once(STAGE, work(calls)) == {"n": 1}
    assert calls == ["answer"]
    assert "sample.done.json is damaged" in notes[0]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_result_is_named_and_computed_again(tmp_path: Path, damage: str) -> None:
    """By its checksum. What was there is set aside, not deleted."""
    Run(tmp_path).once(STAGE, work([]))
    path = tmp_path / "rounds/1/samples.jsonl"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("ans" if damage == "truncated" else "anXwer")
    run, notes, calls = watched(tmp_path)
    run.once(STAGE, work(calls))
    assert calls == ["answer"]
    assert "samples.jsonl is damaged or missing" in notes[0]
    assert path.read_text() == "answer"
    assert (path.parent / "samples.jsonl.damaged").exists() == (damage != "missing")


@pytest.mark.parametrize("text", ["answer", "another answer"])
def test_what_reads_a_repaired_stage_is_computed_again_if_that_came_out_otherwise(tmp_path: Path, text: str) -> None:
    """On another machine a repaired file may differ; what was made from the old one is then stale, and stays so if the
    program is killed in between."""
    later = Stage("rounds/1", "judge", (), {}, {"samples": STAGE.key})
    calls: list[str] = []

    def judge(part: Path) -> dict[str, Any]:
        calls.append("judged")
        return {"n": 2}

    first = Run(tmp_path)
    first.once(STAGE, work([]))
    first.once(later, judge)
    (tmp_path / "rounds/1/samples.jsonl").write_text("damaged")
    Run(tmp_path).once(STAGE, work([], text))  # killed after the repair
    again = Run(tmp_path)
    again.once(STAGE, work([], "not called"))
    again.once(later, judge)
    assert calls == (["judged"] if text == "answer" else ["judged", "judged"])


def watched(folder: Path) -> tuple[Run, list[str], list[str]]:
    """A run, the notes it makes, and an empty list of calls."""
    run, notes = Run(folder), list[str]()
    run.report = lambda event: notes.append(event.note)
    return run, notes, []


@pytest.mark.parametrize(("found", "age"), [(1, "older"), (99, "newer"), ("x", "newer"), (None, "newer")])
def test_a_run_of_another_version_is_refused(tmp_path: Path, found: Any, age: str) -> None:
    """Never misread; the way out is named, and nothing is touched."""
    (tmp_path / "run.json").write_text(json.dumps({"format": found}))
    with pytest.raises(RunError, match=f"an? {age} version .* another --out"):
        Run(tmp_path)


def test_a_run_from_before_there_were_versions_is_refused(tmp_path: Path) -> None:
    """Its markers have no checksums."""
    (tmp_path / "rounds/0").mkdir(parents=True)
    (tmp_path / "rounds/0/seed.done.json").write_text('{"key": "x", "summary": {}}')
    with pytest.raises(RunError, match="an older version"):
        Run(tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_a_finished_stage_of_another_run_is_taken_over(tmp_path: Path) -> None:
    """Not computed, not copied, and whole even if the other run is deleted."""
    Run(tmp_path / "first").once(STAGE, work([]), HERE)
    calls: list[str] = []
    run = Run(tmp_path / "second", Library([tmp_path]))
    assert run.once(STAGE, work(calls), HERE) == {"n": 1}
    assert calls == []
    assert run.borrowed == {STAGE.title: (tmp_path / "first").resolve()}
    ours, theirs = (tmp_path / name / "rounds/1/samples.jsonl" for name in ("second", "first"))
    assert ours.samefile(theirs)
    shutil.rmtree(tmp_path / "first")
    assert Run(tmp_path / "second").once(STAGE, work(calls), HERE) == {"n": 1}
    assert calls == []


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"device": "cuda:0"}, {"backend": "mlx"}, {"bits": 4}])
def test_other_arithmetic_is_another_result(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A stage computed with other numerics is not taken over; a run resumed elsewhere keeps its own, and records it."""
    Run(tmp_path / "first").once(STAGE, work([]), HERE)
    calls: list[str] = []
    Run(tmp_path / "second", Library([tmp_path])).once(STAGE, work(calls), HERE | changes)
    assert calls == ["answer"]
    again = Run(tmp_path / "first", Library([tmp_path]))
    again.once(STAGE, work(calls), HERE | changes)
    assert calls == ["answer"]
    assert again.makers[STAGE.title] == HERE


def test_a_damaged_result_of_another_run_is_not_taken_over(tmp_path: Path) -> None:
    """Its checksum is looked at first."""
    Run(tmp_path / "first").once(STAGE, work([]), HERE)
    (tmp_path / "first/rounds/1/samples.jsonl").write_text("damaged")
    calls: list[str] = []
    Run(tmp_path / "second", Library([tmp_path])).once(STAGE, work(calls), HERE)
    assert calls == ["answer"]


def test_a_stage_begun_elsewhere_says_so_and_is_not_lent(tmp_path: Path) -> None:
    """Half on one machine, half on another: recorded, and good for this run only."""
    there = HERE | {"device": "cuda:0"}
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "first").once(STAGE, work([], fail=True), there)
    run = Run(tmp_path / "first")
    run.once(STAGE, work([]), HERE)
    assert run.makers == {STAGE.title: HERE, f"{STAGE.title} (first part)": there}
    assert Library([tmp_path]).find(STAGE.key, HERE) is None


def test_what_was_made_from_other_bytes_is_not_taken_over(tmp_path: Path) -> None:
    """The same key, but this run's own answers came out otherwise."""
    later = Stage("rounds/1", "judge", (), {}, {"samples": STAGE.key})
    for name, text, library in (("first", "answer", None), ("second", "another", Library([tmp_path]))):
        run = Run(tmp_path / name)
        run.once(STAGE, work([], text), HERE)
        run.library = library
        run.once(later, lambda part: {"n": 2}, HERE)
    assert run.computed == ["rounds/1 sample", "rounds/1 judge"]


def test_a_takeover_that_was_cut_short_leaves_the_lender_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was shared so far is another run's file: it is not gone on with, not even if the lender is gone."""

    def journal(part: Path) -> dict[str, Any]:
        found = Marked(part / "samples.jsonl")
        found.append(["a", "b"])
        return {"kept": len(found.kept)}

    Run(tmp_path / "first").once(STAGE, journal, HERE)
    shutil.copytree(tmp_path / "first", tmp_path / "kept", copy_function=os.link)
    with monkeypatch.context() as patch:
        patch.setattr("spa_lite.files.sync_tree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path / "second", Library([tmp_path])).once(STAGE, journal, HERE)
    shutil.rmtree(tmp_path / "first")
    assert Run(tmp_path / "second").once(STAGE, journal, HERE) == {"kept": 0}
    assert (tmp_path / "kept/rounds/1/samples.jsonl").read_bytes() == b'"a"\n"b"\n'


EVIL = '{"key": "k", "made_by": {}, "summary": {}, "reads": {}, "checksums": {"../../../x": "0"}}'


def test_a_marker_never_reaches_outside_its_folder(tmp_path: Path) -> None:
    """A run folder may come from anywhere: what is set aside, or taken over, lies in it."""
    outside = tmp_path / "precious"
    outside.write_text("x")
    (tmp_path / "runs/first/rounds/1").mkdir(parents=True)
    marker = tmp_path / "runs/first/rounds/1/sample.done.json"
    (tmp_path / "runs/first/run.json").write_text('{"format": 2}')
    marker.write_text(EVIL.replace('"k"', f'"{STAGE.key}"').replace("../../../x", "../../../../precious"))
    assert Library([tmp_path / "runs"]).books == {}
    assert Run(tmp_path / "runs/first").once(STAGE, work([])) == {"n": 1}
    assert outside.read_text() == "x"


@pytest.mark.parametrize("content", [EVIL, "[]", "{}", '{"key": 3}', "{", '{"key": "k", "made_by": []}', "\x00"])
def test_a_senseless_marker_of_another_run_stops_nobody(tmp_path: Path, content: str) -> None:
    """It is not in the library."""
    Run(tmp_path / "first")
    (tmp_path / "first/init").mkdir()
    (tmp_path / "first/init/measure.done.json").write_text(content)
    assert Library([tmp_path]).books == {}


def test_a_strangers_results_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of runs may be one that others can write to."""
    Run(tmp_path / "first").once(STAGE, work([]), HERE)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert Library([tmp_path]).books == {}


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have none."""
    Run(tmp_path / "first").once(STAGE, work([]), HERE)
    monkeypatch.setattr("os.link", lambda *names: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    Run(tmp_path / "second", Library([tmp_path])).once(STAGE, work(["unused"]), HERE)
    assert (tmp_path / "second/rounds/1/samples.jsonl").read_text() == "answer"


def test_work_under_other_settings_is_begun_anew(tmp_path: Path) -> None:
    """What an attempt with other settings left is not mixed in, and that is said."""
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).once(STAGE, work([], "half", fail=True))
    run, notes, _ = watched(tmp_path)

    def look(part: Path) -> dict[str, Any]:
        return {"left": sorted(p.name for p in part.iterdir())}

    assert run.once(replace(STAGE, settings={"sampling.n": 3}), look) == {"left": ["begun.json"]}
    assert "begun with other settings" in notes[0]


def test_the_time_of_interrupted_attempts_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a stage are those of all attempts, by a clock that cannot be set back."""
    clock = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).once(STAGE, work([], fail=True))
    run = Run(tmp_path)
    run.once(STAGE, work([]))
    assert run.spent("rounds/1")["sample"]["seconds"] == 12.0


# --- locks ------------------------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    """And the lock of a holder that is gone, however it went, is free."""
    code = (
        "import sys, pathlib; from spa_lite.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=rf"in use by process {other.pid} on .*--out"), locked(tmp_path):
        pass
    assert str(other.pid) in (holder(tmp_path) or "")
    other.kill()
    other.communicate()
    with locked(tmp_path):
        assert "process" in (tmp_path / ".lock").read_text()
    assert holder(tmp_path) is None


def test_a_file_system_without_locks_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with locked(tmp_path):
        pass


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """One sentence and the way out."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        Run(tmp_path / "file" / "run")


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    """The error names the stage and the cause; earlier stages stay."""
    run = Run(tmp_path)
    run.once(STAGE, work([]))

    def full(folder: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device", str(folder / "judgements.jsonl"))

    later = Stage("rounds/1", "judge", ("judgements.jsonl",), {}, {})
    with pytest.raises(RunError, match="rounds/1 judge: No space left"):
        run.once(later, full)
    assert Run(tmp_path).once(STAGE, work([])) == {"n": 1}


def test_a_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old content stays if the new cannot be finished; a file has its name only when it is on the disk."""
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    done: list[str] = []
    monkeypatch.setattr("os.fsync", lambda fd: done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"))
    write_atomic(path, b"newer")
    assert done == ["file", "folder"]
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"newer"


def test_moving_a_file_onto_its_other_name_leaves_one(tmp_path: Path) -> None:
    """A rename between two names of one file does nothing, says POSIX."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    move(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_two_processes_begin_a_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one makes or removes, the other may have made or removed just before."""
    touch, written = Path.touch, write_json

    def removed(path: Path) -> None:
        touch(path)
        path.unlink()

    def moved(path: Path, value: Any) -> None:
        written(path, value)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "touch", removed)
    monkeypatch.setattr(store, "write_json", moved)
    assert (Run(tmp_path / "run").folder / store.HEAD).exists()
    monkeypatch.setattr(store, "write_json", lambda path, value: moved(path.with_name("other"), value))
    with pytest.raises(RunError, match="cannot write to"):
        Run(tmp_path / "other")
