"""What only a tokenizer can tell of a record: its length, what the template makes of it, and where its tokens meet.

None of this needs a model's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from spa_lite.backend import Tokenizer
from spa_lite.credit import pieces
from spa_lite.encode import answer_ids
from spa_lite.errors import DataError, ModelError
from spa_lite.reading import Item
from spa_lite.records import Ids, Message, Record

HEADER = 2
"""Tokens at the end of a prompt that are the template's, the same for every record."""


class Anatomy(Protocol):
    """A tokenizer that can be looked into; `spa_lite.backends.anatomy` has it for every model."""

    @property
    def context(self) -> int:
        """Tokens of the longest text."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes ids of texts."""
        ...

    def together(self, messages: Sequence[Message], text: str) -> tuple[Ids, Ids] | None:
        """Ids of prompt and answer as one text, and of the prompt alone; None where this cannot be said."""
        ...

    def special(self, ids: Sequence[int]) -> dict[int, str]:
        """The control tokens among these ids, and their names."""
        ...

    @property
    def strings(self) -> tuple[str, ...]:
        """The strings of the control tokens."""
        ...


class Token(Record, frozen=True, kw_only=True):
    """One token as it is shown: its text, whether its log-probability counts, whether it is a control token."""

    id: int
    text: str
    scored: bool
    special: bool


class Mask(Record, frozen=True, kw_only=True):
    """A record as the model sees it: the prompt, and each answer with its end-of-turn token."""

    row: int
    id: str
    prompt: tuple[Token, ...]
    answers: tuple[tuple[Token, ...], ...]


class TokenChecks:
    """Checks of one item after the other. `lengths` is the answers' number of tokens, the last item's."""

    def __init__(self, anatomy: Anatomy, max_prompt_length: int) -> None:
        self._anatomy, self._most = anatomy, max_prompt_length
        self._header: Ids | None = None
        self.lengths: tuple[int, ...] = ()

    def __call__(self, item: Item) -> Iterator[tuple[str, str]]:
        """(kind, what exactly) of all that is odd."""
        self.lengths = ()
        tokenizer = self._anatomy.tokenizer
        try:
            prompt = tuple(tokenizer.encode_prompt(item.messages))
            answers = [answer_ids(item.messages, answer, tokenizer) for answer in item.answers]
        except (ModelError, DataError) as error:
            yield "template", f"refused: {error}"
            return
        self.lengths = tuple(len(ids) for ids in answers)
        if len(prompt) > self._most:
            yield "long-prompt", f"{len(prompt)} tokens"
        yield from self._template(item, prompt)
        for text, ids in zip(item.answers, answers, strict=True):
            found = self._anatomy.together(item.messages, text)
            if found and found[0][: len(found[1])] != found[1]:
                yield "boundary", _where(self._anatomy, *found)
            if _squeezed(tokenizer.decode(ids)) != _squeezed(_without(text, self._anatomy.strings)):
                yield "lossy", "an answer does not come back from its tokens"

    def _template(self, item: Item, prompt: Ids) -> Iterator[tuple[str, str]]:
        special = self._anatomy.special(prompt[:2])
        if len(prompt) > 1 and prompt[0] == prompt[1] and prompt[0] in special:
            yield "template", f"begins twice with {special[prompt[0]]}"
        seen = _squeezed(self._anatomy.tokenizer.decode(prompt))
        if any(_squeezed(_without(turn.content, self._anatomy.strings)) not in seen for turn in item.messages):
            yield "template", "a turn does not come back from the prompt's tokens"
        self._header = self._header or prompt[-HEADER:]
        if prompt[-HEADER:] != self._header:
            yield "template", "the prompt's last tokens are others than those of the first record"


def _where(anatomy: Anatomy, both: Ids, before: Ids) -> str:
    """The token that straddles the border, and what the prompt alone ends with."""
    at = next((i for i, (x, y) in enumerate(zip(both, before, strict=False)) if x != y), len(before) - 1)
    texts = [anatomy.tokenizer.decode([i]) for i in (both[at], before[-1])]
    return f"{texts[0]!r} instead of {texts[1]!r}"


def _squeezed(text: str) -> str:
    """A text without blanks: templates trim, and some tokenizers drop a blank at the front."""
    return "".join(text.split())


def _without(text: str, strings: Sequence[str]) -> str:
    """A text without the strings of control tokens, which `decode` may leave out."""
    for string in strings:
        text = text.replace(string, "")
    return text


def mask(row: int, item: Item, anatomy: Anatomy) -> Mask | None:
    """A record's tokens, and which of them are scored; None where the template refuses it, which TokenChecks tells."""
    tokenizer = anatomy.tokenizer
    try:
        prompt = tuple(tokenizer.encode_prompt(item.messages))
        answers = [answer_ids(item.messages, answer, tokenizer) for answer in item.answers]
    except (ModelError, DataError):
        return None
    return Mask(
        row=row,
        id=item.id,
        prompt=_tokens(anatomy, prompt, False),
        answers=tuple(_tokens(anatomy, ids, True) for ids in answers),
    )


def _tokens(anatomy: Anatomy, ids: Ids, scored: bool) -> tuple[Token, ...]:
    names = anatomy.special(ids)
    texts = pieces(anatomy.tokenizer, ids)
    return tuple(
        Token(id=i, text=names.get(i, text), scored=scored, special=i in names)
        for i, text in zip(ids, texts, strict=True)
    )
