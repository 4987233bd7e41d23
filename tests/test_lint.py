"""What `lint` finds and what it leaves alone; measures of collapse; near-duplicates."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite.backend import ModelSettings
from spa_lite.backends.anatomy import Anatomy
from spa_lite.errors import DataError
from spa_lite.keys import digest, generator
from spa_lite.lesson import MODEL_DIR
from spa_lite.lint import Hit, Lint, lint, lint_pairs, lint_prompts, lint_samples
from spa_lite.lint import near as lint_near
from spa_lite.lint import text as lint_text
from spa_lite.lint.near import Near, alike
from spa_lite.lint.samples import WINDOW, Findings
from spa_lite.lint.text import boilerplate, mix_up, open_block, special_strings, stops_short, think_tags
from spa_lite.records import Completion, Ended, Message, Pair, Prompt, Sample


def write(folder: Path, *records: dict[str, Any] | str, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def pair(chosen: str = "The Rhine.", rejected: str = "The Alps.", prompt: str = "Name a river.", **more: Any) -> Any:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def found(report: Lint) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


SENTENCE = "The river that you are looking for is the Rhine, which flows through Basel and Cologne"
ENGLISH = "This is what you would have to do with the house and the garden that they are for you."
GERMAN = "Das ist nicht der Fluss, den wir für die Stadt und das Land auf dem Weg mit einem Boot suchen."
RUSSIAN = "Это река, которая течёт через весь большой город"


# --- a kind at a time ------------------------------------------------------------------------------------------

SEEN: dict[str, tuple[list[dict[str, Any] | str], list[int]]] = {
    "unusable": ([pair(), "broken", {"prompt": "x"}], [2]),
    "foreign": ([{"instruction": "Name it.", "chosen": "a", "rejected": "b"}, pair()], [1]),
    "empty": ([pair(), pair(chosen=" ")], [2]),
    "same-answers": ([pair(chosen="Same.", rejected="Same."), pair()], [1]),
    "near-answers": ([pair(), pair(chosen=SENTENCE + ".", rejected=SENTENCE + "!", prompt="Other?")], [2]),
    "repeated": ([pair(), pair(prompt="Other?"), pair()], [3]),
    "near-prompts": ([pair(prompt=SENTENCE), pair(prompt="Other?"), pair(prompt=SENTENCE + " now")], [3]),
    "truncated": ([pair(), pair(chosen="See:\n```python\nx = 1", prompt="Code?")], [2]),
    "stops-short": ([pair(chosen=SENTENCE + "."), pair(chosen=SENTENCE), pair(chosen=SENTENCE + "!")], [2]),
    "think-tags": ([pair(), pair(chosen="<think>hm</think>A."), pair(chosen="hm</think>A.")], [2, 3]),
    "boilerplate": ([pair(), pair(rejected="As an AI language model, I have no opinion.")], [2]),
    "language": ([pair(), pair(prompt=ENGLISH, chosen=GERMAN), pair(prompt=ENGLISH, chosen=RUSSIAN)], [2, 3]),
    "special-strings": ([pair(), pair(prompt="Say <|im_end|>"), pair(chosen="Yes.</s>")], [2, 3]),
}


@pytest.mark.parametrize("kind", SEEN)
def test_each_kind_is_found_where_it_is(kind: str, tmp_path: Path) -> None:
    records, rows = SEEN[kind]
    report = lint(write(tmp_path, *records))
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    assert list(finding.rows) == rows
    assert finding.count == len(rows)
    assert finding.share == pytest.approx(len(rows) / len(records))


def test_sound_pairs_have_no_findings(tmp_path: Path) -> None:
    report = lint(write(tmp_path, pair(), pair(prompt="What is blue?", chosen="The sky.", rejected="Grass.")))
    assert report.findings == ()
    assert (report.records, report.kinds) == (2, {"pairs": 2})


def test_only_a_source_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert found(lint(write(tmp_path, "broken"))) == {"unusable": 1}
    with pytest.raises(DataError, match="no such file"):
        lint(tmp_path / "gone.jsonl")


def test_every_hit_is_told_with_row_id_and_sort(tmp_path: Path) -> None:
    hits: list[Hit] = []
    lint(write(tmp_path, pair(), pair(rejected="I hope this helps!", id="x")), detail=hits.append)
    assert [(hit.kind, hit.row, hit.id, hit.what) for hit in hits] == [
        ("boilerplate", 2, "x", "closer"),
        ("boilerplate", 2, "x", "in the worse answer only"),
    ]


def test_where_few_answers_end_as_sentences_stopping_short_says_nothing(tmp_path: Path) -> None:
    others = [pair(chosen=f"{SENTENCE} {n}", rejected="no") for n in range(3)]
    report = lint(write(tmp_path, *others, pair(chosen=SENTENCE + ".")))
    assert "stops-short" not in found(report)
    assert any("only 25 %" in sentence for sentence in report.skipped)


def test_a_run_s_own_samples_are_measured_too(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Name a river."}]
    cut, whole = ({"ids": [1], "text": text, "ended": ended} for text, ended in (("The Rhi", "cap"), ("Po.", "eos")))
    report = lint(write(tmp_path, {"id": "s", "messages": asked, "prompt_ids": [1], "completions": [cut, whole]}))
    assert found(report) == {"truncated": 1}
    assert report.samples
    assert report.samples["truncated"] == 0.5


def test_length_balance(tmp_path: Path) -> None:
    rows = [pair("xxxx", "yy"), pair("x", "yyy"), pair("xxxxx", "y"), pair("xx", "yy")]
    (length,) = lint(write(tmp_path, *rows)).lengths
    assert (length.better_mean, length.worse_mean) == (3.0, 2.0)
    assert (length.better_median, length.worse_median) == (3.0, 2.0)
    assert length.longer_wins
    assert length.longer_wins["value"] == pytest.approx(2 / 3)
    assert length.longer_wins["n"] == 3  # the pair of equal length does not count
    assert length.longer_wins["low"] < 0.3 < 0.9 < length.longer_wins["high"]


def test_overlap_with_an_evaluation_file(tmp_path: Path) -> None:
    questions: list[dict[str, Any]] = [
        {"question_id": 1, "turns": [SENTENCE, "And then?"]},
        {"instruction": "Name a river!"},
    ]
    evaluation = write(tmp_path, *questions, name="e.jsonl")
    rows = [pair(), pair(prompt=SENTENCE + " now"), pair(prompt="Something else altogether?")]
    (finding,) = [f for f in lint(write(tmp_path, *rows), against=evaluation).findings if f.kind == "overlap"]
    assert finding.rows == (1, 2)
    assert finding.sorts == {"exact": 1, "near": 1}
    with pytest.raises(DataError, match="no question"):
        lint(write(tmp_path, *rows), against=write(tmp_path, {"x": 1}, name="none.jsonl"))


def test_prompts_that_differ_in_case_or_layout_alone_are_near_not_the_same(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        pair(prompt="Name a river."),
        pair(prompt="Name a river.", chosen="The Elbe."),  # a second pair of the same prompt
        pair(prompt="name  a river!"),
    )
    (finding,) = lint(path).findings
    assert (finding.kind, finding.rows, finding.example) == ("near-prompts", (3,), "row 1, 1.00 alike")


def test_near_is_the_threshold(tmp_path: Path) -> None:
    path = write(tmp_path, pair(prompt=SENTENCE), pair(prompt=SENTENCE.replace("Rhine", "Danube")))
    assert "near-prompts" in found(lint(path, near=0.6))
    assert "near-prompts" not in found(lint(path, near=0.95))


def test_records_in_memory_are_looked_at_alike() -> None:
    asked = (Message(role="user", content="Name a river."),)
    report = lint_pairs([Pair(id="p", messages=asked, chosen="As an AI model, no.", rejected="Po.")])
    assert found(report) == {"boilerplate": 1}
    said = (Message(role="user", content="Say </s>"),)
    assert found(lint_prompts([Prompt(id="p", messages=said)])) == {"special-strings": 1}


def test_sorts_without_end_are_bounded(tmp_path: Path) -> None:
    rows = [pair(prompt=f"Say <|a{n}|>") for n in range(150)]
    (finding,) = [f for f in lint(write(tmp_path, *rows)).findings if f.kind == "special-strings"]
    assert (finding.count, finding.sorts["other"]) == (150, 50)


# --- rules of thumb --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE, True),
        (SENTENCE + ".", False),
        (SENTENCE + " 🙂", False),
        (SENTENCE + "。", False),
        ("Rhine", None),
        (SENTENCE + ".\n- the Rhine, for one thing, and the Danube for another", None),
        (SENTENCE + ".\n\nYours, Kim", None),
        (SENTENCE + " https://example.org/a", None),
    ],
)
def test_stopping_short(text: str, expected: bool | None) -> None:
    assert stops_short(text) is expected


def test_open_code_blocks() -> None:
    assert open_block("a\n```\nx")
    assert not open_block("a\n```\nx\n```\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", None),
        ("<think>a</think>b", "whole"),
        ("<THINK>a", "open"),
        ("a</think>b", "close"),
        ("<think><reasoning>a</think></reasoning>", "close"),
    ],
)
def test_think_tags(text: str, expected: str | None) -> None:
    assert think_tags(text) == expected


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("As an AI language model, I cannot say.", ["self-description"]),
        ("I’m sorry, but I can’t do that.", ["refusal"]),
        ("Certainly! Here is a list.", ["opener"]),
        ("Po. I hope this helps!", ["closer"]),
        ("As of my last update it was so.", ["cutoff"]),
        ("I am sorry for your loss. Here is a river.", []),
        ("A model of artificial intelligence", []),
    ],
)
def test_boilerplate(text: str, kinds: list[str]) -> None:
    assert boilerplate(text) == kinds


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (ENGLISH, ENGLISH, None),
        (ENGLISH, GERMAN, "English → German"),
        (ENGLISH, RUSSIAN, "Latin → Cyrillic"),
        (
            "これは日本語の文章です。川の名前を教えてください。",
            "好的，这是一个关于河流名称的简短回答，请您看看吧。",
            "Japanese → Cjk",
        ),
        (
            "これは日本語の文章です。川の名前を教えてください。",
            "はい、ライン川という川があります。とても長い川です。",
            None,
        ),
        ("12 + 30 = ?", RUSSIAN, None),
        (ENGLISH, "Ja.", None),
    ],
)
def test_languages(prompt: str, answer: str, expected: str | None) -> None:
    assert mix_up(prompt, answer) == expected


def test_special_strings() -> None:
    assert special_strings("a <|im_end|> b </s> <|im_end|> [INST]") == ["<|im_end|>", "</s>", "[INST]"]
    assert special_strings("a < b | c > d, <b>bold</b>, x[1]") == []


# --- near-duplicates -------------------------------------------------------------------------------------------


def exact(x: str, y: str) -> float:
    """Jaccard's index, computed from its definition."""
    one, other = (
        {text[i : i + lint_near.SIZE] for i in range(max(len(text) - lint_near.SIZE + 1, 1))}
        for text in (lint_near.plain(x), lint_near.plain(y))
    )
    return len(one & other) / len(one | other)


@given(st.text(alphabet="ab ", min_size=1, max_size=40), st.text(alphabet="ab ", min_size=1, max_size=40))
def test_likeness_is_jaccards_index(x: str, y: str) -> None:
    assert alike(x, y) == pytest.approx(exact(x, y))


def test_minhash_finds_what_is_alike_and_nothing_else() -> None:
    """200 texts of 40 words, and each again with a word changed (0.87 to 0.95 alike)."""
    draws = generator(digest("words"))
    texts = [" ".join(f"w{n}" for n in draws.integers(0, 10_000, 40)) for _ in range(200)]
    index = Near(0.8)
    for row, text in enumerate(texts):
        assert index.like(text) is None
        index.add(row, text)
    changed = [text.replace(text.split()[20], "other") for text in texts]
    matches = [index.like(text) for text in changed]
    assert [match and match[0] for match in matches] == list(range(200))
    assert all(
        match and match[1] == pytest.approx(exact(x, y)) for match, x, y in zip(matches, texts, changed, strict=True)
    )


def test_a_full_index_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_near, "MOST_CHARACTERS", 20)
    report = lint(write(tmp_path, *(pair(prompt=f"Prompt number {n} {n}") for n in range(5))))
    assert any("the first 2 different ones" in sentence for sentence in report.skipped)


# --- tokens ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """The built-in model's tokenizer."""
    pytest.importorskip("torch", reason="a tokenizer is read by the rules of the backend, and torch is not here")
    return Anatomy(ModelSettings(str(MODEL_DIR)))


def test_long_prompts_are_counted_in_tokens(anatomy: Anatomy, tmp_path: Path) -> None:
    path = write(tmp_path, pair(), pair(prompt="What is the opposite of fast? Leo asks."))
    assert found(lint(path, anatomy=anatomy, max_prompt_length=10)) == {"long-prompt": 1}
    assert found(lint(path, anatomy=anatomy, max_prompt_length=100)) == {}
    assert [length.unit for length in lint(path, anatomy=anatomy).lengths] == ["characters", "tokens"]


def test_the_mask_is_what_is_trained_on(anatomy: Anatomy, tmp_path: Path) -> None:
    (mask,) = lint(write(tmp_path, pair(), pair(prompt="Other?")), anatomy=anatomy, show=1).shown
    asked = [Message(role="user", content="Name a river.")]
    assert tuple(token.id for token in mask.prompt) == tuple(anatomy.tokenizer.encode_prompt(asked))
    assert not any(token.scored for token in mask.prompt)
    answer = mask.answers[0]
    assert tuple(token.id for token in answer) == tuple(anatomy.tokenizer.encode_answer(asked, "The Rhine."))
    assert all(token.scored for token in answer)
    assert answer[-1].special
    assert "".join(token.text for token in answer[:-1]).strip() == "The Rhine."


def test_a_record_that_the_template_refuses_is_counted_and_the_next_one_is_shown(tmp_path: Path) -> None:
    report = lint(write(tmp_path, pair(prompt="refuse"), pair()), anatomy=Odd(), max_prompt_length=90, show=1)
    assert found(report) == {"template": 1}
    assert [mask.row for mask in report.shown] == [2]


class Odd:
    """A tokenizer of characters that merges `: ` across the border, trims its prompts and knows no `é`."""

    context, strings = 100, ("<s>",)

    @property
    def tokenizer(self) -> Any:
        return self

    stop_ids, end_of_turn = frozenset({0}), 0

    def encode_prompt(self, messages: Any) -> tuple[int, ...]:
        text = messages[-1].content
        if text == "refuse":
            raise DataError("no")
        return tuple(map(ord, text.replace("lost", "") + (";" if "other" in text else ":")))

    def encode_answer(self, messages: Any, text: str) -> tuple[int, ...]:
        return (*map(ord, text.replace("é", "")), 0)

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, filter(None, ids)))

    def together(self, messages: Any, text: str) -> Any:
        before = self.encode_prompt(messages)
        merges = text.startswith(" ")
        return (*(before[:-1] if merges else before), 999, *map(ord, text)), before

    def special(self, ids: Any) -> dict[int, str]:
        return {i: "<s>" for i in ids if i == ord("~")}


@pytest.mark.parametrize(
    ("record", "kind", "note"),
    [
        (pair(chosen=" Rhine"), "boundary", "'ϧ' instead of ':'"),
        (pair(chosen="Orléans"), "lossy", "does not come back"),
        (pair(prompt="a lost word"), "template", "a turn does not come back"),
        (pair(prompt="other header"), "template", "last tokens are others"),
        (pair(prompt="~~ twice"), "template", "begins twice with <s>"),
        (pair(prompt="refuse"), "template", "refused: no"),
    ],
)
def test_oddities_of_tokens(record: dict[str, Any], kind: str, note: str, tmp_path: Path) -> None:
    report = lint(write(tmp_path, pair(prompt="First one."), record), anatomy=Odd(), max_prompt_length=90)
    assert found(report) == {kind: 1}
    assert report.findings[0].rows == (2,)
    assert note in report.findings[0].example


def test_without_a_tokenizer_it_says_what_is_skipped(tmp_path: Path, anatomy: Anatomy) -> None:
    path = write(tmp_path, pair())
    assert any("boundary" in sentence for sentence in lint(path).skipped)
    assert lint(path, anatomy=anatomy).skipped == ()


# --- collapse --------------------------------------------------------------------------------------------------


def sample(id_: str, *answers: str, ended: Ended = "eos", ids: bool = True) -> Sample:
    """A sample whose token ids are the words' characters, summed: the same word is the same id."""
    completions = tuple(
        Completion(ids=(*(sum(map(ord, word)) for word in text.split()), 0) if ids else (), text=text, ended=ended)
        for text in answers
    )
    return Sample(id=id_, messages=(Message(role="user", content=id_),), prompt_ids=(1,), completions=completions)


def test_measures_by_hand() -> None:
    found = lint_samples([sample("1", "a b c", "a b c"), sample("2", "a b c", "d"), sample("3", "", "e f e f e f e f")])
    assert (found.prompts, found.answers) == (3, 6)
    assert found.mean_length == pytest.approx((3 + 3 + 3 + 1 + 0 + 8) / 6)
    assert found.distinct_1 == pytest.approx(6 / 18)
    assert found.distinct_2 == pytest.approx(4 / 13)  # ab, bc, ef, fe of 2 + 2 + 2 + 0 + 0 + 7
    assert found.repeat_4 == pytest.approx((1 - 2 / 5) / 6)  # of five 4-grams two are different
    assert found.looping == pytest.approx(1 / 6)
    assert found.identical_pairs == pytest.approx(1 / 3)
    assert found.shared == pytest.approx(2 / 3)
    assert found.empty == pytest.approx(1 / 6)
    assert found.truncated == 0
    assert lint_samples([sample("1", "a", "b", ended="cap")]).truncated == 1


def test_without_ids_words_are_counted() -> None:
    assert lint_samples([sample("1", "a b c", ids=False)]).mean_length == 3


def test_distinct_n_does_not_depend_on_the_size_of_the_round() -> None:
    draws = generator(digest("size")).integers(0, 500, (200, 50))
    samples = [sample(str(i), " ".join(f"w{n}" for n in row)) for i, row in enumerate(draws)]
    small, large = lint_samples(samples[:40]), lint_samples(samples)
    assert small.window == large.window == WINDOW
    assert large.distinct_1 == pytest.approx(small.distinct_1, rel=0.05)


def test_warnings_of_collapse() -> None:
    draws = generator(digest("sound")).integers(0, 500, (100, 2, 20))
    sound = [sample(str(i), *(" ".join(f"w{n}" for n in row) for row in pair_)) for i, pair_ in enumerate(draws)]
    before = lint_samples(sound)
    assert before.warnings() == before.warnings(before.to_dict()) == []
    same = lint_samples([sample(str(i), "we are all the same", "we are all the same") for i in range(100)])
    assert [line.split(" % ")[0] for line in same.warnings()] == ["100.0", "100.0"]
    assert any("distinct-1 fell" in line for line in same.warnings(before.to_dict() | {"window": same.window}))
    longer = Findings(prompts=9, answers=9, mean_length=2 * before.mean_length)
    assert "grew from 20.0 to 40.0 tokens" in " ".join(longer.warnings(before.to_dict()))
    cut = Findings(prompts=100, answers=200, truncated=0.15)
    assert cut.warnings() == []
    assert "15.0 % of the answers were cut by --max-tokens (the round before: 0.0 %)" in cut.warnings(before.to_dict())
    few = Findings(prompts=4, answers=8, truncated=0.15)
    assert few.warnings(before.to_dict() | {"truncated": 0.08}) == []  # chance would do that
    assert Findings().warnings() == ["there are no answers at all"]
    assert before.warnings({"some": "thing else"}) == []


def test_a_round_is_measured_in_less_than_a_second() -> None:
    """2,400 answers of 100 tokens, by the processor's clock."""
    draws = generator(digest("speed")).integers(0, 2000, (1200, 2, 100))
    samples = [
        Sample(
            id=str(i),
            messages=(Message(role="user", content="q"),),
            prompt_ids=(1,),
            completions=tuple(Completion(ids=tuple(map(int, row)), text=str(row[:9]), ended="eos") for row in two),
        )
        for i, two in enumerate(draws)
    ]
    start = time.process_time()
    lint_samples(samples)
    assert time.process_time() - start < 1


def test_the_lists_are_as_they_are_said_to_be() -> None:
    assert set(lint_text.BOILERPLATE) == {"self-description", "refusal", "cutoff", "opener", "closer"}
    assert len(lint_text.STOP_WORDS) == 7
