"""`run --dry-run`: settings, stages, memory and time, before anything is downloaded, loaded or written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_lite.cli import commands  # noqa: F401 - registers the commands
from spa_lite.cli.main import app
from spa_lite.errors import SpaError
from tests.small import write_data
from tests.tiny import make_model

BIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
"""The shape of an 8B model."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Run a command in this process: standard output, standard error (or the sentence it was refused with)."""
    try:
        app([*words], standalone_mode=False)
    except SpaError as error:
        return capfd.readouterr().out, str(error)
    out, err = capfd.readouterr()
    return out, err


def small(folder: Path, model: str, backend: str) -> Sequence[str]:
    """`run` on small data."""
    files = write_data(folder, pairs=20, prompts=12)
    names = ["--seed-pairs", files["inputs.seed_pairs"], "--prompts", files["inputs.prompts"]]
    sizes = ["--rounds", "1", "--max-tokens", "8", "--max-prompt-length", "64", "--max-seq-length", "128"]
    return ["run", "--model", model, "--backend", backend, *names, *sizes]


def test_every_setting_and_where_it_came_from(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the lesson, with memory and stages; nothing is written."""
    out, _ = call(capfd, "run", "--dry-run", "--beta", "0.3", "--lesson-prompts", "12")
    assert re.search(r"^loss\.beta +0\.3 +command line$", out, re.M)
    assert re.search(r"^sampling\.max_tokens +48 +scale lesson$", out, re.M)
    assert re.search(r"│ train +│.* │ rounds/1 train +│ to compute +│ +4 │", out.replace("\n", " "))
    assert "1.3 M parameters" in out
    assert "tokens per forward: training 2,048, scoring 4,096; 0 layers checkpointed; 128 prompts" in out
    assert not list(here.iterdir())


def test_a_recipe_of_other_stages(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Helpers once, prompts that will be written, no seed stage; time and memory as ever; nothing is written."""
    out, _ = call(capfd, "run", "--dry-run", "--recipe", "synpo", "--rounds", "2", "--prompt-count", "30")
    told = [line.split("│")[1].strip() for line in out.splitlines() if "to compute" in line]
    rounds = [
        f"rounds/{i} {kind}" for i in (1, 2) for kind in ("prompts", "improver", "sample", "judge", "train", "measure")
    ]
    assert told == ["init measure", "rounds/0 generator", *rounds]
    assert "time on this CPU for 100 pairs and 60 prompts: about" in out
    assert re.search(r"│ train +│", out)
    assert not list(here.iterdir())


def test_written_prompts_need_no_data(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is asked for that the recipe has no use for; a judge of its own is said to be beside the estimate."""
    (here / "big").mkdir()
    (here / "big/config.json").write_text(json.dumps(BIG))
    words = ["run", "--dry-run", "--model", "big", "--backend", "torch", "--device", "cpu"]
    out, err = call(capfd, *words, "--recipe", "sao")
    assert "no data were named" not in err
    assert "time on this CPU for 1000 prompts: about" in out
    out, _ = call(capfd, *words, "--recipe", "simpo-onpolicy", "--judge-model", "x/y")
    assert "not in it: the model that judges (reward-model)" in out


@pytest.mark.parametrize("backend", ["toy", "torch", pytest.param("mlx", marks=pytest.mark.long)])
def test_what_is_finished_is_seen(here: Path, capfd: pytest.CaptureFixture[str], backend: str) -> None:
    """Without weights in memory the plan knows the keys of the real run, its folder, and how long stages took."""
    pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}.get(backend, "json"))
    model = "toy" if backend == "toy" else str(make_model(here / "model"))
    words = small(here, model, backend)
    out, _ = call(capfd, *words, "--dry-run")
    assert out.count("to compute") == 7
    call(capfd, *words)
    out, _ = call(capfd, *words, "--dry-run")
    assert out.count("│ finished") == 7
    (folder,) = (here / "runs").iterdir()
    assert f"stages of runs/{folder.name}" in out
    out, _ = call(capfd, *words, "--dry-run", "--alpha", "0.3")
    assert (out.count("from another run"), out.count("to compute")) == (5, 2)
    assert "from stages measured here before" in out


def test_a_config_is_enough(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """8B parameters, before the download: memory on this machine and on others, in 16 and in 4 bits."""
    (here / "big").mkdir()
    (here / "big/config.json").write_text(json.dumps(BIG))
    out, err = call(capfd, "run", "--model", "big", "--backend", "torch", "--device", "cpu", "--dry-run")
    assert "8,030.3 M parameters" in out
    assert "no data were named" in err
    assert "without weights" in err
    assert "time on this CPU for 100 pairs and 1000 prompts: about" in out
    found = {name: numbers(out, name) for name in ("CUDA, bfloat16", "CUDA, 4 bits", "Apple GPU, 4 bits")}
    for train, checkpointed, *_ in found.values():
        assert train > checkpointed + 3
    assert 16 < min(found["CUDA, bfloat16"][1:]) < max(found["CUDA, bfloat16"][1:]) < 32
    assert 4 < min(found["CUDA, 4 bits"][1:]) < max(found["CUDA, 4 bits"][1:]) < 16
    assert not (here / "runs").exists()


def numbers(out: str, row: str) -> list[float]:
    """Numbers of a table's row."""
    (line,) = [line for line in out.splitlines() if row in line]
    return [float(n) for n in re.findall(r"\d+\.\d+", line)]


def test_limits_and_batches_change_the_estimate(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is read; and what is free decides where they are left open."""
    (here / "big").mkdir()
    (here / "big/config.json").write_text(json.dumps(BIG))
    words = ["run", "--model", "big", "--backend", "torch", "--device", "cpu", "--dry-run"]

    def peaks(*more: str) -> list[float]:
        out, _ = call(capfd, *words, "--micro-tokens", "1", "--score-tokens", "1", "--checkpointed-layers", "0", *more)
        return [numbers(out, f"│ {stage} ")[-1] for stage in ("train", "sample", "judge")]

    plain = peaks()
    assert peaks("--micro-tokens", "8192")[0] > plain[0]
    assert peaks("--sample-batch", "64")[1] > plain[1]
    assert peaks("--score-tokens", "8192")[2] > plain[2]
    assert peaks("--checkpointed-layers", "4")[0] < plain[0]
    assert peaks("--lora-rank", "256")[0] > plain[0]
    assert peaks("--max-tokens", "20")[1] < plain[1]

    def sizes(gigabytes: int) -> list[int]:
        monkeypatch.setattr("spa_lite.backends.memory.free", lambda: gigabytes * 10**9)
        out, _ = call(capfd, *words)
        (line,) = re.findall(r"training ([\d,]+), scoring ([\d,]+); (\d+) layers", " ".join(out.split()))
        return [int(number.replace(",", "")) for number in line]

    assert sizes(400) == [2048, 4096, 0]
    little, least = sizes(50), sizes(44)
    assert little[0] < 2048
    assert 0 < little[2] < least[2]


def test_the_size_of_kept_states_is_told(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If they are asked for: 1,000 prompts, two answers of 100 tokens, 4,096 numbers of two bytes each."""
    (here / "big").mkdir()
    (here / "big/config.json").write_text(json.dumps(BIG))
    words = ["run", "--model", "big", "--backend", "torch", "--device", "cpu", "--dtype", "bfloat16", "--dry-run"]
    out, _ = call(capfd, *words, "--max-tokens", "100", "--cache-reference")
    assert "for 1000 prompts: at most 1.64 GB (--cache-reference)" in out
    assert "--cache-reference" not in call(capfd, *words)[0]


WRONG: list[tuple[list[str], str]] = [
    (["--model", "who/knows"], "not in the hub's cache"),
    (["--seed-pairs", "nowhere.jsonl", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--report-to", "tensorbord"], "tensorboard"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG)
def test_what_is_wrong_is_said(here: Path, capfd: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    """As the run itself would."""
    _, err = call(capfd, "run", "--dry-run", *words)
    assert sentence in err


def test_training_fits_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen once, from what a step on one row keeps, and remembered in the run folder; the user's own are taken."""
    from tests.crash import recipe_of
    from tests.small import run_small

    make_model(tmp_path / "model")

    def used(name: str, free: int, **changes: Any) -> tuple[int, int]:
        monkeypatch.setattr("spa_lite.backends.memory.free", lambda: free)
        open_ = {"batching.micro_tokens": None, "train.max_steps": 1}
        recipe = recipe_of(f"torch:{tmp_path / 'model'}", tmp_path, open_ | changes)
        run_small(tmp_path / name, recipe)
        kept = json.loads((tmp_path / name / "batching.json").read_text())["used"]
        return kept["micro_tokens"], kept["checkpointed"]

    assert used("much", 2**40) == (2048, 0)
    tokens, layers = used("little", 1)
    assert tokens < 2048
    assert layers > 0
    assert used("much", 1) == (2048, 0), "a run goes on as it began"
    assert used("asked", 1, **{"batching.micro_tokens": 40, "batching.checkpointed_layers": 0}) == (40, 0)
