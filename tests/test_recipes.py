"""Every shipped recipe to its end on the toy backend, interrupted or not; on the lesson with real models (long)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spa_lite import prompts
from spa_lite.errors import DataError
from spa_lite.events import Event
from spa_lite.recipe import build, layers_of, settings_of, shipped
from spa_lite.records import Judgement, Sample
from spa_lite.stages.workbench import read_judgements, read_samples
from tests.small import SMALL, lines, results, run_small, small_recipe, tiny, write_data

RECIPES = sorted(shipped("recipe"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pairs and prompts."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Folder and summary of a recipe's run, made once."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            made[name] = folder, run_small(folder, tiny(name, files))[0]
        return made[name]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(ran: Any, name: str) -> None:
    """Something is trained in every round, and what it is made of lies in the run folder."""
    folder, summary = ran(name)
    rounds = [row for row in summary["rows"] if row["stage"].startswith("round")]
    assert rounds
    assert all(row["trained"]["steps"] > 0 for row in rounds)
    assert (folder / "adapter/adapter_config.json").exists()
    assert all((folder / row["folder"] / "judgements.jsonl").exists() for row in rounds)


class Stopped(Exception):
    """An interruption."""


@pytest.mark.parametrize("name", RECIPES)
def test_interrupted_is_uninterrupted(tmp_path: Path, ran: Any, files: dict[str, str], name: str) -> None:
    """Stopped at moments spread over the run and gone on with each time, it ends with the same bytes."""
    folder, _ = ran(name)
    recipe, events = tiny(name, files), 0

    def count(event: Event) -> None:
        nonlocal events
        events += 1

    run_small(tmp_path / "counted", recipe, report=count)
    left = [events * k // 7 for k in range(1, 7)]
    while left:
        seen, limit = 0, left.pop(0)

        def stop(event: Event, limit: int = limit) -> None:
            nonlocal seen
            seen += 1
            if seen == limit:
                raise Stopped

        try:
            run_small(tmp_path / "run", recipe, report=stop)
        except Stopped:
            continue
        break
    run_small(tmp_path / "run", recipe)
    assert results(tmp_path / "run") == results(folder)


def samples(folder: Path, i: int = 1) -> list[Sample]:
    """The candidates of a round."""
    return list(read_samples(folder / f"rounds/{i}/samples.jsonl"))


def judgements(folder: Path, i: int = 1) -> list[Judgement]:
    """The judgements of a round."""
    return read_judgements(folder / f"rounds/{i}/judgements.jsonl")


def test_spin_lets_the_good_answer_win(ran: Any) -> None:
    """Gold against one sample, the same prompts in every round, and the pairs of two rounds trained on."""
    folder, _ = ran("spin")
    assert [[c.kind for c in s.completions] for s in samples(folder)] == [["gold", "sample"]] * len(samples(folder))
    assert all(j.chosen.ended == "human" and j.rejected.ended != "human" for j in judgements(folder, 2))
    assert [s.id for s in samples(folder, 1)] == [s.id for s in samples(folder, 2)]
    assert [s.completions[1].text for s in samples(folder, 1)] != [s.completions[1].text for s in samples(folder, 2)]
    ids = {i for line in lines(folder / "rounds/2/metrics.jsonl") for i in line["ids"]}
    assert {i for i in ids if i.startswith("rounds/1/")}
    assert {i for i in ids if not i.startswith("rounds/1/")}


def test_selm_has_a_third_answer(ran: Any) -> None:
    """Two labelled answers and a greedy one, ranked; the greedy one is the third of every row."""
    folder, _ = ran("selm")
    kinds = [tuple(c.kind for c in s.completions) for s in samples(folder)]
    assert set(kinds) == {("chosen", "rejected", "greedy")}
    by_id = {s.id: s for s in samples(folder)}
    assert all(j.third == by_id[j.id].completions[2].ids for j in judgements(folder))
    first, second = ({s.id for s in samples(folder, i)} for i in (1, 2))
    assert not first & second  # slices


def test_synpo_restarts_and_grows(ran: Any) -> None:
    """Improved answers against pi_init's, a taught writer and a taught improver per round, all pairs so far."""
    folder, _ = ran("synpo")
    assert {tuple(c.kind for c in s.completions) for s in samples(folder)} == {("improve", "init")}
    for place in ("rounds/0/generator-adapter", "rounds/1/improver-adapter", "rounds/2/improver-adapter"):
        assert (folder / place / "adapter_config.json").exists()
    assert not any(c.logprobs for s in samples(folder) for c in s.completions)


def test_self_rewarding_pairs_the_best_with_the_worst(ran: Any) -> None:
    """Four samples, graded; ties are left out and counted."""
    folder, summary = ran("self-rewarding")
    assert {len(s.completions) for s in samples(folder)} == {4}
    ties = sum(j.tie and j.a.ids != j.b.ids for j in judgements(folder))
    row = next(row for row in summary["rows"] if row["stage"] == "round 1")
    assert row["trained"]["left_out"].get("tie", 0) == ties


def test_offline_dpo_samples_nothing(ran: Any) -> None:
    """The labelled pairs themselves, chosen first."""
    folder, _ = ran("dpo")
    assert {tuple(c.kind for c in s.completions) for s in samples(folder)} == {("chosen", "rejected")}
    assert {j.label for j in judgements(folder)} == {"a"}


def test_sao_counts_what_it_wrote(ran: Any) -> None:
    """How many prompts were kept and how often they repeat, with and without personas; none of them is held out."""
    folder, summary = ran("sao")
    told = next(row["prompted"] for row in summary["rows"] if row["stage"] == "round 1")
    assert told["asked"] == 16
    assert told["kept"] == len(lines(folder / "rounds/1/prompts.jsonl")) == told["prompts"]
    assert 0 <= told["repeated_without_personas"] <= 1
    assert told["control"] == len(prompts.texts_of(list(read_samples(folder / "rounds/1/control.jsonl")))) > 0
    kept = told["kept"] + told["unreadable"] + told["similar"] + told["held_out"] + told["filtered"]
    assert kept == told["asked"]


def test_sao_again_and_again(tmp_path: Path, files: dict[str, str]) -> None:
    """Several rounds on request: each writes prompts of its own, none like one of the round before."""
    run_small(tmp_path / "run", tiny("sao", files, {"rounds": 2}))
    first, second = (lines(tmp_path / f"run/rounds/{i}/prompts.jsonl") for i in (1, 2))
    assert second
    assert not {p["id"] for p in first} & {p["id"] for p in second}
    assert not {p["messages"][-1]["content"] for p in first} & {p["messages"][-1]["content"] for p in second}


def test_an_adapter_judges_in_the_policys_place(tmp_path: Path, ran: Any, files: dict[str, str]) -> None:
    """Labels are those of its implicit reward; what a loss compares with is still the policy's."""
    folder, _ = ran("spa")
    found = []
    for k in (0, 2):
        changes = {"judge": "implicit", "judge.adapter": str(folder / f"rounds/{k}/adapter")}
        run_small(tmp_path / str(k), tiny("sao", files, changes))
        found.append(judgements(tmp_path / str(k)))
    assert [j.score_a for j in found[0]] != [j.score_a for j in found[1]]
    assert [j.a.policy for j in found[0]] == [j.a.policy for j in found[1]]
    assert all(j.logratio_a == 0 for j in found[0])  # the policy is pi_init


def test_nothing_usable_written_is_said(tmp_path: Path, files: dict[str, str]) -> None:
    """A round without a single prompt names the counts and the mend."""
    with pytest.raises(DataError, match=r"of 16 that were written none can be used .*--prompt-temp"):
        run_small(tmp_path / "run", tiny("sao", files, {"prompts.max_tokens": 1}))


def test_a_gap_leaves_pairs_out(tmp_path: Path, files: dict[str, str]) -> None:
    """Pairs closer than min_gap are counted and not trained on; too large a gap leaves nothing, and says so."""
    recipe = small_recipe(files, {"rounds": 1, "pairing.min_gap": 0.05})
    _, summary = tmp_path, run_small(tmp_path / "run", recipe)[0]
    near = [j for j in judgements(tmp_path / "run") if j.a.ids != j.b.ids and (j.gap or 0) < 0.05]
    assert 0 < len(near) == summary["rows"][-1]["trained"]["left_out"]["gap"]
    with pytest.raises(DataError, match="lower --min-gap"):
        run_small(tmp_path / "none", small_recipe(files, {"rounds": 1, "pairing.min_gap": 1e6}))


def test_a_draft_too_long_to_be_improved(tmp_path: Path, files: dict[str, str]) -> None:
    """Its prompt is left out and counted; the candidates of the others stay with their prompts."""
    notes: list[str] = []
    changes = {"rounds": 1, "prompts": "bare", "prompts.generator": False, "lengths.max_prompt_length": 285}
    recipe = tiny(
        "synpo", files, changes | {"sampling.max_tokens": 40, "pairing.min_gap": 0.0, "pairing.gap_judge": None}
    )
    run_small(tmp_path / "run", recipe, report=lambda event: notes.append(event.note))
    told = next(note for note in notes if "lack a candidate" in note)
    found, asked = samples(tmp_path / "run"), lines(tmp_path / "run/rounds/1/prompts.jsonl")
    assert told.startswith(f"{len(asked) - len(found)} of {len(asked)} prompts lack a candidate")
    assert 0 < len(found) < len(asked)


def test_demonstrations_of_a_file(tmp_path: Path, files: dict[str, str]) -> None:
    """SPIN on SFT data: no labelled pair is needed."""
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "red cat"}) + "\n" for i in range(12)))
    recipe = small_recipe({"inputs.gold": str(path)}, {"rounds": 2}, "spin")
    run_small(tmp_path / "run", recipe)
    assert {s.completions[0].text for s in samples(tmp_path / "run")} == {"red cat"}


def test_more_prompts_than_there_are(tmp_path: Path, files: dict[str, str]) -> None:
    """Good answers are gone through again under other ids, with other samples beside them."""
    recipe = tiny("spin", files, {"prompts.count": 50, "rounds": 1})
    run_small(tmp_path / "run", recipe)
    found = samples(tmp_path / "run")
    again = [s for s in found if s.id.endswith("#2")]
    assert len(found) == 50
    assert again
    first = {s.id: s for s in found}
    assert any(first[s.id[:-2]].completions[1].text != s.completions[1].text for s in again)


# --- the lesson, with real models -------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {
    "rounds": 1,
    "lesson.prompts": 24,
    "lesson.seed_pairs": 24,
    "lesson.held_out": 8,
    "measure.prompts": 8,
    "measure.pairs": 8,
    "prompts.count": 24,
    "prompts.control": 8,
    "sft.epochs": 1,
    "train.epochs": 1,
    "seed_dpo.epochs": 1,
}


def lesson_run(folder: Path, name: str, backend: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The command, at a size of seconds."""
    pool = build(layers_of(name, "lesson"))[0].prompts.source == "pool"
    settings = {k: v for k, v in SHORT.items() if not (pool and k == "prompts.count")} | (changes or {})
    command = [sys.executable, "-m", "spa_lite.cli", "run", "--recipe", name, "--backend", backend, "--no-report"]
    command += [f"--set={path}={value}" for path, value in settings.items()] + ["--json", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_sibling_on_the_lesson(tmp_path: Path) -> None:
    """One that uses every verb: prompts written, answers judged in words, trained without a reference."""
    pytest.importorskip("torch")
    row = lesson_run(tmp_path / "run", "sao", "torch")["rows"][-1]
    assert row["prompted"]["kept"] > 12
    assert row["gold"]["score"] > 0


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_the_lesson(tmp_path: Path, name: str) -> None:
    """With both frameworks, which write and draw the same texts in the first round."""
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    for backend in ("torch", "mlx"):
        row = lesson_run(tmp_path / backend, name, backend)["rows"][-1]
        assert row["trained"]["steps"] > 0
        assert row["gold"]["score"] > 0
    found = [[[c.ids for c in s.completions] for s in samples(tmp_path / b)] for b in ("torch", "mlx")]
    same = sum(one == other for one, other in zip(*found, strict=True))
    assert same >= 0.9 * len(found[0])  # a helper, or pi_0, is trained first: rounding may flip a draw


@pytest.mark.long
def test_gold_judges_only_what_it_knows(tmp_path: Path) -> None:
    """Written prompts that are no tasks of the lesson are left out where gold judges."""
    pytest.importorskip("torch")
    told = lesson_run(tmp_path / "run", "sao", "torch", {"judge": "gold", "prompts.temp": 1.5})["rows"][-1]["prompted"]
    assert told["unknown"] > 0
    assert told["prompts"] == told["kept"] - told["unknown"] == len(samples(tmp_path / "run"))


def test_recipes_leave_what_they_do_not_name() -> None:
    """A recipe names settings of the method, and nothing about memory, place or measuring."""
    default = settings_of(build({"small": {}})[0])
    for name in RECIPES:
        changed = {p for p, v in settings_of(build(layers_of(name, "paper"))[0]).items() if v != default[p]}
        assert not {p for p in changed if p.startswith(("batching.", "measure.", "stop.", "lora.", "model."))}, name
    assert set(SMALL) <= set(default)
