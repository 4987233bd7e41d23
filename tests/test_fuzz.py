"""Readers on damaged, half-typed and random files: one sentence or a count for everything, never a traceback.

For a source that can be read at all, records in = kept + repeated + bad. 500 files in `make test`; 5,000, and
CSV, in `make test-long`. The seed is fixed.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spa_lite import data, describe, lint, reading, sources
from spa_lite.benches import alpaca, alpaca_files, knowledge, mt_bench_files
from spa_lite.errors import SpaError

NAMES = [
    *("id", "prompt", "messages", "chosen", "rejected", "a", "b", "label", "responses", "best", "ranking", "prompt_id"),
    *("extra", "instruction", "input", "output", "conversations", "turns", "completions", "logratio_a", "category"),
    *("question_id", "generator", "preference", "output_1", "output_2", "question", "answer", "choices"),
]
short = st.text(max_size=8)
words = st.sampled_from(
    ["Name a river.", "Rhine", "Alps", "", " ", "user", "assistant", "Human: x", "a", "1", "\0", "=1"]
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "robot"]), "content": words}
) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), words | st.none(), max_size=3)
scalar = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | words | short
value = scalar | st.lists(turn, max_size=3) | st.lists(words, max_size=3) | st.dictionaries(short, scalar, max_size=2)
record = st.dictionaries(st.sampled_from(NAMES), value, max_size=6)
good = st.fixed_dictionaries({"prompt": words}, optional={"chosen": words, "rejected": words, "a": words, "b": words})
records = st.lists(record | good, min_size=1, max_size=5)


def jsonl(found: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in found)


def table(found: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(name for one in found for name in one)) or ["prompt"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for one in found:
        writer.writerow([json.dumps(one.get(name)) if name in one else "" for name in columns])
    return text.getvalue().encode("utf-8", "surrogatepass")


FORMATS: list[tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = [
    ("f.jsonl", jsonl),
    ("f.json", lambda found: json.dumps(found).encode()),
    ("f.jsonl.gz", lambda found: gzip.compress(jsonl(found), mtime=0)),
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and content: good bytes of some format, often cut, changed or put together from two."""
    name, write = draw(st.sampled_from(FORMATS))
    content = draw(st.binary(max_size=40)) if draw(st.integers(0, 9)) == 0 else write(draw(records))
    how = draw(st.sampled_from(["whole", "whole", "cut", "byte", "twice", "noise"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        content = content[:at]
    elif how == "byte":
        content = content[:at] + draw(st.binary(min_size=1, max_size=2)) + content[at + 1 :]
    elif how == "twice":
        content = content[:at] + content
    elif how == "noise":
        content = content[:at] + draw(st.binary(max_size=5)) + content[at:]
    return name, content


OURS: list[Callable[..., Any]] = [data.iter_prompts, data.iter_pairs, data.iter_candidates, reading.read]
OTHERS: list[Callable[[Path], Any]] = [
    lambda path: [*lint.lint(path).findings],
    lambda path: lint.lint(path, against=path),
    describe.describe,
    alpaca_files.read_records,
    alpaca_files.read_outputs,
    alpaca_files.read_length_data,
    lambda path: alpaca.from_annotations(path),
    mt_bench_files.read_questions,
    mt_bench_files.read_prompts,
    mt_bench_files.read_references,
    knowledge.read_problems,
    knowledge.read_choices,
]


def entries_of(path: Path) -> int | None:
    """How many records a file holds; None if it breaks off."""
    try:
        return sum(1 for _ in sources.entries(path))
    except SpaError:
        return None


def check_counts(path: Path) -> None:
    """No record is lost: every reader of ours, lint and stats account for each."""
    total = entries_of(path)
    for read in OURS:
        found = read(path, skip_bad=True)
        broken = ""
        try:
            kept = sum(1 for _ in found)
        except SpaError as error:
            broken, kept = str(error), found.report.kept
        report = found.report
        if total is not None:
            assert report.kept + report.repeated + report.skipped == total, (read, report)
            assert bool(broken) == (report.kept == 0), broken  # nothing usable is an error of its own
        else:
            assert broken
        assert kept == report.kept
    if total is not None:
        looked = lint.lint(path)
        assert looked.records == total
        described = describe.describe(path)
        assert described.usable + described.repeated + sum(described.bad.values()) == described.records == total


def check_sentence(read: Callable[[Path], Any], path: Path) -> None:
    """Whatever a reader thinks of a file, it says so in a sentence."""
    with contextlib.suppress(SpaError):
        read(path)


def try_files(folder: Path, count: int) -> None:
    """Write and read `count` files."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(), st.sampled_from(OTHERS), st.sampled_from(OURS))
    def attempt(file: tuple[str, bytes], other: Callable[[Path], Any], strict: Callable[[Path], Any]) -> None:
        path = folder / file[0]
        path.write_bytes(file[1])
        check_counts(path)
        check_sentence(other, path)
        check_sentence(lambda path: list(strict(path)), path)

    attempt()


def test_five_hundred_damaged_files(tmp_path: Path) -> None:
    try_files(tmp_path, 500)


@pytest.mark.long
def test_five_thousand_damaged_files(tmp_path: Path) -> None:
    try_files(tmp_path, 4900)


def try_tables(folder: Path, count: int) -> None:
    """The same with CSV, which goes through a library and is slow."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(records, st.integers(0, 400), st.binary(max_size=3))
    def attempt(found: list[dict[str, Any]], at: int, noise: bytes) -> None:
        content = table(found)
        path = folder / "f.csv"
        path.write_bytes(content[:at] + noise + content[at:] if noise else content)
        check_counts(path)

    attempt()


@pytest.mark.long
def test_a_hundred_damaged_tables(tmp_path: Path) -> None:
    try_tables(tmp_path, 100)
