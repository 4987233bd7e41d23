"""What the backends with a real model share: roles on one base, batching, and the order of things.

A framework brings four things: adapters, a decoder, log-probs of packed rows, and an optimizer step. All else
is here once, so that the backends are equals.
"""

from __future__ import annotations

import gc
import traceback
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from spa_lite.backend import (
    INIT,
    POLICY,
    PREVIOUS,
    Activations,
    Batching,
    Floats,
    Keep,
    Known,
    Lora,
    ModelSettings,
    Objective,
    Optimizer,
    Sampling,
    StepStats,
)
from spa_lite.backends import memory
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.checks import check_prompts, check_rows
from spa_lite.backends.decoding import Answer, Decoding
from spa_lite.backends.model_folder import fingerprint
from spa_lite.backends.packing import batches, responses_of
from spa_lite.errors import BackendError, OutOfMemory
from spa_lite.records import Completion, Ids, Row, Score
from spa_lite.shape import Shape, shape_of


class Adapters(Protocol):
    """Named adapters on one frozen base; `use(None)` is the bare base."""

    def fresh(self, lora: Lora) -> str:
        """A new adapter of zero effect."""

    def load(self, folder: Path) -> str:
        """An adapter from a folder. Raises ModelError unless it fits the base."""

    def clone(self, source: str) -> str:
        """A frozen copy."""

    def drop(self, name: str) -> None:
        """Forget an adapter."""

    def save(self, name: str, folder: Path) -> None:
        """Write it in PEFT format."""

    def use(self, name: str | None) -> None:
        """Switch the base to this adapter."""


class Net(Protocol):
    """What must be known of a loaded model."""

    context: int
    vocab: int
    shared: int
    """The longest line on which a prompt may stand once for several responses; 0 where the model cannot do that."""


class Training(Protocol):
    """An optimizer over one adapter."""

    def step(
        self,
        rows: Sequence[Row],
        objective: Objective,
        learning_rate: float,
        batching: Batching,
        known: Known | None,
    ) -> StepStats:
        """One optimizer step on the mean loss over rows: whole, or (if anything is raised) not at all."""

    def activations(self, row: Row) -> Activations:
        """Measure what a step on this row would hold. Changes nothing."""

    def save(self, folder: Path) -> None:
        """Write the optimizer's state beside its adapter."""


class LocalBackend(ABC):
    """One model on this machine. A new backend has all three roles on the bare base."""

    name: str
    can_train = True

    def __init__(
        self, settings: ModelSettings, tokenizer: ChatTokenizer, adapters: Adapters, net: Net, weights_digest: str
    ) -> None:
        self.settings, self.tokenizer, self.adapters, self.net = settings, tokenizer, adapters, net
        self.batching = settings.batching
        self.context, self.vocabulary = net.context, net.vocab
        self.fingerprint = fingerprint(weights_digest, tokenizer.fingerprint)
        self._roles: dict[str, str | None] = {INIT: None, PREVIOUS: None, POLICY: None}
        self._training: Training | None = None

    # What a framework brings

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Device, real dtype and bits, parameter counts, and whether a slower way had to be taken."""

    @abstractmethod
    def _groups(self, prompts: Sequence[Ids], sampling: Sampling) -> list[list[int]]:
        """Indices of prompts that one decoder answers: all, if it refills; else by length, see `by_length`."""

    @abstractmethod
    def _decoder(
        self, prompts: Sequence[Ids], keys: Sequence[Sequence[bytes]], sampling: Sampling, keep: bool
    ) -> Decoding:
        """A decoder of these prompts, for the adapter in use; `keep`: with the states of each answer."""

    @abstractmethod
    def _token_logprobs(self, rows: Sequence[Row]) -> Floats:
        """Log-probs [N] of all response tokens, in row order, under the adapter in use."""

    @abstractmethod
    def _new_training(self, optimizer: Optimizer, adapter: str) -> Training:
        """Fresh optimizer state."""

    @abstractmethod
    def _old_training(self, folder: Path, adapter: str) -> Training | None:
        """The optimizer state stored in a folder; None if there is none."""

    @property
    def shape(self) -> Shape:
        """What matters of the model for estimates of memory. Raises ModelError where its config does not say it."""
        return shape_of(self._config)

    @property
    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """config.json, with transformers' defaults."""

    @property
    def advice(self) -> tuple[str, ...]:
        """What a user should hear before a long run on this machine."""
        return ()

    def machine_checks(self) -> Iterator[tuple[str, bool | None, str]]:
        """What only this machine can answer, for `doctor`."""
        return iter(())

    def free_memory(self) -> int | None:
        """Bytes that this backend may still take, on its device."""
        return memory.free()

    def peak_memory(self, reset: bool = False) -> int | None:
        """The most bytes taken so far, on its device."""
        found = memory.peak()
        if reset:
            memory.forget_peak()
        return found

    @contextmanager
    def _memory_for(self, what: str, flag: str) -> Iterator[None]:
        """Turn whatever a framework raises when memory runs out into one sentence, and free what can be freed."""
        try:
            yield
            return
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            said = " ".join(str(error).split())[:120] or type(error).__name__
            traceback.clear_frames(error.__traceback__)  # they hold the arrays that were too many
        gc.collect()
        self._tidy()
        raise OutOfMemory(f"memory ran out when {what}: lower {flag} ({said})") from None

    def _tidy(self) -> None:  # noqa: B027 - not every framework keeps some
        """Give memory that is not needed back to the system: called between stages."""

    # Roles

    def bind(self, role: str, adapter: Path | None = None, lora: Lora | None = None) -> None:
        """Make `role` a stored adapter, a fresh zero-effect one (`lora`), or the bare base."""
        name = self.adapters.load(adapter) if adapter is not None else self.adapters.fresh(lora) if lora else None
        self._rebind(role, name)
        self._tidy()

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
        self,
        prompts: Sequence[Ids],
        n: int,
        sampling: Sampling,
        keys: Sequence[Sequence[bytes]],
        role: str = POLICY,
        keep: Keep | None = None,
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yield (index of prompt, its n completions) as they finish; prompts of like length are read together."""
        self._adapter(role)
        check_prompts(prompts, n, keys, self.context)
        self._enter(role)
        for group in self._groups(prompts, sampling) if prompts else []:
            with self._memory_for(f"{self.batching.sample} prompts were answered together", "--sample-batch"):
                self._enter(role)
                some, names = [prompts[index] for index in group], [keys[index] for index in group]
                decoder = self._decoder(some, names, sampling, keep is not None)
                for index, answers in self._answers(decoder, role, group, keep):
                    yield index, tuple(self._completion(answer) for answer in answers)
        self._tidy()

    def stream(self, prompt: Ids, sampling: Sampling, key: bytes, role: str = POLICY) -> Generator[int, None, None]:
        """Yield the tokens of one answer as they are drawn."""
        self._adapter(role)
        check_prompts([prompt], 1, [[key]], self.context)
        self._enter(role)
        with self._memory_for("one answer was written", "--max-tokens"):
            yield from self._decoder([prompt], [[key]], sampling, False).tokens(lambda: self._enter(role))
        self._tidy()

    def _answers(
        self, decoder: Decoding, role: str, group: Sequence[int], keep: Keep | None
    ) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """Yield (index of prompt, its n answers) as the last of them ends."""
        n = decoder.n
        waiting: dict[int, dict[int, Answer]] = {index: {} for index in group}
        for place, answer in decoder.answers(lambda: self._enter(role)):
            index, number = group[place // n], place % n
            if keep is not None and answer.states is not None:
                keep(index, number, answer.states)
            waiting[index][number] = answer._replace(states=None)
            if len(waiting[index]) == n:
                found = waiting.pop(index)
                yield index, tuple(found[k] for k in range(n))

    def _completion(self, answer: Answer) -> Completion:
        ended: Literal["eos", "cap"] = "eos" if answer.ended else "cap"
        return Completion(ids=answer.ids, text=self.tokenizer.decode(answer.ids), ended=ended, logprobs=answer.logprobs)

    # Scoring

    def logprob(
        self, rows: Sequence[Row], role: str, per_token: bool = False
    ) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Yield (index of row, one Score per response), rows of like length first scored together."""
        self._adapter(role)
        check_rows(rows, self.context, self.vocabulary)
        for batch in batches(rows, self.batching.score_tokens, self.net.shared):
            some = [rows[index] for index in batch]
            with self._memory_for(f"{len(some)} rows were scored together", "--score-tokens"):
                self._enter(role)
                scores = responses_of(some).scores(self._token_logprobs(some), per_token)
            yield from zip(batch, scores, strict=True)
        self._tidy()

    # Training

    def start_training(self, optimizer: Optimizer) -> None:
        """Fresh AdamW state for POLICY's adapter."""
        name = self._adapter(POLICY)
        if name is None:
            raise BackendError("the policy has no adapter to train: bind one to it first")
        self._training = self._new_training(optimizer, name)
        self._tidy()

    def dpo_step(
        self, rows: Sequence[Row], objective: Objective, learning_rate: float, known: Known | None = None
    ) -> StepStats:
        """One optimizer step on the mean loss over rows, micro-batch by micro-batch."""
        training = self._under_way()
        check_rows(rows, self.context, self.vocabulary)
        with self._memory_for(f"{self.batching.micro_tokens} tokens were trained on together", "--micro-tokens"):
            return training.step(rows, objective, learning_rate, self.batching, known)

    def activations(self, row: Row) -> Activations | None:
        """Measure what a training step on this row would hold."""
        training = self._under_way()
        check_rows([row], self.context, self.vocabulary)
        with self._memory_for("one pair was tried out", "--max-seq-length"):
            return training.activations(row)

    def _under_way(self) -> Training:
        if self._training is None:
            raise BackendError("no training is under way: call start_training or restore first")
        return self._training

    def save(self, folder: Path, role: str = POLICY, optimizer: bool = True) -> None:
        """Write the adapter (PEFT, float32) and, for POLICY in training, `optimizer.safetensors` beside it."""
        name = self._adapter(role)
        if name is None:
            raise BackendError(f"role {role!r} is the bare base: there is no adapter to save")
        self.adapters.save(name, folder)
        if optimizer and role == POLICY and self._training is not None:
            self._training.save(folder)

    def restore(self, folder: Path) -> None:
        """Load POLICY and, if it was saved in training, the optimizer with its settings and state."""
        self.bind(POLICY, folder)
        name = self._adapter(POLICY)
        assert name is not None
        self._training = self._old_training(folder, name)


def by_length(prompts: Sequence[Ids], size: int, room: int, equal: bool = False) -> list[list[int]]:
    """Indices of at most `size` prompts of like length; of the same length if `equal`.

    Some models have no position beyond their context, so that padding must not push an answer there: prompts longer
    than `room` stand alone.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        last = groups[-1] if groups else []
        apart = len(prompts[index]) > room or (equal and bool(last) and len(prompts[last[0]]) != len(prompts[index]))
        if last and len(last) < size and not apart:
            last.append(index)
        else:
            groups.append([index])
    return groups
