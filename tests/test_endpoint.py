"""The endpoint on the toy backend: every field, every refusal, clients that come together and clients that leave."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite import backends, keys
from spa_lite.backend import Backend, ModelSettings, Sampling
from spa_lite.completions import NEUTRAL, Asked, Refused, read
from spa_lite.door import Door
from spa_lite.endpoint import MOST_BYTES, MOST_WAITING, Endpoint, Job, Visit, application, stages_of, work
from spa_lite.errors import JudgeError, OutOfMemory
from spa_lite.records import Message, Row
from spa_lite.server import ChatServer
from tests.speaking import LATE, Command
from tests.test_cli import RUN, TOY, call, here

__all__ = ["here"]

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.loopback

USUAL = Sampling(0.8, 0.95, 30)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
SEED = 181
"""Both stages answer it with some twenty letters."""


class Served:
    """An endpoint at work in this process."""

    def __init__(self, key: str | None = None, host: str = "127.0.0.1") -> None:
        from spa_lite.cli.serve import answering, listening

        self.visits: SimpleQueue[Visit] = SimpleQueue()
        self.backend = backends.load("toy", ModelSettings("toy"))
        self.backend.bind("round 1")
        delta = np.random.default_rng(0).normal(size=(261, 261))
        delta[:, 257] -= 2  # longer answers
        self.backend._roles["round 1"] = delta  # type: ignore[attr-defined]
        self.endpoint = Endpoint(self.backend, stages_of({"init": None, "round 1": Path("there")}), USUAL)
        self.sock = listening("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        self.asgi = application(self.endpoint, Door(host, self.port, key), self.visits.put)
        self.server = answering(self.asgi, self.sock, lambda: None)
        self.worker = threading.Thread(target=work, args=[self.endpoint.jobs])

    def __enter__(self) -> Served:
        self.worker.start()
        self.server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.endpoint.jobs.put(None)
        self.server.__exit__(None, None, None)
        self.worker.join()
        self.sock.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @contextmanager
    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the response as it comes."""
        said = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=LATE)) as connection:
            more = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, said, kind | more)
            yield connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a request: status and JSON."""
        with self.open(method, path, body, **headers) as response:
            assert response.headers["content-type"] == "application/json"
            assert not [name for name in response.headers if name.lower().startswith("access-control")]
            return response.status, json.loads(response.read())

    def chat(self, **fields: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        status, said = self.ask("POST", "/v1/chat/completions", asking(**fields))
        assert status == 200, said
        return dict(said)

    def text(self, **fields: Any) -> str:
        """The text of the first answer."""
        return str(self.chat(**fields)["choices"][0]["message"]["content"])

    def chunks(self, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed completion, which ends with [DONE]."""
        with self.open("POST", "/v1/chat/completions", asking(stream=True, **fields)) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *lines, done, rest = response.read().decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def asking(**fields: Any) -> dict[str, Any]:
    """A body."""
    return {"model": "last", "messages": HELLO, "seed": SEED} | fields


def head(port: int, more: str) -> bytes:
    """The headers of a request, as they are sent."""
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: localhost:{port}", "Content-Type: application/json", more]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One endpoint for the tests that leave it as it was."""
    with Served() as one:
        yield one


def expected(served: Served, role: str, sampling: Sampling = USUAL, seed: int = SEED, index: int = 0) -> Any:
    """What the backend itself says to HELLO."""
    prompt = served.backend.tokenizer.encode_prompt([Message(role="user", content="Hello")])
    key = keys.digest("serve", seed, index)
    return dict(served.backend.sample([prompt], 1, sampling, [[key]], role))[0][0]


# --- what can be asked -------------------------------------------------------------------------------------------


def test_models_are_stages(served: Served) -> None:
    status, said = served.ask("GET", "/v1/models")
    assert (status, [one["id"] for one in said["data"]]) == (200, ["init", "round-1", "last", "policy"])
    assert served.ask("GET", "/v1/models/round-1") == (200, said["data"][1])
    assert said["data"][1] == {"id": "round-1", "object": "model", "created": 0, "owned_by": "spa-lite"} | {
        "created": served.endpoint.began
    }
    assert served.ask("GET", "/health") == (200, {"status": "ok"})
    assert stages_of({"init": None, "seed": None, "policy": None}) == {
        "init": "init",
        "seed": "seed",
        "policy": "policy",
        "last": "policy",
    }


@pytest.mark.parametrize(
    ("model", "role"), [("init", "init"), ("round-1", "round 1"), ("last", "round 1"), ("policy", "round 1")]
)
def test_each_stage_answers_as_itself(served: Served, model: str, role: str) -> None:
    whole = expected(served, role)
    said = served.chat(model=model)
    reason = "length" if whole.ended == "cap" else "stop"
    assert said["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
    ]
    tokens = len(whole.ids)
    assert said["usage"] == {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    assert (said["object"], said["model"]) == ("chat.completion", role.replace(" ", "-"))
    assert said["id"].startswith("chatcmpl-")
    assert expected(served, "init").text != expected(served, "round 1").text


def test_the_recipe_answers_where_nothing_is_asked(served: Served) -> None:
    assert served.text() == served.text(temperature=0.8, top_p=0.95, max_tokens=30)
    assert served.text(temperature=None, stop=None, tools=None, user="me", presence_penalty=0, n=1) == served.text()


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0}, Sampling(0, 0.95, 30)),
        ({"temperature": 1.7}, Sampling(1.7, 0.95, 30)),
        ({"top_p": 0.1}, Sampling(0.8, 0.1, 30)),
        ({"max_tokens": 2}, Sampling(0.8, 0.95, 2)),
        ({"max_completion_tokens": 60, "temperature": 0, "max_tokens": 60}, Sampling(0, 0.95, 60)),
    ],
)
def test_how_an_answer_is_drawn(served: Served, fields: dict[str, Any], sampling: Sampling) -> None:
    assert served.text(**fields) == expected(served, "round 1", sampling).text != served.text()


def test_a_seed_is_an_answer(served: Served) -> None:
    texts = [served.text(seed=seed, temperature=2) for seed in (1, 1, 2, -3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert len({served.text(seed=None, temperature=2) for _ in range(4)}) > 1, "without a seed, each is new"


def test_several_answers(served: Served) -> None:
    said = served.chat(n=3, temperature=2, max_tokens=9)
    wanted = [expected(served, "round 1", Sampling(2, 0.95, 9), index=k) for k in range(3)]
    assert [c["message"]["content"] for c in said["choices"]] == [one.text for one in wanted]
    assert said["usage"]["completion_tokens"] == sum(len(one.ids) for one in wanted)


def test_text_comes_in_parts_and_roles(served: Served) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert served.chat(messages=[{"role": "user", "content": parts}])["usage"]["prompt_tokens"] == 7 + 1  # a line break
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "S"},
        *HELLO,
        {"role": "assistant", "content": "A", "tool_calls": None},
        *HELLO,
    ]
    longer = served.chat(messages=turns)
    turns[0]["role"] = "developer"
    assert served.chat(messages=turns)["usage"] == longer["usage"]
    assert longer["usage"]["prompt_tokens"] == 7 + 3 + 3 + 7


def test_the_stream_is_the_answer(served: Served) -> None:
    fields: dict[str, Any] = {"n": 2, "temperature": 2, "max_tokens": 12}
    whole, chunks = served.chat(**fields), served.chunks(**fields, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None}
    for index, choice in enumerate(whole["choices"]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
    assert "usage" not in served.chunks()[0]


def test_stop_strings_cut_before_themselves(served: Served) -> None:
    text = served.text(max_tokens=40, model="init")
    stop = text[5:8]
    assert text.count(stop) == 1
    fields: dict[str, Any] = {"max_tokens": 40, "model": "init", "stop": ["never said", stop]}
    said = served.chat(**fields)
    assert said["choices"][0]["message"]["content"] == text[:5]
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["completion_tokens"] == 8, "a token is a byte: those of the stop string were drawn, too"
    chunks = served.chunks(**fields)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text[:5]
    assert served.text(max_tokens=40, model="init", stop=stop) == text[:5]


def test_log_probabilities_are_those_of_temperature_one(served: Served) -> None:
    said = served.chat(model="round-1", logprobs=True, temperature=0.3)
    listed = said["choices"][0]["logprobs"]["content"]
    whole = expected(served, "round 1", Sampling(0.3, 0.95, 30))
    prompt = served.backend.tokenizer.encode_prompt([Message(role="user", content="Hello")])
    row = Row(prompt=prompt, responses=(whole.ids,))
    assert sum(one["logprob"] for one in listed) == pytest.approx(
        dict(served.backend.logprob([row], "round 1"))[0][0].logp
    )
    assert len(listed) == said["usage"]["completion_tokens"]
    assert "".join(one["token"] for one in listed) == whole.text
    assert bytes(byte for one in listed for byte in one["bytes"]).decode() == whole.text


# --- what is refused ---------------------------------------------------------------------------------------------

PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty"),
    ({"frequency_penalty": 1}, "frequency_penalty", "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "top_logprobs"),
    ({"top_k": 5}, "top_k", "top_k"),
    ({"messages": PICTURE}, "messages[0].content[0].type", "image_url"),
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
    ({"messages": [HELLO[0] | {"name": "Ann"}]}, "messages[0]", "name"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "must end with a user turn"),
    ({"messages": None}, "messages", "messages"),
    ({"model": None}, "model", "model"),
    ({"temperature": -1}, "temperature", ">= 0"),
    ({"temperature": "warm"}, "temperature", "Expected `float"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"n": 129}, "n", "<= 128"),
    ({"seed": 0.5}, "seed", "int"),
    ({"stop": [""]}, "stop[0]", "length >= 1"),
    ({"stop": list("abcde")}, "stop", "length <= 4"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"extra": True}}, "stream_options", "extra"),
    ({"stream": True, "logprobs": True}, "logprobs", "leave out stream"),
    ({"messages": [{"role": "user", "content": "x" * 4100}]}, "messages", "context length is 4096"),
    ({"max_tokens": 4090}, "messages", "answered with 4090"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSALS, ids=[f"{list(r[0])[-1]}-{r[1]}" for r in REFUSALS])
def test_what_cannot_be_done_is_refused_by_name(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    status, said = served.ask("POST", "/v1/chat/completions", asking(**fields))
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")
    assert words in said["error"]["message"]
    assert said["error"]["param"] == param


def test_an_unknown_model_names_the_known_ones(served: Served) -> None:
    status, said = served.ask("POST", "/v1/chat/completions", asking(model="gpt"))
    assert (status, said["error"]["code"], said["error"]["param"]) == (404, "model_not_found", "model")
    assert said["error"]["message"] == "there is no model 'gpt' here; there are init, round-1, last, policy"
    assert served.ask("GET", "/v1/models/gpt")[0] == 404


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff{}", b'{"model": NaN}', b"[" * 99999, b'{"a": "\\ud800"}'])
def test_no_json(served: Served, body: bytes) -> None:
    status, said = served.ask("POST", "/v1/chat/completions", body)
    assert (status, list(said)) == (400, ["error"])


def test_other_refusals_are_json_too(served: Served) -> None:
    assert served.ask("GET", "/v1/nowhere")[0] == 404
    assert served.ask("GET", "/v1/chat/completions")[0] == 405
    assert served.ask("OPTIONS", "/v1/chat/completions", Access_Control_Request_Method="POST")[0] == 405
    assert served.ask("POST", "/v1/chat/completions", asking(), Content_Type="text/plain")[0] == 415
    ask = partial(served.ask, "POST", "/v1/chat/completions")
    assert ask(asking(), Content_Type="application/json; charset=utf-8")[0] == 200
    assert ask(Content_Type="application/json", Content_Length="5000000")[0] == 413


def test_a_body_of_unknown_length_is_limited(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=LATE) as line:
        line.sendall(head(served.port, "Transfer-Encoding: chunked"))
        for size in (MOST_BYTES, 1):  # not a byte more, so that nothing is lost with the connection
            line.sendall(f"{size:x}\r\n".encode() + b" " * size + b"\r\n")
        assert line.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:PORT", 200),
        ("localhost:PORT", 200),
        ("LOCALHOST:PORT", 200),
        ("[::1]:PORT", 200),
        ("evil.example:PORT", 421),
        ("127.0.0.1.evil.example:PORT", 421),
        ("127.0.0.1:1", 421),
        ("127.0.0.1", 421),
        ("192.0.2.7:PORT", 421),
        ("evil.example@127.0.0.1:PORT", 421),
        ("127.0.0.1:PORT/v1", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_only_names_of_this_machine(served: Served, host: str, status: int) -> None:
    assert served.ask("GET", "/v1/models", Host=host.replace("PORT", str(served.port)))[0] == status


def test_pages_of_other_sites_may_not_ask(served: Served) -> None:
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{served.port}", "http://127.0.0.1:1"):
        assert served.ask("POST", "/v1/chat/completions", asking(), Origin=origin)[0] == 403
    assert served.ask("GET", "/v1/models", Origin=f"http://127.0.0.1:{served.port}")[0] == 200


def test_an_open_door_takes_numbers_and_its_own_name() -> None:
    door = Door("0.0.0.0", 80)
    assert all(map(door.known, ["192.0.2.7", "192.0.2.7:80", "[2001:db8::1]", "localhost"]))
    assert not any(map(door.known, ["evil.example", "192.0.2.7:81"]))
    assert Door("box.lan", 80).known("box.lan")
    assert (door.local, Door("::1", 80).local, Door("localhost", 80).local) == (False, True, True)


def test_the_key_is_asked_for() -> None:
    with Served(key="s3cret") as served:
        for word in ("", "Bearer wrong", "s3cret", "Bearer \xe9"):
            status, said = served.ask("GET", "/v1/models", Authorization=word)
            assert (status, said["error"]["code"]) == (401, "invalid_api_key")
            assert "s3cret" not in str(said)
        assert served.ask("GET", "/v1/models", Authorization="Bearer s3cret")[0] == 200
        assert served.ask("GET", "/health")[0] == 200
    assert "s3cret" not in repr(Door("127.0.0.1", 1, "s3cret"))


# --- several at once, and those who leave ------------------------------------------------------------------------


class Slow:
    """Lets a backend go on by one token per `step`, and notes whose answers are begun and ended."""

    def __init__(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.ended = SimpleQueue[str](), SimpleQueue[str]()
        self.tokens = threading.Semaphore(0)
        self.real = backend.stream
        monkeypatch.setattr(backend, "stream", self.stream)

    def stream(self, prompt: Any, sampling: Sampling, key: bytes, role: str) -> Iterator[int]:
        self.begun.put(role)
        try:
            for token in self.real(prompt, sampling, key, role):
                assert self.tokens.acquire(timeout=LATE)
                yield token
        finally:
            self.ended.put(role)


@pytest.fixture
def slow(served: Served, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """The served model, slow."""
    return Slow(served.backend, monkeypatch)


def test_others_wait_in_order_and_the_server_answers(served: Served, slow: Slow) -> None:
    done: SimpleQueue[str] = SimpleQueue()

    def ask(model: str) -> None:
        done.put(served.chat(model=model, max_tokens=4, temperature=0)["model"])

    first = threading.Thread(target=ask, args=["init"])
    first.start()
    assert slow.begun.get(timeout=LATE) == "init"
    second = threading.Thread(target=ask, args=["round-1"])
    second.start()
    assert served.ask("GET", "/health")[0] == 200
    assert served.ask("GET", "/v1/models")[0] == 200
    assert slow.begun.empty()
    slow.tokens.release(20)
    assert {done.get(timeout=LATE), done.get(timeout=LATE)} == {"init", "round-1"}
    assert [slow.ended.get(timeout=LATE), slow.ended.get(timeout=LATE)] == ["init", "round 1"]
    first.join()
    second.join()


@pytest.mark.parametrize("streaming", [True, False])
def test_who_leaves_frees_the_model(served: Served, slow: Slow, streaming: bool) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=LATE) as line:
        said = json.dumps(asking(model="init", stream=streaming, max_tokens=4000)).encode()
        line.sendall(head(served.port, f"Content-Length: {len(said)}") + said)
        assert slow.begun.get(timeout=LATE) == "init"
    mine = (4000, streaming)  # others are noted a moment after their answers
    visits = iter(partial(served.visits.get, timeout=LATE), None)
    visit = next(v for v in visits if v.asked and (v.asked.max_tokens, v.asked.stream) == mine)
    assert (visit.left, visit.answers) == (True, [])
    slow.tokens.release(1)
    assert slow.ended.get(timeout=LATE) == "init"
    slow.tokens.release(20)
    assert served.chat(max_tokens=3)["model"] == "round-1"


def test_too_many_are_sent_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: SimpleQueue[Any] = SimpleQueue()
    for _ in range(MOST_WAITING):
        jobs.put(None)
    monkeypatch.setitem(vars(served.endpoint), "jobs", jobs)
    assert served.ask("POST", "/v1/chat/completions", asking())[0] == 503


@pytest.mark.parametrize(
    ("error", "words"),
    [(OutOfMemory("memory ran out: lower --max-tokens"), "lower --max-tokens"), (KeyError("private"), "(KeyError)")],
)
def test_a_failure_ends_one_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    real = served.backend.stream

    def fail(*args: Any) -> Iterator[int]:
        yield from list(real(*args))[:2]
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(served.backend, "stream", fail)
        status, said = served.ask("POST", "/v1/chat/completions", asking())
        assert (status, said["error"]["type"]) == (500, "server_error")
        assert words in said["error"]["message"]
        assert "private" not in str(said)
        with served.open("POST", "/v1/chat/completions", asking(stream=True)) as response:
            *_, last, rest = response.read().decode().split("\n\n")
    assert words in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert rest == "", "no [DONE] after an error"
    assert served.text() == expected(served, "round 1").text


def test_a_server_that_is_stopped_tells_those_who_wait() -> None:
    heard: list[Any] = []

    def stop() -> Iterator[Any]:
        yield 1
        raise KeyboardInterrupt

    jobs: SimpleQueue[Job | None] = SimpleQueue()
    for _ in range(2):
        jobs.put(Job(stop(), heard.append))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        work(jobs)
    assert heard[0] == 1
    assert [error.status for error in heard[1:]] == [503, 503]


# --- our own client, and the command -----------------------------------------------------------------------------


def test_our_own_judge_may_ask(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probabilities come without alternatives, so that it takes the words."""
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asked, turns = ChatServer(served.url, "init", retries=0), [Message(role="user", content="Hello")]
    assert asked.preferences([turns], ["A", "B"]) == [None]
    assert asked.replies([turns], 12) == [expected(served, "init", Sampling(0, 0.95, 12)).text]
    assert asked.replies([[Message(role="user", content="x" * 5000)]], 12) == [""]
    assert asked.unanswered == 1
    with pytest.raises(JudgeError, match="does not know that model"):
        ChatServer(served.url, "gpt", retries=0).replies([turns], 12)


def talk(url: str, stages: tuple[str, str]) -> tuple[str, str]:
    """Ask two stages through the openai package; their answers, streamed and not, are the same."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=LATE)
    found = []
    with client:
        assert set(stages) < {model.id for model in client.models.list()}
        for stage in stages:
            asked = {"model": stage, "messages": HELLO, "seed": 3, "temperature": 1.0, "max_tokens": 16}
            whole = client.chat.completions.create(**asked)
            assert whole.model == stage
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert (text, chunks[-1].usage) == (whole.choices[0].message.content, whole.usage)
            found.append(text)
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
            client.chat.completions.create(model="gpt", messages=HELLO)
    return found[0], found[1]


def test_the_command_on_a_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, *RUN, "--out", "run")[0] == 0
    command = Command("run", "--temp", "0.5")
    port = command.url.rpartition(":")[2].removesuffix("/v1")
    assert command.welcome[0] == f"serving run at {command.url}\n"
    assert command.welcome[1] == "models: init, seed, round-1, round-2, last, policy\n"
    assert f"curl {command.url}/chat/completions " in command.welcome[3]
    one, other = talk(command.url, ("init", "round-2"))
    assert one != other
    code, _, said = call(capfd, "serve", "run", "--port", port)
    assert (code, said.count("\n")) == (1, 1)
    assert f"error: cannot listen on 127.0.0.1, port {port} (Address already in use)" in said
    code, err = command.end()
    assert code == 130
    assert err.count("POST /v1/chat/completions 200 init: 7 tokens asked, ") == 2
    assert err.count("POST /v1/chat/completions 404 (model_not_found)\n") == 1
    assert err.endswith("interrupted\n")
    assert "Hello" not in err
    assert "Traceback" not in err


def test_the_command_with_key_round_and_verbose(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert call(capfd, *RUN, "--out", "run")[0] == 0
    monkeypatch.setenv("MY_KEY", "s3cret")
    command = Command(
        "run", "--round", "1", "--api-key-env", "MY_KEY", "--verbose", "--host", "0.0.0.0", "--allow-remote"
    )
    assert command.welcome[1] == "models: init, round-1, last, policy\n"
    assert "$MY_KEY" in command.welcome[3]
    connection = http.client.HTTPConnection("127.0.0.1", int(command.url.split(":")[2].removesuffix("/v1")))
    body = json.dumps(asking(messages=[{"role": "user", "content": "\x1b[31mHello"}]))
    headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    text = json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
    connection.close()
    code, err = command.end(signal.SIGTERM)
    assert code == 143
    assert "other machines may ask this one, with the key" in err
    assert "  user: \\u001b[31mHello\n" in err
    assert "  answer: " in err
    assert text[:5] in err
    assert "s3cret" not in err + "".join(command.welcome)


def test_an_answer_under_way_is_dropped(here: Path) -> None:
    """A stream that would take minutes ends with the server, and says so."""
    command = Command("--backend", "toy", "--model", "toy", "--max-tokens", "4000")
    connection = http.client.HTTPConnection("127.0.0.1", int(command.url.split(":")[2].removesuffix("/v1")))
    body = json.dumps(asking(stream=True, n=128, temperature=3.0))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    command.process.send_signal(signal.SIGINT)
    said = response.read().decode()
    connection.close()
    assert "[DONE]" not in said
    assert "the server has been stopped" in said
    code, err = command.end()
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "0.0.0.0"], "--allow-remote"),
        (["--host", "192.0.2.1"], "--allow-remote"),
        (["--host", "192.0.2.1", "--allow-remote"], "cannot listen on 192.0.2.1"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--round", "9"], "'9'"),
        (["--port", "99999"], "--port"),
        (["no-such-run"], "no-such-run"),
    ],
)
def test_wrong_words(here: Path, capfd: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    code, out, err = call(capfd, "serve", *args, *TOY[:4])
    assert code in (1, 2)
    assert words in err
    assert (out, err.count("\n")) == ("", 1)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = call(capfd, "serve", *TOY[:4])
    assert code == 1
    assert err == "error: serving needs uvicorn: pip install 'spa-lite[serve]'\n"


@pytest.mark.long
def test_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lesson's model and its seed adapter on one base, through the openai package."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    command = Command("--backend", "torch")
    assert command.welcome[1] == "models: init, seed-adapter, last, policy\n"
    one, other = talk(command.url, ("init", "seed-adapter"))
    assert one != other
    code, err = command.end()
    assert code == 130
    assert "Traceback" not in err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Asked.__struct_fields__, *NEUTRAL, "other"]), JSON, max_size=4))
def test_any_json_is_read_or_refused(fields: dict[str, Any]) -> None:
    with suppress(Refused):
        asked = read(json.dumps(asking(**fields)).encode())
        assert asked.sampling(USUAL, 100).max_tokens >= 1
        assert len(asked.streams()) == asked.n
