"""A DPO step in MLX: this program's, plain and refined, against mlx-lm-lora's and a plain MLX loop.

LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 python benchmarks/bench_mlx_step.py
    [--quick] [--rounds 5] [--only TEXT] [--device cpu|gpu]

On Linux MLX's own matrix library is many times slower than OpenBLAS, hence the LD_PRELOAD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contestants import ALPHA, LAMBDA, Step, ours, plain, recorded_sums, refined, stepping
from machine import installed
from side_by_side import Claim, Contestant, Options, Shown, Suite, Unavailable, main
from workloads import ALPHA as LORA_ALPHA
from workloads import BETA, RANK, described_step, model_and_adapters, pairs, scale

from spa_lite.records import Row

PLAIN = "ours: plain, reference recomputed"
PLAIN_KNOWN = "ours: plain, reference sums known"
REFINED = "ours: refined, extrapolated, reference recomputed"
REFINED_KNOWN = "ours: refined, extrapolated, reference states known"
PEER, PEER_TUNED = "mlx-lm-lora default", "mlx-lm-lora tuned"
LOOP, LOOP_MIXED = "plain loop, four forwards", "plain loop, four forwards, decoupled"
PAIRS = 4


def rows_of(options: Options) -> list[Row]:
    """The pairs of one step."""
    return pairs(PAIRS, *scale(options.quick))


def contestants(options: Options) -> list[Contestant]:
    """All who can do a step on the same weights and ids."""
    base, policy, previous = model_and_adapters(options.folder, options.quick)
    rows = rows_of(options)

    def own(objective: Callable[[], Any], known: str = "") -> Callable[[], Step]:
        def load() -> Step:
            backend = ours(options, base, policy, previous, framework="mlx")
            return Step(backend, objective, known_of(backend, rows, known == "states") if known else None)

        return load

    def theirs(batch: int) -> Callable[[], Peer]:
        return lambda: Peer(options, base, policy, previous, batch)

    def loop(mixed: bool) -> Callable[[], Loop]:
        return lambda: Loop(options, base, policy, previous, mixed)

    return [
        Contestant(PLAIN, stepping(rows, own(plain)), like=LOOP),
        Contestant(PLAIN_KNOWN, stepping(rows, own(plain, "sums")), like=PLAIN),
        Contestant(REFINED, stepping(rows, own(refined)), like=LOOP_MIXED),
        Contestant(REFINED_KNOWN, stepping(rows, own(refined, "states")), like=REFINED),
        Contestant(PEER, stepping(rows, theirs(PAIRS)), like=PLAIN),
        Contestant(PEER_TUNED, stepping(rows, theirs(1)), like=PLAIN),
        Contestant(LOOP, stepping(rows, loop(False)), like=PLAIN),
        Contestant(LOOP_MIXED, stepping(rows, loop(True)), like=REFINED),
    ]


def known_of(backend: Any, rows: Sequence[Row], states: bool) -> Any:
    """What the sampler would have recorded of the answers."""
    import mlx.core as mx

    from spa_lite.backend import PREVIOUS, Known
    from spa_lite.backends.mlx_sampling import to_host
    from spa_lite.backends.packing import pack

    known = recorded_sums(backend, rows)
    if not states:
        return known
    backend._enter(PREVIOUS)
    kept = []
    for row in rows:
        packed = pack([row])
        arrays = (packed.ids, packed.positions, packed.segments, packed.places)
        found = to_host(backend.net.states([mx.array(array) for array in arrays], False))
        kept += np.split(found, packed.lengths.cumsum()[:-1])
    return Known(known.sums, tuple(kept))


def worn(options: Options, base: Path, folder: Path) -> Any:
    """The model as mlx-lm loads it, with mlx-lm's LoRA layers and an adapter in PEFT's format; only that is trained."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model
    from safetensors.numpy import load_file

    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    made, _ = load_model(base)
    made.set_dtype(getattr(mx, options.dtype))
    made.freeze()
    stored = load_file(folder / "adapter_model.safetensors")
    keys = {".".join(key.split(".")[5:7]) for key in stored}
    settings = {"rank": RANK, "scale": LORA_ALPHA / RANK, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(made, len(made.layers), settings)
    made.load_weights([(plain_key(key), mx.array(array.T)) for key, array in stored.items()], strict=False)
    mx.eval(made.parameters())
    return made


def plain_key(key: str) -> str:
    """mlx-lm's name of a tensor, from PEFT's."""
    key = key.removeprefix("base_model.model.")
    return key.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")


def named(gradient: Any) -> dict[str, Any]:
    """A gradient as PEFT would name and turn it."""
    from mlx.utils import tree_flatten

    from spa_lite.backends.mlx_adapters import peft_key

    return {peft_key(key): np.array(array).T for key, array in tree_flatten(gradient)}


class Loop:
    """A DPO step as one writes it in MLX: a padded batch of chosen and one of rejected answers, each through policy and
    reference, full float32 logits, compiled as a whole. `mixed`: the refined loss on mixed logits."""

    def __init__(self, options: Options, base: Path, policy: Path, previous: Path, mixed: bool) -> None:
        import mlx.core as mx
        import mlx.nn as nn
        import mlx.optimizers as optim

        self.policy, self.reference, self.mixed = worn(options, base, policy), worn(options, base, previous), mixed
        self.optimizer = optim.AdamW(0.0, weight_decay=0.0)
        state = [self.policy.state]
        self.gradient = mx.compile(nn.value_and_grad(self.policy, self._loss), inputs=state, outputs=state)
        self.found: Any = None

    def step(self, rows: Sequence[Row]) -> None:
        """One optimizer step on the mean loss over rows."""
        import mlx.core as mx

        (loss, margins), gradient = self.gradient(*batch_of(rows))
        self.optimizer.update(self.policy, gradient)
        mx.eval(loss, margins, gradient, self.policy.parameters(), self.optimizer.state)
        self.found = loss, margins, gradient

    def _loss(self, chosen: Any, rejected: Any, chosen_mask: Any, rejected_mask: Any) -> Any:
        import mlx.core as mx
        import mlx.nn as nn

        def total(logits: Any, beside: Any, ids: Any, mask: Any) -> Any:
            # Differences are summed: sums of whole log-probs over hundreds of tokens round by 1e-3 nats.
            mine, theirs = (nn.losses.cross_entropy(some, ids[:, 1:]) for some in (logits, beside))
            return ((theirs - mine) * mask[:, 1:]).sum(-1)

        ratios, simulated = [], []
        for ids, mask in ((chosen, chosen_mask), (rejected, rejected_mask)):
            mine = self.policy(ids[:, :-1]).astype(mx.float32)
            theirs = mx.stop_gradient(self.reference(ids[:, :-1]).astype(mx.float32))
            ratios.append(total(mine, theirs, ids, mask))
            if self.mixed:
                both = mx.stop_gradient((1 + LAMBDA) * mine - LAMBDA * theirs)
                simulated.append(total(both, theirs, ids, mask))
        margin = BETA * (ratios[0] - ratios[1])
        if not self.mixed:
            return -nn.log_sigmoid(margin).mean(), margin
        seen = BETA * (simulated[0] - simulated[1])
        doubt = ALPHA * (seen < 0)
        return (-(1 - doubt) * nn.log_sigmoid(margin) - doubt * nn.log_sigmoid(-margin)).mean(), seen

    def shown(self) -> Shown:
        """The last step's."""
        loss, margins, gradient = self.found
        return Shown(loss.item(), named(gradient), margins.tolist() if self.mixed else None)


def batch_of(rows: Sequence[Row]) -> list[Any]:
    """Ids and masks of answer tokens for the chosen and the rejected, padded on the right to one length."""
    import mlx.core as mx

    most = max(len(row.prompt) + len(response) for row in rows for response in row.responses)
    ids, masks = np.zeros((2, len(rows), most), np.int32), np.zeros((2, len(rows), most), np.float32)
    for index, row in enumerate(rows):
        for side, response in enumerate(row.responses):
            end = len(row.prompt) + len(response)
            ids[side, index, :end] = (*row.prompt, *response)
            masks[side, index, len(row.prompt) : end] = 1
    return [mx.array(part) for array in (ids, masks) for part in array]


class Peer:
    """mlx-lm-lora's DPO step, from its own functions, put together and compiled as its trainer does.

    Its trainer itself asks for Metal's memory limit, prints, and draws its batches at random.
    """

    def __init__(self, options: Options, base: Path, policy: Path, previous: Path, batch: int) -> None:
        if not installed("mlx-lm-lora"):
            raise Unavailable("mlx-lm-lora is not installed")
        import mlx.core as mx
        import mlx.nn as nn
        import mlx.optimizers as optim
        from mlx_lm_lora.trainer import dpo_trainer

        self.policy, self.reference, self.batch = worn(options, base, policy), worn(options, base, previous), batch
        self.policy.train()
        self.optimizer = optim.AdamW(0.0, weight_decay=0.0)
        self.made, self.loss = dpo_trainer, 0.0
        value_and_gradient = nn.value_and_grad(self.policy, self._loss)
        state = [self.policy.state, mx.random.state]
        self.gradient = mx.compile(value_and_gradient, inputs=state, outputs=state)
        self.found: Any = None

    def step(self, rows: Sequence[Row]) -> None:
        """One optimizer step, its gradient accumulated over batches of rows of like length."""
        import mlx.core as mx
        from mlx.utils import tree_map

        data = [
            {
                "chosen": [*row.prompt, *row.responses[0]],
                "rejected": [*row.prompt, *row.responses[1]],
                "chosen_prompt_length": len(row.prompt),
                "rejected_prompt_length": len(row.prompt),
            }
            for row in rows
        ]
        parts, total, self.loss = len(rows) // self.batch, None, 0.0
        for batch in self.made.iterate_dpo_batches(data, self.batch, 2048):
            (loss, *_), gradient = self.gradient(*batch)
            total = gradient if total is None else tree_map(lambda a, b: a + b, total, gradient)
            mx.eval(loss, total)
            self.loss += loss.item() / parts
        total = tree_map(lambda array: array / parts, total)
        self.optimizer.update(self.policy, total)
        mx.eval(self.policy.parameters(), self.optimizer.state, total)
        self.found = total

    def _loss(self, chosen: Any, rejected: Any, chosen_mask: Any, rejected_mask: Any) -> Any:
        import mlx.core as mx

        def score(model: Any, ids: Any, mask: Any) -> Any:
            return self.made.compute_score(self.made.get_token_scores(model, ids, mask), mask, "sigmoid")

        return self.made.dpo_loss(
            policy_chosen_score=score(self.policy, chosen, chosen_mask),
            policy_rejected_score=score(self.policy, rejected, rejected_mask),
            reference_chosen_score=mx.stop_gradient(score(self.reference, chosen, chosen_mask)),
            reference_rejected_score=mx.stop_gradient(score(self.reference, rejected, rejected_mask)),
            chosen_masks=chosen_mask,
            rejected_masks=rejected_mask,
            beta=BETA,
            delta=50.0,
        )

    def shown(self) -> Shown:
        """The last step's."""
        return Shown(self.loss, named(self.found))


SUITE = Suite(
    name="mlx_step",
    title="A DPO step with LoRA, in MLX",
    unit="pair",
    about=(
        f"{described_step(pairs(PAIRS, *scale(quick=False)))} mlx-lm-lora default: all pairs in one padded batch "
        "(its default is batches of 4), the reference in every step; tuned: a pair at a time, accumulated. Its loss "
        "and batches are called directly, compiled as its trainer does, since the trainer needs Metal. The plain loop "
        "does four forwards over full float32 logits of padded batches."
    ),
    contestants=contestants,
    claims=[
        Claim("mlx-lm-lora default / ours plain, reference recomputed in both", PEER, PLAIN, at_least=1.5),
        Claim("mlx-lm-lora tuned / ours plain, reference recomputed in both", PEER_TUNED, PLAIN),
        Claim("mlx-lm-lora default (recomputes) / ours plain, reference sums known", PEER, PLAIN_KNOWN),
        Claim("mlx-lm-lora tuned (recomputes) / ours plain, reference sums known", PEER_TUNED, PLAIN_KNOWN),
        Claim("mlx-lm-lora default (plain DPO) / ours refined, reference recomputed in both", PEER, REFINED),
        Claim("plain loop / ours, the same refined step", LOOP_MIXED, REFINED),
        Claim("ours refined / ours plain, no reference pass in either", REFINED_KNOWN, PLAIN_KNOWN, at_most=1.10),
        Claim("memory: mlx-lm-lora default / ours plain", PEER, PLAIN, at_least=2.0, of="memory"),
        Claim("memory: mlx-lm-lora tuned / ours plain", PEER_TUNED, PLAIN, of="memory"),
    ],
    framework="mlx",
)

if __name__ == "__main__":
    main(SUITE)
