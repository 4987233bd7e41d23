"""`spa-lite runs`: what it says about folders as crashes, copies and accidents leave them, and what it deletes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spa_lite import cleanup, files
from spa_lite.checkpoint import KEPT
from spa_lite.cleanup import clean, rubbish
from spa_lite.cli.render import fail
from spa_lite.cli.runs import runs, size
from spa_lite.errors import RunError, SpaError
from spa_lite.events import Event
from spa_lite.inventory import Place, overview, places, read, resolve, size_of
from spa_lite.library import Library
from spa_lite.lock import locked
from spa_lite.spa import align
from spa_lite.store import Run
from tests.small import results, small_recipe, start, write_data
from tests.test_cli import call as main


class Killed(BaseException):
    """The power went."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first`, finished; `second`, which takes from it what is equal; `killed` in the last round's training."""
    root = tmp_path_factory.mktemp("made") / "runs"
    data = write_data(root.parent, pairs=20, prompts=16)

    def killed(event: Event) -> None:
        if event.stage == "round 2 train" and event.done == 2:
            raise Killed

    def run(name: str, report: Callable[[Event], None] = lambda event: None, **changes: Any) -> None:
        recipe = small_recipe(data, {"train.batch_size": 2, **{k.replace("__", "."): v for k, v in changes.items()}})
        models, encoded = start(recipe)
        align(models, recipe, encoded, Run(root / name, Library([root])), report)

    run("first")
    run("second", refine__alpha=0.4)
    with pytest.raises(Killed):
        run("killed", killed, loss__beta=0.2, train__save_every=1)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these runs to do anything with: `runs/` of the current folder, with hard links as they were."""
    clone(made, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def clone(source: Path, target: Path) -> None:
    """Copy a folder of runs; names that are one file there are one file here."""
    seen: dict[int, Path] = {}

    def copy(a: str, b: str) -> None:
        inode = Path(a).stat().st_ino
        if inode in seen:
            os.link(seen[inode], b)
        else:
            shutil.copy2(a, b)
            seen[inode] = Path(b)

    shutil.copytree(source, target, copy_function=copy)


def call(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `spa-lite runs ...`, without building the other commands first."""
    try:
        code = runs(list(args), standalone_mode=False) or 0
    except SpaError as error:
        fail(str(error))
        code = 1
    return code, *capfd.readouterr()


def bytes_below(root: Path) -> int:
    """What the disk holds: every file once."""
    return sum({s.st_ino: s.st_size for p in root.rglob("*") if p.is_file() for s in [p.stat()]}.values())


def listed(capfd: pytest.CaptureFixture[str], *args: str) -> dict[str, dict[str, Any]]:
    """The list as a program reads it, by name."""
    code, out, err = call(capfd, "--json", *args)
    assert code == 0, err
    return {line["name"]: line for line in json.loads(out)}


# -- what there is -------------------------------------------------------------------------------------------------


def test_the_list(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """State, result, and what is shared: counted by keys, and in bytes by what removing a run really frees."""
    found = listed(capfd)
    assert {name: line["state"] for name, line in found.items()} == {
        "first": "finished",
        "second": "finished",
        "killed": "stopped",
    }
    assert (found["first"]["recipe"], found["first"]["scale"], found["first"]["model"]) == ("spa", "paper", "toy")
    assert (found["first"]["stages"], found["first"]["of"]) == (11, 11)
    assert (found["killed"]["stages"], found["killed"]["of"]) == (9, 11)
    assert found["killed"]["stage"] == "rounds/2 train"
    assert found["first"]["result"]["measure"] == "pair_accuracy"
    assert found["first"]["shares"] == {"second": 5, "killed": 1}, "init, seed, its measure, sample and judge; init"
    before = bytes_below(root)
    shutil.rmtree(root / "second")
    assert before - bytes_below(root) == found["second"]["own_bytes"] < found["second"]["bytes"]
    code, out, err = call(capfd)
    assert code == 0, err
    assert "rounds/2 train, step 2 of 4" in " ".join(out.replace("│", " ").split())
    assert "first shares 1 stage with killed" in out


def test_a_run_at_work(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is named with its process, and neither removed nor cleaned up."""
    (root / "killed/rounds/1/train.done.json.damaged").write_text("x")
    with locked(root / "killed"):
        line = listed(capfd)["killed"]
        assert (line["state"], line["stage"]) == ("running", "rounds/2 train")
        assert f"process {os.getpid()}" in line["by"]
        code, _, err = call(capfd, "rm", "killed", "--yes")
        assert code == 1
        assert "in use by process" in err
        code, _, err = call(capfd, "gc", "--yes")
        assert code == 0
        assert "killed is in use by process" in err
    assert (root / "killed/rounds/1/train.done.json.damaged").exists()
    assert listed(capfd)["killed"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("name", "content", "state", "problem"),
    [
        ("run.json", '{"form', "damaged", "run.json is damaged"),
        ("run.json", "[1]", "damaged", "run.json is damaged"),
        ("run.json", '{"format": 99}', "other version", "newer version of spa-lite (format 99"),
        ("run.json", None, "other version", "older version of spa-lite (format 1"),
        ("recipe.yaml", "lozz: 1", "finished", "there is no setting 'lozz'"),
        ("recipe.yaml", "[", "finished", "not valid YAML"),
        ("summary.json", '"x"', "stopped", "summary.json is damaged"),
        ("summary.json", '{"rows": [{"win_rate": 3}]}', "stopped", "summary.json is damaged"),
        ("rounds/1/train.done.json", "\x00", "stopped", "rounds/1/train.done.json is damaged"),
        ("rounds/1/train.done.json", '{"key": 1}', "stopped", "rounds/1/train.done.json is damaged"),
        (
            "rounds/1/train.done.json",
            '{"key": "k", "made_by": {}, "summary": {}, "reads": {}, "checksums": {"../../../x": "0"}}',
            "stopped",
            "names files outside its folder",
        ),
        ("rounds/1/train.part/begun.json", "3", "finished", "begun.json is damaged"),
        ("rounds/1/timings.json", "[]", "finished", None),
    ],
)  # fmt: skip
def test_damage_is_named(
    root: Path, capfd: pytest.CaptureFixture[str], name: str, content: str | None, state: str, problem: str | None
) -> None:
    """A run of another version or with a file that cannot be read is listed as such; nothing breaks."""
    path = root / "first" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    line = listed(capfd)["first"]
    assert line["state"] == state
    assert (problem or "") in " ".join(line["problems"])
    assert bool(line["problems"]) == bool(problem)
    for args in ([], ["show", "first"], ["gc"]):
        code, _, err = call(capfd, *args)
        assert code == 0, err


def test_nothing_to_list(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An empty folder is no error; one that is not there is."""
    (root / "not a run").mkdir()
    for run in ("first", "second", "killed"):
        shutil.rmtree(root / run)
    code, out, err = call(capfd)
    assert (code, out) == (0, "")
    assert "there are no runs below runs" in err
    assert call(capfd, "--root", "nowhere")[0] == 1


def test_a_study_is_one_line(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its cells are runs when asked for; names in files are shown, not obeyed."""
    (root / "study/cells").mkdir(parents=True)
    (root / "study/study.json").write_text("{}")
    for run in ("second", "killed"):
        (root / run).rename(root / "study/cells" / f"[red]{run}\x1b[2J")
    found = listed(capfd)
    assert set(found) == {"first", "study"}
    assert (found["study"]["cells"], found["study"]["state"]) == (2, "1 stopped, 1 finished")
    assert found["first"]["shares"] == {"study": 5}
    assert size_of([root / "study"]).own == found["study"]["own_bytes"]
    assert len(listed(capfd, "--all")) == 3
    for args in (["--all"], ["show", "study"]):
        code, out, err = call(capfd, *args)
        assert code == 0, err
        assert "\x1b[2J" not in out + err
        assert "[red]second" in out.replace("\n", "")


def test_show(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Settings that differ, stages with their cost, what is unfinished, where things are."""
    code, out, err = call(capfd, "show", "second", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["differences"]["refine.alpha"] == {"value": 0.4, "default": 0.1}
    assert "loss.beta" not in found["differences"]
    assert found["made_by"] == ["toy/cpu/float64/64"]
    stages = {stage["stage"]: stage for stage in found["finished"]}
    assert stages["rounds/0 seed"]["shared"] == ["first"]
    assert stages["rounds/0 seed"]["seconds"] is None, "it was taken from elsewhere"
    assert stages["rounds/1 train"]["shared"] == []
    assert found["shares"] == {"first": 5, "killed": 1}
    assert stages["rounds/1 train"]["seconds"] >= 0
    assert stages["rounds/1 train"]["bytes"] > 500_000
    assert "runs/second/rounds/1/samples.jsonl" in found["paths"]
    (part,) = json.loads(call(capfd, "show", "killed", "--json")[1])["unfinished"]
    assert (part["stage"], part["step"], part["of"]) == ("rounds/2 train", 2, 4)
    code, out, _ = call(capfd, "show", "killed")
    assert code == 0
    assert "step 2 of 4" in out
    assert "not begun" in out
    assert "made of" in out
    assert "dpo seed | pool" in out


def test_show_check_finds_damaged_files(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A flipped byte or a missing file is named, with exit code 1."""
    assert call(capfd, "show", "second", "--check")[0] == 0
    path = root / "second/rounds/2/samples.jsonl"
    path.write_bytes(b"X" + path.read_bytes()[1:])
    (root / "second/rounds/2/judgements.jsonl").unlink()
    code, _, err = call(capfd, "show", "second", "--check")
    assert code == 1
    assert "rounds/2/samples.jsonl is damaged" in err
    assert "rounds/2/judgements.jsonl is missing" in err
    assert call(capfd, "show", "second")[0] == 0, "only --check reads everything"


def test_names(root: Path) -> None:
    """A path, a name, the beginning of one; the nearest of an unknown one."""
    (root / "second").rename(root / "fires")
    assert resolve("first", root).name == "first"
    assert resolve("k", root).name == "killed"
    assert resolve("runs/killed/", root).folder == Path("runs/killed")
    for word, said in (
        ("fi", "begins 2 names"),
        ("fisrt", "did you mean first?"),
        ("runs", "neither"),
        ("", "neither"),
    ):
        with pytest.raises(RunError, match=said):
            resolve(word, root)


# -- removing ------------------------------------------------------------------------------------------------------


def test_rm_asks(root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes with --dry-run, without an answer, or with the wrong one; where nobody can answer, the exit is 2."""
    own = listed(capfd)["second"]["own_bytes"]
    code, _, err = main(capfd, "runs", "rm", "second", "--dry-run")
    assert code == 0
    assert f"of which {size(own)} would be freed" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    code, _, err = main(capfd, "runs", "rm", "second")
    assert code == 2
    assert "--yes" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert main(capfd, "runs", "rm", "second")[0] == 0
    assert len(places(root)) == 3


def test_rm_removes_what_was_named_and_no_more(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What others share stays whole; files that spa-lite did not write stay; links are not followed."""
    (root / "second/thesis.tex").write_text("x")
    (root / "link").symlink_to("first")
    (root / "first/rounds/9").symlink_to(Path("precious").absolute())
    Path("precious/train.part").mkdir(parents=True)
    before, freed = bytes_below(root), size_of(cleanup.belongings(resolve("second", root))).own
    code, _, err = call(capfd, "rm", "second", "sec", "--yes")
    assert code == 0, err
    assert "kept thesis.tex" in err
    assert before - bytes_below(root) == freed
    assert [path.name for path in (root / "second").rglob("*")] == ["thesis.tex"]
    assert call(capfd, "show", "first", "--check")[0] == 0
    assert call(capfd, "rm", "runs/link", "--yes")[0] == 1
    assert call(capfd, "rm", "first", "killed", "--yes")[0] == 0
    assert {path.name for path in root.iterdir()} == {"second", "link"}
    assert Path("precious/train.part").exists()


def test_rm_of_a_study(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All its cells go, unless somebody works on one of them."""
    (root / "study/cells").mkdir(parents=True)
    for name in ("study.json", "results.csv", "results.json", "cells.svg"):
        (root / "study" / name).write_text("{}")
    for run in ("second", "killed"):
        (root / run).rename(root / "study/cells" / run)
    with locked(root / "study/cells/killed"):
        assert call(capfd, "rm", "study", "--yes")[0] == 1
    assert call(capfd, "rm", "study", "--yes")[0] == 0
    assert [path.name for path in root.iterdir()] == ["first"]


# -- cleaning up ---------------------------------------------------------------------------------------------------


def test_gc_finds_what_interruptions_leave(root: Path) -> None:
    """And nothing else: unfinished work that will be gone on with stays."""
    killed = root / "killed/rounds/2/train.part"
    shutil.copytree(killed, root / "first/rounds/2/train.part")
    for step in (3, 4):
        shutil.copytree(killed / "checkpoints/00000002", killed / f"checkpoints/{step:08d}")
    rest = [
        "killed/rounds/2/train.part/checkpoints/.new/x",
        "killed/rounds/2/train.part/.begun.json.tmp",
        "killed/.recipe.yaml.tmp",
        "second/rounds/1/samples.jsonl.damaged",
        "second/adapter/.adapter_config.json",
        "by hand/.train123/metrics.jsonl",
        "killed/rounds/2/measure.part/policy.jsonl",
    ]
    for name in rest:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "second/rounds/2/train.part").mkdir()
    (root / "second/rounds/2/train.part/done.json").write_text("{}")
    names = {item.path.relative_to(root).as_posix() for item in rubbish(root).leftovers}
    wanted = {
        "first/rounds/2/train.part",
        "killed/.recipe.yaml.tmp",
        "killed/rounds/2/measure.part",
        "killed/rounds/2/train.part/.begun.json.tmp",
        "killed/rounds/2/train.part/checkpoints/.new",
        "second/adapter/.adapter_config.json",
        "second/rounds/1/samples.jsonl.damaged",
    }
    checkpoints = sorted(path.name for path in killed.glob("checkpoints/0*"))
    wanted |= {f"killed/rounds/2/train.part/checkpoints/{name}" for name in checkpoints[:-KEPT]}
    assert names == wanted
    before = bytes_below(root)
    for path in (root / "by hand/.train123", root / "by hand/.train123/metrics.jsonl"):
        os.utime(path, (0, 0))
    found = rubbish(root)
    assert clean(found) == (found.bytes, [])
    assert before - bytes_below(root) == found.bytes
    assert not (root / "by hand/.train123").exists()
    assert rubbish(root).bytes == 0
    assert not rubbish(root).leftovers
    assert read(Place("killed", root / "killed")).parts["rounds/2 train"].step == 4


def test_gc_drops_work_that_another_run_has_finished(root: Path) -> None:
    """The run would take that stage from there."""
    shutil.copytree(root / "first", root / "third")
    part = root / "third/rounds/2/train.part"
    part.mkdir()
    files.write_json(part / "begun.json", {"key": _key(root, "first"), "made_by": _made_by(root, "first")})
    (root / "third/rounds/2/train.done.json").unlink()
    (found,) = rubbish(root).leftovers
    assert found.path == part
    assert "first has finished" in found.why
    files.write_json(part / "begun.json", {"key": _key(root, "first"), "made_by": {"backend": "torch"}})
    assert not rubbish(root).leftovers, "other arithmetic: it is not the same"


def _key(root: Path, run: str) -> str:
    return str(files.read_json(root / run / "rounds/2/train.done.json")["key"])


def _made_by(root: Path, run: str) -> dict[str, Any]:
    return dict(files.read_json(root / run / "rounds/2/train.done.json")["made_by"])


def test_gc_makes_copies_one_file(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A dry run first; then every byte is as it was, twice the names, and a second one finds nothing."""
    shutil.copytree(root / "first", root / "copy")
    before, was = results(root), bytes_below(root)
    code, out, err = call(capfd, "gc")
    assert code == 0
    assert "a copy of the same in first" in out
    assert "--yes" in err
    assert bytes_below(root) == was
    code, out, _ = call(capfd, "gc", "--yes", "--json")
    assert code == 0
    assert json.loads(out)["freed"] == was - bytes_below(root) > 1_000_000
    assert results(root) == before
    assert (root / "copy/adapter/adapter_model.safetensors").samefile(
        root / "first/rounds/2/adapter/adapter_model.safetensors"
    )
    assert call(capfd, "show", "copy", "--check")[0] == 0
    code, _, err = call(capfd, "gc")
    assert "nothing to clean up" in err


def test_gc_never_trusts_a_copy(root: Path) -> None:
    """A damaged file takes nobody's place and is not replaced; nor is one of other arithmetic, or one behind a link."""
    for name in ("damaged", "other", "linked"):
        shutil.copytree(root / "first", root / name)
    path = root / "damaged/rounds/1/samples.jsonl"
    path.write_bytes(b"X" + path.read_bytes()[1:])
    for marker in (root / "other").rglob("*.done.json"):
        marker.write_text(marker.read_text().replace('"cpu"', '"cuda"'))
    shutil.move(root / "linked/rounds/1", root.parent / "outside")
    (root / "linked/rounds/1").symlink_to((root.parent / "outside").absolute())
    twins = rubbish(root).duplicates
    touched = {copy.path for twin in twins for _, copy in twin.links}
    assert {root / "damaged/rounds/2/samples.jsonl", root / "first/rounds/2/samples.jsonl"} & touched
    assert path not in touched
    assert {twin.like for twin in twins if twin.run.name == "other"} == {"other"}
    assert "other" not in {twin.like for twin in twins if twin.run.name != "other"}
    assert not any("linked/rounds/1" in str(file) for file in touched)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_gc_may_be_interrupted(root: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Wherever it stops, every file is whole, and the next one does the rest."""
    shutil.copytree(root / "first", root / "copy")
    before, count, move = results(root), itertools.count(), files.move

    def stopped(source: Path, target: Path) -> None:
        if next(count) == stop:
            raise Killed
        move(source, target)

    monkeypatch.setattr(files, "move", stopped)
    with pytest.raises(Killed):
        clean(rubbish(root))
    assert {name: content for name, content in results(root).items() if ".tmp" not in name} == before
    monkeypatch.setattr(files, "move", move)
    assert clean(rubbish(root))[1] == []
    assert results(root) == before
    assert rubbish(root) == cleanup.Rubbish([], [], [])


def test_gc_without_hard_links(root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk cannot do that, copies stay and it is said."""
    shutil.copytree(root / "first", root / "copy")
    before = results(root)

    def refused(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    code, _, err = call(capfd, "gc", "--yes")
    assert code == 0
    assert "stays a copy, because no hard link can be made (Operation not supported)" in err
    assert "0 B freed" in err
    assert results(root) == before


def test_gc_leaves_what_changed_meanwhile(root: Path) -> None:
    """Between looking and doing, a run may have gone on."""
    shutil.copytree(root / "first", root / "copy")
    (root / "first/rounds/1/train.part").mkdir()
    found = rubbish(root)
    (root / "first/rounds/1/train.part/policy.jsonl").write_text("work")
    path = root / "copy/rounds/1/samples.jsonl"
    path.write_text("new")
    freed, failed = clean(found)
    assert freed < found.bytes
    assert sum("meanwhile" in line for line in failed) == 2
    assert path.read_text() == "new"
    assert (root / "first/rounds/1/train.part/policy.jsonl").exists()


def test_sizes() -> None:
    """Powers of 1000, one digit, never `1000.0 kB`."""
    shown = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 1_234_567: "1.2 MB"}
    assert {count: size(count) for count in shown} == shown
    assert size(5e12) == "5.0 TB"


def test_overview_of_nothing_is_nothing() -> None:
    """No runs, no lines."""
    assert overview([]) == []
