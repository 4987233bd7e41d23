"""Any Hugging Face causal LM on CPU, CUDA or MPS: one frozen base, one LoRA adapter per role.

Reading order: `local` (what all backends with a real model share), `torch_model` (load, forward), `torch_adapters`
(roles), `torch_sampling`, `torch_scoring`, `torch_training` (one optimizer step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spa_lite.backend import POLICY, Floats, ModelSettings, Optimizer, Sampling
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.local import LocalBackend, by_length
from spa_lite.backends.packing import Packed
from spa_lite.backends.torch_adapters import Adapters
from spa_lite.backends.torch_model import Net, bits_of, count, free_memory, load
from spa_lite.backends.torch_sampling import Decoder, cache_works
from spa_lite.backends.torch_scoring import response_states, to_numpy, token_logprobs
from spa_lite.backends.torch_training import Training
from spa_lite.records import Ids


class TorchBackend(LocalBackend):
    """One model in PyTorch."""

    name = "torch"
    adapters: Adapters

    def __init__(self, settings: ModelSettings) -> None:
        loaded = load(settings)
        tokenizer = ChatTokenizer(
            loaded.tokenizer, settings.model, loaded.eos_ids, template=settings.template, system=settings.system
        )
        self.net = Net(loaded.model, loaded.device)
        adapters = Adapters(loaded.model, settings.model)
        super().__init__(settings, tokenizer, adapters, self.net, loaded.weights_digest)
        self._base_parameters = count(loaded.model.parameters())
        self._dtype = loaded.dtype
        self._cached: bool | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Device, real dtype and bits, parameter counts, and whether a slower way had to be taken."""
        adapter = self._roles.get(POLICY)
        return {
            "device": str(self.net.device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "bits": bits_of(self.settings, self._dtype),
            "architecture": type(self.net.model).__name__,
            "parameters": self._base_parameters,
            "adapter_parameters": count(self.adapters.tensors(adapter).values()) if adapter else 0,
            "attention": getattr(self.net.model.config, "_attn_implementation", None),
            "key_value_cache": "not tried yet" if self._cached is None else self._cached,
            "head": "logits of all positions (slow)" if self.net.whole else "response positions only",
        }

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.net.model.config.to_dict()
        return config

    def machine_checks(self) -> Iterator[tuple[str, bool | None, str]]:
        """Which devices this PyTorch can use."""
        found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found += ["MPS (Apple)"] * torch.backends.mps.is_available()
        yield "a GPU that PyTorch can use", True if found else None, ", ".join(found) or "none: the CPU is used"

    def free_memory(self) -> int | None:
        """Bytes that this backend may still take, on its device."""
        return free_memory(self.net.device)

    def peak_memory(self, reset: bool = False) -> int | None:
        """The most bytes taken so far: what PyTorch counted on CUDA, elsewhere the whole process."""
        device = self.net.device
        if device.type != "cuda":
            return super().peak_memory(reset)
        found = int(torch.cuda.max_memory_allocated(device))
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return found

    def _tidy(self) -> None:
        if self.net.device.type != "cpu":
            (torch.cuda if self.net.device.type == "cuda" else torch.mps).empty_cache()

    def _groups(self, prompts: Sequence[Ids]) -> list[list[int]]:
        if self._cached is None:
            self._cached = cache_works(self.net)
        return by_length(prompts, self.batching.sample)

    def _decoder(self, prompts: Sequence[Ids], keys: Sequence[Sequence[bytes]], sampling: Sampling) -> Decoder:
        return Decoder(self.net, prompts, keys, sampling, self.tokenizer.stop_ids, bool(self._cached))

    @torch.inference_mode()
    def _token_logprobs(self, packed: Packed) -> Floats:
        return to_numpy(token_logprobs(self.net, response_states(self.net, packed), self.net.tensor(packed.targets)))

    def _new_training(self, optimizer: Optimizer, adapter: str) -> Training:
        training = Training(self.net, self._enter, optimizer, self.adapters.tensors(adapter))
        self.adapters.train_only(adapter)
        return training

    def _old_training(self, folder: Path, adapter: str) -> Training | None:
        if not Training.saved_in(folder):
            return None
        training = self._new_training(Training.settings_in(folder), adapter)
        training.restore(folder)
        return training
