"""How the benchmarks compare: equal first, then timed in turn, with a noise floor, memory and the machine's own limits.

A suite is a function that names its contestants and what is claimed of them; `main` does the rest:

1. Every contestant does the work once. Those that should agree must: losses (1e-4 in float32, 2e-2 in 16 bits),
   gradients (cosine above 0.999), values such as log-probabilities (as losses). If any does not, nothing is timed.
2. A matrix product and a copy are timed: what this machine can do at best.
3. Rounds: A B C, C B A, A B C, ... in one process, the first contestant a second time in each as the noise floor.
   A ratio is taken within a round; what is told is the median of the ratios, the least and the most.
4. Memory: each contestant does the work once more, in a process of its own (on CUDA: what PyTorch counts).

`python benchmarks/side_by_side.py --page` writes the tables of benchmarks/results/ into docs/speed.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from machine import ceiling, device_name, gauges, installed, now, operations, versions
from pages import PAGE, RESULTS, table, with_tables

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
COSINE = 0.999
ROUNDS = 5
TWIN = "the first again"


class Unavailable(Exception):
    """A contestant cannot run here; the message is the reason, a sentence."""


@dataclass(frozen=True)
class Shown:
    """What came out of the work, as far as it must agree: a loss, gradients by name, values such as log-probs."""

    loss: float | None = None
    gradients: Mapping[str, Any] = field(default_factory=dict)
    values: Sequence[float] | None = None


@dataclass(frozen=True)
class Done:
    """One go: how many units it did, and, where they are known, its arithmetic and what it had to read at least."""

    units: float
    flops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Ready:
    """A loaded contestant. `go` does the work once; `shown` says what came out last."""

    go: Callable[[], Done]
    shown: Callable[[], Shown] = Shown


@dataclass(frozen=True)
class Contestant:
    """Somebody who does the work. `make` loads (and may raise Unavailable); `like` names whom it must agree with."""

    name: str
    make: Callable[[], Ready]
    like: str = ""


@dataclass(frozen=True)
class Claim:
    """slow / fast, in time per unit or (`of="memory"`) in bytes. The target: at least, or at most, that ratio."""

    text: str
    slow: str
    fast: str
    at_least: float | None = None
    at_most: float | None = None
    of: str = "time"

    def reached(self, ratio: float) -> bool | None:
        """Whether the target is reached; None if there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)


@dataclass(frozen=True)
class Options:
    """What a script was asked for. `folder` keeps the models that a suite makes; processes of their own find them.
    `size`: so many times the usual number of pairs or prompts."""

    folder: Path
    quick: bool = False
    device: str = "cpu"
    size: int = 1

    @property
    def dtype(self) -> str:
        """float32 on the CPU, bfloat16 on a GPU."""
        return "float32" if self.device == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Suite:
    """One comparison. `contestants` is called with the options; the first is the one that is timed twice."""

    name: str
    title: str
    unit: str
    about: str | Callable[[Options], str]
    contestants: Callable[[Options], Sequence[Contestant]]
    claims: Sequence[Claim]
    framework: str = "torch"
    needs: tuple[str, ...] = ()  # packages without which there is nothing to compare


def main(suite: Suite, words: Sequence[str] | None = None) -> None:
    """Run a suite as the command line says."""
    args = parser(suite).parse_args(words)
    settle()
    lacking = [name for name in suite.needs if not installed(name)]
    if lacking:
        sys.exit(f"{suite.name}: {', '.join(lacking)} is not installed, so there is nothing to compare with")
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        options = Options(Path(folder), args.quick, args.device, args.size)
        if args.alone:
            print(json.dumps(alone(suite, options, args.alone)))
            return
        found = compared(suite, options, args.rounds or (2 if args.quick else ROUNDS), args.only)
    if args.quick or args.only:
        print(table(found))
        print("A look at whether everything runs: a small model or a part of the suite, so nothing is written down.")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{suite.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{suite.name}.md").write_text(table(found), encoding="utf-8")
    print(table(found))


def parser(suite: Suite) -> argparse.ArgumentParser:
    """The options of every suite."""
    made = argparse.ArgumentParser(description=suite.title)
    made.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does everything run?")
    made.add_argument("--rounds", type=int, help=f"rounds that count (default {ROUNDS})")
    made.add_argument("--only", default="", help="contestants whose name holds this text, and the first")
    made.add_argument("--size", type=int, default=1, help="so many times the usual number of pairs or prompts")
    made.add_argument("--device", default="cpu", help="cpu; cuda; gpu (MLX)")
    made.add_argument("--out", type=Path, default=RESULTS, help="where NAME.json and NAME.md go")
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--alone", help=argparse.SUPPRESS)
    return made


def settle() -> None:
    """One thread, since processor time means something only where nobody spins; no network; no chatter."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="transformers|trl|peft|torch")
    if installed("torch"):
        import torch

        torch.set_num_threads(1)


# --- the comparison ----------------------------------------------------------------------------------------------


def compared(suite: Suite, options: Options, rounds: int, only: str = "") -> dict[str, Any]:
    """Everything that a suite finds out, as plain values. Exits with a sentence where contestants do not agree."""
    every = list(suite.contestants(options))
    chosen = [c for c in every if c is every[0] or only in c.name]
    ready, first, missing = loaded(suite, chosen, options)
    agreed = gate(chosen, ready, options.dtype)
    faults = [line for lines in agreed.values() for line in lines["faults"]]
    if faults:
        sys.exit(f"{suite.name}: nothing is timed, because the results differ:\n  " + "\n  ".join(faults))
    goes = timed(suite, ready, options, rounds)
    seconds = {name: [go.seconds for go in some] for name, some in goes.items()}
    names = list(ready)
    ready.clear()  # all of them together may hold most of the machine's memory, which is asked for again below
    gc.collect()
    memory = {} if options.quick else {name: remembered(suite, options, name) for name in names}
    return {
        "name": suite.name,
        "title": suite.title,
        "unit": suite.unit,
        "about": suite.about if isinstance(suite.about, str) else suite.about(options),
        "clock": "cpu" if options.device == "cpu" else "wall",
        "device": device_name(options.device),
        "dtype": options.dtype,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(suite, options, rounds),
        "rounds": rounds,
        "ceiling": ceiling(suite.framework, options.device, options.dtype, options.quick),
        "agreement": agreed,
        "contestants": {
            name: {
                "seconds": seconds[name],
                "median": median(seconds[name]),
                "first": first[name].seconds,
                "flops": goes[name][-1].flops or first[name].flops,
                "bytes": goes[name][-1].bytes,
                **memory.get(name, {}),
            }
            for name in names
        },
        "noise": spread(ratios(seconds[TWIN], seconds[names[0]])),
        "claims": [judged(claim, seconds, memory) for claim in suite.claims if {claim.slow, claim.fast} <= {*names}],
        "missing": missing,
    }


def loaded(
    suite: Suite, chosen: Sequence[Contestant], options: Options
) -> tuple[dict[str, Ready], dict[str, Timed], dict[str, str]]:
    """Contestants that are ready, their first goes, and why the others cannot run."""
    ready: dict[str, Ready] = {}
    first: dict[str, Timed] = {}
    missing: dict[str, str] = {}
    for contestant in chosen:
        tell(suite, f"loading {contestant.name}, one go")
        try:
            made = contestant.make()
            first[contestant.name] = counted(suite, made, options)
        except Unavailable as error:
            missing[contestant.name] = str(error)
            continue
        ready[contestant.name] = made
    return ready, first, missing


def command(suite: Suite, options: Options, rounds: int) -> str:
    """What does the same again."""
    said = {"--rounds": (rounds, ROUNDS), "--size": (options.size, 1), "--device": (options.device, "cpu")}
    words = [f" {name} {value}" for name, (value, usual) in said.items() if value != usual]
    return f"python benchmarks/bench_{suite.name}.py" + "".join(words)


def gate(chosen: Sequence[Contestant], ready: Mapping[str, Ready], dtype: str) -> dict[str, dict[str, Any]]:
    """How far each contestant is from the one it must agree with, and what is wrong with that."""
    found = {}
    for contestant in chosen:
        if contestant.name in ready and contestant.like in ready:
            mine, theirs = ready[contestant.name].shown(), ready[contestant.like].shown()
            found[contestant.name] = {"like": contestant.like, **agreement(contestant, mine, theirs, dtype)}
    return found


def agreement(contestant: Contestant, mine: Shown, theirs: Shown, dtype: str) -> dict[str, Any]:
    """Differences, and a sentence for each that is too large or cannot be told."""
    limit, who = TOLERANCE[dtype], f"{contestant.name} and {contestant.like}"
    found: dict[str, Any] = {}
    faults = []
    if mine.loss is not None and theirs.loss is not None:
        found["loss"] = abs(mine.loss - theirs.loss)
        if not found["loss"] <= limit:
            faults.append(f"{who}: losses {mine.loss:.6f} and {theirs.loss:.6f}")
    if mine.values is not None and theirs.values is not None:
        a, b = np.asarray(mine.values, dtype=np.float64), np.asarray(theirs.values, dtype=np.float64)
        found["values"] = float(np.abs(a - b).max()) if a.shape == b.shape and a.size else float("nan")
        if not found["values"] <= limit:
            faults.append(f"{who}: values differ by {found['values']:.2g} ({a.size} and {b.size} of them)")
    if mine.gradients and theirs.gradients:
        found["cosine"] = cosine(mine.gradients, theirs.gradients)
        if not found["cosine"] > COSINE:
            faults.append(f"{who}: the cosine of the gradients is {found['cosine']:.6f}")
    if not found:
        faults.append(f"{who}: there is nothing to compare")
    return found | {"faults": faults}


def cosine(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Cosine of two gradients taken as one vector each; nan if they do not name the same tensors."""
    if a.keys() != b.keys():
        return float("nan")
    x = np.concatenate([np.asarray(a[name], dtype=np.float64).ravel() for name in sorted(a)])
    y = np.concatenate([np.asarray(b[name], dtype=np.float64).ravel() for name in sorted(b)])
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y))) if x.shape == y.shape else float("nan")


@dataclass(frozen=True)
class Timed:
    """One go: seconds, arithmetic and bytes per unit."""

    seconds: float
    flops: float | None
    bytes: float | None


def timed(suite: Suite, ready: Mapping[str, Ready], options: Options, rounds: int) -> dict[str, list[Timed]]:
    """A go of every contestant a round; the order turns round in every other one."""
    first = next(iter(ready))
    order = [*ready, TWIN]
    found: dict[str, list[Timed]] = {name: [] for name in order}
    for number in range(rounds):
        tell(suite, f"round {number + 1} of {rounds}")
        for name in order if number % 2 == 0 else reversed(order):
            found[name].append(a_go(ready[first if name == TWIN else name], options.device))
    return found


def a_go(ready: Ready, device: str) -> Timed:
    """Time one go."""
    begun = now(device)
    done = ready.go()
    spent = now(device) - begun
    return Timed(*(None if value is None else value / done.units for value in (spent, done.flops, done.bytes)))  # type: ignore[arg-type]


def counted(suite: Suite, made: Ready, options: Options) -> Timed:
    """The first go, with the floating-point operations of its products and attention, forwards and backwards."""
    if suite.framework != "torch":
        return a_go(made, options.device)
    with operations() as total:
        return a_go(Ready(lambda: replace(made.go(), flops=float(total[0]) or None)), options.device)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def judged(
    claim: Claim, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """A claim with the ratio that was found. Of memory there is one number, and none where it was not measured."""
    found: dict[str, Any] = asdict(claim)
    if claim.of == "time":
        found |= spread(ratios(seconds[claim.slow], seconds[claim.fast]))
    elif memory.get(claim.slow) and memory.get(claim.fast):
        found["median"] = memory[claim.slow]["work_bytes"] / memory[claim.fast]["work_bytes"]
    found["reached"] = claim.reached(found["median"]) if "median" in found else None
    return found


def tell(suite: Suite, what: str) -> None:
    """Progress, on stderr."""
    print(f"{suite.name}: {what}", file=sys.stderr, flush=True)


# --- memory ------------------------------------------------------------------------------------------------------


def remembered(suite: Suite, options: Options, name: str) -> dict[str, float]:
    """Bytes that the work takes beyond what was there when all was loaded, and the whole, in a process of its own."""
    tell(suite, f"memory of {name}")
    script = str(Path(sys.argv[0]).resolve())
    words = [sys.executable, script, "--alone", name, "--folder", str(options.folder), "--device", options.device]
    words += ["--size", str(options.size)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        tell(suite, f"{name} failed in a process of its own, so its memory is not told:\n{done.stderr[-2000:]}")
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(suite: Suite, options: Options, name: str) -> dict[str, float]:
    """Load one contestant, then the most memory that one go takes."""
    ready = next(c for c in suite.contestants(options) if c.name == name).make()
    before, peak = gauges(options.device)
    held = before()
    ready.go()
    return {"peak_bytes": peak(), "work_bytes": peak() - held}


if __name__ == "__main__":
    made = argparse.ArgumentParser(description="Write the tables of benchmarks/results/ into docs/speed.md.")
    made.add_argument("--page", action="store_true", required=True)
    made.parse_args()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
