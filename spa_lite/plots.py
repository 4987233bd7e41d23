"""The plots of a study: the headline measure per cell, per round, and over two settings. SVG and PNG, the same bytes
every time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spa_lite.compare import Cell, Comparison, Estimate, natural
from spa_lite.figures import COLOURS, label, new, style, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots(folder: Path, comparison: Comparison) -> list[Path]:
    """Draw the headline measure, as SVG and PNG: per cell (cells), per round (rounds), over two settings (grid).

    Returns the files written: only plots for which there are numbers.
    """
    drawings = {
        "cells": _draw_cells if any(comparison.headline in cell.estimates for cell in comparison.cells) else None,
        "rounds": _draw_rounds if len(_rounds(comparison)) > 1 else None,
        "grid": _draw_grid if _grid(comparison) else None,
    }
    written = []
    with style():
        for name, draw in drawings.items():
            if draw is None:
                (folder / f"{name}.svg").unlink(missing_ok=True)
                (folder / f"{name}.png").unlink(missing_ok=True)
            else:
                written += write_figure(draw(comparison), folder / name, ("svg", "png"), bbox_inches="tight")
    return written


def _named(cell: Cell, comparison: Comparison) -> str:
    return label(f"{cell.name} (base)" if cell.name == comparison.base and cell.name != "base" else cell.name)


def _title(comparison: Comparison) -> str:
    return label(str(comparison.about.get("name", "study")), 70)


def _quantity(comparison: Comparison) -> str:
    return {"win_rate": "win rate vs init, %", "pair_accuracy": "held-out pairs, %"}[comparison.headline]


def _draw_cells(comparison: Comparison) -> Figure:
    """A line per cell, base on top: seeds as rings, mean and interval, and the numbers on the right."""
    labels = [_named(cell, comparison) for cell in comparison.cells]
    heights = [max(1.0, 0.62 * (text.count("\n") + 1)) for text in labels]
    places = -np.cumsum(heights) + np.array(heights) / 2
    figure, axes = new(6.0, 0.9 + 0.36 * sum(heights))
    for cell, y in zip(comparison.cells, places, strict=True):
        found = cell.estimates.get(comparison.headline)
        base = cell.name == comparison.base
        axes.text(1.02, y, _numbers(found), transform=axes.get_yaxis_transform(), va="center_baseline")
        if found is None:
            continue
        colour, mean = COLOURS[1 if base else 0], 100 * found.mean
        if base:
            axes.axvline(mean, color=colour, linewidth=0.8, linestyle="--", zorder=0)
        if found.low is not None and found.high is not None:
            axes.plot([100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        dots = [100 * value for value in found.values.values()]
        axes.plot(dots, [y] * len(dots), "o", markersize=6, markerfacecolor="white", markeredgecolor="#555555")
        axes.plot([mean], [y], "|", color=colour, markersize=15, markeredgewidth=2.2)
    axes.axvline(50, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(places, labels)
    axes.set_ylim(-sum(heights), 0)
    axes.tick_params(axis="y", length=0)
    key = "tick: mean, bar: 95 % interval over seeds, ring: one seed, dashed: base, dotted: 50 %"
    axes.set_xlabel(f"{_quantity(comparison)}\n{key}")
    axes.set_title(_title(comparison), loc="left")
    return figure


def _numbers(found: Estimate | None) -> str:
    if found is None:
        return "no result"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:.1f}"
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _rounds(comparison: Comparison) -> list[int]:
    """The rounds after which the headline measure is known in some cell; 0 is pi_0."""
    prefix = f"{comparison.headline}_round_"
    return sorted(int(name.removeprefix(prefix)) for name in comparison.measures if name.startswith(prefix))


def _draw_rounds(comparison: Comparison) -> Figure:
    """Means over seeds, a line per cell, the base thick; cells side by side within a round so that bars can be read."""
    rounds, cells = _rounds(comparison), comparison.cells
    figure, axes = new(6.0, max(3.4, 0.8 + 0.17 * sum(_named(cell, comparison).count("\n") + 1.6 for cell in cells)))
    dashes, markers = ("-", "--", "-.", ":"), "sovP^X*d"
    for i, cell in enumerate(cells):
        known = [(r, e) for r in rounds if (e := cell.estimates.get(f"{comparison.headline}_round_{r}"))]
        if not known:
            continue
        base = cell.name == comparison.base
        shift = 0.3 * ((i + 0.5) / len(cells) - 0.5)
        axes.errorbar(
            [r + shift for r, _ in known],
            [100 * e.mean for _, e in known],
            yerr=[100 * (e.sd or 0.0) for _, e in known],
            color=COLOURS[1] if base else [c for c in COLOURS if c != COLOURS[1]][(i - 1) % (len(COLOURS) - 1)],
            marker="D" if base else markers[(i - 1) % len(markers)],
            linestyle="-" if base else dashes[i % len(dashes)],
            linewidth=2.4 if base else 1.2,
            markersize=5,
            elinewidth=0.6,
            label=_named(cell, comparison),
            zorder=3 if base else 2,
        )
    axes.axhline(50, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xticks(rounds, ["seed" if r == 0 else str(r) for r in rounds])
    axes.set_xlabel("after round (bar: standard deviation over seeds, dotted: 50 %)")
    axes.set_ylabel(_quantity(comparison))
    axes.set_title(_title(comparison), loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    return figure


Grid = tuple[str, str, list[str], list[str], dict[tuple[str, str], Cell]]


def _grid(comparison: Comparison) -> Grid | None:
    """(setting across, setting down, their values, cells by both) if two settings were varied in all combinations.

    The base cell may be one of the combinations or none.
    """
    settings = sorted({setting for cell in comparison.cells for setting in cell.changes})
    others = [cell for cell in comparison.cells if cell.name != comparison.base]
    if len(settings) != 2 or not any(comparison.headline in cell.estimates for cell in others):
        return None
    down, across = settings
    for cells in (comparison.cells, others):
        spots = {(_setting(comparison, cell, across), _setting(comparison, cell, down)): cell for cell in cells}
        xs, ys = (sorted({spot[i] for spot in spots}, key=natural) for i in (0, 1))
        if min(len(xs), len(ys)) > 1 and len(cells) == len(spots) == len(xs) * len(ys):
            return across, down, xs, ys, spots
    return None


def _setting(comparison: Comparison, cell: Cell, setting: str) -> str:
    """A setting's value in a cell, as text."""
    return _shown({setting: "as given", **comparison.about.get("given", {}), **cell.changes}[setting])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _draw_grid(comparison: Comparison) -> Figure:
    """The mean of every combination of two settings, as a shade and as a number; the base framed."""
    import matplotlib
    from matplotlib.patches import Rectangle

    grid = _grid(comparison)
    assert grid is not None
    across, down, xs, ys, spots = grid
    means = np.full((len(ys), len(xs)), np.nan)
    for (x, y), cell in spots.items():
        if found := cell.estimates.get(comparison.headline):
            means[ys.index(y), xs.index(x)] = 100 * found.mean
    framed = any(cell.name == comparison.base for cell in spots.values())
    figure, axes = new(1.6 + 1.1 * len(xs), 1.2 + 0.6 * len(ys))
    axes.imshow(means, cmap=matplotlib.colormaps["cividis"], aspect="auto")
    for column, row in itertools.product(range(len(xs)), range(len(ys))):
        cell = spots[xs[column], ys[row]]
        found = cell.estimates.get(comparison.headline)
        colour = "white" if means[row, column] < (np.nanmin(means) + np.nanmax(means)) / 2 else "black"
        spread = "" if found is None or found.sd is None else f"\n± {100 * found.sd:.1f}"
        text = "no result" if found is None else f"{100 * found.mean:.1f}{spread}"
        axes.text(column, row, text, ha="center", va="center", color=colour)
        if cell.name == comparison.base:
            place = (column - 0.46, row - 0.46)
            axes.add_patch(Rectangle(place, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=1.6))
    axes.set_xticks(range(len(xs)), [label(x, 14) for x in xs])
    axes.set_yticks(range(len(ys)), [label(y, 20) for y in ys])
    axes.set_xlabel(label(across, 60))
    axes.set_ylabel(label(down, 24))
    axes.spines[:].set_visible(False)
    key = f"{_quantity(comparison)}\n± standard deviation over seeds" + ("; framed: base" if framed else "")
    axes.set_title(f"{_title(comparison)}\n{key}", loc="left", fontsize=9)
    return figure
