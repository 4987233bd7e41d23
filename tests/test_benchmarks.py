"""The benchmarks of speed: every suite runs, refuses a contestant that computes something else, and tells the truth."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
SUITES = ("step", "score", "sample", "round", "head", "mlx_step", "mlx_sample")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Modules of benchmarks/, which are scripts, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def suite(side: Any, contestants: list[Any], claims: list[Any] | None = None) -> Any:
    return side.Suite("made", "A made-up suite", "thing", "About.", lambda options: contestants, claims or [])


def does(side: Any, shown: Any, units: float = 1.0) -> Callable[[], Any]:
    return lambda: side.Ready(lambda: side.Done(units), lambda: shown)


@pytest.mark.long
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_runs(
    name: str, load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlx" if name.startswith("mlx") else "peft", reason="the peers need it")
    load("side_by_side").main(load(f"bench_{name}").SUITE, ["--quick", "--rounds", "1", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "| the same code twice (noise) |" in told
    assert "nothing is written down" in told
    assert not list(tmp_path.iterdir())
    if name == "step":
        ran = "TRL default | not run" not in told
        assert ran == load("machine").installed("trl")
        assert ran or "TRL is not installed here (make peers installs it)" in told


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ({"loss": 1.001}, "losses 1.001000 and 1.000000"),
        ({"loss": math.nan}, "losses nan"),
        ({"values": [1.0, 2.1]}, "values differ by 0.1"),
        ({"values": [1.0]}, "values differ by nan"),
        ({"gradients": {"a": [1.0, -1.0]}}, "cosine of the gradients is 0.0"),
        ({"gradients": {"b": [1.0, 1.0]}}, "cosine of the gradients is nan"),
        ({}, "there is nothing to compare"),
    ],
)
def test_nothing_is_timed_where_results_differ(
    mine: dict[str, Any], said: str, load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    side = load("side_by_side")
    right = side.Shown(1.0, {"a": [1.0, 1.0]}, [1.0, 2.0])
    wrong = side.Shown(**mine)
    made = suite(
        side, [side.Contestant("ours", does(side, right)), side.Contestant("other", does(side, wrong), "ours")]
    )
    with pytest.raises(SystemExit, match=f"nothing is timed(?s:.*){said}"):
        side.main(made, ["--quick"])
    assert capsys.readouterr().out == ""


def test_a_contestant_that_cannot_run_is_named(load: Callable[[str], Any]) -> None:
    side = load("side_by_side")

    def make() -> Any:
        raise side.Unavailable("it needs a moon")

    alike = side.Shown(loss=1.0)
    contestants = [side.Contestant("ours", does(side, alike)), side.Contestant("other", make, "ours")]
    claims = [side.Claim("other / ours", "other", "ours", at_least=2.0)]
    found = side.compared(suite(side, contestants, claims), side.Options(Path(), quick=True), 1)
    assert found["missing"] == {"other": "it needs a moon"}
    assert found["claims"] == []
    assert "| other | not run: it needs a moon |" in load("pages").table(found)


def test_ratios_are_of_time_per_unit_within_a_round(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = load("side_by_side")
    clock = [0.0]
    order: list[str] = []
    monkeypatch.setattr(side, "now", lambda device: clock[0])
    monkeypatch.setattr(side, "counted", lambda suite, made, options: side.a_go(made, "cpu"))

    def contestant(name: str, seconds: list[float], units: float) -> Any:
        left = iter(seconds)

        def go() -> Any:
            order.append(name)
            clock[0] += next(left)
            return side.Done(units)

        return side.Contestant(name, lambda: side.Ready(go))

    # The first go does not count; ours goes twice a round, and the second round is in reverse.
    ours = contestant("ours", [9.0, 1.0, 1.0, 2.0, 2.0], 1.0)
    other = contestant("other", [9.0, 6.0, 16.0], 2.0)
    claims = [
        side.Claim("other / ours", "other", "ours", at_least=4.0),
        side.Claim("ours / other", "ours", "other", at_most=0.2),
    ]
    found = side.compared(suite(side, [ours, other], claims), side.Options(Path(), quick=True), 2)
    assert order == ["ours", "other", "ours", "other", "ours", "ours", "other", "ours"]
    assert [found["claims"][0][key] for key in ("median", "least", "most", "reached")] == [3.5, 3.0, 4.0, False]
    assert found["claims"][1]["reached"] is False
    assert found["noise"] == {"median": 1.0, "least": 1.0, "most": 1.0}


def test_operations_are_counted_forwards_and_backwards(load: Callable[[str], Any]) -> None:
    torch = pytest.importorskip("torch")
    with load("machine").operations() as total:
        a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
        (a @ b).sum().backward()
        with torch.inference_mode():
            torch.nn.functional.linear(a, b.T)
    assert total[0] == 3 * (2 * 3 * 5 * 7)


def test_lengths_are_mixed_and_always_the_same(load: Callable[[str], Any]) -> None:
    works = load("workloads")
    rows = works.pairs(16, 8192, works.Lengths())
    answers = [len(response) for row in rows for response in row.responses]
    assert rows == works.pairs(16, 8192, works.Lengths())
    assert 235 < sum(answers) / len(answers) < 260
    assert max(answers) > 4 * min(answers)


def test_the_page_shows_the_newest_results(load: Callable[[str], Any]) -> None:
    pages = load("pages")
    text = PAGE.read_text(encoding="utf-8")
    assert pages.with_tables(text) == text, "run: python benchmarks/side_by_side.py --page"
    for name in SUITES:
        assert f"<!-- table: {name} -->" in text
        path = pages.RESULTS / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            assert path.with_suffix(".md").read_text(encoding="utf-8") == pages.table(found)
            assert all(not lines["faults"] for lines in found["agreement"].values())
