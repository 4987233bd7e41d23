"""The judge of an evaluation: which one it is, its model in memory, and its opinions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite import answers, backends, judges
from spa_lite.answers import Side
from spa_lite.backend import INIT, POLICY
from spa_lite.cli.eval_sides import opened, same_model
from spa_lite.cli.eval_work import Work
from spa_lite.errors import RecipeError
from spa_lite.evaluate import gold_of
from spa_lite.lesson import source
from spa_lite.models import Models
from spa_lite.opinion import Judge, Opinion
from spa_lite.recipe import Recipe
from spa_lite.records import Sample
from spa_lite.stages.workbench import folder_digest

if TYPE_CHECKING:
    from spa_lite.asking import Asked

IN_WORDS = ("openai", "self-pair", "self-score")
"""Judges that can be asked a question in words, such as a benchmark's."""


def judging_recipe(work: Work, lesson: bool = False) -> Recipe:
    """The recipe with the judge that is asked for; in the lesson it is gold by itself.

    Raises RecipeError, before any work, for no judge, a setting it lacks, or a policy that equals its reference.
    """
    r = work.recipe
    if not work.asked_for("judge.by"):
        if not lesson:
            raise RecipeError(f"who shall judge? Give --judge, one of: {', '.join(judges.TABLE)}")
        r = replace(r, judge=replace(r.judge, by="gold"))
    if not work.asked_for("inputs.adapter_path"):  # pi_0 of a run is not its judge
        r = replace(r, inputs=replace(r.inputs, adapter_path=None))
    judges.check_origin(r)
    judges.check(r)
    apart = r.judge.reference == "none" or r.inputs.adapter_path or r.inputs.init_model
    if r.judge.by == "implicit" and not apart:
        raise RecipeError("--judge implicit compares a policy with pi_init: name the policy with --adapter-path")
    if r.judge.reference == "lagged":
        raise RecipeError("there is no lagged reference here: give pi_{i-2} as --init-adapter")
    return r


def judged(work: Work, r: Recipe, sides: Sequence[Side], samples: Sequence[Sample]) -> tuple[Judge, list[Opinion]]:
    """The judge and its opinions. Its model takes the place of the sides' in memory."""
    kind = judges.TABLE[r.judge.by]
    depends: Any = None
    if kind.policy:
        models = work.one.of(r)
        other = models.reference_fingerprint if models.has_other_reference else None  # before our own model is loaded
        bind(work, r)
        roles = [folder_digest(adapter) for adapter in adapters(r)]
        depends = [roles, other, models.made_by, r.judge.reference]
    else:
        work.one.release()
        models = work.one.of(r)
    if kind.sums and not all(same_model(r, side) for side in sides):
        samples = answers.with_ids(samples, models)
    judge = judges.open_judge(r, models, backends.load_classifier, gold_of(source.rule), cache=replies(work, r))
    # Two models that take turns are loaded once each: everything is judged in one go.
    size = len(samples) if kind.sums and models.has_other_reference else answers.AT_A_TIME
    return judge, answers.opinions(judge, samples, work.out / "opinions", work.report, depends, size)


def adapters(r: Recipe) -> tuple[Path | None, Path | None]:
    """The adapters of POLICY and INIT."""
    init = Path(r.inputs.init_adapter) if r.inputs.init_adapter else None
    return Path(r.inputs.adapter_path) if r.inputs.adapter_path else init, init


def bind(work: Work, r: Recipe) -> Models:
    """The judge's model with its roles."""
    policy, init = adapters(r)
    models = opened(work, r, policy)
    models.backend.bind(INIT, init)
    models.backend.bind(POLICY, policy)
    return models


def asked_of(work: Work, r: Recipe) -> Asked:
    """Who answers a benchmark's questions to the judge. Raises RecipeError for a judge that has no words."""
    from spa_lite.asking import LocalModel
    from spa_lite.server import ChatServer

    if r.judge.by == "openai":
        work.one.release()
        assert r.judge.url
        assert r.judge.model
        return ChatServer(r.judge.url, r.judge.model, replies(work, r))
    models, (adapter, _) = bind(work, r), adapters(r)
    name = " + ".join(Path(part).name for part in (r.inputs.model or "built-in model", adapter) if part)
    return LocalModel(models.backend, POLICY, name, folder_digest(adapter) or "")


def in_words(r: Recipe) -> None:
    """Raises RecipeError for a judge that cannot be asked in words."""
    if r.judge.by not in IN_WORDS:
        raise RecipeError(f"--judge {r.judge.by} cannot grade in words; choose --judge {', '.join(IN_WORDS)}")


def replies(work: Work, r: Recipe) -> Path | None:
    """Where a server's replies are kept."""
    return work.out / "replies" if r.judge.by == "openai" else None


def own_judge(r: Recipe, sides: Sequence[Side]) -> list[str]:
    """Say so where the judge is one of the sides, or stands on the same model."""
    if not judges.TABLE[r.judge.by].policy:
        return []
    adapter = folder_digest(adapters(r)[0])
    found = [
        f"{'' if folder_digest(s.adapter) == adapter else 'the base model of '}{s.name}"
        for s in sides
        if same_model(r, s)
    ]
    return [f"the judge is {' and '.join(found)}: do not take its word alone"] if found else []
