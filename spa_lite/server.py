"""A model behind a server that speaks OpenAI's chat completions: llama-server, mlx_lm.server, vLLM, Ollama, or hosted.

Only the given address is contacted. The key comes from the environment (OPENAI_API_KEY), is read anew for each batch
of questions, and is kept nowhere: not in an attribute, a name, a cache or an error, even if the server repeats it.

Servers differ in what they take and give. What one refuses is left out from then on, and log-probabilities are used
only if a first question shows that they come. Of those, only the list of alternatives is believed: some servers
report another token than the one they chose.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from spa_lite.asking import ROUNDING, Conversation
from spa_lite.door import is_loopback
from spa_lite.errors import JudgeError
from spa_lite.keys import digest
from spa_lite.opinion import Tick
from spa_lite.records import Message
from spa_lite.reply_cache import Listed, Reply, ReplyCache

KEY = "OPENAI_API_KEY"
LISTS = (20, 10, 5, 0)
"""Alternatives asked for per token: as many as the server allows. 0 asks for no log-probabilities."""
BLANK = " \t\r\n\u0120\u010a\u2581"
"""Blanks, and the signs that stand for one in raw vocabulary entries."""
NEGLIGIBLE = 0.01
"""Probability so small that it does not matter how it is shared out between an option and one that it begins."""
CONNECT = 10.0
"""Seconds until a server that says nothing at all is taken to be away."""
SECRET = 4
"""Letters from which on a key is one; below, it is a word that stands for none."""
SHORT = 200
"""Letters of a server's own words that an error repeats."""
UNANSWERABLE = re.compile(
    r"context.{0,20}(?:length|size|window)|exceed_context|prompt is too long|output limit was reached"
    r"|content_filter|content_policy",
    re.IGNORECASE,
)
"""What servers say of a question that is too long, or that a filter stops: no reason to end a whole run."""


@dataclass(frozen=True)
class Dialect:
    """What a server has been found to take."""

    length: str = "max_tokens"
    temperature: bool = True
    alternatives: int = LISTS[0]

    def settings(self, max_tokens: int, listed: bool) -> dict[str, Any]:
        """Settings of a request."""
        asked: dict[str, Any] = {self.length: max_tokens}
        if self.temperature:
            asked["temperature"] = 0
        if listed:
            asked |= {"logprobs": True, "top_logprobs": self.alternatives}
        return asked

    def without(self, refusal: str) -> Dialect | None:
        """The dialect that avoids what a refusal names; None if it names nothing that can be avoided."""
        if "logprobs" in refusal and self.alternatives:
            return replace(self, alternatives=LISTS[LISTS.index(self.alternatives) + 1])
        if "temperature" in refusal and self.temperature:
            return replace(self, temperature=False)
        if "max_tokens" in refusal and self.length == "max_tokens":
            return replace(self, length="max_completion_tokens")
        return None


class ChatServer:
    """Asks `model` at `url` (as http://127.0.0.1:8080/v1). Replies are kept in the folder `cache` and not asked twice.

    `parallel` requests are in flight at a time, each is given `timeout` seconds, and tried again `retries` times where
    the server is busy, failing or away. The cache knows the model by its name alone: other weights under the same
    name want another folder.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path | None = None,
        *,
        parallel: int = 4,
        timeout: float = 300.0,
        retries: int = 4,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise JudgeError("asking a server needs the package openai: pip install 'spa-lite[openai]'")
        self.url, self.model = checked(url), model
        self.name = f"{model} at {self.url}"
        self.key = digest("chat server", model).hex()
        self.cache = ReplyCache(cache) if cache is not None else None
        self.parallel, self.timeout, self.retries = parallel, timeout, retries
        self.unanswered = 0
        """Questions that the server would not take: too long for it, or stopped by its filter."""
        self._dialect, self._lists = Dialect(), dict[tuple[str, ...], bool]()
        self._lock = Lock()

    def replies(self, conversations: Sequence[Conversation], max_tokens: int, tick: Tick = lambda: None) -> list[str]:
        """The reply to each at temperature 0 (where the server takes one), empty where there is none.

        Raises JudgeError if the server cannot be asked.
        """
        with self._asking() as ask:
            asked = partial(ask, max_tokens=max_tokens, listed=False)
            return [reply.text for reply in self._each(asked, conversations, lambda reply: tick())]

    def preferences(
        self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick = lambda: None
    ) -> list[tuple[float, ...] | None]:
        """Log-probability (nats) of each option as the beginning of the reply.

        None for all if the server lists no two of the options when asked to choose one, and for a conversation whose
        reply does not begin with one. For an option that is not listed stands an upper bound. Raises JudgeError.
        """
        known: list[tuple[float, ...] | None] = []

        def note(reply: Reply) -> None:
            known.append(beginnings(reply, options))
            if known[-1] is not None:
                tick()

        with self._asking() as ask:
            asked = partial(ask, max_tokens=2 + max(map(len, options)), listed=True)
            if not conversations or not self._lists_options(asked, tuple(options)):
                return [None] * len(conversations)
            self._each(asked, conversations, note)
            return known

    def _lists_options(self, ask: Callable[[Conversation], Reply], options: tuple[str, ...]) -> bool:
        """Whether the server lists log-probabilities of at least two options where they are to be expected."""
        if options not in self._lists:
            wish = f"Choose one of these: {', '.join(options)}. Reply with your choice and nothing else."
            lists = ask([Message(role="user", content=wish)]).lists
            self._lists[options] = any(len(merged(found).keys() & set(options)) > 1 for found in lists)
        return self._lists[options]

    def _each(
        self,
        ask: Callable[[Conversation], Reply],
        conversations: Sequence[Conversation],
        done: Callable[[Reply], None],
    ) -> list[Reply]:
        """The replies in order, a few requests at a time. `done` is called in this thread, in order."""
        pool = ThreadPoolExecutor(self.parallel)
        replies: list[Reply] = []
        try:
            for future in [pool.submit(ask, turns) for turns in conversations]:
                replies.append(future.result())
                done(replies[-1])
        except BaseException as error:
            # What is in flight is worth keeping; but after a Ctrl-C nobody waits for it.
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
        pool.shutdown()
        return replies

    @contextmanager
    def _asking(self) -> Iterator[Callable[..., Reply]]:
        """What asks one question; its connections are closed in the end."""
        import openai

        proxies = not is_loopback(urlsplit(self.url).hostname or "")  # none stands before this machine itself
        transport = openai.DefaultHttpxClient(
            timeout=openai.Timeout(self.timeout, connect=min(self.timeout, CONNECT)),
            follow_redirects=False,
            trust_env=proxies,
            verify=proxies or self.url.startswith("https"),  # to read the certificates takes longer than a request
        )
        client = openai.OpenAI(
            api_key=_key() or "none",  # the library insists on one; a local server does not look
            base_url=self.url,
            max_retries=self.retries,
            http_client=transport,
        )
        with client:
            yield partial(self._ask, client)

    def _ask(self, client: Any, turns: Conversation, max_tokens: int, listed: bool) -> Reply:
        """One reply: the remembered one, or the server's."""
        messages = [{"role": turn.role, "content": _plain(turn.content)} for turn in turns]
        key = digest(self.key, json.dumps(messages), max_tokens, LISTS[0] if listed else 0).hex()
        known = self.cache.get(key) if self.cache is not None else None
        if known is not None:
            return known
        content = self._content(client, messages, max_tokens, listed)
        if content is None:
            return Reply(key=key, text="")
        reply = self._read(key, content) if content else Reply(key=key, text="")
        if self.cache is not None:
            self.cache.add(reply)
        return reply

    def _content(self, client: Any, messages: list[dict[str, str]], max_tokens: int, listed: bool) -> str | None:
        """What the server sends. Empty if it gives no log-probabilities, None if it takes no such question."""
        import openai

        while True:
            dialect = self._dialect
            if listed and not dialect.alternatives:
                return ""
            try:
                answer = client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **dialect.settings(max_tokens, listed)
                )
            except openai.APIStatusError as error:
                said = error.response.text
                if error.status_code in (400, 413, 422, 500) and UNANSWERABLE.search(said):
                    with self._lock:
                        self.unanswered += 1
                    return None
                if not (error.status_code in (400, 422) and self._adapted(dialect, said)):
                    raise JudgeError(self._refusal(error.status_code, said)) from None
            except openai.APITimeoutError:
                raise JudgeError(
                    f"{self.name} did not answer within {self.timeout:g} s, {self.retries + 1} times over: "
                    "see what it is doing, then run the same command again"
                ) from None
            except openai.OpenAIError as error:
                reason = _short(str(error.__cause__ or error))
                raise JudgeError(
                    f"{self.name} cannot be reached ({reason}): see whether it is running, and check --judge-url"
                ) from None
            else:
                return str(answer.content.decode(errors="replace"))

    def _adapted(self, dialect: Dialect, said: str) -> bool:
        """Leave out what the server has just refused. False if it names nothing that could be left out."""
        with self._lock:
            if self._dialect == dialect:
                self._dialect = dialect.without(said[:500]) or dialect
            return self._dialect != dialect

    def _refusal(self, status: int, said: str) -> str:
        """One sentence about an error's status and what the server said."""
        words = _short(_message(said))
        if status in (401, 403):  # its words may hold a part of the key
            which = "with this key" if _key() else "without a key"
            return f"{self.name} lets nobody in {which} (status {status}): set {KEY} in the environment"
        if status == 404:
            return f"{self.name} does not know that model or path ({words}): check --judge-model and --judge-url"
        if status == 429:
            return (
                f"{self.name} takes no more questions for now, or a quota is used up ({words}): "
                "run the same command again later"
            )
        if status >= 500:
            return (
                f"{self.name} failed with status {status}, {self.retries + 1} times over ({words}): "
                "see its log, then run the same command again"
            )
        return f"{self.name} refuses the question with status {status} ({words}): check --judge-model and --judge-url"

    def _read(self, key: str, content: str) -> Reply:
        """The reply in a body. Raises JudgeError if there is none."""
        try:
            body = json.loads(content)
            choice = msgspec.convert(body, type=Completion).choices[0]
        except (ValueError, RecursionError, IndexError):  # a ValidationError is a ValueError
            raise JudgeError(
                f"{self.name} answers in another form than OpenAI's chat completions ({_short(_message(content))}): "
                "check --judge-url, which often ends in /v1"
            ) from None
        text = choice.message.content
        return Reply(key=key, text=_clean(text) if isinstance(text, str) else "", lists=listed_in(choice.logprobs))


class Alternative(msgspec.Struct):
    """A token that could have stood there. Some have no text, such as those that fill up a vocabulary."""

    token: str | None = None
    logprob: float | None = None


class Position(msgspec.Struct):
    """A token of the reply. The one that the server says it chose is not read."""

    top_logprobs: list[Alternative] = []


class Positions(msgspec.Struct):
    """`logprobs` of a choice."""

    content: list[Position]


class Said(msgspec.Struct):
    """`message` of a choice."""

    content: Any = None


class Choice(msgspec.Struct):
    """One of a completion's choices."""

    message: Said
    logprobs: Any = None


class Completion(msgspec.Struct):
    """As much of a chat completion as is needed. Servers may leave out the rest, such as `usage`."""

    choices: list[Choice]


def checked(url: str) -> str:
    """The address without a slash at its end. Raises JudgeError unless it is a plain one, without a secret in it."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        plain = False
    if not plain or "@" in parts.netloc or parts.query or parts.fragment:
        raise JudgeError(
            "the judge's address must be like http://127.0.0.1:8080/v1, without name, password or query: check "
            f"--judge-url (a key belongs into {KEY})"
        )
    return url.rstrip("/")


def listed_in(logprobs: Any) -> tuple[Listed, ...]:
    """The alternatives listed for each token; nothing if there are none, or in another form."""
    try:
        positions = msgspec.convert(logprobs, type=Positions).content
    except msgspec.ValidationError:
        return ()
    return tuple(
        tuple(
            (_clean(a.token), min(a.logprob, 0.0))
            for a in position.top_logprobs
            if a.token is not None and a.logprob is not None and math.isfinite(a.logprob)
        )
        for position in positions
    )


def merged(listed: Listed) -> dict[str, float]:
    """Log-probability of each listed text without blanks around it: " A" and "A" are one."""
    found: dict[str, float] = {}
    for token, logp in listed:
        text = token.strip(BLANK)
        found[text] = float(np.logaddexp(found.get(text, -math.inf), logp))
    return found


def beginnings(reply: Reply, options: Sequence[str]) -> tuple[float, ...] | None:
    """Log-probability of each option as the beginning of a reply at temperature 0; None where it cannot be known.

    An option may be one token, or a listed one and the next ("1", "0"). What follows a token is only known of the one
    that the reply begins with.
    """
    lists = [merged(listed) for listed in reply.lists]
    while lists and _best(lists[0]) == "":  # the reply begins with a blank
        lists = lists[1:]
    first, second = [*lists, {}, {}][:2]
    logps = {option: first.get(option, _unlisted(first)) for option in options}
    if not first.keys() & logps.keys():
        return None
    for option in logps.keys() - first.keys():
        start = max((o for o in logps if o in first and option.startswith(o)), key=len, default=None)
        if start is None or first[start] < math.log(NEGLIGIBLE):
            continue
        if not reply.text.strip(BLANK).startswith(start):
            return None
        after = second.get(option[len(start) :], _unlisted(second))
        logps[option] = first[start] + after
        logps[start] += math.log1p(-min(math.exp(after), 1 - ROUNDING))
    return tuple(logps[option] for option in options)


def _best(listed: dict[str, float]) -> str | None:
    return max(listed, key=listed.__getitem__, default=None)


def _unlisted(listed: dict[str, float]) -> float:
    """An upper bound of the log-probability of what is not listed: no more than the last that is, nor than is left."""
    left = 1 - math.fsum(map(math.exp, listed.values()))
    return min([math.log(max(left, ROUNDING)), *listed.values()])


def _key() -> str:
    """The key in the environment, or nothing."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(f"{KEY} holds characters that no key has: set it again")
    return key


def _hidden(said: str) -> str:
    """What a server said, without the key, should it repeat it."""
    key = _key()
    return said.replace(key, "[key]") if len(key) >= SECRET else said


def _plain(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def _clean(text: str) -> str:
    """A part of a reply as it may be kept."""
    return _plain(_hidden(text))


def _message(said: str) -> str:
    """The message in an error's body, or all of it."""
    try:
        body = json.loads(said)
    except (ValueError, RecursionError):
        return said
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _short(said: str) -> str:
    """The beginning of somebody's words, on one line."""
    line = " ".join(_hidden(said).split())
    return (line if len(line) <= SHORT else f"{line[:SHORT]} ...") or "it says nothing"
