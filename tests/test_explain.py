"""One pair explained: the numbers are those of the objective and of the run, and text is shown, never obeyed."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from spa_lite import objective
from spa_lite.backend import INIT, POLICY, Backend, Lora, ModelSettings, Optimizer
from spa_lite.backends.toy import ToyBackend
from spa_lite.cli import render
from spa_lite.cli.explain import spark
from spa_lite.cli.main import main
from spa_lite.encode import encode_answers
from spa_lite.errors import DataError, RunError
from spa_lite.explain import Explanation, Trained, html, noisy, reasons
from spa_lite.explain_sources import (
    explain_pair,
    explain_run,
    extrapolated_margins,
    given_candidates,
    given_judgements,
    place_of,
)
from spa_lite.objective import Dpo, dpo_loss, preference, refined_loss
from spa_lite.recipe import Recipe, build
from spa_lite.records import Message, Row
from spa_lite.stages.workbench import read_judgements
from tests.small import SMALL, lines, load, run_small, small_recipe, write_data
from tests.tiny import make_model

LIMITS: dict[str, Any] = {"max_prompt_length": 200, "max_length": 400, "long_prompts": "skip"}
ASK = (Message(role="user", content="say it"),)
EVIL = "<script>document.title='obeyed'</script><img src=x onerror=\"document.title='obeyed'\">"
EVIL += " [bold]b[/] \x1b[31m \u202eabc"


def moved(backend: Backend, steps: int = 3) -> Backend:
    """A backend whose policy has made a few steps away from the base."""
    tokenizer = backend.tokenizer
    row = Row(
        prompt=tokenizer.encode_prompt(ASK),
        responses=(tokenizer.encode_answer(ASK, "red é cat"), tokenizer.encode_answer(ASK, "my sun mends")),
    )
    backend.bind(POLICY, None, Lora(rank=4))
    backend.snapshot()
    backend.start_training(Optimizer())
    for _ in range(steps):
        backend.dpo_step([row], Dpo(0.5), 2e-2)
    return backend


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy, whose first round flags pairs."""
    folder = tmp_path_factory.mktemp("run")
    run_small(folder / "run", small_recipe(write_data(folder)))
    return folder / "run"


def opened(recipe: Recipe) -> Backend:
    return load(recipe)


def term(e: Explanation, name: str) -> Any:
    """The term whose name begins so."""
    (found,) = [t for t in (*e.judged, *e.trained) if t.name.startswith(name)][:1]
    return found


# -- a pair of a run ------------------------------------------------------------------------------------------------


def test_a_pair_of_a_run_has_the_run_s_numbers(run: Path) -> None:
    """Every pair of a round: credit sums to the judge's log-ratio, terms follow from the log, flags are the log's."""
    path = run / "rounds/2/judgements.jsonl"
    judgements, log = read_judgements(path), lines(run / "rounds/2/metrics.jsonl")
    flags = {i for line in log for i in line["flagged"]}
    assert flags
    seen = set()
    for row, j in enumerate(judgements, 1):
        e = explain_run(path, row, opened)
        assert (e.id, e.row, e.chosen.letter) == (j.id, row, j.label)
        for answer, side in ((e.chosen, j.chosen), (e.rejected, j.rejected)):
            assert fsum(c.logratio for c in answer.credits) == pytest.approx(side.logratio, abs=1e-9)
            assert answer.running[-1] == pytest.approx(side.logratio, abs=1e-9)
        sign = 1 if j.label == "a" else -1
        assert next(t for t in e.judged if t.name == "margin m").value == pytest.approx(sign * j.margin)
        line = next((line for line in log if j.id in line["ids"]), None)
        if line is None:
            assert e.trained == ()
            assert "not trained on because its answers are the same" in e.why[0]
            continue
        m, softened = line["margins"][line["ids"].index(j.id)], j.id in flags
        seen.add(softened)
        assert e.flagged == softened
        assert next(t for t in e.trained if t.name == "margin m").value == m
        assert term(e, "extrapolated").value == line["extrapolated_margins"][line["ids"].index(j.id)]
        assert term(e, "threshold").value == line["tau"]
        assert term(e, "DPO loss").value == pytest.approx(dpo_loss(m))
        assert term(e, "refined loss").value == pytest.approx(refined_loss(m, float(softened), 0.1))
        slope = preference(m) - (1 - 0.1 * softened)
        assert term(e, "d loss / d m").value == pytest.approx(slope)
        gradient = term(e, "d loss / d log")
        assert (gradient.chosen, gradient.rejected) == pytest.approx((0.1 * slope, -0.1 * slope))
        assert e.why[0].startswith("Flagged:" if softened else ("Not flagged:", "Taken for noise, but not softened"))
    assert seen == {True, False}


def test_what_the_run_s_files_no_longer_tell_is_said(run: Path, tmp_path: Path) -> None:
    """An older run without margins, an adapter that is gone, a round without training: the rest is shown."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    path, log = old / "rounds/1/judgements.jsonl", old / "rounds/1/metrics.jsonl"
    known = lines(log)
    flagged = next(i for line in known for i in line["flagged"])
    row = next(n for n, j in enumerate(read_judgements(path), 1) if j.id == flagged)
    for line in known:
        del line["margins"], line["extrapolated_margins"]
    log.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in known))
    e = explain_run(path, row, opened)
    assert e.flagged
    assert e.why[0].startswith("Flagged: the run says so")
    assert any("no margins per pair" in note for note in e.notes)
    assert next(t for t in e.trained if t.name == "margin m").value is None
    assert next(t for t in e.trained if t.name == "refined loss").shown("value") == "–"
    shutil.rmtree(old / "rounds/0/adapter")
    e = explain_run(path, row, opened)
    assert e.chosen.credits == ()
    assert any("rounds/0/adapter is not there" in note for note in e.notes)
    assert "log-ratio" in html(e)
    log.unlink()
    assert explain_run(path, row, opened).why == ("Round 1 has not been trained yet, so nothing was flagged.",)


def test_rows_and_places(run: Path, tmp_path: Path) -> None:
    path = run / "rounds/1/judgements.jsonl"
    count = len(read_judgements(path))
    with pytest.raises(DataError, match=f"there is no row {count + 1} in .*: its last usable record is number {count}"):
        explain_run(path, count + 1, opened)
    elsewhere = tmp_path / "judgements.jsonl"
    shutil.copy(path, elsewhere)
    assert place_of(elsewhere) is None
    with pytest.raises(RunError, match=r"no rounds/N/judgements\.jsonl of a run"):
        explain_run(elsewhere, 1, opened)


# -- any pairs ------------------------------------------------------------------------------------------------------


def write_pairs(path: Path, count: int) -> Path:
    """Labelled pairs, with blank lines between them."""
    words = ["red", "cat", "sun", "my", "mends", "blue", "é"]
    with path.open("w") as file:
        for i in range(count):
            chosen, rejected = (" ".join(words[(i * k + j) % 7] for j in range(3)) for k in (2, 3))
            file.write(
                json.dumps({"id": f"p{i}", "prompt": f"say {i}", "chosen": f"{chosen} {i}", "rejected": rejected})
            )
            file.write("\n\n")
    return path


def test_the_extrapolated_margin_is_that_of_mixed_logits_and_nothing_moves() -> None:
    """Against the toy's own tables; the weights are the same bytes afterwards."""
    backend = moved(ToyBackend(ModelSettings("toy")))
    assert isinstance(backend, ToyBackend)
    row = encode_answers(ASK, ("red cat", "my sun"), backend.tokenizer, _counter(), **LIMITS)
    assert row is not None
    before = backend.logits(POLICY).tobytes(), backend.logits(INIT).tobytes()
    (found,) = extrapolated_margins(backend, [row], 0.5, 0.7)
    assert (backend.logits(POLICY).tobytes(), backend.logits(INIT).tobytes()) == before
    mixed = objective.extrapolate(backend.logits(POLICY), backend.logits(INIT), 0.7)
    sums = []
    for logits in (mixed, backend.logits(INIT)):
        table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for response in row.responses:
            ids = [row.prompt[-1], *response]
            sums.append(fsum(table[a, b] for a, b in pairwise(ids)))
    yw, yl, ref_yw, ref_yl = sums
    assert found == pytest.approx(objective.margin(yw, yl, ref_yw, ref_yl, 0.5), abs=1e-9)
    assert extrapolated_margins(backend, [row], 0.5, 0.0)[0] == pytest.approx(_margin(backend, row, 0.5), abs=1e-9)


def _counter() -> Any:
    from collections import Counter

    return Counter()


def _margin(backend: Backend, row: Row, beta: float) -> float:
    ((_, own),), ((_, other),) = list(backend.logprob([row], POLICY)), list(backend.logprob([row], INIT))
    return float(objective.margin(own[0].logp, own[1].logp, other[0].logp, other[1].logp, beta))


def test_looking_moves_nothing_on_torch(tmp_path: Path) -> None:
    """The adapter is the same, bit by bit; with lambda 0 the margin is the plain one."""
    pytest.importorskip("torch")
    from spa_lite.backends.torch import TorchBackend

    backend = moved(TorchBackend(ModelSettings(str(make_model(tmp_path / "model")), device="cpu")))
    row = encode_answers(ASK, ("my sister mends", "a heron"), backend.tokenizer, _counter(), **LIMITS)
    assert row is not None
    backend.save(tmp_path / "before", optimizer=False)
    plain, more = (extrapolated_margins(backend, [row, row], 0.5, lambda_) for lambda_ in (0.0, 0.5))
    backend.save(tmp_path / "after", optimizer=False)
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert plain[0] == pytest.approx(_margin(backend, row, 0.5), abs=1e-5)
    assert 1.2 < more[0] / plain[0] < 2.5  # about 1 + lambda near the reference


def small(adapter: Path, **changes: Any) -> Recipe:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return build({"small": SMALL, "test": {"inputs.adapter_path": str(adapter)} | names})[0]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    moved(ToyBackend(ModelSettings("toy"))).save(tmp_path / "adapter", optimizer=False)
    return tmp_path / "adapter"


def bound(adapter: Path) -> Backend:
    backend = ToyBackend(ModelSettings("toy"))
    backend.bind(POLICY, adapter)
    return backend


def test_the_threshold_stands_on_the_pairs_before(tmp_path: Path, adapter: Path) -> None:
    """tau is the quantile of the eight margins before; earlier, nothing is flagged. Blank lines do not count."""
    path, recipe, backend = write_pairs(tmp_path / "pairs.jsonl", 20), small(adapter), bound(adapter)
    givens = list(given_candidates(path, backend, LIMITS))
    rows = [Row(prompt=g.sample.prompt_ids, responses=tuple(c.ids for c in g.sample.completions)) for g in givens]
    margins = extrapolated_margins(backend, rows, recipe.loss.beta, 0.5)
    early = explain_pair(givens, path, 8, backend, recipe)
    assert not early.flagged
    assert "the window is not full, so nothing is flagged. A threshold needs 8 margins, and 7 came" in early.why[0]
    verdicts = set()
    for row in range(9, 21):
        e = explain_pair(given_candidates(path, backend, LIMITS), path, row, backend, recipe)
        assert e.id == f"p{row - 1}"
        assert term(e, "extrapolated").value == pytest.approx(margins[row - 1], abs=1e-9)
        tau = float(np.quantile(margins[row - 9 : row - 1], 0.3))
        assert term(e, "threshold").value == pytest.approx(tau, abs=1e-9)
        assert e.flagged == (margins[row - 1] < tau)
        assert e.why[0].startswith("It would be flagged" if e.flagged else "Not flagged")
        verdicts.add(e.flagged)
    assert verdicts == {True, False}
    assert backend.logits(POLICY).tobytes() == bound(adapter).logits(POLICY).tobytes()  # type: ignore[attr-defined]


def test_without_a_label_the_implicit_reward_chooses(tmp_path: Path, adapter: Path) -> None:
    """Also of more than two answers; the pairs before are labelled alike."""
    path, backend = tmp_path / "several.jsonl", bound(adapter)
    records = [{"prompt": f"say {i}", "responses": ["my sun", f"red cat {i}", "tea"]} for i in range(10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    e = explain_pair(given_candidates(path, backend, LIMITS), path, 10, backend, small(adapter))
    assert e.chosen.logratio > e.rejected.logratio
    assert e.labelled_by == "the implicit reward (Eq. 8)"
    assert any("best and the worst of 3" in note for note in e.notes)
    assert term(e, "threshold").value is not None


def test_what_cannot_be_extrapolated_is_said(tmp_path: Path, adapter: Path) -> None:
    """Without a reference, and on a backend that cannot train; refinement that is off flags nothing."""
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    backend = bound(adapter)
    e = explain_pair(given_candidates(path, backend, LIMITS), path, 3, backend, small(adapter, judge__reference="none"))
    assert e.flagged is None
    assert e.chosen.reference == 0.0
    assert "not known" in e.why[0]
    backend.can_train = False  # type: ignore[misc]
    e = explain_pair(given_candidates(path, backend, LIMITS), path, 3, backend, small(adapter))
    assert any("a backend that can train" in note for note in e.notes)
    assert term(e, "DPO loss").value is not None
    e = explain_pair(given_candidates(path, backend, LIMITS), path, 3, backend, small(adapter, refine__alpha=0.0))
    assert e.flagged is False
    assert e.why == ("Not flagged: refinement is off (refine.alpha = 0).",)


def test_judgements_from_elsewhere_keep_their_labels(run: Path, tmp_path: Path) -> None:
    """A copied file of judgements is explained under whatever policy is given."""
    path = tmp_path / "copy.jsonl"
    shutil.copy(run / "rounds/1/judgements.jsonl", path)
    backend = bound(run / "rounds/0/adapter")
    (first, *_) = read_judgements(path)
    e = explain_pair(given_judgements(path), path, 1, backend, small(run / "rounds/0/adapter"))
    assert e.chosen.text == first.chosen.text
    assert e.chosen.logratio == pytest.approx(first.chosen.logratio, abs=1e-9)


def test_reasons_of_the_warm_up() -> None:
    recipe = build({"small": SMALL})[0]
    seen = Trained(margin=-1.0, extrapolated=-1.5, tau=-1.0, window=8, softened=False, step=2, steps=20)
    assert noisy(seen, recipe) == 1.0
    assert "warm-up (the first 20% of the steps)" in reasons(seen, recipe)[1]
    early = Trained(margin=-1.0, extrapolated=None, tau=None, window=0, softened=False, step=1, steps=20)
    assert noisy(early, recipe) == 0.0
    assert "in the warm-up, the first 20% of the steps, and before its last steps" in reasons(early, recipe)[0]


# -- on paper and on the screen -------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path: Path, adapter: Path) -> Explanation:
    """A pair whose texts would like to be obeyed."""
    path, backend = tmp_path / "evil.jsonl", bound(adapter)
    path.write_text("\n" + json.dumps({"id": EVIL, "prompt": EVIL, "a": EVIL, "b": "red\n[/] cat"}) + "\n")
    return explain_pair(given_candidates(path, backend, LIMITS | {"max_length": 900}), path, 1, backend, small(adapter))


def test_the_page_shows_text_and_obeys_none(evil: Explanation) -> None:
    """Every tag is the template's; no script, no address, no control character; each token has its number."""
    page = html(evil)
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {name for name, _ in attributes if name.startswith("on") or name in {"src", "href"}}

    Reader().feed(page)
    assert not {"script", "img", "link", "iframe"} & set(tags)
    assert "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert "http" not in page
    assert page.count(" nats = ") == evil.chosen.tokens + evil.rejected.tokens
    assert "prefers-color-scheme: dark" in page


def test_the_terminal_shows_text_and_obeys_none(
    evil: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spa_lite.cli import explain as command

    out = io.StringIO()
    monkeypatch.setattr(render, "out", Console(file=out, force_terminal=True, color_system="truecolor", width=200))
    command._show(evil)
    said = out.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert "\x1b" not in plain
    assert "[bold]b[/] \\u001b[31m \\u202eabc" in plain
    assert "red\n[/] cat" in plain
    assert "\x1b[4;48;2;180;83;9m" in said or "\x1b[1;48;2;29;78;216m" in said  # the tokens have their colours


def test_bars() -> None:
    assert spark([0.0, 1.0, 2.0], 0.0, 2.0) == "▁▅█ +2.0000" or spark([0.0, 1.0, 2.0], 0.0, 2.0) == "▁▄█ +2.0000"
    assert len(spark([float(i) for i in range(500)], 0.0, 499.0).split(" ")[0]) == 60


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `spa-lite explain ...` here: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["spa-lite", "explain", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_the_command(command: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path, adapter: Path) -> None:
    """A pair of a run, a pair of a file, as JSON, and what is refused."""
    page, of_run = tmp_path / "out.html", run / "rounds/1/judgements.jsonl"
    code, said, _ = command(of_run, "--row", 2, "--html", page, "--json")
    assert (code, json.loads(said)["row"]) == (0, 2)
    assert page.read_text().startswith("<!DOCTYPE html>")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3)
    toy = ("--backend", "toy", "--model", "toy", "--adapter-path", adapter)
    code, said, _ = command(pairs, "--row", 3, *toy)
    assert code == 0
    assert "pair p2 (record 3 of" in said
    assert "extrapolated margin m*" in said
    for words, exit_code, sentence in (
        ((pairs,), 2, "Give --row N; the first record is 1"),
        ((pairs, "--row", 7, *toy), 1, "there is no row 7"),
        ((pairs, "--row", 1, *toy, "--judge", "longest"), 2, "explain shows the implicit reward"),
        (
            (pairs, "--row", 1, *toy, "--html", tmp_path / "no/out.html"),
            1,
            "there is no such folder; check the path of",
        ),
        ((pairs, "--row", 1, *toy, "--html", tmp_path), 1, "it is a folder; check the path of --html"),
        ((pairs, "--row", 1, *toy[:-2]), 2, "the policy equals its reference"),
        ((pairs, "--row", 1, *toy, "--init-model", "toy:1"), 2, "leave --init-model out"),
        ((of_run, "--row", 1, "--beta", "0.5"), 2, "the settings of a run's pair are the run's"),
        ((of_run, "--row", 1, "--set", "refine.alpha=0"), 2, "the settings of a run's pair are the run's"),
    ):
        code, _, wrong = command(*words)
        assert code == exit_code
        assert sentence in " ".join(wrong.split())


def test_a_browser_runs_nothing_of_it(evil: Explanation, tmp_path: Path) -> None:
    """A real headless browser: the page's title stays its own."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "page.html"
    page.write_text(html(evil))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>spa-lite explain: &lt;script&gt;" in dom
    assert "<title>obeyed" not in dom
