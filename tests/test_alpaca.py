"""AlpacaEval: its published numbers from its own annotations, joined by prompt; its files; and the real package."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_lite.benches import alpaca, alpaca_files
from spa_lite.benches.alpaca_files import Output
from spa_lite.benches.alpaca_package import run_annotations, run_package
from spa_lite.errors import BackendMissing, DataError, JudgeError
from spa_lite.length_control import NO_DIFFICULTY, Rows, length_controlled
from spa_lite.opinion import Opinion, Tick, Verdict, compared
from spa_lite.records import Sample

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden/alpaca_phi_2_sft.json.gz").read_bytes()))
PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="alpaca-eval (the extra `alpaca`) is not installed"
)


def golden() -> list[dict[str, Any]]:
    """The golden model's annotations, with made-up texts of the true lengths."""
    columns = zip(GOLDEN["preference"], GOLDEN["reference_length"], GOLDEN["length"], strict=True)
    return [
        {
            "instruction": f"Prompt {i}.",
            "output_1": "r" * reference,
            "generator_1": "gpt4_1106_preview",
            "output_2": "m" * length,
            "generator_2": GOLDEN["model"],
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference,
        }
        for i, (preference, reference, length) in enumerate(columns)
    ]


def written(path: Path, records: Sequence[Any]) -> Path:
    """A JSON list."""
    path.write_text(json.dumps(records))
    return path


def references(path: Path) -> Path:
    """The references in official order."""
    outputs = [Output(instruction=a["instruction"], output=a["output_1"], generator="g") for a in golden()]
    alpaca_files.write_outputs(path, outputs)
    return path


def length_data(path: Path) -> Path:
    """A file of the columns of `df_gamed.csv`, with numbers from a seed."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as stream:
        cells = csv.writer(stream)
        cells.writerow([*alpaca_files.LENGTH_COLUMNS, "not_gamed_baseline", "model"])
        hard = rng.normal(size=805)
        for model in ("concise", "verbose"):
            for i in range(805):
                length = rng.normal(2 if model == "concise" else -2)
                cells.writerow([rng.uniform(), float(i), length, hard[i], False, model])
    return path


def test_published_numbers(tmp_path: Path) -> None:
    """Win rate and its error to 1e-6 points, counts and the discrete win rate exactly."""
    found = alpaca.from_annotations(written(tmp_path / "a.json", golden())).to_dict()
    ours, published = found["alpaca_eval"], GOLDEN["published"]
    for name in ("win_rate", "standard_error", "discrete_win_rate"):
        assert ours[name] == pytest.approx(published[name], abs=1e-6)
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert ours[name] == published[name]
    assert (found["n"], found["annotator"]) == (805, "weighted_alpaca_eval_gpt4_turbo")


def test_without_its_data_there_is_no_alpacaeval_lc(tmp_path: Path) -> None:
    """The fit without difficulty is another quantity and has another name; the package's like fit is near it."""
    found = alpaca.from_annotations(written(tmp_path / "a.json", golden()))
    lc = found.length_controlled
    assert lc.name == NO_DIFFICULTY
    assert lc.interval is not None
    assert 100 * lc.interval.value == pytest.approx(GOLDEN["published"]["lc_minimal_package"], abs=0.3)
    assert found.to_dict()["alpaca_eval"]["length_controlled_winrate"] is None
    assert any("df_gamed.csv" in note for note in found.notes)


def test_lc_takes_difficulty_by_prompt_and_the_rows(tmp_path: Path) -> None:
    """The fit of `length_control` on the file's numbers, its lengths turned round."""
    path = length_data(tmp_path / "df_gamed.csv")
    found = alpaca.from_annotations(written(tmp_path / "a.json", golden()), path, resamples=10)
    with path.open() as stream:
        rows = [{k: float(row[k]) for k in alpaca_files.LENGTH_COLUMNS} for row in csv.DictReader(stream)]
    wins, length, hard = (
        np.array([row[c] for row in rows]) for c in ("preference", "std_delta_len", "instruction_difficulty")
    )
    delta = [a - b for a, b in zip(GOLDEN["length"], GOLDEN["reference_length"], strict=True)]
    expected = length_controlled(
        [p - 1 for p in GOLDEN["preference"]], delta, list(hard[:805]), rows=Rows(wins, -length, hard), resamples=10
    )
    assert found.length_controlled.name == "AlpacaEval LC"
    assert found.length_controlled.interval is not None
    assert expected.interval is not None
    assert found.length_controlled.interval.value == pytest.approx(expected.interval.value)
    assert found.notes == ()


def test_order_changes_nothing_and_a_missing_prompt_is_named(tmp_path: Path) -> None:
    """Joined by prompt: shuffled files give the same; with one prompt less there is no AlpacaEval LC."""
    lc, refs = length_data(tmp_path / "df_gamed.csv"), references(tmp_path / "refs.json")
    records = golden()
    whole = alpaca.from_annotations(written(tmp_path / "a.json", records), lc, resamples=20)
    random.Random(0).shuffle(records)
    shuffled = written(tmp_path / "s.json", records)
    assert alpaca.from_annotations(shuffled, lc, refs, resamples=20) == whole
    assert alpaca.from_annotations(shuffled, lc, resamples=20).length_controlled.name == NO_DIFFICULTY
    gone = records.pop()["instruction"]
    short = alpaca.from_annotations(written(tmp_path / "m.json", records), lc, refs, resamples=20)
    assert (short.n, short.missing) == (804, 1)
    assert short.length_controlled.name == NO_DIFFICULTY
    assert any(f'1 of the 805 official prompts missing: "{gone}"' in note for note in short.notes)


def test_what_length_control_has_to_say_is_said(tmp_path: Path) -> None:
    """Why there is no number, or little in it: beside the result, not in its depths alone."""
    records = golden()[:30]
    assert "fewer than 100 prompts" in alpaca.score(records).notes[-1]
    won = [record | {"preference": 2} for record in records]
    assert f"{NO_DIFFICULTY}: every prompt has the same outcome" in alpaca.score(won).notes[-1]


def test_another_reference_is_not_alpacaevals(tmp_path: Path) -> None:
    """Its difficulties belong to its references."""
    records = golden()
    records[5]["output_1"] += "!"
    found = alpaca.from_annotations(
        written(tmp_path / "a.json", records), length_data(tmp_path / "df.csv"), references(tmp_path / "refs.json")
    )
    assert found.length_controlled.name == NO_DIFFICULTY
    assert "others" in found.notes[-1]


def test_what_is_no_preference_is_counted_and_shown(tmp_path: Path) -> None:
    """Null, NaN, a word, a missing field, and a number that is none; 0 is an old way to write a draw."""
    records = golden()[:20]
    for i, value in enumerate([None, math.nan, "2", -1, 3.5, 0]):
        records[i]["preference"] = value
    del records[6]["preference"]
    records.append({**records[7], "preference": 1.0})
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in records).encode()))
    found = alpaca.from_annotations(path)
    assert found.n == 14
    assert found.draws == 1
    assert found.dropped == {"no preference": 4, "preference outside 1 to 2": 2, "prompt twice": 1}
    assert found.n + sum(found.dropped.values()) == len(records)
    assert any("4 (no preference)" in note for note in found.notes)


def completion(**logprobs: float) -> dict[str, Any]:
    """What a server says of its first token."""
    listed = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    return {"logprobs": {"content": [{"token": "m", "top_logprobs": listed}]}}


def test_preference_from_logprobs() -> None:
    """As alpaca-eval 0.6.6 computes it, the drawn order included: its first twelve draws, and 1.18242552 for m."""
    prompts = [f"Name {i} rivers." for i in range(12)]
    assert "".join("FT"[alpaca.switched(p)] for p in prompts) == "FTFTTTFTTTFT"
    said = completion(m=-0.2, M=-1.7, x=-3.0)
    straight = alpaca.preference_from_logprobs({"instruction": prompts[0], "raw_completion": said})
    turned = alpaca.preference_from_logprobs(
        {"instruction": prompts[1], "preference_raw_completion": json.dumps(said), "preference": None}
    )
    assert straight == pytest.approx(1.1824255238063563, abs=1e-12)
    assert turned == pytest.approx(3 - straight)
    only = [
        alpaca.preference_from_logprobs({"instruction": prompts[0], "raw_completion": completion(**{t: -9.0})})
        for t in "mM"
    ]
    assert only == [1.0, 2.0]
    assert math.isnan(alpaca.preference_from_logprobs({"instruction": "\ud800", "raw_completion": said}))
    for nothing in (None, "Sure, m", {}, completion(x=0.0), {"logprobs": None}):
        assert math.isnan(alpaca.preference_from_logprobs({"instruction": "", "raw_completion": nothing}))


def test_logprobs_stand_in_for_a_missing_preference() -> None:
    """And are counted."""
    records = golden()[:20]
    del records[0]["preference"]
    records[0]["raw_completion"] = completion(m=-0.1, M=-3.0)
    found = alpaca.score(records)
    assert (found.n, found.from_logprobs) == (20, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no annotation in it"),
        ("{}", "not a list"),
        ("[1]", "record 1: not an object"),
        ('[{"instruction": "a"', "not valid JSON"),
        ('[{"instruction": "a", "output_1": "b"}]', 'record 1: "output_2" is missing'),
        ('[{"instruction": "a", "output_1": "b", "output_2": "c"}]', "no preference between 1 and 2 in 1 annotations"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, said: str) -> None:
    """In one sentence that names the file."""
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        alpaca.from_annotations(path)
    assert str(path) in str(caught.value)


def test_a_file_of_several_models_asks_for_one() -> None:
    """Or one annotator."""
    records = golden()[:20]
    records[3]["generator_2"] = "another"
    with pytest.raises(DataError, match=r"2 models .* choose one with --generator"):
        alpaca.score(records)
    assert alpaca.score(records, model=GOLDEN["model"]).n == 19
    with pytest.raises(DataError, match="asked for"):
        alpaca.score(records, annotator="nobody")


def test_other_peoples_length_data_is_refused(tmp_path: Path) -> None:
    """A column less, a prompt less, a word for a number; references that are not official."""
    path = length_data(tmp_path / "df.csv")
    lines = path.read_text().splitlines()
    whole = alpaca_files.read_length_data(path)
    path.write_text("\n".join([lines[0].replace("index", "idx"), *lines[1:]]))
    assert alpaca_files.read_length_data(path).difficulty == whole.difficulty
    for text, said in (
        ("\n".join(["preference,index", *lines[1:]]), "no column std_delta_len, instruction_difficulty"),
        ("\n".join(lines[:805]), "one difficulty for each of 805"),
        ("\n".join([*lines, "a,b,c,d,e,f"]), "no number"),
        ("", "no column"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            alpaca_files.read_length_data(path)
    records = written(tmp_path / "a.json", golden())
    refs = written(tmp_path / "refs.json", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match="805 references"):
        alpaca.from_annotations(records, None, refs)


def test_without_a_network_the_hub_is_a_sentence(tmp_path: Path) -> None:
    """Which file to give instead."""
    with pytest.raises(DataError, match=r"alpaca_eval_gpt4_baseline\.json cannot be fetched"):
        alpaca.from_annotations(written(tmp_path / "a.json", golden()[:2]), None, "hub")


@settings(max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {name: st.text(st.characters(), max_size=3) for name in ("instruction", "output_1", "output_2")},
            optional={
                "preference": st.none() | st.floats() | st.sampled_from(["2", True, 10**400, -(10**400)]),
                "raw_completion": st.recursive(st.none() | st.text(max_size=3), lambda x: st.lists(x, max_size=2)),
                "annotator": st.sampled_from(["a", None]),
            },
        ),
        max_size=8,
    )
)
def test_any_records_give_numbers_or_a_sentence(records: list[dict[str, Any]]) -> None:
    """And every record is counted somewhere."""
    try:
        found = alpaca.score(records)
    except DataError:
        return
    assert found.n + sum(found.dropped.values()) == len(records)
    assert 0 <= found.win_rate.low <= found.win_rate.value <= found.win_rate.high <= 1


# --- judging ---------------------------------------------------------------------------------------------------


class Prefers:
    """A judge that likes long answers, and the one it is shown first; it cannot be read on some prompts."""

    name, key = 'prefers "length": {a}', "k"

    def __init__(self, unread: str = "never") -> None:
        self.unread = unread

    def __call__(self, samples: Sequence[Sample], tick: Tick = lambda: None) -> list[Opinion]:
        return [self.one(sample) for sample in samples]

    def one(self, sample: Sample) -> Opinion:
        """Both orders."""
        a, b = (len(c.text) for c in sample.completions)
        silent = self.unread in sample.messages[0].content
        shown = {(0, 1): a - b + 5, (1, 0): b - a + 5}
        return compared(
            2,
            [
                Verdict(first=i, second=j, p=None if silent else 1 / (1 + math.exp(-margin / 20)))
                for (i, j), margin in shown.items()
            ],
        )


def pairs(n: int) -> tuple[list[Output], list[Output]]:
    """Outputs and references, with texts that a careless template would swallow and a few same answers."""
    rng = random.Random(0)
    names = [f"{i} {{output_1}} {{x}}" if i % 3 else f"{i} {{output_2}}" for i in range(n)]
    model = [Output(instruction=name, output="{output_2}" + "m" * rng.randrange(60), generator="m") for name in names]
    return model, [
        Output(instruction=o.instruction, output=o.output if i % 20 == 0 else "r" * rng.randrange(60), generator="r")
        for i, o in enumerate(model)
    ]


def test_judged_outputs_are_annotations(tmp_path: Path) -> None:
    """Through the files and back: joined by prompt, both orders, same answers draw, unread ones count as none."""
    model, reference = pairs(60)
    alpaca_files.write_outputs(tmp_path / "model_outputs.json", reversed(model))
    outputs = alpaca_files.read_outputs(tmp_path / "model_outputs.json")
    assert outputs == list(reversed(model))
    found = alpaca.judge_outputs(outputs, reference, Prefers(unread="7 {"))
    alpaca_files.write_records(tmp_path / "annotations.json", found)
    scored = alpaca.from_annotations(tmp_path / "annotations.json")
    assert [a["instruction"] for a in found] == [o.instruction for o in reference]
    assert found[0]["preference"] == 1.5
    unread = [a for a in found if a["preference"] is None]
    assert len(unread) == scored.dropped["no preference"] == 6
    assert (scored.model, scored.reference, scored.annotator) == ("m", "r", Prefers.name)
    one = next(a for a in found if len(a["output_2"]) > len(a["output_1"]) + 10 and a["preference"] is not None)
    assert one["preference"] > 1.5


def test_a_file_of_prompts_needs_no_answers(tmp_path: Path) -> None:
    """And keeps the name of the data set."""
    records = [{"instruction": "Name a lake.", "dataset": "d"}, {"instruction": "Name a hill.", "output": "No."}]
    lake, hill = alpaca_files.read_prompts(written(tmp_path / "p.json", records))
    assert (lake.messages[0].content, lake.extra, hill.extra) == ("Name a lake.", {"dataset": "d"}, {})
    with pytest.raises(DataError, match='record 1: "output" is missing'):
        alpaca_files.read_outputs(tmp_path / "p.json")


def test_scores_alone_make_whole_preferences() -> None:
    """A judge of numbers says which; one whose differences are log-odds says how probable."""
    assert [alpaca.preference(Opinion(scores=s)) for s in ((0.0, 3.0), (3.0, 0.0), (1.0, 1.0))] == [2.0, 1.0, 1.5]
    assert alpaca.preference(Opinion(scores=(0.0, math.log(3)), odds=True)) == pytest.approx(1.75)
    assert alpaca.preference(Opinion(scores=(0.0, 3.0)), same=True) == 1.5


def test_prompts_that_only_one_side_has_are_told() -> None:
    """And two answers to one prompt are refused."""
    model, reference = pairs(5)
    matched = alpaca.match(model[1:], reference[:4])
    assert (len(matched.samples), matched.unanswered, matched.unknown) == (
        3,
        [model[0].instruction],
        [model[4].instruction],
    )
    with pytest.raises(DataError, match="two answers"):
        alpaca.match([*model, model[0]], reference)
    with pytest.raises(DataError, match="share no prompt"):
        alpaca.match(model[:2], reference[3:])


# --- the package -----------------------------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the judge is asked anything."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match=r"spa-lite\[alpaca\]"):
        run_package(*pairs(3), Prefers())


@pytest.mark.long
@PACKAGE
def test_the_package_agrees() -> None:
    """Its numbers from our judge, offline, over more than one of its chunks, are ours from the same annotations."""
    model, reference = pairs(150)
    judge = Prefers(unread="7 {")
    theirs = run_package(model, reference, judge)
    ours = alpaca.score(alpaca.judge_outputs(model, reference, judge)).to_dict()["alpaca_eval"]
    for name, value in ours.items():
        if value is not None:
            assert theirs.metrics[name] == pytest.approx(value), name
    assert alpaca.score(theirs.annotations).to_dict()["alpaca_eval"] == pytest.approx(ours)
    assert {a["annotator"] for a in theirs.annotations} == {judge.name}
    with pytest.raises(JudgeError, match="none of 8 annotations"):
        run_package(model[1:9], reference[1:9], Prefers(unread=""))
    with pytest.raises(DataError, match="all 805"):
        run_package(model, reference, judge, lc_data="df_gamed.csv")
    records = golden()[:30]
    for i, value in enumerate([None, math.nan, -1, 0]):
        records[i] = {k: v for k, v in records[i].items() if not k.startswith("gen")} | {"preference": value}
    records.append(records[0] | {"preference": 2.0, "output_2": "another"})
    theirs, found = run_annotations(records), alpaca.score(records[1:], model=GOLDEN["model"])
    assert theirs.metrics["n_total"] == found.n + 2


@pytest.mark.long
@PACKAGE
def test_the_packages_length_control_agrees(tmp_path: Path) -> None:
    """On the golden model: its L1 penalty and cross-validation cost 0.2 points at most."""
    path = length_data(tmp_path / "df_gamed.csv")
    theirs = run_annotations(golden(), path).metrics["length_controlled_winrate"]
    ours = alpaca.score(golden(), path).to_dict()["alpaca_eval"]["length_controlled_winrate"]
    assert theirs == pytest.approx(ours, abs=0.2)
