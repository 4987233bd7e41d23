"""Any readable source, whatever its records are: prompts, pairs, candidates, a run's samples or judgements.

Each record becomes one `Item`: a conversation and the answers to it. What other tools write (Alpaca's `instruction`,
ShareGPT's `conversations`, a conversation that goes on to its answer) is put into this project's words first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from spa_lite import data, keys, sources
from spa_lite.records import Ended, Judgement, Message, Sample
from spa_lite.sources import BadRecord, Fields, Place, Source

Kind = Literal["prompts", "pairs", "candidates", "samples", "judgements"]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's speakers."""


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


# --- other tools' forms ----------------------------------------------------------------------------------------


def ours(fields: Fields) -> tuple[Fields, str]:
    """The fields in this project's words, and the name of the form they came in ("" if it was ours already)."""
    for name, translate in (("alpaca", _alpaca), ("sharegpt", _sharegpt), ("conversation", _answered)):
        found = translate(fields)
        if found is not None:
            return _plain_answers(found), name
    return fields, ""


def _alpaca(fields: Fields) -> Fields | None:
    """`instruction` with an optional `input` is the prompt. `output`, the answer to imitate, stays where it is."""
    instruction, more = fields.get("instruction"), fields.get("input")
    if not isinstance(instruction, str) or "prompt" in fields or "messages" in fields:
        return None
    rest = {name: value for name, value in fields.items() if name not in ("instruction", "input")}
    return {"prompt": f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction} | rest


def _sharegpt(fields: Fields) -> Fields | None:
    """`conversations` of {from, value} are turns. An answer at their end goes into `output`."""
    turns = fields.get("conversations")
    if not isinstance(turns, list) or "prompt" in fields or "messages" in fields:
        return None
    rest = {name: value for name, value in fields.items() if name != "conversations"}
    return _split_answer({"messages": [_turn(turn) for turn in turns]} | rest)


def _answered(fields: Fields) -> Fields | None:
    """`messages` that go on to their answer, and nothing else to go by."""
    turns = fields.get("messages")
    alone = all(fields.get(name) is None for name in ("prompt", "chosen", "rejected", "a", "b", "responses"))
    if not (alone and isinstance(turns, list) and len(turns) > 1):
        return None
    last = turns[-1]
    return _split_answer(fields) if isinstance(last, dict) and last.get("role") == "assistant" else None


def _split_answer(fields: Fields) -> Fields:
    turns = fields["messages"]
    if len(turns) > 1 and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        return fields | {"messages": turns[:-1], "output": turns[-1].get("content")}
    return fields


def _turn(turn: object) -> object:
    if isinstance(turn, dict) and isinstance(turn.get("from"), str):
        return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return turn


def _plain_answers(fields: Fields) -> Fields:
    """`chosen` and `rejected` as {from, value} are texts."""
    plain = {
        name: fields[name]["value"]
        for name in ("chosen", "rejected")
        if isinstance(fields.get(name), dict) and isinstance(fields[name].get("value"), str)
    }
    return fields | plain
