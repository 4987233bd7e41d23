"""`spa-lite eval` as a user types it, on a run of the toy backend; the built-in lesson once."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spa_lite import backends
from spa_lite.answers import read_answers
from spa_lite.backend import POLICY, Backend, ModelSettings
from spa_lite.backends.toy import ToyBackend
from spa_lite.cli.eval import check_read, which_mode
from spa_lite.errors import DataError, RecipeError
from spa_lite.lesson import MODEL_DIR
from spa_lite.records import Message, Row
from tests.small import lines, run_small, small_recipe, write_data
from tests.test_cli import call

LAST, FIRST = "runs/r/rounds/2", "runs/r/rounds/0"
VERSUS = ["eval", "--a", LAST, "--b", FIRST, "--prompts", "asked.jsonl"]
LONGEST = [*VERSUS, "--judge", "longest"]
TOY = ["--backend", "toy", "--model", "toy"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two rounds, runs/r, and files to evaluate on. Tests write with --out."""
    folder = tmp_path_factory.mktemp("eval")
    files = write_data(folder)
    changes = {"inputs.held_out": str(folder / "held.jsonl"), "train.learning_rate": 0.3}
    held = [
        {"prompt": f"pick {i}", "chosen": "red dog", "rejected": "a cup of tea" if i % 3 else "red dog!"}
        for i in range(12)
    ]
    (folder / "held.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in held))
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"say a word {i}"}) + "\n" for i in range(10)))
    (folder / "other.jsonl").write_text('{"prompt": "another one"}\n{"prompt": "say a word 3"}\n')
    run_small(folder / "runs" / "r", small_recipe(files, changes))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Work beside the run; `here` is for results."""
    monkeypatch.chdir(place)
    return tmp_path


def result(capfd: pytest.CaptureFixture[str], out: Path, *args: str) -> dict[str, Any]:
    """The one result of a command that must succeed."""
    code, said, err = call(capfd, *args, "--out", str(out), "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(said)
    return found


# --- held-out pairs --------------------------------------------------------------------------------------------


def test_stages_of_a_run(here: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The accuracies are the run's own; changes are those of the accuracies; eval.json holds what is printed."""
    found = result(capfd, here, "eval", "--run", "r")
    rows = json.loads((place / "runs/r/summary.json").read_text())["rows"]
    assert list(found["stages"]) == [row["stage"] for row in rows] == ["init", "seed", "round 1", "round 2"]
    for row in rows:
        assert found["stages"][row["stage"]]["accuracy"] == pytest.approx(row["pair_accuracy"])
    values = [m["accuracy"]["value"] for m in found["stages"].values()]
    changes = [m["to_before"]["value"] for m in list(found["stages"].values())[1:]]
    assert changes == pytest.approx([after - before for before, after in pairwise(values)])
    for m in found["stages"].values():
        assert m["margin"] == pytest.approx(m["chosen"] - m["rejected"])
    assert found["longer_wins"]["value"] == 0, "every rejected answer is the longer one"
    assert found["n"] == 12
    assert json.loads((here / "eval.json").read_text())["results"] == [found]


def test_the_newest_run_is_the_default(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is named, and the tables show every stage."""
    code, out, err = call(capfd, "eval", "--out", str(here))
    assert code == 0, err
    assert "the newest run: runs/r" in err
    assert "round 2" in out
    assert "12 pairs; the longer answer is the preferred one in 0.0 [" in out
    assert f"results: {here}/eval.json" in err


def test_a_policy_on_a_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--model, --adapter-path and --held-out, without a run; the same numbers as the run's."""
    whole = result(capfd, here, "eval", "--run", "r")
    alone = ["eval", *TOY, "--adapter-path", "runs/r/adapter", "--held-out", "held.jsonl", "--scale", "laptop"]
    found = result(capfd, here, *alone)
    assert list(found["stages"]) == ["init", "policy"]
    assert found["stages"]["policy"]["margin"] == pytest.approx(whole["stages"]["round 2"]["margin"])
    doubled = result(capfd, here, *alone, "--beta", "0.2")
    assert doubled["stages"]["policy"]["margin"] == pytest.approx(2 * found["stages"]["policy"]["margin"])
    assert result(capfd, here, *alone, "--measure-pairs", "5")["n"] == 5


# --- head-to-head ----------------------------------------------------------------------------------------------


def test_the_longer_answers_win(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Counted from the answers that were kept; exchanged sides give 1 minus the win rate."""
    found = result(capfd, here, *LONGEST)
    kept = {path.stem: lines(path) for path in (here / "answers").glob("*.jsonl")}
    assert len(kept) == 2
    sides = [[len(sample["completions"][0]["ids"]) for sample in side] for side in kept.values()]
    wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(*sides, strict=True)) / 10
    assert found["win_rate"]["value"] in (pytest.approx(wins), pytest.approx(1 - wins))
    back = result(capfd, here, "eval", "--a", FIRST, "--b", LAST, *LONGEST[5:])
    assert back["win_rate"]["value"] == pytest.approx(1 - found["win_rate"]["value"])
    assert (found["n"], found["judge"]["name"], found["orders"]) == (10, "longest", None)
    assert len(json.loads((here / "eval.json").read_text())["results"]) == 2


def test_difficulty_of_the_prompts_enters_the_length_control(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a field of every record, under a name of its own; where a record lacks it, that is said."""
    hard = here / "hard.jsonl"
    asked = [{"prompt": f"say a word {i}", "hard": (i % 4) / 2} for i in range(12)]
    hard.write_text("".join(json.dumps(one) + "\n" for one in asked))
    words = ["eval", "--a", LAST, "--b", FIRST, "--prompts", str(hard), "--judge", "longest"]
    plain, found = result(capfd, here, *words), result(capfd, here, *words, "--difficulty", "hard")
    assert plain["length_controlled"]["name"] == "LC (no difficulty)"
    assert found["length_controlled"]["name"] == "LC (with difficulty)"
    assert found["length_controlled"]["interval"] != plain["length_controlled"]["interval"]
    assert found["win_rate"] == plain["win_rate"]
    code, _, err = call(capfd, *words, "--difficulty", "soft", "--out", str(here))
    assert (code, "no number of that name" in err) == (1, True)


def test_sides_in_every_form(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run, its last stage, and an adapter folder are the same side; init and a whole model are others."""
    (same,) = {
        result(capfd, here, "eval", "--a", word, "--b", "init", *LONGEST[5:], "--run", "r")["win_rate"]["value"]
        for word in (LAST, "runs/r", f"{LAST}/adapter")
    }
    found = result(capfd, here, "eval", "--a", "runs/r/init", "--b", "model:toy:7", *LONGEST[5:])
    assert 0 <= same <= 1
    assert found["a"]["adapter"] is None
    assert found["a"]["fingerprint"] != found["b"]["fingerprint"]


def test_a_file_of_kept_answers(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a side answered can be given in its place; its prompts are then the default."""
    whole = result(capfd, here, *LONGEST)
    answers = [str(path) for path in (here / "answers").glob("*.jsonl")]
    by_file = result(capfd, here, "eval", "--a", answers[0], "--b", answers[1], "--judge", "longest")
    assert by_file["n"] == 10
    assert sorted([by_file["length_a"], by_file["length_b"]]) == sorted([whole["length_a"], whole["length_b"]])


def test_a_side_against_itself_answers_twice(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two draws of one model: its judge should see no difference, and it is said why it is done."""
    code, out, err = call(capfd, "eval", "--a", LAST, "--b", LAST, *LONGEST[5:], "--out", str(here), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "a sound judge gives 50 %" in err
    assert found["identical"] < 10
    assert found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]


def test_files_of_answers_need_no_model(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two files, joined by prompt; what only one of them answers is counted. Lengths are characters then."""
    a = [{"prompt": f"p{i}", "answer": "long " * (i + 1)} for i in range(4)]
    b = [{"instruction": f"p{i}", "output": "short", "generator": "g"} for i in range(1, 5)]
    (here / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in a))
    (here / "b.json").write_text(json.dumps(b))
    files = ["--a", str(here / "a.jsonl"), "--b", str(here / "b.json"), "--out", str(here)]
    code, out, err = call(capfd, "eval", *files, "--judge", "longest", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["n"], found["left_out"], found["win_rate"]["value"]) == (3, 1, 1.0)
    assert "1 of 4 prompts are left out" in err
    assert found["length_b"] == 5


class Fake:
    """A server that prefers the answer shown first with the given probability; knows no grade."""

    name, key = "fake at http://nowhere", "fake"
    first = 0.9

    def __init__(self, url: str, model: str, cache: Path | None = None) -> None:
        self.asked: list[str] = []

    def preferences(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str], tick: Any = lambda: None
    ) -> list[tuple[float, ...] | None]:
        """P(A), whatever is asked."""
        import math

        for _ in conversations:
            tick()
        return [(math.log(self.first), math.log(1 - self.first)) for _ in conversations]

    def replies(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int, tick: Any = lambda: None
    ) -> list[str]:
        """A grade, whatever is asked."""
        for _ in conversations:
            tick()
        return ["Fine. [[7]]" for _ in conversations]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """--judge openai without a server."""
    monkeypatch.setattr("spa_lite.server.ChatServer", Fake)
    return ["--judge", "openai", "--judge-url", "http://nowhere/v1", "--judge-model", "m"]


def test_a_judge_that_only_sees_the_order(here: Path, fake: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Both orders make it 50 %, and it is called unusable."""
    code, out, err = call(capfd, *VERSUS, *fake, "--out", str(here))
    assert code == 0, err
    assert "warning: judge unusable" in err
    assert "no verdict" in out
    assert "openai fake at http://nowhere" in out
    found = json.loads((here / "eval.json").read_text())["results"][0]
    assert found["win_rate"]["value"] == 0.5
    assert found["orders"]["first"]["value"] == 1
    assert found["verdict"] == ""


def test_the_judge_is_one_of_the_sides(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The trained model as its own judge is said to be so."""
    own = ["--judge", "implicit", "--adapter-path", f"{LAST}/adapter"]
    found = result(capfd, here, *VERSUS, *own)
    assert any(line.startswith(f"the judge is {LAST} and the base model of {FIRST}") for line in found["warnings"])
    other = result(capfd, here, *VERSUS, "--judge", "implicit", "--adapter-path", f"{FIRST}/adapter")
    assert any(f"the base model of {LAST} and {FIRST}:" in line for line in other["warnings"])
    assert other["win_rate"] != found["win_rate"], "another adapter is another judge"


def test_a_judge_of_two_models(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--init-model as the reference: rewards are those of the two models, the policy with its adapter."""
    judge = ["--judge", "implicit", "--adapter-path", f"{LAST}/adapter", "--init-model", "toy:2", "--beta", "1"]
    result(capfd, here, *VERSUS, *judge)
    (told,) = (lines(path) for path in (here / "opinions").glob("*.jsonl"))
    one_side = lines(next((here / "answers").glob("*.jsonl")))
    policy, other = (backends.load("toy", ModelSettings(model=name)) for name in ("toy", "toy:2"))
    policy.bind(POLICY, Path(LAST) / "adapter")
    assert len(told) == len(one_side) == 10
    for opinion, sample in zip(told, one_side, strict=True):
        row = Row(prompt=tuple(sample["prompt_ids"]), responses=(tuple(sample["completions"][0]["ids"]),))
        ((_, (own,)),), ((_, (reference,)),) = policy.logprob([row], POLICY), other.logprob([row], POLICY)
        assert pytest.approx(own.logp - reference.logp) in opinion["scores"]


def test_two_models_are_never_in_memory_together(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Side a, side b and the judge are three models; whenever one is loaded, the others are gone."""
    alive: weakref.WeakSet[Backend] = weakref.WeakSet()
    loaded = []
    real = backends.load

    def load(name: str | None, settings: ModelSettings) -> Backend:
        gc.collect()
        assert len(alive) == 0
        made = real(name, settings)
        alive.add(made)
        loaded.append(settings.model)
        return made

    monkeypatch.setattr(backends, "load", load)
    three = ["--backend", "toy", "--model", "toy:1", "--a", "model:toy:2", "--b", "model:toy:3", "--judge", "self-pair"]
    result(capfd, here, "eval", *three, "--prompts", "asked.jsonl")
    assert loaded == ["toy:2", "toy:3", "toy:1"]


def test_interrupted_and_gone_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped while side b answers: the same command computes only the rest and finds what it would have found."""
    whole = result(capfd, here / "whole", *LONGEST)
    sampled: list[int] = []
    stop_at = 14
    real = ToyBackend.sample

    def sample(self: ToyBackend, prompts: Any, *args: Any) -> Iterator[Any]:
        for found in real(self, prompts, *args):
            sampled.append(found[0])
            if len(sampled) == stop_at:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(ToyBackend, "sample", sample)
    small = [*LONGEST, "--sample-batch", "1"]
    code, _, _ = call(capfd, *small, "--out", str(here / "parts"))
    assert code == 130
    assert not (here / "parts/eval.json").exists()
    stop_at = -1
    parts = result(capfd, here / "parts", *small)
    assert len(sampled) == 14 + 20 - 10, "of ten prompts on either side, four are written at a time"
    assert parts == whole
    assert result(capfd, here / "parts", *small) == whole
    assert len(sampled) == 24, "nothing is answered again"


CHANGES = [
    ["--seed", "5"],
    ["--temp", "0.1"],
    ["--max-tokens", "3"],
    ["--limit-prompts", "4"],
    ["--prompts", "other.jsonl"],
    ["--judge", "random"],
    ["--judge", "likelihood"],
    ["--set", "sampling.top_p=0.1"],
]


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_each_option_changes_something(here: Path, capfd: pytest.CaptureFixture[str], change: list[str]) -> None:
    """Another number, of the same prompts and judge or others."""
    numbers = ("n", "win_rate", "length_a", "length_b", "judge")
    before = UNCHANGED or result(capfd, here, *LONGEST)
    UNCHANGED.update(before)
    after = result(capfd, here, *LONGEST, *change)
    assert [before[k] for k in numbers] != [after[k] for k in numbers]


UNCHANGED: dict[str, Any] = {}
"""The result without a change, once it is known."""

TOGETHER: list[tuple[tuple[str | None, str | None, str | None, set[str]], str]] = [
    ((LAST, None, None, set()), "--a and --b"),
    ((None, None, "alpacca", set()), "alpaca or mt-bench"),
    ((None, FIRST, "alpaca", set()), "leave --b out"),
    ((LAST, None, "alpaca", {"--from-annotations"}), "leave --a and --b out"),
    ((None, None, None, {"--questions"}), "--bench mt-bench"),
    ((None, None, "alpaca", {"--references"}), "--bench mt-bench"),
    ((None, None, None, {"--lc-data"}), "--bench alpaca"),
    ((None, None, "alpaca", {"--gsm8k"}), "one at a time"),
    ((None, None, None, {"--gsm8k", "--from-annotations"}), "one at a time"),
    ((None, None, "alpaca", {"--annotator"}), "--from-annotations"),
]


@pytest.mark.parametrize(("given", "names"), TOGETHER)
def test_options_that_do_not_go_together(
    given: tuple[str | None, str | None, str | None, set[str]], names: str
) -> None:
    """Each is named with the mend."""
    with pytest.raises(RecipeError, match=names):
        which_mode(*given)


UNUSED = [
    ("held-out", "inputs.prompts", "--prompts"),
    ("held-out", "judge.by", "--judge"),
    ("mt-bench", "sampling.temp", "--temp"),
    ("knowledge", "judge.by", "--judge"),
    ("annotations", "inputs.model", "--model"),
]


@pytest.mark.parametrize(("mode", "path", "flag"), UNUSED)
def test_what_would_change_nothing_is_refused(mode: str, path: str, flag: str) -> None:
    with pytest.raises(RecipeError, match=f"does not read {flag}"):
        check_read(mode, {path: "x"}, None)
    check_read(mode, {"seed": "1"}, None)


WRONG: list[tuple[list[str], int, str]] = [
    (["eval", "--a", LAST], 2, "--a and --b"),
    ([*VERSUS], 2, "who shall judge"),
    (["eval", "--run", "r", "--difficulty", "x"], 2, "--difficulty is about a head-to-head"),
    (["eval", "--bench", "alpaca", "--run", "r", "--difficulty", "x"], 2, "no use for --difficulty"),
    ([*VERSUS, "--judge", "gold"], 2, "gold knows no truth"),
    ([*VERSUS, "--judge", "openai"], 2, "--judge-url"),
    ([*VERSUS, "--judge", "implicit"], 2, "--adapter-path"),
    ([*VERSUS, "--judge", "longst"], 2, "judge.by"),
    (["eval", "--a", "nowhere", "--b", FIRST, "--judge", "longest"], 1, "nowhere is no file or folder"),
    (["eval", "--a", "runs", "--b", FIRST, "--judge", "longest"], 1, "neither an adapter nor a model"),
    (["eval", "--a", "held.jsonl", "--b", FIRST, "--judge", "longest"], 1, "held.jsonl, line 1"),
    (["eval", *TOY, "--a", "init", "--b", "model:toy:1", "--judge", "longest"], 2, "--prompts"),
    (["eval", "--run", "nope"], 1, "there is no run 'nope'"),
    (["eval", "--run", "r", "--scale", "lesson"], 2, "--scale"),
    (["eval", *TOY], 2, "--held-out"),
    (["eval", "--held-out", "asked.jsonl"], 1, "asked.jsonl, line 1"),
    (["eval", "--bench", "mt-bench", "--judge", "self-score"], 2, "--questions"),
    (["eval", "--bench", "mt-bench", "--questions", "asked.jsonl", "--judge", "longest"], 2, "in words"),
    (["eval", "--bench", "mt-bench", "--questions", "asked.jsonl", "--judge", "self-score"], 1, "asked.jsonl, line 1"),
    (["eval", "--bench", "alpaca", "--a", "asked.jsonl", "--reference-outputs", "x.json"], 1, "a model is needed"),
    (["eval", "--bench", "alpaca", "--a", LAST], 1, "alpaca_eval_gpt4_baseline.json itself as --reference-outputs"),
    (["eval", "--from-annotations", "x.json"], 1, "x.json"),
    (["eval", "--gsm8k", "asked.jsonl"], 1, "asked.jsonl, line 1"),
    (["eval", "--multiple-choice", "nowhere.jsonl"], 1, "nowhere.jsonl"),
]


@pytest.mark.parametrize(("args", "code", "names"), WRONG, ids=[" ".join(a[-2:]) for a, _, _ in WRONG])
def test_wrong_input_gets_one_sentence(
    here: Path, capfd: pytest.CaptureFixture[str], args: list[str], code: int, names: str
) -> None:
    """It names the thing and the mend; no traceback."""
    found, _, err = call(capfd, *args, "--out", str(here))
    assert found == code, err
    assert "Traceback" not in err
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert names in last[0]


def test_results_are_not_lost_to_a_strange_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An eval.json that is not ours is neither read nor overwritten; a folder that cannot be made is named."""
    (here / "eval.json").write_text("[1]")
    code, _, err = call(capfd, *LONGEST, "--out", str(here))
    assert code == 1
    assert "eval.json is not a file of this version" in err
    assert (here / "eval.json").read_text() == "[1]"
    code, _, err = call(capfd, *LONGEST, "--out", str(here / "eval.json"))
    assert code == 1
    assert "choose another folder with --out" in err


# --- benchmarks ------------------------------------------------------------------------------------------------


def alpaca_files(folder: Path) -> tuple[str, str]:
    """References of six prompts, and annotations of them: the model won every third."""
    refs = [{"instruction": f"q{i}", "output": "r" * (i + 1), "generator": "ref"} for i in range(6)]
    told = [
        {"instruction": r["instruction"], "output_1": r["output"], "generator_1": "ref", "output_2": "mm",
         "generator_2": "mine", "annotator": "J", "preference": 2.0 if i % 3 == 0 else 1.0}
        for i, r in enumerate(refs)
    ]  # fmt: skip
    (folder / "refs.json").write_text(json.dumps(refs))
    (folder / "told.json").write_text(json.dumps(told))
    return str(folder / "refs.json"), str(folder / "told.json")


def test_annotations_need_no_framework(here: Path) -> None:
    """Scored in a process of its own, which never imports torch, MLX, transformers or datasets."""
    _, told = alpaca_files(here)
    code = (
        "import sys; from spa_lite.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "print([name for name in ('torch', 'mlx', 'transformers', 'datasets', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", "--from-annotations", told, "--json", "--out", str(here)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, imported = done.stdout.splitlines()
    assert imported == "[]"
    found = json.loads(out)
    assert found["result"]["win_rate"]["value"] == pytest.approx(1 / 3)
    assert found["result"]["length_controlled"]["name"] == "LC (no difficulty)"


def test_bare_annotations_reach_the_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without the names of models and judge, too."""
    from spa_lite.benches import alpaca_package
    from spa_lite.cli.eval_annotations import annotated

    _, told = alpaca_files(here)
    bare = [{k: a[k] for k in ("instruction", "output_1", "output_2", "preference")} for a in json.loads(
        Path(told).read_text()
    )]  # fmt: skip
    (here / "bare.json").write_text(json.dumps(bare))
    asked: list[Any] = []

    def run(annotations: Any, lc_data: Path | None = None) -> alpaca_package.Package:
        asked.extend(annotations)
        return alpaca_package.Package({"n_total": len(annotations)}, [])

    monkeypatch.setattr(alpaca_package, "run_annotations", run)
    found = annotated(str(here / "bare.json"), None, None, True, 0)
    assert (found["package"], asked) == ({"n_total": 6}, bare)


def test_alpaca_with_a_judge_of_ones_own(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Outputs and annotations in AlpacaEval's form, which score the same when they are read again."""
    refs, _ = alpaca_files(here)
    bench = ["eval", "--bench", "alpaca", "--a", LAST, "--reference-outputs", refs]
    alone = result(capfd, here, *bench)
    outputs = json.loads((here / "model_outputs.json").read_text())
    assert [o["instruction"] for o in outputs] == [f"q{i}" for i in range(6)]
    assert {o["generator"] for o in outputs} == {LAST}
    assert "result" not in alone
    judged = result(capfd, here, *bench, "--judge", "longest")
    again = result(capfd, here, "eval", "--from-annotations", str(here / "annotations.json"))
    assert again["result"]["win_rate"] == judged["result"]["win_rate"]
    wins = sum(1.0 if len(o["output"]) > i + 1 else 0.5 * (len(o["output"]) == i + 1) for i, o in enumerate(outputs))
    assert judged["result"]["win_rate"]["value"] == pytest.approx(wins / 6)
    mine = result(capfd, here, "eval", "--bench", "alpaca", "--a", LAST, "--prompts", "asked.jsonl")
    assert mine["n"] == 10
    (here / "p.json").write_text('[{"instruction": "Name a lake."}]')
    assert result(capfd, here, "eval", "--bench", "alpaca", "--a", LAST, "--prompts", str(here / "p.json"))["n"] == 1
    two = result(capfd, here, *bench, "--judge", "longest", "--limit-prompts", "2")
    assert "4 prompts of the references were not answered" in two["warnings"]


def test_mt_bench(here: Path, fake: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Two turns of each question, graded; the name says that the files are not the official ones."""
    asked = [{"question_id": i, "category": "writing", "turns": ["hello", "more"]} for i in range(3)]
    (here / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    bench = ["eval", "--bench", "mt-bench", "--a", LAST, "--questions", str(here / "q.jsonl"), *fake]
    found = result(capfd, here, *bench)
    assert found["result"]["average"]["value"] == 7
    assert found["result"]["graded"] == 6
    assert found["result"]["name"].startswith("custom questions")
    assert len(lines(here / "mt-bench-grades.jsonl")) == 6
    code, out, _ = call(capfd, *bench, "--out", str(here))
    assert code == 0
    assert "7.00 [7.00, 7.00]" in out


def test_knowledge_before_and_after(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both files in one command; without sides they compare init and the last round."""
    (here / "g.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer": "#### 4"}\n'
    )
    choices = {"question": "Which?", "choices": ["red", "cup"], "answer": 0}
    (here / "c.jsonl").write_text(json.dumps(choices) + "\n")
    files = ["--gsm8k", str(here / "g.jsonl"), "--multiple-choice", str(here / "c.jsonl")]
    code, out, err = call(capfd, "eval", "--run", "r", *files, "--out", str(here), "--json")
    assert code == 0, err
    gsm8k, choice = map(json.loads, out.splitlines())
    assert [one["name"] for one in gsm8k["sides"]] == ["init", "round 2"]
    assert gsm8k["rules"]["last number"]["change"]["questions"] == 2
    told = zip(gsm8k["sides"], gsm8k["rules"]["last number"]["sides"], strict=True)
    unread = [f"{who['name']}: {one['unread']} replies without a number" for who, one in told if one["unread"]]
    assert unread
    assert all(any(w.startswith(line) for w in gsm8k["warnings"]) for line in unread)
    assert set(choice["rules"]) == {"sum", "per character", "per token"}
    one = result(capfd, here, "eval", "--a", LAST, "--b", LAST, *files[:2])
    assert one["rules"]["last number"]["change"] is None
    code, out, err = call(capfd, "eval", "--run", "r", *files, "--out", str(here))
    assert code == 0
    assert "gained, lost" in out
    assert f"warning: {gsm8k['warnings'][0]}" in err


# --- the lesson ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_lesson_knows_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its held-out prompts and gold are the defaults of a head-to-head."""
    monkeypatch.chdir(tmp_path)
    seed = str(MODEL_DIR.parent / "seed_adapter")
    found = result(capfd, tmp_path / "out", "eval", "--a", seed, "--b", "init", "--measure-prompts", "6")
    assert (found["n"], found["judge"]["name"]) == (6, "gold")


# --- files of answers ------------------------------------------------------------------------------------------

ANSWERS = [
    ('{"prompt": "p", "answer": "x"}', "x"),
    ('{"messages": [{"role": "user", "content": "p"}], "response": "x"}', "x"),
    ('{"instruction": "p", "output": "x"}', "x"),
    ('{"id": "1", "messages": [{"role": "user", "content": "p"}], "prompt_ids": [1], "completions": '
     '[{"ids": [1], "text": "x", "ended": "eos"}, {"ids": [2], "text": "y", "ended": "eos"}]}', "x"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "text"), ANSWERS)
def test_answers_in_every_form(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (found,) = read_answers(tmp_path / "a.jsonl")
    assert found.messages == (Message(role="user", content="p"),)
    assert found.completions[0].text == text


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ('{"prompt": "p"}', "line 1: there is no text in `answer`"),
        ('{"answer": "x"}', "line 1: there is no text in `prompt`"),
        ('{"prompt": "p", "answer": 3}', "line 1: there is no text in `answer`"),
        ('{"messages": "p", "answer": "x"}', "line 1"),
        (
            '{"prompt": "p", "answer": "x"}\n{"instruction": "p", "output": "y"}',
            "line 2: this prompt is answered above",
        ),
        ('{"id": "1", "messages": [], "prompt_ids": [], "completions": []}', "no answer in `completions`"),
        ("", "holds no answer"),
        ("nonsense", "line 1"),
    ],
)
def test_bad_answers_are_named(tmp_path: Path, content: str, names: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=names):
        read_answers(tmp_path / "a.jsonl")
