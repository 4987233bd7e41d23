"""Judging a file of any length: records in, one line each out, in order, in bounded memory.

Records are taken 256 at a time. With an output file, lines so far lie in `FILE.part/` with a mark that says how far
they are whole and what was counted by then, so that the same command goes on after an interruption and ends with the
same bytes. Two whole models are never in memory together: the policy's sums are spooled first, then the reference's.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import data, encode, files, judges
from spa_lite.agreement import Tally
from spa_lite.backend import INIT, POLICY, Backend, Batching
from spa_lite.errors import RecipeError, RunError
from spa_lite.events import Event, Report, Tick, silent, unheard
from spa_lite.fit import NAME, Remembered, sizes_that_fit
from spa_lite.journal import Spool
from spa_lite.judge import CHUNK, Scorer, decide, no_reference, rows_of, scored
from spa_lite.judged import Item, Judged
from spa_lite.judges.controls import Gold
from spa_lite.models import Models
from spa_lite.opinion import Judge, Opinion
from spa_lite.recipe import Recipe, settings_of
from spa_lite.records import Completion, Row, Sample
from spa_lite.stages.workbench import folder_digest
from spa_lite.unfinished import finish, unfinished

TWICE = 16
"""Records at the beginning that are judged once more, each alone, to see how much numbers depend on the batch."""
ROUNDING = 2.0**-23
"""Half a float32's last place, relative: what numbers are taken to be sure to where no difference was seen."""
SECONDS = 1.0
"""How often what is done is put on the disk."""


class Progress(msgspec.Struct):
    """How far a file is judged: how many records were read (`whole`: all) and counted, and the drift that was seen."""

    read: int = 0
    whole: bool = False
    counts: dict[str, int] = {}
    drift: float | None = None
    tally: Tally = msgspec.field(default_factory=Tally)


@dataclass
class Job:
    """What is judged, and how. `bind` puts the roles on the backend; `expected` is about how many records there are (0:
    nobody knows).

    `samples`: the source holds samples (token ids and all), else candidates. `full`: write Judgements, which `train`
    reads, as is always done for samples. `tokens`: add the log-ratio of each token. `by`: the extra field whose
    values are told apart in the tally.
    """

    source: Path
    recipe: Recipe
    models: Models
    bind: Callable[[Backend], None]
    samples: bool = False
    full: bool = False
    tokens: bool = False
    by: str | None = None
    round_: int = 1
    load_classifier: judges.LoadClassifier | None = None
    gold: Gold | None = None
    cache: Path | None = None
    report: Report = silent
    expected: int = 0
    kind: judges.Kind = field(init=False)
    judge: Judge | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, before anything is loaded. Raises RecipeError."""
        if not self.samples:
            judges.check_origin(self.recipe)
        self.kind = judges.check(self.recipe)
        self.full = self.full or self.samples
        self._bound = self._still = False
        self._sizes: Remembered | None = None
        two = self.models.has_other_reference
        if self.recipe.judge.reference == "none" and two:
            raise RecipeError("--init-model is the reference, and --judge-reference none wants none; leave one out")
        if self.tokens and (self.full or not self.kind.sums):
            raise RecipeError(
                "--tokens needs --judge implicit or likelihood and the short lines: leave out --full, and give pairs"
            )
        if self.tokens and two:
            raise RecipeError(
                "--tokens needs both models at once, and two whole ones are never in memory together; "
                "leave out --tokens or --init-model"
            )

    @property
    def wants_policy(self) -> bool:
        """Whether the policy model is loaded at all."""
        return self.kind.policy or self.full

    @property
    def wants_sums(self) -> bool:
        """Whether answers are scored under the policy."""
        return self.kind.sums or self.full

    @property
    def wants_reference(self) -> bool:
        """Whether they are scored under the reference, too."""
        return (self.recipe.judge.by == "implicit" or self.full) and self.recipe.judge.reference != "none"

    @property
    def two_models(self) -> bool:
        """Whether a whole other model is the reference that is asked."""
        return self.wants_reference and self.models.has_other_reference

    # -- models ------------------------------------------------------------------------------------------------

    def backend(self) -> Backend:
        """The policy's backend, with its roles on it."""
        backend = self.models.backend
        if not self._bound:
            self._bound = True

            def fitting() -> Batching:
                return sizes_that_fit(self.recipe, backend, training=False)

            backend.batching = self._sizes.apply(self.recipe, fitting, training=False) if self._sizes else fitting()
            self.bind(backend)
        return backend

    def open(self, sums: tuple[Scorer, Scorer] | None = None) -> Judge:
        """The judge."""
        if self.wants_policy and not sums:
            self.backend()
        return judges.open_judge(
            self.recipe, self.models, self.load_classifier, self.gold, self.round_, sums=sums, cache=self.cache
        )

    def identity(self) -> dict[str, Any]:
        """All that the lines depend on, by name."""
        i = self.recipe.inputs
        found: dict[str, Any] = {"the input file": files.digest_file(self.source)}
        found |= self.recipe.for_stage("judge") | {"lengths.max_length": self.recipe.lengths.max_length}
        found |= {"--round": self.round_, "--full": self.full, "--tokens": self.tokens, "--by": self.by}
        if self.wants_policy:
            self.backend()
            found |= {"the model": self.models.fingerprint, "--init-model": i.init_model}
            found |= {"--adapter-path": folder_digest(self.models.policy_adapter)}
            found |= {"--init-adapter": folder_digest(self.models.init_adapter)}
        if not self.kind.sums:
            found["the judge"] = self._opened().key
            if self.two_models:
                self.judge = None  # it holds the policy's model, which must leave the memory meanwhile
        return found

    def _opened(self) -> Judge:
        """The judge that needs no sums, opened once."""
        self.judge = self.judge or self.open()
        return self.judge

    def remember(self, folder: Path) -> None:
        """Batch sizes that had to be made smaller are kept in this folder."""
        self._sizes = Remembered(folder, settings_of(self.recipe.batching))

    # -- records -----------------------------------------------------------------------------------------------

    def chunks(self, progress: Progress) -> Iterator[list[Item]]:
        """The records behind those that were read already, as ids where a model is loaded. Counts what is skipped."""
        if self.samples:
            numbered = enumerate(data.iter_jsonl(self.source, Sample), 1)
            items = (Item(row=row, sample=sample) for row, sample in islice(numbered, progress.read, None))
            while some := list(islice(items, CHUNK)):
                progress.read += len(some)
                yield some
            return
        reading = data.iter_candidates(self.source, skip_bad=self.recipe.inputs.skip_bad)
        for _ in islice(reading, progress.read):
            pass
        counts = Counter(progress.counts)
        while chunk := list(islice(reading, CHUNK)):
            found = [item for candidate in chunk if (item := self._item(candidate, counts))]
            progress.read += len(chunk)
            counts["bad records"], counts["repeats"] = reading.report.skipped, reading.report.repeated
            progress.counts = dict(counts)
            yield found
        counts["bad records"], counts["repeats"] = reading.report.skipped, reading.report.repeated
        progress.counts = dict(counts)

    def _item(self, candidate: data.Candidates, counts: Counter[str]) -> Item | None:
        prompt = candidate.prompt
        row: Row | None = Row(prompt=(), responses=((),) * len(candidate.answers))
        if self.wants_policy:
            backend = self.backend()
            row = encode.encode_answers(
                prompt.messages, candidate.answers, backend.tokenizer, counts, **limits(self.recipe, backend)
            )
        if row is None:
            return None
        answers = zip(row.responses, candidate.answers, strict=True)
        sample = Sample(
            id=prompt.id,
            messages=prompt.messages,
            prompt_ids=row.prompt,
            completions=tuple(Completion(ids=ids, text=text, ended="human") for ids, text in answers),
            extra=prompt.extra,
        )
        return Item(row=candidate.row, sample=sample, gold=candidate.gold)

    # -- lines -------------------------------------------------------------------------------------------------

    def blocks(self, folder: Path, progress: Progress) -> Iterator[tuple[bytes, int]]:
        """The lines behind those that are there already, as bytes with their number, a chunk at a time.

        `folder` is where sums of two whole models are kept meanwhile. `progress` is that of the chunk yielded last.
        """
        if self.two_models:
            items = self._spooled_items(folder, progress)
            policy, reference = self._spooled_sums(folder, items)
            chunks: Iterator[list[Item]] = self._from_spool(items, progress)
            done = progress.tally.records
            own, other = Kept(Told(policy, done)), Kept(Told(reference, done))
            once = self._pace("judge", 1, done)
        else:
            chunks = self.chunks(progress)
            if self.wants_policy:
                self.backend()
            self.report(Event("judge"))  # rates count from here, not from before the model was loaded
            parts = (not self.kind.sums) + self.wants_sums + self.wants_reference
            pace = self._pace("judge", parts, progress.tally.records)
            own = Kept(self._scorer(POLICY, pace))
            other = Kept(self._scorer(INIT, pace) if self.wants_reference else no_reference)
            once = unheard if self.kind.sums else pace
        self.judge = judge = self.open((own, other)) if self.kind.sums else self._opened()
        for some in chunks:
            samples = [item.sample for item in some]
            opinions = judge(samples, once) if samples else []
            sums = list(zip(*self._sums_of(samples, own, other), strict=True))
            if progress.drift is None and samples:
                progress.drift = self._drift(judge, folder, samples[:TWICE], opinions)
            credit = self._credit(samples) if self.tokens else [None] * len(some)
            judged = zip(some, opinions, sums, credit, strict=True)
            lines = [self._line(item, opinion, *pair, progress, c) for item, opinion, pair, c in judged]
            self._notice()
            yield _encoded(lines), len(lines)

    def _sums_of(
        self, samples: Sequence[Sample], own: Kept, other: Kept
    ) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        """Policy and reference sums of samples that were judged: what the judge has asked for already, and for whole
        Judgements what it has not."""
        nothing: list[tuple[float, ...]] = [()] * len(samples)
        if not samples:
            return nothing, nothing
        rows, by = rows_of(samples), self.recipe.judge.by
        policy = own.sums if self.kind.sums else own(rows) if self.full else nothing
        return policy, other.sums if by == "implicit" else other(rows) if self.full else nothing

    def _scorer(self, role: str, tick: Tick) -> Scorer:
        def score(rows: Sequence[Row]) -> list[tuple[float, ...]]:
            self.backend()
            return self.models.scorer(role, tick)(rows)

        return score

    def _pace(self, stage: str, parts: int, done: int) -> Tick:
        """A tick per record and part of it that is done."""
        ticks, useful = done * parts, 0

        def tick(tokens: int = 0) -> None:
            nonlocal ticks, useful
            if self._still:
                return
            ticks, useful = ticks + 1, useful + tokens
            if ticks % parts == 0:
                now = ticks // parts
                total = self.expected and max(now, self.expected)
                self.report(Event(stage, now, total, "pairs", tokens=useful))

        return tick

    def _notice(self) -> None:
        backend = self.models.loaded
        if backend and self._sizes:
            note = self._sizes.notice(backend.batching)
            if note:
                self.report(Event("judge", note=note))

    def _drift(self, judge: Judge, folder: Path, samples: Sequence[Sample], opinions: Sequence[Opinion]) -> float:
        """The largest difference that it makes to a margin whether a record is judged in the batch or alone."""
        if not self.kind.rounds:
            return 0.0
        if self.two_models and self.kind.sums:
            judge = self.open((Told(folder / "policy.alone.jsonl"), Told(folder / "reference.alone.jsonl")))
        found, size, self._still = 0.0, 0.0, True
        for sample, opinion in zip(samples, opinions, strict=False):
            (alone,) = judge([sample])
            moved = [x - y for x, y in zip(opinion.scores, alone.scores, strict=True)]
            found, size = max(found, max(moved) - min(moved)), max(size, *map(abs, opinion.scores))
        self._still = False
        return found or ROUNDING * size

    def _credit(self, samples: Sequence[Sample]) -> list[list[list[tuple[str, float]]]]:
        """Per sample and answer: each token's text and its log-ratio (its log-probability where no reference is)."""
        from spa_lite.credit import credits_of

        backend, rows = self.backend(), rows_of(samples)
        roles = [POLICY, INIT] if self.wants_reference else [POLICY]
        scores = [scored(backend, rows, role, per_token=True) for role in roles]
        found = []
        for index, row in enumerate(rows):
            answers = []
            for place, ids in enumerate(row.responses):
                tokens = [some[index][place].per_token or () for some in scores]
                answers.append([(c.piece, c.logratio) for c in credits_of(backend.tokenizer, ids, *tokens)])
            found.append(answers)
        return found

    def _line(
        self,
        item: Item,
        opinion: Opinion,
        policy: Sequence[float],
        reference: Sequence[float],
        progress: Progress,
        credit: list[list[tuple[str, float]]] | None,
    ) -> Any:
        """What is written of a record; and it is counted."""
        judged = Judged(item, opinion, self.recipe, progress.drift or 0.0)
        progress.tally.add(judged.seen(policy, self.by))
        if self.full:
            return decide(item.sample, policy, reference, opinion, self.recipe)
        against = reference if self.recipe.judge.by == "implicit" else None
        assert self.judge
        return judged.line(self.judge.name, policy, against, credit)

    # -- two whole models --------------------------------------------------------------------------------------

    def _spooled_items(self, folder: Path, progress: Progress) -> Spool:
        """All records as ids, in a file: when the sums are there, no model is needed to read them."""
        spool = Spool(folder / "items.jsonl")
        read = msgspec.convert(spool.note, Progress, strict=False) if spool.note else Progress()
        if not read.whole:
            for some in self.chunks(read):
                spool.append(_encoded(some), len(some), read)
            read.whole = True
            spool.append(b"", 0, read)
        progress.counts = read.counts
        return spool

    def _from_spool(self, items: Spool, progress: Progress) -> Iterator[list[Item]]:
        lines = islice(items.read(), progress.read, None)
        while some := [msgspec.json.decode(line, type=Item) for line in islice(lines, CHUNK)]:
            progress.read += len(some)
            yield some

    def _spooled_sums(self, folder: Path, items: Spool) -> tuple[Path, Path]:
        """All sums under the policy, then all under the other model, in files."""
        self.expected = items.lines

        def policy(tick: Tick) -> AbstractContextManager[Scorer]:
            return nullcontext(self._scorer(POLICY, tick))

        def reference(tick: Tick) -> AbstractContextManager[Scorer]:
            self._bound = False  # the policy leaves the memory, and its roles with it
            return self.models.other_scorer(tick)

        own = self._sums(folder / "policy.jsonl", items, policy, lambda: self.models.fingerprint)
        return own, self._sums(folder / "reference.jsonl", items, reference, lambda: self.models.reference_fingerprint)

    def _sums(
        self,
        path: Path,
        items: Spool,
        opened: Callable[[Tick], AbstractContextManager[Scorer]],
        fingerprint: Callable[[], str],
    ) -> Path:
        """The sums of all records under one model, and beside them those of the first few, each scored alone.

        Raises RunError if the model is not the one that sums are there from.
        """
        spool, alone = Spool(path), Spool(path.with_name(f"{path.stem}.alone.jsonl"))
        few = min(TWICE, items.lines)
        if spool.lines == items.lines and alone.lines == few:
            return path
        with opened(self._pace(path.stem, 1, spool.lines)) as score:
            model = fingerprint()
            if spool.note not in (None, model):
                raise RunError(
                    f"{path} holds sums of another {path.stem} model; go back to that, or begin anew with --fresh"
                )
            place = Progress(read=spool.lines)
            for some in self._from_spool(items, place):
                sums = score(rows_of([item.sample for item in some]))
                spool.append(_encoded(sums), len(sums), model)
            if alone.lines < few:
                first = next(self._from_spool(items, Progress()))[:TWICE]
                self._still = True
                singly = [score(rows_of([item.sample]))[0] for item in first[alone.lines :]]
                self._still = False
                alone.append(_encoded(singly), len(singly))
        return path


class Kept:
    """A scorer that keeps the sums it gave last, for whoever writes them down."""

    def __init__(self, score: Scorer) -> None:
        self.score = score
        self.sums: list[tuple[float, ...]] = []

    def __call__(self, rows: Sequence[Row]) -> list[tuple[float, ...]]:
        """Score rows."""
        self.sums = self.score(rows)
        return self.sums


class Told:
    """A scorer of rows that were scored before, in order: it reads their sums from a file, behind the first `done`."""

    def __init__(self, path: Path, done: int = 0) -> None:
        self._lines = islice(Spool(path).read(), done, None)

    def __call__(self, rows: Sequence[Row]) -> list[tuple[float, ...]]:
        """The sums of the next rows."""
        return [msgspec.json.decode(line, type=tuple[float, ...]) for line in islice(self._lines, len(rows))]


def limits(recipe: Recipe, backend: Backend) -> dict[str, Any]:
    """How long human answers and their prompts may be, as `encode` asks it."""
    return {
        "max_prompt_length": recipe.lengths.max_prompt_length,
        "max_length": min(recipe.lengths.max_length, backend.context),
        "long_prompts": recipe.lengths.long_prompts,
    }


# --- to standard output, or to a file -----------------------------------------------------------------------------


def stream(job: Job, write: Callable[[bytes], None]) -> Progress:
    """Judge everything and hand out the lines as they come."""
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="spa-lite-") as folder:
        for block, _ in job.blocks(Path(folder), progress):
            write(block)
    return progress


REPLIES, LINES = "replies", "lines.jsonl"


def to_file(job: Job, output: Path, fresh: bool = False, seconds: float = SECONDS) -> Progress:
    """Judge everything into a file, going on with what an interrupted call has left in `FILE.part/`.

    What is done is put on the disk every so many `seconds`. Raises RunError as `unfinished` does.
    """

    def identity(part: Path) -> dict[str, Any]:
        job.remember(part)
        job.cache = job.cache or part / REPLIES
        return job.identity()

    with unfinished(output, identity, fresh, early=(NAME, f".{NAME}.tmp", REPLIES)) as part:
        spool = Spool(part / LINES)
        progress = msgspec.convert(spool.note, Progress, strict=False) if spool.note else Progress()
        if spool.lines:
            job.report(Event("judge", note=f"going on behind {spool.lines} lines that {part} holds"))
        blocks: list[bytes] = []
        count, last = 0, time.monotonic()
        for block, lines in job.blocks(part, progress):
            blocks.append(block)
            count += lines
            if time.monotonic() - last >= seconds:
                spool.append(b"".join(blocks), count, progress)
                blocks, count, last = [], 0, time.monotonic()
        spool.append(b"".join(blocks), count, progress)
        finish(part, LINES, output)
    return progress


def _encoded(records: Sequence[Any]) -> bytes:
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)
