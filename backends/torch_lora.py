"""A leaner forward for PEFT's LoRA layers: the same sum in fewer passes over arrays of the output's size.

PEFT multiplies by the scaling, adds and casts one after the other; here the second small product adds itself, scaled,
to what the base layer gave. In 16 bits the adapter, kept in float32, is rounded to the model's precision rather than
the input being widened to the adapter's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's names for its layers on linear layers, of whatever precision."""


def make_lean(layer: BaseTunerLayer) -> None:
    """Give a LoRA layer the lean forward, as far as its adapters are of the plain kind. May be called again."""
    if not isinstance(layer, LoraLayer) or type(layer).__name__ not in LINEAR:
        return
    plain = {name for name in layer.lora_A if _is_plain(layer, name)}
    usual = type(layer).forward

    def forward(x: Tensor, *args: Any, **more: Any) -> Any:
        active = layer.active_adapters
        if layer.merged or args or more or not (layer.disable_adapters or (len(active) == 1 and active[0] in plain)):
            return usual(layer, x, *args, **more)
        return layer.base_layer(x) if layer.disable_adapters else added(layer, x, active[0])

    layer.forward = forward


def added(layer: Any, x: Tensor, name: str) -> Tensor:
    """base(x) + scaling * (x A^T) B^T, for x [..., width]."""
    down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    flat = x.reshape(-1, x.shape[-1])
    small = flat @ down.t().to(x.dtype)
    found = layer.base_layer(flat)
    add = torch.Tensor.addmm_ if type(layer.base_layer) is nn.Linear else torch.addmm  # others may give views
    return add(found, small, up.t().to(x.dtype), alpha=scale).view(*x.shape[:-1], -1)


def _is_plain(layer: Any, name: str) -> bool:
    """Neither dropout nor a bias of its own, nor one of PEFT's variants (DoRA, ...)."""
    dropout = isinstance(layer.lora_dropout[name], nn.Identity)
    return dropout and not layer.lora_bias.get(name) and name not in getattr(layer, "lora_variant", {})
