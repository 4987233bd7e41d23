"""What every evaluation needs: its settings, the run it is about, its folder, and eval.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.options import resolve
from spa_lite.cli.run import HOME, default_scale
from spa_lite.errors import RecipeError, RunError
from spa_lite.recipe import Recipe

if TYPE_CHECKING:
    from spa_lite.answers import OneModel
    from spa_lite.events import Report

NAME = "eval.json"
FORMAT = 1


@dataclass(frozen=True)
class Work:
    """One evaluation: its settings and where each came from, the run it is about, and where results go."""

    recipe: Recipe
    sources: Mapping[str, str]
    run: Path | None
    out: Path
    one: OneModel
    report: Report
    used: dict[Any, dict[str, Any]] = field(default_factory=dict)  # which models answered, by key of the side

    def asked_for(self, path: str) -> bool:
        """Whether the user set this (command line or file), rather than the run or a default."""
        return asked_for(self.sources, path)

    @property
    def limit(self) -> int | None:
        """How many prompts or questions at most; what a run was limited to does not count."""
        return self.recipe.inputs.limit_prompts if self.asked_for("inputs.limit_prompts") else None

    def max_tokens(self, usual: int) -> int:
        """Longest answer of a benchmark that has a limit of its own."""
        return self.recipe.sampling.max_tokens if self.asked_for("sampling.max_tokens") else usual


def asked_for(sources: Mapping[str, str], path: str) -> bool:
    """Whether a setting came from the command line or a file, by the sources of all settings."""
    return sources[path] == "command line" or sources[path].endswith((".yaml", ".yml"))


# --- settings --------------------------------------------------------------------------------------------------

Layers = tuple[dict[str, Any], Sequence[str], Path | None, str | None, str | None]


@contextmanager
def working(layers: Layers, run: str | None, sides: Sequence[str | None], out: Path | None) -> Iterator[Work]:
    """The settings of an evaluation, its folder (nobody else's inside the block), and its progress."""
    from spa_lite import backends
    from spa_lite.answers import OneModel
    from spa_lite.cli import render
    from spa_lite.lock import locked

    folder = which_run(run, sides, layers)
    recipe, sources = settings(layers, folder)
    place = folder_of(out or (folder / "eval" if folder else Path("eval")))
    earlier(place)
    with locked(place), render.progress() as report:
        yield Work(recipe, sources, folder, place, OneModel(backends.load), report)


def folder_of(out: Path) -> Path:
    """The folder of the results. Raises RunError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None
    return out


def which_run(run: str | None, sides: Sequence[str | None], layers: Layers) -> Path | None:
    """The run that is asked for: named, or that of a side; without sides, model and data the newest one."""
    from spa_lite.answers import run_of
    from spa_lite.cli import render
    from spa_lite.inventory import resolve as resolve_run

    if run is not None:
        place = resolve_run(run, HOME)
        if place.kind == "study":
            raise RunError(
                f"{run} is a study; name one of its runs: {', '.join(cell.name for cell in place.cells[:3])}"
            )
        return place.folder
    inside = [found for side in sides if side and (found := run_of(Path(side)))]
    if inside or any(sides):
        return inside[0] if inside else None
    given = {path.split("=")[0].strip() for path in layers[1]} | set(layers[0])
    if layers[2] or given & {"inputs.model", "inputs.adapter_path", "inputs.held_out", "inputs.seed_pairs"}:
        return None
    newest = max(HOME.glob("*/summary.json"), key=lambda p: p.stat().st_mtime, default=None)
    if newest is not None:
        render.note(f"the newest run: {newest.parent}")
        return newest.parent
    return None


def settings(layers: Layers, run: Path | None) -> tuple[Recipe, dict[str, str]]:
    """The recipe: the run's, where there is one, and what the user says on top of it."""
    from spa_lite.recipe import read_yaml

    given, sets, config, recipe, scale = layers
    if run is None:
        return without_sampler(*resolve(given, sets, config, recipe, scale, default_scale))
    if recipe or scale:
        raise RecipeError(f"--recipe and --scale would change the settings of {run}; change single ones with --set")
    of_run = {p: v for p, v in read_yaml(run / "recipe.yaml").items() if not p.startswith(("judge.", "sampling.by"))}
    return without_sampler(
        *resolve(given, sets, config, default_scale=default_scale, study=(f"{run.name} (its run)", of_run))
    )


def without_sampler(recipe: Recipe, sources: dict[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The same, where answers come from the model itself. Raises RecipeError if another sampler is asked for."""
    if recipe.sampling.by:
        raise RecipeError("--sampler is for the rounds of `run`; to hear a GGUF itself, give --model FILE.gguf")
    return recipe, sources


def run_recipe(run: Path) -> Recipe:
    """The recipe of a run."""
    return settings(({}, [], None, None, None), run)[0]


# --- results ---------------------------------------------------------------------------------------------------


def circumstances(work: Work) -> dict[str, Any]:
    """What a number depends on beside its data: seed, settings, versions, and what models were computed on."""
    from importlib.metadata import PackageNotFoundError, version

    def known(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    r = work.recipe
    named = ("spa-lite", "numpy", "torch", "transformers", "peft", "mlx", "mlx-lm")
    return {
        "run": str(work.run) if work.run else None,
        "seed": r.seed,
        "settings": {"sampling": vars(r.sampling), "lengths": vars(r.lengths), "model": vars(r.model)},
        "versions": {name: found for name in named if (found := known(name))},
    }


def save(folder: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Put results into eval.json; an earlier one of the same title and data makes room, others stay."""
    from spa_lite.files import write_json

    def name(one: Mapping[str, Any]) -> tuple[Any, ...]:
        return one["kind"], one["title"], one.get("data")

    others = [one for one in earlier(folder) if name(one) not in set(map(name, found))]
    write_json(folder / NAME, {"format": FORMAT, "results": [*others, *found]})


def earlier(folder: Path) -> list[dict[str, Any]]:
    """The results that a folder holds already. Raises RunError for a file that is not ours."""
    from spa_lite.files import read_json

    path = folder / NAME
    found = read_json(path) if path.exists() else {"format": FORMAT, "results": []}
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RunError(f"{path} is not a file of this version of spa-lite; move it away, or choose another --out")
    return list(found["results"])
