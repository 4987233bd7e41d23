"""What every stage of a run works with: models, data, a run folder; roles put on the base; work that is resumed.

A policy is named by the stage that made it, so a key never depends on where a run lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextlib import nullcontext as alone
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import backend as contract
from spa_lite import encode, guards, sampler, sft, states
from spa_lite.backend import INIT, POLICY, PREVIOUS, Backend, Sampling
from spa_lite.checkpoint import Checkpoints
from spa_lite.errors import ModelError
from spa_lite.estimate import Longest, longest_of_rows, responses_of
from spa_lite.evaluate import GoldRule
from spa_lite.events import Event, Report, Tick, silent, ticking
from spa_lite.files import lines_of, move
from spa_lite.fit import Remembered, sizes_that_fit
from spa_lite.journal import Marked
from spa_lite.judge import Scorer, Sums, Tokens, resumed, token_scorer
from spa_lite.models import Models
from spa_lite.prompts import Material
from spa_lite.recipe import Recipe, settings_of, that_matter
from spa_lite.records import Completion, Judgement, Pair, Prompt, Row, Sample
from spa_lite.sample import Encoded, sample
from spa_lite.store import Run, Stage, digest
from spa_lite.train import optimizer_of


@dataclass(frozen=True)
class Data:
    """Everything a run reads, already as token ids. `gold` is the truth where it is known (the lesson).

    `rounds` are the prompts of each round, empty where the model writes them. `answers` is what people answered to
    them, by the prompt's id: one good answer, or the chosen and the rejected one.
    """

    seed_pairs: list[tuple[Pair, Row]]
    rounds: list[list[Encoded]]
    held_out_pairs: list[tuple[Pair, Row]]
    held_out_prompts: list[Encoded]
    answers: dict[str, tuple[Completion, ...]] = field(default_factory=dict)
    material: Material | None = None  # what the model is asked for where it writes prompts
    gold: GoldRule | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """An adapter, and the key of the stage (or the digest of the folder) that it comes from."""

    adapter: Path | None
    key: str


FRAME = 64
"""Tokens that a chat template and the words of a request may add to a text that a model wrote."""


class Workbench:
    """One run's models, data and folder, and what its stages have in common."""

    def __init__(self, models: Models, recipe: Recipe, data: Data, run: Run, report: Report = silent) -> None:
        self.models, self.recipe, self.data, self.run = models, recipe, data, run
        self.summaries: dict[str, dict[str, dict[str, Any]]] = {}
        self.stages: dict[str, Stage] = {}  # by title
        self.stopped: str | None = None  # the round after which a stop rule ended the run
        self.init = Policy(models.init_adapter, digest(["init", folder_digest(models.init_adapter)]))
        self.sizes = Remembered(run.folder, settings_of(recipe.batching))
        self._report = report
        run.report = report
        run.meter = lambda: models.loaded.peak_memory(reset=True) if models.loaded else None

    def _stage(self, folder: str, kind: str, outputs: tuple[str, ...], inputs: dict[str, str], size: int = 0) -> Stage:
        settings = that_matter(self.recipe, kind, int(inputs.get("round", 0)))
        return Stage(folder, kind, outputs, settings, {"model": self.models.fingerprint, **inputs}, size)

    def _once(
        self, stage: Stage, work: Callable[[Path], dict[str, Any]], made_by: dict[str, Any] | None = None
    ) -> Stage:
        """Do a stage, or read it if it is finished; either way its summary is kept for the table."""
        summary = self.run.once(stage, work, made_by or self.models.made_by)
        self.summaries.setdefault(stage.folder, {})[stage.kind] = summary
        self.stages[stage.title] = stage
        self.report(Event(stage.title, 1, 1, "stage", metrics=summary))
        return stage

    def stage_of(self, i: int, kind: str) -> Stage:
        """A stage of a round that is done."""
        return self.stages[f"rounds/{i} {kind}"]

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
        role: str = POLICY,
        sampling: Sampling | None = None,
        first: int = 0,
    ) -> None:
        """Write all samples of the prompts to a journal at `path`; those that it holds are not computed again. `keep`:
        their states, too, to a file beside it. The rest is as in `sample`."""
        journal = Marked(path)
        writer = states.Writer(path.with_name(states.NAME), read_samples(path)) if keep else None
        if writer and not writer.whole:
            self.report(Event(name, note=f"{writer.path} is damaged or missing, so all is sampled anew"))
            path.unlink()
            journal, writer = Marked(path), states.Writer(writer.path, [])
        for chunk in sample(
            backend, prompts, self.recipe, i, self.report, name, n, role, len(journal.kept), writer, sampling, first
        ):
            journal.append(chunk)

    def _taught(self, i: int, kind: str, known: Callable[[Path], Any], inputs: dict[str, str], size: int) -> Policy:
        """A helper of a recipe, trained by SFT from pi_init on (messages, answer) pairs."""

        def work(part: Path) -> dict[str, Any]:
            examples = known(part)
            backend = self._train_from(self.init)
            rows, told = sft.rows_of(examples, backend, self.recipe)
            name = f"round {i} {kind}" if i else kind
            if len(told.lines()) > 1:
                self.report(Event(name, note=f"{kind}: {' '.join(told.lines())}"))
            summary = sft.teach(backend, rows, self.recipe, self._checkpoints(part, name), self.report, name, i)
            move(part / "adapter", part / f"{kind}-adapter")
            move(part / "metrics.jsonl", part / f"{kind}.jsonl")
            return summary

        outputs = (f"{kind}-adapter", f"{kind}.jsonl")
        stage = self._stage(f"rounds/{i}", kind, outputs, {"pi_init": self.init.key, "round": str(i), **inputs}, size)
        return self._policy(self._once(stage, work), f"{kind}-adapter")

    @property
    def _labelled(self) -> list[Prompt]:
        return [pair.prompt for pair, _ in self.data.seed_pairs]

    @property
    def _in_lesson(self) -> bool:
        return self.recipe.inputs.model is None

    def _encoded(self, found: Sequence[Prompt], name: str) -> list[Encoded]:
        """Prompts with their ids; what does not fit is said."""
        lengths = self.recipe.lengths
        encoded, told = encode.encode_prompts(
            found,
            self.models.backend.tokenizer,
            max_prompt_length=lengths.max_prompt_length,
            long_prompts=lengths.long_prompts,
            max_tokens=self.recipe.sampling.max_tokens,
            context=self.models.backend.context,
        )
        if len(told.lines()) > 1:
            self.report(Event(name, note=f"{name}: {' '.join(told.lines())}"))
        return encoded

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

    def _policy(self, stage: Stage, name: str = "adapter") -> Policy:
        return Policy(self.run.path(stage, name), stage.key)

    def _bind(self, adapter: Path | None, lagged: Policy | None = None) -> Backend:
        """Put the roles on the base: pi_init, the policy, and whatever else is asked for."""
        backend = self.models.backend
        backend.batching = self.sizes.apply(
            self.recipe, lambda: sizes_that_fit(self.recipe, backend, training=False), training=False
        )
        backend.bind(INIT, self.models.init_adapter)
        backend.bind(POLICY, adapter)
        if lagged:
            backend.bind("lagged", lagged.adapter)
        return backend

    def _train_from(self, start: Policy, reference: Policy | None = None) -> Backend:
        """Begin to train the adapter of `start`, or a fresh one where it has none; PREVIOUS is `reference` (none: the
        start itself)."""
        backend = self._bind(start.adapter)
        if start.adapter is None:
            backend.bind(POLICY, None, lora_shape(self.recipe))
        backend.snapshot()
        if reference and reference.key != start.key:
            backend.bind(PREVIOUS, reference.adapter)
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

    def _init_scorer(self, tick: Tick) -> AbstractContextManager[Scorer]:
        """Scores under pi_init: the base, or a whole other model that takes its place inside the block."""
        models = self.models
        return models.other_scorer(tick) if models.has_other_reference else alone(models.scorer(INIT, tick))


def longest(recipe: Recipe, data: Data) -> Longest:
    """The longest texts that a run trains on, in tokens, as far as they are known before it samples."""
    prompts = [len(ids) for share in data.rounds for _, ids in share]
    if guards.is_written(recipe):
        prompts.append(min(recipe.lengths.max_prompt_length, recipe.prompts.max_tokens + FRAME))
    labelled = longest_of_rows([row for _, row in data.seed_pairs if guards.needs_pairs(recipe)])
    human = [len(answer.ids) for answers in data.answers.values() for answer in answers]
    answer = max([recipe.sampling.max_tokens, *human]) if prompts else 0
    prompt = max([*prompts, labelled.prompt])
    improved = 0
    if prompts and "improve" in recipe.candidates.kinds:  # which learns from a prompt with a draft, and an answer
        improved = min(recipe.lengths.max_length, labelled.pair + recipe.sampling.max_tokens + FRAME)
    return Longest(prompt, answer, max(labelled.pair, improved), max(labelled.labelled, improved), responses_of(recipe))


def lora_shape(recipe: Recipe) -> contract.Lora:
    """The fresh adapter a recipe asks for."""
    return contract.Lora(recipe.lora.rank, recipe.lora.alpha, tuple(recipe.lora.targets), recipe.seed)


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
