"""Credit per token: the pieces are the text, and the shares sum to the answer's log-ratio."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from math import fsum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spa_lite.backend import INIT, POLICY, Backend, ModelSettings, Tokenizer
from spa_lite.backends.toy import ToyBackend, ToyTokenizer
from spa_lite.credit import END, Credit, credit, credits_of, pieces
from spa_lite.records import Ids, Message, Row
from tests.test_explain import moved
from tests.tiny import make_model, make_tokenizer

ASK = (Message(role="user", content="tell me"),)


def joined(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The pieces in a row, without the sign of the end."""
    return "".join(piece for piece in pieces(tokenizer, ids) if piece != END)


@cache
def byte_level() -> Any:
    """A real byte-level BPE tokenizer with a chat template, as the backends have it."""
    from spa_lite.backends.chat import ChatTokenizer

    return ChatTokenizer(make_tokenizer(), "tiny")


class Metaspace:
    """A tokenizer of SentencePiece's kind: a word begins with its space, which is dropped in front, and characters it
    does not know are bytes."""

    stop_ids, end_of_turn = frozenset({0}), 0

    def __init__(self) -> None:
        from tokenizers import Tokenizer as Core
        from tokenizers import decoders, models

        words = ["</s>", "▁", "▁a", "▁heron", "a", "!"] + [f"<0x{byte:02X}>" for byte in range(256)]
        self.core = Core(models.WordLevel({word: i for i, word in enumerate(words)}, "</s>"))
        self.core.add_special_tokens(["</s>"])
        self.core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.core.decode(list(ids)))

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        return ()

    def encode_answer(self, messages: Sequence[Message], text: str) -> Ids:
        return ()


@given(st.text(max_size=40))
@example("é日本🙂!\ufffd\ufffd x")
@example(" two  spaces ")
def test_pieces_are_the_text(text: str) -> None:
    """On bytes and on byte-level BPE, also where a character is spread over tokens."""
    for tokenizer in (ToyTokenizer(), byte_level()):
        ids = tokenizer.encode_answer(ASK, text)
        assert joined(tokenizer, ids) == tokenizer.decode(ids)
        assert pieces(tokenizer, ids)[-1] == END
        assert len(pieces(tokenizer, ids)) == len(ids)


@given(st.lists(st.integers(0, 261), max_size=30))
def test_pieces_of_any_bytes(ids: list[int]) -> None:
    """Sampled bytes need not be UTF-8; still nothing is lost, and marks are shown by their ids."""
    tokenizer = ToyTokenizer()
    found = [piece for piece in pieces(tokenizer, ids) if not piece.startswith("⟨")]
    assert "".join(found) == tokenizer.decode([i for i in ids if i < 256])


def test_a_dropped_space_is_no_mark() -> None:
    """SentencePiece drops the first space of a text. Its piece is empty in front, and a space elsewhere."""
    tokenizer = Metaspace()
    smile = [6 + byte for byte in "🙂".encode()]
    assert pieces(tokenizer, [2, 3, 1, *smile, 5, 0]) == ["a", " heron", " ", "", "", "", "🙂", "!", END]
    assert pieces(tokenizer, [1, 2, 4]) == ["", " a", "a"]
    assert tokenizer.decode([1, 2, 4]) == " aa"


def test_the_token_that_completes_a_character_has_it() -> None:
    assert pieces(ToyTokenizer(), [*"é!".encode(), 257, 256]) == ["", "é", "!", END, "⟨256⟩"]
    assert pieces(ToyTokenizer(), []) == []


def test_time_is_linear() -> None:
    """No call decodes more than a few tokens, but for the length of one character."""

    class Counted(ToyTokenizer):
        longest = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    for ids, most in (([97, 195, 169, 257] * 4000, 8), ([0xFF] * 4000, 70)):
        tokenizer, began = Counted(), time.monotonic()
        assert len(pieces(tokenizer, ids)) == len(ids)
        assert tokenizer.longest <= most
        assert time.monotonic() - began < 5


def total(credits: Sequence[Credit]) -> float:
    return fsum(c.logratio for c in credits)


def check_sums(backend: Backend, near: float) -> list[Credit]:
    """Credit of an answer, whose sum is the difference of its two scores."""
    prompt, ids = backend.tokenizer.encode_prompt(ASK), backend.tokenizer.encode_answer(ASK, "my sister mends é 日本")
    row = Row(prompt=prompt, responses=(ids,))
    ((_, (own,)),), ((_, (other,)),) = list(backend.logprob([row], POLICY)), list(backend.logprob([row], INIT))
    found = credit(backend, prompt, ids, POLICY, INIT)
    assert total(found) == pytest.approx(own.logp - other.logp, abs=near)
    assert abs(total(found)) > 100 * near
    assert "".join(c.piece for c in found) == "my sister mends é 日本" + END
    assert total(credit(backend, prompt, ids, POLICY)) == pytest.approx(own.logp, abs=near)
    assert credits_of(backend.tokenizer, ids, [c.policy for c in found], [c.reference for c in found]) == found
    return found


def test_credit_sums_to_the_log_ratio() -> None:
    check_sums(moved(ToyBackend(ModelSettings("toy"))), 1e-9)


def test_credit_sums_to_the_log_ratio_on_torch(tmp_path: Path) -> None:
    """Scored in float32, one answer at a time or both together."""
    pytest.importorskip("torch")
    from spa_lite.backends.torch import TorchBackend

    check_sums(moved(TorchBackend(ModelSettings(str(make_model(tmp_path)), device="cpu"))), 1e-5)


def test_the_toy_is_a_backend() -> None:
    """A base without adapter earns nothing against itself."""
    backend = ToyBackend(ModelSettings("toy"))
    prompt, ids = backend.tokenizer.encode_prompt(ASK), backend.tokenizer.encode_answer(ASK, "ab")
    assert [c.logratio for c in credit(backend, prompt, ids, POLICY, INIT)] == [0.0, 0.0, 0.0]
