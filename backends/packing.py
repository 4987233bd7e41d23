"""Rows of token ids laid out for one forward pass, the same for every framework. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa_lite.backend import Batch, Floats, Outcome, StepStats
from spa_lite.backends.checks import longest
from spa_lite.records import Ids, Row, Score

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """The responses of some rows as one right-padded batch. R responses, N response tokens in all.

    Attention is causal, so padding on the right changes nothing before it and needs no mask.
    """

    ids: Ints  # [R, longest]
    places: Ints  # [N] flat index of the position that predicts each response token
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


def pack(rows: Sequence[Row]) -> Packed:
    """Lay out rows for one forward pass."""
    pairs = [(index, row.prompt, response) for index, row in enumerate(rows) for response in row.responses]
    width = max(len(prompt) + len(response) for _, prompt, response in pairs)
    ids: list[Ids] = []
    places: list[int] = []
    targets: list[int] = []
    for line, (_, prompt, response) in enumerate(pairs):
        ids.append((*prompt, *response) + (0,) * (width - len(prompt) - len(response)))
        first = line * width + len(prompt) - 1
        places.extend(range(first, first + len(response)))
        targets.extend(response)
    lengths = np.array([len(response) for _, _, response in pairs], dtype=np.int64)
    return Packed(
        ids=np.array(ids, dtype=np.int64),
        places=np.array(places, dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
        owner=np.repeat(np.arange(len(pairs)), lengths),
        lengths=lengths,
        row=np.array([index for index, _, _ in pairs], dtype=np.int64),
    )


def batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Indices of rows of like length, as many together as hold `size` pairs of responses (one row at least)."""
    batch: list[int] = []
    responses = 0
    for index in sorted(range(len(rows)), key=lambda index: longest(rows[index])):
        more = len(rows[index].responses)
        if batch and responses + more > 2 * size:
            yield batch
            batch, responses = [], 0
        batch.append(index)
        responses += more
    if batch:
        yield batch


def micro_batches(
    rows: Sequence[Row], reference: Floats | None, size: int
) -> Iterator[tuple[Sequence[Row], Floats | None]]:
    """Yield `size` rows at a time, each time with the known reference sums [responses] of these rows, if any."""
    begin = 0
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        end = begin + sum(len(row.responses) for row in some)
        yield some, None if reference is None else reference[begin:end]
        begin = end


def step_stats(parts: Sequence[tuple[Batch, Outcome]], grad_norm: float, skipped: bool) -> StepStats:
    """What an optimizer step reports, from what its micro-batches saw."""
    batches_ = [batch for batch, _ in parts]
    return StepStats(
        loss=float(np.concatenate([outcome.loss for _, outcome in parts]).mean()),
        grad_norm=grad_norm,
        skipped=skipped,
        tokens=int(sum(batch.tokens.sum() for batch in batches_)),
        logp=np.concatenate([batch.logp for batch in batches_]),
        reference=np.concatenate([batch.reference for batch in batches_]),
        metrics={name: np.concatenate([outcome.metrics[name] for _, outcome in parts]) for name in parts[0][1].metrics},
    )
