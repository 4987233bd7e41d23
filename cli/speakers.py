"""Who can be spoken to: the policies of a run, or a model and its adapter, on one base in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.eval_work import Layers, settings, which_run
from spa_lite.rounds import Policies, named, policies_of

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.recipe import Recipe

GROUPS = [
    *(f"inputs.{name}" for name in ("model", "backend", "device", "adapter_path", "init_adapter")),
    *("seed", "model", "sampling.temp", "sampling.top_p", "sampling.max_tokens", "lengths.max_prompt_length"),
]
"""Settings of the commands in which models speak."""


@dataclass(frozen=True)
class Speakers:
    """Some policies of one base, by name, and the settings under which they speak."""

    recipe: Recipe
    run: Path | None
    policies: Policies
    sources: Mapping[str, str]  # where each setting came from

    @property
    def title(self) -> str:
        """What they belong to."""
        return self.run.name if self.run else Path(self.recipe.inputs.model or "the built-in model").name

    def named(self, word: str) -> str:
        """The policy that a word stands for. Raises RunError naming those that there are."""
        return named(self.policies, word, str(self.run or self.title))


def speakers(given: dict[str, Any], run: str | None, sets: Sequence[str] = (), config: Path | None = None) -> Speakers:
    """The policies of a run (a name or a folder); or of --model with --adapter-path; without either, of the newest run,
    and where there is none, the built-in model and its seed adapter."""
    from spa_lite.cli import render
    from spa_lite.lesson import MODEL_DIR

    layers: Layers = (given, sets, config, None, None)
    folder = which_run(run, [], layers)
    recipe, sources = settings(layers, folder)
    if folder and sources["inputs.adapter_path"] == "command line":
        adapter = recipe.inputs.adapter_path
        init = policies_of(None, recipe)["init"]
        return Speakers(recipe, folder, {"init": init, "policy": Path(adapter) if adapter else None}, sources)
    policies = policies_of(folder, recipe)
    if not (folder or recipe.inputs.model or recipe.inputs.adapter_path):
        render.note("the built-in model and its seed adapter (name a run, or give --model and --adapter-path)")
        policies["seed adapter"] = MODEL_DIR.parent / "seed_adapter"
    return Speakers(recipe, folder, policies, sources)


def opened(who: Speakers, names: Sequence[str]) -> Backend:
    """The one base, with each of these policies bound to a role of its own name."""
    from spa_lite import backends
    from spa_lite.prepare import model_settings

    backend = backends.load(who.recipe.inputs.backend, model_settings(who.recipe))
    before_they_speak(backend, who, names)
    for name in names:
        backend.bind(name, who.policies[name])
    return backend


def before_they_speak(backend: Backend, who: Speakers, names: Sequence[str]) -> None:
    """Say what the backend advises on this machine, and check the adapter of each policy, once."""
    from spa_lite.cli import render
    from spa_lite.cli.checks import check_adapter

    for line in backend.advice:
        render.note(line)
    for adapter in dict.fromkeys(who.policies[name] for name in names):
        if adapter:
            check_adapter(backend, adapter)
