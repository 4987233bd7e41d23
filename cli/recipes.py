"""`spa-lite recipes`: what is shipped, and every setting."""

from __future__ import annotations

from typing import Annotated

import typer

from spa_lite.cli.main import app


@app.command("recipes")
def recipes(name: Annotated[str | None, typer.Argument(help="A recipe or scale to show; none lists all.")] = None) -> None:
    """List the shipped recipes and scales, or show one with every setting and what it affects."""
    from rich.table import Table

    from spa_lite.cli.render import note, safe, show
    from spa_lite.recipe import SETTINGS, build, load_layer, settings_of, shipped

    if name is None:
        for kind in ("recipe", "scale"):
            for known, path in shipped(kind).items():
                first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
                print(f"{kind:<7} {known:<14} {first}")
        note("spa-lite recipes NAME shows one with all its settings")
        return
    kind = "scale" if name in shipped("scale") else "recipe"
    recipe, source = build({f"{kind} {name}": load_layer(kind, name)})  # type: ignore[arg-type]
    table = Table(title=f"{kind} {name}", title_justify="left")
    for column in ("setting", "value", "from", "stages", "what it does"):
        table.add_column(column, no_wrap=column == "setting")
    values = settings_of(recipe)
    for path, s in SETTINGS.items():
        table.add_row(path, safe(str(values[path])), source[path], " ".join(s.stages) or "-", safe(s.help))
    show(table)
