"""From a recipe to a loaded model, with the waiting shown."""

from __future__ import annotations

from pathlib import Path

from spa_lite import backends
from spa_lite.backend import Backend
from spa_lite.models import Models
from spa_lite.prepare import model_settings
from spa_lite.recipe import Recipe


def load(recipe: Recipe, model: str | None = None) -> Backend:
    """The recipe's model, or another one in the same way."""
    name, _ = backends.choose(recipe.inputs.backend)
    return backends.load(name, model_settings(recipe, model))


def models_of(recipe: Recipe) -> Models:
    """Everything a run may need to load."""
    i = recipe.inputs
    return Models(
        load=lambda: load(recipe),
        init_adapter=Path(i.init_adapter) if i.init_adapter else None,
        policy_adapter=Path(i.adapter_path) if i.adapter_path else None,
        load_reference=(lambda: load(recipe, i.init_model)) if i.init_model else None,
    )
