"""Records in other forms: this project's own, TRL's, Alpaca's; as JSON lines, JSON, CSV or Parquet.

A record that cannot be said in the wanted form is left out and counted. Files are whole or not there.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from spa_lite.errors import DataError
from spa_lite.files import move, sync
from spa_lite.reading import Item
from spa_lite.records import Message

Fields = dict[str, Any]

FORMS: dict[str, str] = {
    "own": "what spa-lite reads",
    "prompts": "the same, without answers",
    "trl": "TRL's conversational preferences",
    "alpaca": "instruction and output, the better answer",
}
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins like this for a formula."""


class Unsayable(Exception):
    """A record that has no place in the wanted form; the text says why, in words to count under."""


class Converted(msgspec.Struct):
    """What came of it: records written, left out by reason, and CSV cells that got an apostrophe."""

    written: int = 0
    left_out: Counter[str] = msgspec.field(default_factory=Counter)
    guarded: int = 0
    dropped: Counter[str] = msgspec.field(default_factory=Counter)


# --- forms -----------------------------------------------------------------------------------------------------


def own(item: Item) -> Fields:
    """A record as this project reads it: a prompt, a pair where it is known which answer is better, or candidates."""
    record: Fields = {"id": item.id, "messages": _plain(item.messages)}
    if item.answers:
        record |= _answers(item)
    return record | ({"extra": item.extra} if item.extra else {})


def _answers(item: Item) -> Fields:
    if len(item.answers) == 2 and item.gold and item.answers[0] != item.answers[1]:
        return {"chosen": item.answers[item.gold[0]], "rejected": item.answers[1 - item.gold[0]]}
    if len(item.answers) == 2:
        return {"a": item.answers[0], "b": item.answers[1]}
    if len(item.answers) < 2:
        raise Unsayable("with one answer only")
    said = {} if not item.gold else {"best": item.gold[0]} if len(item.gold) == 1 else {"ranking": list(item.gold)}
    return {"responses": list(item.answers), **said}


def prompts(item: Item) -> Fields:
    """The conversation alone."""
    return {"id": item.id, "messages": _plain(item.messages)} | ({"extra": item.extra} if item.extra else {})


def trl(item: Item) -> Fields:
    """A preference as TRL's trainers take it, all of it turns; a prompt alone where there are no answers."""
    prompt = _plain(item.messages)
    if not item.answers:
        return {"prompt": prompt}
    better, worse = preferred(item)
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
    }


def alpaca(item: Item) -> Fields:
    """`instruction` and `output`, for one turn."""
    if len(item.messages) != 1:
        raise Unsayable("of several turns")
    output = preferred(item)[0] if item.answers else item.extra.get("output", "")
    return {"instruction": item.messages[0].content, "input": "", "output": output}


def preferred(item: Item) -> tuple[str, str]:
    """The best and the worst answer. Raises Unsayable where nobody said which they are."""
    if not item.gold:
        raise Unsayable("without a preference")
    best = item.gold[0]
    if len(item.gold) == 1 and len(item.answers) != 2:
        raise Unsayable("whose worst answer is not known")
    return item.answers[best], item.answers[item.gold[-1] if len(item.gold) > 1 else 1 - best]


def _plain(messages: Sequence[Message]) -> list[Fields]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


FORM: dict[str, Callable[[Item], Fields]] = {"own": own, "prompts": prompts, "trl": trl, "alpaca": alpaca}


def converted(items: Iterable[Item], form: str, told: Converted) -> Iterator[Fields]:
    """Records in a form; what is left out is counted in `told`."""
    for item in items:
        try:
            fields = FORM[form](item)
        except Unsayable as why:
            told.left_out[str(why)] += 1
            continue
        if form in ("trl", "alpaca"):
            told.dropped["id"] += 1
            if item.extra:
                told.dropped["other fields"] += 1
        told.written += 1
        yield fields


# --- files -----------------------------------------------------------------------------------------------------


def ending(path: Path) -> str:
    """Which of ENDINGS a file has. Raises DataError for another."""
    found = next((end for end in ENDINGS if path.name.lower().endswith(end)), None)
    if found is None:
        raise DataError(f"{path}: the ending {path.suffix or '(none)'} is unknown; use one of {', '.join(ENDINGS)}")
    return found


def write(path: Path, records: Iterable[Fields], told: Converted) -> None:
    """Write records in the format of the file's ending, whole or not at all. Raises DataError where that fails.

    CSV and Parquet hold `messages` and other lists and objects as JSON text, CSV guards what would be a formula.
    """
    write_to = {".csv": _csv, ".parquet": _parquet, ".json": _json}.get(ending(path), _jsonl)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with _opened(temporary, path) as stream:
                write_to(stream, records, told)
            sync(temporary)
            move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: record {told.written} cannot be written ({error}); change that value") from error


@contextmanager
def _opened(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    """A binary stream; a compressed one names no file and no time, so that the same records give the same bytes."""
    with temporary.open("wb") as below:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=below, mtime=0) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield below


def write_lines(stream: IO[bytes] | io.RawIOBase, records: Iterable[Fields], told: Converted) -> None:
    """JSON lines into a stream that is open already."""
    encoder = msgspec.json.Encoder()
    for record in records:
        stream.write(encoder.encode(record) + b"\n")


_jsonl = write_lines


def _json(stream: IO[bytes], records: Iterable[Fields], told: Converted) -> None:
    encoder = msgspec.json.Encoder()
    before = b"[\n"
    for record in records:
        stream.write(before + encoder.encode(record))
        before = b",\n"
    stream.write(b"\n]\n" if before == b",\n" else b"[]\n")


COLUMNS = ("id", "prompt", "messages", "chosen", "rejected", "a", "b", "responses", "best", "ranking", "instruction",
           "input", "output", "extra")  # fmt: skip


@contextmanager
def _spooled(records: Iterable[Fields]) -> Iterator[tuple[IO[bytes], list[str]]]:
    """The records in a temporary file, and the columns that any of them has: a table must know them first."""
    seen: set[str] = set()
    encoder = msgspec.json.Encoder()
    with tempfile.TemporaryFile() as spool:
        for record in records:
            seen |= record.keys()
            spool.write(encoder.encode(record) + b"\n")
        spool.seek(0)
        yield spool, [name for name in COLUMNS if name in seen]


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else msgspec.json.encode(value).decode()


def _csv(stream: IO[bytes], records: Iterable[Fields], told: Converted) -> None:
    text = io.TextIOWrapper(stream, "utf-8", newline="", write_through=True)
    table = csv.writer(text)
    with _spooled(records) as (spool, columns):
        table.writerow(columns or ["id"])
        for line in spool:
            record = msgspec.json.decode(line)
            table.writerow([_guarded(_cell(record.get(name)), told) for name in columns])
    text.detach()


def _guarded(cell: str, told: Converted) -> str:
    """A cell that no spreadsheet calculates."""
    if not cell.startswith(FORMULA):
        return cell
    told.guarded += 1
    return f"'{cell}"


def _parquet(stream: IO[bytes], records: Iterable[Fields], told: Converted) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    lists = {"messages": turns, "responses": pyarrow.list_(pyarrow.string())}
    with _spooled(records) as (spool, columns):
        first = msgspec.json.decode(next(spool, b"{}"))
        spool.seek(0)
        # TRL's prompts and answers are turns; ours are texts.
        lists |= {name: turns for name in ("prompt", "chosen", "rejected") if isinstance(first.get(name), list)}
        schema = pyarrow.schema([(name, lists.get(name, pyarrow.string())) for name in columns])
        with pyarrow.parquet.ParquetWriter(stream, schema) as table:
            while lines := spool.readlines(1 << 24):
                block = [msgspec.json.decode(line) for line in lines]
                rows = [{name: _value(name, row.get(name), lists) for name in columns} for row in block]
                table.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _value(name: str, value: Any, lists: Fields) -> Any:
    return value if name in lists or value is None else _cell(value)
