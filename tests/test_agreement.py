"""Agreement with gold labels, on counts that a reader can check by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.agreement import BINS, GROUPS, OTHERS, Seen, Tally, deciles, share_of_best
from spa_lite.intervals import mcnemar, wilson


def seen(p: float, right: float, **changes: object) -> Seen:
    """A judged pair with gold."""
    known = Seen(math.log(p / (1 - p)) if p < 1 else 30.0, p == 0.5, p == 0.5, right=right, p=p)
    return known._replace(**changes)  # type: ignore[arg-type]


def tally(*records: Seen) -> Tally:
    """All of them counted."""
    found = Tally()
    for record in records:
        found.add(record)
    return found


def test_accuracy_with_its_interval() -> None:
    """Three of four right, one of them half."""
    found = tally(seen(0.9, 1), seen(0.8, 1), seen(0.7, 0), seen(0.5, 0.5)).summary()
    interval = wilson(2.5, 4)
    assert interval is not None
    assert found["accuracy"] == interval.to_dict()
    assert (found["records"], found["ties"], found["close"], found["guessing"]) == (4, 1, 1, 0.5)


def test_without_gold_there_are_only_counts() -> None:
    found = tally(Seen(1.0, False, False, orders=(True, False), firsts=(1.0, 0.5), unread=2)).summary()
    assert found["accuracy"] is found["calibration"] is found["guessing"] is None
    assert found["baselines"] == found["groups"] == {}
    assert found["deciles"] == []
    assert (found["order_agreement"]["value"], found["first_position"]["value"], found["unread"]) == (0.5, 0.75, 2)


def test_calibration_by_hand() -> None:
    """Bins of .05 from .5 on: two labels at .92 and .94 with one right, one at .5 that is a tie, one at 1."""
    found = tally(seen(0.92, 1), seen(0.94, 0), seen(0.5, 0.5), seen(1.0, 1)).calibration()
    assert found is not None
    assert [b["n"] for b in found["bins"]] == [1, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert found["bins"][8]["confidence"] == pytest.approx(0.93)
    assert found["bins"][8]["accuracy"] == 0.5
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.93) + 0 + 0) / 4)
    assert found["brier"] == pytest.approx((0.08**2 + 0.94**2 + 0.25 + 0) / 4)


def test_a_baseline_beside_the_judge() -> None:
    """McNemar looks at the records on which only one of the two is right."""
    records = [seen(0.9, 1, baselines={"longer wins": 0.0})] * 8 + [seen(0.9, 0, baselines={"longer wins": 1.0})] * 2
    both = [seen(0.9, 1, baselines={"longer wins": 1.0}), seen(0.9, 1, baselines={"longer wins": 0.5})]
    found = tally(*records, *both).summary()["baselines"]["longer wins"]
    assert (found["only_judge_right"], found["only_baseline_right"]) == (8, 2)
    assert found["accuracy"]["value"] == pytest.approx(3.5 / 12)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_mcnemar() -> None:
    assert mcnemar(0, 0) is None
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    exact, normal = mcnemar(550, 449), mcnemar(550, 450)
    assert exact is not None
    assert normal is not None
    assert exact == pytest.approx(normal, abs=2e-4), "the approximation takes over where both say the same"


def test_share_of_best() -> None:
    assert [share_of_best(v, 1) for v in ([1, 2], [2, 1], [2, 2], [3, 3, 3], [3, 1, 3])] == [1, 0, 0.5, 1 / 3, 0]


def test_subsets_are_bounded() -> None:
    """What comes after the thousandth subset is counted together."""
    found = tally(*[seen(0.9, 1, group=str(i)) for i in range(GROUPS + 5)], seen(0.9, 0, group="3")).groups
    assert len(found) == GROUPS + 1
    assert (found[OTHERS].n, found["3"].n, found["3"].hits) == (5, 2, 1)


def test_deciles_by_hand() -> None:
    """Twenty margins 1 to 20, the larger half right: tenths of two records each."""
    found = deciles(tally(*[Seen(float(m), False, False, right=float(m > 10)) for m in range(1, 21)]).margins)
    assert [d["accuracy"] for d in found] == pytest.approx([0] * 5 + [1] * 5)
    assert [d["up_to"] for d in found] == pytest.approx([2 * k for k in range(1, 11)], rel=0.03)


@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1, max_size=60))
def test_counts_agree_with_each_other(records: list[tuple[float, bool]]) -> None:
    """Bins and deciles hold every record once, and a tally that was written down goes on as if it had not been."""
    all_seen = [seen(p, float(right)) for p, right in records]
    whole, half = tally(*all_seen), tally(*all_seen[: len(all_seen) // 2])
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(half)), Tally, strict=False)
    for record in all_seen[len(all_seen) // 2 :]:
        again.add(record)
    assert again == whole
    found = whole.summary()
    right = sum(r for _, r in records)
    assert sum(b["n"] for b in found["calibration"]["bins"]) == len(records)
    assert found["calibration"]["ece"] <= 1
    assert found["accuracy"]["value"] == float(Fraction(right, len(records)))
    if len(records) >= BINS:
        assert sum(d["n"] * d["accuracy"] for d in found["deciles"]) == pytest.approx(right)
