"""docs/numbers.md against a run: every field that is logged is explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.small import lines, run_small, small_recipe, write_data

PAGE = (Path(__file__).parent.parent / "docs" / "numbers.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-z_0-9]+)`", PAGE))


def names(value: Any) -> Iterator[str]:
    """Names of all fields of a record, nested ones too."""
    for name, inner in value.items():
        yield name
        if isinstance(inner, dict):
            yield from names(inner)


def test_every_field_is_explained(tmp_path: Path) -> None:
    run_small(tmp_path / "run", small_recipe(write_data(tmp_path)))
    folder = tmp_path / "run/rounds/1"
    summary = msgspec.json.decode((tmp_path / "run/summary.json").read_bytes())
    rows = [row | {f"{kind}.": row[kind] for kind in ("trained", "sampled", "judged")} for row in summary["rows"]]
    logged = {
        "metrics.jsonl": set(lines(folder / "metrics.jsonl")[0]),
        "judgements.jsonl": set(names(lines(folder / "judgements.jsonl")[0])),
        "summary.json": {name for row in rows for name in names(row) if not name.endswith(".")} | set(summary),
        "timings.json": set(names(msgspec.json.decode((folder / "timings.json").read_bytes()))) | {"peak"},
    }
    stages = {"sample", "judge", "train", "measure", "seed"}
    assert {file: missing for file, fields in logged.items() if (missing := fields - NAMED - stages)} == {}


@pytest.mark.parametrize("field", ["win_rate", "gold", "label_accuracy", "flags", "flagged_wrong"])
def test_what_only_the_lesson_logs_is_explained(field: str) -> None:
    assert field in NAMED
