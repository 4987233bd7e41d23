"""A part of the GPU script: its contestants go, must agree, and are timed in turn; every finding is a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gpu_models import GIB, Bench
from machine import now
from side_by_side import Claim, Contestant, Ready, Shown, Suite, Unavailable, agreement, judged, timed


class Differs(Exception):
    """Contestants do not agree, so nothing is timed."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    part: str
    what: str
    found: str
    target: str = ""
    reached: bool | None = None


@dataclass(frozen=True)
class Floor:
    """Seconds per unit that a contestant needs at least, and which share of that speed it should reach."""

    of: str
    seconds: float
    at_least: float

    def line(self, part: str, taken: float) -> Line:
        """What was reached of it."""
        share = self.seconds / taken
        told = f"at least {self.at_least:.0%}"
        return Line(part, f"{self.of}: share of the floor", f"{share:.1%}", told, share >= self.at_least)


def suite_of(name: str, unit: str, contestants: Sequence[Contestant], claims: Sequence[Claim]) -> Suite:
    """One of the harness, without what only its pages need."""
    return Suite(name, "", unit, "", lambda _: contestants, claims)


def measure(suite: Suite, bench: Bench, floor: Floor | None = None, rounds: int | None = None) -> Iterator[Line]:
    """First goes, then agreement, then rounds: as `side_by_side.compared`, with contestants that share a model."""
    ready: dict[str, Ready] = {}
    shown: dict[str, Shown] = {}
    every = suite.contestants(bench.options)
    for contestant in every:
        try:
            made = contestant.make()
            spent, held = first_go(made, bench.options.device)
            told = f"{spent:.2f} s" + (f", {held / GIB:.2f} GiB beyond what is loaded" if held is not None else "")
            yield Line(suite.name, f"{contestant.name}: first go", told)
        except (Unavailable, RuntimeError) as error:  # memory that runs out is a RuntimeError, too
            bench.tidy()
            yield Line(suite.name, contestant.name, f"not run: {first_line(error)}")
            continue
        ready[contestant.name], shown[contestant.name] = made, made.shown()
    for contestant in every:
        if contestant.name in shown and contestant.like in shown:
            mine, theirs = shown[contestant.name], shown[contestant.like]
            try:
                yield agreed(suite.name, agreement(contestant, mine, theirs, bench.options.dtype), contestant.name)
            except Differs as error:
                del ready[contestant.name]
                yield Line(suite.name, contestant.name, f"not timed: {error}", reached=False)
    shown.clear()
    goes = timed(suite, ready, bench.options, rounds or bench.rounds)
    seconds = {name: [go.seconds for go in some] for name, some in goes.items()}
    for name, some in seconds.items():
        yield Line(suite.name, name, f"{1 / median(some):,.4g} {suite.unit}/s")
        if floor and name == floor.of:
            yield floor.line(suite.name, median(some))
    for claim in suite.claims:
        if {claim.slow, claim.fast} <= ready.keys():
            found = judged(claim, seconds, {})
            wide = f"{found['median']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
            yield Line(suite.name, claim.text, wide, f"at least {claim.at_least:g}", found["reached"])


def first_go(made: Ready, device: str) -> tuple[float, int | None]:
    """Seconds of the first go, with all that is compiled and captured in it; and on CUDA the most bytes it took."""
    import torch

    cuda = device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated() if cuda else 0, now(device)
    made.go()
    spent = now(device) - begun
    return spent, torch.cuda.max_memory_allocated() - before if cuda else None


def agreed(part: str, found: dict[str, Any], name: str) -> Line:
    """A line that says how near two contestants are. Raises Differs if they are not."""
    if found["faults"]:
        raise Differs("; ".join(found["faults"]))
    near = ", ".join(f"{what} {value:.2g}" for what, value in found.items() if what not in {"faults", "cosine"})
    cosine = f"cosine {found['cosine']:.6f}" if "cosine" in found else ""
    return Line(part, f"{name}: agrees", ", ".join(filter(None, (near, cosine))))


def first_line(error: BaseException) -> str:
    """An error in short."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}"
