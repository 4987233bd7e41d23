"""Numbers of a comparison, on opinions small enough to count by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.errors import DataError
from spa_lite.head_to_head import head_to_head, worth
from spa_lite.intervals import prompts_needed
from spa_lite.length_control import NO_DIFFICULTY
from spa_lite.opinion import Opinion, Verdict, compared
from spa_lite.records import Completion, Message, Sample


def sample(a: str, b: str) -> Sample:
    """A prompt with two answers."""
    answers = tuple(Completion(ids=(), text=text, ended="human") for text in (a, b))
    return Sample(id="x", messages=(Message(role="user", content="?"),), prompt_ids=(), completions=answers)


def votes(first: float | None, second: float | None) -> Opinion:
    """Both orders: p that the first shown is better, a shown first and then b shown first."""
    return compared(2, [Verdict(first=0, second=1, p=first), Verdict(first=1, second=0, p=second)])


def swapped(opinion: Opinion) -> Opinion:
    """The same opinion with the sides exchanged."""
    verdicts = tuple(Verdict(first=1 - v.first, second=1 - v.second, p=v.p) for v in opinion.verdicts)
    return Opinion(scores=opinion.scores[::-1], odds=opinion.odds, verdicts=verdicts, unread=opinion.unread)


A, B, FIRST, SECOND, TIE = votes(0.9, 0.2), votes(0.1, 0.8), votes(0.9, 0.8), votes(0.1, 0.2), votes(0.5, 0.5)


@pytest.mark.parametrize(
    ("opinion", "value"),
    [
        (Opinion(scores=(2.0, 1.0)), 1.0),
        (Opinion(scores=(1.0, 2.0)), 0.0),
        (Opinion(scores=(1.0, 1.0)), 0.5),
        (A, 1.0),
        (B, 0.0),
        (FIRST, 0.5),
        (SECOND, 0.5),
        (TIE, 0.5),
        (votes(0.9, 0.5), 0.75),
        (votes(0.9, None), 0.75),
        (votes(None, None), 0.5),
    ],
)
def test_worth_of_a_prompt(opinion: Opinion, value: float) -> None:
    assert worth(opinion) == value


def test_counted_by_hand() -> None:
    """Ten prompts: 5 won, 2 lost, 1 for the first shown, 1 tied, 1 with the same text; one reply was not read."""
    told = [A, A, A, A, votes(0.9, None), B, B, FIRST, TIE, FIRST]
    samples = [*[sample("long answer", "short")] * 9, sample("same", "same")]
    found = head_to_head(samples, told)
    assert found.n == 10
    assert found.wins == [1, 1, 1, 1, 0.75, 0, 0, 0.5, 0.5, 0.5]
    assert found.win_rate.value == pytest.approx(0.625)
    assert found.decisive is not None
    assert found.decisive.value == pytest.approx(5 / 7)
    assert found.decisive.n == 7
    assert (found.ties, found.identical) == (3, 1)
    assert found.orders is not None
    assert found.orders.agreement is not None
    assert found.orders.agreement.value == pytest.approx(7 / 8)
    assert found.orders.agreement.n == 8, "one was not read, one is the same text"
    assert found.orders.first is not None
    # Of 19 readable replies: one each of the 4 + 2 agreed prompts, both of FIRST twice, the single one, ties half.
    assert found.orders.first.value == pytest.approx((6 + 4 + 1 + 1) / 19)
    assert (found.orders.unread, found.orders.replies) == (1, 20)
    assert found.length_a == pytest.approx(10.3)
    assert found.length_b == pytest.approx(4.9)
    spread = (sum((w - 0.625) ** 2 for w in found.wins) / 10) ** 0.5
    assert found.prompts_needed == prompts_needed(0.125, spread)
    assert found.length_controlled.name == NO_DIFFICULTY
    assert found.warnings == []


def test_a_judge_of_single_answers_has_no_order() -> None:
    found = head_to_head([sample("a", "b")] * 3, [Opinion(scores=(1.0, 0.0))] * 3)
    assert found.orders is None
    assert found.win_rate.value == 1
    assert found.to_dict()["orders"] is None


def test_an_unusable_judge_says_so() -> None:
    """Who always prefers the first shown gives 50 %, and no verdict even where the interval would allow one."""
    first = head_to_head([sample("a", "b")] * 100, [FIRST] * 100)
    assert first.win_rate.value == 0.5
    assert first.orders is not None
    assert first.orders.first is not None
    assert first.orders.first.value == 1
    assert "judge unusable" in first.warnings[0]
    split = head_to_head([sample("a", "b")] * 100, [A] * 59 + [FIRST] * 41)
    assert split.win_rate.low > 0.5
    assert split.verdict == ""
    enough = head_to_head([sample("a", "b")] * 100, [A] * 60 + [FIRST] * 40)
    assert enough.verdict == "a"
    silent = head_to_head([sample("a", "b")] * 5, [votes(None, None)] * 5)
    assert "no reply could be read" in silent.warnings[0]


def test_the_same_text_is_a_tie_whatever_the_judge_rounds() -> None:
    found = head_to_head([sample("a", "a"), sample("a", "b")], [Opinion(scores=(1.0, 1.0 - 1e-9))] * 2)
    assert found.wins == [0.5, 1.0]


@given(
    st.lists(st.tuples(st.sampled_from([A, B, FIRST, SECOND, TIE, votes(0.7, None)]), st.integers(1, 9)), min_size=1)
)
def test_exchanging_the_sides_mirrors_everything(drawn: list[tuple[Opinion, int]]) -> None:
    """1 minus the win rate, and the same diagnostics."""
    told = [opinion for opinion, _ in drawn]
    there = head_to_head([sample("x" * n, "y" * 4) for _, n in drawn], told)
    back = head_to_head([sample("y" * 4, "x" * n) for _, n in drawn], [swapped(o) for o in told])
    assert back.wins == [1 - w for w in there.wins]
    assert back.win_rate.value == pytest.approx(1 - there.win_rate.value)
    assert back.win_rate.low == pytest.approx(1 - there.win_rate.high, abs=0.05)
    assert (back.orders, back.ties, back.prompts_needed) == (there.orders, there.ties, there.prompts_needed)
    one, other = there.length_controlled.interval, back.length_controlled.interval
    assert (one is None) == (other is None)
    if one and other:
        assert other.value == pytest.approx(1 - one.value, abs=1e-6)


def test_length_control_sees_through_length() -> None:
    """The longer answer wins nine times in ten, and three in four of a's are longer: that is all its 70 % are."""
    longer, shorter = sample("x" * 8, "y" * 5), sample("x" * 2, "y" * 5)
    won, lost = Opinion(scores=(1.0, 0.0)), Opinion(scores=(0.0, 1.0))
    found = head_to_head([longer] * 120 + [shorter] * 40, [won] * 108 + [lost] * 12 + [won] * 4 + [lost] * 36)
    assert found.win_rate.value == pytest.approx(0.7)
    assert found.length_controlled.interval is not None
    assert found.length_controlled.interval.value == pytest.approx(0.5, abs=0.01)


def test_difficulty_explains_what_length_cannot() -> None:
    """Hard prompts are lost and easy ones won, with equal lengths on both: the fit sees it, the mean stays."""
    pairs = [sample("x" * n, "y" * 5) for n in (4, 6)] * 80
    opinions = [Opinion(scores=(1.0, 0.0))] * 80 + [Opinion(scores=(0.0, 1.0))] * 80
    found = head_to_head(pairs, opinions, difficulty=[1.0] * 80 + [-1.0] * 80)
    assert found.length_controlled.difficulty > 1
    assert head_to_head(pairs, opinions).length_controlled.difficulty == 0
    assert found.length_controlled.interval is not None
    assert found.length_controlled.interval.value == pytest.approx(0.5, abs=0.01)


def test_nothing_to_compare() -> None:
    with pytest.raises(DataError, match="no prompt that both sides answered"):
        head_to_head([], [])
    three = Sample(id="t", messages=(), prompt_ids=(), completions=sample("a", "b").completions * 2)
    with pytest.raises(DataError, match="prompt t has 4 answers"):
        head_to_head([three], [A])
