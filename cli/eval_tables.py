"""What `eval` found, as tables: rates in per cent with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from spa_lite.cli.render import number, percent, safe


def table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    """An empty table, its first column on the left."""
    made = Table(title=safe(title), title_justify="left", caption=safe(caption) or None, caption_justify="left")
    for name in columns:
        left = name == columns[0]
        made.add_column(name, justify="left" if left else "right", no_wrap=not left)
    return made


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of any result."""
    kinds = {
        "held-out pairs": pairs_tables,
        "head-to-head": head_to_head_tables,
        "alpaca": alpaca_tables,
        "mt-bench": mt_bench_tables,
    }
    return kinds.get(found["kind"], knowledge_tables)(found)


def pairs_tables(found: Mapping[str, Any]) -> list[Table]:
    """Accuracy per stage beside its baselines; and margins and rewards."""
    longer = f"{found['n']} pairs; the longer answer is the preferred one in {percent(found['longer_wins'])} %"
    accuracy = table(
        "held-out pairs: how often the preferred answer is preferred, %",
        ["stage", "implicit reward", "to the stage before", "likelihood", "per token"],
        longer,
    )
    margins = table(
        f"held-out pairs: margins and rewards, in nats times beta ({found['beta']:g})",
        ["stage", "margin mean", "median", "above 0 %", "chosen", "rejected", "corr. with length", "Brier"],
    )
    for name, m in found["stages"].items():
        accuracy.add_row(
            safe(name),
            percent(m["accuracy"]),
            change(m["to_before"]),
            percent(m["likelihood"]),
            percent(m["per_token"]),
        )
        numbers = [number(m[k], 3) for k in ("chosen", "rejected", "length_correlation", "brier")]
        share = number(100 * m["positive"], 1)
        margins.add_row(safe(name), number(m["margin"], 3), number(m["margin_median"], 3), share, *numbers)
    return [accuracy, margins]


def head_to_head_tables(found: Mapping[str, Any]) -> list[Table]:
    """Side a against side b, a measure per line."""
    lc, orders = found["length_controlled"], found["orders"]
    caption = sentence(found) + (f"\n{lc['name']}: {lc['note']}" if lc["note"] else "")
    made = table(f"a: {found['a']['name']}\nb: {found['b']['name']}", ["a against b", "value"], caption)
    made.add_row("judge", safe(found["judge"]["name"]))
    made.add_row("prompts", f"{found['n']} ({found['ties']} ties, {found['identical']} of them the same text)")
    made.add_row("win rate of a %", percent(found["win_rate"]))
    made.add_row("ties left out %", percent(found["decisive"]))
    made.add_row(f"{lc['name']} %", percent(lc["interval"]))
    _orders(made, orders)
    a, b = found["length_a"], found["length_b"]
    grown = f" ({100 * (a / b - 1):+.0f} %)" if b else ""
    made.add_row("length of b -> a", f"{b:.1f} -> {a:.1f}{grown} characters")
    made.add_row("prompts needed", "-" if found["prompts_needed"] is None else f"{found['prompts_needed']:,}")
    return [made]


def _orders(made: Table, orders: Mapping[str, Any] | None) -> None:
    """What both orders tell of a judge that compares."""
    if orders:
        made.add_row("orders agree %", percent(orders["agreement"]))
        made.add_row("first shown wins %", percent(orders["first"]))
        made.add_row("replies not read", f"{orders['unread']} of {orders['replies']}")


def sentence(found: Mapping[str, Any]) -> str:
    """What the interval allows to say."""
    if not found["usable"]:
        return "no verdict: the judge is unusable"
    if not found["verdict"]:
        return "no difference is seen: the interval holds 50 %"
    better, worse = ("a", "b") if found["verdict"] == "a" else ("b", "a")
    return f"{better} is better than {worse} for this judge: the interval excludes 50 %"


def change(interval: Mapping[str, float] | None) -> str:
    """`+3.0 [+0.4, +5.6]` of a difference of shares."""
    if not interval:
        return "-"
    value, low, high = (100 * interval[k] for k in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def alpaca_tables(found: Mapping[str, Any]) -> list[Table]:
    """What annotations say; nothing if there was no judge. The package's own numbers are in per cent already."""
    if "result" not in found:
        return []
    result, theirs = found["result"], found.get("package") or {}
    lc, error = result["length_controlled"], result["standard_error"]
    made = table(
        f"{result['model']}\nagainst {result['reference']}",
        ["AlpacaEval", "value", *(["alpaca-eval"] if theirs else [])],
    )

    def row(name: str, value: str, key: str = "", digits: int = 2) -> None:
        made.add_row(name, value, *([number(theirs.get(key), digits)] if theirs else []))

    row("judge", safe(result["annotator"]))
    row("prompts", str(result["n"]), "n_total", 0)
    row("win rate %", percent(result["win_rate"]), "win_rate")
    row("standard error", number(None if error is None else 100 * error), "standard_error")
    row("wins and ties only %", percent(result["discrete_win_rate"]), "discrete_win_rate")
    row(f"{lc['name']} %", percent(lc["interval"]), "length_controlled_winrate")
    row("won, lost, drawn", f"{result['wins']}, {result['losses']}, {result['draws']}")
    row("length, reference -> model", f"{result['reference_length']:.0f} -> {result['length']:.0f}", "avg_length", 0)
    _orders(made, found.get("orders"))
    return [made]


def mt_bench_tables(found: Mapping[str, Any]) -> list[Table]:
    """Grades from 1 to 10, with a bootstrap over the questions."""
    result = found["result"]
    made = table(f"{found['side']['name']}\n{result['name']}", ["grade, 1 to 10", "mean", "questions"])
    means = {"turn 1": result["turn_1"], "turn 2": result["turn_2"], "both": result["average"], **result["categories"]}
    for name, mean in means.items():
        shown = f"{mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]" if mean else "-"
        made.add_row(safe(name), shown, str(mean["n"]) if mean else "0")
    return [made]


def knowledge_tables(found: Mapping[str, Any]) -> list[Table]:
    """Share of right answers of each side, and what changed."""
    names = [one["name"] for one in found["sides"]]
    both = len(names) == 2
    made = table(
        f"{found['kind']}: right answers, %",
        ["by", *map(safe, names), *(["change", "gained, lost", "p"] if both else [])],
        f"{found['n']} questions",
    )
    for rule, told in found["rules"].items():
        cells = [percent(one["accuracy"]) for one in told["sides"]]
        if both:
            c = told["change"]
            cells += [change(c["difference"]), f"{c['gained']}, {c['lost']}", number(c["p"], 3)]
        made.add_row(rule, *cells)
    return [made]
