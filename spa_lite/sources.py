"""Where records come from: files, standard input, a hub. Yields untyped fields with the place each was found.

Nothing here knows what a prompt or a pair is; see `spa_lite.data` for that. Lines are read one at a time, so
that a file of any length needs the memory of its longest line. Parquet, CSV and hub data sets go through the
`datasets` library, imported only then. The network is touched for a name that starts with `hub:` and for
nothing else.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from spa_lite.errors import DataError

Source = str | Path
Fields = dict[str, Any]

HUB = "hub:"
KNOWN = ".jsonl, .jsonl.gz, .json, .parquet, .csv"
PROBE_SECONDS = 8.0
"""How long to look for the hub before saying that it cannot be reached: its own library tries for half a minute."""

_BOM = b"\xef\xbb\xbf"
_HUB_NAME = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<part>[\w.-]+))?(?::(?P<split>[\w.\[\]:%+-]+))?")
_FIELDS = msgspec.json.Decoder(dict[str, Any])


class BadRecord(Exception):
    """One record that cannot be used. `kind` is what it is counted under; the text names the mend, not the place."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Place(NamedTuple):
    """Where a record was found; both numbers count from 1, and a number that is not known is 0."""

    source: str
    line: int = 0
    record: int = 0

    def __str__(self) -> str:
        if self.line and self.record:
            return f"{self.source}, line {self.line} (record {self.record})"
        return f"{self.source}, line {self.line}" if self.line else f"{self.source}, record {self.record}"


class Entry(NamedTuple):
    """One record as it was found: still JSON, or already taken apart by another library."""

    place: Place
    value: bytes | Fields


def fields(entry: Entry) -> Fields:
    """The fields of an entry. Raises BadRecord if it is no JSON object."""
    if isinstance(entry.value, dict):
        return entry.value
    try:
        return _FIELDS.decode(entry.value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise why_not_json(entry.value, error) from None


def why_not_json(raw: bytes, error: Exception) -> BadRecord:
    """Say in words why a line is no JSON object."""
    cut = not raw.endswith(b"\n")  # only the last line of a file can lack its end
    if b"\0" in raw:
        return BadRecord("nul", "the line holds a NUL character; remove it, or restore the file")
    try:
        text = raw.decode()
    except UnicodeDecodeError as wrong:
        if not (cut and wrong.reason == "unexpected end of data"):
            return BadRecord("utf-8", f"byte {wrong.start + 1} of the line is not UTF-8; save the file as UTF-8")
        text = ""
    if isinstance(error, msgspec.ValidationError) and "Expected `object`" in str(error):
        return BadRecord("object", 'the line is JSON but not an object; write {"prompt": ...}, one object per line')
    with contextlib.suppress(ValueError, RecursionError):
        # Python's own reader is laxer than JSON in exactly these points.
        json.loads(text)
        return BadRecord(
            "json", "NaN, Infinity, a huge number or half a surrogate pair is not JSON; write null or the character"
        )
    if cut and (not text or "truncated" in str(error)):
        return BadRecord("cut", "the last line is cut off in the middle; write the file again or delete that line")
    reason = str(error).removeprefix("JSON is malformed: ")
    return BadRecord(
        "json", f"not valid JSON ({reason}); write one object per line, or name the file .json if it is a list"
    )


# --- choosing a reader -----------------------------------------------------------------------------------------


def check(source: Source) -> None:
    """Refuse what can be refused before reading. Raises DataError for a path or a hub name that cannot work."""
    name = str(source)
    if name == "-":
        return
    if name.startswith(HUB):
        _hub_parts(name)
        return
    path = Path(source)
    try:
        if not path.exists():
            raise DataError(f"{name}: there is no such file; {_guess(name)}")
        if path.is_dir():
            raise DataError(f"{name}: this is a folder; name a file in it ({KNOWN})")
        if path.is_file() and _reader(path) is None:
            raise DataError(f"{name}: the ending {path.suffix or '(none)'} is unknown; use one of {KNOWN}")
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _guess(name: str) -> str:
    """The likeliest mend for a missing file."""
    if name.count("/") == 1 and _HUB_NAME.fullmatch(HUB + name) and not Path(name).suffix:
        return f"check the path, or write {HUB}{name} for a data set of that name on the hub"
    return "check the path"


def entries(source: Source) -> Iterator[Entry]:
    """All records of a source, in order. Raises DataError, before the first record or on the way to a damaged one."""
    check(source)
    name = str(source)
    if name == "-":
        return _lines(sys.stdin.buffer, "standard input")
    if name.startswith(HUB):
        return _hub(name)
    # A pipe, as in <(command), has no telling name: it is read as lines.
    reader = _reader(Path(source)) or _jsonl
    return reader(Path(source))


def _reader(path: Path) -> Any:
    name = path.name.lower()
    readers = ((".jsonl", _jsonl), (".jsonl.gz", _jsonl), (".json", _json), (".parquet", _parquet), (".csv", _csv))
    return next((reader for ending, reader in readers if name.endswith(ending)), None)


# --- JSON ------------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Entry]:
    with _opened(path) as stream:
        yield from _lines(stream, str(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream, unpacked if the name ends with .gz; every failure to read becomes a DataError."""
    try:
        opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as stream:
            yield stream
    except EOFError:
        raise DataError(f"{path}: the compressed file is cut off; copy or write it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a sound gzip file ({error}); copy it again, or drop the .gz") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None


def _lines(stream: Iterable[bytes], name: str) -> Iterator[Entry]:
    """Lines that are not blank, without a leading byte-order mark. Only \\n ends a line; JSON takes \\r for a blank."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield Entry(Place(name, number), line)


def _json(path: Path) -> Iterator[Entry]:
    """The records of one JSON document: a list, or an object whose `data` is a list. Read in one piece."""
    with _opened(path) as stream:
        whole = stream.read().removeprefix(_BOM)
    position, line = 0, 1
    for number, record in enumerate(_json_list(whole, str(path)), 1):
        raw = bytes(record)
        start = whole.index(raw, position)
        line += whole.count(b"\n", position, start)
        yield Entry(Place(str(path), line, number), raw)
        line += raw.count(b"\n")
        position = start + len(raw)


def _json_list(whole: bytes, name: str) -> Iterable[msgspec.Raw]:
    """The undecoded elements of the list. Raises DataError, with the line, if there is no list."""
    if not whole.strip():
        return []
    try:
        if whole.lstrip().startswith(b"["):
            return msgspec.json.decode(whole, type=list[msgspec.Raw])
        return msgspec.json.decode(whole, type=_Data).data
    except msgspec.ValidationError:
        mend = "write one of them, or name it .jsonl if it holds one object per line"
        raise DataError(f'{name}, line 1: neither a list nor {{"data": [...]}}; {mend}') from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        at = re.search(r"byte (\d+)", str(error))
        line = whole.count(b"\n", 0, int(at[1]) if at else len(whole)) + 1
        mend = "if it holds one object per line, name it .jsonl"
        raise DataError(f"{name}, line {line}: not one valid JSON document ({error}); {mend}") from None


class _Data(msgspec.Struct):
    data: list[msgspec.Raw]


# --- through the datasets library ------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Entry]:
    """A null is how Parquet writes a field that is not there."""
    for place, value in _table(path, "parquet"):
        assert isinstance(value, dict)
        yield Entry(place, {key: cell for key, cell in value.items() if cell is not None})


def _csv(path: Path) -> Iterator[Entry]:
    """CSV cells are text: none is taken for a number. One may spell out a list of turns in JSON."""
    with _opened(path) as stream:
        lines = (line.decode("utf-8-sig", "replace") for line in stream)
        columns = next(csv.reader(lines), [])
    if not columns:
        return
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}, line 1: a column name occurs twice; give each column its own name")
    for place, value in _table(path, "csv", columns, keep_default_na=False, encoding="utf-8-sig"):
        assert isinstance(value, dict)
        # An empty cell is how CSV writes a field that is not there.
        yield Entry(place, {key: _turns(cell) for key, cell in value.items() if cell not in ("", None)})


def _turns(cell: str) -> Any:
    """A CSV cell, or the list of turns that it spells out in JSON."""
    if not cell.startswith("["):
        return cell
    try:
        value = msgspec.json.decode(cell)
    except msgspec.DecodeError:
        return cell
    return value if value and all(isinstance(turn, dict) and "role" in turn for turn in value) else cell


def _table(path: Path, kind: str, columns: list[str] | None = None, **options: Any) -> Iterator[Entry]:
    import datasets

    with _opened(path):  # a file that may not be read is refused in our words
        pass
    if not path.stat().st_size:
        return
    features = None if columns is None else datasets.Features({name: datasets.Value("string") for name in columns})
    number = 0
    with _quiet(datasets):
        try:
            # Streaming: rows come in blocks, and no copy of the file is made in a cache.
            rows = datasets.load_dataset(
                kind, data_files=glob.escape(str(path)), split="train", streaming=True, features=features, **options
            )
            for number, row in enumerate(rows, 1):
                yield Entry(Place(str(path), record=number), row)
        except DataError:
            raise
        except UnicodeDecodeError:
            raise DataError(f"{path}, after record {number}: not UTF-8; save the file as UTF-8") from None
        except Exception as error:
            mend = "write the file again"
            raise DataError(f"{path}, after record {number}: not sound {kind} ({_first(error)}); {mend}") from None


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep the library from writing its own account of a failure to stderr: ours is one sentence."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _first(error: Exception) -> str:
    """The first line of another library's message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


# --- the hub ---------------------------------------------------------------------------------------------------


def _hub_parts(name: str) -> tuple[tuple[str, ...], str | None]:
    """((owner/name and, if it is named, the configuration), split)."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name}: not the name of a data set; write hub:owner/name or hub:owner/name:split")
    return tuple(part for part in (match["name"], match["part"]) if part), match["split"]


def _hub(source: str) -> Iterator[Entry]:
    name, split = _hub_parts(source)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"1", "ON", "YES", "TRUE"} and not reachable():
        raise DataError(
            f"{source}: the hub cannot be reached; connect to the network, give a local file, "
            "or set HF_HUB_OFFLINE=1 if the data set was downloaded before"
        )
    import datasets

    with _quiet(datasets):
        try:
            rows = datasets.load_dataset(*name, split=split or _only_split(name, datasets))
        except DataError:
            raise
        except Exception as error:
            mend = "check the name and the split, and that you are logged in if it is private"
            raise DataError(f"{source}: cannot be loaded ({_first(error)}); {mend}") from None
    for number, row in enumerate(rows, 1):
        yield Entry(Place(source, record=number), dict(row))


def _only_split(name: tuple[str, ...], datasets: Any) -> str:
    """The split to read when none is named: `train`, or the only one there is."""
    splits, whole = list(datasets.get_dataset_split_names(*name)), "/".join(name)
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else str(splits[0])
    raise DataError(f"hub:{whole}: it has the splits {', '.join(splits)}; say which one, as in hub:{whole}:{splits[0]}")


def reachable() -> bool:
    """Whether the hub answers at all, found out within PROBE_SECONDS whatever the resolver does."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    url = constants.ENDPOINT
    answered = threading.Event()

    def probe() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError as error:
            error.close()
            answered.set()  # an unfriendly answer is an answer
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                answered.set()  # other certificates than ours: the library may know them
        except (OSError, ValueError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
