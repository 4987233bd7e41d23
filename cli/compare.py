"""`spa-lite compare`: the same prompts answered by several stages of a run, to be read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.eval_work import asked_for
from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Sets, command
from spa_lite.cli.speakers import GROUPS, Speakers, before_they_speak, speakers
from spa_lite.errors import RecipeError, RunError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from spa_lite.models import Models
    from spa_lite.records import Completion, Message, Prompt, Sample

FEW, MORE = 20, 100
"""Prompts of the lesson, unless the user says how many: to read, and to vote on, where many answers are alike."""
CHARACTERS, LINES = 1000, 15
"""What a terminal shows of an answer without --full."""


@command(
    app,
    "compare",
    [
        *GROUPS,
        *("inputs.prompts", "inputs.limit_prompts", "inputs.skip_bad", "lengths.long_prompts", "batching.sample"),
    ],
)
def compare(
    given: dict[str, Any],
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A path, a name, or the beginning of one (default: newest).")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="init, seed, round numbers, last (default: init, the first and the last; --blind: init and the last).",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write the answers to, as JSON lines.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines; with --blind, the result as JSON.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Show long answers whole in the terminal, too.")] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Vote on two stages without seeing which is which.")] = False,
    votes: Annotated[
        Path | None,
        typer.Option(help="--blind: file of the votes, as labelled pairs (default: votes-A-B.jsonl in the run)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where answers and votes are kept (default: the run, or here)."),
    ] = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Answer the same prompts with several stages of a run, side by side. --blind: vote which answers are better.

    Without --prompts: the first 20 held-out prompts of the built-in lesson (--blind: 100). Answers and votes are kept:
    the same command again asks nothing twice.
    """
    import msgspec

    from spa_lite.cli import render
    from spa_lite.cli.streams import writer
    from spa_lite.lock import locked

    check(given, output, as_json, full, blind, votes)
    who = speakers(given, run, set_ or [], config)
    names = stages_of(who, stages, blind)
    prompts = prompts_of(who, MORE if blind else FEW)
    home = out or who.run or Path()
    with locked(folder_in(home)):
        if blind:
            from spa_lite.cli.blind import vote

            vote(who, names, prompts, home, votes, as_json)
            return
        answers = list(zip(*answered(who, names, prompts, home, opened(who, names)), strict=True))
    records = [record(names, samples) for samples in answers]
    if output:
        with writer(str(output)) as write:
            for one in records:
                write(one)
        render.note(f"answers: {output}")
    if as_json:
        for one in records:
            print(msgspec.json.encode(one).decode())
    if not (output or as_json):
        for number, samples in enumerate(answers, 1):
            show(f"{number}/{len(answers)}", samples[0].messages, answers_of(names, samples), cut=not full)
        render.out.print(render.safe(summary(names, answers)))


def check(
    given: Mapping[str, Any], output: Path | None, as_json: bool, full: bool, blind: bool, votes: Path | None
) -> None:
    """Raises RecipeError for options that do not go together."""
    if votes and not blind:
        raise RecipeError("--votes is the file of --blind; give that, too, or leave --votes out")
    if blind and output:
        raise RecipeError("--blind writes votes, not answers: name their file with --votes, and leave -o out")
    if full and (output or as_json or blind):
        raise RecipeError("answers are cut in the plain table only, so --full changes nothing here; leave it out")
    if blind and given.get("inputs.prompts") == "-":
        raise RecipeError("--blind reads the votes from standard input; give --prompts a file")


def stages_of(who: Speakers, words: str | None, blind: bool) -> list[str]:
    """The stages that are meant; for --blind in the order of their making.

    Raises RunError for a run without trained stages, RecipeError for stages that cannot be compared.
    """
    other = who.recipe.inputs.init_model  # then init is no state of the one base
    names = [name for name in who.policies if not (other and name == "init")]
    if len(names) < 2:
        raise RunError(
            f"{who.title} has only the stage {names[0] if names else 'init'}, so there is nothing to compare; "
            "finish a stage of the run, or give --adapter-path"
        )
    usual = [names[0], names[-1]] if blind else [*names[:2], names[-1]]
    found = [who.named(word) for word in words.split(",")] if words is not None else list(dict.fromkeys(usual))
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice:
        raise RecipeError(f"--stages names {twice} twice; name each stage once")
    if other and "init" in found:
        raise RecipeError(f"init is another whole model here ({other}); leave it out of --stages, or use eval --a --b")
    if blind and len(found) != 2:
        raise RecipeError(f"--blind compares two stages, and --stages names {len(found)}; name two")
    return sorted(found, key=names.index) if blind else found


def prompts_of(who: Speakers, usual: int) -> list[Prompt]:
    """The prompts to answer: those of a file, or some of the lesson's held-out ones; never those a run was trained on.

    Raises RecipeError if there are none.
    """
    from spa_lite.cli.eval_head_to_head import read_prompts
    from spa_lite.lesson import source
    from spa_lite.prepare import is_lesson

    r = who.recipe
    limit = r.inputs.limit_prompts if asked_for(who.sources, "inputs.limit_prompts") else None
    if r.inputs.prompts and asked_for(who.sources, "inputs.prompts"):
        return read_prompts(r.inputs.prompts, r.inputs.skip_bad)[:limit]
    if not is_lesson(r):
        raise RecipeError("no prompts to answer: give --prompts FILE (or - for standard input)")
    return source.prompts(r.lesson.split, r.lesson.held_out, 2)[: limit or usual]


# --- answers ---------------------------------------------------------------------------------------------------


def folder_in(home: Path) -> Path:
    """The folder of the answers. Raises RunError if it cannot be made."""
    from spa_lite.cli.eval_work import folder_of

    return folder_of(home / "compare")


def opened(who: Speakers, names: Sequence[str]) -> Models:
    """The one base, loaded; what is to be said about it and about these adapters is said."""
    from spa_lite import backends
    from spa_lite.prepare import models_of

    models = models_of(who.recipe, backends.load)
    before_they_speak(models.backend, who, names)
    return models


def answered(
    who: Speakers, names: Sequence[str], prompts: Sequence[Prompt], home: Path, models: Models
) -> list[list[Sample]]:
    """The answers of each stage to the prompts, read or made; prompts that cannot be answered are said once."""
    from spa_lite.answers import Side, answers
    from spa_lite.cli import render

    found, said = [], []
    with render.progress(keep=False) as report:
        for name in names:
            side = Side(name, who.recipe, who.policies[name])
            samples, notes = answers(side, models, prompts, who.recipe, folder_in(home), report=report, stage=name)
            found.append(samples)
            said += notes
    for line in dict.fromkeys(said):
        render.note(line)
    return found


def record(names: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    """The line of a prompt: the conversation, and by stage the text, how it ended, and its number of tokens."""
    own = {"extra": samples[0].extra} if samples[0].extra else {}
    told = {
        name: {"text": answer.text, "ended": answer.ended, "tokens": len(answer.ids)}
        for name, answer in answers_of(names, samples)
    }
    return {"id": samples[0].id, "messages": samples[0].messages, "answers": told, **own}


def answers_of(names: Sequence[str], samples: Sequence[Sample]) -> list[tuple[str, Completion]]:
    """The one answer of each stage."""
    return [(name, sample.completions[0]) for name, sample in zip(names, samples, strict=True)]


# --- in the terminal -------------------------------------------------------------------------------------------


def show(
    title: str,
    messages: Sequence[Message],
    answers: Sequence[tuple[str, Completion]],
    cut: bool = False,
    on_stderr: bool = False,
) -> None:
    """A prompt, and below it the answers beside their names."""
    from rich.console import Console, Group
    from rich.text import Text

    from spa_lite.cli import render

    stream = render.err if on_stderr else render.out
    asked = [Text(f"{m.role}: ", style="bold").append(render.plain(m.content), style="not bold") for m in messages]
    # The two consoles of `render` leave wrapping to the terminal, which would tear the rows apart.
    console = stream if stream.is_terminal else Console(stderr=on_stderr, emoji=False, highlight=False, width=100)
    console.print(Group(Text(f"\n{title}", style="bold cyan"), *asked, table_of(answers, cut)), soft_wrap=False)


def table_of(answers: Sequence[tuple[str, Completion]], cut: bool) -> Table:
    """A row per answer: its name, and the text as it is, but for control characters."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    shown: dict[str, str] = {}
    for name, answer in answers:
        first = shown.setdefault(answer.text, name)
        cell = _cell(answer, cut) if first == name else Text(f"[the same as {first}]", style="dim")
        table.add_row(Text(name, style="bold"), cell)
    return table


def _cell(answer: Completion, cut: bool) -> Text:
    """An answer, and in brackets what is to be said about it."""
    from rich.text import Text

    from spa_lite.cli import render

    text, left = shortened(answer.text) if cut else (answer.text, 0)
    notes = [
        *([] if text else ["empty"]),
        *([f"{left:,} more characters: --full shows them"] if left else []),
        *([f"stopped at the limit of {len(answer.ids)} tokens"] if answer.ended == "cap" else []),
    ]
    parts = [Text(render.plain(text))] if text else []
    return Text("\n").join([*parts, *(Text(f"[{note}]", style="dim") for note in notes)])


def shortened(text: str) -> tuple[str, int]:
    """The beginning of a long answer, and how many characters are left out."""
    kept = "\n".join(text.split("\n")[:LINES])[:CHARACTERS]
    return kept, len(text) - len(kept)


def summary(names: Sequence[str], answers: Sequence[Sequence[Sample]]) -> str:
    """How many prompts, how long the answers are, and how many are those of the first stage."""
    return f"{len(answers)} prompts; {'; '.join(_lengths(names, answers))}"


def _lengths(names: Sequence[str], answers: Sequence[Sequence[Sample]]) -> Iterator[str]:
    for i, name in enumerate(names):
        own = [samples[i].completions[0] for samples in answers]
        same = sum(one.text == samples[0].completions[0].text for one, samples in zip(own, answers, strict=True))
        mean = sum(len(one.ids) for one in own) / len(own)
        yield f"{name}: {mean:.1f} tokens" + (f", {same} the same as {names[0]}" if i else "")
