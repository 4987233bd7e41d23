"""Answers of one side of a comparison: a stage or an adapter of a model, a whole model, or a file that holds them.

What a model answers is kept in a file named by all that it depends on, so that the same question again costs nothing
and an interruption a chunk. Models take turns: `OneModel` has at most one in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import encode, sources
from spa_lite.backend import GGUF, POLICY
from spa_lite.data import conversation_key
from spa_lite.errors import DataError, ModelError
from spa_lite.events import Report, silent
from spa_lite.journal import Marked
from spa_lite.judge import asked
from spa_lite.models import Models
from spa_lite.opinion import Judge, Opinion
from spa_lite.prepare import Loader, models_of
from spa_lite.recipe import Recipe, that_matter
from spa_lite.records import Completion, Message, Prompt, Sample
from spa_lite.sample import sample
from spa_lite.sources import BadRecord, Fields
from spa_lite.stages.workbench import folder_digest
from spa_lite.store import HEAD, digest

ADAPTERS, MODEL = ("adapter_config.json", "adapter.gguf"), "config.json"
"""Files that make a folder an adapter, or a model. A model may also be a GGUF file."""
MODEL_WORD = "model:"
ANSWER_FIELDS = ("output", "answer", "response")
"""Where a file may keep an answer: as AlpacaEval's files do, or in plain words."""


@dataclass(frozen=True)
class Side:
    """Who answers. `recipe` says how its model is loaded; with `file` the answers are there already."""

    name: str
    recipe: Recipe
    adapter: Path | None = None
    file: Path | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two sides that are the same."""
        return self.file, model_key(self.recipe), folder_digest(self.adapter)


def model_key(recipe: Recipe) -> tuple[Any, ...]:
    """What a recipe says about which model is loaded, and how."""
    i = recipe.inputs
    return i.model, i.backend, i.device, i.init_adapter, i.init_model, recipe.model


class OneModel:
    """Whichever model is asked for, alone in memory. Do not keep what it gives: the next one takes its place."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._key: tuple[Any, ...] | None = None
        self._models: Models | None = None

    def of(self, recipe: Recipe) -> Models:
        """The models of a recipe; loaded when they are used."""
        if self._models is None or self._key != model_key(recipe):
            self.release()
            self._key, self._models = model_key(recipe), models_of(recipe, self._load)
        return self._models

    def release(self) -> None:
        """Have none in memory."""
        if self._models is not None:
            self._models = None
            gc.collect()


# --- which side a word means -----------------------------------------------------------------------------------


def run_of(path: Path) -> Path | None:
    """The run folder that a path is or lies in."""
    return next(
        (folder for folder in (path, *path.parents, *path.resolve().parents) if (folder / HEAD).is_file()), None
    )


def side_of(word: str, recipe: Recipe) -> Side:
    """The side a word names: `init`, a run, a stage of one, an adapter, a model (folder, GGUF file or
    `model:NAME`), or a file.

    `recipe` names the base model, unless the word does. Raises ModelError for anything else.
    """
    if word == "init":
        return Side(word, recipe, _given_init(recipe))
    if word.startswith(MODEL_WORD):
        return Side(word, _other_model(recipe, word.removeprefix(MODEL_WORD)))
    path = Path(word)
    if path.is_file() and path.suffix == GGUF:
        return Side(word, _other_model(recipe, word))
    if path.is_file():
        return Side(word, recipe, file=path)
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in ADAPTERS):
            return Side(word, recipe, folder)
    if path.name == "init" and run_of(path):
        return Side(word, recipe, _given_init(recipe))
    if (path / MODEL).is_file():
        return Side(word, _other_model(recipe, word))
    what = "holds neither an adapter nor a model" if path.is_dir() else "is no file or folder"
    raise ModelError(
        f"{word} {what}; a side is a run, a stage of one (runs/NAME/rounds/1), an adapter folder, init, "
        f"a model folder, {MODEL_WORD}NAME, or a file of answers"
    )


def _given_init(recipe: Recipe) -> Path | None:
    return Path(recipe.inputs.init_adapter) if recipe.inputs.init_adapter else None


def _other_model(recipe: Recipe, model: str) -> Recipe:
    return replace(recipe, inputs=replace(recipe.inputs, model=model, init_adapter=None, init_model=None))


# --- answers of a model ----------------------------------------------------------------------------------------


def encoded(
    prompts: Sequence[Prompt], models: Models, recipe: Recipe
) -> tuple[list[tuple[Prompt, tuple[int, ...]]], list[str]]:
    """Prompts as token ids of a model within the recipe's limits, and sentences about those that do not fit."""
    found, report = encode.encode_prompts(
        prompts,
        models.backend.tokenizer,
        max_prompt_length=recipe.lengths.max_prompt_length,
        long_prompts=recipe.lengths.long_prompts,
        max_tokens=recipe.sampling.max_tokens,
        context=models.backend.context,
    )
    return found, report.lines()[1:]


def answers(
    side: Side,
    models: Models,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    folder: Path,
    n: int = 1,
    report: Report = silent,
    stage: str = "answers",
) -> tuple[list[Sample], list[str]]:
    """The answers of a model, n to a prompt, kept in `folder`; and sentences about prompts that were skipped or cut.

    The random numbers are those of the measuring stage of a run: the same for every model.
    """
    ready, notes = encoded(prompts, models, recipe)
    if not ready:
        raise DataError(f"{side.name}: none of {len(prompts)} prompts can be answered: {' '.join(notes)}")
    depends = [models.fingerprint, models.made_by, folder_digest(side.adapter), that_matter(recipe, "sample"), n]
    path = folder / f"{digest([depends, [(p.id, ids) for p, ids in ready]])[:16]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Marked(path)
    if len(journal.kept) < len(ready):
        backend = models.backend
        backend.bind(POLICY, side.adapter)
        for chunk in sample(backend, ready, recipe, 0, report, stage, n, skip=len(journal.kept)):
            journal.append(chunk)
    return [msgspec.json.decode(line, type=Sample) for line in path.read_bytes().splitlines()], notes


# --- answers of a file -----------------------------------------------------------------------------------------


def read_answers(path: Path) -> list[Sample]:
    """Answers of a file, one to a prompt; each line (or element of a JSON list) is in one of these forms.

        {"prompt": "...", "answer": "..."}          `messages` for `prompt`; `response` or `output` for `answer`
        {"instruction": "...", "output": "..."}     AlpacaEval's model_outputs.json
        a line of samples.jsonl                     what `spa-lite sample` writes; its first answer counts

    Raises DataError for a record of another form, naming its line, and for a prompt that is answered twice.
    """
    found: dict[bytes, Sample] = {}
    for entry in sources.entries(path):
        try:
            record = _answered(sources.fields(entry))
        except BadRecord as bad:
            raise DataError(f"{entry.place}: {bad}") from None
        except msgspec.ValidationError as error:
            raise DataError(f"{entry.place}: {error}; mend the record or drop it") from None
        key = conversation_key(record.messages)
        if key in found:
            raise DataError(f"{entry.place}: this prompt is answered above already; keep one of the two")
        found[key] = record
    if not found:
        raise DataError(f"{path}: the file holds no answer; give it at least one")
    return list(found.values())


def _answered(fields: Fields) -> Sample:
    if "completions" in fields:
        whole = msgspec.convert(fields, Sample)
        if not whole.completions:
            raise BadRecord("missing", "there is no answer in `completions`; add one")
        return Sample(
            id=whole.id,
            messages=whole.messages,
            prompt_ids=whole.prompt_ids,
            completions=whole.completions[:1],
            extra=whole.extra,
        )
    messages = _messages(fields)
    text = next((fields[name] for name in ANSWER_FIELDS if name in fields), None)
    if not isinstance(text, str):
        raise BadRecord("missing", "there is no text in `answer`, `response` or `output`; add one")
    extra = {name: v for name, v in fields.items() if name not in {"prompt", "messages", "instruction", *ANSWER_FIELDS}}
    return Sample(
        id=conversation_key(messages).hex()[:16],
        messages=messages,
        prompt_ids=(),
        completions=(Completion(ids=(), text=text, ended="human"),),
        extra=extra.pop("extra") if isinstance(extra.get("extra"), dict) else extra,
    )


def _messages(fields: Fields) -> tuple[Message, ...]:
    if "messages" in fields:
        return msgspec.convert(fields["messages"], tuple[Message, ...])
    asked = fields.get("prompt", fields.get("instruction"))
    if not isinstance(asked, str) or not asked.strip():
        raise BadRecord("missing", "there is no text in `prompt`, `messages` or `instruction`; add one")
    return (Message(role="user", content=asked),)


def prompts_of_answers(samples: Iterable[Sample]) -> list[Prompt]:
    """The prompts that were answered."""
    return [Prompt(id=s.id, messages=s.messages, extra=s.extra) for s in samples]


# --- two sides -------------------------------------------------------------------------------------------------


def paired(
    prompts: Sequence[Prompt], a: Sequence[Sample], b: Sequence[Sample], ids: bool = True
) -> tuple[list[Sample], int]:
    """One sample per prompt that both sides answered, a's answer first; and how many prompts are left out.

    Answers are found by the text of the conversation. Token ids are dropped without `ids`: those of two tokenizers, or
    of one side alone, must not be compared.
    """
    first, second = ({conversation_key(s.messages): s for s in side} for side in (a, b))
    found = []
    for prompt in prompts:
        key = conversation_key(prompt.messages)
        if key in first and key in second:
            found.append(_pair(prompt, first[key], second[key], ids))
    return found, len(prompts) - len(found)


def _pair(prompt: Prompt, a: Sample, b: Sample, ids: bool) -> Sample:
    own = (a.completions[0], b.completions[0])
    return Sample(
        id=prompt.id,
        messages=prompt.messages,
        prompt_ids=a.prompt_ids if ids else (),
        completions=own if ids else tuple(Completion(ids=(), text=c.text, ended=c.ended) for c in own),
        extra=prompt.extra,
    )


def with_ids(samples: Sequence[Sample], models: Models) -> list[Sample]:
    """The samples as token ids of a judge's model, from their texts: the sides may read text otherwise, or be files.

    An answer that broke off at the length cap gets no end-of-turn token.
    """
    tokenizer = models.backend.tokenizer

    def ids(sample: Sample, completion: Completion) -> Completion:
        whole = encode.answer_ids(sample.messages, completion.text, tokenizer)
        cut = whole[:-1] if completion.ended == "cap" else whole
        return Completion(ids=cut, text=completion.text, ended=completion.ended)

    return [
        Sample(
            id=s.id,
            messages=s.messages,
            prompt_ids=tuple(tokenizer.encode_prompt(s.messages)),
            completions=tuple(ids(s, c) for c in s.completions),
            extra=s.extra,
        )
        for s in samples
    ]


# --- what a judge makes of them --------------------------------------------------------------------------------

AT_A_TIME = 64
"""Samples judged between two writes: what an interruption costs."""


def opinions(
    judge: Judge,
    samples: Sequence[Sample],
    folder: Path,
    report: Report = silent,
    depends: Any = None,
    size: int = AT_A_TIME,
) -> list[Opinion]:
    """A judge's opinions on samples, kept in `folder` in a file named by judge, samples and `depends`."""
    folder.mkdir(parents=True, exist_ok=True)
    return asked(folder / f"{digest([judge.key, samples, depends])[:16]}.jsonl", judge, samples, report, size=size)
