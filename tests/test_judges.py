"""The table of judges: each can be opened, contradictions are refused, and the numbers are those of the formulas."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite import backends, judges, prepare
from spa_lite.backend import INIT, POLICY
from spa_lite.errors import RecipeError
from spa_lite.judge import best_and_worst, decide, ranked, rows_of
from spa_lite.judges.controls import Longest, Random, Truth
from spa_lite.judges.own import Implicit, Likelihood, Penalised
from spa_lite.keys import digest, generator
from spa_lite.opinion import Opinion
from spa_lite.recipe import JudgeSettings, Recipe
from spa_lite.records import Completion, Message, Row, Sample
from tests.small import small_recipe


class Classifier:
    """Stands for a reward model: an answer is worth its number of letters x."""

    name, fingerprint, compares, cut = "letters", "f", False, 0

    def tokens(self, text: str) -> int:
        return len(text)

    def scores(
        self, conversations: Sequence[Sequence[Message]], tick: Callable[[], None] = lambda: None
    ) -> list[float]:
        for _ in conversations:
            tick()
        return [float(c[-1].content.count("x")) for c in conversations]

    def comparisons(self, questions: Sequence[Any], tick: Callable[[], None] = lambda: None) -> list[float]:
        return [float(x.count("x") - y.count("x")) for _, x, y in questions]


def recipe_of(**changes: Any) -> Recipe:
    """The small recipe with settings of the judge."""
    return small_recipe({}, {f"judge.{name}": value for name, value in changes.items()})


def sample_of(*texts: str, name: str = "s") -> Sample:
    """A sample whose answers are these texts, one id per character."""
    answers = tuple(Completion(ids=tuple(map(ord, t)), text=t, ended="eos") for t in texts)
    question = (Message(role="user", content="?"),)
    return Sample(id=name, messages=question, prompt_ids=(256, 259, 63), completions=answers)


def given_sums(*sums: Sequence[float]) -> Callable[[Sequence[Row]], list[tuple[float, ...]]]:
    """A scorer that knows its answers."""
    return lambda rows: [tuple(s) for s in sums]


GIVEN: dict[str, dict[str, Any]] = {
    "reward-model": {"model": "letters"},
    "openai": {"model": "m", "url": "http://127.0.0.1:9/v1"},
}
"""What a judge needs beside its name."""


def opened(by: str, compares: bool = False, **changes: Any) -> Any:
    """A judge on the toy, as a command opens it."""
    recipe = recipe_of(by=by, **GIVEN.get(by, {}), **changes)
    models = prepare.models_of(recipe, backends.load)
    if judges.TABLE[by].policy:
        for role in (INIT, POLICY):
            models.backend.bind(role, None)
    kind = type("Other", (Classifier,), {"compares": compares})
    return judges.open_judge(recipe, models, lambda *_: kind(), lambda s, c: float(len(c.text)), 1)


def test_the_table_has_every_judge_of_the_recipe() -> None:
    hints = typing.get_type_hints(JudgeSettings)
    assert set(judges.TABLE) == set(typing.get_args(hints["by"]))


@pytest.mark.parametrize("by", judges.TABLE)
def test_every_judge_can_be_opened(by: str) -> None:
    """It has a name and a key, and (a server aside) one opinion per sample, a score per answer, a tick each."""
    if by == "openai":
        pytest.importorskip("openai")
    judge = opened(by)
    assert by in judge.name
    assert len(judge.key) == 32
    if by != "openai":
        ticks: list[int] = []
        found = judge([sample_of("ab", "cde"), sample_of("a", "b", "c")], lambda: ticks.append(1))
        assert [len(opinion.scores) for opinion in found] == [2, 3]
        assert len(ticks) == 2
        assert all(math.isfinite(score) for opinion in found for score in opinion.scores)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"by": "openai"}, "needs --judge-url and --judge-model; give them"),
    ({"by": "openai", "url": "http://127.0.0.1:9/v1"}, "needs --judge-model; give it"),
    ({"by": "openai", "model": "m"}, "needs --judge-url; give it"),
    ({"by": "reward-model"}, "needs --judge-model"),
    ({"by": "reward-model", "model": "m", "prompt": "p.txt"}, "no use for --judge-prompt"),
    ({"by": "reward-model", "model": "m", "url": "http://x"}, "no use for --judge-url; leave it out, or choose"),
    (
        {"by": "implicit", "model": "m"},
        "no use for --judge-model; leave it out, or choose --judge reward-model or openai",
    ),
    ({"by": "random", "prompt": "p.txt"}, "no use for --judge-prompt"),
    ({"by": "self-pair", "prompt": "nowhere.txt"}, "nowhere.txt"),
    ({"by": "self-score", "url": "http://x"}, "no use for --judge-url"),
]


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS, ids=[w for _, w in CONTRADICTIONS])
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    recipe = recipe_of(**changes)
    models: Any = SimpleNamespace(backend=SimpleNamespace(fingerprint="f"))
    with pytest.raises(RecipeError) as caught:
        judges.open_judge(recipe, models, lambda *_: Classifier())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_comparing_classifier_takes_no_penalty() -> None:
    assert opened("reward-model", compares=True)([sample_of("x", "y")])[0].verdicts
    with pytest.raises(RecipeError, match="compares two answers"):
        opened("reward-model", compares=True, length_penalty=0.1)


def test_no_gold_rule_no_gold_judge() -> None:
    with pytest.raises(RecipeError, match="only the lesson has"):
        judges.open_judge(recipe_of(by="gold"), prepare.models_of(recipe_of(), backends.load))
    with pytest.raises(RecipeError, match="knows no truth about prompt s"):
        Truth(lambda s, c: None)([sample_of("a", "b")])


def test_the_question_can_be_replaced(tmp_path: Path) -> None:
    """Another prompt file, another key."""
    (tmp_path / "mine.txt").write_text("{conversation} A {answer_1} B {answer_2}")
    assert opened("self-pair", prompt=str(tmp_path / "mine.txt")).key != opened("self-pair").key


@pytest.mark.parametrize("change", [{"model": "other"}, {"prompt": "mine.txt"}])
def test_a_server_is_told_apart(change: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model it is asked for and by the question; the address is who is named."""
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("{conversation} A {answer_1} B {answer_2}")

    def judge(**changes: str) -> Any:
        recipe = recipe_of(by="openai", **(GIVEN["openai"] | changes))
        return judges.open_judge(recipe, prepare.models_of(recipe, backends.load))

    assert judge(**change).key != judge().key
    assert "http://127.0.0.1:7/v1" in judge(url="http://127.0.0.1:7/v1").name


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_eq_13_by_hand() -> None:
    """r - a |y|: a reward of .1 * 2 nats less .05 for each of three tokens."""
    judge = Implicit(given_sums((-3.0, -5.0)), given_sums((-5.0, -4.0)), beta=0.1, length_penalty=0.05)
    (opinion,) = judge([sample_of("abc", "de")])
    assert opinion.scores == pytest.approx((0.2 - 0.15, -0.1 - 0.1))
    assert opinion.p(0, 1) == pytest.approx(1 / (1 + math.exp(-0.25)))
    plain = Implicit(given_sums((-3.0, -5.0)), given_sums((-5.0, -4.0)), beta=0.1)([sample_of("abc", "de")])[0]
    assert plain.scores == (0.1 * 2.0, 0.1 * -1.0)


def test_the_likelihood_asks_no_reference() -> None:
    (opinion,) = Likelihood(given_sums((-3.0, -5.0)), beta=0.1)([sample_of("abc", "de")])
    assert opinion.scores == (0.1 * -3.0, 0.1 * -5.0)
    (opinion,) = Likelihood(given_sums((-3.0, -5.0)), beta=1.0, length_penalty=2.0)([sample_of("abc", "de")])
    assert opinion.scores == (-9.0, -9.0)


def test_a_penalty_on_another_judge() -> None:
    (opinion,) = Penalised(Longest(), 0.5)([sample_of("abc", "de")])
    assert opinion.scores == (1.5, 1.0)
    assert "0.5 per token" in opened("self-score", length_penalty=0.5).name


def test_sums_may_come_from_anywhere() -> None:
    """Given sums replace the models, which are not asked."""
    models: Any = None
    sums = (given_sums((-3.0, -5.0)), given_sums((-5.0, -4.0)))
    (opinion,) = judges.open_judge(recipe_of(), models, sums=sums)([sample_of("abc", "de")])
    assert opinion.scores == (0.1 * 2.0, 0.1 * -1.0)
    (opinion,) = judges.open_judge(recipe_of(by="likelihood"), models, sums=sums)([sample_of("abc", "de")])
    assert opinion.scores == (0.1 * -3.0, 0.1 * -5.0)


def test_the_implicit_reward_is_that_of_the_backend() -> None:
    """Scored under both roles of the toy; without a reference its sums are 0."""
    samples = [sample_of("red cat", "blue"), sample_of("dog", "sun moon", name="t")]
    recipe = recipe_of(reference="none")
    models = prepare.models_of(recipe, backends.load)
    models.backend.bind(POLICY, None)
    sums = dict(models.backend.logprob(rows_of(samples), POLICY))
    found = judges.open_judge(recipe, models)(samples)
    assert [o.scores for o in found] == [tuple(0.1 * score.logp for score in sums[i]) for i in range(2)]


def test_controls() -> None:
    """Length is in tokens, or in characters where there are none; the coin has its own stream per sample and round."""
    text_only = Sample(
        id="s", messages=(), prompt_ids=(), completions=(Completion(ids=(), text="four", ended="human"),) * 2
    )
    assert Longest()([sample_of("ab", "cde"), text_only])[0].scores == (2, 3)
    assert Longest()([text_only])[0].scores == (4, 4)
    (coin,) = Random(7, 2)([sample_of("ab", "cde")])
    assert coin.scores == tuple(generator(digest("judge", 7, 2, "s")).random(2).tolist())
    assert coin != Random(7, 1)([sample_of("ab", "cde")])[0]
    assert (coin.odds, coin.p(0, 1)) == (False, None)
    assert Truth(lambda s, c: 2.0 * len(c.text))([sample_of("ab", "cde")])[0].scores == (4, 6)


# --- one sample decided -----------------------------------------------------------------------------------------------

BY_HAND: list[tuple[dict[str, Any], tuple[float, float], str]] = [
    ({}, (-3.0, -5.0), "a"),
    ({}, (-5.0, -3.0), "b"),
    ({}, (-4.0, -4.0), "b"),
    ({"tie": "a"}, (-4.0, -4.0), "a"),
    ({"by": "longest"}, (-3.0, -5.0), "b"),
    ({"length_penalty": 0.1}, (-3.0, -5.0), "a"),
    ({"length_penalty": 0.01}, (-5.0, -4.9), "a"),
]
"""(settings, policy sums, label) of answers of 5 and 10 tokens, with reference sums of -4 and -4."""


@pytest.mark.parametrize(("settings", "policy", "label"), BY_HAND)
def test_decisions_by_hand(settings: dict[str, Any], policy: tuple[float, float], label: str) -> None:
    """Margin and p are those of the log-ratios whoever judges; label, tie and scores are the judge's own."""
    recipe, sample, reference = recipe_of(**settings), sample_of("short", "longer one"), (-4.0, -4.0)
    models: Any = None
    (opinion,) = judges.open_judge(recipe, models, sums=(given_sums(policy), given_sums(reference)))([sample])
    j = decide(sample, policy, reference, opinion, recipe)
    assert j.label == label
    assert (j.score_a, j.score_b) == opinion.scores
    assert j.margin == 0.1 * ((policy[0] + 4) - (policy[1] + 4))
    assert j.p == pytest.approx(1 / (1 + math.exp(-j.margin)))
    assert j.tie == (j.score_a == j.score_b)
    assert (j.tokens_a, j.tokens_b) == (5, 10)


def test_best_and_worst_of_many() -> None:
    sample, opinion = sample_of("a", "b", "c", "d"), Opinion(scores=(3.0, 4.0, 1.0, 2.0))
    j = decide(sample, (0.0,) * 4, (0.0,) * 4, opinion, recipe_of())
    assert (j.a.text, j.b.text, j.label, j.score_a, j.score_b) == ("b", "c", "a", 4.0, 1.0)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.sampled_from("ab"))
def test_ranking(scores: list[int], tie: str) -> None:
    """A permutation in descending order whose ties follow the rule, and whose ends are best and worst."""
    order = ranked([float(s) for s in scores], tie)
    assert sorted(order) == list(range(len(scores)))
    pairs = list(itertools.pairwise(order))
    assert all(scores[i] > scores[j] or (scores[i] == scores[j] and (i < j) == (tie == "a")) for i, j in pairs)
    assert best_and_worst([float(s) for s in scores], tie) == (order[0], order[-1])
