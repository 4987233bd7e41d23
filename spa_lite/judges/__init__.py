"""Every judge there is, in one table, and the one way to open them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite import files
from spa_lite.backend import INIT, POLICY
from spa_lite.errors import RecipeError
from spa_lite.judge import Scorer, no_reference
from spa_lite.judges import controls
from spa_lite.judges.controls import Gold
from spa_lite.judges.own import Implicit, Likelihood, Penalised
from spa_lite.opinion import Judge
from spa_lite.recipe import Recipe

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
    are the settings judge.model, judge.url and judge.prompt that must and that may be given. `rounds` says that its
    numbers come from a model in this process, whose rounding depends on the batch."""

    open: Callable[[Setup], Judge]
    policy: bool = False
    sums: bool = False
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    rounds: bool = False


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
    from spa_lite.judges.asked import PairJudge, read_template

    return PairJudge(_local(s), read_template("pair", s.recipe.judge.prompt), "self-pair")


def _self_score(s: Setup) -> Judge:
    from spa_lite.judges.asked import ScoreJudge, read_template

    judge = ScoreJudge(_local(s), read_template("score", s.recipe.judge.prompt), "self-score")
    penalty = s.recipe.judge.length_penalty
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
    from spa_lite.judges.asked import PairJudge, read_template
    from spa_lite.server import ChatServer

    j = s.recipe.judge
    assert j.url
    assert j.model
    return PairJudge(ChatServer(j.url, j.model, s.cache), read_template("pair", j.prompt), "openai")


def _gold(s: Setup) -> Judge:
    if s.gold is None:
        raise RecipeError("judge.by=gold needs a gold rule, which only the lesson has; use another --judge")
    return controls.Truth(s.gold)


TABLE: dict[str, Kind] = {
    "implicit": Kind(_implicit, policy=True, sums=True, rounds=True),
    "likelihood": Kind(_likelihood, policy=True, sums=True, rounds=True),
    "self-pair": Kind(_self_pair, policy=True, takes=("prompt",), rounds=True),
    "self-score": Kind(_self_score, policy=True, takes=("prompt",), rounds=True),
    "reward-model": Kind(_reward, needs=("model",), rounds=True),
    "openai": Kind(_openai, needs=("url", "model"), takes=("prompt",)),
    "longest": Kind(lambda s: controls.Longest()),
    "random": Kind(lambda s: controls.Random(s.recipe.seed, s.round_)),
    "gold": Kind(_gold),
}
"""The values of `judge.by`."""


def check(recipe: Recipe) -> Kind:
    """The judge's row. Raises RecipeError for a setting that it needs and has not, or has and cannot use."""
    by = recipe.judge.by
    kind = TABLE[by]
    lacking = [f"--judge-{name}" for name in kind.needs if not getattr(recipe.judge, name)]
    if lacking:
        raise RecipeError(f"--judge {by} needs {' and '.join(lacking)}; give {'it' if len(lacking) == 1 else 'them'}")
    for name in ("url", "model", "prompt"):
        if getattr(recipe.judge, name) and name not in (*kind.needs, *kind.takes):
            users = " or ".join(other for other, row in TABLE.items() if name in (*row.needs, *row.takes))
            raise RecipeError(f"--judge {by} has no use for --judge-{name}; leave it out, or choose --judge {users}")
    return kind


def depends(recipe: Recipe) -> dict[str, str]:
    """What a judge's opinions depend on beside the settings of its stage, as inputs of that: the text of its question,
    its model. Empty for judges that have neither. A server's address is not among them."""
    j = recipe.judge
    found = {}
    if j.prompt:
        found["judge prompt"] = _digest(Path(j.prompt))
    if j.model:
        found["judge model"] = j.model if j.by == "openai" else _digest(Path(j.model.removeprefix("pair:")), j.model)
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
