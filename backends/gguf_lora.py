"""A LoRA adapter as a GGUF file, which llama.cpp applies to a model of Llama's shape. Knows PEFT's form of it.

| in     | PEFT                              | GGUF                             |
| ------ | --------------------------------- | -------------------------------- |
| A      | M + `.lora_A.weight` [r, in]      | N + `.weight.lora_a` [r, in]     |
| B      | M + `.lora_B.weight` [out, r]     | N + `.weight.lora_b` [out, r]    |
| effect | W x + scale · B A x               | W x + alpha / r · B A x          |

M is `model.layers.3.self_attn.q_proj` where N is `blk.3.attn_q`. GGUF holds the queries' and keys' rows in another
order (see `gguf_names.permute`), so B's rows are put into it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_lite.backends.adapter_files import Stored, check_plain, modules, scale_of
from spa_lite.backends.gguf_names import heads_of, name_of, permute
from spa_lite.errors import ModelError

ARCHITECTURE = "llama"


def write_lora(stored: Stored, config: Mapping[str, Any], out: Path) -> None:
    """Write an adapter (arrays that NumPy can read) to the file `out`, float32. The same adapter gives the same bytes.

    `config` is the base's as transformers has it: num_attention_heads, num_key_value_heads, num_hidden_layers and,
    if it is there, tie_word_embeddings. Raises ModelError for what GGUF or llama.cpp cannot hold.
    """
    import gguf

    tensors = gguf_tensors(stored, config)
    writer = gguf.GGUFWriter(str(out), ARCHITECTURE)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale_of(stored.config) * stored.config.get("r", 8))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def gguf_tensors(stored: Stored, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The adapter's matrices by GGUF name, in GGUF's order of rows. Raises ModelError as `write_lora` does."""
    check_plain(stored, "a GGUF adapter")
    rank, found = stored.config.get("r", 8), {}
    if scale_of(stored.config) == 0:
        raise ModelError(f"{stored.name} has a lora_alpha of 0, which llama.cpp reads as 1 / rank: use the bare model")
    for module, (a, b) in modules(stored).items():
        if a.shape[0] != rank:
            raise ModelError(f"{stored.name} has rank {rank}, but {a.shape[0]} in {module}: a GGUF adapter has one")
        rows, heads = np.asarray(b, dtype=np.float32), heads_of(module, config)
        if heads and len(rows) % (2 * heads):
            raise ModelError(f"{stored.name}: {module} has {len(rows)} outputs, which are no {heads} heads")
        name = f"{_name(module, config, stored.name)}.weight"
        found[f"{name}.lora_a"] = np.ascontiguousarray(a, dtype=np.float32)
        found[f"{name}.lora_b"] = np.ascontiguousarray(permute(rows, heads) if heads else rows)
    return found


def _name(module: str, config: Mapping[str, Any], owner: str) -> str:
    """What GGUF calls a linear layer of Llama. Raises ModelError for what is none; `owner` is for the message."""
    name = name_of(module)
    layer, _, kind = (name or "").removeprefix("blk.").partition(".")
    if name is None or (not kind and (name != "output" or config.get("tie_word_embeddings"))):
        raise ModelError(f"{owner} adapts {module}, which is no linear layer that a GGUF adapter of Llama may name")
    if kind and int(layer) >= int(config["num_hidden_layers"]):
        raise ModelError(f"{owner} adapts {module}, but the base has only {config['num_hidden_layers']} layers")
    return name
