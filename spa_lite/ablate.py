"""Studies: a recipe with some settings varied over several seeds, every stage that cells share computed once.

A *cell* is one combination of settings; a *job* is a cell with one seed, an ordinary run. A cell may name a recipe of
its own and starts from that. The plan of a study is the method itself, walked through without doing the work: what it
would compute, and what is there already.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from spa_lite import prepare
from spa_lite.compare import Outcome
from spa_lite.errors import RecipeError, SpaError, StaleRun
from spa_lite.events import Report, silent
from spa_lite.judges import LoadClassifier
from spa_lite.library import Library
from spa_lite.models import Models
from spa_lite.plan import Planned, State, plan
from spa_lite.recipe import (
    AXES,
    SETTINGS,
    Recipe,
    atoms,
    build,
    check_path,
    flatten,
    layer_file,
    layers_of,
    read_text,
    settings_of,
)
from spa_lite.spa import align
from spa_lite.stages.workbench import Data
from spa_lite.store import Run, digest

BASE = "base"
RECIPE = "recipe"
"""What a cell writes to start from another recipe; all other names are settings."""
Varied = Mapping[str, Sequence[Any]]
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Cell:
    """One combination of settings: what differs from the recipe as given, or from the one that `recipe` names."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What is asked: a question, settings of its own (and its `recipe`), and cells, the first of which is the base."""

    name: str
    question: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Job:
    """One cell with one seed: a run."""

    cell: Cell
    seed: int
    recipe: Recipe
    folder: Path


# -- what is asked -------------------------------------------------------------------------------------------------


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`judge=implicit,random` or `refine.K=0,0.1` -> (path of the setting, values as read from the command line).

    The name is a path, a flag without dashes, or the last part of a path where that is unique. Values of settings that
    are lists are separated by semicolons: `round_sizes=800;800,800`.
    """
    name, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise RecipeError(f"--vary {text!r} needs the form setting=value,value")
    path = setting_named(name.strip())
    if path == "seed":
        raise RecipeError("--vary seed: seeds are not cells; use --seeds N, and --seed for the first one")
    separator = ";" if ";" in values or list_valued(path) else ","
    words = [value.strip() for value in values.split(separator) if value.strip()]
    if path != RECIPE:
        return path, [read_text(SETTINGS[path], word) for word in words]
    for word in words:
        layer_file("recipe", word)
    return path, words


def setting_named(name: str) -> str:
    """The path of a setting from a path, a flag or a last part. Raises RecipeError naming the nearest."""
    plain = name.lstrip("-").replace("-", "_")
    if plain == RECIPE or plain in AXES:
        return AXES.get(plain, RECIPE)
    by_flag = {s.flag.lstrip("-").replace("-", "_"): s.path for s in SETTINGS.values() if s.flag}
    leaves = [path for path in SETTINGS if path.rpartition(".")[2] == plain]
    if plain in SETTINGS:
        return plain
    if plain in by_flag:
        return by_flag[plain]
    return leaves[0] if len(leaves) == 1 else check_path(plain, "--vary").path


def list_valued(path: str) -> bool:
    """Whether a setting holds a list."""
    return path != RECIPE and list in atoms(SETTINGS[path].type)


def cells_of(
    varied: Varied, base: Recipe, shape: Literal["grid", "one-at-a-time"], asked: Mapping[str, Any] = NOTHING
) -> list[Cell]:
    """The base cell, and the cells that varying the settings gives: all combinations, or one change at a time."""
    if shape == "grid":
        combinations = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    else:
        combinations = [{path: value} for path, values in varied.items() for value in values]
    cells = {BASE: Cell(BASE, {})}
    for combination in combinations:
        recipe = changed(base, combination, asked)
        other = {path: value for path, value in combination.items() if path == RECIPE}
        start = changed(base, other, asked)
        changes = other if start != base else {}
        settings = [path for path in combination if path != RECIPE]
        changes |= {path: recipe.get(path) for path in settings if recipe.get(path) != start.get(path)}
        name = ", ".join(f"{path}={plain(value)}" for path, value in changes.items()) or BASE
        cells.setdefault(name, Cell(name, changes))
    return list(cells.values())


def plain(value: Any) -> str:
    """A value of a setting as people write it."""
    if isinstance(value, list):
        return "+".join(plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def changed(base: Recipe, changes: Mapping[str, Any], asked: Mapping[str, Any] = NOTHING) -> Recipe:
    """A recipe with some settings changed. Where the changes name another recipe, that one on the same scale, with
    `asked` laid over it: what of the base came neither from its own recipe nor from its scale."""
    own = {path: value for path, value in changes.items() if path != RECIPE}
    if RECIPE not in changes:
        return build({"base": settings_of(base), "cell": own})[0]
    return build(layers_of(changes[RECIPE], base.scale) | {"asked": asked, "cell": own})[0]


def value_in(recipe: Recipe, path: str) -> Any:
    """What a recipe has for a setting; for `recipe`, its name."""
    return recipe.name if path == RECIPE else recipe.get(path)


def named(name: str) -> Study:
    """A shipped study, or one from a YAML file. Raises RecipeError naming the nearest."""
    known = shipped()
    path = known.get(name) or (Path(name) if Path(name).suffix in {".yaml", ".yml"} else None)
    if path is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"there is no study {name!r}{hint} (shipped: {', '.join(known)}; or give a .yaml file)")
    return read_study(path)


def shipped() -> dict[str, Path]:
    """Names and files of the shipped studies."""
    folder = Path(str(resources.files("spa_lite.studies")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_study(path: Path) -> Study:
    """A study from YAML: `question`, `settings`, and `cells` by name, the first of which is the base.

    Raises RecipeError on anything else.
    """
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    parts = {"question": str, "settings": dict, "cells": dict}
    if not isinstance(tree, dict) or not isinstance(tree.get("cells"), dict):
        raise RecipeError(f"{path} must hold a study: question, settings, and cells (name: settings)")
    for name, value in tree.items():
        if name not in parts or not isinstance(value, parts[name]):
            raise RecipeError(f"{path}: {name!r} is no part of a study (question, settings, cells) or of a wrong type")
    cells = {str(name): changes or {} for name, changes in tree["cells"].items()}
    for changes in [tree.get("settings", {}), *cells.values()]:
        if not isinstance(changes, dict):
            raise RecipeError(f"{path}: settings are written setting: value")
        for setting, value in flatten(changes).items():
            if setting == RECIPE:
                layer_file("recipe", str(value))
            else:
                check_path(setting, str(path))
    if not cells:
        raise RecipeError(f"{path} has no cells; the first one is the base that the others are compared with")
    found = tuple(Cell(name, flatten(changes)) for name, changes in cells.items())
    return Study(path.stem, tree.get("question", ""), flatten(tree.get("settings", {})), found)


def jobs_of(
    cells: Iterable[Cell], base: Recipe, seeds: int, folder: Path, asked: Mapping[str, Any] = NOTHING
) -> list[Job]:
    """Every cell with every seed, all cells of a seed together: what they share is then at hand."""
    return [
        Job(
            cell,
            seed,
            changed(base, {**cell.changes, "seed": seed}, asked),
            folder / "cells" / f"{slug(cell.name)}-seed{seed}",
        )
        for seed in range(base.seed, base.seed + seeds)
        for cell in cells
    ]


def slug(name: str) -> str:
    """A folder name that says what it is, and never leaves its folder."""
    safe = re.sub(r"[^A-Za-z0-9.=+_-]+", "_", name).strip("._") or "cell"
    if safe == name.replace(", ", "_") and len(safe) <= 80:
        return safe
    return f"{safe[:70]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


# -- what there is -------------------------------------------------------------------------------------------------


class Shelf:
    """Models and data of a study: one model in memory, the data of equal settings read once."""

    def __init__(self, load: prepare.Loader, load_classifier: LoadClassifier | None = None) -> None:
        self._load, self._load_classifier = load, load_classifier
        self._models: tuple[str, Models] | None = None
        self._data: dict[str, Data] = {}

    def models(self, recipe: Recipe) -> Models:
        """The models of a recipe; those of another recipe are released first."""
        key = self._key(recipe, ("inputs.", "model.", "judge.adapter", "sampling.by"))
        if self._models is None or self._models[0] != key:
            self._models = None
            self._models = (key, prepare.models_of(recipe, self._load, self._load_classifier))
        return self._models[1]

    def data(self, recipe: Recipe) -> Data:
        """What a run of the recipe reads."""
        prepare.check_start(recipe)
        groups = ("inputs.", "model.", "lengths.", "lesson.", "measure.", "prompts.", "candidates.")
        needed = ("seed", "round", "sampling.max_tokens", *groups)
        key = self._key(recipe, needed)
        if key not in self._data:
            self._data[key] = prepare.data_of(recipe, self.models(recipe))
        return self._data[key]

    @staticmethod
    def _key(recipe: Recipe, prefixes: tuple[str, ...]) -> str:
        return digest({path: value for path, value in settings_of(recipe).items() if path.startswith(prefixes)})


@dataclass(frozen=True)
class Schedule:
    """The plan of a study. A job that cannot even be planned is there with the reason."""

    jobs: list[tuple[Job, list[Planned] | str]]

    def count(self, *states: State) -> int:
        """Stages in one of these states."""
        return sum(planned.state in states for planned in self.stages)

    @property
    def stages(self) -> list[Planned]:
        """All stages of all jobs."""
        return [planned for _, found in self.jobs if not isinstance(found, str) for planned in found]

    def seconds(self, library: Library) -> float | None:
        """Estimate of what is still to be computed; None while some kind of stage was never measured here."""
        parts = [planned.seconds(library) for planned in self.stages]
        return sum(part for part in parts if part is not None) if None not in parts else None


def schedule(jobs: Sequence[Job], shelf: Shelf, library: Library) -> Schedule:
    """The plan of all jobs. Raises StaleRun where a cell's folder holds something else."""
    seen: set[str] = set()
    found: list[tuple[Job, list[Planned] | str]] = []
    for job in jobs:
        try:
            walked = plan(shelf.models(job.recipe), job.recipe, shelf.data(job.recipe), job.folder, library, seen)
            found.append((job, walked))
        except StaleRun:
            raise
        except SpaError as error:
            found.append((job, str(error)))
    return Schedule(found)


# -- doing it ------------------------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job], shelf: Shelf, library: Library, report: Callable[[Job], Report] = lambda job: silent
) -> Iterator[tuple[Outcome, Run | None]]:
    """Run every job; yield its outcome and its run. What fails is an outcome, too, and stops nothing else."""
    varied = list(dict.fromkeys(path for job in jobs for path in job.cell.changes))
    for job in jobs:
        rows, error, run = None, "", None
        try:
            run = Run(job.folder, library)
            rows = align(shelf.models(job.recipe), job.recipe, shelf.data(job.recipe), run, report(job))["rows"]
            rows = [{**row, "spent": run.spent(row["folder"])} for row in rows]
        except SpaError as problem:
            error = str(problem)
        except Exception as problem:  # a framework's own error in one cell
            error = f"{type(problem).__name__}: {problem}"
        folder = job.folder.relative_to(job.folder.parents[1]).as_posix()
        yield Outcome(job.cell.name, job.seed, told(job, varied), rows, error, folder), run


def told(job: Job, varied: Iterable[str]) -> dict[str, Any]:
    """What a cell changes; of one with a recipe of its own, what it has wherever any cell changes something."""
    if RECIPE not in job.cell.changes:
        return dict(job.cell.changes)
    return {path: job.cell.changes.get(path, value_in(job.recipe, path)) for path in varied}


@dataclass(frozen=True)
class Cost:
    """What a study cost: stages counted, and CPU seconds."""

    stages: int  # of all jobs
    distinct: int  # of them, with a key of their own
    computed: int  # of those, computed now
    cpu_total: float  # of this command, everything included
    cpu_computed: float  # of the stages that were computed now
    cpu_distinct: float  # of all distinct stages, whenever they were computed
    cpu_separately: float  # if every job had computed all of its stages

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: round(value, 1) for name, value in vars(self).items()}


def cost(runs: Iterable[Run], library: Library) -> Cost:
    """What the runs of a study cost, by the clocks of their stages. CPU time counts from the start of the process."""
    needed = [(run, title, key) for run in runs for title, key in run.keys.items()]
    cpu = {key: _cpu(library, key, run.makers.get(title, {})) for run, title, key in needed}
    computed = [key for run, title, key in needed if title in run.computed]
    return Cost(
        stages=len(needed),
        distinct=len(cpu),
        computed=len(computed),
        cpu_total=time.process_time(),
        cpu_computed=sum(cpu[key] for key in computed),
        cpu_distinct=sum(cpu.values()),
        cpu_separately=sum(cpu[key] for _, _, key in needed),
    )


def _cpu(library: Library, key: str, made_by: Mapping[str, Any]) -> float:
    book = library.find(key, made_by)
    return (book.spent or {}).get("cpu", 0.0) if book else 0.0
