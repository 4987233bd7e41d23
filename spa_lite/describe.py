"""What a file of records holds: fields, lengths, turns, roles, labels, repeats. What is odd in it, `lint` says."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from spa_lite import sources
from spa_lite.backend import Tokenizer
from spa_lite.data import KINDS, conversation_key
from spa_lite.encode import answer_ids
from spa_lite.errors import DataError, ModelError
from spa_lite.reading import Item, rows
from spa_lite.records import Record
from spa_lite.sources import Source

QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
FIELDS = 200
"""Names of other fields that are counted; a file with more has them under `other`."""


class Quantiles(Record, frozen=True, kw_only=True):
    """Lengths of all texts of one sort, in one unit."""

    what: str
    unit: str
    count: int
    mean: float
    at: dict[str, float]


class Description(Record, frozen=True, kw_only=True):
    """What a file holds. `bad` counts by kind of what is wrong, `better` by the place of the preferred answer."""

    source: str
    records: int
    usable: int
    bad: dict[str, int]
    repeated: int
    kinds: dict[str, int]
    foreign: dict[str, int]
    prompts: int
    fields: dict[str, int]
    turns: dict[str, int]
    roles: dict[str, int]
    answers: dict[str, int]
    better: dict[str, int]
    ended: dict[str, int]
    lengths: tuple[Quantiles, ...]
    refused: int


def describe(source: Source, tokenizer: Tokenizer | None = None) -> Description:
    """Read a source once and count. With a tokenizer lengths are in tokens, too; `refused` are those it refuses.

    Memory: digests, and eight bytes per text. Raises DataError for a source that cannot be read at all.
    """
    sources.check(source)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("bad", "kinds", "foreign", "fields", "turns")}
    counts |= {name: Counter() for name in ("roles", "answers", "better", "ended")}
    lengths: dict[tuple[str, str], array[int]] = {}
    prompts: set[bytes] = set()
    records = usable = repeated = refused = 0
    for row in rows(source):
        records += 1
        if row.bad is not None:
            counts["bad"][KINDS[row.bad.kind]] += 1
        if row.item is None:
            continue
        if row.first is not None:
            repeated += 1
            continue
        usable += 1
        prompts.add(conversation_key(row.item.messages))
        _count(row.item, counts)
        _measure(_characters(row.item), "characters", lengths)
        if tokenizer:
            try:
                _measure(_tokens(row.item, tokenizer), "tokens", lengths)
            except (ModelError, DataError):
                refused += 1
    return Description(
        source="standard input" if str(source) == "-" else str(source),
        records=records,
        usable=usable,
        repeated=repeated,
        prompts=len(prompts),
        lengths=tuple(_quantiles(what, unit, found) for (what, unit), found in lengths.items()),
        refused=refused,
        **{name: dict(seen.most_common()) for name, seen in counts.items()},
    )


def _count(item: Item, counts: Mapping[str, Counter[str]]) -> None:
    counts["kinds"][item.kind] += 1
    if item.foreign:
        counts["foreign"][item.foreign] += 1
    for name in item.extra:
        known = name in counts["fields"] or len(counts["fields"]) < FIELDS
        counts["fields"][name if known else "other"] += 1
    counts["turns"][str(len(item.messages))] += 1
    counts["roles"].update(turn.role for turn in item.messages)
    counts["answers"][str(len(item.answers))] += 1
    counts["ended"].update(item.ended)
    if item.answers:
        counts["better"][f"answer {item.gold[0] + 1}" if item.gold else "not said"] += 1


def _names(item: Item) -> list[str]:
    """What each answer is called: by its place, or as the better and the worse one."""
    if item.gold and len(item.answers) == 2:
        return ["better answer", "worse answer"] if item.gold[0] == 0 else ["worse answer", "better answer"]
    return ["answer"] * len(item.answers)


def _characters(item: Item) -> list[tuple[str, int]]:
    prompt = sum(len(turn.content) for turn in item.messages)
    answers = [len(answer) for answer in item.answers]
    return [("prompt", prompt), *zip(_names(item), answers, strict=True)]


def _tokens(item: Item, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Lengths as a run has them: the prompt with its template, answers with their end-of-turn token."""
    prompt = len(tokenizer.encode_prompt(item.messages))
    answers = [len(answer_ids(item.messages, answer, tokenizer)) for answer in item.answers]
    return [("prompt", prompt), *zip(_names(item), answers, strict=True)]


def _measure(found: Iterable[tuple[str, int]], unit: str, lengths: dict[tuple[str, str], array[int]]) -> None:
    for what, length in found:
        lengths.setdefault((what, unit), array("I")).append(length)


def _quantiles(what: str, unit: str, found: array[int]) -> Quantiles:
    values = np.frombuffer(found, dtype=np.uintc)
    at = np.quantile(values, list(QUANTILES.values()))
    return Quantiles(
        what=what,
        unit=unit,
        count=len(values),
        mean=float(values.mean()),
        at=dict(zip(QUANTILES, map(float, at), strict=True)),
    )
