"""Step (b) of a round: which of the answers is better, by the model's own implicit reward (Eq. 7 and 8).

The reward of an answer is log pi_policy / pi_reference, summed over its tokens. Other judges (`spa_lite.judges`)
see the same answers and leave their own numbers and label beside the same log-ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from spa_lite import objective
from spa_lite.backend import Backend
from spa_lite.events import Report, Tick, silent, ticking, unheard
from spa_lite.fit import halving
from spa_lite.journal import Marked
from spa_lite.opinion import Judge, Opinion
from spa_lite.recipe import Recipe
from spa_lite.records import Ids, Judgement, Row, Sample, Score, Side

T = TypeVar("T")
Sums = tuple[float, ...]
"""Summed log-probability (nats) of each response of a row."""
Tokens = tuple[tuple[float, ...], ...]
"""The same, token by token."""
Scorer = Callable[[Sequence[Row]], list[Sums]]
CHUNK = 256
"""Rows scored between two writes of a journal. Sums may depend on it (by rounding), so it is the same always."""


def scored(
    backend: Backend, rows: Sequence[Row], role: str, tick: Tick = unheard, per_token: bool = False
) -> list[tuple[Score, ...]]:
    """Scores of rows under a role, in row order; `tick` is called once per row."""

    def once() -> dict[int, tuple[Score, ...]]:
        found: dict[int, tuple[Score, ...]] = {}
        for index, scores in backend.logprob(rows, role, per_token):
            found[index] = scores
            tick(sum(score.tokens for score in scores))
        return found

    found = halving(backend, "score_tokens", once, rows)
    return [found[index] for index in range(len(rows))]


def scorer(backend: Backend, role: str, tick: Tick = unheard) -> Scorer:
    """Score rows under one role of a backend."""
    return lambda rows: [tuple(score.logp for score in scores) for scores in scored(backend, rows, role, tick)]


def token_scorer(backend: Backend, role: str, tick: Tick = unheard) -> Callable[[Sequence[Row]], list[Tokens]]:
    """The same, token by token."""
    return lambda rows: [
        tuple(score.per_token or () for score in scores) for scores in scored(backend, rows, role, tick, per_token=True)
    ]


def resumed(
    path: Path,
    rows: Sequence[Row],
    scorer: Callable[[int], AbstractContextManager[Callable[[Sequence[Row]], list[T]]]],
    kind: type[T],
) -> list[T]:
    """What is scored of all rows, CHUNK rows at a time; those that a journal at `path` holds are not computed again.

    `scorer` opens what scores, if anything is left to do, and is told how much is done.
    """
    journal = Marked(path)
    known = [msgspec.json.decode(line, type=kind) for line in journal.kept]
    if len(known) == len(rows):
        return known
    with scorer(len(known)) as score:
        for start in range(len(known), len(rows), CHUNK):
            found = score(rows[start : start + CHUNK])
            journal.append(found)
            known += found
    return known


def asked(
    path: Path, judge: Judge, samples: Sequence[Sample], report: Report = silent, stage: str = "judge", size: int = 64
) -> list[Opinion]:
    """A judge's opinions on samples, `size` at a time; those that a journal at `path` holds are not asked for again."""
    journal = Marked(path)
    known = [msgspec.json.decode(line, type=Opinion) for line in journal.kept]
    tick = ticking(report, stage, len(samples), "pairs", len(known))
    for start in range(len(known), len(samples), size):
        found = judge(samples[start : start + size], tick)
        journal.append(found)
        known += found
    return known


def no_reference(rows: Sequence[Row]) -> list[Sums]:
    """The reference of `judge.reference=none`: every sum is 0, so the reward is the likelihood."""
    return [(0.0,) * len(row.responses) for row in rows]


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """What is scored: each prompt with all its answers, as the ids that were sampled."""
    return [Row(prompt=s.prompt_ids, responses=tuple(c.ids for c in s.completions)) for s in samples]


def decide(
    sample: Sample,
    policy: Sequence[float],
    reference: Sequence[float],
    opinion: Opinion,
    recipe: Recipe,
    gaps: Opinion | None = None,
) -> Judgement:
    """One sample as the judge's opinion has it, beside the sums (nats) of its answers under policy and reference.

    Of more than two answers the best and the worst become the pair. `gaps` is the opinion of `pairing.gap_judge`.
    """
    rewards = np.array(policy) - np.array(reference)
    best, worst = best_and_worst(opinion.scores, recipe.judge.tie)
    a, b = sorted((best, worst))
    sides = [
        Side(text=c.text, ids=c.ids, ended=c.ended, policy=float(policy[i]), reference=float(reference[i]))
        for i, c in ((i, sample.completions[i]) for i in (a, b))
    ]
    margin = objective.margin(policy[a], policy[b], reference[a], reference[b], recipe.loss.beta)
    return Judgement(
        id=sample.id,
        messages=sample.messages,
        prompt_ids=sample.prompt_ids,
        a=sides[0],
        b=sides[1],
        logratio_a=float(rewards[a]),
        logratio_b=float(rewards[b]),
        margin=float(margin),
        p=float(objective.preference(np.float64(margin))),
        label="a" if best == a else "b",
        tie=opinion.scores[best] == opinion.scores[worst],
        tokens_a=len(sides[0].ids),
        tokens_b=len(sides[1].ids),
        judge=recipe.judge.by,
        score_a=opinion.scores[a],
        score_b=opinion.scores[b],
        confidence=opinion.p(best, worst),
        gap=(gaps or opinion).scores[best] - (gaps or opinion).scores[worst],
        third=third(sample) if recipe.loss.optimism else (),
        extra=sample.extra,
    )


def third(sample: Sample) -> Ids:
    """The policy's own answer: the greedy one, as SELM's code takes it, or a sample, as its paper has it."""
    return next(c.ids for kind in ("greedy", "sample") for c in sample.completions if c.kind == kind)


def best_and_worst(scores: Sequence[float], tie: str) -> tuple[int, int]:
    """Indices of the best and the worst answer."""
    order = ranked(scores, tie)
    return order[0], order[-1]


def ranked(scores: Sequence[float], tie: str) -> list[int]:
    """Indices of the answers, best first. At ties the later answer wins (tie = "b": Eq. 8 prefers the first only
    if it is strictly better), or the earlier (tie = "a": the released code's stable sort)."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -i if tie == "b" else i))


def counts(judgements: Sequence[Judgement]) -> dict[str, float]:
    """What a pile of judgements looks like: sizes, ties, lengths, how often the longer answer won, and how often the
    one of the higher implicit reward (of the `rewarded` pairs, whose rewards differ)."""
    different = [j for j in judgements if j.tokens_a != j.tokens_b]
    longer = sum((j.tokens_a > j.tokens_b) == (j.label == "a") for j in different)
    lengths = [n for j in judgements for n in (j.tokens_a, j.tokens_b)]
    rewarded = [j for j in judgements if j.margin]
    agrees = sum((j.margin > 0) == (j.label == "a") for j in rewarded)
    return {
        "pairs": len(judgements),
        "identical": sum(identical(j) for j in judgements),
        "ties": sum(j.tie for j in judgements),
        "capped": sum(side.ended == "cap" for j in judgements for side in (j.a, j.b)),
        "mean_tokens": float(np.mean(lengths)) if lengths else 0.0,
        "longer_wins": longer / len(different) if different else 0.0,
        "unequal_lengths": len(different),
        "rewarded": len(rewarded),
        "reward_agrees": agrees / len(rewarded) if rewarded else 0.0,
    }


def identical(judgement: Judgement) -> bool:
    """Whether both answers are the same token ids."""
    return judgement.a.ids == judgement.b.ids
