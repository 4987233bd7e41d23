"""`eval --bench`, `--gsm8k`, `--multiple-choice`: a model on questions that come from the user's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spa_lite import data
from spa_lite.answers import Side
from spa_lite.benches import alpaca, alpaca_files, knowledge, mt_bench, mt_bench_files
from spa_lite.benches.alpaca_files import Output
from spa_lite.benches.knowledge import Outcome
from spa_lite.cli import render
from spa_lite.cli.eval_annotations import by_package
from spa_lite.cli.eval_head_to_head import read_prompts
from spa_lite.cli.eval_judges import asked_of, in_words, judged, judging_recipe, own_judge
from spa_lite.cli.eval_sides import answered, bound, described, side, stages_of, subject
from spa_lite.cli.eval_work import Work, circumstances
from spa_lite.errors import ModelError, RecipeError
from spa_lite.events import ticking
from spa_lite.files import digest_file
from spa_lite.head_to_head import head_to_head
from spa_lite.records import Prompt
from spa_lite.stages.workbench import folder_digest
from spa_lite.store import digest

# --- AlpacaEval ------------------------------------------------------------------------------------------------

OUTPUTS, ANNOTATIONS = "model_outputs.json", "annotations.json"


def alpaca_bench(
    work: Work, a: str | None, references: str | None, lc_data: str | None, package: bool
) -> dict[str, Any]:
    """Answer the prompts and write model_outputs.json; with a judge, compare with the references as AlpacaEval does."""
    who = subject(work, a)
    judging = work.asked_for("judge.by")
    r = judging_recipe(work) if judging else work.recipe
    known = (
        alpaca_files.read_outputs(references or alpaca_files.HUB)
        if judging or not work.asked_for("inputs.prompts")
        else []
    )
    prompts = alpaca_prompts(work, known)
    outputs = [
        Output(instruction=s.messages[-1].content, output=s.completions[0].text, generator=who.name)
        for s in answered(work, who, prompts, "answers")
    ]
    alpaca_files.write_outputs(work.out / OUTPUTS, outputs)
    found: dict[str, Any] = {
        "kind": "alpaca",
        "title": f"alpaca: {who.name}",
        "side": described(work, who),
        "n": len(outputs),
        "outputs": OUTPUTS,
        "data": digest([o.instruction for o in outputs]),
        "warnings": [],
        **circumstances(work),
    }
    if not judging:
        render.note(f"answers: {work.out / OUTPUTS} (give --judge to have them compared with the references)")
        return found
    matched = alpaca.match(outputs, known)
    judge, opinions = judged(
        work, r, [Side("references", r, file=Path(references or alpaca_files.HUB))], matched.samples
    )
    annotations = alpaca.annotations_of(matched, opinions, judge.name)
    alpaca_files.write_records(work.out / ANNOTATIONS, annotations)
    shown = head_to_head(matched.samples, opinions, r.seed)  # the references are its side a; orders have no side
    official = alpaca_files.official([(o.instruction, o.output) for o in known])
    score = alpaca.score(annotations, lc_data, official, seed=r.seed)
    found |= {"title": f"alpaca: {who.name} by {judge.name}", "judge": {"name": judge.name, "key": judge.key}}
    found |= {"result": score.to_dict(), "orders": shown.to_dict()["orders"]}
    found |= {"warnings": [*score.notes, *unmatched(matched, official), *shown.warnings, *own_judge(r, [who])]}
    return found | ({"package": by_package(annotations, lc_data)} if package else {})


def unmatched(matched: alpaca.Matched, official: alpaca_files.Official | None) -> list[str]:
    """Say so where answers or references are left out; the score itself names official prompts that are missing."""
    counts = {
        "prompts of the references were not answered": [] if official else matched.unanswered,
        "answers have no reference": matched.unknown,
    }
    return [f"{len(left_out)} {what}" for what, left_out in counts.items() if left_out]


def alpaca_prompts(work: Work, references: Sequence[Output]) -> list[Prompt]:
    """The prompts of --prompts (AlpacaEval's file, or ours), else those of the references."""
    r = work.recipe
    if not (work.asked_for("inputs.prompts") and r.inputs.prompts):
        found = alpaca_files.prompts_of(references)
    elif Path(r.inputs.prompts).suffix == ".json":
        found = alpaca_files.read_prompts(r.inputs.prompts)
    else:
        found = read_prompts(r.inputs.prompts, r.inputs.skip_bad)
    return found[: work.limit]


# --- MT-Bench --------------------------------------------------------------------------------------------------


def mt_bench_bench(
    work: Work, a: str | None, questions: str | None, prompts: str | None, references: str | None
) -> dict[str, Any]:
    """Answer both turns of every question; then a judge grades each answer."""
    if not questions:
        raise RecipeError("--bench mt-bench needs the questions: give FastChat's question.jsonl as --questions")
    who, r = subject(work, a), judging_recipe(work)
    in_words(r)
    bench = mt_bench_files.read(questions, prompts, references)
    questions_asked = bench.questions[: work.limit]
    turns = 2 * len(questions_asked)
    adapter = folder_digest(who.adapter) or ""
    answers = mt_bench.answer_questions(
        bound(work, who),
        questions_asked,
        r,
        model=adapter,
        cache=work.out / "mt-bench-answers.jsonl",
        max_tokens=work.max_tokens(mt_bench.MAX_TOKENS),
        tick=ticking(work.report, "answers", turns, "turns"),
    )
    data.write_jsonl(work.out / "mt-bench.jsonl", answers)
    asked = asked_of(work, r)
    cache, tick = work.out / "mt-bench-replies.jsonl", ticking(work.report, "judge", turns, "turns")
    grades = mt_bench.grade(answers, asked, bench.prompts, bench.references, cache=cache, tick=tick)
    data.write_jsonl(work.out / "mt-bench-grades.jsonl", grades)
    score = mt_bench.summarise(grades, r.seed, bench.files)
    return {
        "kind": "mt-bench",
        "title": f"mt-bench: {who.name} by {asked.name}",
        "n": len(questions_asked),
        "side": described(work, who),
        "judge": {"name": asked.name, "key": asked.key},
        "result": score,
        "data": digest(questions_asked),
        "warnings": [*fewer(questions_asked, bench.questions), *ungraded(score), *own_judge(r, [who])],
        **circumstances(work),
    }


def fewer(asked: Sequence[object], all_: Sequence[object]) -> list[str]:
    """Say so where --limit-prompts left questions out."""
    return [f"only {len(asked)} of {len(all_)} questions were asked"] if len(asked) < len(all_) else []


def ungraded(score: dict[str, Any]) -> list[str]:
    """What is missing from a score."""
    whats = {
        "unread": "replies of the judge without a grade",
        "no_reply": "answers that the judge did not reply to",
        "skipped": "turns that did not fit into the model's context",
        "cut": "answers cut by their length cap",
        "without_reference": "answers graded without the reference that their category wants",
    }
    return [f"{score[key]} {what}" for key, what in whats.items() if score[key]]


# --- knowledge -------------------------------------------------------------------------------------------------


def gsm8k(work: Work, sides: Sequence[Side], file: str) -> dict[str, Any]:
    """Word problems, solved at temperature 0 by each side."""
    problems = knowledge.read_problems(file)[: work.limit]

    def solve(who: Side) -> dict[str, list[Outcome]]:
        solved = knowledge.solve(
            bound(work, who),
            problems,
            model=folder_digest(who.adapter) or "",
            cache=work.out / "gsm8k-replies.jsonl",
            max_tokens=work.max_tokens(knowledge.MAX_TOKENS),
            tick=ticking(work.report, f"{who.name} gsm8k", len(problems), "problems"),
        )
        return {"last number": solved}

    return known(work, "gsm8k", file, len(problems), sides, solve)


def multiple_choice(work: Work, sides: Sequence[Side], file: str) -> dict[str, Any]:
    """The most probable choice, by three rules."""
    questions = knowledge.read_choices(file)[: work.limit]

    def choose(who: Side) -> dict[str, list[Outcome]]:
        tick = ticking(work.report, f"{who.name} choices", len(questions), "questions")
        scored = knowledge.choose(bound(work, who), questions, tick=tick)
        return {by.replace("_", " "): knowledge.outcomes(scored, by) for by in knowledge.RULES}

    return known(work, "multiple choice", file, len(questions), sides, choose)


def known(
    work: Work, kind: str, file: str, n: int, sides: Sequence[Side], ask: Callable[[Side], dict[str, list[Outcome]]]
) -> dict[str, Any]:
    """What each side knows, by each rule; and, of two sides, the difference from the first to the second."""
    outcomes = [ask(who) for who in sides]
    rules: dict[str, Any] = {}
    for rule in outcomes[0]:
        told = [each[rule] for each in outcomes]
        change = knowledge.compare(told[0], told[1], work.recipe.seed) if len(told) == 2 else None
        rules[rule] = {"sides": [knowledge.summarise(one) for one in told], "change": change}
    return {
        "kind": kind,
        "title": f"{kind}: {', '.join(who.name for who in sides)}",
        "n": n,
        "data": digest_file(Path(file)),
        "sides": [described(work, who) for who in sides],
        "rules": rules,
        "warnings": uncounted(sides, rules),
        **circumstances(work),
    }


def uncounted(sides: Sequence[Side], rules: dict[str, Any]) -> list[str]:
    """What is missing from the shares of right answers; all rules are about the same replies."""
    whats = {
        "skipped": "questions that did not fit into the model's context",
        "unread": "replies without a number (they count as wrong)",
        "cut": "replies cut by their length cap",
    }
    told = next(iter(rules.values()))["sides"]
    return [
        f"{who.name}: {one[key]} {what}"
        for who, one in zip(sides, told, strict=True)
        for key, what in whats.items()
        if one[key]
    ]


def before_and_after(work: Work, a: str | None, b: str | None) -> list[Side]:
    """The sides of a knowledge check: --b (init unless it is given), then --a (the last stage unless it is given)."""
    stages = stages_of(work) if not (a and b) else []
    before, after = side(work, b) if b else stages[0], side(work, a) if a else stages[-1]
    for one in (before, after):
        if one.file:
            raise ModelError(f"{one.name} is a file of answers; a knowledge check needs a model")
    return [after] if before.key == after.key else [before, after]
