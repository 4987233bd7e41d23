"""What a method is made of: every piece of every axis, with its source; and a recipe as one line of such pieces.

An axis is a setting (`recipe.AXES`), a piece one of its values. docs/recipes.md says which recipe is which paper.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from spa_lite import losses
from spa_lite.guards import answers_per_prompt
from spa_lite.recipe import AXES, SETTINGS, Recipe
from spa_lite.train import reference_of

WHERE = {"seed stage": "seed_dpo.by"} | AXES
"""What a recipe is described by, and the setting that says which piece it takes: the axes, and what comes before."""

SPA = "SPA (2406.04412)"


@dataclass(frozen=True)
class Piece:
    """One value of an axis: what it is, and the paper, equation or code that it is taken from ("ours": none)."""

    what: str
    source: str


PIECES: dict[str, dict[str, Piece]] = {
    "seed stage": {
        "dpo": Piece("DPO on the labelled pairs makes pi_0; reference pi_init.", f"{SPA}, Eq. 6"),
        "sft": Piece("Supervised fine-tuning on the chosen answers makes pi_0.", "Self-Rewarding (2401.10020)"),
        "none": Piece("pi_0 is pi_init, or the adapter that was given.", "SPIN (2401.01335) and others"),
    },
    "prompts": {
        "pool": Piece("Prompts that people wrote, without answers; each round takes its share.", f"{SPA}, Alg. 1"),
        "gold": Piece("Prompts with one good answer each: SFT data.", "SPIN (2401.01335)"),
        "pairs": Piece("Prompts with two labelled answers.", "DPO (2305.18290); SELM (2405.19332)"),
        "persona": Piece(
            "The model writes what a described person would ask; one prompt per person.",
            "SAO (2510.06652), after Persona-Hub (2406.20094)",
        ),
        "fewshot": Piece(
            "The model writes another prompt like some examples; near-duplicates are dropped.",
            "Self-Instruct (2212.10560); Self-Rewarding (2401.10020)",
        ),
        "keywords": Piece("The model writes a prompt that has the given words in it.", "SynPO (2410.06961)"),
        "bare": Piece("The model writes a prompt with nothing to go by: the control.", "SAO (2510.06652), ablation"),
    },
    "candidates": {
        "sample": Piece("n answers drawn from the policy.", f"{SPA}, Alg. 1"),
        "greedy": Piece("The policy's most likely answer.", "SELM (2405.19332), released code"),
        "gold": Piece("The good answer that came with the prompt.", "SPIN (2401.01335)"),
        "pair": Piece("Both labelled answers.", "DPO (2305.18290)"),
        "init": Piece("An answer drawn from pi_init.", "SynPO (2410.06961)"),
        "improve": Piece("The policy's answer, rewritten by a model that improves answers.", "SynPO (2410.06961)"),
    },
    "judge": {
        "implicit": Piece(
            "The implicit reward beta log pi/pi_ref, per answer.", f"{SPA}, Eq. 7; DPO (2305.18290), Eq. 5"
        ),
        "likelihood": Piece("The log-probability alone: the implicit reward without a reference.", f"{SPA}, ablation"),
        "self-pair": Piece(
            "The policy is asked in words which of two answers is better.", "MT-Bench (2306.05685); SAO (2510.06652)"
        ),
        "self-score": Piece("The policy is asked for a grade; the expected one counts.", "G-Eval (2303.16634)"),
        "self-rubric": Piece(
            "The policy grades by a rubric several times; the mean counts.", "Self-Rewarding (2401.10020)"
        ),
        "reward-model": Piece(
            "A trained model scores answers, or compares two of them.", "ArmoRM (2406.12845); PairRM (2306.02561)"
        ),
        "openai": Piece("Any server with OpenAI's interface is asked which is better.", "MT-Bench (2306.05685)"),
        "order": Piece("The candidate that is named first wins: labels by construction.", "SPIN (2401.01335)"),
        "label": Piece("The label that the pair came with.", "DPO (2305.18290)"),
        "random": Piece("A coin: the control that shows what labels are worth.", "SAO (2510.06652), ablation"),
        "longest": Piece("The longer answer: the control for a bias to length.", "ours"),
        "gold": Piece("The lesson's gold rule: what perfect labels would give.", "ours"),
    },
    "pairing": {
        "two": Piece("There are two answers: the winner and the loser.", f"{SPA}, Eq. 8"),
        "best-worst": Piece(
            "The best and the worst of any number; of two it is the same.", "Self-Rewarding (2401.10020)"
        ),
    },
    "loss": {
        "dpo": Piece("-log sigma(m), m the difference of the two log-ratios times beta.", "DPO (2305.18290), Eq. 7"),
        "ipo": Piece("The log-ratios per token differ by a target, squared error.", "IPO (2310.12036), Eq. 17"),
        "hinge": Piece(
            "max(0, 1 - m): nothing is learned beyond a margin of 1.", "SLiC-HF (2305.10425); RSO (2309.06657)"
        ),
        "dpo-norm": Piece("DPO on log-ratios per token.", "Tulu 3 (2411.15124)"),
        "dpop": Piece("DPO, and a penalty where the chosen answer lost probability.", "DPOP, Smaug (2402.13228)"),
        "apo-zero": Piece(
            "The chosen answer's ratio up, the rejected one's down, each for itself.", "APO (2408.06266)"
        ),
        "kto": Piece("Single good and bad answers against an estimate of the KL; no pairs needed.", "KTO (2402.01306)"),
        "sppo": Piece("Each log-ratio has a target, +-1/(2 beta), squared error.", "SPPO (2405.00675)"),
        "simpo": Piece(
            "Log-probabilities per token must differ by a margin gamma; no reference.", "SimPO (2405.14734)"
        ),
        "cpo": Piece("DPO without a reference, and the chosen answer's likelihood.", "CPO (2401.08417)"),
        "orpo": Piece("The chosen answer's likelihood, and an odds ratio; no reference.", "ORPO (2403.07691)"),
    },
    "noise": {
        "none": Piece("Every label is taken as right.", "ours"),
        "smooth": Piece("Every label is wrong with probability epsilon.", "cDPO (E. Mitchell's note, 2023)"),
        "robust": Piece("The same, made unbiased.", "Robust DPO (2403.00409)"),
        "quantile": Piece(
            "The pairs of lowest margin are softened; lambda extrapolates who they are.", f"{SPA}, Eq. 9-12"
        ),
        "perpair": Piece(
            "A label is wrong with the probability that the judge gives.", "ours, for what UPO (2409.11212) aims at"
        ),
        "weight": Piece(
            "Pairs weigh by the judge's confidence, or by a function of your own.",
            "ours, a hook for SSAPO (2502.18099)",
        ),
    },
    "reference": {
        "auto": Piece("prev where the loss compares with anything, else none.", "ours"),
        "prev": Piece("The policy that wrote the answers.", f"{SPA}, Eq. 10; SPIN (2401.01335)"),
        "init": Piece("pi_init, in every round.", "DPO (2305.18290)"),
        "none": Piece("Nothing.", "SimPO (2405.14734)"),
    },
    "start": {
        "prev": Piece("Training goes on from the policy that wrote the answers.", f"{SPA}, Alg. 1"),
        "init": Piece("Training starts from pi_init in every round.", "SynPO (2410.06961)"),
    },
    "carry": {
        "fresh": Piece("A round trains on its own pairs.", f"{SPA}, Alg. 1"),
        "window2": Piece("On those of this round and of the one before.", "SPIN (2401.01335), released code"),
        "all": Piece("On all pairs so far.", "SynPO (2410.06961)"),
    },
}
"""Axis -> piece -> what it is. The pieces of an axis are the values of its setting, in that order."""


def values(axis: str) -> tuple[str, ...]:
    """The values that the setting of an axis takes."""
    return _words(SETTINGS[WHERE[axis]].type)


def _words(wanted: Any) -> tuple[str, ...]:
    if typing.get_origin(wanted) is Literal:
        return typing.get_args(wanted)
    parts = typing.get_args(wanted)
    return _words(parts[0]) if typing.get_origin(wanted) in {list, Annotated} else ()


# -- a recipe as one line --------------------------------------------------------------------------------------------


def one_line(recipe: Recipe) -> str:
    """`dpo seed | pool | sample(2, 0.7) | implicit(init) | two | dpo(0.1) | quantile(0.1, 0.1, 0.2) | ref prev | ...`.

    The seed stage if there is one, then prompts, candidates, judge, pairing, loss, noise (if anything is done about
    it), the reference of training, and what is carried from round to round: the start, the data.
    """
    r = recipe
    seeded = r.seed_dpo.by != "none" and not r.inputs.no_seed_pairs
    seed = f"{r.seed_dpo.by} seed" if seeded else ""
    if not r.rounds:
        return seed or "nothing"
    parts = [
        seed,
        _prompts(r),
        " + ".join(_candidate(r, kind) for kind in r.candidates.kinds),
        _judge(r),
        _pairing(r),
        _loss(r),
        _noise(r),
        f"ref {reference_of(r)}",
        _carry(r),
    ]
    return " | ".join(part for part in parts if part)


def _call(name: str, *parameters: Any) -> str:
    """`name(a, b)`; without parameters the name alone. The values of several rounds are written a/b."""
    shown = [_plain(p) for p in parameters if p not in (None, "")]
    return f"{name}({', '.join(shown)})" if shown else name


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "/".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _prompts(r: Recipe) -> str:
    p = r.prompts
    if p.source in {"pool", "gold", "pairs"}:
        return p.source
    shown = _call(p.source, p.examples if p.source == "fewshot" else None, p.temp, _nucleus(p.top_p))
    taught = "taught " if p.source == "keywords" and p.generator else ""
    return taught + shown + (" by init" if p.by == "init" else "")


def _candidate(r: Recipe, kind: str) -> str:
    s = r.sampling
    if kind == "sample":
        return _call(kind, s.n, s.temp, _nucleus(s.top_p))
    return _call(kind, s.temp, _nucleus(s.top_p)) if kind in {"init", "improve"} else kind


def _nucleus(top_p: float) -> float | None:
    return top_p if top_p < 1 else None


def _judge(r: Recipe) -> str:
    j = r.judge
    if j.by == "implicit":
        shown = _call(j.by, j.reference)
    elif j.by == "order":
        shown = _call(j.by, " > ".join(r.candidates.kinds))
    elif j.by == "self-rubric":
        shown = _call(j.by, j.tries)
    else:
        shown = _call(j.by, "swap" if j.swap and j.by in {"self-pair", "openai"} else None)
    return shown + (f" - {_plain(j.length_penalty)} a token" if j.length_penalty else "")


def _pairing(r: Recipe) -> str:
    p = r.pairing
    answers = answers_per_prompt(r)
    shown = "two" if answers == 2 else f"{p.by} of {answers}"
    gap = f" + {_call('min-gap', p.min_gap, p.gap_judge)}" if p.min_gap else ""
    return shown + (" + drop-ties" if p.drop_ties else "") + gap


def _loss(r: Recipe) -> str:
    x = r.loss
    parameters = [getattr(x, name) for name in losses.KINDS[x.kind].reads]
    if x.round_betas:
        parameters[0] = x.round_betas
    nll = f" + {_call('nll', x.nll)}" if x.nll is not None else ""
    return _call(x.kind, *parameters) + nll + (f" + {_call('optimism', x.optimism)}" if x.optimism else "")


def _noise(r: Recipe) -> str:
    by, f = r.noise.by, r.refine
    if by == "quantile":
        return _call(by, f.K, f.alpha, f.warmup) if f.alpha else ""
    return {"none": "", "weight": _call(by, r.noise.weight)}.get(
        by, _call(by, r.noise.epsilon) if by in {"smooth", "robust"} else by
    )


def _carry(r: Recipe) -> str:
    data = "one round" if r.rounds == 1 else r.carry.data
    return data if r.rounds == 1 and r.carry.start == "prev" else f"{r.carry.start}, {data}"
