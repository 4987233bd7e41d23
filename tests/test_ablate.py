"""Studies: which cells there are, what they share, what they cost, and that sharing is the same as computing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_lite import ablate, backends, prepare
from spa_lite.ablate import (
    RECIPE,
    Cell,
    Job,
    Shelf,
    Study,
    cells_of,
    changed,
    jobs_of,
    parse_vary,
    schedule,
    shipped,
    slug,
)
from spa_lite.cli import commands  # noqa: F401 - registers the commands
from spa_lite.cli.main import app
from spa_lite.errors import RecipeError, RunError
from spa_lite.events import Event
from spa_lite.library import Library
from spa_lite.lock import locked
from spa_lite.recipe import SETTINGS, Recipe, build, layers_of
from spa_lite.recipe import shipped as recipes_shipped
from spa_lite.spa import align
from spa_lite.store import Run
from tests.crash import contents
from tests.small import run_small, small_recipe, write_data
from tests.test_spa import BESIDE, CHANGES

FEW: dict[str, Any] = {"rounds": 1, "refine.window": 4}


@pytest.fixture
def base(tmp_path: Path) -> Recipe:
    """A small recipe."""
    return small_recipe(write_data(tmp_path, pairs=20, prompts=12), FEW)


def done(jobs: Sequence[Job], root: Path) -> tuple[list[Any], list[Run], Library]:
    """Run jobs on the toy; their outcomes, their runs, the library they used."""
    library = Library([root])
    found = list(ablate.run_jobs(jobs, Shelf(backends.load), library))
    return [outcome for outcome, _ in found], [run for _, run in found if run], library


# --- what is asked ----------------------------------------------------------------------------------------------------

SPELLINGS = [
    ("judge=implicit,random", "judge.by", ["implicit", "random"]),
    ("refine.K=0,0.1", "refine.K", ["0", "0.1"]),
    ("K=0.1", "refine.K", ["0.1"]),
    ("--learning-rate=1e-4, 1e-3", "train.learning_rate", ["1e-4", "1e-3"]),
    ("lambda=0,1", "refine.lambda", ["0", "1"]),
    ("round_sizes=4;4,8", "round_sizes", [[4], [4, 8]]),
    ("lora.targets=q_proj,v_proj", "lora.targets", [["q_proj", "v_proj"]]),
    ("limit_prompts=none,5", "inputs.limit_prompts", [None, "5"]),
    ("recipe=spa,sao", "recipe", ["spa", "sao"]),
    ("loss=dpo,simpo", "loss.kind", ["dpo", "simpo"]),
    ("candidates=sample;gold,sample", "candidates.kinds", [["sample"], ["gold", "sample"]]),
]


@pytest.mark.parametrize(("text", "path", "values"), SPELLINGS)
def test_vary(text: str, path: str, values: list[Any]) -> None:
    """A path, a flag, or the last part of a path; lists are separated by semicolons."""
    assert parse_vary(text) == (path, values)


WRONG = [
    ("judge", "form setting=value"),
    ("judge=", "form setting=value"),
    ("seed=1,2", "--seeds"),
    ("refin.K=1", "refine.K"),
    ("recipe=spa,spinn", "there is no recipe 'spinn'; did you mean spin"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG)
def test_vary_refuses(text: str, sentence: str) -> None:
    """Each in one sentence with the way out."""
    with pytest.raises(RecipeError, match=sentence):
        parse_vary(text)


def test_grid_and_one_at_a_time(base: Recipe) -> None:
    """The base cell is always there, once; equal values under two spellings are one cell."""
    varied = {"judge.by": ["implicit", "random"], "refine.K": ["0.3", "0.30", "0.1"]}
    assert [cell.name for cell in cells_of(varied, base, "grid")] == [
        "base",
        "refine.K=0.1",
        "judge.by=random",
        "judge.by=random, refine.K=0.1",
    ]
    assert [cell.name for cell in cells_of(varied, base, "one-at-a-time")] == [
        "base",
        "judge.by=random",
        "refine.K=0.1",
    ]
    assert [cell.name for cell in cells_of({"refine.K": ["0.2"]}, base, "grid")] == ["base", "refine.K=0.2"]


def test_a_value_of_the_wrong_type_names_the_setting(base: Recipe) -> None:
    """Before anything is computed."""
    with pytest.raises(RecipeError, match=r"refine\.K = 'much'"):
        cells_of({"refine.K": ["much"]}, base, "grid")


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "", "a" * 300, "[red]", "K=0.1, alpha=1"])
def test_a_cell_never_leaves_its_folder(name: str) -> None:
    """Its name is text from the user."""
    found = slug(name)
    assert Path(found).name == found
    assert found.strip(".") != ""
    assert len(found) < 100


def test_cells_of_one_name_are_one_folder_each() -> None:
    """Names that differ only in what a folder cannot hold get folders that differ."""
    assert slug("a/b") != slug("a?b")


def resolved(study: Study) -> list[Recipe]:
    """The recipe of every cell of a study, on the lesson."""
    own = {path: value for path, value in study.settings.items() if path != RECIPE}
    base = build({**layers_of(study.settings.get(RECIPE, "spa"), "lesson"), "study": own})[0]
    return [job.recipe for job in jobs_of(study.cells, base, 1, Path("study"), own)]


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_studies_are_valid(name: str) -> None:
    """Every cell is a recipe that can start, the first is the study as given, and all differ."""
    study = ablate.named(name)
    recipes = resolved(study)
    for recipe in recipes:
        prepare.check_start(recipe)
    assert study.question.endswith((".", "?"))
    assert not study.cells[0].changes
    assert len({json.dumps(recipe.to_dict(), sort_keys=True) for recipe in recipes}) == len(recipes) > 1


def test_every_recipe_is_compared_with_the_same_number_of_answers() -> None:
    """Of its own, over all rounds, with the same labelled pairs; offline DPO writes none."""
    study = ablate.named("recipes")
    found = {cell.name: recipe for cell, recipe in zip(study.cells, resolved(study), strict=True)}
    assert {recipe.name for recipe in found.values()} == set(recipes_shipped("recipe"))
    for name, recipe in found.items():
        each = sum({"sample": recipe.sampling.n, "gold": 0, "pair": 0}.get(kind, 1) for kind in recipe.candidates.kinds)
        prompts = (
            recipe.lesson.prompts if recipe.prompts.source == "pool" else recipe.rounds * (recipe.prompts.count or 0)
        )
        assert prompts * each == (0 if name == "dpo (offline)" else 2400), name
        assert recipe.lesson.seed_pairs == 100


def test_a_cell_with_a_recipe_of_its_own(base: Recipe) -> None:
    """It starts from that recipe on the study's scale; what was asked for is kept, what the base's own says is not."""
    asked = {"rounds": 2, "inputs.model": "toy"}
    found = changed(base, {RECIPE: "sao", "sampling.temp": 0.9}, asked)
    assert (found.name, found.loss.kind, found.scale) == ("sao", "simpo", base.scale)
    assert (found.rounds, found.inputs.model, found.sampling.temp) == (2, "toy", 0.9)
    assert found.refine.window != base.refine.window, "nobody asked for the base's"
    varied = {RECIPE: ["spa", "sao"], "loss.kind": ["dpo", "simpo"]}
    plain = build(layers_of("spa", "lesson"))[0]
    assert [cell.name for cell in cells_of(varied, plain, "grid")] == [
        "base",
        "loss.kind=simpo",
        "recipe=sao, loss.kind=dpo",
        "recipe=sao",
    ]


def test_a_study_of_ones_own(tmp_path: Path) -> None:
    """YAML; what is wrong with it is named."""
    path = tmp_path / "mine.yaml"
    path.write_text("question: Why?\nsettings: {rounds: 1}\ncells: {plain: {}, hot: {sampling.temp: 1.2}}\n")
    assert ablate.named(str(path)).cells == (Cell("plain", {}), Cell("hot", {"sampling.temp": 1.2}))
    for text, sentence in [
        ("cells: {a: {samplin.temp: 1}}", "did you mean sampling.temp"),
        ("cells: {}", "no cells"),
        ("cels: {a: {}}", "must hold a study"),
        ("cells: {a: {}}\nseeds: 3", "'seeds' is no part"),
        ("cells: {a: 3}", "setting: value"),
        ("cells: {a: {recipe: spinn}}", "there is no recipe 'spinn'; did you mean spin"),
        ("settings: {recipe: 3}\ncells: {a: {}}", "there is no recipe '3'"),
        ("cells: [", "not valid YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(RecipeError, match=sentence):
            ablate.named(str(path))
    with pytest.raises(RecipeError, match="did you mean judge"):
        ablate.named("jugde")


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_cells_share_what_is_common(base: Recipe, tmp_path: Path) -> None:
    """Each distinct stage is computed once, as the plan said; and a cell is what the same run alone would be."""
    cells = cells_of({"judge.by": ["implicit", "random"], "refine.K": ["0.3", "0.1"]}, base, "grid")
    jobs = jobs_of(cells, base, 2, tmp_path / "runs/study")
    planned = schedule(jobs, Shelf(backends.load), Library([tmp_path / "runs"]))
    outcomes, runs, library = done(jobs, tmp_path / "runs")
    assert all(outcome.rows for outcome in outcomes)
    cost = ablate.cost(runs, library)
    # Per seed: init, seed, measure, sample, two judges, four trainings and their measures.
    assert (cost.stages, cost.distinct, cost.computed) == (8 * 7, 2 * 14, 2 * 14)
    assert (planned.count("compute"), planned.count("shared")) == (28, 28)
    assert 0 < cost.cpu_distinct == cost.cpu_computed < cost.cpu_separately
    for job in jobs:
        run_small(tmp_path / "alone" / job.folder.name, job.recipe)
        assert contents(job.folder) == contents(tmp_path / "alone" / job.folder.name)


@pytest.mark.parametrize("path", [p for p, value in CHANGES.items() if value is not None])
def test_sharing_is_computing(tmp_path: Path, path: str) -> None:
    """Whatever setting changes, a run beside another one gives what it gives alone: no key forgets anything."""
    files = write_data(tmp_path, pairs=20, prompts=12)
    beside = {"lengths.max_prompt_length": 25, "refine.window": 4} | BESIDE.get(path, {})
    plain, changed = (small_recipe(files, beside | more) for more in ({}, {path: CHANGES[path]}))
    for folder, recipe in (("runs/plain", plain), ("runs/changed", changed), ("alone/changed", changed)):
        library = Library([tmp_path / "runs"]) if folder.startswith("runs") else None
        try:
            shelf = Shelf(backends.load)
            run = Run(tmp_path / folder, library)
            align(shelf.models(recipe), recipe, shelf.data(recipe), run)
        except Exception as error:
            (tmp_path / folder / "error").write_text(str(error))
    assert contents(tmp_path / "runs/changed") == contents(tmp_path / "alone/changed")


ALIKE = [
    ({"refine.alpha": 0}, {"refine.alpha": 0, "refine.K": 0.7, "refine.lambda": 3, "refine.window": 9}),
    ({"refine.lambda": 0}, {"refine.lambda": 0, "refine.lambda_decay": 0.1}),
    ({"rounds": 1}, {"rounds": 1, "refine.lambda_decay": 0.1}),
    ({"batching.micro_tokens": 200}, {"batching.micro_tokens": 300}),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_settings_that_change_nothing_share_everything(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Without alpha the other settings of the refinement are not read; nor is a decay in the first round."""
    files = write_data(tmp_path, pairs=20, prompts=12)
    cells = [Cell("one", one), Cell("other", other)]
    _, runs, _ = done(jobs_of(cells, small_recipe(files, FEW), 1, tmp_path / "runs/study"), tmp_path / "runs")
    assert not runs[1].computed


def test_a_cell_that_fails_stops_nothing(base: Recipe, tmp_path: Path) -> None:
    """Its sentence is in its place; one that cannot even be planned, too."""
    cells = [
        Cell("base", {}),
        Cell("gold", {"judge.by": "gold"}),
        Cell("same", {"sampling.temp": 1e-6}),
        Cell("K", {"refine.K": 0.1}),
    ]
    jobs = jobs_of(cells, base, 1, tmp_path / "runs/study")
    planned = schedule(jobs, Shelf(backends.load), Library([tmp_path / "runs"]))
    assert [isinstance(found, str) for _, found in planned.jobs] == [False, True, False, False]
    outcomes, _, _ = done(jobs, tmp_path / "runs")
    assert [bool(outcome.rows) for outcome in outcomes] == [True, False, False, True]
    assert "gold rule" in outcomes[1].error
    assert "--temp" in outcomes[2].error


def test_another_cell_costs_only_what_is_new(base: Recipe, tmp_path: Path) -> None:
    """Later, and after the study was stopped in the middle."""
    first, more = ([Cell("base", {}), Cell("K", {"refine.K": 0.1})], [Cell("hot", {"sampling.temp": 1.1})])
    done(jobs_of(first, base, 1, tmp_path / "runs/study"), tmp_path / "runs")
    jobs = jobs_of(first + more, base, 1, tmp_path / "runs/study")

    def stop(job: Job) -> Any:
        def report(event: Event) -> None:
            if job.cell.name == "hot" and event.stage.startswith("round 1 judge") and event.unit == "pairs":
                raise KeyboardInterrupt

        return report

    with pytest.raises(KeyboardInterrupt):
        list(ablate.run_jobs(jobs, Shelf(backends.load), Library([tmp_path / "runs"]), stop))
    planned = schedule(jobs, Shelf(backends.load), Library([tmp_path / "runs"]))
    assert [p.stage.title for p in planned.stages if p.state == "compute"] == [
        "rounds/1 judge",
        "rounds/1 train",
        "rounds/1 measure",
    ]
    assert planned.seconds(Library([tmp_path / "runs"])) is not None
    _, runs, _ = done(jobs, tmp_path / "runs")
    assert [len(run.computed) for run in runs] == [0, 0, 3]


def test_one_model_in_memory_at_a_time(base: Recipe, tmp_path: Path) -> None:
    """Cells may vary the model; equal ones load it once."""
    loaded: list[str] = []

    def load(name: str | None, settings: Any) -> Any:
        loaded.append(settings.model)
        return backends.load(name, settings)

    cells = [Cell("base", {}), Cell("K", {"refine.K": 0.1}), Cell("other", {"inputs.model": "toy:7"})]
    jobs = jobs_of(cells, base, 1, tmp_path / "runs/study")
    outcomes = list(ablate.run_jobs(jobs, Shelf(load), Library([tmp_path / "runs"])))
    assert loaded == ["toy", "toy:7"]
    assert all(outcome.rows for outcome, _ in outcomes)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`ablate` on small data, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    sources = write_data(tmp_path, pairs=20, prompts=12)
    given = {"seed-pairs": sources["inputs.seed_pairs"], "prompts": sources["inputs.prompts"], "rounds": 1}
    flags = given | {"backend": "toy", "model": "toy", "max-tokens": 8, "seeds": 2, "micro-tokens": 400}
    return ["ablate", *[word for name, value in flags.items() for word in (f"--{name}", str(value))]]


def call(capfd: pytest.CaptureFixture[str], words: Sequence[str]) -> tuple[int, str, str]:
    """Run a command in this process: exit code, standard output, standard error."""
    try:
        code = app(list(words), standalone_mode=False) or 0
    except RecipeError as error:
        return 2, "", str(error)
    return int(code), *capfd.readouterr()


def test_the_command(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Plan, progress, table, files; then the same again for nothing, and one value more for little."""
    vary = [*words, "--vary", "judge=implicit,random"]
    code, out, err = call(capfd, [*vary, "--dry-run"])
    assert code == 0
    assert "stages to compute (time unknown" in err
    assert not (tmp_path / "runs").exists()
    code, out, err = call(capfd, vary)
    assert code == 0, err
    assert "judge.by=random" in out
    assert "cell 4 of 4" in err
    (folder,) = (tmp_path / "runs").iterdir()
    kept = {p.name for p in folder.iterdir()}
    assert "| judge.by=random |" in (folder / "results.md").read_text()
    assert {"study.json", "results.csv", "results.json", "cells.svg", "cells.png", "rounds.png", "cells"} <= kept
    assert len((folder / "results.csv").read_text().splitlines()) == 5
    code, out, err = call(capfd, [*vary, "--json"])
    assert code == 0
    assert json.loads(out)["study"]["cost"]["computed"] == 0
    code, out, err = call(capfd, [*words, "--vary", "judge=implicit,random,longest"])
    assert "6 stages to compute (about" in err
    assert len(list((folder / "cells").iterdir())) == 6


def test_recipes_side_by_side(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A column says which; every line has what its own recipe has; one that cannot run is a line with the reason."""
    code, out, err = call(capfd, [*words, "--vary", "recipe=spa,spa-official,sao", "--vary", "tie=a,b", "--dry-run"])
    assert code == 0, err
    assert "6 cells" in err
    code, out, err = call(capfd, [*words, "--vary", "recipe=dpo", "--vary", "loss=simpo", "--dry-run"])
    assert "cannot run: recipe=dpo, loss.kind=simpo: loss=simpo has no reference" in " ".join(err.split())
    vary = [*words, "--vary", "recipe=spa-official", "--vary", "tie=a", "--one-at-a-time", "--json"]
    code, out, err = call(capfd, vary)
    assert code == 0, err
    base, other, _ = sorted(json.loads(out)["cells"], key=lambda cell: "base recipe judge".index(cell["cell"][:4]))
    assert (base["cell"], other["settings"]) == ("base", {"recipe": "spa-official", "judge.tie": "a"})
    (folder,) = (tmp_path / "runs").iterdir()
    assert "identical: keep" in next(folder.glob("cells/recipe*/recipe.yaml")).read_text()
    tokens = other["measures"]["sampled_tokens"]["values"]["0"]
    samples = (next(folder.glob("cells/recipe*seed0/rounds/1")) / "samples.jsonl").read_text().splitlines()
    assert tokens == sum(len(c["ids"]) for line in samples for c in json.loads(line)["completions"])
    assert other["measures"]["seconds"]["mean"] > 0
    assert "tokens" in (folder / "results.md").read_text()


def test_a_study_in_use_is_left_alone(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two of the same at once would fail each other's cells."""
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"), pytest.raises(RunError, match="mine is in use by process"):
        call(capfd, [*words, "--vary", "judge=random", "--out", "mine"])
    assert not (tmp_path / "mine/cells").exists()


def test_what_the_command_refuses(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """In a sentence, before anything is loaded."""
    for more, sentence in [
        ([], "what to vary"),
        (["--vary", "judge=random", "--study", "judge"], "what to vary"),
        (["--study", "judge", "--one-at-a-time"], "leave --grid"),
        (["--vary", "judge=coin"], "judge.by = 'coin'"),
        (["--study", "nothing"], "there is no study"),
    ]:
        code, _, err = call(capfd, [*words, *more])
        assert code == 2
        assert sentence in err


def test_the_list_of_studies(capfd: pytest.CaptureFixture[str]) -> None:
    """Each with its question."""
    code, out, _ = call(capfd, ["ablate", "--study", "list"])
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped())


def test_every_setting_can_be_varied() -> None:
    """By its path; only seeds have a flag of their own."""
    assert {ablate.setting_named(path) for path in SETTINGS} == set(SETTINGS)
