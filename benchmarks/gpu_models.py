"""What the GPU script works on: random models of the shapes of Llama, at most one copy for each of the contestants."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import workloads
from contestants import ours
from machine import ceiling, installed
from peers import Trl, peft_model
from side_by_side import Options, Unavailable
from workloads import ALPHA, POLICY, PREVIOUS, RANK, Lengths

from spa_lite.records import Ids, Row

LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": LLAMA
    | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192}
    | {"tie_word_embeddings": True},
    "8b": LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    | {"tie_word_embeddings": False},
}
TINY = {"vocab_size": 384, "max_position_embeddings": 512}
GIB = 2**30


@dataclass(frozen=True)
class Amounts:
    """How much work the parts do."""

    lengths: Lengths = field(default_factory=Lengths)  # about 200 and 250 tokens
    slots: int = 64  # prompts decoded together, two answers each
    answer: int = 250  # tokens of every answer where none stops
    longest: int = 300  # where some do
    pairs: int = 32  # of a step
    texts: int = 96  # pairs scored
    round: int = 64  # prompts of a round
    capped: int = 32  # prompts of a round under a memory cap
    capped_prompt: int = 1024
    capped_answer: int = 300


FULL = Amounts()
TOYS = Amounts(Lengths(12, 10, 4, 24), 4, 9, 12, 4, 6, 6, 4, 24, 8)


class Bench:
    """Where models lie, and at most one copy for each of the contestants in memory."""

    def __init__(self, options: Options, rounds: int, amounts: Amounts) -> None:
        self.options, self.rounds, self.amounts = options, rounds, amounts
        self.speed: dict[str, float] = {}
        self._loaded: dict[tuple[str, str], Any] = {}

    @property
    def vocabulary(self) -> int:
        """Tokens that a model knows."""
        return int(TINY["vocab_size"] if self.options.quick else LLAMA["vocab_size"])

    @property
    def stops(self) -> range:
        """About one token in 250."""
        return range(self.vocabulary - max(1, self.vocabulary // 250), self.vocabulary)

    def prompts(self, count: int, seed: int = 0) -> list[Ids]:
        """Prompts of mixed length."""
        return workloads.prompts(count, self.vocabulary, self.amounts.lengths, seed)

    def pairs(self, count: int, seed: int = 0) -> list[Row]:
        """Pairs of mixed length."""
        return workloads.pairs(count, self.vocabulary, self.amounts.lengths, seed)

    def base(self, size: str) -> Path:
        """A random model with a generated tokenizer, made where it will run."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        from spa_lite.backends.quiet import quiet
        from tests import tiny

        folder = self.options.folder / size
        if not (folder / "tokenizer.json").exists():
            with quiet(), torch.device(self.options.device):
                torch.manual_seed(0)
                config = tiny.make_config("llama", **(TINY if self.options.quick else SHAPES[size]))
                made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.options.dtype))
            made.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
            made.save_pretrained(folder)
            tiny.make_tokenizer().save_pretrained(folder)
        return folder

    def adapter(self, size: str, name: str) -> Path:
        """An adapter of every linear layer in PEFT's format, made without the weights below it."""
        import torch
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        from safetensors.torch import save_file
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.options.folder / f"{size}-{name}"
        if not (folder / "adapter_model.safetensors").exists():
            wanted = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.base(size)))
                shapes = {k: v.shape for k, v in get_peft_model_state_dict(get_peft_model(empty, wanted)).items()}
            chance = torch.Generator().manual_seed(sum(map(ord, name)))
            made = {
                key: torch.randn(shape, generator=chance) * (0.01 if "lora_B" in key else shape[1] ** -0.5)
                for key, shape in shapes.items()
            }
            folder.mkdir(parents=True, exist_ok=True)
            wanted.save_pretrained(str(folder))
            save_file(made, str(folder / "adapter_model.safetensors"))
        return folder

    def files(self, size: str) -> tuple[Path, Path, Path]:
        """The model, the policy's adapter and the previous one's."""
        return self.base(size), self.adapter(size, POLICY), self.adapter(size, PREVIOUS)

    def ours(self, size: str) -> Any:
        """This program's backend."""
        return self._once("ours", size, lambda: self.wide(ours(self.options, *self.files(size), training=False)))

    def quantised(self, size: str) -> Any:
        """Ours with the weights in 4 bits (in the toys as they are). Raises Unavailable without bitsandbytes."""
        self.forget()
        few = self.options.quick
        if not few and not installed("bitsandbytes"):
            raise Unavailable("bitsandbytes is not installed here")
        policy = self.adapter(size, POLICY)
        backend = self.wide(ours(self.options, self.base(size), policy, training=False, load_in_4bit=not few))
        backend.snapshot()
        return backend

    def wide(self, backend: Any) -> Any:
        """With the batch sizes that the program chooses on CUDA where memory is plenty."""
        score, micro = (256, 128) if self.options.quick else (32768, 16384)
        backend.batching = replace(backend.batching, sample=self.amounts.slots, score_tokens=score, micro_tokens=micro)
        return backend

    def peft(self, size: str) -> Any:
        """The model as transformers and PEFT load it."""
        return self._once("peft", size, lambda: peft_model(self.options, *self.files(size)))

    def trl(self, size: str) -> Trl:
        """TRL's trainer, four pairs at a time, checkpointed as by default."""
        made: Trl = self._once("trl", size, lambda: Trl(self.options, *self.files(size), 4, checkpointed=True))
        return made

    def _once(self, who: str, size: str, load: Callable[[], Any]) -> Any:
        if (who, size) not in self._loaded:
            self.forget(lambda key: key[1] != size)
            self._loaded[who, size] = load()
        return self._loaded[who, size]

    def forget(self, which: Callable[[tuple[str, str]], bool] = lambda key: True) -> None:
        """Free what is loaded."""
        for key in [key for key in self._loaded if which(key)]:
            del self._loaded[key]
        self.tidy()

    def tidy(self) -> None:
        """Give back what PyTorch keeps for later."""
        import torch

        gc.collect()
        if self.options.device != "cpu":
            torch.cuda.empty_cache()

    def least(self, backend: Any, done: str, asked: Sequence[Ids], answer: float, slots: int = 1) -> float:
        """The seconds that work on two answers to each prompt takes at least: see `spa_lite.floor`."""
        from spa_lite.effort import Speed
        from spa_lite.floor import Sizes, Weights, fewest, floor_seconds

        sizes = Sizes(fmean(map(len, asked)), answer, 2, slots, backend.batching.micro_tokens)
        speed = Speed(self.rates()["flops"], self.rates()["bytes"])
        work = fewest(backend.shape, Weights.of(backend.shape, backend.description), done, sizes)
        return len(asked) * floor_seconds(work, speed)

    def least_of(self, backend: Any, done: str, rows: Sequence[Row]) -> float:
        """The same of pairs."""
        mean = fmean(len(response) for row in rows for response in row.responses)
        return self.least(backend, done, [row.prompt for row in rows], mean)

    def rates(self) -> dict[str, float]:
        """What a matrix product and a copy reach on this device, measured once."""
        options = self.options
        self.speed = self.speed or ceiling("torch", options.device, options.dtype, options.quick)
        return self.speed
