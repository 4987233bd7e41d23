"""The parts that figures of a report are drawn from: a style, axes by stage and by step, bars, legends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spa_lite.figures import COLOURS, FAINT, INK, RULE, new, short
from spa_lite.report.collect import Told
from spa_lite.report.looks import Look
from spa_lite.throughput import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8
"""Inches: about as wide as a phone, so that text is nearly as large there as elsewhere."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
}
GREY = "#9a9aa5"
KIND_COLOURS = dict(
    zip(KINDS, (COLOURS[3], GREY, COLOURS[1], COLOURS[6], COLOURS[4], COLOURS[5], COLOURS[0], COLOURS[2]), strict=True)
)
KIND_MARKERS = dict(zip(KINDS, "oP*XsD^v", strict=True))

Table = list[dict[str, Any]]
Entries = Sequence[tuple[str, Any]]
"""Of a legend: text and handle."""


@dataclass(frozen=True)
class Drawn:
    """A figure, what it shows in words, and the table behind it (the same keys in every row)."""

    name: str
    title: str
    caption: str
    table: Table
    figure: Figure

    @property
    def text(self) -> str:
        """The figure for those who cannot see it: what it shows, and its numbers if they are few."""
        if len(self.table) > 24:
            return f"{self.caption} The {len(self.table)} rows of data are in {self.name}.csv."
        rows = ["; ".join(f"{key} {_said(value)}" for key, value in row.items()) for row in self.table]
        return f"{self.caption} Data: {' | '.join(rows)}"


def _said(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def without(table: Table, *names: str) -> Table:
    """The table without columns that are for drawing only."""
    return [{key: value for key, value in row.items() if key not in names} for row in table]


def sizes(table: Table, items: str) -> str:
    """`n = 400 prompts.`, or from and to where it differs."""
    ns = sorted({int(row["n"]) for row in table if row.get("n")})
    if not ns:
        return ""
    return f"n = {ns[0]} {items}." if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]} {items}."


# -- axes ----------------------------------------------------------------------------------------------------------


def axes_of(height: float) -> tuple[Figure, Axes]:
    """One panel of the usual width."""
    return new(WIDTH, height, layout="constrained")


def stack(count: int, height: float, extra: float = 0.9) -> tuple[Figure, list[Axes]]:
    """Panels below each other with a common x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, extra + height * count), layout="constrained")
    grid = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def dotted(axes: Axes, y: float) -> None:
    """A line that means: nothing has changed, or guessing."""
    axes.axhline(y, color=FAINT, linewidth=0.9, linestyle=":", zorder=1)


def lines_height(series: Mapping[str, Look]) -> float:
    """Inches that a legend of these lines takes."""
    entries = [short(one.entry) for one in series.values() if one.entry]
    return 0.2 * -(-len(entries) // _columns(entries)) if len(entries) > 1 else 0.0


# -- by stage ------------------------------------------------------------------------------------------------------


def by_stage(
    axes: Axes, runs: Sequence[Told], table: Table, key: str, series: Mapping[str, Look], bars: bool = False
) -> None:
    """A line per series over the stages, side by side within a stage; `bars`: with the intervals of the rows."""
    stages = _stages(runs, table)
    known = [name for name in series if any(row[key] == name for row in table)]
    for i, name in enumerate(known):
        rows, how = [row for row in table if row[key] == name], series[name]
        shift = 0.24 * ((i + 0.5) / len(known) - 0.5)
        spread = None
        if bars:
            spread = [[max(0.0, r["value"] - r["low"]) for r in rows], [max(0.0, r["high"] - r["value"]) for r in rows]]
        axes.errorbar(
            [stages.index(row["stage"]) + shift for row in rows],
            [row["value"] for row in rows],
            yerr=spread,
            color=how.colour,
            linestyle=how.dash,
            marker=how.marker,
            linewidth=1.5,
            markersize=5,
            elinewidth=1.2,
            capsize=2.5,
            label=short(how.entry) if how.entry else "_",
        )
    axes.set_xticks(range(len(stages)), [_short(stage, len(stages)) for stage in stages])
    axes.set_xlim(-0.4, len(stages) - 0.6)
    axes.grid(visible=False, axis="x")


def _stages(runs: Sequence[Told], table: Table) -> list[str]:
    """The stages of a table in the order of the method."""
    order = {stage.name: stage.number for run in runs for stage in run.stages}
    return sorted({row["stage"] for row in table}, key=lambda name: order[name])


def _short(stage: str, count: int) -> str:
    """The name of a stage as a tick: `round 12` is `12` where there are many."""
    return stage.removeprefix("round ") if count > 6 else stage


# -- by step -------------------------------------------------------------------------------------------------------


def per_step(runs: Sequence[Told], names: Sequence[str], rounds_only: bool = False) -> Table:
    """A row per optimizer step. `x` is where it lies: in the unit that belongs to its stage."""
    return [
        {"run": run.name, "stage": stage.name, "step": step.get("step", i)}
        | {"x": stage.number + (i - 0.5) / len(stage.steps)}
        | {name: step.get(name) for name in names}
        for run in runs
        for stage in (run.rounds if rounds_only else run.stages)
        for i, step in enumerate(stage.steps, 1)
    ]


def by_step(axes: Axes, table: Table) -> None:
    """An x axis whose unit is a stage: what is trained more is denser, and stages of several runs lie on each other."""
    numbers = sorted({int(np.floor(row["x"])) for row in table})
    names = {int(np.floor(row["x"])): row["stage"] for row in table}
    for border in numbers[1:]:
        axes.axvline(border, color=RULE, linewidth=1.0)
    axes.set_xlim(numbers[0], numbers[-1] + 1)
    axes.set_xticks([n + 0.5 for n in numbers], [_short(names[n], len(numbers)) for n in numbers])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    counts = [max(row["step"] for row in table if row["stage"] == name) for name in names.values()]
    said = f"{counts[0]} steps per stage" if len(set(counts)) == 1 else f"{'/'.join(map(str, counts))} steps"
    axes.set_xlabel(f"training, {said}")


def stages_of(rows: Table) -> Iterator[Table]:
    """The rows of each stage: lines do not run on from one to the next."""
    for _, part in itertools.groupby(rows, key=lambda row: row["stage"]):
        yield list(part)


def step_line(axes: Axes, rows: Table, name: str, **how: Any) -> None:
    """A column over the steps of one run."""
    for part in stages_of(rows):
        values = np.array([np.nan if row.get(name) is None else row[name] for row in part], dtype=float)
        alone = {"marker": "o", "markersize": 4} if np.isfinite(values).sum() == 1 else {}
        axes.plot([row["x"] for row in part], values, **({"linewidth": 1.5} | how | alone))
        how["label"] = "_"


# -- bars and legends ----------------------------------------------------------------------------------------------


def bars_by_kind(table: Table, key: str, what: str, stacked: bool = True) -> tuple[Figure, Axes]:
    """A bar per value of `key`, its parts by kind of stage; not stacked: a mark per kind."""
    names = list(dict.fromkeys(row[key] for row in table))
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in table)]
    figure, axes = axes_of(1.2 + 0.34 * len(names))
    left = np.zeros(len(names))
    for kind in kinds:
        found = [[row[what] for row in table if row[key] == name and row["kind"] == kind] for name in names]
        if stacked:
            axes.barh(range(len(names)), [sum(f) for f in found], left=left, height=0.6, color=KIND_COLOURS[kind])
            left += [sum(f) for f in found]
        else:
            spots = [(max(f), place) for place, f in enumerate(found) if f]
            axes.plot(*zip(*spots, strict=True), KIND_MARKERS[kind], color=KIND_COLOURS[kind], markersize=7)
    axes.set_yticks(range(len(names)), [short(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    legend(figure, [(k, patch(KIND_COLOURS[k]) if stacked else dot(KIND_COLOURS[k], KIND_MARKERS[k])) for k in kinds])
    return figure, axes


def legend_of(figure: Figure, axes: Axes, more: Entries = ()) -> None:
    """A legend of what is drawn on the axes, if there is more than one thing."""
    handles, names = axes.get_legend_handles_labels()
    entries = [*zip(names, handles, strict=True), *more]
    if len(entries) > 1:
        legend(figure, entries)


def legend(figure: Figure, entries: Entries) -> None:
    """Above the axes, never on the data; as many columns as fit."""
    names = [name for name, _ in entries]
    figure.legend([handle for _, handle in entries], names, loc="outside upper left", ncols=_columns(names))


def _columns(names: Sequence[str]) -> int:
    """As many as are sure to fit into the width of a figure, at 0.075 inches per letter."""
    widest = max(map(len, names), default=0)
    return max(1, min(len(names), 3 if widest <= 13 else 2 if widest <= 24 else 1))


def patch(colour: str, alpha: float = 1.0) -> Any:
    """A handle of a legend: an area."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=alpha)


def dot(colour: str, marker: str) -> Any:
    """A handle of a legend: a mark."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7)
