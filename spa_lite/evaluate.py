"""Measures, each with an interval: agreement of labels with the truth, win rate against pi_init, gold per criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spa_lite.intervals import Interval as Interval
from spa_lite.intervals import bootstrap
from spa_lite.intervals import wilson as wilson
from spa_lite.records import Completion, Judgement, Sample, Side

GoldRule = Callable[[Mapping[str, Any], str, bool], Mapping[str, float] | None]
"""(extra fields of a prompt, text of an answer, whether it ended by itself) -> criteria in [0, 1] and their
weighted "score", or None where the truth is not known."""


def win_rate(scores: Sequence[float], baseline: Sequence[float], seed: int, resamples: int) -> Interval:
    """Share of prompts on which `scores` beats `baseline`, ties half, with a paired bootstrap over prompts."""
    wins = [1.0 if s > b else 0.5 if s == b else 0.0 for s, b in zip(scores, baseline, strict=True)]
    rate = bootstrap(wins, seed, resamples)
    assert rate is not None
    return rate


def gold_means(samples: Sequence[Sample], rule: GoldRule) -> tuple[dict[str, float], list[float]]:
    """Mean of each criterion over the first answers, and every answer's score."""
    criteria = [rule(s.extra, s.completions[0].text, s.completions[0].ended != "cap") or {} for s in samples]
    names = list(criteria[0]) if criteria else []
    return {n: float(np.mean([c[n] for c in criteria])) for n in names}, [c["score"] for c in criteria]


def gold_of(rule: GoldRule, name: str = "score") -> Callable[[Sample, Completion], float | None]:
    """A gold rule as the gold judge calls it."""

    def score(sample: Sample, completion: Completion) -> float | None:
        criteria = rule(sample.extra, completion.text, completion.ended != "cap")
        return None if criteria is None else criteria[name]

    return score


def label_agreement(judgements: Sequence[Judgement], rule: GoldRule) -> dict[str, Interval]:
    """Share of labels that agree with gold, overall ("score") and per criterion; pairs with equal gold do not count."""
    hits: dict[str, list[bool]] = {}
    for j in judgements:
        for name, best in gold_winner(j, rule).items():
            if best is not None:
                hits.setdefault(name, []).append(best == j.label)
    found = {name: wilson(sum(h), len(h)) for name, h in hits.items()}
    return {name: interval for name, interval in found.items() if interval is not None}


def gold_winner(judgement: Judgement, rule: GoldRule) -> dict[str, str | None]:
    """Per criterion, the truly better answer; None where they are equal."""

    def criteria(side: Side) -> Mapping[str, float]:
        return rule(judgement.extra, side.text, side.ended != "cap") or {}

    a, b = criteria(judgement.a), criteria(judgement.b)
    return {name: None if a[name] == b[name] else "a" if a[name] > b[name] else "b" for name in a}


def wrong_flags(judgements: Sequence[Judgement], flagged: Sequence[str], rule: GoldRule) -> dict[str, int]:
    """Of the flagged pairs, how many are truly mislabelled; and how many of all pairs are."""
    by_id = {j.id: j for j in judgements}

    def wrong(j: Judgement) -> bool:
        best = gold_winner(j, rule).get("score")
        return best is not None and best != j.label

    return {
        "flagged": len(flagged),
        "flagged_wrong": sum(wrong(by_id[i]) for i in flagged),
        "wrong": sum(wrong(j) for j in judgements),
        "pairs": len(judgements),
    }


def pair_accuracy(margins: Sequence[float]) -> Interval | None:
    """Share of human pairs whose margin (chosen minus rejected) is above 0, ties half."""
    return wilson(sum(0.5 if m == 0 else float(m > 0) for m in margins), len(margins))
