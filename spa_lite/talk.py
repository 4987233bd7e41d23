"""One answer, as it is being written: what `chat`, `compare` and `serve` say to a model and hear from it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from spa_lite.backend import POLICY, Backend, Sampling, Tokenizer
from spa_lite.errors import DataError
from spa_lite.records import Completion, Ids, Message

UNFINISHED = "\ufffd"
"""What a decoder puts for bytes that are not a letter yet: the next token may make them one."""


def speak(
    backend: Backend, prompt: Ids, sampling: Sampling, key: bytes, role: str = POLICY
) -> Generator[str, None, Completion]:
    """Yield the answer to a prompt in pieces of text, and return it whole. Closing the generator ends the answer."""
    ids: list[int] = []
    said = ""
    for token in backend.stream(prompt, sampling, key, role):
        ids.append(token)
        text = backend.tokenizer.decode(ids)
        if text.startswith(said) and not text.endswith(UNFINISHED) and text != said:
            yield text[len(said) :]
            said = text
    text = backend.tokenizer.decode(ids)
    if text.startswith(said) and text != said:
        yield text[len(said) :]
    ended = bool(ids) and ids[-1] in backend.tokenizer.stop_ids
    return Completion(ids=tuple(ids), text=text, ended="eos" if ended else "cap")


def fitting(messages: Sequence[Message], tokenizer: Tokenizer, room: int) -> tuple[tuple[Message, ...], Ids, int]:
    """The conversation without its oldest exchanges, as many as it takes to fit into `room` tokens; its ids; and how
    many messages are left out. A system turn stays. Raises DataError if the last turn alone is too long."""
    kept = list(messages)
    first = 1 if kept[0].role == "system" else 0
    while True:
        ids = tokenizer.encode_prompt(kept)
        if len(ids) <= room:
            return tuple(kept), ids, len(messages) - len(kept)
        following = next((k for k in range(first + 1, len(kept)) if kept[k].role == "user"), None)
        if following is None:
            raise DataError(f"the last turn has {len(ids)} tokens, but there is room for {room}: shorten it")
        del kept[first:following]
