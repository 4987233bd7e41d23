"""`spa-lite chat`: the conversation, every command through a pipe, and the whole of it through a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console

from spa_lite import backends, data, reading
from spa_lite.backend import INIT, Backend, ModelSettings, Sampling
from spa_lite.cli import chat_screen, render
from spa_lite.cli.chat import COMMANDS
from spa_lite.conversation import Answering, Conversation, Exchange
from spa_lite.errors import DataError
from spa_lite.interrupt import patient
from tests.small import run_small, small_recipe, write_data
from tests.speaking import Terminal, answer
from tests.test_cli import call

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")  # pexpect forks, and execs at once
END = 257
RUN = ["chat", "t", "--max-tokens", "40"]


@pytest.fixture(scope="module")
def toy() -> Backend:
    """The bigram model: a token is a byte."""
    return backends.load("toy", ModelSettings("toy"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished toy run `t` of two rounds."""
    folder = tmp_path_factory.mktemp("chat")
    run_small(folder / "t", small_recipe(write_data(folder)))
    (folder / "endless.py").write_text(
        "from spa_lite.backends.toy import ToyBackend\n\n\nclass Endless(ToyBackend):\n    context = 1_000_000\n"
    )
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to work in."""
    monkeypatch.chdir(home)
    return home


def talk(toy: Backend, seed: int = 0, max_tokens: int = 40) -> Conversation:
    return Conversation(toy, INIT, Sampling(1.0, 1.0, max_tokens), seed)


def whole(answer: Answering) -> Exchange:
    """An answer heard to its end."""
    return chat_screen.heard(answer, lambda piece: None)


def say(monkeypatch: pytest.MonkeyPatch, *messages: str | bytes) -> None:
    """Put messages on standard input, which then is no terminal."""
    raw = b"".join((m if isinstance(m, bytes) else m.encode()) + b"\n" for m in messages)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


# --- the conversation ------------------------------------------------------------------------------------------


def test_seed_and_questions_make_the_conversation(toy: Backend) -> None:
    def answers(seed: int) -> list[str]:
        one = talk(toy, seed)
        asked = [whole(one.ask("hello")), whole(one.ask("hello")), whole(one.again()), whole(one.again())]
        assert [exchange.attempt for exchange in asked] == [0, 0, 1, 2]
        assert one.exchanges == [asked[0], asked[3]], "another answer takes the place of the last"
        return [exchange.answer for exchange in asked]

    first = answers(0)
    assert first == answers(0)
    assert len(set(first)) == 4, "each turn and each attempt has a random stream of its own"
    assert not set(first) & set(answers(1))


def test_pieces_are_the_answer_and_go_into_the_next_prompt(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    one = talk(toy)
    one.instruct("Be brief.")
    pieces = list(one.ask("hello"))
    assert len(pieces) > 3
    assert "".join(pieces) == one.exchanges[0].answer
    seen: list[Any] = []
    encode = toy.tokenizer.encode_prompt

    def spy(turns: Any) -> Any:
        seen.append(list(turns))
        return encode(turns)

    monkeypatch.setattr(toy.tokenizer, "encode_prompt", spy)
    whole(one.ask("and now?"))
    assert [(turn.role, turn.content) for turn in seen[0]] == [
        ("system", "Be brief."),
        ("user", "hello"),
        ("assistant", "".join(pieces)),
        ("user", "and now?"),
    ]


def test_a_stopped_answer_is_kept_as_far_as_it_came(toy: Backend) -> None:
    one, said = talk(toy), list[str]()
    for piece in one.ask("hello", stop=lambda: len(said) >= 3):
        said.append(piece)
    assert one.exchanges == [Exchange("hello", "".join(said), "stopped")]
    assert len(said) == 3
    assert one.record()["ended"] == ["stopped"]
    whole(one.ask("more", stop=lambda: True))
    assert one.exchanges[-1].answer == ""
    assert len(one.record()["messages"]) == 2, "a question without an answer is no part of the conversation"


def test_how_answers_end(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each end has its remark; none where nothing is to be said."""
    one = talk(toy, max_tokens=3)
    assert whole(one.ask("hello")).ended == "cap"
    assert chat_screen.remarks(one.exchanges[0], one) == ["cut at --max-tokens 3"]
    monkeypatch.setattr(toy, "stream", lambda *_: iter([END]))
    assert (whole(one.again()).ended, one.exchanges[0].answer) == ("eos", "")
    assert "an empty answer" in chat_screen.remarks(one.exchanges[0], one)
    monkeypatch.setattr(toy, "stream", lambda *_: iter([97]))
    assert whole(one.again()).ended == "context"
    assert "context of 4096 tokens" in chat_screen.remarks(one.exchanges[0], one)[0]
    monkeypatch.setattr(toy, "stream", lambda *_: iter([97, END]))
    assert chat_screen.remarks(whole(one.again()), one) == []


def test_the_oldest_exchanges_make_room(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "context", 120)
    one = talk(toy, max_tokens=5000)  # more than there is: half of the context stays for the conversation
    monkeypatch.setattr(toy, "stream", lambda *_: iter([97, END]))
    left = [whole(one.ask("x" * 20)).left_out for _ in range(4)]
    assert left == [0, 0, 1, 2]
    assert "the 2 oldest exchanges did not fit" in chat_screen.remarks(one.exchanges[-1], one)[-1]
    assert len(one.exchanges) == 4, "they are saved all the same"
    before = one.exchanges
    with pytest.raises(DataError, match="room for 60: shorten it"):
        whole(one.ask("x" * 100))
    assert one.exchanges == before


def test_a_record_is_read_by_our_readers(toy: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = talk(toy, seed=7)
    whole(one.ask("hello"))
    monkeypatch.setattr(toy, "stream", lambda *_: iter([97, 0, END]))
    whole(one.ask("again"))
    (tmp_path / "x.jsonl").write_text(json.dumps(one.record()) + "\n")
    ((prompt,), report) = data.read_prompts(tmp_path / "x.jsonl")
    assert [turn.content for turn in prompt.messages] == ["hello", one.exchanges[0].answer, "again"]
    assert report.skipped == 0
    assert prompt.extra == {"ended": ["eos", "eos"], "stage": "init", "temp": 1.0, "top_p": 1.0, "seed": 7}
    assert next(reading.read(tmp_path / "x.jsonl")).messages == prompt.messages
    assert one.record()["messages"][-1]["content"] == "a\ufffd", "no reader takes NUL"


def test_a_system_turn_that_a_template_refuses_changes_nothing(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    one = talk(toy)
    one.instruct("first")

    def refuse(turns: Any) -> Any:
        raise DataError("no system turns here")

    monkeypatch.setattr(toy.tokenizer, "encode_prompt", refuse)
    with pytest.raises(DataError, match="no system turns"):
        one.instruct("second")
    assert one.system == "first"


def test_another_answer_needs_a_question_and_a_temperature(toy: Backend) -> None:
    with pytest.raises(DataError, match="ask something first"):
        talk(toy).again()
    one = Conversation(toy, INIT, Sampling(0.0, 1.0, 5))
    whole(one.ask("hello"))
    with pytest.raises(DataError, match="raise --temp"):
        one.again()


def test_the_third_ctrl_c_leaves_and_sigterm_at_once() -> None:
    told: list[str] = []
    with patient(lambda: told.append("told")) as caught:
        signal.raise_signal(signal.SIGINT)
        assert (len(caught), told) == (1, [])
        signal.raise_signal(signal.SIGINT)
        assert told == ["told"]
        caught.clear()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


# --- what is shown ---------------------------------------------------------------------------------------------

WILD = ["\x1b", "[31mred", "\x1b[", "2J", "[bo", "ld]x[/bold]", "\u202e", " \\"]
TAME = "\\u001b[31mred\\u001b[2J[bold]x[/bold]\\u202e \\"


def written(*pieces: str) -> Answering:
    """An answer of just these pieces."""
    yield from pieces
    return Exchange("?", "".join(pieces), "eos")


def test_an_escape_in_two_pieces_does_not_get_through(toy: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    chat_screen.show({"round [1]": (talk(toy), written(*WILD))})
    assert capfd.readouterr().out == TAME + "\n"


def test_nor_in_a_column(toy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(chat_screen, "Console", lambda **_: console)
    chat_screen.side_by_side({name: (talk(toy), written(*WILD)) for name in ("one", "[b]two")})
    last = screen.getvalue().splitlines()[-2:]
    assert [line.count(TAME) for line in last if TAME in line] == [2]
    assert "[b]two" in screen.getvalue()
    assert not re.search(r"\x1b\[(31m|2J)", screen.getvalue())


@pytest.mark.parametrize(("width", "columns"), [(200, True), (80, True), (75, False)])
def test_columns_where_there_is_room(toy: Backend, monkeypatch: pytest.MonkeyPatch, width: int, columns: bool) -> None:
    used: list[str] = []
    monkeypatch.setattr(render, "out", Console(file=io.StringIO(), force_terminal=True, width=width))
    monkeypatch.setattr(chat_screen, "side_by_side", lambda answers: used.append("columns"))
    monkeypatch.setattr(chat_screen, "in_turn", lambda answers: used.append("in turn"))
    chat_screen.show({name: (talk(toy), written("x")) for name in ("one", "two")})
    assert used == ["columns" if columns else "in turn"]


# --- through a pipe --------------------------------------------------------------------------------------------


def test_each_line_is_answered(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "hello", "", "hello", "//hello")
    code, out, err = call(capfd, *RUN)
    assert code == 0, err
    assert "t: round 2 on toy (toy, cpu)" in err
    assert len(out.splitlines()) == 3
    say(monkeypatch, "hello", "hello", "/hello")
    assert call(capfd, *RUN)[1].splitlines() == out.splitlines()[:2], "the same seed and the same lines"
    say(monkeypatch, "hello", b"caf\xe9", "/quit", "never")
    code, again, err = call(capfd, *RUN)
    assert (code, len(again.splitlines())) == (0, 2)
    assert "line 2 is not UTF-8" in err


@pytest.mark.parametrize(
    "option", [["--seed", "1"], ["--temp", "0"], ["--top-p", "0.01"], ["--max-tokens", "2"], ["--round", "init"]]
)
def test_options_matter(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    found = []
    for words in ([], option):
        say(monkeypatch, "hello", "hello", "hello")
        code, out, err = call(capfd, *RUN, *words)
        assert code == 0, err
        found.append(out)
    assert found[0] != found[1]


def test_commands(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "hello", "/regen", "/reset", "hello", "/system Be brief.", "/save talk.jsonl", "/help", "/quit")
    code, out, err = call(capfd, *RUN)
    assert code == 0, err
    first, another, after = out.splitlines()
    assert another != first
    assert after == first, "a new conversation begins at the first turn"
    assert "[system turn: Be brief.]" in err
    assert all(name in err for name in COMMANDS)
    assert "[saved: talk.jsonl, 1 conversation]" in err
    (kept,) = map(json.loads, (here / "talk.jsonl").read_text().splitlines())
    assert [turn["content"] for turn in kept["messages"]] == ["Be brief.", "hello", first]


def test_saving_never_harms(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each refusal is a sentence, and the chat goes on."""
    (tmp_path / "old.jsonl").write_text("mine\n")
    (tmp_path / "folder.jsonl").mkdir()
    names = ["", " x.txt", " none/x.jsonl", " old.jsonl", " a\0b.jsonl", " ~nobody-here/x.jsonl"]
    say(monkeypatch, "/save x.jsonl", "hello", *[f"/save{name}" for name in names], "/save! folder.jsonl", "hello")
    folder = here / "t"
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, "chat", str(folder))
    assert code == 1, "something was not done"
    assert len(out.splitlines()) == 2
    assert err.count("error:") == 1 + len(names) + 1
    for words in ("ask something first", "needs a file", "name a .jsonl file", "No such file", "/save! old.jsonl"):
        assert words in err
    assert (tmp_path / "old.jsonl").read_text() == "mine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.jsonl", "old.jsonl"]
    say(monkeypatch, "hello", "/save! old.jsonl")
    code, _, err = call(capfd, "chat", str(folder))
    assert code == 0
    assert "replacing what was there" in err
    assert "hello" in (tmp_path / "old.jsonl").read_text()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/rgen", "there is no command /rgen; did you mean /regen?"),
        ("/etc/passwd", "a message may begin with / if it is written //"),
        ("/regen", "ask something first"),
        ("/reset now", "/reset stands alone; 'now' was not read"),
        ("x" * 5000, "shorten it"),
    ],
)
def test_the_chat_goes_on(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, sentence: str
) -> None:
    say(monkeypatch, line, "hello")
    code, out, err = call(capfd, *RUN)
    assert (code, len(out.splitlines())) == (1, 1)
    assert sentence in err


def test_several_stages(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each continues its own conversation, from the same random numbers; /regen and /save are for all."""
    say(monkeypatch, "hello", "hello", "/regen", "/save all.jsonl")
    code, out, err = call(capfd, *RUN, "--compare", "init,1,last,2", "--json")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["stage"] for record in found] == ["init", "round 1", "round 2"] * 3
    alone = []
    for stage in ("init", "1", "2"):
        say(monkeypatch, "hello", "hello", "/regen")
        alone += [json.loads(line) for line in call(capfd, *RUN, "--round", stage, "--json")[1].splitlines()]
    assert sorted(found, key=lambda record: str(record["stage"])) == alone
    kept = [json.loads(line) for line in (here / "all.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in kept] == ["init", "round 1", "round 2"]
    for record, first, last in zip(kept, found[:3], found[-3:], strict=True):
        assert record["messages"][-1]["content"] == (last["answer"] or first["answer"]), "an empty one is left out"
    say(monkeypatch, "hello")
    _, out, _ = call(capfd, *RUN, "--compare", "init,1")
    assert out.startswith("init: ")
    assert "\nround 1: " in out


def test_if_one_cannot_answer_none_has(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the stages would go on at different turns."""
    from spa_lite.backends.toy import ToyBackend

    real, asked = ToyBackend.stream, list[str]()

    def failing(self: Any, prompt: Any, sampling: Any, key: bytes, role: str) -> Any:
        asked.append(role)
        if len(asked) == 2:
            raise DataError("not this time")
        return real(self, prompt, sampling, key, role)

    monkeypatch.setattr(ToyBackend, "stream", failing)
    say(monkeypatch, "hello", "/save x1.jsonl", "hello")
    code, out, err = call(capfd, *RUN, "--compare", "init,1", "--json")
    assert code == 1
    assert "not this time" in err
    assert "no answer yet to save" in err
    answers = [json.loads(line)["answer"] for line in out.splitlines()]
    assert answers[0] == answers[1], "the first turn, once more"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["t", "--round", "9"], "t has no stage '9'; it has init, seed, 1, 2"),
        (["t", "--compare", "init,best"], "t has no stage 'best'"),
        (["t", "--compare", " ,"], "--compare names no stage"),
        (["t", "--round", "1", "--compare", "init"], "keep one of them"),
        (["t", "--adapter-path", "t/adapter", "--round", "1"], "--round and --adapter-path both say who speaks"),
        (["--backend", "toy", "--model", "toy", "--round", "1"], "there is no run here"),
        (["nowhere"], "nowhere"),
    ],
)
def test_who_speaks_is_asked_in_one_sentence(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    say(monkeypatch, "hello")
    code, out, err = call(capfd, "chat", *words)
    assert code in {1, 2}
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


def test_the_system_turn_of_the_recipe_can_be_taken_away(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "hello", "/save s1.jsonl", "/system", "/save s2.jsonl")
    code, _, err = call(capfd, *RUN, "--system", "Be kind.")
    assert code == 0, err
    first, second = (json.loads((here / name).read_text())["messages"] for name in ("s1.jsonl", "s2.jsonl"))
    assert [turn["role"] for turn in first] == ["system", "user", "assistant"]
    assert second == first[1:]
    assert "[system turn: none]" in err


# --- through a terminal ----------------------------------------------------------------------------------------

ENDLESS = ["--backend", "endless:Endless", "--model", "toy", "--temp", "0", "--max-tokens", "500000"]
"""The most probable letter after each letter leads into a circle (`huhuhu`), and this backend has no end to it."""


@pytest.fixture
def terminal(home: Path) -> Iterator[Terminal]:
    """A chat with the toy run."""
    open_ = Terminal(home, "t", "--max-tokens", "40")
    yield open_
    open_.child.close(force=True)


def test_a_talk_in_a_terminal(terminal: Terminal, home: Path) -> None:
    assert "t: round 2 on toy (toy, cpu); /help lists the commands, Ctrl-D leaves" in terminal.greeting
    first = answer(terminal.says("hello"))
    assert answer(terminal.says("/regen")) != first
    assert "did you mean /save?" in terminal.says("/svae x")
    terminal.says("one\\\rtwo\x1b\rthree")  # a backslash, then Escape, before Enter
    terminal.says("\x1b[200~pasted\ntext\x1b[201~")
    assert "[saved: spoken.jsonl, 1 conversation]" in terminal.says("/save spoken.jsonl")
    terminal.child.send("half a mess\x03")
    assert "Ctrl-D or /quit leaves" in terminal.ready()
    terminal.child.send("\x04")
    assert terminal.ends() == 0
    ((prompt,), _) = data.read_prompts(home / "spoken.jsonl")
    asked = [turn.content for turn in prompt.messages if turn.role == "user"]
    assert asked == ["hello", "one\ntwo\nthree", "pasted\ntext"]


def test_ctrl_c_stops_the_answer_and_not_the_program(home: Path) -> None:
    terminal = Terminal(home, *ENDLESS)
    for _ in range(2):
        terminal.child.send("x\r")
        terminal.child.expect("init: .{,8}[a-z]{30}")  # it comes while it is written
        terminal.child.sendintr()
        assert "[stopped]" in terminal.ready()
    terminal.says("/save stopped.jsonl")
    terminal.child.send("/quit\r")
    assert terminal.ends() == 0
    (kept,) = map(json.loads, (home / "stopped.jsonl").read_text().splitlines())
    assert kept["ended"] == ["stopped", "stopped"]
    assert [30 <= len(turn["content"]) < 500_000 for turn in kept["messages"] if turn["role"] == "assistant"] == [
        True
    ] * 2


@pytest.mark.parametrize("busy", [True, False])
def test_sigterm_ends_it(home: Path, busy: bool) -> None:
    terminal = Terminal(home, *ENDLESS)
    if busy:
        terminal.child.send("x\r")
        terminal.child.expect("init: .{,8}[a-z]{30}")
    terminal.child.kill(signal.SIGTERM)
    assert terminal.ends() == 143


def test_a_terminal_that_knows_no_editor(home: Path) -> None:
    env = os.environ | {"TERM": "dumb"}
    command = ["-m", "spa_lite.cli", "chat", "t", "--max-tokens", "40"]
    child = pexpect.spawn(sys.executable, command, cwd=str(home), env=env, timeout=30, encoding="utf-8")
    child.expect("> ")
    child.send("hello\r")
    child.expect("round 2: .*> ")
    child.kill(signal.SIGTERM)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 143


@pytest.mark.parametrize(("width", "beside"), [(200, True), (60, False)])
def test_stages_side_by_side(home: Path, width: int, beside: bool) -> None:
    terminal = Terminal(home, "t", "--max-tokens", "20", "--compare", "init,2", width=width)
    shown = terminal.says("hello")
    assert bool(re.search(r"^init +round 2 *$", shown, re.MULTILINE)) == beside
    assert bool(re.search(r"^round 2: \w", shown, re.MULTILINE)) != beside
    terminal.child.send("\x04")
    assert terminal.ends() == 0


def test_the_built_in_model_speaks(tmp_path: Path) -> None:
    """With its seed adapter beside it, on one base, in a terminal."""
    if all(backends.missing(name) for name in ("torch", "mlx")):
        pytest.skip("the lesson model needs a framework")
    terminal = Terminal(tmp_path, "--compare", "init,seed adapter", "--max-tokens", "24", width=60, timeout=120)
    assert "init, seed adapter on the built-in model" in terminal.greeting
    shown = terminal.says("What is the capital of France?")
    for stage in ("init", "seed adapter"):
        assert re.search(r"\w+ \w+", answer(shown, stage))
    terminal.child.send("\x04")
    assert terminal.ends() == 0
