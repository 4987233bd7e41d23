"""Rounds whose answers another file of the model draws: what is checked, what is kept, what the trainer never takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spa_lite import backends, prepare, sampler
from spa_lite.backend import Backend, ModelSettings
from spa_lite.cli.eval_work import settings
from spa_lite.errors import ModelError, RecipeError, SpaError
from spa_lite.recipe import Recipe
from spa_lite.records import Ids, Message
from spa_lite.spa import align
from spa_lite.stages.workbench import read_judgements, read_samples
from spa_lite.store import Run
from tests.small import results, small_recipe, write_data


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A small run whose answers a file draws; the file's content stands for a model's weights."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF one")
    by = {"sampling.by": f"gguf:{tmp_path / 'model.gguf'}", "judge.rescore": "always"}
    return small_recipe(write_data(tmp_path), by)


class Other:
    """The same model by another hand: what it records of its answers is its own, and it may read text otherwise."""

    def __init__(self, inner: Backend, reads: bool) -> None:
        self.inner, self.reads = inner, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def tokenizer(self) -> Any:
        """The model's, or one that ends every answer with something else."""
        return self.inner.tokenizer if self.reads else Tail()

    def sample(self, *args: Any) -> Iterator[Any]:
        """The model's answers, and numbers that are not the model's."""
        for index, some in self.inner.sample(*args):
            yield index, tuple(msgspec.structs.replace(c, logprobs=(-9.0,) * len(c.ids)) for c in some)


class Tail:
    """A tokenizer of another model."""

    stop_ids = frozenset({7})

    def encode_answer(self, messages: list[Message], text: str) -> Ids:
        """One id, whatever is said."""
        return (7,)


def run(folder: Path, recipe: Recipe, loaded: list[str], reads: bool = True) -> dict[str, Any]:
    """A run; `loaded` gets the names of the backends as they are loaded."""

    def load(name: str | None, how: ModelSettings) -> Backend:
        loaded.append(f"{name} {Path(how.model).name}")
        inner = backends.load("toy", prepare.model_settings(recipe))
        return Other(inner, reads) if name == "llamacpp" else inner

    models = prepare.models_of(recipe, load)
    prepare.check_start(recipe)
    return align(models, recipe, prepare.data_of(recipe, models), Run(folder))


def test_it_draws_and_the_trainer_scores(tmp_path: Path, recipe: Recipe) -> None:
    loaded: list[str] = []
    summary = run(tmp_path / "by", recipe, loaded)
    assert loaded == ["toy toy", *["llamacpp model.gguf", "toy toy"] * 2], "alone in memory, once a round"
    own = small_recipe(write_data(tmp_path), {"judge.rescore": "always"})
    run(tmp_path / "own", own, [])
    for i in (1, 2):
        found, expected = (list(read_samples(tmp_path / name / f"rounds/{i}/samples.jsonl")) for name in ("by", "own"))
        assert [[c.ids for c in s.completions] for s in found] == [[c.ids for c in s.completions] for s in expected]
        assert {x for s in found for c in s.completions for x in c.logprobs} == {-9.0}
        judged, right = (read_judgements(tmp_path / name / f"rounds/{i}/judgements.jsonl") for name in ("by", "own"))
        assert judged == right, "nothing of the sampler's numbers"
    trained, alike = (
        {path: bytes_ for path, bytes_ in results(tmp_path / name).items() if "adapter" in path}
        for name in ("by", "own")
    )
    assert trained == alike
    assert len(trained) >= 3
    assert not [line for line in summary["warnings"] if "machine" in line], "the other backend was asked for"
    made_by = msgspec.json.decode((tmp_path / "by/rounds/1/sample.done.json").read_bytes())["made_by"]
    assert made_by == sampler.made_by(recipe)
    assert sampler.made_by(own)["device"] == "auto"
    on_cpu = replace(own, inputs=replace(own.inputs, device="cpu"))
    assert sampler.made_by(on_cpu)["device"] == "cpu"


def test_another_file_is_another_stage(tmp_path: Path, recipe: Recipe) -> None:
    run(tmp_path / "run", recipe, [])
    loaded: list[str] = []
    run(tmp_path / "run", recipe, loaded)
    assert loaded == ["toy toy"], "nothing is drawn again"
    (tmp_path / "model.gguf").write_bytes(b"GGUF two")
    with pytest.raises(SpaError, match="sample"):
        run(tmp_path / "run", recipe, loaded)


def test_a_file_that_reads_text_otherwise_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(ModelError, match="--sampler reads text differently from --model; both need the same tokenizer"):
        run(tmp_path / "run", recipe, [], reads=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge.rescore": "check"}, "--sampler needs --rescore always"),
        ({"train.cache_reference": True}, "leave it or --sampler out"),
        ({"sampling.by": "vllm"}, "--sampler vllm is not understood; write gguf:FILE"),
    ],
)
def test_settings_that_do_not_go_together(recipe: Recipe, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    by = {"sampling.by": recipe.sampling.by, "judge.rescore": "always"}
    with pytest.raises(RecipeError, match=said):
        prepare.check_start(small_recipe(write_data(tmp_path), by | changes))


def test_a_file_that_is_gone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(ModelError, match=r"there is no file .*model\.gguf; --sampler gguf:FILE names"):
        prepare.check_start(recipe)


@pytest.mark.parametrize(("model", "other"), [("a.gguf", "folder"), ("folder", "a.gguf"), (None, "a.gguf")])
def test_a_reference_is_the_same_file(model: str | None, other: str, tmp_path: Path) -> None:
    recipe = small_recipe(write_data(tmp_path), {"inputs.model": model, "inputs.init_model": other})
    with pytest.raises(RecipeError, match="the policy and its reference must be the same file"):
        prepare.models_of(recipe, backends.load)


def test_evaluations_hear_the_model_itself(tmp_path: Path, recipe: Recipe) -> None:
    run(tmp_path / "run", recipe, [])
    assert settings(({}, [], None, None, None), tmp_path / "run")[0].sampling.by is None
    with pytest.raises(RecipeError, match=r"to hear a GGUF itself, give --model FILE\.gguf"):
        settings(({"sampling.by": "gguf:x"}, [], None, None, None), tmp_path / "run")


def test_the_likeliest_answer_makes_no_pair(tmp_path: Path) -> None:
    """A run with temperature 0 is refused before any work; whoever only listens to a model may ask for it."""
    recipe = small_recipe(write_data(tmp_path), {"sampling.temp": 0.0})
    with pytest.raises(RecipeError, match="draws the same answer every time, so no pair is left; raise --temp"):
        prepare.check_start(recipe)
    prepare.check_start(small_recipe(write_data(tmp_path), {"sampling.temp": 0.0, "judge.identical": "keep"}))
