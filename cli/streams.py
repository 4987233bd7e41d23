"""JSON lines in and out of a command: a file, or - for standard input and output."""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from spa_lite import sources
from spa_lite.errors import DataError, RunError


@contextmanager
def local(source: str) -> Iterator[Path]:
    """A file's path; what comes on stdin or through a pipe is put into a temporary file first, so that it can be looked
    at twice. Raises DataError if there is no such file."""
    path = Path(source)
    if source != "-" and not path.is_fifo():
        if not path.exists():
            sources.check(source)
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="stdin-", suffix=".jsonl") as spool:
        with nullcontext(sys.stdin.buffer) if source == "-" else path.open("rb") as stream:
            shutil.copyfileobj(stream, spool)
        spool.flush()
        try:
            yield Path(spool.name)
        except DataError as error:
            name = "standard input" if source == "-" else source
            raise DataError(str(error).replace(spool.name, name)) from error


def holds(path: Path, field: str) -> bool:
    """Whether the first record of a JSON-lines file has a field."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
        return field in msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # whoever reads the file next says what is wrong with it


def count_lines(path: Path) -> int:
    """Lines of a JSON-lines file, for the time left; 0 where that says nothing (other kinds of files, damaged ones)."""
    name = path.name.lower()
    if not path.is_file() or not name.endswith((".jsonl", ".jsonl.gz")):
        return 0
    opener: Any = gzip.open if name.endswith(".gz") else open
    last = b"\n"
    count = 0
    try:
        with opener(path, "rb") as file:
            while chunk := file.read(1 << 20):
                count, last = count + chunk.count(b"\n"), chunk[-1:]
    except (OSError, EOFError, zlib.error):
        return 0  # whoever reads the file next says what is wrong with it
    return count + (last != b"\n")


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
