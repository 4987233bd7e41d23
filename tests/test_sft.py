"""Supervised fine-tuning: the objective by hand, what is learned from, and the command."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite import data, sft, train
from spa_lite.backend import INIT, POLICY, Batch, Lora, ModelSettings, Optimizer
from spa_lite.backends import load
from spa_lite.backends.toy import ToyBackend
from spa_lite.checkpoint import Checkpoints
from spa_lite.errors import DataError, RecipeError
from spa_lite.lesson import source, world
from spa_lite.recipe import build
from spa_lite.records import Demonstration, Message, Row
from spa_lite.store import FORMAT
from spa_lite.train import Example
from tests.small import GOOD, lines
from tests.test_cli import call
from tests.tiny import NARROW, make_model

ASKED = (Message(role="user", content="Name a river."),)


def write(path: Path, records: list[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small(folder: Path, count: int = 20) -> Path:
    """A file of short demonstrations."""
    records = [
        {"prompt": f"say {i}", "completion": " ".join(GOOD[(i + k) % 5] for k in range(i % 3 + 1))}
        for i in range(count)
    ]
    return write(folder / "demos.jsonl", records)


def batch(logp: list[float], tokens: list[int], row: list[int] | None = None) -> Batch:
    """What an objective sees of rows of one response."""
    rows, none = np.array(row or range(len(logp))), np.zeros(0)
    return Batch(np.array(logp), none, none, np.array(tokens), rows, np.unique(rows))


# --- the objective ---------------------------------------------------------------------------------------------------


def test_the_loss_worked_by_hand() -> None:
    """6 nats over 3 tokens and 1 over 4: losses of 2 and 0.25, coefficients of -1/3 and -1/4."""
    outcome = sft.Sft()(batch([-6.0, -1.0], [3, 4]))
    assert outcome.loss.tolist() == [2.0, 0.25]
    assert outcome.coefficients.tolist() == [-1 / 3, -1 / 4]


def test_the_coefficients_are_the_slope_of_the_loss() -> None:
    objective, logp, tokens, step = sft.Sft(), [-3.0, -0.5, -7.0], [2, 5, 3], 1e-6
    found = objective(batch(logp, tokens)).coefficients
    for index in range(3):
        moved = [value + step * (place == index) for place, value in enumerate(logp)]
        change = objective(batch(moved, tokens)).loss.sum() - objective(batch(logp, tokens)).loss.sum()
        assert change / step == pytest.approx(found[index], abs=1e-6)


def test_rows_of_two_answers_are_refused() -> None:
    with pytest.raises(RecipeError, match="exactly one answer"):
        sft.Sft()(batch([-1.0, -2.0], [1, 2], [0, 0]))


# --- a step ----------------------------------------------------------------------------------------------------------


def started(backend: Any, adapter: Path | None = None) -> Any:
    """A backend whose training has begun, from a fresh adapter or a stored one."""
    backend.bind(INIT)
    backend.bind(POLICY, adapter, None if adapter else Lora(4, 8.0))
    backend.snapshot()
    backend.start_training(Optimizer())
    return backend


def examples(backend: Any) -> list[Example]:
    """Six conversations and an answer to each, of different lengths."""
    said = ["two plums.", "the blue door carries seven letters", "no", "an old map!", "yes, again", "a heron"]
    pairs = [((Message(role="user", content=f"what is {n}?"),), text) for n, text in enumerate(said)]
    recipe = build({"test": {"lengths.max_prompt_length": 100, "lengths.max_length": 200}})[0]
    return sft.rows_of(pairs, backend, recipe)[0]


def taught(backend: Any, folder: Path, rate: float, steps: int = 6) -> list[float]:
    """The losses of a few steps on all examples."""
    changes = {"sft.learning_rate": rate, "sft.epochs": steps, "sft.batch_size": 6, "train.schedule": "constant"}
    recipe = build({"test": changes | {"train.warmup": 0.0}})[0]
    folder.mkdir(exist_ok=True)
    sft.teach(backend, examples(backend), recipe, Checkpoints(folder))
    return [line["loss"] for line in lines(folder / "metrics.jsonl")]


def test_what_is_reported_is_the_likelihood_of_the_answers_alone() -> None:
    backend = started(load("toy", ModelSettings(model="toy")))
    rows = [example.row for example in examples(backend)]
    scores = [dict(backend.logprob([row], POLICY))[0][0] for row in rows]
    stats = backend.dpo_step(rows, sft.Sft(), 0.0)
    assert stats.loss == pytest.approx(np.mean([-score.logp / score.tokens for score in scores]))
    found = sft.likelihood(backend, rows, POLICY)
    assert found.tokens == stats.tokens == sum(len(row.responses[0]) for row in rows)
    assert found.loss == pytest.approx(-sum(score.logp for score in scores) / found.tokens)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_the_prompt_is_never_learned() -> None:
    """However likely it is: `q` follows `z` only within the prompt, whose last byte is another one."""
    asked = (Message(role="user", content="zq zq?"),)
    met = []
    for likelier in (0.0, 5.0):
        backend = ToyBackend(ModelSettings(model="toy"))
        backend.base = backend.base.copy()
        backend.base[ord("z"), ord("q")] += likelier
        recipe = build({"test": {}})[0]
        (example,), _ = sft.rows_of([(asked, "plum")], backend, recipe)
        assert {ord("z"), ord("q")} <= set(example.row.prompt[:-1])
        stats = started(backend).dpo_step([example.row], sft.Sft(), 0.1)
        delta = backend.logits(POLICY) - backend.base
        assert not delta[[ord("z"), ord("q")]].any()
        assert delta[ord("p"), ord("l")] > 0
        met.append((stats.loss, stats.grad_norm))
    assert met[0] == met[1]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSettings, Path, list[float]]:
    """A tiny model, an adapter on it, and the losses of a few steps from there, in PyTorch."""
    pytest.importorskip("torch", reason="the tiny model is made with PyTorch")
    folder = tmp_path_factory.mktemp("learned")
    settings = ModelSettings(model=str(make_model(folder / "model", "llama", **NARROW)), device="cpu")
    backend = started(load("torch", settings))
    backend.save(folder / "start", POLICY, optimizer=False)
    return settings, folder / "start", taught(started(backend, folder / "start"), folder / "torch", 1e-2)


def test_pytorch_learns(learned: tuple[ModelSettings, Path, list[float]]) -> None:
    losses = learned[2]
    assert losses[-1] < losses[0] - 0.1
    assert (np.diff(losses) < 0).all()


def test_mlx_learns_the_same(learned: tuple[ModelSettings, Path, list[float]], tmp_path: Path) -> None:
    """From the same adapter the same losses."""
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    settings, start, losses = learned
    assert taught(started(load("mlx", settings), start), tmp_path / "mlx", 1e-2) == pytest.approx(losses, abs=2e-3)


def test_the_toy_learns(tmp_path: Path) -> None:
    losses = taught(started(load("toy", ModelSettings(model="toy"))), tmp_path, 0.1)
    assert (np.diff(losses) < 0).all()


def test_rows_are_cut_skipped_and_counted() -> None:
    backend = load("toy", ModelSettings(model="toy"))
    recipe = build({"test": {"lengths.max_prompt_length": 40, "lengths.max_length": 45}})[0]
    long = (Message(role="user", content="river " * 20),)
    rows, told = sft.rows_of([(ASKED, "Po"), (long, "Po"), (ASKED, "Po " * 40)], backend, recipe, ["a", "b", "c"])
    assert [example.id for example in rows] == ["a", "c"]
    assert rows[0].row == Row(
        prompt=tuple(backend.tokenizer.encode_prompt(ASKED)),
        responses=((*b"Po", backend.tokenizer.end_of_turn),),
    )
    assert backend.tokenizer.end_of_turn not in rows[1].row.responses[0]
    assert (told.kept, told.long_prompts, told.cut_responses) == (2, 1, 1)
    named, _ = sft.rows_of([(ASKED, "Po"), (ASKED, "Rhine")], backend, recipe)
    assert len({example.id for example in named}) == 2


# --- demonstrations --------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Po"}
FORMS = [
    {"prompt": "Name a river.", "completion": "Po"},
    {"prompt": "Name a river.", "answer": "Po"},
    {"prompt": "Name a river.", "response": "Po"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"messages": [USER], "completion": "Po"},
    {"messages": [USER, ANSWER]},
    {"prompt": "Name a river.", "messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "Po"}]},
    {"instruction": "Name a river.", "input": "", "output": "Po"},
    {"prompt": "Name a river.", "chosen": "Po", "rejected": "Alps"},
    {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "Alps"}]},
]


@pytest.mark.parametrize("record", FORMS)
def test_a_demonstration_in_any_form(record: dict[str, Any], tmp_path: Path) -> None:
    (found,), _ = data.read_demonstrations(write(tmp_path / "d.jsonl", [record | {"id": "x", "topic": "water"}]))
    assert found == Demonstration(id="x", messages=ASKED, answer="Po", extra={"topic": "water"})


def test_of_several_turns_the_last_is_the_answer(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
        USER | {"content": "Another."},
        ANSWER | {"content": "Rhine"},
    ]
    (found,), _ = data.read_demonstrations(write(tmp_path / "d.jsonl", [{"messages": turns}]))
    assert [turn.role for turn in found.messages] == ["system", "user", "assistant", "user"]
    assert found.answer == "Rhine"
    (asked,), _ = data.read_demonstrations(
        write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    )
    assert asked.messages[0].content == "Add.\n\n1 2"


def test_repeats_are_counted_and_a_prompt_may_have_two_answers(tmp_path: Path) -> None:
    second = {"prompt": "Name a river.", "completion": "Rhine"}
    found, report = data.read_demonstrations(write(tmp_path / "d.jsonl", [*FORMS, second]))
    assert [one.answer for one in found] == ["Po", "Rhine"]
    assert report.repeated == len(FORMS) - 1
    assert found[0].id != found[1].id


BAD = [
    ({"completion": "Po"}, "neither `prompt` nor `messages`"),
    ({"prompt": "Name a river."}, "there is no answer; add `completion`"),
    ({"messages": [USER]}, "there is no answer"),
    ({"messages": [ANSWER]}, "no user turn"),
    ({"messages": []}, "empty list"),
    ({"prompt": "Name a river.", "completion": " "}, "`completion` is empty"),
    ({"prompt": "Name a river.", "completion": 7}, "`completion` is a number"),
    ({"prompt": "Name a river.", "completion": [USER]}, "ends with a turn of role 'user'"),
    ({"prompt": "Name a river.", "completion": [USER, ANSWER]}, "holds 2 turns"),
    ({"prompt": "Name a river.", "completion": "Po", "answer": "Rhine"}, "are different answers; keep one"),
    ({"prompt": "Name a lake.", "messages": [USER, ANSWER]}, "`prompt` and `messages` disagree"),
    ({"instruction": "Name a river.", "output": ""}, "`output` is empty"),
    ({"conversations": [{"from": "bot", "value": "Po"}, {"from": "gpt", "value": "Po"}]}, "unknown role 'bot'"),
    ({"prompt": "Name a river.", "chosen": "Po"}, "`rejected` is missing"),
    ({"prompt": "Name a river.", "completion": "P\0"}, "NUL"),
    (["Po"], "not an object"),
]


@pytest.mark.parametrize(("record", "said"), BAD)
def test_a_bad_demonstration_is_refused_or_counted(record: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [FORMS[0], record])
    with pytest.raises(DataError) as refused:
        data.read_demonstrations(path)
    assert said in str(refused.value)
    assert f"{path}, line 2" in str(refused.value)
    found, report = data.read_demonstrations(path, skip_bad=True)
    assert len(found) == report.skipped == 1


@pytest.mark.parametrize(("name", "said"), [("hub:nonsense", "hub:owner/name"), ("gone.jsonl", "no such file")])
def test_a_source_that_is_none(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        data.read_demonstrations(name)


def test_held_out_demonstrations_share_no_prompt(tmp_path: Path) -> None:
    every = [
        Demonstration(id=f"{n}{k}", messages=(Message(role="user", content=str(n)),), answer=str(k))
        for n in range(20)
        for k in range(2)
    ]
    learn, held = data.hold_out(every, 0.1)
    assert len(held) == 4
    assert len(learn) == 36
    assert not {one.messages for one in learn} & {one.messages for one in held}


def test_the_lessons_demonstrations_are_perfect() -> None:
    every = source.demonstrations(30, 0)
    scores = [world.gold_score(world.gold(one.extra["lesson"]["facts"], one.answer)) for one in every]
    assert min(scores) == 1.0
    assert every == source.demonstrations(30, 0) != source.demonstrations(30, 1)
    assert all(world.split_of(one.messages[0].content) == "seed" for one in every)


# --- the command -----------------------------------------------------------------------------------------------------

TOY = ["--backend", "toy", "--model", "toy", "--lr", "0.05", "--batch-size", "4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with demos.jsonl to work in."""
    small(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(folder: Path) -> dict[str, bytes]:
    """What must not depend on how often the work was interrupted."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"timings.json", ".lock", "sft.done.json"}
    }


def test_the_command(here: Path) -> None:
    """A process of its own: the loss falls on what was held out, and says so on stdout."""
    command = [sys.executable, "-m", "spa_lite.cli", "sft", "demos.jsonl", *TOY, "--epochs", "5", "--out", "out"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, env=dict(os.environ))
    found = json.loads((here / "out/sft.json").read_text())
    assert (found["demonstrations"], found["steps"], found["before"]["answers"]) == (18, 25, 2)
    assert found["after"]["loss"] < found["before"]["loss"] - 0.2
    assert f"perplexity {found['after']['perplexity']:.3f}" in done.stdout
    assert "held out for measuring: 2" in done.stderr
    assert {path.name for path in (here / "out").iterdir()} == {
        "adapter", "metrics.jsonl", "sft.json", "sft.done.json", "timings.json", ".lock",
    }  # fmt: skip
    assert len(lines(here / "out/metrics.jsonl")) == 25


def test_finished_work_is_kept_and_other_work_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sft", "demos.jsonl", *TOY, "--out", "out"]
    assert call(capfd, *command)[0] == 0
    before = results(here / "out")
    code, out, err = call(capfd, *command)
    assert code == 0
    assert "nothing was computed again" in err
    assert "held out, after" in out
    code, _, err = call(capfd, *command, "--epochs", "4")
    assert code == 1
    assert "sft.epochs was 3 when stage 'sft'" in err
    write(here / "demos.jsonl", [FORMS[0], {"prompt": "Name a lake.", "answer": "Como"}])
    code, _, err = call(capfd, *command)
    assert code == 1
    assert "demonstrations, held out changed" in err
    assert results(here / "out") == before
    assert call(capfd, *command, "--fresh")[0] == 0
    assert results(here / "out") != before


def test_what_others_left_is_never_deleted(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "out/adapter").mkdir(parents=True)
    (here / "out/adapter/precious").touch()
    for more in ([], ["--fresh"]):
        code, _, err = call(capfd, "sft", "demos.jsonl", *TOY, "--out", "out", *more)
        assert code == 1
        assert "not of `sft`" in err
    assert (here / "out/adapter/precious").exists()
    (here / "begun").mkdir()
    (here / "begun/run.json").write_text(json.dumps({"format": FORMAT}))
    code, _, err = call(capfd, "sft", "demos.jsonl", *TOY, "--out", "begun")
    assert code == 1
    assert "run.json is there already" in err


@pytest.mark.parametrize("at", [1, 7, 20])
def test_interrupted_is_uninterrupted(
    at: int, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in some step: a checkpoint is kept, and the same command ends with the same bytes."""
    command = ["sft", "demos.jsonl", *TOY, "--epochs", "5", "--out"]
    real, count = train.optimizer_step, 0

    def step(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "optimizer_step", step)
    code, _, err = call(capfd, *command, "broken")
    assert code == 130
    assert "run the same command again" in err
    assert not (here / "broken/adapter").exists()
    assert call(capfd, *command, "broken")[0] == 0
    assert count == 25
    assert call(capfd, *command, "whole")[0] == 0
    assert results(here / "broken") == results(here / "whole")


def test_other_settings_do_not_go_on(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RecipeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", fail)
        assert call(capfd, "sft", "demos.jsonl", *TOY, "--out", "out")[0] == 2
    assert (here / "out/sft.part").is_dir()
    code, _, err = call(capfd, "sft", "demos.jsonl", *TOY, "--epochs", "1", "--out", "out")
    assert code == 0
    assert "was begun with other settings" in err
    assert json.loads((here / "out/sft.json").read_text())["steps"] == 5


CHANGES = {
    "--epochs": "2",
    "--sft-epochs": "4",
    "--batch-size": "3",
    "--learning-rate": "0.1",
    "--seed": "1",
    "--schedule": "constant",
    "--warmup": "0.5",
    "--weight-decay": "0.5",
    "--max-grad-norm": "0.05",
    "--max-steps": "3",
    "--max-seq-length": "60",
    "--max-prompt-length": "30",
    "--held-out": "0.5",
}


def test_every_setting_changes_the_adapter(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a record with a longer prompt and one with a longer answer, too."""
    with (here / "demos.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "say " * 9, "completion": "red"}) + "\n")
        file.write(json.dumps({"prompt": "say it", "completion": "red cat " * 9}) + "\n")
    limits = ["--max-prompt-length", "50", "--max-seq-length", "200"]
    base = ["sft", "demos.jsonl", *TOY, "--held-out", "0", *limits, "--out"]
    assert call(capfd, *base, "plain")[0] == 0
    adapters = [(here / "plain/adapter/adapter_model.safetensors").read_bytes()]
    for flag, value in CHANGES.items():
        code, _, err = call(capfd, *base, flag, flag, value)
        assert code == 0, err
        adapters.append((here / flag / "adapter/adapter_model.safetensors").read_bytes())
        assert adapters[-1] != adapters[0], flag
    assert len(set(adapters)) == len(adapters)


def test_the_lesson(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a file: some of its careful writers' answers, into an adapter of the shape that was asked for."""
    pytest.importorskip("peft")
    asked = ["--lesson-seed-pairs", "20", "--lora-rank", "2", "--lora-targets", "q_proj", "--max-steps", "2"]
    code, out, err = call(capfd, "sft", "--backend", "torch", *asked, "--out", "out")
    assert code == 0, err
    assert "the built-in lesson" in err
    assert "18 demonstrations, 2 steps" in out
    shape = json.loads((here / "out/adapter/adapter_config.json").read_text())
    assert shape["r"] == 2
    assert shape["target_modules"] == ["q_proj"]


def test_an_adapter_is_taught_further(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, "sft", "demos.jsonl", *TOY, "--out", "one")[0] == 0
    assert call(capfd, "sft", "demos.jsonl", *TOY, "--adapter-path", "one/adapter", "--out", "two")[0] == 0
    one, two = (json.loads((here / name / "sft.json").read_text()) for name in ("one", "two"))
    assert two["before"] == one["after"]
    assert two["after"]["loss"] < two["before"]["loss"]


def test_held_out_is_a_share_or_a_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(here / "held.jsonl", [{"prompt": "say 3", "answer": "red"}, {"prompt": "say x", "answer": "blue"}])
    for value, learned, held in (("held.jsonl", 19, 2), ("0.25", 15, 5), ("50%", 10, 10), ("0", 20, None)):
        code, out, err = call(capfd, "sft", "demos.jsonl", *TOY, "--held-out", value, "--json", "--out", f"{learned}")
        assert code == 0, err
        found = json.loads(out)
        assert found["demonstrations"] == learned
        assert found.get("after", {}).get("answers") == held
    code, _, err = call(capfd, "sft", "demos.jsonl", *TOY, "--held-out", "50", "--out", "x")
    assert code == 2
    assert "the held-out fraction is 50.0" in err
    code, _, err = call(capfd, "sft", "demos.jsonl", *TOY, "--held-out", "demos.jsonl", "--out", "x")
    assert code == 2
    assert "is the FILE itself" in err


def test_wrong_input_is_one_sentence(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "a-file").touch()
    write(here / "bad.jsonl", [{"prompt": "say 3"}])
    write(here / "long.jsonl", [{"prompt": "say " * 99, "answer": "red"}])
    for args, code, said in (
        (["nothing.jsonl", "--out", "x"], 1, "no such file"),
        (["--out", "x"], 2, "no demonstrations: give a FILE"),
        (["bad.jsonl", "--out", "x"], 1, "bad.jsonl, line 1"),
        (["bad.jsonl", "--skip-bad", "--out", "x"], 1, "all 1 record are bad"),
        (["long.jsonl", "--max-prompt-length", "20", "--out", "x"], 1, "no demonstration is left"),
        (["demos.jsonl", "--out", "a-file"], 1, "choose another folder"),
        (["demos.jsonl", "--epochs", "0", "--out", "x"], 2, "sft.epochs"),
        (["demos.jsonl", "--adapter-path", "gone", "--out", "x"], 1, "gone"),
    ):
        found, _, err = call(capfd, "sft", *TOY, *args)
        assert found == code, (args, err)
        assert said in err
        assert "Traceback" not in err
