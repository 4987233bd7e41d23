"""A whole round of SPA: this program's stages against the tools that a user would put together.

python benchmarks/bench_round.py [--quick] [--rounds 5] [--only TEXT]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from contestants import texts_of
from peers import Generate, Loop, Scorer, Trl, peft_model, stops_of
from side_by_side import Claim, Contestant, Done, Options, Ready, Shown, Suite, main
from workloads import BETA, POLICY, adapter, model, prompts, scale

from spa_lite.records import Ids, Judgement, Row

TEMPERATURE = 0.7
ASKED = {"lesson": 128, "Llama": 12}
"""Prompts of a round. With very few of them our texts, the same in every go, could be short or long by chance, and all
pairs would be scored again to check the recorded log-probabilities."""


@dataclass(frozen=True)
class World:
    """One model with its prompts, and how a round on it is done."""

    name: str
    base: Path
    policy: Path
    prompts: Sequence[Ids]
    most: int  # tokens of an answer
    batch: int  # pairs of an optimizer step
    drawn: int  # prompts that the default peer samples together


def worlds(options: Options) -> Iterator[World]:
    """The lesson's, and the random Llama."""
    from spa_lite.lesson import MODEL_DIR

    yield World(
        "lesson",
        MODEL_DIR,
        MODEL_DIR.parent / "seed_adapter",
        lesson_prompts(8 if options.quick else ASKED["lesson"] * options.size),
        48,
        16,
        8,
    )
    base = model(options.folder, options.quick)
    asked = prompts(ASKED["Llama"] * options.size, *scale(options.quick), seed=3)
    yield World("Llama", base, adapter(options.folder, base, POLICY), asked, 24 if options.quick else 256, 4, 4)


def lesson_prompts(number: int) -> list[Ids]:
    """Prompts of the lesson, as its model's ids."""
    from spa_lite import backends
    from spa_lite.backend import ModelSettings
    from spa_lite.lesson import MODEL_DIR, source

    tokenizer = backends.load("torch", ModelSettings(str(MODEL_DIR), device="cpu")).tokenizer
    return [tokenizer.encode_prompt(prompt.messages) for prompt in source.prompts("rounds", number, 0)]


def contestants(options: Options) -> list[Contestant]:
    """For each world: ours, and the composed peers."""
    found: list[Contestant] = []
    for world in worlds(options):
        judged: list[Judgement] = []  # ours, of the last go
        own, mixed = f"{world.name}: ours", f"{world.name}: generate, four forwards, plain loop with refinement"
        found += [
            Contestant(own, our_round(options, world, judged), like=mixed),
            Contestant(mixed, composed(options, world, judged, "loop")),
            Contestant(
                f"{world.name}: generate, four forwards, TRL default", composed(options, world, judged, "trl"), own
            ),
            Contestant(f"{world.name}: the same, tuned", composed(options, world, judged, "tuned"), own),
        ]
    return found


# --- ours --------------------------------------------------------------------------------------------------------


def our_round(options: Options, world: World, judged: list[Judgement]) -> Callable[[], Ready]:
    """The stages of a run in a folder of its own, as `spa-lite run` does them: journals, checkpoints and all."""

    def make() -> Ready:
        from spa_lite import backends, prepare
        from spa_lite.recipe import build, load_layer
        from spa_lite.records import Message, Prompt
        from spa_lite.stages import Workshop
        from spa_lite.stages.workbench import Data, read_judgements
        from spa_lite.store import Run

        scale = load_layer("scale", "lesson") if world.name == "lesson" else {}
        recipe = build({"spa": load_layer("recipe", "spa"), "scale": scale, "bench": changes(options, world)})[0]
        models = prepare.models_of(recipe, backends.load)
        _ = models.backend
        asked = [Prompt(id=str(i), messages=(Message(role="user", content=str(i)),)) for i in range(len(world.prompts))]
        data = Data([], [list(zip(asked, world.prompts, strict=True))], [], [])
        number = count()
        place = Path(tempfile.mkdtemp(dir=options.folder))

        def go() -> Done:
            run = Run(place / str(next(number)))
            with run.locked(recipe):
                shop = Workshop(models, recipe, data, run)
                policy = shop.first_policy()
                samples = shop.sample(1, shop.prompts(1, policy), policy)
                judgements = shop.judge(1, samples, policy, None)
                shop.train(1, judgements, policy)
            judged[:] = read_judgements(run.path(judgements, "judgements.jsonl"))
            return Done(sum(j.tokens_a + j.tokens_b for j in judged) / 1000)

        return Ready(go, lambda: Shown(values=per_token(judged, [(j.logratio_a, j.logratio_b) for j in judged])))

    return make


def changes(options: Options, world: World) -> dict[str, Any]:
    """Settings of the round. Refined from the first step on: of a long round that is all but the beginning."""
    return {
        "inputs.model": str(world.base),
        "inputs.backend": "torch",
        "inputs.device": options.device,
        "inputs.adapter_path": str(world.policy),
        "inputs.no_seed_pairs": True,
        "rounds": 1,
        "sampling.temp": TEMPERATURE,
        "sampling.max_tokens": world.most,
        "loss.beta": BETA,
        "lengths.max_prompt_length": 512,
        "lengths.max_length": 1024,
        "train.batch_size": world.batch,
        "refine.warmup": 0.0,
        "refine.window": 4,
        "refine.before_full": "zero",
    }


def per_token(judged: Sequence[Judgement], ratios: Sequence[Sequence[float]]) -> list[float]:
    """Log-ratios of answers divided by their lengths: rounding grows with these."""
    lengths = [(j.tokens_a, j.tokens_b) for j in judged]
    return [r / n for both, sizes in zip(ratios, lengths, strict=True) for r, n in zip(both, sizes, strict=True)]


# --- the composed peers ------------------------------------------------------------------------------------------


def composed(options: Options, world: World, judged: list[Judgement], way: str) -> Callable[[], Ready]:
    """`generate`, padded forwards with the adapter on and off, then TRL or the plain loop; all with one model."""

    def make() -> Ready:
        trainer: Any
        if way == "loop":
            held = peft_model(options, world.base, world.policy, world.policy)
            trainer = Loop(options, held, mixed=True, batch=world.batch, ordered=False)
        else:
            batch, checkpointed = (1, False) if way == "tuned" else (min(8, world.batch), True)
            trainer = Trl(
                options, world.base, world.policy, world.policy, batch, checkpointed, ordered=not checkpointed
            )
            held = trainer.model
        drawn = len(world.prompts) if way == "tuned" else world.drawn
        ordered = way == "tuned"
        sampler = Generate(options, held, stops_of(world.base), TEMPERATURE, world.most, drawn, ordered)
        scorer = Scorer(held, options, tuned=ordered)

        def go() -> Done:
            held.eval()
            answers = sampler.answers(world.prompts)
            rows = [Row(prompt=p, responses=both) for p, both in zip(world.prompts, answers, strict=True)]
            ratios = judge(scorer, rows)
            best = [
                Row(prompt=r.prompt, responses=r.responses if a > b else r.responses[::-1])
                for r, (a, b) in zip(rows, ratios, strict=True)
            ]
            held.train(way != "loop")
            for start in range(0, len(best), world.batch):
                trainer.step(best[start : start + world.batch])
            return Done(sum(len(ids) for both in answers for ids in both) / 1000)

        def shown() -> Shown:
            held.eval()
            rows = [Row(prompt=j.prompt_ids, responses=(j.a.ids, j.b.ids)) for j in judged]
            return Shown(values=per_token(judged, judge(scorer, rows)))

        return Ready(go, shown)

    return make


def judge(scorer: Scorer, rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Log-ratios of both answers, by four forwards a batch."""
    sides = []
    for which in (0, 1):
        texts = texts_of(rows, which)
        on, off = scorer.per_token(texts), scorer.per_token(texts, base=True)
        sides.append([float(np.sum(a) - np.sum(b)) for a, b in zip(on, off, strict=True)])
    return list(zip(*sides, strict=True))


def claims() -> Iterator[Claim]:
    """The same of both worlds."""
    for name in ("lesson", "Llama"):
        own = f"{name}: ours"
        for peer in ("generate, four forwards, TRL default", "the same, tuned"):
            yield Claim(f"{name}: {peer} / ours", f"{name}: {peer}", own, at_least=2.0)
        loop = f"{name}: generate, four forwards, plain loop with refinement"
        yield Claim(f"{loop} / ours", loop, own)
        trl = f"{name}: generate, four forwards, TRL default"
        yield Claim(f"memory: {trl} / ours", trl, own, of="memory")


def about(options: Options) -> str:
    """What stands above the table."""
    lesson, llama = ASKED["lesson"] * options.size, ASKED["Llama"] * options.size
    return (
        f"The lesson's model with its seed adapter ({lesson} prompts of the lesson, answers of at most 48 tokens, "
        f"steps of 16 pairs), and the random Llama of 38 million parameters with LoRA of rank 16 ({llama} prompts of "
        "mixed length, answers of at most 256 tokens, steps of 4 pairs); the reference is the policy that sampled. "
        "Ours: the stages of `spa-lite run`, with journals, checkpoints, and the refined, extrapolated loss from "
        "the first step on. The peers: `generate` with PEFT (8 and 4 prompts at a time), chosen and rejected in "
        "padded batches of 8 with the adapter on and off, then TRL's plain DPO step or the plain loop's refined "
        "one. Each draws texts of its own, so seconds are per 1,000 sampled tokens. Tuned: sampled all at once, "
        "scored a row at a time, trained on a pair at a time, no checkpointing."
    )


SUITE = Suite(
    name="round",
    title="A whole round: sample, judge, train",
    unit="1,000 sampled tokens",
    about=about,
    contestants=contestants,
    claims=list(claims()),
)

if __name__ == "__main__":
    main(SUITE)
