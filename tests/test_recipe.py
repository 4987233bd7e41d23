"""Settings: each exists once, layers in order, wrong ones are named with the nearest right one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spa_lite.errors import RecipeError
from spa_lite.recipe import (
    ALL_STAGES,
    SETTINGS,
    build,
    for_round,
    layers_of,
    load_layer,
    parse_set,
    read_yaml,
    shipped,
    that_matter,
)


def test_the_defaults_are_the_papers() -> None:
    """Section 5.1 and appendix B of the paper."""
    r, source = build({})
    assert (r.rounds, r.sampling.n, r.sampling.temp, r.sampling.top_p, r.sampling.max_tokens) == (3, 2, 0.7, 1.0, 300)
    assert (r.loss.beta, r.refine.alpha, r.refine.K, r.refine.warmup, r.refine.window) == (0.1, 0.1, 0.1, 0.2, 50)
    assert [for_round(r, i) for i in (1, 2, 3)] == [0.5, 0.25, 0.125]
    assert (r.seed_dpo.epochs, r.train.epochs, r.train.batch_size, r.seed_dpo.batch_size) == (3, 1, 32, 32)
    assert (r.train.schedule, r.train.warmup) == ("cosine", 0.1)
    assert (r.lengths.max_length, r.lengths.max_prompt_length) == (2048, 1024)
    assert (r.judge.by, r.judge.reference, r.judge.tie, r.judge.identical) == ("implicit", "init", "b", "drop")
    assert set(source.values()) == {"default"}


def test_official_differs_where_the_released_code_does() -> None:
    """Two rounds, rank threshold from zero, no decoupling, first answer at ties, closing every answer."""
    r, _ = build({"recipe": load_layer("recipe", "spa-official")})
    assert (r.rounds, r.refine.rule, r.refine.before_full, r.refine.lambda_) == (2, "official", "zero", 0)
    assert (r.judge.tie, r.judge.identical, r.sampling.append_eos) == ("a", "keep", True)


def test_later_layers_win_and_the_source_is_known() -> None:
    """default < recipe < scale < config < command line."""
    r, source = build({"scale": {"rounds": 2, "sampling.temp": 0.5}, "command line": {"rounds": 1}})
    assert (r.rounds, r.sampling.temp) == (1, 0.5)
    assert (source["rounds"], source["sampling.temp"], source["loss.beta"]) == ("command line", "scale", "default")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("refine.lambda=.3", "refine.lambda", 0.3),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning-rate=1e-4", "train.learning_rate", 1e-4),
        ("lora.targets=q_proj,v_proj", "lora.targets", ["q_proj", "v_proj"]),
        ("round_sizes=10,20,30", "round_sizes", [10, 20, 30]),
        ("round_sizes=none", "round_sizes", None),
        ("sampling.append_eos=true", "sampling.append_eos", True),
        ("model.system=none", "model.system", None),
        ("seed=-3", "seed", -3),
    ],
)
def test_values_from_the_command_line(text: str, path: str, value: Any) -> None:
    """`--set group.field=value`, spelled as people spell numbers and lists."""
    r, _ = build({"--set": dict([parse_set(text)])})
    assert r.get(path) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refine.k=1", "did you mean refine.K"),
        ("tempp=1", "did you mean sampling.temp"),
        ("sampling.tmp=1", "did you mean sampling.temp"),
        ("refine.K=2", "<= 1"),
        ("sampling.n=0", ">= 1"),
        ("rounds=x", "Expected `int`"),
        ("sampling.temp=warm", "could not convert"),
        ("judge.by=gpt", "Invalid enum value"),
        ("rounds", "group.field=value"),
        ("train.learning_rate=0", "> 0"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str) -> None:
    """One sentence with the setting and the mend."""
    with pytest.raises(RecipeError) as caught:
        build({"--set": dict([parse_set(text)])})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"round_sizes": [1, 2], "rounds": 3}, ("round_sizes", "rounds")),
        ({"refine.rule": "official", "refine.K": 0.98}, ("refine.K", "refine.rule")),
        ({"lengths.max_length": 100, "lengths.max_prompt_length": 100}, ("max_length", "max_prompt_length")),
        ({"inputs.seed_pairs": "x", "inputs.no_seed_pairs": True}, ("seed_pairs", "no_seed_pairs")),
    ],
)
def test_contradictions_name_both_sides(changes: dict[str, Any], both: tuple[str, str]) -> None:
    """Before any work."""
    with pytest.raises(RecipeError) as caught:
        build({"x": changes})
    assert all(name in str(caught.value) for name in both)


def test_every_setting_has_help_and_known_stages() -> None:
    """And a flag no other setting has."""
    flags = [s.flag for s in SETTINGS.values() if s.flag]
    assert len(flags) == len(set(flags))
    for s in SETTINGS.values():
        assert s.help.endswith(".")
        assert set(s.stages) <= set(ALL_STAGES)


def test_a_stage_sees_only_its_settings() -> None:
    """Changing the learning rate leaves the key of sampling alone."""
    one, _ = build({})
    other, _ = build({"x": {"train.learning_rate": 1e-3, "batching.micro_tokens": 1}})
    assert one.for_stage("sample") == other.for_stage("sample")
    assert one.for_stage("train") != other.for_stage("train")


def test_recipes_can_be_measured_alike() -> None:
    """With a temperature of its own, measuring does not look at the one of sampling."""
    hot = {"sampling.temp": 1.3, "sampling.top_p": 0.5}
    for temp, alike in ((0.7, True), (None, False)):
        one, other = (build({"x": {"measure.temp": temp, **more}})[0] for more in ({}, hot))
        assert (that_matter(one, "measure") == that_matter(other, "measure")) == alike
        assert that_matter(one, "sample") != that_matter(other, "sample")


def test_a_written_recipe_reads_back(tmp_path: Path) -> None:
    """recipe.yaml gives the same recipe again."""
    r, _ = build(
        {"scale": load_layer("scale", "laptop"), "x": {"train.learning_rate": 1e-7, "model.system": "Hi: 'x'"}}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(r.to_dict()))
    assert build({"file": read_yaml(path)})[0] == r


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rounds: [", "not valid YAML"),
        ("- a", "must hold settings"),
        ("sampling: {tmep: 1}", "did you mean sampling.temp"),
    ],
)
def test_bad_config_files(tmp_path: Path, content: str, message: str) -> None:
    """The file is named."""
    path = tmp_path / "my.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    assert message in str(caught.value)
    assert "my.yaml" in str(caught.value)


def test_missing_files_and_names() -> None:
    """A recipe or scale that is not there."""
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load_layer("recipe", "nowhere.yaml")
    with pytest.raises(RecipeError, match="did you mean spa-official"):
        load_layer("recipe", "spa-oficial")
    with pytest.raises(RecipeError, match="laptop"):
        load_layer("scale", "huge")


@pytest.mark.parametrize("recipe", shipped("recipe"))
def test_shipped_files_are_valid(recipe: str) -> None:
    """Every shipped recipe under every shipped scale."""
    assert set(shipped("scale")) == {"paper", "laptop", "lesson"}
    for scale in shipped("scale"):
        r, _ = build(layers_of(recipe, scale))
        assert (r.name, r.scale) == (recipe, scale)
