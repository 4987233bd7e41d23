"""One answer, as it is being written: what `chat`, `compare` and `serve` say to a model and hear from it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from spa_lite.backend import POLICY, Backend, Sampling, Tokenizer
from spa_lite.errors import DataError
from spa_lite.records import Completion, Ended, Ids, Message

UNFINISHED = "\ufffd"
"""What a decoder puts for bytes that are not a letter yet: the next token may make them one."""


def speak(
    backend: Backend, prompt: Ids, sampling: Sampling, key: bytes, role: str = POLICY, stop: Sequence[str] = ()
) -> Generator[str, None, Completion]:
    """Yield the answer to a prompt in pieces of text, and return it whole. Closing the generator ends the answer.

    The text ends before the first of the strings in `stop`; the ids are those that were drawn until it was seen.
    """
    ids: list[int] = []
    said = text = ""
    ended: Ended = "cap"
    for token in backend.stream(prompt, sampling, key, role):
        ids.append(token)
        whole = backend.tokenizer.decode(ids)
        text = before(whole, stop)
        if text != whole:
            ended = "stop"
            break
        ready = text[: len(text) - begun(text, stop)]
        if ready.startswith(said) and not text.endswith(UNFINISHED) and ready != said:
            yield ready[len(said) :]
            said = ready
    if text.startswith(said) and text != said:
        yield text[len(said) :]
    if ended == "cap" and ids and ids[-1] in backend.tokenizer.stop_ids:
        ended = "eos"
    return Completion(ids=tuple(ids), text=text, ended=ended)


def before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of these strings."""
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]


def begun(text: str, stop: Sequence[str]) -> int:
    """How many letters at the end of the text may turn out to be the beginning of one of these strings."""
    sizes = (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size]))
    return max(sizes, default=0)


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
