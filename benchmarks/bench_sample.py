"""Two answers a prompt with their log-probabilities: this program's sampler against transformers with PEFT.

python benchmarks/bench_sample.py [--quick] [--rounds 5] [--only TEXT]
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from contestants import Text, ours
from peers import Generate, Scorer, peft_model, stops_of
from side_by_side import Claim, Contestant, Done, Options, Ready, Shown, Suite, Unavailable, main
from workloads import POLICY, adapter, model, prompts, scale

from spa_lite.records import Completion, Ids

OURS = "ours"
EAGER, TUNED = "generate + PEFT, 4 prompts at a time", "generate + PEFT, all at once"
STATIC, CONTINUOUS = "generate + PEFT, static cache, compiled", "continuous batching + PEFT"
PROMPTS, TEMPERATURE, PAGE = 8, 0.7, 32


def contestants(options: Options) -> list[Contestant]:
    """All who can draw answers. Each counts the tokens it drew: they are not the same texts, but the same lengths on
    average. Equality: the recorded log-probs of our answers are what the peers' model gives the same ids."""
    base = model(options.folder, options.quick)
    policy = adapter(options.folder, base, POLICY)
    asked = prompts(PROMPTS * options.size, *scale(options.quick), seed=2)
    most = 24 if options.quick else 384
    drawn: list[tuple[Text, Completion]] = []  # the last of ours

    def own() -> Ready:
        return drawing(ours(options, base, policy, training=False), asked, most, drawn, done)

    def done(tokens: list[int]) -> Done:
        return Done(sum(tokens), bytes=max(tokens) * weights(base, options))

    def peer(draw: Callable[[Any], Callable[[], list[int]]]) -> Callable[[], Ready]:
        def make() -> Ready:
            held = peft_model(options, base, policy)
            go = draw(held)

            def shown() -> Shown:
                scored = Scorer(held, options).per_token([text for text, _ in drawn])
                return Shown(values=np.concatenate(scored).tolist())

            return Ready(lambda: done(go()), shown)

        return make

    def generate(batch: int, **settings: Any) -> Callable[[Any], Callable[[], list[int]]]:
        def draw(held: Any) -> Callable[[], list[int]]:
            made = Generate(options, held, stops_of(base), TEMPERATURE, most, batch, **settings)
            return lambda: [len(ids) for both in made.answers(asked) for ids in both]

        return draw

    def compiled(held: Any) -> Callable[[], list[int]]:
        from transformers import CompileConfig

        if options.quick:
            raise Unavailable("compilation takes minutes, so --quick leaves it out")
        if options.device == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise Unavailable("torch.compile needs a C++ compiler here")
        everywhere = CompileConfig()
        everywhere._compile_all_devices = True  # by itself it compiles on GPUs only
        return generate(len(asked), ordered=True, cache_implementation="static", compile_config=everywhere)(held)

    def continuous(held: Any) -> Callable[[], list[int]]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        settings = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=most,
            eos_token_id=stops_of(base),
            pad_token_id=0,
        )
        inner = held.get_base_model()  # the adapter's layers are inside it
        # Room for all answers at once. Left to itself it takes most of the machine's memory for its cache.
        blocks = 2 * sum(math.ceil((len(prompt) + most) / PAGE) + 1 for prompt in asked)
        paged = ContinuousBatchingConfig(return_logprobs=True, page_size=PAGE, num_blocks=blocks, max_batch_tokens=2048)

        def go() -> list[int]:
            out = inner.generate_batch(
                inputs=[list(p) for p in asked for _ in range(2)],
                generation_config=settings,
                continuous_batching_config=paged,
                warmup=False,
                progress_bar=False,
            )
            if len(out) != 2 * len(asked):
                raise Unavailable(f"continuous batching answered {len(out)} of {2 * len(asked)} requests")
            return [len(each.generated_tokens) for each in out.values()]

        return go

    return [
        Contestant(OURS, own, like=EAGER),
        Contestant(EAGER, peer(generate(4))),
        Contestant(TUNED, peer(generate(len(asked), ordered=True)), like=OURS),
        Contestant(STATIC, peer(compiled), like=OURS),
        Contestant(CONTINUOUS, peer(continuous), like=OURS),
    ]


def drawing(
    backend: Any, asked: Sequence[Ids], most: int, drawn: list[tuple[Text, Completion]], done: Callable[..., Done]
) -> Ready:
    """Our sampler, any backend's: two answers a prompt, left in `drawn` and shown by their log-probs."""
    from spa_lite.backend import Sampling
    from spa_lite.keys import sample_key

    keys = [[sample_key(0, 1, str(i), k) for k in range(2)] for i in range(len(asked))]

    def go() -> Done:
        found = dict(backend.sample(asked, 2, Sampling(TEMPERATURE, 1.0, most), keys))
        drawn[:] = [((asked[i], c.ids), c) for i in sorted(found) for c in found[i]]
        return done([len(completion.ids) for _, completion in drawn])

    return Ready(go, lambda: Shown(values=[p for _, completion in drawn for p in completion.logprobs or ()]))


def weights(base: Any, options: Options) -> float:
    """Bytes of the weights that every step of decoding reads."""
    stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    return float(stored) / (1 if options.dtype == "float32" else 2)


def about(options: Options) -> str:
    """What stands above the table."""
    return (
        f"A random Llama of 38 million parameters with LoRA of rank 16, unmerged; {PROMPTS * options.size} prompts "
        "of mixed length (mean 200), two answers each at temperature 0.7 of at most 384 tokens, and 25 ids that end "
        "one, so that lengths vary. Seconds are per token that was kept. Each draws its own texts, so a go is not "
        "the same work for all, but tokens are counted. The log-probabilities are at temperature 1: the peers take "
        "them from `output_logits`; continuous batching gives those at the temperature of the draw. Equality: our "
        "recorded log-probabilities against the peers' model on the same ids. The rate in bytes counts the weights "
        "once per step of the longest answer."
    )


SUITE = Suite(
    name="sample",
    title="Sampling two answers a prompt, with log-probabilities",
    unit="token",
    about=about,
    contestants=contestants,
    claims=[
        Claim("generate + PEFT, 4 prompts at a time / ours", EAGER, OURS, at_least=1.3),
        Claim("generate + PEFT, all at once / ours", TUNED, OURS, at_least=1.3),
        Claim("generate + PEFT, static cache, compiled / ours", STATIC, OURS),
        Claim("continuous batching + PEFT / ours", CONTINUOUS, OURS),
        Claim("memory: generate + PEFT, all at once / ours", TUNED, OURS, of="memory"),
    ],
)

if __name__ == "__main__":
    main(SUITE)
