"""Signs that another round will not help, and which round was best. Rounds are known to turn down at some point.

They read the rows of a run's table, a row per stage, and know nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spa_lite.recipe import Recipe, Stop

Row = Mapping[str, Any]

MEASURES = {"win_rate": "win rate", "pair_accuracy": "held-out accuracy"}
"""What tells how good a stage is, the better one first, and what people call it."""


def signs(rows: Sequence[Row], recipe: Recipe) -> list[str]:
    """What the last row of the table says against going on, a sentence each; `stop.*` has the limits."""
    *before, row = rows
    found = [rule(row, before, recipe.stop) for rule in RULES]
    return [f"{row['stage']}: {sentence}" for sentence in found if sentence]


def displacement(row: Row, before: Sequence[Row], limit: Stop) -> str:
    """Chosen answers lost probability in training: the margin grew only because rejected ones lost more."""
    change = (row.get("trained") or {}).get("logratio_chosen") or 0.0
    if change >= -limit.displacement:
        return ""
    mend = "lower the learning rate or the number of epochs"
    return f"chosen answers lost {-change:.1f} nats of log-probability (displacement); {mend}"


def length_growth(row: Row, before: Sequence[Row], limit: Stop) -> str:
    """Answers grew: held-out ones where they are measured, else those of the round."""
    for length in (_measured_length, _sampled_length):
        now, first = length(row), next((n for n in map(length, before) if n), None)
        if now and first:
            grew = f"answers grew from {first:.1f} to {now:.1f} tokens; the judge may be rewarding length"
            return grew if now > limit.length_growth * first else ""
    return ""


def agreement(row: Row, before: Sequence[Row], limit: Stop) -> str:
    """The trained policy agrees with (nearly) all labels of its own round: they tell it nothing new."""
    share = (row.get("trained") or {}).get("accuracy") if row.get("judged") else None
    if share is None or share < limit.agreement:
        return ""
    return f"the policy agrees with {100 * share:.0f} % of the labels, so they teach it little more"


def accuracy_drop(row: Row, before: Sequence[Row], limit: Stop) -> str:
    """Held-out accuracy (the win rate, where the truth is known) fell against the best stage before."""
    for measure, name in MEASURES.items():
        now, earlier = _value(row, measure), [v for r in before if (v := _value(r, measure)) is not None]
        if now is not None and earlier:
            fell = f"{name} fell from {100 * max(earlier):.1f} to {100 * now:.1f} %"
            return fell if max(earlier) - now > limit.accuracy_drop else ""
    return ""


RULES: tuple[Callable[[Row, Sequence[Row], Stop], str], ...] = (displacement, length_growth, agreement, accuracy_drop)


def best(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The stage after training that measured best (the earlier one of equals); None where nothing was measured."""
    for measure in MEASURES:
        trained = [(value, row) for row in rows[1:] if (value := _value(row, measure)) is not None]
        if trained:
            value, row = max(trained, key=lambda found: found[0])
            return {"stage": row["stage"], "folder": row["folder"], "measure": measure, "value": value}
    return None


def _value(row: Row, measure: str) -> float | None:
    interval = row.get(measure)
    return float(interval["value"]) if interval else None


def _measured_length(row: Row) -> float | None:
    return row.get("length")


def _sampled_length(row: Row) -> float | None:
    return (row.get("judged") or {}).get("mean_tokens")
