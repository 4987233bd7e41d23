"""A Llama-shaped model folder as a GGUF file, tensor by tensor; any other by llama.cpp's own converter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spa_lite import files
from spa_lite.backends import gguf_tokenizer, weights
from spa_lite.backends.gguf_names import heads_of, name_of, permute
from spa_lite.backends.gguf_tokenizer import MEND
from spa_lite.backends.weights import Array, Weight
from spa_lite.errors import ModelError

Dtype = Literal["f32", "f16", "bf16"]
STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""GGUF's dtypes as safetensors calls them."""

COVERED = {"LlamaForCausalLM", "MistralForCausalLM"}
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
ROPES = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
"""Rotary scalings that are written, and what each must say."""
RECOMPUTED = "rotary_emb.inv_freq"
"""End of the names of tensors that older folders hold and nobody reads."""


def why_not(config: Mapping[str, Any]) -> str:
    """Why `write_model` does not cover a model with this config.json, in a sentence; "" if it does."""
    return next(_lacks(config), "")


def _lacks(config: Mapping[str, Any]) -> Iterator[str]:
    name = (config.get("architectures") or ["a model without a named architecture"])[0]
    if name not in COVERED:
        yield f"{name} is not shaped as a Llama"
    if config.get("quantization_config") or config.get("quantization"):
        yield "the model is quantised; only weights of 16 or 32 bits are written"
    missing = [field for field in NEEDED if not isinstance(config.get(field), int)]
    if missing:
        yield f"its config.json does not say {missing[0]}"
    window = config.get("sliding_window")
    if name == "MistralForCausalLM" and window and window < _context(config):
        yield f"its layers attend to {window} tokens only (sliding_window)"
    biases = [field for field in ("attention_bias", "mlp_bias") if config.get(field)]
    if biases:
        yield f"it has biases ({biases[0]})"
    if config.get("hidden_act", "silu") != "silu":
        yield f"its activation is {config['hidden_act']}, not silu"
    rope = rope_of(config)
    if rope["rope_type"] not in ROPES:
        yield f"its rotary scaling is {rope['rope_type']}; {', '.join(ROPES)} are written"
    unsaid = [field for field in ROPES.get(rope["rope_type"], ()) if not isinstance(rope.get(field), int | float)]
    if unsaid:
        yield f"its rotary scaling does not say {unsaid[0]}"
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        yield "only a part of each head is rotated (partial_rotary_factor)"


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings in transformers 5's spelling. Where a config has both, transformers takes the older one."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    rope = dict(found) if isinstance(found, Mapping) else {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope


def write_model(model: Path, out: Path, dtype: Dtype = "f16", name: str | None = None) -> None:
    """Write a model folder as a GGUF file, whole or not at all; vectors stay float32. `name`: what the file calls it.

    Raises ModelError where a part of the model cannot be written so that llama.cpp computes the same.
    """
    import gguf

    config = weights.read_json(model / "config.json")
    if reason := why_not(config):
        raise ModelError(f"{model} cannot be written as GGUF here: {reason}: {MEND}")
    config = _with_defaults(model, config)
    found = _checked(model, config)
    vocabulary = gguf_tokenizer.vocabulary(model, config)
    part = out.with_name(f".{out.name}.tmp")
    writer = gguf.GGUFWriter(part, "llama")
    try:
        _write_settings(writer, config, dtype, name or model.resolve().name)
        gguf_tokenizer.write(writer, vocabulary)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for module, weight in found.items():
            _announce(writer, module, weight, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for module, weight in found.items():
            writer.write_tensor_data(_converted(module, weight, dtype, heads_of(module, config)))
        writer.close()
        files.move(part, out)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def _with_defaults(model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config with what transformers takes where the file says nothing."""
    from transformers import AutoConfig

    from spa_lite.backends.model_folder import fetch

    full = fetch(str(model), "config", lambda: AutoConfig.from_pretrained(model, local_files_only=True)).to_dict()
    said = {key: value for key, value in config.items() if value is not None and key != "rope_scaling"}
    return full | said | {"rope_parameters": full["rope_parameters"]}


def _context(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or 2**30)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_settings(writer: Any, config: Mapping[str, Any], dtype: Dtype, name: str) -> None:
    import gguf

    rope, head_dim = rope_of(config), _head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    kinds = gguf.LlamaFileType
    writer.add_file_type({"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "bf16": kinds.MOSTLY_BF16}[dtype])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """By what each rotary frequency [head_dim / 2] is divided under Llama-3's scaling; None without it.

    Waves longer than the original context are stretched by `factor`, short ones stay, and between them it is blended.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width = _head_dim(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    turns = (rope.get("original_max_position_embeddings") or _context(config)) / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _checked(model: Path, config: Mapping[str, Any]) -> dict[str, Weight]:
    """Module -> weight, in the order of the files. Raises ModelError for one that is missing, misshapen or unknown."""
    shapes = _shapes(config)
    found: dict[str, Weight] = {}
    for path in weights.files_of(model):
        for name, weight in weights.read(path).items():
            module = name.removesuffix(".weight")
            if name.endswith(RECOMPUTED):
                continue
            if not name.endswith(".weight") or module not in shapes:
                raise ModelError(f"{model} holds {name}, for which a Llama has no place: {MEND}")
            if weight.shape != shapes[module] or weight.dtype not in weights.FLOATING:
                raise ModelError(f"{model}: {name} is {weight.dtype} {list(weight.shape)}, not {list(shapes[module])}")
            found[module] = weight
    tied = {"lm_head"} if config.get("tie_word_embeddings") else set()  # where it is there, transformers reads it
    lacking = [module for module in shapes if module not in found and module not in tied]
    if lacking:
        raise ModelError(f"{model} lacks {lacking[0]}.weight: download or save it again")
    return found


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The modules of a Llama with this config, and the shapes of their weights."""
    wide, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * _head_dim(config)
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * _head_dim(config)
    layer = {
        "input_layernorm": (wide,),
        "self_attn.q_proj": (queries, wide),
        "self_attn.k_proj": (keys, wide),
        "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, queries),
        "post_attention_layernorm": (wide,),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (words, wide),
        "model.norm": (wide,),
        "lm_head": (words, wide),
    }
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{module}": shape for module, shape in layer.items()}
    return found


def _stored(weight: Weight, dtype: Dtype) -> str:
    return STORED[dtype] if len(weight.shape) > 1 else "F32"


def _announce(writer: Any, module: str, weight: Weight, dtype: Dtype) -> None:
    import gguf

    kind = _stored(weight, dtype)
    size = math.prod(weight.shape) * np.dtype(weights.FLOATING[kind]).itemsize
    writer.add_tensor_info(
        f"{name_of(module)}.weight", weight.shape, np.dtype(np.uint16), size, gguf.GGMLQuantizationType[kind]
    )


def _converted(module: str, weight: Weight, dtype: Dtype, heads: int | None) -> Array:
    """A weight as llama.cpp wants it, made piece by piece: only one tensor in its final dtype is held."""
    kind = _stored(weight, dtype)
    made = np.empty(weight.shape, dtype=weights.FLOATING[kind])
    for piece in weight.pieces():
        rows = weight.rows(piece)
        made[piece] = weights.fits(module, rows, weights.rounded(rows, kind), kind)
    return np.ascontiguousarray(permute(made, heads)) if heads else made


# llama.cpp's own converters


def by_converter(llama_cpp: Path, model: Path, out: Path, dtype: Dtype, trust_remote_code: bool = False) -> None:
    """Write a GGUF file with convert_hf_to_gguf.py of a checkout of llama.cpp, run by this Python.

    That script runs code which a model brings along, so such a model is refused unless it is trusted.
    """
    brings = [name for name in ("config.json", "tokenizer_config.json") if _has_code(model / name)]
    if brings and not trust_remote_code:
        raise ModelError(f"{model} brings its own code ({brings[0]}): add --trust-remote-code if you trust it")
    _run(llama_cpp / "convert_hf_to_gguf.py", [str(model), "--outfile", str(out), "--outtype", dtype], out)


def lora_by_converter(llama_cpp: Path, adapter: Path, base: Path, out: Path) -> None:
    """Write an adapter (PEFT's format) as a GGUF file with convert_lora_to_gguf.py of a checkout of llama.cpp."""
    _run(llama_cpp / "convert_lora_to_gguf.py", ["--base", str(base), "--outfile", str(out), str(adapter)], out)


def _has_code(path: Path) -> bool:
    return path.is_file() and "auto_map" in weights.read_json(path)


def _run(script: Path, arguments: Sequence[str], out: Path) -> None:
    if not script.is_file():
        raise ModelError(f"{script.parent} is no checkout of llama.cpp: it has no {script.name}")
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | quiet,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0 and out.is_file():
        return
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1][:300] if said else f"exit status {done.returncode}, and nothing said"
    raise ModelError(f"{script.name} of {script.parent} failed: {reason}")
