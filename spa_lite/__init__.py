"""SPA (Spread Preference Annotation) on one computer. Read `spa.py` first."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa_lite.backend import ModelSettings
    from spa_lite.errors import SpaError
    from spa_lite.models import Models
    from spa_lite.recipe import Recipe, build, load_layer
    from spa_lite.spa import align
    from spa_lite.stages.workbench import Data
    from spa_lite.store import Run

_HOME = {
    "Data": "stages",
    "ModelSettings": "backend",
    "Models": "models",
    "Recipe": "recipe",
    "Run": "store",
    "SpaError": "errors",
    "align": "spa",
    "build": "recipe",
    "load_layer": "recipe",
}

__all__ = ["Data", "ModelSettings", "Models", "Recipe", "Run", "SpaError", "align", "build", "load_layer"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used, so that `spa-lite --help` answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
