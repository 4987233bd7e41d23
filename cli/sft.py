"""`spa-lite sft`: an adapter from demonstrations, by supervised fine-tuning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from spa_lite.cli.checks import before_use
from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Named, Scale, Sets, command, resolve
from spa_lite.cli.run import default_scale
from spa_lite.errors import DataError, RecipeError, RunError

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.models import Models
    from spa_lite.recipe import Recipe
    from spa_lite.records import Demonstration
    from spa_lite.store import Run, Stage
    from spa_lite.train import Example

SUMMARY = "sft.json"
OUTPUTS = ("adapter", "metrics.jsonl", SUMMARY)
OWN = (*OUTPUTS, "sft.done.json", "sft.part", "timings.json")
"""What the command leaves in its folder."""
GROUPS = [
    *(f"inputs.{name}" for name in ("model", "backend", "device", "adapter_path", "skip_bad")),
    *("seed", "model", "lengths.max_prompt_length", "lengths.max_length", "lengths.long_prompts", "lora", "sft"),
    *(f"train.{name}" for name in ("schedule", "warmup", "weight_decay", "max_grad_norm", "max_steps")),
    *("train.save_every", "train.save_minutes", "batching.micro_tokens", "batching.score_tokens"),
    *("batching.checkpointed_layers", "lesson.seed_pairs"),
]
SHORT = {"sft.epochs": "--epochs", "sft.batch_size": "--batch-size", "sft.learning_rate": "--learning-rate"}


@command(app, "sft", GROUPS, SHORT)
def sft(
    given: dict[str, Any],
    source: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Prompts with one good answer each; - is stdin; none: the lesson's."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapter, metrics.jsonl and sft.json.")] = Path("sft"),
    held_out: Annotated[
        str,
        typer.Option(metavar="SHARE|FILE", help="What the loss is measured on: a share of the prompts, or a file."),
    ] = "10%",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier command left in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Supervised fine-tuning: teach a model (--adapter-path: an adapter further) to answer as demonstrations do.

    The same command again goes on where an interrupted one was.
    """
    from spa_lite import backends, prepare
    from spa_lite.cli import render
    from spa_lite.lock import locked
    from spa_lite.store import Run

    r, _ = resolve(given, set_ or [], config, recipe, scale, default_scale)
    backends.check_trains(r.inputs.backend, r.inputs.model)
    learn, held = demonstrations(source, held_out, r)
    models = prepare.models_of(r, backends.load)
    rows, measured = (encoded(some, models.backend, r, name) for some, name in ((learn, ""), (held, "held out: ")))
    if not rows:
        raise DataError(f"{source or 'the lesson'}: no demonstration is left, so there is nothing to learn")
    before_use(models.backend, r)
    place, stage = Run(out, head=False), stage_of(r, models, rows, measured)
    with locked(out), render.progress() as report:
        make_room(out, fresh)
        place.report, place.meter = report, lambda: models.backend.peak_memory(reset=True)
        summary = place.once(stage, lambda part: tune(models.backend, r, rows, measured, part, place), models.made_by)
    if as_json:
        print(msgspec.json.encode(summary).decode())
    else:
        tell(summary)
    if place.reused:
        render.note("this is finished; nothing was computed again (--fresh starts over)")
    render.note(f"adapter: {out / 'adapter'}")


def demonstrations(source: str | None, held_out: str, r: Recipe) -> tuple[list[Demonstration], list[Demonstration]]:
    """What is learned from and what is held out, no prompt in both. Says what reading skipped."""
    from spa_lite import data
    from spa_lite.cli import render
    from spa_lite.lesson.source import demonstrations as of_lesson

    def read(name: str) -> list[Demonstration]:
        found, told = data.read_demonstrations(name, skip_bad=r.inputs.skip_bad)
        for line in told.lines():
            render.note(line)
        return found

    if source is None and r.inputs.model:
        raise RecipeError("no demonstrations: give a FILE (or - for stdin) of prompts with one good answer each")
    if source is None:
        render.note("the built-in lesson: answers of careful writers (give a FILE and --model for your own)")
    every = read(source) if source else of_lesson(r.lesson.seed_pairs, r.seed)
    share = share_of(held_out)
    if share is not None:
        learn, held = data.hold_out(every, share, r.seed)
        render.note(f"held out for measuring: {len(held)}")
        return learn, held
    if held_out == source:
        raise RecipeError("--held-out is the FILE itself; leave it out and a tenth of the prompts is held out")
    held = read(held_out)
    taken = {data.conversation_key(one.messages) for one in held}
    kept = [one for one in every if data.conversation_key(one.messages) not in taken]
    if len(kept) < len(every):
        render.note(f"left out because their prompt is held out: {len(every) - len(kept)}")
    return kept, held


def share_of(word: str) -> float | None:
    """`0.1` or `10%` as a number; None for the name of a file."""
    try:
        return float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        return None


def encoded(some: list[Demonstration], backend: Backend, r: Recipe, name: str) -> list[Example]:
    """Demonstrations as rows. Says what was left out or cut."""
    from spa_lite.cli import render
    from spa_lite.sft import rows_of

    rows, told = rows_of([(one.messages, one.answer) for one in some], backend, r, [one.id for one in some])
    for line in told.lines()[1:]:
        render.note(f"{name}{line}")
    return rows


def stage_of(r: Recipe, models: Models, rows: list[Example], held: list[Example]) -> Stage:
    """The work as a stage: all that its result depends on."""
    from spa_lite.stages.workbench import folder_digest
    from spa_lite.store import Stage, digest

    settings = {path: value for path, value in r.for_stage("seed").items() if path.split(".")[0] in MATTER}
    data = {
        "demonstrations": digest([[one.id, one.row] for one in rows]),
        "held out": digest([one.row for one in held]),
    }
    inputs = {"model": models.fingerprint, "adapter": folder_digest(models.policy_adapter) or "none", **data}
    return Stage(".", "sft", OUTPUTS, settings, inputs, len(rows))


SAID = ("steps", "skipped", "first_loss", "loss", "tokens")
"""What the summary says of training; the rest of it is about pairs."""
MATTER = ("seed", "model", "lora", "sft", "train")
"""Groups of settings that change the result; lengths do so by the rows they leave."""


def tune(
    backend: Backend, r: Recipe, rows: list[Example], held: list[Example], part: Path, place: Run
) -> dict[str, Any]:
    """Train the adapter in a folder of unfinished work, and measure the loss on what was held out before and after."""
    from spa_lite.backend import INIT, POLICY
    from spa_lite.checkpoint import Checkpoints
    from spa_lite.cli import render
    from spa_lite.estimate import longest_of_rows
    from spa_lite.events import Report, ticking
    from spa_lite.files import write_json
    from spa_lite.fit import sizes_that_fit
    from spa_lite.sft import likelihood, teach
    from spa_lite.stages.workbench import lora_shape
    from spa_lite.train import optimizer_of

    report: Report = place.heard(place.report)
    start = Path(r.inputs.adapter_path) if r.inputs.adapter_path else None
    backend.bind(INIT, start)
    backend.bind(POLICY, start, None if start else lora_shape(r))
    backend.snapshot()
    backend.start_training(optimizer_of(r))
    longest = longest_of_rows([one.row for one in [*rows, *held]])
    backend.batching = sizes_that_fit(r, backend, longest)
    saved = Checkpoints(part, r.train.save_every, r.train.save_minutes, render.note)
    trained = teach(backend, rows, r, saved, report)
    summary = {"demonstrations": len(rows)} | {name: trained[name] for name in SAID}
    for name, role in (("before", INIT), ("after", POLICY)) if held else ():
        tick = ticking(report, f"held-out loss {name}", len(held), "answers")
        summary[name] = likelihood(backend, [one.row for one in held], role, tick).to_dict()
    write_json(part / SUMMARY, summary)
    return summary


def make_room(out: Path, fresh: bool) -> None:
    """Delete what an earlier command left, if that is wanted. Raises RunError if other work's results lie there."""
    from spa_lite.store import HEAD

    ours = any((out / name).exists() for name in ("sft.done.json", "sft.part"))
    there = next((name for name in (*OUTPUTS, HEAD) if (out / name).exists()), None)
    if there and not ours:
        raise RunError(f"{out / there} is there already and not of `sft`; choose another --out, or move it away")
    for name in OWN if fresh else ():
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def tell(summary: dict[str, Any]) -> None:
    """The result in a line or two."""
    print(f"{summary['demonstrations']} demonstrations, {summary['steps']} steps, last loss {shown(summary['loss'])}")
    for name in ("before", "after"):
        if name in summary:
            found = summary[name]
            print(
                f"held out, {name}: {shown(found['loss'])} nats per token, perplexity {shown(found['perplexity'])} "
                f"({found['answers']} answers)"
            )


def shown(value: float | None) -> str:
    """A number with three digits behind the point."""
    return "-" if value is None else f"{value:.3f}"
