"""Where the numbers of an explanation come from: a round of a run folder, or any pairs with a policy and a reference.

In a run, tokens get their credit from the policy that the round began with, against the judge's reference; and what
training made of the pair is read from the run's own log. Elsewhere it is computed: the policy is taken for the model in
training and the reference for where it began, and one training step that changes nothing looks at both.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from spa_lite import data, guards, pairing
from spa_lite.backend import INIT, POLICY, PREVIOUS, Backend, Batch, Floats, Optimizer, Outcome
from spa_lite.credit import Credit, credit
from spa_lite.encode import encode_answers
from spa_lite.errors import DataError, RunError
from spa_lite.explain import Answer, Explanation, Trained, judged_terms, noisy, reasons, trained_terms
from spa_lite.files import lines_of
from spa_lite.fit import halving
from spa_lite.judge import best_and_worst, scorer
from spa_lite.losses import dpo
from spa_lite.objective import Window
from spa_lite.recipe import Recipe, build, for_round, read_yaml
from spa_lite.records import Completion, Judgement, Row, Sample, Side
from spa_lite.train import reference_of

Load = Callable[[Recipe], Backend]
REFERENCE = "reference"
"""The role of the judge's reference."""
FAR = 1e-2
"""Nats by which sums may differ from those that were stored, before that is said."""


# --- a pair of a run ----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A round of a run folder."""

    run: Path
    round: int

    def file(self, name: str, back: int = 0) -> Path:
        """A file of this round, or of one before it."""
        return self.run / "rounds" / str(self.round - back) / name


def place_of(path: Path) -> Place | None:
    """Which round of which run a file of judgements belongs to; None if it is no run's."""
    folder = path.resolve().parent
    run = folder.parent.parent
    is_round = path.name == "judgements.jsonl" and folder.parent.name == "rounds" and folder.name.isdigit()
    return Place(run, int(folder.name)) if is_round and (run / "recipe.yaml").is_file() else None


def explain_run(path: Path, row: int, load: Load, changes: Mapping[str, Any] | None = None) -> Explanation:
    """A pair of a round. `changes` are settings that win over the run's, such as the device.

    Raises RunError if the file lies in no run, DataError if there is no such row.
    """
    place = place_of(path)
    if place is None:
        raise RunError(f"{path} is no rounds/N/judgements.jsonl of a run; give that file, or pairs and a policy")
    recipe = build({"recipe.yaml": read_yaml(place.run / "recipe.yaml"), "command line": changes or {}})[0]
    judgement = _nth(enumerate(data.iter_jsonl(path, Judgement), 1), row, path)[1]
    notes: list[str] = []
    known = _credits(place, recipe, judgement, load, notes)
    chosen, rejected = (
        _stored(letter, side, known.get(letter, ()), notes)
        for letter, side in sorted([("a", judgement.a), ("b", judgement.b)], key=lambda s: s[0] != judgement.label)
    )
    if judgement.judge != "implicit":
        notes.append(f"The label is that of the judge {judgement.judge}; the implicit reward had no say in it.")
    seen, words = trained_in(place, recipe, judgement, notes)
    return Explanation(
        source=str(path),
        row=row,
        id=judgement.id,
        messages=judgement.messages,
        policy=f"π_{place.round - 1}, the policy that round {place.round} began with",
        reference=_reference_in_words(recipe, place.round),
        labelled_by=f"the run's judge ({judgement.judge})",
        chosen=chosen,
        rejected=rejected,
        judged=judged_terms(chosen, rejected, recipe.loss.beta),
        trained=trained_terms(seen, recipe, place.round) if seen else (),
        flagged=seen.softened if seen else None,
        why=reasons(seen, recipe) if seen else (words,),
        notes=tuple(notes),
    )


def _reference_in_words(recipe: Recipe, round_: int) -> str:
    if recipe.judge.reference == "none":
        return "none: likelihood alone"
    return f"π_{round_ - 2}" if recipe.judge.reference == "lagged" and round_ > 1 else "π_init"


def _stored(letter: str, side: Side, credits: tuple[Credit, ...], notes: list[str]) -> Answer:
    """An answer with the sums that the run stored, which are the judge's."""
    off = abs(fsum(c.logratio for c in credits) - side.logratio) if credits else 0.0
    if off > FAR:
        notes.append(
            f"The log-ratio of answer {letter} was {side.logratio:.4f} when it was judged, {off:.4f} from now."
        )
    return Answer(
        letter=letter,
        text=side.text,
        ended=side.ended,
        tokens=len(side.ids),
        policy=side.policy,
        reference=side.reference,
        credits=credits,
    )


def _credits(
    place: Place, recipe: Recipe, judgement: Judgement, load: Load, notes: list[str]
) -> dict[str, tuple[Credit, ...]]:
    """Credit of both answers, or a note that says what it would take."""
    i, needs = recipe.inputs, {}
    given = i.adapter_path or i.init_adapter
    init = Path(i.init_adapter) if i.init_adapter else None
    is_given = place.round == 1 and not guards.has_seed_stage(recipe)  # else the seed stage made π_0
    needs[POLICY] = (Path(given) if given else None) if is_given else place.file("adapter", back=1)
    lagged = recipe.judge.reference == "lagged" and place.round > 1
    if needs[POLICY] == init and not i.init_model and recipe.judge.reference != "none":
        notes.append("Policy and reference are both π_init in this round, so no log-ratio is other than 0.")
        return {}
    needs[REFERENCE] = place.file("adapter", back=2) if lagged else init
    if i.init_model and recipe.judge.reference == "init":
        notes.append("No credit per token: π_init is another model, and both are never in memory together.")
        return {}
    missing = [str(folder) for folder in needs.values() if folder and not folder.is_dir()]
    if missing:
        notes.append(f"No credit per token: {missing[0]} is not there (any more).")
        return {}
    backend = load(recipe)
    for role, adapter in needs.items():
        backend.bind(role, adapter)
    reference = None if recipe.judge.reference == "none" else REFERENCE
    return {
        letter: tuple(credit(backend, judgement.prompt_ids, side.ids, POLICY, reference))
        for letter, side in (("a", judgement.a), ("b", judgement.b))
    }


def trained_in(place: Place, recipe: Recipe, judgement: Judgement, notes: list[str]) -> tuple[Trained | None, str]:
    """What the round's log says of a pair; or nothing, and why."""
    lines = [msgspec.json.decode(line) for line in lines_of(place.file("metrics.jsonl"))]
    if not lines:
        return None, f"Round {place.round} has not been trained yet, so nothing was flagged."
    found = [n for n, line in enumerate(lines) if judgement.id in line["ids"]]
    if not found:
        why = {"identical": "its answers are the same tokens", "tie": "it is a tie", "gap": "its scores are too close"}
        reason = why.get(pairing.why_not(judgement, recipe))
        return None, "The pair was not trained on" + (f" because {reason}." if reason else ".")
    line, before = lines[found[0]], sum(_margins(line) for line in lines[: found[0]])
    at = line["ids"].index(judgement.id)
    if len(found) > 1:
        notes.append(f"The pair was trained on {len(found)} times; these are the numbers of the first.")
    if "margins" not in line:
        notes.append(
            "This run kept no margins per pair (an older version made it), so terms that need them are missing."
        )
    if recipe.refine.rule == "official":
        notes.append(
            "The log has one threshold per step, that of its first pair; under this rule it moves pair by pair."
        )
    against = {"prev": f", against π_{place.round - 1}", "init": ", against π_init"}.get(reference_of(recipe), "")
    notes.append(f"The margin in training is that before step {line['step']}{against}.")
    return Trained(
        margin=_item(line.get("margins"), at),
        extrapolated=_item(line.get("extrapolated_margins"), at),
        tau=line["tau"],
        window=min(before + at * (recipe.refine.rule == "official"), recipe.refine.window),
        softened=judgement.id in line["flagged"],
        step=line["step"],
        steps=len(lines),
    ), ""


def _item(values: Sequence[float] | None, at: int) -> float | None:
    return values[at] if values else None


# --- a pair of any file -------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """A record of a file, encoded. `order` has the indices of the better and the worse answer, if it says which."""

    number: int
    sample: Sample
    order: tuple[int, int] | None


def given_candidates(
    path: Path, backend: Backend, limits: Mapping[str, Any], skip_bad: bool = False
) -> Iterator[Given]:
    """Answers of a file of pairs. Those that do not fit into `limits` (see `spa_lite.encode`) are left out."""
    for record in data.iter_candidates(path, skip_bad=skip_bad):
        messages, texts, gold = record.prompt.messages, record.answers, record.gold
        row = encode_answers(messages, texts, backend.tokenizer, Counter(), **limits)
        if row is None:
            continue
        answers = tuple(
            Completion(ids=ids, text=text, ended="human") for ids, text in zip(row.responses, texts, strict=True)
        )
        sample = Sample(id=record.prompt.id, messages=messages, prompt_ids=row.prompt, completions=answers)
        whole = len(gold) == len(texts) or (gold and len(texts) == 2)
        yield Given(record.row, sample, (gold[0], gold[-1] if len(gold) > 1 else 1 - gold[0]) if whole else None)


def given_judgements(path: Path) -> Iterator[Given]:
    """Pairs of a file of judgements, as they were labelled."""
    for number, j in enumerate(data.iter_jsonl(path, Judgement), 1):
        answers = tuple(Completion(ids=side.ids, text=side.text, ended=side.ended) for side in (j.a, j.b))
        sample = Sample(id=j.id, messages=j.messages, prompt_ids=j.prompt_ids, completions=answers)
        yield Given(number, sample, (0, 1) if j.label == "a" else (1, 0))


def explain_pair(
    givens: Iterable[Given], source: Path | str, row: int, backend: Backend, recipe: Recipe, round_: int = 1
) -> Explanation:
    """A pair under POLICY and INIT of the backend, and what a round with this recipe would make of it.

    The threshold stands on the margins of the records before it. Raises DataError if there is no such row.
    """
    before: deque[Given] = deque(maxlen=recipe.refine.window)
    _, it = _nth(((g.number, g) for g in givens), row, source, lambda pair: before.append(pair[1]))
    beta, notes = recipe.loss.beta, list[str]()
    best, worst = _oriented([it], backend, recipe)[0]
    chosen, rejected = (_scored(it.sample, i, backend, recipe) for i in (best, worst))
    seen = _looked(list(before), it, (best, worst), backend, recipe, round_, notes)
    margin = beta * (chosen.logratio - rejected.logratio)
    seen = msgspec.structs.replace(seen, margin=margin)
    seen = msgspec.structs.replace(seen, softened=_known(noisy(seen, recipe)))
    if len(it.sample.completions) > 2:
        notes.append(f"The best and the worst of {len(it.sample.completions)} answers make the pair.")
    notes.append(
        "Policy and reference stand for the model in training and its start (π_{i-1}). In a run, targets of the first "
        f"{recipe.refine.warmup:.0%} of the steps are never softened."
    )
    return Explanation(
        source=str(source),
        row=row,
        id=it.sample.id,
        messages=it.sample.messages,
        policy=f"the adapter {recipe.inputs.adapter_path}" if recipe.inputs.adapter_path else "the model",
        reference="none: likelihood alone" if recipe.judge.reference == "none" else "π_init, the model without it",
        labelled_by="the file" if it.order else "the implicit reward (Eq. 8)",
        chosen=chosen,
        rejected=rejected,
        judged=judged_terms(chosen, rejected, beta),
        trained=trained_terms(seen, recipe, round_),
        flagged=seen.softened,
        why=reasons(seen, recipe),
        notes=tuple(notes),
    )


def _margins(line: dict[str, Any]) -> int:
    """How many margins a step put into the window. (Older versions, which logged none, did so in every step.)"""
    return sum(value is not None for value in line.get("extrapolated_margins", line["ids"]))


def _known(z: float | None) -> bool | None:
    return None if z is None else bool(z)


def _scored(sample: Sample, i: int, backend: Backend, recipe: Recipe) -> Answer:
    """An answer with its credit, whose sums are the answer's."""
    reference = None if recipe.judge.reference == "none" else INIT
    answer = sample.completions[i]
    credits = tuple(credit(backend, sample.prompt_ids, answer.ids, POLICY, reference))
    return Answer(
        letter="abcdefghijklmnopqrstuvwxyz"[i] if i < 26 else str(i),
        text=answer.text,
        ended=answer.ended,
        tokens=len(answer.ids),
        policy=fsum(c.policy for c in credits),
        reference=fsum(c.reference for c in credits),
        credits=credits,
    )


def _oriented(givens: Sequence[Given], backend: Backend, recipe: Recipe) -> list[tuple[int, int]]:
    """(better, worse) of each record: as the file says, else by the implicit reward."""
    open_ = [g for g in givens if g.order is None]
    rows = [Row(prompt=g.sample.prompt_ids, responses=tuple(c.ids for c in g.sample.completions)) for g in open_]
    own = scorer(backend, POLICY)(rows) if rows else []
    other = scorer(backend, INIT)(rows) if rows and recipe.judge.reference != "none" else [(0.0,) * len(r) for r in own]
    found = iter(
        best_and_worst([a - b for a, b in zip(*sums, strict=True)], recipe.judge.tie)
        for sums in zip(own, other, strict=True)
    )
    return [g.order or next(found) for g in givens]


def _looked(
    before: list[Given],
    it: Given,
    order: tuple[int, int],
    backend: Backend,
    recipe: Recipe,
    round_: int,
    notes: list[str],
) -> Trained:
    """The extrapolated margin of a pair, and the threshold from the pairs before it. Nothing is changed."""
    f = recipe.refine
    adapter, full = recipe.inputs.adapter_path or recipe.inputs.init_adapter, len(before) >= f.window
    if recipe.judge.reference == "none" or not adapter or not backend.can_train:
        what = "a backend that can train" if not backend.can_train else "an adapter and its reference"
        notes.append(f"No extrapolated margin (Eq. 11): that takes {what}.")
        return Trained(window=len(before))
    orders = [*(_oriented(before, backend, recipe) if full else []), order]
    rows = [_row(g.sample, *pair) for g, pair in zip([*(before if full else []), it], orders, strict=True)]
    init = recipe.inputs.init_adapter
    margins = extrapolated_margins(
        backend, rows, recipe.loss.beta, for_round(recipe, round_), Path(init) if init else None
    )
    window = Window(f.rule, f.K, f.window, f.before_full)
    window.push(margins[:-1])
    return Trained(extrapolated=float(margins[-1]), tau=window.tau, window=len(before))


def _row(sample: Sample, best: int, worst: int) -> Row:
    return Row(prompt=sample.prompt_ids, responses=(sample.completions[best].ids, sample.completions[worst].ids))


def extrapolated_margins(
    backend: Backend, rows: Sequence[Row], beta: float, lambda_: float, reference: Path | None = None
) -> Floats:
    """Margins [rows] under the logits of Eq. 11, from POLICY and the adapter `reference` (None: the bare base).

    By a training step with learning rate 0 and no gradient, for the mixing needs the logits. Replaces PREVIOUS and
    whatever training was under way; the weights stay as they are.
    """
    backend.bind(PREVIOUS, reference)
    backend.start_training(Optimizer())
    look = Look(beta, lambda_)
    return halving(backend, "micro_tokens", lambda: backend.dpo_step(rows, look, 0.0), rows).metrics[
        "extrapolated_margin"
    ]


class Look:
    """An objective that only looks: loss and coefficients are zero."""

    reference = True
    sequential = False

    def __init__(self, beta: float, lambda_: float) -> None:
        self.loss, self.extrapolation = dpo(beta), lambda_

    def __call__(self, batch: Batch) -> Outcome:
        """The extrapolated margins of a batch, as a metric."""
        margins = self.loss.margins(batch, batch.extrapolated if self.extrapolation else batch.logp)
        return Outcome(np.zeros(len(margins)), np.zeros(len(batch.logp)), {"extrapolated_margin": margins})


def _nth(
    numbered: Iterable[tuple[int, Any]], row: int, source: Path | str, passed: Callable[[Any], None] = lambda _: None
) -> tuple[int, Any]:
    """The record of that number, and `passed` called for those before it."""
    last = 0
    for item in numbered:
        if item[0] == row:
            return item
        if item[0] > row:
            raise DataError(f"row {row} of {source} cannot be used: it repeats an earlier one, is bad or too long")
        last = item[0]
        passed(item)
    raise DataError(f"there is no row {row} in {source}: its last usable record is number {last}")
