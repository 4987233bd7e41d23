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

from spa_lite.backend import Batch, Batching, Floats, Objective, Optimizer, Outcome, StepStats
from spa_lite.backends.mlx_adapters import Adapters, Held, Tree, peft_key
from spa_lite.backends.mlx_model import Net
from spa_lite.backends.mlx_scoring import extrapolated_logprobs, response_states, tiled, to_numpy, token_logprobs
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
Program = Callable[..., tuple[mx.array, mx.array, mx.array, Arrays]]


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
        self.checkpointing = False
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
        reference: Floats | None = None,
    ) -> StepStats:
        """Accumulate the gradient of the mean loss over rows, then move, unless something is not finite."""
        self.checkpointing = batching.gradient_checkpointing
        total: Tree = {key: mx.zeros_like(array) for key, array in self._held.tree.items()}
        parts = []
        try:
            for some, known in micro_batches(rows, reference, batching.micro):
                batch, outcome, gradient = self._accumulate(some, known, objective, len(rows))
                parts.append((batch, outcome))
                total = {key: total[key] + gradient[key] for key in total} if gradient else total
                mx.eval(total)
        finally:
            # Leaves no array of a finished program in the layers.
            self.adapters.place({}, {})
        norm = float(mx.sqrt(sum(mx.square(array).sum() for array in total.values())).item())
        finite = bool(np.isfinite(norm)) and all(np.isfinite(outcome.loss).all() for _, outcome in parts)
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
        self, rows: Sequence[Row], known: Floats | None, objective: Objective, total: int
    ) -> tuple[Batch, Outcome, Tree]:
        """What the objective made of one micro-batch, and the gradient of its share of the mean loss."""
        packed = pack(rows)
        strength, held = objective.extrapolation, self._held
        name = self.previous()
        previous = BASE if name is None else self.adapters.held[name]
        program = self._program(held, previous, strength, objective.reference and (known is None or strength > 0))
        inputs = [list(held.tree.values()), list(previous.tree.values()), *map(mx.array, padded(packed))]
        late = mx.full(inputs[-1].shape, mx.nan)
        mx.eval(late)
        logp, reference, mixed, gradient = program(*inputs, late)
        mx.eval(logp, reference, mixed)
        count = len(packed.targets)

        def sums(values: mx.array) -> Floats:
            return packed.sums(to_numpy(values)[:count]) if len(values) else np.zeros(0)

        expected = known if known is not None and objective.reference and strength == 0 else sums(reference)
        batch = Batch(sums(logp), expected, sums(mixed), packed.lengths, packed.row)
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
        return batch, outcome, dict(zip(held.tree, gradient, strict=True))

    def _program(self, policy: Held, previous: Held, strength: float, reference: bool) -> Program:
        """The compiled program for adapters of these shapes: one for a whole training, in practice."""
        shapes = [[held.scales, [array.shape for array in held.tree.values()]] for held in (policy, previous)]
        key = json.dumps([shapes, strength, reference, self.checkpointing])
        if key not in self.programs:
            self.programs[key] = mx.compile(self._traced(policy, previous, strength, reference))
        return self.programs[key]

    def _traced(self, policy: Held, previous: Held, strength: float, reference: bool) -> Program:
        """(policy, previous, ids, places, targets, weights) -> log-probs [N] of policy, previous and mix, gradient."""
        net, adapters = self.net, self.adapters
        adapted_head, checkpointing = "lm_head" in policy.scales, self.checkpointing

        def program(trained: Arrays, frozen: Arrays, ids: Any, places: Any, targets: Any, weights: Any) -> Any:
            self.traces += 1
            none = mx.zeros(0)

            def enter(held: Held, arrays: Arrays) -> None:
                adapters.place(held.scales, dict(zip(held.tree, arrays, strict=True)))

            def plain(states: mx.array, some: mx.array) -> mx.array:
                return token_logprobs(net.head(states), some)

            enter(previous, frozen)
            theirs = response_states(net, ids, places) if reference or strength > 0 else none
            expected = tiled(net, plain, theirs, targets) if reference else none

            def forward(*arrays: mx.array) -> list[mx.array]:
                enter(policy, list(arrays))
                with checkpointed(net.model, checkpointing):
                    own = response_states(net, ids, places)
                logp = tiled(net, plain, own, targets, again=not adapted_head)
                if strength == 0:
                    return [logp]

                def mix(ours: mx.array, others: mx.array, some: mx.array) -> mx.array:
                    enter(previous, frozen)
                    logits = net.head(others)
                    enter(policy, list(arrays))
                    return extrapolated_logprobs(net.head(ours), logits, some, strength)

                return [logp, mx.stop_gradient(tiled(net, mix, own, theirs, targets))]

            seeds = [weights, mx.zeros_like(weights)][: 1 + (strength > 0)]
            outputs, gradient = mx.vjp(forward, trained, seeds)
            return outputs[0], expected, outputs[1] if strength > 0 else none, gradient

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
    """ids [R, time], places [N] and targets [N] with time and N rounded up; what is added has no weight."""
    responses, width = packed.ids.shape
    wide, many = rounded(width), rounded(len(packed.targets))
    ids = np.zeros((responses, wide), dtype=np.int32)
    ids[:, :width] = packed.ids
    places, targets = np.zeros(many, dtype=np.int32), np.zeros(many, dtype=np.int32)
    places[: len(packed.places)] = packed.places // width * wide + packed.places % width
    targets[: len(packed.targets)] = packed.targets
    return [ids, places, targets]


def rounded(size: int) -> int:
    """The next of at most eight sizes per doubling, 8 at least: at most an eighth is wasted on larger ones."""
    grain = max(8, 2 ** (max(1, size).bit_length() - 4))
    return -(-max(1, size) // grain) * grain


def write(target: mx.array, values: Floats32) -> None:
    """Change an evaluated array in place, through the NumPy view of its memory."""
    np.array(target, copy=False)[:] = values


@contextmanager
def checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of the model's blocks inside the block.

    mlx-lm's way changes the class of the blocks, for good and once more at every call; so it is done once per class
    and switched off where it is not wanted.
    """
    for block in {type(layer): layer for layer in model.layers}.values() if wanted else ():
        if type(block) not in _CHECKPOINTED:
            _CHECKPOINTED.add(type(block))
            _add_switch(block)
    _SWITCH.append(wanted)
    try:
        yield
    finally:
        _SWITCH.pop()


def _add_switch(block: Any) -> None:
    kind = type(block)
    plain = kind.__call__
    grad_checkpoint(block)
    again = kind.__call__
    kind.__call__ = lambda self, *args, **more: (again if _SWITCH[-1] else plain)(self, *args, **more)


_SWITCH = [False]
_CHECKPOINTED: set[type] = set()
