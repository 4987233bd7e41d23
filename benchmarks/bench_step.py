"""A DPO step: this program's, plain and refined, against TRL's DPOTrainer and a plain PyTorch loop.

python benchmarks/bench_step.py [--quick] [--rounds 5] [--only TEXT]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from contestants import Step, Text, every_text, ours, plain, refined, stepping
from peers import Loop, Scorer, Trl, peft_model
from side_by_side import Claim, Contestant, Options, Suite, main
from workloads import described_step, model_and_adapters, pairs, scale

from spa_lite.records import Row

PLAIN = "ours: plain, reference sums known"
REFINED = "ours: refined, extrapolated, reference recomputed"
REFINED_KNOWN = "ours: refined, extrapolated, reference states known"
TRL, TRL_TUNED, TRL_KNOWN = "TRL default", "TRL tuned", "TRL tuned, reference precomputed"
LOOP, LOOP_TUNED = "plain loop, decoupled", "plain loop, decoupled, a pair at a time"
PAIRS = 4


def rows_of(options: Options) -> list[Row]:
    """The pairs of one step."""
    return pairs(PAIRS * options.size, *scale(options.quick))


def contestants(options: Options) -> list[Contestant]:
    """All who can do a step on the same weights and ids."""
    base, policy, previous = model_and_adapters(options.folder, options.quick)
    rows = rows_of(options)

    def own(objective: Callable[[], Any], known: str = "") -> Callable[[], Step]:
        def load() -> Step:
            backend = ours(options, base, policy, previous)
            return Step(backend, objective, what_is_known(known == "states") if known else None)

        return load

    def what_is_known(states: bool) -> Any:
        from spa_lite.backend import Known

        reference, texts = peft_model(options, base, previous), every_text(rows)
        sums = np.array([values.sum() for values in Scorer(reference, options).per_token(texts, batch=1)])
        return Known(sums, tuple(states_of(reference, text) for text in texts) if states else None)

    def loop(batch: int, ordered: bool) -> Callable[[], Loop]:
        return lambda: Loop(options, peft_model(options, base, policy, previous), True, batch, ordered)

    def trl(batch: int, **settings: Any) -> Callable[[], Trl]:
        return lambda: Trl(options, base, policy, previous, batch, **settings)

    return [
        Contestant(PLAIN, stepping(rows, own(plain, "sums"))),
        Contestant(REFINED, stepping(rows, own(refined)), like=LOOP),
        Contestant(REFINED_KNOWN, stepping(rows, own(refined, "states")), like=REFINED),
        Contestant(TRL, stepping(rows, trl(min(8, len(rows)), checkpointed=True)), like=PLAIN),
        Contestant(TRL_TUNED, stepping(rows, trl(1, checkpointed=False, ordered=True)), like=PLAIN),
        Contestant(TRL_KNOWN, stepping(rows, trl(1, checkpointed=False, ordered=True, known=rows)), like=PLAIN),
        Contestant(LOOP, stepping(rows, loop(len(rows), False)), like=REFINED),
        Contestant(LOOP_TUNED, stepping(rows, loop(1, True)), like=LOOP),
    ]


def states_of(model: Any, text: Text) -> Any:
    """What the head reads where each token of an answer is predicted [tokens, width]."""
    import torch

    prompt, answer = text
    with torch.no_grad():
        body = model.get_base_model().base_model
        ids = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
        states = body(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
    kept = states.cpu()
    return kept.view(torch.uint16).numpy() if kept.dtype == torch.bfloat16 else kept.numpy()


def about(options: Options) -> str:
    """What stands above the table."""
    return (
        f"{described_step(rows_of(options))} TRL default: all pairs in one padded batch, every layer "
        "checkpointed, as its defaults have it; tuned: sorted, no checkpointing, a pair at a time (nothing is padded "
        "but within the pair; the plain loop, run both ways, shows what that is worth here). Its loss is called "
        "directly, without data loader and logging. The plain loop does four forwards over full logits, mixes them, "
        "and takes the refined loss; all pairs in one batch, or a pair at a time."
    )


SUITE = Suite(
    name="step",
    title="A DPO step with LoRA",
    unit="pair",
    about=about,
    contestants=contestants,
    claims=[
        Claim("TRL tuned (plain DPO) / ours refined, reference recomputed in both", TRL_TUNED, REFINED, at_least=1.0),
        Claim("TRL default (plain DPO) / ours refined, reference recomputed in both", TRL, REFINED),
        Claim("plain loop / ours, the same refined step", LOOP, REFINED, at_least=2.0),
        Claim("plain loop, a pair at a time / ours, the same refined step", LOOP_TUNED, REFINED, at_least=2.0),
        Claim("ours refined / ours plain, no reference pass in either", REFINED_KNOWN, PLAIN, at_most=1.10),
        Claim("TRL tuned / ours plain, reference known in both", TRL_KNOWN, PLAIN),
        Claim("memory: TRL default / ours refined", TRL, REFINED, of="memory"),
        Claim("memory: TRL tuned / ours refined", TRL_TUNED, REFINED, of="memory"),
        Claim("memory: plain loop / ours refined", LOOP, REFINED, of="memory"),
    ],
)

if __name__ == "__main__":
    main(SUITE)
