"""A study's statistics against numbers one can check by hand or with SciPy, and what its files let through."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from spa_lite.cli.study_table import comparison_tables, markdown
from spa_lite.compare import (
    MEASURES,
    Comparison,
    Difference,
    Outcome,
    compare,
    difference,
    estimate,
    holm,
    meaning,
    measures,
    table_csv,
    to_dict,
    write_results,
)
from spa_lite.errors import RunError
from spa_lite.markdown import literal
from spa_lite.plots import _grid, plots

EVIL = "=cmd|' /C calc'!A0 [red]x $a_{$ </svg> --> 名 \x1b[2J"


def share(value: float) -> dict[str, float]:
    """An interval as summaries hold it; only its value is read."""
    return {"value": value, "low": 0.0, "high": 1.0, "n": 100}


def run_rows(win: float, labels: Sequence[float] = (0.7, 0.6), name: str = "win_rate") -> list[dict[str, Any]]:
    """Rows of a summary with a round per label accuracy; the headline measure climbs to `win`."""
    rows: list[dict[str, Any]] = [
        {"stage": "init", "judged": None},
        {"stage": "seed", "judged": None, name: share(0.5)},
    ]
    for i, right in enumerate(labels, start=1):
        rows.append(
            {
                "stage": f"round {i}",
                name: share(0.5 + (win - 0.5) * i / len(labels)),
                "gold": {"brevity": 0.25, "score": win},
                "length": 20.0 + i,
                "label_accuracy": {"brevity": share(0.0), "score": share(right)},
                "flags": {"flagged": 10 * i, "flagged_wrong": 5, "wrong": 20, "pairs": 100},
                "judged": {"pairs": 100, "mean_tokens": 11.0},
                "trained": {"flagged_share": 0.1 * i, "loss": 0.5},
            }
        )
    return rows


def study(wins: Mapping[str, Sequence[float | None]], **more: Any) -> list[Outcome]:
    """Outcomes of cells whose seeds 0, 1, ... have these win rates; None failed."""
    return [
        Outcome(cell, seed, {} if cell == "base" else {"loss.beta": cell}, None, "the disk is full; make room")
        if win is None
        else Outcome(
            cell, seed, {} if cell == "base" else {"loss.beta": cell}, run_rows(win, **more), "", f"runs/{seed}"
        )
        for cell, seeds in wins.items()
        for seed, win in enumerate(seeds)
    ]


def against_base(wins: Mapping[str, Sequence[float | None]], cell: str = "other") -> Difference:
    """The difference of a cell's win rate to the base."""
    comparison = compare(study(wins), "base", {})
    return next(c for c in comparison.cells if c.name == cell).differences["win_rate"]


# -- numbers of one run --------------------------------------------------------------------------------------------


def test_measures_of_a_run() -> None:
    """The last row is the result; flags are pooled, label accuracies averaged."""
    assert measures(run_rows(0.75)) == {
        "win_rate": 0.75,
        "gold_score": 0.75,
        "gold_brevity": 0.25,
        "label_accuracy": pytest.approx(0.65),
        "flagged_share": pytest.approx(0.15),
        "flagged_wrong_share": pytest.approx(10 / 30),
        "wrong_share": 0.2,
        "length": 22.0,
        "loss": 0.5,
        "win_rate_round_0": 0.5,
        "win_rate_round_1": 0.625,
        "win_rate_round_2": 0.75,
        "label_accuracy_round_1": 0.7,
        "label_accuracy_round_2": 0.6,
    }


def test_measures_of_other_runs() -> None:
    """Without rounds the seed stage is the result; without the truth pairs and sampled lengths are left; no NaN."""
    seed_only: list[dict[str, Any]] = [
        {"stage": "init"},
        {"stage": "seed", "win_rate": share(0.6), "trained": {"loss": math.nan}},
    ]
    assert measures(seed_only) == {"win_rate": 0.6, "win_rate_round_0": 0.6}
    judged = {"judged": {"mean_tokens": 11.0}, "trained": {"flagged_share": 0.0}}
    own: list[dict[str, Any]] = [
        {"stage": "init", "pair_accuracy": share(0.5)},
        {"stage": "round 1", "pair_accuracy": share(0.6), **judged},
    ]
    found = measures(own)
    assert (found["pair_accuracy"], found["pair_accuracy_round_0"], found["length"]) == (0.6, 0.5, 11.0)
    assert "flagged_wrong_share" not in found
    assert measures([{"stage": "init", "pair_accuracy": None}]) == {}


def test_every_measure_has_a_meaning() -> None:
    """Of its own, or of its kind; a round is named and its mean is not claimed."""
    for name in measures(run_rows(0.75)):
        assert meaning(name)
    assert meaning("win_rate") == MEASURES["win_rate"]
    assert meaning("gold_brevity") == MEASURES["gold_CRITERION"]
    assert meaning("label_accuracy_round_2").endswith("; round 2")
    assert "mean over the rounds" not in meaning("label_accuracy_round_2")


# -- statistics ----------------------------------------------------------------------------------------------------


def test_paired_t_test_by_hand() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.464, p = 0.0742; interval 2 +- 4.303 / sqrt 3."""
    found = difference({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert (found.mean, found.sd) == (2.0, 1.0)
    assert found.values == {0: 1.0, 1: 2.0, 2: 3.0}
    assert found.p == pytest.approx(0.0742, abs=5e-5)
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)


def test_against_scipy() -> None:
    """Our interval and p are those of SciPy's own paired test, and the interval holds 0 exactly where p > 0.05."""
    ours, base = [0.61, 0.66, 0.58, 0.70], [0.60, 0.61, 0.57, 0.62]
    found, test = against_base({"base": base, "other": ours}), stats.ttest_rel(ours, base)
    expected = test.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((test.pvalue, expected.low, expected.high))
    alone = estimate(dict(enumerate(ours)))
    expected = stats.ttest_1samp(ours, 0.0).confidence_interval(0.95)
    assert (alone.low, alone.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval() -> None:
    """A mean and a difference, nothing more."""
    found = against_base({"base": [0.5], "other": [0.6]})
    assert found.mean == pytest.approx(0.1)
    assert (found.sd, found.low, found.high, found.p, found.p_holm) == (None, None, None, None, None)
    assert compare(study({"base": [0.5], "other": [0.6]}), "base", {}).comparisons == 0


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_equal_differences_have_no_p(shift: float) -> None:
    """The same shift for every seed, up to rounding: no variation seen, so nothing to test with."""
    base = [0.5, 0.7, 0.6]
    found = against_base({"base": base, "other": [win + shift for win in base]})
    assert found.mean == pytest.approx(shift)
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.sd == pytest.approx(0.0, abs=1e-12)


def test_rounding_is_no_variation() -> None:
    """0.1 + 0.2 against 0.3."""
    found = difference({0: 0.1 + 0.2, 1: 0.4}, {0: 0.3, 1: 0.4})
    assert found.values[0] > found.values[1] == 0.0
    assert (found.low, found.high, found.p) == (None, None, None)


def test_only_common_seeds_are_compared() -> None:
    """A seed that failed in either cell is left out of the difference and counted."""
    wins = {"base": [0.5, None, 0.6, 0.55], "other": [0.6, 0.9, None, 0.7]}
    assert list(against_base(wins).values) == [0, 3]
    comparison = compare(study(wins), "base", {})
    assert [list(cell.estimates["win_rate"].values) for cell in comparison.cells] == [[0, 2, 3], [0, 1, 3]]
    text = markdown(comparison)
    assert "| 3 of 4 |" in text
    assert "(2 seeds) |" in text
    assert "- seed 2 of other: the disk is full; make room\n" in text


def test_the_base_cell_may_fail() -> None:
    """Then there are means and no differences, and the table says so."""
    comparison = compare(study({"base": [None, None], "other": [0.6, 0.7]}), "base", {})
    assert comparison.cells[1].differences == {}
    assert comparison.headline == "win_rate"
    assert "the base cell has no result" in markdown(comparison)


def test_everything_may_fail(tmp_path: Path) -> None:
    """Results are still written; there is nothing to draw, and what was drawn before goes."""
    (tmp_path / "cells.svg").touch()
    comparison = write_results(tmp_path, study({"base": [None], "other": [None]}), "base", {})
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.json"}
    assert markdown(comparison).count("the disk is full") == 2


def test_holm_by_hand() -> None:
    """0.01 x 3, 0.03 x 2, and 0.04 x 1 raised to the one before."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_counts_the_cells_tested() -> None:
    """The base and a cell of one seed are no tests: two are."""
    wins: dict[str, list[float | None]] = {
        "base": [0.50, 0.51, 0.53],
        "a": [0.61, 0.60, 0.65],
        "b": [0.52, 0.58, 0.50],
        "c": [0.9, None, None],
    }
    comparison = compare(study(wins), "base", {})
    assert comparison.comparisons == 2
    found = {cell.name: cell.differences["win_rate"] for cell in comparison.cells[1:]}
    assert found["a"].p is not None
    assert found["a"].p_holm == pytest.approx(2 * found["a"].p)
    assert found["b"].p_holm == found["b"].p
    assert found["c"].p_holm is None


def test_the_headline_is_what_all_have() -> None:
    """Win rates where every run has one, pair accuracy otherwise."""
    wins = study({"base": [0.5, 0.6]})
    assert compare(wins, "base", {}).headline == "win_rate"
    pairs = [Outcome("own", 0, {}, run_rows(0.6, name="pair_accuracy"))]
    assert compare([*wins, *pairs], "base", {}).headline == "pair_accuracy"
    assert compare(pairs, "own", {}).headline == "pair_accuracy"


def test_refusals() -> None:
    """A base that is not there, a seed that came twice."""
    outcomes = study({"one": [0.5]})
    with pytest.raises(RunError, match=r"base cell 'base' is not among .* one of: one"):
        compare(outcomes, "base", {})
    with pytest.raises(RunError, match="cell 'one' has two results for seed 0"):
        compare(outcomes * 2, "one", {})


def test_cells_come_in_natural_order() -> None:
    """The base first, then numbers by value."""
    names = ["lr=10", "lr=1e-3", "lr=2", "base", "lr=5e-4"]
    cells = compare(study({name: [0.5] for name in names}), "base", {}).cells
    assert [cell.name for cell in cells] == ["base", "lr=5e-4", "lr=1e-3", "lr=2", "lr=10"]


WINS = st.lists(st.one_of(st.none(), st.integers(0, 400).map(lambda wins: wins / 400)), min_size=3, max_size=3)
STUDIES = st.dictionaries(st.sampled_from(["base", "a", "b", "c"]), WINS, min_size=2).filter(lambda s: "base" in s)


@settings(max_examples=25, deadline=None)
@given(STUDIES, st.randoms(use_true_random=False))
def test_order_of_outcomes_does_not_matter(wins: dict[str, list[float | None]], random: Any) -> None:
    """Whichever run ends first."""
    outcomes = study(wins)
    expected = compare(outcomes, "base", {})
    random.shuffle(outcomes)
    found = compare(outcomes, "base", {})
    assert (to_dict(found), table_csv(found)) == (to_dict(expected), table_csv(expected))


@settings(max_examples=25, deadline=None)
@given(STUDIES, st.floats(-1.0, 1.0))
def test_a_constant_leaves_differences(wins: dict[str, list[float | None]], constant: float) -> None:
    """What every run gains alike is no difference between cells."""
    moved = {name: [None if win is None else win + constant for win in seeds] for name, seeds in wins.items()}
    before, after = (compare(study(s), "base", {}) for s in (wins, moved))
    for old, new in zip(before.cells, after.cells, strict=True):
        assert old.differences.keys() == new.differences.keys()
        for one, other in zip(old.differences.values(), new.differences.values(), strict=True):
            assert other.mean == pytest.approx(one.mean, abs=1e-9)
            assert (other.p is None) == (one.p is None)
            if one.p is not None:
                assert other.p == pytest.approx(one.p, rel=1e-6, abs=1e-9)


# -- files and tables ----------------------------------------------------------------------------------------------


def evil_study() -> list[Outcome]:
    """Three cells of two seeds; one has a name made to harm and failed once."""
    evil = [Outcome(EVIL, 0, {"judge.by": "@SUM(1)", "loss.beta": -0.5}, run_rows(0.7), folder="+x")]
    evil.append(Outcome(EVIL, 1, {"judge.by": "@SUM(1)", "loss.beta": -0.5}, None, "-1 is [bold]wrong"))
    return study({"base": [0.5, 0.6], "other": [0.7, 0.65]}) + evil


def test_csv_is_no_formula() -> None:
    """Text that starts like one gets an apostrophe; numbers stay numbers; what failed is a line too."""
    lines = list(csv.DictReader(io.StringIO(table_csv(compare(evil_study(), "base", {})))))
    assert len(lines) == 6
    evil = [line for line in lines if line["cell"] == f"'{EVIL}"]
    assert [line["win_rate"] for line in evil] == ["0.7", ""]
    assert (evil[0]["judge.by"], evil[0]["loss.beta"], evil[0]["folder"]) == ("'@SUM(1)", "-0.5", "'+x")
    assert evil[1]["error"] == "'-1 is [bold]wrong"
    assert [line["base"] for line in lines] == ["yes"] * 2 + ["no"] * 4
    assert lines[0]["loss.beta"] == ""


def test_csv_settings_that_are_not_text() -> None:
    """Lists and truth values as JSON; a setting named like a formula is guarded as well."""
    odd = Outcome("odd", 0, {"=a": [1, "b"], "flag": True, "off": None, "tab": "\t=1"}, run_rows(0.5))
    header, line = csv.reader(io.StringIO(table_csv(compare([odd], "odd", {}))))
    assert header[3:7] == ["'=a", "flag", "off", "tab"]
    assert line[3:7] == ['[1, "b"]', "true", "null", "'\t=1"]


def test_json_holds_everything() -> None:
    """Study, settings, statistics, single values and errors; no value that JSON does not know."""
    comparison = compare(evil_study(), "base", {"name": "labels", "seeds": [0, 1]})
    found = json.loads(json.dumps(to_dict(comparison), allow_nan=False))
    assert found["study"] == {"name": "labels", "seeds": [0, 1]}
    assert (found["base"], found["headline"], found["comparisons"]) == ("base", "win_rate", 1)
    cells = {cell["cell"]: cell for cell in found["cells"]}
    assert cells[EVIL]["errors"] == {"1": "-1 is [bold]wrong"}
    assert cells[EVIL]["settings"] == {"judge.by": "@SUM(1)", "loss.beta": -0.5}
    assert cells["base"]["runs"] == {"0": "runs/0", "1": "runs/1"}
    win = cells["other"]["measures"]["win_rate"]
    assert (win["n"], win["values"]) == (2, {"0": 0.7, "1": 0.65})
    assert win["difference"]["values"] == pytest.approx({"0": 0.2, "1": 0.05})
    assert set(win["difference"]) == {"n", "values", "mean", "sd", "low", "high", "p", "p_holm"}
    assert "difference" not in cells["base"]["measures"]["win_rate"]
    assert list(found["measures"]) == list(measures(run_rows(0.5)))


def test_files(tmp_path: Path) -> None:
    """The same outcomes give the same bytes, whatever their order; SVGs hold names as text, whatever they say."""
    contents = []
    for place, outcomes in (("one", evil_study()), ("two", evil_study()[::-1])):
        folder = tmp_path / place
        folder.mkdir()
        write_results(folder, outcomes, "base", {"name": "<script>"})
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    plotted = {"cells.svg", "cells.png", "rounds.svg", "rounds.png"}
    assert set(contents[0]) == {"results.csv", "results.json"} | plotted
    assert contents[0] == contents[1]
    for name in plotted:
        if name.endswith(".svg"):
            tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(contents[0][name]).iter()}
            assert "script" not in tags
            assert "path" in tags
        else:
            assert contents[0][name].startswith(b"\x89PNG")


def crossed(names: str, given: Mapping[str, Any] | None = None) -> Comparison:
    """A study whose cells' names say what they change (`a1`, `a1b2`) from the base cell; a2b2 failed."""
    outcomes = [Outcome("base", 0, {}, [{"stage": "seed", "win_rate": share(0.4)}])]
    for name in names.split():
        changes = {name[i]: int(name[i + 1]) for i in range(0, len(name), 2)}
        outcomes.append(Outcome(name, 0, changes, None if name == "a2b2" else outcomes[0].rows))
    return compare(outcomes, "base", {"given": given or {}})


def test_two_settings_make_a_grid(tmp_path: Path) -> None:
    """With the base where it is one of the combinations, else without; a failed cell has its place."""
    inside, outside = crossed("a1 b1 a1b1", {"a": 0, "b": 0}), crossed("a1b1 a1b2 a2b1 a2b2")
    assert {path.name for path in plots(tmp_path, inside)} == {"cells.svg", "cells.png", "grid.svg", "grid.png"}
    base, a1, a1b1, b1 = inside.cells
    spots = {("0", "0"): base, ("0", "1"): a1, ("1", "1"): a1b1, ("1", "0"): b1}
    assert _grid(inside) == ("b", "a", ["0", "1"], ["0", "1"], spots)
    found = _grid(outside)
    assert found is not None
    assert sorted(found[4]) == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    plots(tmp_path, outside)
    half = _grid(crossed("a1 a2 a1b1 a2b1"))
    assert half is not None
    assert (half[2], half[3], len(half[4])) == (["1", "as given"], ["1", "2"], 4)
    named = _grid(crossed("a1 b1 a1b1"))
    assert named is not None
    assert named[2] == ["1", "as given"]


@pytest.mark.parametrize("names", ["a1 b1", "a1 a2", "a1 b1 c1 a1b1", "a1b1", "a2b2", "a1 b1 b2 a1b1"])
def test_what_is_no_grid(names: str) -> None:
    """One change at a time, one setting, three, one cell, no result, a combination left out."""
    assert _grid(crossed(names)) is None


def test_csv_tells_the_values_as_given() -> None:
    """Where they are known."""
    lines = list(csv.DictReader(io.StringIO(table_csv(crossed("a1 b1", {"a": 7, "b": 8})))))
    assert [(line["a"], line["b"]) for line in lines] == [("7", "8"), ("1", "8"), ("7", "1")]


def rendered(comparison: Comparison) -> str:
    """The tables as a terminal would show them."""
    console = Console(file=io.StringIO(), width=250, force_terminal=True, highlight=False)
    for table in comparison_tables(comparison):
        console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_tables_escape_names_and_errors() -> None:
    """Markup and control characters are shown, not obeyed."""
    text = rendered(compare(evil_study(), "base", {"name": "[blink]study"}))
    assert "[red]x" in text
    assert "[bold]wrong" in text
    assert "[blink]study" in text
    assert "\\u001b[2J" in text
    assert "\x1b[2J" not in text


def test_table_and_markdown_say_the_same() -> None:
    """The columns that have something in them, a line per cell, and how to read them."""
    wins = {"base": [0.50, 0.51, 0.53], "a": [0.61, 0.60, 0.65], "b": [0.52, 0.58, 0.50]}
    comparison = compare(study(wins), "base", {"name": "two_cells"})
    lines = markdown(comparison).splitlines()
    assert lines[0] == "**two_cells: win rate vs init %**"
    assert lines[2].startswith(
        "| cell | seeds | mean | sd | 95 % interval | difference to base | p | Holm p | length |"
    )
    assert lines[4] == "| base | 3 | 51.3 | 1.5 | [47.5, 55.1] | base | - | - | 22.0 | 65.0 |"
    assert lines[5] == "| a | 3 | 62.0 | 2.6 | [55.4, 68.6] | +10.7 [+6.9, +14.5] | 0.007 | 0.014 | 22.0 | 65.0 |"
    assert "Holm p for 2 comparisons;" in lines[-1]
    shown = rendered(comparison)
    assert all(part in shown for part in lines[5].strip("| ").split(" | "))
    without = [Outcome("base", 0, {}, [{"stage": "init"}, {"stage": "seed", "win_rate": share(0.5)}])]
    assert "length" not in markdown(compare(without, "base", {}))


def test_markdown_is_literal() -> None:
    """What would be markup is escaped, names of settings stay readable."""
    assert literal("seed_stage.learning_rate=1e-3") == "seed_stage.learning_rate=1e-3"
    assert literal("a|b <b>&amp; [x](y) _z_ `c`\n") == r"a\|b &lt;b\>&amp;amp; \[x\](y) \_z\_ \`c\`\\u000a"
