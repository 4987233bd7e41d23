"""What the page `spa.py` calls: each step of the method as one stage of a run folder, with its key and its files.

A stage binds the roles it needs, calls the function of the same name (`sample`, `judge`, `train`) and writes what
came out. A policy is named by the stage that made it, so a key never depends on where a run lies.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextlib import nullcontext as alone
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import backend as contract
from spa_lite import evaluate, objective, rescore, sampler, states, stop
from spa_lite.backend import INIT, POLICY, Backend
from spa_lite.checkpoint import Checkpoints
from spa_lite.errors import DataError, ModelError
from spa_lite.estimate import Longest, longest_of_rows
from spa_lite.evaluate import GoldRule
from spa_lite.events import Event, Report, Tick, silent, ticking
from spa_lite.files import digest_of_weights, lines_of, move, share, write_json
from spa_lite.fit import Remembered, sizes_that_fit
from spa_lite.journal import Journal, Marked
from spa_lite.judge import (
    Scorer,
    Sums,
    Tokens,
    asked,
    counts,
    decide,
    no_reference,
    resumed,
    rows_of,
    token_scorer,
)
from spa_lite.judges import TABLE, depends, open_judge
from spa_lite.lint.samples import Findings, Tally
from spa_lite.models import Models
from spa_lite.opinion import Opinion
from spa_lite.recipe import Recipe, for_round, settings_of, that_matter
from spa_lite.records import Completion, Judgement, Pair, Row, Sample
from spa_lite.sample import Encoded, sample
from spa_lite.store import Run, Stage, digest
from spa_lite.train import Example, Plan, TrainObjective, optimizer_of, pairs_of, round_plan, seed_plan, train


@dataclass(frozen=True)
class Data:
    """Everything a run reads, already as token ids. `gold` is the truth where it is known (the lesson)."""

    seed_pairs: list[tuple[Pair, Row]]
    rounds: list[list[Encoded]]
    held_out_pairs: list[tuple[Pair, Row]]
    held_out_prompts: list[Encoded]
    gold: GoldRule | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """An adapter, and the key of the stage (or the digest of the folder) that it comes from."""

    adapter: Path | None
    key: str


class Workshop:
    """The stages of one run. Methods are named as the page `spa.py` calls them."""

    def __init__(self, models: Models, recipe: Recipe, data: Data, run: Run, report: Report = silent) -> None:
        self.models, self.recipe, self.data, self.run = models, recipe, data, run
        self.summaries: dict[str, dict[str, dict[str, Any]]] = {}
        self.init = Policy(models.init_adapter, digest(["init", folder_digest(models.init_adapter)]))
        self.sizes = Remembered(run.folder, settings_of(recipe.batching))
        self._sampled: dict[int, Stage] = {}  # per round, where its samples are
        self.stopped: str | None = None  # the round after which a stop rule ended the run
        self._report = report
        run.report = report
        run.meter = lambda: models.loaded.peak_memory(reset=True) if models.loaded else None

    # -- stages ------------------------------------------------------------------------------------------------

    def seed_dpo(self) -> Policy:
        """pi_0: plain DPO on the seed pairs, from pi_init, reference pi_init (Eq. 6)."""
        pairs = [Example(pair.id, row) for pair, row in self.data.seed_pairs]

        def work(part: Path) -> dict[str, Any]:
            backend = self._bind(None, training=True)
            plan, loss = seed_plan(self.recipe, len(pairs)), objective.Dpo(self.recipe.loss.beta)
            return train(backend, pairs, loss, plan, self.recipe, self._checkpoints(part, "seed"), self.report, "seed")

        inputs = {"pi_init": self.init.key, "seed pairs": digest([[p.id, p.row] for p in pairs])}
        stage = self._stage("rounds/0", "seed", ("adapter", "metrics.jsonl"), inputs, len(pairs))
        return self._policy(self._once(stage, work))

    def given_policy(self) -> Policy:
        """pi_0 of a run without seed pairs: the adapter the user gave, or pi_init itself (judged by another model)."""
        adapter = self.models.policy_adapter or self.models.init_adapter
        return Policy(adapter, digest(["given", folder_digest(adapter)]))

    def sample(self, i: int, policy: Policy) -> Stage:
        """Two answers per prompt of X_i from pi_{i-1}."""
        prompts, name = self.data.rounds[i - 1], f"round {i} sample"
        drawing = sampler.file_of(self.recipe)

        def work(part: Path) -> dict[str, Any]:
            with self._drawing(policy.adapter) as backend:
                keep = states.wanted(self.recipe, i)
                if keep and (size := states.room(self.recipe, backend, len(prompts), i, part)):
                    self.report(Event(name, note=size))
                self._answer(backend, part / "samples.jsonl", prompts, i, name, keep=keep)
            tokens = capped = 0
            seen = Tally()
            for answer in read_samples(part / "samples.jsonl"):
                tokens += sum(len(c.ids) for c in answer.completions)
                capped += sum(c.ended == "cap" for c in answer.completions)
                seen.add(answer)
            return {
                "prompts": len(prompts),
                "tokens": tokens,
                "capped": capped,
                "lint": seen.findings().to_dict(),
            }

        inputs = {"policy": policy.key, "prompts": digest(prompts), "round": str(i)}
        if drawing:
            inputs["sampler"] = digest_of_weights(drawing)
        stage = self._stage(f"rounds/{i}", "sample", ("samples.jsonl", states.NAME), inputs, len(prompts))
        self._sampled[i] = self._once(stage, work, sampler.made_by(self.recipe) if drawing else None)
        return self._sampled[i]

    def judge(self, i: int, samples: Stage, policy: Policy, lagged: Policy | None) -> Stage:
        """Label the answers by the implicit reward of pi_{i-1} against pi_init (or what judge.reference says)."""
        name = f"round {i} judge"
        reference, reference_key = self._judge_reference(policy, lagged)

        def work(part: Path) -> dict[str, Any]:
            self._bind(policy.adapter, lagged)
            pile = list(read_samples(self.run.path(samples, "samples.jsonl")))
            rows, check = rows_of(pile), rescore.Check(pile, self.recipe, i)

            def sums() -> list[Sums]:
                self._bind(policy.adapter, lagged)  # another model may have taken its place
                return self._sums(
                    part / "policy.jsonl", rows, lambda tick: alone(self.models.scorer(POLICY, tick)), name
                )

            again = self._values(part / "check.jsonl", [rows[k] for k in check.chosen], f"{name} check")
            own = sums() if check.sums is None or check.drifts(again) else check.sums
            opinions = self._asked(part, pile, i, name)
            other = self._sums(part / "reference.jsonl", rows, reference, f"{name} reference")
            if opinions is None:
                few = [other[k] for k in check.chosen]
                recorded, scored = check.recorded, rescore.sums_of(again)
                if check.flip(self._labels(check.picked, recorded, few), self._labels(check.picked, scored, few)):
                    own = sums()
                opinions = self._labels(pile, own, other)
            judged = [decide(*each, self.recipe) for each in zip(pile, own, other, opinions, strict=True)]
            Journal(part / "judgements.jsonl").append(judged)
            self.report(Event(name, note=rescore.sentence(check.to_dict())))
            return counts(judged) | {"rescore": check.to_dict()}

        inputs = {"samples": samples.key, "policy": policy.key, "reference": reference_key, "round": str(i)}
        inputs |= depends(self.recipe)
        return self._once(self._stage(f"rounds/{i}", "judge", ("judgements.jsonl",), inputs, samples.size), work)

    def train(self, i: int, judgements: Stage, policy: Policy) -> Policy:
        """pi_i: refined DPO on the round's pairs, from pi_{i-1}, reference pi_{i-1} (Eq. 10 to 12)."""
        name = f"round {i} train"

        def work(part: Path) -> dict[str, Any]:
            pairs = pairs_of(read_judgements(self.run.path(judgements, "judgements.jsonl")), self.recipe, self._kept(i))
            if not pairs:
                raise DataError(
                    f"round {i}: every pair holds two identical answers, so there is nothing to learn; raise --temp"
                )
            backend = self._bind(policy.adapter, training=True)
            plan = round_plan(self.recipe, len(pairs))
            self._say_if_late(plan, i)
            loss, saved = round_objective(self.recipe, i, plan), self._checkpoints(part, name)
            return train(backend, pairs, loss, plan, self.recipe, saved, self.report, name, i)

        inputs = {"judgements": judgements.key, "policy": policy.key, "round": str(i)}
        if states.wanted(self.recipe, i):
            inputs["samples"] = self._sampled[i].key
        stage = self._stage(f"rounds/{i}", "train", ("adapter", "metrics.jsonl"), inputs, judgements.size)
        return self._policy(self._once(stage, work))

    def measure(self, folder: str, policy: Policy | None) -> None:
        """Held-out measures of a policy (None: pi_init): gold of its answers where known, accuracy on human pairs."""
        if policy and self.recipe.measure.every == "end" and folder != f"rounds/{self.recipe.rounds}":
            return
        self._measure(folder, policy)

    def enough(self, i: int, policy: Policy) -> bool:
        """Whether a stop rule ends the run after round i; what is measured at the end is measured then."""
        found = stop.signs(self.rows, self.recipe)
        if not found or self.recipe.stop.action == "warn" or i == self.recipe.rounds:
            return False
        self.stopped = f"round {i}"
        self.report(Event(f"round {i}", note=f"stopping here (stop.action=stop): {'; '.join(found)}"))
        self._measure(f"rounds/{i}", policy)
        return True

    def _measure(self, folder: str, policy: Policy | None) -> None:
        who = policy or self.init
        baseline, name = self._baseline() if policy else None, f"{self.row_name(folder)} measure"
        prompts, pairs = self.data.held_out_prompts, self.data.held_out_pairs

        def work(part: Path) -> dict[str, Any]:
            backend = self._bind(who.adapter)
            found: dict[str, Any] = {}
            if self.data.gold and prompts:
                found |= self._gold_measures(backend, part, baseline, name)
            if pairs:
                found |= self._pair_measures(who, part, name)
            if policy and self.data.gold and (self.run.folder / folder / "judgements.jsonl").exists():
                found |= self._label_measures(self.run.folder / folder)
            return found

        inputs = {
            "policy": who.key,
            "held out": digest([prompts, [row for _, row in pairs], self.data.gold is not None]),
        }
        if self.models.has_other_reference:
            inputs["reference"] = self.models.reference_fingerprint
        self._once(self._stage(folder, "measure", ("answers.jsonl",), inputs, len(prompts) + len(pairs)), work)

    def _say_if_late(self, plan: Plan, i: int) -> None:
        """Say once that refinement starts later than its warm-up, because the window is not full by then."""
        r = self.recipe.refine
        first = math.ceil(r.window / plan.batch_size)
        if i > 1 or not r.alpha or r.before_full == "zero" or first <= r.warmup * plan.steps:
            return
        when = (
            f"starts at step {first + 1} of {plan.steps}"
            if first < plan.steps
            else "never starts in a round this small"
        )
        note = f"refinement {when}: its threshold needs {r.window} margins (refine.window)"
        self.report(Event(f"round {i} train", note=note))

    def _asked(self, part: Path, pile: Sequence[Sample], i: int, name: str) -> list[Opinion] | None:
        """Opinions of a judge that needs no sums, asked before others are scored: it may be a whole other model, which
        takes the policy's place. None of one that does."""
        if TABLE[self.recipe.judge.by].sums:
            return None
        gold = evaluate.gold_of(self.data.gold) if self.data.gold else None
        loader, replies = self.models.load_classifier, part / "replies"
        judge = open_judge(self.recipe, self.models, loader, gold=gold, round_=i, cache=replies)
        return asked(part / "opinions.jsonl", judge, pile, self.report, f"{name} opinions")

    def _labels(self, pile: Sequence[Sample], own: Sequence[Sums], other: Sequence[Sums]) -> list[Opinion]:
        """Opinions of a judge that needs nothing but sums under the policy and the reference."""
        return open_judge(self.recipe, self.models, sums=(lambda _: list(own), lambda _: list(other)))(pile)

    # -- measures ----------------------------------------------------------------------------------------------

    def _gold_measures(self, backend: Backend, part: Path, baseline: list[float] | None, name: str) -> dict[str, Any]:
        """One answer per held-out prompt (same keys for every policy), its gold, and the win rate against pi_init."""
        rule = self.data.gold
        assert rule is not None
        self._answer(backend, part / "answers.jsonl", self.data.held_out_prompts, 0, name, n=1)
        answers = list(read_samples(part / "answers.jsonl"))
        means, scores = evaluate.gold_means(answers, rule)
        found: dict[str, Any] = {"gold": means, "length": _mean([len(a.completions[0].ids) for a in answers])}
        if baseline is not None:
            rate = evaluate.win_rate(scores, baseline, self.recipe.seed, self.recipe.measure.bootstrap)
            found["win_rate"] = rate.to_dict()
        return found

    def _baseline(self) -> list[float] | None:
        """Gold scores of pi_init's answers, from its own measure stage."""
        path = self.run.folder / "init" / "answers.jsonl"
        if self.data.gold is None or not path.exists():
            return None
        return evaluate.gold_means(list(read_samples(path)), self.data.gold)[1]

    def _pair_measures(self, who: Policy, part: Path, name: str) -> dict[str, Any]:
        """How often the policy's implicit reward prefers the human's choice on held-out pairs."""
        models, rows = self.models, [row for _, row in self.data.held_out_pairs]
        if who == self.init and not models.has_other_reference:
            half = evaluate.Interval(0.5, 0.5, 0.5, len(rows))  # pi_init against itself prefers neither answer
            return {"pair_accuracy": half.to_dict(), "pair_margin_nats": 0.0}
        own = self._sums(part / "policy.jsonl", rows, lambda tick: alone(models.scorer(POLICY, tick)), name)
        other = self._sums(part / "reference.jsonl", rows, self._init_scorer, f"{name} reference")
        margins = [objective.margin(yw, yl, rw, rl, 1.0) for (yw, yl), (rw, rl) in zip(own, other, strict=True)]
        accuracy = evaluate.pair_accuracy(margins)
        return {"pair_accuracy": accuracy.to_dict() if accuracy else None, "pair_margin_nats": _mean(margins)}

    def _label_measures(self, place: Path) -> dict[str, Any]:
        """Share of the round's self-labels that agree with gold, and how many of the flagged were truly wrong."""
        assert self.data.gold is not None
        judgements = read_judgements(place / "judgements.jsonl")
        agreement = evaluate.label_agreement(judgements, self.data.gold)
        lines = [msgspec.json.decode(line) for line in lines_of(place / "metrics.jsonl")]
        flagged = [i for line in lines for i in line["flagged"]]
        return {
            "label_accuracy": {name: interval.to_dict() for name, interval in agreement.items()},
            "flags": evaluate.wrong_flags(judgements, flagged, self.data.gold),
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table so far: a row per folder of stages, with all that their summaries say."""
        rows = []
        for folder, kinds in self.summaries.items():
            row = {"stage": self.row_name(folder), "folder": folder, **kinds.get("measure", {})}
            row |= {"judged": kinds.get("judge"), "sampled": kinds.get("sample")}
            rows.append(row | {"trained": kinds.get("train") or kinds.get("seed") or {}})
        return rows

    def row_name(self, folder: str) -> str:
        """What people call the stage whose result lies in that folder."""
        start = "seed" if self.data.seed_pairs else "pi_0"
        return {"init": "init", "rounds/0": start}.get(folder, folder.replace("rounds/", "round "))

    # -- plumbing ----------------------------------------------------------------------------------------------

    def _stage(self, folder: str, kind: str, outputs: tuple[str, ...], inputs: dict[str, str], size: int = 0) -> Stage:
        settings = that_matter(self.recipe, kind, int(inputs.get("round", 0)))
        return Stage(folder, kind, outputs, settings, {"model": self.models.fingerprint, **inputs}, size)

    def _once(
        self, stage: Stage, work: Callable[[Path], dict[str, Any]], made_by: dict[str, Any] | None = None
    ) -> Stage:
        """Do a stage, or read it if it is finished; either way its summary is kept for the table."""
        summary = self.run.once(stage, work, made_by or self.models.made_by)
        self.summaries.setdefault(stage.folder, {})[stage.kind] = summary
        self.report(Event(stage.title, 1, 1, "stage", metrics=summary))
        return stage

    def report(self, event: Event) -> None:
        """Hand on what happens; and write down batch sizes before anything that was computed with them is kept."""
        backend = self.models.loaded
        if backend and event.unit != "stage":
            note = self.sizes.notice(backend.batching)
            if note:
                self._report(Event(event.stage, note=note))
        self._report(event)

    def _checkpoints(self, part: Path, name: str) -> Checkpoints:
        t = self.recipe.train
        return Checkpoints(part, t.save_every, t.save_minutes, lambda note: self.report(Event(name, note=note)))

    def _answer(
        self,
        backend: Backend,
        path: Path,
        prompts: Sequence[Encoded],
        i: int,
        name: str,
        n: int | None = None,
        keep: bool = False,
    ) -> None:
        """Write all samples of the prompts to a journal at `path`; those that it holds are not computed again. `keep`:
        their states, too, to a file beside it."""
        journal = Marked(path)
        writer = states.Writer(path.with_name(states.NAME), read_samples(path)) if keep else None
        if writer and not writer.whole:
            self.report(Event(name, note=f"{writer.path} is damaged or missing, so all is sampled anew"))
            path.unlink()
            journal, writer = Marked(path), states.Writer(writer.path, [])
        for chunk in sample(
            backend, prompts, self.recipe, i, self.report, name, n, skip=len(journal.kept), keep=writer
        ):
            journal.append(chunk)

    def _kept(self, i: int) -> states.Reader | None:
        """The states of round i's samples, if they were kept and are what the judge saw."""
        if not states.wanted(self.recipe, i):
            return None
        judged = self.summaries[f"rounds/{i}"]["judge"]
        if rescore.drifted(judged["rescore"]):
            self.report(Event(f"round {i} train", note="the sampler's states are not used: its log-probs drifted"))
            return None
        place = self.run.path(self._sampled[i])
        return states.Reader(place / states.NAME, read_samples(place / "samples.jsonl"))

    def _sums(
        self, path: Path, rows: Sequence[Row], scorer: Callable[[Tick], AbstractContextManager[Scorer]], name: str
    ) -> list[Sums]:
        """Sums of all rows under a scorer that is opened for them; a journal at `path` holds what is done already."""
        return resumed(path, rows, lambda done: scorer(ticking(self.report, name, len(rows), "pairs", done)), Sums)

    def _values(self, path: Path, rows: Sequence[Row], name: str) -> list[Tokens]:
        """The same under the policy, token by token."""

        def opened(done: int) -> AbstractContextManager[Callable[[Sequence[Row]], list[Tokens]]]:
            tick = ticking(self.report, name, len(rows), "pairs", done)
            return alone(token_scorer(self.models.backend, POLICY, tick))

        return resumed(path, rows, opened, Tokens)

    def _policy(self, stage: Stage) -> Policy:
        return Policy(self.run.path(stage, "adapter"), stage.key)

    def _bind(self, adapter: Path | None, lagged: Policy | None = None, training: bool = False) -> Backend:
        """Put the roles on the base: pi_init, the policy, and whatever else is asked for."""
        backend = self.models.backend
        backend.batching = self.sizes.apply(
            self.recipe, lambda: sizes_that_fit(self.recipe, backend, training=False), training=False
        )
        backend.bind(INIT, self.models.init_adapter)
        if adapter or not training:
            backend.bind(POLICY, adapter)
        elif self.models.init_adapter:
            backend.bind(POLICY, self.models.init_adapter)
        else:
            backend.bind(POLICY, None, lora_shape(self.recipe))
        if lagged:
            backend.bind("lagged", lagged.adapter)
        if training:
            backend.snapshot()
            backend.start_training(optimizer_of(self.recipe))
            most = longest(self.recipe, self.data)
            backend.batching = self.sizes.apply(self.recipe, lambda: sizes_that_fit(self.recipe, backend, most))
        return backend

    @contextmanager
    def _drawing(self, adapter: Path | None) -> Iterator[Backend]:
        """What draws the answers of a policy: the base with its adapter, or what --sampler names, with it."""
        if sampler.file_of(self.recipe) is None:
            yield self._bind(adapter)
            return
        with self.models.sampler() as other:
            other.bind(POLICY, adapter)
            yield other

    def _judge_reference(
        self, policy: Policy, lagged: Policy | None
    ) -> tuple[Callable[[Tick], AbstractContextManager[Scorer]], str]:
        """What opens the scorer of the judge's reference, and that reference's key."""
        which = self.recipe.judge.reference
        if which == "none":
            return lambda tick: alone(no_reference), "none"
        if which == "lagged" and lagged:
            return lambda tick: alone(self.models.scorer("lagged", tick)), lagged.key
        if self.models.has_other_reference:
            return self._init_scorer, self.models.reference_fingerprint
        if policy.key == self.init.key and self.recipe.judge.by == "implicit":
            raise ModelError("the judge's policy equals its reference; give --adapter-path or --init-model")
        return self._init_scorer, self.init.key

    def _init_scorer(self, tick: Tick) -> AbstractContextManager[Scorer]:
        """Scores under pi_init: the base, or a whole other model that takes its place inside the block."""
        models = self.models
        return models.other_scorer(tick) if models.has_other_reference else alone(models.scorer(INIT, tick))


def round_objective(recipe: Recipe, round_: int, plan: Plan) -> TrainObjective:
    """The refined loss of a round; with alpha = 0 that is plain DPO."""
    r = recipe.refine
    if not r.alpha:
        return objective.Dpo(recipe.loss.beta)
    window = objective.Window(r.rule, r.K, r.window, r.before_full)
    first = objective.first_watched(plan.sizes, r.window, r.warmup)
    return objective.Refined(recipe.loss.beta, r.alpha, for_round(recipe, round_), window, r.warmup, plan.steps, first)


def longest(recipe: Recipe, data: Data) -> Longest:
    """The longest texts that a run trains on, in tokens, as far as they are known before it samples."""
    prompts = [len(ids) for share in data.rounds for _, ids in share]
    labelled = longest_of_rows([row for _, row in data.seed_pairs])
    answer = recipe.sampling.max_tokens if prompts else 0
    return Longest(max([*prompts, labelled.prompt]), answer, labelled.pair, labelled.labelled)


def lora_shape(recipe: Recipe) -> contract.Lora:
    """The fresh adapter a recipe asks for."""
    return contract.Lora(recipe.lora.rank, recipe.lora.alpha, tuple(recipe.lora.targets), recipe.seed)


def pair_sample(pair: Pair, row: Row) -> Sample:
    """A human pair as a sample with two answers, chosen first, ready to be judged."""
    texts = (pair.chosen, pair.rejected)
    answers = tuple(Completion(ids=i, text=t, ended="human") for i, t in zip(row.responses, texts, strict=True))
    return Sample(id=pair.id, messages=pair.messages, prompt_ids=row.prompt, completions=answers, extra=pair.extra)


def _mean(values: Sequence[float]) -> float | None:
    return float(sum(values) / len(values)) if values else None


def folder_digest(folder: Path | None) -> str | None:
    """Digest of an adapter folder's files, or of an adapter that is one file."""
    if folder is None:
        return None
    if not folder.exists():
        raise ModelError(f"there is no adapter folder {folder}; check the path")
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return digest([(p.name, digest(p.read_bytes())) for p in files if p.suffix in {".json", ".safetensors", ".gguf"}])


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of a round, one at a time: those of a large round fill much memory."""
    return (msgspec.json.decode(line, type=Sample) for line in lines_of(path))


def read_judgements(path: Path) -> list[Judgement]:
    """Judgements of a round."""
    return [msgspec.json.decode(line, type=Judgement) for line in lines_of(path)]


def summarise_run(shop: Workshop, policy: Policy) -> dict[str, Any]:
    """Gather the stages into rows for the table, write summary.json, and put the final adapter at the top."""
    rows = shop.rows
    summary = {
        "recipe": shop.recipe.name,
        "scale": shop.recipe.scale,
        "rows": rows,
        "best": stop.best(rows),
        "stopped": shop.stopped,
        "warnings": warnings(rows, shop.recipe) + several_makers(shop.run.makers),
        "notes": shop.data.notes,
        "versions": versions(shop.models.made_by.get("backend", "")),
    }
    top = shop.run.folder
    write_json(top / "summary.json", summary)
    write_json(top / "timings.json", {row["stage"]: shop.run.spent(row["folder"]) for row in rows})
    if policy.adapter:
        for file in sorted(policy.adapter.glob("adapter*")):
            share(file, top / "adapter" / f".{file.name}")
            move(top / "adapter" / f".{file.name}", top / "adapter" / file.name)
    return summary


LIBRARIES = {"torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx-lm", "transformers")}
"""What a result may depend on beside the program itself, by backend."""


def versions(backend: str) -> dict[str, str]:
    """Versions of Python, spa-lite, NumPy and the backend's libraries, as far as they are installed as packages."""
    found = {"python": platform.python_version()}
    for name in ("spa-lite", "numpy", *LIBRARIES.get(backend, ())):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def several_makers(makers: dict[str, dict[str, Any]]) -> list[str]:
    """Say so if the stages of a run were computed on different backends, devices or precisions."""
    stages: dict[str, list[str]] = {}
    for title, maker in makers.items():
        if maker and maker.get("backend") != sampler.BACKEND:  # which was asked for
            stages.setdefault(", ".join(str(value) for value in maker.values()), []).append(title)
    if len(stages) < 2:
        return []
    parts = [f"{len(titles)} on {maker} ({titles[0]} to {titles[-1]})" for maker, titles in stages.items()]
    return [f"the stages of this run were not all computed on the same machine or backend: {'; '.join(parts)}"]


def warnings(rows: Sequence[dict[str, Any]], recipe: Recipe) -> list[str]:
    """What a user should know before trusting the result: labels near chance, length as the judge, signs to stop."""
    found, before = [], None
    for i, row in enumerate(rows):
        judged, trained = row.get("judged") or {}, row.get("trained") or {}
        again = judged.get("rescore") or {}
        if again.get("checked") and again["why"]:
            found.append(f"{row['stage']}: {rescore.sentence(again)}")
        lint = (row.get("sampled") or {}).get("lint")
        if lint:
            found += [f"{row['stage']}: {sentence}" for sentence in Findings(**lint).warnings(before)]
            before = lint
        right = (row.get("label_accuracy") or {}).get("score")
        if right and right["high"] < 0.5:
            found.append(
                f"{row['stage']}: the self-labels are wrong more often than right ({100 * right['value']:.0f} % right)"
            )
        if judged.get("unequal_lengths", 0) >= 50 and not 0.2 < judged["longer_wins"] < 0.8:
            way = "longer" if judged["longer_wins"] > 0.5 else "shorter"
            found.append(f"{row['stage']}: the judge almost always prefers the {way} answer; length may be all it sees")
        found += stop.signs(rows[: i + 1], recipe)
        if trained.get("skipped"):
            found.append(
                f"{row['stage']}: {trained['skipped']} training steps were skipped because they were not finite"
            )
    return found
