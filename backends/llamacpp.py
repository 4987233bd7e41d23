"""What llama.cpp loads: a GGUF file that samples and scores, with LoRA adapters, and cannot be trained.

Reading order: `local` (what all backends with a real model share), `gguf_header` (what the file says of itself),
`llamacpp_model` (load, forward), `llamacpp_tokenizer`, `llamacpp_adapters` (roles), `llamacpp_sampling`,
`llamacpp_scoring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from spa_lite.backend import POLICY, Floats, ModelSettings, Sampling
from spa_lite.backends import ONLY_SAMPLES, llamacpp_model
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.llamacpp_adapters import Adapters
from spa_lite.backends.llamacpp_model import SEQUENCES
from spa_lite.backends.llamacpp_sampling import Decoder
from spa_lite.backends.llamacpp_scoring import row_logprobs
from spa_lite.backends.llamacpp_tokenizer import stop_ids, tokenizer_of
from spa_lite.backends.local import LocalBackend
from spa_lite.errors import BackendError
from spa_lite.files import digest_of_weights
from spa_lite.records import Ids, Row

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class LlamaCppBackend(LocalBackend):
    """One model in llama.cpp."""

    name = "llamacpp"
    can_train = False
    adapters: Adapters
    net: llamacpp_model.Net

    def __init__(self, settings: ModelSettings) -> None:
        net = llamacpp_model.load(settings)
        path = Path(settings.model).expanduser()
        tokenizer = ChatTokenizer(
            tokenizer_of(path, net.header, net.tokenize),
            settings.model,
            stop_ids(net.header),
            template=settings.template,
            system=settings.system,
        )
        super().__init__(settings, tokenizer, Adapters(net, settings.model), net, digest_of_weights(path))

    @property
    def description(self) -> dict[str, Any]:
        """Device, kind of numbers, parameter counts, and what is done at a time."""
        adapter, header = self._roles.get(POLICY), self.net.header
        return {
            "device": "gpu" if self.net.gpu else "cpu",
            "dtype": DTYPES.get(self.net.kind, self.net.kind.lower()),
            "bits": 32 if self.net.kind == "F32" else header.bits,
            "architecture": header.architecture,
            "parameters": self.net.parameters,
            "adapter_parameters": self.adapters.held[adapter].parameters if adapter else 0,
            "keys_and_values": DTYPES[self.net.cache_kind],
            "threads": llamacpp_model.threads(),
            "batches": f"up to {SEQUENCES} answers at once",
            "limits": "it samples and scores, and cannot be trained",
        }

    @property
    def _config(self) -> dict[str, Any]:
        return self.net.header.config

    def _groups(self, prompts: Sequence[Ids], sampling: Sampling) -> list[list[int]]:
        return [list(range(len(prompts)))]

    def _decoder(
        self, prompts: Sequence[Ids], keys: Sequence[Sequence[bytes]], sampling: Sampling, keep: bool
    ) -> Decoder:
        if keep:
            raise BackendError("llama.cpp keeps no hidden states of what it samples: leave --cache-reference out")
        slots = self.batching.sample * len(keys[0])
        return Decoder(self.net, prompts, keys, sampling, self.tokenizer.stop_ids, slots, self.adapters.active)

    def _token_logprobs(self, rows: Sequence[Row]) -> Floats:
        return row_logprobs(self.net, rows, self.adapters.active)

    def _refuse(self, *args: Any, **more: Any) -> Never:
        raise BackendError(ONLY_SAMPLES)

    start_training = dpo_step = activations = save = restore = _new_training = _old_training = _refuse
