"""What `export` is asked for: whose adapter, of which stage, under which settings, and where to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.options import resolve
from spa_lite.cli.run import HOME, default_scale
from spa_lite.errors import ModelError, RunError

if TYPE_CHECKING:
    from spa_lite.recipe import Recipe

BASE = "init"
"""The word for the base without an adapter."""
CONFIG, RECORD = "adapter_config.json", "export.json"
OURS = {CONFIG, RECORD, "adapter_model.safetensors", "adapters.safetensors", "check.jsonl"}
"""What --force may delete, beside what export.json names."""


@dataclass(frozen=True)
class Source:
    """An adapter (None: the bare base), the run it is of (None: of none), and its stage there. `name` is short, for the
    folder to write."""

    adapter: Path | None
    run: Path | None
    stage: str | None
    recipe: Recipe

    @property
    def name(self) -> str:
        """`spa-1a2b3c4d-round-2`, or the adapter folder's own name."""
        place = self.run or self.adapter
        own = place.resolve().name if place else base_name(self.recipe.inputs.model).replace(" ", "-").replace("/", "-")
        return f"{own}-{self.stage.replace(' ', '-')}" if self.stage else own

    @property
    def what(self) -> str:
        """What is exported, for messages."""
        return str(self.adapter) if self.adapter else f"the base {base_name(self.recipe.inputs.model)}"


def source_of(word: str, stage: str | None, given: dict[str, Any]) -> Source:
    """What a word of the command line names: an adapter folder, a run or one of its stages, the name of a run, or
    `init`, the base alone."""
    place = Path(word)
    if word == BASE and not place.exists():
        return Source(None, None, None, recipe_of(None, given))
    if stage is None and (adapter := _adapter_in(place)):
        run = _run_of(place)
        return Source(adapter, run, _stage_of(adapter, run), recipe_of(run, given))
    if (place / CONFIG).is_file():
        raise RunError(f"--round {stage} picks a stage of a run, and {place} is an adapter; leave it out")
    run = place if (place / "recipe.yaml").is_file() else _named_run(word)
    return _of_run(run, stage, recipe_of(run, given))


def _adapter_in(place: Path) -> Path | None:
    """The adapter folder that a folder is or holds."""
    return next((folder for folder in (place, place / "adapter") if (folder / CONFIG).is_file()), None)


def _of_run(run: Path, word: str | None, recipe: Recipe) -> Source:
    from spa_lite.rounds import named, policies_of

    if word is None and (adapter := _adapter_in(run)):
        return Source(adapter, run, _stage_of(adapter, run), recipe)
    policies = policies_of(run, recipe)
    if word is None:
        stages = [name.removeprefix("round ") for name in policies if name != "init"]
        mend = f"--round {stages[-1]} takes what it has" if stages else "run it first"
        raise ModelError(f"{run} holds no adapter (adapter/{CONFIG}): it is not finished; {mend}")
    stage = named(policies, word, str(run))
    return Source(policies[stage], run, stage, recipe)


def _named_run(word: str) -> Path:
    from spa_lite.inventory import resolve as resolve_run

    if Path(word).is_dir():
        raise ModelError(
            f"{word} holds no adapter ({CONFIG} or adapter/{CONFIG}); give a finished run, one of its stages or an"
            " adapter"
        )
    try:
        place = resolve_run(word, HOME)
    except RunError as error:
        raise RunError(f"{word} is no folder here: {error}") from None
    if place.kind == "study":
        raise RunError(f"{word} is a study; name one of its runs: {', '.join(cell.name for cell in place.cells[:3])}")
    return place.folder


def _run_of(place: Path) -> Path | None:
    """The run folder that a folder is or lies in."""
    from spa_lite.answers import run_of

    return place if (place / "recipe.yaml").is_file() else run_of(place)


def _stage_of(adapter: Path, run: Path | None) -> str | None:
    """The stage of a run that an adapter folder is, if it can be told."""
    if run is None:
        return None
    rounds = [int(p.parent.name) for p in run.glob("rounds/[0-9]*/adapter") if p.parent.name.isdigit()]
    inside = (
        adapter.resolve().relative_to(run.resolve()).parts if adapter.resolve().is_relative_to(run.resolve()) else ()
    )
    numbers = [int(inside[1])] if inside[:1] == ("rounds",) else rounds if inside == ("adapter",) else []
    return ("seed" if max(numbers) == 0 else f"round {max(numbers)}") if numbers else None


# Settings


def recipe_of(run: Path | None, given: dict[str, Any]) -> Recipe:
    """What the command line says, on top of the settings of the run."""
    from spa_lite.recipe import read_yaml

    path = run / "recipe.yaml" if run else None
    of_run = read_yaml(path) if path and path.is_file() else {}
    elsewhere = ("name", "scale", "inputs.device")  # the run may have been on another machine
    kept = {name: value for name, value in of_run.items() if value is not None and name not in elsewhere}
    recipe, _ = resolve(kept | given, default_scale=default_scale)
    return dataclasses.replace(recipe, name=of_run.get("name", recipe.name), scale=of_run.get("scale", recipe.scale))


def check_alone(adapter: Path | None) -> None:
    """Refuse an adapter that says it was trained on top of another one: its base is not the model alone."""
    if adapter is None:
        return
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path") or "") if isinstance(config, dict) else ""
    if base and (Path(base) / CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        raise ModelError(
            f"{adapter} was trained on top of another adapter ({Path(base).name}): merge that one into its base first"
            " and give the result as --model"
        )


# The place


def check_free(out: Path, force: bool) -> None:
    """OUT is new or empty; or, with --force, a folder that holds an export and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    others = sorted({path.name for path in out.iterdir()} - OURS - _recorded(out)) if out.is_dir() else [out.name]
    if others:
        raise RunError(f"{out} is not empty and not only an export ({others[0]}); choose another folder")
    if not force:
        raise RunError(f"{out} already holds an export; choose another folder, or replace it with --force")


def _recorded(out: Path) -> set[str]:
    """The files that the export.json in a folder says are its own."""
    try:
        names = json.loads((out / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def base_name(model: str | None) -> str:
    """What to call the base in files that others read: a hub name, or a folder's own name without its place."""
    if model is None:
        return "spa-lite lesson model"
    path = Path(model).expanduser()
    local = path.is_dir() or path.is_absolute() or model.startswith((".", "~"))
    return path.resolve().name if local else model
