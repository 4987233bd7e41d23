"""MT-Bench: its files, the two turns, the judge's replies and the scores, on made-up questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spa_lite.backend import ModelSettings
from spa_lite.backends.toy import ToyBackend
from spa_lite.benches import mt_bench, mt_bench_files
from spa_lite.benches.mt_bench import Answered, Grade, answer_questions, grade, rating_of, summarise
from spa_lite.benches.mt_bench_files import Files, Question, Template, own_prompts, read, read_prompts, read_questions
from spa_lite.benches.shared import Reply
from spa_lite.errors import DataError
from spa_lite.opinion import Tick
from spa_lite.recipe import Recipe
from spa_lite.records import Message

RECIPE = Recipe()
CATEGORIES = ["writing", "math", "stem", "gardening"]


def write(path: Path, lines: Sequence[Any]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def question(number: int, category: str = "writing") -> Question:
    """A made-up question."""
    return Question(question_id=str(number), category=category, turns=(f"first {number}", f"second {number}"))


QUESTIONS = [question(i, category) for i, category in enumerate(CATEGORIES, 1)]


class Scripted:
    """A judge who replies what `say` makes of the last user turn, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, say: Callable[[str], str], key: str = "k") -> None:
        self.say, self.key = say, key
        self.asked: list[tuple[Message, ...]] = []

    def replies(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int, tick: Tick = lambda: None
    ) -> list[str]:
        """One reply each."""
        for conversation in conversations:
            self.asked.append(tuple(conversation))
            tick()
        return [self.say(conversation[-1].content) for conversation in conversations]

    def preferences(
        self, conversations: Sequence[Sequence[Message]], options: Sequence[str], tick: Tick = lambda: None
    ) -> list[tuple[float, ...] | None]:
        """Not needed here."""
        raise NotImplementedError


# --- reading a grade -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is good. Rating: [[8]]", 8.0),
        ("[[7.5]]", 7.5),
        ("Rating: [[ 8 ]].", 8.0),
        ("[[10]]", 10.0),
        ("[[8/10]]", None),
        ("**8**", None),
        ("as shown in [1]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("[[]]", None),
        ("[[nan]] [[inf]]", None),
        ("[[٥]]", None),
        ("A first thought: [[3]]. No: [[6]]", 6.0),
        ("A draft [[3]], in the end [[8/10]]", None),
        ("<think>perhaps [[3]]</think>Rating: [[8]]", 8.0),
        ("perhaps [[3]]</think>Rating: [[8]]", 8.0),
        ("<think>perhaps [[3]]</think>It is fine.", None),
        ("<think>perhaps [[3]] and then", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(reply: str, rating: float | None) -> None:
    """Drafts, citations, fractions and numbers out of range are no grade."""
    assert rating_of(reply) == rating


@given(st.text(alphabet="[]0123456789./ <think>x\n", max_size=60))
@example("[[" * 50)
@example("<think>" * 50)
def test_no_reply_breaks_the_reader(reply: str) -> None:
    """Any text gives a grade or none."""
    rating = rating_of(reply)
    assert rating is None or 1 <= rating <= 10
    assert rating_of(reply + "\n</think> [[4]]") == 4


# --- the files -------------------------------------------------------------------------------------------------

LINE = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}


def test_a_checksum_tells_the_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed byte makes it the user's own, and the score is named after that."""
    path = write(tmp_path / "question.jsonl", [LINE])
    assert read(path).files == Files(questions="custom", prompts="own", references="none")
    monkeypatch.setitem(mt_bench_files.OFFICIAL, "questions", hashlib.sha256(path.read_bytes()).hexdigest())
    found = read(path)
    assert found.files.questions == "official"
    assert mt_bench.name(found.files, "J") == "MT-Bench questions, own prompt, no references, judge J"
    path.write_text(path.read_text() + "\n")
    changed = read(path)
    assert (changed.questions, changed.files.questions) == (found.questions, "custom")
    assert mt_bench.name(changed.files, "J").startswith("custom questions")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"question_id": 82, "category": "writing", "turns": ["a"]}', "length 2"),
        ('{"question_id": 82, "category": "writing", "turns": ["a", " "]}', "empty"),
        ('{"question_id": 82, "category": "writing"}', "turns"),
        ('{"question_id": 81, "category": "writing", "turns": ["c", "d"]}', "question_id 81 was there before"),
        ('{"question_id": 82, "category": "wri', "cut off"),
        ("[1]", "not an object"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    """One sentence with file and line."""
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line)
    with pytest.raises(DataError, match=told) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}, line 2: ")


def judge_prompts() -> list[dict[str, Any]]:
    """A made-up file in FastChat's form, with a system turn, a doubled brace and a prompt for pairs."""
    pair = {"name": "pair-v2", "prompt_template": "{answer_a}", "output_format": "[[A]]"}
    turn1 = "Q {question} R {ref_answer_1} A {answer}"
    turn2 = "Q {question_1} {question_2} R {ref_answer_2} A {answer_1} {answer_2}"
    rest: dict[str, Any] = {"type": "single", "system_prompt": "Judge.", "output_format": "[[rating]]"}
    templates = {
        "single-v1": "{{x}} Q {question} A {answer}",
        "single-math-v1": turn1,
        "single-v1-multi-turn": turn2.replace("R {ref_answer_2} ", ""),
        "single-math-v1-multi-turn": turn2,
    }
    return [pair, *({"name": name, "prompt_template": text} | rest for name, text in templates.items())]


def test_judge_prompts_in_fastchats_form(tmp_path: Path) -> None:
    """The four for single answers are read; a template is filled in one pass."""
    prompts = read_prompts(write(tmp_path / "judge_prompts.jsonl", judge_prompts()))
    assert list(prompts) == [(1, False), (1, True), (2, False), (2, True)]
    texts = {"question": "what {answer}?", "answer": "{{answer}} {question}"}
    system, user = prompts[1, False].messages(texts)
    assert (system.role, system.content) == ("system", "Judge.")
    assert user.content == "{x} Q what {answer}? A {{answer}} {question}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt_template": "Q {question}"}, "line 3: the prompt single-math-v1 has no place for {answer}"),
        ({"prompt_template": "{question} {answer} {ref_answer_1} {mood}"}, "unknown place {mood}"),
        ({"output_format": "[[A]]"}, "only"),
        ({"name": "other"}, "there is no prompt named single-math-v1"),
    ],
)
def test_incomplete_judge_prompts_are_refused(tmp_path: Path, change: dict[str, str], told: str) -> None:
    """A prompt that shows not what it grades would give numbers all the same."""
    lines = judge_prompts()
    lines[2] |= change
    with pytest.raises(DataError) as error:
        read_prompts(write(tmp_path / "judge_prompts.jsonl", lines))
    assert told in str(error.value)


def test_own_prompts_show_all_there_is() -> None:
    """Ours have the places that are asked of others, and no unknown one."""
    for way, template in own_prompts().items():
        places = set(mt_bench_files.PLACE.findall(template.prompt_template))
        assert mt_bench_files.NEEDED[way] <= places <= mt_bench_files.PLACES


def test_reference_answers_in_fastchats_form(tmp_path: Path) -> None:
    """Numbers are texts, too."""
    lines = [{"question_id": 112, "model_id": "x", "choices": [{"index": 0, "turns": [12000, "half"]}]}]
    path = write(tmp_path / "gpt-4.jsonl", lines)
    assert mt_bench_files.read_references(path) == {"112": ("12000", "half")}
    with pytest.raises(DataError, match="line 1"):
        mt_bench_files.read_references(write(path, [{"question_id": 112, "choices": []}]))


# --- answers ---------------------------------------------------------------------------------------------------


class Counting:
    """A backend that counts the prompts it is asked to answer, and stops after some."""

    def __init__(self, stop_after: int = 10**9, context: int = 4096) -> None:
        self._inner = ToyBackend(ModelSettings("toy"))
        self.context, self.left, self.answered = context, stop_after, 0
        self.prompts: list[tuple[int, ...]] = []
        self.temperatures: set[float] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sample(self, prompts: Sequence[tuple[int, ...]], n: int, sampling: Any, *rest: Any) -> Any:
        """As the toy does. A batch is as wide as its longest prompt and its longest answer."""
        sizes = [len(prompt) for prompt in prompts]
        assert not sizes or max(sizes) + min(sampling.max_tokens, self.context - min(sizes)) <= self.context
        self.prompts += prompts
        self.temperatures.add(sampling.temperature)
        for found in self._inner.sample(prompts, n, sampling, *rest):
            if self.answered == self.left:
                raise KeyboardInterrupt
            self.answered += 1
            yield found


def answers(backend: Any, questions: Sequence[Question] = QUESTIONS, **more: Any) -> list[Answered]:
    """Short answers of a toy."""
    settings: dict[str, Any] = {"model": "m", "max_tokens": 6} | more
    return answer_questions(backend, questions, RECIPE, **settings)


def test_the_second_turn_follows_the_models_own_first_answer() -> None:
    """At the category's temperature; an answer depends on its question alone."""
    backend = Counting()
    found = answers(backend)
    assert [a.question for a in found] == QUESTIONS
    assert backend.temperatures == {0.0, 0.1, 0.7}
    conversation = (
        Message(role="user", content="first 2"),
        Message(role="assistant", content=found[1].replies[0].text.strip()),
        Message(role="user", content="second 2"),
    )
    assert tuple(backend.tokenizer.encode_prompt(conversation)) in backend.prompts
    assert answers(Counting(), QUESTIONS[::-1]) == found[::-1]
    assert answers(Counting(), QUESTIONS[2:3]) == found[2:3]


def test_interrupted_answers_go_on(tmp_path: Path) -> None:
    """Nothing is generated twice, and another model or length takes nothing of it."""
    whole, cache = answers(Counting()), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answers(Counting(stop_after=5), cache=cache)
    rest, again, other = Counting(), Counting(), Counting()
    assert answers(rest, cache=cache) == whole
    assert answers(again, cache=cache) == whole
    answers(other, cache=cache, model="n")
    assert (rest.answered, again.answered, other.answered) == (3, 0, 8)


def test_what_does_not_fit_is_skipped_and_counted() -> None:
    """The first turn alone fits, barely, or not even that; nothing else is graded, and every turn ticks."""
    long = Question(question_id="9", category="stem", turns=("x" * 80, "y"))
    second = Question(question_id="8", category="stem", turns=("x", "y" * 80))
    barely = Question(question_id="7", category="stem", turns=("x" * 55, "y"))
    ticks: list[int] = []
    found = answers(Counting(context=60), [*QUESTIONS, second, barely, long], tick=lambda: ticks.append(1))
    assert [len(a.replies) for a in found] == [2, 2, 2, 2, 1, 1, 0]
    assert len(ticks) == 14
    summary = summarise(grade(found, Scripted(lambda _: "[[5]]"), own_prompts()), seed=0)
    assert (summary["questions"], summary["graded"], summary["skipped"]) == (7, 10, 4)
    assert summary["turn_1"]["n"] == 6


# --- grades ----------------------------------------------------------------------------------------------------


def answered(number: int, category: str = "writing") -> Answered:
    """Two made-up answers."""
    replies = (Reply(text=f"one {number}", cut=True), Reply(text=f"two {number}"))
    return Answered(question=question(number, category), replies=replies)


def test_what_the_judge_is_shown() -> None:
    """The first turn alone; then both; with reference answers where the category wants them and there are some."""
    templates = {
        way: Template(prompt_template=f"{way[0]}{way[1]}" + "".join(f"|{{{place}}}" for place in sorted(places)))
        for way, places in mt_bench_files.NEEDED.items()
    }
    judge = Scripted(lambda _: "[[5]]")
    references = {"1": ("ref one", "ref two"), "2": ("ref one", ""), "3": ("never", "shown")}
    piles = [answered(1, "math"), answered(2, "math"), answered(3, "stem"), answered(4, "math")]
    grades = grade(piles, judge, templates, references)
    assert [asked[-1].content for asked in judge.asked] == [
        "1True|one 1|first 1|ref one",
        "2True|two 1|second 1|ref two",
        "1True|one 2|first 2|ref one",
        "2False|two 2|second 2",
        "1False|one 3|first 3",
        "2False|two 3|second 3",
        "1False|one 4|first 4",
        "2False|two 4|second 4",
    ]
    assert [g.reference for g in grades] == [True, True, True, False, None, None, False, False]
    assert summarise(grades, 0)["without_reference"] == 3


def test_a_reply_without_a_grade_is_asked_for_once_more() -> None:
    """With other words, because temperature 0 would give the same reply; what stays unread is counted."""

    def say(text: str) -> str:
        if "one 1" in text:
            return "Rating: [[7]]" if text.endswith(mt_bench.REMINDER) else "Rating: 7"
        return "" if "one 2" in text else "no idea"

    judge, ticks = Scripted(say), []
    grades = grade([answered(1), answered(2)], judge, own_prompts(), tick=lambda: ticks.append(1))
    # Turn 2 shows the first answer, too, so that the script treats it as it treats turn 1.
    assert [(g.fate, g.rating, g.retried) for g in grades] == [
        ("graded", 7.0, True),
        ("graded", 7.0, True),
        ("no reply", None, False),
        ("no reply", None, False),
    ]
    assert (len(judge.asked), len(ticks)) == (6, 4)
    (unread,) = [g for g in grade([answered(3)], judge, own_prompts()) if g.turn == 2]
    assert (unread.fate, unread.reply, unread.retried) == ("unread", "no idea", True)
    summary = summarise(grades, 0)
    assert (summary["graded"], summary["no_reply"], summary["unread"], summary["retried"]) == (2, 2, 0, 2)
    assert summary["cut"] == 2


def test_grades_are_kept(tmp_path: Path) -> None:
    """A second call asks nobody; another judge, prompt or answer is asked."""
    cache = tmp_path / "grades.jsonl"
    judge = Scripted(lambda _: "[[5]]")
    first = grade([answered(1)], judge, own_prompts(), cache=cache)
    assert grade([answered(1)], judge, own_prompts(), cache=cache) == first
    assert len(judge.asked) == 2
    grade([answered(1), answered(2)], judge, own_prompts(), cache=cache)
    assert len(judge.asked) == 4
    other = Scripted(lambda _: "[[6]]", key="other")
    assert {g.rating for g in grade([answered(1)], other, own_prompts(), cache=cache)} == {6.0}


def test_an_interrupted_judge_goes_on(tmp_path: Path) -> None:
    """What was replied before the interruption is not asked again."""
    piles, cache = [answered(i) for i in range(20)], tmp_path / "grades.jsonl"

    def fails(text: str) -> str:
        if "two 17" in text:
            raise KeyboardInterrupt
        return "[[5]]"

    with pytest.raises(KeyboardInterrupt):
        grade(piles, Scripted(fails), own_prompts(), cache=cache)
    judge = Scripted(lambda _: "[[5]]")
    assert len(grade(piles, judge, own_prompts(), cache=cache)) == 40
    assert len(judge.asked) == 40 - 32


# --- scores ----------------------------------------------------------------------------------------------------


def rated(number: int, turn: Any, rating: float | None, category: str = "math") -> Grade:
    """A grade."""
    fate: Any = "unread" if rating is None else "graded"
    return Grade(question_id=str(number), category=category, turn=turn, judge="J", fate=fate, rating=rating)


def test_scores_by_hand() -> None:
    """Turn 1 (8 + 6 + 4) / 3, turn 2 (7 + 1) / 2, both 26 / 5; a missing grade is no zero."""
    pile = [
        rated(1, 1, 8),
        rated(1, 2, 7),
        rated(2, 1, 6),
        rated(2, 2, None),
        rated(3, 1, 4, "stem"),
        rated(3, 2, 1, "stem"),
    ]
    summary = summarise(pile, seed=3, files=Files(questions="official", prompts="official", references="official"))
    assert [summary[part]["value"] for part in ("turn_1", "turn_2", "average")] == [6.0, 4.0, pytest.approx(5.2)]
    assert [summary[part]["n"] for part in ("turn_1", "turn_2", "average")] == [3, 2, 3]
    assert summary["categories"]["math"]["value"] == 7.0
    assert list(summary["categories"]) == ["math", "stem"]
    assert summary["name"] == "MT-Bench questions, official prompts, judge J"
    assert summary == summarise(pile, 3, Files(questions="official", prompts="official", references="official"))
    json.dumps(summary)


def test_the_interval_is_over_questions() -> None:
    """Twenty questions whose two grades agree: as wide as twenty grades, wider than forty."""
    twice = [rated(i, turn, 1 + i % 10) for i in range(20) for turn in (1, 2)]
    once = summarise([g for g in twice if g.turn == 1], 0)["average"]
    both = summarise(twice, 0)["average"]
    assert both["high"] - both["low"] == pytest.approx(once["high"] - once["low"])
    assert both["n"] == 20


def test_nothing_graded_is_no_score() -> None:
    """Not a zero."""
    summary = summarise([rated(1, 1, None), rated(1, 2, None)], 0)
    assert (summary["average"], summary["unread"]) == (None, 2)
