"""Answers being written in a batch: what every framework's sampler shares. A framework advances, fetches and keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from spa_lite.backend import Sampling
from spa_lite.records import Ids

CDF_BLOCK = 256
"""Probabilities are summed in blocks of this many, then over blocks: float32 keeps its digits in large vocabularies."""
LOOK = 8
"""Steps between two looks at which answers have ended: a look makes the device wait for the host."""

Answer = tuple[Ids, tuple[float, ...], bool]
"""Token ids, their log-probs at temperature 1 (nats), and whether the model ended it itself."""


class Decoding(ABC):
    """One batch of prompts and their answers while they are being written."""

    def __init__(
        self,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        context: int,
    ) -> None:
        self.sampling, self.stop_ids, self.context = sampling, stop_ids, context
        self.n = len(keys[0])
        self.keys = [key for group in keys for key in group]
        self.limits = [
            max(0, min(sampling.max_tokens, context - len(prompt))) for prompt in prompts for _ in range(self.n)
        ]
        self.rows = list(range(len(self.keys)))  # answers still being written, by their place in the batch
        self.width = max(len(prompt) for prompt in prompts)
        self.length = max(self.limits)

    @abstractmethod
    def advance(self, start: int, steps: int) -> list[bool]:
        """Write `steps` more tokens of every answer in `rows`; say which answers have ended."""

    @abstractmethod
    def fetch(self, over: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids and log-probs of these answers, by their index in `rows`."""

    @abstractmethod
    def select(self, live: Sequence[int]) -> None:
        """Forget the state of all answers but these, by their index in `rows`."""

    def answers(self, enter: Callable[[], None]) -> Iterator[tuple[int, Answer]]:
        """Yield (place, answer) as answers end. `enter` switches to the right adapter after every pause."""
        for place in [place for place in self.rows if self.limits[place] == 0]:
            yield place, ((), (), False)
        self._keep([index for index, place in enumerate(self.rows) if self.limits[place] > 0])
        step = 0
        while self.rows:
            enter()
            stride = min(LOOK, self.length - step)
            ended = self.advance(step, stride)
            step += stride
            over = [index for index, end in enumerate(ended) if end]
            # Copying the cache costs about one step, so a few ended answers ride along until the next look.
            if len(over) * 8 >= len(self.rows):
                yield from self._collect(over)
                self._keep([index for index, end in enumerate(ended) if not end])

    def _collect(self, over: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        tokens, logps = self.fetch(over)
        for place, ids, values in zip([self.rows[i] for i in over], tokens, logps, strict=True):
            limit = self.limits[place]
            end = next((i + 1 for i, token in enumerate(ids[:limit]) if token in self.stop_ids), None)
            size = end or limit
            yield place, (tuple(ids[:size]), tuple(values[:size]), end is not None)

    def _keep(self, live: Sequence[int]) -> None:
        """Go on with these answers only."""
        if len(live) < len(self.rows):
            self.rows = [self.rows[i] for i in live]
            self.select(live)
