"""Any Hugging Face causal LM on CPU, CUDA or MPS: one frozen base, one LoRA adapter per role.

Reading order: `torch_model` (load, forward), `torch_adapters` (roles), `torch_sampling`, `torch_scoring`,
`torch_training` (one optimizer step). This file binds them to the contract of `spa_lite.backend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spa_lite.backend import INIT, POLICY, PREVIOUS, Lora, ModelSettings, Objective, Optimizer, Sampling, StepStats
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.checks import check_prompts, check_rows, longest
from spa_lite.backends.torch_adapters import Adapters
from spa_lite.backends.torch_model import Net, count, load
from spa_lite.backends.torch_sampling import Answer, Decoder, cache_works
from spa_lite.backends.torch_scoring import pack, response_states, to_numpy, token_logprobs
from spa_lite.backends.torch_training import Training, layers_checkpointed
from spa_lite.errors import BackendError
from spa_lite.keys import digest
from spa_lite.records import Completion, Ids, Row, Score


class TorchBackend:
    """One model in PyTorch. A new backend has all three roles on the bare base."""

    name = "torch"
    can_train = True

    def __init__(self, settings: ModelSettings) -> None:
        loaded = load(settings)
        self.settings = settings
        self.tokenizer = ChatTokenizer(
            loaded.tokenizer, settings.model, loaded.eos_ids, template=settings.template, system=settings.system
        )
        self.net = Net(loaded.model, loaded.device)
        self.adapters = Adapters(loaded.model, settings.model)
        self.context = self.net.context
        self.fingerprint = digest(loaded.weights_digest, self.tokenizer.fingerprint).hex()
        self._base_parameters = count(loaded.model.parameters())
        self._dtype = loaded.dtype
        self._roles: dict[str, str | None] = {INIT: None, PREVIOUS: None, POLICY: None}
        self._training: Training | None = None
        self._cached: bool | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Device, real dtype and bits, parameter counts, and whether a slower way had to be taken."""
        adapter = self._roles.get(POLICY)
        return {
            "device": str(self.net.device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "bits": 4 if self.settings.load_in_4bit else torch.finfo(self._dtype).bits,
            "architecture": type(self.net.model).__name__,
            "parameters": self._base_parameters,
            "adapter_parameters": count(self.adapters.tensors(adapter).values()) if adapter else 0,
            "attention": getattr(self.net.model.config, "_attn_implementation", None),
            "key_value_cache": "not tried yet" if self._cached is None else self._cached,
            "head": "logits of all positions (slow)" if self.net.whole else "response positions only",
        }

    # Roles

    def bind(self, role: str, adapter: Path | None = None, lora: Lora | None = None) -> None:
        """Make `role` a stored adapter, a fresh zero-effect one (`lora`), or the bare base."""
        name = self.adapters.load(adapter) if adapter is not None else self.adapters.fresh(lora) if lora else None
        self._rebind(role, name)

    def snapshot(self) -> None:
        """PREVIOUS becomes a frozen copy of POLICY."""
        source = self._adapter(POLICY)
        self._rebind(PREVIOUS, self.adapters.clone(source) if source is not None else None)

    def unbind(self, role: str) -> None:
        """Forget a role's adapter and free its memory."""
        self._adapter(role)
        self._rebind(role, None)
        del self._roles[role]

    def _rebind(self, role: str, name: str | None) -> None:
        before = self._roles.get(role)
        self._roles[role] = name
        if role == POLICY:
            self._training = None
        if before is not None:
            self.adapters.drop(before)

    def _adapter(self, role: str) -> str | None:
        if role not in self._roles:
            raise BackendError(f"role {role!r} is not bound (bound: {', '.join(self._roles)}): call bind first")
        return self._roles[role]

    def _enter(self, role: str) -> None:
        self.adapters.use(self._adapter(role))

    # Sampling

    def sample(
        self, prompts: Sequence[Ids], n: int, sampling: Sampling, keys: Sequence[Sequence[bytes]], role: str = POLICY
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yield (index of prompt, its n completions) as they finish; prompts of like length share a batch."""
        self._adapter(role)
        check_prompts(prompts, n, keys, self.context)
        self._enter(role)
        if self._cached is None:
            self._cached = cache_works(self.net)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.settings.batching.sample):
            batch = order[start : start + self.settings.batching.sample]
            self._enter(role)
            decoder = Decoder(
                self.net,
                [prompts[index] for index in batch],
                [keys[index] for index in batch],
                sampling,
                self.tokenizer.stop_ids,
                self._cached,
            )
            waiting: dict[int, dict[int, Answer]] = {index: {} for index in batch}
            for place, answer in decoder.answers(lambda: self._enter(role)):
                index = batch[place // n]
                waiting[index][place % n] = answer
                if len(waiting[index]) == n:
                    yield index, tuple(self._completion(waiting[index][k]) for k in range(n))

    def _completion(self, answer: Answer) -> Completion:
        ids, logprobs, ended = answer
        return Completion(ids=ids, text=self.tokenizer.decode(ids), ended="eos" if ended else "cap", logprobs=logprobs)

    # Scoring

    def logprob(
        self, rows: Sequence[Row], role: str, per_token: bool = False
    ) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Yield (index of row, one Score per response), rows of like length first scored together."""
        self._adapter(role)
        check_rows(rows, self.context)
        for batch in _batches(rows, self.settings.batching.score):
            self._enter(role)
            scores = self._score([rows[index] for index in batch], per_token)
            yield from zip(batch, scores, strict=True)

    @torch.inference_mode()
    def _score(self, rows: Sequence[Row], per_token: bool) -> list[tuple[Score, ...]]:
        packed = pack(self.net, rows)
        values = to_numpy(token_logprobs(self.net, response_states(self.net, packed), packed.targets))
        sums = packed.sums(values)
        ends = packed.lengths.cumsum()
        scores: list[list[Score]] = [[] for _ in rows]
        for response, row in enumerate(packed.row):
            size = int(packed.lengths[response])
            tokens = tuple(values[ends[response] - size : ends[response]].tolist()) if per_token else None
            scores[row].append(Score(logp=float(sums[response]), tokens=size, per_token=tokens))
        return [tuple(some) for some in scores]

    # Training

    def start_training(self, optimizer: Optimizer) -> None:
        """Fresh AdamW state for POLICY's adapter."""
        name = self._adapter(POLICY)
        if name is None:
            raise BackendError("the policy has no adapter to train: bind one to it first")
        self._training = Training(optimizer, self.adapters.tensors(name))
        self.adapters.train_only(name)

    def dpo_step(self, rows: Sequence[Row], objective: Objective, learning_rate: float) -> StepStats:
        """One optimizer step on the mean loss over rows, micro-batch by micro-batch in row order."""
        if self._training is None:
            raise BackendError("no training is under way: call start_training or restore first")
        check_rows(rows, self.context)
        batching = self.settings.batching
        with layers_checkpointed(self.net.model, batching.gradient_checkpointing):
            return self._training.step(self.net, self._enter, rows, objective, learning_rate, batching.micro)

    def save(self, folder: Path, role: str = POLICY) -> None:
        """Write the adapter (PEFT, float32) and, for POLICY in training, `optimizer.safetensors` beside it."""
        name = self._adapter(role)
        if name is None:
            raise BackendError(f"role {role!r} is the bare base: there is no adapter to save")
        self.adapters.save(name, folder)
        if role == POLICY and self._training is not None:
            self._training.save(folder)

    def restore(self, folder: Path) -> None:
        """Load POLICY and, if it was saved in training, the optimizer with its settings and state."""
        self.bind(POLICY, folder)
        name = self._adapter(POLICY)
        assert name is not None
        if Training.saved_in(folder):
            self._training = Training.restore(folder, self.adapters.tensors(name))
            self.adapters.train_only(name)


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Indices of rows of like length, as many together as hold `size` pairs of responses (one row at least)."""
    batch: list[int] = []
    responses = 0
    for index in sorted(range(len(rows)), key=lambda index: longest(rows[index])):
        more = len(rows[index].responses)
        if batch and responses + more > 2 * size:
            yield batch
            batch, responses = [], 0
        batch.append(index)
        responses += more
    if batch:
        yield batch
