"""Tiny random models of several architectures, made on the spot, with a generated tokenizer and a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 384
SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

EXTRA_ENDS = tuple(range(320, 344))
ARCHITECTURES = ("llama", "qwen2", "mistral", "gemma2", "phi3", "gpt_neox", "gpt2", "gpt_neo")
"""Grouped queries, biases, sliding windows, soft-capped logits, fused layers, partial rotary, Conv1D, local windows."""
KINDS = {"llama3": "llama", "smollm2": "llama", "yarn": "llama", "mistral-full": "mistral", "gemma2-full": "gemma2"}
"""Shapes that are an architecture with other settings."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Llama-3's rotary scaling, for so short an original length that it changes the first few tokens."""
NARROW: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}
"""A smaller model: MLX multiplies matrices slowly where only its own library does it."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def sentences(count: int = 1500, seed: int = 0) -> Iterator[str]:
    """Made-up English to train a tokenizer on."""
    rng = random.Random(seed)
    who = ["the baker", "a heron", "my sister", "the last train", "an old map", "this engine"]
    does = ["carries", "forgets", "paints", "measures", "answers", "mends"]
    what = ["the blue door", "seven plums", "a quiet song", "the long bridge", "nothing at all", "two letters"]
    for _ in range(count):
        yield f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}{rng.choice(['.', '?', '!'])}"


def make_tokenizer(
    specials: list[str] | None = None,
    template: str | None = TEMPLATE,
    bos: str | None = "<|bos|>",
    eos: str | None = "<|end|>",
    adds_bos: bool = False,
) -> Any:
    """A byte-level BPE tokenizer with the given special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = specials if specials is not None else SPECIALS
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences(), trainer)
    if adds_bos and bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def make_config(architecture: str, **changes: Any) -> Any:
    """2 layers, 4 heads, and a hidden size of 64, or of 32 for the shapes that only MLX is tested on."""
    from transformers import AutoConfig

    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    wide = {"intermediate_size": 96, "initializer_range": 0.15}
    narrow = shape | NARROW | {"num_key_value_heads": 2}
    soft = {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
    special: dict[str, dict[str, Any]] = {
        "llama": shape | wide | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        "qwen2": shape | wide | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "mistral": shape | wide | {"num_key_value_heads": 2, "sliding_window": 12},
        "gemma2": shape | wide | soft | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12},
        "phi3": shape | wide | {"num_key_value_heads": 2, "original_max_position_embeddings": 256},
        "gpt_neox": shape | wide,
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.15},
        "gpt_neo": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 256,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 12,
            "initializer_range": 0.15,
        },
        "llama3": narrow | {"head_dim": 16, "rope_parameters": dict(LLAMA3)},
        "smollm2": narrow | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        "qwen3": narrow | {"head_dim": 16},
        "mistral-full": narrow | {"sliding_window": None},
        "gemma2-full": narrow | soft | {"head_dim": 16, "sliding_window": 256},
        "granite": narrow | {"logits_scaling": 2.0, "embedding_multiplier": 1.5, "attention_multiplier": 0.3},
        "yarn": narrow | {"head_dim": 16, "rope_parameters": dict(YARN)},
    }
    kind = KINDS.get(architecture, architecture)
    return AutoConfig.for_model(kind, **common | special[architecture] | changes)


def make_model(folder: Path, architecture: str = "llama", seed: int = 0, uneven: bool = False, **changes: Any) -> Path:
    """Save a random model of that architecture, its config changed, with its tokenizer; return the folder.

    Its generation config names many end tokens besides the tokenizer's own, so that answers are short. `uneven`:
    norms and biases are random too, which a fresh model leaves at one and zero.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from spa_lite.backends.quiet import quiet

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(architecture, **changes), dtype=torch.float32)
        for parameter in model.parameters() if uneven else ():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, *EXTRA_ENDS], pad_token_id=0)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


def make_gguf(folder: Path, architecture: str = "llama", dtype: Any = "f32", **changes: Any) -> Path:
    """Such a model of Llama's shape in a folder, and as a GGUF file in it; return the file.

    A GGUF file names one end token, so that one is made likely.
    """
    import safetensors.numpy as safetensors

    from spa_lite.backends.gguf_writer import write_model

    out = folder / "gguf" / f"{architecture}-{dtype}.gguf"
    if not (folder / "model.safetensors").is_file():
        make_model(folder, architecture, **changes)
        tensors = safetensors.load_file(folder / "model.safetensors")
        head = tensors["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"]
        head[2] *= 4
        safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    out.parent.mkdir(exist_ok=True)
    write_model(folder, out, dtype)
    return out


def make_adapter(model: Path, folder: Path, seed: int = 0, rank: int = 4, size: float = 0.1, **config: Any) -> Path:
    """An adapter in PEFT's format on all linear layers of a Llama-shaped model, of toy numbers; return its folder."""
    import numpy as np
    import safetensors.numpy as safetensors

    from spa_lite.backends import adapter_files

    rng, tensors = np.random.default_rng(seed), {}
    for name, weight in sorted(safetensors.load_file(model / "model.safetensors").items()):
        if name.endswith("_proj.weight"):
            module = adapter_files.PREFIX + name.removesuffix(".weight")
            for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                tensors[f"{module}.lora_{side}.weight"] = rng.normal(0, size, shape).astype(np.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8.0, "target_modules": targets}
    adapter_files.write_peft(folder, plain | config, tensors, model.name)
    return folder
