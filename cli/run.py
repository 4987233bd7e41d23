"""`spa-lite run`: the whole method."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from spa_lite.cli.checks import before_use
from spa_lite.cli.main import app
from spa_lite.cli.options import command, resolve


def default_scale(flat: dict[str, Any]) -> str:
    """The lesson's size for the built-in world, a laptop's for the user's own model."""
    own = any(flat.get(f"inputs.{name}") for name in ("model", "seed_pairs", "prompts", "held_out"))
    return "laptop" if own else "lesson"


@command(app, "run")
def run(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings; flags win.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The method: spa, spa-official, or a YAML file (default: spa)")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="The size: lesson, laptop, paper, or a YAML file (default: lesson; laptop with your own files)"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Override any setting; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder (default: runs/<recipe>-<8 hex of recipe and inputs>)")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run folder holds and start over.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and where each came from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Align a model: seed DPO, then rounds of sample, judge, train. With no arguments: the built-in lesson.

    The same command again goes on after the last finished stage, or prints the table of a finished run.
    """
    resolved, sources = resolve(given, set_ or [], config, recipe, scale, default_scale)
    if dry_run:
        _show_settings(resolved, sources)
        return

    import msgspec

    from spa_lite import backends, prepare
    from spa_lite.cli import render
    from spa_lite.spa import align
    from spa_lite.store import Run, write_json

    raw = prepare.read(resolved)
    if prepare.is_lesson(resolved):
        render.note(
            "the built-in lesson: a tiny model that knows one small world "
            "(give --model, --seed-pairs and --prompts for your own)"
        )
    models = prepare.models_of(resolved, backends.load)
    data = prepare.encode_all(raw, models.backend, resolved)
    for line in data.notes:
        render.note(line)
    before_use(models.backend, resolved)
    folder = out or Path("runs") / prepare.run_name(resolved, models, data)
    if fresh and folder.exists():
        _clear(folder)
    place = Run(folder)
    if not (folder / "recipe.yaml").exists():
        write_recipe(folder, resolved)
    render.note(f"run folder: {folder}")
    with render.progress() as report:
        summary = align(models, resolved, data, place, report)
    write_recipe(folder, resolved)  # once more: settings that no finished stage depends on may have changed
    seconds = {row["stage"]: place.seconds(row["folder"]) for row in summary["rows"]}
    write_json(folder / "timings.json", seconds)
    if as_json:
        print(msgspec.json.encode(summary).decode())
        return
    if not place.computed:
        render.note("this run is finished; nothing was computed again (--fresh starts over)")
    for table in render.summary_tables(summary, seconds):
        render.show(table)
    for warning in summary["warnings"]:
        render.note(f"warning: {warning}")
    render.note(f"adapter: {folder / 'adapter'}")


def write_recipe(folder: Path, recipe: Any) -> None:
    """recipe.yaml: every setting, so that the run can be repeated from it."""
    import yaml

    from spa_lite.store import write_atomic

    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomic(folder / "recipe.yaml", text.encode())


def _clear(folder: Path) -> None:
    """Delete a run folder, but never a folder that is not one."""
    from spa_lite.errors import RunError

    if not (folder / "recipe.yaml").exists() and any(folder.iterdir()):
        raise RunError(
            f"{folder} does not look like a run folder (it has no recipe.yaml), so --fresh will not delete it"
        )
    shutil.rmtree(folder)


def _show_settings(resolved: Any, sources: dict[str, str]) -> None:
    """The resolved recipe, a line per setting."""
    for path, source in sources.items():
        print(f"{path:<34} {resolved.get(path)!s:<24} {source}")
