"""llama.cpp's samples and scores beside PyTorch's, from the same weights in several precisions: how fast, how far off.

python benchmarks/bench_gguf.py [--quick] [--rounds 3]

Writes benchmarks/results/gguf.md. Processor time of one thread; all take turns, and a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import device_name, seconds_of, versions
from workloads import POLICY, adapter, model, prompts, scale

from spa_lite import backends, keys
from spa_lite.backend import Backend, ModelSettings, Sampling
from spa_lite.records import Ids, Row

RESULTS = Path(__file__).parent / "results" / "gguf.md"
N, MOST = 2, 64
EQUAL = 1e-4
"""Nats per token that the float32 file may be off."""
VERSIONS = {"spa-lite", "torch", "llama-cpp-python"}
ALONE = "one answer at a time"
TORCH, KINDS = "PyTorch, float32", {"Q8_0": 7, "Q4_K_M": 15}
"""llama.cpp's numbers for kinds of quantised files."""


@dataclass
class Contestant:
    """Who draws and scores, seconds per token of each round, and how far off the log-probs are."""

    backend: Backend
    sampling: list[float]
    scoring: list[float]
    drawn: int = 0
    off: tuple[float, float] = (0.0, 0.0)  # mean and largest, nats per token


def files(folder: Path, base: Path) -> Iterator[tuple[str, ModelSettings]]:
    """The contestants: a name, and how it is loaded."""
    import llama_cpp.llama_cpp as api

    from spa_lite.backends.gguf_writer import write_model

    yield TORCH, ModelSettings(str(base), device="cpu", dtype="float32")
    for name, dtype in (("F32", "f32"), ("F16", "f16"), ("BF16", "bf16")):
        write_model(base, folder / f"{name}.gguf", dtype)  # type: ignore[arg-type]
        yield name, ModelSettings(str(folder / f"{name}.gguf"))
    yield "F16 --dtype float32", ModelSettings(str(folder / "F16.gguf"), dtype="float32")
    for name, kind in KINDS.items():
        wanted, out = api.llama_model_quantize_default_params(), folder / f"{name}.gguf"
        wanted.ftype = kind
        if api.llama_model_quantize(bytes(folder / "F32.gguf"), bytes(out), ctypes.byref(wanted)):
            raise SystemExit(f"llama.cpp cannot write {name}")
        yield name, ModelSettings(str(out))
    yield f"F32, {ALONE}", ModelSettings(str(folder / "F32.gguf"))


def draw(one: Contestant, asked: list[Ids], alone: bool) -> list[Row]:
    """Two answers to each prompt, all at once or one by one."""
    names = [[keys.sample_key(0, 1, str(i), k) for k in range(N)] for i in range(len(asked))]
    how = Sampling(0.7, 1.0, MOST)
    if alone:
        found = {
            i: tuple(dict(one.backend.sample([ids], 1, how, [[name]]))[0][0] for name in names[i])
            for i, ids in enumerate(asked)
        }
    else:
        found = dict(one.backend.sample(asked, N, how, names))
    one.drawn = sum(len(c.ids) for some in found.values() for c in some)
    return [Row(prompt=asked[i], responses=tuple(c.ids for c in found[i])) for i in range(len(asked))]


def per_token(backend: Backend, rows: list[Row]) -> np.ndarray:
    """Log-probs of all response tokens, in order."""
    found = dict(backend.logprob(rows, POLICY, per_token=True))
    return np.array([p for i in range(len(rows)) for one in found[i] for p in one.per_token or ()])


def timed(one: Contestant, asked: list[Ids], texts: list[Row], alone: bool) -> list[Row]:
    """Draw, then score `texts` (none: what was drawn); note the seconds per token of both. Returns what was scored."""
    drawn: list[Row] = []
    seconds = seconds_of(lambda: drawn.extend(draw(one, asked, alone)), "cpu")
    texts = texts or drawn
    one.sampling.append(seconds / one.drawn)
    scored = sum(len(answer) for row in texts for answer in row.responses)
    one.scoring.append(seconds_of(lambda: per_token(one.backend, texts), "cpu") / scored)
    return texts


def measured(rounds: int, quick: bool, folder: Path) -> dict[str, Contestant]:
    """Everybody's times and differences."""
    base = model(folder, quick)
    policy, asked = adapter(folder, base, POLICY), prompts(4 if quick else 8, *scale(quick), seed=2)
    every = {name: Contestant(backends.load(None, how), [], []) for name, how in files(folder, base)}
    for one in every.values():
        one.backend.bind(POLICY, policy)
    texts: list[Row] = []
    for _ in range(rounds + 1):
        for name, one in every.items():
            texts = timed(one, asked, texts, ALONE in name)
    exact = per_token(every[TORCH].backend, texts)
    for one in every.values():
        one.sampling, one.scoring = one.sampling[1:], one.scoring[1:]  # the first go does not count
        off = np.abs(per_token(one.backend, texts) - exact)
        one.off = float(off.mean()), float(off.max())
    if every["F32"].off[1] > EQUAL:
        raise SystemExit(f"llama.cpp is {every['F32'].off[1]:.2g} nats off in float32: nothing to compare")
    return every


def page(rows: dict[str, Contestant], rounds: int) -> str:
    """The table."""
    first = rows[TORCH]

    def times(own: list[float], theirs: list[float]) -> str:
        ratios = sorted(b / a for a, b in zip(own, theirs, strict=True))
        return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"

    about = ", ".join(f"{name} {number}" for name, number in versions().items() if name in VERSIONS)
    lines = [
        f"`python benchmarks/bench_gguf.py --rounds {rounds}`: a random Llama of 38 million parameters with LoRA of",
        f"rank 16, unmerged; 8 prompts, two answers of at most {MOST} tokens each; then PyTorch's answers scored. One",
        f"thread, processor time, {rounds} rounds in turn. How many times as fast as PyTorch: median [least, most].",
        "",
        f"{device_name('cpu')}; {about}.",
        "",
        "| weights | sampling, times PyTorch | scoring, times PyTorch | nats per token off, mean | largest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        sampling, scoring = times(row.sampling, first.sampling), times(row.scoring, first.scoring)
        if row is first:
            sampling = f"1 ({1 / statistics.median(row.sampling):,.0f} tokens/s)"
            scoring = f"1 ({1 / statistics.median(row.scoring):,.0f} tokens/s)"
        lines.append(f"| {name} | {sampling} | {scoring} | {row.off[0]:.1g} | {row.off[1]:.1g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--quick", action="store_true", help="a tiny model, and nothing is written")
    asked.add_argument("--rounds", type=int, default=3)
    given = asked.parse_args()
    if backends.missing("llamacpp"):
        print("llama.cpp is not installed here (make gguf), so this is left out")
        return
    with tempfile.TemporaryDirectory() as place:
        text = page(measured(given.rounds, given.quick, Path(place)), given.rounds)
    print(text)
    if not given.quick:
        RESULTS.write_text(f"# GGUF files: speed and exactness\n\n{text}")


if __name__ == "__main__":
    main()
