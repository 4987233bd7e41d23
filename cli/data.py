"""`spa-lite data`: look at files of prompts and pairs, and convert, divide and sample them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from spa_lite.cli.main import app
from spa_lite.cli.streams import local

if TYPE_CHECKING:
    from rich.table import Table

    from spa_lite.backends.anatomy import Anatomy
    from spa_lite.convert import Converted
    from spa_lite.data import Reading
    from spa_lite.describe import Description
    from spa_lite.reading import Item

data = typer.Typer(no_args_is_help=True, help="Look at files of prompts and pairs; convert, divide and sample them.")
app.add_typer(data, name="data")

LESSON = "lesson"
"""The word for the built-in model."""
LABELLED = "3.3%"
"""The paper's share of labelled prompts."""

Source = Annotated[str, typer.Argument(metavar="FILE", help="A file, hub:owner/name, or - for JSON lines on stdin.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Pass over records that cannot be used, and count them.")]
Seed = Annotated[int, typer.Option(help="Another seed, another choice.")]


@data.command("convert")
def convert(
    source: Source,
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="File to write, in the format of its ending; - is stdout.")
    ],
    to: Annotated[str, typer.Option(metavar="FORM", help="own, prompts, trl or alpaca.")] = "own",
    skip_bad: SkipBad = False,
) -> None:
    """Write a source's records in another form: .jsonl, .jsonl.gz, .json, .csv or .parquet.

    Reads everything spa-lite reads, a run's samples and judgements, and Alpaca's and ShareGPT's files.
    """
    from spa_lite.convert import FORMS, ending
    from spa_lite.errors import RecipeError
    from spa_lite.reading import read

    if to not in FORMS:
        raise RecipeError(f"--to is {to!r}; it is one of {', '.join(FORMS)}")
    if target != "-":
        ending(Path(target))
    reading = read(source, skip_bad=skip_bad)
    told = _write(reading, to, target)
    _say_read(reading)
    _say_converted(told, target)


@data.command("split")
def split(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the parts.")],
    held_out: Annotated[str, typer.Option(metavar="SIZE", help="Prompts for held-out.jsonl: 50, 0.1 or 10%.")] = "10%",
    labelled: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Prompts whose pairs go into seed.jsonl (default: 3.3%)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Files for so many rounds; 0: one prompts.jsonl.")] = 0,
    round_sizes: Annotated[str | None, typer.Option(metavar="N,N,...", help="Prompts of each round.")] = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
) -> None:
    """Divide records into seed.jsonl, prompts.jsonl (or round-1.jsonl, ...) and held-out.jsonl, no prompt in two.

    The choice depends on each prompt's text and --seed, not on the file's order, which is kept.
    """
    from spa_lite.cli.render import note
    from spa_lite.data import conversation_key
    from spa_lite.divide import divide, write_parts
    from spa_lite.reading import read

    sizes = None if round_sizes is None else _sizes(round_sizes)
    with local(source) as path:
        opened = path if source == "-" else source
        labels: dict[bytes, bool] = {}
        reading = read(opened, skip_bad=skip_bad)
        for item in reading:
            key = conversation_key(item.messages)
            labels[key] = labels.get(key, False) or (len(item.answers) > 1 and bool(item.gold))
        division = divide(labels, held_out, labelled or LABELLED, rounds, sizes, seed)
        counts = write_parts(read(opened, skip_bad=skip_bad), division, out)
    _say_read(reading)
    if labelled and not any(labels.values()):
        note("no record says which answer is better, so there is no seed.jsonl")
    for name, count in counts.items():
        note(f"{out / name}.jsonl: {count} records, {division.sizes[name]} different prompts")
    if division.left_over:
        note(f"left over, in no file: {division.left_over} prompts")


def _sizes(text: str) -> list[int]:
    from spa_lite.errors import RecipeError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--round-sizes is {text!r}; give numbers like 100,200,300") from None


@data.command("sample")
def sample(
    source: Source,
    n: Annotated[int, typer.Option("-n", min=1, help="How many records.")],
    output: Annotated[str, typer.Option("-o", "--output", help="File to write; - is stdout.")] = "-",
    seed: Seed = 0,
    skip_bad: SkipBad = False,
) -> None:
    """Draw records at random, the same ones every time, and keep their order.

    A larger -n keeps those of a smaller one.
    """
    from spa_lite.cli.render import note
    from spa_lite.divide import drawn
    from spa_lite.reading import read

    reading = read(source, skip_bad=skip_bad)
    found = drawn(reading, n, seed)
    told = _write(found, "own", output)
    _say_read(reading)
    if len(found) < n:
        note(f"there are only {len(found)} records")
    _say_converted(told, output)


@data.command("stats")
def stats(
    source: Source,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="Count this model's tokens, too: a folder, a hub name, or lesson."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a file holds: records, fields, lengths, turns, roles, labels, repeats."""
    from spa_lite.describe import describe

    found = describe(source, anatomy(model).tokenizer if model else None)
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _print_stats(found)


def anatomy(model: str, **settings: Any) -> Anatomy:
    """The tokenizer of a model, without its weights; `lesson` is the built-in one."""
    from spa_lite.backend import ModelSettings
    from spa_lite.backends.anatomy import Anatomy
    from spa_lite.lesson import MODEL_DIR

    name = str(MODEL_DIR) if model == LESSON and not (Path(model) / "config.json").exists() else model
    return Anatomy(ModelSettings(name, **settings))


class _Screen(io.RawIOBase):
    """A terminal: what it would obey is shown, as an escape that JSON has for it, too."""

    def write(self, line: Any, /) -> int:
        from spa_lite.cli.render import out, safe

        out.print(safe(line.decode()), end="")
        return len(line)


def _write(items: Iterable[Item], form: str, target: str) -> Converted:
    """Write records in a form to a file or to stdout."""
    from spa_lite.convert import Converted, converted, write, write_lines

    told = Converted()
    records = converted(items, form, told)
    if target == "-":
        write_lines(_Screen() if sys.stdout.isatty() else sys.stdout.buffer, records, told)
        sys.stdout.flush()
    else:
        write(Path(target), records, told)
    return told


def _say_read(reading: Reading[Item]) -> None:
    from spa_lite.cli.render import note

    for line in reading.report.lines():
        note(line)


def _say_converted(told: Converted, target: str) -> None:
    from spa_lite.cli.render import note

    note(f"{told.written} written" + ("" if target == "-" else f" to {target}"))
    for why, count in told.left_out.items():
        note(f"{count} left out: {why}")
    if told.dropped:
        note("this form has no place for: " + ", ".join(f"{what} ({count})" for what, count in told.dropped.items()))
    if told.guarded:
        note(f"{told.guarded} cells begin like a formula and got an apostrophe in front, so that no spreadsheet obeys")


def _print_stats(found: Description) -> None:
    from rich.table import Table

    from spa_lite.cli.render import safe, show

    facts = {
        "records": f"{found.records}, usable {found.usable}, repeats {found.repeated}",
        "different prompts": str(found.prompts),
        "unusable": _counts(found.bad),
        "kinds": _counts(found.kinds),
        "other tools' forms": _counts(found.foreign),
        "turns before the answer": _counts(found.turns),
        "roles": _counts(found.roles),
        "answers": _counts(found.answers),
        "preferred": _counts(found.better),
        "answers ended by": _counts(found.ended),
        "other fields": _counts(found.fields),
        "refused by the template": str(found.refused) if found.refused else "",
    }
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if value:
            table.add_row(name, safe(value))
    show(table)
    if found.lengths:
        show(_lengths(found))


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in found.items())


def _lengths(found: Description) -> Table:
    from rich.table import Table

    from spa_lite.describe import QUANTILES

    table = Table(title="lengths", title_justify="left")
    for name in ("what", "unit", "texts", "mean", *QUANTILES):
        table.add_column(name, justify="left" if name in {"what", "unit"} else "right")
    for row in found.lengths:
        quantiles = [f"{row.at[name]:.0f}" for name in QUANTILES]
        table.add_row(row.what, row.unit, str(row.count), f"{row.mean:.1f}", *quantiles)
    return table
