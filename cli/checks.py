"""What a command says and checks once its model is loaded, before the long work begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.recipe import Recipe


def before_use(backend: Backend, recipe: Recipe) -> None:
    """Say what the backend advises on this machine, and check each adapter that the recipe names, once."""
    from spa_lite.cli import render

    for line in backend.advice:
        render.note(line)
    named = (recipe.inputs.init_adapter, recipe.inputs.adapter_path)
    for folder in dict.fromkeys(name for name in named if name):
        check_adapter(backend, Path(folder))


def check_adapter(backend: Backend, folder: Path) -> None:
    """Say whether an adapter that brought a check does what its exporter saw; ModelError if it should and does not."""
    from spa_lite import exchange
    from spa_lite.cli import render

    verdict = exchange.check_adapter(backend, folder)
    if verdict is not None:
        render.note(f"{folder} {exchange.sentence(verdict)}")
