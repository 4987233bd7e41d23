"""The method as a whole, on the toy backend: who is what in each round, resuming, and that every setting matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite import backends, objective, prepare
from spa_lite.backend import INIT, POLICY, PREVIOUS
from spa_lite.errors import DataError, ModelError, RecipeError, SpaError, StaleRun, TrainingDiverged
from spa_lite.events import Event
from spa_lite.judge import decide
from spa_lite.judges import open_judge
from spa_lite.recipe import SETTINGS, Recipe
from spa_lite.records import Completion, Judgement, Sample
from spa_lite.stages.workbench import read_judgements, read_samples
from spa_lite.summary import several_makers
from tests.small import lines, load, results, run_small, small_recipe, start, tiny, write_data


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Pairs and prompts of the small world."""
    return write_data(tmp_path)


class Spy:
    """A backend that writes down who was asked to do what, and may be told to fail."""

    def __init__(self, inner: Any, log: list[tuple[Any, ...]], fail_at: str = "") -> None:
        self._inner, self.log, self.fail_at = inner, log, fail_at

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in {"bind", "sample", "logprob", "dpo_step", "snapshot", "start_training", "save"}:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self.log.append((name, *args[:2], *kwargs.values()))
            if self.fail_at and self.fail_at == f"{name} {sum(entry[0] == name for entry in self.log)}":
                raise KeyboardInterrupt
            return value(*args, **kwargs)

        return call


# --- roles ------------------------------------------------------------------------------------------------------------


def test_the_judge_compares_with_init_in_every_round(tmp_path: Path, files: dict[str, str]) -> None:
    """(i) The reference sums of round 2 are pi_init's, not those of pi_0 or pi_1."""
    recipe = small_recipe(files)
    run_small(tmp_path / "run", recipe)
    backend = load(recipe)
    for round_ in (1, 2):
        backend.bind(INIT, None)
        backend.bind(POLICY, tmp_path / f"run/rounds/{round_ - 1}/adapter")
        for j in read_judgements(tmp_path / f"run/rounds/{round_}/judgements.jsonl"):
            for role, found in ((INIT, [j.a.reference, j.b.reference]), (POLICY, [j.a.policy, j.b.policy])):
                row = j.row if j.label == "a" else type(j.row)(prompt=j.prompt_ids, responses=(j.a.ids, j.b.ids))
                ((_, scores),) = backend.logprob([row], role)
                assert [s.logp for s in scores] == pytest.approx(found, abs=1e-9)


def test_every_training_stage_begins_at_ln_2(tmp_path: Path, files: dict[str, str]) -> None:
    """(j) The DPO reference of round i is pi_{i-1}: the first loss is ln 2 in the seed stage and in every round."""
    run_small(tmp_path / "run", small_recipe(files))
    for i in range(3):
        first = lines(tmp_path / f"run/rounds/{i}/metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-12)
        assert first["logratio_chosen"] == pytest.approx(0, abs=1e-12)


def test_a_round_samples_and_starts_from_the_round_before(tmp_path: Path, files: dict[str, str]) -> None:
    """pi_{i-1} answers, is judged, is the start and the frozen reference; pi_init is bound bare."""
    log: list[tuple[Any, ...]] = []
    run_small(tmp_path / "run", small_recipe(files), lambda backend: Spy(backend, log))
    bound = [str(entry[2]).rsplit("rounds/", 1)[-1] for entry in log if entry[:2] == ("bind", POLICY) and entry[2]]
    assert {"0/adapter", "1/adapter", "2/adapter"} <= set(bound)
    assert all(entry[2] is None for entry in log if entry[:2] == ("bind", INIT))
    assert sum(entry[0] == "snapshot" for entry in log) == 3, "seed stage and two rounds"


def test_lagged_reference(tmp_path: Path, files: dict[str, str]) -> None:
    """judge.reference=lagged is pi_init in round 1 and pi_0 in round 2."""
    run_small(tmp_path / "run", small_recipe(files, {"judge.reference": "lagged"}))
    backend = load(small_recipe(files))
    backend.bind(POLICY, tmp_path / "run/rounds/0/adapter")
    backend.bind(INIT, None)
    for round_, role in ((1, INIT), (2, POLICY)):
        j = read_judgements(tmp_path / f"run/rounds/{round_}/judgements.jsonl")[0]
        ((_, scores),) = backend.logprob([j.row], role)
        assert scores[0].logp == pytest.approx(j.chosen.reference, abs=1e-9)


def test_without_reference_the_likelihood_decides(tmp_path: Path, files: dict[str, str]) -> None:
    """judge.reference=none sums nothing for the reference."""
    run_small(tmp_path / "run", small_recipe(files, {"judge.reference": "none"}))
    judged = read_judgements(tmp_path / "run/rounds/1/judgements.jsonl")
    assert all(j.a.reference == j.b.reference == 0 for j in judged)
    assert all((j.a.policy > j.b.policy) == (j.label == "a") for j in judged if not j.tie)


def test_prompts_are_disjoint_over_the_rounds(tmp_path: Path, files: dict[str, str]) -> None:
    """No prompt is used twice, and every prompt is used."""
    run_small(tmp_path / "run", small_recipe(files))
    used = [[s.id for s in read_samples(tmp_path / f"run/rounds/{i}/samples.jsonl")] for i in (1, 2)]
    assert not set(used[0]) & set(used[1])
    assert len(used[0]) + len(used[1]) == 40


# --- no seed pairs ----------------------------------------------------------------------------------------------------


def test_no_seed_pairs_with_an_adapter(tmp_path: Path, files: dict[str, str]) -> None:
    """pi_0 is the given adapter; there is no seed stage."""
    run_small(tmp_path / "first", small_recipe(files, {"rounds": 0}))
    adapter = str(tmp_path / "first/adapter")
    only_prompts = {"inputs.prompts": files["inputs.prompts"]}
    recipe = small_recipe(only_prompts, {"inputs.no_seed_pairs": True, "inputs.adapter_path": adapter})
    summary, _ = run_small(tmp_path / "second", recipe)
    assert [row["stage"] for row in summary["rows"]] == ["init", "pi_0", "round 1", "round 2"]
    assert not (tmp_path / "second/rounds/0/metrics.jsonl").exists()


def test_no_seed_pairs_with_another_model_as_init(tmp_path: Path, files: dict[str, str]) -> None:
    """The paper's no-seed study: pi_init is a whole other model, loaded alone for its sums."""
    only_prompts = {"inputs.prompts": files["inputs.prompts"]}
    recipe = small_recipe(only_prompts, {"inputs.no_seed_pairs": True, "inputs.init_model": "toy:7"})
    run_small(tmp_path / "run", recipe)
    other = small_recipe(only_prompts, {"inputs.model": "toy:7"})
    backend = load(other)
    j = read_judgements(tmp_path / "run/rounds/1/judgements.jsonl")[0]
    ((_, scores),) = backend.logprob([j.row], INIT)
    assert scores[0].logp == pytest.approx(j.chosen.reference, abs=1e-9)
    assert j.a.policy != pytest.approx(j.a.reference)


def test_a_policy_that_equals_its_reference_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    """Such a judge would give every pair a margin of 0."""
    only_prompts = {"inputs.prompts": files["inputs.prompts"]}
    with pytest.raises(RecipeError, match="--adapter-path"):
        start(small_recipe(only_prompts, {"inputs.no_seed_pairs": True}))
    run = small_recipe(
        only_prompts, {"inputs.no_seed_pairs": True, "inputs.adapter_path": "x", "inputs.init_adapter": "x"}
    )
    with pytest.raises(SpaError):
        run_small(tmp_path / "run", run)


# --- stages, resuming -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_computed_again(tmp_path: Path, files: dict[str, str]) -> None:
    """The second call reads every stage and returns the same summary."""
    recipe = small_recipe(files)
    first, _ = run_small(tmp_path / "run", recipe)
    before = results(tmp_path / "run")
    second, run = run_small(tmp_path / "run", recipe)
    assert run.computed == []
    assert second == first
    assert results(tmp_path / "run") == before


CRASHES = ["dpo_step 1", "dpo_step 5", "sample 1", "sample 2", "logprob 4", "logprob 9", "save 1", "save 3"]


@pytest.mark.parametrize("crash", CRASHES)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, files: dict[str, str], crash: str) -> None:
    """Stopped inside any stage, the same call goes on after the last finished one and ends with the same bytes."""
    recipe = small_recipe(files)
    run_small(tmp_path / "whole", recipe)
    log: list[tuple[Any, ...]] = []
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "broken", recipe, lambda backend: Spy(backend, log, crash))
    _, run = run_small(tmp_path / "broken", recipe)
    assert run.computed
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def test_a_changed_setting_that_touches_a_finished_stage_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    """The message names the field and the stage; nothing is lost."""
    run_small(tmp_path / "run", small_recipe(files))
    before = results(tmp_path / "run")
    with pytest.raises(StaleRun, match=r"sampling\.n was 2 when stage 'rounds/1 sample'.* now 3"):
        run_small(tmp_path / "run", small_recipe(files, {"sampling.n": 3}))
    assert results(tmp_path / "run") == before


def test_a_setting_of_speed_touches_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    """Batch shapes may change in the middle of a run; results stay."""
    run_small(tmp_path / "run", small_recipe(files))
    changes = {"batching.micro_tokens": 1, "batching.sample": 3, "batching.score_tokens": 2}
    _, run = run_small(tmp_path / "run", small_recipe(files, changes))
    assert run.computed == []
    run_small(tmp_path / "other", small_recipe(files, changes))
    for i in (1, 2):
        ours, theirs = (read_samples(tmp_path / f"{name}/rounds/{i}/samples.jsonl") for name in ("run", "other"))
        assert [[c.ids for c in s.completions] for s in ours] == [[c.ids for c in s.completions] for s in theirs]


def test_more_rounds_reuse_what_round_sizes_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    """A third round on top of two finished ones computes only the third."""
    run_small(tmp_path / "run", small_recipe(files, {"round_sizes": [10, 10]}))
    _, run = run_small(tmp_path / "run", small_recipe(files, {"rounds": 3, "round_sizes": [10, 10, 10]}))
    assert {title.split()[0] for title in run.computed} == {"rounds/3"}


# --- every setting matters --------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "seed": 5,
    "rounds": 1,
    "round_sizes": [5, 6],
    "inputs.skip_bad": None,
    "model.system": "Be brief.",
    "lengths.max_prompt_length": 12,
    "lengths.max_length": 30,
    "lengths.long_prompts": "cut",
    "seed_dpo.epochs": 1,
    "seed_dpo.batch_size": 5,
    "seed_dpo.learning_rate": 0.01,
    "sampling.n": 3,
    "sampling.temp": 1.3,
    "sampling.top_p": 0.5,
    "sampling.max_tokens": 5,
    "sampling.append_eos": True,
    "judge.by": "random",
    "judge.reference": "none",
    "judge.tie": "a",
    "judge.identical": "keep",
    "judge.length_penalty": 3.0,
    "measure.every": "end",
    "stop.action": "stop",
    "loss.beta": 0.5,
    "refine.alpha": 0.4,
    "refine.K": 0.6,
    "refine.lambda": 3.0,
    "refine.lambda_decay": 20.0,
    "refine.warmup": 0.9,
    "refine.window": 4,
    "refine.rule": "official",
    "refine.before_full": "zero",
    "train.epochs": 2,
    "train.batch_size": 7,
    "train.learning_rate": 0.01,
    "train.schedule": "constant",
    "train.warmup": 0.9,
    "train.weight_decay": 0.5,
    "train.max_grad_norm": 0.001,
    "train.max_steps": 1,
    "inputs.limit_prompts": 7,
    "inputs.no_seed_pairs": None,
    "seed_dpo.by": "sft",
    "sft.epochs": 1,
    "sft.batch_size": 5,
    "sft.learning_rate": 0.01,
    "prompts.source": "bare",
    "prompts.count": 10,
    "prompts.by": "policy",
    "prompts.generator": False,
    "prompts.temp": 1.2,
    "prompts.top_p": 0.9,
    "prompts.max_tokens": 9,
    "prompts.control": 4,
    "candidates.kinds": ["sample", "greedy"],
    "judge.swap": False,
    "pairing.drop_ties": False,
    "pairing.min_gap": 0.05,
    "pairing.gap_judge": "likelihood",
    "loss.kind": "simpo",
    "loss.nll": 0.5,
    "loss.optimism": 0.5,
    "loss.round_betas": [0.5, 0.01],
    "noise.by": "smooth",
    "noise.epsilon": 0.3,
    "train.round_rates": [0.01, 0.02],
    "train.reference": "init",
    "carry.start": "init",
    "carry.data": "all",
}
"""A value that must change what a run computes; None: tested by name elsewhere in this file or in test_cli."""

SHOWN_ELSEWHERE = {
    "name": "test_recipe",
    "scale": "test_recipe",
    "report_to": "test_trackers",
    "inputs.model": "here: no-seed with another model",
    "inputs.backend": "test_backends",
    "inputs.device": "test_torch",
    "inputs.seed_pairs": "here",
    "inputs.prompts": "here",
    "inputs.held_out": "test_cli",
    "inputs.adapter_path": "here",
    "inputs.init_adapter": "here",
    "inputs.init_model": "here",
    "sampling.by": "test_sampler",
    "model.dtype": "test_torch",
    "model.load_in_4bit": "test_torch",
    "model.trust_remote_code": "test_torch",
    "model.template": "test_chat",
    "lora.rank": "test_torch",
    "lora.alpha": "test_torch",
    "lora.targets": "test_torch",
    "train.save_every": "test_resume; must change no result",
    "train.save_minutes": "test_resume; must change no result",
    "batching.micro_tokens": "test_backends; must change no result",
    "batching.sample": "test_backends; must change no result",
    "batching.score_tokens": "test_backends; must change no result",
    "batching.checkpointed_layers": "test_torch; must change no result",
    "measure.prompts": "test_lesson_run",
    "measure.pairs": "here",
    "measure.bootstrap": "test_evaluate",
    "measure.temp": "test_lesson_run",
    "judge.model": "test_run_judges",
    "judge.rescore": "test_rescore",
    "train.cache_reference": "test_states; must change no result",
    "judge.url": "test_judges",
    "judge.prompt": "test_run_judges",
    "stop.displacement": "test_stop",
    "stop.length_growth": "test_stop",
    "stop.agreement": "test_stop",
    "stop.accuracy_drop": "test_stop",
    "inputs.gold": "test_recipes",
    "prompts.personas": "test_prompts",
    "prompts.keywords": "test_prompts",
    "prompts.template": "test_prompts",
    "prompts.examples": "test_prompts",
    "prompts.similarity": "test_prompts",
    "judge.tries": "test_judges",
    "judge.temp": "test_judges",
    "judge.adapter": "test_recipes",
    "pairing.by": "test_guards: it asks for two answers",
    "loss.simpo_beta": "test_losses",
    "loss.gamma": "test_losses",
    "loss.norm_beta": "test_losses",
    "loss.tau": "test_losses",
    "loss.sppo_beta": "test_losses",
    "loss.orpo_weight": "test_losses",
    "loss.dpop_weight": "test_losses",
    "noise.weight": "test_noise",
    "lesson.seed_pairs": "test_lesson_run",
    "lesson.prompts": "test_lesson_run",
    "lesson.held_out": "test_lesson_run",
    "lesson.split": "test_lesson_run",
}


def test_every_setting_is_accounted_for() -> None:
    """A new setting must be shown to matter."""
    assert set(CHANGES) | set(SHOWN_ELSEWHERE) == set(SETTINGS)


def outcome(folder: Path, files: dict[str, str], changes: dict[str, Any], name: str | None = None) -> Any:
    """All that a run computed, or the sentence it was refused with."""
    try:
        run_small(folder, tiny(name, files, changes) if name else small_recipe(files, changes))
    except SpaError as error:
        return str(error)
    return results(folder) | {"measured": (folder / "rounds/1/measure.done.json").exists()}


BESIDE: dict[str, dict[str, Any]] = {
    # settings that only matter together with another one
    "lengths.long_prompts": {"lengths.max_prompt_length": 12},
    "judge.tie": {"sampling.max_tokens": 1, "judge.identical": "keep"},
    "judge.identical": {"sampling.max_tokens": 1},
    "refine.lambda_decay": {"refine.lambda": 1.0},
    "refine.before_full": {"refine.warmup": 0.0},
    "refine.rule": {"refine.before_full": "zero"},
    "stop.action": {"stop.agreement": 0.1},
    "pairing.gap_judge": {"judge.by": "random", "pairing.min_gap": 0.3},
    "loss.kind": {"noise.by": "none"},
    "loss.nll": {"noise.by": "none"},
    "noise.epsilon": {"noise.by": "smooth"},
}

OF = {
    "sft.epochs": "self-rewarding",
    "sft.batch_size": "self-rewarding",
    "sft.learning_rate": "self-rewarding",
    "prompts.source": "sao",
    "prompts.count": "sao",
    "prompts.by": "self-rewarding",
    "prompts.generator": "synpo",
    "prompts.temp": "sao",
    "prompts.top_p": "sao",
    "prompts.max_tokens": "sao",
    "prompts.control": "sao",
    "judge.swap": "sao",
    "pairing.drop_ties": "self-rewarding",
    "loss.optimism": "selm",
}
"""The recipe that a setting matters to, where that is not `spa`."""


@pytest.mark.parametrize("path", [p for p, value in CHANGES.items() if value is not None])
def test_every_setting_changes_something(tmp_path: Path, files: dict[str, str], path: str) -> None:
    """No option is read by nobody."""
    beside = BESIDE.get(path, {})
    plain = outcome(tmp_path / "plain", files, beside, OF.get(path))
    changed = outcome(tmp_path / "changed", files, beside | {path: CHANGES[path]}, OF.get(path))
    assert plain != changed
    assert isinstance(plain, dict), plain
    assert isinstance(changed, dict) or path == "lengths.max_length", changed


# --- failures ---------------------------------------------------------------------------------------------------------


def test_three_steps_that_are_not_finite_stop_the_run(tmp_path: Path, files: dict[str, str]) -> None:
    """Each is skipped and counted; the third in a row ends the run with finished stages kept."""

    class Broken(Spy):
        def __getattr__(self, name: str) -> Any:
            if name != "dpo_step":
                return super().__getattr__(name)

            def step(rows: Sequence[Any], loss: Any, rate: float, known: Any) -> Any:
                return self._inner.dpo_step(rows, Poisoned(), rate, known)

            return step

    class Poisoned(objective.Dpo):
        def __call__(self, batch: Any) -> Any:
            found = super().__call__(batch)
            return type(found)(found.loss * np.nan, found.coefficients * np.nan, found.metrics)

    notes: list[Event] = []
    with pytest.raises(TrainingDiverged, match=r"seed: .* 3 steps in a row"):
        run_small(tmp_path / "run", small_recipe(files), lambda b: Broken(b, []), notes.append)
    assert any("skipped a non-finite step (2 so far)" in event.note for event in notes)
    run_small(tmp_path / "run", small_recipe(files))


def test_a_late_window_is_said_once(tmp_path: Path, files: dict[str, str]) -> None:
    """Before the window is full nothing is refined, and the user is told when that will be."""
    notes: list[Event] = []
    run_small(tmp_path / "run", small_recipe(files, {"refine.window": 50}), report=notes.append)
    said = [event.note for event in notes if "needs 50 margins" in event.note]
    assert len(said) == 1
    assert "never" in said[0]


def test_a_round_of_identical_answers_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    """Nothing can be learned from two answers that are the same."""
    with pytest.raises((DataError, RecipeError), match="--temp"):
        run_small(tmp_path / "run", small_recipe(files, {"sampling.temp": 1e-6}))


def test_missing_adapter_folder(tmp_path: Path, files: dict[str, str]) -> None:
    """The folder is named."""
    with pytest.raises(ModelError, match="nowhere"):
        run_small(tmp_path / "run", small_recipe(files, {"inputs.init_adapter": str(tmp_path / "nowhere")}))


# --- judging one sample by hand ---------------------------------------------------------------------------------------


def sample_of(*texts: str) -> Sample:
    """A sample whose answers are these texts, one id per character."""
    answers = tuple(Completion(ids=tuple(map(ord, t)), text=t, ended="eos") for t in texts)
    return Sample(id="s", messages=(), prompt_ids=(1,), completions=answers)


def judged(sample: Sample, policy: list[float], reference: list[float], recipe: Recipe) -> Judgement:
    """What the recipe's judge makes of sums that are known."""
    models = prepare.models_of(recipe, backends.load)
    judge = open_judge(recipe, models, sums=(lambda rows: [tuple(policy)], lambda rows: [tuple(reference)]))
    return decide(sample, policy, reference, judge([sample])[0], recipe)


BY_HAND: list[tuple[dict[str, Any], list[float], str]] = [
    ({}, [-3.0, -5.0], "a"),
    ({}, [-5.0, -3.0], "b"),
    ({}, [-4.0, -4.0], "b"),
    ({"judge.tie": "a"}, [-4.0, -4.0], "a"),
    ({"judge.by": "longest"}, [-3.0, -5.0], "b"),
]
"""(settings, policy sums, label), with reference sums of -4 and -4."""


@pytest.mark.parametrize(("settings", "policy", "label"), BY_HAND)
def test_decisions_by_hand(files: dict[str, str], settings: dict[str, Any], policy: list[float], label: str) -> None:
    """Eq. 7 and 8 on numbers a reader can check."""
    j = judged(sample_of("short", "longer one"), policy, [-4.0, -4.0], small_recipe(files, settings))
    assert j.label == label
    assert j.margin == pytest.approx(0.1 * (policy[0] - policy[1]))
    assert j.p == pytest.approx(1 / (1 + math.exp(-j.margin)))
    assert j.tie == (policy[0] == policy[1] and settings.get("judge.by") != "longest")
    assert (j.tokens_a, j.tokens_b) == (5, 10)


def test_best_and_worst_of_many(files: dict[str, str]) -> None:
    """With n > 2 the best and the worst make the pair, in sample order."""
    j = judged(sample_of("a", "b", "c", "d"), [-3.0, -1.0, -9.0, -2.0], [0.0] * 4, small_recipe(files))
    assert (j.a.text, j.b.text, j.label) == ("b", "c", "a")


def test_roles_have_names() -> None:
    """The three roles of one set of weights."""
    assert (INIT, PREVIOUS, POLICY) == ("init", "previous", "policy")


def test_a_run_from_two_places_says_so() -> None:
    here, there = {"backend": "mlx", "device": "cpu"}, {"backend": "torch", "device": "cuda:0"}
    assert several_makers({"seed": here, "round 1 sample": here, "old": {}}) == []
    [said] = several_makers({"seed": there, "round 1 sample": here, "round 1 judge": here})
    assert "1 on torch, cuda:0 (seed to seed); 2 on mlx, cpu (round 1 sample to round 1 judge)" in said
