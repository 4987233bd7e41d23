"""From a recipe to all that a run reads: records from files or the lesson, split over the rounds, as token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from spa_lite import data, encode, guards, judges, prompts, sampler, sft
from spa_lite.backend import GGUF, Backend, ModelSettings
from spa_lite.errors import DataError, RecipeError
from spa_lite.evaluate import GoldRule
from spa_lite.fit import batching_of
from spa_lite.judges import LoadClassifier
from spa_lite.models import Models
from spa_lite.prompts import Material
from spa_lite.recipe import SETTINGS, Inputs, Recipe, settings_of
from spa_lite.records import Completion, Demonstration, Ids, Pair, Prompt, Row
from spa_lite.sample import Encoded
from spa_lite.stages.workbench import Data, folder_digest
from spa_lite.store import digest

Loader = Callable[[str | None, ModelSettings], Backend]
"""(name of a backend or None for the best one here, how to load) -> a backend with its model."""


Answers = tuple[Completion, ...]
"""What people answered: one good answer, or the chosen and the rejected one."""
Answered = tuple[Prompt, Ids, Answers]


@dataclass
class Raw:
    """Records as they were read, before any model is loaded."""

    seed_pairs: list[Pair] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    held_out_pairs: list[Pair] = field(default_factory=list)
    held_out_prompts: list[Prompt] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    material: Material | None = None
    gold: GoldRule | None = None
    notes: list[str] = field(default_factory=list)


def model_settings(recipe: Recipe, model: str | None = None) -> ModelSettings:
    """How to load the recipe's model (or another one in the same way). No model means the built-in one."""
    from spa_lite.lesson import MODEL_DIR

    m, i = recipe.model, recipe.inputs
    return ModelSettings(
        model=model or i.model or str(MODEL_DIR),
        device=i.device,
        dtype=m.dtype,
        load_in_4bit=m.load_in_4bit,
        trust_remote_code=m.trust_remote_code,
        system=m.system,
        template=m.template,
        batching=batching_of(recipe),
    )


def models_of(recipe: Recipe, load: Loader, load_classifier: LoadClassifier | None = None) -> Models:
    """Everything a run may need to load; nothing is loaded yet. The loaders are those of `spa_lite.backends`; the
    second is for `judge.by=reward-model`."""
    from spa_lite.lesson import adapter_folder

    i = recipe.inputs
    check_reference(i)

    def reference() -> Backend:
        return load(i.backend, model_settings(recipe, i.init_model))

    def drawing() -> Backend:
        return load(sampler.BACKEND, sampler_settings(recipe))

    return Models(
        load=lambda: load(i.backend, model_settings(recipe)),
        init_adapter=adapter_folder(i.init_adapter),
        policy_adapter=adapter_folder(i.adapter_path),
        load_reference=reference if i.init_model else None,
        load_classifier=load_classifier,
        load_sampler=drawing if recipe.sampling.by else None,
        judge_adapter=adapter_folder(recipe.judge.adapter),
    )


def check_reference(inputs: Inputs) -> None:
    """Raise RecipeError for a GGUF beside another model: quantised log-probs differ from the original's, and that
    difference would be taken for a reward."""
    if inputs.init_model and any(name and name.endswith(GGUF) for name in (inputs.model, inputs.init_model)):
        raise RecipeError(
            "with a GGUF the policy and its reference must be the same file: leave --init-model out, "
            "and give the policy as --adapter-path"
        )


def sampler_settings(recipe: Recipe) -> ModelSettings:
    """How the GGUF of --sampler is loaded: its precision is its own."""
    return replace(
        model_settings(recipe, str(sampler.file_of(recipe))),
        device=sampler.device(recipe),
        dtype="auto",
        load_in_4bit=False,
    )


def data_of(recipe: Recipe, models: Models) -> Data:
    """Everything a run reads, as token ids of its model."""
    raw = read(recipe)
    return encode_all(raw, models.backend, recipe)


def is_lesson(recipe: Recipe) -> bool:
    """Whether the built-in world supplies the data: no model and no file was named."""
    i = recipe.inputs
    return not (i.model or i.seed_pairs or i.prompts or i.held_out or i.gold)


def read(recipe: Recipe) -> Raw:
    """Read (or make) a run's records. Raises RecipeError if something needed is not named, DataError on bad data."""
    check_start(recipe)
    raw = lesson(recipe) if is_lesson(recipe) else files(recipe)
    if guards.is_written(recipe):
        raw.material = prompts.read(recipe, recipe.inputs.model is None)
        raw.notes += raw.material.notes
    if recipe.inputs.limit_prompts:
        raw.prompts = raw.prompts[: recipe.inputs.limit_prompts]
    return raw


def check_start(recipe: Recipe) -> None:
    """Where pi_0 comes from must be clear, and a judge must not compare a policy with itself."""
    i = recipe.inputs
    if i.adapter_path and not i.no_seed_pairs:
        raise RecipeError("--adapter-path is pi_0 and needs --no-seed-pairs; use --init-adapter for pi_init")
    guards.check(recipe)
    if recipe.rounds:
        judges.check(recipe)
        judges.gap_of(recipe)
        sampler.check(recipe)
    if "gold" in {recipe.judge.by, recipe.pairing.gap_judge} and not is_lesson(recipe):
        raise RecipeError("judge.by=gold needs a gold rule, which only the lesson has; use another --judge")


def lesson(recipe: Recipe) -> Raw:
    """The built-in world."""
    from spa_lite.lesson import source

    size, seed = recipe.lesson, recipe.seed
    return Raw(
        seed_pairs=[] if recipe.inputs.no_seed_pairs else source.pairs("seed", size.seed_pairs, seed),
        prompts=source.prompts("rounds", size.prompts, seed) if guards.needs_pool(recipe) else [],
        held_out_pairs=source.pairs(size.split, size.held_out, 1),
        held_out_prompts=source.prompts(size.split, size.held_out, 2),
        gold=source.rule,
    )


def files(recipe: Recipe) -> Raw:
    """The user's own files. Held-out pairs never share a prompt with anything that is trained on."""
    i = recipe.inputs
    if not i.seed_pairs and (need := guards.needs_pairs(recipe)):
        mend = ", or --no-seed-pairs with --adapter-path or --init-model" if need.startswith("the seed stage") else ""
        raise RecipeError(f"no labelled pairs, which {need} needs: give --seed-pairs FILE{mend}")
    if i.prompts and recipe.rounds and not guards.needs_pool(recipe):
        raise RecipeError(f"--prompts is for prompts=pool, and prompts={recipe.prompts.source}; leave it out")
    if not i.prompts and guards.needs_pool(recipe):
        raise RecipeError(
            "no prompts for the rounds: give --prompts FILE, or --rounds 0 to train on the seed pairs alone"
        )
    raw = Raw()
    if i.seed_pairs:
        raw.seed_pairs = _pairs(raw, i.seed_pairs, i.skip_bad)
    if i.seed_pairs and i.held_out == i.seed_pairs:
        raise RecipeError("--held-out is the file of --seed-pairs; leave it out and a tenth of them is held out")
    if i.held_out:
        raw.held_out_pairs = _pairs(raw, i.held_out, i.skip_bad)
        held = {data.conversation_key(pair.messages) for pair in raw.held_out_pairs}
        kept = [pair for pair in raw.seed_pairs if data.conversation_key(pair.messages) not in held]
        if len(kept) < len(raw.seed_pairs):
            shared = len(raw.seed_pairs) - len(kept)
            raw.notes.append(f"left out of the seed pairs because their prompt is held out: {shared}.")
        raw.seed_pairs = kept
    elif raw.seed_pairs:
        raw.seed_pairs, raw.held_out_pairs = data.hold_out(raw.seed_pairs, seed=recipe.seed)
        raw.notes.append(f"held out of the seed pairs for measuring: {len(raw.held_out_pairs)}.")
    if i.gold and recipe.rounds:
        raw.demonstrations = demonstrations_of(raw, i.gold, i.skip_bad)
    if i.prompts and recipe.rounds:
        raw.prompts = prompts_of(raw, i.prompts, i.skip_bad)
        raw.prompts, shared = data.without(raw.prompts, raw.held_out_pairs + raw.seed_pairs)
        if shared:
            raw.notes.append(f"left out of the rounds because they occur among the labelled pairs: {shared} prompts.")
    return raw


def _pairs(raw: Raw, source: str, skip_bad: bool) -> list[Pair]:
    pairs, report = data.read_pairs(source, skip_bad=skip_bad)
    raw.notes += report.lines()
    return pairs


def demonstrations_of(raw: Raw, source: str, skip_bad: bool) -> list[Demonstration]:
    """Prompts with a good answer each, but for those that are held out; what was skipped is noted."""
    found, report = data.read_demonstrations(source, skip_bad=skip_bad)
    raw.notes += report.lines()
    held = {data.conversation_key(pair.messages) for pair in raw.held_out_pairs}
    kept = [one for one in found if data.conversation_key(one.messages) not in held]
    if len(kept) < len(found):
        raw.notes.append(f"left out of the demonstrations because their prompt is held out: {len(found) - len(kept)}.")
    return kept


def prompts_of(raw: Raw, source: str, skip_bad: bool) -> list[Prompt]:
    """Prompts of a source; what was skipped is noted."""
    prompts, report = data.read_prompts(source, skip_bad=skip_bad)
    raw.notes += report.lines()
    return prompts


def encode_all(raw: Raw, backend: Backend, recipe: Recipe) -> Data:
    """Records as token ids, the prompts split over the rounds. What is skipped or cut is counted in `notes`."""
    notes = list(raw.notes)
    pool = guards.needs_pool(recipe)
    shares = data.split_rounds(raw.prompts, recipe.rounds, recipe.round_sizes, recipe.seed) if pool else []

    def asked(records: list[Prompt], name: str) -> list[tuple[Prompt, Ids]]:
        found, report = encode.encode_prompts(
            records,
            backend.tokenizer,
            max_prompt_length=recipe.lengths.max_prompt_length,
            long_prompts=recipe.lengths.long_prompts,
            max_tokens=recipe.sampling.max_tokens,
            context=backend.context,
        )
        return _told(notes, name, found, len(records), report)

    def pairs(records: list[Pair], name: str) -> list[tuple[Pair, Row]]:
        found, report = encode.encode_pairs(
            records,
            backend.tokenizer,
            max_prompt_length=recipe.lengths.max_prompt_length,
            max_length=min(recipe.lengths.max_length, backend.context),
            long_prompts=recipe.lengths.long_prompts,
            context=backend.context,
        )
        return _told(notes, name, found, len(records), report)

    labelled = pairs(raw.seed_pairs, "seed pairs")
    rounds = [asked(share, f"prompts of round {i}") for i, share in enumerate(shares, start=1)]
    answers: dict[str, Answers] = {}
    if recipe.rounds and recipe.prompts.source in {"gold", "pairs"}:
        known = [answered(pair, row) for pair, row in labelled]
        if recipe.inputs.gold:
            known = _demonstrated(raw.demonstrations, backend, recipe, notes)
        rounds, answers = gone_through(known, recipe)
    return Data(
        seed_pairs=labelled,
        rounds=rounds,
        answers=answers,
        material=raw.material,
        held_out_pairs=pairs(raw.held_out_pairs[: recipe.measure.pairs], "held-out pairs"),
        held_out_prompts=asked(raw.held_out_prompts[: recipe.measure.prompts], "held-out prompts"),
        gold=raw.gold,
        notes=notes,
    )


def answered(pair: Pair, row: Row) -> Answered:
    """A labelled pair as a prompt of a round, with its chosen and its rejected answer."""
    texts = (pair.chosen, pair.rejected)
    answers = tuple(Completion(ids=i, text=t, ended="human") for i, t in zip(row.responses, texts, strict=True))
    return pair.prompt, row.prompt, answers


def _demonstrated(found: list[Demonstration], backend: Backend, recipe: Recipe, notes: list[str]) -> list[Answered]:
    """Demonstrations as prompts of a round, each with its good answer."""
    rows, report = sft.rows_of(
        [(one.messages, one.answer) for one in found], backend, recipe, ids=[one.id for one in found]
    )
    by_id = {one.id: one for one in found}
    return [
        (
            Prompt(id=row.id, messages=by_id[row.id].messages, extra=by_id[row.id].extra),
            row.row.prompt,
            (Completion(ids=row.row.responses[0], text=by_id[row.id].answer, ended="human"),),
        )
        for row in _told(notes, "demonstrations", rows, len(found), report)
    ]


def gone_through(known: list[Answered], recipe: Recipe) -> tuple[list[list[Encoded]], dict[str, Answers]]:
    """The prompts of each round, and the human answers by their ids.

    Labelled pairs are shared out over the rounds, good answers are there in every one. Where a round asks for more than
    there are, they come again under another id.
    """
    r = recipe
    every = [list(range(len(known)))] * r.rounds
    if r.prompts.source == "pairs":
        every = data.shares(len(known), r.rounds, None if r.prompts.count else r.round_sizes, r.seed, "labelled pairs")
    rounds, answers = [], {}
    for i, share in enumerate(every):
        count = r.prompts.count or (r.round_sizes[i] if r.round_sizes else len(share))
        chosen = []
        for k in range(count):
            prompt, ids, human = known[share[k % len(share)]]
            again = f"{prompt.id}#{k // len(share) + 1}" if k >= len(share) else prompt.id
            chosen.append((msgspec.structs.replace(prompt, id=again), ids))
            answers[again] = human
        rounds.append(chosen)
    return rounds, answers


def what_matters(recipe: Recipe) -> dict[str, Any]:
    """The settings that a result depends on, apart from the data."""
    values = settings_of(recipe)
    alone = {path for path in SETTINGS if path in {"rounds", "measure.every"} or path.startswith("stop.")}
    return {s.path: values[s.path] for s in SETTINGS.values() if s.stages or s.path in alone}


def run_name(recipe: Recipe, models: Models, data: Data) -> str:
    """`<recipe>-<8 hex>`: a digest of all settings that matter to a result and of everything that is read."""
    settings = what_matters(recipe)
    read = [
        [row for _, row in data.seed_pairs],
        [[ids for _, ids in share] for share in data.rounds],
        [row for _, row in data.held_out_pairs],
        [ids for _, ids in data.held_out_prompts],
    ]
    start = [models.fingerprint, folder_digest(models.init_adapter), folder_digest(models.policy_adapter)]
    return f"{recipe.name}-{digest([settings, read, start, recipe.inputs.init_model])[:8]}"


T = TypeVar("T")


def _told(notes: list[str], name: str, found: list[T], given: int, report: encode.EncodeReport) -> list[T]:
    """Note what encoding skipped or cut; an empty result is an error where something was given."""
    if given and not found:
        raise DataError(f"{name}: none of {given} can be used: {' '.join(report.lines()[1:])}")
    if len(report.lines()) > 1:
        notes.append(f"{name}: {' '.join(report.lines())}")
    return found
