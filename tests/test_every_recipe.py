"""What lists, counts and shows runs knows the stages of every recipe: those without a seed stage, with written prompts,
with helpers, with several kinds of candidates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spa_lite import explain_sources, inventory, model_card
from spa_lite.axes import one_line
from spa_lite.cli import render
from spa_lite.effort import measured, reference_passes, rows_trained_on, work
from spa_lite.estimate import Longest, responses_of
from spa_lite.events import Event
from spa_lite.files import read_json
from spa_lite.floor import Floor
from spa_lite.library import Library
from spa_lite.pairing import why_not
from spa_lite.plan import plan
from spa_lite.recipe import Recipe, build, load_layer, shipped
from spa_lite.records import Judgement
from spa_lite.report import collect, examples, figures, tables, training
from spa_lite.report.page import write_report
from spa_lite.rounds import policies_of, row_name
from spa_lite.shape import shape_of
from spa_lite.stages.workbench import longest, read_judgements
from spa_lite.store import Stage
from spa_lite.summary import warnings
from spa_lite.throughput import KINDS, Went
from tests.small import load, run_small, start, tiny, write_data
from tests.test_estimate import LLAMA_8B

SHOWN = ("sao", "spin", "synpo", "self-rewarding", "dpo")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pairs and prompts."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> Callable[[str], Path]:
    """The folder of a recipe's run, made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            run_small(made[name], tiny(name, files))
        return made[name]

    return run


def told(folder: Path) -> collect.Told:
    """A run as the report sees it."""
    return collect.read_runs([folder])[0]


# -- listing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_has_the_stages_of_its_recipe(ran: Any, files: dict[str, str], name: str) -> None:
    """Those that are planned, those that are expected of its folder, and those that are found in it."""
    recipe = tiny(name, files)
    models, data = start(recipe)
    planned = [p.stage.title for p in plan(models, recipe, data, Path("nowhere"), Library([]), set())]
    assert sorted(planned) == sorted(inventory.titles_of(recipe))
    place = inventory.place_of(ran(name), name)
    assert place
    reading = inventory.read(place)
    assert sorted(reading.books) == sorted(planned)
    assert {book.kind for book in reading.books.values()} <= set(KINDS)
    assert inventory.state_of(reading, None) == "finished"


def test_what_is_skipped_is_not_expected() -> None:
    """No measure of pi_0 where it is pi_init, none between where only the end is measured."""
    sao = build({"r": load_layer("recipe", "sao")})[0]
    assert list(inventory.titles_of(sao))[:2] == ["init measure", "rounds/1 prompts"]
    end = build({"r": load_layer("recipe", "spa"), "x": {"measure.every": "end", "rounds": 2}})[0]
    assert [t for t in inventory.titles_of(end) if t.endswith("measure")] == ["init measure", "rounds/2 measure"]
    other = build({"r": load_layer("recipe", "spa-noseed"), "x": {"inputs.init_model": "x"}})[0]
    assert "rounds/0 measure" in inventory.titles_of(other), "pi_init is another model"


def test_a_run_that_a_rule_stopped_is_finished(tmp_path: Path, files: dict[str, str]) -> None:
    changes = {"stop.agreement": 0.0, "stop.action": "stop", "measure.every": "end"}
    run_small(tmp_path / "run", tiny("spa", files, changes))
    place = inventory.place_of(tmp_path / "run", "run")
    assert place
    assert inventory.state_of(inventory.read(place), None) == "finished"


class Killed(BaseException):
    """The power went."""


@pytest.mark.parametrize(("name", "at", "of"), [("synpo", "round 2 improver", None), ("spin", "round 2 train", None)])
def test_how_far_unfinished_work_is(tmp_path: Path, files: dict[str, str], name: str, at: str, of: None) -> None:
    """Of as many steps as the stage has in the end: SFT helpers, and the pairs of several rounds."""
    recipe = tiny(name, files, {"train.save_every": 1})
    totals: dict[str, int] = {}

    def killed(event: Event) -> None:
        totals[event.stage] = event.total
        if event.stage == at and event.unit == "steps" and event.done == 2:
            raise Killed

    with pytest.raises(Killed):
        run_small(tmp_path / "run", recipe, report=killed)
    place = inventory.place_of(tmp_path / "run", "run")
    assert place
    (part,) = inventory.read(place).parts.values()
    assert part.title == at.replace("round ", "rounds/")
    assert (part.step, part.of) == (2, totals[at])


def test_names_of_policies(ran: Any, files: dict[str, str]) -> None:
    """A helper is no policy, and a run without a seed stage has none of that name."""
    assert list(policies_of(ran("synpo"), tiny("synpo", files))) == ["init", "round 1", "round 2"]
    assert row_name(tiny("synpo", files), "rounds/0") == "generator"
    assert row_name(tiny("self-rewarding", files), "rounds/0") == "seed"
    assert row_name(tiny("spin", files, {"inputs.init_model": "x"}), "rounds/0") == "pi_0"


# -- estimates -----------------------------------------------------------------------------------------------------


def recipe_of(name: str, **changes: Any) -> Recipe:
    """A shipped recipe with changes."""
    return build({"r": load_layer("recipe", name), "x": {k.replace("__", "."): v for k, v in changes.items()}})[0]


def flops(recipe: Recipe) -> dict[str, float]:
    """Arithmetic by kind of stage, of texts of 100 tokens."""
    from spa_lite.backend import Batching

    texts = Longest(100, 100, 200, responses=responses_of(recipe))
    done = work(shape_of(LLAMA_8B), recipe, Batching(), 100, 50, 0, longest=texts)
    assert tuple(done) == KINDS
    return {kind: some.flop for kind, some in done.items()}


def test_work_is_done_where_the_recipe_has_it() -> None:
    """Only what a recipe has takes time."""
    found = {name: {kind for kind, flop in flops(recipe_of(name)).items() if flop} for name in shipped("recipe")}
    assert found["spa"] == {"seed", "sample", "judge", "train"}
    assert found["sao"] == {"prompts", "sample", "judge", "train"}
    assert found["synpo"] == {"generator", "prompts", "improver", "sample", "judge", "train"}
    assert found["dpo"] == {"judge", "train"}, "nothing is sampled"
    assert found["self-rewarding"] == {"seed", "prompts", "sample", "judge", "train"}


def test_more_of_anything_is_more_work() -> None:
    """Answers, questions of a judge, pairs of earlier rounds, a third answer, a reference that must be passed."""
    sao, spin, selm = flops(recipe_of("sao")), flops(recipe_of("spin")), flops(recipe_of("selm"))
    assert flops(recipe_of("sao", judge__swap=False))["judge"] < sao["judge"]
    assert flops(recipe_of("sao", judge__by="longest"))["judge"] < 0.2 * sao["judge"]
    rubric = recipe_of("self-rewarding", inputs__model="x")
    assert flops(recipe_of("self-rewarding", inputs__model="x", judge__tries=1))["judge"] < flops(rubric)["judge"]
    five, one = flops(recipe_of("simpo-onpolicy")), flops(recipe_of("simpo-onpolicy", sampling__n=1))
    assert five["sample"] > 3 * one["sample"], "the prompt is read once"
    assert flops(recipe_of("spin", carry__data="all"))["train"] > spin["train"]
    assert flops(recipe_of("selm", loss__optimism=0.0))["train"] < selm["train"]
    assert rows_trained_on(recipe_of("synpo"), 400) == 100 * (1 + 2 + 3 + 4)
    assert measured(recipe_of("spa")) == measured(recipe_of("sao", rounds=4)) == 4
    passes = {name: reference_passes(recipe_of(name)) for name in shipped("recipe")}
    assert passes["spa"] == pytest.approx(0.8)
    assert (passes["sao"], passes["dpo"], passes["spin"], passes["self-rewarding"]) == (0, 1, 1, 0)


def test_the_longest_texts_of_a_recipe(files: dict[str, str]) -> None:
    """Written prompts are as long as they may get; the improver reads a draft, too; a third answer is beside two."""
    recipe = tiny("sao", files)
    found = longest(recipe, start(recipe)[1])
    assert (found.prompt, found.answer, found.responses) == (20 + 64, 12, 2)
    synpo = tiny("synpo", files)
    assert longest(synpo, start(synpo)[1]).single > found.single
    assert Longest(10, 5, 0, responses=3).row == 10 + 3 * 4
    assert responses_of(tiny("selm", files)) == 3


@pytest.mark.parametrize(
    ("name", "kind", "done", "known"),
    [
        ("spa", "sample", "sampled", True),
        ("spin", "train", "trained", True),
        ("spin", "sample", "sampled", False),
        ("selm", "train", "trained", False),
        ("sao", "sample", "sampled", False),
        ("sao", "prompts", "sampled", False),
        ("synpo", "improver", "trained", False),
    ],
)
def test_no_floor_of_what_is_not_known(files: dict[str, str], name: str, kind: str, done: str, known: bool) -> None:
    from spa_lite.effort import Speed
    from tests.test_throughput import Shaped

    recipe = tiny(name, files)
    models, data = start(recipe, Shaped)
    _ = models.backend
    floor = Floor(models, recipe, data, lambda backend: Speed(1e9, 1e9))
    found = floor.seconds(Stage("rounds/1", kind, (), {}, {}, 20), done, Went(units=10, tokens=200, seconds=1.0))
    assert (found is not None) == known


# -- what a user is told -------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "prompted": {
        "asked": 100,
        "kept": 90,
        "unreadable": 5,
        "filtered": 0,
        "held_out": 0,
        "similar": 5,
        "repeated": 0.1,
    },
    "judged": {
        "pairs": 100,
        "unread": 10,
        "disagree_share": 0.3,
        "identical": 10,
        "rewarded": 90,
        "reward_agrees": 0.6,
    },
    "trained": {"left_out": {"identical": 10}},
}


@pytest.mark.parametrize(
    ("recipe", "part", "changes", "sentence"),
    [
        ("sao", "prompted", {"kept": 70, "similar": 25}, "prompts repeat or cannot be used: 70 of 100 prompts kept"),
        ("sao", "prompted", {"repeated": 0.3}, "30.0 % repeat an earlier one"),
        ("sao", "judged", {"unread": 30}, "30 of 200 replies of the judge could not be read"),
        ("self-rewarding", "judged", {"unread": 130}, "130 of 1200 replies"),
        ("sao", "judged", {"disagree_share": 0.5}, "in 50 % of the pairs the judge prefers the other answer"),
        ("synpo", "trained", {"left_out": {"gap": 60}}, "60 are closer than pairing.min_gap"),
        ("spin", "judged", {"identical": 60}, "answered 60 with the good answer itself"),
        ("spin", "judged", {"reward_agrees": 0.99}, "the policy prefers 99 % of the good answers to its own already"),
    ],
)
def test_warnings_of_a_recipe(recipe: str, part: str, changes: dict[str, Any], sentence: str) -> None:
    """Nothing is said while all is well, and one thing when something is not."""
    row = {"stage": "round 1", "folder": "rounds/1"} | GOOD
    r = recipe_of(recipe)
    assert warnings([row], r) == []
    (said,) = warnings([row | {part: GOOD[part] | changes}], r)
    assert said.startswith("round 1: ")
    assert sentence in said


def test_the_implicit_reward_is_compared_with_other_judges(ran: Any) -> None:
    """In the first round pi_init has no reward to compare; later it has."""
    rows = {stage.place: stage.row["judged"] for stage in told(ran("spin")).rounds}
    assert rows["rounds/1"]["rewarded"] == 0
    judged = read_judgements(ran("spin") / "rounds/2/judgements.jsonl")
    agrees = [(j.margin > 0) == (j.label == "a") for j in judged if j.margin]
    assert rows["rounds/2"]["rewarded"] == len(agrees) > 0
    assert rows["rounds/2"]["reward_agrees"] == pytest.approx(sum(agrees) / len(agrees))


def test_the_tables_of_the_terminal(ran: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Written prompts have a table, and what a recipe has not has no column."""
    for name in ("sao", "spa"):
        folder = ran(name)
        for table in render.summary_tables(read_json(folder / "summary.json"), {}):
            render.show(table)
        out = capfd.readouterr().out
        assert ("prompts written" in out, "without %" in out, "flagged %" in out) == (
            (True, True, False) if name == "sao" else (False, False, True)
        )


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHOWN)
def test_the_page_of_a_recipe(ran: Any, files: dict[str, str], tmp_path: Path, name: str, monkeypatch: Any) -> None:
    """With all it is made of, its prompts and the kinds of its candidates; nothing is missing."""
    monkeypatch.setattr(figures, "FIGURES", (figures.seconds, training.displacement, training.loss))
    notes: list[str] = []
    path = write_report([ran(name)], tmp_path, lambda r: load(r), notes.append)
    page = path.read_text()
    assert notes == []
    shown = one_line(tiny(name, files))
    assert page.split('class="made">')[1].split("<")[0] == shown.replace(">", "&gt;")
    assert ("<h2>Prompts</h2>" in page) == (name in {"sao", "synpo", "self-rewarding"})
    origins = {"spin": "chosen · gold", "synpo": "chosen · improve", "dpo": "rejected · rejected"}
    for other, origin in origins.items():
        assert (origin in page) == (name == other)
    assert "flagged %" not in page
    assert (tmp_path / "displacement.csv").is_file()


def test_written_prompts_are_escaped(ran: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """As everything that a model wrote."""
    monkeypatch.setattr(figures, "FIGURES", ())
    import shutil

    run = Path(shutil.copytree(ran("sao"), tmp_path / "run"))
    (run / "rounds/1/prompts.jsonl").write_text(
        '{"id": "x", "messages": [{"role": "user", "content": "<b>hi\\u001b[31m"}], "extra": {"persona": "<i>me"}}\n'
    )
    assert [(one.text, one.given) for one in examples.written(told(run))] == [("<b>hi\x1b[31m", "<i>me")]
    page = write_report([run], tmp_path / "page").read_text()
    assert "&lt;b&gt;hi" in page
    assert "&lt;i&gt;me" in page
    assert "<i>me" not in page
    assert "\x1b" not in page


def test_captions_say_what_a_loss_is(ran: Any) -> None:
    """Without a reference there are no log-ratios; the dotted line is ln 2 only where every stage starts there."""
    drawn = {
        name: (training.displacement([told(ran(name))]), training.loss([told(ran(name))]))
        for name in ("sao", "spin", "dpo", "spa")
    }
    captions = {name: tuple(one.caption for one in both if one) for name, both in drawn.items()}
    assert "no reference" in captions["sao"][0]
    assert "(simpo)" in captions["sao"][1]
    assert "π_init" in captions["dpo"][0]
    assert ["ln 2" in captions[name][1] for name in ("sao", "spin", "dpo", "spa")] == [False, True, False, True]


def test_rows_of_the_tables(ran: Any) -> None:
    """Counts are those of the summaries."""
    run = told(ran("sao"))
    sheet = tables.prompts_sheet(run)
    found = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    prompted = run.rounds[0].row["prompted"]
    assert found["kept"] == str(prompted["kept"])
    assert found["without personas %"] == f"{100 * prompted['repeated_without_personas']:.1f}"
    assert dict(tables.facts(run))["made of"] == one_line(run.recipe or Recipe())
    judging = tables.judging_sheet(told(ran("spin")))
    assert "reward agrees %" in judging.columns
    assert "reward agrees %" not in tables.judging_sheet(told(ran("spa"))).columns


# -- one pair, one adapter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHOWN)
def test_a_pair_is_explained(ran: Any, files: dict[str, str], name: str) -> None:
    """As far as its recipe goes: the terms of DPO for DPO, one sentence for other losses, no flag where none is."""
    path = ran(name) / "rounds/1/judgements.jsonl"
    trained = [i for i, j in enumerate(read_judgements(path), 1) if usable(j, tiny(name, files))]
    found = explain_sources.explain_run(path, trained[0], load)
    judge = tiny(name, files).judge.by
    assert f"the judge {judge}; the implicit reward had no say" in " ".join(found.notes)
    itself = "Policy and reference are both π_init" in " ".join(found.notes)
    assert itself == (name != "self-rewarding")
    assert bool(found.chosen.credits) == (not itself)
    names = [term.name for term in found.trained]
    assert names[:1] == ["margin m"]
    assert ("DPO loss" in names) == (name in {"spin", "dpo", "self-rewarding"})
    assert "flag z" not in names
    assert found.why[0].startswith("Not flagged: with noise=none no pair is.")


def usable(judgement: Judgement, recipe: Recipe) -> bool:
    """Whether a pair is trained on."""
    return not why_not(judgement, recipe)


def test_a_card_says_how_it_was_trained() -> None:
    """By which pieces, from which papers, with which settings."""
    sao, spin, spa = recipe_of("sao"), recipe_of("spin"), recipe_of("spa")
    assert model_card.is_spa(spa)
    assert not model_card.is_spa(sao)
    assert {"SAO (2510.06652)", "SimPO (2405.14734)"} <= set(model_card.sources(sao))
    assert "SPIN (2401.01335)" in model_card.sources(spin)
    assert {"loss.simpo_beta", "loss.gamma"} <= set(model_card.shown(sao))
    assert not {"loss.beta", "refine.K", "seed_dpo.learning_rate"} & set(model_card.shown(sao))
    assert {"loss.round_betas", "train.round_rates"} <= set(model_card.shown(spin))
    assert {"loss.beta", "refine.K", "seed_dpo.learning_rate"} <= set(model_card.shown(spa))
    assert ("simpo" in model_card.tags_of(sao), model_card.SPA in model_card.tags_of(spa)) == (True, True)
    record = {"model": "m", "source": "s", "backend": "torch", "dtype": "float32", "effect": 0.1, "checks": []}
    text = model_card.card(model_card.shareable(sao), sao, Path("nowhere"), "round 1", Path("nowhere"), record)
    assert "by the recipe sao (round 1): persona(0.6)" in text
    assert "SimPO (2405.14734)" in text
    assert "Spread Preference" not in text
