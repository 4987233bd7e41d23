"""AlpacaEval: win rate, standard error and length-controlled win rate, from annotations or with a judge of one's own.

An annotation is one prompt with the reference's answer (`output_1`), the model's (`output_2`) and a `preference` from 1
(the reference is better) to 2 (the model is). The numbers are defined as alpaca-eval 0.6.6 defines them, but for one
thing: prompts are joined by their text and not by their place in a list, so that a missing or moved one spoils nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from spa_lite import intervals
from spa_lite.benches import alpaca_files
from spa_lite.benches.alpaca_files import PROMPTS, Official, Output, Source, key_of
from spa_lite.errors import DataError
from spa_lite.intervals import Interval
from spa_lite.length_control import LengthControlled, length_controlled
from spa_lite.opinion import Judge, Opinion, Tick
from spa_lite.records import Completion, Message, Sample

NAME = "AlpacaEval LC"
TOKENS = ("m", "M")
"""What AlpacaEval's judge says for the answer that it was shown first, and second."""
SEED = 0
"""AlpacaEval's seed for the order in which a pair is shown."""
NAMED = 3
"""How many missing prompts are named."""

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What annotations say of one model. Shares are in [0, 1], lengths are mean characters, `n` counts the preferences.

    `dropped` says how many annotations were not counted, and why; `missing` how many of the 805 prompts are not there
    (None where the official prompts are not known). `notes` must be shown beside the numbers.
    """

    model: str
    reference: str
    annotator: str
    n: int
    win_rate: Interval
    standard_error: float | None
    discrete: Interval
    wins: int
    losses: int
    draws: int
    length_controlled: LengthControlled
    length: float
    reference_length: float
    from_logprobs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    missing: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values. `alpaca_eval` holds them under alpaca-eval's own names, in percent."""
        lc = self.length_controlled
        official = lc.interval if lc.name == NAME else None
        return {
            "model": self.model,
            "reference": self.reference,
            "annotator": self.annotator,
            "n": self.n,
            "win_rate": self.win_rate.to_dict(),
            "standard_error": self.standard_error,
            "discrete_win_rate": self.discrete.to_dict(),
            "wins": self.wins,
            "losses": self.losses,
            "draws": self.draws,
            "length_controlled": {
                "name": lc.name,
                "interval": lc.interval.to_dict() if lc.interval else None,
                "note": lc.note,
                "coefficients": {"length": lc.length, "difficulty": lc.difficulty, "intercept": lc.intercept},
            },
            "length": self.length,
            "reference_length": self.reference_length,
            "from_logprobs": self.from_logprobs,
            "dropped": self.dropped,
            "missing": self.missing,
            "notes": list(self.notes),
            "alpaca_eval": {
                "win_rate": 100 * self.win_rate.value,
                "standard_error": None if self.standard_error is None else 100 * self.standard_error,
                "n_wins": self.wins,
                "n_wins_base": self.losses,
                "n_draws": self.draws,
                "n_total": self.n,
                "discrete_win_rate": 100 * self.discrete.value,
                "length_controlled_winrate": 100 * official.value if official else None,
                "avg_length": int(self.length),
            },
        }


def from_annotations(
    path: Source,
    lc_data: Source | None = None,
    references: Source | None = None,
    *,
    model: str | None = None,
    annotator: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Result:
    """Score an annotation file of AlpacaEval's.

    `lc_data` is `df_gamed.csv` and `references` the 805 references in official order, each a file or `"hub"`. The
    references are only needed where the annotations are not all 805 in official order themselves. `model` and
    `annotator` choose from a file that holds several; `resamples` are those of length control. Raises DataError for a
    file that cannot be used.
    """
    found = alpaca_files.read_records(path)
    known = None
    if references is not None:
        known = alpaca_files.official([(o.instruction, o.output) for o in alpaca_files.read_outputs(references)])
        if known is None:
            raise DataError(
                f"{references}: not AlpacaEval's {PROMPTS} references by gpt4_1106_preview in official order; "
                f"give its {alpaca_files.REFERENCES}"
            )
    return score(
        found, lc_data, known, model=model, annotator=annotator, seed=seed, resamples=resamples, place=str(path)
    )


def score(
    annotations: Sequence[Annotation],
    lc_data: Source | None = None,
    official: Official | None = None,
    *,
    model: str | None = None,
    annotator: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
    place: str = "annotations",
) -> Result:
    """Score annotations; see `from_annotations`. `place` names them in errors."""
    chosen = of_one(annotations, model, annotator, place)
    for number, annotation in enumerate(chosen, 1):
        _check(annotation, f"{place}, record {number}")
    if official is None:
        official = alpaca_files.official([(a["instruction"], a["output_1"]) for a in chosen])
    # In the order of the keys, so that nothing depends on the order of the file.
    rows = sorted((_Row.of(a) for a in chosen), key=lambda row: row.key)
    kept, dropped = _kept(rows)
    if not kept:
        raise DataError(f"{place}: no preference between 1 and 2 in {len(rows)} annotations; {_reasons(dropped)}")
    won = np.array([row.preference - 1 for row in kept])
    sure = [0.5 if row.preference == 1.5 else float(np.round(row.preference)) - 1 for row in kept]
    win_rate, discrete = intervals.share(list(won), seed), intervals.share(sure, seed)
    assert win_rate is not None
    assert discrete is not None
    there = {row.key for row in rows}
    missing = None if official is None else [key for key in official.places if key not in there]
    lc, why = _length_controlled(kept, lc_data, official, missing, (seed, resamples))
    return Result(
        model=_name(chosen, "generator_2", "model"),
        reference=_name(chosen, "generator_1", "reference"),
        annotator=_name(chosen, "annotator", "unnamed annotator"),
        n=len(kept),
        win_rate=win_rate,
        standard_error=float(won.std(ddof=1) / math.sqrt(len(won))) if len(won) > 1 else None,
        discrete=discrete,
        wins=int((won > 0.5).sum()),
        losses=int((won < 0.5).sum()),
        draws=int((won == 0.5).sum()),
        length_controlled=lc,
        length=float(np.mean([row.length for row in rows])),
        reference_length=float(np.mean([row.length - row.delta for row in rows])),
        from_logprobs=sum(row.from_logprobs for row in kept),
        dropped=dropped,
        missing=None if missing is None else len(missing),
        notes=tuple(note for note in (_reasons(dropped), _missing(official, missing), why, _fitted(lc)) if note),
    )


@dataclass(frozen=True)
class _Row:
    """What one annotation comes to; the preference is NaN where there is none."""

    key: str
    preference: float
    length: int
    delta: int
    from_logprobs: bool

    @classmethod
    def of(cls, annotation: Annotation) -> _Row:
        stated, length = _stated(annotation), len(annotation["output_2"])
        return cls(
            key=key_of(annotation["instruction"]),
            preference=preference_from_logprobs(annotation) if math.isnan(stated) else stated,
            length=length,
            delta=length - len(annotation["output_1"]),
            from_logprobs=math.isnan(stated),
        )


def preference_in(annotation: Mapping[str, Any]) -> float | None:
    """The preference that an annotation holds, or that its log-probabilities make; None if it has none from 1 to 2."""
    stated = _stated(annotation)
    found = preference_from_logprobs(annotation) if math.isnan(stated) else stated
    return found if 1 <= found <= 2 else None


def _stated(annotation: Mapping[str, Any]) -> float:
    """NaN for what is no number; 0 is how older files write a draw."""
    value = annotation.get("preference")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    if isinstance(value, int):
        value = float(min(max(value, -9), 9))  # it may be too large for a float
    return 1.5 if value == 0 else value


def preference_from_logprobs(annotation: Mapping[str, Any]) -> float:
    """The preference that the judge's log-probabilities of its two verdicts make, NaN where they are not there.

    2 - P(m) / (P(m) + P(M)), and mirrored where the two answers were shown in the other order, which AlpacaEval draws
    from the instruction.
    """
    raw = annotation.get("preference_raw_completion", annotation.get("raw_completion"))
    try:
        completion = json.loads(raw) if isinstance(raw, str) else raw
        listed = completion["logprobs"]["content"][0]["top_logprobs"]
        said = {entry["token"]: float(entry["logprob"]) for entry in listed if entry["token"] in TOKENS}
        turned = switched(annotation["instruction"])
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return math.nan
    if not said:
        return math.nan
    first, second = (said.get(token, -math.inf) for token in TOKENS)
    preference = 2 - 1 / (1 + math.exp(min(second - first, 700.0)))
    return 3 - preference if turned else preference


def switched(instruction: str) -> bool:
    """Whether AlpacaEval shows the model's answer first."""
    return random.Random(f"is_switched_outputs{instruction}{SEED}").choices([False, True], k=1)[0]


def _length_controlled(
    rows: Sequence[_Row],
    lc_data: Source | None,
    official: Official | None,
    missing: list[str] | None,
    bootstrap: tuple[int, int],
) -> tuple[LengthControlled, str]:
    """The length-controlled win rate, and why it is not AlpacaEval's where it is not. `bootstrap`: seed, resamples."""
    seed, resamples = bootstrap
    wins, delta = [row.preference - 1 for row in rows], [float(row.delta) for row in rows]
    why = ""
    if lc_data is None:
        why = f"no {NAME} without {alpaca_files.LENGTH_DATA}"
    elif official is None:
        why = (
            f"no {NAME}: these are not the {PROMPTS} official prompts with their references in official order; "
            f"where only the order differs, give {alpaca_files.REFERENCES} as --reference-outputs"
        )
    elif missing or any(row.key not in official.places for row in rows):
        why = f"no {NAME}: it takes all {PROMPTS} official prompts and no others"
    elif any(row.length - row.delta != official.lengths[row.key] for row in rows):
        why = f"no {NAME}: it is defined against the references by gpt4_1106_preview, and these are others"
    if why or lc_data is None or official is None:
        return length_controlled(wins, delta, seed=seed, resamples=resamples), why
    data = alpaca_files.read_length_data(lc_data)
    difficulty = [data.difficulty[official.places[row.key]] for row in rows]
    found = length_controlled(wins, delta, difficulty, seed, rows=data.rows, resamples=resamples)
    return replace(found, name=NAME), ""


# --- judging with a judge of one's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """Prompts that both files answer, as samples: the reference's answer first, the model's second.

    `unanswered` are prompts of the references that the model did not answer, `unknown` those without a reference.
    """

    samples: list[Sample]
    references: list[Output]
    outputs: list[Output]
    unanswered: list[str]
    unknown: list[str]


def match(outputs: Sequence[Output], references: Sequence[Output]) -> Matched:
    """Join by the text of the prompt, in the order of the references.

    Raises DataError for a prompt that one file holds twice, and if the two share none.
    """
    by_key, known = _by_key(outputs, "model outputs"), _by_key(references, "reference outputs")
    both = [key for key in known if key in by_key]
    if not both:
        raise DataError("model outputs and reference outputs share no prompt; give files of the same benchmark")
    return Matched(
        samples=[_sample(key, known[key], by_key[key]) for key in both],
        references=[known[key] for key in both],
        outputs=[by_key[key] for key in both],
        unanswered=[known[key].instruction for key in known if key not in by_key],
        unknown=[by_key[key].instruction for key in by_key if key not in known],
    )


def judge_outputs(
    outputs: Sequence[Output], references: Sequence[Output], judge: Judge, tick: Tick = lambda: None
) -> list[Annotation]:
    """Annotations, in AlpacaEval's format, of every prompt that both answer. Raises as `match` and the judge do."""
    matched = match(outputs, references)
    return annotations_of(matched, judge(matched.samples, tick), judge.name)


def annotations_of(matched: Matched, opinions: Sequence[Opinion], annotator: str) -> list[Annotation]:
    """A judge's opinions in AlpacaEval's format, which `score` and the official tool read."""
    return [
        {
            "dataset": reference.dataset or "",
            "instruction": reference.instruction,
            "output_1": reference.output,
            "generator_1": reference.generator or "reference",
            "output_2": output.output,
            "generator_2": output.generator or "model",
            "annotator": annotator,
            "preference": preference(opinion, reference.output == output.output),
        }
        for reference, output, opinion in zip(matched.references, matched.outputs, opinions, strict=True)
    ]


def preference(opinion: Opinion, same: bool = False) -> float | None:
    """1 (answer 0, the reference's, is better) to 2 (answer 1 is), None if no reply could be read. Same texts draw."""
    if same:
        return 1.5
    p = opinion.p(1, 0)
    if p is not None:
        return 1 + p
    if opinion.verdicts:
        return None
    reference, model = opinion.scores
    return 2.0 if model > reference else 1.0 if model < reference else 1.5


def _sample(key: str, reference: Output, output: Output) -> Sample:
    texts = (reference.output, output.output)
    return Sample(
        id=key,
        messages=(Message(role="user", content=reference.instruction),),
        prompt_ids=(),
        completions=tuple(Completion(ids=(), text=text, ended="human") for text in texts),
    )


def _by_key(outputs: Sequence[Output], what: str) -> dict[str, Output]:
    found: dict[str, Output] = {}
    for output in outputs:
        key = key_of(output.instruction)
        if key in found:
            raise DataError(f"{what}: two answers to the prompt {_short(output.instruction)}; keep one of them")
        found[key] = output
    return found


# --- one annotation --------------------------------------------------------------------------------------------


def of_one(annotations: Sequence[Annotation], model: str | None, annotator: str | None, place: str) -> list[Annotation]:
    """The annotations of one model by one annotator. Raises DataError if there are none or several remain."""
    wanted = {"generator_2": model, "annotator": annotator}
    chosen = [a for a in annotations if all(name is None or a.get(k) == name for k, name in wanted.items())]
    if not chosen:
        raise DataError(f"{place}: no annotation{' that was asked for' if annotations else ''} in it; check the file")
    for kind, word, option in (("generator_2", "model", "--generator"), ("annotator", "annotator", "--annotator")):
        names = sorted({str(a.get(kind)) for a in chosen})
        if len(names) > 1:
            said = ", ".join(names[:5])
            raise DataError(f"{place}: annotations of {len(names)} {word}s ({said}); choose one with {option}")
    return chosen


def _check(annotation: Annotation, place: str) -> None:
    for name in ("instruction", "output_1", "output_2"):
        if not isinstance(annotation.get(name), str):
            raise DataError(f'{place}: "{name}" is missing or no text; give AlpacaEval\'s annotations.json')


def _kept(rows: Sequence[_Row]) -> tuple[list[_Row], dict[str, int]]:
    """The rows that count, and how many do not, by reason."""
    kept: list[_Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if kept and kept[-1].key == row.key:
            dropped["prompt twice"] += 1
        elif math.isnan(row.preference):
            dropped["no preference"] += 1
        elif not 1 <= row.preference <= 2:
            dropped["preference outside 1 to 2"] += 1
        else:
            kept.append(row)
    return kept, dict(dropped)


def _name(annotations: Sequence[Annotation], kind: str, default: str) -> str:
    return str(annotations[0].get(kind) or default)


def _reasons(dropped: Mapping[str, int]) -> str:
    return "dropped: " + ", ".join(f"{count} ({why})" for why, count in dropped.items()) if dropped else ""


def _missing(official: Official | None, missing: list[str] | None) -> str:
    if not official or not missing:
        return ""
    named = ", ".join(_short(official.instructions[key]) for key in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return f"{len(missing)} of the {PROMPTS} official prompts missing: {named}{more}"


def _fitted(lc: LengthControlled) -> str:
    return f"{lc.name}: {lc.note}" if lc.note else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f'"{line[:57]}..."' if len(line) > 60 else f'"{line}"'
