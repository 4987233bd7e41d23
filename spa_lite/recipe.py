"""Every setting exactly once: its default, its help text, the command-line flag that sets it, the stages it affects.

The defaults are the paper's (recipe `spa`, scale `paper`). A recipe is the method, a scale its size; both are
YAML files of the settings that differ. A setting's name is its path: `sampling.temp`, `refine.K`. A stage's key
holds only the settings that name it, so that a change elsewhere costs nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from spa_lite.errors import RecipeError
from spa_lite.files import write_atomic

Fraction = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
Nonnegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]

ALL_STAGES = ("seed", "prompts", "sample", "judge", "train", "measure")

AXES = {
    "prompts": "prompts.source",
    "candidates": "candidates.kinds",
    "judge": "judge.by",
    "pairing": "pairing.by",
    "loss": "loss.kind",
    "noise": "noise.by",
    "reference": "train.reference",
    "start": "carry.start",
    "carry": "carry.data",
}
"""What a method is made of, and the setting that says which piece of it a recipe takes (`spa_lite.axes` tells more)."""


def setting(default: Any, help: str, *stages: str, flag: str | None = None) -> Any:
    """One setting. `stages` it affects; none for what changes memory, speed or place only."""
    metadata = {"help": help, "stages": stages, "flag": flag}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Inputs:
    """Where things come from. A stage's key holds the content, never the path."""

    model: str | None = setting(
        None, "Model folder, hub name or GGUF file; none: the built-in lesson model.", flag="--model"
    )
    backend: str | None = setting(
        None, "mlx, torch, llamacpp (GGUF files) or toy, or module:Class; none: the best one here.", flag="--backend"
    )
    device: str = setting(
        "auto", "auto or cpu; with torch cuda, cuda:1 or mps; with mlx or llamacpp gpu.", flag="--device"
    )
    seed_pairs: str | None = setting(
        None, "Human-labelled pairs: file, - or hub:owner/name[:split].", flag="--seed-pairs"
    )
    prompts: str | None = setting(None, "Unlabelled prompts: file, - or hub:owner/name[:split].", flag="--prompts")
    held_out: str | None = setting(
        None, "Held-out labelled pairs; none: 10 % of the seed pairs, disjoint by prompt.", flag="--held-out"
    )
    no_seed_pairs: bool = setting(
        False, "Skip the seed stage; pi_0 is --adapter-path, or pi_init is --init-model.", flag="--no-seed-pairs"
    )
    adapter_path: str | None = setting(None, "Adapter that is the policy pi_0.", flag="--adapter-path")
    init_adapter: str | None = setting(None, "Adapter that is pi_init; none: the bare base.", flag="--init-adapter")
    init_model: str | None = setting(None, "Whole other model that is pi_init when judging.", flag="--init-model")
    gold: str | None = setting(
        None,
        "Prompts with one good answer each (SFT data) for prompts=gold; none: what the seed pairs chose.",
        flag="--gold",
    )
    skip_bad: bool = setting(False, "Skip and count bad records instead of stopping.", flag="--skip-bad")
    limit_prompts: Count | None = setting(None, "Use only this many prompts (a smoke run).", flag="--limit-prompts")


@dataclass(frozen=True)
class Model:
    """How the model is loaded and how it reads a conversation."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Base weights: float32 on CPU and MPS, bfloat16 on CUDA, the file's own with MLX on a GPU.",
        *ALL_STAGES,
        flag="--dtype",
    )
    load_in_4bit: bool = setting(
        False, "Quantise the base to 4 bits (CUDA or MLX).", *ALL_STAGES, flag="--load-in-4bit"
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.", flag="--trust-remote-code")
    system: str | None = setting(None, "System turn for conversations that have none.", *ALL_STAGES, flag="--system")
    template: str | None = setting(
        None, "Chat template: a Jinja file, or plain; none: the tokenizer's own.", *ALL_STAGES, flag="--template"
    )


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens."""

    max_prompt_length: Count = setting(1024, "Longest prompt.", *ALL_STAGES, flag="--max-prompt-length")
    max_length: Count = setting(2048, "Longest prompt plus human answer.", "seed", "measure", flag="--max-seq-length")
    long_prompts: Literal["skip", "cut"] = setting(
        "skip", "Longer prompts: skip, or cut (keep their end).", *ALL_STAGES, flag="--long-prompts"
    )


@dataclass(frozen=True)
class Lora:
    """The adapter. The paper trains full weights; rank and learning rate are this project's choice."""

    rank: Count = setting(16, "Rank.", "seed", "train", flag="--lora-rank")
    alpha: Positive = setting(
        32.0, "Scale numerator: updates are multiplied by alpha / rank.", "seed", "train", flag="--lora-alpha"
    )
    targets: list[str] = setting(
        ["all-linear"],
        "Names of adapted layers; all-linear: every one but the head.",
        "seed",
        "train",
        flag="--lora-targets",
    )


@dataclass(frozen=True)
class SeedDpo:
    """The seed stage: plain DPO on the human pairs, reference pi_init (Eq. 6); or SFT on the chosen answers."""

    by: Literal["dpo", "sft", "none"] = setting(
        "dpo",
        "What makes pi_0: dpo on the pairs, sft on their chosen answers (settings sft.*), or none (pi_init).",
        "seed",
        flag="--seed-stage",
    )
    epochs: Count = setting(3, "Passes over the seed pairs.", "seed", flag="--seed-epochs")
    batch_size: Count = setting(32, "Pairs per optimizer step.", "seed", flag="--seed-batch-size")
    learning_rate: Positive = setting(
        5e-5, "Peak learning rate (the paper: 5e-7, full weights).", "seed", flag="--seed-learning-rate"
    )


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: `spa-lite sft`, an SFT seed stage, the helpers of `keywords` and `improve`."""

    epochs: Count = setting(3, "Passes over the answers.", "seed", flag="--sft-epochs")
    batch_size: Count = setting(16, "Answers per optimizer step.", "seed", flag="--sft-batch-size")
    learning_rate: Positive = setting(2e-4, "Peak learning rate.", "seed", flag="--sft-learning-rate")


@dataclass(frozen=True)
class Prompts:
    """Axis: where the prompts of a round come from. All but `source` and `count` are for prompts that are written."""

    source: Literal["pool", "gold", "pairs", "persona", "fewshot", "keywords", "bare"] = setting(
        "pool",
        "pool (--prompts), gold (with a good answer), pairs (labelled); written by the model: persona, fewshot, "
        "keywords, bare.",
        "prompts",
        flag="--prompt-source",
    )
    count: Count | None = setting(
        None,
        "Prompts of a round that are written, or gone through (gold, pairs: again and again until there are so many); "
        "none: 400, or each once.",
        "prompts",
        flag="--prompt-count",
    )
    by: Literal["policy", "init"] = setting(
        "policy", "Who writes: the policy, or pi_init.", "prompts", flag="--prompt-writer"
    )
    generator: bool = setting(
        False,
        "Teach the writer of keywords first, by SFT on the labelled prompts and their keywords (SynPO).",
        "prompts",
        flag="--prompt-generator",
    )
    personas: str | None = setting(
        None, "Personas, one a line, or hub:owner/name[:split]; none: the shipped list.", flag="--personas"
    )
    keywords: str | None = setting(
        None, "Keywords, a comma-separated group a line; none: words of the labelled prompts.", flag="--keywords"
    )
    examples: Count = setting(4, "Labelled prompts shown as examples (fewshot).", "prompts", flag="--examples")
    template: str | None = setting(
        None, "File with the request for a prompt; none: a shipped one.", flag="--prompt-template"
    )
    temp: Nonnegative = setting(0.6, "Temperature.", "prompts", flag="--prompt-temp")
    top_p: Annotated[float, Meta(gt=0, le=1)] = setting(1.0, "Nucleus mass.", "prompts", flag="--prompt-top-p")
    max_tokens: Count = setting(128, "Longest prompt written.", "prompts", flag="--prompt-max-tokens")
    similarity: Fraction = setting(
        0.7,
        "A prompt this similar (ROUGE-L) to an earlier one is dropped; 1: the same words only.",
        "prompts",
        flag="--similarity",
    )
    control: Natural = setting(
        100,
        "Prompts also written without personas, to show what personas change in how often they repeat.",
        "prompts",
        flag="--prompt-control",
    )


Candidate = Literal["sample", "greedy", "gold", "pair", "init", "improve"]


@dataclass(frozen=True)
class Candidates:
    """Axis: which answers to a prompt are judged. With judge=order the first named is the best."""

    kinds: list[Candidate] = setting(
        ["sample"],
        "sample (n of them), greedy, gold, pair (both labelled answers), init (a sample of pi_init), improve (the "
        "policy's answer, improved).",
        "sample",
        flag="--candidates",
    )


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn from pi_{i-1}."""

    n: Count = setting(2, "Answers per prompt; the best and the worst make the pair.", "sample", flag="--n")
    temp: Nonnegative = setting(0.7, "Temperature.", "sample", "measure", flag="--temp")
    top_p: Annotated[float, Meta(gt=0, le=1)] = setting(1.0, "Nucleus mass.", "sample", "measure", flag="--top-p")
    max_tokens: Count = setting(300, "Longest answer.", "sample", "measure", flag="--max-tokens")
    by: str | None = setting(
        None,
        "What draws a round's answers: gguf:FILE, a GGUF of the same model (with --rescore always); none: the policy.",
        flag="--sampler",
    )
    append_eos: bool = setting(
        False,
        "Close answers that hit the cap with an end of turn, as the released code does.",
        "sample",
        flag="--append-eos",
    )


@dataclass(frozen=True)
class JudgeSettings:
    """Who labels the pairs."""

    by: Literal[
        "implicit",
        "likelihood",
        "self-pair",
        "self-score",
        "self-rubric",
        "reward-model",
        "openai",
        "order",
        "label",
        "random",
        "longest",
        "gold",
    ] = setting(
        "implicit",
        "implicit (Eq. 7), likelihood, self-pair, self-score, self-rubric, reward-model, openai; by construction: "
        "order (of the candidates), label (of the pairs); controls: random, longest, gold (lesson only).",
        "judge",
        flag="--judge",
    )
    reference: Literal["init", "lagged", "none"] = setting(
        "init", "init: pi_init; lagged: pi_{i-2}; none: likelihood alone.", "judge", flag="--judge-reference"
    )
    tie: Literal["a", "b"] = setting(
        "b", "Winner at an exact tie: the paper's Eq. 8 gives b, the released code a.", "judge", flag="--tie"
    )
    identical: Literal["drop", "keep"] = setting(
        "drop", "Pairs of identical answers: drop (and count) or keep.", "judge", flag="--identical"
    )
    rescore: Literal["always", "check", "never"] = setting(
        "check",
        "Sampled log-probs as the judge's numerator: never take them (always), if a re-scored 2 % agree (check), or "
        "unseen (never).",
        "judge",
        flag="--rescore",
    )
    length_penalty: Nonnegative = setting(
        0.0,
        "Taken off an answer's reward per token (Eq. 13; the paper: 0.001 to 0.01).",
        "judge",
        flag="--length-penalty",
    )
    model: str | None = setting(
        None,
        "The model of reward-model (a folder or hub name) or openai (the server's name for it).",
        flag="--judge-model",
    )
    url: str | None = setting(
        None, "Address of the openai judge, such as http://127.0.0.1:8080/v1.", flag="--judge-url"
    )
    prompt: str | None = setting(
        None,
        "File with the question put to self-pair, self-score, self-rubric or openai; none: a shipped one, or the words "
        "that the built-in model was taught.",
        flag="--judge-prompt",
    )
    swap: bool = setting(
        True, "self-pair and openai: ask in both orders; no: only in the order of the answers.", "judge", flag="--swap"
    )
    tries: Count = setting(
        3, "self-rubric: grades drawn per answer, of which the mean is taken.", "judge", flag="--judge-tries"
    )
    temp: Nonnegative = setting(0.7, "self-rubric: temperature of a grade.", "judge", flag="--judge-temp")
    adapter: str | None = setting(
        None,
        "implicit in a run: the adapter that judges in the policy's place; lesson: the one that comes with the lesson. "
        "Unused by other judges.",
        flag="--judge-adapter",
    )


@dataclass(frozen=True)
class Pairing:
    """Axis: which of the judged answers make a training pair."""

    by: Literal["two", "best-worst"] = setting(
        "best-worst", "two (there must be two), or the best and the worst of any number.", "judge", flag="--pairing"
    )
    drop_ties: bool = setting(
        False, "Leave out pairs whose answers the judge finds equal.", "train", flag="--drop-ties"
    )
    min_gap: Nonnegative = setting(0.0, "Leave out pairs whose scores are closer than this.", "train", flag="--min-gap")
    gap_judge: Literal["implicit", "likelihood", "self-pair", "self-score", "reward-model", "openai", "gold"] | None = (
        setting(None, "Whose scores min_gap looks at; none: the judge's own.", "judge", flag="--gap-judge")
    )


@dataclass(frozen=True)
class LossSettings:
    """Axis: the loss of a round, and the numbers of each. docs/losses.md has the formulas."""

    kind: Literal["dpo", "ipo", "hinge", "dpo-norm", "dpop", "apo-zero", "kto", "sppo", "simpo", "cpo", "orpo"] = (
        setting(
            "dpo",
            "dpo, ipo, hinge, dpo-norm, dpop, apo-zero, kto, sppo; without a reference: simpo, cpo, orpo.",
            "train",
            flag="--loss",
        )
    )
    beta: Positive = setting(
        0.1,
        "Strength of the pull towards the reference (Eq. 5): of the implicit reward, the seed stage, and every loss "
        "that looks at sums over tokens.",
        "seed",
        "judge",
        "train",
        flag="--beta",
    )
    simpo_beta: Positive = setting(10.0, "simpo: factor on log-probabilities per token.", "train", flag="--simpo-beta")
    gamma: Nonnegative = setting(
        3.0, "simpo: target margin, absolute (its repository asks for gamma / beta).", "train", flag="--gamma"
    )
    norm_beta: Positive = setting(5.0, "dpo-norm: factor on log-ratios per token.", "train", flag="--norm-beta")
    tau: Positive = setting(0.1, "ipo: the target is 1 / (2 tau) nats per token.", "train", flag="--tau")
    sppo_beta: Positive = setting(1e-3, "sppo: the targets are +-1 / (2 beta) nats.", "train", flag="--sppo-beta")
    orpo_weight: Positive = setting(0.1, "orpo: weight of the odds ratio.", "train", flag="--orpo-weight")
    dpop_weight: Positive = setting(50.0, "dpop: weight of the penalty.", "train", flag="--dpop-weight")
    nll: Nonnegative | None = setting(
        None,
        "Weight of the chosen answer's negative log-likelihood per token; none: as the loss has it (cpo, orpo: 1, else "
        "0).",
        "train",
        flag="--nll",
    )
    optimism: Nonnegative = setting(
        0.0,
        "Weight of SELM's optimism: takes likelihood off the policy's own answer.",
        "judge",
        "train",
        flag="--optimism",
    )
    round_betas: list[Positive] | None = setting(
        None,
        "The loss's beta in each round, the last one from then on; none: the same in all.",
        "train",
        flag="--round-betas",
    )


@dataclass(frozen=True)
class Noise:
    """Axis: what is done about labels that may be wrong."""

    by: Literal["none", "smooth", "robust", "quantile", "perpair", "weight"] = setting(
        "quantile",
        "quantile (SPA's refinement: settings refine.*), smooth or robust (every label wrong with probability "
        "epsilon), perpair (with the judge's own), weight, or none.",
        "train",
        flag="--noise",
    )
    epsilon: Annotated[float, Meta(ge=0, lt=0.5)] = setting(
        0.1, "smooth and robust: how often a label is wrong.", "train", flag="--epsilon"
    )
    weight: str = setting(
        "confidence",
        "weight: confidence (of the judge: |2p - 1|), or module:function from a round's judgements to weights.",
        "train",
        flag="--pair-weight",
    )


@dataclass(frozen=True)
class Refine:
    """Self-refinement: soften pairs that look like noise (Eq. 9 to 12)."""

    alpha: Fraction = setting(
        0.1, "Label smoothing of a flagged pair; 0 turns refinement off.", "train", flag="--alpha"
    )
    K: Fraction = setting(0.1, "Share of lowest margins that is flagged.", "train", flag="--refine-k")
    lambda_: Nonnegative = setting(
        0.5, "Extrapolation of round 1 (Eq. 11); 0: flag by the plain margin.", "train", flag="--lambda"
    )
    lambda_decay: Nonnegative = setting(0.5, "Factor on lambda from round to round.", "train", flag="--lambda-decay")
    warmup: Fraction = setting(
        0.2, "Share of optimizer steps before refinement starts.", "train", flag="--refine-warmup"
    )
    window: Annotated[int, Meta(ge=2)] = setting(
        50, "Recent margins the threshold is taken from.", "train", flag="--window"
    )
    rule: Literal["paper", "official"] = setting(
        "paper",
        "Threshold: paper (percentile, per step) or official (the released code's rank rule, per pair).",
        "train",
        flag="--threshold-rule",
    )
    before_full: Literal["off", "zero"] = setting(
        "off",
        "Until the window is full: off (flag nothing) or zero (threshold 0, as released).",
        "train",
        flag="--before-full",
    )


@dataclass(frozen=True)
class Train:
    """Optimisation. Optimizer and schedule restart every round."""

    epochs: Count = setting(1, "Passes over a round's pairs.", "train", flag="--epochs")
    batch_size: Count = setting(32, "Pairs per optimizer step.", "train", flag="--batch-size")
    learning_rate: Positive = setting(
        5e-5, "Peak learning rate (the paper: 5e-7, full weights).", "train", flag="--learning-rate"
    )
    round_rates: list[Positive] | None = setting(
        None,
        "The peak learning rate in each round, the last one from then on; none: learning_rate in all.",
        "train",
        flag="--round-learning-rates",
    )
    reference: Literal["auto", "prev", "init", "none"] = setting(
        "auto",
        "What the loss compares with: prev (the policy that answered), init, none; auto: prev if the loss compares at "
        "all.",
        "train",
        flag="--train-reference",
    )
    schedule: Literal["cosine", "constant"] = setting(
        "cosine", "After the warm-up.", "seed", "train", flag="--schedule"
    )
    warmup: Fraction = setting(0.1, "Share of steps with a rising learning rate.", "seed", "train", flag="--warmup")
    weight_decay: Nonnegative = setting(0.0, "AdamW weight decay.", "seed", "train", flag="--weight-decay")
    max_grad_norm: Positive = setting(1.0, "Gradient clipping (global norm).", "seed", "train", flag="--max-grad-norm")
    cache_reference: bool = setting(
        False,
        "Keep the sampler's hidden states on disk: training with extrapolation then needs no reference pass.",
        "sample",
        "train",
        flag="--cache-reference",
    )
    max_steps: Count | None = setting(
        None, "Stop a training stage after this many steps.", "seed", "train", flag="--max-steps"
    )
    save_every: Natural = setting(50, "Steps between checkpoints; 0: only by the clock.", flag="--save-every")
    save_minutes: Nonnegative = setting(5.0, "Minutes between checkpoints; 0: only by steps.", flag="--save-minutes")


@dataclass(frozen=True)
class Carry:
    """Axis: what a round takes over from those before it."""

    start: Literal["prev", "init"] = setting(
        "prev", "Training starts from the policy that answered (prev), or from pi_init.", "train", flag="--start"
    )
    data: Literal["fresh", "window2", "all"] = setting(
        "fresh",
        "Pairs trained on: the round's own (fresh), those of two rounds, or all so far.",
        "train",
        flag="--carry",
    )


@dataclass(frozen=True)
class Batching:
    """Memory and speed only."""

    micro_tokens: Count | None = setting(
        None,
        "Tokens, padding included, per forward pass in training; none: what is fast, if it fits into free memory.",
        flag="--micro-tokens",
    )
    sample: Count = setting(64, "Prompts decoded together.", flag="--sample-batch")
    score_tokens: Count | None = setting(None, "The same as micro_tokens, for scoring.", flag="--score-tokens")
    checkpointed_layers: Natural | None = setting(
        None,
        "Layers whose activations are made again in the backward pass; none: as few as memory forces.",
        flag="--checkpointed-layers",
    )


@dataclass(frozen=True)
class Measure:
    """What is measured, and how often."""

    every: Literal["round", "end"] = setting(
        "round", "Measure after every round, or only before the first stage and at the end.", flag="--eval-every"
    )
    prompts: Natural = setting(400, "Held-out prompts answered (lesson).", "measure", flag="--measure-prompts")
    pairs: Natural = setting(500, "Held-out pairs judged, at most.", "measure", flag="--measure-pairs")
    temp: Nonnegative | None = setting(
        None,
        "Temperature of the answers to held-out prompts, with top-p 1; none: as the rounds sample.",
        "measure",
        flag="--measure-temp",
    )
    bootstrap: Count = setting(2000, "Resamples of the paired bootstrap.", "measure", flag="--bootstrap")


@dataclass(frozen=True)
class Stop:
    """Signs that another round will not help. Each is a warning; with action=stop it also ends the run."""

    action: Literal["warn", "stop"] = setting(
        "warn", "What a stop rule does: warn, or stop after the round.", flag="--stop-rules"
    )
    displacement: Positive = setting(
        1.0, "Nats of log-probability that chosen answers may lose in a training stage.", flag="--stop-displacement"
    )
    length_growth: Positive = setting(
        1.5,
        "Mean answer length over that of the first round (or of init, where it is measured).",
        flag="--stop-length-growth",
    )
    agreement: Fraction = setting(
        0.98,
        "Share of a round's labels that the trained policy agrees with: near 1 there is nothing left to learn.",
        flag="--stop-agreement",
    )
    accuracy_drop: Fraction = setting(
        0.1, "Held-out accuracy (or win rate) lost against the best round so far.", flag="--stop-accuracy-drop"
    )


@dataclass(frozen=True)
class Lesson:
    """Sizes of the built-in world, used when no prompts are given."""

    seed_pairs: Count = setting(100, "Gold-labelled pairs.", flag="--lesson-seed-pairs")
    prompts: Count = setting(2400, "Unlabelled prompts over all rounds.", flag="--lesson-prompts")
    held_out: Count = setting(400, "Held-out prompts.", flag="--lesson-held-out")
    split: Literal["tune", "heldout"] = setting(
        "heldout", "Which unseen prompts are measured on.", flag="--lesson-split"
    )


@dataclass(frozen=True)
class Recipe:
    """All settings."""

    name: str = setting("spa", "Name of the recipe.")
    scale: str = setting("paper", "Name of the scale.")
    seed: int = setting(0, "Seed of every random stream.", *ALL_STAGES, flag="--seed")
    rounds: Natural = setting(3, "Rounds of sample, judge, train.", flag="--rounds")
    round_sizes: list[Count] | None = setting(
        None, "Prompts per round (the paper: 8000, 20000, 30000); none: even shares.", flag="--round-sizes"
    )
    report_to: list[str] = setting(
        [], "Trackers that get the numbers, too: tensorboard, wandb, trackio.", flag="--report-to"
    )
    inputs: Inputs = field(default_factory=Inputs)
    model: Model = field(default_factory=Model)
    lengths: Lengths = field(default_factory=Lengths)
    lora: Lora = field(default_factory=Lora)
    seed_dpo: SeedDpo = field(default_factory=SeedDpo)
    sft: Sft = field(default_factory=Sft)
    prompts: Prompts = field(default_factory=Prompts)
    candidates: Candidates = field(default_factory=Candidates)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    pairing: Pairing = field(default_factory=Pairing)
    loss: LossSettings = field(default_factory=LossSettings)
    noise: Noise = field(default_factory=Noise)
    refine: Refine = field(default_factory=Refine)
    train: Train = field(default_factory=Train)
    carry: Carry = field(default_factory=Carry)
    batching: Batching = field(default_factory=Batching)
    measure: Measure = field(default_factory=Measure)
    stop: Stop = field(default_factory=Stop)
    lesson: Lesson = field(default_factory=Lesson)

    def get(self, path: str) -> Any:
        """Value of the setting with this path."""
        return settings_of(self)[path]

    def for_stage(self, stage: str) -> dict[str, Any]:
        """The settings that enter a stage's key."""
        values = settings_of(self)
        return {s.path: values[s.path] for s in SETTINGS.values() if stage in s.stages}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to recipe.yaml."""
        return nest(settings_of(self))


@dataclass(frozen=True)
class Setting:
    """Description of one setting."""

    path: str
    type: Any
    default: Any
    help: str
    stages: tuple[str, ...]
    flag: str | None


def _describe(cls: type, prefix: str = "") -> Iterator[Setting]:
    """All settings below a dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        path = f"{prefix}{f.name.rstrip('_')}"
        if "help" not in f.metadata:
            yield from _describe(hints[f.name], f"{path}.")
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        yield Setting(path, hints[f.name], default, f.metadata["help"], f.metadata["stages"], f.metadata["flag"])


SETTINGS: dict[str, Setting] = {s.path: s for s in _describe(Recipe)}
"""Every setting by path."""


def settings_of(node: Any, prefix: str = "") -> dict[str, Any]:
    """path -> value of a recipe (or of a part of one)."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(node):
        value, path = getattr(node, f.name), f"{prefix}{f.name.rstrip('_')}"
        flat |= settings_of(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, leaf = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. An axis may be named alone: {"judge": "random"} -> {"judge.by": "random"}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {AXES.get(path, path): value}
    return flat


def check_path(path: str, source: str) -> Setting:
    """The setting of that path (or of that axis), or RecipeError naming the nearest one."""
    path = AXES.get(path, path)
    if path in SETTINGS:
        return SETTINGS[path]
    leaves = {p.rsplit(".", 1)[-1]: p for p in SETTINGS}
    leaves |= {s.flag.lstrip("-").replace("-", "_"): s.path for s in SETTINGS.values() if s.flag}
    near = difflib.get_close_matches(path, SETTINGS, n=1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(path.rsplit(".", 1)[-1], leaves, n=1)
    ]
    hint = f"; did you mean {near[0]}?" if near else "; spa-lite recipes lists them"
    raise RecipeError(f"{source}: there is no setting {path!r}{hint}")


def convert(path: str, value: Any, source: str) -> Any:
    """A value of the setting's type. Text is read as the type needs it (`1e-4`, `true`); nothing else is guessed."""
    wanted = check_path(path, source).type
    try:
        if isinstance(value, str) and float in atoms(wanted):
            value = float(value)  # msgspec and YAML both refuse spellings such as `.3` and `1e-4`
        return msgspec.convert(value, wanted, strict=not isinstance(value, str))
    except (msgspec.ValidationError, ValueError) as error:
        words = typing.get_args(wanted) if typing.get_origin(wanted) is typing.Literal else ()
        mend = f"; choose one of {', '.join(words)}" if words else ""
        raise RecipeError(f"{source}: {path} = {value!r}: {error}{mend}") from None


def atoms(wanted: Any) -> set[Any]:
    """The plain types a setting may hold: {float, NoneType} of `Annotated[float, ...] | None`."""
    if typing.get_origin(wanted) is Annotated:
        return atoms(typing.get_args(wanted)[0])
    if typing.get_origin(wanted) in {typing.Union, types.UnionType}:
        return {atom for part in typing.get_args(wanted) for atom in atoms(part)}
    return {typing.get_origin(wanted) or wanted}


def build(layers: Mapping[str, Mapping[str, Any]]) -> tuple[Recipe, dict[str, str]]:
    """A recipe from layers of {path: value}, later ones winning; and for each path the layer its value came from."""
    flat = {s.path: s.default for s in SETTINGS.values()}
    source = dict.fromkeys(flat, "default")
    for name, layer in layers.items():
        for path, value in layer.items():
            path = check_path(path, name).path
            flat[path] = convert(path, value, name)
            source[path] = name
    recipe = _construct(Recipe, flat)
    check(recipe)
    return recipe, source


def _construct(cls: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    values = {}
    for f in dataclasses.fields(cls):
        path = f"{prefix}{f.name.rstrip('_')}"
        if "help" in f.metadata:
            values[f.name] = flat[path]
        else:
            values[f.name] = _construct(typing.get_type_hints(cls)[f.name], flat, f"{path}.")
    return cls(**values)


def shipped(kind: Literal["recipe", "scale"]) -> dict[str, Path]:
    """Names and files of the shipped recipes or scales."""
    folder = Path(str(resources.files("spa_lite.recipes")))
    return {
        p.stem.removeprefix("scale-"): p
        for p in sorted(folder.glob("*.yaml"))
        if (kind == "scale") == p.stem.startswith("scale-")
    }


def load_layer(kind: Literal["recipe", "scale"], name: str) -> dict[str, Any]:
    """Settings of a shipped recipe or scale, or of a YAML file. Raises RecipeError naming the nearest."""
    return read_yaml(layer_file(kind, name))


def load_on(recipe: str, scale: str) -> dict[str, Any]:
    """What a recipe chooses on one scale: `scales: {lesson: {...}}` in its file. It wins over both."""
    return read_yaml(layer_file("recipe", recipe), on=scale)


def layers_of(recipe: str, scale: str) -> dict[str, dict[str, Any]]:
    """The layers that the names of a recipe and of a scale stand for, later ones winning."""
    layers = {f"recipe {recipe}": load_layer("recipe", recipe), f"scale {scale}": load_layer("scale", scale)}
    chosen = load_on(recipe, scale)
    return layers | ({f"recipe {recipe} on {scale}": chosen} if chosen else {})


def layer_file(kind: Literal["recipe", "scale"], name: str) -> Path:
    """The file of a shipped recipe or scale, or the YAML file of that name."""
    known = shipped(kind)
    if name in known:
        return known[name]
    if Path(name).suffix in {".yaml", ".yml"}:
        return Path(name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(f"there is no {kind} {name!r}{hint} (shipped: {', '.join(known)}; or give a .yaml file)")


def read_yaml(path: Path, on: str | None = None) -> dict[str, Any]:
    """{path: value} of a YAML file of settings, nested or dotted; with `on`, of what it says for that scale alone.

    Raises RecipeError on anything unknown.
    """
    import yaml

    try:
        # The C loader, where there is one, is eight times as fast.
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} must hold settings (name: value), not a {type(tree).__name__}")
    scales = tree.pop("scales", None) or {}
    if not isinstance(scales, dict) or not all(isinstance(part, dict) for part in scales.values()):
        raise RecipeError(
            f"{path}: `scales` must hold settings by the name of a scale, such as scales: {{lesson: {{rounds: 1}}}}"
        )
    flat = flatten({str(k): v for k, v in (tree if on is None else scales.get(on, {})).items()})
    for setting_path in flat:
        check_path(setting_path, str(path))
    return flat


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """recipe.yaml: every setting, so that the run can be repeated from it."""
    import yaml

    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomic(folder / "recipe.yaml", text.encode())


def parse_set(text: str) -> tuple[str, Any]:
    """`group.field=value` -> (path, value). Lists are written a,b,c; `none` is no value."""
    path, equals, value = text.partition("=")
    path = path.strip().replace("-", "_")
    if not equals:
        raise RecipeError(f"--set {text!r} needs the form group.field=value")
    found = check_path(path, "--set")
    return found.path, read_text(found, value.strip())


def read_text(s: Setting, value: str) -> Any:
    """A command-line word as the value of a setting."""
    if value.lower() in {"none", "null"} and type(None) in atoms(s.type):
        return None
    if list in atoms(s.type):
        return [convert_item(item) for item in value.split(",") if item]
    return value


def convert_item(text: str) -> int | float | str:
    """An element of a list: a number where it looks like one."""
    text = text.strip()
    with suppress(ValueError):
        return int(text) if text.isdigit() else float(text) if text[:1] in "0123456789." else text
    return text


def check(recipe: Recipe) -> None:
    """Contradictions between settings. Raises RecipeError naming both."""
    r = recipe
    if r.round_sizes is not None and len(r.round_sizes) != r.rounds:
        raise RecipeError(f"round_sizes names {len(r.round_sizes)} rounds but rounds is {r.rounds}; make them agree")
    if r.refine.rule == "official" and int(r.refine.window * r.refine.K) + 1 >= r.refine.window:
        raise RecipeError(f"refine.K={r.refine.K:g} is too large for refine.rule=official; lower it below 0.98")
    if r.lengths.max_length <= r.lengths.max_prompt_length:
        raise RecipeError(
            f"lengths.max_length={r.lengths.max_length} leaves no room after lengths.max_prompt_length="
            f"{r.lengths.max_prompt_length}; raise the first or lower the second"
        )
    if r.judge.length_penalty and r.judge.by in {"self-pair", "openai", "order", "label", "random", "longest", "gold"}:
        raise RecipeError(
            f"judge.length_penalty needs a judge with a reward per answer, and judge.by={r.judge.by} has none"
        )
    if r.train.cache_reference and r.sampling.append_eos:
        raise RecipeError(
            "train.cache_reference keeps the states of sampled tokens, and sampling.append_eos adds tokens that are "
            "not sampled; leave out --cache-reference"
        )
    if r.inputs.no_seed_pairs and r.inputs.seed_pairs:
        raise RecipeError("inputs.seed_pairs and inputs.no_seed_pairs exclude each other; give one")


def that_matter(recipe: Recipe, stage: str, round_: int = 0) -> dict[str, Any]:
    """The settings that enter a stage's key, without those that change nothing beside the others.

    Lambda is that of the round, as are beta and learning rate where they are given per round.
    """
    r, helper = recipe, stage in {"generator", "improver"}
    settings = r.for_stage("seed" if helper else stage)
    unread: tuple[str, ...] = ()
    if helper or (stage == "seed" and r.seed_dpo.by == "sft"):
        unread = ("seed_dpo.epochs", "seed_dpo.batch_size", "seed_dpo.learning_rate", "loss.")
    elif stage == "seed":
        unread = ("sft.",)
    elif stage == "judge":
        asks = {"self-pair", "openai"} & {r.judge.by, r.pairing.gap_judge}
        unread = () if asks else ("judge.swap",)
        unread += () if r.judge.by == "self-rubric" else ("judge.tries", "judge.temp")
        unread += ("judge.adapter",)  # its digest is an input of the stage
        settings["loss.optimism"] = settings["loss.optimism"] > 0  # whether a third answer is kept
    elif stage == "measure" and r.measure.temp is not None:
        unread = ("sampling.temp", "sampling.top_p")
    elif stage == "train":
        settings["refine.lambda"] = for_round(r, round_)
        for per_round in ("loss.round_betas", "train.round_rates"):
            values = settings[per_round]
            settings[per_round] = values and values[min(round_, len(values)) - 1]
        unread = ("refine.lambda_decay", *_unread_in_training(r))
    if helper:
        unread += ("seed_dpo.by",)
    return {path: value for path, value in settings.items() if not path.startswith(unread) or not unread}


def _unread_in_training(r: Recipe) -> Iterator[str]:
    """Settings of a training stage that nothing reads beside the others."""
    from spa_lite.losses import USES

    yield from {path for uses in USES.values() for path in uses} - set(USES[r.loss.kind])
    if r.train.round_rates:
        yield "train.learning_rate"
    if r.noise.by != "quantile":
        yield "refine."
    elif not r.refine.alpha:
        yield from (f"refine.{f.name.rstrip('_')}" for f in dataclasses.fields(Refine) if f.name != "alpha")
    if r.noise.by not in {"smooth", "robust"}:
        yield "noise.epsilon"
    if r.noise.by != "weight":
        yield "noise.weight"


def for_round(recipe: Recipe, round_: int) -> float:
    """lambda of round 1, 2, ...: the paper halves it each round."""
    return recipe.refine.lambda_ * recipe.refine.lambda_decay ** (round_ - 1)
