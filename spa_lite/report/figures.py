"""The figures of a report: what came of each stage, judging, cost. Each is made from a table, which is its CSV.

A figure that would have nothing to show is not made. With one run it shows what there is; with several, a line (or a
panel) per run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spa_lite.figures import COLOURS, FAINT, short
from spa_lite.report.collect import Judgement, Stage, Told
from spa_lite.report.drawing import (
    GREY,
    Drawn,
    Table,
    axes_of,
    bars_by_kind,
    by_stage,
    dotted,
    legend,
    legend_of,
    lines_height,
    patch,
    sizes,
    stack,
    without,
)
from spa_lite.report.looks import FEW, Look, look, looks, some
from spa_lite.report.training import displacement, loss, threshold

GROUPS = (
    ("label right", True, COLOURS[0]),
    ("label wrong", False, COLOURS[1]),
    ("not known, or equal", None, GREY),
)
"""Judgements by `right`, and their colours."""
BINS = 30


def figures(runs: Sequence[Told]) -> list[Drawn]:
    """Every figure there are numbers for."""
    drawn = [draw(runs) for draw in FIGURES]
    return [one for one in drawn if one is not None]


# -- measures per stage --------------------------------------------------------------------------------------------


def win_rate(runs: Sequence[Told]) -> Drawn | None:
    """How often a policy's answers beat those of pi_init."""
    caption = (
        "Share of held-out prompts on which the answer has the higher gold score than π_init's, ties half, in %; "
        "dotted: 50 %, no change."
    )
    return _intervals(runs, "win_rate", "Win rate against π_init", caption, "paired bootstrap", "prompts", "win rate")


def pair_accuracy(runs: Sequence[Told]) -> Drawn | None:
    """How often the implicit reward agrees with people."""
    caption = (
        "Share of held-out labelled pairs on which the implicit reward prefers the same answer as the label, in %; "
        "dotted: 50 %, guessing. π_init is 50 by definition."
    )
    return _intervals(runs, "pair_accuracy", "Held-out pairs", caption, "Wilson", "pairs", "accuracy")


def labels(runs: Sequence[Told]) -> Drawn | None:
    """How often self-labels are right."""
    caption = (
        "Share of the round's own labels that agree with the gold score, pairs of equal gold left out, in %; "
        "dotted: 50 %, guessing."
    )
    title = "Self-labels that agree with gold"
    return _intervals(runs, "labels", title, caption, "Wilson", "pairs", "right labels")


def _intervals(
    runs: Sequence[Told], measure: str, title: str, caption: str, kind: str, items: str, unit: str
) -> Drawn | None:
    """A measure with its interval per stage, a line per run."""
    table: Table = []
    for run in runs:
        for stage in run.stages:
            found = stage.interval(measure)
            if found:
                numbers = {key: 100 * found[key] for key in ("value", "low", "high")}
                table.append({"run": run.name, "stage": stage.name, "n": found.get("n"), **numbers})
    if not table:
        return None
    series = looks(runs)
    figure, axes = axes_of(2.8 + lines_height(series))
    by_stage(axes, runs, table, "run", series, bars=len(runs) <= FEW)
    dotted(axes, 50)
    axes.set_ylabel(f"{unit}, %")
    legend_of(figure, axes)
    bars = f"Bars: 95 % intervals ({kind})." if len(runs) <= FEW else f"The 95 % intervals ({kind}) are in the CSV."
    return Drawn(measure, title, f"{caption} {bars} {sizes(table, items)}", table, figure)


def gold(runs: Sequence[Told]) -> Drawn | None:
    """Mean gold of the answers: per criterion, or the score of each run."""
    one = len(runs) == 1
    table = [
        {"run": run.name, "stage": stage.name, "criterion": criterion, "value": mean}
        for run in runs
        for stage in run.stages
        for criterion, mean in (stage.row.get("gold") or {}).items()
        if one or criterion == "score"
    ]
    if not table:
        return None
    criteria = dict.fromkeys(row["criterion"] for row in table)
    series = {name: look(i, name) for i, name in enumerate(criteria)} if one else looks(runs)
    figure, axes = axes_of(2.8 + lines_height(series))
    by_stage(axes, runs, table, "criterion" if one else "run", series)
    axes.set_ylabel("mean gold, 0 to 1")
    legend_of(figure, axes)
    more = "; “score” is the weighted mean of the others." if one else ": the weighted mean of the criteria."
    caption = f"Mean gold of the answers to the held-out prompts, from 0 to 1{more}"
    return Drawn("gold", "Gold by criterion" if one else "Gold score", caption, table, figure)


def length(runs: Sequence[Told]) -> Drawn | None:
    """Mean tokens of an answer."""
    table: Table = []
    for run in runs:
        for stage in run.stages:
            sampled = (stage.row.get("judged") or {}).get("mean_tokens")
            for whose, mean in (("held-out answers", stage.row.get("length")), ("samples", sampled)):
                if mean is not None:
                    table.append({"run": run.name, "stage": stage.name, "of": whose, "value": mean})
    if len(runs) > 1 and any(row["of"] != "samples" for row in table):
        table = [row for row in table if row["of"] != "samples"]
    if not table:
        return None
    kinds = sorted({row["of"] for row in table})
    series = {name: look(i, name) for i, name in enumerate(kinds)} if len(runs) == 1 else looks(runs)
    figure, axes = axes_of(2.6 + lines_height(series))
    by_stage(axes, runs, table, "of" if len(runs) == 1 else "run", series)
    axes.set_ylim(0, 1.12 * max(row["value"] for row in table) or 1.0)
    axes.set_ylabel("tokens")
    legend_of(figure, axes)
    caption = f"Mean number of tokens of an answer, the end token included ({' and '.join(kinds)})."
    more = " Samples of a round are written by the policy before it." if "samples" in kinds else ""
    return Drawn("length", "Length of answers", caption + more, table, figure)


def flagged(runs: Sequence[Told]) -> Drawn | None:
    """What was taken for noise, and whether it was."""
    table: Table = []
    for run in runs:
        for stage in run.rounds:
            trained, flags = stage.row["trained"], stage.row.get("flags") or {}
            if trained.get("pairs_seen"):
                wrong, count = flags.get("flagged_wrong"), trained.get("flagged", 0)
                share = 100 * flags["wrong"] / flags["pairs"] if flags.get("pairs") else None
                table.append(
                    {"run": run.name, "stage": stage.name, "pairs": trained["pairs_seen"], "flagged": count,
                     "flagged_share": 100 * count / trained["pairs_seen"], "flagged_wrong": wrong,
                     "wrong_share_of_all": share}
                )  # fmt: skip
    if not any(row["flagged"] for row in table):
        return None
    return _flagged_of_one(table) if len(runs) == 1 else _flagged_of_several(runs, table)


def _flagged_of_several(runs: Sequence[Told], table: Table) -> Drawn:
    series = looks(runs)
    figure, axes = axes_of(2.6 + lines_height(series))
    by_stage(axes, runs, [row | {"value": row["flagged_share"]} for row in table], "run", series)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("flagged pairs, %")
    legend_of(figure, axes)
    caption = "Training pairs that were taken for noise and softened, in % of the round's pairs."
    return Drawn("flagged", "Flagged pairs", caption, table, figure)


def _flagged_of_one(table: Table) -> Drawn:
    """A bar per round: how many, and where the truth is known how many of them had the wrong label."""
    known = any(row["flagged_wrong"] is not None for row in table)
    figure, axes = axes_of(1.0 + 0.36 * len(table) + 0.2 * known)
    for place, row in enumerate(table):
        wrong = row["flagged_wrong"] or 0
        axes.barh(place, wrong, height=0.55, color=COLOURS[1])
        rest = COLOURS[0] if known else GREY
        axes.barh(place, row["flagged"] - wrong, left=wrong, height=0.55, color=rest)
        said = f"{row['flagged_share']:.1f} % of {row['pairs']}"
        if row["flagged_wrong"] is not None and row["flagged"]:
            said = f"{100 * wrong / row['flagged']:.0f} % wrong (all: {row['wrong_share_of_all']:.0f} %)"
        axes.annotate(said, (row["flagged"], place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(table)), [row["stage"] for row in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, 1.75 * max(row["flagged"] for row in table))
    axes.set_xlabel("pairs")
    axes.grid(visible=False, axis="y")
    caption = "Training pairs that were taken for noise and softened."
    if not known:
        return Drawn("flagged", "Flagged pairs", caption, table, figure)
    legend(figure, [("label wrong", patch(COLOURS[1])), ("label right or equal", patch(COLOURS[0]))])
    caption += (
        " Beside the bars: how many of them had the wrong label indeed, and in brackets how many of all pairs had: "
        "what flagging at random would hit."
    )
    return Drawn("flagged", "Flagged pairs, and whether they were wrong", caption, table, figure)


# -- judging -------------------------------------------------------------------------------------------------------


def margins(runs: Sequence[Told]) -> Drawn | None:
    """Histogram of the margins, by whether the label was right; a panel per round, or per run."""
    panels = _panels(runs)
    if not panels:
        return None
    edges = _edges(np.array([j.margin for _, _, pile in panels for j in pile], dtype=float))
    known = any(j.right is not None for _, _, pile in panels for j in pile)
    figure, grid = stack(len(panels), 1.2)
    table: Table = []
    for (run, stage, pile), axes in zip(panels, grid, strict=True):
        counts = {}
        bottom = np.zeros(len(edges) - 1)
        for group, is_right, colour in GROUPS:
            values = np.array([j.margin for j in pile if j.right is is_right], dtype=float)
            counts[group] = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
            axes.bar(edges[:-1], counts[group], np.diff(edges), bottom, align="edge", color=colour)
            bottom += counts[group]
        table += [
            {"run": run.name, "stage": stage.name, "from": float(edges[i]), "to": float(edges[i + 1])}
            | {group: int(count[i]) for group, count in counts.items()}
            for i in range(len(edges) - 1)
        ]
        axes.axvline(0, color=FAINT, linewidth=0.9, linestyle=":")
        named = stage.name if len(runs) == 1 else f"{run.name}, {stage.name}"
        axes.set_title(f"{short(named, 40)}, {len(pile)} pairs", loc="left")
        axes.set_ylabel("pairs")
        axes.grid(visible=False, axis="x")
    grid[-1].set_xlabel("margin towards the label: β × difference of log-ratios (nats)")
    if known:
        legend(figure, [(group, patch(colour)) for group, _, colour in GROUPS])
    caption = (
        "How sure the implicit reward was: β times the difference of the two log-ratios, towards the answer that was "
        "labelled as the better one. At 0 it cannot tell; below 0 it disagrees with the label, as only another judge "
        "can. Identical answers are left out; the outermost bars also hold what lies beyond."
    )
    left_out = f" {len(panels)} of the {len(runs)} runs." if len(runs) > len(panels) else ""
    return Drawn("margins", "Margins of the labels", caption + left_out, table, figure)


def _edges(values: np.ndarray) -> np.ndarray:
    """Borders of the bins: about 99 % of the values lie inside, and 0 is a border."""
    low, high = np.minimum(np.quantile(values, 0.005), 0.0), np.maximum(np.quantile(values, 0.995), 0.0)
    step = (high - low) / BINS or 1.0
    return step * np.arange(np.floor(low / step - 1e-9), np.ceil(high / step + 1e-9) + 1)


def _panels(runs: Sequence[Told]) -> list[tuple[Told, Stage, list[Judgement]]]:
    """Whose judgements are shown: the last eight rounds of one run, the last round of each of a few."""
    found = []
    for run in some(runs):
        piles = [(s, [j for j in s.judgements if j.margin is not None and not j.identical]) for s in run.rounds]
        piles = [(stage, pile) for stage, pile in piles if any(j.margin for j in pile)]  # not pi_init against itself
        found += [(run, stage, pile) for stage, pile in (piles[-8:] if len(runs) == 1 else piles[-1:])]
    return found


LOGPROBS = {
    f"{side}, {role}": Look(colour, dash, marker, f"{side}, {role}")
    for side, colour, marker in (("chosen", COLOURS[0], "o"), ("rejected", COLOURS[1], "s"))
    for role, dash in (("policy", "-"), ("reference", ":"))
}


def logprobs(runs: Sequence[Told]) -> Drawn | None:
    """Chosen and rejected log-probabilities apart, under the policy that wrote the answers and under the reference."""
    table: Table = []
    for stage in runs[0].rounds if len(runs) == 1 else []:
        for at, side in enumerate(("chosen", "rejected")):
            for role in ("policy", "reference"):
                sums = [s[at] for j in stage.judgements if (s := getattr(j, role)) is not None]
                if sums:
                    table.append(
                        {"run": runs[0].name, "stage": stage.name, "answers": side, "under": role, "n": len(sums),
                         "value": float(np.mean(sums)), "series": f"{side}, {role}"}
                    )  # fmt: skip
    if not table:
        return None
    figure, axes = axes_of(2.8 + lines_height(LOGPROBS))
    by_stage(axes, runs, table, "series", LOGPROBS)
    axes.set_ylabel("nats per answer")
    legend_of(figure, axes)
    caption = (
        "Mean log-probability of the chosen and of the rejected answers (summed over tokens, nats) when they were "
        "judged: under the policy that the round began with, and under the judge's reference. "
        f"{sizes(table, 'answers per point')}"
    )
    return Drawn("logprobs", "Log-probabilities of chosen and rejected", caption, without(table, "series"), figure)


# -- cost ----------------------------------------------------------------------------------------------------------


def seconds(runs: Sequence[Told]) -> Drawn | None:
    """Where the time went."""
    table = _costs(runs, "seconds")
    if not table:
        return None
    figure, axes = bars_by_kind(table, "stage" if len(runs) == 1 else "run", "seconds")
    axes.set_xlabel("seconds")
    caption = (
        "Wall-clock time of each stage that was computed in this run, measuring included; stages taken from another "
        "run took none."
    )
    return Drawn("seconds", "Time", caption, table, figure)


def memory(runs: Sequence[Told]) -> Drawn | None:
    """Peak memory per stage."""
    table = [row | {"gigabytes": row.pop("peak") / 1e9} for row in _costs(runs, "peak")]
    if not table:
        return None
    figure, axes = bars_by_kind(table, "stage" if len(runs) == 1 else "run", "gigabytes", stacked=False)
    axes.set_xlabel("peak memory, GB (10⁹ bytes)")
    axes.set_xlim(0, 1.1 * max(row["gigabytes"] for row in table) or 1.0)
    caption = "Peak memory while each stage was computed: of the process on a CPU, of the device on a GPU."
    return Drawn("memory", "Peak memory", caption, table, figure)


def _costs(runs: Sequence[Told], what: str) -> Table:
    """A row per kind of stage that has a number."""
    return [
        {"run": run.name, "stage": stage.name, "kind": kind, what: float(spent[what])}
        for run in runs
        for stage in run.stages
        for kind, spent in stage.spent.items()
        if spent.get(what) is not None
    ]


FIGURES: tuple[Callable[[Sequence[Told]], Drawn | None], ...] = (
    win_rate,
    pair_accuracy,
    gold,
    length,
    labels,
    logprobs,
    margins,
    displacement,
    loss,
    flagged,
    threshold,
    seconds,
    memory,
)
