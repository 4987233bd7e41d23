"""A study's statistics as tables for the terminal and as Markdown. Names and errors are escaped in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from spa_lite.cli.render import number, safe
from spa_lite.compare import Cell, Comparison, Difference, Estimate
from spa_lite.markdown import literal

TITLES = {"win_rate": "win rate vs init %", "pair_accuracy": "held-out pairs %"}
COMPARED = ("cell", "seeds", "mean", "sd", "95 % interval", "difference to base", "p", "Holm p")
BESIDE = ("length", "labels right %", "tokens", "seconds")
"""Means over the seeds that say how a cell came to its result, and what it took."""


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The headline measure per cell, compared with the base cell; what else there is to say of the cells; and, if runs
    failed, which and why."""
    table = _table(comparison, COMPARED)
    table.title = f"{safe(name(comparison))}: {TITLES[comparison.headline]}"
    table.caption = reading(comparison)
    beside = [column for column in shown_columns(comparison) if column in BESIDE]
    more = [_table(comparison, ("cell", *beside))] if beside else []
    return [table, *more, *([_failures(comparison)] if failures(comparison) else [])]


def _table(comparison: Comparison, columns: Sequence[str]) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    for column in columns:
        left = column == "cell"
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for cell in comparison.cells:
        shown = fields(comparison, cell, safe)
        table.add_row(*[shown[column] for column in columns])
    return table


def _failures(comparison: Comparison) -> Table:
    table = Table(title="failed", title_justify="left")
    table.add_column("cell", overflow="fold")
    table.add_column("seed", justify="right")
    table.add_column("why", overflow="fold")
    for cell, seed, error in failures(comparison):
        table.add_row(safe(cell), str(seed), safe(error))
    return table


def markdown(comparison: Comparison) -> str:
    """The same as Markdown: a table, how to read it, and a list of what failed."""
    columns = shown_columns(comparison)
    lines = [
        f"**{literal(name(comparison))}: {TITLES[comparison.headline]}**",
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' if column == 'cell' else '---:' for column in columns)} |",
    ]
    for cell in comparison.cells:
        shown = fields(comparison, cell, literal)
        lines.append(f"| {' | '.join(shown[column] for column in columns)} |")
    lines += ["", reading(comparison)]
    if failures(comparison):
        lines += ["", "Failed:", ""]
        lines += [f"- seed {seed} of {literal(cell)}: {literal(error)}" for cell, seed, error in failures(comparison)]
    return "\n".join(lines) + "\n"


def name(comparison: Comparison) -> str:
    """The study's name."""
    return str(comparison.about.get("name", "study"))


def shown_columns(comparison: Comparison) -> list[str]:
    """The columns of which there is anything to show."""
    absent = {
        "length": "length",
        "labels right %": "label_accuracy",
        "tokens": "sampled_tokens",
        "seconds": "seconds",
    }
    return [column for column in (*COMPARED, *BESIDE) if absent.get(column, "") in {"", *comparison.measures}]


def failures(comparison: Comparison) -> list[tuple[str, int, str]]:
    """(cell, seed, sentence) of every run that failed."""
    return [(cell.name, seed, error) for cell in comparison.cells for seed, error in cell.failed.items()]


def reading(comparison: Comparison) -> str:
    """How to read the table, in a line or two."""
    base = next(cell for cell in comparison.cells if cell.name == comparison.base)
    if comparison.headline not in base.estimates:
        return "the base cell has no result, so there is nothing to compare with"
    if not comparison.comparisons:
        return "means over seeds; p and intervals need at least two seeds that differ"
    tests = "1 comparison" if comparison.comparisons == 1 else f"{comparison.comparisons} comparisons"
    return f"differences are paired by seed, p by a paired t-test, Holm p for {tests}; few seeds see only large effects"


def fields(comparison: Comparison, cell: Cell, escape: Callable[[str], str]) -> dict[str, str]:
    """A cell's line of the table, by column."""
    found, change = cell.estimates.get(comparison.headline), cell.differences.get(comparison.headline)
    length, labels = cell.estimates.get("length"), cell.estimates.get("label_accuracy")
    tokens, seconds = cell.estimates.get("sampled_tokens"), cell.estimates.get("seconds")
    is_base = cell.name == comparison.base
    return {
        "cell": escape(cell.name) + (" (base)" if is_base and cell.name != "base" else ""),
        "seeds": _seeds(cell, found),
        "mean": _percent(found.mean if found else None),
        "sd": _percent(found.sd if found else None),
        "95 % interval": _interval(found),
        "difference to base": "base" if is_base else _difference(change, found),
        "p": _p(change.p if change else None),
        "Holm p": _p(change.p_holm if change else None),
        "length": number(length.mean if length else None, 1),
        "labels right %": _percent(labels.mean if labels else None),
        "tokens": f"{tokens.mean:,.0f}" if tokens else "-",
        "seconds": number(seconds.mean if seconds else None, 0),
    }


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)


def _seeds(cell: Cell, found: Estimate | None) -> str:
    """`3`, or `2 of 3` where a run failed."""
    known, all_ = len(found.values) if found else 0, len(cell.folders)
    return str(all_) if known == all_ else f"{known} of {all_}"


def _interval(found: Estimate | None, form: str = ".1f") -> str:
    if found is None or found.low is None or found.high is None:
        return "-"
    return f"[{100 * found.low:{form}}, {100 * found.high:{form}}]"


def _difference(change: Difference | None, found: Estimate | None) -> str:
    """`+3.2 [-1.0, +7.4]`, and the number of seeds where not every seed of the cell has a partner."""
    if change is None or found is None:
        return "-"
    interval = "" if change.low is None else f" {_interval(change, '+.1f')}"
    seeds, plural = len(change.values), "s" if len(change.values) > 1 else ""
    return f"{100 * change.mean:+.1f}{interval}" + (f" ({seeds} seed{plural})" if seeds < len(found.values) else "")


def _p(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
