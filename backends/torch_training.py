"""One optimizer step on the adapter of POLICY, and its state on disk. No loss is known here."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spa_lite.backend import (
    POLICY,
    PREVIOUS,
    Activations,
    Batch,
    Batching,
    Known,
    Objective,
    Optimizer,
    Outcome,
    StepStats,
)
from spa_lite.backends.packing import micro_batches, step_stats
from spa_lite.backends.torch_activations import layers_of, measure
from spa_lite.backends.torch_head import Reference, read
from spa_lite.backends.torch_model import Net, trim_heap
from spa_lite.backends.torch_scoring import Laid, lay_out, response_states, to_numpy
from spa_lite.errors import ModelError
from spa_lite.records import Row

STATE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError)
Enter = Callable[[str], None]


class Training:
    """AdamW on one adapter's parameters, float32. `enter` switches the base to a role's adapter."""

    def __init__(self, net: Net, enter: Enter, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self.net, self.enter, self.settings = net, enter, optimizer
        self.parameters = dict(parameters)
        self.adamw = torch.optim.AdamW(
            list(self.parameters.values()),
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def step(
        self,
        rows: Sequence[Row],
        objective: Objective,
        learning_rate: float,
        batching: Batching,
        known: Known | None = None,
    ) -> StepStats:
        """Accumulate the gradient of the mean loss over rows, then move, unless something is not finite."""
        micro = micro_batches(rows, known, batching.micro_tokens, self.net.shared, objective.sequential)
        try:
            with first_layers_recomputed(self.net.model, batching.checkpointed):
                parts = [
                    (indices, *self._accumulate(indices, some, theirs, objective, len(rows), batching.checkpointed > 0))
                    for indices, some, theirs in micro
                ]
            norm = self._clip()
            finite = bool(np.isfinite(norm)) and all(np.isfinite(outcome.loss).all() for _, _, outcome in parts)
            if finite:
                self._move(learning_rate)
        finally:
            self.adamw.zero_grad(set_to_none=True)
        return step_stats(parts, norm, not finite)

    def _move(self, learning_rate: float) -> None:
        """One AdamW step, whole or not at all: it works parameter by parameter, and memory may run out half-way."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        before = [(p, p.detach().clone(), copy.deepcopy(self.adamw.state.get(p))) for p in self.parameters.values()]
        try:
            self.adamw.step()
        except BaseException:
            for parameter, value, state in before:
                parameter.data.copy_(value)
                self.adamw.state.pop(parameter, None)
                if state is not None:
                    self.adamw.state[parameter] = state
            raise

    def _accumulate(
        self,
        indices: Sequence[int],
        rows: Sequence[Row],
        known: Known | None,
        objective: Objective,
        total: int,
        checkpointed: bool,
    ) -> tuple[Batch, Outcome]:
        """Forward and backward of one micro-batch. The policy's graph is built last and used at once."""
        net, laid = self.net, lay_out(self.net, rows)
        packed = laid.packed
        beside = self._reference(laid, known, objective)
        found = read(net, self._policy_states(laid, checkpointed), laid.targets, beside, self.enter)

        logp, reference, extrapolated = (
            packed.sums(to_numpy(some)) for some in (found.logp, found.reference, found.extrapolated)
        )
        if known is not None:
            reference = known.sums
        none = np.zeros(0)
        batch = Batch(
            logp,
            reference if objective.reference else none,
            extrapolated if objective.extrapolation else none,
            packed.lengths,
            packed.row,
            np.array(indices, dtype=np.int64),
        )
        outcome = objective(batch)
        if np.isfinite(outcome.loss).all() and len(found.logp):
            weight = net.tensor(outcome.coefficients[packed.owner] / total, torch.float32)
            (found.logp * weight).sum().backward()  # type: ignore[no-untyped-call]
        return batch, outcome

    def _reference(self, laid: Laid, known: Known | None, objective: Objective) -> Reference | None:
        """What must be read of the reference: its body runs only if its states are not known."""
        wanted = objective.reference and known is None
        if not wanted and not objective.extrapolation:
            return None
        if known is not None and known.states is not None:
            states = _from_host(known.states, self.net)
        else:
            self.enter(PREVIOUS)
            with torch.no_grad():
                states = response_states(self.net, laid)
        return Reference(states, wanted, objective.extrapolation)

    def _policy_states(self, laid: Laid, checkpointed: bool) -> Tensor:
        """With gradients. Checkpointed layers leave a heap in pieces: each keeps an array between the holes it made."""
        self.enter(POLICY)
        if checkpointed:
            trim_heap(self.net.device)
        states = response_states(self.net, laid)
        if checkpointed:
            trim_heap(self.net.device)
        return states

    def activations(self, row: Row) -> Activations:
        """Measure what a step on this row would hold. Changes nothing."""
        try:
            self.enter(POLICY)
            return measure(self.net, lay_out(self.net, [row]))
        finally:
            self.adamw.zero_grad(set_to_none=True)

    def _clip(self) -> float:
        """Clip the gradient's global norm in place; return the norm before that."""
        limit = self.settings.max_grad_norm if self.settings.max_grad_norm > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def save(self, folder: Path) -> None:
        """Moments, step counts and settings, as safetensors."""
        tensors = {
            f"{key}.{moment}": self.adamw.state[parameter][moment].detach().cpu().contiguous()
            for key, parameter in self.parameters.items()
            for moment in MOMENTS
            if parameter in self.adamw.state
        }
        settings = json.dumps(dataclasses.asdict(self.settings), sort_keys=True)
        (folder / STATE).write_bytes(to_bytes(tensors, metadata={"adamw": settings}))

    @staticmethod
    def saved_in(folder: Path) -> bool:
        """Whether the folder holds an optimizer."""
        return (folder / STATE).is_file()

    @staticmethod
    def settings_in(folder: Path) -> Optimizer:
        """The settings of the optimizer in a folder."""
        try:
            with safe_open(folder / STATE, "pt") as file:  # type: ignore[no-untyped-call]
                return Optimizer(**json.loads(file.metadata()["adamw"]))
        except DAMAGE as error:
            raise ModelError(f"{folder / STATE} is damaged or belongs to another adapter: {error}") from error

    def restore(self, folder: Path) -> None:
        """Go on from the state saved beside the adapter."""
        try:
            stored = load_file(folder / STATE)
            for key, parameter in self.parameters.items():
                if f"{key}.step" in stored:
                    self.adamw.state[parameter] = {
                        moment: _placed(stored[f"{key}.{moment}"], moment, parameter) for moment in MOMENTS
                    }
        except DAMAGE as error:
            raise ModelError(f"{folder / STATE} is damaged or belongs to another adapter: {error}") from error


@contextmanager
def first_layers_recomputed(model: nn.Module, count: int) -> Iterator[None]:
    """Inside the block the first `count` layers keep nothing but their input, and run again in the backward pass."""
    layers = layers_of(model)[:count]
    for layer in layers:
        # No dropout is in use, so there are no random states to keep.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _from_host(states: Sequence[NDArray[Any]], net: Net) -> Tensor:
    """Kept states of all tokens, [N, width]; NumPy has no bfloat16, which therefore comes as bare bits."""
    found = torch.from_numpy(np.concatenate(states))
    return (found.view(torch.bfloat16) if found.dtype == torch.uint16 else found).to(net.device, net.model.dtype)


def _placed(value: Tensor, moment: str, parameter: nn.Parameter) -> Tensor:
    """A stored moment where AdamW wants it: counts on the host, moments beside their parameter."""
    if moment == "step":
        return value.clone()
    if value.shape != parameter.shape:
        raise ValueError(f"a moment of shape {list(value.shape)} for a parameter of {list(parameter.shape)}")
    return value.to(parameter.device)
