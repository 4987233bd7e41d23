"""Step (b) of a round: which of the answers is better, by the model's own implicit reward (Eq. 7 and 8).

The reward of an answer is log pi_policy / pi_reference, summed over its tokens. The other judges are
controls: they see the same answers and leave their own label beside the same log-ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from spa_lite import objective
from spa_lite.backend import Backend
from spa_lite.errors import RecipeError
from spa_lite.fit import halving
from spa_lite.journal import Marked
from spa_lite.keys import digest, generator
from spa_lite.recipe import Recipe
from spa_lite.records import Completion, Judgement, Row, Sample, Side

CHUNK = 256
"""Samples scored together, so that a file of any length is judged in bounded memory."""

Scorer = Callable[[Sequence[Row]], list[tuple[float, ...]]]
"""Rows -> summed log-probability (nats) of each response."""

Gold = Callable[[Sample, Completion], float | None]
"""True quality of an answer where it is known (the lesson), else None."""


def scorer(backend: Backend, role: str, tick: Callable[[], None] = lambda: None) -> Scorer:
    """Score rows under one role of a backend; `tick` is called once per row."""

    def once(rows: Sequence[Row]) -> list[tuple[float, ...]]:
        found: dict[int, tuple[float, ...]] = {}
        for index, scores in backend.logprob(rows, role):
            found[index] = tuple(score.logp for score in scores)
            tick()
        return [found[index] for index in range(len(rows))]

    return lambda rows: halving(backend, "score", lambda: once(rows))


def resumed(
    path: Path, rows: Sequence[Row], scorer: Callable[[], AbstractContextManager[Scorer]], size: int
) -> list[tuple[float, ...]]:
    """The sums of all rows, `size` rows at a time; those that a journal at `path` holds are not computed again.

    `scorer` opens what scores, if anything is left to do.
    """
    journal = Marked(path)
    known = [msgspec.json.decode(line, type=tuple[float, ...]) for line in journal.kept]
    with scorer() if len(known) < len(rows) else nullcontext(no_reference) as score:
        for start in range(len(known), len(rows), size):
            sums = score(rows[start : start + size])
            journal.append(sums)
            known += sums
    return known


def no_reference(rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """The reference of `judge.reference=none`: every sum is 0, so the reward is the likelihood."""
    return [(0.0,) * len(row.responses) for row in rows]


def judge_all(
    samples: Sequence[Sample],
    policy: Scorer,
    reference: Scorer,
    recipe: Recipe,
    round_: int = 0,
    gold: Gold | None = None,
) -> list[Judgement]:
    """Judge samples: first all policy sums, then all reference sums, so that the two may be different models.

    Raises RecipeError for a gold judge without a gold rule.
    """
    if recipe.judge.by == "gold" and gold is None:
        raise RecipeError("judge.by=gold needs a gold rule, which only the lesson has; use another --judge")
    rows = rows_of(samples)
    own, other = policy(rows), reference(rows)
    return [decide(*triple, recipe, round_, gold) for triple in zip(samples, own, other, strict=True)]


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """What is scored: each prompt with all its answers, as the ids that were sampled."""
    return [Row(prompt=s.prompt_ids, responses=tuple(c.ids for c in s.completions)) for s in samples]


def judge(
    samples: Iterable[Sample],
    policy: Scorer,
    reference: Scorer,
    recipe: Recipe,
    round_: int = 0,
    gold: Gold | None = None,
) -> Iterator[Judgement]:
    """The same in chunks: yield one Judgement per sample, in order, in bounded memory."""
    iterator = iter(samples)
    while chunk := list(islice(iterator, CHUNK)):
        yield from judge_all(chunk, policy, reference, recipe, round_, gold)


def decide(
    sample: Sample,
    policy: Sequence[float],
    reference: Sequence[float],
    recipe: Recipe,
    round_: int = 0,
    gold: Gold | None = None,
) -> Judgement:
    """Judge one sample. Of more than two answers the best and the worst become the pair."""
    rewards = np.array(policy) - np.array(reference)
    opinion = _opinion(sample, rewards, recipe, round_, gold)
    best, worst = best_and_worst(opinion, recipe.judge.tie)
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
        tie=bool(opinion[best] == opinion[worst]),
        tokens_a=len(sides[0].ids),
        tokens_b=len(sides[1].ids),
        judge=recipe.judge.by,
        extra=sample.extra,
    )


def best_and_worst(rewards: Sequence[float], tie: str) -> tuple[int, int]:
    """Indices of the best and the worst answer. At ties the later answer wins (tie = "b": Eq. 8 prefers the
    first only if it is strictly better), or the earlier (tie = "a": the released code's stable sort)."""
    order = sorted(range(len(rewards)), key=lambda i: (-rewards[i], -i if tie == "b" else i))
    return order[0], order[-1]


def _opinion(sample: Sample, rewards: Sequence[float], recipe: Recipe, round_: int, gold: Gold | None) -> list[float]:
    """The judge's own number per answer; higher is better."""
    if recipe.judge.by == "implicit":
        return [float(r) for r in rewards]
    if recipe.judge.by == "longest":
        return [float(len(c.ids)) for c in sample.completions]
    if recipe.judge.by == "random":
        draws = generator(digest("judge", recipe.seed, round_, sample.id)).random(len(sample.completions))
        return [float(d) for d in draws]
    assert gold is not None
    scores = [gold(sample, c) for c in sample.completions]
    if any(s is None for s in scores):
        raise RecipeError(f"judge.by=gold knows no truth about prompt {sample.id}; use another --judge")
    return [float(s) for s in scores if s is not None]


def counts(judgements: Sequence[Judgement]) -> dict[str, float]:
    """What a pile of judgements looks like: sizes, ties, lengths, how often the longer answer won."""
    different = [j for j in judgements if j.tokens_a != j.tokens_b]
    longer = sum((j.tokens_a > j.tokens_b) == (j.label == "a") for j in different)
    lengths = [n for j in judgements for n in (j.tokens_a, j.tokens_b)]
    return {
        "pairs": len(judgements),
        "identical": sum(identical(j) for j in judgements),
        "ties": sum(j.tie for j in judgements),
        "capped": sum(side.ended == "cap" for j in judgements for side in (j.a, j.b)),
        "mean_tokens": float(np.mean(lengths)) if lengths else 0.0,
        "longer_wins": longer / len(different) if different else 0.0,
        "unequal_lengths": len(different),
    }


def identical(judgement: Judgement) -> bool:
    """Whether both answers are the same token ids."""
    return judgement.a.ids == judgement.b.ids
