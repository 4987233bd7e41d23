"""Replies that were paid for once: JSON lines in a file that only grows, found again by a digest of the question."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import msgspec

from spa_lite.records import Record

NAME = "replies.jsonl"

Listed = tuple[tuple[str, float], ...]
"""What a server lists for one token of its reply: the alternatives and their log-probabilities (nats)."""


class Reply(Record, frozen=True, kw_only=True):
    """What a server said. `lists` is empty where it gave no log-probabilities."""

    key: str
    text: str
    lists: tuple[Listed, ...] = ()


class ReplyCache:
    """The replies in a folder's file. Only where each line begins is kept in memory.

    `damaged` counts lines that could not be read, as one that was being written when a program stopped: they are
    passed over, and asked again. Threads may share a cache, and processes may share its file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.damaged = 0
        self._places: dict[str, int] = {}
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            place = 0
            for line in file:
                self._note(line, place)
                place += len(line)
                if not line.endswith(b"\n"):
                    file.write(b"\n")

    def _note(self, line: bytes, place: int) -> None:
        reply = _read(line)
        if reply is None:
            self.damaged += 1
        else:
            self._places[reply.key] = place

    def get(self, key: str) -> Reply | None:
        """The reply to a question, if it is known."""
        with self._lock:
            place = self._places.get(key)
        if place is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place)
            reply = _read(file.readline())
        return reply if reply is not None and reply.key == key else None  # the file may have been changed since

    def add(self, reply: Reply) -> None:
        """Append a reply."""
        line = msgspec.json.encode(reply) + b"\n"
        with self._lock, self.path.open("ab", buffering=0) as file:
            file.write(line)
            self._places[reply.key] = file.tell() - len(line)


def _read(line: bytes) -> Reply | None:
    try:
        return msgspec.json.decode(line, type=Reply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
