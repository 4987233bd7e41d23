"""The real alpaca-eval package (the extra `alpaca`), with a judge of ours as its annotator and without the network.

The package runs in a process of its own, `python -m spa_lite.benches.alpaca_package FOLDER`: importing it reads `.env`
files and changes global settings of logging and scikit-learn. The judge has been asked before, so what crosses over is
a table of preferences; the package asks for them through its own prompts, in the order it draws, and computes its
numbers. Left to itself it would look for data on its hub, keep verdicts by the judge's name alone and write into its
own folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spa_lite
from spa_lite.benches import alpaca, alpaca_files
from spa_lite.benches.alpaca_files import LENGTH_DATA, Output, Source
from spa_lite.errors import BackendMissing, DataError, JudgeError, SpaError
from spa_lite.opinion import Judge, Tick

FIELDS = ("instruction", "output_1", "output_2")
GENERATORS = ("generator_1", "generator_2")
TEMPLATE = "\n".join("{" + name + "}" for name in FIELDS)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
HOW = "pip install 'spa-lite[alpaca]'"


@dataclass(frozen=True)
class Package:
    """What the package says: its leaderboard row, in percent under its own names, and its annotations."""

    metrics: dict[str, Any]
    annotations: list[dict[str, Any]]


def run_package(
    outputs: Sequence[Output],
    references: Sequence[Output],
    judge: Judge,
    lc_data: Source | None = None,
    tick: Tick = lambda: None,
) -> Package:
    """Judge the outputs and let alpaca-eval compute its numbers.

    With `lc_data` (`df_gamed.csv`, a file or `"hub"`) its length-controlled win rate is among them. That takes all the
    official prompts: the package joins by position. Raises BackendMissing if it is not installed, DataError if the
    prompts do not allow what is asked, JudgeError if no reply of the judge could be read.
    """
    check_installed()
    matched = alpaca.match(outputs, references)
    length_data = None if lc_data is None else _length_data(lc_data, matched)
    annotations = alpaca.judge_outputs(matched.outputs, matched.references, judge, tick)
    return run_annotations(annotations, length_data)


def run_annotations(annotations: Sequence[Mapping[str, Any]], lc_data: Path | None = None) -> Package:
    """Let alpaca-eval annotate pairs whose preferences are known, of one model by one annotator.

    Of a prompt that occurs twice the first with a preference is taken. With `lc_data` they must be all 805 in official
    order. Raises as `run_package` does.
    """
    check_installed()
    known = _known(annotations)
    if all(pair["preference"] is None for pair in known):
        raise JudgeError(f"none of {len(annotations)} annotations holds a preference; try another judge")
    with tempfile.TemporaryDirectory(prefix="spa-lite-alpaca-") as name:
        folder = Path(name)
        job = {"annotations": known, "lc_data": None if lc_data is None else str(lc_data.resolve())}
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, name], cwd=name, env=_environment(), capture_output=True, check=False
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise SpaError(f"alpaca-eval failed: {said[-1] if said else f'exit code {done.returncode}'}")
        found = json.loads((folder / "result.json").read_text())
    named = {kind: annotations[0].get(kind) for kind in GENERATORS}
    return Package(found["metrics"], [{**annotation, **named} for annotation in found["annotations"]])


def _known(annotations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One pair of each prompt, with what the package needs to know of it."""
    found: dict[str, dict[str, Any]] = {}
    for annotation in annotations:
        pair: dict[str, Any] = {name: str(annotation[name]) for name in FIELDS}
        pair |= {
            "annotator": str(annotation.get("annotator") or "unnamed annotator"),
            "preference": alpaca.preference_in(annotation),
        }
        before = found.get(pair["instruction"])
        if before is None or before["preference"] is None:
            found[pair["instruction"]] = pair
    return list(found.values())


def check_installed() -> None:
    """Raises BackendMissing if the package, or what it does not say it needs, is not there. Imports neither."""
    if importlib.util.find_spec("alpaca_eval") is None:
        raise BackendMissing(f"alpaca-eval is not installed here: {HOW}")
    if importlib.util.find_spec("pkg_resources") is None:
        raise BackendMissing(f"alpaca-eval needs pkg_resources, which setuptools 82 no longer has: {HOW}")


def _length_data(source: Source, matched: alpaca.Matched) -> Path:
    """The file, checked, if the package may use it."""
    found = alpaca_files.official([(o.instruction, o.output) for o in matched.references])
    if found is None or matched.unanswered:
        raise DataError(
            "alpaca-eval's length control takes outputs for all 805 official prompts, and the references in their order"
        )
    path = Path(alpaca_files.fetch(LENGTH_DATA) if source == alpaca_files.HUB else source)
    alpaca_files.read_length_data(path)
    return path


def _environment() -> dict[str, str]:
    """Ours, offline; it asks for the user's name, which a container may not know."""
    here = str(Path(spa_lite.__file__).resolve().parents[1])
    paths = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    return {"LOGNAME": "spa-lite", **os.environ, **OFFLINE, "PYTHONPATH": paths}


# --- in the process of its own ---------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Do `job.json`, leave `result.json`."""
    import alpaca_eval
    from alpaca_eval.metrics import glm_winrate

    job = json.loads((folder / "job.json").read_text())
    annotations, lc_data = job["annotations"], job["lc_data"]
    glm_winrate.hf_hub_download = lambda *_, **__: lc_data
    metric = "get_winrate" if lc_data is None else "get_length_controlled_winrate"
    board, annotated = alpaca_eval.evaluate(
        model_outputs=_side(annotations, 2),
        reference_outputs=_side(annotations, 1),
        annotators_config=str(_config(folder, annotations[0]["annotator"])),
        name="model",
        fn_completions=_annotator(annotations),
        fn_metric=metric,
        sort_by="win_rate",
        metric_kwargs={} if lc_data is None else {"save_weights_dir": None},
        caching_path=None,  # else old verdicts of a judge with the same name
        is_avoid_reannotations=False,
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
    )
    result = {"metrics": board.loc["model"].to_dict(), "annotations": annotated}
    (folder / "result.json").write_text(json.dumps(result, default=float))


def _side(annotations: Sequence[Mapping[str, Any]], side: int) -> list[dict[str, str]]:
    # Not the real names: a model called as its reference is given 50 % without a look.
    return [
        {"instruction": a["instruction"], "output": a[f"output_{side}"], "generator": f"generator_{side}"}
        for a in annotations
    ]


def _config(folder: Path, annotator: str) -> Path:
    """A folder with the annotator's configuration; the prompt must be a file."""
    (folder / "judge").mkdir()
    prompt = folder / "judge" / "prompt.txt"
    prompt.write_text(TEMPLATE)
    settings = {"prompt_template": str(prompt), "fn_completion_parser": "eval_parser", "batch_size": 1}
    # Every JSON document is a YAML one.
    (folder / "judge" / "configs.yaml").write_text(json.dumps({annotator: settings}))
    return folder / "judge"


def _annotator(annotations: Sequence[Mapping[str, Any]]) -> Any:
    """The callable that stands for the judge: it knows a preference by the prompt the package makes of the pair."""
    answers = {}
    for a in annotations:
        known = a["preference"]
        answers[_filled(a["instruction"], a["output_1"], a["output_2"])] = repr(known)
        answers[_filled(a["instruction"], a["output_2"], a["output_1"])] = repr(None if known is None else 3 - known)

    def complete(prompts: Sequence[str], **_: Any) -> dict[str, list[str]]:
        return {"completions": [answers[prompt] for prompt in prompts]}

    return complete


def _filled(*values: str) -> str:
    """The template as the package fills it: one place after the other, so that a text may fill a later one's place."""
    prompt = TEMPLATE
    for name, value in zip(FIELDS, values, strict=True):
        prompt = prompt.replace("{" + name + "}", value, 1)
    return prompt


if __name__ == "__main__":
    main(Path(sys.argv[1]))
