"""The lesson world: its tasks are many and disjoint, its writers and its gold rule do what the module says."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.lesson import FAMILIES, MODEL_DIR, WEIGHTS, Task, gold, gold_score, pair, skills, tasks, world, write

SPLITS = tuple(world.SPLITS)


def example(family: str, text: str) -> Task:
    """The task of this exact text."""
    return next(task for task in world.family_tasks(family) if task.text == text)


def test_there_are_many_families_and_prompts() -> None:
    texts = [task.text for family in FAMILIES for task in world.family_tasks(family)]
    assert len(FAMILIES) >= 8
    assert len(texts) >= 20_000
    assert len(set(texts)) == len(texts)


def test_splits_cover_everything_once() -> None:
    assert sorted(hundredth for owned in world.SPLITS.values() for hundredth in owned) == list(range(100))


def test_splits_are_disjoint_and_cover_every_family() -> None:
    drawn = {split: tasks(split, 1000) for split in SPLITS}  # type: ignore[arg-type]
    for split, members in drawn.items():
        assert {world.split_of(task.text) for task in members} == {split}
        assert {task.family for task in members} == set(FAMILIES)
        assert len({task.text for task in members}) == 1000


def test_a_seed_gives_another_draw_of_the_same_split() -> None:
    assert tasks("rounds", 50, seed=1) == tasks("rounds", 50, seed=1)
    assert tasks("rounds", 50, seed=1) != tasks("rounds", 50, seed=2)


def test_asking_for_too_many_names_the_split() -> None:
    with pytest.raises(ValueError, match="heldout"):
        tasks("heldout", 1_000_000)
    with pytest.raises(ValueError, match="nonsense"):
        tasks("nonsense", 1)  # type: ignore[arg-type]


def test_the_same_in_another_process() -> None:
    code = (
        "import random; from spa_lite.lesson import tasks, write; rng = random.Random(3);"
        "print([(t.text, write(t, rng)) for t in tasks('seed', 20, 7)])"
    )
    rng = random.Random(3)
    here = str([(task.text, write(task, rng)) for task in tasks("seed", 20, 7)])
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        assert there.stdout.strip() == here


def test_the_world_loads_no_framework() -> None:
    code = "import sys, spa_lite.lesson.skills; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_facts_are_plain_json() -> None:
    for task in tasks("tune", 200):
        assert json.loads(json.dumps(task.facts)) == task.facts


def test_each_opener_and_closing_has_exactly_one_tone_word() -> None:
    for style in world.STYLES.values():
        for text in style.kind_openers + style.kind_closings:
            assert tone_words(text) == (1, 0), text
        for text in style.rude_openers + style.rude_closings:
            assert tone_words(text) == (0, 1), text


def test_clear_frames_name_the_topic_and_vague_ones_ramble() -> None:
    for style in world.STYLES.values():
        for frame in style.clear_frames:
            assert style.topic in frame.lower().split(), frame
            assert not filler_words(frame), frame
        for frame in style.vague_frames:
            assert style.topic not in frame.lower().split(), frame
            assert filler_words(frame), frame


def filler_words(text: str) -> set[str]:
    return set(text.lower().replace(",", " ").split()) & world.FILLER_WORDS


def tone_words(text: str) -> tuple[int, int]:
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return sum(word in world.KIND_WORDS for word in words), sum(word in world.RUDE_WORDS for word in words)


def test_no_prompt_or_answer_holds_a_tone_word() -> None:
    marked = world.KIND_WORDS | world.RUDE_WORDS | world.FILLER_WORDS
    for family in FAMILIES:
        for task in world.family_tasks(family)[::50]:
            assert not marked.intersection(task.text.lower().replace(".", " ").replace("?", " ").split())
    assert not marked.intersection(word.lower() for words in world.RIVALS.values() for word in words)


@pytest.mark.parametrize("family", FAMILIES)
def test_care_decides_the_gold_score(family: str) -> None:
    rng = random.Random(0)
    members = world.family_tasks(family)[:100]
    careful = [gold_score(gold(task, write(task, rng, care=1.0))) for task in members]
    careless = [gold_score(gold(task, write(task, rng, care=0.0))) for task in members]
    assert min(careful) == 1.0
    assert max(careless) < 0.4


@pytest.mark.parametrize("family", FAMILIES)
def test_length_does_not_tell_care(family: str) -> None:
    rng = random.Random(0)
    members = world.family_tasks(family)[:300]
    careful = statistics.mean(len(write(task, rng, care=1.0)) for task in members)
    careless = statistics.mean(len(write(task, rng, care=0.0)) for task in members)
    assert 0.85 < careful / careless < 1.18


def test_pairs_differ_in_gold() -> None:
    rng = random.Random(0)
    for task in tasks("seed", 100):
        first, second = pair(task, rng)
        assert gold_score(gold(task, first)) != gold_score(gold(task, second))


@pytest.mark.parametrize(
    ("family", "prompt", "right", "wrong"),
    [
        ("list", "Name two fruits for Tom.", "plum and fig", "plum"),
        ("colour", "Tell Anna the colour of grass.", "It is green", "It is green or blue"),
        ("opposite", "Give Tom the opposite of hot.", "hot against cold", "It is wet"),
        ("capital", "Tell Anna the capital of Peru.", "LIMA!", "Oslo"),
        ("sound", "Tell Anna the sound of a cow.", "moo", "moomoo"),
        ("plural", "Tell Anna the plural of mouse.", "mice", "mouses"),
        ("young", "Tell Anna what to call a young dog.", "a puppy", "a kitten"),
        ("next", "Tell Anna what follows Monday.", "after Monday comes Tuesday", "Sunday"),
        ("greet", "Greet Tom in the morning at the park.", "Good morning", "Good evening"),
    ],
)
def test_correctness_by_hand(family: str, prompt: str, right: str, wrong: str) -> None:
    task = example(family, prompt)
    assert gold(task, right)["correctness"] == 1.0
    assert gold(task, wrong)["correctness"] < 1.0


@pytest.mark.parametrize(
    ("accept", "rivals", "given", "right", "wrong"),
    [
        (["7"], "number", ["3", "4"], "3 and 4 make 7", "the plums make 8"),
        (["23"], ["9", "23"], [], "23 is more", "9 is more"),
        (["lamp"], ["lamp", "road", "hill"], [], "the first word is lamp", "lamp and road"),
    ],
)
def test_correctness_by_hand_where_prompts_are_drawn(
    accept: list[str], rivals: str | list[str], given: list[str], right: str, wrong: str
) -> None:
    facts = {"mention": ["word"], "item": "x", "accept": accept, "need": 1, "rivals": rivals, "given": given}
    assert gold(facts, right)["correctness"] == 1.0
    assert gold(facts, wrong)["correctness"] == 0.0


def test_every_criterion_by_hand() -> None:
    task = example("colour", "Tell Anna the colour of grass.")
    best = "A bright topic. The colour is green. Have a sunny hour."
    assert gold(task, best) == dict.fromkeys(WEIGHTS, 1.0)
    assert gold(task, best.replace("green", "red"))["correctness"] == 0.0
    assert gold(task, best.replace("colour", "thing"))["completeness"] == 0.0
    assert gold(task, best.replace("is", "is kinda"))["brevity"] == 0.5
    assert gold(task, best.replace("A bright topic", "Paint is dull"))["courtesy"] == 0.5
    assert gold(task, best[:-1])["ending"] == 0.0
    assert gold(task, best[:-1] + " and.")["ending"] == 0.0
    assert gold(task, best, ended=False)["ending"] == 0.0
    assert gold(task, best + " word" * 35)["brevity"] < 0.5
    assert gold(task.facts, best) == gold(task, best)


def test_weights_sum_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)


@given(text=st.text(), index=st.integers(0, 11), ended=st.booleans())
def test_gold_scores_any_text(text: str, index: int, ended: bool) -> None:
    task = world.family_tasks(FAMILIES[index % len(FAMILIES)])[0]
    criteria = gold(task, text, ended)
    assert set(criteria) == set(WEIGHTS)
    assert all(0.0 <= value <= 1.0 for value in criteria.values())
    assert 0.0 <= gold_score(criteria) <= 1.0


def test_nothing_earns_nothing() -> None:
    for text in ("", "   ", "\n", "…!?"):
        assert gold_score(gold(tasks("tune", 1)[0], text)) == 0.0


def test_every_skill_makes_a_conversation() -> None:
    rng = random.Random(0)
    assert set(skills.SHARES) == set(skills.SKILLS)
    assert sum(skills.SHARES.values()) == pytest.approx(1.0)
    for skill in skills.SKILLS.values():
        messages = skill(tasks("train", 1)[0], rng)
        assert [message["role"] for message in messages][-2:] == ["user", "assistant"]
        assert all(message["content"] for message in messages)


def test_the_model_folder_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir() if path.is_file()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"chat_template.jinja"} <= set(files)
    assert sum(files.values()) <= 6_000_000
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert all(config[width] % 64 == 0 for width in ("hidden_size", "intermediate_size", "vocab_size"))
