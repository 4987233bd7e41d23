"""Signs that another round will not help: each rule by hand, and a run that stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spa_lite import stop
from spa_lite.events import Event
from tests.small import run_small, small_recipe, write_data


def share(value: float) -> dict[str, float]:
    """An interval of which only the value counts here."""
    return {"value": value, "low": 0.0, "high": 1.0, "n": 100}


def table(**last: Any) -> list[dict[str, Any]]:
    """Three rows; the last one as given."""
    init = {"stage": "init", "folder": "init", "length": 20.0, "pair_accuracy": share(0.5), "trained": {}}
    seed = {"stage": "seed", "folder": "rounds/0", "length": 20.0, "pair_accuracy": share(0.8), "trained": {}}
    first = {"stage": "round 1", "folder": "rounds/1", "judged": {"mean_tokens": 10.0}, "trained": {}}
    return [init, seed, first | last]


RULES: dict[str, tuple[dict[str, Any], float, float, str]] = {
    "stop.displacement": ({"trained": {"logratio_chosen": -1.2}}, 1.1, 1.3, "lost 1.2 nats"),
    "stop.length_growth": ({"length": 32.0}, 1.5, 1.7, "grew from 20.0 to 32.0 tokens"),
    "stop.agreement": ({"trained": {"accuracy": 0.9}}, 0.9, 0.91, "agrees with 90 % of the labels"),
    "stop.accuracy_drop": ({"pair_accuracy": share(0.68)}, 0.1, 0.13, "held-out accuracy fell from 80.0 to 68.0 %"),
}


@pytest.mark.parametrize("path", RULES)
def test_a_rule_speaks_at_its_limit_and_not_before(path: str) -> None:
    last, at, beyond, words = RULES[path]
    rows = table(**last)
    (sentence,) = stop.signs(rows, small_recipe({}, {path: at}))
    assert sentence.startswith("round 1: ")
    assert words in sentence
    assert stop.signs(rows, small_recipe({}, {path: beyond})) == []


def test_nothing_is_said_of_a_quiet_round() -> None:
    rows = table(length=21.0, pair_accuracy=share(0.79), trained={"accuracy": 0.7, "logratio_chosen": 0.3})
    assert stop.signs(rows, small_recipe({})) == []
    assert stop.signs(rows[:1], small_recipe({})) == []


def test_the_answers_of_a_round_count_where_no_others_are_measured() -> None:
    rows = [*table(judged={"mean_tokens": 10.0}), {"stage": "round 2", "judged": {"mean_tokens": 16.0}, "trained": {}}]
    assert "grew from 10.0 to 16.0" in stop.signs(rows, small_recipe({}))[0]


def test_human_labels_may_be_learned_by_heart() -> None:
    rows = [*table()[:1], {"stage": "seed", "folder": "rounds/0", "trained": {"accuracy": 1.0}}]
    assert stop.signs(rows, small_recipe({})) == []


def test_the_win_rate_counts_where_the_truth_is_known() -> None:
    rows = table(win_rate=share(0.6), pair_accuracy=share(0.5))
    rows[1]["win_rate"] = share(0.55)
    assert stop.signs(rows, small_recipe({})) == []
    found = stop.best(rows)
    assert found == {"stage": "round 1", "folder": "rounds/1", "measure": "win_rate", "value": 0.6}


def test_the_best_of_equals_is_the_earlier_and_init_is_none() -> None:
    assert (stop.best(table(pair_accuracy=share(0.8))) or {})["stage"] == "seed"
    assert stop.best(table()[:1]) is None


def test_a_run_warns_goes_on_and_names_the_best(tmp_path: Path) -> None:
    recipe = small_recipe(write_data(tmp_path), {"stop.agreement": 0.0})
    summary, _ = run_small(tmp_path / "run", recipe)
    assert [row["stage"] for row in summary["rows"]][-1] == "round 2"
    assert sum("% of the labels, so" in warning for warning in summary["warnings"]) == 2
    assert summary["stopped"] is None
    assert summary["best"]["measure"] == "pair_accuracy"


@pytest.mark.parametrize("every", ["round", "end"])
def test_a_run_stops_on_request_and_ends_as_whole_as_any(tmp_path: Path, every: str) -> None:
    changes = {"stop.agreement": 0.0, "stop.action": "stop", "measure.every": every}
    recipe, events = small_recipe(write_data(tmp_path), changes), list[Event]()
    summary, _ = run_small(tmp_path / "run", recipe, report=events.append)
    assert summary["stopped"] == "round 1"
    assert [row["stage"] for row in summary["rows"]] == ["init", "seed", "round 1"]
    assert summary["rows"][-1]["pair_accuracy"]
    assert [("pair_accuracy" in row) for row in summary["rows"]] == [True, every == "round", True]
    assert any("stopping here (stop.action=stop)" in event.note for event in events)
    kept = (tmp_path / "run/rounds/1/adapter/adapter_model.safetensors").read_bytes()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == kept
    again, run = run_small(tmp_path / "run", recipe)
    assert again == summary
    assert run.computed == []


def test_measuring_at_the_end_alone_changes_no_adapter(tmp_path: Path) -> None:
    files = write_data(tmp_path)
    run_small(tmp_path / "each", small_recipe(files))
    run_small(tmp_path / "end", small_recipe(files, {"measure.every": "end"}))
    for i in range(3):
        name = f"rounds/{i}/adapter/adapter_model.safetensors"
        assert (tmp_path / "each" / name).read_bytes() == (tmp_path / "end" / name).read_bytes()
        assert (tmp_path / "end" / f"rounds/{i}/measure.done.json").exists() == (i == 2)
