"""Who is evaluated: the stages of a run, the policy that is named, or whatever side a word means; and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa_lite import answers
from spa_lite.answers import Side
from spa_lite.backend import POLICY, Backend
from spa_lite.cli import render
from spa_lite.cli.checks import before_use, check_adapter
from spa_lite.cli.eval_work import Work, run_recipe
from spa_lite.errors import ModelError
from spa_lite.lesson import MODEL_DIR
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.records import Prompt, Sample
from spa_lite.rounds import policies_of
from spa_lite.stages.workbench import folder_digest


def stages_of(work: Work) -> list[Side]:
    """init and all that came of it, in order: the stages of the run, or the policy that is named."""
    r = work.recipe
    found = policies_of(None if work.asked_for("inputs.adapter_path") else work.run, r)
    if not (work.run or r.inputs.adapter_path or r.inputs.model or r.inputs.init_model):
        render.note("the built-in model and its seed adapter (give --run, or --model and --adapter-path, for yours)")
        found["seed adapter"] = MODEL_DIR.parent / "seed_adapter"
    return [Side(name, r, adapter) for name, adapter in found.items()]


def side(work: Work, word: str) -> Side:
    """The side a word names; a stage of another run brings that run's model, unless the user named one."""
    other = None if word == "init" or word.startswith(answers.MODEL_WORD) else answers.run_of(Path(word))
    r = work.recipe
    if other and other != work.run and not work.asked_for("inputs.model"):
        theirs = run_recipe(other)
        inputs = replace(
            r.inputs,
            model=theirs.inputs.model,
            backend=(r if work.asked_for("inputs.backend") else theirs).inputs.backend,
            init_adapter=theirs.inputs.init_adapter,
            init_model=theirs.inputs.init_model,
        )
        r = replace(r, model=theirs.model, inputs=inputs)
    return answers.side_of(word, r)


def subject(work: Work, word: str | None, stages: Sequence[Side] = ()) -> Side:
    """The model under test: --a, or the last stage, named by its run or model. Raises ModelError for a file."""
    if word is None:
        last = (stages or stages_of(work))[-1]
        return replace(last, name=f"{work.run.name} {last.name}" if work.run else model_name(last))
    found = side(work, word)
    if found.file:
        raise ModelError(f"{word} is a file of answers; a model is needed here: name a stage, an adapter or a model")
    return found


def model_name(side: Side) -> str:
    """A model and its adapter by the names of their folders."""
    return " + ".join(Path(part).name for part in (side.recipe.inputs.model or "built-in model", side.adapter) if part)


def described(work: Work, side: Side) -> dict[str, Any]:
    """A side as eval.json names it; of a model that was used, what it is and what it was computed on."""
    known = {
        "name": side.name,
        "adapter": str(side.adapter) if side.adapter else None,
        "adapter_digest": folder_digest(side.adapter),
        "model": side.recipe.inputs.model,
        "file": str(side.file) if side.file else None,
    }
    return known | work.used.get(side.key, {})


def opened(work: Work, r: Recipe, adapter: Path | None) -> Models:
    """The models of a recipe, alone in memory. What the backend advises is said once, an adapter's check is made."""
    models = work.one.of(r)
    if models.loaded is None:
        before_use(models.backend, r)
    if adapter:
        check_adapter(models.backend, adapter)
    return models


def bound(work: Work, side: Side) -> Backend:
    """The backend of a side with its adapter as the policy."""
    models = opened(work, side.recipe, side.adapter)
    models.backend.bind(POLICY, side.adapter)
    work.used[side.key] = {"fingerprint": models.fingerprint, "made_by": models.made_by}
    return models.backend


def answered(work: Work, side: Side, prompts: Sequence[Prompt], stage: str, n: int = 1) -> list[Sample]:
    """The answers of one side, read or made."""
    if side.file:
        return answers.read_answers(side.file)
    models = opened(work, side.recipe, side.adapter)
    work.used[side.key] = {"fingerprint": models.fingerprint, "made_by": models.made_by}
    found, notes = answers.answers(side, models, prompts, work.recipe, work.out / "answers", n, work.report, stage)
    for line in notes:
        render.note(f"{side.name}: {line}")
    return found


def same_model(r: Recipe, side: Side) -> bool:
    """Whether a side's answers come from the model that a recipe names."""
    return side.file is None and answers.model_key(side.recipe) == answers.model_key(r)
