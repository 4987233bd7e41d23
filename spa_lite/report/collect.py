"""What a run folder tells, as plain values: finished or not, of this version or an older one. Nothing is changed.

What is missing is left out, what is damaged is named in `problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from spa_lite.errors import RecipeError, RunError, SpaError
from spa_lite.files import read_json
from spa_lite.inventory import Place, Reading, differences, place_of
from spa_lite.library import markers_of, numerics
from spa_lite.prepare import is_lesson
from spa_lite.recipe import Recipe, build, read_yaml, settings_of
from spa_lite.records import Ids, Message, Prompt
from spa_lite.rounds import row_name
from spa_lite.store import check_format
from spa_lite.summary import warnings
from spa_lite.throughput import KINDS

Gold = Callable[[Mapping[str, Any], str, bool], Mapping[str, float] | None]
"""The gold rule, None where it knows nothing (as in `evaluate`)."""


class Side(msgspec.Struct, frozen=True):
    """What is shown of one of two judged answers. Sums are nats; None where the judge read none."""

    text: str
    ids: Ids = ()
    ended: str = "eos"
    kind: str = "sample"
    policy: float | None = None
    reference: float | None = None


class Judged(msgspec.Struct, frozen=True):
    """What is shown of one line of judgements.jsonl."""

    id: str
    messages: tuple[Message, ...]
    a: Side
    b: Side
    label: str
    prompt_ids: Ids = ()
    margin: float | None = None
    p: float | None = None
    tie: bool = False
    tokens_a: int = 0
    tokens_b: int = 0
    judge: str = "implicit"
    score_a: float | None = None
    score_b: float | None = None
    confidence: float | None = None
    extra: dict[str, Any] = {}

    @property
    def chosen(self) -> Side:
        """The preferred answer."""
        return self.a if self.label == "a" else self.b

    @property
    def rejected(self) -> Side:
        """The other one."""
        return self.b if self.label == "a" else self.a

    @property
    def certainty(self) -> float | None:
        """How far apart the judge saw both: by its own scores if it has any, else by the margin."""
        if self.score_a is not None and self.score_b is not None:
            return abs(self.score_a - self.score_b)
        return None if self.margin is None else abs(self.margin)

    @property
    def identical(self) -> bool:
        """Whether both answers are the same."""
        return self.a.ids == self.b.ids and self.a.text == self.b.text


class Answer(msgspec.Struct, frozen=True):
    """One line of samples.jsonl or answers.jsonl."""

    id: str
    messages: tuple[Message, ...]
    completions: tuple[Side, ...]
    extra: dict[str, Any] = {}


@dataclass(frozen=True)
class Judgement:
    """The numbers of one judged pair, for figures. `margin` is towards the label: below 0 the implicit reward would
    have said otherwise. `right` is None where the truth is not known, or both answers are equally good."""

    id: str
    certainty: float | None
    margin: float | None
    right: bool | None
    flagged: bool
    identical: bool
    policy: tuple[float, float] | None = None  # log-probability (nats) of chosen and rejected under the judge's policy
    reference: tuple[float, float] | None = None  # and under its reference
    judge: str = "implicit"


@dataclass(frozen=True)
class Stage:
    """init, the seed stage or a round: a row of the table, and what lies behind it."""

    name: str
    place: str  # init, rounds/0, rounds/1, ...
    row: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    spent: Mapping[str, Mapping[str, float]]  # kind -> seconds, cpu, peak (bytes)
    made_by: Mapping[str, Mapping[str, Any]]  # kind -> what computed it
    sizes: Mapping[str, int]  # kind -> prompts or pairs it worked on
    judgements: Sequence[Judgement] = ()

    @property
    def number(self) -> int:
        """-1 for init, 0 for pi_0, then the round."""
        return _number(self.place)

    def interval(self, name: str) -> Mapping[str, float] | None:
        """A measure with its interval in [0, 1]; None if it was not measured. `labels`: agreement with gold."""
        found = (self.row.get("label_accuracy") or {}).get("score") if name == "labels" else self.row.get(name)
        return found if isinstance(found, Mapping) and {"value", "low", "high"} <= found.keys() else None


@dataclass
class Told:
    """One run as the report sees it. `unfinished` says where it stands; empty if it is finished."""

    name: str
    folder: Path
    unfinished: str = ""
    recipe: Recipe | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # path -> value, of recipe.yaml
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # path -> (value, that of its recipe and scale)
    stages: list[Stage] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the run itself noted
    problems: list[str] = field(default_factory=list)  # what could not be read or computed for the report
    gold: Gold | None = None

    @property
    def rounds(self) -> list[Stage]:
        """The stages that judged or will judge: rounds 1, 2, ..."""
        return [stage for stage in self.stages if stage.number > 0]

    @property
    def makers(self) -> list[str]:
        """Kinds of arithmetic the results come from: one, unless the run changed machines."""
        return sorted({numerics(maker) for stage in self.stages for maker in stage.made_by.values() if maker})

    @property
    def reused(self) -> list[str]:
        """Stages that were taken from another run: their results are there, and no time was spent."""
        return [f"{stage.name} {kind}" for stage in self.stages for kind in stage.made_by if not stage.spent.get(kind)]


# -- which runs ----------------------------------------------------------------------------------------------------


def places_of(paths: Iterable[Path]) -> list[Place]:
    """The runs that are meant: run folders, and the cells of studies. Raises RunError for anything else."""
    found: dict[Path, Place] = {}
    for path in paths:
        place = place_of(path, path.resolve().name)
        if place is None:
            raise RunError(f"{path} is neither a run nor a study (it has no run.json); spa-lite runs lists them")
        for run in place.runs:
            found.setdefault(run.folder.resolve(), run)
    if not found:
        raise RunError("there is no run to report on: the study has no cells yet")
    return list(found.values())


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, as short as tells them apart."""
    for depth in range(1, 1 + max(len(folder.resolve().parts) for folder in folders)):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def read_runs(paths: Iterable[Path]) -> list[Told]:
    """Read every run that is meant. Raises RunError if there is none, or one has another format."""
    places = places_of(paths)
    names = names_of([place.folder for place in places])
    return [read_run(place, name) for place, name in zip(places, names, strict=True)]


def read_run(place: Place, name: str) -> Told:
    """Read one run folder."""
    folder = place.folder
    check_format(folder)
    told = Told(name, folder)
    _read_recipe(told, place)
    if told.recipe and is_lesson(told.recipe):
        told.gold = lesson_gold
    markers = _markers(told)
    names = sorted({*markers, *(path.parent.relative_to(folder).as_posix() for path in _parts(folder))}, key=_number)
    told.stages = [_stage(told, at, markers.get(at, {})) for at in names]
    if (folder / "summary.json").exists():
        told.summary = _json(told, folder / "summary.json") or {}
    told.warnings = [str(line) for line in told.summary.get("warnings") or _warnings(told)]
    told.notes += [str(line) for line in told.summary.get("notes") or []]
    told.unfinished = "" if told.summary else _where(told, markers)
    return told


def _warnings(told: Told) -> list[str]:
    """What an unfinished run would warn of by now."""
    return [] if told.summary or told.recipe is None else warnings([dict(s.row) for s in told.stages], told.recipe)


def lesson_gold(extra: Mapping[str, Any], text: str, ended: bool) -> Mapping[str, float] | None:
    """The lesson's gold rule; nothing for a record that does not look like the lesson's."""
    from spa_lite.lesson.source import rule

    try:
        return rule(extra, text, ended)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _read_recipe(told: Told, place: Place) -> None:
    path = place.folder / "recipe.yaml"
    if not path.exists():
        return
    try:
        told.settings = read_yaml(path)
        told.recipe = build({str(path): told.settings})[0]
        told.settings = settings_of(told.recipe)
        told.changed = differences(Reading(place, recipe=told.recipe))
    except RecipeError as error:
        told.problems.append(str(error))


def _markers(told: Told) -> dict[str, dict[str, dict[str, Any]]]:
    """Place -> kind -> what the marker of that finished stage says."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in markers_of(told.folder):
        done, kind = _json(told, path), path.name.removesuffix(".done.json")
        if done is not None and kind in KINDS:
            found.setdefault(path.parent.relative_to(told.folder).as_posix(), {})[kind] = done
    return {at: {kind: kinds[kind] for kind in KINDS if kind in kinds} for at, kinds in found.items()}


def _parts(folder: Path) -> list[Path]:
    return [path for pattern in ("init/*.part", "rounds/*/*.part") for path in sorted(folder.glob(pattern))]


def _where(told: Told, markers: Mapping[str, Mapping[str, Any]]) -> str:
    """Where an unfinished run stands."""
    begun = [f"{_row_name(told, at)} {path.name.removesuffix('.part')}" for path in _parts(told.folder)
             if (at := path.parent.relative_to(told.folder).as_posix())]  # fmt: skip
    done = [f"{_row_name(told, at)} {kind}" for at in sorted(markers, key=_number) for kind in markers[at]]
    last = f"finished so far: {done[-1]}" if done else "no stage is finished"
    total = f" (of {told.recipe.rounds} rounds)" if told.recipe else ""
    return f"{last}{total}" + (f"; begun: {', '.join(begun)}" if begun else "")


def _row_name(told: Told, at: str) -> str:
    """What people call the stage, as in the run's own table."""
    return row_name(told.recipe or Recipe(), at)


def _number(at: str) -> int:
    last = at.rpartition("/")[2]
    return int(last) if last.isdecimal() else -1


# -- one stage -----------------------------------------------------------------------------------------------------


def _stage(told: Told, at: str, done: Mapping[str, Mapping[str, Any]]) -> Stage:
    kinds = {kind: marker.get("summary") or {} for kind, marker in done.items()}
    steps = _steps(told, at)
    row = {
        "stage": _row_name(told, at),
        "folder": at,
        **kinds.get("measure", {}),
        "judged": kinds.get("judge"),
        "sampled": kinds.get("sample"),
        "prompted": kinds.get("prompts"),
        "trained": kinds.get("train") or kinds.get("seed") or kinds.get("generator") or {},
    }
    flagged = {i for step in steps for i in step.get("flagged") or []}
    timings = told.folder / at / "timings.json"
    return Stage(
        name=row["stage"],
        place=at,
        row=row,
        steps=steps,
        spent=(_json(told, timings) or {}) if timings.exists() else {},
        made_by={kind: marker.get("made_by") or {} for kind, marker in done.items()},
        sizes={kind: int(marker.get("size") or 0) for kind, marker in done.items()},
        judgements=[_numbers(told, judged, flagged) for judged in judged_of(told, at)],
    )


def _steps(told: Told, at: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, those of a stage that is still at work included."""
    place = told.folder / at
    names = ("metrics.jsonl", "train.part/metrics.jsonl", "seed.part/metrics.jsonl", "generator.jsonl")
    for path in (place / name for name in names):
        if path.exists():
            return list(_records(told, path, dict[str, Any]))
    return []


def _numbers(told: Told, judged: Judged, flagged: set[str]) -> Judgement:
    margin = judged.margin
    towards = margin if margin is None or judged.label == "a" else -margin
    sides = judged.chosen, judged.rejected
    return Judgement(
        judged.id,
        judged.certainty,
        towards,
        right(told, judged),
        judged.id in flagged,
        judged.identical,
        _both(*[side.policy for side in sides]),
        _both(*[side.reference for side in sides]),
        judged.judge,
    )


def _both(chosen: float | None, rejected: float | None) -> tuple[float, float] | None:
    """Two sums, if there are any: a judge that reads no probabilities leaves none, or zeros."""
    return (chosen, rejected) if chosen and rejected else None


def right(told: Told, judged: Judged) -> bool | None:
    """Whether a label agrees with gold; None where that is not known or both answers are equally good."""
    chosen, rejected = (gold_score(told, judged.extra, side) for side in (judged.chosen, judged.rejected))
    return None if chosen is None or rejected is None or chosen == rejected else chosen > rejected


def gold_score(told: Told, extra: Mapping[str, Any], side: Side) -> float | None:
    """Gold score of an answer, where the truth is known."""
    found = told.gold(extra, side.text, side.ended != "cap") if told.gold else None
    return None if found is None else found["score"]


def judged_of(told: Told, at: str) -> Iterator[Judged]:
    """The judged pairs of a round, one at a time: those of a large one fill much memory."""
    yield from _records(told, told.folder / at / "judgements.jsonl", Judged)


def samples_of(told: Told, at: str) -> Iterator[Answer]:
    """All the candidates of a round."""
    yield from _records(told, told.folder / at / "samples.jsonl", Answer)


def prompts_of(told: Told, at: str) -> Iterator[Prompt]:
    """The prompts that a round's model wrote, as far as they were kept."""
    yield from _records(told, told.folder / at / "prompts.jsonl", Prompt)


def answers_of(told: Told, at: str) -> Iterator[Answer]:
    """The answers of a stage's policy to the held-out prompts."""
    yield from _records(told, told.folder / at / "answers.jsonl", Answer)


def _records(told: Told, path: Path, type_: Any) -> Iterator[Any]:
    """Records of a JSON-lines file. What cannot be read is counted in the notes."""
    decode, bad = msgspec.json.Decoder(type_).decode, 0
    for line in _lines(path):
        if not line.endswith(b"\n") and path.parent.name.endswith(".part"):
            continue  # being written just now
        try:
            yield decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            bad += 1
    if bad:
        told.problems.append(f"{path.relative_to(told.folder).as_posix()}: lines that cannot be read: {bad}")


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file


def _json(told: Told, path: Path) -> dict[str, Any] | None:
    """An object of a JSON file; None if it is damaged, which is noted."""
    try:
        found = read_json(path)
    except (SpaError, OSError):
        found = None
    if isinstance(found, dict):
        return found
    told.problems.append(f"{path.relative_to(told.folder).as_posix()} is damaged and was left out")
    return None
