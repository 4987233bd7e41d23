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
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
COSINE = 0.999
ROUNDS = 5
LIBRARIES = ("spa-lite", "torch", "transformers", "peft", "trl", "mlx", "mlx-lm", "mlx-lm-lora", "numpy")
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


def installed(package: str) -> bool:
    """Whether a package is there, by the name of its distribution."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# --- the comparison ----------------------------------------------------------------------------------------------


def compared(suite: Suite, options: Options, rounds: int, only: str = "") -> dict[str, Any]:
    """Everything that a suite finds out, as plain values. Exits with a sentence where contestants do not agree."""
    every = list(suite.contestants(options))
    chosen = [c for c in every if c is every[0] or only in c.name]
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
    agreed = gate(chosen, ready, options.dtype)
    faults = [line for lines in agreed.values() for line in lines["faults"]]
    if faults:
        sys.exit(f"{suite.name}: nothing is timed, because the results differ:\n  " + "\n  ".join(faults))
    goes = timed(suite, ready, options, rounds)
    seconds = {name: [go.seconds for go in some] for name, some in goes.items()}
    memory = {} if options.quick else {name: remembered(suite, options, name) for name in ready}
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
        "ceiling": ceiling(suite.framework, options),
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
            for name in ready
        },
        "noise": spread(ratios(seconds[TWIN], seconds[next(iter(ready))])),
        "claims": [
            judged(claim, seconds, memory) for claim in suite.claims if {claim.slow, claim.fast} <= ready.keys()
        ],
        "missing": missing,
    }


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


@contextmanager
def operations() -> Iterator[list[int]]:
    """Counts what PyTorch is asked to do inside the block, in this thread; into a list of one number."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    known = dict(flop_registry)  # which lacks the attention of the CPU
    known[aten._scaled_dot_product_flash_attention_for_cpu] = known[aten._scaled_dot_product_flash_attention]
    known[aten._scaled_dot_product_flash_attention_for_cpu_backward] = known[
        aten._scaled_dot_product_flash_attention_backward
    ]
    total = [0]

    @cache
    def composite(func: Any) -> bool:  # inside inference mode some operations arrive whole
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))

    class Counter(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count = known.get(func._overloadpacket)
            if count is None and composite(func):
                with self:
                    return func.decompose(*args, **kwargs or {})
            made = func(*args, **kwargs or {})
            total[0] += count(*args, **kwargs or {}, out_val=made) if count else 0
            return made

    with Counter():
        yield total


def now(device: str) -> float:
    """Seconds: of processor time, or of the clock once a GPU has done all it was asked for."""
    if device == "cpu":
        return time.process_time()
    at_rest(device)
    return time.perf_counter()


def at_rest(device: str) -> None:
    """Wait for a GPU: `cuda` is PyTorch's, `gpu` is MLX's."""
    if device == "gpu":
        import mlx.core as mx

        mx.synchronize()
    else:
        import torch

        torch.cuda.synchronize()


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


def gauges(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """What reads the bytes in use, and the most so far, which starts here."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    if device == "gpu":
        import mlx.core as mx

        mx.reset_peak_memory()
        return mx.get_active_memory, mx.get_peak_memory
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the largest resident set so far
    return lambda: resident("VmRSS"), lambda: resident("VmHWM")


def resident(line: str) -> int:
    """Bytes, from a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"{line}:\s+(\d+) kB", status)[0]) * 1024


# --- the machine -------------------------------------------------------------------------------------------------


def ceiling(framework: str, options: Options) -> dict[str, float]:
    """Operations per second of a matrix product, and bytes per second of a copy (read and written): best of five."""
    size, numbers = (256, 2**20) if options.quick else (1536, 2**26) if options.device == "cpu" else (8192, 2**30)
    product, copy = (mlx_probes if framework == "mlx" else torch_probes)(size, numbers, options)
    width = 4 if options.dtype == "float32" else 2
    return {"flops": 2 * size**3 / best(product, options), "bytes": 2 * width * numbers / best(copy, options)}


def best(work: Callable[[], Any], options: Options) -> float:
    """The least seconds of five goes, after one that does not count."""
    spent = []
    for _ in range(6):
        begun = now(options.device)
        work()
        spent.append(now(options.device) - begun)
    return max(min(spent[1:]), 1e-9)


def torch_probes(size: int, numbers: int, options: Options) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A product of two squares, and a copy."""
    import torch

    kind = {"dtype": getattr(torch, options.dtype), "device": options.device}
    a, b = torch.rand(size, size, **kind), torch.rand(size, size, **kind)
    source, target, out = torch.rand(numbers, **kind), torch.zeros(numbers, **kind), torch.empty(size, size, **kind)
    return lambda: torch.mm(a, b, out=out), lambda: target.copy_(source)


def mlx_probes(size: int, numbers: int, options: Options) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same in MLX."""
    import mlx.core as mx

    kind = getattr(mx, options.dtype)
    a, b, source = (mx.random.uniform(shape=shape).astype(kind) for shape in ((size, size), (size, size), (numbers,)))
    mx.eval(a, b, source)
    return lambda: mx.eval(a @ b), lambda: mx.eval(source + 1)


def device_name(device: str) -> str:
    """What the work ran on, in words."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    if device == "gpu":
        import mlx.core as mx

        return str(mx.device_info().get("device_name", platform.machine()))
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, of which one was used"


def versions() -> dict[str, str]:
    """Of Python and of every library that may matter, as far as it is installed."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES if installed(name)}
    return {"python": platform.python_version()} | found


# --- tables ------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """A result as Markdown: who took how long, what that means, and who could not run."""
    top, unit = found["ceiling"], found["unit"]
    lines = [
        f"# {found['title']}",
        "",
        found["about"],
        "",
        f"`{found['command']}`, {found['date']}. {found['device']}; {found['dtype']}, one thread. "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f". Seconds of {'processor time' if found['clock'] == 'cpu' else 'the clock'}, medians of "
        f"{found['rounds']} rounds. In the same run a matrix product reached {top['flops'] / 1e9:,.0f} GFLOP/s and a "
        f"copy {top['bytes'] / 1e9:,.1f} GB/s.",
        "",
        f"| who | s per {unit} | least to most | first go | GFLOP per {unit} | rates (of the product, of the copy) "
        "| memory for the work, MiB | of the process, MiB | agrees with |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
        *(row(name, each, found) for name, each in found["contestants"].items()),
        *(f"| {name} | not run: {reason} | | | | | | | |" for name, reason in found["missing"].items()),
        "",
        "| ratio | median | least to most | target | reached |",
        "| --- | ---: | ---: | ---: | --- |",
        *(claimed(claim) for claim in found["claims"]),
        "| the same code twice (noise) | {median:.2f} | {least:.2f} to {most:.2f} | | |".format(**found["noise"]),
    ]
    return "\n".join(lines) + "\n"


def row(name: str, each: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """One contestant."""
    spent, top, agreed = each["seconds"], found["ceiling"], found["agreement"].get(name, {})
    rates = [
        f"{each[what] / each['median'] / 1e9:,.3g} {unit} ({each[what] / each['median'] / top[what]:.0%})"
        for what, unit in (("flops", "GFLOP/s"), ("bytes", "GB/s"))
        if each[what]
    ]
    apart = [f"{what} {agreed[what]:.0e}" for what in ("loss", "values") if what in agreed]
    apart += [f"cosine {agreed['cosine']:.6f}"] if "cosine" in agreed else []
    cells = [
        name,
        number(each["median"]),
        f"{number(min(spent))} to {number(max(spent))}",
        number(each["first"]),
        number(each["flops"] / 1e9) if each["flops"] else "",
        ", ".join(rates),
        *(f"{each[key] / 2**20:,.0f}" if key in each else "" for key in ("work_bytes", "peak_bytes")),
        f"{agreed['like']}: {', '.join(apart)}" if agreed else "",
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def claimed(claim: Mapping[str, Any]) -> str:
    """One claim."""
    target = f"at least {claim['at_least']:g}" if claim["at_least"] is not None else ""
    target = f"at most {claim['at_most']:g}" if claim["at_most"] is not None else target
    if "median" not in claim:
        return f"| {claim['text']} | not measured | | {target} | |"
    wide = f"{claim['least']:.2f} to {claim['most']:.2f}" if "least" in claim else ""
    reached = {True: "yes", False: "no", None: ""}[claim["reached"]]
    return f"| {claim['text']} | {claim['median']:.2f} | {wide} | {target} | {reached} |"


def with_tables(page: str, results: Path = RESULTS) -> str:
    """The page with the newest table of every suite between its two marks."""

    def fresh(found: re.Match[str]) -> str:
        name = found[1]
        path = results / f"{name}.json"
        text = "Not measured yet.\n" if not path.exists() else table(json.loads(path.read_text(encoding="utf-8")))
        text = re.sub(r"^# ", "### ", text, flags=re.M)
        return f"<!-- table: {name} -->\n\n{text}\n<!-- end: {name} -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end: \1 -->", fresh, page, flags=re.S)


if __name__ == "__main__":
    made = argparse.ArgumentParser(description="Write the tables of benchmarks/results/ into docs/speed.md.")
    made.add_argument("--page", action="store_true", required=True)
    made.parse_args()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
