"""How llama.cpp names a Llama's weights, and in which order it wants their rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROTATED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
"""Modules whose output is rotated, and the setting that says by how many heads."""
IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>.+)")

Weight = TypeVar("Weight", bound=np.generic)


def name_of(module: str) -> str | None:
    """GGUF's name (without `.weight`) of a Llama's module, as `model.layers.3.mlp.up_proj`; None if it has none."""
    found = IN_LAYER.fullmatch(module)
    if not found:
        return WHOLE.get(module)
    name = LAYER.get(found["module"])
    return name and f"blk.{found['layer']}.{name}"


def heads_of(module: str, config: Mapping[str, Any]) -> int | None:
    """By how many heads the rows of a module's weight must be permuted; None if they stay as they are."""
    found = IN_LAYER.fullmatch(module)
    field = ROTATED.get(found["module"]) if found else None
    if field is None:
        return None
    return int(config.get(field) or config["num_attention_heads"])


def permute(weight: NDArray[Weight], heads: int) -> NDArray[Weight]:
    """Rows [out, ...] from transformers' order into llama.cpp's, head by head.

    transformers rotates row i of a head with row i + d/2, llama.cpp neighbours: 0 1 2 3 4 5 becomes 0 3 1 4 2 5.
    Of an adapter only B is permuted.
    """
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
