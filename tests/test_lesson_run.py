"""The built-in lesson through the real model: a small case of `spa-lite run`, and (long) the whole of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spa_lite import backends, lesson
from spa_lite.backend import POLICY, ModelSettings, Sampling
from spa_lite.evaluate import wilson
from spa_lite.recipe import read_yaml
from spa_lite.stages.workbench import read_samples
from tests.small import lines
from tests.speaking import LATE, Command, Terminal, answer

if all(backends.missing(name) for name in ("torch", "mlx")):
    pytest.skip("the lesson model needs a framework; toy covers the method without one", allow_module_level=True)

TINY = ["--lesson-seed-pairs", "12", "--lesson-prompts", "24", "--lesson-held-out", "20", "--rounds", "2"]
CRITERIA = ["correctness", "completeness", "courtesy", "brevity", "ending"]


def spa_lite(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A real command in a real process."""
    command = [sys.executable, "-m", "spa_lite.cli", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ.copy())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One tiny lesson run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("lesson")
    done = spa_lite("run", *TINY, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_the_table(run: tuple[Path, str]) -> None:
    """A row per stage with every promised number."""
    _, printed = run
    for column in ("win rate vs init %", "labels right %", "length", "flagged %", "of them wrong", "loss", "seconds"):
        assert column in printed
    for name in [*CRITERIA, "init", "seed", "round 1", "round 2"]:
        assert name in printed


def test_the_summary(run: tuple[Path, str]) -> None:
    """Intervals hold their values; the win rate is against init on the same prompts; labels are counted."""
    summary = json.loads((run[0] / "summary.json").read_text())
    rows = {row["stage"]: row for row in summary["rows"]}
    assert list(rows["init"]["gold"]) == [*CRITERIA, "score"]
    assert "win_rate" not in rows["init"]
    for stage in ("seed", "round 1", "round 2"):
        rate = rows[stage]["win_rate"]
        assert rate["n"] == 20
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        assert rows[stage]["trained"]["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    for stage in ("round 1", "round 2"):
        assert 0 < rows[stage]["label_accuracy"]["score"]["n"] <= 12
        assert rows[stage]["flags"]["pairs"] == 12


def test_no_gold_inside_a_round(run: tuple[Path, str]) -> None:
    """The labels of a round are the implicit reward's, whatever gold says."""
    for judged in lines(run[0] / "rounds/1/judgements.jsonl"):
        assert judged["judge"] == "implicit"
        assert judged["label"] == ("a" if judged["margin"] > 0 else "b")


def test_the_gold_control(run: tuple[Path, str], tmp_path: Path) -> None:
    """judge.by=gold agrees with gold on every pair whose gold differs: the ceiling."""
    done = spa_lite("run", *TINY, "--rounds", "1", "--judge", "gold", "--json", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][-1]
    assert row["label_accuracy"]["score"]["value"] == 1.0


@pytest.mark.parametrize(
    ("flag", "value", "count"),
    [
        ("--measure-prompts", "7", 7),
        pytest.param("--lesson-held-out", "9", 9, marks=pytest.mark.long),
        pytest.param("--lesson-split", "tune", 20, marks=pytest.mark.long),
    ],
)
def test_lesson_sizes_matter(run: tuple[Path, str], tmp_path: Path, flag: str, value: str, count: int) -> None:
    """How many held-out prompts, and which."""
    done = spa_lite("run", *TINY, "--rounds", "0", flag, value, "--out", "x", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = lines(tmp_path / "x/init/answers.jsonl")
    assert len(answers) == count
    same = [a["messages"] for a in answers] == [a["messages"] for a in lines(run[0] / "init/answers.jsonl")[:count]]
    assert same == (value != "tune")


@pytest.mark.long
def test_the_temperature_of_measuring(run: tuple[Path, str], tmp_path: Path) -> None:
    """The same prompts are answered otherwise."""
    done = spa_lite("run", *TINY, "--rounds", "0", "--measure-temp", "0", "--out", "x", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (lines(folder / "init/answers.jsonl") for folder in (tmp_path / "x", run[0]))
    assert [a["messages"] for a in one] == [a["messages"] for a in other]
    assert [a["completions"] for a in one] != [a["completions"] for a in other]


def test_judge_on_a_fresh_machine(tmp_path: Path) -> None:
    """`spa-lite judge pairs.jsonl` works verbatim, says with what, and tells polite from rude in its own world."""
    from spa_lite.lesson.source import pairs

    with (tmp_path / "pairs.jsonl").open("wb") as file:
        for pair in pairs("tune", 60, 0):
            file.write(msgspec.json.encode(pair) + b"\n")
    done = spa_lite("judge", "pairs.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "built-in model and its seed adapter; it knows only its lesson" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 60
    right = wilson(sum(record["label"] == "a" for record in found), 60)
    assert right is not None
    assert right.low > 0.5, "the shipped adapter prefers what gold prefers more often than chance"


def test_the_method_from_python(tmp_path: Path) -> None:
    """An adapter of a finished run judges as it did when it was trained, where the run scored all answers, too."""
    done = spa_lite("run", *TINY, "--rounds", "1", "--rescore", "always", "--out", "run", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = tmp_path / "run/rounds/1/samples.jsonl"
    adapter = str(tmp_path / "run/rounds/0/adapter")
    done = spa_lite("judge", str(samples), "--adapter-path", adapter, "-o", "again.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "run/rounds/1/judgements.jsonl").read_bytes()


def test_the_model_is_small() -> None:
    """At most 6 MB of float16 safetensors, nothing pickled."""
    files = {p.name: p.stat().st_size for p in lesson.MODEL_DIR.iterdir()}
    assert files["model.safetensors"] <= 6_000_000
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.long
def test_the_build_can_be_repeated(tmp_path: Path) -> None:
    """A few steps of the build, twice: the same files, in the format of the shipped model."""
    pytest.importorskip("torch", reason="the model is built with PyTorch")
    command = [sys.executable, "-m", "spa_lite.lesson.build", "--steps", "3", "--threads", "1", "--out"]
    for name in ("one", "two"):
        done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {p.name for p in lesson.MODEL_DIR.iterdir()}
    assert one["tokenizer.json"] == (lesson.MODEL_DIR / "tokenizer.json").read_bytes()
    assert one["config.json"] == (lesson.MODEL_DIR / "config.json").read_bytes()


@pytest.mark.long
def test_the_whole_lesson(tmp_path: Path) -> None:
    """`spa-lite run` with nothing else: the final model beats init, interval above one half, and says how."""
    done = spa_lite("run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    final = rows[-1]
    assert final["win_rate"]["low"] > 0.5
    assert final["win_rate"]["n"] >= 400
    again = spa_lite("run", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["rows"] == rows
    assert "nothing was computed again" not in done.stderr


@pytest.mark.long
@pytest.mark.loopback
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_the_final_adapter_speaks(run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal and through the endpoint, at temperature 0: the same words, and those of the policy on its base."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    monkeypatch.chdir(run[0].parent)
    sample = next(read_samples(run[0] / "rounds/2/samples.jsonl"))
    question = sample.messages[-1].content
    terminal = Terminal(run[0].parent, "run", "--temp", "0", width=200, timeout=120)
    said = answer(terminal.says(question))
    terminal.child.send("\x04")
    assert terminal.ends() == 0
    backend = backends.load(None, ModelSettings(str(lesson.MODEL_DIR)))
    backend.bind(POLICY, run[0] / "adapter")
    greedy = Sampling(0.0, 1.0, read_yaml(run[0] / "recipe.yaml")["sampling.max_tokens"])
    expected = backend.tokenizer.decode(list(backend.stream(sample.prompt_ids, greedy, bytes(16))))
    assert said == expected
    command = Command("run")
    with openai.OpenAI(base_url=command.url, api_key="none", max_retries=0, timeout=LATE) as client:
        turn: Any = {"role": "user", "content": question}
        reply = client.chat.completions.create(model="last", temperature=0, messages=[turn])
    assert reply.choices[0].message.content == expected
    assert command.end()[0] == 130


@pytest.mark.gguf
@pytest.mark.long
def test_a_gguf_draws_the_answers(run: tuple[Path, str], tmp_path: Path) -> None:
    """From a float32 file, with each round's adapter: the samples, labels and adapters of the run without it."""
    pytest.importorskip("llama_cpp", reason="needs the extra: pip install 'spa-lite[gguf]'")
    done = spa_lite("export", "init", "base", "--to", "gguf", "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by = ("--sampler", "gguf:base/model.gguf", "--rescore", "always")
    done = spa_lite("run", *TINY, *by, "--out", "by", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for i in (1, 2):
        found, expected = (lines(folder / f"rounds/{i}/samples.jsonl") for folder in (tmp_path / "by", run[0]))
        assert [[c["ids"] for c in s["completions"]] for s in found] == [
            [c["ids"] for c in s["completions"]] for s in expected
        ]
        marker = json.loads((tmp_path / f"by/rounds/{i}/sample.done.json").read_text())
        assert marker["made_by"]["backend"] == "llamacpp"
