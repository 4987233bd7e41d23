"""`spa-lite explain`: one pair, token by token and term by term."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Named, Round, Scale, Sets, command, resolve
from spa_lite.cli.policy import GROUPS, JUDGING, bind, limits, with_policy
from spa_lite.cli.run import default_scale
from spa_lite.cli.streams import holds, local
from spa_lite.errors import DataError, RecipeError, RunError

if TYPE_CHECKING:
    from spa_lite.explain import Answer, Explanation, Term
    from spa_lite.recipe import Recipe

BARS = "▁▂▃▄▅▆▇█"
ABOVE, BELOW = "bold on #1d4ed8", "underline on #b45309"
"""Tokens that the policy likes better than the reference does, and less: blue and orange, bold and underlined."""


SIZES = ["batching.micro_tokens", "batching.score_tokens"]


@command(app, "explain", ["seed", *GROUPS, *JUDGING, "loss", "refine", *SIZES])
def explain(
    given: dict[str, Any],
    source: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Pairs, or judgements: of a run (rounds/N/judgements.jsonl), or others."),
    ],
    row: Annotated[int | None, typer.Option(min=1, help="Which record, from 1; blank lines do not count.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write it as a web page, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    round_: Round = 1,
    config: Config = None,
    recipe: Named = None,
    scale: Scale = None,
    set_: Sets = None,
) -> None:
    """Explain one pair: which tokens earned the reward, every term of the loss, and why it was flagged or not.

    For a file of a run all numbers are the run's. For other files the policy is --adapter-path, else the newest run's
    adapter, else the built-in model's seed adapter.
    """
    import msgspec

    from spa_lite.cli import render
    from spa_lite.explain import html as as_html
    from spa_lite.files import write_atomic

    if row is None:
        raise RecipeError(f"which pair of {source}? Give --row N; the first record is 1")
    if html and (html.is_dir() or not html.absolute().parent.is_dir()):
        reason = "it is a folder" if html.is_dir() else "there is no such folder"
        raise RunError(f"cannot write {html}: {reason}; check the path of --html")
    with local(source) as path:
        found = _explained(path, source, row, given, (round_, config, recipe, scale, set_))
    if html:
        write_atomic(html, as_html(found).encode())
        render.note(f"page: {html}")
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(found)


def _explained(path: Path, source: str, row: int, given: dict[str, Any], options: tuple[Any, ...]) -> Explanation:
    """A pair of a run as the run saw it, unless a model is named; any other under the policy that is named or found."""
    from spa_lite import backends, explain_sources, prepare
    from spa_lite.cli import render

    named = any(f"inputs.{name}" in given for name in ("model", "adapter_path", "init_adapter", "init_model"))
    if explain_sources.place_of(path) and not named:
        changes = {p: v for p, v in resolve_line(given).items() if p.startswith(("inputs.", "model.", "batching."))}
        if len(changes) < len(given) or any(options[1:]):
            raise RecipeError("the settings of a run's pair are the run's; name a model to try others")
        return explain_sources.explain_run(path, row, lambda r: prepare.models_of(r, backends.load).backend, changes)
    round_, config, recipe, scale, set_ = options
    settings = set_ or [], config, recipe, scale, default_scale
    r, _ = resolve(with_policy(given, resolve(given, *settings)[0]), *settings)
    check(r)
    backend = prepare.models_of(r, backends.load).backend
    bind(backend, r)
    judged = holds(path, "logratio_a")
    if judged and not holds(path, "prompt_ids"):
        raise DataError(f"{source} holds labels without token ids; write it again with `spa-lite judge --full`")
    if judged:
        givens = explain_sources.given_judgements(path)
    else:
        givens = explain_sources.given_candidates(path, backend, limits(r, backend), r.inputs.skip_bad)
    render.note(f"policy: {r.inputs.adapter_path or 'the model itself'}")
    return explain_sources.explain_pair(givens, source, row, backend, r, round_)


def resolve_line(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the command line as their values."""
    from spa_lite.recipe import SETTINGS, read_text

    return {path: read_text(SETTINGS[path], v) if isinstance(v, str) else v for path, v in given.items()}


def check(r: Recipe) -> None:
    """Policy and reference must differ, and must be states of one model; other judges have no token's credit."""
    if r.judge.by != "implicit":
        raise RecipeError(f"explain shows the implicit reward, not --judge {r.judge.by}; leave --judge out")
    if r.inputs.init_model:
        raise RecipeError(
            "explain needs policy and reference on one model; leave --init-model out, give --init-adapter"
        )
    if r.judge.reference == "lagged":
        raise RecipeError("by hand pi_{i-2} is given as --init-adapter; leave --judge-reference out")
    if r.judge.reference != "none" and not r.inputs.adapter_path:
        raise RecipeError("the policy equals its reference; give --adapter-path or --judge-reference none")


def _show(e: Explanation) -> None:
    from rich.table import Table
    from rich.text import Text

    from spa_lite.cli import render

    safe, out = render.safe, render.out
    out.print(f"[bold]pair {safe(e.id)}[/] (record {e.row} of {safe(e.source)})")
    out.print(safe(f"policy: {e.policy}; reference: {e.reference}; chosen by: {e.labelled_by}"))
    for turn in e.messages:
        out.print(f"[bold]{safe(turn.role)}:[/] {safe(turn.content)}")
    span = [value for answer in (e.chosen, e.rejected) for value in answer.running]
    for name, answer in (("chosen", e.chosen), ("rejected", e.rejected)):
        out.print(
            f"\n[bold]{name}[/] (answer {answer.letter}, {answer.tokens} tokens), log-ratio {answer.logratio:+.4f}"
        )
        out.print(_coloured(answer, e.scale) if answer.credits else Text.from_markup(safe(answer.text)))
        if answer.credits:
            out.print(f"sum so far: {spark(answer.running, min(span), max(span))}")
    if e.telling():
        table = Table(title="the most telling tokens (nats)", title_justify="left")
        for column in ("token", "answer", "place", "log π", "log π_ref", "log-ratio"):
            table.add_column(column, justify="left" if column in {"token", "answer"} else "right")
        for name, place, c in e.telling():
            numbers = f"{c.policy:.3f}", f"{c.reference:.3f}", f"{c.logratio:+.3f}"
            table.add_row(safe(c.piece.replace("\n", "↵").replace(" ", "␣")) or "·", name, str(place), *numbers)
        render.show(table)
    for title, terms in (("how it is judged", e.judged), ("the loss, and the flag", e.trained)):
        if terms:
            render.show(_terms(title, terms))
    for said in (*e.why, *e.notes):
        out.print(safe(said))


def _coloured(answer: Answer, scale: float) -> Any:
    """Tokens whose credit is a tenth of the full colour's or more, marked."""
    from rich.text import Text

    from spa_lite.cli import render

    text = Text()
    for c in answer.credits:
        piece = Text.from_markup(render.safe(c.piece or "·"), emoji=False)
        if abs(c.logratio) >= 0.1 * scale > 0:
            piece.stylize(ABOVE if c.logratio > 0 else BELOW)
        text.append_text(piece)
    return text


def _terms(title: str, terms: tuple[Term, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("term", "formula", "where", "chosen", "rejected", "pair"):
        table.add_column(column, justify="left" if column in {"term", "formula", "where"} else "right")
    for t in terms:
        of_pair = t.chosen is None and t.rejected is None
        table.add_row(
            t.name,
            t.formula,
            t.where,
            *[t.shown(which) if of_pair == (which == "value") else "" for which in ("chosen", "rejected", "value")],
        )
    return table


def spark(values: list[float], low: float, high: float, width: int = 60) -> str:
    """A line of bars between `low` and `high`, and the last value as a number."""
    places = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)] if len(values) > width else values
    room = (high - low) or 1.0
    return "".join(BARS[round((len(BARS) - 1) * (v - low) / room)] for v in places) + f" {values[-1]:+.4f}"
