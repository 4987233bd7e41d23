"""What sharing saves: a study of twelve refinement settings against the same twelve runs one by one. CPU seconds.

    python benchmarks/bench_ablate.py [--prompts 800] [--table benchmarks/results/ablate.md]

Both sides run the real commands in fresh folders, in one go, and the cells are shown to hold the same bytes as the
separate runs. For three rounds the separate side is not run again but summed from the clocks of the study's own stages.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from spa_lite.files import checksums

ALPHAS, KS = ("0", "0.1", "0.2", "0.4"), ("0.05", "0.1", "0.2")
COMPARED = ("adapter", "rounds", "init")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=800)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(table(Path(folder), options.prompts)) + "\n"
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")


def spend(*words: str) -> float:
    """CPU seconds of one `spa-lite` command, its start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "spa_lite.cli", *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def study(folder: Path, rounds: int, prompts: int) -> tuple[float, dict[str, float]]:
    """CPU seconds of the twelve cells as a study, and its own account."""
    vary = ["--vary", f"refine.alpha={','.join(ALPHAS)}", "--vary", f"refine.K={','.join(KS)}", "--seeds", "1"]
    size = ["--rounds", str(rounds), "--lesson-prompts", str(prompts)]
    spent = spend("ablate", *vary, *size, "--out", str(folder))
    return spent, json.loads((folder / "results.json").read_text())["study"]["cost"]


def separately(folder: Path, prompts: int) -> float:
    """CPU seconds of the same twelve runs of one round, each on its own."""
    total = 0.0
    for alpha in ALPHAS:
        for k in KS:
            size = ["--rounds", "1", "--lesson-prompts", str(prompts)]
            out = ["--fresh", "--out", str(folder / f"{alpha}-{k}")]
            total += spend("run", "--alpha", alpha, "--refine-k", k, *size, *out)
    return total


def results(run: Path) -> dict[str, str]:
    """Checksums of a run's results."""
    found = checksums(run, COMPARED)
    return {name: checksum for name, checksum in found.items() if not name.endswith("timings.json")}


def equal(together: Path, alone: Path) -> int:
    """How many cells hold what their separate run holds. Every separate run has a cell."""
    cells = [results(cell) for cell in (together / "cells").iterdir()]
    return sum(results(run) in cells for run in alone.iterdir())


def table(folder: Path, prompts: int) -> list[str]:
    """The measurement as Markdown."""
    one, cost = study(folder / "one", 1, prompts)
    alone = separately(folder / "alone", prompts)
    same = equal(folder / "one", folder / "alone")
    _, three = study(folder / "three", 3, prompts)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return [
        "# A study of twelve cells against twelve runs",
        "",
        f"`python benchmarks/bench_ablate.py --prompts {prompts}`, OMP_NUM_THREADS={threads}, PyTorch on the CPU. The "
        f"lesson, seed 0: refine.alpha {', '.join(ALPHAS)} by refine.K {', '.join(KS)} (without alpha K changes "
        "nothing, so three cells are one training). CPU seconds.",
        "",
        "| | rounds | stages | distinct | CPU s | share of separate runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| the study | 1 | {cost['stages']:.0f} | {cost['distinct']:.0f} | {one:.0f} | {100 * one / alone:.0f} % |",
        f"| the sum of its distinct stages | 1 | | | {cost['cpu_distinct']:.0f} | |",
        f"| twelve `spa-lite run --fresh` | 1 | {cost['stages']:.0f} | | {alone:.0f} | 100 % |",
        f"| the study | 3 | {three['stages']:.0f} | {three['distinct']:.0f} | {three['cpu_total']:.0f} | "
        f"{100 * three['cpu_total'] / three['cpu_separately']:.0f} % |",
        f"| the sum of its distinct stages | 3 | | | {three['cpu_distinct']:.0f} | |",
        f"| every run's own stages, summed from their clocks | 3 | {three['stages']:.0f} | | "
        f"{three['cpu_separately']:.0f} | 100 % |",
        "",
        f"{same} of 12 cells hold byte for byte what their separate run holds. The study of one round took "
        f"{one / cost['cpu_distinct']:.2f} times the sum of its distinct stages.",
    ]


if __name__ == "__main__":
    main()
