"""Who can be asked a question in words: a model in this process, or (`spa_lite.server`) one behind a server.

Two things can be had of both: a reply, and how probable each of a few fixed replies is. The second needs no parsing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from spa_lite.backend import Backend, Sampling
from spa_lite.events import per_unit
from spa_lite.fit import halving
from spa_lite.judge import scorer
from spa_lite.keys import digest
from spa_lite.opinion import Tick
from spa_lite.records import Ids, Message, Row

Conversation = Sequence[Message]
ROUNDING = 1e-12
"""Share of an option's probability that is left at least where all of it goes to a longer option."""


class Asked(Protocol):
    """Somebody who can be asked. A conversation ends with a user turn."""

    @property
    def name(self) -> str:
        """Who is asked, to stand beside every number. Holds no secret."""
        ...

    @property
    def key(self) -> str:
        """Digest of all that the answers depend on beside the conversations."""
        ...

    def replies(self, conversations: Sequence[Conversation], max_tokens: int, tick: Tick = lambda: None) -> list[str]:
        """The reply to each at temperature 0; empty where there is none, as where the conversation is too long.

        `tick` is called once per conversation.
        """
        ...

    def preferences(
        self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick = lambda: None
    ) -> list[tuple[float, ...] | None]:
        """Log-probability (nats) that the reply begins with each option; None where it cannot be known.

        Options exclude each other: what begins with "10" does not count for "1". They need not sum to one. `tick` is
        called once per conversation that is known of: where it is not, there is still the reply to ask for.
        """
        ...


class Drawn(Protocol):
    """Somebody whose replies can be drawn at a temperature, each from a random stream of its own."""

    @property
    def name(self) -> str:
        """Who is asked, to stand beside every number."""
        ...

    @property
    def key(self) -> str:
        """Digest of all that the answers depend on beside the conversations and what they are drawn with."""
        ...

    def draws(
        self,
        conversations: Sequence[Conversation],
        keys: Sequence[Sequence[bytes]],
        temp: float,
        max_tokens: int,
        tick: Tick = lambda: None,
    ) -> list[list[str]]:
        """As many replies to each as there are keys, which name their streams (see `spa_lite.keys`); all have as many.

        Empty ones where the conversation is too long. `tick` is called once per conversation.
        """
        ...


class LocalModel:
    """A backend's model under one of its roles. `name` is what people call it.

    What adapter the role has is not part of `key`: whoever binds one says so in `bound`.
    """

    def __init__(self, backend: Backend, role: str, name: str, bound: str = "") -> None:
        self.backend, self.role, self.name = backend, role, name
        self.key = digest("local model", backend.fingerprint, role, bound).hex()
        self.too_long = 0
        """Conversations that did not fit into the model's context and were not asked."""

    def replies(self, conversations: Sequence[Conversation], max_tokens: int, tick: Tick = lambda: None) -> list[str]:
        """The most probable token after the other, until the turn ends or after `max_tokens`."""
        # Nothing is drawn at temperature 0, but the contract asks for a stream per answer.
        keys = [[digest("reply", index)] for index in range(len(conversations))]
        return [text for (text,) in self.draws(conversations, keys, 0.0, max_tokens, tick)]

    def draws(
        self,
        conversations: Sequence[Conversation],
        keys: Sequence[Sequence[bytes]],
        temp: float,
        max_tokens: int,
        tick: Tick = lambda: None,
    ) -> list[list[str]]:
        """Replies drawn from the whole vocabulary, until the turn ends or after `max_tokens`."""
        prompts = {i: self.backend.tokenizer.encode_prompt(turns) for i, turns in enumerate(conversations)}
        fitting = {i: ids for i, ids in prompts.items() if len(ids) < self.backend.context}
        sampling = Sampling(temperature=temp, top_p=1.0, max_tokens=max_tokens)
        written = self._written(list(fitting.values()), [keys[i] for i in fitting], sampling, tick)
        texts = dict(zip(fitting, written, strict=True))
        self.too_long += len(prompts) - len(fitting)
        for _ in range(len(prompts) - len(fitting)):
            tick()
        return [texts.get(i, [""] * len(keys[i])) for i in prompts]

    def preferences(
        self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick = lambda: None
    ) -> list[tuple[float, ...] | None]:
        """Summed log-probability of each option's tokens, as they stand after the prompt, without the end of turn.

        Sums are compared, so that options may share their first tokens (a space of its own, say). Where one
        option's tokens begin another's, the longer one's probability is taken off the shorter one's.
        None where the conversation is too long, and where the tokenizer makes two options the same.
        """
        rows = {i: self._row(turns, options) for i, turns in enumerate(conversations)}
        fitting = {i: row for i, row in rows.items() if row is not None}
        sums = dict(zip(fitting, scorer(self.backend, self.role, per_unit(tick))(list(fitting.values())), strict=True))
        return [apart(fitting[i].responses, sums[i]) if i in fitting else None for i in rows]

    def _row(self, turns: Conversation, options: Sequence[str]) -> Row | None:
        """What is scored; None where it does not fit."""
        tokenizer = self.backend.tokenizer
        row = Row(
            prompt=tokenizer.encode_prompt(turns),
            responses=tuple(tokenizer.encode_answer(turns, option)[:-1] for option in options),
        )
        return row if len(row.prompt) + max(map(len, row.responses)) <= self.backend.context else None

    def _written(
        self, prompts: Sequence[Ids], keys: Sequence[Sequence[bytes]], sampling: Sampling, tick: Tick
    ) -> list[list[str]]:
        if not prompts:
            return []

        def once() -> list[list[str]]:
            found: dict[int, list[str]] = {}
            for index, completions in self.backend.sample(prompts, len(keys[0]), sampling, keys, self.role):
                found[index] = [completion.text for completion in completions]
                tick()
            return [found[index] for index in range(len(prompts))]

        return halving(self.backend, "sample", once)


def apart(options: Sequence[Ids], sums: Sequence[float]) -> tuple[float, ...] | None:
    """Log-probabilities of options that exclude each other, from those of their tokens.

    None if two options are the same tokens, or one is none at all.
    """
    if len(set(options)) < len(options) or not all(options):
        return None
    left = dict(zip(options, sums, strict=True))
    for ids in sorted(left, key=len, reverse=True):  # so that what is taken off has been taken apart before
        longer = [left[other] - left[ids] for other in left if len(other) > len(ids) and other[: len(ids)] == ids]
        if longer and left[ids] > -math.inf:
            left[ids] += math.log1p(-min(math.fsum(map(math.exp, longer)), 1 - ROUNDING))
    return tuple(left[ids] for ids in options)


def without_thinking(reply: str) -> str:
    """The reply without what a model thinks aloud in <think> blocks, closed or cut off.

    A template may open the block in the prompt, so everything before a last, lonely </think> is thinking, too.
    """
    return re.sub(r"<think>.*", "", reply.rpartition("</think>")[2], flags=re.DOTALL).strip()
