"""Candidate `improve`: a better answer, asked of whoever has seen the first one (SynPO, 2410.06961)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spa_lite.prompts.material import shipped
from spa_lite.records import Message

Conversation = tuple[Message, ...]


def request(messages: Sequence[Message], answer: str, lesson: bool) -> Conversation:
    """The conversation that asks for a better answer to `messages`; in the lesson as its model was taught.

    Elsewhere the answer stands as a turn of the conversation and the request after it.
    """
    if lesson:
        from spa_lite.lesson.skills import ask_to_improve

        return (Message(role="user", content=ask_to_improve(messages[-1].content, answer)),)
    said, wish = Message(role="assistant", content=answer), Message(role="user", content=shipped("improve"))
    return (*messages, said, wish)


def examples(answered: Iterable[tuple[Sequence[Message], str, str]], lesson: bool) -> list[tuple[Conversation, str]]:
    """What teaches an improver, from (conversation, own answer, good answer): (request, good answer) of each."""
    return [(request(messages, own, lesson), good) for messages, own, good in answered]
