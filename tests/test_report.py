"""The report: what it shows of a run, of several, of one that is not finished; and that text stays text."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from spa_lite import prepare
from spa_lite.cleanup import belongings
from spa_lite.cli import main as cli
from spa_lite.errors import RunError
from spa_lite.figures import inline_svg, style
from spa_lite.inventory import place_of
from spa_lite.report import figures, tables, write_report
from spa_lite.report.collect import Told, read_runs
from spa_lite.report.drawing import STYLE, axes_of, legend_of
from spa_lite.report.evaluations import eval_sheet
from spa_lite.report.examples import judgements, sampled, side_by_side
from spa_lite.report.looks import groups, looks
from spa_lite.report.page import shown, table_csv
from spa_lite.report.tables import differences
from tests.small import load, run_small, small_recipe, write_data

NASTY = (
    '<script>document.title="pwned"</script><img src=x onerror=\'document.title="pwned"\'></style></script>'
    "<svg onload='document.title=\"pwned\"'>{{ 7 * 7 }}\x1b[31mred\x07 \u202eright to left\u2066"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy run of two rounds without gold."""
    folder = tmp_path_factory.mktemp("report")
    run_small(folder / "toy-run", small_recipe(write_data(folder)))
    return folder / "toy-run"


FEW = (figures.pair_accuracy, figures.flagged)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two figures only: the rest of the page is what is looked at."""
    monkeypatch.setattr(figures, "FIGURES", FEW)


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run that may be changed."""
    return Path(shutil.copytree(run, folder))


def gold_like(run: Path) -> None:
    """Give every stage of a run what only runs with a known truth have."""
    for i, marker in enumerate([run / "init/measure.done.json", *sorted(run.glob("rounds/*/measure.done.json"))]):
        done = json.loads(marker.read_text())
        rate = {"value": 0.5 + 0.05 * i, "low": 0.4 + 0.05 * i, "high": 0.6 + 0.05 * i, "n": 40}
        done["summary"] |= {"win_rate": rate, "gold": {"courtesy": 0.5, "score": 0.6}, "length": 9.0 + i}
        done["summary"] |= {"label_accuracy": {"score": rate}} if i > 1 else {}
        done["summary"] |= {"flags": {"flagged": 4, "flagged_wrong": 3, "wrong": 5, "pairs": 20}} if i > 1 else {}
        marker.write_text(json.dumps(done))


def drawn(run: Told | list[Told]) -> dict[str, Any]:
    """The figures of a run, or several, by name."""
    with style(**STYLE):
        return {one.name: one for one in figures.figures(run if isinstance(run, list) else [run])}


# -- what is read --------------------------------------------------------------------------------------------------


def test_a_run_is_read_from_its_folder(run: Path) -> None:
    (told,) = read_runs([run])
    assert [stage.name for stage in told.stages] == ["init", "seed", "round 1", "round 2"]
    assert told.unfinished == ""
    assert told.problems == []
    summary = json.loads((run / "summary.json").read_text())
    for stage, row in zip(told.stages, summary["rows"], strict=True):
        assert {key: stage.row[key] for key in row} == row
    judged = told.stages[2].judgements
    assert len(judged) == 20
    assert all(j.margin is not None and j.margin >= 0 for j in judged)  # towards the judge's own labels
    assert sum(j.flagged for j in judged) == summary["rows"][2]["trained"]["flagged"] > 0


def test_an_unfinished_run_is_shown_as_far_as_it_is(run: Path, tmp_path: Path, few: None) -> None:
    cut = copied(run, tmp_path / "cut")
    for name in ("summary.json", "rounds/2/train.done.json", "rounds/2/measure.done.json"):
        (cut / name).unlink()
    part = cut / "rounds/2/train.part"
    part.mkdir()
    lines = (cut / "rounds/2/metrics.jsonl").read_bytes().splitlines(keepends=True)
    (part / "metrics.jsonl").write_bytes(lines[0] + lines[1][:40])  # killed within a line
    (cut / "rounds/2/metrics.jsonl").unlink()
    (told,) = read_runs([cut])
    assert told.unfinished == "finished so far: round 2 judge (of 2 rounds); begun: round 2 train"
    assert [step["step"] for step in told.stages[-1].steps] == [1]
    page = write_report([cut]).read_text()
    assert "This run is not finished." in page
    assert "finished so far: round 2 judge" in page


def test_older_and_damaged_folders_still_give_a_report(run: Path, tmp_path: Path, few: None) -> None:
    old = copied(run, tmp_path / "old")
    for marker in old.rglob("*.done.json"):
        done = json.loads(marker.read_text())
        marker.write_text(json.dumps({"key": done["key"], "summary": done["summary"]}))
    for metrics in old.rglob("metrics.jsonl"):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        new = {"margins", "extrapolated_margins", "logp_chosen", "logp_rejected"}
        metrics.write_text("".join(json.dumps({k: v for k, v in r.items() if k not in new}) + "\n" for r in rows))
    (old / "rounds/1/judgements.jsonl").write_bytes(b"not json\n")
    (old / "rounds/1/timings.json").write_bytes(b"{")
    (old / "recipe.yaml").write_text("no.such.setting: 1\n")
    said: list[str] = []
    page = write_report([old], tell=said.append).read_text()
    assert "Stage by stage" in page
    assert [line.partition(": ")[2] for line in said] == [
        said[0].partition(": ")[2],
        "rounds/1/timings.json is damaged and was left out",
        "rounds/1/judgements.jsonl: lines that cannot be read: 1",
    ]
    assert "no.such.setting" in said[0]


def test_the_command_prints_where_the_page_lies(
    run: Path, few: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the beginning of a name, and without one the newest."""
    monkeypatch.chdir(run.parent)
    for words in (["toy-r"], []):
        monkeypatch.setattr(sys, "argv", ["spa-lite", "report", *words, "--root", ".", "--no-credit"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert Path(capfd.readouterr().out.strip()) == Path("toy-run/report/report.html")
    assert (run / "report/flagged.png").exists()
    place = place_of(run, "toy-run")
    assert place is not None
    assert run / "report" in belongings(place)  # it goes when the run goes


def test_no_run_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="neither a run nor a study"):
        write_report([tmp_path])


# -- figures -------------------------------------------------------------------------------------------------------


def test_without_gold_nothing_speaks_of_gold(run: Path) -> None:
    (told,) = read_runs([run])
    found = drawn(told)
    assert set(found) == {
        "pair_accuracy", "length", "logprobs", "margins", "displacement", "loss", "flagged", "threshold", "seconds"
    } | ({"memory"} & set(found))  # fmt: skip
    assert found["flagged"].title == "Flagged pairs"
    assert {"q05", "q50", "q95", "tau"} <= found["threshold"].table[0].keys()
    assert sum(row["not known, or equal"] for row in found["margins"].table) == sum(
        not j.identical for stage in told.rounds for j in stage.judgements
    )


def test_with_gold_win_rate_labels_and_flags_are_drawn(run: Path, tmp_path: Path) -> None:
    known = copied(run, tmp_path / "known")
    gold_like(known)
    (told,) = read_runs([known])
    found = drawn(told)
    assert {"win_rate", "labels", "gold"} <= set(found)
    assert [round(row["value"]) for row in found["win_rate"].table] == [50, 55, 60, 65]
    assert found["flagged"].table[0]["flagged_wrong"] == 3
    assert found["flagged"].table[0]["wrong_share_of_all"] == 25.0


def test_a_figure_follows_the_theme_and_keeps_its_ids_apart(run: Path) -> None:
    (told,) = read_runs([run])
    with style(**STYLE):
        figure = figures.pair_accuracy([told])
        assert figure is not None
        first, second = (inline_svg(figure.figure, name, figure.title, NASTY) for name in ("one", "two"))
    trees = [ElementTree.fromstring(svg) for svg in (first, second)]
    ids = [{element.get("id") for element in tree.iter() if element.get("id")} for tree in trees]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert "currentColor" in first
    assert "var(--series-1)" in first
    assert "#1b1b1f" not in first
    text = [element.text for element in trees[0].iter("{http://www.w3.org/2000/svg}text")]
    assert "round 2" in text  # text is text
    assert trees[0].find("{http://www.w3.org/2000/svg}title") is not None
    used = {v.partition("#")[2].rstrip(")") for e in trees[0].iter() for v in e.attrib.values() if "#one-" in v}
    assert used <= ids[0]


# -- several runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", [13, 16, 24, 27, 30])
def test_a_legend_fits_into_its_figure(letters: int) -> None:
    with style(**STYLE):
        figure, axes = axes_of(2.8)
        for i in range(4):
            axes.plot([0, 1], [0, i], label=f"{i}_rounds-2a07eb24 (3 seeds), other"[:letters])
        legend_of(figure, axes)
        figure.draw_without_rendering()
        assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


def test_several_runs_are_compared(run: Path, tmp_path: Path, few: None) -> None:
    other = copied(run, tmp_path / "other")
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("window: 8", "window: 9"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/loss.csv").touch()
    page = write_report([run, other], tmp_path / "out").read_text()
    assert not (tmp_path / "out/loss.csv").exists()  # an earlier report's, and not this one's
    assert "2 runs compared" in page
    assert "refine.window" in page
    with (tmp_path / "out/pair_accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"toy-run", "other"}
    assert len(rows) == 8


def test_runs_that_differ_in_many_settings_stand_in_columns(run: Path, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "other")
    recipe = (other / "recipe.yaml").read_text()
    for old, new in (("seed: 0", "seed: 1"), ("window: 8", "window: 9"), ("K: 0.3", "K: 0.2")):
        assert old in recipe
        recipe = recipe.replace(old, new)
    (other / "recipe.yaml").write_text(recipe)
    told = read_runs([run, other])
    few = differences(told)
    assert [row[0] for row in few.rows] == ["toy-run", "other"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "WIDE", 4)
        turned = differences(told)
    assert turned.columns == ["", "toy-run", "other"]
    assert [row[0] for row in turned.rows] == list(few.columns[1:])
    assert list(turned.rows[0]) == ["seed", "0", "1"]


def test_runs_that_differ_in_the_seed_alone_share_a_colour(run: Path) -> None:
    (told,) = read_runs([run])
    runs = [
        Told(f"lr{rate}-seed{seed}", told.folder, settings={"seed": seed, "lr": rate})
        for rate in (1, 2)
        for seed in range(4)
    ]
    assert [(name, len(members)) for name, members in groups(runs)] == [("lr1 (4 seeds)", 4), ("lr2 (4 seeds)", 4)]
    assert len({one.colour for one in looks(runs).values()}) == 2
    assert [one.entry for one in looks(runs).values() if one.entry] == ["lr1 (4 seeds)", "lr2 (4 seeds)"]
    assert len({one.colour for one in looks(runs[:4]).values()}) == 4


def test_a_study_stands_for_its_cells(run: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.json").write_text("{}")
    with pytest.raises(RunError, match="no cells"):
        read_runs([study])
    for cell in ("a", "b"):
        copied(run, study / "cells" / cell)
    assert [told.name for told in read_runs([study, study / "cells/a"])] == ["a", "b"]


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", (figures.pair_accuracy, figures.margins, figures.length))
    for name in ("one", "two"):
        write_report([run], tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"report.html", "stages.csv", "margins.csv", "margins.png"} <= set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    page = (tmp_path / "one/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert "<script" not in page


def test_credit_sums_to_the_log_ratio(run: Path, tmp_path: Path, few: None) -> None:
    (told,) = read_runs([run])
    pairs = judgements(told)
    assert [one.kind for one in pairs] == [*["most certain"] * 3, *["least certain"] * 3] * 2
    page = write_report([run], tmp_path / "out", load)
    assert 'class="tokens"' in page.read_text()
    from spa_lite.report.examples import credited

    for one in credited(pairs, load):
        for _, side, _, tokens in one.sides:
            assert tokens is not None
            assert side.policy is not None
            assert side.reference is not None
            assert sum(c.logratio for c in tokens) == pytest.approx(side.policy - side.reference, abs=1e-4)


def test_credit_that_cannot_be_computed_is_said(run: Path, tmp_path: Path, few: None) -> None:
    gone = copied(run, tmp_path / "gone")
    shutil.rmtree(gone / "rounds/0/adapter")
    said: list[str] = []
    write_report([gone], backend=load, tell=said.append)
    assert len(said) == 1
    assert "token credit was not computed" in said[0]
    assert "rounds/0/adapter is missing" in said[0]


def test_equal_answers_are_shown_once(run: Path, tmp_path: Path) -> None:
    known = copied(run, tmp_path / "known")
    line = {"id": "h0", "messages": [{"role": "user", "content": "hm?"}], "prompt_ids": [1]}
    for at, text in (("init", "same"), ("rounds/0", "same"), ("rounds/2", "other")):
        answer = line | {"completions": [{"ids": [1, 2], "text": text, "ended": "eos"}]}
        (known / at / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    (example,) = side_by_side(read_runs([known]))
    assert [(cell.title, cell.text) for cell in example.cells] == [("init, seed", "same"), ("round 2", "other")]


def test_answers_that_a_run_did_not_keep_are_sampled(run: Path, tmp_path: Path, few: None) -> None:
    (told,) = read_runs([run])
    assert side_by_side([told]) == []
    loaded: list[Any] = []

    def counted(recipe: Any) -> Any:
        loaded.append(recipe)
        return load(recipe)

    page = write_report([run], tmp_path / "out", counted).read_text()
    assert len(loaded) == 1, "one model for credit and answers"
    examples = sampled(told, load)
    assert told.recipe is not None
    held_out = [pair.messages for pair in prepare.read(told.recipe).held_out_pairs]
    assert [example.messages for example in examples] == held_out[:4]
    assert {cell.title for example in examples for cell in example.cells} <= {"init", "round 2", "init, round 2"}
    assert examples == sampled(told, load)  # the same every time
    assert "Answers, side by side" in page
    assert told.problems == []


def test_answers_that_cannot_be_sampled_are_said(run: Path, tmp_path: Path) -> None:
    moved = copied(run, tmp_path / "moved")
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace("pairs.jsonl", "gone.jsonl"))
    (told,) = read_runs([moved])
    assert sampled(told, load) == []
    assert "answers before and after were not sampled" in told.problems[0]
    assert "gone.jsonl" in told.problems[0]


def test_what_eval_found_is_a_table(run: Path, tmp_path: Path, few: None) -> None:
    known = copied(run, tmp_path / "evaluated")
    share = {"value": 0.75, "low": 0.5, "high": 0.875, "n": 12}
    controlled = {"name": "LC (no difficulty)", "interval": share | {"value": 0.5625}, "note": ""}
    results: list[Any] = [
        {"kind": "held-out pairs", "title": "held-out pairs",
         "stages": {"seed": {"accuracy": share, "chosen": 0.25, "rejected": -1.5}}},
        {"kind": "head-to-head", "title": f"{NASTY} against init", "win_rate": share, "length_controlled": controlled},
        {"kind": "alpaca", "title": "alpaca: x", "result": {"win_rate": share, "length_controlled": controlled}},
        {"kind": "alpaca", "title": "answers only"},
        {"kind": "mt-bench", "title": "mt-bench: x", "result": {"average": share | {"value": 6.5}}},
        {"kind": "gsm8k", "title": "gsm8k: x", "sides": [{"name": "x"}],
         "rules": {"strict": {"sides": [{"accuracy": share}]}}},
        {"kind": "odd"},
    ]  # fmt: skip
    (known / "eval").mkdir()
    (known / "eval/eval.json").write_text(json.dumps({"format": 1, "results": results}))
    (told,) = read_runs([known])
    rows = eval_sheet(told).rows
    assert rows[0][:3] == ["held-out pairs, seed", "accuracy %", "75.0 [50.0, 87.5]"]
    assert rows[0][3:] == ["12", "chosen 0.250, rejected -1.500"]
    assert rows[2] == ["alpaca: x", "win rate %", "75.0 [50.0, 87.5]", "12", "LC (no difficulty) 56.2 [50.0, 87.5]"]
    assert [row[0] for row in rows[3:]] == ["mt-bench: x", "gsm8k, strict: x"]
    assert told.problems == ["eval/eval.json: a result cannot be read and was left out"]
    seen = Seen(write_report([known]).read_text())
    assert "Evaluations" in seen.text
    assert not {"script", "img"} & seen.tags
    (known / "eval/eval.json").write_text("[")
    assert "eval/eval.json is damaged and was left out" in write_report([known]).read_text()


def test_csv_cells_are_no_formulas() -> None:
    assert table_csv(["a"], [["=1+1"], ["@x"], [-1.5], [None]]) == b"a\n'=1+1\n'@x\n-1.5\n\"\"\n"


def test_control_codes_are_shown() -> None:
    assert shown("a\x1b[31m\u202eb\nc\td") == "a\\u001b[31m\\u202eb\nc\td"


# -- text stays text -----------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def nasty(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run in which every text is an attack; beside it, in `several`, one of two such runs."""
    top = tmp_path_factory.mktemp("nasty")
    folder = copied(run, top / NASTY.replace("/", "∕").replace("\x07", "")[:80])
    gold_like(folder)
    for path in folder.rglob("judgements.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["id"] = NASTY
            row["messages"] = [{"role": NASTY, "content": NASTY}]
            row["a"]["text"] = row["b"]["text"] = NASTY
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    answer = {"id": NASTY, "messages": [{"role": "user", "content": NASTY}]}
    answer["completions"] = [{"ids": [1], "text": NASTY, "ended": NASTY}]
    for at in ("init", "rounds/0", "rounds/2"):
        (folder / at / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"warnings": [NASTY], "notes": [NASTY], "stopped": NASTY}
    summary["best"] = {"stage": NASTY, "folder": NASTY, "measure": NASTY, "value": 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("system: null", f"system: {json.dumps(NASTY)}"))
    for marker in folder.rglob("*.done.json"):
        done = json.loads(marker.read_text())
        marker.write_text(json.dumps(done | {"made_by": {"backend": NASTY, "device": NASTY, "chip": NASTY}}))
    other = copied(folder, top / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", FEW)
        write_report([folder, other], top / "several")
        return write_report([folder], top / "one")


def test_model_text_is_shown_and_never_obeyed(nasty: Path) -> None:
    for path in (nasty, nasty.parent.parent / "several/report.html"):
        page = path.read_text()
        seen = Seen(page)
        assert not {"script", "img", "iframe", "object", "link", "a", "base"} & seen.tags
        assert not {name for name in seen.attributes if name.startswith("on")}
        assert (
            NASTY.replace("\x1b", "\\u001b").replace("\x07", "\\u0007").replace("\u202e", "\\u202e")[:-1] in seen.text
        )
        assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(page)
    for table in nasty.parent.glob("*.csv"):
        rows = csv.reader(table.read_text().splitlines())
        assert not any(cell[:1] in "=@" for row in rows for cell in row if cell)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_nothing_runs_in_a_real_browser(nasty: Path, tmp_path: Path) -> None:
    def dom(path: Path) -> str:
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000"]
        profile = [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.resolve().as_uri()]
        return subprocess.run([*command, *profile], capture_output=True, text=True, check=True, timeout=60).stdout

    unsafe = tmp_path / "unsafe.html"
    unsafe.write_text(f"<!doctype html><title>calm</title>{NASTY}")
    assert "<title>pwned</title>" in dom(unsafe)  # this browser does run what is there
    page = dom(nasty)
    assert "<title>pwned" not in page
    assert "spa-lite report</title>" in page
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<svg") == 2
