"""`spa-lite run --dry-run`: settings, stages, memory and time, without loading or computing anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from spa_lite.cli import render
from spa_lite.errors import ModelError

if TYPE_CHECKING:
    from spa_lite.backend import Batching
    from spa_lite.estimate import Longest, Memory
    from spa_lite.library import Library
    from spa_lite.models import Models
    from spa_lite.plan import Planned
    from spa_lite.prepare import Raw
    from spa_lite.recipe import Recipe
    from spa_lite.shape import Shape
    from spa_lite.stages.workbench import Data

GB = 1e9


def show(recipe: Recipe, sources: dict[str, str], out: Path | None) -> None:
    """Print everything that can be known before the model is there; say what cannot."""
    from spa_lite import prepare
    from spa_lite.backends.outline import outline
    from spa_lite.cli.run import HOME, library_beside
    from spa_lite.fit import batching_of
    from spa_lite.stages.workbench import longest as longest_in

    for path, source in sources.items():
        print(f"{path:<34} {recipe.get(path)!s:<24} {render.safe(source)}")
    raw = _records(recipe)
    models = prepare.models_of(recipe, outline)
    used = models.backend.description
    data = _encoded(recipe, models, raw)
    longest = longest_in(recipe, data) if data else None
    _show_model(models, used)
    sizes = batching_of(recipe)
    if models.backend.shape:
        sizes = _show_memory(recipe, models, models.backend.shape, longest)
        _show_cache(recipe, models.backend.shape, str(used["dtype"]), _asked(recipe, data))
        if recipe.inputs.model:
            _show_elsewhere(recipe, models.backend.shape, longest)
    folder = (out or HOME / prepare.run_name(recipe, models, data)) if data and _has_weights(models) else None
    library = library_beside(folder or HOME / "unnamed")
    planned = _planned(recipe, models, data, folder, library)
    _show_stages(planned, library, folder)
    if not planned or any(stage.seconds(library) is None for stage in planned):
        _show_arithmetic(recipe, models.backend.shape, sizes, data, longest, str(used["device"]))


def _records(recipe: Recipe) -> Raw | None:
    """The records of the run; None if no file is named yet, so that a model can be looked at before there are any."""
    from spa_lite import prepare
    from spa_lite.guards import needs_pairs, needs_pool

    i = recipe.inputs
    needed = needs_pairs(recipe) or needs_pool(recipe) or recipe.prompts.source == "gold"
    if i.model and needed and not (i.seed_pairs or i.prompts or i.gold or i.no_seed_pairs):
        render.note("no data were named, so lengths are the recipe's limits (give --seed-pairs and --prompts)")
        return None
    return prepare.read(recipe)


def _encoded(recipe: Recipe, models: Models, raw: Raw | None) -> Data | None:
    from spa_lite import prepare

    if raw is None:
        return None
    try:
        data = prepare.encode_all(raw, models.backend, recipe)
    except ModelError as error:
        render.note(f"lengths are the recipe's limits: {error}")
        return None
    for line in data.notes:
        render.note(line)
    return data


def _has_weights(models: Models) -> bool:
    try:
        return bool(models.fingerprint)
    except ModelError:
        return False


def _planned(
    recipe: Recipe, models: Models, data: Data | None, folder: Path | None, library: Library
) -> list[Planned] | None:
    """The stages of the run; None where nothing can be looked up, because there is no fingerprint without weights."""
    from spa_lite.plan import plan

    return plan(models, recipe, data, folder, library, set()) if data is not None and folder is not None else None


def _show_model(models: Models, used: dict[str, Any]) -> None:
    parts = [str(used[name]) for name in ("architecture", "device", "dtype") if used.get(name)]
    size = [f"{used['bits']} bits", f"{used['parameters'] / 1e6:,.1f} M parameters"]
    print("\nmodel: " + render.safe(", ".join([models.backend.name, *parts, *size])))


def _show_memory(recipe: Recipe, models: Models, shape: Shape, longest: Longest | None) -> Batching:
    """The memory of each kind of stage; returns the batch sizes that would be chosen."""
    from spa_lite.estimate import Place, memory
    from spa_lite.fit import planned_sizes

    place, free = Place.of(models.backend), models.backend.free_memory()
    sizes = planned_sizes(recipe, shape, place, free, longest)
    found = memory(shape, recipe, sizes, place, longest)
    table = Table(title="memory, estimated, GB", title_justify="left", caption_justify="left")
    table.caption = _verdict(found, free, sizes)
    rows = _parts(found)
    for name in ("stage", *rows[0][1], "peak"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, parts in rows:
        numbers = [f"{size / GB:.2f}" if size else "-" for size in parts.values()]
        table.add_row(stage, *numbers, f"{found.stages[stage] / GB:.2f}")
    render.show(table)
    return sizes


def _asked(recipe: Recipe, data: Data | None) -> int:
    """Prompts over all rounds, those that will be written as well; a round number of them where none were named."""
    from spa_lite.guards import is_written
    from spa_lite.stages.prompts import asked_for

    if is_written(recipe):
        return sum(asked_for(recipe, i) for i in range(1, recipe.rounds + 1))
    return 1000 if data is None else sum(len(share) for share in data.rounds)


def _show_cache(recipe: Recipe, shape: Shape, dtype: str, prompts: int) -> None:
    """What --cache-reference takes on the disk; nothing where it is not asked for."""
    from spa_lite.states import cache_bytes

    size = sum(cache_bytes(recipe, shape, dtype, prompts, i) for i in range(1, recipe.rounds + 1)) // max(
        1, recipe.rounds
    )
    if size:
        print(f"the sampler's states on the disk for {prompts} prompts: at most {size / GB:.2f} GB (--cache-reference)")


ELSEWHERE = {
    "CUDA, bfloat16": ("torch", "cuda", "bfloat16", 16),
    "CUDA, 4 bits": ("torch", "cuda", "bfloat16", 4),
    "Apple GPU, bfloat16": ("mlx", "gpu", "bfloat16", 16),
    "Apple GPU, 4 bits": ("mlx", "gpu", "bfloat16", 4),
}
"""Other ways to run the same model: name -> backend, device, dtype, bits."""


def _show_elsewhere(recipe: Recipe, shape: Shape, longest: Longest | None) -> None:
    """The least that the same run takes on a GPU, for whoever has one to choose. By formula: no GPU was measured."""
    from spa_lite.backend import Batching
    from spa_lite.estimate import Place, memory
    from spa_lite.fit import batching_of

    title = "the least on a GPU, by formula (not measured), peak in GB"
    table = Table(title=title, title_justify="left")
    for name in ("", "train", "train, checkpointed", "sample", "judge"):
        table.add_column(name, justify="right" if name else "left")
    sizes = batching_of(recipe, Batching(score_tokens=1, micro_tokens=1))
    for name, way in ELSEWHERE.items():
        found = memory(shape, recipe, sizes, Place(*way), longest).stages
        least = memory(shape, recipe, replace(sizes, checkpointed=shape.layers - 1), Place(*way), longest).stages
        parts = (found["train"], least["train"], found["sample"], found["judge"])
        table.add_row(name, *[f"{size / GB:.2f}" for size in parts])
    render.show(table)


def _parts(found: Memory) -> list[tuple[str, dict[str, int]]]:
    """What fills the memory of each kind of stage."""
    shared = {"runtime": found.runtime, "base": found.base, "adapters": found.adapters}
    empty = dict.fromkeys(("optimizer", "activations", "logits", "KV cache", "decoding", "scoring"), 0)
    training = {"optimizer": found.optimizer, "activations": found.activations, "logits": found.logits}
    sampling = {"KV cache": found.cache, "decoding": found.decoding}
    own = {"train": training, "sample": sampling, "judge": {"scoring": found.scoring}}
    return [(stage, shared | empty | parts) for stage, parts in own.items()]


def _verdict(found: Memory, free: int | None, sizes: Batching) -> str:
    said = f"tokens per forward: training {sizes.micro_tokens:,}, scoring {sizes.score_tokens:,}; "
    said += f"{sizes.checkpointed} layers checkpointed; {sizes.sample} prompts sampled together"
    if free is None:
        return said
    fits = (
        "it fits" if found.peak <= free else "IT DOES NOT FIT: take a shorter --max-seq-length, or lower what is yours"
    )
    if found.fixed > free:
        fits = "THE WEIGHTS ALONE DO NOT FIT: take a smaller model, or fewer bits on a GPU (below)"
    return f"{said}; {free / GB:.1f} GB are free: {fits}"


def _show_stages(planned: list[Planned] | None, library: Library, folder: Path | None) -> None:
    """A line per stage, with what it would take if stages like it were measured here."""
    if not planned:
        render.note("nothing was looked up: without weights or data a stage has no key, so all are taken to be new")
        return
    states = {"done": "finished", "reuse": "from another run", "compute": "to compute"}
    table = Table(title=f"stages of {render.safe(str(folder))}", title_justify="left")
    for name in ("stage", "state", "prompts or pairs", "time"):
        table.add_column(name, justify="right" if name in {"prompts or pairs", "time"} else "left")
    for stage in planned:
        time = render.duration(stage.seconds(library)) if stage.state == "compute" else ""
        table.add_row(stage.stage.title, states[stage.state], str(stage.stage.size), time or "-")
    render.show(table)
    parts = [stage.seconds(library) for stage in planned]
    if None not in parts:
        total = sum(part for part in parts if part is not None)
        print(f"time: about {render.duration(total)}, from stages measured here before")


def _show_arithmetic(
    recipe: Recipe, shape: Shape | None, sizes: Batching, data: Data | None, longest: Longest | None, device: str
) -> None:
    """Time from the model's arithmetic; without data, for round numbers of them."""
    from spa_lite.effort import cpu_speed, seconds, work
    from spa_lite.guards import needs_pairs

    if shape is None:
        return
    if device != "cpu":
        print("time: not known for a GPU before stages were measured here; a run with --limit-prompts tells")
        return
    prompts, pairs, held_out, answered = _asked(recipe, data), 100, 0, 0
    if data is not None:
        pairs, held_out = len(data.seed_pairs), len(data.held_out_pairs)
        answered = len(data.held_out_prompts) if data.gold else 0
    pairs = pairs if needs_pairs(recipe) else 0
    found = work(shape, recipe, sizes, prompts, pairs, held_out, longest=longest, answered=answered)
    speed = cpu_speed()
    times = {kind: seconds(some, speed) for kind, some in found.items()}
    parts = ", ".join(f"{kind} {render.duration(time)}" for kind, time in times.items() if time >= 1)
    total = render.duration(sum(times.values()))
    used = " and ".join(f"{count} {what}" for count, what in ((pairs, "pairs"), (prompts, "prompts")) if count)
    print(
        f"time on this CPU for {used}: about {total} ({parts}); from "
        f"{speed.flop / GB:.0f} GFLOP/s measured now, good to a factor of two or so, and with texts as long as the "
        "longest"
    )
    others = {recipe.judge.by, recipe.pairing.gap_judge} & {"reward-model", "openai"} if recipe.rounds else None
    if others:
        print(f"not in it: the model that judges ({', '.join(sorted(map(str, others)))})")
