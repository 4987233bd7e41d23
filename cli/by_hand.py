"""`sample`, `judge`, `train`: the steps of a round by hand. Chained on files they give what `run` gives."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import msgspec
import typer

from spa_lite.cli.checks import before_use
from spa_lite.cli.main import app
from spa_lite.cli.options import command, resolve
from spa_lite.cli.run import default_scale
from spa_lite.errors import DataError, ModelError, RecipeError, RunError
from spa_lite.recipe import Recipe

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.records import Judgement, Sample

Config = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings; the command line wins.")]
Named = Annotated[str | None, typer.Option(help="Recipe: spa, spa-official, or a YAML file (default: spa)")]
Scale = Annotated[str | None, typer.Option(help="Scale: lesson, laptop, paper, or a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Override any setting.")]
Round = Annotated[int, typer.Option("--round", min=1, help="Which round this is (1, 2, ...).")]
Output = Annotated[str, typer.Option("-o", "--output", help="File to write; - is stdout.")]

SLIM = ("id", "logratio_a", "logratio_b", "margin", "p", "label", "tie", "tokens_a", "tokens_b")
"""What `judge` says of a pair that came with texts only."""


@command(app, "sample", ["", "inputs", "model", "lengths", "sampling", "batching", "lesson"])
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
    from spa_lite import backends, prepare
    from spa_lite.cli import render
    from spa_lite.sample import sample as sample_step

    r, _ = resolve(given, set_ or [], config, recipe, scale, default_scale)
    if round_ > r.rounds:
        raise RecipeError(f"--round {round_} but rounds is {r.rounds}; raise --rounds")
    raw = prepare.Raw()
    if r.inputs.prompts:
        raw.prompts = prepare.prompts_of(raw, r.inputs.prompts, r.inputs.skip_bad)[: r.inputs.limit_prompts]
    elif r.inputs.model:
        raise RecipeError("no prompts: give --prompts FILE (or - for stdin)")
    else:
        raw.prompts = prepare.lesson(r).prompts[: r.inputs.limit_prompts]
    backend = prepare.models_of(r, backends.load).backend
    data = prepare.encode_all(raw, backend, r)
    for line in data.notes:
        render.note(line)
    _bind(backend, r)
    with render.progress() as report, writer(output) as write:
        for chunk in sample_step(backend, data.rounds[round_ - 1], r, round_, report, f"round {round_} sample"):
            for answered in chunk:
                write(answered)


@command(app, "judge", ["", "inputs", "model", "lengths", "judge", "loss", "batching"])
def judge(
    given: dict[str, Any],
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Pairs (a/b or chosen/rejected) or samples; - is stdin.")
    ],
    round_: Round = 1,
    output: Output = "-",
    full: Annotated[bool, typer.Option("--full", help="Keep texts, ids and sums: what `train` reads.")] = False,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Say which of two answers the model's implicit reward prefers, one JSON line per pair.

    The policy is --adapter-path, else the newest run's adapter, else the built-in model's seed adapter.
    """
    from spa_lite import backends, prepare
    from spa_lite.backend import INIT, POLICY
    from spa_lite.cli import render
    from spa_lite.evaluate import gold_of
    from spa_lite.events import Event
    from spa_lite.judge import judge as judge_step
    from spa_lite.judge import judge_all, no_reference
    from spa_lite.lesson.source import rule

    r, _ = resolve(_with_policy(given), set_ or [], config, recipe, scale, default_scale)
    models = prepare.models_of(r, backends.load)
    with local(source) as path:
        is_samples = holds_samples(path)
        gold: dict[str, str] = {}
        counted: dict[str, int] = {}
        samples: Iterable[Sample] = (
            read_samples(path) if is_samples else read_pairs(path, models.backend, r, gold, counted)
        )
        if r.judge.reference == "lagged":
            raise RecipeError("by hand pi_{i-2} is given as --init-adapter; leave --judge-reference out")
        _bind(models.backend, r)
        if (
            r.judge.by == "implicit"
            and r.judge.reference != "none"
            and not (r.inputs.adapter_path or models.has_other_reference)
        ):
            raise RecipeError(
                "the judge's policy equals its reference; give --adapter-path, --init-model or --judge-reference none"
            )
        expected, scored = count_lines(path), itertools.count(1)
        agree = labelled = done = 0
        with render.progress() as report, writer(output) as write:
            policy = models.scorer(
                POLICY, lambda: report(Event("judge", count := next(scored), max(count, expected), "pairs"))
            )
            judgements: Iterable[Judgement]
            if models.has_other_reference:  # two whole models are never in memory together: one pass each
                judgements = judge_all(list(samples), policy, models.other_alone, r, round_, gold_of(rule))
            else:
                reference = no_reference if r.judge.reference == "none" else models.scorer(INIT)
                judgements = judge_step(samples, policy, reference, r, round_, gold_of(rule))
            for judgement in judgements:
                done += 1
                write(judgement if full or is_samples else {name: getattr(judgement, name) for name in SLIM})
                if judgement.id in gold:
                    labelled += 1
                    agree += gold.pop(judgement.id) == judgement.label
    _say_agreement(agree, labelled, done, counted)


def _say_agreement(agree: int, total: int, done: int, counted: dict[str, int]) -> None:
    from spa_lite.cli import render
    from spa_lite.evaluate import wilson

    skipped = ", ".join(f"{count} {what}" for what, count in counted.items() if count)
    render.note(f"{done} pairs judged" + (f"; {skipped}" if skipped else ""))
    interval = wilson(agree, total)
    if interval:
        render.note(
            f"agreement with the gold labels: {render.percent(interval.to_dict())} % of {total} pairs "
            "(95 % Wilson interval)"
        )


@command(
    app, "train", ["", "inputs", "model", "lengths", "lora", "seed_dpo", "judge", "loss", "refine", "train", "batching"]
)
def train(
    given: dict[str, Any],
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Judgements (from `judge`) or human pairs; - is stdin.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and metrics.jsonl.")],
    round_: Round = 1,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Train an adapter: refined DPO on judgements from --adapter-path, or the seed stage's DPO on human pairs."""
    from spa_lite import backends, data, encode, objective, prepare
    from spa_lite import train as loop
    from spa_lite.backend import POLICY, Lora
    from spa_lite.checkpoint import Checkpoints
    from spa_lite.cli import render
    from spa_lite.estimate import longest_of_rows
    from spa_lite.files import move
    from spa_lite.fit import batching_of, micro_that_fits
    from spa_lite.records import Judgement
    from spa_lite.stages import lora_shape, round_objective
    from spa_lite.train import Example

    r, _ = resolve(given, set_ or [], config, recipe, scale, default_scale)
    with local(source) as path:
        judged = holds(path, "logratio_a")
        if judged and not holds(path, "prompt_ids"):
            raise DataError(f"{source} holds labels without token ids; write it again with `spa-lite judge --full`")
        if judged:
            rows = loop.pairs_of(list(data.iter_jsonl(path, Judgement)), r)
        backend = prepare.models_of(r, backends.load).backend
        if not judged:
            pairs, told = data.read_pairs(path, skip_bad=r.inputs.skip_bad)
            encoded, counts = encode.encode_pairs(
                pairs, backend.tokenizer, context=backend.context, **_limits(r, backend)
            )
            for line in told.lines() + counts.lines()[1:]:
                render.note(line)
            rows = [Example(pair.id, row) for pair, row in encoded]
    if not rows:
        raise DataError(f"{source} holds no pair of different answers, so there is nothing to learn")
    before_use(backend, r)
    if r.batching.micro is None:
        texts = longest_of_rows([example.row for example in rows])
        backend.batching = batching_of(r, micro_that_fits(r, backend, texts))
    shape: Lora | None = None if r.inputs.adapter_path or r.inputs.init_adapter else lora_shape(r)
    start = r.inputs.adapter_path or r.inputs.init_adapter
    backend.bind(POLICY, Path(start) if start else None, shape)
    backend.snapshot()
    out.mkdir(parents=True, exist_ok=True)
    plan = loop.round_plan(r, len(rows)) if judged else loop.seed_plan(r, len(rows))
    loss = round_objective(r, round_, plan.steps) if judged else objective.Dpo(r.loss.beta)
    stage, number = (f"round {round_} train", round_) if judged else ("seed", 0)
    with tempfile.TemporaryDirectory(dir=out, prefix=".train") as unfinished, render.progress() as report:
        saved = Checkpoints(Path(unfinished), tell=render.note)
        summary = loop.train(backend, rows, loss, plan, r, saved, report, stage, number)
        for name in ("metrics.jsonl", "adapter"):
            move(Path(unfinished) / name, out / name)
    print(msgspec.json.encode(summary).decode())
    render.note(f"adapter: {out / 'adapter'}")


def _limits(r: Recipe, backend: Backend) -> dict[str, Any]:
    return {
        "max_prompt_length": r.lengths.max_prompt_length,
        "max_length": min(r.lengths.max_length, backend.context),
        "long_prompts": r.lengths.long_prompts,
    }


def _bind(backend: Backend, r: Recipe) -> None:
    from spa_lite.backend import INIT, POLICY

    before_use(backend, r)
    backend.bind(INIT, Path(r.inputs.init_adapter) if r.inputs.init_adapter else None)
    start = r.inputs.adapter_path or r.inputs.init_adapter
    backend.bind(POLICY, Path(start) if start else None)


def _with_policy(given: dict[str, Any]) -> dict[str, Any]:
    """Without a named policy: the newest run's, else the built-in seed adapter. Says which."""
    from spa_lite.cli import render
    from spa_lite.lesson import MODEL_DIR
    from spa_lite.recipe import SETTINGS, read_yaml

    if any(f"inputs.{name}" in given for name in ("model", "adapter_path", "init_model")):
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


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of a file."""
    from spa_lite import data
    from spa_lite.records import Sample

    return data.iter_jsonl(path, Sample)


def read_pairs(
    path: Path, backend: Backend, r: Recipe, gold: dict[str, str], counted: dict[str, int]
) -> Iterator[Sample]:
    """Pairs of a file as samples with two answers. Fills `gold` (id -> better side) and counts what is skipped."""
    from spa_lite import data, encode
    from spa_lite.records import Pair
    from spa_lite.stages import pair_sample

    reading = data.iter_candidates(path, skip_bad=r.inputs.skip_bad)
    while chunk := list(islice(reading, 256)):
        better = {c.prompt.id: c.gold for c in chunk}
        pairs = [
            Pair(id=c.prompt.id, messages=c.prompt.messages, chosen=c.a, rejected=c.b, extra=c.prompt.extra)
            for c in chunk
        ]
        rows, report = encode.encode_pairs(
            pairs, backend.tokenizer, context=backend.context, keep_identical=True, **_limits(r, backend)
        )
        for what in ("long_prompts", "cut_prompts", "cut_responses", "empty"):
            counted[what.replace("_", " ")] = counted.get(what.replace("_", " "), 0) + getattr(report, what)
        for pair, row in rows:
            side = better[pair.id]
            if side:
                gold[pair.id] = side
            yield pair_sample(pair, row)
    counted["bad records"], counted["repeats"] = reading.report.skipped, reading.report.repeated


@contextmanager
def local(source: str) -> Iterator[Path]:
    """A file's path; what comes on stdin is put into a temporary file first, so that it can be looked at twice."""
    if source != "-":
        yield Path(source)
        return
    with tempfile.NamedTemporaryFile(prefix="stdin-", suffix=".jsonl") as spool:
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
        yield Path(spool.name)


def holds(path: Path, field: str) -> bool:
    """Whether the first record of a JSON-lines file has a field."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
        return field in msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # whoever reads the file next says what is wrong with it


def count_lines(path: Path) -> int:
    """Lines of a text file, for the time left; 0 where that says nothing (compressed or binary files)."""
    if path.suffix != ".jsonl" or not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def holds_samples(path: Path) -> bool:
    """Whether a file holds samples (from `sample`) rather than pairs."""
    return holds(path, "completions")


@contextmanager
def writer(output: str) -> Iterator[Any]:
    """Write JSON lines to a file, whole or not at all, or to stdout."""
    encoder = msgspec.json.Encoder()
    if output == "-":
        stream: BinaryIO = sys.stdout.buffer
        yield lambda record: stream.write(encoder.encode(record) + b"\n")
        stream.flush()
        return
    path = Path(output)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield lambda record: file.write(encoder.encode(record) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; check the path given with -o") from error
    finally:
        temporary.unlink(missing_ok=True)
