"""A bigram policy in NumPy that truly samples, scores and learns: the oracle of the contract suite.

Logits of the next byte are a row of a matrix, `base + adapter`, picked by the last byte. That is small enough
to differentiate by hand and to do everything in float64, and it shares no code with the other backends.
A model is a name: "toy", or "toy:SEED" for another base matrix. No files are needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from spa_lite import keys as streams
from spa_lite.backend import (
    INIT,
    POLICY,
    PREVIOUS,
    Batch,
    Floats,
    Keep,
    Known,
    Lora,
    ModelSettings,
    Objective,
    Optimizer,
    Outcome,
    Sampling,
    StepStats,
)
from spa_lite.backends.checks import check_prompts, check_rows
from spa_lite.backends.packing import micro_batches, step_stats
from spa_lite.errors import BackendError, DataError, ModelError
from spa_lite.objective import extrapolate
from spa_lite.records import Completion, Ids, Message, Row, Score

BOS, END, SYSTEM, USER, ASSISTANT = 256, 257, 258, 259, 260
VOCABULARY = 261
TURNS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"
DELTA = "delta"
Places = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Per response, where its tokens stand in a table: indices (last, next)."""


class ToyTokenizer:
    """Bytes, and five marks: BOS, end of turn, and one per role.

    The last user turn is left open, so that an answer's first byte follows from the prompt's last one.
    """

    stop_ids = frozenset({END})
    end_of_turn = END

    def __init__(self, system: str | None = None) -> None:
        self._system = system

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        """BOS, then each turn as its role's mark, its bytes, and END (but for the last)."""
        if not messages or messages[-1].role != "user":
            raise DataError("a conversation must end with a user turn")
        if self._system is not None and all(message.role != "system" for message in messages):
            messages = (Message(role="system", content=self._system), *messages)
        ids = [BOS]
        for message in messages:
            if message.role not in TURNS:
                raise DataError(f"the toy tokenizer knows no role {message.role!r}: use {', '.join(TURNS)}")
            ids += [TURNS[message.role], *message.content.encode(), END]
        return tuple(ids[:-1])

    def encode_answer(self, messages: Sequence[Message], text: str) -> Ids:
        """The answer's bytes and END."""
        return (*text.encode(), END)

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes among the ids as text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclasses.dataclass
class AdamW:
    """Moments of one matrix. Decoupled weight decay, bias correction."""

    settings: Optimizer
    first: Floats
    second: Floats
    steps: int = 0

    def move(self, weights: Floats, gradient: Floats, rate: float) -> Floats:
        """The weights after one step."""
        o, self.steps = self.settings, self.steps + 1
        self.first = o.beta1 * self.first + (1 - o.beta1) * gradient
        self.second = o.beta2 * self.second + (1 - o.beta2) * gradient**2
        mean = self.first / (1 - o.beta1**self.steps)
        spread = np.sqrt(self.second / (1 - o.beta2**self.steps))
        return np.asarray(weights * (1 - rate * o.weight_decay) - rate * mean / (spread + o.eps))


class ToyBackend:
    """The contract of `spa_lite.backend`, in the fewest lines. A new backend has all three roles on the bare base."""

    name = "toy"
    can_train = True
    context = 4096

    def __init__(self, settings: ModelSettings) -> None:
        self.settings, self.batching = settings, settings.batching
        self.base = base_matrix(settings.model)
        self.base.setflags(write=False)
        self.tokenizer = ToyTokenizer(settings.system)
        self.fingerprint = streams.digest("toy", self.base.tobytes(), settings.system).hex()
        # A delta is never changed in place: every step makes a new one, so roles may share one safely.
        self._roles: dict[str, Floats | None] = {INIT: None, PREVIOUS: None, POLICY: None}
        self._adamw: AdamW | None = None

    shape = None

    @property
    def advice(self) -> tuple[str, ...]:
        """Nothing to know."""
        return ()

    def machine_checks(self) -> Iterator[tuple[str, bool | None, str]]:
        """Nothing depends on the machine."""
        return iter(())

    def free_memory(self) -> int | None:
        """Nothing to speak of is needed."""
        return None

    def peak_memory(self, reset: bool = False) -> int | None:
        """Nothing to speak of was needed."""
        return None

    @property
    def description(self) -> dict[str, Any]:
        """Device, precision and sizes."""
        delta = self._roles.get(POLICY)
        return {
            "device": "cpu",
            "dtype": "float64",
            "bits": 64,
            "architecture": "bigram",
            "parameters": self.base.size,
            "adapter_parameters": 0 if delta is None else delta.size,
        }

    def bind(self, role: str, adapter: Path | None = None, lora: Lora | None = None) -> None:
        """Make `role` a stored matrix, a fresh zero one (`lora`), or the bare base."""
        fresh = np.zeros_like(self.base) if lora is not None else None
        self._set(role, read_delta(adapter) if adapter is not None else fresh)

    def snapshot(self) -> None:
        """PREVIOUS becomes POLICY as it is now."""
        self._set(PREVIOUS, self._delta(POLICY))

    def unbind(self, role: str) -> None:
        """Forget a role."""
        self._delta(role)
        self._set(role, None)
        del self._roles[role]

    def logits(self, role: str) -> Floats:
        """Logits [last, next] under a role."""
        delta = self._delta(role)
        return self.base if delta is None else self.base + delta

    def _set(self, role: str, delta: Floats | None) -> None:
        self._roles[role] = delta
        if role == POLICY:
            self._adamw = None

    def _delta(self, role: str) -> Floats | None:
        if role not in self._roles:
            raise BackendError(f"role {role!r} is not bound (bound: {', '.join(self._roles)}): call bind first")
        return self._roles[role]

    def sample(
        self,
        prompts: Sequence[Ids],
        n: int,
        sampling: Sampling,
        keys: Sequence[Sequence[bytes]],
        role: str = POLICY,
        keep: Keep | None = None,
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yield (index of prompt, its n completions), one prompt after the other. States to keep are rows of logits."""
        check_prompts(prompts, n, keys, self.context)
        logits = self.logits(role)
        logprobs, choose = log_softmax(logits), chooser(logits, sampling)
        for index, prompt in enumerate(prompts):
            limit = min(sampling.max_tokens, self.context - len(prompt))
            answers = tuple(self._write(prompt[-1], key, limit, logprobs, choose) for key in keys[index])
            for number, answer in enumerate(answers if keep else ()):
                assert keep is not None
                keep(index, number, logits[steps(prompt, answer.ids)[0]])
            yield index, answers

    def stream(self, prompt: Ids, sampling: Sampling, key: bytes, role: str = POLICY) -> Generator[int, None, None]:
        """Yield the tokens of one answer as they are drawn."""
        check_prompts([prompt], 1, [[key]], self.context)
        limit = min(sampling.max_tokens, self.context - len(prompt))
        return _tokens(prompt[-1], key, limit, chooser(self.logits(role), sampling))

    def _write(self, last: int, key: bytes, limit: int, logprobs: Floats, choose: Chooser) -> Completion:
        ids = list(_tokens(last, key, limit, choose))
        values = logprobs[[last, *ids[:-1]][: len(ids)], ids].tolist()
        ended = "eos" if ids[-1:] == [END] else "cap"
        return Completion(ids=tuple(ids), text=self.tokenizer.decode(ids), ended=ended, logprobs=tuple(values))  # type: ignore[arg-type]

    def logprob(
        self, rows: Sequence[Row], role: str, per_token: bool = False
    ) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Yield (index of row, one Score per response)."""
        check_rows(rows, self.context, VOCABULARY)
        logprobs = log_softmax(self.logits(role))
        for index, row in enumerate(rows):
            values = [logprobs[steps(row.prompt, response)].tolist() for response in row.responses]
            yield (
                index,
                tuple(Score(logp=fsum(v), tokens=len(v), per_token=tuple(v) if per_token else None) for v in values),
            )

    def start_training(self, optimizer: Optimizer) -> None:
        """Fresh AdamW state for POLICY's matrix."""
        delta = self._delta(POLICY)
        if delta is None:
            raise BackendError("the policy has no adapter to train: bind one to it first")
        self._adamw = AdamW(optimizer, np.zeros_like(delta), np.zeros_like(delta))

    def activations(self, row: Row) -> None:
        """Nothing to speak of is needed."""

    def dpo_step(
        self, rows: Sequence[Row], objective: Objective, learning_rate: float, known: Known | None = None
    ) -> StepStats:
        """One optimizer step on the mean loss over rows."""
        if self._adamw is None:
            raise BackendError("no training is under way: call start_training or restore first")
        check_rows(rows, self.context, VOCABULARY)
        tables = self.logits(POLICY), self.logits(PREVIOUS)
        gradient, parts = np.zeros_like(self.base), []
        for some in micro_batches(rows, known, self.batching.micro_tokens, self.context, objective.sequential):
            indices, theirs, told = some
            batch, outcome, part = _gradient(indices, theirs, told, objective, *tables)
            gradient += part / len(rows)
            parts.append((indices, batch, outcome))
        losses = np.concatenate([outcome.loss for _, _, outcome in parts])
        norm = float(np.sqrt((gradient**2).sum()))
        finite = bool(np.isfinite(losses).all() and np.isfinite(norm))
        if finite:
            limit = self._adamw.settings.max_grad_norm
            clipped = gradient * min(1.0, limit / (norm + 1e-6)) if limit > 0 else gradient
            delta = self._delta(POLICY)
            assert delta is not None
            self._roles[POLICY] = self._adamw.move(delta, clipped, learning_rate)
        return step_stats(parts, norm, not finite)

    def save(self, folder: Path, role: str = POLICY, optimizer: bool = True) -> None:
        """Write the matrix and, for POLICY in training, the optimizer beside it."""
        delta = self._delta(role)
        if delta is None:
            raise BackendError(f"role {role!r} is the bare base: there is no adapter to save")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "TOY", "base_model_name_or_path": self.settings.model}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / WEIGHTS).write_bytes(safetensors.save({DELTA: delta}))
        if optimizer and role == POLICY and self._adamw is not None:
            state = {"first": self._adamw.first, "second": self._adamw.second, "steps": np.array(self._adamw.steps)}
            settings = json.dumps(dataclasses.asdict(self._adamw.settings), sort_keys=True)
            (folder / STATE).write_bytes(safetensors.save(state | {"settings": _letters(settings)}))

    def restore(self, folder: Path) -> None:
        """Load POLICY and, if it was saved in training, the optimizer with its settings and state."""
        self.bind(POLICY, folder)
        if (folder / STATE).is_file():
            state = _read(folder / STATE)
            settings = Optimizer(**json.loads(state["settings"].tobytes()))
            self._adamw = AdamW(settings, state["first"], state["second"], int(state["steps"]))


class Chooser:
    """Draws the next byte: inverse CDF of the tempered, perhaps truncated distribution, in vocabulary order."""

    def __init__(self, cumulative: Floats) -> None:
        self.cumulative = cumulative

    def __call__(self, last: int, uniform: float) -> int:
        """First id whose cumulative probability exceeds the uniform."""
        row = self.cumulative[last]
        return int(np.searchsorted(row, uniform * row[-1], side="right"))


def _tokens(last: int, key: bytes, limit: int, choose: Chooser) -> Generator[int, None, None]:
    """Yield up to `limit` tokens after `last`, the end token included."""
    for step in range(limit):
        if step % streams.BLOCK == 0:
            uniforms = streams.uniforms(key, step // streams.BLOCK)
        last = choose(last, float(uniforms[step % streams.BLOCK]))
        yield last
        if last == END:
            return


def chooser(logits: Floats, sampling: Sampling) -> Chooser:
    """The chooser for a matrix of logits [last, next]."""
    if sampling.temperature == 0:
        best = np.eye(logits.shape[1])[logits.argmax(axis=1)]
        return Chooser(best.cumsum(axis=1))
    probabilities = np.exp(log_softmax(logits / sampling.temperature))
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    return Chooser(probabilities.cumsum(axis=1))


def nucleus(probabilities: Floats, top_p: float) -> Floats:
    """Zero all but the fewest most probable tokens whose mass reaches `top_p` (ties: the lower id first)."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    kept = ordered * (ordered.cumsum(axis=1) - ordered < top_p)
    result = np.zeros_like(probabilities)
    np.put_along_axis(result, order, kept, axis=1)
    return result


def log_softmax(logits: Floats) -> Floats:
    """Row-wise, stable."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def steps(prompt: Ids, response: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (last, next) of each response token."""
    line = np.array([*prompt[-1:], *response], dtype=np.int64)
    return line[:-1], line[1:]


def base_matrix(model: str) -> Floats:
    """Random logits that favour lower-case letters and spaces, with an END about every dozen bytes."""
    name, _, seed = model.partition(":")
    if name != "toy" or not (seed or "0").isdigit():
        raise ModelError(f"the toy backend has no model {model!r}: use toy or toy:SEED")
    matrix = 1.5 * streams.generator(streams.digest("toy", int(seed or 0))).standard_normal((VOCABULARY, VOCABULARY))
    letters = np.zeros(VOCABULARY, dtype=bool)
    letters[[*range(ord("a"), ord("z") + 1), ord(" ")]] = True
    matrix[:, ~letters] -= 12.0
    matrix[:, END] += 12.5
    return np.asarray(matrix)


def _gradient(
    indices: Sequence[int],
    rows: Sequence[Row],
    known: Known | None,
    objective: Objective,
    policy: Floats,
    previous: Floats,
) -> tuple[Batch, Outcome, Floats]:
    """What the objective says of some rows, and the gradient of their summed loss in the logits matrix.

    d log p(b | a) / d logits[a, :] = onehot(b) - softmax(logits[a, :]).
    """
    places = [steps(row.prompt, response) for row in rows for response in row.responses]
    logprobs = log_softmax(policy)
    batch = Batch(
        logp=_sums(logprobs, places),
        reference=_reference(known, previous, places) if objective.reference else np.zeros(0),
        extrapolated=_extrapolated(known, policy, previous, places, objective.extrapolation),
        tokens=np.array([len(place[0]) for place in places], dtype=np.int64),
        row=np.repeat(np.arange(len(rows)), [len(row.responses) for row in rows]),
        index=np.array(indices, dtype=np.int64),
    )
    outcome = objective(batch)
    counts = np.zeros_like(policy)
    for coefficient, place in zip(outcome.coefficients, places, strict=True):
        np.add.at(counts, place, coefficient)
    return batch, outcome, counts - counts.sum(axis=1, keepdims=True) * np.exp(logprobs)


def _reference(known: Known | None, previous: Floats, places: Places) -> Floats:
    """Sums under PREVIOUS: those that are known already, used as they are."""
    return known.sums if known else _sums(log_softmax(previous), places)


def _extrapolated(known: Known | None, policy: Floats, previous: Floats, places: Places, strength: float) -> Floats:
    """Sums under the mixed logits (Eq. 11), from PREVIOUS's states where they are known: here they are its logits."""
    if strength == 0:
        return np.zeros(0)
    states = (known and known.states) or [previous[last] for last, _ in places]
    mixed = [log_softmax(extrapolate(policy[last], h, strength)) for (last, _), h in zip(places, states, strict=True)]
    return np.array([logp[range(len(to)), to].sum() for logp, (_, to) in zip(mixed, places, strict=True)])


def read_delta(folder: Path) -> Floats:
    """The matrix in an adapter folder."""
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("peft_type")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no adapter folder: {CONFIG} cannot be read") from error
    if kind != "TOY":
        raise ModelError(f"{folder} holds a {kind} adapter; the toy backend reads only its own")
    delta = _read(folder / WEIGHTS).get(DELTA)
    if delta is None or delta.shape != (VOCABULARY, VOCABULARY):
        raise ModelError(f"{folder / WEIGHTS} does not fit: it needs {DELTA} of {VOCABULARY} x {VOCABULARY}")
    return np.asarray(delta, dtype=np.float64)


def _read(path: Path) -> Mapping[str, NDArray[Any]]:
    try:
        found: Mapping[str, NDArray[Any]] = safetensors.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return found


def _letters(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _sums(logprobs: Floats, places: Places) -> Floats:
    return np.array([logprobs[place].sum() for place in places])
