"""Every judge can label the rounds of a run, and what its opinions depend on is part of the stage's key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_lite import backends, prepare
from spa_lite.errors import RecipeError, StaleRun
from spa_lite.events import Event
from spa_lite.models import Models
from spa_lite.recipe import Recipe
from spa_lite.records import Judgement
from spa_lite.spa import align
from spa_lite.stages.workbench import read_judgements
from spa_lite.store import Run
from tests.small import small_recipe, write_data

QUESTION = "{conversation}\n[[1]] {answer_1}\n[[2]] {answer_2}\nWhich is better, A or B?"


class Vowels:
    """Stands for a reward model: an answer is worth its vowels."""

    name, fingerprint, compares, cut = "vowels", "v", False, 0
    asked = 0

    def tokens(self, text: str) -> int:
        return len(text.split())

    def scores(self, conversations: Sequence[Any], tick: Callable[[], None] = lambda: None) -> list[float]:
        for _ in conversations:
            tick()
        type(self).asked += len(conversations)
        return [float(sum(c[-1].content.count(v) for v in "aeiou")) for c in conversations]

    def comparisons(self, questions: Sequence[Any], tick: Callable[[], None] = lambda: None) -> list[float]:
        raise NotImplementedError


def aligned(folder: Path, recipe: Recipe, stop_at: str = "") -> list[Judgement]:
    """Run one round and return its judgements; `stop_at` is the stage at whose first event the run is stopped."""

    def report(event: Event) -> None:
        if stop_at and event.stage.endswith(stop_at) and event.unit != "stage":
            raise KeyboardInterrupt

    models: Models = prepare.models_of(recipe, backends.load, lambda name, device, trust: Vowels())
    align(models, recipe, prepare.data_of(recipe, models), Run(folder), report)
    return read_judgements(folder / "rounds/1/judgements.jsonl")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Pairs and prompts of the small world."""
    return write_data(tmp_path, prompts=12)


def one_round(files: dict[str, str], **changes: Any) -> Recipe:
    """The small recipe for one round with settings of the judge."""
    return small_recipe(files, {"rounds": 1} | {f"judge.{name}": value for name, value in changes.items()})


def scores(judged: Judgement) -> tuple[float, float]:
    """The judge's own numbers, which are there."""
    assert judged.score_a is not None
    assert judged.score_b is not None
    return judged.score_a, judged.score_b


@pytest.mark.parametrize("by", ["likelihood", "self-pair", "self-score", "self-rubric", "longest", "random"])
def test_a_round_is_labelled_by_the_scores_of_its_judge(tmp_path: Path, files: dict[str, str], by: str) -> None:
    judged = aligned(tmp_path / "run", one_round(files, by=by))
    assert all(j.judge == by for j in judged)
    assert all((scores(j)[0] > scores(j)[1]) == (j.label == "a") for j in judged)
    assert any(j.logratio_a != 0 for j in judged), "the log-ratios are there beside them"


def test_a_reward_model_labels_a_round_and_is_not_asked_twice(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = one_round(files, by="reward-model", model="vowels")
    Vowels.asked = 0
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "run", recipe, stop_at="judge reference")
    judged = aligned(tmp_path / "run", recipe)
    assert Vowels.asked == 2 * len(judged), "its opinions outlived the interruption"
    assert [j.score_a for j in judged] == [float(sum(j.a.text.count(v) for v in "aeiou")) for j in judged]


def test_drawn_grades_outlive_an_interruption(tmp_path: Path, files: dict[str, str]) -> None:
    """Some asked before, some after: the same judgements as in one go. Other tries are another stage."""
    recipe = one_round(files, by="self-rubric", tries=2)
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "run", recipe, stop_at="judge reference")
    assert aligned(tmp_path / "run", recipe) == aligned(tmp_path / "whole", recipe)
    with pytest.raises(StaleRun, match=r"judge\.tries"):
        aligned(tmp_path / "run", one_round(files, by="self-rubric", tries=3))


def test_one_order_is_another_stage_with_other_scores(tmp_path: Path, files: dict[str, str]) -> None:
    both, one = (one_round(files, by="self-pair", swap=swap) for swap in (True, False))
    first, second = aligned(tmp_path / "both", both), aligned(tmp_path / "one", one)
    assert [scores(j) for j in first] != [scores(j) for j in second]
    with pytest.raises(StaleRun, match=r"judge\.swap"):
        aligned(tmp_path / "both", one)


def test_the_length_penalty_is_that_of_eq_13(tmp_path: Path, files: dict[str, str]) -> None:
    judged = aligned(tmp_path / "run", one_round(files, length_penalty=0.5))
    assert [j.score_a for j in judged] == pytest.approx([0.1 * j.logratio_a - 0.5 * j.tokens_a for j in judged])


def test_another_question_is_another_stage(tmp_path: Path, files: dict[str, str]) -> None:
    question = tmp_path / "question.txt"
    question.write_text(QUESTION)
    aligned(tmp_path / "run", one_round(files, by="self-pair", prompt=str(question)))
    again = tmp_path / "again.txt"
    again.write_text(QUESTION)
    aligned(tmp_path / "run", one_round(files, by="self-pair", prompt=str(again)))
    again.with_name("other.txt").write_text(QUESTION + " Be fair.")
    with pytest.raises(StaleRun, match="judge prompt changed since stage 'rounds/1 judge'"):
        aligned(tmp_path / "run", one_round(files, by="self-pair", prompt=str(again.with_name("other.txt"))))


def test_another_reward_model_is_another_stage(tmp_path: Path, files: dict[str, str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
    aligned(tmp_path / "run", one_round(files, by="reward-model", model=str(tmp_path / "one")))
    with pytest.raises(StaleRun, match="judge model changed"):
        aligned(tmp_path / "run", one_round(files, by="reward-model", model=str(tmp_path / "two")))


def test_a_judge_that_lacks_something_is_refused_before_any_work(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = one_round(files, by="openai")
    with pytest.raises(RecipeError, match="--judge openai needs --judge-url and --judge-model"):
        aligned(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()
