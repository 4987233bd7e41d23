"""The parts of the GPU script. Each is called with the models and a size, and yields what it finds, line by line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import numpy as np
from contestants import Step, every_text, plain, recorded_sums, refined, start_training, stepping, valued
from gpu_lines import Differs, Floor, Line, agreed, measure, suite_of
from gpu_models import GIB, Bench
from machine import seconds_of
from peers import Generate, Loop, Scorer, Trl
from side_by_side import Claim, Contestant, Done, Ready, Shown, Suite, agreement
from workloads import POLICY, described, prompts

from spa_lite.records import Ids, Row

CONTEXT = GIB * 6 // 10
"""What CUDA itself takes of a card, beyond what PyTorch counts."""


def rates(bench: Bench, size: str = "") -> Iterator[Line]:
    """What the device can do at best."""
    found = bench.rates()
    yield Line("rates", "matrix product", f"{found['flops'] / 1e12:,.3g} TFLOP/s")
    yield Line("rates", "copy, read and written", f"{found['bytes'] / 1e9:,.4g} GB/s")


OURS, SIMPLE, GENERATE = "ours", "ours, plain decoding", "generate + PEFT, eager"


def sample(bench: Bench, size: str) -> Iterator[Line]:
    """128 rows: all answers equally long, for the floor; then answers that stop, about one token in 250."""
    backend, amounts = bench.ours(size), bench.amounts
    asked = bench.prompts(amounts.slots)
    yield sampled_alike(bench, size, asked)
    least = bench.least(backend, "sampled", asked, amounts.answer, 2 * len(asked))
    yield Line(f"sample-{size}", f"{OURS}: decoding", backend.description["decoding"])
    floor = Floor(OURS, least / (2 * len(asked) * amounts.answer), {"1b": 0.35, "8b": 0.5}[size])
    yield from measure(sampling_suite(bench, size, asked, amounts.answer, ()), bench, floor)
    more = bench.prompts(2 * amounts.slots, seed=1)
    yield from measure(sampling_suite(bench, size, more, amounts.longest, bench.stops), bench)


def sampling_suite(bench: Bench, size: str, asked: Sequence[Ids], most: int, stops: Sequence[int]) -> Suite:
    """Two answers a prompt with log-probs, at most so many tokens; ended by one of `stops`."""

    def own(simple: bool) -> Callable[[], Ready]:
        def go() -> Done:
            return Done(sum(len(c.ids) for _, some in draw(bench.ours(size), asked, most, stops, simple) for c in some))

        return lambda: Ready(go)

    def theirs() -> Ready:
        made = Generate(bench.options, bench.peft(size), stops, 0.7, most, bench.amounts.slots)
        return Ready(lambda: Done(sum(len(ids) for some in made.answers(asked) for ids in some)))

    least = {"1b": 4.0, "8b": 2.5}[size]
    return suite_of(
        f"sample-{size}",
        "token",
        [Contestant(OURS, own(False)), Contestant(SIMPLE, own(True)), Contestant(GENERATE, theirs)],
        [
            Claim(f"generate / ours, {'stopping' if stops else 'none stops'}", GENERATE, OURS, at_least=least),
            Claim("ours plain / ours", SIMPLE, OURS, at_least=1.0),
        ],
    )


def draw(
    backend: Any, asked: Sequence[Ids], most: int, stops: Sequence[int], simple: bool = False
) -> list[tuple[int, Any]]:
    """Two answers a prompt under POLICY, ended by one of `stops`; `simple`: without what makes our decoding fast."""
    from spa_lite.backend import Sampling
    from spa_lite.keys import sample_key

    keys = [[sample_key(0, 0, str(index), k) for k in range(2)] for index in range(len(asked))]
    # As any model can be decoded: a growing cache, padding on the left, no graph.
    way = {"_way": "padded", "_slots": None} if simple else {}
    with changed(backend.tokenizer, _stops=frozenset(stops)), changed(backend, **way):
        return list(backend.sample(asked, 2, Sampling(0.7, 1.0, most), keys))


@contextmanager
def changed(thing: Any, **others: Any) -> Iterator[None]:
    """Other attributes inside the block."""
    before = {name: getattr(thing, name) for name in others}
    vars(thing).update(others)
    try:
        yield
    finally:
        vars(thing).update(before)


def sampled_alike(bench: Bench, size: str, asked: Sequence[Ids]) -> Line:
    """Both ways of decoding draw the same text (in float32), and the log-probs are those of a padded forward."""
    few = asked[:8]
    fast, slow = (dict(draw(bench.ours(size), few, 32, (), simple)) for simple in (False, True))
    answers = [(index, c) for index in range(len(few)) for c in fast[index]]
    other = [c for index in range(len(few)) for c in slow[index]]
    same = fmean(np.mean(np.array(a.ids) == np.array(b.ids)) for (_, a), b in zip(answers, other, strict=True))
    if bench.options.dtype == "float32" and same < 1:
        raise Differs(f"ours and plain decoding draw different texts: {same:.1%} of the tokens are the same")
    texts = [(few[index], c.ids) for index, c in answers]
    theirs = Scorer(bench.peft(size), bench.options).per_token(texts)
    mine = Shown(values=[fmean(c.logprobs) for _, c in answers])
    judge = Contestant(OURS, lambda: Ready(lambda: Done(1)), like="a padded forward")
    found = agreement(judge, mine, Shown(values=[float(values.mean()) for values in theirs]), bench.options.dtype)
    line = agreed(f"sample-{size}", found, f"{OURS} (mean log-prob per answer)")
    return replace(line, found=f"{line.found}; {same:.1%} of tokens as in plain decoding")


PLAIN, REFINED = "ours: plain, recorded reference", "ours: refined, reference recomputed"
TRL, TRL_TUNED, LOOP = "TRL default, 4 pairs", "TRL tuned: sorted, no checkpointing", "plain loop, refined, a pair"


def step(bench: Bench, size: str) -> Iterator[Line]:
    """One optimizer step."""
    backend = bench.ours(size)
    backend._slots = None  # a sampler's cache
    rows = bench.pairs(bench.amounts.pairs // (2 if size == "8b" else 1))
    least = bench.least_of(backend, "trained", rows)
    yield Line(f"step-{size}", "work", described(rows))
    floor = Floor(PLAIN, least / len(rows), {"1b": 0.35, "8b": 0.45}[size])
    yield from measure(step_suite(bench, size, rows), bench, floor)


def step_suite(bench: Bench, size: str, rows: Sequence[Row]) -> Suite:
    """Ours and theirs on the same rows."""
    exact = bench.options.dtype == "float32"  # else the margins, sums over hundreds of tokens, round too much

    def own(objective: Callable[[], Any], recorded: bool) -> Callable[[], Ready]:
        def load() -> Step:
            backend = bench.ours(size)
            start_training(backend)
            return Step(backend, objective, recorded_sums(backend, rows) if recorded else None, margins=exact)

        return stepping(rows, load)

    def trl(tuned: bool) -> Callable[[], Ready]:
        return stepping(rows, lambda: bench.trl(size), lambda trainer: tune(trainer, tuned))

    def loop() -> Loop:
        return Loop(bench.options, bench.peft(size), mixed=True, batch=1, ordered=True)

    return suite_of(
        f"step-{size}",
        "pair",
        [
            Contestant(PLAIN, own(plain, True)),
            Contestant(REFINED, own(refined, False)),
            Contestant(TRL, trl(False), like=PLAIN),
            Contestant(TRL_TUNED, trl(True), like=PLAIN),
            Contestant(LOOP, stepping(rows, loop), like=REFINED),
        ],
        [
            Claim("TRL default / ours plain", TRL, PLAIN, at_least=2.6),
            Claim("TRL tuned / ours plain", TRL_TUNED, PLAIN, at_least=1.3),
            Claim("TRL default (plain) / ours refined", TRL, REFINED, at_least=1.9),
            Claim("plain loop / ours refined", LOOP, REFINED, at_least=2.0),
        ],
    )


def tune(trainer: Trl, tuned: bool) -> None:
    """Turn TRL from its defaults to what one who knows it sets, and back."""
    trainer.ordered = tuned
    if tuned:
        trainer.model.gradient_checkpointing_disable()
    else:
        trainer.model.gradient_checkpointing_enable(trainer.trainer.args.gradient_checkpointing_kwargs)


SCORED, PADDED, PADDED_TUNED = "ours: scored", "padded forwards of 8", "padded forwards of 8, sorted, answers' logits"


def score(bench: Bench, size: str) -> Iterator[Line]:
    """Log-probs of both answers of user's pairs under the base."""
    backend = bench.ours(size)
    rows = bench.pairs(bench.amounts.texts, seed=2)
    tokens = sum(len(response) for row in rows for response in row.responses)
    floor = Floor(SCORED, bench.least_of(backend, "scored", rows) / tokens, {"1b": 0.4, "8b": 0.55}[size])
    yield from measure(scoring_suite(bench, size, rows, tokens), bench, floor)


def scoring_suite(bench: Bench, size: str, rows: Sequence[Row], tokens: int) -> Suite:
    """Ours and padded forwards over all logits. Shown is the mean log-prob of each answer."""

    def own() -> Ready:
        from spa_lite.backend import INIT

        backend = bench.ours(size)

        def values(found: dict[int, Any]) -> list[float]:
            return [score.logp / score.tokens for index in range(len(rows)) for score in found[index]]

        return valued(tokens, lambda: dict(backend.logprob(rows, INIT)), values)

    def padded(tuned: bool) -> Callable[[], Ready]:
        def make() -> Ready:
            scorer, texts = Scorer(bench.peft(size), bench.options, tuned), every_text(rows)
            return valued(tokens, lambda: scorer.per_token(texts, base=True), lambda found: [a.mean() for a in found])

        return make

    return suite_of(
        f"score-{size}",
        "token",
        [
            Contestant(SCORED, own),
            Contestant(PADDED, padded(False), like=SCORED),
            Contestant(PADDED_TUNED, padded(True), like=SCORED),
        ],
        [
            Claim("padded forwards / ours", PADDED, SCORED, at_least=2.5),
            Claim("padded forwards, tuned / ours", PADDED_TUNED, SCORED, at_least=1.0),
        ],
    )


ROUND, COMPOSED = "ours: a round", "generate, four forwards, TRL default"


def whole_round(bench: Bench, size: str) -> Iterator[Line]:
    """Sample, judge, train."""
    asked, stops = bench.prompts(bench.amounts.round, seed=3), bench.stops
    most, batch = bench.amounts.longest, bench.amounts.pairs

    def own() -> Ready:
        def go() -> Done:
            our_round(bench.ours(size), asked, most, stops, batch)
            return Done(len(asked))

        return Ready(go)

    def theirs() -> Ready:
        writer = Generate(bench.options, bench.peft(size), stops, 0.7, most, bench.amounts.slots)
        judge, trainer = Scorer(bench.peft(size), bench.options), bench.trl(size)
        tune(trainer, False)

        def go() -> Done:
            answers = writer.answers(asked)
            texts = [(prompt, ids) for prompt, both in zip(asked, answers, strict=True) for ids in both]
            own, other = (judge.per_token(texts, base) for base in (False, True))
            rewards = [float(a.sum() - b.sum()) for a, b in zip(own, other, strict=True)]
            rows = labelled(asked, answers, better_first(rewards))
            for start in range(0, len(rows), batch):
                trainer.step(rows[start : start + batch])
            return Done(len(asked))

        return Ready(go)

    claims = [Claim("the composed peers / ours", COMPOSED, ROUND, at_least={"1b": 2.0, "8b": 4.0}[size])]
    contestants = [Contestant(ROUND, own), Contestant(COMPOSED, theirs)]
    yield from measure(suite_of(f"round-{size}", "prompt", contestants, claims), bench, rounds=1)


Order = tuple[int, int]
"""Which of two answers is the better one, and the other."""


def better_first(rewards: Sequence[float]) -> list[Order]:
    """Of the rewards of both answers of each prompt."""
    return [(0, 1) if a > b else (1, 0) for a, b in zip(rewards[::2], rewards[1::2], strict=True)]


def labelled(asked: Sequence[Ids], answers: Sequence[Sequence[Ids]], orders: Sequence[Order]) -> list[Row]:
    """Pairs, the better answer first."""
    return [
        Row(prompt=prompt, responses=(both[first], both[second]))
        for prompt, both, (first, second) in zip(asked, answers, orders, strict=True)
    ]


def our_round(backend: Any, asked: Sequence[Ids], most: int, stops: Sequence[int], batch: int) -> None:
    """The three stages with what each leaves for the next: sampled log-probs are the judge's and the reference's."""
    from spa_lite.backend import INIT, Known
    from spa_lite.fit import halving

    drawn = halving(backend, "sample", lambda: dict(draw(backend, asked, most, stops)))
    answers = [tuple(c.ids for c in drawn[index]) for index in range(len(asked))]
    own = [math.fsum(c.logprobs) for index in range(len(asked)) for c in drawn[index]]
    rows = labelled(asked, answers, [(0, 1)] * len(asked))
    scored = halving(backend, "score_tokens", lambda: dict(backend.logprob(rows, INIT)))
    other = [s.logp for index in range(len(rows)) for s in scored[index]]
    orders = better_first([a - b for a, b in zip(own, other, strict=True)])
    better = labelled(asked, answers, orders)
    sums = np.array([own[2 * index + which] for index, order in enumerate(orders) for which in order])
    backend.snapshot()
    start_training(backend)
    for start in range(0, len(better), batch):
        some, known = better[start : start + batch], Known(sums[2 * start : 2 * (start + batch)])
        halving(backend, "micro_tokens", lambda some=some, known=known: backend.dpo_step(some, refined(), 1e-5, known))


def four_bits(bench: Bench, size: str) -> Iterator[Line]:
    """Sampling and a step with packed weights, against the floor."""
    backend, amounts = bench.quantised(size), bench.amounts
    asked, rows = bench.prompts(amounts.slots), bench.pairs(amounts.pairs // 2)
    start_training(backend)

    def line(done: str, unit: str, count: int, least: float, work: Callable[[], Any]) -> Line:
        work()
        spent = median(seconds_of(work, bench.options.device) for _ in range(bench.rounds))
        told = f"{count / spent:,.4g} {unit}/s, {least / spent:.0%} of the floor"
        return Line(f"four-{size}", f"ours, 4 bits: {done}", told)

    slots = 2 * len(asked)
    least = bench.least(backend, "sampled", asked, amounts.answer, slots)
    yield line("sampled", "token", slots * amounts.answer, least, lambda: draw(backend, asked, amounts.answer, ()))
    least = bench.least_of(backend, "trained", rows)
    yield line(
        "scored and trained",
        "pair",
        len(rows),
        least,
        lambda: backend.dpo_step(rows, plain(), 0.0, recorded_sums(backend, rows)),
    )


def capped(bench: Bench, size: str) -> Iterator[Line]:
    """A round inside a small card's memory: prompts of up to 1,024 tokens, answers of 300, none of which stops."""
    import torch

    most = 6 if size == "1b" else 12
    part, cuda = f"cap-{size}", bench.options.device != "cpu"
    bench.base(size)
    bench.adapter(size, POLICY)  # made without a cap
    bench.forget()
    cap, backend = most * GIB - CONTEXT, None
    if cuda:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()
    try:
        backend = bench.quantised(size) if size == "8b" else bench.ours(size)
        long = replace(bench.amounts.lengths, prompt=bench.amounts.capped_prompt / 2, most=bench.amounts.capped_prompt)
        asked = prompts(bench.amounts.capped - 1, bench.vocabulary, long)
        asked.append((asked[0] * bench.amounts.capped_prompt)[: bench.amounts.capped_prompt])
        backend.batching = chosen(bench, backend, asked, cap if cuda else None)
        spent = seconds_of(
            lambda: our_round(backend, asked, bench.amounts.capped_answer, (), bench.amounts.pairs),
            bench.options.device,
        )
        yield Line(part, "a round", f"{len(asked)} prompts in {spent:.1f} s; at the end {backend.batching}")
        if cuda:
            peak = (torch.cuda.max_memory_reserved() + CONTEXT) / GIB
            yield Line(part, "most memory taken", f"{peak:.2f} GiB", f"at most {most}", peak <= most)
    finally:
        backend = None
        bench.forget()
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def chosen(bench: Bench, backend: Any, asked: Sequence[Ids], cap: int | None) -> Any:
    """The batch sizes that the program itself takes for that much memory."""
    import torch

    from spa_lite.estimate import Longest
    from spa_lite.fit import sizes_that_fit
    from spa_lite.recipe import build, load_layer

    if cap is not None:
        backend.free_memory = lambda: cap - torch.cuda.memory_allocated()
    answer = bench.amounts.capped_answer
    asks = {"sampling.max_tokens": answer, "lengths.max_prompt_length": bench.amounts.capped_prompt}
    recipe = build({"scale": load_layer("scale", "laptop"), "bench": asks})[0]
    start_training(backend)
    longest = max(map(len, asked))
    return sizes_that_fit(recipe, backend, Longest(longest, answer, longest + answer))
