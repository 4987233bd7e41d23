"""The head in tiles of tokens: log-probabilities and, in the same pass, their derivative. No logits outlive a tile.

The derivative of log p(target) by what the head reads needs nothing from the loss, which multiplies it by one number
per response. So it is formed while the tile is there, and [N, width] is kept in place of [N, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spa_lite.backend import POLICY, PREVIOUS
from spa_lite.backends.torch_model import Net

TILE_NUMBERS = {"cpu": 2**22, "cuda": 2**26}
"""Logits made at a time. A tile is passed over several times: on a CPU it should not be far larger than the caches, on
a GPU it must be large enough to keep the processors busy."""
TILE_ROWS = 64
"""Tokens that a tile has at least, however large the vocabulary: with fewer a product waits for the head's weights."""


@dataclass(frozen=True)
class Reference:
    """What is wanted of the reference, whose states [N, width] these are."""

    states: Tensor
    logp: bool  # its own log-probabilities
    strength: float  # lambda of Eq. 11; 0: nothing extrapolated

    def part(self, start: int, end: int) -> Reference:
        """The same for some of the tokens."""
        return Reference(self.states[start:end], self.logp, self.strength)


@dataclass(frozen=True)
class Read:
    """Log-probabilities [N] of the targets, nats, float32."""

    logp: Tensor  # differentiable
    reference: Tensor  # zeros unless wanted, as is the next
    extrapolated: Tensor  # under the mixed logits of Eq. 11, renormalised


def tile_size(net: Net) -> int:
    """Tokens per tile."""
    return max(TILE_ROWS, TILE_NUMBERS.get(net.device.type, TILE_NUMBERS["cpu"]) // net.vocab)


def token_logprobs(net: Net, states: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [N] of each target token from states [N, width], float32, without gradient."""
    found = torch.empty(len(targets), device=states.device)
    for start, end in _tiles(net, len(targets)):
        found[start:end] = _pick(net.head(states[start:end]).log_softmax(-1), targets[start:end])
    return found


def read(net: Net, states: Tensor, targets: Tensor, reference: Reference | None, enter: Callable[[str], None]) -> Read:
    """Read the policy's states and the reference's together. `enter` switches roles, for a head with adapters."""
    if net.head_adapted:
        return _read_adapted(net, states, targets, reference, enter)
    logp, theirs, mixed = _Tiles.apply(states, net, targets, reference)  # type: ignore[no-untyped-call]
    return Read(logp, theirs, mixed)


class _Tiles(torch.autograd.Function):
    """(log p, the reference's, extrapolated), each [N]; the first is differentiable in the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, net: Net, targets: Tensor, reference: Reference | None) -> Any:
        found = torch.zeros(3, len(targets), device=states.device)
        states = states.detach()
        slopes = torch.empty_like(states)
        for start, end in _tiles(net, len(targets)):
            part = reference and reference.part(start, end)
            _tile(net, states[start:end], targets[start:end], part, found[:, start:end], slopes[start:end])
        ctx.save_for_backward(slopes)
        logp, theirs, mixed = found.unbind()
        ctx.mark_non_differentiable(theirs, mixed)
        return logp, theirs, mixed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        return (ctx.saved_tensors[0] * upstream[:, None]).to(ctx.saved_tensors[0].dtype), None, None, None


def _tile(
    net: Net, states: Tensor, targets: Tensor, reference: Reference | None, found: Tensor, slopes: Tensor
) -> None:
    """One tile: fills found [3, n] and slopes [n, width], d log p / d state."""
    beside = _beside(net, states, targets, reference, found)
    made, back = _product(net, states)
    capped = net.finish(made)
    own = capped.log_softmax(-1)
    found[0] = _pick(own, targets)
    if beside is not None and reference is not None:
        found[2] = _pick_logits(beside.lerp_(own, 1 + reference.strength), targets)
    del beside
    slope = own.exp_().neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(slope[:, :1]))
    slopes.copy_(back(net.unfinish(slope, capped).to(made.dtype)))


def _product(net: Net, states: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The head's product [n, vocabulary] of states [n, width], and what takes d / d product to d / d states."""
    head = net.model.get_output_embeddings()
    if net.whole:
        return states, lambda slope: slope
    if type(head) is nn.Linear:
        return net.project(states), lambda slope: slope @ head.weight
    with torch.enable_grad():  # a quantised head alone knows its weights
        leaf = states.detach().requires_grad_()
        made = net.project(leaf)
    return made.detach(), lambda slope: torch.autograd.grad(made, leaf, slope)[0]


def _beside(net: Net, states: Tensor, targets: Tensor, reference: Reference | None, found: Tensor) -> Tensor | None:
    """The reference's part of a tile; its log-probs [n, vocabulary], if the policy's are to be mixed into them."""
    if reference is None:
        return None
    if reference.logp or net.capped:
        theirs = net.head(reference.states).log_softmax(-1)
        found[1] = _pick(theirs, targets)
        return theirs if reference.strength else None
    # The head is linear: the mixed logits are its product with the mixed states.
    mixed = reference.states.float().lerp(states.float(), 1 + reference.strength).to(states.dtype)
    found[2] = _pick(net.head(mixed).log_softmax(-1), targets)
    return None


def _read_adapted(
    net: Net, states: Tensor, targets: Tensor, reference: Reference | None, enter: Callable[[str], None]
) -> Read:
    """The head has parameters to train: autograd differentiates it, and makes each tile again for that."""
    parts: list[Tensor] = []
    found = torch.zeros(2, len(targets), device=states.device)
    for start, end in _tiles(net, len(targets)):
        some, ids = states[start:end], targets[start:end]
        enter(POLICY)
        parts.append(checkpoint(_logp, net, some, ids, use_reentrant=False))
        if reference is not None:
            with torch.no_grad():
                enter(PREVIOUS)
                theirs = net.head(reference.states[start:end])
                found[0, start:end] = _pick_logits(theirs.clone(), ids)
                enter(POLICY)
                if reference.strength:
                    found[1, start:end] = _pick_logits(theirs.lerp_(net.head(some), 1 + reference.strength), ids)
    return Read(torch.cat(parts) if parts else states.sum(-1), found[0], found[1])


def _logp(net: Net, states: Tensor, targets: Tensor) -> Tensor:
    return _pick(net.head(states).log_softmax(-1), targets)


def _pick(logps: Tensor, targets: Tensor) -> Tensor:
    return logps.gather(1, targets[:, None])[:, 0]


def _pick_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of the targets; the logits are used up."""
    logits -= logits.amax(-1, keepdim=True)
    chosen = _pick(logits, targets)
    return chosen - logits.exp_().sum(-1).log()


def _tiles(net: Net, tokens: int) -> list[tuple[int, int]]:
    size = tile_size(net)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]
