"""A run folder: the marker comes last, a finished stage is never computed again, a changed one is never misread."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spa_lite.errors import RunError, StaleRun
from spa_lite.store import Run, Stage, digest, read_json, write_atomic

STAGE = Stage("rounds/1", "sample", ("samples.jsonl",), {"sampling.n": 2}, {"policy": "k0"})


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
    assert "sample" in run.seconds("rounds/1")
    assert "seconds" not in json.dumps(read_json(tmp_path / "rounds/1/sample.done.json"))


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    """It is neither trusted nor a traceback."""
    Run(tmp_path).once(STAGE, work([]))
    (tmp_path / "rounds/1/sample.done.json").write_text('{"key": ')
    with pytest.raises(RunError, match=r"sample\.done\.json is damaged"):
        Run(tmp_path).once(STAGE, work([]))


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
    """The old content stays if the new cannot be finished."""
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
