"""All that needs a GPU, in one script of ten minutes: ours against what a user would run, and against the hardware.

    python benchmarks/bench_gpu.py [--parts rates,sample-1b,step-8b] [--minutes 9] [--rounds 2] [--tiny]

Models are random, of the shapes of Llama-3.2-1B and Llama-3.1-8B, in bfloat16, with two LoRA adapters of rank 16. Each
part has a time of its own and fails alone; what is known is printed, and written to gpu.json (in --out), part
by part. TRL and bitsandbytes are used where they are installed. `--tiny` goes through everything with toys.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import side_by_side
from contestants import Generate, Loop, Scorer, Trl, gradients_of, ours, peft_model, refined
from side_by_side import (
    Claim,
    Contestant,
    Done,
    Options,
    Ready,
    Shown,
    Suite,
    Unavailable,
    agreement,
    ceiling,
    device_name,
    installed,
    judged,
    now,
    timed,
    versions,
)
from workloads import ALPHA, BETA, POLICY, PREVIOUS, RANK, Lengths, described, pairs, prompts

from spa_lite.records import Ids, Row

LLAMA: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": LLAMA
    | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192}
    | {"tie_word_embeddings": True},
    "8b": LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    | {"tie_word_embeddings": False},
}
TINY = {"vocab_size": 384, "max_position_embeddings": 512}
GIB = 2**30
CONTEXT = GIB * 6 // 10
"""What CUDA itself takes of a card, beyond what PyTorch counts."""


@dataclass(frozen=True)
class Amounts:
    """How much work the parts do."""

    lengths: Lengths = field(default_factory=Lengths)  # about 200 and 250 tokens
    slots: int = 64  # prompts decoded together, two answers each
    answer: int = 250  # tokens of every answer where none stops
    longest: int = 300  # where some do
    pairs: int = 32  # of a step
    texts: int = 96  # pairs scored
    round: int = 64  # prompts of a round
    capped: int = 32  # prompts of a round under a memory cap
    capped_prompt: int = 1024
    capped_answer: int = 300


FULL = Amounts()
TOYS = Amounts(Lengths(12, 10, 4, 24), 4, 9, 12, 4, 6, 6, 4, 24, 8)


class Differs(Exception):
    """Contestants do not agree, so nothing is timed."""


class OutOfTime(Exception):
    """A part took longer than it may."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    part: str
    what: str
    found: str
    target: str = ""
    reached: bool | None = None


@dataclass(frozen=True)
class Floor:
    """Seconds per unit that a contestant needs at least, and which share of that speed it should reach."""

    of: str
    seconds: float
    at_least: float

    def line(self, part: str, taken: float) -> Line:
        """What was reached of it."""
        share = self.seconds / taken
        told = f"at least {self.at_least:.0%}"
        return Line(part, f"{self.of}: share of the floor", f"{share:.1%}", told, share >= self.at_least)


# --- what the parts share ------------------------------------------------------------------------------------------


class Bench:
    """Where models lie, and at most one copy for each of the contestants in memory."""

    def __init__(self, options: Options, rounds: int, amounts: Amounts) -> None:
        self.options, self.rounds, self.amounts = options, rounds, amounts
        self.speed: dict[str, float] = {}
        self._loaded: dict[tuple[str, str], Any] = {}

    @property
    def vocabulary(self) -> int:
        """Tokens that a model knows."""
        return int(TINY["vocab_size"] if self.options.quick else LLAMA["vocab_size"])

    def base(self, size: str) -> Path:
        """A random model with a generated tokenizer, made where it will run."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        from spa_lite.backends.quiet import quiet
        from tests import tiny

        folder = self.options.folder / size
        if not (folder / "tokenizer.json").exists():
            with quiet(), torch.device(self.options.device):
                torch.manual_seed(0)
                config = tiny.make_config("llama", **(TINY if self.options.quick else SHAPES[size] | WIDE))
                made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.options.dtype))
            made.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
            made.save_pretrained(folder)
            tiny.make_tokenizer().save_pretrained(folder)
        return folder

    def adapter(self, size: str, name: str) -> Path:
        """An adapter of every linear layer in PEFT's format, made without the weights below it."""
        import torch
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        from safetensors.torch import save_file
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.options.folder / f"{size}-{name}"
        if not (folder / "adapter_model.safetensors").exists():
            wanted = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.base(size)))
                shapes = {k: v.shape for k, v in get_peft_model_state_dict(get_peft_model(empty, wanted)).items()}
            chance = torch.Generator().manual_seed(sum(map(ord, name)))
            made = {
                key: torch.randn(shape, generator=chance) * (0.01 if "lora_B" in key else shape[1] ** -0.5)
                for key, shape in shapes.items()
            }
            folder.mkdir(parents=True, exist_ok=True)
            wanted.save_pretrained(str(folder))
            save_file(made, str(folder / "adapter_model.safetensors"))
        return folder

    def ours(self, size: str) -> Any:
        """This program's backend, with the batch sizes of a large GPU."""

        def load() -> Any:
            policy, previous = self.adapter(size, POLICY), self.adapter(size, PREVIOUS)
            backend = ours(self.options, self.base(size), policy, previous, training=False)
            backend.batching = self.batching(backend.batching)
            return backend

        return self._once("ours", size, load)

    def batching(self, usual: Any) -> Any:
        """Tokens per forward as the program chooses them on CUDA where memory is plenty."""
        few = self.options.quick
        return replace(
            usual, sample=self.amounts.slots, score_tokens=256 if few else 32768, micro_tokens=128 if few else 16384
        )

    def peft(self, size: str) -> Any:
        """The model as transformers and PEFT load it."""

        def load() -> Any:
            return peft_model(self.options, self.base(size), self.adapter(size, POLICY), self.adapter(size, PREVIOUS))

        return self._once("peft", size, load)

    def trl(self, size: str) -> Trl:
        """TRL's trainer, four pairs at a time, checkpointed as by default."""

        def load() -> Trl:
            policy, previous = self.adapter(size, POLICY), self.adapter(size, PREVIOUS)
            return Trl(self.options, self.base(size), policy, previous, 4, checkpointed=True)

        made: Trl = self._once("trl", size, load)
        return made

    def _once(self, who: str, size: str, load: Callable[[], Any]) -> Any:
        if (who, size) not in self._loaded:
            self.forget(lambda key: key[1] != size)
            self._loaded[who, size] = load()
        return self._loaded[who, size]

    def forget(self, which: Callable[[tuple[str, str]], bool] = lambda key: True) -> None:
        """Free what is loaded."""
        for key in [key for key in self._loaded if which(key)]:
            del self._loaded[key]
        self.tidy()

    def tidy(self) -> None:
        """Give back what PyTorch keeps for later."""
        import torch

        gc.collect()
        if self.options.device != "cpu":
            torch.cuda.empty_cache()

    def least(self, backend: Any, done: str, prompt: float, answer: float, rows: float, slots: int) -> float:
        """The seconds that some work takes at least: see `spa_lite.floor`."""
        from spa_lite.estimate import Speed
        from spa_lite.floor import Sizes, Weights, fewest, floor_seconds

        sizes = Sizes(prompt, answer, 2, slots, backend.batching.micro_tokens)
        speed = Speed(self.rates()["flops"], self.rates()["bytes"])
        work = fewest(backend.shape, Weights.of(backend.shape, backend.description), done, sizes)
        return rows * floor_seconds(work, speed)

    def rates(self) -> dict[str, float]:
        """What a matrix product and a copy reach on this device, measured once."""
        self.speed = self.speed or ceiling("torch", self.options.device, self.options.dtype, self.options.quick)
        return self.speed


WIDE = {"initializer_range": 0.02, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


def measure(suite: Suite, bench: Bench, floor: Floor | None = None, rounds: int | None = None) -> Iterator[Line]:
    """First goes, then agreement, then rounds: as `side_by_side.compared`, with contestants that share a model."""
    ready: dict[str, Ready] = {}
    shown: dict[str, Shown] = {}
    every = suite.contestants(bench.options)
    for contestant in every:
        try:
            made = contestant.make()
            spent, held = first_go(made, bench.options.device)
            told = f"{spent:.2f} s" + (f", {held / GIB:.2f} GiB beyond what is loaded" if held is not None else "")
            yield Line(suite.name, f"{contestant.name}: first go", told)
        except (Unavailable, RuntimeError) as error:  # memory that runs out is a RuntimeError, too
            bench.tidy()
            yield Line(suite.name, contestant.name, f"not run: {first_line(error)}")
            continue
        ready[contestant.name], shown[contestant.name] = made, made.shown()
    for contestant in every:
        if contestant.name in shown and contestant.like in shown:
            mine, theirs = shown[contestant.name], shown[contestant.like]
            try:
                yield agreed(suite.name, agreement(contestant, mine, theirs, bench.options.dtype), contestant.name)
            except Differs as error:
                del ready[contestant.name]
                yield Line(suite.name, contestant.name, f"not timed: {error}", reached=False)
    shown.clear()
    goes = timed(suite, ready, bench.options, rounds or bench.rounds)
    seconds = {name: [go.seconds for go in some] for name, some in goes.items()}
    for name, some in seconds.items():
        yield Line(suite.name, name, f"{1 / median(some):,.4g} {suite.unit}/s")
        if floor and name == floor.of:
            yield floor.line(suite.name, median(some))
    for claim in suite.claims:
        if {claim.slow, claim.fast} <= ready.keys():
            found = judged(claim, seconds, {})
            wide = f"{found['median']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
            yield Line(suite.name, claim.text, wide, f"at least {claim.at_least:g}", found["reached"])


def first_go(made: Ready, device: str) -> tuple[float, int | None]:
    """Seconds of the first go, with all that is compiled and captured in it; and on CUDA the most bytes it took."""
    import torch

    cuda = device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated() if cuda else 0, now(device)
    made.go()
    spent = now(device) - begun
    return spent, torch.cuda.max_memory_allocated() - before if cuda else None


def agreed(part: str, found: dict[str, Any], name: str) -> Line:
    """A line that says how near two contestants are. Raises Differs if they are not."""
    if found["faults"]:
        raise Differs("; ".join(found["faults"]))
    near = ", ".join(f"{what} {value:.2g}" for what, value in found.items() if what not in {"faults", "cosine"})
    cosine = f"cosine {found['cosine']:.6f}" if "cosine" in found else ""
    return Line(part, f"{name}: agrees", ", ".join(filter(None, (near, cosine))))


def first_line(error: BaseException) -> str:
    """An error in short."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}"


# --- the parts -----------------------------------------------------------------------------------------------------


def rates(bench: Bench, size: str = "") -> Iterator[Line]:
    """What the device can do at best."""
    found = bench.rates()
    yield Line("rates", "matrix product", f"{found['flops'] / 1e12:,.3g} TFLOP/s")
    yield Line("rates", "copy, read and written", f"{found['bytes'] / 1e9:,.4g} GB/s")


OURS, SIMPLE, GENERATE = "ours", "ours, plain decoding", "generate + PEFT, eager"


def sample(bench: Bench, size: str) -> Iterator[Line]:
    """128 rows: all answers equally long, for the floor; then answers that stop, about one token in 250."""
    backend, amounts = bench.ours(size), bench.amounts
    asked = prompts(amounts.slots, bench.vocabulary, amounts.lengths)
    yield sampled_alike(bench, size, asked)
    tokens = 2 * len(asked) * amounts.answer
    least = bench.least(backend, "sampled", fmean(map(len, asked)), amounts.answer, len(asked), 2 * len(asked))
    yield Line(f"sample-{size}", f"{OURS}: decoding", backend.description["decoding"])
    floor = Floor(OURS, least / tokens, {"1b": 0.35, "8b": 0.5}[size])
    yield from measure(sampling_suite(bench, size, asked, amounts.answer, ()), bench, floor)
    stops = range(bench.vocabulary - max(1, bench.vocabulary // 250), bench.vocabulary)
    more = prompts(2 * amounts.slots, bench.vocabulary, amounts.lengths, seed=1)
    yield from measure(sampling_suite(bench, size, more, amounts.longest, stops), bench)


def sampling_suite(bench: Bench, size: str, asked: Sequence[Ids], most: int, stops: Sequence[int]) -> Suite:
    """Two answers a prompt with log-probs, at most so many tokens; ended by one of `stops`."""

    def own(plain: bool) -> Callable[[], Ready]:
        def go() -> Done:
            return Done(sum(len(c.ids) for _, some in draw(bench.ours(size), asked, most, stops, plain) for c in some))

        return lambda: Ready(go)

    def theirs() -> Ready:
        made = Generate(bench.options, bench.peft(size), stops, 0.7, most, bench.amounts.slots)
        return Ready(lambda: Done(sum(len(ids) for some in made.answers(asked) for ids in some)))

    least = {"1b": 4.0, "8b": 2.5}[size]
    return Suite(
        name=f"sample-{size}",
        title="Sampling",
        unit="token",
        about=f"{len(asked)} prompts, {'no' if not stops else len(stops)} tokens that stop",
        contestants=lambda _: [
            Contestant(OURS, own(False)),
            Contestant(SIMPLE, own(True)),
            Contestant(GENERATE, theirs),
        ],
        claims=[
            Claim(f"generate / ours, {'stopping' if stops else 'none stops'}", GENERATE, OURS, at_least=least),
            Claim("ours plain / ours", SIMPLE, OURS, at_least=1.0),
        ],
    )


def draw(
    backend: Any, asked: Sequence[Ids], most: int, stops: Sequence[int], plain: bool = False
) -> list[tuple[int, Any]]:
    """Two answers a prompt under POLICY."""
    from spa_lite.backend import Sampling
    from spa_lite.keys import sample_key

    keys = [[sample_key(0, 0, str(index), k) for k in range(2)] for index in range(len(asked))]
    with stopping_at(backend, stops), plainly(backend, plain):
        return list(backend.sample(asked, 2, Sampling(0.7, 1.0, most), keys))


@contextmanager
def stopping_at(backend: Any, stops: Sequence[int]) -> Iterator[None]:
    """Other tokens end an answer inside the block."""
    before = backend.tokenizer._stops
    backend.tokenizer._stops = frozenset(stops)
    try:
        yield
    finally:
        backend.tokenizer._stops = before


@contextmanager
def plainly(backend: Any, plain: bool) -> Iterator[None]:
    """Decode as any model can be inside the block: a growing cache, padding on the left, no graph."""
    before = backend._way, backend._slots
    if plain:
        backend._way, backend._slots = "padded", None
    try:
        yield
    finally:
        if plain:
            backend._way, backend._slots = before


def sampled_alike(bench: Bench, size: str, asked: Sequence[Ids]) -> Line:
    """Both ways of decoding draw the same text (in float32), and the log-probs are those of a padded forward."""
    few = asked[:8]
    fast, slow = (dict(draw(bench.ours(size), few, 32, (), plain)) for plain in (False, True))
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
    rows = pairs(bench.amounts.pairs // (2 if size == "8b" else 1), bench.vocabulary, bench.amounts.lengths)
    answers = [len(response) for row in rows for response in row.responses]
    mean = fmean(len(row.prompt) for row in rows)
    least = bench.least(backend, "trained", mean, fmean(answers), len(rows), 1)
    yield Line(f"step-{size}", "work", described(rows))
    yield from measure(
        step_suite(bench, size, rows), bench, Floor(PLAIN, least / len(rows), {"1b": 0.35, "8b": 0.45}[size])
    )


def step_suite(bench: Bench, size: str, rows: Sequence[Row]) -> Suite:
    """Ours and theirs on the same rows. The learning rate is 0, so that all goes are the same."""

    def own(objective: Callable[[], Any], recorded: bool) -> Callable[[], Ready]:
        def make() -> Ready:
            backend = bench.ours(size)
            start_training(backend)
            known = recorded_sums(backend, rows) if recorded else None
            last: list[Any] = []

            def go() -> Done:
                last[:] = [backend.dpo_step(rows, objective(), 0.0, known)]
                return Done(len(rows))

            def shown() -> Shown:
                exact = bench.options.dtype == "float32"  # else sums over hundreds of tokens round too much
                margins = last[0].metrics.get("extrapolated_margin") if exact else None
                return Shown(float(last[0].loss), gradients_of(backend), margins)

            return Ready(go, shown)

        return make

    def trl(tuned: bool) -> Callable[[], Ready]:
        def make() -> Ready:
            trainer = bench.trl(size)

            def go() -> Done:
                tune(trainer, tuned)
                trainer.step(rows)
                return Done(len(rows))

            return Ready(go, trainer.shown)

        return make

    def loop() -> Ready:
        made = Loop(bench.options, bench.peft(size), mixed=True, batch=1, ordered=True)

        def go() -> Done:
            made.step(rows)
            return Done(len(rows))

        return Ready(go, made.shown)

    return Suite(
        name=f"step-{size}",
        title="A DPO step",
        unit="pair",
        about="",
        contestants=lambda _: [
            Contestant(PLAIN, own(plain_loss, True)),
            Contestant(REFINED, own(refined, False)),
            Contestant(TRL, trl(False), like=PLAIN),
            Contestant(TRL_TUNED, trl(True), like=PLAIN),
            Contestant(LOOP, loop, like=REFINED),
        ],
        claims=[
            Claim("TRL default / ours plain", TRL, PLAIN, at_least=2.6),
            Claim("TRL tuned / ours plain", TRL_TUNED, PLAIN, at_least=1.3),
            Claim("TRL default (plain) / ours refined", TRL, REFINED, at_least=1.9),
            Claim("plain loop / ours refined", LOOP, REFINED, at_least=2.0),
        ],
    )


def plain_loss() -> Any:
    """Plain DPO."""
    from spa_lite.objective import Dpo

    return Dpo(BETA)


def start_training(backend: Any) -> None:
    """Anew, so that the optimizer has seen no other gradient."""
    from contestants import NO_CLIPPING

    from spa_lite.backend import Optimizer

    backend.start_training(Optimizer(max_grad_norm=NO_CLIPPING))


def recorded_sums(backend: Any, rows: Sequence[Row]) -> Any:
    """What the sampler and the judge leave of the reference."""
    from spa_lite.backend import PREVIOUS as ROLE
    from spa_lite.backend import Known

    found = dict(backend.logprob(rows, ROLE))
    return Known(np.array([score.logp for index in range(len(rows)) for score in found[index]]))


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
    rows = pairs(bench.amounts.texts, bench.vocabulary, bench.amounts.lengths, seed=2)
    texts = [(row.prompt, response) for row in rows for response in row.responses]
    tokens = sum(len(response) for _, response in texts)
    mean = fmean(len(row.prompt) for row in rows)
    least = bench.least(backend, "scored", mean, tokens / len(texts), len(rows), 1)
    floor = Floor(SCORED, least / tokens, {"1b": 0.4, "8b": 0.55}[size])
    yield from measure(scoring_suite(bench, size, rows, texts), bench, floor)


def scoring_suite(bench: Bench, size: str, rows: Sequence[Row], texts: Sequence[tuple[Ids, Ids]]) -> Suite:
    """Ours and padded forwards over all logits."""
    tokens = sum(len(response) for _, response in texts)

    def own() -> Ready:
        from spa_lite.backend import INIT

        backend, found = bench.ours(size), {}

        def go() -> Done:
            found.update(backend.logprob(rows, INIT))
            return Done(tokens)

        def shown() -> Shown:
            return Shown(values=[s.logp / s.tokens for index in range(len(rows)) for s in found[index]])

        return Ready(go, shown)

    def padded(tuned: bool) -> Callable[[], Ready]:
        def make() -> Ready:
            scorer, found = Scorer(bench.peft(size), bench.options, tuned), []

            def go() -> Done:
                found[:] = scorer.per_token(texts, base=True)
                return Done(tokens)

            return Ready(go, lambda: Shown(values=[float(values.mean()) for values in found]))

        return make

    return Suite(
        name=f"score-{size}",
        title="Scoring",
        unit="token",
        about="",
        contestants=lambda _: [
            Contestant(SCORED, own),
            Contestant(PADDED, padded(False), like=SCORED),
            Contestant(PADDED_TUNED, padded(True), like=SCORED),
        ],
        claims=[
            Claim("padded forwards / ours", PADDED, SCORED, at_least=2.5),
            Claim("padded forwards, tuned / ours", PADDED_TUNED, SCORED, at_least=1.0),
        ],
    )


ROUND, COMPOSED = "ours: a round", "generate, four forwards, TRL default"


def whole_round(bench: Bench, size: str) -> Iterator[Line]:
    """Sample, judge, train."""
    asked = prompts(bench.amounts.round, bench.vocabulary, bench.amounts.lengths, seed=3)
    stops = range(bench.vocabulary - max(1, bench.vocabulary // 250), bench.vocabulary)
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

    yield from measure(
        Suite(
            name=f"round-{size}",
            title="A round",
            unit="prompt",
            about="",
            contestants=lambda _: [Contestant(ROUND, own), Contestant(COMPOSED, theirs)],
            claims=[Claim("the composed peers / ours", COMPOSED, ROUND, at_least={"1b": 2.0, "8b": 4.0}[size])],
        ),
        bench,
        rounds=1,
    )


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
    backend = quantised(bench, size)
    amounts = bench.amounts
    asked = prompts(amounts.slots, bench.vocabulary, amounts.lengths)
    rows = pairs(amounts.pairs // 2, bench.vocabulary, amounts.lengths)
    tokens = 2 * len(asked) * amounts.answer
    start_training(backend)
    works: dict[str, tuple[float, Callable[[], Any], float]] = {
        "token": (
            tokens,
            lambda: draw(backend, asked, amounts.answer, ()),
            bench.least(backend, "sampled", fmean(map(len, asked)), amounts.answer, len(asked), 2 * len(asked)),
        ),
        "pair": (
            len(rows),
            lambda: backend.dpo_step(rows, plain_loss(), 0.0, recorded_sums(backend, rows)),
            bench.least(
                backend,
                "trained",
                fmean(len(row.prompt) for row in rows),
                fmean(len(r) for row in rows for r in row.responses),
                len(rows),
                1,
            ),
        ),
    }
    for unit, (count, work, least) in works.items():
        work()
        spent = []
        for _ in range(bench.rounds):
            begun = now(bench.options.device)
            work()
            spent.append(now(bench.options.device) - begun)
        told = f"{count / median(spent):,.4g} {unit}/s, {least / median(spent):.0%} of the floor"
        yield Line(f"four-{size}", f"ours, 4 bits: {'sampled' if unit == 'token' else 'scored and trained'}", told)


def quantised(bench: Bench, size: str) -> Any:
    """Ours with the weights in 4 bits (in the toys as they are). Raises Unavailable without bitsandbytes."""
    from spa_lite import backends
    from spa_lite.backend import INIT, ModelSettings
    from spa_lite.backend import POLICY as ROLE

    bench.forget()
    if not bench.options.quick and not installed("bitsandbytes"):
        raise Unavailable("bitsandbytes is not installed here")
    settings = ModelSettings(
        str(bench.base(size)), bench.options.device, bench.options.dtype, load_in_4bit=not bench.options.quick
    )
    backend: Any = backends.load("torch", settings)
    backend.batching = bench.batching(backend.batching)
    backend.bind(INIT, None)
    backend.bind(ROLE, bench.adapter(size, POLICY))
    backend.snapshot()
    return backend


def capped(bench: Bench, size: str) -> Iterator[Line]:
    """A round inside a small card's memory: prompts of up to 1,024 tokens, answers of 300, none of which stops."""
    import torch

    most = 6 if size == "1b" else 12
    part, cuda = f"cap-{size}", bench.options.device != "cpu"
    bench.base(size), bench.adapter(size, POLICY), bench.forget()  # made without a cap
    cap, backend = most * GIB - CONTEXT, None
    if cuda:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()
    try:
        backend = quantised(bench, size) if size == "8b" else bench.ours(size)
        long = replace(bench.amounts.lengths, prompt=bench.amounts.capped_prompt / 2, most=bench.amounts.capped_prompt)
        asked = prompts(bench.amounts.capped - 1, bench.vocabulary, long)
        asked.append((asked[0] * bench.amounts.capped_prompt)[: bench.amounts.capped_prompt])
        backend.batching = chosen(bench, backend, asked, cap if cuda else None)
        begun = now(bench.options.device)
        our_round(backend, asked, bench.amounts.capped_answer, (), bench.amounts.pairs)
        spent = now(bench.options.device) - begun
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


PARTS: dict[str, tuple[Callable[[Bench, str], Iterator[Line]], str, int]] = {
    "rates": (rates, "", 20),
    "sample-1b": (sample, "1b", 80),
    "step-1b": (step, "1b", 80),
    "score-1b": (score, "1b", 40),
    "round-1b": (whole_round, "1b", 60),
    "sample-8b": (sample, "8b", 180),
    "step-8b": (step, "8b", 150),
    "score-8b": (score, "8b", 60),
    "round-8b": (whole_round, "8b", 150),
    "four-8b": (four_bits, "8b", 60),
    "cap-1b": (capped, "1b", 60),
    "cap-8b": (capped, "8b", 90),
}
"""Name -> what it does, with which model, and the seconds it may take."""


# --- the script ----------------------------------------------------------------------------------------------------


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block once that much time is gone."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(words: Sequence[str] | None = None) -> list[Line]:
    """Go through the parts that are asked for; print the table last."""
    args = parser().parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        sys.exit(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not (args.tiny or args.device or has_cuda()):
        print("there is no CUDA device here; --tiny goes through everything with toys on the CPU", file=sys.stderr)
        return []
    folder = args.folder or Path(tempfile.mkdtemp(prefix="spa-lite-gpu-"))
    options = Options(folder, args.tiny, args.device or ("cpu" if args.tiny else "cuda"))
    side_by_side.COSINE = args.cosine
    bench = Bench(options, args.rounds, TOYS if args.tiny else FULL)
    lines, times, end = [], {}, time.monotonic() + 60 * args.minutes
    try:
        for name in args.parts:
            begun = time.monotonic()
            try:
                for line in guarded(name, bench, min(PARTS[name][2], end - begun)):
                    lines.append(line)
                    print(f"{line.part} | {line.what} | {line.found}", file=sys.stderr, flush=True)
            except OutOfTime as error:  # while a line was printed
                lines.append(Line(name, "failed", first_line(error), reached=False))
            times[name] = round(time.monotonic() - begun, 1)
            write(args.out, bench, lines, times)
    finally:
        bench.forget()
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(bench, lines))
    return lines


def guarded(name: str, bench: Bench, seconds: float) -> Iterator[Line]:
    """The lines of a part; whatever goes wrong costs no other part."""
    work, size, _ = PARTS[name]
    if seconds < 5:
        yield Line(name, "not run", "no time left")
        return
    try:
        with within(seconds):
            yield from work(bench, size)
    except Exception as error:
        bench.forget()
        yield Line(name, "failed", first_line(error), reached=False)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    made.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    made.add_argument("--minutes", type=float, default=9.0, help="no part goes on beyond that")
    made.add_argument("--rounds", type=int, default=2, help="rounds that count")
    made.add_argument("--cosine", type=float, default=side_by_side.COSINE, help="of gradients that count as the same")
    made.add_argument("--tiny", action="store_true", help="toys, on the CPU unless --device says otherwise")
    made.add_argument("--device", help="cuda, or cpu")
    made.add_argument("--folder", type=Path, help="where models are kept; none: made anew, and removed")
    made.add_argument("--out", type=Path, help="folder of gpu.json")
    return made


def has_cuda() -> bool:
    """Whether there is a device to measure."""
    import torch

    return bool(torch.cuda.is_available())


def write(out: Path | None, bench: Bench, lines: Sequence[Line], times: dict[str, float]) -> None:
    """All that is known so far, as JSON."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    found = head(bench) | {"parts": times, "lines": [asdict(line) for line in lines]}
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def head(bench: Bench) -> dict[str, Any]:
    """Machine, versions, date, command."""
    return {
        "device": device_name(bench.options.device),
        "dtype": bench.options.dtype,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", "benchmarks/bench_gpu.py", *sys.argv[1:]]),
        "ceiling": bench.speed,
    }


def table(bench: Bench, lines: Sequence[Line]) -> str:
    """Everything as Markdown."""
    about = head(bench)
    named = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rows = [
        f"| {line.part} | {line.what} | {line.found} | {line.target} | "
        f"{ {True: 'yes', False: 'no', None: ''}[line.reached] } |"
        for line in lines
    ]
    return "\n".join(
        [
            f"{about['device']}, {about['dtype']}; {named}; {about['date']}",
            "",
            "| part | what | found | target | reached |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


if __name__ == "__main__":
    main()
