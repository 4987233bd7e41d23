"""What the benchmarks work on: a random Llama, its adapters, and pairs of token ids whose lengths are mixed as in life.

Everything is made from fixed seeds. Models and adapters are saved into a folder in the ordinary formats, so that all
contestants read the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spa_lite.records import Ids, Row

sys.path.insert(0, str(Path(__file__).parent.parent))

LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""38 million parameters."""
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 384, "max_position_embeddings": 256}
"""What --quick takes: the tests' tiny model."""
RANK, ALPHA, BETA = 16, 32.0, 0.1
POLICY, PREVIOUS = "policy", "previous"


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: about the mean, lognormal, from `least` to `most`."""

    prompt: float = 200
    answer: float = 250
    least: int = 8
    most: int = 512
    spread: float = 0.55  # standard deviation of the logarithm


QUICK = Lengths(prompt=12, answer=16, least=4, most=32)


def model(folder: Path, quick: bool = False, **changes: Any) -> Path:
    """The random Llama with a generated tokenizer; made once a folder."""
    from tests import tiny

    shape = (SMALL if quick else LLAMA) | changes
    place = folder / ("small" if quick else "llama")
    if not (place / "config.json").exists():
        tiny.make_model(place, "llama", **({} if quick else {"initializer_range": 0.02}) | shape)
    return place


def adapter(folder: Path, base: Path, name: str) -> Path:
    """A LoRA adapter of every linear layer in PEFT's format, none of its parts zero: the name is its seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    place = folder / f"{base.name}-{name}"
    if not (place / "adapter_config.json").exists():
        wanted = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, name)))
            made = get_peft_model(plain_model(base), wanted)
            for key, parameter in made.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=0.01)
        made.save_pretrained(place)
    return place


def model_and_adapters(folder: Path, quick: bool) -> tuple[Path, Path, Path]:
    """The random Llama, the policy's adapter and the previous one's."""
    base = model(folder, quick)
    return base, adapter(folder, base, POLICY), adapter(folder, base, PREVIOUS)


def plain_model(base: Path, options: Any = None) -> Any:
    """The model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    from spa_lite.backends.quiet import quiet

    with quiet():
        made = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, options.dtype if options else "float32"))
    return made.to(options.device if options else "cpu")


def sizes(count: int, mean: float, lengths: Lengths, rng: Any) -> list[int]:
    """Lengths in random order. They are the quantiles of the distribution, so that few have the spread of many."""
    from statistics import NormalDist

    shares = (np.arange(count) + 0.5) / count
    logs = np.log(mean) - lengths.spread**2 / 2 + lengths.spread * np.array([NormalDist().inv_cdf(s) for s in shares])
    return [int(size) for size in rng.permutation(np.clip(np.exp(logs).round(), lengths.least, lengths.most))]


def scale(quick: bool) -> tuple[int, Lengths]:
    """Vocabulary and lengths: the random Llama's, or what --quick takes."""
    return (SMALL["vocab_size"], QUICK) if quick else (LLAMA["vocab_size"], Lengths())


def prompts(count: int, vocabulary: int, lengths: Lengths, seed: int = 0) -> list[Ids]:
    """Random ids that end nothing."""
    rng = np.random.default_rng(seed)
    return [ids(size, vocabulary, rng) for size in sizes(count, lengths.prompt, lengths, rng)]


def pairs(count: int, vocabulary: int, lengths: Lengths, seed: int = 0) -> list[Row]:
    """Prompts with two answers each, the chosen one first."""
    rng = np.random.default_rng(seed)
    asked = [ids(size, vocabulary, rng) for size in sizes(count, lengths.prompt, lengths, rng)]
    answers = [ids(size, vocabulary, rng) for size in sizes(2 * count, lengths.answer, lengths, rng)]
    return [Row(prompt=p, responses=(answers[2 * i], answers[2 * i + 1])) for i, p in enumerate(asked)]


def ids(size: int, vocabulary: int, rng: Any) -> Ids:
    """Random ids, none of which ends an answer."""
    from tests import tiny

    usual = [*range(6, tiny.EXTRA_ENDS[0]), *range(tiny.EXTRA_ENDS[-1] + 1, vocabulary)]
    return tuple(int(token) for token in rng.choice(usual, size))


def described(rows: Sequence[Row]) -> str:
    """How long the work is, in words."""
    asked = [len(row.prompt) for row in rows]
    answers = [len(response) for row in rows for response in row.responses]
    return (
        f"{len(rows)} pairs; prompts of {min(asked)} to {max(asked)} tokens (mean {np.mean(asked):.0f}), answers of "
        f"{min(answers)} to {max(answers)} (mean {np.mean(answers):.0f})"
    )


def described_step(rows: Sequence[Row]) -> str:
    """The model and the work of one optimizer step, in words."""
    return (
        "A random Llama of 38 million parameters (10 layers of 512, vocabulary 8,192), LoRA of rank 16 on every "
        f"linear layer, one optimizer step (learning rate 0, so that all goes are the same) on {described(rows)}."
    )
