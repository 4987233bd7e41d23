"""Batch sizes that fit: the numbers of a stand-in backend are small enough to be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.backend import Activations, Backend, Batching
from spa_lite.errors import OutOfMemory
from spa_lite.estimate import Longest, Place, held, longest_of_rows, tokens_of
from spa_lite.fit import (
    Remembered,
    Size,
    batching_of,
    choose,
    halves,
    halving,
    planned_sizes,
    row_of,
    sizes_that_fit,
)
from spa_lite.recipe import Recipe, build, settings_of
from spa_lite.records import Row
from spa_lite.shape import Shape, shape_of
from tests.test_estimate import LLAMA_8B

PLACE = Place("mlx", "cpu", "float32", 32)
"""Where what is held is taken as it is: no slack for the allocator."""
HUNDRED = Activations(tokens=100, layers=8, layer=10_000, checkpointed=1_000, work=5_000, rest=0)
"""What a row of a hundred tokens keeps. With 0 checkpointed layers it needs 8 * 10,000 + 5,000 = 85,000 bytes, with 1
76,000, with 2 67,000, with 3 58,000, ..., with 7 (one is whole) 7,000 + 10,000 + 5,000 = 22,000, with 8 23,000."""
LONGEST = Longest(prompt=40, answer=31, pair=71)
"""A row of 40 + 30 + 30 tokens."""


def recipe_of(**batching: int | None) -> Recipe:
    """The paper's, with batch sizes of the user's."""
    return build({"test": {f"batching.{name}": size for name, size in batching.items()}})[0]


@dataclass
class StandIn:
    """A backend with so many bytes free, of which a row takes what HUNDRED says for its length."""

    free: int
    batching: Batching = field(default_factory=Batching)
    most: int = 10**9  # tokens of the longest row that can be tried out
    probed: tuple[int, ...] = ()
    shape: Shape | None = None
    name = "mlx"
    description: ClassVar[dict[str, Any]] = {"device": "cpu", "dtype": "float32", "bits": 32}
    tokenizer = SimpleNamespace(end_of_turn=7)

    def free_memory(self) -> int:
        return self.free

    def activations(self, row: Row) -> Activations:
        self.probed += (tokens_of(row),)
        if tokens_of(row) > self.most:
            raise OutOfMemory("memory ran out")
        share = tokens_of(row) / 100
        return Activations(*(int(n if name == "layers" else share * n) for name, n in vars(HUNDRED).items()))


def chosen(free: float, recipe: Recipe | None = None, **changes: Any) -> tuple[int, int]:
    """(tokens, checkpointed layers) with so many bytes to plan with."""
    found = sizes_that_fit(recipe or recipe_of(), cast(Backend, StandIn(round(free / 0.8), **changes)), LONGEST)
    return found.micro_tokens, found.checkpointed


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (2048 * 850, (2048, 0)),  # 850 bytes per token: all of what is fast
        (2048 * 850 - 1, (1024, 0)),
        (128 * 850, (128, 0)),
        (128 * 850 - 1, (100, 0)),  # the longest row alone
        (85_000, (100, 0)),
        (84_999, (100, 1)),
        (76_000, (100, 1)),
        (60_000, (100, 3)),
        (22_000, (100, 7)),
        (1, (100, 7)),  # it never fits; what needs least is tried
    ],
)
def test_fewer_tokens_come_before_checkpointing(room: int, expected: tuple[int, int]) -> None:
    """The room is 80 % of what is free; the first sizes on the way down that fit into it."""
    assert chosen(room) == expected


def test_what_the_user_asks_for_stays() -> None:
    """One number may be given and the other found."""
    assert chosen(60_000, recipe_of(micro_tokens=2048)) == (2048, 7)
    assert chosen(1000 * 850, recipe_of(micro_tokens=1000)) == (1000, 0)
    assert chosen(999 * 850, recipe_of(micro_tokens=1000)) == (1000, 1)
    assert chosen(2048 * 850, recipe_of(checkpointed_layers=2)) == (2048, 2)
    assert chosen(1, recipe_of(checkpointed_layers=2)) == (100, 2)
    assert chosen(1, recipe_of(micro_tokens=5, checkpointed_layers=0)) == (5, 0)
    given = sizes_that_fit(recipe_of(score_tokens=9, sample=3), cast(Backend, StandIn(1)), LONGEST)
    assert (given.score_tokens, given.sample) == (9, 3)


def test_a_row_that_is_too_long_to_try_out_is_measured_by_its_half() -> None:
    """And the numbers are those of the whole."""
    backend = StandIn(round(60_000 / 0.8), most=60)
    found = sizes_that_fit(recipe_of(), cast(Backend, backend), LONGEST)
    assert backend.probed == (100, 50)
    assert (found.micro_tokens, found.checkpointed) == (100, 3)


def test_a_row_to_try_out_is_as_long_as_the_longest_and_fits_the_context() -> None:
    """Neither of its two texts is longer than the longest there is."""
    short, long = Row(prompt=(1,) * 9, responses=((1,), (1, 1))), Row(prompt=(1, 1), responses=((1,) * 6, (1,) * 5))
    for rows in ([short], [long], [short, long]):
        row = row_of(longest_of_rows(rows), 7)
        assert tokens_of(row) == max(map(tokens_of, rows))
        assert max(len(row.prompt) + len(answer) for answer in row.responses) <= longest_of_rows(rows).single
        assert {*row.prompt, *row.responses[0], *row.responses[1]} == {7}


@given(
    numbers=st.tuples(*[st.integers(1, 10**6)] * 4),
    layers=st.integers(1, 40),
    tokens=st.integers(1, 4000),
    room=st.integers(1, 10**10),
)
def test_never_checkpoints_what_fits_and_never_plans_more_than_there_is(
    numbers: tuple[int, int, int, int], layers: int, tokens: int, room: int
) -> None:
    """For any model; and no step on the way down that fits is passed over."""
    layer, checkpointed, work, rest = numbers
    kept = Activations(tokens, layers, layer, checkpointed, work, rest)
    found = choose(recipe_of(), Batching(micro_tokens=2048), kept, PLACE, room)

    def need(micro: int, again: int) -> float:
        return held(kept, max(micro, tokens), again, PLACE)

    needed = need(found.micro_tokens, found.checkpointed)
    if need(tokens, 0) <= room:
        assert found.checkpointed == 0
    if any(need(tokens, k) <= room for k in range(layers + 1)):
        assert needed <= room
    if found.checkpointed and needed <= room:
        assert need(tokens, found.checkpointed - 1) > room
    if not found.checkpointed and found.micro_tokens < 2048:
        assert need(min(2048, 2 * found.micro_tokens), 0) > room or found.micro_tokens == tokens


def test_halves_end_at_the_longest_row() -> None:
    assert list(halves(2048, 300)) == [2048, 1024, 512, 300]
    assert list(halves(2048, 2048)) == [2048]
    assert list(halves(2048, 5000)) == [2048]


def test_before_anything_is_loaded_the_formulas_choose() -> None:
    """An 8B model in 16 bits with so many GiB free on a GPU, prompts of 512 and answers of 300 tokens."""
    shape, place, longest = shape_of(LLAMA_8B), Place("torch", "cuda", "bfloat16", 16), Longest(512, 300, 812)
    sizes = [planned_sizes(recipe_of(), shape, place, free * 2**30, longest) for free in (23, 27, 32, 80, 400)]
    assert sizes[0].checkpointed > sizes[1].checkpointed > 0 == sizes[2].checkpointed
    assert sizes[0].micro_tokens == sizes[2].micro_tokens == longest.row < sizes[3].micro_tokens < 16384
    assert sizes[4] == Batching(score_tokens=32768, micro_tokens=16384)
    assert planned_sizes(recipe_of(), shape, place, None, longest) == sizes[4]


# -- where memory runs out -------------------------------------------------------------------------------------------


EIGHT = replace(shape_of(LLAMA_8B), layers=8)
ROWS = [Row(prompt=(1,) * 40, responses=((1,) * 31, (1,) * 31)), Row(prompt=(1,) * 20, responses=((1,) * 21,))]
"""100 and 40 tokens."""


def tried(fits: Callable[[Batching], bool], size: Size, rows: Sequence[Row], **batching: int) -> list[tuple[int, int]]:
    """(that size, checkpointed layers) of all that is tried until something fits, or nothing is left."""
    backend, seen = StandIn(0, Batching(**batching), shape=EIGHT), []

    def work() -> None:
        seen.append((getattr(backend.batching, size), backend.batching.checkpointed))
        if not fits(backend.batching):
            raise OutOfMemory("memory ran out")

    with suppress(OutOfMemory):
        halving(cast(Backend, backend), size, work, rows)
    return seen


def test_a_step_that_runs_out_is_tried_with_less() -> None:
    """Half of what it can have used (2 rows of 100 tokens at most), the longest row alone, then two layers more."""

    def fits(b: Batching) -> bool:
        return held(HUNDRED, max(100, min(b.micro_tokens, 140)), b.checkpointed, PLACE) <= 60_000

    assert tried(fits, "micro_tokens", ROWS, micro_tokens=2048) == [(2048, 0), (100, 0), (100, 2), (100, 4)]
    assert tried(fits, "micro_tokens", ROWS * 4, micro_tokens=2048)[:4] == [(2048, 0), (400, 0), (200, 0), (100, 0)]
    alone = tried(lambda _: False, "micro_tokens", ROWS[:1], micro_tokens=2048, checkpointed=3)
    assert alone == [(2048, 3), (2048, 5), (2048, 7), (2048, 8)]


def test_without_rows_there_is_nothing_to_skip() -> None:
    """Halves down to one token or prompt; scoring and sampling have no layers to checkpoint."""
    assert tried(lambda _: False, "sample", (), sample=5) == [(5, 0), (2, 0), (1, 0)]
    assert tried(lambda b: b.score_tokens < 3, "score_tokens", (), score_tokens=9) == [(9, 0), (4, 0), (2, 0)]
    assert tried(lambda _: False, "score_tokens", ROWS, score_tokens=300) == [(300, 0), (100, 0)]


def test_the_end_of_the_way_is_said() -> None:
    """What ran out, and what else there is to change."""
    with pytest.raises(OutOfMemory, match=r"memory ran out; nothing smaller is left: .*--max-tokens"):
        halving(cast(Backend, StandIn(0, Batching(sample=1))), "sample", failing)


def failing() -> None:
    raise OutOfMemory("memory ran out")


# -- remembering -----------------------------------------------------------------------------------------------------


def test_sizes_are_chosen_once_and_remembered(tmp_path: Path) -> None:
    """A run goes on as it began, and what memory taught in sampling stays when training chooses."""
    recipe, usual = recipe_of(), batching_of(recipe_of())
    sizes = Remembered(tmp_path, settings_of(recipe.batching))
    assert sizes.apply(recipe) == usual
    assert not sizes.notice(usual)
    assert sizes.notice(replace(usual, sample=32)) == "memory ran out, so from here on: sample 64 -> 32"
    tight = replace(usual, micro_tokens=100, checkpointed=3)
    assert sizes.apply(recipe, lambda: tight) == replace(tight, sample=32)
    said = "training takes up to 100 tokens per forward pass; the first 3 layers are computed twice to save memory"
    assert sizes.notice(sizes.apply(recipe)) == said
    assert not sizes.notice(sizes.apply(recipe)), "said once"
    again = Remembered(tmp_path, settings_of(recipe.batching))
    assert again.apply(recipe, lambda: usual) == replace(tight, sample=32)
    assert (
        again.notice(replace(tight, sample=32, checkpointed=5))
        == "memory ran out, so from here on: checkpointed 3 -> 5"
    )
    assert Remembered(tmp_path, settings_of(recipe.batching)).apply(recipe).checkpointed == 5
    wish = recipe_of(micro_tokens=7)
    assert Remembered(tmp_path, settings_of(wish.batching)).apply(wish).micro_tokens == 7


def test_other_files_are_ignored(tmp_path: Path) -> None:
    """Those of an older version ask for other things; a damaged one says nothing."""
    recipe = recipe_of()
    older = {"micro": None, "sample": 64, "score": 32, "gradient_checkpointing": True}
    for text in (json.dumps({"asked": older, "used": older | {"micro": 2}}), "{", '{"used": 3}'):
        (tmp_path / "batching.json").write_text(text)
        assert Remembered(tmp_path, settings_of(recipe.batching)).apply(recipe) == batching_of(recipe)
