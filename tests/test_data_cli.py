"""`spa-lite data`: what each command writes, what each option changes, what is said of wrong input."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_lite import backends, data, reading
from spa_lite.convert import Converted, converted, write
from spa_lite.data import conversation_key
from spa_lite.describe import describe
from spa_lite.divide import divide, drawn
from spa_lite.errors import DataError, RecipeError
from spa_lite.records import Message, Pair
from tests.small import lines
from tests.test_cli import call

NEEDS_TOKENIZER = pytest.mark.skipif(
    bool(backends.missing(backends.choose()[0])), reason="a tokenizer is read by the rules of a backend; none is here"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, *records: dict[str, Any] | str) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path.name


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{n}", "prompt": f"Name {n}.", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(count)]


def give(monkeypatch: pytest.MonkeyPatch, *records: dict[str, Any]) -> None:
    """Put records on standard input."""
    text = "".join(json.dumps(one) + "\n" for one in records).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


ODD = {"id": "o", "prompt": '=1+1\n, "quoted"', "chosen": "-5 é", "rejected": "@x", "note": {"score": 1.5}}
TURNS = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "id": "t"}


# --- convert ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.json", "o.parquet"])
def test_what_is_converted_comes_back(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", ODD, TURNS | {"chosen": "A", "rejected": "B"})
    code, out, err = call(capfd, "data", "convert", source, name)
    assert (code, out) == (0, "")
    assert "2 written" in err
    back, report = data.read_pairs(name)
    kept, _ = data.read_pairs(source)
    assert [(p.id, p.messages, p.chosen, p.rejected) for p in back] == [
        (p.id, p.messages, p.chosen, p.rejected) for p in kept
    ]
    assert report.kept == 2


def test_a_field_that_only_some_records_have_comes_back_from_a_table(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = put(here / "d.jsonl", TURNS | {"chosen": "A", "rejected": "B"}, {"id": "p", "prompt": "Alone?"})
    for step in ((source, "own.jsonl"), ("own.jsonl", "d.parquet"), ("d.parquet", "back.jsonl")):
        assert call(capfd, "data", "convert", *step)[0] == 0
    assert Path("back.jsonl").read_text() == Path("own.jsonl").read_text()


def test_the_same_records_give_the_same_bytes(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *pairs(3))
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        assert call(capfd, "data", "convert", source, name)[0] == 0
    assert (here / "one.jsonl.gz").read_bytes() == (here / "two.jsonl.gz").read_bytes()
    assert gzip.decompress((here / "one.jsonl.gz").read_bytes()).count(b"\n") == 3


def test_csv_cells_cannot_become_formulas(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capfd, "data", "convert", put(here / "d.jsonl", ODD, *pairs(1)), "o.csv")
    assert code == 0
    assert "2 cells begin like a formula" in err
    with (here / "o.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["chosen"] for row in rows] == ["'-5 é", "yes 0"]
    assert rows[0]["rejected"] == "'@x"
    assert json.loads(rows[0]["messages"]) == [{"role": "user", "content": ODD["prompt"]}]
    assert json.loads(rows[0]["extra"]) == {"note": {"score": 1.5}}
    assert rows[1]["extra"] == ""


def test_forms(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *pairs(1), TURNS | {"a": "x", "b": "y"})
    code, out, err = call(capfd, "data", "convert", source, "-", "--to", "trl")
    assert code == 0
    assert json.loads(out) == {
        "prompt": [{"role": "user", "content": "Name 0."}],
        "chosen": [{"role": "assistant", "content": "yes 0"}],
        "rejected": [{"role": "assistant", "content": "no 0"}],
    }
    assert "1 left out: without a preference" in err
    assert "no place for: id (1)" in err
    _, out, err = call(capfd, "data", "convert", source, "-", "--to", "alpaca")
    assert json.loads(out) == {"instruction": "Name 0.", "input": "", "output": "yes 0"}
    assert "1 left out: of several turns" in err
    _, out, _ = call(capfd, "data", "convert", source, "-", "--to", "prompts")
    assert [sorted(json.loads(line)) for line in out.splitlines()] == [["id", "messages"], ["id", "messages"]]
    _, out, _ = call(capfd, "data", "convert", source, "-")
    assert [sorted(json.loads(line)) for line in out.splitlines()] == [
        ["chosen", "id", "messages", "rejected"],
        ["a", "b", "id", "messages"],
    ]


FOREIGN: dict[str, tuple[dict[str, Any], list[tuple[str, str]], tuple[str, ...]]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2")], ()),
    "alpaca pair": ({"instruction": "Add.", "chosen": "3", "rejected": "4"}, [("user", "Add.")], ("3", "4")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        [("user", "Hi")],
        (),
    ),
    "sharegpt pair": (
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "A"}}
        | {"rejected": {"from": "gpt", "value": "B"}},
        [("user", "Hi")],
        ("A", "B"),
    ),
    "conversation": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        [("user", "Hi")],
        (),
    ),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_other_tools_forms(form: str, here: Path) -> None:
    record, turns, answers = FOREIGN[form]
    (item,) = reading.read(put(here / "d.jsonl", record))
    assert [(turn.role, turn.content) for turn in item.messages] == turns
    assert item.answers == answers
    assert item.foreign == form.split()[0]


def test_a_run_s_judgements_become_pairs(here: Path) -> None:
    side = {"ids": [1], "ended": "eos", "policy": 0.0, "reference": 0.0}
    record = {"id": "j", "messages": [{"role": "user", "content": "Q"}], "prompt_ids": [1], "label": "b", "tie": False}
    record |= {"a": side | {"text": "A"}, "b": side | {"text": "B"}, "tokens_a": 1, "tokens_b": 1}
    record |= dict.fromkeys(("logratio_a", "logratio_b", "margin", "p"), 0.0)
    reading_, told = reading.read(put(here / "d.jsonl", record)), Converted()
    (fields,) = converted(reading_, "own", told)
    assert (fields["chosen"], fields["rejected"]) == ("B", "A")


def test_rankings_and_ties_keep_what_is_known(here: Path) -> None:
    source = put(
        here / "d.jsonl",
        {"prompt": "1", "responses": ["x", "y", "z"], "ranking": [2, 0, 1]},
        {"prompt": "2", "responses": ["x", "y", "z"], "best": 1},
    )
    told = Converted()
    own = list(converted(reading.read(source), "own", told))
    assert [one.get("ranking", one.get("best")) for one in own] == [[2, 0, 1], 1]
    (trl,) = converted(reading.read(source), "trl", told)
    assert (trl["chosen"][0]["content"], trl["rejected"][0]["content"]) == ("z", "y")
    assert told.left_out == {"whose worst answer is not known": 1}


def test_a_file_is_whole_or_as_it_was(here: Path) -> None:
    target = here / "o.csv"
    target.write_text("old")
    with pytest.raises(DataError, match="cannot be written"):
        write(target, iter([{"id": "x", "chosen": object()}]), Converted())
    assert target.read_text() == "old"
    assert [path.name for path in here.iterdir()] == ["o.csv"]


# --- split -----------------------------------------------------------------------------------------------------


def prompts_in(path: Path) -> set[str]:
    return {line["messages"][0]["content"] for line in lines(path)}


def test_split_is_disjoint_and_whole(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    twice = [one | {"id": f"{one['id']}b", "chosen": "again"} for one in pairs(30)]
    source = put(here / "d.jsonl", *pairs(30), *twice)
    code, _, err = call(
        capfd, "data", "split", source, "--out", "s", "--held-out", "20%", "--labelled", "5", "--rounds", "2"
    )
    assert code == 0, err
    names = ["held-out.jsonl", "round-1.jsonl", "round-2.jsonl", "seed.jsonl"]
    assert sorted(path.name for path in (here / "s").iterdir()) == names
    parts = [prompts_in(here / "s" / name) for name in names]
    assert [len(part) for part in parts] == [6, 10, 9, 5]
    assert len(set().union(*parts)) == 30
    assert len(lines(here / "s" / "seed.jsonl")) == 10  # both pairs of each of the five prompts
    assert all("chosen" in line for line in lines(here / "s" / "seed.jsonl"))
    assert not any("chosen" in line for line in lines(here / "s" / "round-1.jsonl"))
    assert "10 records, 5 different prompts" in err


def test_the_choice_depends_on_text_and_seed_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forth, back = put(here / "f.jsonl", *pairs(40)), put(here / "b.jsonl", *reversed(pairs(40)))
    for source, seed, out in ((forth, "0", "one"), (back, "0", "two"), (forth, "1", "three")):
        assert call(capfd, "data", "split", source, "--out", out, "--seed", seed)[0] == 0
    held = [prompts_in(here / out / "held-out.jsonl") for out in ("one", "two", "three")]
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 4
    assert len(prompts_in(here / "one" / "seed.jsonl")) == 1
    assert len(prompts_in(here / "one" / "prompts.jsonl")) == 35


def test_sizes_of_rounds_and_what_is_left(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *({"prompt": f"Tell {n}."} for n in range(20)))
    args = ["--rounds", "2", "--round-sizes", "3,4", "--held-out", "0"]
    code, _, err = call(capfd, "data", "split", source, "--out", "s", "--labelled", "5", *args)
    assert code == 0
    assert [len(lines(here / "s" / f"round-{n}.jsonl")) for n in (1, 2)] == [3, 4]
    assert sorted(path.name for path in (here / "s").iterdir()) == ["round-1.jsonl", "round-2.jsonl"]
    assert "left over, in no file: 13 prompts" in err
    assert "no seed.jsonl" in err


def test_labelled_prompts_go_where_labels_are_needed(here: Path) -> None:
    division = divide({bytes([n]): n % 2 == 0 for n in range(20)}, "3", "50%", 0, None, 0)
    labelled = [key for key, part in division.parts.items() if part in ("held-out", "seed")]
    assert len(labelled) == 3 + 5
    assert all(key[0] % 2 == 0 for key in labelled)


def test_existing_files_are_not_replaced(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *pairs(20))
    assert call(capfd, "data", "split", source, "--out", "s")[0] == 0
    before = (here / "s" / "seed.jsonl").read_bytes()
    code, _, err = call(capfd, "data", "split", source, "--out", "s", "--seed", "1")
    assert code == 1
    assert "is there already; name another --out" in err
    assert (here / "s" / "seed.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        (("1.5", "1", 0, None), RecipeError, "--held-out is '1.5'"),
        (("x", "1", 0, None), RecipeError, "--held-out is 'x'"),
        (("1", "nan", 0, None), RecipeError, "--labelled is 'nan'"),
        (("6", "6", 0, None), DataError, "ask for 12 labelled prompts and there are 10"),
        (("1", "1", 2, [5, 5]), DataError, "ask for 10 prompts and 8 are left"),
        (("1", "1", 2, [5]), RecipeError, "--rounds 2 with 1 --round-sizes"),
        (("1", "1", 2, [0, 1]), RecipeError, "one of at least 1 per round"),
    ],
)
def test_impossible_sizes(sizes: tuple[str, str, int, list[int] | None], error: Any, words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        divide({bytes([n]): True for n in range(10)}, *sizes, 0)


# --- sample and stats ------------------------------------------------------------------------------------------


def test_samples_are_the_same_every_time_nested_and_in_order(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *pairs(50))

    def ids(*args: str) -> list[int]:
        code, out, _ = call(capfd, "data", "sample", source, *args)
        assert code == 0
        return [int(json.loads(line)["id"][1:]) for line in out.splitlines()]

    small, large = ids("-n", "5"), ids("-n", "20")
    assert small == sorted(small) == ids("-n", "5")
    assert set(small) < set(large)
    assert ids("-n", "5", "--seed", "1") != small
    assert len(ids("-n", "99")) == 50
    assert call(capfd, "data", "sample", source, "-n", "5", "-o", "o.jsonl")[0] == 0
    assert [int(line["id"][1:]) for line in lines(here / "o.jsonl")] == small


def test_a_terminal_is_shown_what_it_would_obey(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"id": "x", "prompt": "[red]a\u202eb\u009b31m"}
    put(here / "d.jsonl", record)
    _, piped, _ = call(capfd, "data", "sample", "d.jsonl", "-n", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, shown, _ = call(capfd, "data", "sample", "d.jsonl", "-n", "1")
    assert "\u202e" in piped
    assert "[red]a\\u202eb\\u009b31m" in shown
    assert json.loads(shown) == json.loads(piped)


def test_every_record_is_as_likely() -> None:
    made = [reading.Item("prompts", str(n), (Message(role="user", content=f"q{n}"),), {}) for n in range(10)]
    counts = [0] * 10
    for seed in range(500):
        for item in drawn(made, 3, seed):
            counts[int(item.id)] += 1
    assert sum(counts) == 1500
    assert all(100 < count < 200 for count in counts), counts  # 150 expected, standard deviation 10


@NEEDS_TOKENIZER
def test_stats(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *pairs(3), pairs(1)[0], "broken", TURNS | {"a": "x", "b": "y", "topic": "z"})
    found = describe(source)
    assert (found.records, found.usable, found.repeated, found.prompts) == (6, 4, 1, 4)
    assert found.bad == {"not valid JSON": 1}
    assert found.kinds == {"pairs": 3, "candidates": 1}
    assert found.turns == {"1": 3, "2": 1}
    assert found.roles == {"user": 4, "system": 1}
    assert found.better == {"answer 1": 3, "not said": 1}
    assert found.fields == {"topic": 1}
    (better,) = [length for length in found.lengths if length.what == "better answer"]
    assert (better.count, better.mean, better.at["median"]) == (3, 5.0, 5.0)
    code, out, _ = call(capfd, "data", "stats", source)
    assert code == 0
    assert "usable 4, repeats 1" in out
    code, out, _ = call(capfd, "data", "stats", source, "--json", "--model", "lesson")
    units = {length["unit"] for length in json.loads(out)["lengths"]}
    assert (code, units) == (0, {"characters", "tokens"})


# --- lint on the command line ----------------------------------------------------------------------------------

LINTED: list[dict[str, Any]] = [
    {"id": "one", "prompt": "Say [red]\x1b[31m</s>", "chosen": "I hope this helps!", "rejected": "Po."},
    {"id": "two", "prompt": "Name a river.", "chosen": "The Rhine.", "rejected": "The Alps."},
]


CLOSE = LINTED[1] | {"chosen": "The Rhine flows there.", "rejected": "The Rhone flows there."}


def test_lint_shows_counts_rows_and_what_was_not_checked(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "data", "lint", put(here / "d.jsonl", *LINTED))
    assert code == 0
    assert "boilerplate" in out
    assert "50.0" in out
    assert "not checked: what needs a tokenizer" in err
    assert "the longer one is the better one in 100.0" in out


@NEEDS_TOKENIZER
def test_lint_shows_the_mask_and_escapes_what_files_say(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "data", "lint", put(here / "d.jsonl", *LINTED), "--model", "lesson", "--show", "2")
    assert code == 0
    assert "\x1b" not in out
    assert "[red]" in out.replace("|", "")
    assert "row 1 one, prompt (not scored): " in out
    assert "<|user|>" in out
    assert "row 2 two" in out
    _, out, _ = call(capfd, "data", "lint", "d.jsonl", "--model", "lesson", "--show", "0")
    assert "not scored" not in out
    put(here / "long.jsonl", {"prompt": "word " * 2000, "chosen": "A", "rejected": "B"})
    _, out, _ = call(capfd, "data", "lint", "long.jsonl", "--model", "lesson")
    assert "more tokens ..." in out
    assert out.count("word") < 400


def test_lint_as_json_with_details_and_strict(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = put(here / "d.jsonl", *LINTED)
    code, out, _ = call(capfd, "data", "lint", source, "--json", "--strict", "--details", "hits.jsonl")
    assert code == 1
    kinds = [finding["kind"] for finding in json.loads(out)["findings"]]
    assert kinds == ["boilerplate", "special-strings"]
    hits = lines(here / "hits.jsonl")
    assert [(hit["kind"], hit["row"], hit["id"]) for hit in hits] == [
        ("special-strings", 1, "one"),
        ("boilerplate", 1, "one"),
        ("boilerplate", 1, "one"),
    ]
    assert call(capfd, "data", "lint", put(here / "fine.jsonl", LINTED[1]), "--strict")[0] == 0


@NEEDS_TOKENIZER
@pytest.mark.parametrize(
    ("option", "kind"),
    [
        (["--max-prompt-length", "3"], "long-prompt"),
        (["--template", "refuse.jinja"], "template"),
        (["--against", "d.jsonl"], "overlap"),
        (["--near", "0.5"], "near-answers"),
    ],
)
def test_options_of_lint_change_what_is_found(
    option: list[str], kind: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "refuse.jinja").write_text(
        "{% for m in messages %}{% if 'river' in m['content'] %}{{ raise_exception('no rivers') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    base = ["data", "lint", put(here / "d.jsonl", CLOSE), "--model", "lesson", "--json", "--show", "0"]
    assert json.loads(call(capfd, *base)[1])["findings"] == []
    assert [finding["kind"] for finding in json.loads(call(capfd, *base, *option)[1])["findings"]] == [kind]


@NEEDS_TOKENIZER
def test_a_system_turn_is_part_of_what_lint_shows(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["data", "lint", put(here / "d.jsonl", LINTED[1]), "--model", "lesson", "--template", "plain", "--json"]
    plain, brief = (json.loads(call(capfd, *base, *more)[1])["shown"][0] for more in ([], ["--system", "Be brief."]))
    assert len(brief["prompt"]) > len(plain["prompt"])


# --- all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["lint", "-"], ["stats", "-"], ["convert", "-", "-"], ["sample", "-", "-n", "1"]])
def test_standard_input(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], here: Path
) -> None:
    give(monkeypatch, *pairs(2))
    code, out, err = call(capfd, "data", *args)
    assert (code, bool(out)) == (0, True), err


def test_split_of_standard_input(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], here: Path
) -> None:
    give(monkeypatch, *pairs(20))
    assert call(capfd, "data", "split", "-", "--out", "s")[0] == 0
    assert len(lines(here / "s" / "held-out.jsonl")) == 2


@pytest.mark.parametrize(
    "args", [["convert", "d.jsonl", "-"], ["sample", "d.jsonl", "-n", "9"], ["split", "d.jsonl", "--out", "s"]]
)
def test_bad_records_stop_it_or_are_counted(args: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(here / "d.jsonl", *pairs(9), "broken")
    code, _, err = call(capfd, "data", *args)
    assert (code, "d.jsonl, line 10: not valid JSON" in err) == (1, True)
    code, _, err = call(capfd, "data", *args, "--skip-bad")
    assert code == 0
    assert "1 bad record skipped: 1 not valid JSON." in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["lint", "gone.jsonl"], "there is no such file"),
        (["lint", "d.jsonl", "--show", "2"], "--show needs a tokenizer; give --model, too"),
        (["lint", "d.jsonl", "--trust-remote-code"], "--trust-remote-code needs a tokenizer"),
        pytest.param(["lint", "d.jsonl", "--model", "gone"], "gone is no folder here", marks=NEEDS_TOKENIZER),
        (["convert", "d.jsonl", "o.txt"], "the ending .txt is unknown"),
        (["convert", "d.jsonl", "o.csv", "--to", "xml"], "it is one of own, prompts, trl, alpaca"),
        (["convert", "d.jsonl", "no/o.csv"], "cannot be written"),
        (["split", "d.jsonl", "--out", "s", "--round-sizes", "x"], "give numbers like"),
        (["sample", "d.jsonl", "-n", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_input_is_one_sentence(
    args: list[str], words: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(here / "d.jsonl", *pairs(2))
    code, _, err = call(capfd, "data", *args)
    assert code in (1, 2)
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def test_keys_of_pairs_and_items_agree(here: Path) -> None:
    """`split` divides by the same conversation as a run does."""
    (item,) = reading.read(put(here / "d.jsonl", *pairs(1)))
    (pair,) = data.read_pairs("d.jsonl")[0]
    assert isinstance(pair, Pair)
    assert conversation_key(item.messages) == conversation_key(pair.messages)
