"""Commands as a user types them: real subprocesses where it matters, `main()` in this process where it only parses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_lite.axes import PIECES, one_line
from spa_lite.cli import main as cli
from spa_lite.cli import render
from spa_lite.events import Event
from spa_lite.lock import locked
from spa_lite.recipe import SETTINGS, build, layers_of, shipped
from tests.small import lines, results, write_data

TOY = ["--backend", "toy", "--model", "toy", "--max-tokens", "12", "--rounds", "2"]
QUICK = ["--seed-learning-rate", "0.05", "--lr", "0.05", "--set", "refine.window=8", "--set", "refine.K=0.3"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pairs.jsonl and prompts.jsonl to work in."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    argv, sys.argv = sys.argv, ["spa-lite", *args]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = argv
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def spawn(args: Sequence[str], **kwargs: Any) -> subprocess.Popen[str]:
    """A real process."""
    command = [sys.executable, "-m", "spa_lite.cli", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


RUN = ["run", *TOY, *QUICK, "--seed-pairs", "pairs.jsonl", "--prompts", "prompts.jsonl", "--no-report"]


def test_run_makes_a_table_and_a_folder(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The default folder is named by recipe and inputs; the same command again computes nothing."""
    code, out, err = call(capfd, *RUN)
    assert code == 0, err
    assert "round 2" in out
    assert "held-out pairs %" in out
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("spa-")
    assert len(folder.name) == len("spa-") + 8
    wanted = {"run.json", "recipe.yaml", "summary.json", "adapter", "rounds", "init", "timings.json", "batching.json"}
    assert {p.name for p in folder.iterdir()} == wanted | {".lock"}
    before = results(folder)
    code, again, err = call(capfd, *RUN)
    assert code == 0
    assert "nothing was computed again" in err
    assert again == out
    assert results(folder) == before


def test_a_changed_setting_gets_a_new_folder(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And with --out it is refused, naming field and stage; --fresh starts over."""
    call(capfd, *RUN)
    call(capfd, *RUN, "--beta", "0.2")
    assert len(list((here / "runs").iterdir())) == 2
    code, _, _ = call(capfd, *RUN, "--save-every", "3", "--score-tokens", "90")
    assert code == 0, "what changes no result names no folder"
    assert len(list((here / "runs").iterdir())) == 2
    call(capfd, *RUN, "--out", "mine")
    code, _, err = call(capfd, *RUN, "--out", "mine", "--beta", "0.2")
    assert code == 1
    assert "loss.beta was 0.1 when stage 'rounds/0 seed' of mine was finished and is now 0.2" in err
    assert "beta: 0.1" in (here / "mine/recipe.yaml").read_text()
    code, _, err = call(capfd, *RUN, "--out", "mine", "--beta", "0.2", "--fresh")
    assert code == 0, err


def test_fresh_never_deletes_a_folder_that_is_no_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A home folder given by mistake survives."""
    (here / "precious").mkdir()
    (here / "precious/thesis.tex").write_text("x")
    code, _, err = call(capfd, *RUN, "--out", "precious", "--fresh")
    assert code == 1
    assert "run.json" in err
    assert (here / "precious/thesis.tex").exists()


def test_json_and_config_and_underscores(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program can read the answer; a YAML file sets what the command line does not; `_` is read as `-`."""
    (here / "my.yaml").write_text("rounds: 3\nloss: {beta: 0.3}\nsampling.temp: 0.9\n")
    code, out, err = call(capfd, *RUN, "-c", "my.yaml", "--json", "--max_tokens", "6", "--out", "run")
    assert code == 0, err
    summary = json.loads(out)
    assert [row["stage"] for row in summary["rows"]] == ["init", "seed", "round 1", "round 2"], "the command line wins"
    written = (here / "run/recipe.yaml").read_text()
    assert "beta: 0.3" in written
    assert "temp: 0.9" in written
    assert "max_tokens: 6" in written


def test_dry_run_shows_where_each_value_comes_from(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And does nothing."""
    code, out, _ = call(capfd, *RUN, "--dry-run", "--scale", "laptop")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert rows["rounds"].endswith("command line")
    assert rows["lora.rank"].endswith("scale laptop")
    assert rows["loss.beta"].endswith("default")
    assert not (here / "runs").exists()


def test_by_hand_equals_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`train` on pairs, then sample | judge | train on files, reproduces both rounds of `run` to the byte."""
    (here / "held.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    assert call(capfd, *RUN, "--out", "run", "--held-out", "held.jsonl")[0] == 0
    same = ["--backend", "toy", "--model", "toy", *QUICK[4:], "--scale", "laptop"]
    assert call(capfd, "train", "pairs.jsonl", *same, "--seed-learning-rate", "0.05", "--out", "0")[0] == 0
    for i in (1, 2):
        policy = [
            *same[:4],
            "--scale",
            "laptop",
            "--adapter-path",
            f"{i - 1}/adapter",
            "--round",
            str(i),
        ]
        assert (
            call(
                capfd,
                "sample",
                *policy,
                "--rounds",
                "2",
                "--max-tokens",
                "12",
                "--prompts",
                "prompts.jsonl",
                "-o",
                "s.jsonl",
            )[0]
            == 0
        )
        assert call(capfd, "judge", "s.jsonl", *policy, "-o", "j.jsonl")[0] == 0
        assert call(capfd, "train", "j.jsonl", *policy, *QUICK[2:], "--out", str(i))[0] == 0
        place = here / f"run/rounds/{i}"
        assert (here / "s.jsonl").read_bytes() == (place / "samples.jsonl").read_bytes()
        assert (here / "j.jsonl").read_bytes() == (place / "judgements.jsonl").read_bytes()
        assert (here / f"{i}/metrics.jsonl").read_bytes() == (place / "metrics.jsonl").read_bytes()
        ours, theirs = (p / "adapter/adapter_model.safetensors" for p in (here / str(i), place))
        assert ours.read_bytes() == theirs.read_bytes()


def test_rated_answers_train_kto_by_hand(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Single answers with a label; another loss, a pair among them and a label of another kind are one sentence."""
    records = [{"prompt": f"say {i}", "completion": "red" if i % 3 else "hat", "label": i % 3 > 0} for i in range(8)]
    texts = [json.dumps(record) + "\n" for record in records]
    (here / "rated.jsonl").write_text("".join(texts))
    (here / "mixed.jsonl").write_text(texts[0] + (here / "pairs.jsonl").read_text())
    (here / "words.jsonl").write_text(texts[0].replace("false", '"no"'))
    toy = ("--backend", "toy", "--model", "toy", "--out", "out")
    code, out, _ = call(capfd, "train", "rated.jsonl", "--loss", "kto", *toy)
    assert code == 0
    assert json.loads(out)["logratio_chosen"] > 0 > json.loads(out)["logratio_rejected"]
    assert len({name for line in lines(here / "out/metrics.jsonl") for name in line["ids"]}) == 8
    for name, loss, exit_, message in (
        ("rated", "dpo", 2, "only kto learns from; give --loss kto"),
        ("mixed", "kto", 1, "line 2: `label` is missing"),
        ("words", "kto", 1, "line 1: `label` is a text; write true"),
    ):
        code, _, err = call(capfd, "train", f"{name}.jsonl", "--loss", loss, *toy)
        assert (code, message in err, err.count("\n")) == (exit_, True, 1), err


def test_human_pairs_train_the_loss_that_is_asked_for(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By default the seed stage's DPO; no label of a person is refined."""
    toy = ("--backend", "toy", "--model", "toy")
    for name, more in {"dpo": (), "none": ("--noise", "none"), "simpo": ("--loss", "simpo")}.items():
        assert call(capfd, "train", "pairs.jsonl", *more, *toy, "--out", name)[0] == 0
    logs = {name: (here / name / "metrics.jsonl").read_bytes() for name in ("dpo", "none", "simpo")}
    assert logs["dpo"] == logs["none"] != logs["simpo"]


def test_pipes(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """JSON lines in on stdin, JSON lines out on stdout, everything else on stderr."""
    call(capfd, *RUN, "--out", "run")
    policy = ["--backend", "toy", "--model", "toy", "--adapter-path", "run/adapter"]
    sample = spawn(["sample", *policy, "--max-tokens", "8", "--prompts", "-", "--rounds", "1"], stdin=subprocess.PIPE)
    out, err = sample.communicate('{"prompt": "hello"}\n{"prompt": "you"}\n')
    assert sample.returncode == 0, err
    judge = spawn(["judge", "-", *policy], stdin=subprocess.PIPE)
    out, err = judge.communicate(out)
    assert judge.returncode == 0, err
    assert [json.loads(line)["label"] in "ab" for line in out.splitlines()] == [True, True]
    assert "2 pairs judged" in err


def test_judge_pairs(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line per pair with the promised fields; agreement with gold on stderr; ties are ties."""
    call(capfd, *RUN)
    code, out, err = call(capfd, "judge", "pairs.jsonl")
    assert code == 0, err
    assert "judging with the newest run" in err
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 40
    names = ["id", "logratio_a", "logratio_b", "margin", "p", "label", "tie", "tokens_a", "tokens_b"]
    assert all(set(names) <= set(record) for record in found)
    for record in found:
        assert record["margin"] == pytest.approx(0.1 * (record["logratio_a"] - record["logratio_b"]))
        assert record["label"] == ("a" if record["margin"] > 0 else "b")
    right = sum(record["label"] == "a" for record in found)
    assert f"agreement with the gold labels: {100 * right / 40:.1f} [" in err

    (here / "ab.jsonl").write_text('{"id": "t", "prompt": "x", "a": "same", "b": "same"}\n')
    code, out, err = call(capfd, "judge", "ab.jsonl")
    record = json.loads(out)
    assert (record["tie"], record["label"], record["p"]) == (True, "b", 0.5)
    assert "agreement" not in err


def test_judge_without_a_policy(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bare model against itself would call every pair a tie: refused, with the ways out."""
    code, _, err = call(capfd, "judge", "pairs.jsonl", "--backend", "toy", "--model", "toy")
    assert code == 2
    assert "--adapter-path" in err
    likelihood = ["--backend", "toy", "--model", "toy", "--judge-reference", "none"]
    code, out, _ = call(capfd, "judge", "pairs.jsonl", *likelihood)
    assert code == 0
    assert len(out.splitlines()) == 40


WRONG: list[tuple[list[str], int, str]] = [
    (["run", "--model", "toy", "--backend", "toy"], 2, "--seed-pairs"),
    (["run", "--model", "toy", "--backend", "toy", "--seed-pairs", "pairs.jsonl"], 2, "--prompts"),
    ([*RUN, "--seed-pairs", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    ([*RUN, "--seed-pairs", "prompts.jsonl"], 1, "prompts.jsonl, line 1"),
    ([*RUN, "--temp", "warm"], 2, "sampling.temp"),
    ([*RUN, "--temp", "-1"], 2, "sampling.temp"),
    ([*RUN, "--recipe", "spaa"], 2, "did you mean spa"),
    ([*RUN, "--set", "refine.kk=1"], 2, "did you mean refine.K"),
    ([*RUN, "--tempp", "1"], 2, "--temp"),
    ([*RUN, "--backend", "tourch"], 1, "torch"),
    ([*RUN, "--round-sizes", "30,30"], 1, "60"),
    ([*RUN, "--judge", "gold"], 2, "gold"),
    ([*RUN, "--held-out", "pairs.jsonl"], 2, "--held-out"),
    (["judge", "pairs.jsonl", *TOY[:4], "--judge-reference", "lagged"], 2, "--init-adapter"),
    (["judge", "pairs.jsonl", *TOY[:4], "--judge-reference", "none", "-o", "no/dir.jsonl"], 1, "no/dir.jsonl"),
    ([*RUN, "--no-seed-pairs"], 2, "exclude"),
    ([*RUN, "--adapter-path", "x"], 2, "--no-seed-pairs"),
    ([*RUN, "--init-adapter", "x"], 1, "no adapter folder x"),
    ([*RUN, "--max-prompt-length", "4000"], 2, "max_length"),
    ([*RUN, "-c", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["judge", "nowhere.jsonl", "--backend", "toy", "--model", "toy", "--judge-reference", "none"], 1, "nowhere.jsonl"),
    (["train", "prompts.jsonl", "--backend", "toy", "--model", "toy", "--out", "o"], 1, "prompts.jsonl, line 1"),
    (["sample", "--backend", "toy", "--model", "toy"], 2, "--prompts"),
    (["sample", *TOY, "--prompts", "prompts.jsonl", "--round", "9"], 2, "--rounds"),
    (["recipes", "nope"], 2, "nope"),
    (["recipes", "saoo"], 2, "did you mean sao"),
    (["recipes", "--yaml"], 2, "name the recipe"),
    (["recipes", "sao", "--yaml", "--scale", "lesson"], 2, "leave --scale out"),
    (["recipes", "axes", "--scale", "lesson"], 2, "leave --scale out"),
    (["recipes", "lesson", "--scale", "paper"], 2, "leave --scale out"),
    (["recipes", "sao", "--scale", "huge"], 2, "laptop"),
    (["nonsense"], 2, "nonsense"),
]


@pytest.mark.parametrize(("args", "code", "names"), WRONG, ids=[" ".join(a[-2:]) for a, _, _ in WRONG])
def test_wrong_input_gets_one_sentence(
    here: Path, capfd: pytest.CaptureFixture[str], args: list[str], code: int, names: str
) -> None:
    """It names the thing and the mend; no traceback."""
    found, _, err = call(capfd, *args)
    assert found == code, err
    assert "Traceback" not in err
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert names in last[0]


def test_bad_records_are_refused_or_skipped_and_counted(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--skip-bad goes on and says how many of what."""
    with (here / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": ""}\n{"prompt": 3}\n{"prompt": "cut sh')
    code, _, err = call(capfd, *RUN)
    assert code == 1
    assert "prompts.jsonl, line 41" in err
    code, _, err = call(capfd, *RUN, "--skip-bad")
    assert code == 0
    assert "3 bad records skipped" in err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_finished_work(
    here: Path, capfd: pytest.CaptureFixture[str], sent: signal.Signals, code: int
) -> None:
    """Its exit code, a line that says how to go on, and the same command ends with the same results."""
    slow = [*RUN, "--set", "seed_dpo.epochs=80", "--out"]
    # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with spawn([*slow, "broken"], cwd=here, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stderr is not None
        while not (here / "broken/init/measure.done.json").exists():  # then the long seed stage is next
            assert process.poll() is None
        process.send_signal(sent)
        err = process.stderr.read()
        assert process.wait(timeout=60) == code
    assert "run the same command again" in err
    assert not (here / "broken/rounds/0/seed.done.json").exists()
    assert call(capfd, *slow, "broken")[0] == 0
    assert call(capfd, *slow, "whole", "--fresh")[0] == 0  # which takes nothing from the other run
    assert results(here / "broken") == results(here / "whole")


def test_a_run_takes_what_its_neighbour_has_computed(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another alpha changes training alone: the rest is shared, and that is said. --fresh computes everything."""
    call(capfd, *RUN)
    code, _, err = call(capfd, *RUN, "--alpha", "0.3", "--out", "runs/other")
    assert code == 0
    assert "which had computed the same: init measure, rounds/0 seed, rounds/0 measure, rounds/1 sample" in err
    ours, theirs = ((here / "runs" / name / "rounds/1/samples.jsonl") for name in ("other", newest(here)))
    assert ours.samefile(theirs)
    code, _, err = call(capfd, *RUN, "--alpha", "0.3", "--out", "runs/other", "--fresh")
    assert "which had computed the same" not in err
    assert not ours.samefile(theirs)


def newest(here: Path) -> str:
    """Name of the run that has a name of its own."""
    (name,) = [p.name for p in (here / "runs").iterdir() if p.name.startswith("spa-")]
    return name


def test_a_path_that_cannot_be_written_is_one_sentence(here: Path) -> None:
    """Wherever it happens, and with nothing of Python's own words."""
    (here / "file").write_text("")
    for words in (["ablate", *RUN[1:-1], "--vary", "refine.K=0.1", "--out", "file/study"], [*RUN, "--out", "file/run"]):
        with spawn(words, cwd=here) as process:
            _, err = process.communicate()
        assert process.returncode == 1
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: ")
        assert "file/" in err.splitlines()[-1]


def test_two_processes_started_at_once(here: Path) -> None:
    """One does the run, the other is told so; nothing is mixed up."""
    words = [*RUN, "--set", "seed_dpo.epochs=80", "--out", "mine"]
    with spawn(words, cwd=here) as one, spawn(words, cwd=here) as other:
        said = [process.communicate()[1] for process in (one, other)]
    codes = [one.returncode, other.returncode]
    assert sorted(codes) == [0, 1], said
    winner, loser = (one, other) if codes[0] == 0 else (other, one)
    assert f"mine is in use by process {winner.pid}" in said[0 if loser is one else 1]
    assert (here / "mine/summary.json").exists()


def test_a_run_in_use_is_left_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A second process is told who holds it, --fresh included."""
    call(capfd, *RUN, "--out", "mine")
    with locked(here / "mine"):
        for more in ([], ["--fresh"]):
            with spawn([*RUN, "--out", "mine", *more], cwd=here) as process:
                _, err = process.communicate()
            assert process.returncode == 1
            assert f"mine is in use by process {os.getpid()}" in err
    assert (here / "mine/summary.json").exists()


def test_text_from_data_is_never_obeyed(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Terminal codes and markup in a path or a record are shown, not acted on."""
    code, _, err = call(capfd, *RUN, "--seed-pairs", "[red]x\x1b[31m.jsonl")
    assert code == 1
    assert "[red]x\\u001b[31m.jsonl" in err
    assert "\x1b" not in err


def test_a_word_between_colons_is_no_picture(capfd: pytest.CaptureFixture[str]) -> None:
    render.fail("hub:x: is no name")
    render.out.print("hub:x: is no name")
    assert capfd.readouterr() == ("hub:x: is no name\n", "error: hub:x: is no name\n")


def test_doctor_on_toy(capfd: pytest.CaptureFixture[str]) -> None:
    """Every preflight check holds on the oracle, and a program can read it."""
    code, out, _ = call(capfd, "doctor", "--backend", "toy", "--model", "toy", "--json")
    found = json.loads(out)
    assert code == 0
    assert all(check["passed"] for check in found["checks"])
    assert len(found["checks"]) >= 9
    assert found["backend"]["name"] == "toy"
    code, out, _ = call(capfd, "doctor", "--backend", "toy", "--model", "toy")
    assert "ln 2" in out


def test_recipes(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is shipped, each with its one line; one with every setting, what differs first; what they are made of."""
    code, out, _ = call(capfd, "recipes")
    assert code == 0
    for name in shipped("recipe"):
        assert one_line(build(layers_of(name, "paper"))[0]) in " ".join(out.split())
    code, out, _ = call(capfd, "recipes", "spa-official")
    assert "recipe spa-official" in out
    differs, settings = out.split("all settings")
    assert "refine.before_full" in differs
    assert "refine.window" not in differs
    assert all(f" {path} " in settings for path in SETTINGS)
    code, out, _ = call(capfd, "recipes", "sao", "--scale", "lesson")
    assert re.search(r"prompts.count +│ +800 +│ +none +│ +recipe sao on lesson", out)
    code, out, _ = call(capfd, "recipes", "axes")
    assert all(name in out and piece.source in out for pieces in PIECES.values() for name, piece in pieces.items())
    (here / "mine.yaml").write_text("# Mine, [red]red[/] as it is.\nname: mine\nrounds: 1\n")
    code, out, _ = call(capfd, "recipes", "mine.yaml")
    assert "Mine, [red]red[/] as it is." in out
    code, out, _ = call(capfd, "run", "--help")
    assert all(name in out for name in shipped("recipe"))


@pytest.mark.parametrize("name", shipped("recipe"))
def test_a_recipes_file_is_given_back(here: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """--yaml prints what --recipe takes, with the same result on every scale."""
    code, out, _ = call(capfd, "recipes", name, "--yaml")
    assert code == 0
    (here / "mine.yaml").write_text(out)
    for scale in shipped("scale"):
        assert build(layers_of("mine.yaml", scale))[0] == build(layers_of(name, scale))[0]


def test_no_file_is_written_beside_what_was_asked_for(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`judge` to stdout leaves the folder as it was."""
    before = sorted(here.rglob("*"))
    call(capfd, "judge", "pairs.jsonl", "--backend", "toy", "--model", "toy", "--judge-reference", "none")
    assert sorted(here.rglob("*")) == before
    assert lines(here / "pairs.jsonl")


def test_a_rate_counts_from_where_its_stage_was_begun(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Units that are done together are told of together; what was done before an interruption is nobody's speed."""
    clock = iter([0.0, 10.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    report = render._lines(every=5.0)
    for event in (
        Event("seed", 1, 1, "stage"),  # at 10
        Event("judge", 1, 2, "pairs", note="\x1b[2Jhello [red]"),  # at 10
        Event("judge", 2, 2, "pairs"),  # at 20
        Event("train", 19, 20, "steps"),  # at 40, after 18 steps of another day
    ):
        report(event)
    monkeypatch.setattr("time.monotonic", iter([0.0, 1.0, 3.0, 11.0]).__next__)
    report = render._lines(every=5.0)
    for event in (Event("judge"), Event("judge", 8, 0, "pairs"), Event("judge", 80, 0, "pairs")):  # at 1, 3 and 11
        report(event)
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == "judge: 80 pairs, 7.3/s", "a number that nobody knows gives no time left"
    assert "judge: 2/2 pairs, 0.2/s, 0 s left" in err
    assert "train: 19/20 steps, 0.1/s, 20 s left" in err
    assert "\x1b" not in err
    assert "hello [red]" in err
