"""Tokens per second with a clock of the test's own, floors that can be checked by hand, and where both are shown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from rich.console import Console
from rich.progress import Progress

from spa_lite.backend import Backend
from spa_lite.backends import speed as device
from spa_lite.cli import render
from spa_lite.effort import Speed, Work
from spa_lite.events import Event, per_unit, ticking
from spa_lite.floor import Floor, Sizes, Weights, fewest, floor_seconds
from spa_lite.report.collect import read_runs
from spa_lite.report.tables import throughput_sheet
from spa_lite.shape import Shape
from spa_lite.spa import align
from spa_lite.store import Run, Stage
from spa_lite.throughput import Pace, Total, Went, rates, totals
from tests.small import results, run_small, small_recipe, start, write_data

SHAPE = Shape("llama", 2, 8, 16, 2, 1, 4, 100, tied=False, gated=True, context=64)
BODY = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8


def heard(events: Sequence[Event], *clock: float) -> Pace:
    """A pace that was made at the first reading of the clock and heard an event at each of the others."""
    pace = Pace(iter(clock).__next__)
    for event in events:
        pace.hear(event)
    return pace


# --- counting ---------------------------------------------------------------------------------------------------------


def test_ticks_become_events_with_all_tokens_so_far() -> None:
    events: list[Event] = []
    tick = ticking(events.append, "judge", 10, "pairs", start=8)
    tick(5)
    tick(7)
    tick(9)  # once more, in a smaller batch
    assert events == [
        Event("judge", 8, 10, "pairs", begins=True),
        Event("judge", 9, 10, "pairs", tokens=5),
        Event("judge", 10, 10, "pairs", tokens=12),
        Event("judge", 10, 10, "pairs", tokens=21),
    ]


def test_a_tick_that_counts_units_takes_tokens_too() -> None:
    seen: list[int] = []
    per_unit(lambda: seen.append(1))(40)
    assert seen == [1]


def test_time_counts_from_where_work_begins() -> None:
    """What was done in an earlier process is not counted, nor is loading, nor the time between two chunks."""
    pace = heard(
        [
            Event("sample", 64, 256, "prompts", begins=True),  # at 10, behind the loading of a model
            Event("sample", 96, 256, "prompts", tokens=3000),  # at 15
            Event("sample", 128, 256, "prompts", tokens=6400),  # at 18
            Event("sample", 128, 256, "prompts", begins=True),  # at 50: the next chunk
            Event("sample", 192, 256, "prompts", tokens=1600),  # at 52
        ],
        *(0, 10, 15, 18, 50, 52),
    )
    assert pace.done() == {"sampled": Went(128, 8000, 10.0)}
    assert pace.went["sample", "prompts"].tokens_per_second == 800.0


def test_without_a_beginning_the_event_before_is_one() -> None:
    pace = heard([Event("train", note="hello"), Event("train", 51, 100, "steps", tokens=30)], 0, 4, 7)
    assert pace.done() == {"trained": Went(1, 30, 3.0)}


def test_what_counts_no_tokens_has_no_rate() -> None:
    pace = heard([Event("answers", 0, 2, "turns", begins=True), Event("answers", 1, 2, "turns")], 0, 1, 2)
    assert pace.done() == {}


def test_two_units_of_a_stage_are_two_things() -> None:
    """Measuring samples, then scores, under one name."""
    events: list[Event] = []
    for unit in ("prompts", "pairs"):
        ticking(events.append, "measure", 1, unit)(100)
    pace = heard(events, 0, 1, 3, 3, 7)
    assert pace.done() == {"sampled": Went(1, 100, 2.0), "scored": Went(1, 100, 4.0)}
    assert rates(pace, lambda done, went: 1.0 if done == "scored" else None) == {
        "sampled_tokens": 100,
        "sampled_seconds": 2.0,
        "sampled_tokens_per_second": 50.0,
        "scored_tokens": 100,
        "scored_seconds": 4.0,
        "scored_tokens_per_second": 25.0,
        "scored_share_of_floor": 0.25,
    }


def test_totals_are_weighed_by_time() -> None:
    fast = {"trained_tokens": 600, "trained_seconds": 2.0, "trained_share_of_floor": 0.5}
    slow = {"trained_tokens": 400, "trained_seconds": 8.0, "trained_share_of_floor": 0.1}
    spent: list[dict[str, dict[str, float]]] = [{"train": {"seconds": 3.0, **fast}}, {"train": slow}, {"judge": {}}]
    (total,) = totals(spent)
    assert (total.kind, total.done, total.tokens, total.per_second) == ("train", "trained", 1000, 100.0)
    assert total.share == pytest.approx(0.18)
    del slow["trained_share_of_floor"]
    assert totals(spent) == [Total("train", "trained", 1000, 10.0, None)], "not known of all of it"


# --- the floor --------------------------------------------------------------------------------------------------------


def test_a_floor_by_hand() -> None:
    """A prompt of 4 tokens with two answers of 3; two layers, queries 8 and keys 4 wide; a vocabulary of 100."""
    assert SHAPE.body == BODY
    weights, sizes = Weights(1000.0, 2), Sizes(prompt=4, answer=3, answers=2, slots=8, forward=20)
    head, seen = 2 * 100 * 8 * 6, 2 * 3 * (4 + 1.5)  # places that the answers' tokens see
    attention = 4 * 2 * 8
    (scored,) = fewest(SHAPE, weights, "scored", sizes)
    assert scored == Work(2 * BODY * 10 + head + attention * (8 + seen), 1000 * 10 / 20)
    (trained,) = fewest(SHAPE, weights, "trained", sizes)
    assert trained == Work(2 * (2 * BODY * 10 + head) + 3 * attention * (8 + seen), 1000)
    reading, steps = fewest(SHAPE, weights, "sampled", sizes)
    assert reading == Work(2 * BODY * 4 + attention * 8, 1000 * 4 / 20)
    assert steps == Work(2 * BODY * 6 + head + attention * seen, 1000 * 6 / 8 + 2 * 2 * 4 * 2 * seen)


@pytest.mark.parametrize(("slots", "per_second"), [(32, 46_700), (128, 126_000), (512, 220_000)])
def test_the_floor_of_a_known_model(slots: int, per_second: float) -> None:
    """Llama-3.2-1B in 16 bits, places 450 on average, 4.3 TB/s, 790 TFLOP/s: reading weights, keys, then arithmetic."""
    shape = Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, tied=True, gated=True, context=2048)
    weights = Weights.of(shape, {"dtype": "bfloat16", "bits": 16})
    assert weights.read == pytest.approx(2 * 1.236e9, rel=1e-3)
    _, steps = fewest(shape, weights, "sampled", Sizes(325, 250, 2, slots, 16384))
    assert 500 / floor_seconds([steps], Speed(790e12, 4.3e12)) == pytest.approx(per_second, rel=3e-3)


def test_the_longer_of_arithmetic_and_reading_counts_in_each_phase() -> None:
    assert floor_seconds([Work(10, 10), Work(100, 2)], Speed(10, 2)) == 5 + 10


@pytest.mark.parametrize(
    ("description", "read"),
    [
        ({"dtype": "float32", "bits": 32}, 4 * (BODY + 800)),
        ({"dtype": "bfloat16", "bits": 16}, 2 * (BODY + 800)),
        ({"dtype": "bfloat16", "bits": 4}, BODY / 2 + 2 * 800),
    ],
)
def test_bytes_of_a_forward(description: dict[str, Any], read: float) -> None:
    assert Weights.of(SHAPE, description).read == read


class Shaped:
    """A backend around another one that has a shape."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return SHAPE if name == "shape" else getattr(self.inner, name)


def test_a_run_knows_its_floor(tmp_path: Path) -> None:
    """The share in timings.json is the floor of the least work, at the lengths of the data, over the seconds taken."""
    recipe = small_recipe(write_data(tmp_path))
    models, data = start(recipe, lambda backend: cast(Backend, Shaped(backend)))
    asked: list[str] = []

    def measure(backend: Backend) -> Speed:
        asked.append(backend.name)
        return Speed(1e9, 1e9)

    floor = Floor(models, recipe, data, measure)
    _ = models.backend
    stage = Stage("rounds/1", "sample", (), {}, {}, 20)
    went = Went(units=20, tokens=400, seconds=2.0)  # two answers of 10 tokens each
    prompt = sum(len(ids) for _, ids in data.rounds[0]) / len(data.rounds[0])
    b = models.backend.batching
    sizes = Sizes(prompt, 10.0, 2, 2 * min(b.sample, len(data.rounds[0])), b.score_tokens)
    weights = Weights.of(SHAPE, models.backend.description)
    least = 20 * floor_seconds(fewest(SHAPE, weights, "sampled", sizes), Speed(1e9, 1e9))
    assert floor.seconds(stage, "sampled", went) == pytest.approx(least)
    seed = Stage("rounds/0", "seed", (), {}, {}, 40)
    assert floor.seconds(seed, "trained", Went(5, 400, 1.0)) is not None
    assert floor.seconds(replace(stage, kind="measure", folder="init"), "scored", Went()) is None
    assert asked == ["toy"], "measured once"


def test_no_shape_no_floor(tmp_path: Path) -> None:
    recipe = small_recipe(write_data(tmp_path))
    models, data = start(recipe)
    _ = models.backend
    floor = Floor(models, recipe, data, lambda backend: Speed(1, 1))
    assert floor.seconds(Stage("rounds/1", "sample", (), {}, {}, 1), "sampled", Went(1, 1, 1)) is None


def test_a_devices_speed_is_of_the_best_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first go does not count, however short."""
    readings = iter([0, 0.1, 1, 3, 3, 4.5, 5, 10, 10, 14, 14, 17])
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    assert device.least_seconds(lambda: None) == 1.5


def test_a_device_without_room_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(device, "torch_work", full)
    backend = SimpleNamespace(name="torch", description={"device": "cuda:0", "dtype": "bfloat16"})
    assert device.speed(cast(Backend, backend)) is None


def test_a_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(device, "SIZES", {"cpu": (16, 64)})
    product, copy, width = device.torch_work(16, 64, "cpu", "bfloat16")
    assert (product(), copy(), width)[2] == 2

    torch = SimpleNamespace(name="torch", description={"device": "cpu", "dtype": "float32"})
    found = device.speed(cast(Backend, torch))
    assert found is not None
    assert min(found.flop, found.bytes) > 0


# --- where it is shown ------------------------------------------------------------------------------------------------


def test_progress_lines_have_tokens_per_second(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 90.0, 100.0, 110.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    report = render._lines(every=5.0)
    report(Event("round 1 sample", 32, 64, "prompts", begins=True))
    for event in (
        Event("round 1 sample", 40, 64, "prompts", tokens=4000),
        Event("round 1 sample", 48, 64, "prompts", tokens=9000),
        Event("round 1 sample", 64, 64, "prompts", tokens=24000),
    ):
        report(event)
    assert capfd.readouterr().err.splitlines() == [
        "round 1 sample: 48/64 prompts, 0.8/s, 450 tokens/s, 20 s left",
        "round 1 sample: 64/64 prompts, 1.1/s, 800 tokens/s, 0 s left",
    ]


def test_bars_have_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 14.0])
    console = Console(file=io.StringIO(), force_terminal=True)
    bars = Progress(render._Rate(), console=console, auto_refresh=False, get_time=lambda: 0.0)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    report = render._bars(bars, keep=True)
    report(Event("seed", 0, 8, "steps", begins=True))
    assert bars.tasks == [], "nothing is done yet"
    report(Event("seed", 1, 8, "steps", tokens=100))
    assert bars.tasks[0].fields["tokens"] == ", 25 tokens/s"


def test_the_table_of_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    spent: dict[str, float] = {"sampled_tokens": 12000, "sampled_seconds": 10.0, "sampled_share_of_floor": 0.345}
    table = render.throughput_table([{"sample": spent}, {"sample": {"seconds": 1.0}}])
    assert table is not None
    render.show(table)
    assert [word for word in capfd.readouterr().out.split() if word in {"sampled", "12,000", "1,200", "34.5"}] == [
        "sampled",
        "12,000",
        "1,200",
        "34.5",
    ]
    assert render.throughput_table([{"sample": {"seconds": 1.0}}]) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run."""
    place = tmp_path_factory.mktemp("throughput")
    run_small(place / "run", small_recipe(write_data(place)))
    return place / "run"


def test_a_run_says_how_many_tokens_went_through(finished: Path) -> None:
    """As many as the answers have, which other files know; clocks are in timings.json alone."""
    summary = msgspec.json.decode((finished / "summary.json").read_bytes())
    timings = msgspec.json.decode((finished / "timings.json").read_bytes())
    for row in summary["rows"][2:]:
        spent = timings[row["stage"]]
        assert spent["sample"]["sampled_tokens"] == row["sampled"]["tokens"]
        assert spent["train"]["trained_tokens"] == row["trained"]["tokens"]
        assert spent["train"]["trained_seconds"] <= spent["train"]["seconds"]
    assert timings["seed"]["seed"]["trained_tokens"] == summary["rows"][1]["trained"]["tokens"]
    assert b"per_second" not in (finished / "summary.json").read_bytes() + b"".join(results(finished).values())


def test_the_report_shows_it(finished: Path) -> None:
    sheet = throughput_sheet(read_runs([finished])[0])
    assert [row[:2] for row in sheet.rows][:2] == [["seed", "trained"], ["sample", "sampled"]]


def test_only_what_this_process_did_counts(tmp_path: Path) -> None:
    """A run that was stopped in its first training step goes on: what was sampled before is not counted again."""
    recipe = small_recipe(write_data(tmp_path), {"train.save_every": 1})
    models, data = start(recipe)

    def stop(event: Event) -> None:
        if event.unit == "steps" and event.stage == "round 1 train" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(models, recipe, data, Run(tmp_path / "run"), stop)
    run_small(tmp_path / "run", recipe)
    lines = [msgspec.json.decode(line) for line in (tmp_path / "run/rounds/1/metrics.jsonl").read_bytes().splitlines()]
    spent = Run(tmp_path / "run").spent("rounds/1")["train"]
    assert len(lines) > 2
    assert spent["trained_tokens"] < sum(line["tokens"] for line in lines)
