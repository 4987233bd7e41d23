"""`spa-lite compare` as a user types it, on a run of the toy backend: the table, and voting without the names."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_lite.backends.toy import ToyBackend
from spa_lite.cli import compare as cli
from spa_lite.records import Completion, Message
from tests.small import lines, run_small, small_recipe, write_data
from tests.test_cli import call

ASKED = ["compare", "r", "--prompts", "asked.jsonl"]
BLIND = [*ASKED, "--blind"]
VOTES = "votes-init-round-2.jsonl"
QUESTION = r"\(q\)uit: "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two rounds, runs/r, and prompts. Tests work on a copy of it."""
    folder = tmp_path_factory.mktemp("compare")
    changes = {"train.learning_rate": 0.3}
    run_small(folder / "runs" / "r", small_recipe(write_data(folder), changes))
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"say a word {i}"}) + "\n" for i in range(8)))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy to work in."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def records(capfd: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    """The JSON lines of a command that must succeed."""
    code, out, err = call(capfd, *args, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def voted(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, *args: str) -> dict[str, Any]:
    """What a session of votes comes to."""
    says(monkeypatch, text)
    (found,) = records(capfd, *(args or BLIND))
    return found


# --- the table -------------------------------------------------------------------------------------------------


def test_answers_of_the_usual_stages(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """init, the first and the last; JSON on stdout, in a file, and in the terminal are the same answers."""
    found = records(capfd, *ASKED)
    assert [record["messages"][0]["content"] for record in found] == [f"say a word {i}" for i in range(8)]
    assert all(list(record["answers"]) == ["init", "seed", "round 2"] for record in found)
    assert {a["ended"] for record in found for a in record["answers"].values()} <= {"eos", "cap"}
    code, out, err = call(capfd, *ASKED, "-o", "answers.jsonl")
    assert (code, out) == (0, "")
    assert "answers: answers.jsonl" in err
    assert lines(here / "answers.jsonl") == found
    code, out, _ = call(capfd, *ASKED)
    assert code == 0
    assert "8 prompts; init: " in out
    means = [sum(record["answers"]["seed"]["tokens"] for record in found) / 8]
    assert f"seed: {means[0]:.1f} tokens" in out
    assert "8/8\nuser: say a word 7\n" in out


def test_asked_again_it_costs_nothing(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sampled twice; a stage more is sampled alone. The answers lie in the run."""
    drawn: list[int] = []
    real = ToyBackend.sample

    def sample(self: ToyBackend, prompts: Any, *args: Any) -> Any:
        drawn.append(len(prompts))
        return real(self, prompts, *args)

    monkeypatch.setattr(ToyBackend, "sample", sample)
    first = records(capfd, *ASKED, "--stages", "init,2")
    assert sum(drawn) == 16
    assert len(list((here / "runs/r/compare").glob("*.jsonl"))) == 2
    drawn.clear()
    assert records(capfd, *ASKED, "--stages", "init,2") == first
    assert drawn == []
    again = records(capfd, *ASKED, "--stages", "last,1,init")
    assert sum(drawn) == 8
    assert [record["answers"]["init"] for record in again] == [record["answers"]["init"] for record in first]
    assert list(again[0]["answers"]) == ["round 2", "round 1", "init"], "in the order that was asked for"
    drawn.clear()
    records(capfd, *ASKED, "--out", "elsewhere")
    assert sum(drawn) == 24
    assert len(list((here / "elsewhere/compare").glob("*.jsonl"))) == 3


def test_ctrl_c_keeps_what_was_answered(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block (--sample-batch says how large they are); the same command goes on behind them."""
    drawn: list[int] = []
    real = ToyBackend.sample

    def sample(self: ToyBackend, prompts: Any, *args: Any) -> Any:
        if sum(drawn) == 12 and interrupt:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return real(self, prompts, *args)

    monkeypatch.setattr(ToyBackend, "sample", sample)
    interrupt = True
    code, _, err = call(capfd, *ASKED, "--sample-batch", "1")
    assert (code, drawn) == (130, [4, 4, 4])
    assert "everything so far is kept: run the same command again to go on" in err
    interrupt = False
    again = records(capfd, *ASKED)
    assert drawn == [4, 4, 4, 4, 8]
    assert again == records(capfd, *ASKED, "--out", "whole")


def test_every_sampling_option_does_something(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Other temperature, nucleus, seed and length give other answers."""
    plain = [*ASKED, "--stages", "init,last"]
    usual = records(capfd, *plain)
    for option in (["--temp", "0.01"], ["--top-p", "0.3"], ["--seed", "1"], ["--max-tokens", "2"]):
        assert records(capfd, *plain, *option) != usual, option
    short = records(capfd, *plain, "--max-tokens", "2")
    assert {a["tokens"] for record in short for a in record["answers"].values()} <= {1, 2}
    assert records(capfd, *plain, "--limit-prompts", "3") == usual[:3]
    assert records(capfd, *plain, "--set", "sampling.temp=0.01") == records(capfd, *plain, "--temp", "0.01")
    (here / "mine.yaml").write_text("sampling.temp: 0.01\ninputs.limit_prompts: 2\n")
    assert records(capfd, *plain, "-c", "mine.yaml") == records(capfd, *plain, "--temp", "0.01")[:2]


def test_prompts_in_the_usual_forms(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard input and conversations; a bad record is refused, or passed over and counted; a long one is left out."""
    says(monkeypatch, '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "k": 1}\n')
    (found,) = records(capfd, "compare", "r", "--prompts", "-")
    assert [turn["role"] for turn in found["messages"]] == ["system", "user"]
    assert found["extra"] == {"k": 1}
    (here / "bad.jsonl").write_text('{"prompt": "one"}\n{"prompt": ""}\n{"prompt": "' + "long " * 30 + '"}\n')
    code, _, err = call(capfd, "compare", "r", "--prompts", "bad.jsonl")
    assert (code, "bad.jsonl, line 2" in err) == (1, True)
    assert len(records(capfd, "compare", "r", "--prompts", "bad.jsonl", "--skip-bad")) == 2
    short = ["compare", "r", "--prompts", "bad.jsonl", "--skip-bad", "--max-prompt-length", "20"]
    code, out, err = call(capfd, *short, "--json")
    assert (code, len(out.splitlines())) == (0, 1)
    assert err.count("1 skipped: the prompt is too long") == 1, "said once, not for each stage"
    assert len(records(capfd, *short, "--long-prompts", "cut")) == 2


def test_a_model_without_a_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--model and --adapter-path; the same answers as of the run's stage, kept here."""
    alone = ["compare", "--backend", "toy", "--model", "toy", "--adapter-path", "runs/r/adapter"]
    found = records(capfd, *alone, "--prompts", "asked.jsonl", "--max-tokens", "12")
    assert [list(record["answers"]) for record in found] == [["init", "policy"]] * 8
    of_run = records(capfd, *ASKED)
    assert [r["answers"]["policy"] for r in found] == [r["answers"]["round 2"] for r in of_run]
    assert (here / "compare").is_dir()
    given = ["--init-adapter", "runs/r/rounds/0/adapter", "--prompts", "asked.jsonl", "--max-tokens", "12"]
    other = records(capfd, *alone, *given)
    assert [r["answers"]["init"] for r in other] == [r["answers"]["seed"] for r in of_run]
    shown = records(capfd, *ASKED, "--adapter-path", "runs/r/rounds/0/adapter")
    assert [r["answers"]["policy"] for r in shown] == [r["answers"]["seed"] for r in of_run]


def test_the_lesson_needs_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a run: the built-in model and its seed adapter, on held-out prompts; more of them to vote on."""
    monkeypatch.chdir(tmp_path)
    found = records(capfd, "compare", "--max-tokens", "4")
    assert [list(record["answers"]) for record in found] == [["init", "seed adapter"]] * 20
    few = ["compare", "--max-tokens", "4", "--blind"]
    tally = voted(capfd, monkeypatch, "", *few)
    assert (tally["stages"], tally["identical"] + tally["left"]) == (["init", "seed adapter"], 100)
    tally = voted(capfd, monkeypatch, "", *few, "--limit-prompts", "7")
    assert tally["identical"] + tally["left"] == 7


def test_the_newest_run_is_the_default(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capfd, "compare", "--prompts", "asked.jsonl")
    assert (code, "the newest run: runs/r" in err) == (0, True)


WRONG: dict[str, tuple[list[str], str]] = {
    "no such stage": (["--stages", "init,7"], "has no stage '7'; it has init, seed, 1, 2"),
    "one stage twice": (["--stages", "1,round 1"], "--stages names round 1 twice"),
    "an empty name": (["--stages", "init,"], "has no stage ''"),
    "no such file": (["--prompts", "none.jsonl"], "none.jsonl: there is no such file"),
    "no prompts": (["--prompts", "empty.jsonl"], "the source is empty"),
    "three stages": (["--blind", "--stages", "init,1,2"], "--blind compares two stages, and --stages names 3"),
    "votes without blind": (["--votes", "v.jsonl"], "--votes is the file of --blind"),
    "blind with -o": (["--blind", "-o", "x.jsonl"], "leave -o out"),
    "full with json": (["--full", "--json"], "--full changes nothing here"),
    "stdin twice": (["--blind", "--prompts", "-"], "--blind reads the votes from standard input"),
    "votes of another kind": (["--blind", "--votes", "pairs.jsonl"], "pairs.jsonl, line 1: this is no vote"),
    "votes that run cannot read": (["--blind", "--votes", "v.txt"], "must end with .jsonl"),
    "a folder for -o": (["-o", "runs"], "cannot write runs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence(here: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    options, sentence = WRONG[case]
    (here / "empty.jsonl").write_text("")
    before = (here / "pairs.jsonl").read_bytes()
    code, out, err = call(capfd, *ASKED, *options)
    assert code in (1, 2)
    assert out == ""
    assert sentence in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert (here / "pairs.jsonl").read_bytes() == before


def test_nothing_to_compare(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run without adapters; a run without a file of prompts; init as another whole model."""
    code, _, err = call(capfd, "compare", "r")
    assert (code, "give --prompts FILE" in err) == (2, True)
    recipe = here / "runs/r/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("init_model: null", "init_model: toy"))
    assert list(records(capfd, *ASKED)[0]["answers"]) == ["seed", "round 1", "round 2"]
    code, _, err = call(capfd, *ASKED, "--stages", "init,last")
    assert (code, "init is another whole model here" in err) == (2, True)
    shutil.rmtree(here / "runs/r/rounds")
    code, _, err = call(capfd, *ASKED)
    assert (code, "so there is nothing to compare" in err) == (1, True)


def test_what_a_model_says_is_shown_not_obeyed(capfd: pytest.CaptureFixture[str]) -> None:
    """Markup, emoji codes, control codes and direction overrides; long answers are cut with a note."""
    rude = "[bold]x[/] :smile: \x1b[31m\r \u202e [link=file:///]y"
    answers = [
        ("init", Completion(ids=(1,), text=rude, ended="eos")),
        ("seed", Completion(ids=(1, 2), text="z" * 1500, ended="cap")),
        ("round 1", Completion(ids=(), text="", ended="eos")),
        ("round 2", Completion(ids=(), text="\n".join("abcdefghijklmnopqrst"), ended="eos")),
        ("round 3", Completion(ids=(1,), text=rude, ended="eos")),
    ]
    cli.show("1/1", [Message(role="user", content=rude)], answers, cut=True)
    out, err = capfd.readouterr()
    assert out.count(r"[bold]x[/] :smile: \u001b[31m\u000d \u202e [link=file:///]y") == 2
    assert "[500 more characters: --full shows them]" in out
    assert "[10 more characters: --full shows them]" in out
    assert "[stopped at the limit of 2 tokens]" in out
    assert "[empty]" in out
    assert "[the same as init]" in out
    assert not {"\x1b", "\r", "\u202e"} & set(out)
    assert err == ""
    cli.show("1/1", [], answers, on_stderr=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("z") == 1500
    assert "--full" not in err


def test_full_shows_the_whole_answer(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "CHARACTERS", 4)
    assert "more characters: --full shows them" in call(capfd, *ASKED)[1]
    assert "more characters" not in call(capfd, *ASKED, "--full")[1]


# --- voting ----------------------------------------------------------------------------------------------------


def test_votes_are_counted_for_the_stage_behind_the_letter(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the answers themselves: which stage each chosen text is of. Asked again it says the same."""
    found = voted(capfd, monkeypatch, "a\nb\nA\nE\nn\nwhat?\ns\n")
    told = {r["messages"][0]["content"]: r["answers"] for r in records(capfd, *ASKED)}
    pairs = lines(here / "runs/r" / VOTES)
    wins = sum(told[p["messages"][0]["content"]]["round 2"]["text"] == p["chosen"] for p in pairs)
    assert len(pairs) == found["pairs"] == 3
    assert (found["wins"], found["losses"], found["either"], found["neither"]) == (wins, 3 - wins, 1, 1)
    assert found["win_rate"]["n"] == 3
    same = sum(answers["init"]["text"] == answers["round 2"]["text"] for answers in told.values())
    assert (found["identical"], found["left"]) == (same, 8 - same - 5)
    assert voted(capfd, monkeypatch, "") == found
    code, out, err = call(capfd, *BLIND)
    assert code == 0
    assert f"round 2 against init: wins {wins} of 3 decided votes, {100 * wins / 3:.1f} [" in out
    assert f"1 either, 1 neither, {same} with identical answers, {8 - same - 5} not voted on" in out
    assert f"pairs for run --seed-pairs: 3, in runs/r/{VOTES}" in err


def test_the_names_are_not_shown(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while anything is asked; the same order in every session, whatever way round the stages are named."""
    call(capfd, *ASKED, "--stages", "init,last")
    says(monkeypatch, "s\n" * 8)
    _, out, first = call(capfd, *BLIND)
    assert not [name for name in ("init", "round", "seed") if name in first]
    assert first.count("(q)uit: ") == 8 == first.count("│ A │") == first.count("│ B │")
    assert "round 2 against init: no decided vote" in out
    says(monkeypatch, "s\n" * 8)
    assert call(capfd, *BLIND, "--stages", "last,init")[2] == first
    says(monkeypatch, "s\n" * 8)
    assert call(capfd, *BLIND, "--seed", "1")[2] != first


def test_undo_and_a_file_of_ones_own(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end, too. A file of votes on other stages is refused and stays."""
    mine = [*BLIND, "--votes", "mine.jsonl"]
    says(monkeypatch, "u\na\nu\nb\n")
    assert call(capfd, *mine)[2].count("there is no vote to take back") == 1
    assert [line["vote"]["said"] for line in lines(here / "mine.jsonl")] == ["b"]
    found = voted(capfd, monkeypatch, "e\n" * 7 + "u\na\n", *mine)
    assert (found["either"], found["pairs"], found["left"]) == (6, 2, 0)
    kept = (here / "mine.jsonl").read_bytes()
    code, _, err = call(capfd, *mine, "--stages", "seed,last")
    assert (code, "a vote on init and round 2, not on seed and round 2" in err) == (1, True)
    assert (here / "mine.jsonl").read_bytes() == kept
    assert not (here / "runs/r" / VOTES).exists()


def test_votes_outlive_the_run(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person did is not deleted with what can be computed anew."""
    voted(capfd, monkeypatch, "a\n")
    files = ["--seed-pairs", "pairs.jsonl", "--prompts", "prompts.jsonl", "--backend", "toy", "--model", "toy"]
    code, _, err = call(capfd, "run", *files, "--out", "runs/r", "--fresh")
    assert (code, f"holds votes of `compare` ({VOTES})" in err) == (1, True)
    assert call(capfd, "runs", "rm", "r", "--yes")[0] == 0
    assert [path.name for path in (here / "runs/r").iterdir()] == [VOTES]


def test_a_session_in_a_terminal(here: Path) -> None:
    """Ctrl-C after a vote, then on where it was; and the votes are seed pairs of a run as they are."""
    pexpect = pytest.importorskip("pexpect")
    command = [sys.executable, "-m", "spa_lite.cli"]

    def session() -> Any:
        return pexpect.spawn(command[0], [*command[1:], *BLIND], encoding="utf-8", timeout=60, dimensions=(40, 80))

    first = session()
    first.expect("1/8.*say a word 0.*" + QUESTION)
    first.sendline("a")
    first.expect("2/8.*say a word 1.*" + QUESTION)
    shown = first.before
    first.sendintr()
    first.expect("interrupted; everything so far is kept: run the same command again")
    first.expect(pexpect.EOF)
    first.close()
    assert first.exitstatus == 130
    assert len(lines(here / "runs/r" / VOTES)) == 1
    second = session()
    for number, word in enumerate("babbaab", 2):
        second.expect(f"{number}/8.*say a word {number - 1}.*" + QUESTION)
        assert "init" not in second.before
        second.sendline(word)
    second.expect("nothing is left to vote on")
    second.sendeof()
    second.expect(r"round 2 against init: wins \d of 8 decided votes")
    second.expect(pexpect.EOF)
    second.close()
    assert second.exitstatus == 0
    assert shown is not None
    assert len(lines(here / "runs/r" / VOTES)) == 8
    toy = ["--backend", "toy", "--model", "toy", "--max-tokens", "12", "--rounds", "1", "--no-report"]
    run = [*command, "run", *toy, "--seed-pairs", f"runs/r/{VOTES}", "--prompts", "prompts.jsonl", "--out", "runs/new"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 records read" in done.stderr


def test_a_kill_loses_no_vote(here: Path) -> None:
    """Votes by a pipe; the process is killed while it waits for the next one."""
    command = [sys.executable, "-m", "spa_lite.cli", *BLIND]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(b"a\nb\n")
        process.stdin.flush()
        seen = b""
        while b"3/8" not in seen:
            piece = os.read(process.stderr.fileno(), 1 << 16)
            assert piece, seen
            seen += piece
        process.send_signal(signal.SIGKILL)
    assert [line["vote"]["said"] for line in lines(here / "runs/r" / VOTES)] == ["a", "b"]
