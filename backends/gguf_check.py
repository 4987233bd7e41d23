"""A GGUF file read back: its weights against what was meant, and its vocabulary against the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa_lite.backends import weights
from spa_lite.backends.adapter_files import Stored, modules, scale_of
from spa_lite.backends.gguf_names import heads_of, name_of, permute
from spa_lite.backends.merging import Sums, Survival, sums
from spa_lite.errors import ModelError
from spa_lite.records import Ids

STEPS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
"""By how much, of itself, a number may move when it is rounded."""
TINY = 2.0**-24
"""Numbers this small are not normal in float16, and move by up to this."""


def read_back(file: Path, merged: Path, stored: Stored) -> tuple[int, Survival]:
    """How many tensors of a Llama-shaped model are in the file as they are in the merged folder (float32), and what of
    the adapter's change is.

    Raises ModelError naming the first tensor that differs by more than rounding.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = weights.read_json(merged / "config.json")
    there = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    pairs, scale = modules(stored), np.float32(scale_of(stored.config))
    count, found = 0, Sums()
    for path in weights.files_of(merged):
        for name, weight in weights.read(path).items():
            module = name.removesuffix(".weight")
            tensor = there.get(f"{name_of(module)}.weight")
            if tensor is None:
                continue
            heads = heads_of(module, config)
            order = np.arange(weight.shape[0])
            places = np.argsort(permute(order[:, None], heads)[:, 0]) if heads else order
            kind = tensor.tensor_type.name
            for piece in weight.pieces():
                meant = weight.rows(piece)
                real = dequantize(tensor.data[places[piece]], tensor.tensor_type).reshape(meant.shape)
                if kind in STEPS and not np.allclose(real, meant, rtol=STEPS[kind], atol=TINY if STEPS[kind] else 0):
                    raise ModelError(
                        f"{file.name} holds {tensor.name} otherwise than {name} was meant: the file is wrong"
                    )
                if module in pairs:
                    wanted = scale * np.asarray(pairs[module][1][piece] @ pairs[module][0], dtype=np.float32)
                    found += sums(real - meant + wanted, wanted)
            count += 1
    return count, found.survival()


def read_lora_back(file: Path, stored: Stored, config: Any) -> int:
    """How many matrices of an adapter are in the file exactly as they were meant. Raises ModelError if one is not."""
    from gguf import GGUFReader

    from spa_lite.backends.gguf_lora import gguf_tensors

    meant = gguf_tensors(stored, config)
    there = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    for name, tensor in meant.items():
        if name not in there or not np.array_equal(there[name], tensor):
            raise ModelError(f"{file.name} does not hold {name} as it was meant: the file is wrong")
    if there.keys() - meant.keys():
        raise ModelError(
            f"{file.name} holds {min(there.keys() - meant.keys())}, which was not meant: the file is wrong"
        )
    return len(meant)


def tokenised(vocabulary: Any, texts: Sequence[str]) -> list[Ids]:
    """What llama.cpp makes of texts in which special tokens are tokens, with the BOS that the file asks for.

    `vocabulary` is llama.cpp's own, of a loaded model.
    """
    import llama_cpp.llama_cpp as api

    found = []
    for text in texts:
        data = text.encode()
        ids = (api.llama_token * (len(data) + 8))()
        count = api.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
        found.append(tuple(ids[: max(0, count)]))
    return found
