"""`spa-lite ablate`: what happens if some settings are changed. Cells share every stage that they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import Named, command, resolve
from spa_lite.cli.run import HOME, default_scale, library_beside
from spa_lite.errors import RecipeError

if TYPE_CHECKING:
    from spa_lite.ablate import Cost, Job, Schedule, Shelf, Study
    from spa_lite.compare import Outcome
    from spa_lite.events import Report
    from spa_lite.library import Library
    from spa_lite.recipe import Recipe


@command(app, "ablate")
def ablate(
    given: dict[str, Any],
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="SETTING=A,B", help="A setting (or recipe) and the values to try; repeatable."),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option("--study", help="A shipped study (--study list names them) or a YAML file, instead of --vary."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from --seed on.")] = 3,
    grid: Annotated[
        bool | None,
        typer.Option(
            "--grid/--one-at-a-time", help="All combinations (default), or one change from the base at a time."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings; flags win.")] = None,
    recipe: Named = None,
    scale: Annotated[str | None, typer.Option(help="The size: lesson, laptop, paper, or a YAML file.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Set any setting of all cells.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Study folder (default: runs/<study>-<8 hex>)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and compute nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Vary settings of a recipe over several seeds and compare: a table, results.csv, results.json, plots.

    Every cell is a run of its own under cells/, but what cells have in common is computed once, and so is what any run
    beside them has computed. The same command goes on after an interruption; another value computes only what is new.
    """
    from spa_lite import ablate as studies
    from spa_lite import backends
    from spa_lite.cli import render, trackers
    from spa_lite.cli.study_table import comparison_tables, markdown
    from spa_lite.compare import write_results
    from spa_lite.files import write_atomic, write_json
    from spa_lite.lock import locked

    if study == "list":
        for name, path in studies.shipped().items():
            print(f"{name:<18} {studies.read_study(path).question}")
        return
    asked, base, kept, varied = _what(given, set_ or [], config, recipe, scale, vary or [], study, grid)
    trackers.check(base.report_to)
    folder = out or HOME / f"{asked.name}-{_name(base, varied)}"
    jobs = studies.jobs_of(asked.cells, base, seeds, folder, kept)
    for job in jobs:
        backends.check_trains(job.recipe.inputs.backend, job.recipe.inputs.model)
    shelf, library = studies.Shelf(backends.load, backends.load_classifier), library_beside(folder, [folder.parent])
    _introduce(asked, jobs, folder, shelf.models(base).backend.advice)
    schedule = studies.schedule(jobs, shelf, library)
    _show_plan(schedule, library)
    if dry_run:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        about = {
            "name": asked.name,
            "question": asked.question,
            "seeds": [base.seed + i for i in range(seeds)],
            "given": {path: studies.value_in(base, path) for cell in asked.cells for path in cell.changes},
        }
        write_json(folder / "study.json", {**about, "cells": {cell.name: cell.changes for cell in asked.cells}})
        outcomes, spent = _run(jobs, schedule, shelf, library, folder, base)
        comparison = write_results(folder, outcomes, asked.cells[0].name, {**about, "cost": spent.to_dict()})
        write_atomic(folder / "results.md", markdown(comparison).encode())
    if as_json:
        print((folder / "results.json").read_text(encoding="utf-8"), end="")
        return
    for table in comparison_tables(comparison):
        render.show(table)
    _say_cost(spent)
    render.note(f"results: {folder / 'results.csv'}, results.json, results.md and plots beside it")
    if all(outcome.rows is None for outcome in outcomes):
        raise typer.Exit(1)


def _what(
    given: dict[str, Any],
    sets: Sequence[str],
    config: Path | None,
    recipe: str | None,
    scale: str | None,
    vary: Sequence[str],
    study: str | None,
    grid: bool | None,
) -> tuple[Study, Recipe, dict[str, Any], list[str]]:
    """The study, its base recipe, what of that study, file and command line asked for, and the paths that --vary
    names."""
    from spa_lite import ablate as studies

    if bool(vary) == bool(study):
        raise RecipeError("say what to vary: either --vary SETTING=A,B or --study NAME (--study list names them)")
    if study:
        if grid is not None:
            raise RecipeError("a study names its cells; leave --grid and --one-at-a-time out")
        asked = studies.named(study)
        base, source = resolve(given, sets, config, recipe, scale, default_scale, (asked.name, asked.settings))
        return asked, base, _asked(base, source, config, asked.name), []
    base, source = resolve(given, sets, config, recipe, scale, default_scale)
    kept = _asked(base, source, config)
    varied: dict[str, list[Any]] = {}
    for text in vary:
        path, values = studies.parse_vary(text)
        varied.setdefault(path, []).extend(values)
    shape: Literal["grid", "one-at-a-time"] = "one-at-a-time" if grid is False else "grid"
    cells = studies.cells_of(varied, base, shape, kept)
    return studies.Study("ablate", cells=tuple(cells)), base, kept, sorted(varied)


def _asked(base: Recipe, source: Mapping[str, str], config: Path | None, study: str = "") -> dict[str, Any]:
    """The settings that a cell with a recipe of its own takes over: those that somebody asked for."""
    layers = {"command line", f"study {study}", str(config)}
    return {path: base.get(path) for path, layer in source.items() if layer in layers}


def _name(base: Recipe, varied: Sequence[str]) -> str:
    """8 hex of what the study is about: the same command with another value goes to the same folder."""
    from spa_lite.prepare import what_matters
    from spa_lite.recipe import settings_of
    from spa_lite.store import digest

    named = {p: v for p, v in settings_of(base).items() if p.startswith(("inputs.", "lesson.", "round_sizes"))}
    fixed = {p: v for p, v in (what_matters(base) | named).items() if p not in varied}
    return digest([fixed, list(varied)])[:8]


def _introduce(asked: Study, jobs: Sequence[Job], folder: Path, advice: Sequence[str]) -> None:
    from spa_lite.cli import render

    for line in [asked.question, *advice]:
        if line:
            render.note(line)
    seeds = len({job.seed for job in jobs})
    render.note(f"{len(asked.cells)} cells, {seeds} seeds; base cell: {asked.cells[0].name}; study folder: {folder}")


def _show_plan(schedule: Schedule, library: Library) -> None:
    """What is computed and what is not, before anything starts."""
    from rich.table import Table

    from spa_lite.cli import render

    table = Table(title="plan: stages", title_justify="left")
    for column in ("cell", "seed", "to compute", "from another cell", "from another run", "finished"):
        table.add_column(column, justify="left" if column == "cell" else "right", overflow="fold")
    states = ("compute", "shared", "reuse", "done")
    for job, planned in schedule.jobs:
        if isinstance(planned, str):
            table.add_row(render.safe(job.cell.name), str(job.seed), "cannot run")
            continue
        counts = [sum(stage.state == state for stage in planned) for state in states]
        table.add_row(render.safe(job.cell.name), str(job.seed), *[str(n) if n else "-" for n in counts])
    render.err.print(table)
    for sentence in dict.fromkeys(f"{job.cell.name}: {why}" for job, why in schedule.jobs if isinstance(why, str)):
        render.note(f"cannot run: {sentence}")
    time = render.duration(schedule.seconds(library))
    known = (
        f"about {time}, from stages measured before" if time else "time unknown: no such stage was measured here yet"
    )
    render.note(
        f"{schedule.count('compute')} stages to compute ({known}); {schedule.count('shared', 'reuse', 'done')} to reuse"
    )


def _run(
    jobs: Sequence[Job], schedule: Schedule, shelf: Shelf, library: Library, folder: Path, base: Recipe
) -> tuple[list[Outcome], Cost]:
    """Run all jobs with progress; a line per finished cell."""
    from spa_lite import ablate as studies
    from spa_lite.cli import render, trackers
    from spa_lite.compare import measures

    outcomes, runs = [], []
    with (
        render.progress(keep=False) as progress,
        trackers.tracked(progress, base.report_to, folder, base.to_dict()) as report,
    ):

        def told(job: Job) -> Report:
            return lambda event: report(replace(event, stage=f"{job.folder.name}: {event.stage}"))

        for number, (outcome, run) in enumerate(studies.run_jobs(jobs, shelf, library, told), start=1):
            outcomes.append(outcome)
            if run:
                runs.append(run)
            found = measures(outcome.rows or ())
            headline = next((f"{n.replace('_', ' ')} {100 * found[n]:.1f} %" for n in found), outcome.error)
            left = render.duration(schedule.seconds(library))
            more = f", {left} left" if left and number < len(jobs) else ""
            render.note(f"cell {number} of {len(jobs)}, {outcome.cell}, seed {outcome.seed}: {headline}{more}")
    return outcomes, studies.cost(runs, library)


def _say_cost(spent: Cost) -> None:
    from spa_lite.cli import render

    share = f" ({100 * spent.cpu_distinct / spent.cpu_separately:.0f} %)" if spent.cpu_separately else ""
    render.note(
        f"{spent.distinct} distinct stages of {spent.stages}, {spent.computed} computed now; CPU seconds: "
        f"{spent.cpu_distinct:.0f} for the distinct stages, {spent.cpu_separately:.0f} if every run had computed its "
        f"own{share}"
    )
