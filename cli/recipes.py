"""`spa-lite recipes`: what is shipped, what recipes are made of, and every setting of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import Scale
from spa_lite.errors import RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from spa_lite.recipe import Recipe

AXES = "axes"


@app.command("recipes")
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A recipe, a scale, or a YAML file; axes: what recipes are made of; none: all.")
    ] = None,
    scale: Scale = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print its file, as --recipe takes it: a start for one of your own.")
    ] = False,
) -> None:
    """List the shipped recipes, each with its one line. NAME: one with all its settings; axes: all pieces."""
    from spa_lite.cli import render
    from spa_lite.recipe import build, layer_file, layers_of, load_layer, shipped

    if as_yaml and (name in {None, AXES} or scale):
        raise RecipeError(
            "--yaml prints the file of one recipe, for all scales: name the recipe, and leave --scale out"
        )
    if name is None:
        _list(scale or "paper")
        render.note("spa-lite recipes NAME shows one with all its settings, spa-lite recipes axes every piece")
        return
    if name == AXES:
        if scale:
            raise RecipeError("the axes are the same on every scale; leave --scale out")
        for table in _pieces():
            render.show(table)
        return
    is_scale = name in shipped("scale")
    file = layer_file("scale" if is_scale else "recipe", name)
    if is_scale:
        if scale:
            raise RecipeError(f"{name} is a scale itself; leave --scale out")
        recipe, source = build({f"scale {name}": load_layer("scale", name)})
    else:
        recipe, source = build(layers_of(name, scale or "paper"))
    if as_yaml:
        print(file.read_text(encoding="utf-8"), end="")
        return
    _show("scale" if is_scale else "recipe", name, file, recipe, source)


def about(file: Path) -> str:
    """The comment that a file begins with, on one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _list(scale: str) -> None:
    """Every recipe with its first words and its one line, then the scales."""
    from spa_lite.axes import one_line
    from spa_lite.cli import render
    from spa_lite.recipe import build, layers_of, shipped

    found = {
        name: [about(file), one_line(build(layers_of(name, scale))[0])] for name, file in shipped("recipe").items()
    }
    render.show(_told(f"recipes, at scale {scale}", found))
    render.show(_told("scales", {name: [about(file)] for name, file in shipped("scale").items()}))


def _told(title: str, found: Mapping[str, Sequence[str]]) -> Table:
    """Names, and beside each what is to be said of it, in paragraphs."""
    from rich import box
    from rich.table import Table

    from spa_lite.cli import render

    table = Table(title=render.safe(title), title_justify="left", show_header=False, box=box.SIMPLE, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, (first, *more) in found.items():
        table.add_row(name, render.safe(first))
        for line in more:
            table.add_row("", render.safe(line), end_section=True)
    return table


def _show(kind: str, name: str, file: Path, recipe: Recipe, source: Mapping[str, str]) -> None:
    """What it is, its one line, what is not as by default, and all settings."""
    from rich import box
    from rich.table import Table

    from spa_lite.axes import one_line
    from spa_lite.cli import render
    from spa_lite.recipe import SETTINGS, settings_of

    values: Mapping[str, Any] = settings_of(recipe)
    line = {f"at scale {recipe.scale}": [one_line(recipe)]} if kind == "recipe" else {}
    render.show(_told(f"{kind} {name}", {"about": [about(file)]} | line))
    title = f"{kind} {render.safe(name)}"
    other = Table(title=f"{title}: what is not as by default", title_justify="left")
    for column in ("setting", "value", "default", "from"):
        other.add_column(column, no_wrap=column == "setting", overflow="fold")
    for s in SETTINGS.values():
        if values[s.path] != s.default and s.path not in {"name", "scale"}:
            other.add_row(s.path, *map(render.safe, (shown(values[s.path]), shown(s.default), source[s.path])))
    render.show(other)
    # As narrow as can be, so that 80 columns hold it.
    table = Table(title=f"{title}: all settings", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column, widest in (("setting", None), ("value", 12), ("from", 12), ("what it does, and to which stages", None)):
        table.add_column(column, no_wrap=column == "setting", overflow="fold", max_width=widest)
    for s in SETTINGS.values():
        stages = f" \\[{' '.join(s.stages)}]" if s.stages else ""
        table.add_row(s.path, *map(render.safe, (shown(values[s.path]), source[s.path])), render.safe(s.help) + stages)
    render.show(table)


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(map(shown, value)) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pieces() -> list[Table]:
    """A table per axis: its pieces, what they are, where they come from."""
    from rich.table import Table

    from spa_lite.axes import PIECES, WHERE
    from spa_lite.cli import render
    from spa_lite.recipe import SETTINGS

    tables = []
    for axis, pieces in PIECES.items():
        s = SETTINGS[WHERE[axis]]
        table = Table(title=f"{axis}: {s.path}, {s.flag}", title_justify="left")
        width = max(len(name) for name in pieces)
        table.add_column("piece", no_wrap=True, min_width=width)
        table.add_column("what it is", ratio=3)
        table.add_column("source", ratio=2)
        for name, piece in pieces.items():
            table.add_row(
                f"{name}{' *' if _default(s.default) == name else ''}", *map(render.safe, (piece.what, piece.source))
            )
        tables.append(table)
    tables[-1].caption, tables[-1].caption_justify = "* the default (SPA)", "left"
    return tables


def _default(value: Any) -> str:
    return str(value[0] if isinstance(value, list) else value)
