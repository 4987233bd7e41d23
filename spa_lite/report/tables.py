"""The tables of a report: what is empty in every row is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spa_lite.axes import one_line
from spa_lite.compare import measures
from spa_lite.report.collect import Stage, Told
from spa_lite.stop import MEASURES
from spa_lite.throughput import Total, totals


@dataclass(frozen=True)
class Sheet:
    """A table: a title per column, and rows of texts; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return len(self.columns) < 2 or not self.rows


NONE = "–"
WIDE = 14
"""Columns that fit on a page."""


def sheet(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> Sheet:
    """A table without the columns in which no row has anything."""
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    return Sheet([columns[i] for i in kept], [[row[i] or NONE for i in kept] for row in rows])


def stage_sheet(run: Told) -> Sheet:
    """What came of each stage, as the terminal has it."""
    columns = (
        "stage", "win rate vs init %", "labels right %", "held-out pairs %", "mean gold", "length", "flagged %",
        "of them wrong", "loss", "seconds", "peak GB",
    )  # fmt: skip
    return sheet(columns, [_stage_cells(stage, refines(run)) for stage in run.stages])


def refines(run: Told) -> bool:
    """Whether a run may flag pairs as noise."""
    return run.recipe is None or (run.recipe.noise.by == "quantile" and run.recipe.refine.alpha > 0)


def prompts_sheet(run: Told) -> Sheet:
    """What became of the prompts that each round's model was asked to write."""
    columns = (
        "round", "asked for", "kept", "no prompt", "no task", "held out", "too similar", "no task of the world",
        "repeat %", "with personas %", "without personas %",
    )  # fmt: skip
    return sheet(columns, [_prompts_cells(stage) for stage in run.rounds if stage.row.get("prompted")])


def _prompts_cells(stage: Stage) -> list[str | None]:
    found = stage.row["prompted"]
    names = ("unreadable", "filtered", "held_out", "similar", "unknown")
    return [
        stage.name.removeprefix("round "),
        *[count(found.get(name)) for name in ("asked", "kept")],
        *[count(found[name]) if found.get(name) else None for name in names],
        percent(found.get("repeated")),
        percent(found.get("repeated_with_personas")),
        percent(found.get("repeated_without_personas")),
    ]


def _stage_cells(stage: Stage, flags_any: bool) -> list[str | None]:
    row = stage.row
    judged, trained, flags = row.get("judged") or {}, row.get("trained") or {}, row.get("flags") or {}
    peaks = [spent["peak"] for spent in stage.spent.values() if spent.get("peak")]
    seconds = [spent["seconds"] for spent in stage.spent.values() if "seconds" in spent]
    return [
        stage.name,
        interval(stage.interval("win_rate")),
        interval(stage.interval("labels")),
        interval(stage.interval("pair_accuracy")),
        fixed((row.get("gold") or {}).get("score"), 3),
        fixed(row.get("length") or judged.get("mean_tokens"), 1),
        percent(trained.get("flagged_share")) if judged and flags_any else None,
        f"{flags['flagged_wrong']} of {flags['flagged']}" if flags.get("flagged") else None,
        fixed(trained.get("loss"), 4),
        fixed(sum(seconds), 1) if seconds else None,
        fixed(max(peaks) / 1e9, 2) if peaks else None,
    ]


def judging_sheet(run: Told) -> Sheet:
    """What each round's answers and labels look like."""
    columns = (
        "round", "pairs", "identical", "ties", "not trained on", "replies unread", "orders disagree %",
        "reward agrees %", "cut at the cap", "longer wins %", "distinct-2 %", "repeated 4-grams %",
        "going in circles %",
    )  # fmt: skip
    return sheet(columns, [_judging_cells(stage) for stage in run.rounds if stage.row.get("judged")])


def _judging_cells(stage: Stage) -> list[str | None]:
    judged, left_out = stage.row["judged"], (stage.row.get("trained") or {}).get("left_out") or {}
    other = any(j.judge != "implicit" for j in stage.judgements[:1])  # that the reward agrees with itself says nothing
    lint = judged.get("lint") or (stage.row.get("sampled") or {}).get("lint") or {}
    return [
        stage.name.removeprefix("round "),
        *[count(judged.get(name)) for name in ("pairs", "identical", "ties")],
        count(sum(left_out.values())) if left_out else None,
        count(judged["unread"]) if judged.get("unread") else None,
        percent(judged.get("disagree_share")),
        percent(judged.get("reward_agrees")) if judged.get("rewarded") and other else None,
        count(judged.get("capped")),
        percent(judged.get("longer_wins")) if judged.get("unequal_lengths") else None,
        *[percent(lint.get(name)) for name in ("distinct_2", "repeat_4", "looping")],
    ]


def throughput_sheet(run: Told) -> Sheet:
    """Useful tokens per second of each kind of stage that was computed in the run."""
    columns = ("stage", "what", "tokens", "tokens per second", "% of the floor")
    return sheet(columns, [_throughput_cells(total) for total in totals([stage.spent for stage in run.stages])])


def _throughput_cells(total: Total) -> list[str | None]:
    return [total.kind, total.done, f"{total.tokens:,.0f}", fixed(total.per_second, 1), percent(total.share)]


def tiles(run: Told) -> list[tuple[str, str, str]]:
    """(what, value, beside it) of the few numbers that say how it ended."""
    found = []
    for name, title in (
        ("win_rate", "win rate vs init"),
        ("pair_accuracy", "held-out pairs"),
        ("labels", "self-labels right"),
    ):
        known = [stage for stage in run.stages if stage.interval(name)]
        if known and (at := known[-1].interval(name)):
            beside = f"{100 * at['low']:.1f} to {100 * at['high']:.1f}, n = {at.get('n', 0):g}, {known[-1].name}"
            found.append((title, f"{100 * at['value']:.1f} %", beside))
    took = [spent["seconds"] for stage in run.stages for spent in stage.spent.values() if "seconds" in spent]
    if took:
        found.append(("time", duration(sum(took)), f"{len(took)} stages computed here"))
    return found


def facts(run: Told) -> list[tuple[str, str]]:
    """What a run is: name and value, those that are known."""
    r = run.recipe
    pairs: list[tuple[str, str | None]] = [
        ("run folder", run.folder.name),
        ("state", (run.unfinished and f"not finished; {run.unfinished}") or "finished"),
        ("recipe", f"{r.name} at scale {r.scale}" if r else None),
        ("made of", one_line(r) if r else None),
        ("model", (r.inputs.model or "the built-in lesson model") if r else None),
        ("judge", _judge(run)),
        ("data", _data(run)),
        ("computed on", "; ".join(run.makers) or None),
        ("machine", "; ".join(_machine(run)) or None),
        ("versions", _versions(run)),
        ("taken from another run", ", ".join(run.reused) or None),
        ("stopped early", f"after {stopped}, by a stop rule" if (stopped := run.summary.get("stopped")) else None),
        ("best stage", _best(run)),
    ]
    return [(name, value) for name, value in pairs if value]


def _versions(run: Told) -> str | None:
    found = run.summary.get("versions")
    return ", ".join(f"{name} {number}" for name, number in found.items()) if isinstance(found, dict) else None


def _judge(run: Told) -> str | None:
    r = run.recipe
    if r is None or not r.rounds:
        return None
    parts = [r.judge.by, f"reference {r.judge.reference}" if r.judge.by == "implicit" else "", r.judge.model or ""]
    return ", ".join(part for part in parts if part)


def _data(run: Told) -> str | None:
    """How many of what the run worked on."""
    sizes = {(stage.number, kind): size for stage in run.stages for kind, size in stage.sizes.items()}
    parts = []
    if (0, "seed") in sizes:
        parts.append(f"{sizes[0, 'seed']} seed pairs")
    rounds = [
        (stage.row.get("sampled") or {}).get("prompts") or stage.sizes["sample"]
        for stage in run.stages
        if "sample" in stage.sizes
    ]
    if rounds:
        each = str(rounds[0]) if len(set(rounds)) == 1 else " + ".join(map(str, rounds))
        parts.append(f"{each} prompts in each of {len(rounds)} rounds" if "+" not in each else f"{each} prompts")
    for name, what in (("win_rate", "held-out prompts"), ("pair_accuracy", "held-out pairs")):
        ns = {at["n"] for stage in run.stages if (at := stage.interval(name)) and "n" in at}
        if ns:
            parts.append(f"{max(ns):g} {what}")
    return ", ".join(parts) or None


def _machine(run: Told) -> list[str]:
    """What the stages say of the machine beside the arithmetic."""
    known = {"backend", "device", "dtype", "bits"}
    return sorted(
        {
            ", ".join(f"{key} {value}" for key, value in sorted(maker.items()) if key not in known and value)
            for stage in run.stages
            for maker in stage.made_by.values()
        }
        - {""}
    )


def settings(run: Told) -> Sheet:
    """Every setting of the run."""
    return sheet(("setting", "value"), [(path, plain(value)) for path, value in run.settings.items()])


def changed(run: Told) -> Sheet:
    """The settings that are not as the recipe and the scale have them."""
    rows = [(path, plain(mine), plain(theirs)) for path, (mine, theirs) in run.changed.items()]
    return sheet(("setting", "here", "there"), rows)


def differences(runs: Sequence[Told]) -> Sheet:
    """Several runs side by side: the settings in which they differ, then what came of it."""
    if len(runs) < 2:
        return Sheet((), ())
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    missing = object()
    varied = [p for p in paths if len({plain(run.settings.get(p, missing)) for run in runs}) > 1]
    found = [measures([stage.row for stage in run.stages]) for run in runs]
    names = [
        n
        for n in dict.fromkeys(name for one in found for name in one)
        if "_round_" not in n and (n == "gold_score" or not n.startswith("gold_"))
        if not n.startswith("flagged") or any(refines(run) for run in runs)
    ]
    rows = []
    for run, numbers in zip(runs, found, strict=True):
        given = [plain(run.settings[p]) if p in run.settings else None for p in varied]
        rows.append([run.name, *given, *[_measured(n, numbers.get(n)) for n in names]])
    return _narrow(sheet(["run", *varied, *[_titled(name) for name in names]], rows))


def _narrow(found: Sheet) -> Sheet:
    """A table that is too wide for a page is turned, if that makes it narrower."""
    if len(found.columns) <= max(WIDE, 1 + len(found.rows)):
        return found
    names, *columns = zip(*found.rows, strict=True)
    return Sheet(["", *names], [[title, *cells] for title, cells in zip(found.columns[1:], columns, strict=True)])


SHARES = {
    "win_rate": "win rate vs init %",
    "pair_accuracy": "held-out pairs %",
    "label_accuracy": "labels right %",
    "wrong_share": "labels wrong %",
    "flagged_share": "flagged %",
    "flagged_wrong_share": "of them wrong %",
}
"""Measures of `compare` that are shares, and their titles."""


def _titled(name: str) -> str:
    return SHARES.get(name) or name.replace("_", " ")


def _measured(name: str, value: float | None) -> str | None:
    if name in SHARES:
        return percent(value)
    return count(value) if name.endswith("tokens") else fixed(value, 1 if name == "length" else 3)


def plain(value: Any) -> str:
    """A setting's value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=lambda o: "not set")


def _best(run: Told) -> str | None:
    """The stage that measured best."""
    best = run.summary.get("best")
    if not isinstance(best, Mapping) or not {"stage", "measure", "value"} <= best.keys():
        return None
    return f"{best['stage']} ({MEASURES.get(best['measure'], best['measure'])} {100 * best['value']:.1f} %)"


def interval(found: Mapping[str, float] | None) -> str | None:
    """`61.2 [57.0, 65.1]` of an interval in [0, 1]."""
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" if found else None


def fixed(value: float | None, digits: int) -> str | None:
    """A number with so many decimals."""
    return None if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str | None:
    """A share in [0, 1] in %."""
    return None if share is None else f"{100 * share:.1f}"


def count(value: float | None) -> str | None:
    """A whole number."""
    return None if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
