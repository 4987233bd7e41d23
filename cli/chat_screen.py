"""How the answers of one turn appear while they are written: one after the other, or side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spa_lite.cli import render
from spa_lite.conversation import Answering, Conversation, Exchange

COLUMN = 38
"""Narrowest column in which an answer can be read."""

Answers = Mapping[str, tuple[Conversation, Answering]]
"""By stage: its conversation, and its answer under way."""


def show(answers: Answers, as_json: bool = False) -> None:
    """Let each stage answer and show it. Raises what an answer raises."""
    if as_json:
        as_lines(answers)
    elif len(answers) > 1 and render.out.is_terminal and render.out.width >= COLUMN * len(answers):
        side_by_side(answers)
    else:
        in_turn(answers)


def in_turn(answers: Answers) -> None:
    """One after the other, behind its name; a single one that goes into a file or a pipe is the answer alone."""
    for stage, (talk, pieces) in answers.items():
        if len(answers) > 1 or render.out.is_terminal:
            render.out.print(Text(f"{render.plain(stage)}: ", style="bold cyan"), end="")
        exchange = heard(pieces, render.piece)
        render.piece("\n")
        for line in remarks(exchange, talk):
            render.aside(f"[{line}]")


def side_by_side(answers: Answers) -> None:
    """A column per stage. They write one after the other: the base in memory is one."""
    cells = {stage: Text() for stage in answers}

    def table() -> Table:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold cyan")
        for stage in cells:
            table.add_column(Text(render.plain(stage)), ratio=1, overflow="fold")
        table.add_row(*[cell.copy() for cell in cells.values()])
        return table

    # A console of its own: the other does not wrap.
    with Live(
        get_renderable=table,
        console=Console(emoji=False, highlight=False),
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        for stage, (talk, pieces) in answers.items():
            exchange = heard(pieces, lambda text, cell=cells[stage]: cell.append(render.plain(text)))  # type: ignore[misc]
            for line in remarks(exchange, talk):
                cells[stage].append(f"\n[{line}]", style="dim")


def as_lines(answers: Answers) -> None:
    """A line of JSON per answer on stdout."""
    for stage, (_, pieces) in answers.items():
        exchange = heard(pieces, lambda text: None)
        found = {name: getattr(exchange, name) for name in ("asked", "answer", "ended", "left_out")}
        sys.stdout.buffer.write(msgspec.json.encode({"stage": stage} | found) + b"\n")
        sys.stdout.buffer.flush()


def heard(pieces: Answering, put: Callable[[str], object]) -> Exchange:
    """Hand on an answer piece by piece, and return what it came to."""
    while True:
        try:
            put(next(pieces))
        except StopIteration as end:
            exchange: Exchange = end.value
            return exchange


def remarks(exchange: Exchange, talk: Conversation) -> list[str]:
    """What one should know of an answer and cannot see in it."""
    said = []
    if exchange.ended == "stopped":
        said.append("stopped")
    elif not exchange.answer.strip():
        said.append("an empty answer")
    if exchange.ended == "cap":
        said.append(f"cut at --max-tokens {talk.sampling.max_tokens}")
    if exchange.ended == "context":
        said.append(f"cut where the model's context of {talk.backend.context} tokens ends")
    if not exchange.counts:
        said.append("this question is not part of the conversation; /regen asks it again")
    if exchange.left_out:
        count = f"{exchange.left_out} oldest exchanges" if exchange.left_out > 1 else "oldest exchange"
        said.append(f"the {count} did not fit into the model's context and had to be left out")
    return said
