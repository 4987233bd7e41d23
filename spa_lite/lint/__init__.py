"""What is odd about data, counted by kind: a file of records before it is used, a round's own answers after.

A finding is no verdict. It says how often something was seen and where, so that one can look; docs/data.md says of each
kind what to do about it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from spa_lite import sources
from spa_lite.data import KINDS as UNUSABLE
from spa_lite.errors import DataError
from spa_lite.intervals import wilson
from spa_lite.lint import text as look
from spa_lite.lint.near import MOST, Near, alike
from spa_lite.lint.samples import Findings, Tally, lint_samples
from spa_lite.lint.tokens import Anatomy, Mask, TokenChecks, mask
from spa_lite.reading import Item, Row, rows
from spa_lite.records import Pair, Prompt, Record
from spa_lite.sources import BadRecord, Place, Source

__all__ = ["Findings", "Lint", "lint", "lint_items", "lint_pairs", "lint_prompts", "lint_samples"]

KINDS = {
    "unusable": "records that cannot be read",
    "foreign": "in another tool's form; `spa-lite data convert` puts them into ours",
    "empty": "an empty text",
    "same-answers": "two answers that are the same",
    "near-answers": "two answers that are nearly the same",
    "repeated": "an exact repeat of an earlier record",
    "near-prompts": "a prompt nearly the same as an earlier one",
    "overlap": "a prompt that is in the evaluation file",
    "truncated": "an answer cut by the length limit, or with a code block left open",
    "stops-short": "an answer that ends without a sentence's end, where most do not",
    "think-tags": "think tags without their partner, or in one answer only",
    "boilerplate": "set phrases of assistants",
    "language": "an answer in another language than its prompt",
    "special-strings": "strings of special tokens inside a text",
    "long-prompt": "a prompt longer than --max-prompt-length",
    "boundary": "a token that would straddle the border of prompt and answer",
    "template": "the chat template changes or refuses a text",
    "lossy": "an answer that its tokens do not give back",
}
"""Every kind of finding, in words."""
TOKEN_KINDS = ("long-prompt", "boundary", "template", "lossy")
SORTS = 100
"""Sorts of one kind that are counted apart; all others are `other`."""
FIRST = 5
"""Rows that are named with each finding."""
MANY_END = 0.5
"""Share of long answers that must end with a sentence's end before one that does not is odd."""
NEAR = 0.8
"""Jaccard's index of the shingles from which on two texts are nearly the same."""


class Hit(Record, frozen=True, kw_only=True):
    """One thing seen in one record: `row` counts from 1, `what` says which of the sorts of this kind it is."""

    kind: str
    row: int
    id: str = ""
    what: str = ""
    note: str = ""


class Finding(Record, frozen=True, kw_only=True):
    """All of one kind: number of records that have it, their share of all records, the first few, and their sorts.

    `example` is what is to be said of the first one.
    """

    kind: str
    count: int
    share: float
    rows: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    sorts: dict[str, int]
    example: str = ""


class Length(Record, frozen=True, kw_only=True):
    """Lengths of the better and the worse answers, and the share of pairs whose longer answer is the better one.

    `longer_wins` has value, low, high and n (95 % Wilson interval); pairs of equal length do not count.
    """

    unit: str
    better_mean: float
    better_median: float
    worse_mean: float
    worse_median: float
    longer_wins: dict[str, float] | None


class Lint(Record, frozen=True, kw_only=True):
    """The report. `skipped` says, a sentence each, which checks were not made, or not of all records."""

    source: str
    records: int
    kinds: dict[str, int]
    findings: tuple[Finding, ...]
    lengths: tuple[Length, ...] = ()
    samples: dict[str, float] | None = None
    shown: tuple[Mask, ...] = ()
    skipped: tuple[str, ...] = ()


def lint(
    source: Source,
    *,
    name: str | None = None,
    anatomy: Anatomy | None = None,
    max_prompt_length: int | None = None,
    against: Source | None = None,
    near: float = NEAR,
    show: int = 0,
    detail: Callable[[Hit], None] = lambda hit: None,
) -> Lint:
    """Look at every record of a source, in one pass. `name` is what the report calls it.

    `anatomy` allows the checks of tokens, `max_prompt_length` being the cut; `show` records come back as tokens.
    `detail` is called with every single hit. Memory: digests, lengths, and up to MOST prompts for the near-duplicates.
    Raises DataError for a source that cannot be read at all.
    """
    sources.check(source)
    evaluation = _questions(against, near) if against is not None else None
    return lint_items(rows(source), name or str(source), anatomy, max_prompt_length, evaluation, near, show, detail)


def lint_pairs(pairs: Iterable[Pair], **settings: Any) -> Lint:
    """The same of pairs that are in memory; `settings` as those of `lint_items`."""
    items = (Item("pairs", p.id, p.messages, p.extra, (p.chosen, p.rejected), (0,)) for p in pairs)
    return lint_items(_numbered(items), "pairs", **settings)


def lint_prompts(prompts: Iterable[Prompt], **settings: Any) -> Lint:
    """The same of prompts that are in memory; `settings` as those of `lint_items`."""
    return lint_items(_numbered(Item("prompts", p.id, p.messages, p.extra) for p in prompts), "prompts", **settings)


def _numbered(items: Iterable[Item]) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        yield Row(number, Place("", record=number), item)


def lint_items(
    found: Iterable[Row],
    name: str,
    anatomy: Anatomy | None = None,
    max_prompt_length: int | None = None,
    evaluation: Near | None = None,
    near: float = NEAR,
    show: int = 0,
    detail: Callable[[Hit], None] = lambda hit: None,
) -> Lint:
    """Look at rows; see `lint`."""
    tally, index, endings = _Tally(detail), Near(near), _Endings()
    lengths = {"characters": _Lengths()}
    tokens = TokenChecks(anatomy, max_prompt_length or anatomy.context) if anatomy else None
    if tokens:
        lengths["tokens"] = _Lengths()
    kinds: Counter[str] = Counter()
    answered = Tally()
    shown: list[Mask] = []
    unseen = 0
    for row in found:
        tally.begin(row)
        if row.bad is not None:
            tally.bad(row.bad)
            continue
        item = row.item
        assert item is not None
        kinds[item.kind] += 1
        if row.first is not None:
            tally.hit("repeated", note=f"row {row.first}")
            continue
        if item.sample:
            answered.add(item.sample)
        if item.foreign:
            tally.hit("foreign", item.foreign)
        unseen += _prompt(item, row.number, index, evaluation, tally)
        _answers(item, near, endings, tally)
        lengths["characters"].add(item, [len(answer) for answer in item.answers])
        if tokens:
            for kind, note in tokens(item):
                tally.hit(kind, note=note)
            lengths["tokens"].add(item, tokens.lengths)
            if anatomy and len(shown) < show and (seen := mask(row.number, item, anatomy)):
                shown.append(seen)
    skipped = [*endings.doubts(tally)]
    if unseen:
        skipped.append(f"near-duplicates of {unseen} prompts: only the first {len(index)} different ones are compared")
    if not tokens:
        skipped.append("what needs a tokenizer (" + ", ".join(TOKEN_KINDS) + "; lengths in tokens): give --model")
    return Lint(
        source=name,
        records=tally.records,
        kinds=dict(kinds),
        findings=tally.findings(),
        lengths=tuple(length for unit, seen in lengths.items() if (length := seen.measured(unit))),
        samples=answered.findings().to_dict() if answered.answers else None,
        shown=tuple(shown),
        skipped=tuple(skipped),
    )


# --- the checks ------------------------------------------------------------------------------------------------


def _prompt(item: Item, number: int, index: Near, evaluation: Near | None, tally: _Tally) -> bool:
    """Near-duplicates, overlap, strings of special tokens. True if the index was full and could not take the prompt."""
    said = [turn.content for turn in item.messages if turn.role != "system"]
    text = "\n".join(said)
    unseen = False
    if not index.knows(text):  # the same prompt again is how several pairs of one prompt are written
        like = index.like(text)
        if like is None:
            unseen = index.full
            index.add(number, text)
        else:
            tally.hit("near-prompts", note=f"row {like[0]}, {like[1]:.2f} alike")
    if evaluation is not None:
        asked = [turn.content for turn in item.messages if turn.role == "user"]
        matches = [match for question in asked if (match := evaluation.like(question))]
        if matches:
            row, value = max(matches, key=lambda match: match[1])
            tally.hit("overlap", "exact" if value == 1 else "near", f"row {row} of the evaluation file, {value:.2f}")
    for string in dict.fromkeys(s for turn in item.messages for s in look.special_strings(turn.content)):
        tally.hit("special-strings", string, "in the prompt")
    return unseen


def _answers(item: Item, near: float, endings: _Endings, tally: _Tally) -> None:
    """Everything that answers show by themselves, and beside each other."""
    question = item.messages[-1].content
    for place, answer in enumerate(item.answers):
        who = _who(item, place)
        if not answer.strip():
            tally.hit("empty", who)
            continue
        ended = item.ended[place] if item.ended else None
        if ended == "cap":
            tally.hit("truncated", "cut by the length limit", who)
        elif look.open_block(answer):
            tally.hit("truncated", "open code block", who)
        elif ended is None:
            endings.add(answer, who, tally)
        change = look.mix_up(question, answer)
        if change:
            tally.hit("language", change, who)
        for string in look.special_strings(answer):
            tally.hit("special-strings", string, who)
    _one_sided(item, tally)
    _alike(item, near, tally)


def _who(item: Item, place: int) -> str:
    """Which answer, in words."""
    if item.gold and len(item.answers) == 2:
        return "the better answer" if item.gold[0] == place else "the worse answer"
    return f"answer {place + 1}"


def _one_sided(item: Item, tally: _Tally) -> None:
    """Phrases and tags, and whether only some of the answers have them: that is what training would learn."""
    tags = [look.think_tags(answer) for answer in item.answers]
    for place, tag in enumerate(tags):
        if tag in ("open", "close"):
            tally.hit("think-tags", f"{tag} tag alone", _who(item, place))
    if any(tags) and not all(tags):
        tally.hit("think-tags", "in some answers only")
    phrases = [look.boilerplate(answer) for answer in item.answers]
    for place, names in enumerate(phrases):
        for name in names:
            tally.hit("boilerplate", name, _who(item, place))
    having = [place for place, names in enumerate(phrases) if names]
    if having and len(having) < len(phrases) and item.gold and len(item.answers) == 2:
        tally.hit("boilerplate", f"in {_who(item, having[0])} only")


def _alike(item: Item, near: float, tally: _Tally) -> None:
    """Answers to one prompt that are the same or nearly so; of very many answers, each with the one before it."""
    texts = item.answers
    few = len(texts) <= 16
    compared = [(i, j) for j in range(len(texts)) for i in (range(j) if few else range(max(j - 1, 0), j))]
    if any(texts[i] == texts[j] for i, j in compared):
        tally.hit("same-answers")
    values = [alike(texts[i], texts[j]) for i, j in compared if texts[i] != texts[j] and texts[i].strip()]
    if values and max(values) >= near:
        tally.hit("near-answers", note=f"{max(values):.2f} alike")


def _questions(source: Source, near: float) -> Near:
    """An index of an evaluation file's questions: `prompt`, `messages`, `instruction`, `question`, MT-Bench's `turns`.

    Raises DataError if it holds none, or more than can be remembered.
    """
    index, number = Near(near), 0
    for number, entry in enumerate(sources.entries(source), 1):
        try:
            for question in _asked(sources.fields(entry)):
                if index.full:
                    raise DataError(f"{source}: more than {MOST} questions to compare with; give a smaller file")
                index.add(number, question)
        except BadRecord as bad:
            raise DataError(f"{entry.place}: {bad}") from None
    if not len(index):
        raise DataError(f"{source}: there is no question in it; give prompts, or `instruction`, `question` or `turns`")
    return index


def _asked(fields: dict[str, Any]) -> list[str]:
    turns = fields.get("turns")
    if isinstance(turns, list):
        return [turn for turn in turns if isinstance(turn, str) and turn.strip()]
    for name in ("instruction", "question", "prompt"):
        if isinstance(fields.get(name), str) and fields[name].strip():
            return [fields[name]]
    spoken = fields.get("messages") or fields.get("prompt") or fields.get("chosen")
    if not isinstance(spoken, list):
        return []
    return [
        turn["content"]
        for turn in spoken
        if isinstance(turn, dict) and turn.get("role") == "user" and isinstance(turn.get("content"), str)
    ]


# --- counting --------------------------------------------------------------------------------------------------


class _Tally:
    """Hits counted by kind: a record counts once per kind, and once per sort of a kind."""

    def __init__(self, detail: Callable[[Hit], None]) -> None:
        self._detail = detail
        self.records = 0
        self._counts: Counter[str] = Counter()
        self._sorts: dict[str, Counter[str]] = {}
        self._rows: dict[str, list[tuple[int, str]]] = {}
        self._examples: dict[str, str] = {}
        self._last: dict[tuple[str, str], int] = {}
        self._row, self._id = 0, ""

    def begin(self, row: Row) -> None:
        self.records += 1
        self._row, self._id = row.number, row.item.id if row.item else ""

    def bad(self, bad: BadRecord) -> None:
        """A record that cannot be used, under the kind that fits."""
        kind = {"empty": "empty", "same": "same-answers"}.get(bad.kind, "unusable")
        self.hit(kind, UNUSABLE[bad.kind] if kind == "unusable" else "", str(bad))

    def hit(self, kind: str, what: str = "", note: str = "") -> None:
        self._detail(Hit(kind=kind, row=self._row, id=self._id, what=what, note=note))
        if self._is_new(kind, ""):
            self._counts[kind] += 1
            self._examples.setdefault(kind, note)
            first = self._rows.setdefault(kind, [])
            if len(first) < FIRST:
                first.append((self._row, self._id))
        sorts = self._sorts.setdefault(kind, Counter())
        what = what if what in sorts or len(sorts) < SORTS else "other"
        if what and self._is_new(kind, what):
            sorts[what] += 1

    def _is_new(self, kind: str, what: str) -> bool:
        new = self._last.get((kind, what)) != self._row
        self._last[kind, what] = self._row
        return new

    def withdraw(self, kind: str) -> int:
        """Forget a kind; how many records had it."""
        return self._counts.pop(kind, 0)

    def findings(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(
                kind=kind,
                count=self._counts[kind],
                share=self._counts[kind] / self.records,
                rows=tuple(row for row, _ in self._rows[kind]),
                ids=tuple(id_ for _, id_ in self._rows[kind]),
                sorts=dict(self._sorts.get(kind, Counter()).most_common()),
                example=self._examples[kind],
            )
            for kind in KINDS
            if self._counts[kind]
        )


class _Endings:
    """Whether the answers of a file end as sentences do, without which one that does not is not odd."""

    def __init__(self) -> None:
        self._ended = self._short = 0

    def add(self, answer: str, who: str, tally: _Tally) -> None:
        short = look.stops_short(answer)
        self._short += short is True
        self._ended += short is False
        if short:
            tally.hit("stops-short", who, f"ends with {answer.rstrip()[-20:]!r}")

    def doubts(self, tally: _Tally) -> Iterator[str]:
        total = self._ended + self._short
        if total and self._ended < MANY_END * total:
            count, share = tally.withdraw("stops-short"), self._ended / total
            yield (
                f"where answers stop short ({count} records): only {100 * share:.0f} % of the long answers end with a "
                "sentence's end, so that says nothing here"
            )


class _Lengths:
    """Lengths of better and worse answers: four bytes each."""

    def __init__(self) -> None:
        self._better, self._worse = array("I"), array("I")

    def add(self, item: Item, lengths: Iterable[int]) -> None:
        found = list(lengths)
        if item.gold and len(found) > 1:
            best = item.gold[0]
            worst = item.gold[-1] if len(item.gold) > 1 else next(i for i in range(len(found)) if i != best)
            if len(found) == 2 or len(item.gold) > 1:
                self._better.append(found[best])
                self._worse.append(found[worst])

    def measured(self, unit: str) -> Length | None:
        if not self._better:
            return None
        better, worse = (np.frombuffer(side, dtype=np.uintc) for side in (self._better, self._worse))
        wins = wilson(int((better > worse).sum()), int((better != worse).sum()))
        return Length(
            unit=unit,
            better_mean=float(better.mean()),
            better_median=float(np.median(better)),
            worse_mean=float(worse.mean()),
            worse_median=float(np.median(worse)),
            longer_wins=wins.to_dict() if wins else None,
        )
