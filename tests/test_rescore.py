"""Sampled log-probs in the judge's place: when they are used, and that nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spa_lite import judge, rescore
from spa_lite.backend import POLICY
from spa_lite.events import Event
from spa_lite.opinion import Opinion
from spa_lite.recipe import Recipe, build
from spa_lite.records import Completion, Sample
from spa_lite.rescore import Check, drifted, recorded, sentence
from spa_lite.stages.workbench import read_judgements, read_samples
from tests.small import load, results, run_small, small_recipe, write_data


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Pairs and prompts of the small world."""
    return write_data(tmp_path)


class Off:
    """A backend whose sampler is off by a little at each token, as another kernel's would be, and counts its passes."""

    def __init__(self, inner: Any, by: float, asked: list[tuple[str, int]]) -> None:
        self.__dict__.update(_inner=inner, by=by, asked=asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def sample(self, *args: Any) -> Iterator[Any]:
        """Answers with log-probs that are off."""
        for index, some in self._inner.sample(*args):
            yield (
                index,
                tuple(msgspec.structs.replace(c, logprobs=tuple(x + self.by for x in c.logprobs)) for c in some),
            )

    def logprob(self, rows: Any, role: str, *args: Any) -> Any:
        """Scores that are right."""
        self.asked.append((role, len(rows)))
        return self._inner.logprob(rows, role, *args)


def run(folder: Path, recipe: Recipe, off: float = 0.0) -> tuple[dict[str, Any], list[str], int]:
    """A run; what `rescore` says of round 1, the notes, and how many rows were scored under the policy."""
    asked: list[tuple[str, int]] = []
    notes: list[Event] = []
    summary, _ = run_small(folder, recipe, lambda backend: Off(backend, off, asked), notes.append)
    row = next(row for row in summary["rows"] if row["stage"] == "round 1")
    said = [event.note for event in notes if event.stage == "round 1 judge" and event.note]
    return row["judged"]["rescore"], said + summary["warnings"], sum(n for role, n in asked if role == POLICY)


def test_what_the_sampler_stored_is_what_a_pass_gives(tmp_path: Path, files: dict[str, str]) -> None:
    """Sums from samples.jsonl are the judge's, and DPO's reference; the labels are those of scoring everything."""
    found, said, rows = run(tmp_path / "check", small_recipe(files))
    _, _, never = run(tmp_path / "never", small_recipe(files, {"judge.rescore": "never"}))
    always, _, every = run(tmp_path / "always", small_recipe(files, {"judge.rescore": "always"}))
    assert (found["checked"], found["rescored"], found["flips"], found["why"]) == (8, 8, 0, "")
    assert found["largest_drift"] == pytest.approx(0, abs=1e-12)
    assert (always["checked"], always["rescored"], always["why"]) == (0, 20, "judge.rescore=always")
    assert (rows - never, every - never) == (2 * 8, 2 * 20), "two rounds of twenty prompts"
    assert "8 of 20 pairs scored again are 0 nats per token off (largest 0), 0 labels flip" in said[0]
    assert results(tmp_path / "check") == results(tmp_path / "always") == results(tmp_path / "never")
    samples = list(read_samples(tmp_path / "check/rounds/1/samples.jsonl"))
    for sample, j in zip(samples, read_judgements(tmp_path / "check/rounds/1/judgements.jsonl"), strict=True):
        assert [j.a.policy, j.b.policy] == [math.fsum(c.logprobs) for c in sample.completions]


@pytest.mark.parametrize(("by", "why"), [(0.03, "their mean drift is 0.03"), (3.0, "labels flip, more than 1 %")])
@pytest.mark.parametrize("other", [False, True])
def test_a_sampler_that_is_off_is_not_believed(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, by: float, why: str, other: bool
) -> None:
    """By drift or, where that is let pass, by labels; then everything is scored again, and that is warned of."""
    monkeypatch.setattr(rescore, "DRIFT", 0.02 if by < 1 else 5.0)
    beside: dict[str, Any] = {}
    if other:  # a whole other model is the reference: the policy is loaded and bound anew
        files = {"inputs.prompts": files["inputs.prompts"]}
        beside = {"inputs.no_seed_pairs": True, "inputs.init_model": "toy:7"}
    always, _, _ = run(tmp_path / "always", small_recipe(files, beside | {"judge.rescore": "always"}), by)
    found, said, _ = run(tmp_path / "check", small_recipe(files, beside), by)
    assert why in found["why"]
    assert found["rescored"] == found["pairs"] == always["rescored"]
    assert drifted(found) == (by < 1)
    assert any(why in line for line in said)
    assert any("round 1: sampled log-probs are not used" in line for line in said)
    judged = [read_judgements(tmp_path / name / "rounds/1/judgements.jsonl") for name in ("check", "always")]
    assert judged[0] == judged[1]


def test_never_takes_them_as_they_are(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = small_recipe(files, {"judge.rescore": "never"})
    found, said, _ = run(tmp_path / "run", recipe, 1.0)
    nothing = dict.fromkeys(("mean_drift", "largest_drift", "flips"))
    assert found == {"pairs": 20, "checked": 0, "rescored": 0, "why": ""} | nothing
    assert "unseen" in said[0]
    backend = load(recipe)
    backend.bind(POLICY, tmp_path / "run/rounds/0/adapter")
    j = read_judgements(tmp_path / "run/rounds/1/judgements.jsonl")[0]
    ((_, scores),) = backend.logprob([j.row], POLICY)
    assert j.chosen.policy == pytest.approx(scores[0].logp + len(j.chosen.ids), abs=1e-9)


def test_a_token_that_was_not_sampled_has_no_log_prob(tmp_path: Path, files: dict[str, str]) -> None:
    """sampling.append_eos adds one to answers that were cut."""
    changes = {"sampling.append_eos": True, "sampling.max_tokens": 5}
    found, _, _ = run(tmp_path / "run", small_recipe(files, changes))
    assert (found["why"], found["rescored"]) == ("not every token was sampled", 20)
    one = Completion(ids=(1, 2), text="ab", ended="human")
    assert recorded([Sample(id="s", messages=(), prompt_ids=(1,), completions=(one,))]) is None


@pytest.mark.parametrize("by", ["likelihood", "longest", "self-pair"])
def test_every_judge_reads_the_same_sums(tmp_path: Path, files: dict[str, str], by: str) -> None:
    """Labels of a judge that needs no sums cannot flip; the sums beside them are checked all the same."""
    found, _, _ = run(tmp_path / "check", small_recipe(files, {"judge.by": by}))
    run(tmp_path / "always", small_recipe(files, {"judge.by": by, "judge.rescore": "always"}))
    assert (found["checked"], found["flips"]) == (8, 0 if by == "likelihood" else None)
    assert results(tmp_path / "check") == results(tmp_path / "always")


@pytest.mark.parametrize("place", [("round 1 judge check", 4), ("round 1 judge", 8), ("round 1 judge reference", 12)])
@pytest.mark.parametrize("off", [0.0, 0.03])
def test_a_check_that_was_interrupted_goes_on(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, place: tuple[str, int], off: float
) -> None:
    """To the same bytes, whichever way it decides."""
    monkeypatch.setattr(judge, "CHUNK", 4)
    recipe, stopped = small_recipe(files, {"rounds": 1}), []

    def stop(event: Event) -> None:
        if (event.stage, event.done, bool(event.note)) == (*place, False):
            stopped.append(event)
            raise KeyboardInterrupt

    def once(folder: Path, report: Any = lambda event: None) -> None:
        run_small(folder, recipe, lambda backend: Off(backend, off, []), report)

    once(tmp_path / "whole")
    try:
        once(tmp_path / "run", stop)
    except KeyboardInterrupt:
        once(tmp_path / "run")
    assert bool(stopped) == (place[0] != "round 1 judge" or off > 0), "only a check that fails scores everything"
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    done = [(tmp_path / name / "rounds/1/judge.done.json").read_bytes() for name in ("run", "whole")]
    assert done[0] == done[1]


def made(count: int, answers: int = 2) -> list[Sample]:
    """Samples of two tokens an answer."""
    return [
        Sample(
            id=str(i),
            messages=(),
            prompt_ids=(1,),
            completions=tuple(
                Completion(ids=(i, k), text="", ended="eos", logprobs=(-1.0, -2.0)) for k in range(answers)
            ),
        )
        for i in range(count)
    ]


def recipe_of(**changes: Any) -> Recipe:
    """Settings by path, dots as underscores."""
    return build({"test": {f"judge.{k}" if k != "seed" else k: v for k, v in changes.items()}})[0]


def test_what_is_scored_again_is_drawn_by_a_key() -> None:
    """2 %, 8 at least, never simply the first; another seed or round draws others."""
    assert [len(Check(made(n), recipe_of(), 1).chosen) for n in (3, 8, 100, 401, 1000)] == [3, 8, 8, 9, 20]
    drawn = [Check(made(500), recipe_of(seed=seed), round_).chosen for seed, round_ in ((0, 1), (0, 2), (1, 1))]
    assert len({tuple(some) for some in drawn}) == 3
    assert all(some == sorted(some) and some[-1] > 100 for some in drawn)
    assert drawn[0] == Check(made(500), recipe_of(), 1).chosen


def test_drift_is_the_mean_over_tokens() -> None:
    """The largest is told, and decides nothing."""
    check = Check(made(4), recipe_of(), 1)
    again = [((-1.0, -2.0), (-1.0, -2.1)) for _ in check.chosen]
    assert check.drifts(again)
    assert check.mean == pytest.approx(0.025)
    assert check.largest == pytest.approx(0.1)
    assert not Check(made(4), recipe_of(), 1).drifts([((-1.0, -2.0), (-1.0, -2.07)) for _ in again])
    assert Check(made(4), recipe_of(), 1).drifts([((-1.0, -2.0), (-1.0, math.nan)) for _ in again])


def test_one_flip_in_a_hundred_is_let_pass() -> None:
    """Of fewer none is. A label of more than two answers is their best and their worst."""

    def flips(pairs: int, flipped: int, answers: int = 2) -> tuple[bool, int | None]:
        check = Check(made(pairs, answers), recipe_of(), 1)
        check.chosen = list(range(pairs))
        one, other = tuple(map(float, range(answers))), tuple(map(float, range(answers)))[::-1]
        before = [Opinion(scores=one)] * pairs
        after = [Opinion(scores=other if i < flipped else one) for i in range(pairs)]
        return check.flip(before, after), check.flips

    assert flips(8, 0) == (False, 0)
    assert flips(8, 1) == (True, 1)
    assert flips(100, 1) == (False, 1)
    assert flips(100, 2) == (True, 2)
    assert flips(99, 1, answers=4) == (True, 1)


def test_identical_answers_may_change_places() -> None:
    same = [msgspec.structs.replace(s, completions=(s.completions[0], s.completions[0])) for s in made(8)]
    check = Check(same, recipe_of(), 1)
    assert not check.flip([Opinion(scores=(1.0, 0.0))] * 8, [Opinion(scores=(0.0, 1.0))] * 8)
    assert check.flips == 0


def test_the_sentence_names_the_mend() -> None:
    check = Check(made(8), recipe_of(rescore="always"), 1)
    assert sentence(check.to_dict()).endswith("judge.rescore=always; all 8 pairs were scored again")
