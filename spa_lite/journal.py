"""JSON lines that grow by blocks, so that what was computed before an interruption is never computed again.

A mark says how far the file is known to be whole: lines, bytes, and a checksum of these bytes. Whatever lies
behind the mark was being written when the program stopped, and is cut off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import files


class Mark(msgspec.Struct, frozen=True):
    """The part of a journal that is whole."""

    lines: int = 0
    bytes: int = 0
    checksum: str = ""


def whole(path: Path, mark: Mark) -> bytes | None:
    """The bytes up to a mark; None if they are not what was marked."""
    content = path.read_bytes()[: mark.bytes] if path.exists() else b""
    return content if not mark.lines or files.digest_bytes(content) == mark.checksum else None


class Journal:
    """Lines of a file. `content` is what is kept of it; whatever the file holds behind that is cut off."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self.path, self.kept = path, content.splitlines()
        self._lines, self._bytes = len(self.kept), len(content)
        self._hash = hashlib.blake2b(content, digest_size=16)
        files.write(path, b"", at=self._bytes, durable=False)

    def append(self, records: Iterable[Any], durable: bool = True) -> Mark:
        """Write records behind what is there. Returns the mark of all lines so far."""
        lines = [msgspec.json.encode(record) + b"\n" for record in records]
        block = b"".join(lines)
        files.write(self.path, block, at=self._bytes, durable=durable)
        self._lines, self._bytes = self._lines + len(lines), self._bytes + len(block)
        self._hash.update(block)
        return self.mark

    @property
    def mark(self) -> Mark:
        """All lines so far."""
        return Mark(self._lines, self._bytes, self._hash.hexdigest())


class Marked(Journal):
    """A journal whose mark lies beside it: every block is durable before the next one is computed.

    `damaged` says that the file was not what the mark told, so that it begins anew.
    """

    def __init__(self, path: Path) -> None:
        self._note = path.with_name(f"{path.name}.mark")
        content = whole(path, self._read())
        self.damaged = content is None
        super().__init__(path, content or b"")

    def _read(self) -> Mark:
        try:
            return msgspec.json.decode(self._note.read_bytes(), type=Mark)
        except (FileNotFoundError, msgspec.DecodeError):
            return Mark()

    def append(self, records: Iterable[Any], durable: bool = True) -> Mark:
        """Write a block and then its mark."""
        mark = super().append(records, durable)
        files.write_atomic(self._note, msgspec.json.encode(mark))
        return mark


class Spool:
    """A marked journal of any length: its lines stay on the disk, and are read again one at a time.

    `lines` says how many there are, `note` is what their writer left with the last block.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._mark_path = path, path.with_name(f"{path.name}.mark")
        stored = self._stored()
        self._hash = _hash_of(path, stored.mark.bytes)
        if stored.mark.lines and self._hash.hexdigest() != stored.mark.checksum:
            stored, self._hash = _Stored(), hashlib.blake2b(digest_size=16)
        self.lines, self.note = stored.mark.lines, stored.note
        self._bytes = stored.mark.bytes
        files.write(path, b"", at=self._bytes, durable=False)

    def _stored(self) -> _Stored:
        try:
            return msgspec.json.decode(self._mark_path.read_bytes(), type=_Stored)
        except (FileNotFoundError, msgspec.DecodeError):
            return _Stored()

    def append(self, block: bytes, lines: int, note: Any = None) -> None:
        """Write a block of whole lines, and then the mark with the note: durable both, or neither counts."""
        files.write(self.path, block, at=self._bytes)
        self._hash.update(block)
        self._bytes, self.lines, self.note = self._bytes + len(block), self.lines + lines, note
        mark = Mark(self.lines, self._bytes, self._hash.hexdigest())
        files.write_atomic(self._mark_path, msgspec.json.encode(_Stored(mark, note)))

    def read(self) -> Iterator[bytes]:
        """The lines so far."""
        with self.path.open("rb") as file:
            yield from islice(file, self.lines)


class _Stored(msgspec.Struct, frozen=True):
    """The mark of a spool, and what was noted with it."""

    mark: Mark = Mark()
    note: Any = None


def _hash_of(path: Path, length: int) -> Any:
    """A running checksum of the first bytes of a file, read in pieces."""
    found = hashlib.blake2b(digest_size=16)
    if length and path.exists():
        with path.open("rb") as file:
            while length and (piece := file.read(min(length, 1 << 20))):
                found.update(piece)
                length -= len(piece)
    return found
