"""SPA (Spread Preference Annotation) on one computer. Read `spa.py` first."""

from spa_lite.backend import ModelSettings
from spa_lite.errors import SpaError
from spa_lite.recipe import Recipe, build
from spa_lite.spa import spa
from spa_lite.stages import Data, Models
from spa_lite.store import Run

__all__ = ["Data", "ModelSettings", "Models", "Recipe", "Run", "SpaError", "build", "spa"]
