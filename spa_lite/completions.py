"""Chat completions in OpenAI's form: what a request may ask for, and the shapes of the answers. No server in here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_bytes
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from spa_lite.backend import Sampling, Tokenizer
from spa_lite.errors import ServeError
from spa_lite.keys import digest
from spa_lite.records import Completion, Ids, Message
from spa_lite.talk import UNFINISHED

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Values that ask for nothing, of fields that cannot be done; clients send them. (`tool_choice` without tools, say.)"""

IGNORED = {"user"}
"""Who asks: nothing here depends on it."""


class Refused(ServeError):
    """A request that is not answered: status, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message: text only."""

    type: Literal["text"]
    text: str


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def message(self) -> Message:
        """The message as everybody else here knows it: `developer` is the newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False


Limit = Annotated[int, Meta(ge=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """A request that can be answered."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] = []
    logprobs: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> int | None:
        """Longest answer that is asked for, in tokens."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, usual: Sampling, room: int) -> Sampling:
        """How answers are drawn; what is not said is as usual. There is room for `room` tokens."""
        return Sampling(
            usual.temperature if self.temperature is None else self.temperature,
            usual.top_p if self.top_p is None else self.top_p,
            self.limit or min(usual.max_tokens, room),
        )

    def streams(self) -> list[bytes]:
        """Names of the random streams of the n answers: by the seed alone, whichever stage is asked."""
        start: object = token_bytes(16) if self.seed is None else self.seed
        return [digest("serve", start, index) for index in range(self.n)]


def read(body: bytes) -> Asked:
    """The request in a body. Raises Refused naming the field that is wrong, or that cannot be done."""
    try:
        said = _bare(msgspec.json.decode(body))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise Refused(400, "the body must be a JSON object")
    for name in [name for name in said if name not in Asked.__struct_fields__]:
        if name not in IGNORED and said[name] not in NEUTRAL.get(name, ()):
            raise Refused(400, f"{name} is not supported here: leave it out", name, "unsupported_parameter")
        del said[name]
    try:
        asked = msgspec.convert(said, Asked)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        missing = re.search(r"required field `(\w+)`", what)
        param = (where.rstrip("`") or (missing[1] if missing else "")) or None
        raise Refused(400, f"{where.rstrip('`')}: {what}" if where else what, param) from None
    if asked.max_tokens and asked.max_completion_tokens not in (None, asked.max_tokens):
        raise Refused(400, "max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    if asked.stream_options and not asked.stream:
        raise Refused(400, "stream_options is for stream: true", "stream_options")
    if asked.stream and asked.logprobs:
        raise Refused(400, "logprobs come with the whole answer: leave out stream, or logprobs", "logprobs")
    return asked


def _bare(value: Any) -> Any:
    """A value without null fields: to say null is to say nothing."""
    if isinstance(value, dict):
        return {name: _bare(inner) for name, inner in value.items() if inner is not None}
    return [_bare(inner) for inner in value] if isinstance(value, list) else value


# --- answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer, and what is listed of its tokens where log-probabilities were asked for."""

    said: Completion
    tokens: list[dict[str, Any]] | None = None

    @property
    def reason(self) -> Literal["stop", "length"]:
        """Why it ended, in OpenAI's words."""
        return "length" if self.said.ended == "cap" else "stop"


@dataclass(frozen=True)
class Reply:
    """What all parts of one reply have in common."""

    id: str
    created: int
    model: str

    def whole(self, answers: Sequence[Answer], prompt: int) -> dict[str, Any]:
        """The reply in one piece; the prompt had so many tokens."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.said.text, "refusal": None},
                "logprobs": None if answer.tokens is None else {"content": answer.tokens, "refusal": None},
                "finish_reason": answer.reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self._of("chat.completion", choices) | {"usage": usage(prompt, answers)}

    def chunk(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A part of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._of("chat.completion.chunk", [choice])

    def last(self, answers: Sequence[Answer], prompt: int) -> dict[str, Any]:
        """The chunk that has the usage, and no choice."""
        return self._of("chat.completion.chunk", []) | {"usage": usage(prompt, answers)}

    def _of(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt: int, answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of the prompt, and of all answers, with their ends of turn."""
    tokens = sum(len(answer.said.ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def listed(ids: Ids, logprobs: Sequence[float], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Each token with the text that it added and its log-probability (nats, temperature 1).

    A token that is no text yet, as a part of a letter or the end of turn, adds none: together they are the answer.
    """
    content, said = [], ""
    for count, logprob in enumerate(logprobs, start=1):
        text, added = tokenizer.decode(ids[:count]), ""
        if text.startswith(said) and (count == len(ids) or not text.endswith(UNFINISHED)):
            added, said = text[len(said) :], text
        content.append({"token": added, "logprob": logprob, "bytes": list(added.encode()), "top_logprobs": []})
    return content
