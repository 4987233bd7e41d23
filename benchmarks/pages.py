"""Results as Markdown: the table of a suite, and docs/speed.md with the newest of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"


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
