"""What matters of a model for estimates, from its `config.json` alone: sizes, and the layers an adapter is put on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spa_lite.errors import ModelError

KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocabulary": ("vocab_size",),
}
"""What must be there, under one of the names that architectures have for it."""
MAY_BE = {
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "context": ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"),
}
MIXTURES = ("num_local_experts", "num_experts", "n_routed_experts")
PLAIN_MLP = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "phi", "opt", "starcoder2", "falcon", "bloom"}
"""Two matrices where the others have three (a gate)."""
TIED = {
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "opt",
    "cohere",
    "cohere2",
    "starcoder2",
    "smollm3",
}
"""The head is the embedding where the config does not say."""
POSITIONS = {"gpt2", "gpt_neo", "opt"}
"""A learned vector per position."""

SEPARATE = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
LLAMA = SEPARATE | {"output": "self_attn.o_proj"} | MLP
NAMES: dict[str, dict[str, str]] = {
    "phi3": {"query+key+value": "self_attn.qkv_proj", "output": "self_attn.o_proj"}
    | {"gate+up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
    "gpt_neox": {"query+key+value": "attention.query_key_value", "output": "attention.dense"}
    | {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    "gpt2": {"query+key+value": "attn.c_attn", "output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "gpt_neo": {
        part: f"attn.attention.{name}"
        for part, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}.items()
    }
    | {"up": "mlp.c_fc", "down": "mlp.c_proj"},
    "phi": SEPARATE | {"output": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
    "starcoder2": SEPARATE | {"output": "self_attn.o_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
}
"""The linear layers of a block, where they are not named as Llama's are; a sum is several in one matrix."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer."""

    kind: str  # transformers' model_type
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding
    gated: bool  # the MLP has a gate
    context: int  # longest sequence, in tokens

    @property
    def queries(self) -> int:
        """Width of a token's queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> (inputs, outputs)."""
        h, m = self.hidden, self.intermediate
        sizes = {
            "query": (h, self.queries),
            "key": (h, self.keys),
            "value": (h, self.keys),
            "output": (self.queries, h),
            "gate": (h, m if self.gated else 0),
            "up": (h, m),
            "down": (m, h),
        }
        found = {}
        for parts, name in NAMES.get(self.kind, LLAMA).items():
            of = [sizes[part] for part in parts.split("+")]
            found[name] = (of[0][0], sum(outputs for _, outputs in of))
        return {name: size for name, size in found.items() if size[1]}

    @property
    def body(self) -> int:
        """Parameters of the blocks, norms included, biases not."""
        return self.layers * (sum(i * o for i, o in self.linear.values()) + 2 * self.hidden) + self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding, and of learned positions."""
        return (self.vocabulary + (self.context if self.kind in POSITIONS else 0)) * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the output head; 0 where it is the embedding."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.body + self.embedding + self.head

    def adapter(self, rank: int, targets: Sequence[str] = ("all-linear",)) -> int:
        """Parameters of a LoRA adapter. Raises ModelError for a target that names no linear layer."""
        size = 0
        head = {} if self.tied else {"lm_head": (self.hidden, self.vocabulary)}
        named = {f"layers.{name}": io for name, io in self.linear.items()} | head
        for target in targets:
            if target != "all-linear" and not any(_is_named(name, target) for name in named):
                kinds = ", ".join(sorted({name.rpartition(".")[2] for name in named}))
                raise ModelError(f"no linear layer of this model is named {target!r}: it has {kinds}")
        for name, (inputs, outputs) in named.items():
            every = "all-linear" in targets and name != "lm_head"
            if every or any(_is_named(name, target) for target in targets):
                size += rank * (inputs + outputs) * (1 if name == "lm_head" else self.layers)
        return size


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a transformers `config.json`. Raises ModelError naming what is missing or cannot be estimated."""
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else config
    kind = str(text.get("model_type") or config.get("model_type") or "unknown")
    must = {name: _number(text, keys) for name, keys in KEYS.items()}
    for name, value in must.items():
        if value is None:
            raise ModelError(f"the config of this {kind} model has no {KEYS[name][0]}, so its size is unknown")
    if any((_number(text, (key,)) or 0) > 1 for key in MIXTURES):
        raise ModelError(f"this {kind} model is a mixture of experts, whose size is not estimated")
    sizes = {name: value for name, value in must.items() if value is not None}
    may = {name: _number(text, keys) for name, keys in MAY_BE.items()}
    gated = kind not in PLAIN_MLP
    if may["intermediate"] is None and gated:
        raise ModelError(f"the config of this {kind} model has no {MAY_BE['intermediate'][0]}, so its size is unknown")
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return Shape(
        kind=kind,
        **sizes,
        intermediate=may["intermediate"] or 4 * sizes["hidden"],
        kv_heads=may["kv_heads"] or sizes["heads"],
        head_dim=may["head_dim"] or sizes["hidden"] // sizes["heads"],
        tied=kind in TIED if tied is None else bool(tied),
        gated=gated,
        context=may["context"] or 2**20,
    )


def _number(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """The first positive whole number under one of the keys."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
