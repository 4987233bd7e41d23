"""The table of judges: each can be opened, contradictions are refused, and the numbers are those of the formulas."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite import backends, judges, prepare
from spa_lite.backend import INIT, POLICY
from spa_lite.errors import RecipeError
from spa_lite.judge import best_and_worst, decide, ranked, rows_of
from spa_lite.judges.controls import Longest, Random, Truth
from spa_lite.judges.given import Label, Order, ranking
from spa_lite.judges.own import Implicit, Likelihood, Penalised
from spa_lite.judges.wording import read_template
from spa_lite.keys import digest, generator
from spa_lite.lesson import source
from spa_lite.opinion import Opinion, tallied
from spa_lite.recipe import Candidates, JudgeSettings, Recipe, build, that_matter
from spa_lite.records import Completion, Message, Pair, Row, Sample
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


def of(kinds: Sequence[Any], *texts: str) -> Sample:
    """The same with the kinds of its answers."""
    sample = sample_of(*texts)
    answers = zip(sample.completions, kinds, strict=False)
    return msgspec.structs.replace(
        sample, completions=tuple(msgspec.structs.replace(answer, kind=kind) for answer, kind in answers)
    )


def given_sums(*sums: Sequence[float]) -> Callable[[Sequence[Row]], list[tuple[float, ...]]]:
    """A scorer that knows its answers."""
    return lambda rows: [tuple(s) for s in sums]


GIVEN: dict[str, dict[str, Any]] = {
    "reward-model": {"model": "letters"},
    "openai": {"model": "m", "url": "http://127.0.0.1:9/v1"},
}
"""What a judge needs beside its name."""

KINDS: dict[str, tuple[Any, ...]] = {"label": ("rejected", "chosen", "chosen"), "order": ("gold", "greedy", "init")}
"""Where the answers come from that a judge by construction can compare."""
ASKED_HERE = [by for by in judges.TABLE if by != "openai"]
CANDIDATES: dict[str, list[Any]] = {"label": ["pair"], "order": ["init", "gold", "greedy"]}


def opened(by: str, compares: bool = False, **changes: Any) -> Any:
    """A judge on the toy, as a command opens it."""
    recipe = recipe_of(by=by, **GIVEN.get(by, {}), **changes)
    recipe = replace(recipe, candidates=Candidates(CANDIDATES.get(by, ["sample"])))
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
        kinds = KINDS.get(by, ("sample",) * 3)
        found = judge([of(kinds, "ab", "cde"), of(kinds, "a", "b", "c")], lambda: ticks.append(1))
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
    ({"by": "self-score", "swap": False}, "no use for --no-swap; leave it out, or choose --judge self-pair or openai"),
    ({"by": "implicit", "swap": False}, "no use for --no-swap"),
    ({"by": "self-rubric", "temp": 0.0}, "raise --judge-temp, or give --judge-tries 1"),
    ({"by": "order"}, "sample is the only one; name two or more in candidates.kinds"),
    ({"by": "order", "length_penalty": 0.1}, "needs a judge with a reward per answer"),
    ({"by": "label", "length_penalty": 0.1}, "needs a judge with a reward per answer"),
]


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS, ids=[w for _, w in CONTRADICTIONS])
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    models: Any = SimpleNamespace(backend=SimpleNamespace(fingerprint="f"))
    with pytest.raises(RecipeError) as caught:
        judges.open_judge(recipe_of(**changes), models, lambda *_: Classifier())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_another_judge_may_stay() -> None:
    """What a recipe says of self-rubric must not keep another judge out."""
    assert judges.check(recipe_of(by="random", tries=5, temp=0.1, adapter="lesson")) is judges.TABLE["random"]


def test_a_question_that_cannot_be_put_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("{conversation} {answer}")
    judges.check(recipe_of(by="self-rubric", prompt=str(tmp_path / "mine.txt")))
    with pytest.raises(RecipeError, match=r"lacks \{answer_1\} and"):
        judges.check(recipe_of(by="self-pair", prompt=str(tmp_path / "mine.txt")))


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


# --- by construction --------------------------------------------------------------------------------------------------


def test_the_order_of_the_candidates_decides() -> None:
    """The first kind named is the best; `pair` stands for the chosen, then the rejected answer; one kind ties."""
    judge = Order(["gold", "pair", "sample"])
    assert judge.name == "order gold > chosen > rejected > sample"
    kinds = ("sample", "rejected", "gold", "sample", "chosen")
    (opinion,) = judge([of(kinds, "a", "b", "c", "d", "e")])
    assert opinion == Opinion(scores=(-3, -2, 0, -3, -1))
    assert Order(["sample", "gold"])([of(("sample", "gold"), "a", "b")])[0].scores == (0, -1)
    assert Order(["sample", "gold"]).key != Order(["gold", "sample"]).key
    assert ranking(["sample", "greedy", "sample"]) == ("sample", "greedy")


def test_order_refuses_what_has_no_place() -> None:
    with pytest.raises(RecipeError, match="sample is the only one"):
        Order(["sample"])
    with pytest.raises(RecipeError, match=r"prompt s has an answer of kind greedy; name it in candidates\.kinds"):
        Order(["gold", "sample"])([of(("gold", "greedy"), "a", "b")])


def test_the_label_decides() -> None:
    assert Label()([of(("rejected", "chosen"), "a", "b")])[0].scores == (0, 1)
    with pytest.raises(RecipeError, match="labelled answers only, and prompt s has one of kind sample"):
        Label()([of(("chosen", "sample"), "a", "b")])


# --- who else judges, and what that depends on ------------------------------------------------------------------------


def with_gap(by: str, gap: str | None, **changes: Any) -> Recipe:
    """A recipe with two judges."""
    kinds = {"candidates.kinds": ["gold", "sample"], "pairing.gap_judge": gap}
    return small_recipe({}, kinds | {"judge.by": by} | {f"judge.{name}": value for name, value in changes.items()})


def test_the_gap_judge_takes_the_judges_place() -> None:
    """With what the judge itself does not use, and with what it needs."""
    recipe = with_gap("order", "reward-model", model="letters")
    judges.check(recipe)
    gap = judges.gap_of(recipe)
    assert gap is not None
    assert (gap.judge.by, gap.judge.model, gap.pairing.gap_judge) == ("reward-model", "letters", None)
    judge = judges.open_judge(gap, prepare.models_of(gap, backends.load), lambda *_: Classifier())
    assert judge([sample_of("xx", "y")])[0].scores == (2, 0)
    alone = judges.gap_of(with_gap("self-pair", "self-score", swap=False, prompt=None, length_penalty=0.0))
    assert alone is not None
    assert alone.judge.swap, "that was said of the judge itself"
    assert judges.gap_of(with_gap("random", "self-pair", swap=False)) != judges.gap_of(with_gap("random", "self-pair"))
    assert judges.gap_of(with_gap("random", None)) is None
    assert judges.gap_of(with_gap("self-score", "self-score")) is None, "the judge's own scores are there already"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"by": "order", "gap": "reward-model"}, "--gap-judge reward-model needs --judge-model; give that, too"),
        ({"by": "order", "gap": "openai", "model": "m"}, "--gap-judge openai needs --judge-url; give that"),
        (
            {"by": "reward-model", "gap": "openai", "model": "m"},
            "--gap-judge openai needs --judge-model, which --judge reward-model has; choose another --gap-judge",
        ),
        ({"by": "order", "gap": "self-score", "swap": False}, "--judge order has no use for --no-swap"),
    ],
)
def test_a_gap_judge_that_lacks_something_is_refused(settings: dict[str, Any], words: str) -> None:
    verb = judges.check if "swap" in settings else judges.gap_of
    with pytest.raises(RecipeError, match=words):
        verb(with_gap(**settings))


def test_what_a_stage_depends_on(tmp_path: Path) -> None:
    """The words that are really put, and the model; of the gap judge, too."""
    (tmp_path / "same.txt").write_text(read_template("pair"))
    shipped = judges.depends(recipe_of(by="self-pair"))
    assert set(shipped) == {"judge prompt"}
    assert judges.depends(recipe_of(by="self-pair", prompt=str(tmp_path / "same.txt"))) == shipped
    assert judges.depends(build({"test": {"judge.by": "self-pair"}})[0]) != shipped, (
        "the built-in model was taught others"
    )
    server = {"model": "m", "url": "http://127.0.0.1:9/v1"}
    assert judges.depends(recipe_of(by="openai", **server)) == shipped | {"judge model": "m"}
    gap = judges.depends(with_gap("order", "openai", **server))
    assert gap == {"gap judge prompt": shipped["judge prompt"], "gap judge model": "m"}
    assert judges.depends(recipe_of(by="random")) == {}


def test_settings_that_change_nothing_are_not_in_the_key() -> None:
    def kept(recipe: Recipe) -> set[str]:
        return {path for path in that_matter(recipe, "judge") if path in {"judge.swap", "judge.tries", "judge.temp"}}

    assert kept(recipe_of(by="random")) == set()
    assert kept(recipe_of(by="self-pair")) == {"judge.swap"}
    assert kept(recipe_of(by="self-rubric")) == {"judge.tries", "judge.temp"}
    assert kept(with_gap("order", "self-pair")) == {"judge.swap"}


def test_who_says_how_sure_it_is() -> None:
    """A probability where the judge has one, and none made up."""
    sure = {by: opened(by)([of(KINDS.get(by, ("sample",) * 2), "ab", "cde")])[0].p(0, 1) for by in ASKED_HERE}
    known = {by for by, p in sure.items() if p is not None}
    assert known == {"implicit", "likelihood", "self-pair", "reward-model"}
    assert all(0 <= (sure[by] or 0) <= 1 for by in known)
    assert opened("reward-model", compares=True)([sample_of("x", "y")])[0].p(0, 1) == pytest.approx(
        1 / (1 + math.exp(-1))
    )


# --- the lesson model, asked what it was taught -----------------------------------------------------------------------


def agreement(count: int, **changes: Any) -> dict[str, float]:
    """How often judges of the built-in model are right about pairs of two writers; how many replies are unread."""
    recipe = build({"test": {"inputs.backend": "torch", "inputs.device": "cpu"}})[0]
    models = prepare.models_of(recipe, backends.load)
    models.backend.bind(POLICY, None)
    pairs = source.pairs("tune", count, 5)
    samples = [written(pair, (pair.chosen, pair.rejected)[:: 1 if i % 2 else -1]) for i, pair in enumerate(pairs)]
    found = {}
    for name, settings in changes.items():
        changed = replace(recipe, judge=replace(recipe.judge, **settings))
        opinions = judges.open_judge(changed, models)(samples)
        firsts = [opinion.scores[0] - opinion.scores[1] for opinion in opinions]
        right = [0.5 if d == 0 else float((d > 0) == bool(i % 2)) for i, d in enumerate(firsts)]
        assert tallied(opinions)["unread"] <= 0.05 * count
        found[name] = sum(right) / count
    return found


def written(pair: Pair, texts: Sequence[str]) -> Sample:
    """Two answers as a sample."""
    answers = tuple(Completion(ids=(), text=text, ended="human") for text in texts)
    return Sample(id=pair.id, messages=pair.messages, prompt_ids=(), completions=answers)


def test_the_lesson_model_judges_better_than_chance() -> None:
    pytest.importorskip("torch")
    rubric = {"by": "self-rubric", "tries": 1}
    found = agreement(40, pair={"by": "self-pair"}, score={"by": "self-score"}, rubric=rubric)
    assert min(found.values()) > 0.7, found


@pytest.mark.long
def test_both_orders_and_more_tries_make_better_judges() -> None:
    """On 400 pairs: two orders against one, three tries against one, all grades' probabilities against drawn ones."""
    pytest.importorskip("torch")
    found = agreement(
        400,
        both={"by": "self-pair"},
        one={"by": "self-pair", "swap": False},
        score={"by": "self-score"},
        three={"by": "self-rubric", "tries": 3},
        single={"by": "self-rubric", "tries": 1},
    )
    assert found["both"] > found["one"] + 0.03, found
    assert found["score"] > found["three"] > found["single"], found
