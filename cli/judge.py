"""`spa-lite judge`: which answers are better, by the judge of choice, how sure it is, and how often it is right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Named, Output, Round, Scale, Sets, command, resolve
from spa_lite.cli.policy import GROUPS, JUDGING, bind, with_policy
from spa_lite.cli.run import default_scale
from spa_lite.cli.streams import count_lines, holds, local
from spa_lite.errors import ModelError, RecipeError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from spa_lite.judging import Job, Progress
    from spa_lite.recipe import Recipe


@command(app, "judge", ["seed", *GROUPS, *JUDGING, "loss", "batching.score_tokens", "batching.sample"])
def judge(
    given: dict[str, Any],
    source: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Answers (a/b, chosen/rejected or responses) or samples; - is stdin."),
    ],
    round_: Round = 1,
    output: Output = "-",
    full: Annotated[bool, typer.Option("--full", help="Keep texts, ids and sums: what `train` reads.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Add the log-ratio of every token, as text.")] = False,
    by: Annotated[
        str | None, typer.Option("--by", metavar="FIELD", help="With gold: accuracy for each value of this field, too.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", help="Also write all that is said at the end to this file, as JSON.")
    ] = None,
    replies: Annotated[
        Path | None,
        typer.Option("--replies", metavar="FOLDER", help="Keep a server's replies here, and ask nothing twice."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted call left in FILE.part.")] = False,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Say which answers are better, one JSON line per record, in order; with gold labels also how often that is right.

    The judge is --judge. The policy is --adapter-path, else the newest run's adapter, else the built-in model's seed
    adapter. With -o FILE the same command goes on where it was interrupted; what goes to stdout begins anew.
    """
    from spa_lite import backends, files, judges, judging, prepare
    from spa_lite.cli import render
    from spa_lite.evaluate import gold_of
    from spa_lite.lesson.source import rule

    r, _ = resolve(given, set_ or [], config, recipe, scale, default_scale)
    if r.judge.reference == "lagged":
        raise RecipeError("by hand pi_{i-2} is given as --init-adapter; leave --judge-reference out")
    kind = judges.check(r)
    if fresh and output == "-":
        raise RecipeError("--fresh is about FILE.part, and nothing is kept of what goes to stdout; give -o FILE too")
    if replies and r.judge.by != "openai":
        raise RecipeError(f"--replies keeps what a server says, and --judge {r.judge.by} asks none; leave it out")
    if summary and not summary.absolute().parent.is_dir():
        raise RunError(f"cannot write {summary}: there is no such folder; check the path of --summary")
    with local(source) as path:
        is_samples = holds(path, "completions")
        if kind.policy or full or is_samples:
            r, _ = resolve(with_policy(given, r), set_ or [], config, recipe, scale, default_scale)
            check_policy(r)
            check_reference(r)
        with render.progress() as report:
            job = judging.Job(
                path,
                r,
                prepare.models_of(r, backends.load),
                lambda backend: bind(backend, r),
                samples=is_samples,
                full=full,
                tokens=tokens,
                by=by,
                round_=round_,
                load_classifier=backends.load_classifier,
                gold=gold_of(rule),
                cache=replies,
                report=report,
                expected=count_lines(path),
            )
            done = to_stdout(job) if output == "-" else to_file(job, Path(output), fresh)
    say(job, done)
    if summary:
        found = {"judge": job.judge.name if job.judge else "", "counts": done.counts, "drift": done.drift}
        try:
            files.write_json(summary, found | done.tally.summary())
        except OSError as error:
            raise RunError(f"cannot write {summary}: {error.strerror}; check the path of --summary") from error


def check_policy(r: Recipe) -> None:
    """Raise RecipeError where the implicit reward would compare a policy with itself."""
    from spa_lite.lesson import MODEL_DIR
    from spa_lite.stages.workbench import folder_digest

    i = r.inputs
    if r.judge.by != "implicit" or r.judge.reference == "none":
        return
    one, other = (Path(folder) if folder else None for folder in (i.adapter_path, i.init_adapter))
    if i.init_model:
        same = (one or other) is None and Path(i.init_model).resolve() == Path(i.model or MODEL_DIR).resolve()
    else:
        same = one is None or folder_digest(one) == folder_digest(other)
    if same:
        raise RecipeError(
            "the judge's policy equals its reference; give --adapter-path, --init-model or --judge-reference none"
        )


def check_reference(r: Recipe) -> None:
    """Raise ModelError if the other model is not there, or reads text differently: hours before its turn comes."""
    from spa_lite import backends, models, prepare

    other = r.inputs.init_model
    prepare.check_reference(r.inputs)
    name, _ = backends.choose(r.inputs.backend, r.inputs.model)
    if not other or name not in {"torch", "mlx"}:
        return
    from spa_lite.backends.model_folder import check_name
    from spa_lite.backends.outline import outline

    try:
        check_name(other)
    except ModelError as error:
        raise ModelError(str(error).replace("--model", "--init-model")) from error
    both = prepare.model_settings(r), prepare.model_settings(r, other)
    if all(Path(settings.model).is_dir() for settings in both):  # of what is still to be fetched nothing is known
        ours, theirs = (outline(name, settings) for settings in both)
        models.check_vocabulary(models.vocabulary(ours), theirs, "--init-model")


def to_stdout(job: Job) -> Progress:
    """Each chunk as it comes."""
    from spa_lite import judging

    def write(block: bytes) -> None:
        sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()

    return judging.stream(job, write)


def to_file(job: Job, output: Path, fresh: bool) -> Progress:
    """Into a file, going on with what there is."""
    from spa_lite import judging
    from spa_lite.cli import render
    from spa_lite.unfinished import part_of

    try:
        return judging.to_file(job, output, fresh)
    except KeyboardInterrupt:
        render.note(f"what is judged so far lies in {part_of(output)}: the same command goes on")
        raise


def say(job: Job, done: Progress) -> None:
    """What came out, on stderr: counts in sentences, and tables where there are gold labels."""
    from spa_lite.cli import render
    from spa_lite.judged import NO_GROUP

    tally = done.tally
    skipped = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in done.counts.items() if count)
    render.note(f"{tally.records} pairs judged" + (f"; {skipped}" if skipped else ""))
    for note in notes(job):
        render.note(note)
    if not tally.records:
        return
    drift = f"margins within {done.drift:.2g}, the measured drift" if done.drift else "ties"
    render.note(f"too close to call: {100 * tally.close / tally.records:.1f} % ({drift}); ties: {tally.ties}")
    found = tally.summary()
    if found["first_position"]:
        both = found["order_agreement"]
        shown = f"both orders: {render.percent(both)} % agree" if both else "one order"
        render.note(f"shown in {shown}, the answer shown first wins {render.percent(found['first_position'])} %")
    if tally.unread:
        render.note(f"replies that could not be read: {tally.unread}")
    if found["accuracy"]:
        render.note(
            f"agreement with the gold labels: {render.percent(found['accuracy'])} % of {found['accuracy']['n']} pairs "
            "(95 % Wilson interval; a tie counts half)"
        )
        if job.by and set(found["groups"]) <= {NO_GROUP}:
            render.note(f"no record has a field {job.by}, which --by names")
        for made in tables(job.judge.name if job.judge else "", found):
            show(made)
    if found["calibration"]:
        scale = found["calibration"]
        render.note(f"expected calibration error {scale['ece']:.3f}, Brier score {scale['brier']:.3f}")


def notes(job: Job) -> list[str]:
    """What the judge itself has to say: what it could not read, or not in full."""
    said = list(getattr(job.judge, "notes", ()))
    asked = getattr(job.judge, "asked", None)
    for count, what in (
        (getattr(asked, "too_long", 0), "too long for"),
        (getattr(asked, "unanswered", 0), "refused by"),
    ):
        if count:
            said.append(f"{count} questions were {what} {getattr(asked, 'name', 'the judge')}, and count as not read")
    return said


def tables(judge: str, found: dict[str, Any]) -> list[Table]:
    """The judge beside its baselines; subsets; accuracy by certainty; calibration."""
    from spa_lite.cli import render

    beside = table("who", "right %", "only the judge right", "only this one right", "p (McNemar)")
    beside.add_row(render.safe(judge), render.percent(found["accuracy"]), "", "", "")
    for name, base in found["baselines"].items():
        apart = (str(base["only_judge_right"]), str(base["only_baseline_right"]), chance(base["mcnemar_p"]))
        beside.add_row(name, render.percent(base["accuracy"]), *apart)
    beside.add_row("guessing", f"{100 * found['guessing']:.1f}", "", "", "")
    made = [beside]
    if found["groups"]:
        groups = table("subset", "right %", "pairs")
        for name, share in found["groups"].items():
            groups.add_row(render.safe(name), render.percent(share), str(share["n"]))
        made.append(groups)
    if found["deciles"] and found["accuracy"]["n"] >= 50:
        sure = table("tenth, least sure first", "margin up to", "right %")
        for place, tenth in enumerate(found["deciles"], 1):
            sure.add_row(str(place), f"{tenth['up_to']:.3g}", f"{100 * tenth['accuracy']:.1f}")
        made.append(sure)
    if found["calibration"]:
        scale = found["calibration"]
        bins = table("probability", "pairs", "mean %", "right %")
        for b in scale["bins"]:
            if b["n"]:
                mean, right = f"{100 * b['confidence']:.1f}", f"{100 * b['accuracy']:.1f}"
                bins.add_row(f"{b['low']:.2f} to {b['high']:.2f}", str(b["n"]), mean, right)
        made.append(bins)
    return made


def chance(p: float | None) -> str:
    """A p value."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def table(*columns: str) -> Table:
    """An empty table with a first column of names and others of numbers."""
    from rich.table import Table

    made = Table(caption_justify="left")
    for place, name in enumerate(columns):
        made.add_column(name, justify="right" if place else "left", no_wrap=True)
    return made


def show(made: Table) -> None:
    """A table on stderr: what is judged goes to stdout."""
    from rich.console import Console

    from spa_lite.cli import render

    console = render.err if render.err.is_terminal else Console(stderr=True, emoji=False, highlight=False, width=160)
    console.print(made)
