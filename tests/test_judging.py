"""`spa-lite judge` on files: what a line says, that a stopped call goes on, and who is loaded for it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import signal
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spa_lite import backends, judging, prepare
from spa_lite.backend import INIT, POLICY, Backend
from spa_lite.cli.streams import count_lines
from spa_lite.errors import RunError
from spa_lite.evaluate import gold_of
from spa_lite.events import Event
from spa_lite.judging import Job, to_file
from spa_lite.lesson import source
from spa_lite.models import Models
from spa_lite.records import Judgement, Message, Row
from spa_lite.unfinished import part_of
from tests.crash import Instants, in_child, spread
from tests.small import lines, run_small, small_recipe, write_data
from tests.test_cli import call

WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tea", "cup", "hat"]
TOY = ["--backend", "toy", "--model", "toy"]
BARE = [*TOY, "--reference", "none"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with pairs.jsonl: 50 records, one bad, one a repeat, gold in half of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judging, "CHUNK", 8)
    put(tmp_path / "pairs.jsonl")
    return tmp_path


def put(path: Path, count: int = 50) -> Path:
    """A file of pairs."""
    rng = random.Random(1)
    rows = []
    for i in range(count):
        a, b = (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in "ab")
        gold = {"label": rng.choice("ab")} if i % 2 else {}
        rows.append(
            json.dumps({"id": f"r{i}", "prompt": f"say {i}", "a": a, "b": b + "!", "topic": "xy"[i % 2]} | gold)
        )
    rows[3:3] = ["{bad", rows[2].replace("r2", "again")]
    path.write_text("\n".join(rows) + "\n")
    return path


def job(path: Path, load: Any = backends.load, **changes: Any) -> Job:
    """Judging a file on the toy. Changes with a dot are settings, but for `seed` others are fields of the job."""
    fields = {name: changes.pop(name) for name in list(changes) if "." not in name and name != "seed"}
    base = {"judge.reference": "none"} if "inputs.init_model" not in changes else {}
    recipe = small_recipe({}, {"inputs.skip_bad": True, "batching.score_tokens": 60} | base | changes)

    def bind(backend: Backend) -> None:
        backend.bind(INIT, None)
        backend.bind(POLICY, None)

    return Job(path, recipe, prepare.models_of(recipe, load), bind, **fields)


def judged(work: Job, output: Path) -> list[dict[str, Any]]:
    """The lines of a finished file."""
    to_file(work, output)
    return lines(output)


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_line_says_how_sure(here: Path) -> None:
    """Every number of a line from the backend's own sums."""
    found = judged(job(here / "pairs.jsonl"), here / "out.jsonl")
    raw = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines() if "bad" not in line]
    rows = {i: record for i, record in enumerate([*raw[:3], None, *raw[3:]], 1) if record}
    assert [line["row"] for line in found] == [i for i in rows if i != 5], (
        "in order, the bad one and the repeat left out"
    )
    backend = backends.load("toy", prepare.model_settings(small_recipe({})))
    backend.bind(POLICY, None)
    for line in found:
        record = rows[line["row"]]
        asked = [Message(role="user", content=record["prompt"])]
        prompt = backend.tokenizer.encode_prompt(asked)
        ids = [backend.tokenizer.encode_answer(asked, record[side]) for side in "ab"]
        ((_, scores),) = backend.logprob([Row(prompt=prompt, responses=tuple(ids))], POLICY)
        a, b = (score.logp for score in scores)
        assert (line["id"], line["judge"]) == (record["id"], "implicit")
        assert (line["tokens_a"], line["tokens_b"]) == tuple(map(len, ids))
        assert (line["logratio_a"], line["logratio_b"]) == pytest.approx((a, b))
        assert line["scores"] == pytest.approx([0.1 * a, 0.1 * b])
        assert line["margin"] == pytest.approx(0.1 * (a - b))
        assert line["margin_per_token"] == pytest.approx(0.1 * (a / len(ids[0]) - b / len(ids[1])))
        assert line["label"] == ("a" if a > b else "b")
        assert (line["tie"], line["close"]) == (False, False)
        assert line.get("gold") == record.get("label")
        assert ("right" in line) == ("label" in record)
        assert line.get("right", False) == (record.get("label") == line["label"])


def test_many_answers(here: Path) -> None:
    """Best, worst and the whole ranking; gold by index or as a ranking; two answers are a pair."""
    rows = [
        {"id": "x", "prompt": "q", "responses": ["zzzz", "tea", "a cup"], "best": 1},
        {"id": "y", "prompt": "q", "responses": ["zzzz", "tea", "a cup"], "ranking": [2, 1, 0], "n": 1},
        {"id": "z", "prompt": "q", "responses": ["zzzz", "tea"], "label": 0},
        {"id": "t", "prompt": "q", "responses": ["tea", "tea", "tea"]},
    ]
    (here / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    x, y, z, t = judged(job(here / "many.jsonl"), here / "out.jsonl")
    assert x["ranking"] == sorted(range(3), key=lambda i: -x["scores"][i])
    assert (x["best"], x["worst"]) == (x["ranking"][0], x["ranking"][-1])
    assert x["margin"] == x["scores"][x["best"]] - x["scores"][x["worst"]]
    assert len(x["tokens"]) == len(x["logratios"]) == 3
    assert "label" not in x
    assert (x["gold"], x["right"]) == (1, x["best"] == 1)
    assert (y["gold"], y["right"]) == ([2, 1, 0], y["best"] == 2)
    assert (z["gold"], z["right"]) == ("a", z["label"] == "a")
    assert (t["tie"], t["close"], t["ranking"]) == (True, True, [2, 1, 0])


class Drifting:
    """A backend whose sums depend on how many rows are scored together."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def logprob(self, rows: Any, role: str, per_token: bool = False) -> Any:
        for index, (first, *rest) in self._inner.logprob(rows, role, per_token):
            yield index, (msgspec.structs.replace(first, logp=first.logp + 5.0 * (len(rows) > 1)), *rest)


def test_too_close_to_call(here: Path) -> None:
    """The drift is the largest change of a margin when a record is scored alone; margins within it are close."""
    work = job(here / "pairs.jsonl", lambda *args: Drifting(backends.load(*args)))
    progress = to_file(work, here / "out.jsonl")
    found = lines(here / "out.jsonl")
    assert progress.drift == pytest.approx(0.1 * 5.0)
    assert [line["close"] for line in found] == [abs(line["margin"]) <= progress.drift for line in found]
    assert 0 < sum(line["close"] for line in found) == progress.tally.close
    exact = job(here / "pairs.jsonl")
    largest = max(abs(s) for line in judged(exact, here / "exact.jsonl")[:8] for s in line["scores"])
    again = to_file(job(here / "pairs.jsonl"), here / "exact.jsonl")
    assert again.drift is not None
    assert 0 < again.drift <= 2**-23 * largest, "where nothing was seen, a float's rounding"


def test_pair_judges_say_whether_both_orders_agree(here: Path) -> None:
    found = judged(job(here / "pairs.jsonl", **{"judge.by": "self-pair"}), here / "out.jsonl")
    assert all({"orders_agree", "unread", "p", "tokens_a"} <= set(line) for line in found)
    assert all("logratio_a" not in line for line in found)
    assert all(line["scores"] == [line["p"], 1 - line["p"]] for line in found)


def test_one_order_only(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Other scores, no word about orders that agree, and other unfinished work."""
    both = judged(job(here / "pairs.jsonl", **{"judge.by": "self-pair"}), here / "both.jsonl")
    one = judged(job(here / "pairs.jsonl", **{"judge.by": "self-pair", "judge.swap": False}), here / "one.jsonl")
    assert [line["scores"] for line in one] != [line["scores"] for line in both]
    assert all("orders_agree" in line for line in both)
    assert not any("orders_agree" in line for line in one)
    found, _, err = call(capfd, "judge", "pairs.jsonl", *BARE, "--skip-bad", "--judge", "self-pair", "--no-swap")
    assert found == 0
    assert "shown in one order, the answer shown first wins" in err


def test_samples_say_where_answers_come_from(here: Path) -> None:
    """So judges by construction can be asked by hand."""
    answers = [
        {"ids": [65], "text": "A", "ended": "eos", "kind": "sample"},
        {"ids": [66], "text": "B", "ended": "eos", "kind": "gold"},
    ]
    turn = {"role": "user", "content": "?"}
    row = {"id": "s", "messages": [turn], "prompt_ids": [1], "completions": answers}
    (here / "samples.jsonl").write_text(json.dumps(row) + "\n")
    order = {"judge.by": "order", "candidates.kinds": ["gold", "sample"]}
    (line,) = judged(job(here / "samples.jsonl", samples=True, **order), here / "out.jsonl")
    assert (line["label"], line["score_a"], line["score_b"]) == ("b", -1, 0)


@pytest.mark.parametrize("by", ["longest", "random"])
def test_judges_that_need_no_model_load_none(here: Path, by: str) -> None:
    """And say nothing of tokens or log-ratios, which nobody knows."""

    def load(*args: Any) -> Backend:
        raise AssertionError("a model was loaded")

    found = judged(job(here / "pairs.jsonl", load, **{"judge.by": by}), here / "out.jsonl")
    assert len(found) == 50
    assert not {"p", "logratio_a", "tokens_a", "margin_per_token"} & set(found[0])


def test_the_likelihood_reads_no_reference(here: Path) -> None:
    """Even if there is another model that could be one."""
    seen: list[str] = []

    def load(name: Any, settings: Any) -> Backend:
        seen.append(settings.model)
        return backends.load(name, settings)

    found = judged(
        job(here / "pairs.jsonl", load, **{"judge.by": "likelihood", "inputs.init_model": "toy:7"}), here / "out.jsonl"
    )
    assert seen == ["toy"]
    assert found[0]["scores"] == [0.1 * found[0]["logp_a"], 0.1 * found[0]["logp_b"]]
    assert "logratio_a" not in found[0]


def test_tokens_add_up(here: Path) -> None:
    """Each token with its log-ratio; together they are the answer and its sum."""
    for line in judged(job(here / "pairs.jsonl", tokens=True), here / "out.jsonl"):
        for side in "ab":
            assert sum(value for _, value in line[f"credit_{side}"]) == pytest.approx(line[f"logratio_{side}"])
            assert len(line[f"credit_{side}"]) == line[f"tokens_{side}"]
    assert "".join(piece for piece, _ in line["credit_b"]).startswith(tuple(WORDS))


def test_each_setting_matters(here: Path) -> None:
    """A setting that changed nothing would be a lie in the help."""
    outcomes: dict[str, bytes] = {}
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "beta": {"loss.beta": 0.2},
        "penalty": {"judge.length_penalty": 0.05},
        "likelihood": {"judge.by": "likelihood"},
        "cut": {"lengths.max_length": 12, "lengths.max_prompt_length": 11},
        "model": {"inputs.model": "toy:3"},
        "tokens": {"tokens": True},
    }
    for name, changes in settings.items():
        to_file(job(here / "pairs.jsonl", **changes), here / "out.jsonl")
        outcomes[name] = (here / "out.jsonl").read_bytes()
    assert len(set(outcomes.values())) == len(outcomes)
    tie = put_same(here)
    assert judged(job(tie), here / "t.jsonl")[0]["label"] == "b"
    assert judged(job(tie, **{"judge.tie": "a"}), here / "t.jsonl")[0]["label"] == "a"
    coins = {str(judged(job(tie, **{"judge.by": "random", "seed": s}), here / "t.jsonl")) for s in (0, 1)}
    assert len(coins | {str(judged(job(tie, round_=2, **{"judge.by": "random"}), here / "t.jsonl"))}) == 3


def put_same(folder: Path) -> Path:
    """One record with two equal answers."""
    (folder / "same.jsonl").write_text('{"id": "t", "prompt": "x", "a": "same", "b": "same"}\n')
    return folder / "same.jsonl"


def test_skipped_records_are_counted(here: Path) -> None:
    """Nothing is dropped silently: bad ones, repeats, and what does not fit."""
    long = json.dumps({"id": "long", "prompt": "x" * 500, "a": "x", "b": "y"}) + "\n"
    path = here / "pairs.jsonl"
    path.write_text(path.read_text() + long)
    progress = to_file(job(path, **{"lengths.max_prompt_length": 100}), here / "out.jsonl")
    assert progress.counts == {"bad records": 1, "repeats": 1, "long_prompts": 1} | {
        name: n for name, n in progress.counts.items() if name not in {"bad records", "repeats", "long_prompts"}
    }
    assert progress.tally.records == 50


# --- two models -------------------------------------------------------------------------------------------------------


class Alone:
    """Loads toy models and sees to it that no two of them are alive together."""

    def __init__(self) -> None:
        self.alive = 0
        self.loaded: list[str] = []

    def __call__(self, name: str | None, settings: Any) -> Any:
        owner = self

        class Counted(Drifting):
            def __init__(self) -> None:
                super().__init__(backends.load(name, settings))
                owner.alive += 1
                owner.loaded.append(settings.model)
                assert owner.alive == 1, "two models in memory"

            def __del__(self) -> None:
                owner.alive -= 1

            def logprob(self, *args: Any, **kwargs: Any) -> Any:
                return self._inner.logprob(*args, **kwargs)

        return Counted()


def test_two_whole_models_one_after_the_other(here: Path) -> None:
    """The log-ratio is that of the two; each is loaded once."""
    load = Alone()
    found = judged(job(here / "pairs.jsonl", load, **{"inputs.init_model": "toy:7"}), here / "out.jsonl")
    assert load.loaded == ["toy", "toy:7"]
    own, other = (
        judged(job(here / "pairs.jsonl", **{"inputs.model": model}), here / "one.jsonl") for model in ("toy", "toy:7")
    )
    for both, a, b in zip(found, own, other, strict=True):
        assert both["logratio_a"] == pytest.approx(a["logratio_a"] - b["logratio_a"])
        assert (both["row"], both.get("gold")) == (a["row"], a.get("gold"))
    assert not part_of(here / "out.jsonl").exists()


def test_two_models_and_a_judge_of_its_own(here: Path) -> None:
    """Whole judgements by a judge that asks the policy: it leaves for the reference, and comes back."""
    load = Alone()
    work = job(here / "pairs.jsonl", load, full=True, **{"inputs.init_model": "toy:7", "judge.by": "self-pair"})
    found = judged(work, here / "out.jsonl")
    assert load.loaded == ["toy", "toy:7", "toy"]
    assert all(line["a"]["reference"] != line["a"]["policy"] for line in found)
    assert all(line["score_a"] is not None for line in found)


# --- stopping and going on --------------------------------------------------------------------------------------------

WORK: dict[str, dict[str, Any]] = {
    "one model": {},
    "two models": {"inputs.init_model": "toy:7"},
    "no model": {"judge.by": "longest"},
}


@pytest.mark.parametrize("kind", ["one model", "no model", pytest.param("two models", marks=pytest.mark.long)])
def test_killed_anywhere_it_goes_on(here: Path, kind: str) -> None:
    """SIGKILL before, within and after writes and renames: the same command ends with the same bytes."""
    path, places = here / "pairs.jsonl", here / "places.json"

    def work(output: str, fatal: int = 0) -> None:
        instants = Instants(fatal)
        instants.watch()
        to_file(job(path, report=instants.report, **WORK[kind]), here / output, seconds=0)
        if output == "whole.jsonl":
            places.write_text(json.dumps(instants.places))

    assert in_child(lambda: work("whole.jsonl")) == 0
    expected, count = (here / "whole.jsonl").read_bytes(), len(json.loads(places.read_text()))
    assert expected.count(b"\n") == 50
    for point in spread("10" if kind == "two models" else "6", count):
        output = f"run-{point}.jsonl"
        assert in_child(lambda: work(output, point)) == -signal.SIGKILL  # noqa: B023
        assert in_child(lambda: work(output)) == 0  # noqa: B023
        assert (here / output).read_bytes() == expected, json.loads(places.read_text())[point - 1]
        assert not part_of(here / output).exists()


def stopped(here: Path, **changes: Any) -> Job:
    """A call that was stopped after about twenty records; returns what goes on with it."""

    def report(event: Any) -> None:
        if event.done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_file(job(here / "pairs.jsonl", report=report, **changes), here / "out.jsonl", seconds=0)
    return job(here / "pairs.jsonl", **changes)


def test_what_was_done_is_not_done_again(here: Path) -> None:
    """Counts, gold and drift of the first half are those of the whole."""
    whole = to_file(job(here / "pairs.jsonl", by="topic"), here / "whole.jsonl")
    work, ticks = stopped(here, by="topic"), []
    work.report = lambda event: ticks.append(event) if event.unit else None
    done = to_file(work, here / "out.jsonl")
    assert (here / "out.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()
    assert done == whole
    assert 20 < len(ticks) < 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss.beta": 0.7}, "loss.beta was 0.1 and is now 0.7"),
        ({"judge.length_penalty": 0.1}, "judge.length_penalty was 0.0 and is now 0.1"),
        ({"inputs.model": "toy:5"}, "the model has changed"),
        ({"full": True}, "--full was False and is now True"),
        ({"by": "topic"}, "--by was None and is now 'topic'"),
        ({"round_": 2}, "--round was 1 and is now 2"),
    ],
)
def test_a_changed_setting_is_refused_by_name(here: Path, changes: dict[str, Any], words: str) -> None:
    stopped(here)
    with pytest.raises(RunError) as caught:
        to_file(job(here / "pairs.jsonl", **changes), here / "out.jsonl")
    assert words in str(caught.value)
    assert "--fresh" in str(caught.value)
    to_file(job(here / "pairs.jsonl", **changes), here / "out.jsonl", fresh=True)


def test_a_changed_file_is_refused(here: Path) -> None:
    work = stopped(here)
    path = here / "pairs.jsonl"
    path.write_text(path.read_text().replace("say 40", "say so"))
    with pytest.raises(RunError, match="the input file has changed"):
        to_file(work, here / "out.jsonl")


def test_a_changed_reference_is_refused(here: Path) -> None:
    """Half of the sums of one model and half of another's under the same name would be nobody's."""
    stopped_at = []

    def report(event: Any) -> None:
        if event.stage == "reference" and event.done > 20:
            stopped_at.append(event)
            raise KeyboardInterrupt

    settings = {"inputs.init_model": "toy:7"}
    with pytest.raises(KeyboardInterrupt):
        to_file(job(here / "pairs.jsonl", report=report, **settings), here / "out.jsonl", seconds=0)
    assert stopped_at

    def load(name: Any, wanted: Any) -> Backend:
        other = {"toy:7": "toy:8"}.get(wanted.model, wanted.model)
        return backends.load(name, dataclasses.replace(wanted, model=other))

    with pytest.raises(RunError, match="another reference model"):
        to_file(job(here / "pairs.jsonl", load, **settings), here / "out.jsonl")
    to_file(job(here / "pairs.jsonl", **settings), here / "out.jsonl")
    to_file(job(here / "pairs.jsonl", **settings), here / "whole.jsonl")
    assert (here / "out.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_speed_may_change_on_the_way(here: Path) -> None:
    """A smaller batch for the rest is no other judgement."""
    work = stopped(here)
    work.recipe = small_recipe({}, {"inputs.skip_bad": True, "batching.score_tokens": 1, "judge.reference": "none"})
    assert to_file(work, here / "out.jsonl").tally.records == 50


def test_nothing_of_the_users_is_removed(here: Path) -> None:
    """A folder that is no unfinished work stays, and a folder is never replaced by a file."""
    part_of(here / "out.jsonl").mkdir()
    (part_of(here / "out.jsonl") / "thesis.tex").write_text("x")
    for fresh in (False, True):
        with pytest.raises(RunError, match=r"thesis\.tex"):
            to_file(job(here / "pairs.jsonl"), here / "out.jsonl", fresh)
    (here / "folder").mkdir()
    with pytest.raises(RunError, match="it is a folder"):
        to_file(job(here / "pairs.jsonl"), here / "folder")
    (here / "file.jsonl.part").write_text("x")
    with pytest.raises(RunError, match="cannot write"):
        to_file(job(here / "pairs.jsonl"), here / "file.jsonl")


def test_a_damaged_part_is_made_anew(here: Path) -> None:
    """Lines that are not those that were marked do not count."""
    work = stopped(here)
    spool = part_of(here / "out.jsonl") / "lines.jsonl"
    spool.write_bytes(spool.read_bytes().replace(b"implicit", b"IMPLICIT", 1))
    to_file(work, here / "out.jsonl")
    assert b"IMPLICIT" not in (here / "out.jsonl").read_bytes()
    assert len(lines(here / "out.jsonl")) == 50


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Four times the records take hardly more: what is remembered of each is a digest or two (and its line nowhere)."""
    peaks = []
    for count in (500, 2000):
        path = put(tmp_path / "many.jsonl", count)
        work = job(path, **{"judge.by": "longest"})
        to_file(work, tmp_path / "warm.jsonl")
        tracemalloc.start()
        to_file(job(path, **{"judge.by": "longest"}), tmp_path / "out.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1500 < 400, "bytes per record"


# --- judgements that can be trained on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"judge.by": "longest"},
        {"judge.by": "self-pair"},
        {"judge.by": "self-rubric"},
        {"judge.length_penalty": 2.0},
    ],
)
def test_samples_become_what_run_writes(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Byte for byte, whoever judges; and whole judgements of pairs can be read as such."""
    recipe = small_recipe(write_data(tmp_path, 12, 12), {"rounds": 1} | settings)
    run_small(tmp_path / "run", recipe)
    place = tmp_path / "run/rounds/1"
    models = Models(
        lambda: backends.load("toy", prepare.model_settings(recipe)), None, tmp_path / "run/rounds/0/adapter"
    )

    def bind(backend: Backend) -> None:
        backend.bind(INIT, None)
        backend.bind(POLICY, models.policy_adapter)

    to_file(Job(place / "samples.jsonl", recipe, models, bind, samples=True), tmp_path / "j.jsonl")
    assert (tmp_path / "j.jsonl").read_bytes() == (place / "judgements.jsonl").read_bytes()


def test_full_keeps_what_train_reads(here: Path) -> None:
    work = job(here / "pairs.jsonl", full=True, **{"judge.by": "random"})
    to_file(work, here / "out.jsonl")
    found = [msgspec.json.decode(line, type=Judgement) for line in (here / "out.jsonl").read_bytes().splitlines()]
    assert len(found) == 50
    assert all(j.a.policy < 0 and j.a.reference == 0 for j in found)
    assert all((j.label == "a") == (j.score_a > j.score_b) for j in found)  # type: ignore[operator]


def test_the_gold_judge_knows_the_lesson(tmp_path: Path) -> None:
    """The gold rule is asked where it is known."""
    rule = gold_of(source.rule)
    prompt = source.prompts("tune", 1, 0)[0]
    answers = ("Yes.", "No.")
    record = msgspec.to_builtins(prompt) | {"a": answers[0], "b": answers[1]}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    (line,) = judged(job(tmp_path / "p.jsonl", gold=rule, **{"judge.by": "gold"}), tmp_path / "o.jsonl")
    assert all(0 <= score <= 1 for score in line["scores"])


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_to_a_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Accuracy beside the baselines on stderr, all of it in --summary, nothing on stdout."""
    args = ["judge", "pairs.jsonl", *BARE, "--skip-bad", "--by", "topic", "--summary", "s.json", "-o", "out.jsonl"]
    code, out, err = call(capfd, *args)
    assert (code, out) == (0, ""), err
    found = json.loads((here / "s.json").read_bytes())
    right = [line["right"] for line in lines(here / "out.jsonl") if "right" in line]
    assert found["accuracy"]["value"] == sum(right) / len(right)
    assert found["accuracy"]["n"] == 25
    assert set(found["baselines"]) == {"longer wins", "likelihood", "likelihood per token"}
    assert found["groups"] == {"y": found["accuracy"]}
    assert found["judge"] == "implicit"
    for words in ("50 pairs judged; 1 bad records, 1 repeats", "longer wins", "guessing", "calibration error", "drift"):
        assert words in err
    code, out, _ = call(capfd, "judge", "pairs.jsonl", *BARE, "--skip-bad")
    assert out.encode() == (here / "out.jsonl").read_bytes(), "to stdout the same lines"


def test_the_command_goes_on(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopped(here, **{"inputs.model": "toy"})
    assert part_of(here / "out.jsonl").is_dir()
    code, _, err = call(capfd, "judge", "pairs.jsonl", *BARE, "--skip-bad", "-o", "out.jsonl")
    assert code == 1, "other settings than the library call above: the scale's"
    assert "out.jsonl.part holds unfinished work" in err
    code, _, err = call(capfd, "judge", "pairs.jsonl", *BARE, "--skip-bad", "-o", "out.jsonl", "--fresh")
    assert code == 0, err
    assert sorted(p.name for p in here.iterdir()) == ["out.jsonl", "pairs.jsonl"]


@pytest.mark.loopback
def test_a_server_judges(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded; a reply that is paid for is not asked again by the call that goes on."""
    pytest.importorskip("openai")
    from tests.test_server import StandIn, completion

    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
        thread.start()
        try:
            broken = [True]

            def answer(body: Any, count: int) -> tuple[int, Any]:
                if count > 30 and broken:
                    return 401, "no"
                return 200, completion("A", {"A": -0.1, "B": -2.4})

            server.answer = answer
            (here / "pairs.jsonl").write_text("".join((here / "pairs.jsonl").read_text().splitlines(True)[6:36]))
            asking = ["judge", "pairs.jsonl", "--judge", "openai", "--judge-url", server.url, "--judge-model", "m"]
            code, _, err = call(capfd, *asking, "-o", "out.jsonl")
            assert code == 1, err
            assert (part_of(here / "out.jsonl") / "replies").is_dir()
            first, broken[:] = server.questions[:30], []
            begun = len(server.asked)
            code, _, err = call(capfd, *asking, "-o", "out.jsonl")
            assert code == 0, err
            assert not set(first) & set(server.questions[begun:])
            found = lines(here / "out.jsonl")
            assert len(found) == 30
            assert {line["judge"] for line in found} == {f"openai m at {server.url}"}
            assert all(line["tie"] and line["close"] and not line["orders_agree"] for line in found), "A, whatever A is"
            assert "the answer shown first wins 100.0" in err
            assert b"a-secret" not in (here / "out.jsonl").read_bytes() + err.encode()
            assert [p.name for p in here.iterdir() if "part" in p.name] == []
            asked = []
            for _ in range(2):
                assert call(capfd, *asking, "--replies", "kept", "-o", "out.jsonl")[0] == 0
                asked.append(len(server.asked))
            assert asked[0] == asked[1], "the second time all is in the folder"
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


WRONG: list[tuple[list[str], int, str]] = [
    (["pairs.jsonl", *BARE], 1, "pairs.jsonl, line 4"),
    (["pairs.jsonl", *BARE, "--skip-bad", "-o", "no/dir.jsonl"], 1, "no/dir.jsonl"),
    (["pairs.jsonl", *BARE, "--skip-bad", "-o", "."], 1, "it is a folder"),
    (["pairs.jsonl", *BARE, "--skip-bad", "--summary", "no/s.json"], 1, "no/s.json"),
    (["pairs.jsonl", *BARE, "--fresh"], 2, "give -o FILE"),
    (["pairs.jsonl", *TOY, "--reference", "lagged"], 2, "--init-adapter"),
    (["pairs.jsonl", *TOY], 2, "policy equals its reference"),
    (["pairs.jsonl", *BARE, "--init-model", "toy:7"], 2, "leave one out"),
    (["pairs.jsonl", *TOY, "--init-model", "toy:7", "--tokens"], 2, "never in memory together"),
    (["pairs.jsonl", *BARE, "--tokens", "--full"], 2, "--tokens needs"),
    (["pairs.jsonl", *BARE, "--tokens", "--judge", "longest"], 2, "--tokens needs"),
    (["pairs.jsonl", "--judge", "openai"], 2, "--judge-url and --judge-model"),
    (["pairs.jsonl", "--judge", "reward-model"], 2, "--judge-model"),
    (["pairs.jsonl", "--judge", "random", "--judge-prompt", "p.txt"], 2, "--judge-prompt"),
    (["pairs.jsonl", "--judge", "gold", "--skip-bad"], 2, "no truth"),
    (["pairs.jsonl", "--judge", "longest", "--length-penalty", "0.1"], 2, "length_penalty"),
    (["pairs.jsonl", "--judge", "label"], 2, "only samples of a run say; choose another --judge"),
    (["pairs.jsonl", "--judge", "order", "--recipe", "spin"], 2, "only samples of a run say"),
    (["pairs.jsonl", "--judge", "longest", "--no-swap"], 2, "no use for --no-swap"),
    (["pairs.jsonl", *TOY, "--judge", "self-rubric", "--judge-adapter", "lesson"], 2, "--judge-adapter"),
    (["pairs.jsonl", "--judge", "oracle"], 2, "choose one of implicit, likelihood"),
    (["pairs.jsonl", *TOY, "--init-model", "toy"], 2, "policy equals its reference"),
    (["pairs.jsonl", "--judge", "longest", "--replies", "kept"], 2, "--judge longest asks none"),
    (["pairs.jsonl", "--judge", "longest", "--limit-prompts", "3"], 2, "--limit-prompts"),
    (["none.jsonl", "--judge", "longest", "-o", "out.jsonl"], 1, "none.jsonl: there is no such file"),
    (["empty.jsonl", "--judge", "longest"], 1, "empty"),
    (["pairs.txt", "--judge", "longest"], 1, "pairs.txt"),
    (["pairs.jsonl", *TOY, "--adapter-path", "nowhere"], 1, "no adapter folder nowhere"),
]


@pytest.mark.parametrize(("args", "code", "words"), WRONG, ids=[" ".join(a[-2:]) for a, _, _ in WRONG])
def test_wrong_input_gets_one_sentence(
    here: Path, capfd: pytest.CaptureFixture[str], args: list[str], code: int, words: str
) -> None:
    (here / "empty.jsonl").touch()
    found, out, err = call(capfd, "judge", *args)
    assert found == code, err
    assert words in err
    assert out == ""
    assert [line.startswith("error: ") for line in err.splitlines()][-1]
    assert "Traceback" not in err
    assert not part_of(here / "out.jsonl").exists()


def test_the_other_model_is_looked_at_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A reference that is not there, or that reads text differently, is refused before the policy scores anything."""
    pytest.importorskip("torch", reason="tiny models are made with torch")
    from tests import tiny

    one, other = (tiny.make_model(tmp_path / name, "llama") for name in ("one", "other"))
    words = json.loads((other / "tokenizer.json").read_bytes())
    vocabulary = words["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    pairs = put(tmp_path / "pairs.jsonl", 5)
    for model, sentence in ((tmp_path / "nowhere", "there is no model folder"), (other, "reads text differently")):
        asked = ["judge", str(pairs), "--skip-bad", "--backend", "torch", "--model", str(one)]
        code, out, err = call(capfd, *asked, "--init-model", str(model))
        assert (code, out) == (1, "")
        assert sentence in err
        assert "policy:" not in err


def test_nothing_done_is_nothing_to_go_on_with(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bad line in the first chunk is mended, and the same command works."""
    asked = ["judge", "pairs.jsonl", "--judge", "longest", "-o", "out.jsonl"]
    assert call(capfd, *asked)[0] == 1
    (here / "pairs.jsonl").write_text((here / "pairs.jsonl").read_text().replace("{bad\n", ""))
    code, _, err = call(capfd, *asked)
    assert code == 0, err


def test_a_pipe_is_a_source(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As `judge <(zcat pairs.jsonl.gz)` gives one: it can be read only once."""
    os.mkfifo(here / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((here / "pipe").write_bytes, (here / "pairs.jsonl").read_bytes())
        code, out, err = call(capfd, "judge", "pipe", "--judge", "longest", "--skip-bad")
    assert code == 0, err
    assert out == call(capfd, "judge", "pairs.jsonl", "--judge", "longest", "--skip-bad")[1]
    with ThreadPoolExecutor(1) as pool:
        pool.submit((here / "pipe").write_bytes, (here / "pairs.jsonl").read_bytes())
        assert "error: pipe, line 4: " in call(capfd, "judge", "pipe", "--judge", "longest")[2], (
            "by the name it was given"
        )


def test_time_left_is_said_only_where_it_is_known(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Compressed lines are counted; of a list nobody knows the length, and not each record is a line."""
    content = (here / "pairs.jsonl").read_bytes()
    (here / "pairs.jsonl.gz").write_bytes(gzip.compress(content.removesuffix(b"\n")))
    (here / "pairs.json").write_text(json.dumps([json.loads(s) for s in content.splitlines() if s != b"{bad"]))
    assert count_lines(here / "pairs.jsonl.gz") == count_lines(here / "pairs.jsonl") == 52
    assert count_lines(here / "pairs.json") == 0
    code, _, err = call(capfd, "judge", "pairs.json", "--judge", "longest")
    assert code == 0
    assert err.splitlines()[0] == "50 pairs judged; 1 repeats"


@pytest.mark.parametrize("changes", [{}, {"full": True}, {"full": True, "judge.by": "random"}], ids=str)
def test_every_record_is_told_of_once(here: Path, changes: dict[str, Any]) -> None:
    """Also where a record is scored twice, under policy and reference."""
    told: list[Event] = []
    judged(job(here / "pairs.jsonl", report=told.append, expected=52, **changes), here / "out.jsonl")
    assert [(e.done, e.total) for e in told if e.done] == [(i + 1, 52) for i in range(50)]


def test_a_policy_may_be_named_by_any_option(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--set names a model as well as --model does, and no other is taken in its place."""
    (here / "c.yaml").write_text("inputs: {model: toy, backend: toy}\njudge: {reference: none}\n")
    want = call(capfd, "judge", "pairs.jsonl", *BARE, "--skip-bad")[1]
    for words in (["--config", "c.yaml"], ["--backend", "toy", "--reference", "none", "--set", "inputs.model=toy"]):
        code, out, err = call(capfd, "judge", "pairs.jsonl", "--skip-bad", *words)
        assert (code, out) == (0, want)
        assert "built-in" not in err


def test_a_subset_that_nobody_is_in_is_said(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capfd, "judge", "pairs.jsonl", "--judge", "longest", "--skip-bad", "--by", "nosuch")
    assert code == 0
    assert "no record has a field nosuch, which --by names" in err


# --- against plain code -----------------------------------------------------------------------------------------------


def test_scores_equal_a_plain_transformers_loop(tmp_path: Path) -> None:
    """One answer at a time, log-softmax, sum: to 1e-4 nats, on a small random Llama."""
    pytest.importorskip("torch", reason="tiny models are made with torch")
    from benchmarks.bench_judge import plain_scores
    from tests import tiny

    model = tiny.make_model(tmp_path / "model", "llama")
    rng = random.Random(0)
    with (tmp_path / "p.jsonl").open("w") as file:
        for i in range(12):
            a, b = (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in "ab")
            file.write(json.dumps({"id": str(i), "prompt": f"say {i}", "a": a, "b": b + "?"}) + "\n")
    changes = {"inputs.backend": "torch", "inputs.model": str(model), "lengths.max_length": 200}
    limits = {"lengths.max_prompt_length": 100, "inputs.device": "cpu", "judge.by": "likelihood"}
    work = job(tmp_path / "p.jsonl", full=True, **changes, **limits)
    to_file(work, tmp_path / "o.jsonl")
    found = [msgspec.json.decode(line, type=Judgement) for line in (tmp_path / "o.jsonl").read_bytes().splitlines()]
    rows = [Row(prompt=j.prompt_ids, responses=(j.a.ids, j.b.ids)) for j in found]
    for j, plain in zip(found, plain_scores(model, rows), strict=True):
        assert (j.a.policy, j.b.policy) == pytest.approx(plain, abs=1e-4)
