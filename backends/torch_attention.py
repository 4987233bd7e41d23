"""Attention over lines of one prompt and several responses, without computing what the mask would hide.

On a CPU a masked attention costs the whole square. Here a long line is taken apart: the prompt with its first response
is plainly causal, and each further response looks at the prompt and itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from spa_lite.backends.packing import Packed

NAME = "spa_lite_by_response"
LONG = 320
"""Tokens from which on that pays: on shorter lines the many small calls cost more than the square."""


def by_response(model: Any) -> bool:
    """Make a model attend in this way wherever a mask says how (`with_parts`), if it lets its attention be chosen."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, KeyError, AttributeError):
        return False
    return model.config._attn_implementation == NAME


def with_parts(mask: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """The mask [L, 1, W, W], carrying the lengths of each line's parts and the masks of its further responses."""
    lines = []
    for segments in packed.segments:
        first, *sizes = [int((segments == number).sum()) for number in range(int(segments.max()) + 1)]
        lines.append((first, sizes, [_mask(first, size, dtype) for size in sizes[1:]]))
    mask.parts = lines  # type: ignore[attr-defined]
    return mask


def _mask(prompt: int, size: int, dtype: torch.dtype) -> Tensor:
    """Additive [size, prompt + size]: everything in the prompt, and what came before in the response."""
    seen = torch.ones(size, prompt + size, dtype=torch.bool).tril(prompt)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [L, heads, W, width] to [L, W, heads, width]."""
    lines = getattr(attention_mask, "parts", None)
    if lines is None or more.get("position_bias") is not None:
        found: tuple[Tensor, None] = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **more)
        return found
    scale = more.get("scaling")
    each = zip(query, key, value, lines, strict=True)
    return torch.stack([_line(q, k, v, line, scale) for q, k, v, line in each]).transpose(1, 2), None


def _line(query: Tensor, key: Tensor, value: Tensor, line: Any, scale: float | None) -> Tensor:
    """One line, [heads, W, width]."""
    prompt, sizes, masks = line
    parts = [prompt, *sizes, query.shape[1] - prompt - sum(sizes)]
    asked = query.split([prompt + sizes[0], *parts[2:]], dim=1)
    keys, values = key.split(parts, dim=1), value.split(parts, dim=1)
    found = []
    for number, (one, mask) in enumerate(zip(asked[:-1], [None, *masks], strict=True), 1):
        both = torch.cat([keys[0], keys[number]], dim=1), torch.cat([values[0], values[number]], dim=1)
        found.append(
            scaled_dot_product_attention(
                one[None], both[0][None], both[1][None], mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )[0]
        )
    return torch.cat([*found, torch.zeros_like(asked[-1])], dim=1)
