"""`spa-lite report`: runs as a page one can look at, with figures and their data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spa_lite.cli.main import app
from spa_lite.cli.run import HOME

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.recipe import Recipe


@app.command("report")
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN...]", help="Paths, names, or beginnings of names (default: the newest run)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write (default: report/ in the run; beside the first of several)."),
    ] = None,
    no_credit: Annotated[
        bool,
        typer.Option("--no-credit", help="Load no model: no token credit, and no answers that the run did not keep."),
    ] = False,
    root: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder of runs.")] = HOME,
) -> None:
    """Write a page about a run: figures, answers before and after, judgements, cost. Several runs are compared.

    One HTML file that needs no network, and beside it each figure as PNG and its data as CSV. A study stands for its
    cells; an unfinished run is shown as far as it is.
    """
    from spa_lite.cli.render import note, safe
    from spa_lite.cli.render import out as stdout
    from spa_lite.report import write_report

    folders = places(runs or [], root)
    where = out or (folders[0] if len(folders) == 1 else folders[0].resolve().parent) / "report"
    path = write_report(folders, where, None if no_credit else load, tell=note)
    stdout.print(safe(str(path)))


def places(words: list[str], root: Path) -> list[Path]:
    """The folders that are meant; without a word the newest run. Raises RunError if there is none."""
    from spa_lite.cli.render import note
    from spa_lite.errors import RunError
    from spa_lite.inventory import resolve

    if words:
        return [resolve(word, root).folder for word in words]
    newest = max(root.glob("*/run.json"), key=lambda head: _touched(head.parent), default=None)
    if newest is None:
        raise RunError(f"there is no run below {root}; spa-lite run makes one, and --root names another folder")
    note(f"the newest run: {newest.parent}")
    return [newest.parent]


def _touched(folder: Path) -> float:
    """When a run was last worked on: a report about it does not count."""
    files = [*folder.glob("*.json"), *folder.glob("rounds/*/*.json")]
    return max((file.stat().st_mtime for file in files), default=0.0)


def load(recipe: Recipe) -> Backend:
    """The model of a run, for token credit and answers."""
    from spa_lite import backends, prepare
    from spa_lite.cli.render import note

    note("loading the run's model for token credit and answers (--no-credit leaves them out)")
    return prepare.models_of(recipe, backends.load).backend
