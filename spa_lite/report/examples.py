"""Which answers and judgements a report shows, and what needs the run's model: the token credit of these few, and
answers of a run that kept none."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from spa_lite import encode, prepare
from spa_lite.backend import INIT, POLICY, Backend
from spa_lite.credit import Credit, credit
from spa_lite.data import conversation_key
from spa_lite.errors import SpaError
from spa_lite.guards import has_seed_stage
from spa_lite.recipe import Recipe
from spa_lite.records import Ids, Message, Prompt
from spa_lite.report.collect import (
    Judged,
    Side,
    Stage,
    Told,
    answers_of,
    gold_score,
    judged_of,
    prompts_of,
    right,
    samples_of,
)
from spa_lite.report.looks import some
from spa_lite.sample import Encoded, answer

OpenBackend = Callable[[Recipe], Backend]
"""Loads the model of a run's recipe."""

FIRST, EXTREME = 4, 2
"""Held-out prompts shown: the first few, and those with the most won and the most lost gold."""
PAIRS = 3
"""Most and least certain judgements shown, of the first and of the last round."""
WRITTEN = 8
"""Prompts shown of those that a model wrote."""


@dataclass(frozen=True)
class Cell:
    """One answer: who gave it (several, if they gave the same), what it says, its gold score where known."""

    title: str
    text: str
    tokens: int
    capped: bool
    score: float | None


@dataclass(frozen=True)
class Example:
    """One held-out prompt with an answer per stage (or per run). `why` it is shown."""

    why: str
    messages: Sequence[Message]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Shown:
    """A judgement that is shown. `credit` of the chosen and the rejected answer is None where it was not computed."""

    run: Told
    stage: Stage
    kind: str  # "most certain", "least certain"; "" where the judge is as sure of every pair
    judged: Judged
    right: bool | None
    flagged: bool
    credit: tuple[Sequence[Credit], Sequence[Credit]] | None = None
    origins: tuple[str, str] = (
        "",
        "",
    )  # kinds of candidates: of chosen, of rejected

    @property
    def margin(self) -> float | None:
        """The margin, towards the label."""
        margin = self.judged.margin
        return margin if margin is None or self.judged.label == "a" else -margin

    @property
    def p(self) -> float | None:
        """The judge's probability (of the implicit judge: Eq. 7) that the chosen answer is the better one."""
        p = self.judged.p
        if self.judged.judge != "implicit":
            return self.judged.confidence
        return p if p is None or self.judged.label == "a" else 1 - p

    def own_score(self, side: Side) -> float | None:
        """The number that a judge with numbers of its own gave an answer."""
        if self.judged.judge in {"implicit", "order", "label"}:  # those of the last two are ranks
            return None
        return self.judged.score_a if side is self.judged.a else self.judged.score_b

    @property
    def sides(self) -> list[tuple[str, Side, float | None, Sequence[Credit] | None]]:
        """(chosen or rejected and which candidate it is, the answer, its gold score, its credit)."""
        credits, pair = self.credit or (None, None), (self.judged.chosen, self.judged.rejected)
        return [
            (f"{name} · {origin}" if origin else name, side, gold_score(self.run, self.judged.extra, side), one)
            for name, origin, side, one in zip(("chosen", "rejected"), self.origins, pair, credits, strict=True)
        ]


# -- answers side by side ------------------------------------------------------------------------------------------


def side_by_side(runs: Sequence[Told]) -> list[Example]:
    """The same held-out prompts answered before and after: by init, pi_0 and the last round of one run, or by the last
    policy of each of several. Nothing where the runs have no answers in common."""
    if len(runs) == 1:
        measured = [stage for stage in runs[0].stages if (runs[0].folder / stage.place / "answers.jsonl").exists()]
        chosen = [stage for stage in measured if stage.number <= 0] + [s for s in measured if s.number > 0][-1:]
        columns = [(runs[0], stage, stage.name) for stage in chosen]
    else:
        columns = [(run, stage, run.name) for run in some(runs) for stage in _answered(run)[-1:]]
    if not columns:
        return []
    piles = [{answer.id: answer for answer in answers_of(run, stage.place)} for run, stage, _ in columns]
    common = [i for i in piles[0] if all(i in pile and pile[i].completions for pile in piles)]
    found = []
    scores = [_scores(run, pile) for (run, _, _), pile in zip(columns, piles, strict=True)]
    for why, i in _interesting(common, scores, several=len(runs) > 1):
        cells = []
        for (run, _, title), pile in zip(columns, piles, strict=True):
            side = pile[i].completions[0]
            score = gold_score(run, pile[i].extra, side)
            cells.append(Cell(title, side.text, len(side.ids), side.ended == "cap", score))
        found.append(Example(why, piles[0][i].messages, _merged(cells)))
    return found


def sampled(run: Told, open_backend: OpenBackend) -> list[Example]:
    """The same of a run that kept no answers: init and its last policy answer the first held-out prompts now.

    Nothing where there is no policy or no held-out pair; a note of the run says why it could not be done.
    """
    trained = [stage for stage in run.stages if (run.folder / stage.place / "adapter").is_dir()]
    if run.recipe is None or not trained or "-" in (run.recipe.inputs.held_out, run.recipe.inputs.seed_pairs):
        return []  # standard input was read long ago
    try:
        return _sampled(run, run.recipe, trained[-1], open_backend)
    except (SpaError, OSError) as error:
        run.problems.append(f"answers before and after were not sampled: {error}")
        return []


def _sampled(run: Told, recipe: Recipe, last: Stage, open_backend: OpenBackend) -> list[Example]:
    pairs = prepare.read(replace(recipe, rounds=0)).held_out_pairs  # without the prompts of the rounds
    prompts = list({conversation_key(pair.messages): pair.prompt for pair in reversed(pairs)}.values())[::-1][:FIRST]
    if not prompts:
        return []
    backend = open_backend(recipe)
    start = recipe.inputs.init_adapter
    backend.bind(INIT, Path(start) if start else None)
    backend.bind(POLICY, _adapter(run, last.number))
    encoded: list[Encoded] = encode.encode_prompts(
        prompts,
        backend.tokenizer,
        max_prompt_length=recipe.lengths.max_prompt_length,
        long_prompts=recipe.lengths.long_prompts,
        max_tokens=recipe.sampling.max_tokens,
        context=backend.context,
    )[0]
    before, after = (answer(backend, encoded, recipe, 0, [0], role) for role in (INIT, POLICY))
    found = []
    for one, other in zip(before, after, strict=True):
        cells = [
            Cell(title, said.text, len(said.ids), said.ended == "cap", None)
            for title, said in (("init", one.completions[0]), (last.name, other.completions[0]))
        ]
        found.append(Example("", one.messages, _merged(cells)))
    return found


def _merged(cells: Sequence[Cell]) -> list[Cell]:
    """Equal answers once, under the names of all who gave them."""
    found: list[Cell] = []
    for cell in cells:
        same = next((n for n, other in enumerate(found) if replace(other, title=cell.title) == cell), None)
        if same is None:
            found.append(cell)
        else:
            found[same] = replace(cell, title=f"{found[same].title}, {cell.title}")
    return found


def _answered(run: Told) -> list[Stage]:
    return [stage for stage in run.stages if (run.folder / stage.place / "answers.jsonl").exists()]


def _scores(run: Told, pile: Mapping[str, Any]) -> dict[str, float | None]:
    return {i: gold_score(run, a.extra, a.completions[0]) for i, a in pile.items() if a.completions}


def _interesting(
    ids: Sequence[str], scores: Sequence[Mapping[str, float | None]], several: bool
) -> list[tuple[str, str]]:
    """(why, id): the first few as they come, then those whose gold rose and fell most from the first to the last, or
    (several runs) differs most."""
    shown = [("", i) for i in ids[:FIRST]]
    if several:
        known = {i: [s for one in scores if (s := one[i]) is not None] for i in ids[FIRST:]}
        spread = {i: max(found) - min(found) for i, found in known.items() if len(found) > 1}
        most = sorted((i for i in spread if spread[i] > 0), key=lambda i: -spread[i])
        return shown + [("gold differs most", i) for i in most[: 2 * EXTREME]]
    change = {
        i: after - before
        for i in ids[FIRST:]
        if (before := scores[0][i]) is not None and (after := scores[-1][i]) is not None
    }
    ordered = sorted(change, key=lambda i: change[i])
    best = [i for i in ordered[::-1] if change[i] > 0][:EXTREME]
    worst = [i for i in ordered if change[i] < 0][:EXTREME]
    return shown + [("gained most gold", i) for i in best] + [("lost most gold", i) for i in worst]


# -- written prompts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrote:
    """A prompt that a model wrote, and what it was given to go by: a persona, keywords, examples."""

    text: str
    given: str


def written(run: Told) -> list[Wrote]:
    """The first prompts that were written, of the first round that wrote any."""
    for stage in run.rounds:
        if found := [_wrote(prompt) for prompt in islice(prompts_of(run, stage.place), WRITTEN)]:
            return found
    return []


def _wrote(prompt: Prompt) -> Wrote:
    given = next((prompt.extra[name] for name in ("persona", "keywords", "examples") if name in prompt.extra), "")
    return Wrote(prompt.messages[-1].content, " · ".join(map(str, given)) if isinstance(given, list) else str(given))


# -- judgements ----------------------------------------------------------------------------------------------------


def judgements(run: Told) -> list[Shown]:
    """The most and the least certain judgements of the first and of the last round that judged."""
    judging = [stage for stage in run.rounds if any(_usable(stage))]
    return [shown for stage in dict.fromkeys(stage.place for stage in (judging[:1] + judging[-1:]))
            for shown in _extremes(run, next(s for s in judging if s.place == stage))]  # fmt: skip


def _usable(stage: Stage) -> Iterator[tuple[float, int]]:
    """(how sure, line) of pairs whose answers differ."""
    return (
        (j.certainty, line) for line, j in enumerate(stage.judgements) if j.certainty is not None and not j.identical
    )


def _extremes(run: Told, stage: Stage) -> list[Shown]:
    """A second look at the file, for the few lines that are shown."""
    most = heapq.nlargest(PAIRS, _usable(stage), key=lambda pair: (pair[0], -pair[1]))
    least = [pair for pair in heapq.nsmallest(PAIRS, _usable(stage)) if pair not in most]
    sure = {certainty for certainty, _ in most + least}
    words = ("most certain", "least certain") if len(sure) > 1 else ("", "")
    kinds = {line: words[0] for _, line in most} | {line: words[1] for _, line in least}
    order, origins = list(kinds), _origins(run, stage, set(kinds))
    found = [
        Shown(run, stage, kinds[line], judged, right(run, judged), stage.judgements[line].flagged)
        for line, judged in enumerate(judged_of(run, stage.place))
        if line in kinds
    ]
    found = [
        replace(one, origins=(named.get(one.judged.chosen.ids, ""), named.get(one.judged.rejected.ids, "")))
        for one in found
        for named in [origins.get(one.judged.id, {})]
    ]
    places = sorted(kinds)
    return [found[places.index(line)] for line in order]


def _origins(run: Told, stage: Stage, lines: Set[int]) -> dict[str, dict[Ids, str]]:
    """Id -> an answer's tokens -> which kinds of candidates it is, of some lines of a round that has several kinds."""
    if run.recipe is None or run.recipe.candidates.kinds == ["sample"]:
        return {}
    found: dict[str, dict[Ids, str]] = {}
    for line, sample in enumerate(samples_of(run, stage.place)):
        if line in lines:
            named = found.setdefault(sample.id, {})
            for answer in sample.completions:
                named[answer.ids] = f"{named[answer.ids]}, {answer.kind}" if answer.ids in named else answer.kind
    return found


# -- token credit --------------------------------------------------------------------------------------------------


def credited(shown: Sequence[Shown], open_backend: OpenBackend) -> list[Shown]:
    """The same judgements with token credit, from the run's own model and the adapter of the policy that judged.

    Where that cannot be done (the model is gone, the reference is another model) a note of the run says why.
    """
    found: list[Shown] = []
    for run in {id(one.run): one.run for one in shown}.values():
        mine = [one for one in shown if one.run is run]
        try:
            found += _credited(run, mine, open_backend)
        except (SpaError, OSError) as error:
            run.problems.append(f"token credit was not computed: {error}")
            found += mine
    return found


def _credited(run: Told, shown: Sequence[Shown], open_backend: OpenBackend) -> list[Shown]:
    if run.recipe is None:
        raise SpaError("the run has no recipe.yaml that can be read")
    if run.recipe.inputs.init_model:
        raise SpaError("the reference is a model of its own (--init-model); spa-lite explain shows single pairs")
    backend = open_backend(run.recipe)
    i = run.recipe.inputs
    start = i.init_adapter
    found = []
    for one in shown:
        policy = _adapter(run, one.stage.number - 1)
        if policy == (Path(start) if start else None) and run.recipe.judge.reference != "none":
            found.append(one)  # pi_init against itself: no token has any credit
            continue
        backend.bind(INIT, Path(start) if start else None)
        backend.bind(POLICY, policy)
        reference: str | None = None if run.recipe.judge.reference == "none" else INIT
        if run.recipe.judge.reference == "lagged" and one.stage.number > 1:
            reference = "lagged"
            backend.bind(reference, _adapter(run, one.stage.number - 2))
        prompt = one.judged.prompt_ids
        chosen, rejected = (
            credit(backend, prompt, side.ids, POLICY, reference) for side in (one.judged.chosen, one.judged.rejected)
        )
        found.append(replace(one, credit=(chosen, rejected)))
    return found


def _adapter(run: Told, round_: int) -> Path | None:
    """The adapter of pi_round."""
    path = run.folder / f"rounds/{round_}/adapter"
    if path.is_dir():
        return path
    assert run.recipe is not None
    given = run.recipe.inputs.adapter_path or run.recipe.inputs.init_adapter
    if round_ == 0 and not has_seed_stage(run.recipe):
        return Path(given) if given else None
    raise SpaError(f"{path} is missing; run the same command again to repair the run")
