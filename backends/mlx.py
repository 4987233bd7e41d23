"""What mlx-lm loads, on Apple silicon or on a Linux CPU: one frozen base, one LoRA adapter per role.

Reading order: `local` (what all backends with a real model share), `mlx_model` (load, forward), `mlx_adapters`
(roles), `mlx_lines` (several responses after one prompt), `mlx_head` (log-probs in tiles), `mlx_sampling`,
`mlx_scoring`, `mlx_training` (one optimizer step), `mlx_device` and `mlx_checks` (what only the machine knows).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from spa_lite.backend import POLICY, PREVIOUS, Floats, ModelSettings, Optimizer, Sampling
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.local import LocalBackend, by_length
from spa_lite.backends.mlx_adapters import Adapters
from spa_lite.backends.mlx_checks import checks
from spa_lite.backends.mlx_device import advice, device_in_use, free_memory
from spa_lite.backends.mlx_model import Net, load
from spa_lite.backends.mlx_sampling import Decoder, Way, best_way
from spa_lite.backends.mlx_scoring import row_logprobs
from spa_lite.backends.mlx_training import STATE, Training, settings_in
from spa_lite.records import Ids, Row


class MlxBackend(LocalBackend):
    """One model in MLX."""

    name = "mlx"
    adapters: Adapters
    net: Net

    def __init__(self, settings: ModelSettings) -> None:
        loaded = load(settings)
        tokenizer = ChatTokenizer(
            loaded.tokenizer, settings.model, loaded.eos_ids, template=settings.template, system=settings.system
        )
        adapters = Adapters(loaded.model, settings.model)
        super().__init__(settings, tokenizer, adapters, Net(loaded), loaded.weights_digest)
        self._loaded = loaded
        self._way: Way | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Device, real dtype and bits, parameter counts, and whether a slower way had to be taken."""
        adapter = self._roles.get(POLICY)
        tree = self.adapters.held[adapter].tree if adapter else {}
        return {
            "device": device_in_use(),
            "dtype": str(self._loaded.dtype).removeprefix("mlx.core."),
            "bits": self._loaded.bits,
            "architecture": type(self.net.model).__module__.rpartition(".")[2],
            "parameters": self._loaded.parameters,
            "adapter_parameters": sum(array.size for array in tree.values()),
            "prompts_share_a_batch": self._way or "not tried yet",
            "prompt": "once per row" if self.net.shared else f"once per response ({self.net.alone})",
            "head": "logits of all positions (slow)" if self.net.whole else "response positions only",
            "limits": "; ".join(self._loaded.notes) or "none",
        }

    @property
    def advice(self) -> tuple[str, ...]:
        """What a user should know before a long run."""
        return (*self._loaded.notes, *advice())

    @property
    def _config(self) -> dict[str, Any]:
        return self._loaded.config

    def machine_checks(self) -> Iterator[tuple[str, bool | None, str]]:
        """Whether Metal agrees with the CPU, and whether the CPU's matrix library is the fast one."""
        return checks(self, self.net)

    def free_memory(self) -> int | None:
        """Bytes that this backend may still take."""
        return free_memory(device_in_use())

    def peak_memory(self, reset: bool = False) -> int | None:
        """The most bytes that MLX has held."""
        found = int(mx.get_peak_memory())
        if reset:
            mx.reset_peak_memory()
        return found

    def _best_way(self) -> Way:
        """How this model decodes, found out by trying once."""
        self._way = self._way or best_way(self.net)
        return self._way

    def _groups(self, prompts: Sequence[Ids], sampling: Sampling) -> list[list[int]]:
        if self._best_way() == "padded":
            return [list(range(len(prompts)))]
        return by_length(prompts, self.batching.sample, self.context - sampling.max_tokens, equal=True)

    def _decoder(
        self, prompts: Sequence[Ids], keys: Sequence[Sequence[bytes]], sampling: Sampling, keep: bool
    ) -> Decoder:
        slots = self.batching.sample * len(keys[0])
        return Decoder(self.net, prompts, keys, sampling, self.tokenizer.stop_ids, self._best_way(), slots, keep)

    def _token_logprobs(self, rows: Sequence[Row]) -> Floats:
        return row_logprobs(self.net, rows)

    def _new_training(self, optimizer: Optimizer, adapter: str) -> Training:
        return Training(self.net, self.adapters, optimizer, adapter, lambda: self._adapter(PREVIOUS))

    def _old_training(self, folder: Path, adapter: str) -> Training | None:
        if not (folder / STATE).is_file():
            return None
        training = self._new_training(settings_in(folder), adapter)
        training.restore(folder)
        return training

    def _tidy(self) -> None:
        mx.clear_cache()
