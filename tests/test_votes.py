"""Votes on two stages' answers: kept as they are cast, readable as labelled pairs, and what they come to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spa_lite import files
from spa_lite.data import read_pairs
from spa_lite.errors import DataError, RunError
from spa_lite.records import Completion, Message, Sample
from spa_lite.votes import Match, Question, Tally, Votes, beside, file_name, questions_of
from tests.small import lines

MATCH = Match(("init", "round 1"), "policies", seed=0)


def samples(name: str, count: int, text: str = "") -> list[Sample]:
    """One answer to each of some prompts."""
    return [
        Sample(
            id=f"p{i}",
            messages=(Message(role="user", content=f"say {i}"),),
            prompt_ids=(),
            completions=(Completion(ids=(1, 2), text=text or f"{name} says {i}", ended="eos"),),
            extra={"hard": i},
        )
        for i in range(count)
    ]


def asked(count: int = 6, match: Match = MATCH) -> list[Question]:
    """Questions whose answers name their stage."""
    return questions_of(match, samples("init", count), samples("round 1", count))


def letter(question: Question, stage: str) -> str:
    """Under which letter the answer of a stage is shown."""
    return next(name for name, answer in zip("ab", question.answers, strict=True) if answer.text.startswith(stage))


def cast(votes: Votes, question: Question, stage: str) -> None:
    """Vote for the answer of a stage."""
    votes.cast(question, "a" if letter(question, stage) == "a" else "b")


# --- the order -------------------------------------------------------------------------------------------------


def test_the_order_is_chance_fixed_by_the_seed() -> None:
    """About half of the first answers are those of init; a part of the prompts has the order it has in the whole."""
    whole = [letter(question, "init") for question in asked(1000)]
    assert 440 < whole.count("a") < 560
    assert [letter(question, "init") for question in asked(100)] == whole[:100]
    other = [letter(question, "init") for question in asked(1000, replace(MATCH, seed=1))]
    assert 400 < sum(x != y for x, y in zip(whole, other, strict=True)) < 600


# --- the files -------------------------------------------------------------------------------------------------


def test_votes_for_an_answer_are_labelled_pairs(tmp_path: Path) -> None:
    """The reader of pairs takes the file as it is; either and neither lie beside it."""
    file, questions = tmp_path / "votes.jsonl", asked()
    votes = Votes(file, MATCH)
    cast(votes, questions[0], "init")
    votes.cast(questions[1], "either")
    cast(votes, questions[2], "round 1")
    votes.cast(questions[3], "neither")
    pairs, report = read_pairs(file)
    assert (report.kept, report.skipped, votes.trainable) == (2, 0, 2)
    assert [(p.chosen, p.rejected) for p in pairs] == [
        ("init says 0", "round 1 says 0"),
        ("round 1 says 2", "init says 2"),
    ]
    assert pairs[0].messages[0].content == "say 0"
    assert pairs[0].extra["hard"] == 0, "what else the prompt's record had stays with it"
    others = lines(beside(file))
    assert [line["vote"]["said"] for line in others] == ["either", "neither"]
    assert {others[0]["a"], others[0]["b"]} == {"init says 1", "round 1 says 1"}
    assert [vote.vote.number for vote in votes.votes] == [1, 2, 3, 4]
    ballot = lines(file)[0]["vote"]
    assert ballot["stages"] == ["init", "round 1"]
    assert ballot["shown"]["ab".index(ballot["said"])] == "init"
    assert (ballot["seed"], ballot["prompt"], ballot["answers"]) == (0, "p0", questions[0].key)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """In a later session either; the same answers under another seed are the same question."""
    file = tmp_path / "votes.jsonl"
    first = Votes(file, MATCH)
    cast(first, asked()[0], "init")
    first.cast(asked()[1], "neither")
    again = Votes(file, replace(MATCH, seed=3))
    assert [again.asks(question) for question in asked(4, again.match)] == [False, False, True, True]
    assert not again.asks(questions_of(MATCH, samples("", 1, "same"), samples("", 1, "same"))[0])
    assert again.asks(questions_of(MATCH, samples("new", 1), samples("round 1", 1))[0]), (
        "other answers are a new question"
    )


def test_a_vote_is_on_the_disk_before_the_next_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = files.write

    def write(path: Path, content: bytes, at: int = 0, durable: bool = True) -> None:
        synced.append(durable)
        real(path, content, at, durable)

    monkeypatch.setattr(files, "write", write)
    votes = Votes(tmp_path / "votes.jsonl", MATCH)
    for question in asked(3):
        votes.cast(question, "a")
    assert synced == [True, True, True]
    assert len(lines(tmp_path / "votes.jsonl")) == 3


def test_the_last_vote_is_taken_back(tmp_path: Path) -> None:
    """Of either file, of an earlier session, too, until there is none."""
    file, questions = tmp_path / "votes.jsonl", asked()
    votes = Votes(file, MATCH)
    cast(votes, questions[0], "init")
    kept = file.read_bytes()
    cast(votes, questions[1], "init")
    votes.cast(questions[2], "either")
    assert (taken := votes.take_back())
    assert taken.vote.said == "either"
    assert beside(file).read_bytes() == b""
    later = Votes(file, MATCH)
    assert later.take_back()
    assert file.read_bytes() == kept
    assert later.asks(questions[1])
    cast(later, questions[1], "round 1")
    assert later.tally(questions).wins == 1
    assert later.take_back()
    assert later.take_back()
    assert later.take_back() is None
    assert file.read_bytes() == b""


@pytest.mark.parametrize("left", [1, 5, 30, -20, -2])
def test_a_line_cut_short_is_mended(tmp_path: Path, left: int) -> None:
    """Wherever the program was killed within a write; the vote is asked for again, the others stay."""
    file, questions = tmp_path / "votes.jsonl", asked()
    votes = Votes(file, MATCH)
    cast(votes, questions[0], "init")
    kept = file.read_bytes()
    cast(votes, questions[1], "init")
    last = file.read_bytes()[len(kept) :]
    file.write_bytes(kept + last[:left])
    again = Votes(file, MATCH)
    assert again.mended == [file]
    assert file.read_bytes() == kept
    assert [again.asks(question) for question in questions[:2]] == [False, True]
    cast(again, questions[1], "init")
    assert file.read_bytes() == kept + last


def test_a_whole_last_line_without_its_end_counts(tmp_path: Path) -> None:
    """An editor may have taken the end of the line; the next vote begins a line of its own."""
    file, questions = tmp_path / "votes.jsonl", asked()
    cast(Votes(file, MATCH), questions[0], "init")
    file.write_bytes(b"\n" + file.read_bytes().rstrip(b"\n"))
    votes = Votes(file, MATCH)
    assert votes.mended == []
    cast(votes, questions[1], "init")
    assert read_pairs(file)[1].kept == 2


PAIR = '{"prompt": "p", "chosen": "c", "rejected": "r"}'


@pytest.mark.parametrize("content", [PAIR + "\n", PAIR, "hello", '{"messages":[{"role":"user"}]}', "\0\0\n"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=r"mine.jsonl, line 1: this is no vote .* name another file with --votes"):
        Votes(file, MATCH)
    assert file.read_text() == content


def test_votes_on_other_stages_are_refused(tmp_path: Path) -> None:
    """By their names, by their adapters, by the form of the line."""
    file = tmp_path / "votes.jsonl"
    cast(Votes(file, MATCH), asked()[0], "init")
    with pytest.raises(DataError, match=r"line 1: a vote on init and round 1, not on init and round 2"):
        Votes(file, replace(MATCH, stages=("init", "round 2")))
    with pytest.raises(DataError, match="other policies that are called init and round 1, too"):
        Votes(file, replace(MATCH, policies="trained again"))
    line = json.loads(file.read_text())
    file.write_text(json.dumps(line | {"vote": line["vote"] | {"format": 9}}) + "\n")
    with pytest.raises(DataError, match="a vote in form 9"):
        Votes(file, MATCH)


def test_a_name_that_will_not_do_is_refused_before_anybody_votes(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, why in (
        ("votes.txt", "must end with .jsonl"),
        ("no/votes.jsonl", "there is no folder"),
        ("folder.jsonl", "it is a folder"),
    ):
        with pytest.raises(RunError, match=why):
            Votes(tmp_path / name, MATCH)
    assert file_name(("init", "round 3")) == "votes-init-round-3.jsonl"


def test_no_pair_is_made_of_an_empty_answer(tmp_path: Path) -> None:
    """The vote counts all the same."""
    file = tmp_path / "votes.jsonl"
    votes = Votes(file, MATCH)
    questions = questions_of(MATCH, samples("", 1, " "), samples("round 1", 1))
    cast(votes, questions[0], "round 1")
    assert not file.exists()
    assert lines(beside(file))[0]["vote"]["said"] in "ab"
    assert (votes.tally(questions).wins, votes.trainable) == (1, 0)


# --- what they come to -----------------------------------------------------------------------------------------


def test_the_tally_is_counted_by_hand(tmp_path: Path) -> None:
    """8 of 12 decided votes: Wilson's interval, worked out with z = 1.959964."""
    questions = asked(16)
    same = questions_of(MATCH, samples("", 2, "same"), samples("", 2, "same"))
    votes = Votes(tmp_path / "votes.jsonl", MATCH)
    for i, question in enumerate(questions[:12]):
        cast(votes, question, "init" if i % 3 == 0 else "round 1")
    votes.cast(questions[12], "either")
    votes.cast(questions[13], "either")
    votes.cast(questions[14], "neither")
    tally = votes.tally([*questions, *same])
    assert tally == Tally(("init", "round 1"), wins=8, losses=4, either=2, neither=1, identical=2)
    rate = tally.win_rate
    assert rate
    assert (rate.value, rate.low, rate.high, rate.n) == pytest.approx((2 / 3, 0.39062, 0.86188, 12), abs=1e-4)
    assert Votes(tmp_path / "votes.jsonl", MATCH).tally([]) == replace(tally, identical=0)
    assert Tally(("init", "seed"), 0, 0, 3, 0, 0).to_dict()["win_rate"] is None
