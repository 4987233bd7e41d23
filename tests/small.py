"""A whole run on the toy backend in a fraction of a second: the data, the recipe, the call."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import backends, prepare
from spa_lite.backend import Backend
from spa_lite.events import Report, silent
from spa_lite.models import Models
from spa_lite.recipe import Recipe, build, load_layer
from spa_lite.spa import align
from spa_lite.stages.workbench import Data
from spa_lite.store import Run

GOOD, BAD = ["red", "blue", "green", "cat", "dog"], ["sun", "moon", "tea", "cup", "hat"]

SMALL: dict[str, Any] = {
    "inputs.backend": "toy",
    "inputs.model": "toy",
    "rounds": 2,
    "sampling.max_tokens": 12,
    "seed_dpo.learning_rate": 0.05,
    "seed_dpo.batch_size": 8,
    "train.learning_rate": 0.05,
    "train.batch_size": 4,
    "refine.window": 8,
    "refine.K": 0.3,
}
"""Settings under which every part of the method is at work within a few steps."""


def write_data(folder: Path, pairs: int = 40, prompts: int = 40) -> dict[str, str]:
    """Write pairs.jsonl and prompts.jsonl and return the settings that name them."""
    rng = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(pairs):
            chosen, rejected = " ".join(rng.choices(GOOD, k=3)), " ".join(rng.choices(BAD, k=3))
            file.write(json.dumps({"prompt": f"say {i}", "chosen": chosen, "rejected": rejected}) + "\n")
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(prompts):
            file.write(json.dumps({"id": f"x{i}", "prompt": f"tell {rng.choice(GOOD)} {i}"}) + "\n")
    return {"inputs.seed_pairs": str(folder / "pairs.jsonl"), "inputs.prompts": str(folder / "prompts.jsonl")}


def small_recipe(files: Mapping[str, str], changes: Mapping[str, Any] | None = None, name: str = "spa") -> Recipe:
    """The small recipe on those files, with changes on top."""
    layers: dict[str, Mapping[str, Any]] = {"name": load_layer("recipe", name), "small": SMALL, "files": files}
    return build(layers | {"test": changes or {}})[0]


POOLED = {"spa", "spa-official", "spa-noseed", "iterative-dpo", "simpo-onpolicy"}
"""Recipes that read prompts of a file."""
TINY: dict[str, Any] = {
    "prompts.count": 16,
    "prompts.max_tokens": 20,
    "prompts.examples": 2,
    "sft.learning_rate": 0.05,
    "lengths.max_prompt_length": 600,
}
STANDS_IN: dict[str, dict[str, Any]] = {
    "iterative-dpo": {"judge": "longest"},
    "simpo-onpolicy": {"judge": "longest"},
    "selm": {"judge": "longest"},
    "synpo": {"pairing.gap_judge": "likelihood", "pairing.min_gap": 0.01},
    "spa-noseed": {"inputs.no_seed_pairs": False},
    "self-rewarding": {"judge": "longest", "prompts": "bare"},  # its prompts are no tasks for Self-Instruct's filters
}
"""What the toy has no model for."""


def tiny(name: str, files: Mapping[str, str], changes: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe at a size of seconds."""
    written = name in {"sao", "self-rewarding", "synpo"}
    kept = {k: v for k, v in files.items() if k != "inputs.prompts" or name in POOLED}
    size = {k: v for k, v in TINY.items() if written or k != "prompts.count"}
    rounds = {"rounds": min(2, small_recipe(kept, {"inputs.no_seed_pairs": False}, name).rounds)}
    return small_recipe(kept, size | rounds | STANDS_IN.get(name, {}) | (changes or {}), name)


def load(recipe: Recipe) -> Backend:
    """The recipe's backend."""
    return backends.load(recipe.inputs.backend or "toy", prepare.model_settings(recipe))


def start(recipe: Recipe, wrap: Any = lambda backend: backend) -> tuple[Models, Data]:
    """Models and data of a recipe. `wrap` may put a spy around the backend."""
    models = prepare.models_of(recipe, lambda name, settings: wrap(backends.load(name, settings)))
    return models, prepare.data_of(recipe, models)


def run_small(
    folder: Path, recipe: Recipe, wrap: Any = lambda backend: backend, report: Report = silent
) -> tuple[dict[str, Any], Run]:
    """Run the method into a folder."""
    models, data = start(recipe, wrap)
    run = Run(folder)
    return align(models, recipe, data, run, report), run


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a run that holds results: no clocks, no settings, no markers."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in {".jsonl", ".safetensors"}
    }
