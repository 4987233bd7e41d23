"""The check that alignment has not cost knowledge: readers, numbers, choices, the comparison, in the lesson's world."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spa_lite.backend import ModelSettings
from spa_lite.backends.toy import ToyBackend
from spa_lite.benches.knowledge import (
    INSTRUCTION,
    RULES,
    Choices,
    Outcome,
    Problem,
    Scored,
    choose,
    compare,
    last_number,
    outcomes,
    read_choices,
    read_problems,
    solve,
    summarise,
)
from spa_lite.errors import DataError
from spa_lite.lesson import world
from spa_lite.records import Completion, Message, Row


def write(path: Path, lines: Sequence[Any]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lesson_problems(count: int) -> list[dict[str, Any]]:
    """Sums of the lesson's world in GSM8K's form."""
    tasks = [task for task in world.tasks("heldout", 40 * count) if task.family == "sum"][:count]
    return [
        {"question": t.text, "answer": f"{' + '.join(t.facts['given'])}.\n#### {t.facts['accept'][0]}"} for t in tasks
    ]


def lesson_choices(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Capitals of the lesson's world with three wrong ones each."""
    rng, lines = random.Random(seed), []
    for task in [task for task in world.tasks("heldout", 40 * count) if task.family == "capital"][:count]:
        right = task.facts["accept"][0]
        choices = [right, *rng.sample([c for c in world.CAPITALS.values() if c != right], 3)]
        rng.shuffle(choices)
        lines.append({"question": task.text, "choices": choices, "answer": "ABCD"[choices.index(right)]})
    return lines


class Told(ToyBackend):
    """A toy that says what it is told to: `replies` by a part of the prompt's text, or the sum of its two numbers."""

    def __init__(self, replies: Mapping[str, str], context: int = 4096) -> None:
        super().__init__(ModelSettings("toy"))
        self.told, self.context, self.asked = replies, context, 0

    def sample(self, prompts: Sequence[tuple[int, ...]], n: int, sampling: Any, *rest: Any) -> Any:
        """One reply each, nothing drawn."""
        assert sampling.temperature == 0
        for index, ids in enumerate(prompts):
            text = self.tokenizer.decode(ids)
            self.asked += 1
            (reply,) = [reply for part, reply in self.told.items() if part in text]
            yield index, (Completion(ids=(1,), text=reply, ended="cap" if reply == "" else "eos"),)


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So she has 18.", "18"),
        ("it costs $1,250.00 in all", "1250"),
        ("from 3 to 1,2345", "2345"),
        ("3, 4, 5", "5"),
        ("10-4", "4"),
        ("(10)-4", "4"),
        ("= -4", "-4"),
        ("minus: −4 degrees", "-4"),
        ("- 7 apples", "7"),
        ("a loss of -$5", "-5"),
        ("half, that is .5", "0.5"),
        ("**72**", "72"),
        (r"\boxed{36}%", "36"),
        ("1" + "0" * 60 + "7", "1" + "0" * 60 + "7"),
        ("-1" + "0" * 60 + "7", "-1" + "0" * 60 + "7"),
        ("none at all", None),
        ("٣", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    """Commas, signs, currencies and full stops, compared exactly."""
    assert last_number(text) == (None if number is None else Decimal(number))


@given(st.text(alphabet="0123456789,.-$− x\n", max_size=40))
@example("1," * 500)
@example("." * 500)
def test_no_text_breaks_the_reader(text: str) -> None:
    """A number or none; what is said last counts."""
    last_number(text)
    assert last_number(text + "\n#### 42") == 42


# --- word problems ---------------------------------------------------------------------------------------------


def test_word_problems_by_hand(tmp_path: Path) -> None:
    """Two right, one wrong, one without a number, one only drafted in a reasoning block."""
    names = ("apples", "bees", "cups", "dogs", "eggs")
    lines = [{"question": f"How many {name}?", "answer": "Some.\n#### 1,200"} for name in names]
    problems = read_problems(write(tmp_path / "test.jsonl", lines))
    replies = ["That makes 1200.", "$1,200.00", "1200 - 1 = 1199", "", "<think>1200</think> I do not know."]
    backend = Told(dict(zip(names, replies, strict=True)))
    found = solve(backend, problems, model="m")
    assert [o.right for o in found] == [True, True, False, False, False]
    summary = summarise(found)
    assert (summary["right"], summary["asked"], summary["unread"], summary["cut"]) == (2, 5, 2, 1)
    # Wilson, 2 of 5.
    assert [round(summary["accuracy"][part], 3) for part in ("value", "low", "high")] == [0.4, 0.118, 0.769]


def test_solutions_are_kept(tmp_path: Path) -> None:
    """A second call generates nothing; another model does."""
    problems = read_problems(write(tmp_path / "test.jsonl", lesson_problems(3)))
    assert len({p.number for p in problems}) > 1
    # The toy answers a sum it was told.
    backend = Told({problem.question: f"{problem.number}" for problem in problems})
    cache = tmp_path / "replies.jsonl"
    first = solve(backend, problems, model="m", cache=cache)
    assert [o.right for o in first] == [True] * 3
    assert solve(backend, problems, model="m", cache=cache) == first
    assert backend.asked == 3
    solve(backend, problems[:1], model="n", cache=cache)
    assert backend.asked == 4


def test_problems_that_do_not_fit_are_skipped_and_counted() -> None:
    """Not counted as wrong; every problem ticks."""
    short = Problem(id="s", question="1?", number=Decimal(1))
    long = Problem(id="l", question="x" * 200, number=Decimal(1))
    ticks: list[int] = []
    backend = Told({"1?": "1"}, context=len(INSTRUCTION) + 50)
    found = solve(backend, [long, short], model="m", tick=lambda: ticks.append(1))
    assert [o.right for o in found] == [None, True]
    assert (summarise(found)["asked"], summarise(found)["skipped"]) == (1, 1)
    assert summarise(found[:1])["accuracy"] is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"question": "How many?", "answer": "42"}, "####"),
        ({"question": "How many?", "answer": "#### many"}, "####"),
        ({"question": "How many?"}, "`answer` is no text"),
        ({"question": 3, "answer": "#### 3"}, "`question` is no text"),
    ],
)
def test_bad_problems_are_refused(tmp_path: Path, line: Any, told: str) -> None:
    """With file and line."""
    path = write(tmp_path / "test.jsonl", [{"question": "Q", "answer": "#### 1"}, line])
    with pytest.raises(DataError, match=told) as error:
        read_problems(path)
    assert str(error.value).startswith(f"{path}, line 2: ")


# --- multiple choice -------------------------------------------------------------------------------------------

THREE = ["red", "blue", "green"]


@pytest.mark.parametrize(
    "line",
    [
        {"question": "Sky?", "choices": THREE, "answer": 1},
        {"question": "Sky?", "choices": THREE, "answer": "B"},
        {"question": "Sky?", "choices": {"text": THREE, "label": ["A", "B", "C"]}, "answerKey": "B", "id": "x"},
        {"question": "Sky?", "choices": {"text": THREE, "label": ["1", "2", "3"]}, "answerKey": "2"},
        {
            "question": {
                "stem": "Sky?",
                "choices": [{"text": t, "label": x} for t, x in zip(THREE, "ABC", strict=True)],
            },
            "answerKey": "B",
        },
    ],
)
def test_shapes_of_multiple_choice(tmp_path: Path, line: Any) -> None:
    """A plain one, MMLU's, ARC's two."""
    (found,) = read_choices(write(tmp_path / "choices.jsonl", [line]))
    assert (found.question, found.choices, found.answer) == ("Sky?", tuple(THREE), 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": 3}, "a number from 0 to 2 or one of A, B, C"),
        ({"answer": -1}, "from 0 to 2"),
        ({"answer": True}, "from 0 to 2"),
        ({"answer": "1"}, "from 0 to 2"),
        ({"answer": None}, "from 0 to 2"),
        ({"choices": ["red"]}, "2 to 26"),
        ({"choices": ["red", " "]}, "2 to 26"),
        ({"choices": ["red", "red"]}, "the same"),
        ({"choices": "red"}, "Expected `array`"),
        ({"choices": {"text": THREE, "label": ["A"]}}, "2 to 26"),
        ({"choices": None}, "`choices` is missing"),
        ({"question": ""}, "`question` is no text"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, change: Any, told: str) -> None:
    """With file, line and the mend; an index written as text is not guessed."""
    line = {"question": "Sky?", "choices": THREE, "answer": 1} | change
    path = write(tmp_path / "choices.jsonl", [line])
    with pytest.raises(DataError) as error:
        read_choices(path)
    assert str(error.value).startswith(f"{path}, line 1: ")
    assert told in str(error.value)


def test_the_three_rules_by_hand() -> None:
    """Sums -4, -6, -9 of 2, 6, 9 characters and 1, 3, 3 tokens; a tie picks nothing."""
    question = Choices(id="q", question="?", choices=("ab", "abcdef", "abcdefghi"), answer=1)
    scored = Scored(choices=question, logp=(-4.0, -6.0, -9.0), tokens=(1, 3, 3))
    assert scored.picked("sum") == 0
    assert scored.picked("per_token") == 1
    assert scored.picked("per_character") is None
    assert [outcomes([scored], by)[0].right for by in RULES] == [False, False, True]


def test_choices_are_scored_as_the_model_would_say_them(tmp_path: Path) -> None:
    """Each sum is that of the choice's own bytes after the question, without an end of turn."""
    questions = read_choices(write(tmp_path / "choices.jsonl", lesson_choices(4)))
    backend = ToyBackend(ModelSettings("toy"))
    for scored in choose(backend, questions):
        prompt = backend.tokenizer.encode_prompt((Message(role="user", content=scored.choices.question),))
        for text, logp, tokens in zip(scored.choices.choices, scored.logp, scored.tokens, strict=True):
            ((_, (alone,)),) = backend.logprob([Row(prompt=prompt, responses=(tuple(text.encode()),))], "policy")
            assert logp == pytest.approx(alone.logp)
            assert tokens == len(text)
    assert choose(backend, questions[::-1]) == choose(backend, questions)[::-1]


def test_choices_that_do_not_fit_are_skipped_and_counted() -> None:
    """One long choice is enough."""
    backend = ToyBackend(ModelSettings("toy"))
    backend.context = 20
    fits = Choices(id="a", question="?", choices=("x", "y"), answer=0)
    long = Choices(id="b", question="?", choices=("x", "y" * 20), answer=0)
    ticks: list[int] = []
    found = choose(backend, [long, fits], tick=lambda: ticks.append(1))
    assert (found[0].logp, len(found[1].logp), len(ticks)) == ((), 2, 2)
    assert summarise(outcomes(found, "sum"))["skipped"] == 1
    assert choose(backend, [long])[0].logp == ()


def test_a_choice_without_a_token_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probability of 0 would win: the question is skipped."""
    backend = ToyBackend(ModelSettings("toy"))
    monkeypatch.setattr(backend.tokenizer, "encode_answer", lambda _, text: () if text == "x" else (1, 2, 257))
    assert choose(backend, [Choices(id="a", question="?", choices=("x", "y"), answer=0)])[0].logp == ()


# --- before and after ------------------------------------------------------------------------------------------


def outcome(name: str, right: bool | None) -> Outcome:
    """An outcome."""
    return Outcome(id=name, right=right)


def test_the_comparison_by_hand() -> None:
    """Joined by question: of 12, 1 gained and 7 lost; exact McNemar over 8 changes: 2 * (1 + 8) / 256."""
    before = [outcome(str(i), i < 9) for i in range(12)]
    after = [outcome(str(i), i in {7, 8, 9}) for i in range(12)]
    found = compare([*before, outcome("old", True)], [outcome("new", True), *after[::-1]], seed=0)
    assert (found["questions"], found["left_out"], found["gained"], found["lost"]) == (12, 2, 1, 7)
    assert found["p"] == pytest.approx(2 * (comb(8, 0) + comb(8, 1)) / 2**8)
    assert (found["before"], found["after"]) == (0.75, 0.25)
    assert found["difference"]["value"] == pytest.approx(-0.5)
    assert found["difference"]["high"] < 0
    same = compare(before, before, seed=0)
    assert (same["p"], same["difference"]["value"]) == (1.0, 0.0)
    json.dumps(found)


def test_nothing_in_common_is_refused() -> None:
    """A skipped question is none that was answered."""
    with pytest.raises(DataError, match="both models were asked"):
        compare([outcome("1", True)], [outcome("1", None)], seed=0)


def test_repeated_questions_stay_apart(tmp_path: Path) -> None:
    """Two lines with the same question are two questions."""
    found = read_problems(write(tmp_path / "test.jsonl", [{"question": "Q", "answer": "#### 1"}] * 2))
    assert len({problem.id for problem in found}) == 2
