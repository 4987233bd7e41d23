"""The script for a rented GPU, with toys on the CPU: every part runs, and the numbers are where they should be."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], Any]]:
    """Modules of benchmarks/, which are scripts, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


@pytest.fixture(scope="module")
def script(load: Callable[[str], Any]) -> Any:
    return load("bench_gpu")


def goes(script: Any, folder: Path, parts: list[str], rounds: int) -> list[Any]:
    """The lines of some parts with toys, none of which failed."""
    lines = script.main(["--tiny", "--rounds", str(rounds), "--parts", ",".join(parts), "--out", str(folder)])
    assert [f"{line.part}: {line.what} {line.found}" for line in lines if line.what in {"failed", "not run"}] == []
    assert list(dict.fromkeys(line.part for line in lines)) == parts
    return list(lines)


def test_toys_go_through_the_parts(script: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What was compared is told, and the file has what the table has."""
    parts = ["rates", "sample-1b", "step-1b", "score-1b"]
    lines = goes(script, tmp_path, parts, 1)
    told = {(line.part, line.what) for line in lines}
    for part, what in (
        ("sample-1b", "generate / ours, none stops"),
        ("sample-1b", "ours: share of the floor"),
        ("sample-1b", "ours (mean log-prob per answer): agrees"),
        ("step-1b", "plain loop, refined, a pair: agrees"),
        ("step-1b", "ours: plain, recorded reference: share of the floor"),
        ("score-1b", "padded forwards / ours"),
    ):
        assert (part, what) in told
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["what"] for line in found["lines"]] == [line.what for line in lines]
    assert list(found["parts"]) == parts
    assert min(found["ceiling"].values()) > 0
    assert capfd.readouterr().out.count("\n| ") == len(lines) + 2


@pytest.mark.long
def test_toys_go_through_all_of_it(script: Any, tmp_path: Path) -> None:
    goes(script, tmp_path, list(script.PARTS), 2)


def test_a_part_that_fails_costs_only_itself(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Any, size: str) -> Any:
        yield script.Line("step-1b", "first", "1")
        raise RuntimeError("CUDA error: out of everything\nand a stack")

    monkeypatch.setitem(script.PARTS, "step-1b", (broken, "1b", 60))
    lines = script.main(["--tiny", "--parts", "step-1b,rates", "--out", str(tmp_path)])
    assert [(line.part, line.what, line.found) for line in lines[:2]] == [
        ("step-1b", "first", "1"),
        ("step-1b", "failed", "RuntimeError: CUDA error: out of everything"),
    ]
    assert {line.part for line in lines[2:]} == {"rates"}


def test_a_part_stops_when_its_time_is_over(script: Any) -> None:
    with pytest.raises(script.OutOfTime), script.within(0.01):
        threading.Event().wait(10)


def test_nothing_is_timed_that_differs(load: Callable[[str], Any]) -> None:
    lines = load("gpu_lines")
    found = {"values": 0.5, "faults": ["ours and theirs: values differ by 0.5 (8 and 8 of them)"]}
    with pytest.raises(lines.Differs, match=r"differ by 0\.5"):
        lines.agreed("score-1b", found, "ours")


def test_the_better_answer_comes_first(load: Callable[[str], Any]) -> None:
    parts = load("gpu_parts")
    asked, answers = [(1,), (2,)], [((3,), (4,)), ((5,), (6,))]
    rows = parts.labelled(asked, answers, parts.better_first([0.5, 0.1, -2.0, -1.0]))
    assert [row.responses for row in rows] == [((3,), (4,)), ((6,), (5,))]
