"""What every backend asks of its callers, in one place and in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from spa_lite.errors import BackendError, ModelError
from spa_lite.records import Ids, Row


def check_prompts(prompts: Sequence[Ids], n: int, keys: Sequence[Sequence[bytes]], context: int) -> None:
    """Each prompt leaves room for an answer and has n keys."""
    if len(keys) != len(prompts):
        raise BackendError(f"there are {len(keys)} lists of keys for {len(prompts)} prompts")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ModelError(f"prompt {index} has {len(prompt)} tokens; this model takes 1 to {context - 1}")
        if len(keys[index]) != n:
            raise BackendError(f"prompt {index} has {len(keys[index])} keys for {n} samples")


def check_rows(rows: Sequence[Row], context: int, vocabulary: int) -> None:
    """Each row has a prompt and a response, and fits the model. MLX would read beyond its table without a word."""
    for index, row in enumerate(rows):
        if not row.prompt or not row.responses:
            raise ModelError(f"row {index} needs at least one prompt token and one response")
        if longest(row) > context:
            raise ModelError(f"row {index} has {longest(row)} tokens; this model takes {context}: shorten it")
        most = max(max(ids, default=0) for ids in (row.prompt, *row.responses))
        if most >= vocabulary:
            raise ModelError(f"row {index} holds token id {most}; this model knows ids below {vocabulary}")


def longest(row: Row) -> int:
    """Tokens of the row's longest sequence, prompt included."""
    return len(row.prompt) + max((len(response) for response in row.responses), default=0)
