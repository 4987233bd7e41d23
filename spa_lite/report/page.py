"""Renders the page. Everything that comes from a model, a file or a name passes through jinja2's autoescape and
`shown`; the page holds no script, and its content security policy forbids any."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from spa_lite.axes import one_line
from spa_lite.backend import Backend
from spa_lite.compare import csv_field
from spa_lite.figures import inline_svg, style, visible, write_figure
from spa_lite.files import write_atomic
from spa_lite.inventory import STUDY
from spa_lite.recipe import Recipe
from spa_lite.report.collect import Told, read_runs
from spa_lite.report.drawing import STYLE
from spa_lite.report.evaluations import eval_sheet
from spa_lite.report.examples import (
    FIRST,
    OpenBackend,
    Shown,
    credited,
    judgements,
    sampled,
    side_by_side,
    written,
)
from spa_lite.report.figures import figures
from spa_lite.report.looks import some
from spa_lite.report.tables import (
    changed,
    differences,
    facts,
    judging_sheet,
    prompts_sheet,
    settings,
    stage_sheet,
    throughput_sheet,
    tiles,
)

NAME = "report.html"
GROUPS = (
    ("What came of it", ("win_rate", "pair_accuracy", "gold", "length")),
    ("Judging", ("labels", "logprobs", "margins")),
    ("Training", ("displacement", "loss", "flagged", "threshold")),
    ("Cost", ("seconds", "memory")),
)
"""The sections of figures: title, and the figures in order."""


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    backend: OpenBackend | None = None,
    tell: Callable[[str], None] = lambda note: None,
) -> Path:
    """Write the report of run folders (or studies) and return the path of the page.

    `out` is a folder (default: `report/` in the first run); it gets report.html, and each figure as PNG and CSV.
    `backend` loads the model of a recipe, for the token credit of the few judgements that are shown, and for answers
    before and after where a run kept none; without it there are neither. `tell` hears what could not be read or
    computed. The same runs give the same bytes. Raises RunError if a path is no run, or a run has another format.
    """
    told = read_runs(runs)
    folder = out or runs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    shown = judgements(told[0]) if len(told) == 1 else []
    examples = side_by_side(told)
    if backend is not None and len(told) == 1:
        opened = _once(backend)
        shown = credited(shown, opened)
        examples = examples or sampled(told[0], opened)
    evaluations = [eval_sheet(run) for run in told]
    pictures = {}
    with style(**STYLE):
        for one in figures(told):
            write_figure(one.figure, folder / one.name, ("png",))
            one.figure.set_layout_engine("none")  # it is laid out by now
            table = [list(row.values()) for row in one.table]
            write_atomic(folder / f"{one.name}.csv", table_csv(list(one.table[0]), table))
            picture = inline_svg(one.figure, f"fig-{one.name}", one.title, one.text)
            pictures[one.name] = {"about": one, "svg": picture}
    for name in {name for _, names in GROUPS for name in names} - pictures.keys():  # of an earlier report
        for kind in ("png", "csv"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    write_atomic(folder / "stages.csv", stages_csv(told))
    page = render(
        runs=told,
        one=told[0] if len(told) == 1 else None,
        tiles=tiles(told[0]),
        pictures=pictures,
        groups=[(title, [name for name in names if name in pictures]) for title, names in GROUPS],
        sheets=[stage_sheet(run) for run in told],
        judging=[judging_sheet(run) for run in told],
        prompting=[prompts_sheet(run) for run in told],
        made_of=[one_line(run.recipe) if run.recipe else "" for run in told],
        written=written(told[0]) if len(told) == 1 else [],
        throughput=[throughput_sheet(run) for run in told],
        evaluations=evaluations,
        differences=differences(told),
        study=any((path / STUDY).is_file() for path in runs),
        facts=[facts(run) for run in told],
        settings=[settings(run) for run in told],
        changed=[changed(run) for run in told],
        examples=examples,
        first=FIRST,
        shown_runs=len(some(told)),
        has_gold=all(run.gold for run in told),
        judgements=_by_round(shown),
        version=_version(),
    )
    write_atomic(folder / NAME, page.encode())
    for run in told:
        for line in run.problems:
            tell(f"{run.name}: {line}")
    return folder / NAME


def _once(open_backend: OpenBackend) -> OpenBackend:
    """The same for a run's recipe, which loads its model at the first call."""
    found: list[Backend] = []

    def opened(recipe: Recipe) -> Backend:
        if not found:
            found.append(open_backend(recipe))
        return found[0]

    return opened


def _by_round(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """The judgements of each round, with the log-ratio (nats) that has the full colour."""
    found = []
    for name in dict.fromkeys(one.stage.name for one in shown):
        mine = [_harmless(one) for one in shown if one.stage.name == name]
        sizes = [abs(c.logratio) for one in mine for side in one.credit or () for c in side]
        hint = "The pairs of which the judge was most and least sure: chosen and rejected as it labelled them."
        if not any(one.kind for one in mine):
            hint = "The first pairs, for the judge is as sure of each: chosen and rejected as it labelled them."
        if sizes:
            hint += " Each token is coloured by its credit log π/π_ref; an answer's log-ratio is their sum."
        scale = float(np.quantile(sizes, 0.98)) if sizes else 0.0
        found.append({"title": f"Judgements of {name}", "hint": hint, "shown": mine, "scale": scale})
    return found


def _harmless(one: Shown) -> Shown:
    """The same judgement, the pieces of its credit as they are shown."""
    if one.credit is None:
        return one
    chosen, rejected = ([replace(c, piece=shown(c.piece)) for c in side] for side in one.credit)
    return dataclasses.replace(one, credit=(chosen, rejected))


def render(**values: Any) -> str:
    """The page as HTML."""
    import jinja2
    import markupsafe

    loader = jinja2.FunctionLoader(lambda name: _template(name))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters |= {
        "shown": shown,
        "percent": percent,
        "number": number,
        "safe_svg": lambda svg: markupsafe.Markup(svg),
    }
    css = markupsafe.Markup(_template("report.css"))
    return environment.get_template("report.html").render(css=css, **values)


def _template(name: str) -> str:
    return resources.files("spa_lite").joinpath("templates", name).read_text(encoding="utf-8")


def shown(text: Any) -> str:
    """Text of a model, a file or a person: control characters and direction overrides are shown; lines stay lines."""
    return visible(str(text), keep="\n\t\u00a0")


def percent(interval: Mapping[str, float] | None) -> str:
    """`61.2 [57.0, 65.1]` of an interval in [0, 1]."""
    if not interval:
        return "–"
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def table_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as CSV: nothing where there is no value, and no text that a spreadsheet could take for a formula."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(columns)
    for row in rows:
        write(["" if value is None else csv_field(value) for value in row])
    return text.getvalue().encode()


def stages_csv(runs: Sequence[Told]) -> bytes:
    """All numbers of every stage of every run, a row each."""
    flat = [{"run": run.name, "stage": stage.name} | _flat(stage.row) for run in runs for stage in run.stages]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    return table_csv(columns, [[row.get(key) for key in columns] for row in flat])


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested numbers by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


def _version() -> str:
    try:
        return metadata.version("spa-lite")
    except metadata.PackageNotFoundError:
        return ""
