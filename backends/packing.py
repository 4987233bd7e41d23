"""Rows of token ids laid out for one forward pass, the same for every framework. NumPy only.

A row's prompt is computed once: its responses follow it on one line, [prompt | a | b], each at the positions and with
the view that it would have alone. Where a model cannot do that, or a line would be longer than it may be, every
response has a line, and a prompt, of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa_lite.backend import Batch, Floats, Known, Outcome, StepStats
from spa_lite.records import Row, Score

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Responses:
    """The responses of some rows: R responses, N response tokens in all, in row order."""

    targets: Ints  # [N] the response tokens
    owner: Ints  # [N] response of each token
    lengths: Ints  # [R] response tokens
    row: Ints  # [R] row of each response

    def sums(self, per_token: Floats) -> Floats:
        """Per-response sums [R] of a per-token array [N], float64."""
        return np.bincount(self.owner, weights=per_token, minlength=len(self.lengths)).astype(np.float64)

    def scores(self, per_token: Floats, keep: bool) -> list[tuple[Score, ...]]:
        """One Score per response, row by row, from per-token log-probs [N]; `keep` stores these too."""
        sums, ends = self.sums(per_token), self.lengths.cumsum()
        found: list[list[Score]] = [[] for _ in range(int(self.row[-1]) + 1)]
        for response, row in enumerate(self.row):
            size = int(self.lengths[response])
            tokens = tuple(per_token[ends[response] - size : ends[response]].tolist()) if keep else None
            found[row].append(Score(logp=float(sums[response]), tokens=size, per_token=tokens))
        return [tuple(some) for some in found]


@dataclass(frozen=True)
class Packed(Responses):
    """The same as L right-padded lines of W tokens. A response's last token predicts nothing, and is left out."""

    ids: Ints  # [L, W]
    positions: Ints  # [L, W] restarted after the prompt by each response
    segments: Ints  # [L, W] 0 in the prompt, 1, 2, ... in the responses that follow it, -1 in the padding
    places: Ints  # [N] flat index into [L, W] of the position that predicts each response token

    @property
    def branching(self) -> bool:
        """Whether a line holds several responses: else attention is plainly causal, and padding needs no mask."""
        return bool((self.segments > 1).any())

    def mask(self) -> Flags:
        """[L, W, W]: what each position (second axis) may see: of what precedes it the prompt and its own response."""
        theirs = self.segments[:, None, :]
        return ((theirs == 0) | (theirs == self.segments[:, :, None])) & np.tri(self.ids.shape[1], dtype=np.bool_)


def responses_of(rows: Sequence[Row]) -> Responses:
    """The responses of rows, without a layout."""
    every = [(index, response) for index, row in enumerate(rows) for response in row.responses]
    lengths = np.array([len(response) for _, response in every], dtype=np.int64)
    return Responses(
        targets=np.array([token for _, response in every for token in response], dtype=np.int64),
        owner=np.repeat(np.arange(len(every)), lengths),
        lengths=lengths,
        row=np.array([index for index, _ in every], dtype=np.int64),
    )


def together(row: Row) -> int:
    """Tokens of a row on one line: the prompt once, and each response without its last token."""
    return len(row.prompt) + sum(max(0, len(response) - 1) for response in row.responses)


def apart(row: Row) -> int:
    """Tokens of the longest line of a row whose responses have a line each."""
    return len(row.prompt) + max(max(0, len(response) - 1) for response in row.responses)


def width(row: Row, shared: int) -> int:
    """Tokens of a row's longest line, where lines of up to `shared` tokens may hold several responses."""
    return together(row) if together(row) <= shared else apart(row)


def lines(row: Row, shared: int) -> int:
    """How many lines a row takes."""
    return 1 if together(row) <= shared else len(row.responses)


def pack(rows: Sequence[Row], shared: int = 0) -> Packed:
    """Lay out rows for one forward pass. Rows of up to `shared` tokens are one line; 0: every response has its own."""
    laid = [part for row in rows for part in _lines(row, shared)]
    wide = max(together(row) for row in laid)
    ids = np.zeros((len(laid), wide), dtype=np.int64)
    positions, segments = np.zeros_like(ids), np.full_like(ids, -1)
    places: list[Ints] = []
    for line, row in enumerate(laid):
        prompt = len(row.prompt)
        ids[line, :prompt], positions[line, :prompt], segments[line, :prompt] = row.prompt, range(prompt), 0
        start = prompt
        for number, response in enumerate(row.responses, 1):
            end = start + max(0, len(response) - 1)
            ids[line, start:end] = response[:-1]
            positions[line, start:end] = range(prompt, prompt + end - start)
            segments[line, start:end] = number
            predicting = np.array([prompt - 1, *range(start, end)][: len(response)], dtype=np.int64)
            places.append(line * wide + predicting)
            start = end
    them = responses_of(rows)
    return Packed(
        them.targets,
        them.owner,
        them.lengths,
        them.row,
        ids=ids,
        positions=positions,
        segments=segments,
        places=np.concatenate(places) if places else np.zeros(0, dtype=np.int64),
    )


def _lines(row: Row, shared: int) -> list[Row]:
    if together(row) <= shared:
        return [row]
    return [Row(prompt=row.prompt, responses=(response,)) for response in row.responses]


def batches(rows: Sequence[Row], tokens: int, shared: int = 0) -> Iterator[list[int]]:
    """Indices of rows of like length, the longest first, as many together as `tokens` (padding included) allows.

    The longest first: where memory runs out, it does so at once.
    """
    batch: list[int] = []
    wide = held = 0
    for index in sorted(range(len(rows)), key=lambda index: -width(rows[index], shared)):
        more = lines(rows[index], shared)
        if batch and (held + more) * wide > tokens:
            yield batch
            batch, held = [], 0
        wide = wide if batch else width(rows[index], shared)
        batch.append(index)
        held += more
    if batch:
        yield batch


def micro_batches(
    rows: Sequence[Row], known: Known | None, tokens: int, shared: int = 0, in_order: bool = False
) -> Iterator[tuple[list[int], list[Row], Known | None]]:
    """Yield (indices, rows, what is known of them): rows of like length together, or (`in_order`) as they come."""
    first = np.cumsum([0, *(len(row.responses) for row in rows)])
    for some in _in_order(rows, tokens, shared) if in_order else batches(rows, tokens, shared):
        responses = [response for index in some for response in range(first[index], first[index + 1])]
        yield some, [rows[index] for index in some], known and known.of(responses)


def _in_order(rows: Sequence[Row], tokens: int, shared: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index, row in enumerate(rows):
        grown = [rows[i] for i in batch] + [row]
        wide = max(width(some, shared) for some in grown)
        if batch and sum(lines(some, shared) for some in grown) * wide > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def step_stats(parts: Sequence[tuple[list[int], Batch, Outcome]], grad_norm: float, skipped: bool) -> StepStats:
    """What an optimizer step reports, in row order, from what its micro-batches (indices of rows first) saw."""
    batches_ = [batch for _, batch, _ in parts]
    rows = np.argsort([index for some, _, _ in parts for index in some], kind="stable")
    owner = np.concatenate([np.asarray(some)[batch.row] for some, batch, _ in parts])
    responses = np.argsort(owner, kind="stable")

    def metric(name: str) -> Floats:
        return np.concatenate([outcome.metrics[name] for _, _, outcome in parts])[rows]

    reference = np.concatenate([batch.reference for batch in batches_])
    return StepStats(
        loss=float(np.concatenate([outcome.loss for _, _, outcome in parts])[rows].mean()),
        grad_norm=grad_norm,
        skipped=skipped,
        tokens=int(sum(batch.tokens.sum() for batch in batches_)),
        logp=np.concatenate([batch.logp for batch in batches_])[responses],
        reference=reference[responses] if len(reference) else reference,
        metrics={name: metric(name) for name in parts[0][2].metrics},
    )
