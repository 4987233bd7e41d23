"""The policies of a run, by the names that people use: init, then the seed stage, then each round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spa_lite import guards
from spa_lite.errors import RunError
from spa_lite.recipe import Recipe

Policies = Mapping[str, Path | None]
"""Name -> adapter (None: the bare base), in the order of their making."""


def policies_of(run: Path | None, recipe: Recipe) -> dict[str, Path | None]:
    """pi_init, pi_0 (named `seed`, or `pi_0` where it was given) and the policy of each finished round."""
    i = recipe.inputs
    found: dict[str, Path | None] = {"init": Path(i.init_adapter) if i.init_adapter else None}
    folders = sorted(run.glob("rounds/[0-9]*/adapter"), key=lambda path: int(path.parent.name)) if run else []
    if i.adapter_path:
        found["pi_0" if run else "policy"] = Path(i.adapter_path)
    found |= {"seed" if p.parent.name == "0" else f"round {p.parent.name}": p for p in folders}
    return found


def row_name(recipe: Recipe, folder: str) -> str:
    """What people call the stages in a folder of a run, and the policy that comes of them: init, seed, round 1, ...

    `rounds/0` holds what made or measured pi_0; where pi_0 is pi_init, no more than a helper's training.
    """
    start = "seed" if guards.has_seed_stage(recipe) else "pi_0"
    if guards.starts_at_init(recipe) and not recipe.inputs.init_model:
        start = "generator"
    return {"init": "init", "rounds/0": start}.get(folder, folder.replace("rounds/", "round "))


def named(policies: Policies, word: str, of: str = "this run") -> str:
    """The name that a word stands for: itself, a round's number (0: the seed stage or what was given), or `last`.

    Raises RunError naming those that there are.
    """
    word = word.strip()
    names = list(policies)
    others = {"last": names[-1], "0": next((name for name in ("seed", "pi_0") if name in names), "")}
    for found in (word, f"round {word}", others.get(word, "")):
        if found in names:
            return found
    numbers = [name.removeprefix("round ") for name in names]
    raise RunError(f"{of} has no stage {word!r}; it has {', '.join(numbers)}")
