"""Log-probabilities of given answers: a row's prompt is read once, its answers side by side after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spa_lite.backend import Floats
from spa_lite.backends.llamacpp_model import Context, Handle, Net, log_softmax
from spa_lite.backends.packing import apart
from spa_lite.records import Row


def row_logprobs(net: Net, rows: Sequence[Row], adapter: Handle | None) -> Floats:
    """Log-prob of each response token, [N] float64, in row order."""
    found = [np.zeros(0)]
    for some in _pieces(rows, net.sequences(max(map(apart, rows)), 2)):
        found += _logprobs(net, some, adapter)
    return np.concatenate(found)


def _pieces(rows: Sequence[Row], sequences: int) -> Iterator[list[Row]]:
    """Rows that need at most so many sequences, one and one for each response; many responses are divided."""
    piece: list[Row] = []
    held = 0
    for row in rows:
        for start in range(0, len(row.responses), sequences - 1):
            part = Row(prompt=row.prompt, responses=row.responses[start : start + sequences - 1])
            if held + 1 + len(part.responses) > sequences:
                yield piece
                piece, held = [], 0
            piece.append(part)
            held += 1 + len(part.responses)
    yield piece


def _logprobs(net: Net, rows: Sequence[Row], adapter: Handle | None) -> list[Floats]:
    """Log-probs of each response, the tokens after the first on copies of what was read of the row's prompt."""
    every = [(index, response) for index, row in enumerate(rows) for response in row.responses]
    context = Context(net, len(rows) + len(every), max(map(apart, rows)), adapter)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].prompt))
    place = {index: sequence for sequence, index in enumerate(order)}
    after = context.read([(sequence, rows[index].prompt) for sequence, index in enumerate(order)])
    found = [
        log_softmax(after[place[index], None], np.array(response[:1])) if response else np.zeros(0)
        for index, response in every
    ]
    longer = sorted((r for r, (_, ids) in enumerate(every) if len(ids) > 1), key=lambda r: -len(every[r][1]))
    lines = []
    for sequence, r in enumerate(longer, len(rows)):
        index, response = every[r]
        context.copy(place[index], sequence)
        lines.append((sequence, response[:-1]))
    targets = np.concatenate([np.zeros(0, np.int64), *(every[r][1][1:] for r in longer)])
    rest, at = np.zeros(len(targets)), 0
    for logits in context.score(lines) if lines else ():
        rest[at : at + len(logits)] = log_softmax(logits, targets[at : at + len(logits)])
        at += len(logits)
    ends = np.cumsum([len(line) for _, line in lines])
    for r, part in zip(longer, np.split(rest, ends[:-1]), strict=True) if longer else ():
        found[r] = np.concatenate([found[r], part])
    return found
