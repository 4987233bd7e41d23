"""From records to token ids, within limits. The tokenizer here has one token per word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_lite.encode import EncodeReport, answer_ids, encode_pairs, encode_prompts
from spa_lite.errors import RecipeError
from spa_lite.records import Ids, Message, Pair, Prompt, Row

BOS, HEADER, END = 1, 2, 3


class Words:
    """A prompt is BOS, one id per word, the answer's header; "<end>" in an answer is the end-of-turn token."""

    def __init__(self) -> None:
        self.calls = 0
        self.known = {"<end>": END}

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({END})

    @property
    def end_of_turn(self) -> int:
        return END

    def ids(self, text: str) -> Ids:
        self.calls += 1
        # Ids from 10 on, and one id for upper and lower case, so that two texts may be the same tokens.
        return tuple(self.known.setdefault(word.lower(), 10 + len(self.known)) for word in text.split())

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        return (BOS, *(i for turn in messages for i in self.ids(turn.content)), HEADER)

    def encode_answer(self, messages: Sequence[Message], text: str) -> Ids:
        return (*self.ids(text), END)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def turns(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(id=text, messages=turns(text)) for text in texts]


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(id=prompt, messages=turns(prompt), chosen=chosen, rejected=rejected)


def rows(
    *pairs: Pair, max_prompt: int = 9, max_length: int = 20, long: Literal["skip", "cut"] = "skip"
) -> tuple[list[Row], EncodeReport]:
    encoded, report = encode_pairs(
        pairs, Words(), max_prompt_length=max_prompt, max_length=max_length, long_prompts=long, context=20
    )
    assert all(a.id == b.id for (a, _), b in zip(encoded, pairs, strict=False)) or report.skipped
    return [row for _, row in encoded], report


def test_long_prompts_are_skipped_and_counted() -> None:
    some = prompts("a b", "a b c", "a")
    encoded, report = encode_prompts(some, Words(), max_prompt_length=4, long_prompts="skip", max_tokens=4, context=8)
    assert encoded == [(some[0], (BOS, 11, 12, HEADER)), (some[2], (BOS, 11, HEADER))]
    assert report == EncodeReport(kept=2, long_prompts=1)
    assert report.skipped == 1
    assert report.lines() == ["2 encoded.", "1 skipped: the prompt is too long."]


def test_a_cut_prompt_keeps_its_end() -> None:
    encoded, report = encode_prompts(
        prompts("a b c d"), Words(), max_prompt_length=3, long_prompts="cut", max_tokens=4, context=8
    )
    assert [ids for _, ids in encoded] == [(13, 14, HEADER)]
    assert report == EncodeReport(kept=1, cut_prompts=1)


def test_a_prompt_without_tokens_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Words, "encode_prompt", lambda self, messages: ())
    encoded, report = encode_prompts(
        prompts("a"), Words(), max_prompt_length=3, long_prompts="cut", max_tokens=4, context=8
    )
    assert (encoded, report) == ([], EncodeReport(empty=1))


def test_limits_beyond_the_context_are_refused_before_any_work() -> None:
    words = Words()
    with pytest.raises(RecipeError, match=r"max_prompt_length 5 and max_tokens 4 make 9 tokens.*context is 8; lower"):
        encode_prompts(prompts("a"), words, max_prompt_length=5, long_prompts="skip", max_tokens=4, context=8)
    with pytest.raises(RecipeError, match="max_length is 9, but the model's context is 8; lower it to 8"):
        encode_pairs([pair("a", "b", "c")], words, max_prompt_length=5, max_length=9, long_prompts="skip", context=8)
    with pytest.raises(RecipeError, match="max_tokens is 0; it must be at least 1"):
        encode_prompts(prompts("a"), words, max_prompt_length=5, long_prompts="skip", max_tokens=0, context=8)
    assert words.calls == 0


def test_a_pair_becomes_a_row_with_the_chosen_answer_first() -> None:
    (row,), report = rows(pair("q", "a b", "c"))
    assert row == Row(prompt=(BOS, 11, HEADER), responses=((12, 13, END), (14, END)))
    assert report == EncodeReport(kept=1)
    assert report.lines() == ["1 encoded."]


def test_long_answers_lose_their_end_and_their_end_of_turn_token() -> None:
    (row,), report = rows(pair("q", "a b c", "a d"), max_length=6)
    assert row.responses == ((12, 13, 14), (12, 15, END))
    assert report == EncodeReport(kept=1, cut_responses=1)
    (row,), report = rows(pair("q", "a b c", "d e f"), max_length=5)
    assert row.responses == ((12, 13), (15, 16))
    assert report == EncodeReport(kept=1, cut_responses=2)
    assert report.lines()[1] == "2 answers lost their end and their end-of-turn token: too long."


def test_pairs_with_no_answer_left_are_skipped_and_counted() -> None:
    assert rows(pair("q", "a", "b"), max_length=3) == ([], EncodeReport(empty=1))
    assert rows(pair("q", "<end>", "b")) == ([], EncodeReport(empty=1))


def test_pairs_that_become_the_same_tokens_are_dropped_and_counted() -> None:
    some = (pair("q", "a b", "A B"), pair("r", "a b c d x", "a b c d y"))
    assert rows(*some, max_length=7) == ([], EncodeReport(identical=2))
    assert rows(*some, max_length=8)[1] == EncodeReport(kept=1, identical=1, cut_responses=2)


def test_identical_answers_can_be_kept_for_judging() -> None:
    encoded, report = encode_pairs(
        [pair("q", "a", "A")],
        Words(),
        max_prompt_length=9,
        max_length=20,
        long_prompts="skip",
        context=20,
        keep_identical=True,
    )
    assert report == EncodeReport(kept=1)
    assert encoded[0][1].responses == ((12, END), (12, END))


def test_long_prompts_of_pairs_are_skipped_or_cut() -> None:
    assert rows(pair("a b c", "x", "y"), max_prompt=4) == ([], EncodeReport(long_prompts=1))
    (row,), report = rows(pair("a b c", "x", "y"), max_prompt=3, long="cut")
    assert row.prompt == (12, 13, HEADER)
    assert report == EncodeReport(kept=1, cut_prompts=1)


@pytest.mark.parametrize("text", ["a", "a <end>", "a <end> <end>", "a <end> b"])
def test_an_answer_ends_with_exactly_one_end_of_turn_token(text: str) -> None:
    ids = answer_ids(turns("q"), text, Words())
    assert ids[-1] == END
    assert ids[-2] != END


words_of = st.lists(st.sampled_from("abcdeABC"), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=50)
@given(st.lists(st.builds(pair, words_of, words_of, words_of)), st.integers(1, 10), st.integers(1, 20), st.booleans())
def test_every_pair_is_either_encoded_within_the_limits_or_counted(
    pairs: list[Pair], max_prompt: int, max_length: int, cut: bool
) -> None:
    encoded, report = rows(*pairs, max_prompt=max_prompt, max_length=max_length, long="cut" if cut else "skip")
    assert len(encoded) == report.kept
    assert report.kept + report.skipped == len(pairs)
    for row in encoded:
        assert len(row.prompt) <= max_prompt
        assert row.responses[0] != row.responses[1]
        assert all(1 <= len(ids) <= max_length - len(row.prompt) for ids in row.responses)
    whole = sum(ids[-1] == END for row in encoded for ids in row.responses)
    assert whole == 2 * report.kept - report.cut_responses
