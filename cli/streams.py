"""JSON lines in and out of a command: a file, or - for standard input and output."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from spa_lite.errors import RunError


@contextmanager
def local(source: str) -> Iterator[Path]:
    """A file's path; what comes on stdin is put into a temporary file first, so that it can be looked at twice."""
    if source != "-":
        yield Path(source)
        return
    with tempfile.NamedTemporaryFile(prefix="stdin-", suffix=".jsonl") as spool:
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
        yield Path(spool.name)


def holds(path: Path, field: str) -> bool:
    """Whether the first record of a JSON-lines file has a field."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
        return field in msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # whoever reads the file next says what is wrong with it


def count_lines(path: Path) -> int:
    """Lines of a text file, for the time left; 0 where that says nothing (compressed or binary files)."""
    if path.suffix != ".jsonl" or not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


@contextmanager
def writer(output: str) -> Iterator[Any]:
    """Write JSON lines to a file, whole or not at all, or to stdout."""
    encoder = msgspec.json.Encoder()
    if output == "-":
        stream: BinaryIO = sys.stdout.buffer
        yield lambda record: stream.write(encoder.encode(record) + b"\n")
        stream.flush()
        return
    path = Path(output)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield lambda record: file.write(encoder.encode(record) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; check the path given with -o") from error
    finally:
        temporary.unlink(missing_ok=True)
