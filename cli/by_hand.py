"""`sample` and `train`: the steps of a round by hand. Chained on files they give what `run` gives."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from spa_lite.cli.checks import before_use
from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Named, Output, Round, Scale, Sets, command, resolve
from spa_lite.cli.policy import bind, limits
from spa_lite.cli.run import default_scale
from spa_lite.cli.streams import holds, local, writer
from spa_lite.errors import DataError, RecipeError

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.recipe import Recipe
    from spa_lite.train import Example


@command(
    app, "sample", ["seed", "rounds", "round_sizes", "inputs", "model", "lengths", "sampling", "batching", "lesson"]
)
def sample(
    given: dict[str, Any],
    round_: Round = 1,
    output: Output = "-",
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Answer the prompts of a round n times with the policy (--adapter-path; none: the bare model)."""
    from spa_lite import backends, guards, prepare
    from spa_lite.cli import render
    from spa_lite.sample import sample as sample_step

    r, _ = resolve(given, set_ or [], config, recipe, scale, default_scale)
    if r.rounds and not (guards.needs_pool(r) and r.candidates.kinds == ["sample"]):
        raise RecipeError(
            f"`sample` draws plain answers to given prompts, and recipe {r.name} has prompts={r.prompts.source} and "
            f"candidates={','.join(r.candidates.kinds)}; `run` does the rest"
        )
    if round_ > r.rounds:
        raise RecipeError(f"--round {round_} but rounds is {r.rounds}; raise --rounds")
    raw = prepare.Raw()
    if r.inputs.prompts:
        raw.prompts = prepare.prompts_of(raw, r.inputs.prompts, r.inputs.skip_bad)[: r.inputs.limit_prompts]
    elif r.inputs.model:
        raise RecipeError("no prompts: give --prompts FILE (or - for stdin)")
    else:
        raw.prompts = prepare.lesson(r).prompts[: r.inputs.limit_prompts]
    models = prepare.models_of(r, backends.load)
    data = prepare.encode_all(raw, models.backend, r)
    for line in data.notes:
        render.note(line)
    with models.sampler() as backend, render.progress() as report, writer(output) as write:
        bind(backend, r)
        for chunk in sample_step(backend, data.rounds[round_ - 1], r, round_, report, f"round {round_} sample"):
            for answered in chunk:
                write(answered)


@command(
    app,
    "train",
    [
        "seed",
        "inputs",
        "model",
        "lengths",
        "lora",
        "seed_dpo",
        "loss",
        "noise",
        "refine",
        "train",
        "batching",
        "judge.identical",
    ],
)
def train(
    given: dict[str, Any],
    source: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Judgements (from `judge`), human pairs, or rated answers; - is stdin."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and metrics.jsonl.")],
    round_: Round = 1,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Train an adapter: refined DPO on judgements from --adapter-path, or the seed stage's DPO on human pairs.

    --loss and --noise change what is minimised; --loss kto also takes single answers with a label, true or false.
    """
    from spa_lite import backends, data, prepare
    from spa_lite import train as loop
    from spa_lite.backend import POLICY, PREVIOUS, Lora
    from spa_lite.checkpoint import Checkpoints
    from spa_lite.cli import render
    from spa_lite.estimate import longest_of_rows
    from spa_lite.files import move
    from spa_lite.fit import sizes_that_fit
    from spa_lite.noise import objective_of
    from spa_lite.records import Judgement
    from spa_lite.stages.workbench import lora_shape

    r, _ = resolve(given, set_ or [], config, recipe, scale, default_scale)
    backends.check_trains(r.inputs.backend, r.inputs.model)
    with local(source) as path:
        judged = holds(path, "logratio_a")
        if judged and not holds(path, "prompt_ids"):
            raise DataError(f"{source} holds labels without token ids; write it again with `spa-lite judge --full`")
        alone = not judged and holds(path, "label") and not holds(path, "chosen")
        if alone and r.loss.kind != "kto":
            raise RecipeError(
                f"{source} holds single answers with a label, which only kto learns from; give --loss kto"
            )
        if judged:
            rows = loop.pairs_of(list(data.iter_jsonl(path, Judgement)), r)
        backend = prepare.models_of(r, backends.load).backend
        if not judged:
            rows = rated(path, r, backend) if alone else labelled(path, r, backend)
    if not rows:
        raise DataError(f"{source} holds no pair of different answers, so there is nothing to learn")
    before_use(backend, r)
    if r.train.cache_reference:
        render.note("--cache-reference is for `spa-lite run`: beside a file of judgements there are no states to use")
    shape: Lora | None = None if r.inputs.adapter_path or r.inputs.init_adapter else lora_shape(r)
    start = r.inputs.adapter_path or r.inputs.init_adapter
    backend.bind(POLICY, Path(start) if start else None, shape)
    backend.snapshot()
    if judged and loop.reference_of(r) == "init":
        backend.bind(PREVIOUS, Path(r.inputs.init_adapter) if r.inputs.init_adapter else None)
    backend.start_training(loop.optimizer_of(r))
    backend.batching = sizes_that_fit(r, backend, longest_of_rows([example.row for example in rows]))
    out.mkdir(parents=True, exist_ok=True)
    stage, number = (f"round {round_} train", round_) if judged else ("seed", 0)
    plan = loop.round_plan(r, len(rows), round_) if judged else loop.seed_plan(r, len(rows))
    loss = objective_of(r if judged else unrefined(r), number, plan)
    with tempfile.TemporaryDirectory(dir=out, prefix=".train") as unfinished, render.progress() as report:
        saved = Checkpoints(Path(unfinished), tell=render.note)
        summary = loop.train(backend, rows, loss, plan, r, saved, report, stage, number)
        for name in ("metrics.jsonl", "adapter"):
            move(Path(unfinished) / name, out / name)
    print(msgspec.json.encode(summary).decode())
    render.note(f"adapter: {out / 'adapter'}")


def labelled(path: Path, r: Recipe, backend: Backend) -> list[Example]:
    """Human pairs as rows. Says what was left out or cut."""
    from spa_lite import data, encode
    from spa_lite.cli import render
    from spa_lite.train import Example

    pairs, told = data.read_pairs(path, skip_bad=r.inputs.skip_bad)
    encoded, counts = encode.encode_pairs(pairs, backend.tokenizer, context=backend.context, **limits(r, backend))
    for line in told.lines() + counts.lines()[1:]:
        render.note(line)
    return [Example(pair.id, row) for pair, row in encoded]


def rated(path: Path, r: Recipe, backend: Backend) -> list[Example]:
    """Answers that are desirable or not as rows of one response. Says what was left out or cut."""
    from spa_lite import data, sft
    from spa_lite.cli import render

    answers, told = data.read_rated(path, skip_bad=r.inputs.skip_bad)
    texts, names = [(one.messages, one.answer) for one in answers], [one.id for one in answers]
    rows, counts = sft.rows_of(texts, backend, r, names)
    for line in told.lines() + counts.lines()[1:]:
        render.note(line)
    good = {one.id: one.desirable for one in answers}
    return [replace(row, desirable=good[row.id]) for row in rows]


def unrefined(r: Recipe) -> Recipe:
    """The recipe for labels of people: those are not searched for noise by their margins, as in the seed stage."""
    return replace(r, noise=replace(r.noise, by="none")) if r.noise.by == "quantile" else r
