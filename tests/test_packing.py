"""Rows laid out for a forward pass: hand-checked lines, and properties of any rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.backend import Batch, Floats, Known, Outcome
from spa_lite.backends.packing import batches, lines, micro_batches, pack, responses_of, step_stats, together, width
from spa_lite.records import Row

IDS = st.lists(st.integers(1, 9), max_size=6).map(tuple)
ROWS = st.lists(
    st.builds(
        lambda prompt, responses: Row(prompt=(1, *prompt), responses=tuple(responses)),
        IDS,
        st.lists(IDS, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=7,
)
PAIR = Row(prompt=(1, 2, 3), responses=((4, 5, 6), (7, 8)))


def test_a_pair_on_one_line() -> None:
    packed = pack([PAIR], shared=6)
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5, 7]], "the last token of a response predicts nothing"
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert packed.places.tolist() == [2, 3, 4, 2, 5], "both answers begin after the prompt's last token"
    assert packed.targets.tolist() == [4, 5, 6, 7, 8]
    assert packed.branching
    assert packed.mask()[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_a_pair_that_is_too_long_for_one_line() -> None:
    packed = pack([PAIR], shared=5)
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 7, 0]]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, -1]]
    assert packed.places.tolist() == [2, 3, 4, 7, 8]
    assert not packed.branching
    assert width(PAIR, 6) == together(PAIR) == 6
    assert width(PAIR, 5) == 5
    assert (lines(PAIR, 6), lines(PAIR, 5)) == (1, 2)


@given(ROWS, st.integers(0, 30))
def test_every_token_is_predicted_from_what_stands_before_it(rows: list[Row], shared: int) -> None:
    """Follow the mask: what a predicting position sees, in order, is its own prompt and response so far."""
    packed = pack(rows, shared)
    expected = [
        [*row.prompt, *response[:place]] for row in rows for response in row.responses for place in range(len(response))
    ]
    assert len(packed.places) == len(expected)
    wide = packed.ids.shape[1]
    for place, before in zip(packed.places, expected, strict=True):
        line, column = divmod(int(place), wide)
        seen = packed.mask()[line, column]
        assert packed.ids[line][seen].tolist() == before
        assert packed.positions[line][seen].tolist() == list(range(len(before)))
    assert all(mask.diagonal().all() for mask in packed.mask()), "padding sees itself: a softmax over nothing is nan"


@given(ROWS, st.integers(1, 60), st.integers(0, 30))
def test_batches_hold_every_row_once_within_the_budget(rows: list[Row], tokens: int, shared: int) -> None:
    found = list(batches(rows, tokens, shared))
    assert sorted(index for some in found for index in some) == list(range(len(rows)))
    widths = [width(rows[index], shared) for some in found for index in some]
    assert widths == sorted(widths, reverse=True)
    for some in found:
        packed = pack([rows[index] for index in some], shared)
        assert packed.ids.size <= max(tokens, lines(rows[some[0]], shared) * packed.ids.shape[1])
        assert len(some) == 1 or packed.ids.size <= tokens


@given(ROWS, st.integers(1, 60), st.booleans())
def test_a_step_reports_in_row_order(rows: list[Row], tokens: int, in_order: bool) -> None:
    """Each response's number is its place among all responses; sorting must not show."""
    responses = len(responses_of(rows).lengths)
    known = Known(np.arange(responses, dtype=np.float64), tuple(np.full((1, 1), index) for index in range(responses)))
    parts = []
    for indices, some, theirs in micro_batches(rows, known, tokens, 20, in_order):
        assert theirs is not None
        assert theirs.states is not None
        assert [int(states[0, 0]) for states in theirs.states] == theirs.sums.tolist()
        them = responses_of(some)
        batch = Batch(10 * theirs.sums, theirs.sums, np.zeros(0), them.lengths, them.row, np.array(indices))
        place: Floats = np.array(indices, dtype=np.float64)
        parts.append((indices, batch, Outcome(place, batch.logp, {"place": place})))
    stats = step_stats(parts, 1.0, False)
    assert stats.reference.tolist() == list(range(responses))
    assert stats.logp.tolist() == [10.0 * index for index in range(responses)]
    assert stats.metrics["place"].tolist() == list(range(len(rows)))
    assert stats.loss == pytest.approx((len(rows) - 1) / 2)
    if in_order:
        assert [index for indices, _, _ in parts for index in indices] == list(range(len(rows)))


def test_what_is_known_of_some_responses() -> None:
    known = Known(np.array([1.0, 2.0, 3.0]), (np.zeros((1, 2)), np.ones((2, 2)), np.ones((3, 2))))
    some = known.of([2, 0])
    assert some.sums.tolist() == [3.0, 1.0]
    assert some.states is not None
    assert [len(states) for states in some.states] == [3, 1]
    assert Known(np.array([1.0])).of([0]).states is None
