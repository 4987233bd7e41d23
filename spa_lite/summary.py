"""What a finished run says of itself: a row per stage, versions, and what a user should know before trusting it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spa_lite import guards, pairing, rescore, sampler, stop
from spa_lite.axes import one_line
from spa_lite.files import move, share, write_json
from spa_lite.lint.samples import Findings
from spa_lite.recipe import Recipe
from spa_lite.stages import Workshop
from spa_lite.stages.prompts import sentence
from spa_lite.stages.workbench import Policy


def summarise_run(shop: Workshop, policy: Policy) -> dict[str, Any]:
    """Gather the stages into rows for the table, write summary.json, and put the final adapter at the top."""
    rows = shop.rows
    summary = {
        "recipe": shop.recipe.name,
        "scale": shop.recipe.scale,
        "made_of": one_line(shop.recipe),
        "flags": shop.recipe.noise.by == "quantile",
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
    """What a user should know before trusting the result: prompts that repeat, labels near chance, a judge that sees
    places or lengths, pairs that are left out, signs to stop."""
    found, before = [], None
    for i, row in enumerate(rows):
        judged, trained = row.get("judged") or {}, row.get("trained") or {}
        again = judged.get("rescore") or {}
        about = list(_about_prompts(row.get("prompted") or {}))
        if again.get("checked") and again["why"]:
            about.append(rescore.sentence(again))
        lint = (row.get("sampled") or {}).get("lint")
        if lint:
            about += Findings(**lint).warnings(before)
            before = lint
        right = (row.get("label_accuracy") or {}).get("score")
        if right and right["high"] < 0.5:
            about.append(f"the self-labels are wrong more often than right ({100 * right['value']:.0f} % right)")
        about += _about_judge(judged, recipe)
        about += _about_pairs(judged, trained.get("left_out") or {}, recipe)
        found += [f"{row['stage']}: {what}" for what in about]
        found += stop.signs(rows[: i + 1], recipe)
        if trained.get("skipped"):
            found.append(
                f"{row['stage']}: {trained['skipped']} training steps were skipped because they were not finite"
            )
    return found


LOST, UNREAD, PLACES, LEFT_OUT = 0.2, 0.1, 0.4, 0.5
"""Shares above which a user is told: prompts that repeat or are dropped, replies that cannot be read, pairs whose label
depends on the order, pairs that are not trained on."""


def _about_prompts(prompted: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the prompts that were written."""
    if prompted and max(1 - prompted["kept"] / prompted["asked"], prompted["repeated"]) > LOST:
        yield f"many of the written prompts repeat or cannot be used: {sentence(prompted)}; raise --prompt-temp"


def _about_judge(judged: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    """What is wrong with the judge."""
    asked = judged.get("pairs", 0) * replies(recipe)
    if asked and judged.get("unread", 0) > UNREAD * asked:
        yield (
            f"{judged['unread']} of {asked} replies of the judge could not be read; ask otherwise with --judge-prompt, "
            "or take another judge"
        )
    if (share := judged.get("disagree_share", 0)) > PLACES:
        yield (
            f"in {100 * share:.0f} % of the pairs the judge prefers the other answer when both change places (position "
            "bias); where both orders disagree its label is little more than a guess"
        )
    if judged.get("unequal_lengths", 0) >= 50 and not 0.2 < judged["longer_wins"] < 0.8:
        way = "longer" if judged["longer_wins"] > 0.5 else "shorter"
        yield f"the judge almost always prefers the {way} answer; length may be all it sees"


def replies(recipe: Recipe) -> int:
    """Replies that the judge gives to a prompt with its answers; 0 of a judge that is not asked."""
    n = guards.answers_per_prompt(recipe)
    pairs = n * (n - 1) // 2 * (2 if recipe.judge.swap else 1)
    return {"self-pair": pairs, "openai": pairs, "self-score": n, "self-rubric": n * recipe.judge.tries}.get(
        recipe.judge.by, 0
    )


def _about_pairs(judged: Mapping[str, Any], left_out: Mapping[str, int], recipe: Recipe) -> Iterator[str]:
    """What is wrong with the training pairs."""
    pairs, by_order = judged.get("pairs", 0), recipe.judge.by == "order" and "gold" in recipe.candidates.kinds
    if by_order and judged.get("identical", 0) > LEFT_OUT * pairs:
        yield (
            f"of {pairs} prompts the policy answered {judged['identical']} with the good answer itself: it knows them "
            "by heart, so there is little left to learn"
        )
    elif sum(left_out.values()) > LEFT_OUT * pairs:
        yield pairing.sentence(dict(left_out), pairs)
    if by_order and judged.get("rewarded") and judged["reward_agrees"] > recipe.stop.agreement:
        yield (
            f"before training the policy prefers {100 * judged['reward_agrees']:.0f} % of the good answers to its own "
            "already, so there is little left to learn"
        )
