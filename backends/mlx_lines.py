"""Lines on which several responses follow one prompt, for mlx-lm's models, which take neither positions nor a mask.

All that such a model wants to know of a line, it asks of its cache: where the line begins, what its tokens may see,
and for older keys and values. So a view stands in for the cache; and rotary embeddings are wrapped, to take one
position per token in the place of one per line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

AXES = (4, 5)
"""How many axes a model's attention scores may have; five where it keeps the queries of one key apart (Gemma-2)."""


class View:
    """In the place of a layer's cache: positions [lines, time] that start again, a mask, and nothing kept."""

    def __init__(self, positions: mx.array, mask: mx.array) -> None:
        self.offset, self.mask = positions, mask

    def make_mask(self, *_: Any, **__: Any) -> mx.array:
        """What each token may see. A window is left out: lines are no longer than it (`longest_line`)."""
        return self.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """There is nothing before the line."""
        return keys, values


class Placed(nn.Module):  # type: ignore[misc]  # MLX's modules are Any to mypy
    """A rotary embedding that also takes a position per token [lines, time]: each is then rotated as its own line."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate x [lines, heads, time, width]."""
        if getattr(offset, "ndim", 0) < 2:
            return self.rope(x, offset=offset)
        lines, heads, time, width = x.shape
        each = self.rope(x.transpose(0, 2, 1, 3).reshape(lines * time, heads, 1, width), offset=offset.reshape(-1))
        return each.reshape(lines, time, heads, width).transpose(0, 2, 1, 3)


def views(model: Any, axes: int, positions: mx.array, segments: mx.array) -> list[View]:
    """One view per layer of lines as in `packing.Packed`: positions and segments [lines, time]."""
    own, theirs = segments[:, :, None], segments[:, None, :]
    mask = ((theirs == 0) | (theirs == own)) & mx.tri(segments.shape[1], dtype=mx.bool_)
    return [View(positions, mx.expand_dims(mask, tuple(range(1, axes - 2))))] * len(model.layers)


def longest_line(model: Any, context: int) -> int:
    """The longest line on which a view says all: within the window, where some layers have one."""
    windows = [cache.max_size for cache in make_prompt_cache(model) if "Rotating" in type(cache).__name__]
    return min([2 * context, *windows])


@contextmanager
def placed(model: Any) -> Iterator[None]:
    """Wrap the rotary embeddings of a model, for good unless the block is left by an exception."""
    found = {name: module for name, module in model.named_modules() if name and _rotates(module)}
    _put(model, {name: Placed(module) for name, module in found.items()})
    try:
        yield
    except BaseException:
        _put(model, found)
        raise


def _rotates(module: Any) -> bool:
    call = getattr(type(module), "__call__")  # noqa: B004, B009 - it is the arguments that matter
    return inspect.isfunction(call) and list(inspect.signature(call).parameters)[:3] == ["self", "x", "offset"]


def _put(model: Any, modules: dict[str, Any]) -> None:
    if modules:
        model.update_modules(tree_unflatten(list(modules.items())))
