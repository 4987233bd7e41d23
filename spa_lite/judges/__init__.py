"""Every judge there is, in one table, and the one way to open them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spa_lite import files
from spa_lite.backend import INIT, POLICY
from spa_lite.errors import RecipeError
from spa_lite.judge import Scorer, no_reference
from spa_lite.judges import controls
from spa_lite.judges.controls import Gold
from spa_lite.judges.given import Label, Order
from spa_lite.judges.own import Implicit, Likelihood, Penalised
from spa_lite.opinion import Judge
from spa_lite.recipe import JudgeSettings, Recipe

if TYPE_CHECKING:
    from spa_lite.judges.reward import Classifier
    from spa_lite.models import Models

LoadClassifier = Callable[[str, str, bool], "Classifier"]
"""(folder or hub name, device, trust_remote_code) -> a classifier: `spa_lite.backends.classifiers.load`."""


@dataclass(frozen=True)
class Setup:
    """What judges are opened with. `sums` are scorers of policy and reference to use instead of the models'."""

    recipe: Recipe
    models: Models
    load_classifier: LoadClassifier | None = None
    gold: Gold | None = None
    round_: int = 0
    name: str | None = None
    sums: tuple[Scorer, Scorer] | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Kind:
    """A row of the table. `policy`: it asks the policy model; `sums`: for log-probabilities alone. `needs` and `takes`
    are the settings of `OWN` that must and that may be given. `asks`: what it asks in words. `rounds`: its numbers come
    from a model in this process, whose rounding depends on the batch. `origin`: it looks at nothing but where answers
    come from, which only the samples of a run say."""

    open: Callable[[Setup], Judge]
    policy: bool = False
    sums: bool = False
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    asks: Literal["pair", "score", "rubric"] | None = None
    rounds: bool = False
    origin: bool = False

    @property
    def uses(self) -> tuple[str, ...]:
        """Settings that must or may be given."""
        return self.needs + self.takes


OWN = {"url": "--judge-url", "model": "--judge-model", "prompt": "--judge-prompt", "swap": "--no-swap"}
"""Settings that only some judges use, with the flags that give them another value than the default."""
DEFAULTS = JudgeSettings()


def _implicit(s: Setup) -> Judge:
    policy, reference = s.sums or (s.models.scorer(POLICY), _reference(s))
    return Implicit(policy, reference, s.recipe.loss.beta, s.recipe.judge.length_penalty, lambda: s.models.fingerprint)


def _reference(s: Setup) -> Scorer:
    if s.recipe.judge.reference == "none":
        return no_reference
    return s.models.other_alone if s.models.has_other_reference else s.models.scorer(INIT)


def _likelihood(s: Setup) -> Judge:
    policy = s.sums[0] if s.sums else s.models.scorer(POLICY)
    return Likelihood(policy, s.recipe.loss.beta, s.recipe.judge.length_penalty, lambda: s.models.fingerprint)


def _self_pair(s: Setup) -> Judge:
    from spa_lite.judges.asked import PairJudge
    from spa_lite.judges.wording import wording

    return PairJudge(_local(s), wording("pair", s.recipe).template, "self-pair", s.recipe.judge.swap)


def _self_score(s: Setup) -> Judge:
    from spa_lite.judges.asked import ScoreJudge
    from spa_lite.judges.wording import wording

    put = wording("score", s.recipe)
    return _penalised(ScoreJudge(_local(s), put.template, "self-score", put.options), s.recipe)


def _self_rubric(s: Setup) -> Judge:
    from spa_lite.judges.asked import RubricJudge
    from spa_lite.judges.wording import wording

    j, template = s.recipe.judge, wording("rubric", s.recipe).template
    judge = RubricJudge(_local(s), template, "self-rubric", j.tries, j.temp, s.recipe.seed, s.round_)
    return _penalised(judge, s.recipe)


def _penalised(judge: Judge, recipe: Recipe) -> Judge:
    penalty = recipe.judge.length_penalty
    return Penalised(judge, penalty) if penalty else judge


def _local(s: Setup) -> Any:
    from spa_lite.asking import LocalModel

    i = s.recipe.inputs
    name = s.name or " + ".join(Path(part).name for part in (i.model or "built-in model", i.adapter_path) if part)
    return LocalModel(s.models.backend, POLICY, name)


def _reward(s: Setup) -> Judge:
    from spa_lite.judges.reward import PairEncoderJudge, RewardJudge

    r = s.recipe
    if s.load_classifier is None:
        raise RecipeError("judge.by=reward-model cannot be opened here: nothing that loads classifiers was given")
    assert r.judge.model
    classifier = s.load_classifier(r.judge.model, r.inputs.device, r.model.trust_remote_code)
    if not classifier.compares:
        return RewardJudge(classifier, r.judge.length_penalty)
    if r.judge.length_penalty:
        raise RecipeError(f"judge.length_penalty needs a reward per answer, and {r.judge.model} compares two answers")
    return PairEncoderJudge(classifier)


def _openai(s: Setup) -> Judge:
    from spa_lite.judges.asked import PairJudge
    from spa_lite.judges.wording import wording
    from spa_lite.server import ChatServer

    j = s.recipe.judge
    assert j.url
    assert j.model
    return PairJudge(ChatServer(j.url, j.model, s.cache), wording("pair", s.recipe).template, "openai", j.swap)


def _gold(s: Setup) -> Judge:
    if s.gold is None:
        raise RecipeError("judge.by=gold needs a gold rule, which only the lesson has; use another --judge")
    return controls.Truth(s.gold)


TABLE: dict[str, Kind] = {
    "implicit": Kind(_implicit, policy=True, sums=True, rounds=True),
    "likelihood": Kind(_likelihood, policy=True, sums=True, rounds=True),
    "self-pair": Kind(_self_pair, policy=True, takes=("prompt", "swap"), asks="pair", rounds=True),
    "self-score": Kind(_self_score, policy=True, takes=("prompt",), asks="score", rounds=True),
    "self-rubric": Kind(_self_rubric, policy=True, takes=("prompt",), asks="rubric", rounds=True),
    "reward-model": Kind(_reward, needs=("model",), rounds=True),
    "openai": Kind(_openai, needs=("url", "model"), takes=("prompt", "swap"), asks="pair"),
    "order": Kind(lambda s: Order(s.recipe.candidates.kinds), origin=True),
    "label": Kind(lambda s: Label(), origin=True),
    "longest": Kind(lambda s: controls.Longest()),
    "random": Kind(lambda s: controls.Random(s.recipe.seed, s.round_)),
    "gold": Kind(_gold),
}
"""The values of `judge.by`."""


def check(recipe: Recipe) -> Kind:
    """The judge's row. Raises RecipeError for a setting that it needs and has not, or has and neither it nor the judge
    of `pairing.gap_judge` can use; and for a question that cannot be asked."""
    from spa_lite.judges.wording import wording

    by, gap, given = recipe.judge.by, recipe.pairing.gap_judge, _given(recipe)
    kind = TABLE[by]
    if lacking := [OWN[name] for name in kind.needs if name not in given]:
        raise RecipeError(f"--judge {by} needs {' and '.join(lacking)}; give {'it' if len(lacking) == 1 else 'them'}")
    for name in given:
        if name not in kind.uses and not (gap and name in TABLE[gap].uses):
            users = " or ".join(other for other, row in TABLE.items() if name in row.uses)
            raise RecipeError(f"--judge {by} has no use for {OWN[name]}; leave it out, or choose --judge {users}")
    if by == "self-rubric" and recipe.judge.tries > 1 and not recipe.judge.temp:
        raise RecipeError("judge.temp=0 gives the same grade every time: raise --judge-temp, or give --judge-tries 1")
    if kind.asks:
        wording(kind.asks, recipe)
    return kind


def check_origin(recipe: Recipe) -> None:
    """Raise RecipeError for a judge that looks at where answers come from, beside answers that do not say it."""
    by = recipe.judge.by
    if TABLE[by].origin:
        raise RecipeError(
            f"--judge {by} goes by where answers come from, which only samples of a run say; choose another --judge"
        )


def gap_of(recipe: Recipe) -> Recipe | None:
    """The recipe with the judge of `pairing.gap_judge` in the judge's place; None where that is nobody else.

    A setting such as judge.model is the judge's if it uses it, else the gap judge's. Raises RecipeError for one that
    the gap judge needs and has not.
    """
    by, gap = recipe.judge.by, recipe.pairing.gap_judge
    if gap is None or gap == by:
        return None
    free = [name for name in _given(recipe) if name in TABLE[gap].uses and name not in TABLE[by].uses]
    lacking = [name for name in TABLE[gap].needs if name not in free]
    if taken := [OWN[name] for name in lacking if name in TABLE[by].uses]:
        raise RecipeError(f"--gap-judge {gap} needs {taken[0]}, which --judge {by} has; choose another --gap-judge")
    if lacking:
        raise RecipeError(f"--gap-judge {gap} needs {' and '.join(OWN[name] for name in lacking)}; give that, too")
    reset = {name: getattr(DEFAULTS, name) for name in OWN if name not in free}
    judge = replace(recipe.judge, by=gap, length_penalty=0.0, **reset)
    found = replace(recipe, judge=judge, pairing=replace(recipe.pairing, gap_judge=None))
    check(found)
    return found


def _given(recipe: Recipe) -> list[str]:
    """The settings of `OWN` that are not left at their defaults."""
    return [name for name in OWN if getattr(recipe.judge, name) != getattr(DEFAULTS, name)]


def depends(recipe: Recipe) -> dict[str, str]:
    """What a judge's opinions depend on beside the settings of its stage, as inputs of that: the text of its question,
    its model. Empty for judges that have neither. A server's address is not among them. What the gap judge depends on
    is there, too."""
    from spa_lite.judges.wording import wording

    j, found = recipe.judge, {}
    if asks := TABLE[j.by].asks:
        found["judge prompt"] = wording(asks, recipe).key
    if j.model and "model" in TABLE[j.by].needs:
        found["judge model"] = j.model if j.by == "openai" else _digest(Path(j.model.removeprefix("pair:")), j.model)
    if gap := gap_of(recipe):
        found |= {f"gap {name}": value for name, value in depends(gap).items()}
    return found


@cache
def _digest(path: Path, otherwise: str = "") -> str:
    """Digest of a file, or of a model folder's files; of a hub name, the name."""
    if path.is_dir():
        kept = [p for p in sorted(path.iterdir()) if p.suffix in {".json", ".safetensors"}]
        return files.digest_bytes("".join(p.name + files.digest_file(p) for p in kept).encode())
    return files.digest_file(path) if path.is_file() else otherwise


def open_judge(
    recipe: Recipe,
    models: Models,
    load_classifier: LoadClassifier | None = None,
    gold: Gold | None = None,
    round_: int = 0,
    name: str | None = None,
    sums: tuple[Scorer, Scorer] | None = None,
    cache: Path | None = None,
) -> Judge:
    """The judge that a recipe names. Whoever opens one that asks the policy has bound POLICY (and INIT) before.

    `sums` are scorers of policy and reference, such as sums that are known already; without them the models score.
    `name` is what the policy is called beside its own opinions; `cache` is a folder for a server's replies.
    Raises RecipeError for contradictory settings.
    """
    return check(recipe).open(Setup(recipe, models, load_classifier, gold, round_, name, sums, cache))
