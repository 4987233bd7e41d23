"""Does self-labelling pay on the lesson? Five arms, three seeds, held-out prompts that nothing was tuned on.

    python benchmarks/lesson_science.py [--seeds 0 1 2] [--out runs/science] [--table docs/lesson-results.md]

Arms, all from the same seed pairs: `seed` (DPO on them as the recipe trains it), `seed, tuned` (the best of a sweep
over learning rate and epochs, chosen on the `tune` prompts), `spa`, the same loop with `random` labels, and with
`gold` labels (the ceiling). Every run is a run folder, so a second call computes only what is missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from spa_lite import backends, prepare
from spa_lite.events import Event
from spa_lite.models import Models
from spa_lite.recipe import build, load_layer
from spa_lite.spa import align
from spa_lite.store import Run

Setting = tuple[float, float, int]
SWEEP: list[Setting] = [(1.0, 1e-3, 10), (1.0, 1e-3, 20), (1.0, 3e-3, 3), (1.0, 3e-3, 10), (0.1, 1e-3, 10)]
"""beta, learning rate and epochs that the tuned arm may choose from."""


def main() -> None:
    """Run every arm and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/science"))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    text = "\n".join(table(options.seeds, options.out))
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")


_MODELS: list[Models] = []


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Rows of one run of the lesson with some settings changed; the model is loaded once for all."""
    layers = {"scale": load_layer("scale", "lesson"), "arm": {k.replace("__", "."): v for k, v in changes.items()}}
    recipe, _ = build(layers)
    if not _MODELS:
        _MODELS.append(prepare.models_of(recipe, backends.load))
    data = prepare.data_of(recipe, _MODELS[0])
    print(f"{folder}", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = align(_MODELS[0], recipe, data, Run(folder), quiet)["rows"]
    return rows


def quiet(event: Event) -> None:
    """Notes only."""
    if event.note:
        print(f"  {event.stage}: {event.note}", file=sys.stderr, flush=True)


def win(row: dict[str, Any]) -> float:
    """Win rate against init in points."""
    return 100.0 * float(row["win_rate"]["value"])


def table(seeds: list[int], out: Path) -> list[str]:
    """All arms as Markdown."""
    tuned = best_of_sweep(seeds, out)
    arms: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for seed in seeds:
        for arm in ("spa", "random", "gold"):
            judge = {"judge__by": "implicit" if arm == "spa" else arm}
            arms.setdefault(arm, {})[seed] = run(out / f"{arm}-{seed}", seed=seed, **judge)
        arms.setdefault("tuned", {})[seed] = run(out / f"tuned-{seed}", seed=seed, **seed_only(tuned))
    best = f"beta {tuned[0]:g}, lr {tuned[1]:g}, {tuned[2]} epochs"
    wins = {
        "seed only, as the recipe trains it": {s: win(arms["spa"][s][1]) for s in seeds},
        f"seed only, tuned ({best})": {s: win(arms["tuned"][s][-1]) for s in seeds},
        "SPA": {s: win(arms["spa"][s][-1]) for s in seeds},
        "same loop, random labels": {s: win(arms["random"][s][-1]) for s in seeds},
        "same loop, gold labels": {s: win(arms["gold"][s][-1]) for s in seeds},
    }
    n = arms["spa"][seeds[0]][-1]["win_rate"]["n"]
    lines = [f"Gold win rate against `init` in points, {n} held-out prompts, final stage of each arm.", ""]
    lines += header(["arm", *[f"seed {s}" for s in seeds], "mean"])
    lines += [row([name, *[f"{v[s]:.1f}" for s in seeds], f"{mean(v.values()):.1f}"]) for name, v in wins.items()]
    gentle, hard, spa, *_ = wins.values()
    for name, other in (("the recipe's", gentle), ("the tuned", hard)):
        gaps = [spa[s] - other[s] for s in seeds]
        cells = [f"{gap:+.1f}" for gap in gaps]
        lines.append(row([f"SPA minus {name} seed-only arm", *cells, f"{mean(gaps):+.1f}"]))
    return [*lines, "", *rounds(arms["spa"], seeds), "", *labels(arms["spa"], seeds)]


def seed_only(setting: Setting) -> dict[str, Any]:
    """Settings of a run that stops after the seed stage."""
    beta, rate, epochs = setting
    return {"loss__beta": beta, "seed_dpo__learning_rate": rate, "seed_dpo__epochs": epochs, "rounds": 0}


def best_of_sweep(seeds: list[int], out: Path) -> Setting:
    """The seed-only setting with the highest mean win rate on the `tune` prompts."""
    found: dict[Setting, float] = {}
    for setting in SWEEP:
        name = "tune-" + "-".join(f"{value:g}" for value in setting)
        rows = [run(out / f"{name}-{s}", seed=s, lesson__split="tune", **seed_only(setting)) for s in seeds]
        found[setting] = mean([win(r[-1]) for r in rows])
        print(f"  tune split: {name}: {found[setting]:.1f}", file=sys.stderr, flush=True)
    return max(found, key=lambda setting: found[setting])


def rounds(runs: dict[int, list[dict[str, Any]]], seeds: list[int]) -> list[str]:
    """SPA stage by stage."""
    criteria = [name for name in runs[seeds[0]][0]["gold"] if name != "score"]
    lines = ["SPA stage by stage, mean over seeds: win rate, length, and mean gold per criterion.", ""]
    lines += header(["stage", "win rate", "length", *criteria])
    for i, first in enumerate(runs[seeds[0]]):
        stages = [runs[s][i] for s in seeds]
        cells = [
            "-" if i == 0 else f"{mean([win(r) for r in stages]):.1f}",
            f"{mean([r['length'] for r in stages]):.1f}",
        ]
        cells += [f"{mean([r['gold'][c] for r in stages]):.3f}" for c in criteria]
        lines.append(row([first["stage"], *cells]))
    return lines


def labels(runs: dict[int, list[dict[str, Any]]], seeds: list[int]) -> list[str]:
    """How often the self-labels agree with gold, per round and criterion."""
    stages = [i for i, r in enumerate(runs[seeds[0]]) if r.get("label_accuracy")]
    # A criterion on which hardly any two answers differ (endings) may be missing from a round.
    every = [runs[s][i]["label_accuracy"] for s in seeds for i in stages]
    names = ["score", *[n for n in every[0] if n != "score" and all(n in found for found in every)]]
    lines = ["Self-labels that agree with gold, in per cent, mean over seeds (pairs whose gold differs).", ""]
    lines += header(["round", *names, "flagged", "flagged and wrong", "wrong in all"])
    for i in stages:
        found = [runs[s][i] for s in seeds]
        cells = [f"{100 * mean([r['label_accuracy'][n]['value'] for r in found]):.0f}" for n in names]
        flagged = sum(r["flags"]["flagged"] for r in found)
        wrong = sum(r["flags"]["flagged_wrong"] for r in found)
        share = sum(r["flags"]["wrong"] for r in found) / sum(r["flags"]["pairs"] for r in found)
        cells += [str(flagged), f"{100 * wrong / flagged:.0f} %" if flagged else "-", f"{100 * share:.0f} %"]
        lines.append(row([found[0]["stage"], *cells]))
    return lines


def header(cells: list[str]) -> list[str]:
    """First two lines of a Markdown table."""
    return [row(cells), row(["---"] * len(cells))]


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def mean(values: Any) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
