"""A judge behind a server: a stand-in on this machine answers in OpenAI's shape, and in all that it should not."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.errors import JudgeError
from spa_lite.judges.asked import PairJudge
from spa_lite.records import Completion, Message, Sample
from spa_lite.reply_cache import NAME, Reply, ReplyCache
from spa_lite.server import ChatServer, beginnings

pytest.importorskip("openai")
pytestmark = pytest.mark.loopback

SECRET = "sk-very-secret-0123456789"
Body = dict[str, Any]
Answer = Callable[[Body, int], tuple[int, Any]]
"""(request, how many came before it) -> status and body: text as it is, else JSON."""


class StandIn(ThreadingHTTPServer):
    """Answers every request as `answer` says, and keeps what was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = lambda body, count: (200, completion("A"))
        self.asked: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            count = len(self.server.asked) - 1
        status, said = self.server.answer(body, count)
        content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After-Ms", "1")  # so that nobody waits
        if status == 302:
            self.send_header("Location", "http://192.0.2.1/v1/chat/completions")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A running stand-in; the key is in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def completion(text: str | None, *lists: dict[str, float], token: str = "?") -> Body:
    """A reply in OpenAI's shape, without `usage`. The token it says it chose is wrong, as some servers' is."""
    content = [
        {"token": token, "logprob": -9.0, "top_logprobs": [{"token": t, "logprob": p} for t, p in listed.items()]}
        for listed in lists
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice | ({"logprobs": {"content": content}} if lists else {})]}


def chat(*texts: str) -> list[list[Message]]:
    return [[Message(role="user", content=text)] for text in texts]


def server(stand_in: StandIn, cache: Path | None = None, **settings: Any) -> ChatServer:
    return ChatServer(stand_in.url, "judge-model", cache, **({"retries": 0} | settings))


def listing(*lists: dict[str, float]) -> Answer:
    """Answers with these lists where log-probabilities are asked for, else in words."""
    return lambda body, count: (200, completion("A", *lists) if body.get("logprobs") else completion("Verdict: B"))


def test_replies_in_order_at_temperature_zero(stand_in: StandIn) -> None:
    stand_in.answer = lambda body, count: (200, completion(body["messages"][-1]["content"].upper()))
    ticks: list[int] = []
    asked = server(stand_in, parallel=3)
    texts = [f"question {i}" for i in range(7)]
    assert asked.replies(chat(*texts), 9, lambda: ticks.append(1)) == [text.upper() for text in texts]
    assert len(ticks) == 7
    assert sorted(stand_in.questions) == texts
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in stand_in.asked} == {("judge-model", 0, 9)}
    assert all("logprobs" not in body for body in stand_in.asked)
    assert stand_in.headers[0]["authorization"] == f"Bearer {SECRET}"


def test_a_local_server_needs_no_key(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert server(stand_in).replies(chat("x"), 1) == ["A"]
    assert SECRET not in str(stand_in.headers)
    stand_in.answer = lambda body, count: (401, "")
    with pytest.raises(JudgeError, match="without a key"):
        server(stand_in).replies(chat("x"), 1)


def test_several_requests_are_in_flight(stand_in: StandIn) -> None:
    both = threading.Barrier(2, timeout=5)

    def answer(body: Body, count: int) -> tuple[int, Any]:
        both.wait()
        return 200, completion("A")

    stand_in.answer = answer
    assert server(stand_in, parallel=2).replies(chat("x", "y"), 1) == ["A", "A"]


@pytest.mark.parametrize(
    "listed",
    [
        {"A": -0.5, "B": -1.0, "The": -4.0},
        {"The": -4.0, "\u2581B": -1.0, "\u0120A": -0.5},  # raw vocabulary entries, unsorted
        {" B": -1.0, "A\n": -0.5},
    ],
)
def test_log_probabilities_from_the_list_alone(stand_in: StandIn, listed: dict[str, float]) -> None:
    stand_in.answer = listing(listed)
    asked = server(stand_in)
    assert asked.preferences(chat("x", "y"), ("A", "B")) == [pytest.approx((-0.5, -1.0))] * 2
    assert len(stand_in.asked) == 3  # the first one asks whether both options are listed
    assert asked.preferences(chat("z"), ("A", "B")) == [pytest.approx((-0.5, -1.0))]
    assert len(stand_in.asked) == 4
    assert {(b["logprobs"], b["top_logprobs"], b["temperature"]) for b in stand_in.asked} == {(True, 20, 0)}


def test_spellings_of_an_option_are_added_up() -> None:
    reply = said("A", {"A": math.log(0.2), " A": math.log(0.3), "B": math.log(0.25)})
    assert beginnings(reply, ("A", "B")) == pytest.approx((math.log(0.5), math.log(0.25)))


def test_a_blank_may_come_first() -> None:
    reply = said("\nB", {"\n": -0.1, "A": -3.0}, {"B": -0.2, "A": -2.0})
    assert beginnings(reply, ("A", "B")) == (-2.0, -0.2)


def test_an_option_that_is_not_listed_gets_an_upper_bound() -> None:
    assert beginnings(said("A", {"A": math.log(0.9), "a": math.log(0.04)}), ("A", "B")) == pytest.approx(
        (math.log(0.9), math.log(0.04))
    )
    assert beginnings(said("A", {"A": math.log(0.9), "a": math.log(0.09)}), ("A", "B")) == pytest.approx(
        (math.log(0.9), math.log(0.01))
    )
    assert beginnings(said("Well", {"Well": -0.1, "a": -3.0}), ("A", "B")) is None
    assert beginnings(said(""), ("A", "B")) is None


def test_a_grade_of_two_tokens() -> None:
    grades = ("1", "2", "10")
    one_two, ten = {"1": math.log(0.8), "2": math.log(0.1)}, {"0": math.log(0.75), ".": math.log(0.2)}
    assert beginnings(said("10", one_two, ten), grades) == pytest.approx((math.log(0.2), math.log(0.1), math.log(0.6)))
    single = one_two | {"10": math.log(0.05)}
    assert beginnings(said("1", single, ten), grades) == pytest.approx((math.log(0.8), math.log(0.1), math.log(0.05)))
    # The reply began with 2: nobody knows how often a 1 would have become a 10, unless a 1 is improbable.
    assert beginnings(said("2", {"2": math.log(0.6), "1": math.log(0.3)}, ten), grades) is None
    assert beginnings(said("2", {"2": math.log(0.6), "1": math.log(0.001)}, ten), grades) is not None
    assert beginnings(said("2", one_two, ten), grades) is None


@pytest.mark.parametrize(
    "answer",
    [
        lambda body, count: (200, completion("A")),
        listing({"A": -0.1, "C": -3.0}),  # only one of the two
        lambda body, count: (200, {"choices": [{"message": {"content": "A"}, "logprobs": {"tokens": ["A"]}}]}),
        lambda body, count: (200, '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{}]}}]}'),
    ],
)
def test_without_log_probabilities_one_question_tells(stand_in: StandIn, answer: Answer) -> None:
    stand_in.answer = answer
    asked = server(stand_in)
    assert asked.preferences(chat("x", "y"), ("A", "B")) == [None, None]
    assert asked.preferences(chat("z"), ("A", "B")) == [None]
    assert len(stand_in.asked) == 1


def test_tokens_and_numbers_that_are_none_are_passed_over(stand_in: StandIn) -> None:
    listed = (
        '[{"token":"A","logprob":-0.5},{"token":"B","logprob":-1},{"token":"C","logprob":-Infinity},{"token":null}]'
    )
    said = '{"choices":[{"message":{"content":"A"},"logprobs":{"content":[{"top_logprobs":LISTED}]}}]}'
    stand_in.answer = lambda body, count: (200, said.replace("LISTED", listed))
    assert server(stand_in).preferences(chat("x"), ("A", "B")) == [(-0.5, -1.0)]


def test_what_a_server_refuses_is_left_out_from_then_on(stand_in: StandIn) -> None:
    def answer(body: Body, count: int) -> tuple[int, Any]:
        if "max_tokens" in body:
            return refused("Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return refused("Unsupported value: 'temperature' does not support 0 with this model.")
        if body.get("top_logprobs", 0) > 10:
            return 400, {"error": "top_logprobs must be at most 11"}
        return 200, completion("A", {"A": -0.5, "B": -1.0}) if body.get("logprobs") else completion("A")

    stand_in.answer = answer
    asked = server(stand_in, parallel=1)
    assert asked.preferences(chat("x", "y"), ("A", "B")) == [(-0.5, -1.0)] * 2
    assert len(stand_in.asked) == 3 + 3
    assert asked.replies(chat("z"), 5) == ["A"]
    last = stand_in.asked[-1]
    assert last["max_completion_tokens"] == 5
    assert not last.keys() & {"max_tokens", "temperature", "logprobs"}


def test_a_model_without_log_probabilities_is_asked_in_words(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.answer = lambda body, count: (
        refused("You are not allowed to request logprobs from this model")
        if "logprobs" in body
        else (200, completion("B"))
    )
    asked = server(stand_in, tmp_path)
    assert asked.preferences(chat("x"), ("A", "B")) == [None]
    assert len(stand_in.asked) == 3  # 20, 10 and 5 of them
    assert asked.replies(chat("x"), 5) == ["B"]
    again = server(stand_in, tmp_path)
    assert (again.preferences(chat("x"), ("A", "B")), again.replies(chat("x"), 5)) == ([None], ["B"])
    assert len(stand_in.asked) == 4


def test_a_question_that_the_server_cannot_take_ends_nothing(stand_in: StandIn) -> None:
    def answer(body: Body, count: int) -> tuple[int, Any]:
        if "long" in body["messages"][-1]["content"]:
            return refused("This model's maximum context length is 8 tokens, your messages and max_tokens are more.")
        return 200, completion("A", {"A": -0.5, "B": -1.0})

    stand_in.answer = answer
    asked = server(stand_in)
    assert asked.preferences(chat("x", "long", "y"), ("A", "B")) == [(-0.5, -1.0), None, (-0.5, -1.0)]
    assert asked.replies(chat("long"), 5) == [""]
    assert asked.unanswered == 2


def test_nothing_is_asked_twice(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.answer = listing({"A": -0.5, "B": -1.0})
    first = server(stand_in, tmp_path)
    before = (first.preferences(chat("x", "y"), ("A", "B")), first.replies(chat("x"), 5))
    assert len(stand_in.asked) == 4
    again = server(stand_in, tmp_path)
    assert (again.preferences(chat("x", "y"), ("A", "B")), again.replies(chat("x"), 5)) == before
    assert len(stand_in.asked) == 4
    again.replies(chat("x"), 6)  # another limit, another model, another conversation are other questions
    ChatServer(stand_in.url, "other", tmp_path).replies(chat("x"), 5)
    again.replies([[Message(role="system", content="x"), Message(role="user", content="x")]], 5)
    assert len(stand_in.asked) == 7


def test_damaged_lines_are_counted_and_asked_again(stand_in: StandIn, tmp_path: Path) -> None:
    server(stand_in, tmp_path, parallel=1).replies(chat("x", "y"), 5)
    path = tmp_path / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xff{]\n" + lines[0] + b"7\n" + lines[1][:-9])
    again = server(stand_in, tmp_path)
    assert again.cache is not None
    assert again.cache.damaged == 3
    assert again.replies(chat("x", "y"), 5) == ["A", "A"]
    assert len(stand_in.asked) == 3
    assert server(stand_in, tmp_path).replies(chat("x", "y"), 5) == ["A", "A"]
    assert len(stand_in.asked) == 3


def test_what_was_paid_for_before_an_error_is_kept(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.answer = lambda body, count: (500, "") if "bad" in str(body["messages"]) else (200, completion("A"))
    with pytest.raises(JudgeError):
        server(stand_in, tmp_path, parallel=1).replies(chat("x", "y", "bad", "z"), 5)
    stand_in.answer = lambda body, count: (200, completion("A"))
    asked = len(stand_in.asked)
    server(stand_in, tmp_path).replies(chat("x", "y", "bad", "z"), 5)
    assert "x" not in stand_in.questions[asked:]
    assert "y" not in stand_in.questions[asked:]


def test_a_busy_server_is_asked_again(stand_in: StandIn) -> None:
    stand_in.answer = lambda body, count: (429, {}) if count < 2 else (200, completion("A"))
    assert server(stand_in, retries=2).replies(chat("x"), 5) == ["A"]
    assert len(stand_in.asked) == 3


@pytest.mark.parametrize(
    ("status", "said", "sentence", "retries"),
    [
        (500, {"error": {"message": "out of\nmemory"}}, "status 500, 3 times over (out of memory)", 2),
        (429, {"error": {"message": "quota"}}, "a quota is used up (quota)", 1),
        (404, {"error": {"message": "no model judge-model"}}, "(no model judge-model): check --judge-model", 0),
        (404, "Not Found", "does not know that model or path (Not Found)", 0),
        (401, {"error": {"message": f"Incorrect key {SECRET[:9]}"}}, "set OPENAI_API_KEY in the environment", 0),
        (403, "", "set OPENAI_API_KEY", 0),
        (400, {"error": {"message": "x" * 999}}, "x ...): check --judge-model", 0),
        (302, "", "refuses the question with status 302 (it says nothing)", 0),
        (200, "<html>hello</html>", "another form than OpenAI's chat completions (<html>hello</html>)", 0),
        (200, {"choices": []}, "another form than OpenAI's", 0),
        (200, {"error": {"message": "busy"}}, "another form than OpenAI's chat completions (busy)", 0),
        (200, "[" * 9999, "another form than OpenAI's", 0),
        (200, {"choices": [{"text": "A"}]}, "another form than OpenAI's", 0),
    ],
)
def test_failures_are_one_sentence(stand_in: StandIn, status: int, said: Any, sentence: str, retries: int) -> None:
    stand_in.answer = lambda body, count: (status, said)
    with pytest.raises(JudgeError) as error:
        server(stand_in, retries=retries).replies(chat("x"), 5)
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"judge-model at {stand_in.url} ")
    assert "\n" not in str(error.value)
    assert SECRET[:9] not in str(error.value)
    assert len(str(error.value)) < 450
    assert len(stand_in.asked) == retries + 1


def test_empty_replies_are_replies(stand_in: StandIn) -> None:
    texts: Sequence[str | None] = ("", None, "\ud800")
    stand_in.answer = lambda body, count: (200, completion(texts[int(body["messages"][-1]["content"])]))
    assert server(stand_in).replies(chat("0", "1", "2"), 5) == ["", "", "?"]


def test_no_server_there(stand_in: StandIn) -> None:
    asked = ChatServer("http://127.0.0.1:1/v1", "judge-model", retries=0)
    with pytest.raises(JudgeError, match=r"judge-model at http://127.0.0.1:1/v1 cannot be reached .*--judge-url"):
        asked.replies(chat("x"), 5)


def test_a_slow_server(stand_in: StandIn) -> None:
    def answer(body: Body, count: int) -> tuple[int, Any]:
        stand_in.released.wait()
        return 200, completion("A")

    stand_in.answer = answer
    with pytest.raises(JudgeError, match=r"did not answer within 0\.05 s, 1 times over"):
        server(stand_in, timeout=0.05).replies(chat("x"), 5)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_the_key_is_nowhere(
    stand_in: StandIn, tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    said = f"your key is {SECRET} and your header Bearer {SECRET}"
    stand_in.answer = lambda body, count: (
        (200, completion(said, {"A": -0.5, "B": -1.0, SECRET: -2.0})) if status == 200 else (status, {"error": said})
    )
    asked = server(stand_in, tmp_path)
    seen: list[Any] = []
    with caplog.at_level(logging.DEBUG):
        try:
            seen += [*asked.replies(chat("x"), 5), *asked.preferences(chat("x"), ("A", "B"))]
        except JudgeError as error:
            seen += [error, error.__cause__, error.__suppress_context__ or error.__context__]
    seen += [asked, vars(asked), asked.name, asked.key, caplog.text, capfd.readouterr()]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert SECRET in str(stand_in.headers)
    assert SECRET not in repr(seen)
    assert SECRET not in str(seen)


def test_a_key_that_cannot_be_sent_is_not_shown(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\x07")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY") as error:
        server(stand_in).replies(chat("x"), 5)
    assert SECRET not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    assert server(stand_in).replies(chat("x"), 5) == ["A"]


def test_no_proxy_and_no_other_address(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:3128")  # the tests' guard refuses it
    monkeypatch.setenv("OPENAI_BASE_URL", "http://192.0.2.1/v1")
    assert server(stand_in).replies(chat("x"), 5) == ["A"]


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8080", "ftp://a/v1", "http://", "http://u:p4ss@h/v1", "https://h/v1?key=p4ss", "http://h:x/v1", ""],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(JudgeError, match="--judge-url") as error:
        ChatServer(url, "judge-model")
    assert "p4ss" not in str(error.value)


def test_name_and_key() -> None:
    one, other = ChatServer("http://h:1/v1/", "judge-model"), ChatServer("http://h:2/v1", "judge-model")
    assert one.name == "judge-model at http://h:1/v1"
    assert one.key == other.key != ChatServer("http://h:1/v1", "other").key


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"pip install 'spa-lite\[openai\]'"):
        ChatServer("http://h:1/v1", "judge-model")


@pytest.mark.parametrize("words", [False, True])
def test_a_pair_judge_behind_a_server(stand_in: StandIn, tmp_path: Path, words: bool) -> None:
    def answer(body: Body, count: int) -> tuple[int, Any]:
        question = body["messages"][-1]["content"]
        first = math.log(0.8 if question == "q|good|bad" else 0.4)
        listed = {"A": first, "B": math.log1p(-math.exp(first))}
        return 200, completion("A", *([] if words else [listed]))

    stand_in.answer = answer
    sample = Sample(
        id="x",
        messages=tuple(chat("q")[0]),
        prompt_ids=(),
        completions=tuple(Completion(ids=(), text=text, ended="human") for text in ("good", "bad")),
    )
    opinions = [
        PairJudge(server(stand_in, tmp_path), "{question}|{answer_1}|{answer_2}", "openai")([sample]) for _ in "12"
    ]
    assert opinions[0] == opinions[1]
    assert [v.p for v in opinions[0][0].verdicts] == pytest.approx([1, 1] if words else [0.8, 0.4])
    assert opinions[0][0].scores == pytest.approx((0.5, 0.5) if words else (0.7, 0.3))
    assert sorted(stand_in.questions)[1:] == ["q|bad|good", "q|good|bad"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "logprobs", "top_logprobs", "token"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_body_is_a_reply_or_one_sentence(body: Any) -> None:
    asked = ChatServer("http://127.0.0.1:1/v1", "judge-model")
    with suppress(JudgeError):
        asked._read("k", json.dumps(body))
    whole = json.dumps({"choices": [{"message": {"content": body}, "logprobs": body}]})
    assert beginnings(asked._read("k", whole), ("1", "10")) is None or "top_logprobs" in whole


def test_two_may_write_one_cache(tmp_path: Path) -> None:
    one, other = ReplyCache(tmp_path), ReplyCache(tmp_path)
    for i in range(3):
        one.add(Reply(key=f"one {i}", text="1" * i))
        other.add(Reply(key=f"other {i}", text="2" * 9, lists=((("A", -0.5),),)))
    assert one.get("one 2") == Reply(key="one 2", text="11")
    assert other.get("other 0") == Reply(key="other 0", text="2" * 9, lists=((("A", -0.5),),))
    third = ReplyCache(tmp_path)
    assert third.get("other 2") is not None
    assert (third.get("one 1"), third.get("nobody"), third.damaged) == (Reply(key="one 1", text="1"), None, 0)
    third.path.write_bytes(b"")
    assert third.get("other 2") is None


def said(text: str, *lists: dict[str, float]) -> Reply:
    return Reply(key="", text=text, lists=tuple(tuple(listed.items()) for listed in lists))


def refused(message: str) -> tuple[int, Any]:
    return 400, {"error": {"message": message, "code": "unsupported_parameter"}}
