"""One optimizer step on the adapter of POLICY, and its state on disk. No loss is known here."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from spa_lite.backend import POLICY, PREVIOUS, Batch, Batching, Floats, Objective, Optimizer, Outcome, StepStats
from spa_lite.backends.packing import Packed, micro_batches, pack, step_stats
from spa_lite.backends.torch_model import Net, trim_heap
from spa_lite.backends.torch_scoring import (
    extrapolated_logprobs,
    response_states,
    tile_size,
    to_numpy,
    token_logprobs,
)
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
        reference: Floats | None = None,
    ) -> StepStats:
        """Accumulate the gradient of the mean loss over rows, then move, unless something is not finite."""
        try:
            with layers_checkpointed(self.net.model, batching.gradient_checkpointing):
                parts = [
                    self._accumulate(some, known, objective, len(rows), batching.gradient_checkpointing)
                    for some, known in micro_batches(rows, reference, batching.micro)
                ]
            norm = self._clip()
            finite = bool(np.isfinite(norm)) and all(np.isfinite(outcome.loss).all() for _, outcome in parts)
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
        self, rows: Sequence[Row], known: Floats | None, objective: Objective, total: int, checkpointed: bool
    ) -> tuple[Batch, Outcome]:
        """Forward and backward of one micro-batch. The policy's graph is built last and used at once."""
        net, packed = self.net, pack(rows)
        targets, strength = net.tensor(packed.targets), objective.extrapolation
        with_reference = strength > 0 or (objective.reference and known is None)
        reference_states = self._states(packed, PREVIOUS) if with_reference else None
        states = self._policy_states(packed, checkpointed)
        logp = token_logprobs(net, states, targets)
        reference = known if objective.reference and known is not None else np.zeros(0)
        extrapolated = np.zeros(0)
        if reference_states is not None:
            tokens, mixed = self._no_gradient_logprobs(targets, states.detach(), reference_states, strength)
            reference = packed.sums(tokens) if objective.reference else reference
            extrapolated = packed.sums(mixed) if strength > 0 else extrapolated
            self.enter(POLICY)
        batch = Batch(packed.sums(to_numpy(logp)), reference, extrapolated, packed.lengths, packed.row)
        outcome = objective(batch)
        if np.isfinite(outcome.loss).all() and len(logp):
            weight = net.tensor(outcome.coefficients[packed.owner] / total, torch.float32)
            (logp * weight).sum().backward()  # type: ignore[no-untyped-call]
        return batch, outcome

    def _policy_states(self, packed: Packed, checkpointed: bool) -> Tensor:
        """With gradients. Checkpointed layers leave a heap in pieces: each keeps an array between the holes it made."""
        self.enter(POLICY)
        if checkpointed:
            trim_heap(self.net.device)
        states = response_states(self.net, packed)
        if checkpointed:
            trim_heap(self.net.device)
        return states

    @torch.no_grad()
    def _states(self, packed: Packed, role: str) -> Tensor:
        self.enter(role)
        return response_states(self.net, packed)

    @torch.no_grad()
    def _no_gradient_logprobs(
        self, targets: Tensor, states: Tensor, reference_states: Tensor, strength: float
    ) -> tuple[Floats, Floats]:
        """Per-token log-probs under PREVIOUS and, if strength > 0, under the mixed logits; from the same tiles."""
        plain, mixed = [], []
        size = tile_size(self.net)
        for mine, theirs, ids in zip(
            states.split(size), reference_states.split(size), targets.split(size), strict=True
        ):
            self.enter(PREVIOUS)
            reference = self.net.head(theirs)
            plain.append(-torch.nn.functional.cross_entropy(reference, ids, reduction="none"))
            if strength > 0:
                self.enter(POLICY)
                mixed.append(extrapolated_logprobs(self.net.head(mine), reference, ids, strength))
        none = np.zeros(0)
        return to_numpy(torch.cat(plain)) if plain else none, to_numpy(torch.cat(mixed)) if mixed else none

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
def layers_checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block. Only the layers go into training mode: dropout inside stays off."""
    if not wanted:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()  # type: ignore[operator]


def _placed(value: Tensor, moment: str, parameter: nn.Parameter) -> Tensor:
    """A stored moment where AdamW wants it: counts on the host, moments beside their parameter."""
    if moment == "step":
        return value.clone()
    if value.shape != parameter.shape:
        raise ValueError(f"a moment of shape {list(value.shape)} for a parameter of {list(parameter.shape)}")
    return value.to(parameter.device)
