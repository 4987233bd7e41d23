"""The contract between the method and the framework that holds the model. What crosses it are token ids.

A backend holds one frozen base model and any number of named adapters on it. Three verbs (`sample`,
`logprob`, `dpo_step`) and a little state. Backends know no loss: the objective maps log-probabilities to
a loss per row and one coefficient per response, and the backend differentiates `sum(coefficient * logp)`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spa_lite.records import Completion, Ids, Message, Row, Score

if TYPE_CHECKING:
    from spa_lite.shape import Shape

Floats = NDArray[np.float64]

INIT, PREVIOUS, POLICY = "init", "previous", "policy"
"""The three roles of one set of weights: see the table in README.md."""


GGUF = ".gguf"
"""How the name of a model for llama.cpp ends."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 300


@dataclass(frozen=True)
class Lora:
    """Shape of a fresh adapter. Targets: module-name endings, or "all-linear" for every linear layer but the head."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    seed: int = 0


@dataclass(frozen=True)
class Optimizer:
    """AdamW; the learning rate comes with each step."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Batching:
    """Memory and speed only: none of these may change a result beyond rounding. Tokens count padding; one row is
    always taken, however long."""

    sample: int = 64  # prompts decoded together (each with its n answers)
    score_tokens: int = 4096  # tokens per forward when scoring
    micro_tokens: int = 2048  # tokens per forward of a training step
    checkpointed: int = 0  # layers, from the first, whose activations are made again in the backward pass


@dataclass(frozen=True)
class ModelSettings:
    """Which model, where, and how it reads a conversation. `model`: a folder or a hub name."""

    model: str
    device: str = "auto"  # auto, cpu; with torch cuda, cuda:1, mps; with mlx gpu
    dtype: str = "auto"  # auto: float32 on CPU and MPS, bfloat16 on CUDA; or float32, bfloat16, float16
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    system: str | None = None  # a system turn put before conversations that have none
    template: str | None = None  # a Jinja file, or the name of a built-in fallback ("plain"); None: the model's own
    batching: Batching = field(default_factory=Batching)


@dataclass(frozen=True)
class Known:
    """What is known already of some rows under PREVIOUS, for all responses [R] in row order."""

    sums: Floats  # [R] nats
    states: tuple[NDArray[Any], ...] | None = None  # per response [tokens, width]: what the head reads, see `Keep`

    def of(self, responses: Sequence[int]) -> Known:
        """The same for some of the responses."""
        return Known(self.sums[list(responses)], self.states and tuple(self.states[index] for index in responses))


Keep = Callable[[int, int, NDArray[Any]], None]
"""Takes (index of prompt, index of answer, states [tokens, width]): what the head read at each sampled token. The
numbers are in the model's precision; bfloat16, which NumPy lacks, comes as uint16."""


@dataclass(frozen=True)
class Activations:
    """What a training step holds for its backward pass, in bytes, as measured on one forward of `tokens` tokens."""

    tokens: int  # padding included
    layers: int
    layer: int  # kept by one layer
    checkpointed: int  # kept by one layer that will be made again
    work: int  # a layer at work in the backward pass, beyond what it kept
    rest: int  # outside the layers: embedding, masks, the head's gradient and one tile of logits


@dataclass(frozen=True)
class Batch:
    """What an objective sees of some rows: flat arrays over all responses [R], in row order.

    `row[r]` is the index of the row that response r belongs to. `reference` is empty when the objective
    asks for none, `extrapolated` when `extrapolation` is 0. All sums are in nats, float64. `index[k]` is the
    position of row k among all rows of the step: a batch may hold some of them, in any order.
    """

    logp: Floats
    reference: Floats
    extrapolated: Floats
    tokens: NDArray[np.int64]
    row: NDArray[np.int64]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What an objective makes of a batch: a loss per row and d loss / d logp per response.

    `metrics` holds one array [rows] per name (margin, noisy, ...), for the log.
    """

    loss: Floats
    coefficients: Floats
    metrics: dict[str, Floats] = field(default_factory=dict)


class Objective(Protocol):
    """Maps log-probabilities to a loss. Called once per micro-batch, without gradients; the rows of a step come in any
    order unless it is `sequential`. What it says of them (`Outcome`) is put back into row order by the backend."""

    @property
    def reference(self) -> bool:
        """Whether log-probabilities under PREVIOUS are needed."""
        ...

    @property
    def extrapolation(self) -> float:
        """lambda of Eq. 11 for this step; 0 asks for no extrapolated log-probabilities."""
        ...

    @property
    def sequential(self) -> bool:
        """True if each row must see the outcome of the one before (the released code's threshold rule)."""
        ...

    def __call__(self, batch: Batch) -> Outcome:
        """Loss per row and coefficient per response."""
        ...


@dataclass(frozen=True)
class StepStats:
    """One optimizer step. `loss` is the mean over rows; `skipped` says that loss or gradient was not finite."""

    loss: float
    grad_norm: float
    skipped: bool
    tokens: int
    logp: Floats
    reference: Floats
    metrics: dict[str, Floats] = field(default_factory=dict)


class Tokenizer(Protocol):
    """Text to ids, once. Nothing else in the project turns text into ids."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: union of the generation config's and the tokenizer's."""
        ...

    @property
    def end_of_turn(self) -> int:
        """The one id that closes a human answer."""
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        """Render a conversation ending with a user turn, generation prompt included, one BOS at most."""
        ...

    def encode_answer(self, messages: Sequence[Message], text: str) -> Ids:
        """Ids of a human answer to that conversation, ending with exactly one end-of-turn id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, without special tokens."""
        ...


@runtime_checkable
class Backend(Protocol):
    """One model in one framework. Sampling, scoring and training raise OutOfMemory where a batch does not fit, and
    leave everything as it was."""

    batching: Batching
    """How much is done at a time. May be changed between calls, and holds from the next one on."""

    @property
    def name(self) -> str:
        """The backend's name in the table of `spa_lite.backends`."""
        ...

    @property
    def can_train(self) -> bool:
        """Whether `start_training` and `dpo_step` work."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        ...

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer and template."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """Device, real dtype and bits, parameter counts: what `doctor` shows."""
        ...

    @property
    def shape(self) -> Shape | None:
        """What matters of the model for estimates of memory; None if it needs none to speak of."""
        ...

    @property
    def advice(self) -> Sequence[str]:
        """What a user should hear before a long run on this machine, a sentence each."""
        ...

    def free_memory(self) -> int | None:
        """Bytes that this backend may still take, on its device; None if it needs none to speak of."""
        ...

    def peak_memory(self, reset: bool = False) -> int | None:
        """The most bytes taken so far, on its device; None if it needs none to speak of. With `reset`, where the device
        can, it counts from now on."""
        ...

    def machine_checks(self) -> Iterator[tuple[str, bool | None, str]]:
        """Yield (check, whether it holds, what was seen) for `doctor`: what only this machine can answer.

        None says that there is only something to know, such as that a check needs another machine.
        """
        ...

    def bind(self, role: str, adapter: Path | None = None, lora: Lora | None = None) -> None:
        """Make `role` the adapter stored in a folder (PEFT's or mlx-lm's format); None: the bare base, or, with `lora`,
        a fresh zero-effect adapter. Raises ModelError if the adapter does not fit the base."""
        ...

    def sample(
        self,
        prompts: Sequence[Ids],
        n: int,
        sampling: Sampling,
        keys: Sequence[Sequence[bytes]],
        role: str = POLICY,
        keep: Keep | None = None,
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yield (index of prompt, its n completions) as they finish. `keys[i][k]` names the random stream of
        sample k of prompt i (see `spa_lite.keys`); a completion depends on its prompt, key and role alone.

        `keep` is given each answer's hidden states, before the answer is yielded.
        """
        ...

    def stream(self, prompt: Ids, sampling: Sampling, key: bytes, role: str = POLICY) -> Generator[int, None, None]:
        """Yield the token ids of one answer as they are drawn, its stop token included: those that `sample` would give.
        Whoever has heard enough closes the iterator."""
        ...

    def logprob(
        self, rows: Sequence[Row], role: str, per_token: bool = False
    ) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Yield (index of row, one Score per response) in any order. Log-softmax in float32 or better."""
        ...

    def start_training(self, optimizer: Optimizer) -> None:
        """Fresh optimizer state for the adapter bound to POLICY. Raises BackendError if `can_train` is False."""
        ...

    def dpo_step(
        self, rows: Sequence[Row], objective: Objective, learning_rate: float, known: Known | None = None
    ) -> StepStats:
        """One optimizer step on the mean loss over rows: policy POLICY, reference PREVIOUS.

        What is `known` of the reference is used as it is. It saves that forward pass where the objective does not
        extrapolate, or where the states are known too, and changes nothing but rounding.
        """
        ...

    def activations(self, row: Row) -> Activations | None:
        """Measure what a training step on this row would hold; None if a backend needs no memory to speak of."""
        ...

    def snapshot(self) -> None:
        """PREVIOUS becomes a frozen copy of POLICY."""
        ...

    def save(self, folder: Path, role: str = POLICY, optimizer: bool = True) -> None:
        """Write the adapter in PEFT format (safetensors), and beside it (`optimizer`) its state if in training."""
        ...

    def restore(self, folder: Path) -> None:
        """Load POLICY and the optimizer state saved with it."""
        ...

    def unbind(self, role: str) -> None:
        """Forget a role's adapter and free its memory."""
        ...
