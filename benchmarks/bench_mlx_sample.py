"""Two answers a prompt in MLX: this program's sampler against mlx-lm's batch generation.

LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 python benchmarks/bench_mlx_sample.py
    [--quick] [--rounds 5] [--only TEXT] [--device cpu|gpu]

On Linux MLX's own matrix library is many times slower than OpenBLAS, hence the LD_PRELOAD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bench_mlx_step import worn
from bench_sample import PROMPTS, TEMPERATURE, drawing, weights
from contestants import Text, ours
from peers import stops_of
from side_by_side import Claim, Contestant, Done, Options, Ready, Shown, Suite, main
from workloads import POLICY, adapter, model, prompts, scale

from spa_lite.records import Completion, Ids

OURS = "ours"
PEER, PEER_SILENT = "mlx-lm batch_generate with log-probs", "mlx-lm batch_generate, all at once, no log-probs"


def contestants(options: Options) -> list[Contestant]:
    """Each counts the tokens it drew: not the same texts, but the same lengths on average. Equality: the recorded
    log-probs of our answers are what mlx-lm's model gives the same ids."""
    base = model(options.folder, options.quick)
    policy = adapter(options.folder, base, POLICY)
    asked = prompts(PROMPTS * options.size, *scale(options.quick), seed=2)
    most = 24 if options.quick else 384
    drawn: list[tuple[Text, Completion]] = []  # the last of ours

    def own() -> Ready:
        return drawing(ours(options, base, policy, training=False, framework="mlx"), asked, most, drawn, done)

    def done(tokens: list[int]) -> Done:
        return Done(sum(tokens), bytes=max(tokens) * weights(base, options))

    def peer(silent: bool) -> Callable[[], Ready]:
        def make() -> Ready:
            from mlx_lm import batch_generate
            from mlx_lm.sample_utils import make_sampler
            from mlx_lm.utils import load_tokenizer

            held = worn(options, base, policy)
            tokenizer: Any = load_tokenizer(base, eos_token_ids=stops_of(base))
            wanted = [list(prompt) for prompt in asked for _ in range(2)]
            wider = {"prefill_batch_size": len(wanted), "completion_batch_size": len(wanted)}

            def go() -> Done:
                found = batch_generate(
                    held,
                    tokenizer,
                    sorted(wanted, key=len) if silent else wanted,
                    max_tokens=most,
                    return_token_ids=True,
                    return_logprobs=not silent,
                    sampler=make_sampler(TEMPERATURE),
                    **(wider if silent else {}),
                )
                # The token that ends an answer was computed, but is not among its ids.
                return done([len(ids) + (len(ids) < most) for ids in found.token_ids or ()])

            return Ready(go, lambda: Shown(values=logprobs(held, [text for text, _ in drawn])))

        return make

    return [
        Contestant(OURS, own, like=PEER),
        Contestant(PEER, peer(silent=False)),
        Contestant(PEER_SILENT, peer(silent=True), like=OURS),
    ]


def logprobs(held: Any, texts: Sequence[tuple[Ids, Ids]]) -> list[float]:
    """Of every answer's tokens, one text at a time."""
    import mlx.core as mx

    found = []
    for prompt, answer in texts:
        logits = held(mx.array([[*prompt, *answer][:-1]]))[0, len(prompt) - 1 :].astype(mx.float32)
        every = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found.append(np.array(mx.take_along_axis(every, mx.array(answer)[:, None], axis=-1)[:, 0]))
    return np.concatenate(found).tolist()


def about(options: Options) -> str:
    """What stands above the table."""
    return (
        f"A random Llama of 38 million parameters with LoRA of rank 16, unmerged; {PROMPTS * options.size} prompts "
        "of mixed length (mean 200), two answers each at temperature 0.7 of at most 384 tokens, and 25 ids that end "
        "one, so that lengths vary. Seconds are per sampled token. mlx-lm gets every prompt twice, and computes it "
        "twice; as it comes (8 prompts read at a time, 32 answers decoded together), and all at once, sorted by "
        "length and without asking for log-probabilities. Each draws its own texts, but tokens are counted. Equality: "
        "our recorded log-probabilities against mlx-lm's model on the same ids. The rate in bytes counts the weights "
        "once per step of the longest answer."
    )


SUITE = Suite(
    name="mlx_sample",
    title="Sampling two answers a prompt, in MLX",
    unit="token",
    about=about,
    contestants=contestants,
    claims=[
        Claim("mlx-lm batch_generate with log-probs / ours", PEER, OURS),
        Claim("mlx-lm batch_generate, all at once, no log-probs / ours", PEER_SILENT, OURS),
        Claim("memory: mlx-lm batch_generate with log-probs / ours", PEER, OURS, of="memory"),
    ],
    framework="mlx",
)

if __name__ == "__main__":
    main(SUITE)
