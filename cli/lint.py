"""`spa-lite data lint`: what is odd about a file of records, counted by kind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from spa_lite.cli.data import AsJson, Source, anatomy, data

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from spa_lite.lint import Hit, Length, Lint
    from spa_lite.lint.tokens import Anatomy, Mask, Token

LONGEST = 160
"""Characters of an example that are shown."""
EXAMPLES = {"unusable", "stops-short", "overlap"}
"""Kinds whose first example says more than their sorts do."""
ENDS = 150
"""Tokens shown of the beginning and of the end of a long text; --show 0 shows none, --json all."""
SORTS = 6
"""Sorts of a finding that are shown; --json has all."""


@data.command("lint")
def lint_(
    source: Source,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="Check with this model's tokenizer: a folder, a hub name, or lesson."),
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(min=1, help="With --model: tokens of the longest prompt (default: that of run).")
    ] = None,
    template: Annotated[str | None, typer.Option(help="With --model: chat template, a Jinja file or plain.")] = None,
    system: Annotated[
        str | None, typer.Option(help="With --model: system turn for conversations that have none.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --model: run code that comes with it.")
    ] = False,
    show: Annotated[
        int | None, typer.Option(min=0, help="With --model: show the tokens of the first N records (default: 1).")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="FILE", help="Evaluation file: look for its prompts here.")
    ] = None,
    near: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="How alike two texts are, 0 to 1, that are nearly the same.")
    ] = 0.8,
    details: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything that is found as JSON lines.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything is found.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count what is odd about prompts, pairs, candidates, or a run's samples and judgements; change nothing.

    Rows count from 1. A finding is no verdict: look at the rows.
    """
    from spa_lite.cli.render import note
    from spa_lite.lint import lint
    from spa_lite.recipe import SETTINGS

    reader = {"max_prompt_length": max_prompt_length, "template": template, "system": system}
    found = _reader(model, reader | {"trust_remote_code": trust_remote_code or None, "show": show})
    with tempfile.TemporaryFile() as spool:
        report = lint(
            source,
            anatomy=found,
            max_prompt_length=max_prompt_length or SETTINGS["lengths.max_prompt_length"].default,
            against=against,
            near=near,
            show=1 if show is None else show,
            detail=_keeper(spool) if details else lambda hit: None,
        )
        if details:
            note(f"{_write(details, spool, report)} findings written to {details}")
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        _print(report)
    if strict and report.findings:
        raise typer.Exit(1)


def _reader(model: str | None, given: Mapping[str, Any]) -> Anatomy | None:
    """The tokenizer of a model, without its weights."""
    from spa_lite.errors import RecipeError

    if model is None:
        idle = next((name for name, value in given.items() if value is not None), None)
        if idle:
            raise RecipeError(f"--{idle.replace('_', '-')} needs a tokenizer; give --model, too")
        return None
    settings = {name: given[name] for name in ("template", "system")}
    return anatomy(model, trust_remote_code=bool(given["trust_remote_code"]), **settings)


def _keeper(spool: IO[bytes]) -> Callable[[Hit], None]:
    encoder = msgspec.json.Encoder()

    def keep(hit: Hit) -> None:
        spool.write(encoder.encode(hit) + b"\n")

    return keep


def _write(path: Path, spool: IO[bytes], report: Lint) -> int:
    """Write the hits of the report's findings; those that were taken back at the end are left out."""
    from spa_lite.data import write_jsonl
    from spa_lite.lint import Hit

    kinds = {finding.kind for finding in report.findings}
    spool.seek(0)
    hits = (msgspec.json.decode(line, type=Hit) for line in spool)
    return write_jsonl(path, (hit for hit in hits if hit.kind in kinds))


# --- on the screen ---------------------------------------------------------------------------------------------


def _print(report: Lint) -> None:
    from spa_lite.cli.render import note, out, show

    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    note(f"{report.source}: {report.records} records" + (f" ({kinds})" if kinds else ""))
    if report.findings:
        show(_table(report))
    else:
        out.print("nothing odd was found")
    for length in report.lengths:
        out.print(_length(length))
    if report.samples:
        _samples(report.samples)
    for mask in report.shown:
        for line in _mask(mask):
            out.print(line)
    for sentence in report.skipped:
        note(f"not checked: {sentence}")


def _table(report: Lint) -> Table:
    from rich.table import Table

    from spa_lite.cli.render import safe
    from spa_lite.lint import KINDS

    table = Table(caption="share: of all records; rows count from 1", caption_justify="left")
    for name in ("kind", "records", "share %", "what", "first rows"):
        table.add_column(name, justify="right" if name in {"records", "share %"} else "left", overflow="fold")
    for finding in report.findings:
        sorts = [f"{count} {what}" for what, count in list(finding.sorts.items())[:SORTS]]
        more = [f"{len(finding.sorts) - SORTS} other sorts"] if len(finding.sorts) > SORTS else []
        what = KINDS[finding.kind] + (f": {', '.join(sorts + more)}" if sorts else "")
        tells = finding.example and (not finding.sorts or finding.kind in EXAMPLES)
        example = f"; the first: {_short(finding.example)}" if tells else ""
        rows = ", ".join(map(str, finding.rows)) + (", ..." if finding.count > len(finding.rows) else "")
        table.add_row(finding.kind, str(finding.count), f"{100 * finding.share:.1f}", safe(what + example), rows)
    return table


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _length(length: Length) -> str:
    from spa_lite.cli.render import percent

    wins = length.longer_wins
    said = f"the longer one is the better one in {percent(wins)} % of {wins['n']:g} pairs" if wins else "all are equal"
    return (
        f"{length.unit}: better answers {length.better_mean:.1f} (median {length.better_median:g}), "
        f"worse {length.worse_mean:.1f} (median {length.worse_median:g}); {said}"
    )


def _samples(found: Mapping[str, float]) -> None:
    from spa_lite.cli.render import note, out
    from spa_lite.lint.samples import Findings

    out.print(", ".join(f"{name} {value:.6g}" for name, value in found.items()))
    for warning in Findings(**found).warnings():  # type: ignore[arg-type]
        note(f"warning: {warning}")


def _mask(mask: Mask) -> Iterator[Text]:
    """A record as tokens: the prompt dim, what is scored in two alternating colours, control tokens marked."""
    from rich.text import Text

    from spa_lite.cli.render import safe

    yield Text.from_markup(f"[bold]row {mask.row}[/] {safe(mask.id)}, prompt (not scored): {_ends(mask.prompt)}")
    yield _tokens(mask.prompt)
    for place, answer in enumerate(mask.answers, 1):
        yield Text.from_markup(f"answer {place} (scored): {_ends(answer)}")
        yield _tokens(answer)


def _ends(tokens: Sequence[Token]) -> str:
    """Number of tokens, and the first and last ids."""
    ids = [str(token.id) for token in tokens]
    return f"{len(ids)} tokens, ids {' '.join(ids)}" if len(ids) <= 8 else (
        f"{len(ids)} tokens, ids {' '.join(ids[:4])} ... {' '.join(ids[-4:])}"
    )  # fmt: skip


def _tokens(tokens: Sequence[Token]) -> Text:
    """Tokens with a bar between them, so that they can be told apart without colour, too."""
    from rich.text import Text

    from spa_lite.cli.render import safe

    line = Text("  ")
    left_out = range(ENDS, len(tokens) - ENDS)
    for place, token in enumerate(tokens):
        if place in left_out:
            if place == ENDS:
                line.append(f" ... {len(left_out)} more tokens ... |", style="dim")
            continue
        colour = "dim" if not token.scored else ("green" if place % 2 else "cyan")
        style = f"reverse {colour}" if token.special else colour
        line.append_text(Text.from_markup(safe(token.text.replace("\n", "⏎\n  ")), style=style))
        if place + 1 < len(tokens):
            line.append("|", style="dim")
    return line
