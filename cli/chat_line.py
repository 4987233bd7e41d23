"""What a person types to `chat`: a line editor in a terminal, plain lines elsewhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from spa_lite.cli import render
from spa_lite.interrupt import EXIT_CODES

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

LEAVE = "Ctrl-D or /quit leaves"


def at_terminal() -> bool:
    """Whether somebody sits there who can see a prompt."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def typed(commands: Iterable[str]) -> Iterator[str]:
    """Yield what is typed, a message of one or more lines at a time, until Ctrl-D. Ctrl-C clears the line.

    Enter sends; Alt-Enter (or Esc, Enter) and a backslash before Enter begin a new line; pasted text is one message.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    keys = KeyBindings()
    keys.add("enter")(send)
    keys.add("escape", "enter")(new_line)
    session: PromptSession[str] = PromptSession(
        multiline=True,  # or a pasted text would end at its first line
        key_bindings=keys,
        prompt_continuation="  ",
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        output=None if sys.stdout.isatty() else create_output(always_prefer_tty=True),  # stdout may be a file
    )
    while True:
        try:
            yield _clean(_message(session))
        except KeyboardInterrupt:
            render.aside(LEAVE)
        except EOFError:
            return


def _message(session: PromptSession[str]) -> str:
    """What is typed next. Raises KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D, and SystemExit after SIGTERM.

    An exception from the signal's handler could strike inside the editor, where some are swallowed: it is asked to end.
    """
    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        if session.app.loop is None:  # the editor is not at work, or the terminal too simple for it
            raise SystemExit(EXIT_CODES[signal.SIGTERM])
        session.app.loop.call_soon_threadsafe(leave)

    def leave() -> None:
        if ended and not session.app.is_done:
            session.app.exit(exception=EOFError)

    before = signal.signal(signal.SIGTERM, end)
    try:
        return str(session.prompt("> ", pre_run=leave))
    finally:
        signal.signal(signal.SIGTERM, before)
        if ended:
            raise SystemExit(EXIT_CODES[signal.SIGTERM])


def piped() -> Iterator[str]:
    """Yield the lines of standard input. A line that is not UTF-8 is read as far as it can be, which is said."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            render.note(f"line {number} is not UTF-8; what cannot be read stands as \ufffd")
            yield raw.decode(errors="replace").rstrip("\r\n")


def _clean(text: str) -> str:
    """Text that can be encoded: bytes that are no UTF-8 reach a terminal's reader as lone surrogates."""
    return text.encode(errors="replace").decode()
