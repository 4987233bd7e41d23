"""`spa-lite eval`: how good a model is, with intervals: held-out pairs, head-to-head, benchmarks, annotation files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from spa_lite.cli.eval_work import NAME, Work, folder_of, save, settings, working
from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Named, Scale, Sets, command
from spa_lite.cli.policy import JUDGING
from spa_lite.errors import RecipeError

PANEL = "What to measure"


def _option(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL, **more)


@command(
    app, "eval", ["seed", "inputs", "model", "lengths", "sampling", *JUDGING, "loss", "batching", "measure", "lesson"]
)
def evaluate(
    given: dict[str, Any],
    run: Annotated[
        str | None, _option("--run", help="The run to evaluate: a path, a name, or the beginning of one.")
    ] = None,
    a: Annotated[
        str | None,
        _option("--a", metavar="SIDE", help="A run, a stage of one, an adapter, init, a model, or a file of answers."),
    ] = None,
    b: Annotated[str | None, _option("--b", metavar="SIDE", help="What it is compared with; the same forms.")] = None,
    bench: Annotated[str | None, _option("--bench", metavar="alpaca|mt-bench", help="A public benchmark.")] = None,
    from_annotations: Annotated[
        str | None, _option("--from-annotations", metavar="FILE", help="alpaca: score annotations; needs no model.")
    ] = None,
    generator: Annotated[
        str | None, _option("--generator", metavar="NAME", help="alpaca: whose annotations, if there are several.")
    ] = None,
    annotator: Annotated[
        str | None, _option("--annotator", metavar="NAME", help="alpaca: by which judge, if there are several.")
    ] = None,
    lc_data: Annotated[
        str | None, _option("--lc-data", metavar="FILE", help="alpaca: df_gamed.csv, or hub; for AlpacaEval's LC.")
    ] = None,
    reference_outputs: Annotated[
        str | None, _option("--reference-outputs", metavar="FILE", help="alpaca: answers to beat (default: hub).")
    ] = None,
    package: Annotated[
        bool, _option("--alpaca-eval", help="alpaca: let the alpaca-eval package compute its numbers, too.")
    ] = False,
    questions: Annotated[
        str | None, _option("--questions", metavar="FILE", help="mt-bench: FastChat's question.jsonl.")
    ] = None,
    judge_prompts: Annotated[
        str | None, _option("--judge-prompts", metavar="FILE", help="mt-bench: judge_prompts.jsonl (default: ours).")
    ] = None,
    references: Annotated[
        str | None, _option("--references", metavar="FILE", help="mt-bench: reference answers (default: none).")
    ] = None,
    gsm8k: Annotated[str | None, _option("--gsm8k", metavar="FILE", help="Word problems in GSM8K's form.")] = None,
    multiple_choice: Annotated[
        str | None, _option("--multiple-choice", metavar="FILE", help="Multiple-choice questions.")
    ] = None,
    difficulty: Annotated[
        str | None,
        _option("--difficulty", metavar="FIELD", help="head-to-head: a number of each prompt, for its length control."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results (default: eval/ of the run, or here).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, a line each.")] = False,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Measure a run, a model or a file of answers, with 95 % intervals. Without options: the newest run's stages.

    Held-out pairs: --run, or --model with --adapter-path and --held-out. Head-to-head: --a, --b and --judge.
    """
    import msgspec

    from spa_lite.cli import eval_tables, render

    files = {
        "--from-annotations": from_annotations,
        "--generator": generator,
        "--annotator": annotator,
        "--lc-data": lc_data,
        "--reference-outputs": reference_outputs,
        "--alpaca-eval": package,
        "--questions": questions,
        "--judge-prompts": judge_prompts,
        "--references": references,
        "--gsm8k": gsm8k,
        "--multiple-choice": multiple_choice,
        "--difficulty": difficulty,
    }
    mode = which_mode(a, b, bench, {name for name, value in files.items() if value})
    check_read(mode, given, run)
    if package:
        from spa_lite.benches.alpaca_package import check_installed

        check_installed()
    layers = (given, set_ or [], config, recipe, scale)
    if mode == "annotations":
        from spa_lite.cli.eval_annotations import annotated

        assert from_annotations
        place = folder_of(out or Path("eval"))
        seed = settings(layers, None)[0].seed
        found = [annotated(from_annotations, reference_outputs, lc_data, package, seed, generator, annotator)]
        save(place, found)
    else:
        with working(layers, run, [a, b], out) as work:
            place = work.out
            found = measured(work, mode, a, b, files)
            save(place, found)
    for one in found:
        if as_json:
            print(msgspec.json.encode(one).decode())
            continue
        for table in eval_tables.tables(one):
            render.show(table)
        for line in one["warnings"]:
            render.note(f"warning: {line}")
    render.note(f"results: {place / NAME}")


BENCHES: dict[str, set[str]] = {
    "alpaca": {"--from-annotations", "--generator", "--annotator", "--lc-data", "--reference-outputs", "--alpaca-eval"},
    "mt-bench": {"--questions", "--judge-prompts", "--references"},
}
"""Each benchmark and the options that belong to it."""
KNOWLEDGE = {"--gsm8k", "--multiple-choice"}


def which_mode(a: str | None, b: str | None, bench: str | None, options: set[str]) -> str:
    """What is asked for. Raises RecipeError for options that do not go together."""
    if bench and bench not in BENCHES:
        raise RecipeError(f"there is no benchmark {bench!r}; --bench takes {' or '.join(BENCHES)}")
    if "--from-annotations" in options:
        bench = bench or "alpaca"
        if a or b:
            raise RecipeError("--from-annotations needs no model; leave --a and --b out")
    asked = [what for what in (bench and f"--bench {bench}", *sorted(KNOWLEDGE & options)) if what]
    if bench and len(asked) > 1:
        raise RecipeError(f"{' and '.join(asked)} are separate evaluations; give one at a time")
    for name, its in BENCHES.items():
        odd = sorted(its & options) if bench != name else []
        if odd:
            raise RecipeError(f"{odd[0]} belongs to --bench {name}; give that, too, or leave {odd[0]} out")
    if {"--generator", "--annotator"} & options and "--from-annotations" not in options:
        raise RecipeError("--generator and --annotator choose from a file; give it as --from-annotations")
    if "--difficulty" in options and asked:
        raise RecipeError(f"{asked[0]} has no use for --difficulty; leave it out")
    if bench:
        if b:
            raise RecipeError(f"--bench {bench} is about one model; leave --b out")
        return "annotations" if "--from-annotations" in options else bench
    if KNOWLEDGE & options:
        return "knowledge"
    if (a is None) != (b is None):
        raise RecipeError("a head-to-head needs two sides; give --a and --b")
    if a is None and "--difficulty" in options:
        raise RecipeError("--difficulty is about a head-to-head; give --a and --b, too, or leave it out")
    return "head-to-head" if a else "held-out"


UNREAD: dict[str, tuple[str, ...]] = {
    "held-out": ("inputs.prompts", "judge.by"),
    "head-to-head": (),
    "alpaca": ("inputs.held_out",),
    "mt-bench": ("inputs.prompts", "inputs.held_out", "sampling.temp"),
    "knowledge": ("inputs.prompts", "inputs.held_out", "judge.by", "sampling.temp"),
}
"""Settings that a mode has no use for, although somebody might think so."""


def check_read(mode: str, given: Mapping[str, Any], run: str | None) -> None:
    """Raises RecipeError for a setting that would change nothing."""
    from spa_lite.recipe import SETTINGS

    unread = UNREAD.get(mode, [path for path in given if path != "seed"])
    odd = [str(SETTINGS[path].flag) for path in unread if path in given]
    if mode == "annotations" and run:
        odd.append("--run")
    if odd:
        what = {
            "held-out": "measuring held-out pairs",
            "knowledge": "a knowledge check",
            "annotations": "--from-annotations",
        }
        raise RecipeError(
            f"{what.get(mode, f'--bench {mode}')} does not read {odd[0]}; leave it out (or give --a and --b)"
        )


def measured(work: Work, mode: str, a: str | None, b: str | None, files: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of a mode. What it needs is imported here, so that scoring a file loads no framework."""
    if mode == "held-out":
        from spa_lite.cli.eval_held_out import held_out

        return [held_out(work)]
    if mode == "head-to-head":
        from spa_lite.cli.eval_head_to_head import head_to_head

        assert a
        assert b
        return [head_to_head(work, a, b, files["--difficulty"])]

    from spa_lite.cli import eval_benches as benches

    if mode == "alpaca":
        options = files["--reference-outputs"], files["--lc-data"], files["--alpaca-eval"]
        return [benches.alpaca_bench(work, a, *options)]
    if mode == "mt-bench":
        return [benches.mt_bench_bench(work, a, files["--questions"], files["--judge-prompts"], files["--references"])]
    sides = benches.before_and_after(work, a, b)
    checks = {"--gsm8k": benches.gsm8k, "--multiple-choice": benches.multiple_choice}
    return [check(work, sides, files[name]) for name, check in checks.items() if files[name]]
