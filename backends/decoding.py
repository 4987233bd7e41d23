"""Answers being written, many at once: what every framework's sampler shares. A framework admits, advances, selects.

At most `slots` answers are in work. Those that have ended leave at the next look, and prompts that wait come in for
them, with their n answers; towards the end, when none waits, there are fewer and fewer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spa_lite import keys as streams
from spa_lite.backend import Sampling
from spa_lite.records import Ids

CDF_BLOCK = 256
"""Probabilities are summed in blocks of this many, then over blocks: float32 keeps its digits in large vocabularies."""
LOOK = 8
"""Steps between two looks at which answers have ended: a look makes the device wait for the host."""
WORTH = 8
"""Answers leave, and prompts come in, once they are one in so many: moving or reading them one by one would cost more
than the few slots that idle until then."""

Uniforms = NDArray[np.float32]


class Answer(NamedTuple):
    """One finished answer."""

    ids: Ids
    logprobs: tuple[float, ...]  # at temperature 1, nats
    ended: bool  # by the model itself
    states: NDArray[Any] | None  # [tokens, width], see `spa_lite.backend.Keep`; None unless asked for


class Written(NamedTuple):
    """Some steps of all answers in work, on the host."""

    tokens: NDArray[Any]  # [rows, steps]
    logprobs: NDArray[Any]  # [rows, steps] at temperature 1, nats
    states: NDArray[Any] | None  # [rows, steps, width] what the head read; None unless asked for


@dataclass
class Row:
    """One answer in work."""

    place: int  # prompt * n + its number among the n
    key: bytes
    limit: int
    parts: list[Written] = field(default_factory=list)  # of this row: [steps], [steps], [steps, width]
    steps: int = 0
    over: bool = False
    block: Uniforms | None = None

    def uniforms(self, steps: int) -> Uniforms:
        """The next ones of its stream, all of one block."""
        number, first = divmod(self.steps, streams.BLOCK)
        if self.block is None or first == 0:
            self.block = streams.uniforms(self.key, number)
        return self.block[first : first + steps]

    def answer(self, stop_ids: frozenset[int]) -> Answer:
        """What was written, up to the first stop token (included) or the limit."""
        tokens = np.concatenate([part.tokens for part in self.parts])[: self.limit].tolist()
        end = next((index + 1 for index, token in enumerate(tokens) if token in stop_ids), None)
        size = end or len(tokens)
        logprobs = np.concatenate([part.logprobs for part in self.parts])[:size].tolist()
        kept = [part.states for part in self.parts if part.states is not None]
        states = np.concatenate(kept)[:size] if kept else None
        return Answer(tuple(tokens[:size]), tuple(logprobs), end is not None, states)


class Decoding(ABC):
    """Some prompts, and their answers while they are being written.

    `rows` are the answers in work. A framework holds its state of them in the same order: `admit` adds n for each of
    some prompts at the end, `select` leaves some out. How many are in work changes nothing in an answer but rounding.
    """

    look = LOOK
    """Steps between two looks: a whole number of them make a block of uniforms. Fewer where looking costs nothing."""
    cheap_to_select = False
    """Whether leaving rows out moves next to nothing, and so is worth it at once."""

    def __init__(
        self,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        context: int,
        slots: int | None = None,
        keep: bool = False,
    ) -> None:
        """`slots`: answers in work at most, n at least; None: all, so that nothing is admitted but once."""
        self.prompts, self.sampling, self.stop_ids, self.context, self.keep = prompts, sampling, stop_ids, context, keep
        self.keys, self.n = keys, len(keys[0])
        self.slots = max(self.n, slots or self.n * len(prompts))
        self.limits = [max(0, min(sampling.max_tokens, context - len(prompt))) for prompt in prompts]
        self.rows: list[Row] = []

    @abstractmethod
    def admit(self, prompts: Sequence[int]) -> None:
        """Read these prompts (indices into `prompts`, of like length) under the adapter in use: n more rows each."""

    @abstractmethod
    def advance(self, uniforms: Uniforms, final: bool) -> Written:
        """Write one token per column of `uniforms` [rows, steps] to every row, as `draw` says; zeros if it is greedy.

        Rows that have ended, or are beyond their limit, may be given anything. `final`: no row will be advanced
        again, so that the last token need not be fed.
        """

    @abstractmethod
    def select(self, live: Sequence[int]) -> None:
        """Forget all rows but these, by their index in `rows`, ascending; there may be none."""

    def answers(self, enter: Callable[[], None]) -> Iterator[tuple[int, Answer]]:
        """Yield (place, answer) as answers end. `enter` switches to the right adapter after every pause."""
        for place in [
            prompt * self.n + k for prompt in self._sorted() if not self.limits[prompt] for k in range(self.n)
        ]:
            yield place, Answer((), (), False, None)
        waiting = [prompt for prompt in self._sorted() if self.limits[prompt]]
        while waiting or self.rows:
            enter()
            waiting = self._refill(waiting)
            self._write()
            over = [row for row in self.rows if row.over]
            if len(over) * WORTH >= len(self.rows) or self.cheap_to_select:
                self._leave()
                yield from ((row.place, row.answer(self.stop_ids)) for row in over)

    def tokens(self, enter: Callable[[], None]) -> Iterator[int]:
        """Yield the tokens of the only answer one by one, its stop token included: those that `answers` would give."""
        if not self.limits[0]:
            return
        self.look = 1
        enter()
        self._refill([0])
        row = self.rows[0]
        while not row.over:
            enter()
            self._write()
            yield int(row.parts[-1].tokens[0])

    def _sorted(self) -> list[int]:
        """Prompts of like length follow each other, the longest first: if memory runs out, it does so at once."""
        return sorted(range(len(self.prompts)), key=lambda index: -len(self.prompts[index]))

    def _refill(self, waiting: list[int]) -> list[int]:
        """Let prompts in, if there is room for enough; the rest goes on waiting."""
        free = self.slots - len(self.rows)
        if free < self.n or (self.rows and free * WORTH < self.slots):
            return waiting
        some, rest = waiting[: free // self.n], waiting[free // self.n :]
        if some:
            self.admit(some)
            self.rows += [
                Row(prompt * self.n + k, self.keys[prompt][k], self.limits[prompt])
                for prompt in some
                for k in range(self.n)
            ]
        return rest

    def _write(self) -> None:
        """Advance all rows to the next look."""
        left = max(row.limit - row.steps for row in self.rows if not row.over)
        steps = min(self.look, left)
        greedy = self.sampling.temperature == 0
        uniforms = np.zeros((len(self.rows), steps), np.float32) if greedy else self._uniforms(steps)
        tokens, logprobs, states = self.advance(uniforms, left <= self.look)
        ended = [bool(stops.any()) for stops in np.isin(tokens, list(self.stop_ids))]
        for index, row in enumerate(self.rows):
            row.parts.append(Written(tokens[index], logprobs[index], None if states is None else states[index]))
            row.steps += steps
            row.over = row.over or ended[index] or row.steps >= row.limit

    def _uniforms(self, steps: int) -> Uniforms:
        return np.stack([row.uniforms(steps) for row in self.rows])

    def _leave(self) -> None:
        """Go on without the rows that are over."""
        live = [index for index, row in enumerate(self.rows) if not row.over]
        if len(live) < len(self.rows):
            self.rows = [self.rows[index] for index in live]
            self.select(live)
