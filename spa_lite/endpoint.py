"""The policies of one base behind an OpenAI-compatible chat endpoint: an ASGI application, and a queue to the model.

The model stays in the thread that loaded it: some frameworks ask for that, and a signal then ends an answer at once.
Requests come from the server's thread, one after the other through the queue.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec

from spa_lite.backend import Backend, Sampling
from spa_lite.completions import Answer, Asked, Refused, Reply, listed, read
from spa_lite.door import Door
from spa_lite.errors import SpaError
from spa_lite.records import Row
from spa_lite.rounds import Policies
from spa_lite.talk import speak

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MOST_BYTES = 4 * 2**20
"""Largest body of a request."""
MOST_WAITING = 64
"""Requests that may wait for the model."""

Event = int | str | Answer
"""What is heard of a reply: tokens of the prompt; then, for each answer, its pieces and in the end the answer."""
Application = Callable[[Any, Any, Any], Awaitable[None]]


# --- the model's side --------------------------------------------------------------------------------------------


def answers(backend: Backend, asked: Asked, role: str, usual: Sampling) -> Generator[Event, None, None]:
    """Yield what there is to hear. Raises Refused if the conversation cannot be read, or is too long."""
    try:
        prompt = backend.tokenizer.encode_prompt([turn.message for turn in asked.messages])
    except SpaError as error:
        raise Refused(400, str(error), "messages") from None
    room = backend.context - len(prompt)
    if room < (asked.limit or 1):
        wish = f" and may be answered with {asked.limit}" if asked.limit else ""
        length = f"this model's context length is {backend.context} tokens, but the messages have {len(prompt)}{wish}"
        raise Refused(400, length, "messages", "context_length_exceeded")
    yield len(prompt)
    sampling = asked.sampling(usual, room)
    for key in asked.streams():
        said = yield from speak(backend, prompt, sampling, key, role, asked.stops)
        tokens = None
        if asked.logprobs:
            _, (score,) = next(iter(backend.logprob([Row(prompt=prompt, responses=(said.ids,))], role, per_token=True)))
            tokens = listed(said.ids, score.per_token or (), backend.tokenizer)
        yield Answer(said, tokens)


@dataclass
class Job:
    """A reply to be made. Whoever wants no more of it says so by `gone`."""

    events: Generator[Event, None, None]
    hear: Callable[[Event | Exception | None], None]  # from any thread; None: that was all
    gone: bool = False

    def do(self) -> None:
        """Make it, in this thread."""
        with closing(self.events):
            try:
                while not self.gone:
                    self.hear(next(self.events))
            except StopIteration:
                pass
            except Exception as error:  # of this reply alone: the next one may do
                self.hear(error)
        self.hear(None)


def work(jobs: SimpleQueue[Job | None]) -> None:
    """Do one job after the other until there comes None. Interrupted, it tells those who still wait."""
    job = None
    try:
        while (job := jobs.get()) is not None:
            job.do()
    except BaseException:
        while job is not None:
            job.hear(Refused(503, "the server has been stopped"))
            job = None if jobs.empty() else jobs.get()
        raise


# --- the server's side -------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """One request, for the log."""

    method: str
    path: str
    status: int = 0
    stage: str = ""
    prompt: int = 0  # tokens
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0  # that the model took
    left: bool = False  # before the reply was whole
    why: str = ""  # code or field of a refusal: nothing of what was said
    asked: Asked | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answers."""
        return sum(len(answer.said.ids) for answer in self.answers)


class Left(Exception):
    """The client went away."""


def stages_of(policies: Policies) -> dict[str, str]:
    """Id of a model -> policy: `init`, `seed`, `round-1`, ...; `last`, and `policy` for the same."""
    own, last = {name.replace(" ", "-"): name for name in policies}, list(policies)[-1]
    return own | {word: last for word in ("last", "policy") if word not in own}


@dataclass(frozen=True)
class Endpoint:
    """What is served: a base on which each stage is bound to the role of its name, and how it answers by default."""

    backend: Backend
    stages: Mapping[str, str]  # id -> role
    usual: Sampling
    jobs: SimpleQueue[Job | None] = field(default_factory=SimpleQueue)
    began: int = field(default_factory=lambda: int(time.time()))

    async def health(self, request: Request) -> Response:
        """Whether the server is there."""
        return answer({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The stages, or one of them."""
        word = request.path_params.get("model")
        if word is not None:
            self.stage(word)
            return answer(self._model(word))
        return answer({"object": "list", "data": [self._model(name) for name in self.stages]})

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.began, "owned_by": "spa-lite"}

    def stage(self, word: str) -> str:
        """The role of a stage. Raises Refused naming those that there are."""
        if word not in self.stages:
            known = ", ".join(self.stages)
            raise Refused(404, f"there is no model {word!r} here; there are {known}", "model", "model_not_found")
        return self.stages[word]

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or in pieces."""
        from starlette.responses import StreamingResponse

        visit: Visit = request.scope["visit"]
        asked = read(await body(request))
        role = self.stage(asked.model)
        visit.asked, visit.stage = asked, role.replace(" ", "-")
        if self.jobs.qsize() >= MOST_WAITING:
            raise Refused(503, f"{MOST_WAITING} requests are waiting: try again later")
        heard = self.heard(request, asked, role)
        size = await anext(heard)
        assert isinstance(size, int)  # of the prompt: that is always heard first
        visit.prompt = size
        reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), visit.stage)
        if asked.stream:
            told = stream(heard, reply, asked, visit)
            return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with aclosing(heard):
            async for event in heard:
                if isinstance(event, Answer):
                    visit.answers.append(event)
        return answer(reply.whole(visit.answers, visit.prompt))

    async def heard(self, request: Request, asked: Asked, role: str) -> AsyncGenerator[Event, None]:
        """Yield what the model says to a request. A client that goes away ends it (Left)."""
        visit: Visit = request.scope["visit"]
        said: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(event: Event | Exception | None) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(said.put_nowait, event)

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            said.put_nowait(Left())

        job = Job(answers(self.backend, asked, role, self.usual), hear)
        watching = asyncio.ensure_future(watch())
        self.jobs.put(job)
        visit.left, begun = True, time.perf_counter()
        try:
            while (event := await said.get()) is not None:
                if isinstance(event, Refused | Left):
                    raise event
                if isinstance(event, SpaError):
                    raise Refused(500, str(event))
                if isinstance(event, Exception):
                    raise Refused(500, f"this answer failed ({type(event).__name__})")
                if isinstance(event, int):
                    begun = time.perf_counter()
                yield event
            visit.left = False
        except Refused:
            visit.left = False
            raise
        finally:
            visit.seconds = time.perf_counter() - begun
            job.gone = True
            watching.cancel()


async def stream(
    heard: AsyncGenerator[Event, None], reply: Reply, asked: Asked, visit: Visit
) -> AsyncGenerator[str, None]:
    """Yield server-sent events: the pieces of each answer, the usage if it is asked for, and `[DONE]`."""
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    begun = False

    def sent(chunk: dict[str, Any]) -> str:
        return f"data: {msgspec.json.encode(({'usage': None} if with_usage else {}) | chunk).decode()}\n\n"

    async with aclosing(heard):
        try:
            async for event in heard:
                index = len(visit.answers)
                if not begun:
                    yield sent(reply.chunk(index, {"role": "assistant", "content": ""}))
                begun = not isinstance(event, Answer)
                if isinstance(event, str):
                    yield sent(reply.chunk(index, {"content": event}))
                elif isinstance(event, Answer):
                    visit.answers.append(event)
                    yield sent(reply.chunk(index, {}, event.reason))
        except Refused as error:  # too late for a status
            visit.status = error.status
            yield sent(error.body)
            return
        except Left:
            return
    if with_usage:
        yield sent(reply.last(visit.answers, visit.prompt))
    yield "data: [DONE]\n\n"


async def body(request: Request) -> bytes:
    """The body of a request. Raises Refused unless it is JSON by its name, and not too large."""
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must be JSON: send Content-Type: application/json")
    size, parts = request.headers.get("content-length", "0"), bytearray()
    large = Refused(413, f"the body is larger than {MOST_BYTES // 2**20} MiB")
    if size.isdigit() and int(size) > MOST_BYTES:
        raise large
    try:
        async for part in request.stream():
            parts += part
            if len(parts) > MOST_BYTES:
                raise large
    except ClientDisconnect:
        raise Left from None
    return bytes(parts)


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response in JSON."""
    from starlette.responses import Response

    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


# --- both together -----------------------------------------------------------------------------------------------


def application(endpoint: Endpoint, door: Door, tell: Callable[[Visit], None]) -> Application:
    """The endpoint as an ASGI application. `tell` hears of every request when it is over."""
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def refused(request: Request, error: Refused) -> Response:
        request.scope["visit"].why = error.code or error.param or ""
        return answer(error.body, error.status, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)

    async def unknown(request: Request, error: HTTPException) -> Response:  # no such path, or not with this method
        return await refused(
            request, Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        )

    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, Refused(500, f"this request failed ({type(error).__name__})"))

    async def nobody(request: Request, error: Left) -> Response:
        return Response(status_code=499)  # nobody hears it

    inner = Starlette(
        routes=[
            Route("/health", endpoint.health),
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{model}", endpoint.models),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, HTTPException: unknown, Left: nobody, Exception: failed},
    )
    inner.router.redirect_slashes = False

    async def call(scope: Any, receive: Any, send: Any) -> None:
        visit = scope["visit"] = Visit(scope["method"], scope["path"])

        async def sent(message: Any) -> None:
            visit.status = visit.status or message.get("status", 0)
            await send(message)

        try:
            try:
                door.check(Headers(scope=scope), scope["path"])
            except Refused as error:
                await (await refused(Request(scope), error))(scope, receive, sent)
            else:
                await inner(scope, receive, sent)
        finally:
            tell(visit)

    return call
