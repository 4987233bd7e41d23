"""Ctrl-C and SIGTERM, politely: work that can be kept is finished and kept first; a second signal stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""What a shell expects of a program that ended by a signal: 128 plus its number."""

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Both signals go to this handler inside the block. Outside the main thread nothing can be caught."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def raised() -> Iterator[list[int]]:
    """Inside, both signals raise KeyboardInterrupt. Yields the list that they are noted in."""
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    with handled(stop):
        yield caught


@contextmanager
def deferred(tell: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Inside, the first signal only makes the function that is yielded return True, after calling `tell`.

    Whoever asks that function saves what is worth it; at the end of the block the signal goes to the handler it was
    meant for. A second signal goes there at once.
    """
    caught: list[int] = []
    meant = {number: signal.getsignal(number) for number in EXIT_CODES}

    def hand_on(number: int, frame: FrameType | None) -> None:
        handler = meant[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        else:
            raise KeyboardInterrupt

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            hand_on(number, frame)
        with suppress(RuntimeError):  # the signal came while something was being printed
            tell()

    with handled(remember):
        yield lambda: bool(caught)
    if caught:
        hand_on(caught[0], None)


@contextmanager
def patient(tell: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """For a program that one talks to: Ctrl-C is noted in the list that is yielded, and whoever is at work looks there.

    The list is cleared before each piece of work. A second Ctrl-C in it calls `tell`, a third raises KeyboardInterrupt.
    SIGTERM ends the program at once, with its exit code.
    """
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            raise SystemExit(EXIT_CODES[signal.SIGTERM])
        caught.append(number)
        if len(caught) > 2:
            raise KeyboardInterrupt
        if len(caught) == 2:
            with suppress(RuntimeError):  # the signal came while something was being printed
                tell()

    with handled(remember):
        yield caught
