"""What the benchmarks share: their files read item by item, and replies that are made once and kept.

A kept reply is found by a digest of everything it depends on. So an interrupted evaluation goes on where it stopped,
and a changed question, model or setting is never given an old reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from spa_lite import sources
from spa_lite.asking import Asked, Conversation
from spa_lite.backend import Backend, Sampling
from spa_lite.errors import DataError
from spa_lite.fit import halving
from spa_lite.journal import Marked
from spa_lite.keys import digest, sample_key
from spa_lite.opinion import Tick
from spa_lite.records import Prompt, Record
from spa_lite.sources import BadRecord, Fields, Source

T = TypeVar("T")

TOGETHER = 16
"""Questions put to a judge before its replies are written down."""


class Reply(Record, frozen=True, kw_only=True):
    """What was said. `cut`: the length cap, or the end of the context, came before the end of the turn."""

    text: str
    cut: bool = False


class _Line(Record, frozen=True, kw_only=True):
    key: str
    reply: Reply


class Kept:
    """Replies by key, in a JSON-lines file, or in memory alone where `path` is None."""

    def __init__(self, path: Path | None) -> None:
        self._journal = Marked(path) if path is not None else None
        kept = self._journal.kept if self._journal else []
        lines = [msgspec.json.decode(line, type=_Line) for line in kept]
        self._replies = {line.key: line.reply for line in lines}

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def get(self, key: str) -> Reply | None:
        """The reply of that key, if there is one."""
        return self._replies.get(key)

    def add(self, replies: Iterable[tuple[str, Reply]]) -> None:
        """Remember replies; they are on the disk when this returns."""
        new = [_Line(key=key, reply=reply) for key, reply in replies]
        self._replies |= {line.key: line.reply for line in new}
        if self._journal is not None:
            self._journal.append(new)


def items(source: Source, parse: Callable[[Fields], T]) -> list[T]:
    """Every record of a file, read by `parse`, which raises BadRecord or msgspec's ValidationError.

    Raises DataError, naming file and line, for the first record that cannot be used, and for a file without any.
    """
    found = []
    for entry in sources.entries(source):
        try:
            found.append(parse(sources.fields(entry)))
        except BadRecord as error:
            raise DataError(f"{entry.place}: {error}") from None
        except msgspec.ValidationError as error:
            raise DataError(f"{entry.place}: {error}; mend the line, or get the file again") from None
    if not found:
        raise DataError(f"{source}: the file is empty; get it again")
    return found


def generate(
    backend: Backend,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    *,
    model: str,
    role: str,
    kept: Kept,
    tick: Tick = lambda: None,
) -> list[Reply | None]:
    """The model's reply to each prompt, in order; None where the prompt alone fills the context.

    A reply depends on (seed, id of the prompt) and the prompt alone. `model` names what is bound to `role` beside the
    base, such as a digest of the adapter: a kept reply of another model is not taken. `tick` is called once per prompt.
    """
    ids = [tuple(backend.tokenizer.encode_prompt(prompt.messages)) for prompt in prompts]
    streams = [sample_key(seed, 0, prompt.id, 0) for prompt in prompts]
    way = (sampling.temperature, sampling.top_p, sampling.max_tokens)
    names = [
        digest("reply", backend.fingerprint, model, stream, *way, *prompt).hex()
        for stream, prompt in zip(streams, ids, strict=True)
    ]
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) < backend.context]
    for _ in range(len(ids) - sum(names[i] not in kept for i in fitting)):
        tick()

    def once() -> None:
        todo = [i for i in fitting if names[i] not in kept]
        roomy = [i for i in todo if len(ids[i]) + sampling.max_tokens <= backend.context]
        # A batch is as wide as its longest prompt and its longest answer, so one that is short of room goes alone.
        for group in (roomy, *([i] for i in todo if i not in roomy)):
            streams_of = [[streams[i]] for i in group]
            for index, (completion,) in backend.sample([ids[i] for i in group], 1, sampling, streams_of, role):
                kept.add([(names[group[index]], Reply(text=completion.text, cut=completion.ended == "cap"))])
                tick()

    halving(backend, "sample", once)
    return [kept.get(name) for name in names]


def ask(
    asked: Asked, conversations: Sequence[Conversation], max_tokens: int, kept: Kept, tick: Tick = lambda: None
) -> list[str]:
    """The replies of whoever is asked, in order; empty where there is none. `tick` is called once per conversation."""
    names = [_name(asked, conversation, max_tokens) for conversation in conversations]
    todo = [i for i, name in enumerate(names) if name not in kept]
    for _ in range(len(names) - len(todo)):
        tick()
    for start in range(0, len(todo), TOGETHER):
        some = todo[start : start + TOGETHER]
        texts = asked.replies([conversations[i] for i in some], max_tokens, tick)
        kept.add((names[i], Reply(text=text)) for i, text in zip(some, texts, strict=True))
    return [reply.text for name in names if (reply := kept.get(name))]


def _name(asked: Asked, conversation: Conversation, max_tokens: int) -> str:
    said = (part for turn in conversation for part in (turn.role, turn.content))
    return digest("asked", asked.key, max_tokens, *said).hex()
