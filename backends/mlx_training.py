"""One optimizer step on the adapter of POLICY, and its state on disk. No loss is known here.

Forward, reference and gradient are one compiled program per shape, and lengths are rounded up so that shapes are
few. The coefficients that the objective gives back are an input of that program which is written only after its
first half has run: so nothing is computed twice, and the objective stays a NumPy function.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import grad_checkpoint
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from spa_lite.backend import Activations, Batch, Batching, Known, Objective, Optimizer, Outcome, StepStats
from spa_lite.backends.mlx_adapters import HEAD, Adapters, Held, Tree, peft_key
from spa_lite.backends.mlx_head import Head, Reference, beside, read, token_logprobs
from spa_lite.backends.mlx_model import Net
from spa_lite.backends.mlx_scoring import to_numpy
from spa_lite.backends.packing import Packed, micro_batches, pack, step_stats
from spa_lite.errors import ModelError
from spa_lite.records import Row

STATE = "optimizer.safetensors"
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""MLX's names and, in the file, PyTorch's: a run goes on with either."""
DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError)
BASE = Held({}, {}, {})

Floats32 = NDArray[np.float32]
Arrays = list[mx.array]
Program = Callable[..., tuple[Arrays, mx.array, Arrays]]


@dataclass(frozen=True)
class Wanted:
    """What a program is compiled for, beside its shapes."""

    reference: bool  # log-probs of PREVIOUS
    strength: float  # lambda of Eq. 11; 0: nothing extrapolated
    given: bool  # the states of PREVIOUS come from the caller
    branching: bool  # several responses on a line
    checkpointed: int


class Training:
    """AdamW on one adapter's arrays, float32. `previous` gives the name of PREVIOUS's adapter at each step."""

    def __init__(
        self,
        net: Net,
        adapters: Adapters,
        optimizer: Optimizer,
        policy: str,
        previous: Callable[[], str | None],
    ) -> None:
        self.net, self.adapters, self.settings, self.policy, self.previous = net, adapters, optimizer, policy, previous
        # Without bias correction, MLX's default, the first step is 2e-3 away from PyTorch's at a rate of 1e-3.
        self.adamw = optim.AdamW(
            0.0, [optimizer.beta1, optimizer.beta2], optimizer.eps, optimizer.weight_decay, bias_correction=True
        )
        self.adamw.init(self._held.tree)
        self.checkpointed = 0
        self.programs: dict[str, Program] = {}
        self.traces = 0

    @property
    def _held(self) -> Held:
        return self.adapters.held[self.policy]

    def step(
        self,
        rows: Sequence[Row],
        objective: Objective,
        learning_rate: float,
        batching: Batching,
        known: Known | None = None,
    ) -> StepStats:
        """Accumulate the gradient of the mean loss over rows, then move, unless something is not finite."""
        self.checkpointed = batching.checkpointed
        total: Tree = {key: mx.zeros_like(array) for key, array in self._held.tree.items()}
        shared, parts = self.net.lines_for(rows), []
        try:
            for indices, some, theirs in micro_batches(
                rows, known, batching.micro_tokens, shared, objective.sequential
            ):
                batch, outcome, gradient = self._accumulate(indices, pack(some, shared), theirs, objective, len(rows))
                parts.append((indices, batch, outcome))
                total = {key: total[key] + gradient[key] for key in total} if gradient else total
                mx.eval(total)
        finally:
            # Leaves no array of a finished program in the layers.
            self.adapters.place({}, {})
        norm = float(mx.sqrt(sum(mx.square(array).sum() for array in total.values())).item())
        finite = bool(np.isfinite(norm)) and all(np.isfinite(outcome.loss).all() for _, _, outcome in parts)
        if finite:
            self._move(total, norm, learning_rate)
        return step_stats(parts, norm, not finite)

    def _move(self, gradient: Tree, norm: float, learning_rate: float) -> None:
        """One AdamW step, whole or not at all; the gradient's global norm is clipped as PyTorch clips it."""
        held, before = self._held, (self._held.tree, tree_map(lambda array: array, self.adamw.state))
        limit = self.settings.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        self.adamw.learning_rate = learning_rate
        clipped = {key: array * scale for key, array in gradient.items()}
        try:
            held.tree = self.adamw.apply_gradients(clipped, held.tree)
            mx.eval(held.tree, self.adamw.state)
        except BaseException:
            held.tree, self.adamw.state = before
            raise

    def _accumulate(
        self, indices: Sequence[int], packed: Packed, known: Known | None, objective: Objective, total: int
    ) -> tuple[Batch, Outcome, Tree]:
        """What the objective made of one micro-batch, and the gradient of its share of the mean loss."""
        wanted = Wanted(
            reference=objective.reference and known is None,
            strength=objective.extrapolation,
            given=known is not None and known.states is not None and objective.extrapolation > 0,
            branching=packed.branching,
            checkpointed=self.checkpointed,
        )
        program, inputs, late = self._ready(packed, known, wanted)
        found, slopes, gradient = program(*inputs, late)
        # With the slopes, or the logits that these are made of would wait for them.
        mx.eval(found, slopes)
        count = len(packed.targets)
        logp, *beside = (packed.sums(to_numpy(values)[:count]) for values in found)
        none = np.zeros(0)
        expected = (
            known.sums if known is not None and objective.reference else beside.pop(0) if wanted.reference else none
        )
        places = np.array(indices, dtype=np.int64)
        batch = Batch(logp, expected, beside[0] if beside else none, packed.lengths, packed.row, places)
        outcome = objective(batch)
        if not (np.isfinite(outcome.loss).all() and count):
            return batch, outcome, {}
        weights = np.zeros(late.shape, dtype=np.float32)
        weights[:count] = outcome.coefficients[packed.owner] / total
        write(late, weights)
        mx.eval(gradient)
        if np.isfinite(weights).all() and not all(mx.isfinite(array).all().item() for array in gradient):
            # Either the gradient is truly not finite, or this device had read the placeholders already.
            gradient = program(*inputs, mx.array(weights))[-1]
        return batch, outcome, dict(zip(self._held.tree, gradient, strict=True))

    def _ready(self, packed: Packed, known: Known | None, wanted: Wanted) -> tuple[Program, list[Any], mx.array]:
        """The program for these lines and its inputs, of which the last is still to be written."""
        held, name = self._held, self.previous()
        previous = BASE if name is None else self.adapters.held[name]
        arrays = padded(packed)
        states = stacked(known, len(arrays[-1]), self.net.dtype) if known is not None and wanted.given else mx.zeros(0)
        late = mx.full(arrays[-1].shape, mx.nan)
        mx.eval(late)
        *lines, targets = map(mx.array, arrays)
        inputs = [list(held.tree.values()), list(previous.tree.values()), lines, targets, states]
        return self._program(held, previous, wanted), inputs, late

    def activations(self, row: Row) -> Activations:
        """From the peaks of a step with reference and extrapolation, without checkpointing and with all of it.

        What a checkpointed layer keeps, its input, is counted. `work` cannot be told from `rest`, which holds it.
        The peaks that are compared are those of operations one by one: how far MLX allocates ahead of its work depends
        on what else the machine does, and in a small model that is more than a layer.
        """
        packed = pack([row], self.net.lines_for([row]))
        tokens, layers = padded(packed)[0].size, len(self.net.model.layers)
        with one_by_one():
            most, least = (self._peak(packed, some) for some in (0, layers))
        again = tokens * self.net.width * self.net.dtype.size
        layer = max(again, (most - least + layers * again) // max(1, layers - 1))
        return Activations(tokens, layers, layer, again, work=0, rest=max(0, self._peak(packed, 0) - layers * layer))

    def _peak(self, packed: Packed, checkpointed: int) -> int:
        """Bytes that the gradient of these lines takes at its worst moment."""
        program, inputs, late = self._ready(packed, None, Wanted(True, 1.0, False, packed.branching, checkpointed))
        mx.eval(inputs)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        try:
            found, slopes, gradient = program(*inputs, late)
            mx.eval(found, slopes)
            mx.eval(gradient)
        finally:
            self.adapters.place({}, {})
        return int(mx.get_peak_memory() - held)

    def _program(self, policy: Held, previous: Held, wanted: Wanted) -> Program:
        """The compiled program for adapters of these shapes: one or two for a whole training, in practice."""
        shapes = [[held.scales, [array.shape for array in held.tree.values()]] for held in (policy, previous)]
        key = json.dumps([shapes, dataclasses.astuple(wanted)])
        if key not in self.programs:
            self.programs[key] = mx.compile(self._traced(policy, previous, wanted))
        return self.programs[key]

    def _traced(self, policy: Held, previous: Held, wanted: Wanted) -> Program:
        """(policy, previous, lines, targets, states of previous, weights) -> log-probs, slopes, gradient.

        Log-probs [N] of the policy, then those of the reference and of the mix that are `wanted`.
        """
        net, adapters = self.net, self.adapters
        adapted = HEAD in policy.scales
        mixable = net.linear and not adapted and HEAD not in previous.scales

        def enter(held: Held, arrays: Sequence[mx.array]) -> None:
            adapters.place(held.scales, dict(zip(held.tree, arrays, strict=True)))

        def program(trained: Arrays, frozen: Arrays, lines: Arrays, targets: Any, theirs: Any, weights: Any) -> Any:
            self.traces += 1

            def states() -> mx.array:
                return net.states(lines, wanted.branching)

            def head_of(held: Held, arrays: Sequence[mx.array]) -> Head:
                def head(some: mx.array) -> mx.array:
                    if HEAD in {**policy.scales, **previous.scales}:
                        enter(held, arrays)
                    return net.head(some)

                return head

            reference = None
            if wanted.reference or wanted.strength > 0:
                reference = Reference(head_of(previous, frozen), wanted.reference, wanted.strength, mixable)
                if not wanted.given:
                    enter(previous, frozen)
                    theirs = states()
            else:
                theirs = None

            def forward(*arrays: mx.array) -> list[mx.array]:
                enter(policy, arrays)
                with checkpointed(net.model, wanted.checkpointed):
                    own = states()
                head = head_of(policy, arrays)
                if adapted:
                    # The head is itself trained: its gradient needs all logits.
                    logits = head(own)
                    logp, slopes = token_logprobs(logits, targets), mx.zeros(0)
                    fixed, still = mx.stop_gradient(logits), mx.stop_gradient(own)
                    found = [slopes, logp, *beside(fixed, still, targets, theirs, reference)]
                    return [(weights * logp).sum(), *map(mx.stop_gradient, found)]
                found = read(net, head, mx.stop_gradient(own), targets, theirs, reference)
                logp, slopes, *others = map(mx.stop_gradient, found)
                return [(own.astype(mx.float32) * slopes * weights[:, None]).sum(), slopes, logp, *others]

            count = 3 + wanted.reference + (wanted.strength > 0)
            outputs, gradient = mx.vjp(forward, trained, [mx.ones(()), *[mx.zeros(())] * (count - 1)])
            return outputs[2:], outputs[1], gradient

        return program

    def save(self, folder: Path) -> None:
        """Moments, step count and settings, as the PyTorch backend writes them: either goes on from the other's."""
        tensors = {}
        step = self.adamw.state["step"]
        for key in self._held.tree if int(step) else ():
            for mine, theirs in MOMENTS.items():
                tensors[f"{peft_key(key)}.{theirs}"] = np.ascontiguousarray(np.array(self.adamw.state[key][mine]).T)
            tensors[f"{peft_key(key)}.step"] = np.array(float(step), dtype=np.float32)
        settings = json.dumps(dataclasses.asdict(self.settings), sort_keys=True)
        (folder / STATE).write_bytes(to_bytes(tensors, metadata={"adamw": settings}))

    def restore(self, folder: Path) -> None:
        """Go on from the state saved beside the adapter."""
        try:
            stored = load_file(folder / STATE)
            for key, array in self._held.tree.items() if stored else ():
                for mine, theirs in MOMENTS.items():
                    moment = stored[f"{peft_key(key)}.{theirs}"].T
                    if moment.shape != array.shape:
                        raise ValueError(f"a moment of shape {list(moment.shape)} for an array of {list(array.shape)}")
                    self.adamw.state[key][mine] = mx.array(moment)
                self.adamw.state["step"] = mx.array(int(stored[f"{peft_key(key)}.step"]), mx.uint64)
        except DAMAGE as error:
            raise ModelError(f"{folder / STATE} is damaged or belongs to another adapter: {error}") from error


def settings_in(folder: Path) -> Optimizer:
    """The settings of the optimizer in a folder."""
    try:
        with safe_open(folder / STATE, "np") as file:  # type: ignore[no-untyped-call]
            return Optimizer(**json.loads(file.metadata()["adamw"]))
    except DAMAGE as error:
        raise ModelError(f"{folder / STATE} is damaged or belongs to another adapter: {error}") from error


def padded(packed: Packed) -> list[NDArray[np.int32]]:
    """ids, positions, segments [lines, time], places, targets [N]; time and N rounded up with what weighs nothing."""
    lines, width = packed.ids.shape
    wide, many = rounded(width), rounded(len(packed.targets))
    ids, positions, segments = (np.full((lines, wide), fill, dtype=np.int32) for fill in (0, 0, -1))
    ids[:, :width], positions[:, :width], segments[:, :width] = packed.ids, packed.positions, packed.segments
    places, targets = np.zeros(many, dtype=np.int32), np.zeros(many, dtype=np.int32)
    places[: len(packed.places)] = packed.places // width * wide + packed.places % width
    targets[: len(packed.targets)] = packed.targets
    return [ids, positions, segments, places, targets]


def stacked(known: Known, size: int, dtype: Any) -> mx.array:
    """The known states of all responses as one array [size, width]; bfloat16 comes as uint16."""
    states = np.concatenate(known.states or ())
    whole = np.zeros((size, states.shape[1]), dtype=states.dtype)
    whole[: len(states)] = states
    array = mx.array(whole)
    return array.view(mx.bfloat16) if array.dtype == mx.uint16 else array.astype(dtype)


def rounded(size: int) -> int:
    """The next of at most eight sizes per doubling, 8 at least: at most an eighth is wasted on larger ones."""
    grain = max(8, 2 ** (max(1, size).bit_length() - 4))
    return -(-max(1, size) // grain) * grain


def write(target: mx.array, values: Floats32) -> None:
    """Change an evaluated array in place, through the NumPy view of its memory."""
    np.array(target, copy=False)[:] = values


@contextmanager
def one_by_one() -> Iterator[None]:
    """MLX waits for each operation before it allocates for the next, as it does where memory is short."""
    before = mx.set_memory_limit(0)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@contextmanager
def checkpointed(model: Any, layers: int) -> Iterator[None]:
    """Gradient checkpointing of the first layers inside the block.

    mlx-lm's way changes the class of a layer, for good and once more at every call; so it is done once per class, and
    asks which layers are meant.
    """
    chosen = model.layers[:layers]
    for layer in {type(layer): layer for layer in chosen}.values():
        if type(layer) not in _CHANGED:
            _CHANGED.add(type(layer))
            _add_switch(layer)
    before = set(_AGAIN)
    _AGAIN.update(map(id, chosen))
    try:
        yield
    finally:
        _AGAIN.intersection_update(before)


def _add_switch(layer: Any) -> None:
    kind = type(layer)
    plain = kind.__call__
    grad_checkpoint(layer)
    again = kind.__call__
    kind.__call__ = lambda self, *args, **more: (again if id(self) in _AGAIN else plain)(self, *args, **more)


_AGAIN: set[int] = set()
_CHANGED: set[type] = set()
