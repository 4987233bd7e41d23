"""Records in and out: prompts, human-labelled pairs and answers to judge, each checked as it is read.

A record that cannot be used is refused by a DataError that names the file, the line and the mend, or, with
`skip_bad`, passed over and counted. Repeats are dropped and counted. Only digests of what was read are
remembered, so `iter_prompts` and its siblings take a million lines in little memory; `read_prompts` and its
siblings hold everything.

A source is a path (.jsonl, .jsonl.gz, .json, .parquet, .csv), `-` for JSON lines on standard input, or
`hub:owner/name[:split]`.

    {"prompt": "Name a river.", "id": "p1"}                       a prompt; `messages` works too
    {"prompt": "Name a river.", "chosen": "Rhine", "rejected": "Alps"}   a pair
    {"prompt": "Name a river.", "completion": "Rhine"}    a demonstration: one good answer
    {"prompt": "Name a river.", "completion": "Alps", "label": false}    one answer, and whether it is a good one
    {"prompt": "Name a river.", "a": "Rhine", "b": "Alps", "label": "a"} two answers to judge
    {"prompt": "Name a river.", "responses": ["Rhine", "Alps", "Po"], "best": 0}   any number of them
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from spa_lite import forms, keys, sources
from spa_lite.errors import DataError, RecipeError
from spa_lite.records import Demonstration, Message, Pair, Prompt, Rated, Record
from spa_lite.sources import BadRecord, Fields, Source

T = TypeVar("T")
R = TypeVar("R", bound=Record)
Answered = TypeVar("Answered", Pair, Demonstration)

ROLES = ("system", "user", "assistant")
ANSWERS = ("completion", "answer", "response", "output")
"""Fields of a demonstration that may hold its answer."""
SHOWN = 5
"""How many messages about bad records a report keeps."""

KINDS = {
    "json": "not valid JSON",
    "object": "not an object",
    "cut": "cut off",
    "utf-8": "not UTF-8",
    "nul": "with a NUL character",
    "missing": "with a missing field",
    "empty": "with an empty text",
    "type": "with a field of the wrong type",
    "role": "with an unknown role",
    "turn": "whose conversation has its turns in the wrong order",
    "prompt": "whose fields disagree about the prompt",
    "same": "whose two answers are the same",
    "id": "whose id was taken",
}
"""What a bad record is counted under, in words."""


# --- reports and readers ---------------------------------------------------------------------------------------


class ReadReport(msgspec.Struct, frozen=True):
    """What reading a source came to. `bad` counts by the kinds of KINDS; `messages` are the first few of them."""

    source: str
    kept: int = 0
    repeated: int = 0
    bad: dict[str, int] = {}
    messages: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """Number of bad records passed over."""
        return sum(self.bad.values())

    def lines(self) -> list[str]:
        """The report in sentences for a person."""
        said = [f"{self.source}: {_count(self.kept, 'record')} read."]
        if self.repeated:
            said.append(f"{_count(self.repeated, 'repeat')} of an earlier record dropped.")
        if self.bad:
            kinds = ", ".join(f"{count} {KINDS[kind]}" for kind, count in self.bad.items())
            said.append(f"{_count(self.skipped, 'bad record')} skipped: {kinds}.")
            said.extend(self.messages)
            if self.skipped > len(self.messages):
                said.append(f"... and {self.skipped - len(self.messages)} more.")
        return said


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Candidates(NamedTuple):
    """Two or more answers for the judge, and the number of their record in the source, from 1.

    `gold` is what a person has said of them: the index of the best answer, or the indices of all of them, best
    first; empty where nothing was said.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    row: int


IsFree = Callable[[str], bool]
"""Whether an id was not given to an earlier record."""


class Parsed(NamedTuple, Generic[T]):
    """A record and what makes it the same as another: `key` for its content, `id` if it was given one."""

    record: T
    key: bytes
    id: str | None


class Reading(Generic[T]):
    """An iterator over the good records of a source that keeps count of the others; see `report`.

    Raises DataError on the way: for a bad record (unless `skip_bad`), or if no usable record is left at all.
    """

    def __init__(self, source: Source, parse: Callable[[Fields, IsFree, int], Parsed[T]], skip_bad: bool):
        sources.check(source)  # at once, not at the first record
        self._name = "standard input" if str(source) == "-" else str(source)
        self._parse, self._skip_bad = parse, skip_bad
        self._kept, self._repeated = 0, 0
        self._bad: Counter[str] = Counter()
        self._messages: list[str] = []
        self._records = self._read(source)

    def __iter__(self) -> Iterator[T]:
        return self._records

    def __next__(self) -> T:
        return next(self._records)

    @property
    def report(self) -> ReadReport:
        """The counts so far; final once the iterator is used up."""
        return ReadReport(self._name, self._kept, self._repeated, dict(self._bad), tuple(self._messages))

    def _read(self, source: Source) -> Iterator[T]:
        contents: set[int] = set()
        ids: set[int] = set()

        def is_free(id_: str) -> bool:
            return _number(keys.digest(id_)) not in ids

        for number, entry in enumerate(sources.entries(source), 1):
            try:
                parsed = self._parse(sources.fields(entry), is_free, number)
                key = _number(parsed.key)
                if key in contents:
                    self._repeated += 1
                    continue
                if parsed.id is not None:
                    if not is_free(parsed.id):
                        raise BadRecord("id", f"the id {parsed.id!r} was given to a record above; give each its own")
                    ids.add(_number(keys.digest(parsed.id)))
            except BadRecord as bad:
                self._refuse(bad, entry.place)
                continue
            contents.add(key)
            self._kept += 1
            yield parsed.record
        if not self._kept:
            raise DataError(self._nothing())

    def _refuse(self, bad: BadRecord, place: sources.Place) -> None:
        message = f"{place}: {bad}"
        if not self._skip_bad:
            raise DataError(message)
        self._bad[bad.kind] += 1
        if len(self._messages) < SHOWN:
            self._messages.append(message)

    def _nothing(self) -> str:
        if not self._bad:
            return f"{self._name}: the source is empty; give it at least one record"
        bad = sum(self._bad.values())
        return f"{self._name}: all {_count(bad, 'record')} are bad; the first: {self._messages[0]}"


def _number(digest: bytes) -> int:
    """A digest as the smallest object Python has for 16 bytes: a million of them are remembered."""
    return int.from_bytes(digest)


def iter_prompts(source: Source, *, skip_bad: bool = False) -> Reading[Prompt]:
    """Prompts of a source, one at a time; a conversation seen before is dropped and counted.

    Raises DataError for a source that cannot be read and for the first bad record unless `skip_bad`.
    """
    return Reading(source, parse_prompt, skip_bad)


def read_prompts(source: Source, *, skip_bad: bool = False) -> tuple[list[Prompt], ReadReport]:
    """All prompts of a source in one list, and what was passed over. Raises as `iter_prompts` does."""
    return _all(iter_prompts(source, skip_bad=skip_bad))


def iter_pairs(source: Source, *, skip_bad: bool = False) -> Reading[Pair]:
    """Labelled pairs of a source, one at a time; an exact repeat of a whole pair is dropped and counted.

    Raises DataError for a source that cannot be read and for the first bad record unless `skip_bad`.
    """
    return Reading(source, parse_pair, skip_bad)


def read_pairs(source: Source, *, skip_bad: bool = False) -> tuple[list[Pair], ReadReport]:
    """All labelled pairs of a source in one list, and what was passed over. Raises as `iter_pairs` does."""
    return _all(iter_pairs(source, skip_bad=skip_bad))


def iter_demonstrations(source: Source, *, skip_bad: bool = False) -> Reading[Demonstration]:
    """Prompts with one good answer each, one at a time; a repeat of prompt and answer is dropped and counted.

    The answer is `completion` (or `answer`, `response`, `output`), the assistant turn that ends the conversation, or
    what a labelled pair chose. Raises DataError for a source that cannot be read and for the first bad record unless
    `skip_bad`.
    """
    return Reading(source, parse_demonstration, skip_bad)


def read_demonstrations(source: Source, *, skip_bad: bool = False) -> tuple[list[Demonstration], ReadReport]:
    """All demonstrations of a source in one list, and what was passed over. Raises as `iter_demonstrations` does."""
    return _all(iter_demonstrations(source, skip_bad=skip_bad))


def read_rated(source: Source, *, skip_bad: bool = False) -> tuple[list[Rated], ReadReport]:
    """Prompts with one answer each, as demonstrations are written, and a `label`: true if it is a good one (TRL's
    unpaired preferences). A repeat of all three is dropped and counted.

    Raises DataError for a source that cannot be read and for the first bad record unless `skip_bad`.
    """
    return _all(Reading(source, parse_rated, skip_bad))


def iter_candidates(source: Source, *, skip_bad: bool = False) -> Reading[Candidates]:
    """Answers to judge: `a` and `b` with an optional `label`; a labelled pair (the first is chosen, and gold); or
    `responses`, two or more, with an optional `label` or `best` (an index) or `ranking` (indices, best first).

    Raises DataError for a source that cannot be read and for the first bad record unless `skip_bad`.
    """
    return Reading(source, parse_candidates, skip_bad)


def read_candidates(source: Source, *, skip_bad: bool = False) -> tuple[list[Candidates], ReadReport]:
    """All answers to judge in one list, and what was passed over. Raises as `iter_candidates` does."""
    return _all(iter_candidates(source, skip_bad=skip_bad))


def _all(reading: Reading[T]) -> tuple[list[T], ReadReport]:
    records = list(reading)
    return records, reading.report


# --- one record ------------------------------------------------------------------------------------------------


def conversation_key(messages: Sequence[Message]) -> bytes:
    """16 bytes that are the same for the same conversation text."""
    return keys.digest("conversation", *(part for turn in messages for part in (turn.role, turn.content)))


def parse_prompt(fields: Fields, is_free: IsFree, number: int) -> Parsed[Prompt]:
    """A record that is a prompt; `number` is its own in the source, from 1. Raises BadRecord."""
    messages = _conversation(fields)
    key = conversation_key(messages)
    given = _given_id(fields, is_free)
    extra = _extra(fields, ("id", "prompt", "messages"))
    return Parsed(Prompt(id=given or _short(key), messages=messages, extra=extra), key, given)


def parse_pair(fields: Fields, is_free: IsFree, number: int) -> Parsed[Pair]:
    """A record that is a labelled pair. Raises BadRecord."""
    messages, chosen, rejected = _two_answers(fields, "chosen", "rejected")
    if chosen == rejected:
        raise BadRecord("same", "`chosen` and `rejected` are the same; change one of them or drop the pair")
    # A prompt may have several pairs, so a pair is named by all of its text.
    key = keys.digest("pair", conversation_key(messages), chosen, rejected)
    given = _given_id(fields, is_free)
    extra = _extra(fields, ("id", "prompt", "messages", "chosen", "rejected"))
    pair = Pair(id=given or _short(key), messages=messages, chosen=chosen, rejected=rejected, extra=extra)
    return Parsed(pair, key, given)


def parse_demonstration(fields: Fields, is_free: IsFree, number: int) -> Parsed[Demonstration]:
    """A record with one good answer, in any of its forms. Raises BadRecord."""
    fields, _ = forms.ours(fields)
    if fields.get("chosen") is not None:
        messages, answer, _ = _two_answers(fields, "chosen", "rejected")
    else:
        messages, answer = _conversation(fields), _demonstrated(fields)
    key = keys.digest("demonstration", conversation_key(messages), answer)
    given = _given_id(fields, is_free)
    extra = _extra(fields, ("id", "prompt", "messages", "chosen", "rejected", *ANSWERS))
    return Parsed(Demonstration(id=given or _short(key), messages=messages, answer=answer, extra=extra), key, given)


def parse_rated(fields: Fields, is_free: IsFree, number: int) -> Parsed[Rated]:
    """A record with one answer and what it is worth. Raises BadRecord."""
    label = fields.get("label")
    if label is None:
        raise BadRecord("missing", "`label` is missing; write true (a good answer) or false in every record")
    if not isinstance(label, bool):
        raise BadRecord("type", f"`label` is {_kind(label)}; write true (a good answer) or false")
    found = parse_demonstration({name: value for name, value in fields.items() if name != "label"}, is_free, number)
    key, one = keys.digest("rated", found.key, str(label)), found.record
    name = found.id or _short(key)
    return Parsed(
        Rated(id=name, messages=one.messages, answer=one.answer, desirable=label, extra=one.extra), key, found.id
    )


def _demonstrated(fields: Fields) -> str:
    """The one answer of a demonstration that is no pair."""
    said = {name: fields[name] for name in ANSWERS if fields.get(name) is not None}
    turns = fields.get("messages")
    if isinstance(turns, list) and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        said["messages"] = turns[-1].get("content")  # beside `prompt`, as UltraChat has it
    if not said:
        raise BadRecord("missing", "there is no answer; add `completion`, or end `messages` with an assistant turn")
    texts = {name: _answer_text(value, f"`{name}`") for name, value in said.items()}
    if len(set(texts.values())) > 1:
        raise BadRecord(
            "prompt", f"{' and '.join(f'`{name}`' for name in said)} are different answers; keep one of them"
        )
    return next(iter(texts.values()))


def _answer_text(value: object, name: str) -> str:
    """An answer that is a text, or, as TRL writes it, a list of one assistant turn."""
    if not isinstance(value, list):
        return _text(value, name)
    turns = _turns(value, name)
    if len(turns) > 1:
        raise BadRecord("turn", f"{name} holds {len(turns)} turns; put all but the last into `prompt`")
    return _answer(turns, name)


def parse_candidates(fields: Fields, is_free: IsFree, number: int) -> Parsed[Candidates]:
    """A record with answers to judge, in any of its three forms. Raises BadRecord."""
    lettered = fields.get("a") is not None or fields.get("b") is not None
    labelled = fields.get("chosen") is not None or fields.get("rejected") is not None
    if lettered and labelled:
        raise BadRecord("prompt", "there are both `a`/`b` and `chosen`/`rejected`; keep one of the two forms")
    if labelled:
        pair, key, given = parse_pair(fields, is_free, number)
        return Parsed(Candidates(pair.prompt, (pair.chosen, pair.rejected), (0,), number), key, given)
    if not lettered and fields.get("responses") is not None:
        return _parse_responses(fields, is_free, number)
    if not lettered:
        raise BadRecord(
            "missing", "there are neither `a` and `b` nor `chosen` and `rejected` nor `responses`; add two answers"
        )
    messages, a, b = _two_answers(fields, "a", "b")
    gold = _label(fields.get("label"))
    if gold is not None and a == b:
        # Without a label it is a tie, which the judge reports as one.
        raise BadRecord("same", "`a` and `b` are the same, `label` prefers one; change one or drop the label")
    key = keys.digest("candidates", conversation_key(messages), a, b, gold)
    given, extra = _given_id(fields, is_free), _extra(fields, ("id", "prompt", "messages", "a", "b", "label"))
    prompt = Prompt(id=given or _short(key), messages=messages, extra=extra)
    return Parsed(Candidates(prompt, (a, b), () if gold is None else ("ab".index(gold),), number), key, given)


def _parse_responses(fields: Fields, is_free: IsFree, number: int) -> Parsed[Candidates]:
    """Two or more answers in a list, each a text."""
    found = fields["responses"]
    if not isinstance(found, list):
        raise BadRecord("type", f"`responses` is {_kind(found)}; write a list of texts")
    if len(found) < 2:
        raise BadRecord("missing", f"`responses` holds {len(found)}; give two or more")
    answers = tuple(_text(answer, f"answer {place} of `responses`") for place, answer in enumerate(found))
    messages, gold = _conversation(fields), _gold(fields, answers)
    key = keys.digest("responses", conversation_key(messages), len(answers), *answers, *gold)
    given = _given_id(fields, is_free)
    extra = _extra(fields, ("id", "prompt", "messages", "responses", "label", "best", "ranking"))
    prompt = Prompt(id=given or _short(key), messages=messages, extra=extra)
    return Parsed(Candidates(prompt, answers, gold, number), key, given)


def _gold(fields: Fields, answers: tuple[str, ...]) -> tuple[int, ...]:
    """What is said of several answers: (index of the best,), all indices from best to worst, or nothing."""
    said = {name: fields[name] for name in ("label", "best", "ranking") if fields.get(name) is not None}
    if len(said) > 1:
        raise BadRecord("prompt", f"there are {' and '.join(f'`{name}`' for name in said)}; keep one of them")
    for name, value in said.items():
        found = value if name == "ranking" else [value]
        if not isinstance(found, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in found):
            form = "a list of indices from 0, best first" if name == "ranking" else "the best answer's index, from 0"
            raise BadRecord("type", f"`{name}` is {value!r}; write {form}")
        if name == "ranking" and sorted(found) != list(range(len(answers))):
            raise BadRecord("type", f"`ranking` must name each of 0 to {len(answers) - 1} once; it is {value!r}")
        if not all(0 <= i < len(answers) for i in found):
            raise BadRecord("type", f"`{name}` is {value!r}, but the answers are 0 to {len(answers) - 1}; mend it")
        if sum(answer == answers[found[0]] for answer in answers) > 1:
            raise BadRecord("same", f"`{name}` prefers an answer that occurs twice; change one or drop `{name}`")
        return tuple(found)
    return ()


def _label(value: object) -> Literal["a", "b"] | None:
    """`label` as it may be written: a letter, or the index of the better answer (as text too, for CSV)."""
    if value is None:
        return None
    if not isinstance(value, (bool, float)):
        if value in ("a", "A", "0", 0):
            return "a"
        if value in ("b", "B", "1", 1):
            return "b"
    raise BadRecord("type", f'`label` is {value!r}; write "a" or 0 if `a` is the better answer, "b" or 1 if `b` is')


def _short(key: bytes) -> str:
    return key.hex()[:16]


def _given_id(fields: Fields, is_free: Callable[[str], bool]) -> str | None:
    """The record's own id, if it has one. A whole number is taken as its digits.

    UltraFeedback's `prompt_id` serves as well, but only once: it names the prompt, which may come again.
    """
    given = fields.get("id")
    if given is None:
        given = fields.get("prompt_id")
        return given if isinstance(given, str) and given.strip() and "\0" not in given and is_free(given) else None
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    return _text(given, "`id`")


def _extra(fields: Fields, used: tuple[str, ...]) -> dict[str, Any]:
    """All other fields. Those of a record that was written by `write_jsonl` lie in its `extra` and come up again."""
    extra = {name: value for name, value in fields.items() if name not in used}
    if isinstance(inner := extra.get("extra"), dict):
        del extra["extra"]
        extra = inner | extra
    return extra


def _text(value: object, name: str) -> str:
    """A text that says something. Raises BadRecord otherwise."""
    if value is None:
        raise BadRecord("missing", f"{name} is missing; add it")
    if not isinstance(value, str):
        raise BadRecord("type", f"{name} is {_kind(value)}; write a text in quotes")
    if not value.strip():
        raise BadRecord("empty", f"{name} is empty; fill it in or drop the record")
    if "\0" in value:
        raise BadRecord("nul", f"{name} holds a NUL character; remove it")
    return value


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a text",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _turns(value: object, name: str) -> tuple[Message, ...]:
    """A list of turns, each with a known role and a text. Raises BadRecord otherwise."""
    if value is None:
        raise BadRecord("missing", f"{name} is missing; add it")
    if not isinstance(value, list):
        raise BadRecord("type", f'{name} is {_kind(value)}; write a list like [{{"role": "user", "content": "..."}}]')
    if not value:
        raise BadRecord("empty", f"{name} is an empty list; give it at least one turn")
    return tuple(_turn(turn, f"turn {number} of {name}") for number, turn in enumerate(value, 1))


def _turn(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRecord("type", f'{name} is {_kind(value)}; write {{"role": "user", "content": "..."}}')
    role = _text(value.get("role"), f"`role` in {name}")
    if role not in ROLES:
        raise BadRecord("role", f"{name} has the unknown role {role!r}; use one of {', '.join(ROLES)}")
    return Message(role=role, content=_text(value.get("content"), f"`content` in {name}"))


# --- the prompt of a record ------------------------------------------------------------------------------------


def _conversation(fields: Fields) -> tuple[Message, ...]:
    """The conversation to answer, from `prompt`, `messages`, or both where they agree. Raises BadRecord."""
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is None and messages is None:
        raise BadRecord("missing", "there is neither `prompt` nor `messages`; add one of them")
    if prompt is None:
        return _ends_with_user(_turns(messages, "`messages`"), "`messages`")
    asked = _asked(prompt)
    if messages is None:
        return asked
    turns = _turns(messages, "`messages`")
    # UltraFeedback's `messages` go on to the answer; the prompt is what comes before it.
    until_user = turns[:-1] if turns[-1].role == "assistant" else turns
    if not _same_question(asked, until_user, isinstance(prompt, str)):
        raise BadRecord("prompt", "`prompt` and `messages` disagree; keep one of the two")
    return _ends_with_user(until_user, "`messages`")


def _asked(prompt: object) -> tuple[Message, ...]:
    """`prompt`: a text, or turns as TRL writes them."""
    if isinstance(prompt, list):
        return _ends_with_user(_turns(prompt, "`prompt`"), "`prompt`")
    return (Message(role="user", content=_text(prompt, "`prompt`")),)


def _same_question(asked: tuple[Message, ...], turns: tuple[Message, ...], from_text: bool) -> bool:
    """Whether a prompt is that of a conversation. A text need only be its first or its last user turn."""
    if not from_text:
        return asked == turns
    said = [turn.content.strip() for turn in turns if turn.role == "user"]
    return bool(said) and asked[0].content.strip() in (said[0], said[-1])


def _ends_with_user(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The turns, if an answer can follow them. Raises BadRecord otherwise."""
    if all(turn.role != "user" for turn in turns):
        raise BadRecord("turn", f"{name} has no user turn; add the question to answer")
    if turns[-1].role != "user":
        raise BadRecord("turn", f"{name} ends with a turn of role {turns[-1].role!r}; end it with a user turn")
    return turns


# --- the two answers of a record -------------------------------------------------------------------------------


def _two_answers(fields: Fields, first: str, second: str) -> tuple[tuple[Message, ...], str, str]:
    """Prompt turns and two answer texts, whichever of the usual ways they are written in. Raises BadRecord.

    Both answers are texts, or both are lists of turns: the answer alone, or the whole conversation. Without
    `prompt` and `messages` the prompt is what the two have in common.
    """
    x, y = fields.get(first), fields.get(second)
    x_name, y_name = f"`{first}`", f"`{second}`"
    implicit = fields.get("prompt") is None and fields.get("messages") is None
    if isinstance(x, list) and isinstance(y, list):
        x_turns, y_turns = _turns(x, x_name), _turns(y, y_name)
        if len(x_turns) == len(y_turns) == 1 and not implicit:
            return _conversation(fields), _answer(x_turns, x_name), _answer(y_turns, y_name)
        return _whole(fields, x_turns, y_turns, x_name, y_name)
    if isinstance(x, list) or isinstance(y, list):
        _text(x if isinstance(y, list) else y, x_name if isinstance(y, list) else y_name)
        raise BadRecord("type", f"one of {x_name} and {y_name} is a text and one a list; write both the same way")
    x_text, y_text = _text(x, x_name), _text(y, y_name)
    if not implicit:
        return _conversation(fields), x_text, y_text
    if _HH_START.match(x_text) and _HH_START.match(y_text):
        return _whole(fields, _hh_turns(x_text, x_name), _hh_turns(y_text, y_name), x_name, y_name)
    return _shared_text(x_text, y_text, x_name, y_name)


def _answer(turns: tuple[Message, ...], name: str) -> str:
    if turns[-1].role != "assistant":
        raise BadRecord("turn", f"{name} ends with a turn of role {turns[-1].role!r}; end it with an assistant turn")
    return turns[-1].content


def _whole(
    fields: Fields, x: tuple[Message, ...], y: tuple[Message, ...], x_name: str, y_name: str
) -> tuple[tuple[Message, ...], str, str]:
    """Split two whole conversations before their last turn, where they must agree with each other and the prompt."""
    answers = _answer(x, x_name), _answer(y, y_name)
    if len(x) == 1 or len(y) == 1:
        raise BadRecord("missing", f"there is no prompt; add `prompt`, or put its turns into {x_name} and {y_name}")
    if x[:-1] != y[:-1]:
        mend = "make all turns before the last one the same"
        raise BadRecord("prompt", f"{x_name} and {y_name} differ before their last turn; {mend}")
    turns = _ends_with_user(x[:-1], f"{x_name} before its last turn")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is not None and not _same_question(_asked(prompt), turns, isinstance(prompt, str)):
        raise BadRecord("prompt", f"`prompt` is not what {x_name} answers; drop `prompt` or mend it")
    if messages is not None and _turns(messages, "`messages`") not in (turns, x, y):
        raise BadRecord("prompt", f"`messages` is not the conversation of {x_name}; drop `messages` or mend it")
    return turns, *answers


_HH_START = re.compile(r"\s*Human:")
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_turns(text: str, name: str) -> tuple[Message, ...]:
    """The turns of a conversation written as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    parts = _HH_TURN.split(text.strip())
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    said = [Message(role=_HH_ROLES[speaker], content=words.strip()) for speaker, words in spoken]
    for number, turn in enumerate(said, 1):
        _text(turn.content, f"turn {number} of {name}")
    return tuple(said)


_BOUNDARIES = (re.compile(r"\n\s*"), re.compile(r"[.?!:]\s+"), re.compile(r"\s+"))
"""Where a shared beginning may end, best first: a line, a sentence, a word."""


def _shared_text(x: str, y: str, x_name: str, y_name: str) -> tuple[tuple[Message, ...], str, str]:
    """Split two plain texts where their shared beginning ends, at the end of a line, else a sentence, else a word."""
    differ = next((at for at, (one, other) in enumerate(zip(x, y, strict=False)) if one != other), None)
    shared = x if differ is None else x[:differ]
    shared = shared[: len(y)]
    # A boundary is of use only if something is left before and after it.
    for boundary in _BOUNDARIES:
        for found in reversed(list(boundary.finditer(shared))):
            prompt, rest_x, rest_y = shared[: found.end()].strip(), x[found.end() :].strip(), y[found.end() :].strip()
            if prompt and rest_x and rest_y:
                return (Message(role="user", content=prompt),), rest_x, rest_y
    raise BadRecord("missing", f"there is no `prompt`, and {x_name} and {y_name} share no beginning; add `prompt`")


# --- dividing what was read ------------------------------------------------------------------------------------


def split_rounds(prompts: Sequence[Prompt], rounds: int, sizes: Sequence[int] | None, seed: int) -> list[list[Prompt]]:
    """Disjoint shares of the prompts, one per round: of the given sizes, or as even as can be.

    The same prompts in the same order and the same seed give the same shares. With `sizes`, a further round
    leaves the earlier ones as they were. A conversation that occurs twice is used once. Raises RecipeError for
    sizes that make no sense, DataError if there are too few prompts.
    """
    if rounds < 1 or (sizes is not None and (len(sizes) != rounds or min(sizes) < 1)):
        raise RecipeError(f"{rounds} rounds with the sizes {sizes}; give one size of at least 1 for each round")
    unique = list({conversation_key(prompt.messages): prompt for prompt in reversed(prompts)}.values())[::-1]
    return [[unique[i] for i in share] for share in shares(len(unique), rounds, sizes, seed, "different prompts")]


def shares(count: int, rounds: int, sizes: Sequence[int] | None, seed: int, what: str) -> list[list[int]]:
    """Disjoint shares of `count` things, shuffled: indices for each round. Raises DataError if there are too few."""
    if sizes is None:
        share, over = divmod(count, rounds)
        sizes = [share + (index < over) for index in range(rounds)]
    wanted = max(sum(sizes), rounds)
    if wanted > count:
        raise DataError(
            f"{rounds} rounds ask for {wanted} {what} and there are {count}; add some, or ask for fewer rounds or "
            "smaller ones"
        )
    order = iter(keys.shuffled(count, "rounds", seed).tolist())
    return [[next(order) for _ in range(size)] for size in sizes]


def hold_out(pairs: Sequence[Answered], fraction: float = 0.1, seed: int = 0) -> tuple[list[Answered], list[Answered]]:
    """(train, held out) of pairs or demonstrations, with all of a prompt on one side and the given order kept.

    Holds out that share of the prompts: at least one and never all, if there are two; none if `fraction` is 0.
    Raises RecipeError if `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"the held-out fraction is {fraction}; give a number from 0 up to, not including, 1")
    owners = [conversation_key(pair.messages) for pair in pairs]
    prompts = list(dict.fromkeys(owners))
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1) if fraction and len(prompts) > 1 else 0
    held = {prompts[index] for index in keys.shuffled(len(prompts), "hold out", seed)[:count]}
    train = [pair for pair, owner in zip(pairs, owners, strict=True) if owner not in held]
    return train, [pair for pair, owner in zip(pairs, owners, strict=True) if owner in held]


def without(prompts: Iterable[Prompt], pairs: Iterable[Pair]) -> tuple[list[Prompt], int]:
    """The prompts whose conversation occurs in none of the (held-out) pairs, and how many others there were."""
    taken = {conversation_key(pair.messages) for pair in pairs}
    kept, dropped = [], 0
    for prompt in prompts:
        if conversation_key(prompt.messages) in taken:
            dropped += 1
        else:
            kept.append(prompt)
    return kept, dropped


# --- our own files ---------------------------------------------------------------------------------------------


def write_jsonl(path: str | Path, records: Iterable[msgspec.Struct]) -> int:
    """Write one JSON line per record and return their number; the file is there whole or not at all.

    Raises DataError if the file cannot be written or a record holds what JSON cannot.
    """
    path = Path(path)
    encoder, count = msgspec.json.Encoder(), 0
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            temporary = Path(stream.name)
            try:
                for record in records:
                    stream.write(encoder.encode(record) + b"\n")
                    count += 1
                stream.flush()
                os.fsync(stream.fileno())
                temporary.chmod(0o666 & ~_umask())  # the temporary file is its owner's alone
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: record {count + 1} cannot be written as JSON ({error}); change that value") from error
    _sync_folder(path.parent)
    return count


def _umask() -> int:
    """The mask of new files. There is no way to read it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def iter_jsonl(path: str | Path, type: type[R]) -> Iterator[R]:
    """Records of one type from a file that `write_jsonl` wrote, one at a time. An empty file holds none.

    Raises DataError for a file that cannot be read and for a bad line.
    """
    sources.check(path)
    return _typed(path, msgspec.json.Decoder(type))


def _typed(path: str | Path, decoder: msgspec.json.Decoder[R]) -> Iterator[R]:
    for place, raw in sources.entries(path):
        assert isinstance(raw, bytes)
        try:
            yield decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if isinstance(error, msgspec.ValidationError):
                raise DataError(f"{place}: {error}; the line is not of this kind: write the file again") from None
            raise DataError(f"{place}: {sources.why_not_json(raw, error)}") from None


def read_jsonl(path: str | Path, type: type[R]) -> list[R]:
    """All records of one type from a file that `write_jsonl` wrote. Raises as `iter_jsonl` does."""
    return list(iter_jsonl(path, type))
