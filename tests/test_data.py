"""Reading, checking, dividing and writing records."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message as Headers
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spa_lite import data, sources
from spa_lite.data import read_candidates, read_pairs, read_prompts
from spa_lite.errors import DataError, RecipeError
from spa_lite.records import Message, Pair, Prompt, Record


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def prompt(text: str, id_: str = "") -> Prompt:
    return Prompt(id=id_ or text, messages=(Message(role="user", content=text),))


def pair(text: str, chosen: str = "yes", rejected: str = "no") -> Pair:
    return Pair(id=f"{text}{chosen}{rejected}", messages=prompt(text).messages, chosen=chosen, rejected=rejected)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    def put(content: bytes, name: str = "d.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return put


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- prompts ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_text_or_a_conversation_and_keeps_its_other_fields(put: Callable[..., Path]) -> None:
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("Bye")]
    path = put(line(prompt="Why?", id="x", topic="sky") + line(messages=turns) + line(prompt=[user("How?")], id=7))
    prompts, report = read_prompts(path)
    assert [p.messages[-1].content for p in prompts] == ["Why?", "Bye", "How?"]
    assert prompts[0].id == "x"
    assert prompts[0].extra == {"topic": "sky"}
    assert [m.role for m in prompts[1].messages] == ["system", "user", "assistant", "user"]
    assert prompts[2].id == "7"
    assert report.kept == 3
    assert report.lines() == [f"{path}: 3 records read."]


def test_a_missing_id_is_a_digest_of_the_conversation(put: Callable[..., Path]) -> None:
    (as_text, other), _ = read_prompts(put(line(prompt="Why?", note=1) + line(prompt="Why not?")))
    (as_turns,), _ = read_prompts(put(line(messages=[user("Why?")])))
    assert as_text.id == as_turns.id != other.id
    assert len(as_text.id) == 16
    int(as_text.id, 16)


def test_repeated_prompts_are_dropped_and_counted_whatever_their_ids(put: Callable[..., Path]) -> None:
    path = put(
        line(prompt="A", id="1") + line(prompt="A", id="1") + line(messages=[user("A")], id="2") + line(prompt="B")
    )
    prompts, report = read_prompts(path)
    assert [p.messages[0].content for p in prompts] == ["A", "B"]
    assert report.repeated == 2
    assert report.lines()[1] == "2 repeats of an earlier record dropped."


def test_prompts_are_streamed(put: Callable[..., Path]) -> None:
    reading = data.iter_prompts(put(line(prompt="A") + line(prompt="B") + b"broken\n"))
    assert next(reading).messages[0].content == "A"
    assert reading.report.kept == 1
    assert next(iter(reading)).messages[0].content == "B"
    with pytest.raises(DataError, match="line 3"):
        next(reading)


def test_ultrafeedback_columns_are_understood_as_prompts_and_as_pairs(put: Callable[..., Path]) -> None:
    chosen, rejected = [user("Q"), assistant("good")], [user("Q"), assistant("bad")]
    row = {"prompt": "Q", "prompt_id": "uf1", "chosen": chosen, "rejected": rejected, "messages": chosen}
    path = put(line(**row, score_chosen=8.5, score_rejected=3.0))
    (found,), _ = read_prompts(path)
    assert (found.id, found.messages) == ("uf1", prompt("Q").messages)
    (labelled,), _ = read_pairs(path)
    assert (labelled.id, labelled.chosen, labelled.rejected) == ("uf1", "good", "bad")
    assert labelled.prompt.messages == prompt("Q").messages
    assert labelled.extra == {"prompt_id": "uf1", "score_chosen": 8.5, "score_rejected": 3.0}


def test_a_prompt_id_names_one_pair_only(put: Callable[..., Path]) -> None:
    rows = [line(prompt="Q", prompt_id="p", chosen="a", rejected=other) for other in "bc"]
    pairs, _ = read_pairs(put(b"".join(rows)))
    assert pairs[0].id == "p" != pairs[1].id


# --- pairs -----------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "messages and texts": {"messages": [user("Q")], "chosen": "A", "rejected": "B"},
    "answer turns": {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    "text and answer turns": {"prompt": "Q", "chosen": [assistant("A")], "rejected": [assistant("B")]},
    "whole": {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
    "whole and prompt": {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
    "hh": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    "nulls": {"prompt": "Q", "messages": None, "chosen": "A", "rejected": "B"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_pair_gives_the_same_pair(way: str, put: Callable[..., Path]) -> None:
    (found,), _ = read_pairs(put(line(**WAYS[way])))
    (plain,), _ = read_pairs(put(line(**WAYS["texts"])))
    assert (found.id, found.messages, found.chosen, found.rejected) == (plain.id, plain.messages, "A", "B")


def test_hh_conversations_of_several_turns(put: Callable[..., Path]) -> None:
    start = "\n\nHuman: Hi\nHuman: is a word\n\nAssistant: Hello\n\nto you\n\nHuman: Bye\n\nAssistant:"
    (found,), _ = read_pairs(put(line(chosen=start + " Farewell", rejected=start + " Go")))
    said = [(m.role, m.content) for m in found.messages]
    assert said == [("user", "Hi\nHuman: is a word"), ("assistant", "Hello\n\nto you"), ("user", "Bye")]
    assert (found.chosen, found.rejected) == ("Farewell", "Go")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Name a river.\nRhine it is", "Name a river.\nRhone it is", ("Name a river.", "Rhine it is", "Rhone it is")),
        ("Name it. Rhine", "Name it. Rhone", ("Name it.", "Rhine", "Rhone")),
        ("two and two make four", "two and two make five", ("two and two make", "four", "five")),
        ("a b", "a b c", ("a", "b", "b c")),
    ],
)
def test_plain_texts_are_split_at_a_line_a_sentence_or_a_word(
    chosen: str, rejected: str, expected: tuple[str, str, str], put: Callable[..., Path]
) -> None:
    (found,), _ = read_pairs(put(line(chosen=chosen, rejected=rejected)))
    assert (found.messages[0].content, found.chosen, found.rejected) == expected


def test_exact_repeats_of_pairs_are_dropped_and_other_pairs_of_a_prompt_kept(put: Callable[..., Path]) -> None:
    one, two = line(prompt="Q", chosen="A", rejected="B"), line(prompt="Q", chosen="B", rejected="A")
    pairs, report = read_pairs(put(one + two + one))
    assert len({p.id for p in pairs}) == len(pairs) == 2
    assert report.repeated == 1


# --- answers to judge ------------------------------------------------------------------------------------------


def test_candidates_come_as_letters_or_as_a_labelled_pair(put: Callable[..., Path]) -> None:
    rows = [
        line(prompt="1", a="x", b="y", id="first", note=1),
        line(prompt="2", a="x", b="y", label="b"),
        line(prompt="3", a="x", b="y", label=0),
        line(prompt="4", a=[assistant("x")], b=[assistant("y")], label=1),
        line(prompt="5", chosen="x", rejected="y"),
        line(prompt="6", a="x", b="x"),
        line(prompt="7", responses=["x", "y", "z"], note=2),
        line(prompt="7", responses=["x", "y", "z"], best=2),
        line(prompt="7", responses=["x", "y", "z"], label=1),
        line(prompt="7", responses=["x", "y", "z"], ranking=[1, 2, 0]),
        line(prompt="7", responses=["x", "y", "z"], best=2, note=3),
    ]
    found, report = read_candidates(put(b"".join(rows)))
    assert [c.gold for c in found] == [(), (1,), (0,), (1,), (0,), (), (), (2,), (1,), (1, 2, 0)]
    assert all(c.answers == ("x", "y") for c in found[:5])
    assert found[6].answers == ("x", "y", "z")
    assert (found[0].prompt.id, found[0].prompt.extra) == ("first", {"note": 1})
    assert found[6].prompt.extra == {"note": 2}
    assert (report.kept, report.repeated) == (10, 1)


def test_candidates_know_their_row(put: Callable[..., Path]) -> None:
    """Blank lines are no records; bad ones and repeats are."""
    rows = [
        line(prompt="1", a="x", b="y"),
        b"\n",
        b"bad\n",
        line(prompt="1", a="x", b="y"),
        line(prompt="2", a="x", b="y"),
    ]
    found, _ = read_candidates(put(b"".join(rows)), skip_bad=True)
    assert [c.row for c in found] == [1, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "Q"}, "neither `a` and `b` nor"),
        ({"prompt": "Q", "a": "x"}, "`b` is missing"),
        ({"prompt": "Q", "a": "x", "b": "y", "chosen": "x"}, "keep one of the two forms"),
        ({"prompt": "Q", "a": "x", "b": "y", "label": "c"}, 'write "a" or 0'),
        ({"prompt": "Q", "a": "x", "b": "y", "label": True}, 'write "a" or 0'),
        ({"prompt": "Q", "a": "x", "b": "x", "label": "a"}, "drop the label"),
        ({"prompt": "Q", "responses": "x"}, "write a list of texts"),
        ({"prompt": "Q", "responses": ["x"]}, "give two or more"),
        ({"prompt": "Q", "responses": ["x", 1]}, "answer 1 of `responses` is a number"),
        ({"prompt": "Q", "responses": ["x", "y"], "best": 2}, "the answers are 0 to 1"),
        ({"prompt": "Q", "responses": ["x", "y"], "best": -1}, "the answers are 0 to 1"),
        ({"prompt": "Q", "responses": ["x", "y"], "best": True}, "the best answer's index"),
        ({"prompt": "Q", "responses": ["x", "y"], "ranking": [1]}, "name each of 0 to 1 once"),
        ({"prompt": "Q", "responses": ["x", "y"], "ranking": 1}, "a list of indices"),
        ({"prompt": "Q", "responses": ["x", "y"], "best": 0, "label": 0}, "keep one of them"),
        ({"prompt": "Q", "responses": ["x", "x"], "best": 0}, "occurs twice"),
    ],
)
def test_bad_candidates_are_refused(fields: dict[str, Any], words: str, put: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        read_candidates(put(line(**fields)))
    assert "d.jsonl, line 1: " in str(caught.value)
    assert words in str(caught.value)


# --- bad records -----------------------------------------------------------------------------------------------

GOOD = line(prompt="fine", id="good")
BAD_PROMPTS: dict[str, tuple[bytes, str, str]] = {
    "no prompt": (line(text="x"), "missing", "neither `prompt` nor `messages`; add"),
    "null": (line(prompt=None), "missing", "neither `prompt` nor `messages`; add"),
    "empty": (line(prompt=" \n"), "empty", "`prompt` is empty; fill it in"),
    "no turns": (line(messages=[]), "empty", "`messages` is an empty list; give it"),
    "empty turn": (line(messages=[user("")]), "empty", "`content` in turn 1 of `messages` is empty; fill it in"),
    "number": (line(prompt=5), "type", "`prompt` is a number; write a text"),
    "messages text": (line(messages="hi"), "type", "`messages` is a text; write a list"),
    "turn text": (line(messages=["hi"]), "type", 'turn 1 of `messages` is a text; write {"role"'),
    "sharegpt": (
        line(messages=[{"from": "human", "value": "x"}]),
        "missing",
        "`role` in turn 1 of `messages` is missing; add",
    ),
    "content list": (line(messages=[{"role": "user", "content": ["x"]}]), "type", "is a list; write a text"),
    "bad id": (line(prompt="x", id=1.5), "type", "`id` is a number; write a text"),
    "empty id": (line(prompt="x", id=""), "empty", "`id` is empty; fill it in"),
    "utf-8": (b'{"prompt": "\xff"}\n', "utf-8", "byte 13 of the line is not UTF-8; save the file as UTF-8"),
    "no user": (line(messages=[assistant("x")]), "turn", "no user turn; add"),
    "ends wrong": (line(messages=[user("x"), assistant("y")]), "turn", "role 'assistant'; end it with a user turn"),
    "role": (
        line(messages=[{"role": "robot", "content": "x"}]),
        "role",
        "unknown role 'robot'; use one of system, user",
    ),
    "nul": (line(prompt="a\0b"), "nul", "`prompt` holds a NUL character; remove it"),
    "raw nul": (b'{"prompt": "a\0b"}\n', "nul", "NUL character; remove it"),
    "list": (b'["prompt"]\n', "object", "not an object; write"),
    "text": (b'"prompt"\n', "object", "not an object; write"),
    "not json": (
        b"{'prompt': 'x'}\n",
        "json",
        "not valid JSON (object keys must be strings (byte 1)); write one object per line",
    ),
    "two": (b'{"prompt": "x"} {"prompt": "y"}\n', "json", "write one object per line"),
    "nan": (b'{"prompt": "x", "score": NaN}\n', "json", "NaN, Infinity"),
    "surrogate": (b'{"prompt": "\\ud800"}\n', "json", "surrogate"),
    "deep": (b'{"prompt": ' + b"[" * 9999 + b"]" * 9999 + b"}\n", "json", "write one object per line"),
    "cut in the middle": (b'{"prompt": "x\n', "json", "write one object per line"),
    "duplicate id": (line(prompt="other", id="good"), "id", "'good' was given to a record above; give each its own"),
    "disagree": (line(prompt="x", messages=[user("y")]), "prompt", "`prompt` and `messages` disagree; keep one"),
}
Q = {"prompt": "Q"}
BAD_PAIRS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no chosen": (Q | {"rejected": "x"}, "missing", "`chosen` is missing; add it"),
    "no rejected": (Q | {"chosen": "x"}, "missing", "`rejected` is missing; add it"),
    "empty chosen": (Q | {"chosen": "", "rejected": "x"}, "empty", "`chosen` is empty; fill it in"),
    "type": (Q | {"chosen": {"x": 1}, "rejected": "x"}, "type", "`chosen` is an object; write a text"),
    "mixed": (Q | {"chosen": [assistant("x")], "rejected": "x"}, "type", "write both the same way"),
    "same": (Q | {"chosen": "x", "rejected": "x"}, "same", "are the same; change one of them or drop the pair"),
    "nul": (Q | {"chosen": "x\0", "rejected": "x"}, "nul", "`chosen` holds a NUL character; remove it"),
    "nothing shared": ({"chosen": "x", "rejected": "y"}, "missing", "share no beginning; add `prompt`"),
    "answers only": ({"chosen": [assistant("x")], "rejected": [assistant("y")]}, "missing", "no prompt; add `prompt`"),
    "differ early": (
        {"chosen": [user("x"), assistant("1")], "rejected": [user("y"), assistant("2")]},
        "prompt",
        "differ before their last turn; make",
    ),
    "ends with user": (
        {"chosen": [user("x")], "rejected": [user("x"), assistant("2")]},
        "turn",
        "`chosen` ends with a turn of role 'user'; end it with an assistant turn",
    ),
    "other prompt": (
        Q | {"chosen": [user("x"), assistant("1")], "rejected": [user("x"), assistant("2")]},
        "prompt",
        "drop",
    ),
    "hh empty answer": (
        {"chosen": "\n\nHuman: x\n\nAssistant:", "rejected": "\n\nHuman: x\n\nAssistant: y"},
        "empty",
        "turn 2 of `chosen` is empty; fill it in",
    ),
    "hh no answer": ({"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: x y"}, "turn", "end it with an assistant turn"),
}


def refused(read: Any, path: Path, kind: str, words: str, at: int) -> None:
    """Strict reading names file, line and mend; lenient reading counts the record and keeps the message."""
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {at}: ")
    assert words in message
    assert "; " in message
    _, report = read(path, skip_bad=True)
    assert report.bad == {kind: 1}
    assert report.messages == (message,)
    assert report.lines()[1] == f"1 bad record skipped: 1 {data.KINDS[kind]}."


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_every_bad_prompt_is_refused_with_file_line_and_mend(case: str, put: Callable[..., Path]) -> None:
    raw, kind, words = BAD_PROMPTS[case]
    refused(read_prompts, put(GOOD + b"\r\n" + raw + line(prompt="after")), kind, words, 3)


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_every_bad_pair_is_refused_with_file_line_and_mend(case: str, put: Callable[..., Path]) -> None:
    fields, kind, words = BAD_PAIRS[case]
    refused(read_pairs, put(line(prompt="fine", chosen="a", rejected="b") + line(**fields)), kind, words, 2)


@pytest.mark.parametrize("tail", [b'{"prompt": "wh', b'{"prompt": "x", "y": {}', '{"prompt": "é'.encode()[:-1]])
def test_a_truncated_last_line_is_told_from_other_damage(tail: bytes, put: Callable[..., Path]) -> None:
    refused(read_prompts, put(GOOD + tail), "cut", "the last line is cut off", 2)


def test_a_last_line_needs_no_newline(put: Callable[..., Path]) -> None:
    assert len(read_prompts(put(GOOD + line(prompt="x").rstrip()))[0]) == 2


def test_only_the_first_messages_are_kept_and_the_rest_counted(put: Callable[..., Path]) -> None:
    _, report = read_prompts(put(GOOD + b"5\n" * 3 + line(prompt="") * 9), skip_bad=True)
    assert report.bad == {"object": 3, "empty": 9}
    assert len(report.messages) == data.SHOWN
    assert report.lines()[1] == "12 bad records skipped: 3 not an object, 9 with an empty text."
    assert report.lines()[-1] == "... and 7 more."


def test_nothing_but_bad_records_is_an_error_all_the_same(put: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"all 2 records are bad; the first: .*line 1"):
        read_prompts(put(b"5\n6\n"), skip_bad=True)


# --- unicode, line ends, blank lines ---------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
blank = st.sampled_from([b"", b"\n", b"\r\n", b"  \t\n"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts, min_size=1, max_size=5, unique=True), st.data())
def test_any_text_survives_bom_crlf_and_blank_lines(tmp_path: Path, said: list[str], draw: st.DataObject) -> None:
    content = draw.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    for text in said:
        raw = json.dumps({"prompt": text}, ensure_ascii=draw.draw(st.booleans())).encode()
        content += draw.draw(blank) + raw + draw.draw(st.sampled_from([b"\n", b"\r\n"]))
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    prompts, _ = read_prompts(path)
    assert [p.messages[0].content for p in prompts] == said
    data.write_jsonl(path, prompts)
    assert data.read_jsonl(path, Prompt) == prompts
    assert read_prompts(path)[0] == prompts  # our own records are prompts too


# --- where records come from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.JSONL", "d.jsonl.gz"])
def test_lines_plain_or_compressed(name: str, put: Callable[..., Path]) -> None:
    assert len(read_prompts(put(b"\xef\xbb\xbf" + GOOD, name))[0]) == 1


@pytest.mark.parametrize("wrap", ["[%s]", '{"version": 1, "data": [%s]}', "\ufeff\r\n[%s]"])
def test_a_json_document(wrap: str, put: Callable[..., Path]) -> None:
    inside = '\n {"prompt": "x",\n "n": 1},\n {"prompt": "y"}\n'
    assert [p.messages[0].content for p in read_prompts(put((wrap % inside).encode(), "d.json"))[0]] == ["x", "y"]


def test_a_bad_record_of_a_json_document_is_named_by_line_and_number(put: Callable[..., Path]) -> None:
    path = put(b'[\n{"prompt": "x",\n"n": 1},\n{"prompt": 1}]', "d.json")
    with pytest.raises(DataError, match=r"d\.json, line 4 \(record 2\): `prompt` is a number; write"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + GOOD, "or name it .jsonl if it holds one object per line"),
        (b"[]\n[]", "line 2: not one valid JSON document"),
        (b'[\n{"prompt": "x"},\n{"pro', "line 3: not one valid JSON document"),
        (b'{"rows": []}', 'neither a list nor {"data": [...]}; write one of them'),
        (b"", "the source is empty; give it"),
        (b"[]", "the source is empty; give it"),
    ],
)
def test_bad_json_documents(content: bytes, words: str, put: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        read_prompts(put(content, "d.json"))
    assert str(caught.value).startswith(str(caught.value).split("d.json")[0] + "d.json")
    assert words in str(caught.value)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD + b"5\n")))
    reading = data.iter_prompts("-")
    assert next(reading).id == "good"
    with pytest.raises(DataError, match="standard input, line 2: "):
        next(reading)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read_as_lines(tmp_path: Path) -> None:
    pipe = tmp_path / "63"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(GOOD,))
    writer.start()
    assert read_prompts(pipe)[0][0].id == "good"
    writer.join()


@pytest.mark.parametrize("read", [read_prompts, read_pairs, read_candidates])
def test_paths_that_cannot_work(read: Any, tmp_path: Path, put: Callable[..., Path]) -> None:
    def message(source: str | Path) -> str:
        with pytest.raises(DataError) as caught:
            read(source)
        assert str(caught.value).startswith(str(source))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such file; check the path" in message(tmp_path / "absent.jsonl")
    assert "write hub:owner/name for a data set" in message("owner/name")
    assert "this is a folder; name a file in it" in message(tmp_path)
    assert "the ending .txt is unknown; use one of .jsonl" in message(put(GOOD, "d.txt"))
    assert "the ending (none) is unknown" in message(put(GOOD, "d"))
    assert "is empty; give it at least one record" in message(put(b""))
    assert "is empty; give it at least one record" in message(put(b"\xef\xbb\xbf\n \r\n"))
    assert "is empty; give it at least one record" in message(put(b"", "d.jsonl.gz"))
    assert "write hub:owner/name or hub:owner/name:split" in message("hub:name")


def test_an_unreadable_file(put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(GOOD)

    def deny(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "open", deny, raising=False)
    with pytest.raises(DataError, match=r"d\.jsonl: cannot be read \(Permission denied\); check its permissions"):
        read_prompts(path)


def test_damaged_gzip_files(put: Callable[..., Path]) -> None:
    path = put(GOOD)
    path = path.rename(path.with_name("d.jsonl.gz"))
    with pytest.raises(DataError, match="not a sound gzip file"):
        read_prompts(path)
    path.write_bytes(gzip.compress(os.urandom(9999).hex().encode())[:-99])
    with pytest.raises(DataError, match="cut off"):
        read_prompts(path)


def test_paths_are_refused_before_the_first_record_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        data.iter_prompts(tmp_path / "absent.jsonl")


@pytest.mark.usefixtures("no_network")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that pandas leaves open
def test_csv(put: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    turns = json.dumps([user("hi"), assistant("ho"), user("he")]).replace('"', '""')
    text = f'\ufeffid,prompt,messages,n\r\n1,"say ""a""\nor b",,5\r\n2,NA,,\r\n3,,"{turns}",\r\n4,[sic],,\r\n'
    prompts, _ = read_prompts(put(text.encode(), "a [1].csv"))
    assert [p.messages[-1].content for p in prompts] == ['say "a"\nor b', "NA", "he", "[sic]"]
    assert [p.id for p in prompts] == ["1", "2", "3", "4"]
    assert prompts[0].extra == {"n": "5"}
    with pytest.raises(DataError, match=r"b\.csv, record 2: there is neither `prompt` nor `messages`; add"):
        read_prompts(put(b"prompt,n\nx,1\n,2\n", "b.csv"))
    for content, words in (
        (b"id,prompt\n1,a\n2,b,c\n", "not sound csv"),
        (b"id,prompt\n1,\xff\n", "not UTF-8; save"),
        (b"id,id\n1,2\n", "occurs twice; give"),
        (b"id,prompt\n", "is empty; give"),
        (b"", "is empty; give"),
    ):
        with pytest.raises(DataError) as caught:
            read_prompts(put(content, "c.csv"))
        assert "c.csv" in str(caught.value)
        assert words in str(caught.value)
    gc.collect()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_network")
def test_parquet(put: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [WAYS["whole"] | {"prompt": "Q", "score": 1.5}, WAYS["whole"] | {"prompt": "other"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    pairs, report = read_pairs(tmp_path / "d.parquet", skip_bad=True)
    assert [(p.chosen, p.rejected, p.extra) for p in pairs] == [("A", "B", {"score": 1.5})]
    assert report.messages[0].startswith(f"{tmp_path / 'd.parquet'}, record 2: `prompt` is not what `chosen` answers")
    with pytest.raises(DataError, match=r"e\.parquet, after record 0: not sound parquet"):
        read_pairs(put(b"hello", "e.parquet"))
    with pytest.raises(DataError, match="is empty; give"):
        read_pairs(put(b"", "e.parquet"))
    assert capfd.readouterr() == ("", "")


# --- the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that answers with one row, and the arguments it was asked with."""
    import datasets

    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append({"name": name, **options})
        if options["split"] == "absent":
            raise ValueError("Unknown split 'absent'.\nand more")
        return [WAYS["whole"] | {"prompt": "Q"}]

    monkeypatch.setattr(sources, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: {"o/one": ["only"], "o/n": ["a", "b"]}[name])
    return asked


def test_a_hub_name_is_loaded_without_trusting_code(hub: list[dict[str, Any]]) -> None:
    assert read_pairs("hub:o/n:train_prefs")[0][0].chosen == "A"
    assert read_pairs("hub:o/one")[0][0].chosen == "A"
    assert hub == [{"name": "o/n", "split": "train_prefs"}, {"name": "o/one", "split": "only"}]
    with pytest.raises(DataError, match="it has the splits a, b; say which one, as in hub:o/n:a"):
        read_pairs("hub:o/n")
    with pytest.raises(DataError, match=r"^hub:o/n:absent: cannot be loaded \(Unknown split 'absent'\); check.*$"):
        read_pairs("hub:o/n:absent")


def test_a_hub_that_does_not_answer_is_one_quick_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args: object, **options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    start = time.monotonic()
    with pytest.raises(
        DataError, match="hub:o/n: the hub cannot be reached; connect to the network, give a local file"
    ):
        read_prompts("hub:o/n")
    assert time.monotonic() - start < 5


def test_a_resolver_that_hangs_does_not_hang_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.05)
    release = threading.Event()

    def hang(*args: object, **options: object) -> None:
        release.wait(9)
        raise OSError("no answer")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    start = time.monotonic()
    assert not sources.reachable()
    assert time.monotonic() - start < 5
    release.set()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (urllib.error.HTTPError("", 401, "who are you", Headers(), None), True),
        (urllib.error.URLError(ssl.SSLError("unknown certificate")), True),
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), False),
        (TimeoutError(), False),
    ],
)
def test_what_counts_as_an_answer(answer: Exception, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*args: object, **options: object) -> None:
        raise answer

    monkeypatch.setattr(urllib.request, "urlopen", answers)
    assert sources.reachable() is expected


# --- memory ----------------------------------------------------------------------------------------------------

READ_ALL = """
import pathlib, resource, sys
from spa_lite.data import iter_prompts

def peak():
    # Linux hands ru_maxrss down from the process that started this one, so ask for this program's own high-water mark.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

at_rest = peak()
reading = iter_prompts(sys.argv[1])
assert sum(1 for _ in reading) == int(sys.argv[2])
most = peak()
heavy = {"datasets", "yaml", "torch", "transformers", "mlx", "jinja2", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
print(at_rest, most)
"""


def megabytes(path: Path, count: int) -> tuple[float, float]:
    """Memory of a process that reads `count` prompts with ids: after its imports, and at its peak."""
    with path.open("w") as stream:
        for number in range(count):
            stream.write(f'{{"id": "p{number}", "prompt": "Question {number}: {"why is the sky blue today? " * 4}"}}\n')
    command = [sys.executable, "-c", READ_ALL, str(path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024
    at_rest, peak = (int(number) / unit for number in done.stdout.split())
    return at_rest, peak


def test_a_hundred_thousand_lines_need_little_memory(tmp_path: Path) -> None:
    at_rest, peak = megabytes(tmp_path / "d.jsonl", 100_000)
    assert peak - at_rest < 25  # a tenth of what a million may need above the imports


@pytest.mark.long
def test_a_million_lines_need_less_than_300_megabytes(tmp_path: Path) -> None:
    assert megabytes(tmp_path / "d.jsonl", 1_000_000)[1] < 300


# --- dividing --------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(5, 40), st.integers(0, 3))
def test_rounds_are_disjoint_and_even(rounds: int, count: int, seed: int) -> None:
    prompts = [prompt(str(number)) for number in range(count)]
    parts = data.split_rounds(prompts, rounds, None, seed)
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in prompts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == data.split_rounds(prompts, rounds, None, seed)


def test_rounds_of_given_sizes() -> None:
    prompts = [prompt(str(number)) for number in range(20)]
    two = data.split_rounds(prompts, 2, [3, 4], 0)
    three = data.split_rounds(prompts, 3, [3, 4, 5], 0)
    assert [len(part) for part in three] == [3, 4, 5]
    assert three[:2] == two
    assert len({p.id for part in three for p in part}) == 12
    assert data.split_rounds(prompts, 2, [3, 4], 1) != two


def test_a_conversation_is_in_one_round_only() -> None:
    prompts = [prompt("same", "1"), prompt("same", "2"), prompt("other")]
    (one,), (two,) = data.split_rounds(prompts, 2, None, 0)
    assert {one.id, two.id} == {"1", "other"}


def test_impossible_rounds_name_both_numbers() -> None:
    prompts = [prompt(str(number)) for number in range(5)]
    with pytest.raises(DataError, match="ask for 6 different prompts and there are 5; add"):
        data.split_rounds(prompts, 2, [3, 3], 0)
    with pytest.raises(DataError, match="ask for 6 different prompts and there are 5; add"):
        data.split_rounds(prompts, 6, None, 0)
    for rounds, sizes in ((2, [3]), (1, [0]), (0, None), (0, [])):
        with pytest.raises(RecipeError, match="give one size"):
            data.split_rounds(prompts, rounds, sizes, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=40, unique=True), st.floats(0.01, 0.99))
def test_pairs_of_a_prompt_stay_together(made: list[tuple[int, int]], fraction: float) -> None:
    pairs = [pair(str(number), f"yes{answer}") for number, answer in made]
    train, held = data.hold_out(pairs, fraction, seed=1)
    assert (train, held) == data.hold_out(pairs, fraction, seed=1)
    assert sorted(p.id for p in train + held) == sorted(p.id for p in pairs)
    sides = [{p.messages for p in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    if len(sides[0] | sides[1]) >= 2:
        assert train
        assert held
    prompts = [prompt(str(number)) for number in range(10)]
    kept, dropped = data.without(prompts, held)
    assert dropped == len(sides[1]) == 10 - len(kept)
    assert not {p.messages for p in kept} & sides[1]


def test_the_default_holds_out_a_tenth() -> None:
    pairs = [pair(str(number)) for number in range(50)]
    train, held = data.hold_out(pairs, seed=0)
    assert (len(train), len(held)) == (45, 5)
    assert data.hold_out(pairs, 0, 0) == (pairs, [])
    assert data.hold_out(pairs[:1], 0.5, 0) == (pairs[:1], [])
    with pytest.raises(RecipeError, match="held-out fraction is 1"):
        data.hold_out(pairs, 1, 0)


# --- our own files ---------------------------------------------------------------------------------------------


def test_records_go_out_and_come_back(tmp_path: Path) -> None:
    pairs = [pair("a\nb\u2028c"), pair("x\x85")]
    assert data.write_jsonl(tmp_path / "p.jsonl", pairs) == 2
    assert data.read_jsonl(tmp_path / "p.jsonl", Pair) == pairs
    assert read_pairs(tmp_path / "p.jsonl")[0] == pairs
    assert data.write_jsonl(str(tmp_path / "p.jsonl"), []) == 0
    assert data.read_jsonl(tmp_path / "p.jsonl", Pair) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    data.write_jsonl(path, [prompt("old")])

    def records() -> Iterator[Record]:
        yield prompt("new")
        yield Prompt(id="x", messages=(), extra={"thing": object()})

    with pytest.raises(DataError, match=r"p\.jsonl: record 2 cannot be written as JSON"):
        data.write_jsonl(path, records())
    assert data.read_jsonl(path, Prompt) == [prompt("old")]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="cannot be written"):
        data.write_jsonl(tmp_path / "absent" / "p.jsonl", [])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"id": 1, "messages": []}\n', "Expected `str`, got `int` - at `$.id`; the line is not of this kind"),
        (b'{"messages": []}\n', "missing required field `id`; the line is not of this kind"),
        (b'{"id": "x', "the last line is cut off"),
        (b'"x"\n', "Expected `object`, got `str`; the line is not of this kind"),
    ],
)
def test_a_bad_line_of_our_own_is_named(raw: bytes, words: str, put: Callable[..., Path]) -> None:
    path = put(b'{"id": "a", "messages": []}\n' + raw)
    with pytest.raises(DataError) as caught:
        data.read_jsonl(path, Prompt)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert words in str(caught.value)
