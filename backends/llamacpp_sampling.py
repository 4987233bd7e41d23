"""Sampling in batches: each prompt is read once, its n answers go on from copies of what was read.

llama.cpp computes logits, the host draws: a token is the inverse CDF, in vocabulary order, of the tempered
distribution at one uniform of the answer's own stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_lite.backend import Floats, Sampling
from spa_lite.backends.decoding import Decoding, Uniforms, Written
from spa_lite.backends.llamacpp_model import SEQUENCES, Context, Handle, Net, log_softmax
from spa_lite.errors import BackendError
from spa_lite.records import Ids

TILE = 2**22
"""Numbers of probabilities drawn from at a time."""
Logits = NDArray[np.float32]


class Decoder(Decoding):
    """Prompts and their answers while they are being written. Row i has the sequence `place[i]` of the context.

    The sequences in use are always the first ones: llama.cpp computes only neighbours together.
    """

    look = 1
    cheap_to_select = True

    def __init__(
        self,
        net: Net,
        prompts: Sequence[Ids],
        keys: Sequence[Sequence[bytes]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        slots: int,
        adapter: Handle | None = None,
    ) -> None:
        n, width = len(keys[0]), max(min(len(ids) + sampling.max_tokens, net.context) for ids in prompts)
        if n > SEQUENCES:
            raise BackendError(
                f"llama.cpp writes at most {SEQUENCES} answers to a prompt at once, not {n}: ask for fewer"
            )
        room = min(slots, n * len(prompts), net.sequences(width, n))
        super().__init__(prompts, keys, sampling, stop_ids, net.context, room)
        self.context_ = Context(net, max(room, n), width, adapter)
        self.place: list[int] = []
        self.last = np.zeros(0, np.int32)  # what older rows drew last; it is fed when their next token is asked for
        self.fresh: Logits = np.zeros((0, net.vocab), np.float32)  # after the prompts of the rows behind these

    def admit(self, prompts: Sequence[int]) -> None:
        """Read prompts together, once, then make n rows of each."""
        first = len(self.place)
        order = sorted(range(len(prompts)), key=lambda i: -len(self.prompts[prompts[i]]))
        lines = [(first + at, self.prompts[prompts[i]]) for at, i in enumerate(order)]
        after, read = self.context_.read(lines), dict(zip(order, range(len(order)), strict=True))
        free = first + len(prompts)
        for i in range(len(prompts)):
            self.place.append(first + read[i])
            for _ in range(self.n - 1):
                self.context_.copy(first + read[i], free)
                self.place.append(free)
                free += 1
        mine = [read[i] for i in range(len(prompts)) for _ in range(self.n)]
        self.fresh = np.concatenate([self.fresh, after[mine]])

    def advance(self, uniforms: Uniforms, final: bool) -> Written:
        """Write one token to every row."""
        logits = self.fresh
        if len(self.last):
            old = np.argsort(self.place[: len(self.last)])
            fed = self.context_.read([(self.place[i], self.last[i : i + 1].tolist()) for i in old])
            logits = np.concatenate([fed[np.argsort(old)], self.fresh])
        self.last, logprobs = draw_scored(logits, self.sampling, uniforms[:, 0])
        self.fresh = self.fresh[:0]
        return Written(self.last[:, None], logprobs[:, None], None)

    def select(self, live: Sequence[int]) -> None:
        """Go on with these rows only, and move those with high numbers into what became free."""
        self.last = self.last[list(live)]
        kept = [self.place[i] for i in live]
        for sequence in set(self.place) - set(kept):
            self.context_.forget(sequence)
        free = sorted(set(range(len(kept))) - set(kept))
        for row, sequence in enumerate(kept):
            if sequence >= len(kept):
                kept[row] = free.pop()
                self.context_.copy(sequence, kept[row])
                self.context_.forget(sequence)
        self.place = kept


def draw_scored(logits: Logits, sampling: Sampling, uniforms: NDArray[Any]) -> tuple[NDArray[np.int32], Floats]:
    """One token per row of logits [rows, vocabulary], given one uniform in (0, 1) each, and its log-prob at
    temperature 1 (nats)."""
    size = max(1, TILE // logits.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(logits), size)]
    tokens = np.concatenate([draw(logits[part], sampling, uniforms[part]) for part in parts])
    return tokens, np.concatenate([log_softmax(logits[part], tokens[part]) for part in parts])


def draw(logits: Logits, sampling: Sampling, uniforms: NDArray[Any]) -> NDArray[np.int32]:
    """One token per row."""
    if sampling.temperature == 0:
        return logits.argmax(axis=1).astype(np.int32)
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / np.float32(sampling.temperature))
    if sampling.top_p < 1:
        weights = nucleus(weights, sampling.top_p)
    mass = weights.cumsum(axis=1, dtype=np.float64)
    # Below 1, so that the target stays below the last sum whatever the rounding.
    found = (mass <= uniforms[:, None].astype(np.float64) * mass[:, -1:]).sum(axis=1)
    return found.astype(np.int32)


def nucleus(weights: Logits, top_p: float) -> Logits:
    """Zero all but the fewest most probable tokens whose mass reaches `top_p` (ties: the lower id first)."""
    order = np.argsort(-weights, axis=1, kind="stable")
    ordered = np.take_along_axis(weights, order, axis=1)
    mass = ordered.cumsum(axis=1, dtype=np.float64)
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, order, ordered * (mass - ordered < top_p * mass[:, -1:]), axis=1)
    return kept
