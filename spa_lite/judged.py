"""What an opinion comes to for one record: the line that `judge` writes, and what it adds to the tally."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from spa_lite.agreement import Seen, share_of_best
from spa_lite.judge import ranked
from spa_lite.judges.controls import length
from spa_lite.opinion import Opinion
from spa_lite.recipe import Recipe
from spa_lite.records import Record, Sample

NO_GROUP = "(none)"
"""The subset of records that lack the field."""


class Item(Record, frozen=True, kw_only=True):
    """A record to judge: its number in the source, from 1, and what a person said of it (see `data.Candidates`)."""

    row: int
    sample: Sample
    gold: tuple[int, ...] = ()


class Judged:
    """What an opinion comes to for one record."""

    def __init__(self, item: Item, opinion: Opinion, recipe: Recipe, drift: float) -> None:
        self.item, self.opinion, self.beta = item, opinion, recipe.loss.beta
        self.swap = recipe.judge.swap
        self.order = ranked(opinion.scores, recipe.judge.tie)
        self.pair = len(self.order) == 2
        best, worst = self.order[0], self.order[-1]
        self.first, self.second = (0, 1) if self.pair else (best, worst)
        self.margin = opinion.scores[self.first] - opinion.scores[self.second]
        self.p = opinion.p(self.first, self.second)
        self.tie = opinion.scores[best] == opinion.scores[worst]
        self.close = abs(self.margin) <= drift

    @property
    def right(self) -> bool | None:
        """Whether the answer it puts first is the gold best; None at a tie for the first place, or without gold."""
        gold, top = self.item.gold, max(self.opinion.scores)
        if not gold or sum(score == top for score in self.opinion.scores) > 1:
            return None
        return self.order[0] == gold[0]

    def line(
        self,
        judge: str,
        policy: Sequence[float],
        reference: Sequence[float] | None,
        credit: list[list[tuple[str, float]]] | None,
    ) -> dict[str, Any]:
        """The short line. `reference` None: there is none, and the sums are the policy's alone."""
        found: dict[str, Any] = {"id": self.item.sample.id, "row": self.item.row, "judge": judge}
        if self.pair:
            found["label"] = "ab"[self.order[0]]
        else:
            found |= {"best": self.order[0], "worst": self.order[-1], "ranking": self.order}
        found["scores"] = self.opinion.scores
        found["margin"] = self.margin
        if self.p is not None:
            found["p"] = self.p
        tokens = [len(c.ids) for c in self.item.sample.completions]
        known = all(tokens)
        if policy and known:
            ratios = [own - other for own, other in zip(policy, reference or [0.0] * len(policy), strict=True)]
            mean = [ratio / n for ratio, n in zip(ratios, tokens, strict=True)]
            found["margin_per_token"] = self.beta * (mean[self.first] - mean[self.second])
        found |= {"tie": self.tie, "close": self.close}
        if policy:
            found |= self._named("logp" if reference is None else "logratio", ratios)
        if known:
            found |= self._named("tokens", tokens, "")
        if self.opinion.verdicts:
            if self.swap:
                found["orders_agree"] = all(self.opinion.agreeing) if self.opinion.agreeing else None
            found["unread"] = self.opinion.unread
        elif self.opinion.unread:
            found["unread"] = self.opinion.unread
        if self.item.gold:
            gold = self.item.gold
            found["gold"] = "ab"[gold[0]] if self.pair else list(gold) if len(gold) > 1 else gold[0]
            found["right"] = self.right
        if credit is not None:
            found |= self._named("credit", credit)
        return found

    def _named(self, name: str, values: Sequence[Any], plural: str = "s") -> dict[str, Any]:
        """name_a and name_b of a pair, else one list."""
        return {f"{name}_a": values[0], f"{name}_b": values[1]} if self.pair else {f"{name}{plural}": values}

    def seen(self, policy: Sequence[float], by: str | None) -> Seen:
        """What it adds to the tally. The likelihood baselines are there where the policy's sums are."""
        gold, answers = self.item.gold, self.item.sample.completions
        firsts = tuple(0.5 if v.p == 0.5 else float(v.p > 0.5) for v in self.opinion.verdicts if v.p is not None)
        seen = Seen(self.margin, self.tie, self.close, orders=self.opinion.agreeing, firsts=firsts)
        seen = seen._replace(unread=self.opinion.unread)
        if not gold:
            return seen
        best = gold[0]
        baselines = {"longer wins": share_of_best([length(c) for c in answers], best)}
        if policy:
            baselines["likelihood"] = share_of_best(policy, best)
            mean = [own / len(c.ids) for own, c in zip(policy, answers, strict=True)]
            baselines["likelihood per token"] = share_of_best(mean, best)
        sure = max(self.p, 1 - self.p) if self.pair and self.p is not None else None
        return seen._replace(
            right=share_of_best(self.opinion.scores, best),
            chance=1 / len(answers),
            p=sure,
            baselines=baselines,
            group=None if by is None else _word(self.item.sample.extra.get(by)),
        )


def _word(value: Any) -> str:
    """The value of a field as the name of a subset."""
    return value if isinstance(value, str) else NO_GROUP if value is None else msgspec.json.encode(value).decode()
