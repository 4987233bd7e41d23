"""Answers in pieces, and conversations that grow too long."""

from __future__ import annotations

import pytest

from spa_lite import backends, keys
from spa_lite.backend import INIT, Backend, ModelSettings, Sampling
from spa_lite.errors import DataError
from spa_lite.records import Completion, Message
from spa_lite.talk import fitting, speak

KEY = keys.digest("talk")


@pytest.fixture(scope="module")
def toy() -> Backend:
    """The bigram model: a token is a byte."""
    return backends.load("toy", ModelSettings("toy"))


def turns(*texts: str) -> list[Message]:
    """A conversation that begins with a user turn."""
    return [Message(role=("user", "assistant")[k % 2], content=text) for k, text in enumerate(texts)]


def test_the_pieces_are_the_answer(toy: Backend) -> None:
    prompt, sampling = toy.tokenizer.encode_prompt(turns("hello")), Sampling(1.0, 1.0, 40)
    stream, pieces = speak(toy, prompt, sampling, KEY, INIT), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            whole: Completion = stop.value
            break
    expected = dict(toy.sample([prompt], 1, sampling, [[KEY]], INIT))[0][0]
    assert (whole.ids, whole.text, whole.ended) == (expected.ids, expected.text, expected.ended)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3


def test_a_letter_of_several_tokens_comes_whole(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = toy.tokenizer.encode_answer(turns("?"), "naïve 東!")
    monkeypatch.setattr(toy, "stream", lambda *_: iter(ids))
    assert list(speak(toy, (1,), Sampling(), KEY)) == ["n", "a", "ï", "v", "e", " ", "東", "!"]
    cut = toy.tokenizer.encode_answer(turns("?"), "a東")[:-2]
    monkeypatch.setattr(toy, "stream", lambda *_: iter(cut))
    assert list(speak(toy, (1,), Sampling(), KEY)) == ["a", "\ufffd"], "what stays unfinished is shown at the end"


def test_a_long_conversation_loses_its_oldest_exchanges(toy: Backend) -> None:
    system = Message(role="system", content="Be brief.")
    said = [system, *turns("a" * 30, "b" * 30, "c" * 30, "d" * 30, "e" * 30)]
    whole = len(toy.tokenizer.encode_prompt(said))
    assert fitting(said, toy.tokenizer, whole) == (tuple(said), toy.tokenizer.encode_prompt(said), 0)
    kept, ids, dropped = fitting(said, toy.tokenizer, whole - 1)
    assert (list(kept), dropped) == ([system, *said[3:]], 2)
    assert ids == toy.tokenizer.encode_prompt(kept)
    assert fitting(said, toy.tokenizer, whole - 80)[2] == 4
    with pytest.raises(DataError, match=r"the last turn has .* tokens, but there is room for 20: shorten it"):
        fitting(said, toy.tokenizer, 20)


def test_a_stop_string_ends_the_answer_before_itself(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = toy.tokenizer.encode_answer(turns("?"), "one two tw three")
    tokens = iter(ids)
    monkeypatch.setattr(toy, "stream", lambda *_: tokens)

    def said(*stop: str) -> tuple[list[str], Completion]:
        nonlocal tokens
        tokens = iter(ids)
        stream, pieces = speak(toy, (1,), Sampling(), KEY, stop=stop), []
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                return pieces, end.value

    pieces, whole = said("two three", "tw t")
    assert (pieces, whole.text, whole.ended) == ([*"one ", "two "], "one two ", "stop"), "held back while it may be one"
    assert bytes(whole.ids) == b"one two tw t"
    assert next(tokens) == ord("h"), "nothing is drawn after it"
    pieces, whole = said("three!")
    assert (pieces, whole.text, whole.ended) == ([*"one ", "tw", *"o ", "tw", " ", "three"], "one two tw three", "eos")
    assert said("e t", "one")[1].text == "", "the first in the text, not in the list"
