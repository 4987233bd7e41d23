"""Batch sizes: what is fast if it fits into memory, less where memory runs out, and remembered in the run folder.

How much a training step holds is measured on one row (`Backend.activations`); before there is a model, it comes from
the formulas of `spa_lite.estimate`. Fewer tokens at a time come first: they cost little speed. Only where the longest
row alone does not fit are layers checkpointed, which costs one more forward pass of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from spa_lite.backend import Activations, Backend, Batching
from spa_lite.errors import ModelError, OutOfMemory, RunError
from spa_lite.estimate import Case, Longest, Place, held, longest_of, tokens_of
from spa_lite.files import read_json, write_json
from spa_lite.recipe import Recipe
from spa_lite.records import Row
from spa_lite.shape import Shape

T = TypeVar("T")
Size = Literal["sample", "score_tokens", "micro_tokens"]
NAME = "batching.json"
SHARE = 0.8
"""Of the memory that is free, this much is planned with."""
FAST = {"cpu": (2048, 4096), "apple": (4096, 8192), "cuda": (16384, 32768)}
"""Tokens per forward in training and in scoring; more would bring no speed worth having. A CPU's matrix product is at
its best with some hundred rows, and what it then passes over should not be far larger than the caches. A large GPU
wants thousands, or small models spend their time on starting kernels. A Mac's is full with fewer, and may stop a
program whose kernels take long."""
SHARES = (1, 2, 4, 8, 16)
"""Parts of the longest row that are tried out."""
MANY = 1000
"""Layers of a model whose config does not say: more than there are."""
MEND = {
    "sample": "take a shorter --max-tokens or --max-prompt-length, a smaller model, or fewer bits",
    "score_tokens": "take a shorter --max-seq-length or --max-tokens, a smaller model, or fewer bits",
    "micro_tokens": "take a shorter --max-seq-length or --max-tokens, a smaller model, or fewer bits",
}


def batching_of(recipe: Recipe, usual: Batching | None = None) -> Batching:
    """The batch sizes that a recipe asks for, and the usual ones where it leaves them open."""
    b, usual = recipe.batching, usual or Batching()
    return Batching(
        b.sample,
        b.score_tokens or usual.score_tokens,
        b.micro_tokens or usual.micro_tokens,
        usual.checkpointed if b.checkpointed_layers is None else b.checkpointed_layers,
    )


# -- choosing --------------------------------------------------------------------------------------------------------


def usual_sizes(place: Place) -> Batching:
    """What is fast there, if memory were no matter."""
    micro, score = FAST[place.kind]
    return Batching(score_tokens=score, micro_tokens=micro)


def sizes_that_fit(recipe: Recipe, backend: Backend, longest: Longest | None = None, training: bool = True) -> Batching:
    """Batch sizes for the memory that is free now, with the model loaded. What the recipe asks for stays as it is.

    `longest`: of the data, where known. `training`: one has started, and what a step of it holds is measured; without,
    its sizes are left at the usual ones. So are all for a backend that needs no memory to speak of.
    """
    free, place, shape = backend.free_memory(), Place.of(backend), _shape(backend)
    if free is None:
        return batching_of(recipe)
    sizes, room = batching_of(recipe, usual_sizes(place)), SHARE * free
    if shape:
        longest = longest or longest_of(recipe, shape)
        sizes = replace(sizes, score_tokens=_score_tokens(recipe, Case(shape, recipe, place, longest), room))
    if not training or longest is None:
        return sizes
    case = Case(shape, recipe, place, longest) if shape else None
    room -= case.optimizer if case else 0
    kept = measured(backend, longest, lambda part: case is None or _fits(replace(case, longest=part), room))
    kept = kept or (case.activations if case else None)
    return choose(recipe, sizes, kept, place, room) if kept else sizes


def planned_sizes(recipe: Recipe, shape: Shape, place: Place, free: int | None, longest: Longest | None) -> Batching:
    """The same before anything is loaded, by formula alone."""
    sizes = batching_of(recipe, usual_sizes(place))
    if free is None:
        return sizes
    case = Case(shape, recipe, place, longest or longest_of(recipe, shape))
    room = SHARE * free - case.fixed
    sizes = replace(sizes, score_tokens=_score_tokens(recipe, case, room))
    return choose(recipe, sizes, case.activations, place, room - case.optimizer)


def choose(recipe: Recipe, sizes: Batching, kept: Activations, place: Place, room: float) -> Batching:
    """Sizes with the tokens and the checkpointed layers of a training step, for `room` bytes, from what the longest row
    keeps.

    As many of the tokens as fit without checkpointing, by halves, and no fewer than that row has: below, nothing is
    saved. If the row itself does not fit, as few checkpointed layers as it fits with; if it never does, what is least.
    """
    tokens = [sizes.micro_tokens] if recipe.batching.micro_tokens else list(halves(sizes.micro_tokens, kept.tokens))
    asked = recipe.batching.checkpointed_layers
    layers = range(kept.layers + 1) if asked is None else [asked]
    ladder = [(some, layers[0]) for some in tokens] + [(tokens[-1], more) for more in layers[1:]]

    def need(step: tuple[int, int]) -> float:
        return held(kept, max(step[0], kept.tokens), step[1], place)

    found = next((step for step in ladder if need(step) <= room), None) or min(ladder, key=need)
    return replace(sizes, micro_tokens=found[0], checkpointed=found[1])


def halves(most: int, least: int) -> Iterator[int]:
    """most, a half of it, a quarter, ..., while above `least`; then that."""
    yield most
    while most > least:
        most = max(most // 2, least)
        yield most


def measured(backend: Backend, longest: Longest, fits: Callable[[Longest], bool]) -> Activations | None:
    """What a training step holds for the longest row; None if that cannot be told.

    Where that row itself would not fit, or does not, a half of it is measured, or a quarter, and so on.
    """
    for share in SHARES:
        part = longest.part(share)
        if share == SHARES[-1] or fits(part):
            with suppress(OutOfMemory):
                kept = backend.activations(row_of(part, backend.tokenizer.end_of_turn))
                return kept and grown(kept, longest.row / part.row)
    return None


def grown(kept: Activations, times: float) -> Activations:
    """The same for a row that is so many times longer."""
    return replace(kept, **{name: ceil(times * size) for name, size in asdict(kept).items() if name != "layers"})


def row_of(longest: Longest, token: int) -> Row:
    """A row as long as the longest, made of one token. Neither answer makes it longer than the longest single text."""
    prompt = max(1, min(longest.prompt, 2 * longest.single - longest.row - 2))
    first = (longest.row - prompt) // 2 + 1
    second = longest.row - prompt - first + 2
    return Row(prompt=(token,) * prompt, responses=((token,) * first, (token,) * second))


def _fits(case: Case, room: float) -> bool:
    """Whether a step on the longest row fits, by formula: on some systems too much ends the process."""
    return held(case.activations, case.line, 0, case.place) <= room


def _score_tokens(recipe: Recipe, case: Case, room: float) -> int:
    """Tokens per forward in scoring."""
    if recipe.batching.score_tokens:
        return recipe.batching.score_tokens
    tries = list(halves(usual_sizes(case.place).score_tokens, case.judged))
    return next((tokens for tokens in tries if case.scoring(tokens) <= room), tries[-1])


def _shape(backend: Backend) -> Shape | None:
    """None also where the model's config does not say."""
    try:
        return backend.shape
    except ModelError:
        return None


# -- where memory runs out -------------------------------------------------------------------------------------------


def halving(backend: Backend, size: Size, work: Callable[[], T], rows: Sequence[Row] = ()) -> T:
    """Do work. Where memory runs out, make that batch size of the backend smaller, for good, and do it again.

    `rows` are those that work is done on, where known: what all of them have together is the most that can have been
    tried, and nothing is saved below the longest. A training step on one row at a time is tried with ever more
    checkpointed layers. Raises OutOfMemory if nothing is left.
    """
    lengths = [tokens_of(row) for row in rows]
    while True:
        try:
            return work()
        except OutOfMemory as error:
            smaller = less(backend, size, max(lengths, default=1), max(lengths, default=0) * len(lengths))
            if smaller is None:
                raise OutOfMemory(f"{error}; nothing smaller is left: {MEND[size]}") from None
        backend.batching = smaller


def less(backend: Backend, size: Size, least: int, most: int) -> Batching | None:
    """The next smaller batching: half of that size, or of the `most` that was tried (0: not known); from `least` on,
    in training, a quarter of the layers more checkpointed. None if nothing is left."""
    now = backend.batching
    tried = min(getattr(now, size), most or getattr(now, size))
    if tried > least:
        return replace(now, **{size: max(least, tried // 2)})
    shape = _shape(backend)
    layers = shape.layers if shape else MANY
    if size != "micro_tokens" or now.checkpointed >= layers:
        return None
    return replace(now, checkpointed=min(layers, now.checkpointed + ceil(layers / 4)))


# -- remembering -----------------------------------------------------------------------------------------------------


class Stored(msgspec.Struct):
    """`batching.json`. `fitted`: the sizes of training were chosen, or made smaller."""

    asked: dict[str, Any] = {}
    used: Batching | None = None
    fitted: bool = False


class Remembered:
    """The batch sizes of a run: as the recipe asks, unless memory taught better. A new wish of the user's wins."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = folder / NAME, asked
        self.used: Batching | None = None
        self.fitted, self._written, self._news = False, False, ""
        try:
            stored = msgspec.convert(read_json(self.path), Stored) if self.path.exists() else Stored()
        except (RunError, msgspec.ValidationError):
            stored = Stored()
        if stored.used and stored.asked == asked:
            self.used, self.fitted, self._written = stored.used, stored.fitted, True

    def apply(self, recipe: Recipe, choose: Callable[[], Batching] | None = None, training: bool = True) -> Batching:
        """The batch sizes to use: what is remembered, else what `choose` says, else what the recipe asks for.

        `training`: `choose` is for a training stage. It is asked even if sizes of other stages are remembered, which
        then stay.
        """
        if self.used and (self.fitted or not training or not choose):
            return self.used
        found = choose() if choose else batching_of(recipe)
        if choose and training:
            self.fitted, self._news = True, told(recipe, found)
            if self.used:
                found = replace(found, sample=self.used.sample, score_tokens=self.used.score_tokens)
        self.used, self._written = found, False
        return found

    def notice(self, sizes: Batching) -> str:
        """Write down sizes that are new. Returns a sentence about them, or nothing."""
        changes = _changes(self.used, sizes) if self.used else ""
        news, self._news = self._news, ""
        if changes or not self._written:
            self.used, self._written = sizes, True
            write_json(self.path, {"asked": self.asked, "used": asdict(sizes), "fitted": self.fitted})
        return f"memory ran out, so from here on: {changes}" if changes else news


def told(recipe: Recipe, sizes: Batching) -> str:
    """A sentence about chosen sizes, unless they are the usual ones."""
    if sizes == batching_of(recipe):
        return ""
    again = f"; the first {sizes.checkpointed} layers are computed twice to save memory" if sizes.checkpointed else ""
    return f"training takes up to {sizes.micro_tokens:,} tokens per forward pass{again}"


def _changes(before: Batching, after: Batching) -> str:
    old, new = asdict(before), asdict(after)
    return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in new if old[name] != new[name])
