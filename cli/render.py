"""Everything printed. Progress and notes go to stderr, results to stdout. What a model or a file said is escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spa_lite.events import Event, Report
from spa_lite.throughput import Pace, Went, totals

out = Console(emoji=False, highlight=False, soft_wrap=True)
err = Console(stderr=True, emoji=False, highlight=False, soft_wrap=True)


def safe(text: str) -> str:
    """Text from a model or a file, with control characters and direction overrides shown instead of obeyed."""
    return escape(plain(text))


def plain(text: str) -> str:
    """The same for what is not read as markup. Goes by single characters: pieces of a text may come one by one."""

    def shown(char: str) -> str:
        if char in "\n\t" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn"}:
            return char
        return f"\\u{ord(char):04x}"

    return "".join(map(shown, text))


def piece(text: str) -> None:
    """A piece of a model's answer on stdout, at once and without a line of its own."""
    out.print(Text(plain(text)), end="")
    out.file.flush()


def aside(message: str) -> None:
    """A dim remark on stderr."""
    err.print(Text(plain(message), style="dim"))


def note(message: str) -> None:
    """A sentence on stderr."""
    err.print(safe(message))


def fail(message: str) -> None:
    """An error in one sentence."""
    err.print(f"[bold red]error:[/] {safe(message)}")


class _Count(ProgressColumn):
    """Units done, of how many where that is known."""

    def render(self, task: Task) -> Text:
        total = f"/{task.total:,.0f}" if task.total else ""
        return Text(f"{task.completed:>6,.0f}{total} {task.fields['unit']:<8}")


class _Rate(ProgressColumn):
    """Units per second, and useful tokens per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s{task.fields['tokens']}" if speed else "", style="cyan")


@contextmanager
def progress(keep: bool = True) -> Iterator[Report]:
    """Show events: bars with rate and time left on a terminal, plain lines now and then elsewhere.

    `keep`: bars of what is done stay on the screen.
    """
    if err.is_terminal:
        with Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            _Count(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
        ) as bars:
            yield _bars(bars, keep)
    else:
        yield _lines()


def _bars(bars: Progress, keep: bool) -> Report:
    tasks: dict[str, Any] = {}
    pace = Pace()

    def report(event: Event) -> None:
        went = pace.hear(event)
        if event.note:
            bars.console.print(safe(f"{event.stage}: {event.note}"))
        if not _shown(event):
            return
        total = event.total or None
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(safe(event.stage), total=total, unit=event.unit, tokens="")
        bars.update(tasks[event.stage], completed=event.done, total=total, unit=event.unit, tokens=_tokens(went))
        if total and event.done >= total and not keep:
            bars.remove_task(tasks.pop(event.stage))

    return report


def _lines(every: float = 5.0) -> Report:
    pace = Pace()
    begun: set[tuple[str, str]] = set()
    last = pace.now

    def report(event: Event) -> None:
        nonlocal last
        before, went = pace.now, pace.hear(event)
        if event.note:
            note(f"{event.stage}: {event.note}")
        if not _shown(event):
            return
        if (event.stage, event.unit) not in begun:
            # Answers and scores come in bursts, a batch at a time: the first line waits for more than one answer.
            begun.add((event.stage, event.unit))
            last = before if event.unit == "steps" else pace.now
        if event.done != event.total and pace.now - last < every:
            return
        last = pace.now
        rate = went.units_per_second
        shown = (f", {rate:,.1f}/s" if rate else "") + _tokens(went)
        if rate and event.total:
            shown += f", {(event.total - event.done) / rate:,.0f} s left"
        total = f"/{event.total}" if event.total else ""
        note(f"{event.stage}: {event.done}{total} {event.unit}{shown}")

    return report


def _shown(event: Event) -> bool:
    """Whether an event counts something; a stage that is done, and work that begins, are not shown."""
    return event.unit != "stage" and not event.begins and bool(event.done or event.total)


def _tokens(went: Went) -> str:
    """`, 812 tokens/s`, where tokens are counted."""
    return f", {went.tokens_per_second:,.0f} tokens/s" if went.tokens and went.seconds else ""


def percent(interval: Mapping[str, float] | None) -> str:
    """`61.2 [57.0, 65.1]` of an interval in [0, 1]."""
    if not interval:
        return "-"
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


Spent = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Row of the table -> kind of stage -> seconds, CPU seconds and throughput."""


def summary_tables(summary: Mapping[str, Any], spent: Spent) -> list[Table]:
    """What happened, a row per stage; and, where the truth is known, the mean of each gold criterion."""
    rows: Sequence[Mapping[str, Any]] = summary["rows"]
    has_gold = any(row.get("gold") for row in rows)
    table = Table(
        title=f"{summary['recipe']} at scale {summary['scale']}",
        title_justify="left",
        caption=_counts(rows),
        caption_justify="left",
    )
    columns = ["stage"]
    if has_gold:
        columns += ["win rate vs init %", "labels right %"]
    if any(row.get("pair_accuracy") for row in rows):
        columns += ["held-out pairs %"]
    columns += ["length"]
    if summary.get("flags", True):
        columns += ["flagged %"] + (["of them wrong"] if has_gold else [])
    columns += ["loss", "seconds"]
    for name in columns:
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[_cell(row, name, spent) for name in columns])
    more = [_written(rows)] if any(row.get("prompted") for row in rows) else []
    more += [_criteria(rows)] if has_gold else []
    fast = throughput_table([spent[row["stage"]] for row in rows if row["stage"] in spent])
    return [table, *more, *([fast] if fast else [])]


def throughput_table(spent: Sequence[Mapping[str, Mapping[str, float]]]) -> Table | None:
    """Useful tokens per second of each kind of stage, over all stages that were computed; None if none was."""
    found = totals(spent)
    if not found:
        return None
    floor = any(total.share is not None for total in found)
    table = Table(title="throughput, in tokens of answers", title_justify="left", caption_justify="left")
    table.caption = "floor: the least time on this machine" if floor else None
    for name in ("stage", "what", "tokens", "tokens/s", *(["% of the floor"] if floor else [])):
        table.add_column(name, justify="left" if name in {"stage", "what"} else "right", no_wrap=True)
    for total in found:
        cells = [total.kind, total.done, f"{total.tokens:,.0f}", f"{total.per_second or 0:,.0f}"]
        table.add_row(*cells, *([number(None if total.share is None else 100 * total.share, 1)] if floor else []))
    return table


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many items the intervals stand on."""
    last = rows[-1]
    found = {"held-out prompts": last.get("win_rate"), "held-out pairs": last.get("pair_accuracy")}
    sizes = ", ".join(f"{interval['n']:g} {name}" for name, interval in found.items() if interval)
    return f"{sizes}; intervals are 95 %" if sizes else ""


def _cell(row: Mapping[str, Any], column: str, spent: Spent) -> str:
    trained, judged, flags = row.get("trained") or {}, row.get("judged") or {}, row.get("flags") or {}
    if column == "stage":
        return str(row["stage"])
    if column == "win rate vs init %":
        return percent(row.get("win_rate"))
    if column == "labels right %":
        return percent((row.get("label_accuracy") or {}).get("score"))
    if column == "held-out pairs %":
        return percent(row.get("pair_accuracy"))
    if column == "length":
        return number(row.get("length") or judged.get("mean_tokens"), 1)
    if column == "flagged %":
        return number(100 * trained["flagged_share"], 1) if judged else "-"
    if column == "of them wrong":
        return f"{flags['flagged_wrong']}/{flags['flagged']}" if flags.get("flagged") else "-"
    if column == "loss":
        return number(trained.get("loss"), 4)
    return number(sum(stage["seconds"] for stage in spent.get(str(row["stage"]), {}).values()), 1)


def _written(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What became of the prompts that the model wrote."""
    table = Table(title="prompts written", title_justify="left")
    without = any("repeated_without_personas" in (row.get("prompted") or {}) for row in rows)
    names = {"asked": "asked for", "kept": "kept", "similar": "too similar", "unreadable": "no prompt"}
    for name in ["stage", *names.values(), "repeat %", *(["with personas %", "without %"] if without else [])]:
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows:
        if found := row.get("prompted"):
            shares = ["repeated", *(["repeated_with_personas", "repeated_without_personas"] if without else [])]
            cells = [number(None if found.get(s) is None else 100 * found[s], 1) for s in shares]
            table.add_row(str(row["stage"]), *[str(found[name]) for name in names], *cells)
    return table


def _criteria(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Mean gold per criterion, so that nobody wins by endings alone."""
    names = list(next(row["gold"] for row in rows if row.get("gold")))
    table = Table(title="mean gold on held-out prompts", title_justify="left")
    for name in ["stage", *names]:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        if row.get("gold"):
            table.add_row(str(row["stage"]), *[f"{row['gold'][n]:.3f}" for n in names])
    return table


def show(table: Table) -> None:
    """Print a table on stdout; wide enough for its columns when nobody is looking."""
    console = out if out.is_terminal else Console(emoji=False, highlight=False, width=160)
    console.print(table)


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `5 days`; nothing for an unknown time."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 72 * 60 else f"{round(minutes / 1440)} days"
