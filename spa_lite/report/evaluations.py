"""What `eval` has found about a run, as a table: a row per result, of held-out pairs a row per stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spa_lite.errors import SpaError
from spa_lite.files import read_json
from spa_lite.report.collect import Told
from spa_lite.report.tables import Sheet, fixed, interval, sheet

FILE = "eval/eval.json"
Row = list[str | None]


def eval_sheet(run: Told) -> Sheet:
    """The results in the run's eval/eval.json. A file or a result that cannot be read is a problem of the run."""
    rows: list[Row] = []
    path = run.folder / FILE
    try:
        results = read_json(path)["results"] if path.exists() else []
    except (SpaError, OSError, KeyError, TypeError):
        run.problems.append(f"{FILE} is damaged and was left out")
        results = []
    for result in results:
        try:
            rows += list(_rows(result))
        except (KeyError, TypeError, ValueError, AttributeError):
            run.problems.append(f"{FILE}: a result cannot be read and was left out")
    return sheet(("result", "measure", "value", "n", "beside it"), rows)


def _rows(result: Mapping[str, Any]) -> Iterator[Row]:
    kind, title = result["kind"], str(result["title"])
    if kind == "held-out pairs":
        for name, stage in result["stages"].items():
            rewards = f"chosen {fixed(stage['chosen'], 3)}, rejected {fixed(stage['rejected'], 3)}"
            yield [f"{title}, {name}", *_share("accuracy %", stage["accuracy"]), rewards]
    elif kind == "head-to-head":
        yield [title, *_share("win rate of the first %", result["win_rate"]), _controlled(result)]
    elif kind == "alpaca":
        if found := result.get("result"):  # nothing was judged otherwise
            yield [title, *_share("win rate %", found["win_rate"]), _controlled(found)]
    elif kind == "mt-bench":
        mean = result["result"]["average"]
        said = f"{mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]" if mean else None
        yield [title, "grade, 1 to 10", said, f"{mean['n']:g}" if mean else "0", None]
    else:
        for rule, told in result["rules"].items():
            for side, found in zip(result["sides"], told["sides"], strict=True):
                yield [f"{kind}, {rule}: {side['name']}", *_share("right answers %", found["accuracy"]), None]


def _share(measure: str, found: Mapping[str, float] | None) -> tuple[str, str | None, str]:
    return measure, interval(found), f"{found['n']:g}" if found else "0"


def _controlled(found: Mapping[str, Any]) -> str | None:
    """The length-controlled win rate under its own name."""
    controlled = found["length_controlled"]
    return f"{controlled['name']} {interval(controlled['interval'])}" if controlled["interval"] else None
