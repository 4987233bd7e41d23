"""The lesson on MLX beside the lesson on PyTorch: the same numbers, texts and labels; and runs that change sides."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="both sides are compared: PyTorch is not installed")
mx = pytest.importorskip("mlx.core", reason="both sides are compared: MLX is not installed")
pytest.importorskip("mlx_lm", reason="both sides are compared: mlx-lm is not installed")

from spa_lite import backends
from spa_lite.backend import INIT, POLICY, PREVIOUS, Backend, Lora, ModelSettings, Optimizer
from spa_lite.lesson import MODEL_DIR, source
from spa_lite.objective import Dpo
from spa_lite.records import Row
from tests.contract import sums
from tests.small import lines

ROOT = Path(__file__).parent.parent
TINY = [
    "--no-report",
    "--lesson-seed-pairs",
    "6",
    "--lesson-prompts",
    "8",
    "--lesson-held-out",
    "4",
    "--rounds",
    "1",
    "--seed-epochs",
    "1",
]


def spa_lite(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A real command in a real process."""
    command = [sys.executable, "-m", "spa_lite.cli", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ.copy())


def benchmark() -> Any:
    """The side-by-side benchmark as a module: its comparisons are the ones tested here."""
    spec = importlib.util.spec_from_file_location("lesson_backends", ROOT / "benchmarks/lesson_backends.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found: dict[str, Any]) -> None:
    """What the two sides must agree on."""
    assert found["texts equal"] == found["responses"]
    assert found["log-prob, largest difference (nats)"] < 1e-4
    assert found["loss, relative difference"] < 1e-4
    assert found["LoRA gradient, relative difference"] < 1e-4


def lesson_pairs(backend: Backend, count: int) -> list[Row]:
    """Gold-labelled pairs of the lesson as rows, chosen first."""
    tokenizer = backend.tokenizer
    return [
        Row(
            prompt=tokenizer.encode_prompt(pair.messages),
            responses=(
                tokenizer.encode_answer(pair.messages, pair.chosen),
                tokenizer.encode_answer(pair.messages, pair.rejected),
            ),
        )
        for pair in source.pairs("seed", count, 0)
    ]


def test_the_same_work_gives_the_same_numbers() -> None:
    """Sampling, scoring and one training step on the lesson's own prompts."""
    module = benchmark()
    close(module.same_work(module.load("torch"), module.load("mlx"), 12))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny finished run on each backend, each by its own command."""
    folder = tmp_path_factory.mktemp("sides")
    for name in ("torch", "mlx"):
        done = spa_lite("run", *TINY, "--backend", name, "--out", name, cwd=folder)
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in ("torch", "mlx")}


def test_two_runs_agree(finished: dict[str, Path]) -> None:
    """Independent runs: the same folder names the same stages, and at this size every text and label is the same."""
    torch, mlx = finished["torch"], finished["mlx"]
    for path in ("rounds/0/seed.done.json", "rounds/1/sample.done.json", "rounds/1/train.done.json"):
        assert json.loads((torch / path).read_text())["key"] == json.loads((mlx / path).read_text())["key"]
    for path, field in (("rounds/1/samples.jsonl", "completions"), ("rounds/1/judgements.jsonl", "label")):
        pairs = list(zip(lines(torch / path), lines(mlx / path), strict=True))
        if field == "label":
            assert [a["label"] for a, _ in pairs] == [b["label"] for _, b in pairs]
        else:
            texts = [[[c["ids"] for c in side[field]] for side in pair] for pair in pairs]
            assert all(a == b for a, b in texts)


def test_mlx_judges_what_torch_sampled(finished: dict[str, Path]) -> None:
    module = benchmark()
    for row in module.same_judge(module.load("mlx"), finished["torch"]):
        assert row["labels equal"] == row["clear"] > 0
        assert row["margin, largest difference"] < 1e-3


@pytest.mark.parametrize(("first", "second"), [pytest.param("mlx", "torch", marks=pytest.mark.long), ("torch", "mlx")])
def test_a_run_goes_on_with_the_other_backend(
    finished: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    """Stages that are finished are kept, the others are computed with what is here now, and the run says so."""
    shutil.copytree(finished[first], tmp_path / "run")
    for stage in ("judge", "train", "measure"):
        (tmp_path / f"run/rounds/1/{stage}.done.json").unlink()
    kept = (tmp_path / "run/rounds/1/samples.jsonl").read_bytes()
    done = spa_lite("run", *TINY, "--backend", second, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not all computed on the same machine or backend" in done.stderr
    assert (tmp_path / "run/rounds/1/samples.jsonl").read_bytes() == kept
    made = {
        stage: json.loads((tmp_path / f"run/rounds/1/{stage}.done.json").read_text())["made_by"]["backend"]
        for stage in ("sample", "judge", "train", "measure")
    }
    assert made == {"sample": first, "judge": second, "train": second, "measure": second}
    alone = [one["margin"] for one in lines(finished[first] / "rounds/1/judgements.jsonl")]
    assert [one["margin"] for one in lines(tmp_path / "run/rounds/1/judgements.jsonl")] == pytest.approx(
        alone, abs=1e-3
    )


@pytest.mark.long
def test_judging_by_hand_agrees(tmp_path: Path) -> None:
    """`spa-lite judge` with the shipped seed adapter, on either backend."""
    with (tmp_path / "pairs.jsonl").open("wb") as file:
        for pair in source.pairs("tune", 4, 0):
            file.write(msgspec.json.encode(pair) + b"\n")
    margins = {}
    for name in ("torch", "mlx"):
        done = spa_lite("judge", "pairs.jsonl", "--backend", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        margins[name] = [json.loads(line)["margin"] for line in done.stdout.splitlines()]
    assert margins["mlx"] == pytest.approx(margins["torch"], abs=1e-3)


def trained(backend: Backend, rows: list[Row], steps: int) -> list[float]:
    """Losses of a few steps of DPO, after which INIT and PREVIOUS must be what they were."""
    backend.bind(INIT)
    backend.bind(POLICY, None, Lora(rank=8, alpha=16.0))
    backend.snapshot()
    before = sums(backend, rows, INIT)
    backend.start_training(Optimizer())
    losses = [backend.dpo_step(rows, Dpo(0.1), 5e-3).loss for _ in range(steps)]
    assert (sums(backend, rows, INIT) == before).all()
    assert (sums(backend, rows, PREVIOUS) == before).all()
    return losses


def test_the_lesson_trains_on_a_four_bit_base() -> None:
    backend = backends.load("mlx", ModelSettings(str(MODEL_DIR), load_in_4bit=True))
    assert backend.description["bits"] == 4
    losses = trained(backend, lesson_pairs(backend, 2), 4)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.6 * losses[0]


def hundred_million(folder: Path) -> Path:
    """A random Llama of 100 million parameters in 16 bit, with the lesson's tokenizer."""
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    shape = {"hidden_size": 768, "num_hidden_layers": 14, "intermediate_size": 2432}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    config = json.loads((MODEL_DIR / "config.json").read_text()) | shape
    for path in MODEL_DIR.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    model = llama.Model(llama.ModelArgs.from_dict(config))
    key = mx.random.key(0)
    weights = {
        name: (mx.random.normal(array.shape, key=key) * 0.02 if array.ndim > 1 else array).astype(mx.float16)
        for name, array in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


@pytest.mark.long
def test_a_hundred_million_parameters_train_in_four_bits(tmp_path: Path) -> None:
    """4-bit products are slow on this CPU (about 1 GFLOP/s), so: one pair of short answers, three steps."""
    backend = backends.load("mlx", ModelSettings(str(hundred_million(tmp_path)), load_in_4bit=True))
    assert backend.description["bits"] == 4
    assert 95e6 < backend.description["parameters"] < 105e6
    row = lesson_pairs(backend, 1)[0]
    short = Row(prompt=row.prompt[:4], responses=tuple(response[-8:] for response in row.responses))
    losses = trained(backend, [short], 3)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.long
def test_the_whole_lesson_on_mlx(tmp_path: Path) -> None:
    """`spa-lite run --backend mlx` beside the same on PyTorch: win rates within each other's intervals."""
    command = [sys.executable, str(ROOT / "benchmarks/lesson_backends.py"), "--folder", "runs", "--json"]
    smaller = ["--", "--lesson-prompts", "600", "--lesson-seed-pairs", "60", "--measure-pairs", "60"]
    done = subprocess.run([*command, *smaller], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    close(found["same work"])
    for row in found["same judge"]:
        assert row["labels equal"] >= 0.999 * row["clear"]
    for row in found["same lesson"]:
        if "win rates" in row:
            (torch, low, high), (mlx, other_low, other_high) = row["win rates"]
            assert low <= mlx <= high
            assert other_low <= torch <= other_high
