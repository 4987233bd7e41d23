"""Which model and adapter a command works with, and how they are put on the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.checks import before_use
from spa_lite.errors import ModelError
from spa_lite.recipe import SETTINGS, Recipe

if TYPE_CHECKING:
    from spa_lite.backend import Backend

GROUPS = [
    *(f"inputs.{name}" for name in ("model", "backend", "device", "adapter_path", "init_adapter", "init_model")),
    *("inputs.skip_bad", "model", "lengths"),
]
"""Settings of the commands that read one file under a policy and a reference."""
JUDGING = [path for path in SETTINGS if path.startswith("judge.") and path not in {"judge.rescore", "judge.adapter"}]
"""Settings of a judge that is not part of a run: it knows of no sampler, scores all that it is given, and its policy is
--adapter-path."""


def limits(r: Recipe, backend: Backend) -> dict[str, Any]:
    """How long human answers and their prompts may be."""
    from spa_lite import judging

    return judging.limits(r, backend)


def bind(backend: Backend, r: Recipe) -> None:
    """Put the policy and the reference that a recipe names on the base."""
    from spa_lite.backend import INIT, POLICY

    before_use(backend, r)
    backend.bind(INIT, Path(r.inputs.init_adapter) if r.inputs.init_adapter else None)
    start = r.inputs.adapter_path or r.inputs.init_adapter
    backend.bind(POLICY, Path(start) if start else None)


def with_policy(given: dict[str, Any], r: Recipe) -> dict[str, Any]:
    """Where the recipe so far names no policy: the newest run's, else the built-in seed adapter. Says which."""
    from spa_lite.cli import render
    from spa_lite.lesson import MODEL_DIR
    from spa_lite.recipe import read_yaml

    if r.inputs.model or r.inputs.adapter_path or r.inputs.init_model:
        return given
    newest = max(Path("runs").glob("*/summary.json"), key=lambda p: p.stat().st_mtime, default=None)
    if newest is not None and (newest.parent / "adapter").is_dir():
        settings = read_yaml(newest.parent / "recipe.yaml")
        kept = {
            p: v
            for p, v in settings.items()
            if p.startswith(("model.", "inputs.model", "inputs.backend", "inputs.init_adapter")) and p in SETTINGS
        }
        render.note(f"judging with the newest run, {newest.parent}")
        return (
            {p: v for p, v in kept.items() if v is not None}
            | {"inputs.adapter_path": str(newest.parent / "adapter")}
            | given
        )
    adapter = MODEL_DIR.parent / "seed_adapter"
    if not adapter.is_dir():
        raise ModelError("there is no run to judge with; give --model and --adapter-path, or run `spa-lite run` first")
    render.note(
        "judging with the built-in model and its seed adapter; it knows only its lesson "
        "(give --model and --adapter-path for yours)"
    )
    return {"inputs.adapter_path": str(adapter)} | given
