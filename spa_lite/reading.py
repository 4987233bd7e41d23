"""Any readable source, whatever its records are: prompts, pairs, candidates, a run's samples or judgements.

Each record becomes one `Item`: a conversation and the answers to it. What other tools write is put into this project's
words first (`spa_lite.forms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from spa_lite import data, keys, sources
from spa_lite.forms import ours
from spa_lite.records import Ended, Judgement, Message, Sample
from spa_lite.sources import BadRecord, Fields, Place, Source

Kind = Literal["prompts", "pairs", "candidates", "samples", "judgements"]


class Item(NamedTuple):
    """A conversation that ends with a user turn, and 0 to n answers to it.

    `gold` are indices of answers, best first (only the best where no more was said); empty without a preference.
    `ended` says how each answer ended where that is known. `foreign` names the form it came in, if not ours; `sample`
    is what a sample was made from.
    """

    kind: Kind
    id: str
    messages: tuple[Message, ...]
    extra: dict[str, Any]
    answers: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    ended: tuple[Ended, ...] = ()
    foreign: str = ""
    sample: Sample | None = None


class Row(NamedTuple):
    """One record of a source, good or bad: `number` counts from 1, `first` is the row that this one repeats."""

    number: int
    place: Place
    item: Item | None
    bad: BadRecord | None = None
    first: int | None = None


def read(source: Source, *, skip_bad: bool = False) -> data.Reading[Item]:
    """The good records of a source, repeats dropped and counted. Raises DataError as `data.iter_pairs` does."""
    return data.Reading(source, _parse, skip_bad)


def rows(source: Source) -> Iterator[Row]:
    """Every record of a source, those that cannot be used and repeats included.

    Raises DataError only for a source that cannot be read. Of what was read only digests are remembered.
    """
    first: dict[int, int] = {}
    ids: set[int] = set()

    def is_free(id_: str) -> bool:
        return _number(keys.digest(id_)) not in ids

    for number, entry in enumerate(sources.entries(source), 1):
        try:
            parsed = _parse(sources.fields(entry), is_free, number)
            key = _number(parsed.key)
            if key not in first and parsed.id is not None and not is_free(parsed.id):
                raise BadRecord("id", f"the id {parsed.id!r} was given to a record above; give each its own")
        except BadRecord as bad:
            yield Row(number, entry.place, None, bad)
            continue
        if parsed.id is not None:
            ids.add(_number(keys.digest(parsed.id)))
        earlier = first.setdefault(key, number)
        yield Row(number, entry.place, parsed.record, first=earlier if earlier != number else None)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest)


# --- one record ------------------------------------------------------------------------------------------------


def _parse(fields: Fields, is_free: Callable[[str], bool], number: int) -> data.Parsed[Item]:
    """A record of any kind. Raises BadRecord."""
    if "completions" in fields:
        return _of_run(fields, Sample, _from_sample)
    if "logratio_a" in fields and isinstance(fields.get("a"), dict):
        return _of_run(fields, Judgement, _from_judgement)
    fields, foreign = ours(fields)
    if any(fields.get(name) is not None for name in ("chosen", "rejected", "a", "b", "responses")):
        found, key, given = data.parse_candidates(fields, is_free, number)
        kind: Kind = "pairs" if fields.get("chosen") is not None else "candidates"
        prompt = found.prompt
        return data.Parsed(
            Item(kind, prompt.id, prompt.messages, prompt.extra, found.answers, found.gold, (), foreign), key, given
        )
    prompt, key, given = data.parse_prompt(fields, is_free, number)
    return data.Parsed(Item("prompts", prompt.id, prompt.messages, prompt.extra, foreign=foreign), key, given)


def _of_run(fields: Fields, type: Any, make: Callable[[Any], Item]) -> data.Parsed[Item]:
    """A line of a run's own files."""
    try:
        item = make(msgspec.convert(fields, type))
    except msgspec.ValidationError as error:
        raise BadRecord("type", f"{error}; the line is not one of a run's: write the file again") from None
    key = keys.digest("run", item.id, data.conversation_key(item.messages), *item.answers)
    return data.Parsed(item, key, item.id)


def _from_sample(s: Sample) -> Item:
    answers, ended = tuple(c.text for c in s.completions), tuple(c.ended for c in s.completions)
    return Item("samples", s.id, s.messages, s.extra, answers, (), ended, sample=s)


def _from_judgement(j: Judgement) -> Item:
    best = 0 if j.label == "a" else 1
    return Item("judgements", j.id, j.messages, j.extra, (j.a.text, j.b.text), (best,), (j.a.ended, j.b.ended))
