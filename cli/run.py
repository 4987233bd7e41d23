"""`spa-lite run`: the whole method."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli import trackers
from spa_lite.cli.checks import before_use
from spa_lite.cli.main import app
from spa_lite.cli.options import Named, command, resolve

if TYPE_CHECKING:
    from spa_lite.library import Library
    from spa_lite.models import Models
    from spa_lite.store import Run

HOME = Path("runs")
"""Where runs lie unless --out says otherwise."""


def default_scale(flat: dict[str, Any]) -> str:
    """The lesson's size for the built-in model, a laptop's for the user's own."""
    return "laptop" if flat.get("inputs.model") else "lesson"


@command(app, "run")
def run(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings; flags win.")] = None,
    recipe: Named = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="The size: lesson, laptop, paper, or a YAML file (default: lesson; laptop with a model of your own)"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Override any setting; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder (default: runs/<recipe>-<8 hex of recipe and inputs>)")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what the run folder holds and compute everything anew.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the settings, the stages to compute and to reuse, memory and time; compute nothing.",
        ),
    ] = False,
    page: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report/report.html into the run folder.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Align a model: seed DPO, then rounds of sample, judge, train. With no arguments: the built-in lesson.

    The same command again goes on where an interrupted run was, or prints the table of a finished one. Stages that
    another run beside it has computed are taken from there.
    """
    from spa_lite import backends

    resolved, sources = resolve(given, set_ or [], config, recipe, scale, default_scale)
    trackers.check(resolved.report_to)
    backends.check_trains(resolved.inputs.backend, resolved.inputs.model)
    if dry_run:
        from spa_lite.cli import dry_run as dry

        dry.show(resolved, sources, out)
        return

    import msgspec

    from spa_lite import prepare
    from spa_lite.axes import one_line
    from spa_lite.backends.speed import speed
    from spa_lite.cli import render
    from spa_lite.files import read_json
    from spa_lite.floor import Floor
    from spa_lite.spa import align
    from spa_lite.store import Run

    raw = prepare.read(resolved)
    if prepare.is_lesson(resolved):
        render.note(
            "the built-in lesson: a tiny model that knows one small world "
            "(give --model, --seed-pairs and --prompts for your own)"
        )
    models = prepare.models_of(resolved, backends.load, backends.load_classifier)
    data = prepare.encode_all(raw, models.backend, resolved)
    for line in data.notes:
        render.note(line)
    before_use(models.backend, resolved)
    folder = out or HOME / prepare.run_name(resolved, models, data)
    if fresh and folder.exists():
        clear(folder)
    place = Run(folder, None if fresh else library_beside(folder))
    place.floor = Floor(models, resolved, data, speed).seconds
    render.note(f"run folder: {folder}")
    render.note(f"recipe {resolved.name}: {one_line(resolved)}")
    with (
        render.progress() as progress,
        trackers.tracked(progress, resolved.report_to, folder, resolved.to_dict()) as report,
    ):
        summary = align(models, resolved, data, place, report)
    if as_json:
        print(msgspec.json.encode(summary).decode())
        if page:
            write_page(folder, models)
        return
    say_what_was_reused(place)
    for table in render.summary_tables(summary, read_json(folder / "timings.json")):
        render.show(table)
    say_best(summary)
    for warning in summary["warnings"]:
        render.note(f"warning: {warning}")
    render.note(f"adapter: {folder / 'adapter'}")
    if page:
        write_page(folder, models)


def write_page(folder: Path, models: Models) -> None:
    """The report of a run, with the model that is in memory anyway. A finished run does not fail for it."""
    from spa_lite.cli import render
    from spa_lite.report import write_report

    try:
        render.note(f"report: {write_report([folder], backend=lambda _: models.backend, tell=render.note)}")
    except Exception as error:
        render.note(f"the report could not be written ({error}); `spa-lite report {folder}` tries again")


def say_best(summary: Mapping[str, Any]) -> None:
    """Which round measured best, and where its adapter lies if that was not the last one."""
    from spa_lite.cli import render
    from spa_lite.stop import MEASURES

    best, last = summary["best"], summary["rows"][-1]["folder"]
    if summary["stopped"]:
        render.note(f"a stop rule ended the run after {summary['stopped']} (--stop-rules warn goes on)")
    if best:
        where = "" if last == best["folder"] else f"; its adapter is {best['folder']}/adapter in the run folder"
        render.note(f"best: {best['stage']}, {MEASURES[best['measure']]} {100 * best['value']:.1f} %{where}")


def library_beside(folder: Path, more: Iterable[Path] = ()) -> Library:
    """Finished stages of the runs in the same folder as this one, and in runs/."""
    from spa_lite.library import Library

    return Library([folder.parent, HOME, *more])


def say_what_was_reused(place: Run) -> None:
    """Whether anything was computed at all, and what other runs had computed already."""
    from spa_lite.cli import render

    sources: dict[Path, list[str]] = {}
    for title, run in place.borrowed.items():
        sources.setdefault(run, []).append(title)
    for run, titles in sources.items():
        render.note(f"taken from {run.name}, which had computed the same: {', '.join(titles)}")
    if not place.computed and not place.borrowed:
        render.note("this run is finished; nothing was computed again (--fresh starts over)")


def clear(folder: Path) -> None:
    """Delete a run folder, but never a folder that is not one, or that somebody works on."""
    from spa_lite.errors import RunError
    from spa_lite.lock import locked

    if not any((folder / name).exists() for name in ("run.json", "recipe.yaml")) and any(folder.iterdir()):
        raise RunError(f"{folder} does not look like a run folder (it has no run.json), so it is not deleted")
    votes = next(folder.glob("votes-*.jsonl"), None)
    if votes:  # a person's work cannot be computed anew
        raise RunError(f"{folder} holds votes of `compare` ({votes.name}), so it is not deleted; move them away first")
    with locked(folder):
        shutil.rmtree(folder)
