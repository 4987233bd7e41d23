"""Judging by the implicit reward: this program's passes against padded forwards with transformers and PEFT.

python benchmarks/bench_score.py [--quick] [--rounds 5] [--only TEXT]
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from contestants import Text, every_text, ours, texts_of, valued
from peers import Scorer, peft_model
from side_by_side import Claim, Contestant, Options, Ready, Suite, main
from workloads import POLICY, adapter, described, model, pairs, scale

from spa_lite.records import Row

SAMPLED = "ours: sampled pairs, log-probs recorded"
GIVEN = "ours: a user's pairs, both passes"
FOUR, SHUFFLED = "four padded forwards", "batches of 8 in random order, both passes"
TUNED = "tuned: a row at a time, logits of answers only, both passes"
PAIRS, CHECKED = 8, 0.02
Passes = Callable[[Scorer, bool], list[np.ndarray[Any, Any]]]


def rows_of(options: Options) -> list[Row]:
    """The pairs that are judged."""
    return pairs(PAIRS * options.size, *scale(options.quick), seed=1)


def contestants(options: Options) -> list[Contestant]:
    """All who can judge the same pairs with the same model. What is shown is the log-ratio of every token."""
    base = model(options.folder, options.quick)
    policy = adapter(options.folder, base, POLICY)
    rows = rows_of(options)
    texts = every_text(rows)

    def own(recorded: bool) -> Callable[[], Ready]:
        def make() -> Ready:
            from spa_lite.backend import INIT
            from spa_lite.backend import POLICY as ROLE

            backend = ours(options, base, policy, training=False)
            kept = scores(backend, rows, ROLE) if recorded else None

            def work() -> Any:
                if recorded:  # a few are scored again, to see whether the recorded ones may be taken
                    scores(backend, rows[: math.ceil(CHECKED * len(rows))], ROLE)
                mine = kept if kept is not None else scores(backend, rows, ROLE)
                return mine - scores(backend, rows, INIT)

            return valued(len(rows), work)

        return make

    def peer(passes: Passes, tuned: bool = False) -> Callable[[], Ready]:
        def make() -> Ready:
            scorer = Scorer(peft_model(options, base, policy), options, tuned)
            both = partial(passes, scorer)
            return valued(len(rows), lambda: np.concatenate(both(False)) - np.concatenate(both(True)))

        return make

    def four(scorer: Scorer, bare: bool) -> list[np.ndarray[Any, Any]]:
        chosen, rejected = (scorer.per_token(texts_of(rows, which), bare) for which in (0, 1))
        return [values for both in zip(chosen, rejected, strict=True) for values in both]

    return [
        Contestant(SAMPLED, own(recorded=True), like=FOUR),
        Contestant(GIVEN, own(recorded=False), like=SHUFFLED),
        Contestant(FOUR, peer(four)),
        Contestant(SHUFFLED, peer(lambda scorer, bare: shuffled(scorer, texts, bare)), like=FOUR),
        Contestant(TUNED, peer(lambda scorer, bare: scorer.per_token(texts, bare, batch=1), tuned=True), like=FOUR),
    ]


def scores(backend: Any, rows: Sequence[Row], role: str) -> np.ndarray[Any, Any]:
    """Log-probabilities of all tokens, row by row."""
    found = dict(backend.logprob(rows, role, per_token=True))
    return np.concatenate([np.array(score.per_token) for index in range(len(rows)) for score in found[index]])


def shuffled(scorer: Scorer, texts: Sequence[Text], bare: bool) -> list[np.ndarray[Any, Any]]:
    """As they lie in a shuffled file; told in the order of `texts`."""
    order = random.Random(0).sample(range(len(texts)), len(texts))
    found = dict(zip(order, scorer.per_token([texts[index] for index in order], bare), strict=True))
    return [found[index] for index in range(len(texts))]


def about(options: Options) -> str:
    """What stands above the table."""
    return (
        f"A random Llama of 38 million parameters with LoRA of rank 16, and {described(rows_of(options))}. Every "
        "contestant finds the log-ratio of adapter on to adapter off. Of sampled pairs the log-probabilities under "
        "the policy are recorded: one pass remains, and a second one of 2 % of the pairs (here: one of them) as a "
        "check. The peers run transformers with PEFT: chosen and rejected answers in padded batches of 8 with the "
        "adapter on and off; the same answers shuffled; and, tuned, one at a time, so that nothing is padded, with "
        "the logits of answers only."
    )


SUITE = Suite(
    name="score",
    title="Judging pairs by the implicit reward",
    unit="pair",
    about=about,
    contestants=contestants,
    claims=[
        Claim("four padded forwards / ours, sampled pairs", FOUR, SAMPLED, at_least=2.5),
        Claim("batches of 8 in random order / ours, a user's pairs", SHUFFLED, GIVEN, at_least=1.5),
        Claim("tuned / ours, sampled pairs", TUNED, SAMPLED),
        Claim("tuned / ours, a user's pairs", TUNED, GIVEN),
        Claim("memory: four padded forwards / ours, sampled pairs", FOUR, SAMPLED, of="memory"),
    ],
)

if __name__ == "__main__":
    main(SUITE)
