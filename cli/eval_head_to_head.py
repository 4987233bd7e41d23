"""`eval --a --b`: two sides answer the same prompts, one model in memory at a time; then a judge compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spa_lite import answers, data, prepare
from spa_lite import head_to_head as numbers
from spa_lite.answers import Side
from spa_lite.cli import render
from spa_lite.cli.eval_held_out import held_out_pairs
from spa_lite.cli.eval_judges import judged, judging_recipe, own_judge
from spa_lite.cli.eval_sides import answered, described, same_model, side
from spa_lite.cli.eval_work import Work, circumstances
from spa_lite.errors import DataError, RecipeError
from spa_lite.lesson import source
from spa_lite.records import Prompt, Sample
from spa_lite.store import digest


def head_to_head(work: Work, a: str, b: str, difficulty: str | None = None) -> dict[str, Any]:
    """Side a against side b; `difficulty` is the field of the prompts' records that says how hard they are."""
    sides = [side(work, a), side(work, b)]
    lesson = prepare.is_lesson(work.recipe) and not any(s.file or s.recipe.inputs.model for s in sides)
    r = judging_recipe(work, lesson)
    prompts = prompts_for(work, sides, lesson)
    samples, left_out = both(work, sides, prompts)
    if left_out:
        render.note(f"{left_out} of {len(prompts)} prompts are left out: not both sides answer them")
    hard = difficulties(samples, difficulty) if difficulty else None
    judge, opinions = judged(work, r, sides, samples)
    result = numbers.head_to_head(samples, opinions, r.seed, hard)
    return {
        "kind": "head-to-head",
        "title": f"{a} against {b} by {judge.name}",
        "a": described(work, sides[0]),
        "b": described(work, sides[1]),
        "judge": {"name": judge.name, "key": judge.key, "by": r.judge.by},
        **result.to_dict(),
        "left_out": left_out,
        "difficulty": difficulty,
        "data": digest([[(m.role, m.content) for m in s.messages] for s in samples]),
        "answers": digest([[c.text for c in s.completions] for s in samples]),
        "warnings": [*result.warnings, *own_judge(r, sides)],
        **circumstances(work),
    }


def difficulties(samples: Sequence[Sample], field: str) -> list[float]:
    """A field of every prompt's record as numbers. Raises DataError where it is missing or none."""
    found = [sample.extra.get(field) for sample in samples]
    for sample, value in zip(samples, found, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(
                f"--difficulty {field}: prompt {sample.id} has no number of that name; add it to every record"
            )
    return [float(value) for value in found if value is not None]


def prompts_for(work: Work, sides: Sequence[Side], lesson: bool) -> list[Prompt]:
    """The prompts to answer: --prompts, those of a file of answers, the lesson's, or those of the held-out pairs."""
    r = work.recipe
    files = [s.file for s in sides if s.file]
    if r.inputs.prompts and work.asked_for("inputs.prompts"):
        found = read_prompts(r.inputs.prompts, r.inputs.skip_bad)
    elif files:
        found = answers.prompts_of_answers(answers.read_answers(files[0]))
    elif lesson:
        found = source.prompts(r.lesson.split, r.lesson.held_out, 2)[: r.measure.prompts]
    elif r.inputs.held_out or r.inputs.seed_pairs:
        pairs = held_out_pairs(r)
        found = list({data.conversation_key(pair.messages): pair.prompt for pair in pairs}.values())
        render.note(f"the prompts are those of the held-out pairs: {len(found)} (give others with --prompts)")
    else:
        raise RecipeError("no prompts to answer: give --prompts FILE")
    return found[: work.limit]


def read_prompts(file: str, skip_bad: bool) -> list[Prompt]:
    """Prompts of a file; what was passed over is said."""
    found, told = data.read_prompts(file, skip_bad=skip_bad)
    for line in told.lines()[1:]:
        render.note(line)
    return found


def both(work: Work, sides: Sequence[Side], prompts: Sequence[Prompt]) -> tuple[list[Sample], int]:
    """Both sides' answers in one sample per prompt, and how many prompts are left out.

    A model against itself answers twice: what a sound judge makes of that is known, 50 %.
    """
    a, b = sides
    if a.key == b.key and a.file is None:
        render.note("both sides are the same, so each prompt is answered twice; a sound judge gives 50 %")
        twice = answered(work, a, prompts, "both sides", 2)
        return twice, len(prompts) - len(twice)
    alike = a.file is None and same_model(a.recipe, b)
    first, second = answered(work, a, prompts, "side a"), answered(work, b, prompts, "side b")
    return answers.paired(prompts, first, second, ids=alike)
