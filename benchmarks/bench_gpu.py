"""All that needs a GPU, in one script of ten minutes: ours against what a user would run, and against the hardware.

    python benchmarks/bench_gpu.py [--parts rates,sample-1b,step-8b] [--minutes 9] [--rounds 2] [--tiny]

Models are random, of the shapes of Llama-3.2-1B and Llama-3.1-8B, in bfloat16, with two LoRA adapters of rank 16. Each
part has a time of its own and fails alone; what is known is printed, and written to gpu.json (in --out), part
by part. TRL and bitsandbytes are used where they are installed. `--tiny` goes through everything with toys.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import side_by_side
from gpu_lines import Line, first_line
from gpu_models import FULL, TOYS, Bench
from gpu_parts import capped, four_bits, rates, sample, score, step, whole_round
from machine import device_name, versions
from side_by_side import Options

PARTS: dict[str, tuple[Callable[[Bench, str], Iterator[Line]], str, int]] = {
    "rates": (rates, "", 20),
    "sample-1b": (sample, "1b", 80),
    "step-1b": (step, "1b", 80),
    "score-1b": (score, "1b", 40),
    "round-1b": (whole_round, "1b", 60),
    "sample-8b": (sample, "8b", 180),
    "step-8b": (step, "8b", 150),
    "score-8b": (score, "8b", 60),
    "round-8b": (whole_round, "8b", 150),
    "four-8b": (four_bits, "8b", 60),
    "cap-1b": (capped, "1b", 60),
    "cap-8b": (capped, "8b", 90),
}
"""Name -> what it does, with which model, and the seconds it may take."""


class OutOfTime(Exception):
    """A part took longer than it may."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block once that much time is gone."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(words: Sequence[str] | None = None) -> list[Line]:
    """Go through the parts that are asked for; print the table last."""
    args = parser().parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        sys.exit(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not (args.tiny or args.device or has_cuda()):
        print("there is no CUDA device here; --tiny goes through everything with toys on the CPU", file=sys.stderr)
        return []
    folder = args.folder or Path(tempfile.mkdtemp(prefix="spa-lite-gpu-"))
    options = Options(folder, args.tiny, args.device or ("cpu" if args.tiny else "cuda"))
    side_by_side.COSINE = args.cosine
    bench = Bench(options, args.rounds, TOYS if args.tiny else FULL)
    lines, times, end = [], {}, time.monotonic() + 60 * args.minutes
    try:
        for name in args.parts:
            begun = time.monotonic()
            try:
                for line in guarded(name, bench, min(PARTS[name][2], end - begun)):
                    lines.append(line)
                    print(f"{line.part} | {line.what} | {line.found}", file=sys.stderr, flush=True)
            except OutOfTime as error:  # while a line was printed
                lines.append(Line(name, "failed", first_line(error), reached=False))
            times[name] = round(time.monotonic() - begun, 1)
            write(args.out, bench, lines, times)
    finally:
        bench.forget()
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(bench, lines))
    return lines


def guarded(name: str, bench: Bench, seconds: float) -> Iterator[Line]:
    """The lines of a part; whatever goes wrong costs no other part."""
    work, size, _ = PARTS[name]
    if seconds < 5:
        yield Line(name, "not run", "no time left")
        return
    try:
        with within(seconds):
            yield from work(bench, size)
    except Exception as error:
        bench.forget()
        yield Line(name, "failed", first_line(error), reached=False)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    made.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    made.add_argument("--minutes", type=float, default=9.0, help="no part goes on beyond that")
    made.add_argument("--rounds", type=int, default=2, help="rounds that count")
    made.add_argument("--cosine", type=float, default=side_by_side.COSINE, help="of gradients that count as the same")
    made.add_argument("--tiny", action="store_true", help="toys, on the CPU unless --device says otherwise")
    made.add_argument("--device", help="cuda, or cpu")
    made.add_argument("--folder", type=Path, help="where models are kept; none: made anew, and removed")
    made.add_argument("--out", type=Path, help="folder of gpu.json")
    return made


def has_cuda() -> bool:
    """Whether there is a device to measure."""
    import torch

    return bool(torch.cuda.is_available())


def write(out: Path | None, bench: Bench, lines: Sequence[Line], times: dict[str, float]) -> None:
    """All that is known so far, as JSON."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    found = head(bench) | {"parts": times, "lines": [asdict(line) for line in lines]}
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def head(bench: Bench) -> dict[str, Any]:
    """Machine, versions, date, command."""
    return {
        "device": device_name(bench.options.device),
        "dtype": bench.options.dtype,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", "benchmarks/bench_gpu.py", *sys.argv[1:]]),
        "ceiling": bench.speed,
    }


def table(bench: Bench, lines: Sequence[Line]) -> str:
    """Everything as Markdown."""
    about = head(bench)
    named = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rows = [
        f"| {line.part} | {line.what} | {line.found} | {line.target} | "
        f"{ {True: 'yes', False: 'no', None: ''}[line.reached] } |"
        for line in lines
    ]
    return "\n".join(
        [
            f"{about['device']}, {about['dtype']}; {named}; {about['date']}",
            "",
            "| part | what | found | target | reached |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


if __name__ == "__main__":
    main()
