"""Kill a run at a chosen instant, go on, and compare with a run that nobody disturbed. Used by test_resume.

    python -m tests.crash FOLDER KIND POINTS [CHANGES]

An *instant* is a moment at which a run could be stopped so that it matters: before, within and after each write, before
and after each rename, and at each event of progress. Instants are numbered in the order in which they come. For each
point, a process of its own runs into a SIGKILL at that instant; another one goes on to the end. Prints, as JSON, how
many instants there are and, for each point, where it lay and which files came out differently.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spa_lite import files, judge
from spa_lite.events import Event
from spa_lite.recipe import Recipe
from tests.small import run_small, small_recipe, write_data

BESIDE = {"timings.json", "batching.json", ".lock"}
"""Files that tell of the machine, not of the result."""
QUICK: dict[str, Any] = {
    "rounds": 1,
    "batching.sample": 2,
    "batching.score_tokens": 64,
    "batching.micro_tokens": 64,
    "train.save_every": 2,
    "train.cache_reference": True,
    "seed_dpo.epochs": 1,
    "refine.window": 4,
    "lengths.max_prompt_length": 100,
    "lengths.max_length": 200,
}
"""Small chunks, many checkpoints, and a file of states."""
CHUNK = 4
"""Rows that a journal of sums takes at a time, to be set where these runs are made."""


class Instants:
    """Counts instants, and stops the process at one of them."""

    def __init__(self, fatal: int = 0) -> None:
        self.fatal, self.count = fatal, 0
        self.places: list[str] = []

    def here(self, what: str) -> None:
        """One more."""
        self.count += 1
        self.places.append(what)
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Put instants around everything that reaches the disk."""
        write, move = files.write, files.move

        def torn(path: Path, content: bytes, at: int = 0, durable: bool = True) -> None:
            name = f"{path.parent.name}/{path.name}"
            self.here(f"before writing {name}")
            if self.count + 1 == self.fatal:
                write(path, content[: len(content) // 2], at, durable)
            self.here(f"in the middle of writing {name}")
            write(path, content, at, durable)
            self.here(f"after writing {name}")

        def moved(source: Path, target: Path) -> None:
            name = f"{target.parent.name}/{target.name}"
            self.here(f"before moving {name}")
            move(source, target)
            self.here(f"after moving {name}")

        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("spa_lite"):
                for name, old, new in (("write", write, torn), ("move", move, moved)):
                    if getattr(module, name, None) is old:
                        setattr(module, name, new)

    def report(self, event: Event) -> None:
        """Progress is an instant, too."""
        self.here(f"at {event.stage} {event.done}")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those beside the result."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if Path(name).name not in BESIDE}


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def recipe_of(kind: str, folder: Path, changes: dict[str, Any]) -> Recipe:
    """The small recipe for the toy, or for a model folder with torch or mlx."""
    sources = write_data(folder, pairs=18, prompts=18)
    backend, _, model = kind.partition(":")
    return small_recipe(sources, QUICK | {"inputs.backend": backend, "inputs.model": model or backend} | changes)


def spread(points: str, count: int) -> Sequence[int]:
    """`all`, or that many instants evenly over the run."""
    wanted = count if points == "all" else min(int(points), count)
    return sorted({1 + (i * (count - 1)) // max(1, wanted - 1) for i in range(wanted)})


def main() -> None:
    """Count, kill, go on, compare."""
    folder, kind, points = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    recipe = recipe_of(kind, folder, json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})
    judge.CHUNK = CHUNK
    os.fsync = lambda fd: None  # SIGKILL leaves the system's own buffers alone
    counted = folder / "instants.json"

    def undisturbed() -> None:
        instants = Instants()
        instants.watch()
        run_small(folder / "whole", recipe, report=instants.report)
        counted.write_text(json.dumps(instants.places))

    if in_child(undisturbed):
        sys.exit("the undisturbed run failed")
    places, expected = json.loads(counted.read_text()), contents(folder / "whole")
    found = []
    for point in spread(points, len(places)):
        run = folder / f"run-{point}"

        def disturbed(run: Path = run, point: int = point) -> None:
            instants = Instants(point)
            instants.watch()
            run_small(run, recipe, report=instants.report)

        died = in_child(disturbed)

        def resumed(run: Path = run) -> None:
            run_small(run, recipe)

        ended = in_child(resumed)
        after = contents(run)
        wrong = [name for name in sorted(set(expected) | set(after)) if expected.get(name) != after.get(name)]
        found.append({"point": point, "place": places[point - 1], "died": died, "ended": ended, "wrong": wrong})
    print(json.dumps({"instants": len(places), "points": found}))


if __name__ == "__main__":
    main()
