"""`spa-lite recipes`: what is shipped, and every setting."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from spa_lite.cli.main import app


@app.command("recipes")
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe or scale to show; none lists all.")] = None,
) -> None:
    """List the shipped recipes and scales, or show one with every setting and what it affects."""
    from rich.table import Table

    from spa_lite.cli.render import note, safe, show
    from spa_lite.recipe import SETTINGS, build, load_layer, settings_of, shipped

    if name is None:
        kinds: tuple[Literal["recipe"], Literal["scale"]] = ("recipe", "scale")
        for kind in kinds:
            for known, file in shipped(kind).items():
                first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
                print(f"{kind:<7} {known:<14} {first}")
        note("spa-lite recipes NAME shows one with all its settings")
        return
    of: Literal["recipe", "scale"] = "scale" if name in shipped("scale") else "recipe"
    recipe, source = build({f"{of} {name}": load_layer(of, name)})
    table = Table(title=f"{of} {name}", title_justify="left")
    for column in ("setting", "value", "from", "stages", "what it does"):
        table.add_column(column, no_wrap=column == "setting")
    values = settings_of(recipe)
    for s in SETTINGS.values():
        table.add_row(s.path, safe(str(values[s.path])), source[s.path], " ".join(s.stages) or "-", safe(s.help))
    show(table)
