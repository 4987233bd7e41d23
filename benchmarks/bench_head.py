"""The loss stage alone, at a vocabulary of 128,256: memory and time of tiles against full logits.

python benchmarks/bench_head.py [--quick] [--rounds 5] [--only TEXT]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from contestants import LAMBDA, ours
from side_by_side import Claim, Contestant, Done, Options, Ready, Shown, Suite, main
from workloads import model

VOCABULARY, WIDTH = 128_256, 512
LENGTHS = (512, 2048, 4096)
FULL = "full logits, 2,048 tokens"


def tiles(tokens: int) -> str:
    """Name of ours at that many tokens."""
    return f"ours: tiles, {tokens:,} tokens"


def contestants(options: Options) -> list[Contestant]:
    """Both find log-probs under the policy, with gradient, under the reference, and under the mixed logits (Eq. 11)."""
    shape = {} if options.quick else {"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    base = model(options.folder, options.quick, **shape)

    def work(tokens: int, read: Callable[..., tuple[Any, Any, Any]]) -> Callable[[], Ready]:
        def make() -> Ready:
            import torch

            net = ours(options, base, None, training=False).net
            width = net.model.config.hidden_size
            random = torch.Generator().manual_seed(0)
            policy, reference = (torch.randn(tokens, width, generator=random).to(net.device) for _ in range(2))
            targets = torch.randint(0, net.vocab, (tokens,), generator=random).to(net.device)
            weight = torch.randn(tokens, generator=random).to(net.device)
            last: list[Any] = []

            def go() -> Done:
                states = policy.clone().requires_grad_()
                logp, theirs, mixed = read(net, states, targets, reference)
                loss = (logp * weight).mean()
                loss.backward()
                last[:] = [float(loss.detach()), states.grad, theirs, mixed]
                return Done(tokens)

            def shown() -> Shown:
                values = torch.cat(last[2:]).float().cpu().tolist()
                return Shown(last[0], {"states": last[1].float().cpu().numpy()}, values)

            return Ready(go, shown)

        return make

    lengths = (16, 32, 64) if options.quick else LENGTHS
    return [
        Contestant(tiles(2048), work(lengths[1], tiled), like=FULL),
        Contestant(FULL, work(lengths[1], full)),
        Contestant(tiles(512), work(lengths[0], tiled)),
        Contestant(tiles(4096), work(lengths[2], tiled)),
    ]


def tiled(net: Any, states: Any, targets: Any, reference: Any) -> tuple[Any, Any, Any]:
    """As a training step does it."""
    from spa_lite.backends.torch_head import Reference, read

    found = read(net, states, targets, Reference(reference, True, LAMBDA), lambda role: None)
    return found.logp, found.reference, found.extrapolated


def full(net: Any, states: Any, targets: Any, reference: Any) -> tuple[Any, Any, Any]:
    """All logits of both models, and of their mixture."""
    import torch

    head = net.model.get_output_embeddings()
    mine = head(states)
    with torch.no_grad():
        theirs = head(reference)
        mixed = (1 + LAMBDA) * mine - LAMBDA * theirs
    picked = [logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0] for logits in (mine, theirs, mixed)]
    return picked[0], picked[1], picked[2]


SUITE = Suite(
    name="head",
    title="The loss stage: head, log-softmax, extrapolation and gradient",
    unit="token",
    about=(
        f"A head of {WIDTH} by {VOCABULARY:,} in float32, and as many random states as a step has answer tokens: "
        "log-probs of the policy with their gradient, of the reference, and of the mixed logits. Full logits: three "
        "tensors of tokens by vocabulary, and what log-softmax and its backward pass make of them. What counts here "
        "is memory."
    ),
    contestants=contestants,
    claims=[
        Claim("memory at 2,048 tokens: full logits / ours", FULL, tiles(2048), at_least=8, of="memory"),
        Claim("memory of ours: 4,096 tokens / 512 tokens (flat: 1)", tiles(4096), tiles(512), at_most=1.5, of="memory"),
        Claim("time at 2,048 tokens: full logits / ours", FULL, tiles(2048)),
    ],
)

if __name__ == "__main__":
    main(SUITE)
