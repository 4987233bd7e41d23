"""`eval --from-annotations`: AlpacaEval's numbers from a file. Nothing here loads a model or a framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spa_lite.benches import alpaca, alpaca_files
from spa_lite.files import digest_file


def annotated(
    file: str,
    references: str | None,
    lc_data: str | None,
    package: bool,
    seed: int,
    generator: str | None = None,
    annotator: str | None = None,
) -> dict[str, Any]:
    """Score an annotation file of AlpacaEval's: those of one model by one annotator."""
    score = alpaca.from_annotations(file, lc_data, references, model=generator, annotator=annotator, seed=seed)
    found = {
        "kind": "alpaca",
        "title": f"annotations {file}: {score.model} by {score.annotator}",
        "n": score.n,
        "judge": {"name": score.annotator},
        "result": score.to_dict(),
        "data": digest_file(Path(file)),
        "seed": seed,
        "warnings": list(score.notes),
    }
    if not package:
        return found
    records = alpaca_files.read_records(file)
    return found | {"package": by_package(alpaca.of_one(records, generator, annotator, file), lc_data)}


def by_package(annotations: Sequence[dict[str, Any]], lc_data: str | None) -> dict[str, Any]:
    """What the real alpaca-eval package makes of the same preferences.

    It joins difficulties by position, so it gets them only for all 805 prompts in official order.
    """
    from spa_lite.benches import alpaca_package

    pairs = [(str(a.get("instruction")), str(a.get("output_1"))) for a in annotations]
    if lc_data is None or alpaca_files.official(pairs) is None:
        return alpaca_package.run_annotations(annotations).metrics
    path = alpaca_files.fetch(alpaca_files.LENGTH_DATA) if lc_data == alpaca_files.HUB else lc_data
    return alpaca_package.run_annotations(annotations, Path(path)).metrics
