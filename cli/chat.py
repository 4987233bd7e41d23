"""`spa-lite chat`: talk to a policy, or to several stages of a run at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Sets, command
from spa_lite.cli.speakers import GROUPS, Speakers, opened, speakers
from spa_lite.errors import DataError, RecipeError, RunError, SpaError

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.conversation import Answering, Conversation

COMMANDS = {
    "/regen": "another answer to the last question",
    "/reset": "forget the conversation; the system turn stays",
    "/system TEXT": "set the system turn of all answers to come; without TEXT: none",
    "/save FILE": "the conversation as JSON lines; /save! FILE replaces a file",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D",
}
WITH_TEXT = {"/system", "/save", "/save!"}
NAMES = [*(name.split()[0] for name in COMMANDS), "/save!"]
KEYS = (
    "Enter sends; Alt-Enter, or Esc and then Enter, or a backslash before Enter begins a new line. "
    "Ctrl-C stops an answer. A message that begins with // is sent with one / less."
)


@command(app, "chat", [group for group in GROUPS if group != "lengths.max_prompt_length"])
def chat(
    given: dict[str, Any],
    run: Annotated[str | None, typer.Argument(help="A run, by name or folder (default: the newest one).")] = None,
    round_: Annotated[
        str | None, typer.Option("--round", metavar="N", help="Which stage of the run: init, 0 (seed), 1, ... or last.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="A,B,...", help="Several stages at once: init,1,3.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answers on stdout as JSON lines.")] = False,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Talk to the policy of a run, to a model with its adapter, or to several stages side by side.

    At a terminal /help lists the commands and Ctrl-D leaves. Without one each line of standard input is a message.
    """
    from spa_lite.cli.chat_line import at_terminal, piped, typed
    from spa_lite.interrupt import patient

    who = speakers(given, run, set_ or [], config)
    stages = chosen(who, round_, compare)
    talks = conversations(who, stages)
    live = at_terminal()
    greet(who, talks, live)
    listening: AbstractContextManager[list[int]] = patient(tell_impatient) if live else nullcontext([])
    with listening as presses:
        failed = Room(talks, presses, as_json).hear(typed(NAMES) if live else piped())
    if failed and not live:
        raise typer.Exit(1)


def chosen(who: Speakers, round_: str | None, compare: str | None) -> list[str]:
    """The names of the stages that are asked for; without a word the last one."""
    if compare is not None:
        if round_ is not None:
            raise RecipeError("--round and --compare both say who speaks; keep one of them")
        words = [word for word in compare.split(",") if word.strip()]
        if not words:
            raise RecipeError("--compare names no stage; write it like --compare init,1,last")
        return list(dict.fromkeys(who.named(word) for word in words))
    if round_ is not None and "policy" in who.policies:
        raise RecipeError("--round and --adapter-path both say who speaks; keep one of them")
    if round_ is not None and who.run is None:
        raise RecipeError("--round is a stage of a run, and there is no run here: name one, or leave --round out")
    return [who.named("last" if round_ is None else round_)]


def conversations(who: Speakers, stages: Sequence[str]) -> dict[str, Conversation]:
    """A conversation with each stage, on one base in memory."""
    from spa_lite.backend import Sampling
    from spa_lite.conversation import Conversation

    r = who.recipe
    # The recipe's system turn begins each conversation. The tokenizer must not add it: /system may take it away.
    bare = replace(who, recipe=replace(r, model=replace(r.model, system=None)))
    backend: Backend = opened(bare, stages)
    sampling = Sampling(r.sampling.temp, r.sampling.top_p, r.sampling.max_tokens)
    talks = {stage: Conversation(backend, stage, sampling, r.seed) for stage in stages}
    for talk in talks.values():
        talk.instruct(r.model.system)
    return talks


def greet(who: Speakers, talks: dict[str, Conversation], live: bool) -> None:
    """Say who speaks, on what, and how to leave."""
    from spa_lite.cli import render

    backend = next(iter(talks.values())).backend
    base = Path(who.recipe.inputs.model).name if who.recipe.inputs.model else "the built-in model"
    where = f"{backend.name}, {backend.description['device']}"
    of = f"{who.title}: " if who.run else ""
    render.note(f"{of}{', '.join(talks)} on {base} ({where}){'; /help lists the commands, Ctrl-D leaves' * live}")


def tell_impatient() -> None:
    """What the second Ctrl-C during one answer says."""
    from spa_lite.cli import render

    render.aside("[stopping at the next token; Ctrl-C once more leaves]")


@dataclass
class Room:
    """Everybody who is spoken to. `presses`: the Ctrl-Cs since the last question."""

    talks: dict[str, Conversation]
    presses: list[int]
    as_json: bool = False

    def hear(self, lines: Iterator[str]) -> bool:
        """Answer message after message until the end or /quit. Returns whether one of them failed."""
        from spa_lite.cli import render

        failed = False
        for line in lines:
            if line.strip() == "/quit":
                break
            try:
                self.take(line)
            except SpaError as error:
                failed = True
                render.fail(str(error))
        return failed

    def take(self, line: str) -> None:
        """One message or command. Raises SpaError, and then nothing has changed."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            self.obey(*[*text.split(maxsplit=1), ""][:2])
        elif text:
            self.answer(lambda talk: talk.ask(text.removeprefix("/") if text.startswith("//") else line, self.stop))

    def stop(self) -> bool:
        """Whether Ctrl-C was pressed since the last question."""
        return bool(self.presses)

    def obey(self, word: str, text: str) -> None:
        """Do what a command says."""
        from spa_lite.cli import render

        if word not in NAMES:
            near = difflib.get_close_matches(word, NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            raise DataError(f"there is no command {word}; {hint} (a message may begin with / if it is written //)")
        if text and word not in WITH_TEXT:
            raise DataError(f"{word} stands alone; {text!r} was not read")
        if word == "/regen":
            self.answer(lambda talk: talk.again(self.stop))
        elif word == "/reset":
            for talk in self.talks.values():
                talk.exchanges = []
            render.aside("[a new conversation]")
        elif word == "/system":
            for talk in self.talks.values():
                talk.instruct(text or None)
            render.aside(f"[system turn: {text or 'none'}]")
        elif word in {"/save", "/save!"}:
            self.save(text, replace=word == "/save!")
        else:
            for name, about in COMMANDS.items():
                render.note(f"{name:<13} {about}")
            render.note(KEYS)

    def save(self, file: str, replace: bool) -> None:
        """Write the conversations of all who have said something."""
        from spa_lite.cli import render

        spoken = [talk for talk in self.talks.values() if talk.answered]
        if not spoken:
            raise RunError("there is no answer yet to save: ask something first")
        done = write([talk.record() for talk in spoken], file, replace)
        silent = ", ".join(stage for stage, talk in self.talks.items() if not talk.answered)
        render.aside(f"[saved: {file}, {done}{silent and f'; no answer yet: {silent}'}]")

    def answer(self, ask: Callable[[Conversation], Answering]) -> None:
        """Let all answer. If one of them cannot, none has: they stay at the same turn."""
        from spa_lite.cli.chat_screen import show

        self.presses.clear()
        before = {stage: talk.exchanges for stage, talk in self.talks.items()}
        try:
            show({stage: (talk, ask(talk)) for stage, talk in self.talks.items()}, self.as_json)
        except SpaError:
            for stage, talk in self.talks.items():
                talk.exchanges = before[stage]
            raise


def write(records: Sequence[dict[str, Any]], file: str, replace: bool) -> str:
    """Write conversations to a file, a line each; returns what was done in words. Raises RunError in one sentence."""
    import msgspec

    from spa_lite.files import write_atomic

    if not file:
        raise RunError("/save needs a file: /save talk.jsonl")
    if not file.endswith(".jsonl"):
        raise RunError(f"cannot save {file}: name a .jsonl file, which is what the other commands read")
    try:
        path = Path(file).expanduser()
        existed = path.exists()
        if path.is_dir() or (existed and not replace):
            mend = "" if path.is_dir() else f", or replace it with /save! {file}"
            raise RunError(f"{file} exists; name another file{mend}")
        write_atomic(path, b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    except (OSError, ValueError, RuntimeError) as error:  # a bad name, an unknown ~user
        raise RunError(f"cannot save {file}: {getattr(error, 'strerror', None) or error}; name another file") from error
    count = f"{len(records)} conversation" + ("s" if len(records) > 1 else "")
    return f"{count}, replacing what was there" if existed else count
