"""The lesson on PyTorch and on MLX, side by side in float32: the same numbers, the same texts, the same labels.

    python benchmarks/lesson_backends.py --folder runs/backends > benchmarks/results/lesson_backends.md

1. Same work: both backends score, sample and take one training step on the held-out prompts.
2. Same judge: MLX judges the samples that PyTorch drew in each round, with PyTorch's adapters.
3. Same lesson: two independent whole runs. Finished stages in the folder are reused. Everything after `--` goes to
   `spa-lite run`, for a smaller lesson. With `--json` the numbers come as JSON instead of Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from spa_lite import backends
from spa_lite.backend import INIT, POLICY, Backend, Lora, ModelSettings, Optimizer, Sampling
from spa_lite.keys import sample_key
from spa_lite.lesson import MODEL_DIR, source
from spa_lite.objective import Dpo
from spa_lite.records import Row
from spa_lite.stages.workbench import read_judgements, read_samples

NAMES = ("torch", "mlx")
BIG = 1e6
"""As AdamW's eps it makes a step proportional to the gradient: lr * g / BIG."""


def main() -> None:
    """Do all three and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/backends"), help="where the two runs lie")
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts for the same work")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("run", nargs="*", help="settings for spa-lite run, after --")
    args = parser.parse_args()
    seconds = {name: whole_run(name, args.folder / name, args.run) for name in NAMES}
    pair = [load(name) for name in NAMES]
    found = {
        "same work": same_work(*pair, args.prompts),
        "same judge": same_judge(pair[1], args.folder / "torch"),
        "same lesson": same_lesson(args.folder),
        "seconds": seconds,
    }
    print(json.dumps(found, indent=2) if args.json else markdown(found, args.prompts))


def whole_run(name: str, folder: Path, settings: Sequence[str]) -> dict[str, float]:
    """Run the lesson on a backend, or find it finished; seconds per stage as the run recorded them."""
    command = [sys.executable, "-m", "spa_lite.cli", "run", "--backend", name, "--out", str(folder), *settings]
    # --fresh is not given: a second call finds the run finished. Nothing else is at hand that it could share.
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    stages = json.loads((folder / "timings.json").read_text())
    total = sum(spent["seconds"] for kinds in stages.values() for spent in kinds.values())
    return {"stages": round(total, 1), "this call": round(time.monotonic() - start, 1)}


def load(name: str) -> Backend:
    """The lesson model in float32 on the CPU."""
    return backends.load(name, ModelSettings(str(MODEL_DIR), device="cpu", dtype="float32"))


def same_work(torch: Backend, mlx: Backend, count: int) -> dict[str, Any]:
    """Largest differences of two backends on held-out prompts."""
    records = source.prompts("heldout", count, 2)
    prompts = [torch.tokenizer.encode_prompt(record.messages) for record in records]
    keys = [[sample_key(0, 0, record.id, k) for k in range(2)] for record in records]
    texts = []
    for backend in (torch, mlx):
        backend.bind(POLICY)
        drawn = dict(backend.sample(prompts, 2, Sampling(0.7, 1.0, 48), keys))
        texts.append([one.ids for index in range(count) for one in drawn[index]])
    rows = [Row(prompt=p, responses=tuple(texts[0][2 * i : 2 * i + 2])) for i, p in enumerate(prompts)]
    sums = [logps(backend, rows, POLICY) for backend in (torch, mlx)]
    pairs = [row for row in rows if row.responses[0] != row.responses[1]][:16]
    (loss, gradient), (other_loss, other) = (one_step(backend, pairs) for backend in (torch, mlx))
    size = float(np.sqrt(sum((array**2).sum() for array in gradient.values())))
    apart = float(np.sqrt(sum(((array - other[key]) ** 2).sum() for key, array in gradient.items())))
    return {
        "responses": len(texts[0]),
        "texts equal": sum(a == b for a, b in zip(*texts, strict=True)),
        "log-prob, largest difference (nats)": float(np.abs(sums[0] - sums[1]).max()),
        "loss, relative difference": abs(loss - other_loss) / loss,
        "LoRA gradient, relative difference": apart / size,
    }


def logps(backend: Backend, rows: Sequence[Row], role: str) -> np.ndarray:
    """Summed log-probs of all responses, in order."""
    found = dict(backend.logprob(rows, role))
    return np.array([score.logp for index in range(len(rows)) for score in found[index]])


def one_step(backend: Backend, rows: Sequence[Row]) -> tuple[float, dict[str, np.ndarray]]:
    """The second step's loss, and the gradient by which it moved the adapter (the first one moves B away from 0)."""
    backend.bind(POLICY, None, Lora(rank=8, alpha=8.0))
    backend.snapshot()
    backend.start_training(Optimizer(eps=BIG, max_grad_norm=0.0))
    states, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(2):
            losses.append(backend.dpo_step(rows, Dpo(1.0), BIG).loss)
            backend.save(Path(folder) / str(step))
            states.append(load_file(Path(folder) / str(step) / "adapter_model.safetensors"))
    return losses[1], {key: states[0][key].astype(np.float64) - after for key, after in states[1].items()}


def same_judge(mlx: Backend, run: Path) -> list[dict[str, Any]]:
    """Per round: MLX's labels of PyTorch's samples under PyTorch's adapters, where the margin is clear of rounding."""
    found = []
    for folder in sorted((run / "rounds").iterdir(), key=lambda path: int(path.name)):
        if not (folder / "judgements.jsonl").exists():
            continue
        judged = read_judgements(folder / "judgements.jsonl")
        rows = [Row(prompt=one.prompt_ids, responses=(one.a.ids, one.b.ids)) for one in judged]
        mlx.bind(INIT)
        mlx.bind(POLICY, folder.parent / str(int(folder.name) - 1) / "adapter")
        ratios = logps(mlx, rows, POLICY) - logps(mlx, rows, INIT)
        scale = next((one.margin / (one.logratio_a - one.logratio_b) for one in judged if one.margin), 1.0)
        margins = scale * (ratios[0::2] - ratios[1::2])
        theirs = np.array([one.margin for one in judged])
        clear = np.abs(theirs) > 1e-3
        found.append(
            {
                "round": int(folder.name),
                "judged": len(judged),
                "clear": int(clear.sum()),
                "labels equal": int(((margins > 0) == (theirs > 0))[clear].sum()),
                "margin, largest difference": float(np.abs(margins - theirs).max()),
            }
        )
    return found


def same_lesson(folder: Path) -> list[dict[str, Any]]:
    """Per stage of two independent runs: texts and labels in common, and win rates with their intervals."""
    summaries = [json.loads((folder / name / "summary.json").read_text())["rows"] for name in NAMES]
    found = []
    for torch, mlx in zip(*summaries, strict=True):
        row: dict[str, Any] = {"stage": torch["stage"]}
        files = [folder / name / torch["folder"] for name in NAMES]
        if (files[0] / "samples.jsonl").exists():
            samples = [list(read_samples(path / "samples.jsonl")) for path in files]
            pairs = list(zip(*samples, strict=True))
            row["answers"] = sum(len(a.completions) for a, _ in pairs)
            row["texts equal"] = sum(
                x.ids == y.ids for a, b in pairs for x, y in zip(a.completions, b.completions, strict=True)
            )
            labels = [{one.id: one.label for one in read_judgements(path / "judgements.jsonl")} for path in files]
            shared = labels[0].keys() & labels[1].keys()
            row["judged by both"] = len(shared)
            row["labels equal"] = sum(labels[0][key] == labels[1][key] for key in shared)
        if torch.get("win_rate"):
            row["win rates"] = [
                [round(100 * rate[key], 1) for key in ("value", "low", "high")]
                for rate in (torch["win_rate"], mlx["win_rate"])
            ]
        found.append(row)
    return found


def markdown(found: dict[str, Any], prompts: int) -> str:
    """The numbers as a page."""
    work = found["same work"]
    lines = ["# The lesson on PyTorch and on MLX (float32, CPU)", "", f"Same work, {prompts} held-out prompts:", ""]
    lines += ["| what | seen |", "| --- | --- |"]
    lines += [f"| {key} | {value if isinstance(value, int) else f'{value:.2g}'} |" for key, value in work.items()]
    lines += ["", "MLX judges what PyTorch sampled, with PyTorch's adapters:", ""]
    lines += ["| round | judged | abs(margin) > 1e-3 | of these labelled alike | largest difference of a margin |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['round']} | {row['judged']} | {row['clear']} | {row['labels equal']} "
        f"| {row['margin, largest difference']:.2g} |"
        for row in found["same judge"]
    ]
    lines += ["", "Two independent whole runs (win rate against `init` in %, 95 % interval):", ""]
    lines += [
        "| stage | texts equal | labels equal | win rate, PyTorch | win rate, MLX |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["same lesson"]:
        texts = f"{row['texts equal']} of {row['answers']}" if "answers" in row else "-"
        labels = f"{row['labels equal']} of {row['judged by both']}" if "answers" in row else "-"
        rates = [f"{value} [{low}, {high}]" for value, low, high in row.get("win rates", [])] or ["-", "-"]
        lines.append(f"| {row['stage']} | {texts} | {labels} | {rates[0]} | {rates[1]} |")
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", "mlx", "mlx-lm", "transformers"))
    spent = ", ".join(f"{name} {found['seconds'][name]['stages']:.0f}" for name in NAMES)
    threads = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    preload = "OpenBLAS preloaded" if "openblas" in os.environ.get("LD_PRELOAD", "") else "no library preloaded"
    return "\n".join([*lines, "", f"Seconds of all stages: {spent} ({threads}, {preload}). {versions}."])


if __name__ == "__main__":
    main()
