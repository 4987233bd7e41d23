"""A conversation with one policy: what was asked and answered, the next answer, and what of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spa_lite.backend import Backend, Sampling
from spa_lite.errors import DataError
from spa_lite.keys import digest
from spa_lite.records import Completion, Message
from spa_lite.talk import fitting, speak

Ending = Literal["eos", "cap", "context", "stopped"]
"""The model ended; `max_tokens` cut it; the model's context did; whoever listened stopped it."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. `left_out`: how many earlier exchanges no longer fitted when it was written."""

    asked: str
    answer: str
    ended: Ending
    attempt: int = 0
    left_out: int = 0

    @property
    def counts(self) -> bool:
        """Whether it is part of what is asked and saved later: an exchange without an answer is not."""
        return bool(self.answer.strip())


Answering = Generator[str, None, Exchange]
"""Yields an answer piece by piece, and returns the exchange, which the conversation then holds."""


@dataclass
class Conversation:
    """With the policy bound to `role`. The same seed and the same questions give the same conversation.

    An answer that fails (DataError for a question too long for the model, BackendError) or that nobody hears to its end
    changes nothing.
    """

    backend: Backend
    role: str
    sampling: Sampling
    seed: int = 0
    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def ask(self, question: str, stop: Callable[[], object] = lambda: False) -> Answering:
        """Answer a question. Once `stop()` is true, the answer ends with what was said so far."""
        return self._answer(self.exchanges, question, 0, stop)

    def again(self, stop: Callable[[], object] = lambda: False) -> Answering:
        """Another answer to the last question, from another random stream. Raises DataError if there can be none."""
        if not self.exchanges:
            raise DataError("there is no answer yet to make again: ask something first")
        if self.sampling.temperature == 0:
            raise DataError("at temperature 0 the answer would be the same: raise --temp to get another one")
        *before, last = self.exchanges
        return self._answer(before, last.asked, last.attempt + 1, stop)

    def instruct(self, system: str | None) -> None:
        """Set the system turn of all answers to come. Raises DataError, and keeps the old one, if the model's template
        takes none."""
        self.backend.tokenizer.encode_prompt([*_system(system), Message(role="user", content="?")])
        self.system = system

    @property
    def answered(self) -> bool:
        """Whether there is something to record."""
        return any(exchange.counts for exchange in self.exchanges)

    def record(self) -> dict[str, Any]:
        """One JSON line: the last question as `prompt`, `messages` up to its answer, and how each answer ended.

        Readable as a prompt and as a conversation, if it is `answered`. NUL, which no reader takes, becomes U+FFFD.
        """
        kept = [exchange for exchange in self.exchanges if exchange.counts]
        messages = [{"role": m.role, "content": m.content.replace("\0", "\ufffd")} for m in self._messages(kept)]
        sampling = {"temp": self.sampling.temperature, "top_p": self.sampling.top_p, "seed": self.seed}
        ended = [exchange.ended for exchange in kept]
        return {"prompt": messages[-2]["content"], "messages": messages, "ended": ended, "stage": self.role} | sampling

    def _messages(self, exchanges: Sequence[Exchange]) -> list[Message]:
        turns = _system(self.system)
        for exchange in exchanges:
            if exchange.counts:
                turns += [Message(role="user", content=exchange.asked)]
                turns += [Message(role="assistant", content=exchange.answer)]
        return turns

    def _answer(self, before: Sequence[Exchange], question: str, attempt: int, stop: Callable[[], object]) -> Answering:
        before = list(before)
        turns = [*self._messages(before), Message(role="user", content=question)]
        limit, context = self.sampling.max_tokens, self.backend.context
        # A cap beyond half of the context would leave no room for the conversation.
        _, ids, dropped = fitting(turns, self.backend.tokenizer, context - min(limit, context // 2))
        pieces = speak(self.backend, ids, self.sampling, digest("chat", self.seed, len(before), attempt), self.role)
        said: list[str] = []
        whole: Completion | None = None
        while not stop():
            try:
                said.append(next(pieces))
            except StopIteration as end:
                whole = end.value
                break
            yield said[-1]
        pieces.close()
        ended: Ending = "stopped"
        if whole:
            ended = "eos" if whole.ended == "eos" else "cap" if len(whole.ids) >= limit else "context"
        exchange = Exchange(question, whole.text if whole else "".join(said), ended, attempt, dropped // 2)
        self.exchanges = [*before, exchange]
        return exchange


def _system(text: str | None) -> list[Message]:
    return [Message(role="system", content=text)] if text else []
