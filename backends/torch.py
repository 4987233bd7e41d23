"""Any Hugging Face causal LM on CPU, CUDA or MPS: one frozen base, one LoRA adapter per role.

Reading order: `local` (what all backends with a real model share), `torch_model` (load, forward), `torch_attention`,
`torch_adapters` (roles), `torch_lora`, `torch_sampling`, `torch_decode`, `torch_scoring`, `torch_training` (one
optimizer step).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spa_lite.backend import POLICY, Floats, ModelSettings, Optimizer, Sampling
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.decoding import Decoding
from spa_lite.backends.local import LocalBackend, by_length
from spa_lite.backends.torch_adapters import Adapters
from spa_lite.backends.torch_decode import Capture, Graphs, SlotDecoder, Slots, Way, best_way, slots_needed
from spa_lite.backends.torch_model import Net, bits_of, count, free_memory, load
from spa_lite.backends.torch_sampling import Decoder
from spa_lite.backends.torch_scoring import score
from spa_lite.backends.torch_training import Training
from spa_lite.records import Ids, Row

FEW = 16
"""On a CPU, slots for fewer prompts than this are refilled, so that matrix products do not get too small. More are not:
a new answer among old ones costs as much attention as the longest, which is as dear there as the products."""


class TorchBackend(LocalBackend):
    """One model in PyTorch."""

    name = "torch"
    adapters: Adapters
    net: Net

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
        self._way: Way | None = None
        self._graphs = Graphs(Capture()) if loaded.device.type == "cuda" else None
        self._slots: Slots | None = None
        self._entered: str | None = None
        self._listed: tuple[str | None, list[torch.Tensor]] = (None, [])

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
            "attention": self.net.attention + ", long lines response by response" * (self.net.split_from is not None),
            "prompt": f"once per response ({self.net.apart})" if self.net.apart else "once per row",
            "key_value_cache": self._way or "not tried yet",
            "decoding": self._decoding,
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

    @property
    def _decoding(self) -> str:
        if self._graphs is None:
            return "step by step"
        return f"step by step (no CUDA graph: {self._graphs.failed})" if self._graphs.failed else "CUDA graph"

    def _best_way(self) -> Way:
        """How this model decodes, found out by trying once."""
        self._way = self._way or best_way(self.net)
        return self._way

    def _groups(self, prompts: Sequence[Ids], sampling: Sampling) -> list[list[int]]:
        size, slots = self.batching.sample, self._best_way() == "slots"
        if slots and (self.net.device.type != "cpu" or size < FEW):
            return [list(range(len(prompts)))]
        return by_length(prompts, size, self.context if slots else self.context - sampling.max_tokens)

    def _decoder(
        self, prompts: Sequence[Ids], keys: Sequence[Sequence[bytes]], sampling: Sampling, keep: bool
    ) -> Decoding:
        ends = self.tokenizer.stop_ids
        way = self._best_way()
        if way != "slots":
            return Decoder(self.net, prompts, keys, sampling, ends, keep, way == "padded")
        slots = self._slots_for(prompts, len(keys[0]), sampling, keep)
        return SlotDecoder(slots, prompts, keys, sampling, ends, self._graphs, self._whereabouts)

    def _slots_for(self, prompts: Sequence[Ids], n: int, sampling: Sampling, keep: bool) -> Slots:
        """Slots for this call; where graphs are captured for them, the same for later calls."""
        length = slots_needed(self.net, prompts, sampling)
        if self._graphs is None:
            return Slots(self.net, n * min(self.batching.sample, len(prompts)), length, keep)
        count = n * self.batching.sample
        if self._slots is None or not self._slots.fit(count, length, keep):
            self._forget_slots()
            self._slots = Slots(self.net, count, length, keep)
        return self._slots

    def _forget_slots(self) -> None:
        """Give their memory back, and that of the graphs."""
        self._slots = None
        if self._graphs is not None:
            self._graphs.enter(None)

    def _enter(self, role: str) -> None:
        super()._enter(role)
        self._entered = self._adapter(role)

    def _whereabouts(self) -> Hashable:
        """Which adapter is in use, and where it lies: a CUDA graph reads it there."""
        name = self._entered
        if name != self._listed[0]:
            self._listed = name, list(self.adapters.tensors(name).values()) if name else []
        return name, tuple(tensor.data_ptr() for tensor in self._listed[1])

    def _token_logprobs(self, rows: Sequence[Row]) -> Floats:
        self._forget_slots()
        return score(self.net, rows)

    def _new_training(self, optimizer: Optimizer, adapter: str) -> Training:
        self._forget_slots()
        training = Training(self.net, self._enter, optimizer, self.adapters.tensors(adapter))
        self.adapters.train_only(adapter)
        return training

    def _old_training(self, folder: Path, adapter: str) -> Training | None:
        if not Training.saved_in(folder):
            return None
        training = self._new_training(Training.settings_in(folder), adapter)
        training.restore(folder)
        return training
