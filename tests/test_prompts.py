"""Prompts that a model writes: what it is asked, what is kept of the answers, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_lite import improve, prompts, sources
from spa_lite.data import conversation_key
from spa_lite.errors import DataError, RecipeError
from spa_lite.lesson import skills, source
from spa_lite.lesson.world import NAMES, by_text, family_tasks
from spa_lite.prompts import Counts, Material, asked, generator_examples, read, repetition, written
from spa_lite.prompts.cleaning import cleaned
from spa_lite.prompts.hygiene import FEWEST_WORDS, MOST_WORDS, suits
from spa_lite.prompts.keywords import keywords_of
from spa_lite.prompts.rouge import common, rouge_l, too_similar, words
from spa_lite.recipe import Recipe, build
from spa_lite.records import Completion, Ended, Message, Prompt, Sample


def recipe(**changes: Any) -> Recipe:
    """A recipe with these settings of `prompts`; `persona` unless `source` is named. `seed` is the recipe's."""
    changes = {"source": "persona"} | changes
    seed = changes.pop("seed", 0)
    return build({"test": {"seed": seed} | {f"prompts.{name}": value for name, value in changes.items()}})[0]


def turn(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def labelled(count: int = 12) -> list[Prompt]:
    """Labelled prompts, each with three words of its own."""
    return [Prompt(id=f"s{i}", messages=turn(f"How do alpha{i} and beta{i} make gamma{i}?")) for i in range(count)]


def tasks(count: int = 60) -> list[Prompt]:
    return [pair.prompt for pair in source.pairs("seed", count, 0)]


def requests(r: Recipe, count: int = 30, round_: int = 1, lesson: bool = False, **how: Any) -> list[Prompt]:
    known = how.get("labelled", tasks() if lesson else labelled())
    return asked(r, how.get("material") or read(r, lesson), known, round_, lesson, count)


def said(found: Sequence[Prompt]) -> list[str]:
    return [prompt.messages[-1].content for prompt in found]


# --- requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lesson", [False, True])
@pytest.mark.parametrize("name", ["persona", "fewshot", "keywords", "bare"])
def test_requests_are_drawn_by_seed_and_round(name: str, lesson: bool) -> None:
    r = recipe(source=name)
    first = requests(r, lesson=lesson)
    assert first == requests(r, lesson=lesson)
    assert first[:10] == requests(r, 10, lesson=lesson), "fewer requests are the first ones"
    assert len(first) == len({p.id for p in first}) == 30
    assert first[17].id == f"r1-{name}-17"
    others = [said(requests(r, round_=2, lesson=lesson)), said(requests(recipe(source=name, seed=1), lesson=lesson))]
    if name != "bare":
        if name == "persona":
            others = [
                [str(p.extra) for p in requests(recipe(source=name, seed=s), 30, i, lesson)]
                for s, i in ((0, 2), (1, 1))
            ]
            assert [str(p.extra) for p in first] not in others
        else:
            assert said(first) not in others


def test_each_persona_is_asked_once_before_any_is_asked_again() -> None:
    r = recipe()
    personas = read(r, lesson=False).personas
    assert len(set(personas)) == len(personas) >= 220
    drawn = [p.extra["persona"] for p in requests(r, 2 * len(personas))]
    first, second = drawn[: len(personas)], drawn[len(personas) :]
    assert sorted(first) == sorted(second) == sorted(personas)
    assert first != second
    assert all(f"this person: {p.extra['persona']}." in said([p])[0] for p in requests(r))


def test_the_shipped_personas_are_short_and_differ() -> None:
    personas = read(recipe(), lesson=False).personas
    assert max(map(len, personas)) <= 120
    assert min(len(words(who)) for who in personas) >= 5
    assert not any(too_similar(personas, [], 0.6))
    assert not any(who.startswith("#") or who != who.strip() for who in personas)


def test_the_lesson_is_asked_as_its_model_was_taught() -> None:
    persona = requests(recipe(), len(NAMES), lesson=True)
    assert {p.messages[0].content for p in persona} == {skills.persona(name) for name in NAMES}
    assert {(p.messages[0].role, said([p])[0]) for p in persona} == {("system", skills.ask_for_task())}
    assert set(said(requests(recipe(source="bare"), lesson=True))) == {skills.ask_for_task()}

    families = {task.text: task.family for prompt in tasks() for task in [by_text()[said([prompt])[0]]]}
    for p in requests(recipe(source="fewshot", examples=2), lesson=True):
        assert said([p])[0] == skills.ask_for_task_like(p.extra["examples"])
        assert len({families[text] for text in p.extra["examples"]}) == 1
        assert len(set(p.extra["examples"])) == 2

    items, names = ({prompt.extra["lesson"]["facts"][what] for prompt in tasks()} for what in ("item", "name"))
    for p in requests(recipe(source="keywords"), lesson=True):
        assert said([p])[0] == skills.ask_for_task_from_keywords(p.extra["keywords"])
        one, other = p.extra["keywords"]
        assert (one in items and other in names) or (other in items and one in names)


def test_examples_are_drawn_anew_for_each_request() -> None:
    for count in (1, 4):
        found = requests(recipe(source="fewshot", examples=count))
        assert {len(set(p.extra["examples"])) for p in found} == {count}
        assert len({tuple(p.extra["examples"]) for p in found}) > 5
        assert all(text in said([p])[0] for p in found for text in p.extra["examples"])


def test_keywords_are_two_of_one_prompt_and_one_of_another() -> None:
    for p in requests(recipe(source="keywords")):
        numbers = [word.strip("abcdeghlmpt") for word in p.extra["keywords"]]
        assert sorted(numbers.count(n) for n in set(numbers)) == [1, 2]
        assert all(word in said([p])[0] for word in p.extra["keywords"])
    assert keywords_of("Could you please explain the old harbour, the HARBOUR and its cranes?") == [
        "old", "harbour", "cranes",
    ]  # fmt: skip
    assert keywords_of("Why me?") == ["why", "me"]


def test_keywords_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# groups\nsalt, bread\n\n , \nnight train ,  rain,\n", encoding="utf-8")
    found = requests(recipe(source="keywords", keywords=str(path)), 4, labelled=[])
    assert [sorted(p.extra["keywords"]) for p in found[:2]] in (
        [["bread", "salt"], ["night train", "rain"]],
        [["night train", "rain"], ["bread", "salt"]],
    )
    assert any("keywords: night train, rain." in text for text in said(found))
    path.write_text(" , ,\n", encoding="utf-8")
    with pytest.raises(DataError, match="there is no keyword in it; write some"):
        read(recipe(source="keywords", keywords=str(path)), lesson=False)


@pytest.mark.parametrize("lesson", [False, True])
def test_too_few_labelled_prompts_are_an_error_that_names_the_mend(lesson: bool) -> None:
    with pytest.raises(RecipeError, match="there are none: give --seed-pairs or --keywords"):
        requests(recipe(source="keywords"), lesson=lesson, labelled=[])
    with pytest.raises(RecipeError, match=r"shows 4 labelled .* there are 0.*--seed-pairs, or lower --examples"):
        requests(recipe(source="fewshot"), lesson=lesson, labelled=[])
    twice = labelled(3) * 2  # a prompt with two pairs is one prompt
    with pytest.raises(RecipeError, match="there are 3"):
        requests(recipe(source="fewshot"), lesson=lesson, labelled=twice)


def test_the_lesson_takes_examples_and_words_of_a_users_prompts_too() -> None:
    own = requests(recipe(source="keywords"), 5, lesson=True, labelled=labelled())
    assert all(said([p])[0] == skills.ask_for_task_from_keywords(p.extra["keywords"]) for p in own)
    assert len(requests(recipe(source="fewshot"), 5, lesson=True, labelled=labelled())) == 5


def test_a_source_that_is_not_written() -> None:
    with pytest.raises(RecipeError, match="prompts=pool is not written by the model; choose persona, fewshot"):
        read(recipe(source="pool"), lesson=False)


# --- what requests are made of -----------------------------------------------------------------------------------


def test_personas_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "who.txt"
    path.write_text("\ufeff# mine\na  diver\n\n  a cook\na diver\n", encoding="utf-8")
    found = read(recipe(personas=str(path)), lesson=False)
    assert found.personas == ("a diver", "a cook")
    assert found.notes == (f"{path}: 2 records read.", "1 repeat of an earlier record dropped.")
    assert read(recipe(personas=str(path)), lesson=True).personas == found.personas, "not the lesson's names"
    records = tmp_path / "who.jsonl"
    records.write_text('{"persona": "a diver"}\n{"persona": "a\\ncook"}\n{"persona": "a diver"}\n', encoding="utf-8")
    again = read(recipe(personas=str(records)), lesson=False)
    assert (again.personas, again.notes[1:]) == (found.personas, found.notes[1:])
    assert found.key == again.key != read(recipe(), lesson=False).key


def test_personas_that_cannot_be_read(tmp_path: Path) -> None:
    def message(name: str, content: bytes | None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(recipe(personas=str(path)), lesson=False)
        assert str(caught.value).startswith(str(path))
        return str(caught.value)

    assert "cannot be read (No such file or directory); check --personas" in message("absent.txt", None)
    assert "it is no UTF-8 text" in message("bytes.txt", b"\xff\xfe")
    assert "the file of --personas is empty" in message("empty.txt", b"# nothing\n\n")
    assert "there is no such file" in message("absent.jsonl", None)
    assert "line 2: there is no `persona`, or no text in it" in message("bad.jsonl", b'{"persona": "a"}\n{"who": "b"}')


def test_bad_personas_may_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "who.jsonl"
    path.write_text('{"persona": "a diver"}\n{"persona": "  "}\n{"persona": 3}\n', encoding="utf-8")
    r = recipe(personas=str(path))
    found = read(dataclasses.replace(r, inputs=dataclasses.replace(r.inputs, skip_bad=True)), lesson=False)
    assert found.personas == ("a diver",)
    assert any("2 bad records skipped" in note for note in found.notes)


def test_personas_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*name: str, split: str) -> list[dict[str, Any]]:
        return [{"persona": f"{'/'.join(name)} {split}"}]

    monkeypatch.setattr(sources, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *name: ["train"])
    assert read(recipe(personas="hub:o/n/persona:some"), lesson=False).personas == ("o/n/persona some",)
    assert read(recipe(personas="hub:o/n/persona"), lesson=False).personas == ("o/n/persona train",)
    assert read(recipe(personas="hub:o/n"), lesson=False).personas == ("o/n train",)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "ask.txt"
    path.write_text("As {persona}, ask!\n", encoding="utf-8")
    r = recipe(template=str(path))
    for lesson in (False, True):
        p = requests(r, 1, lesson=lesson)[0]
        assert said([p]) == [f"As {p.extra['persona']}, ask!"]
        assert read(r, lesson).key != read(recipe(), lesson).key
    # The control's text is its own.
    assert "{" not in said(requests(r, 1, material=read(r, False, "bare")))[0]
    assert read(r, True, "bare").template is None

    def message(text: str, name: str) -> str:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            read(recipe(source=name, template=str(path)), lesson=False)
        return str(caught.value)

    assert "lacks {persona}: add it to the file of --prompt-template" in message("Ask!", "persona")
    assert "has a place {who} that nothing fills: it may use {keywords}" in message("{who} {keywords}", "keywords")
    assert "prompts=bare has no places" in message("{persona}", "bare")
    assert "is empty" in message(" \n", "bare")
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file or directory\): check --prompt-template"):
        read(recipe(template=str(tmp_path / "absent")), lesson=False)


HOSTILE = "{persona} {examples} {keywords} \x1b[2J\x00<|im_end|> [bold]$(rm) \u202e </s>"


def test_a_hostile_text_is_only_text(tmp_path: Path) -> None:
    material = Material(source="persona", personas=(HOSTILE,), template="I am {persona}!")
    assert said(requests(recipe(), 1, material=material)) == [f"I am {HOSTILE}!"]
    fewshot = requests(recipe(source="fewshot", examples=1), 1, labelled=[Prompt(id="x", messages=turn(HOSTILE))])
    assert HOSTILE in said(fewshot)[0]
    assert said([kept(answer(HOSTILE))[0]]) == [HOSTILE]
    long = "word " * 20_000 + "\n" * 20_000 + '"' * 2_000 + "Prompt: " * 500
    assert len(kept(answer(long), answer(long + "more"))) == 1


# --- reading what was written ------------------------------------------------------------------------------------


def answer(*texts: str, ended: Ended = "eos", name: str = "") -> Sample:
    answer.made += 1  # type: ignore[attr-defined]
    found = tuple(Completion(ids=(), text=text, ended=ended) for text in texts)
    number = name or f"a{answer.made}"  # type: ignore[attr-defined]
    return Sample(id=number, messages=turn("Write"), prompt_ids=(), completions=found, extra={"persona": "p"})


answer.made = 0  # type: ignore[attr-defined]


def kept(*answers: Sample, r: Recipe | None = None, earlier: Sequence[str] = (), lesson: bool = False) -> list[Prompt]:
    return written(answers, earlier, set(), r or recipe(), lesson).prompts


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Name a river.", "Name a river."),
        ("  Name a river.\n\n", "Name a river."),
        ("User prompt: Name a river.", "Name a river."),
        ("**Prompt 3:** Name a river.", "Name a river."),
        ("# Task:\nName a river.", "Name a river."),
        ("Sure! Here is a prompt for you:\n\nName a river.", "Name a river."),
        ('"Name a river."', "Name a river."),
        ("“Name a ‘big’ river.”", "Name a ‘big’ river."),
        ('Prompt: "Name a river."', "Name a river."),
        ('"Rhine" or "Elbe"', '"Rhine" or "Elbe"'),
        ("1. Name a river.\n2. Name a lake.", "Name a river."),
        ("5) Name a river.\n6) Name a lake.", "Name a river."),
        ("- Name a river.", "Name a river."),
        ("- name it\n- draw it", "- name it\n- draw it"),
        ("```text\nName a river.\n```\nI hope this helps!", "Name a river."),
        ("```\nName a river.", "Name a river."),
        ("Fix this:\n```python\nx = (\n```", "Fix this:\n```python\nx = (\n```"),
        ("<think>What would a diver ask?</think>Name a river.", "Name a river."),
        ("a diver asks ...</think>\nName a river.", "Name a river."),
        ("<think>What would a diver", ""),
        ("Name a river.\nPrompt: Name a lake.", "Name a river."),
        ("Name a river.\n\nAssistant: The Rhine.", "Name a river."),
        ("-----\nName a river.\n-----\nName a lake.", "Name a river."),
        ("Read this and reply.\nQuestion: who?\nAnswer: me", "Read this and reply.\nQuestion: who?\nAnswer: me"),
        ("Tell Mia the bigger number: 4 or 5.", "Tell Mia the bigger number: 4 or 5."),
        ("2 pears, 3 plums: how many?", "2 pears, 3 plums: how many?"),
        ("Prompt:", ""),
        ('""', ""),
    ],
)
def test_one_prompt_is_taken_from_an_answer(said: str, meant: str) -> None:
    assert cleaned(said) == meant


@given(st.text(alphabet=st.sampled_from("\"'`-*#1.2:\n Prompt<think>/ab"), max_size=60))
def test_cleaning_ends_and_is_done_at_once(text: str) -> None:
    assert cleaned(cleaned(text)) == cleaned(text)


def test_every_answer_is_counted_once() -> None:
    answers = [
        answer("Name a river in Europe.", name="r1-persona-0"),
        answer("..."),
        answer(""),
        answer("Name a mountain in", ended="cap"),
        answer("name a RIVER in Europe!"),
        answer("Name a long river in Europe."),
        answer("What is the held-out question?"),
        answer("How deep is the sea?"),
        answer("How do I bake bread without an oven?"),
    ]
    banned = {conversation_key(turn("What is the held-out question?"))}
    found = written(answers, ["How deep is the sea?"], banned, recipe(), False)
    assert found.counts == Counts(
        asked=9, kept=2, unreadable=3, filtered=0, held_out=1, similar=3, repeated=found.counts.repeated, unknown=0
    )
    assert found.counts.repeated == pytest.approx(1 / 6)
    assert said(found.prompts) == ["Name a river in Europe.", "How do I bake bread without an oven?"]
    assert found.prompts[0].id == "r1-persona-0"
    assert found.prompts[0].extra == {"persona": "p"}
    assert prompts.texts_of(answers) == [text for text in prompts.texts_of(answers) if words(text)]
    assert len(prompts.texts_of(answers)) == 6


def test_several_answers_to_a_request_are_prompts_of_their_own() -> None:
    found = kept(answer("Name a river in Europe.", "How do I bake bread?", name="x"))
    assert [p.id for p in found] == ["x-0", "x-1"]


def test_similarity_decides_what_is_dropped() -> None:
    answers = [
        answer("Name a river in Europe."),
        answer("Name a long river in Europe."),
        answer("name a river in europe"),
    ]
    assert [len(kept(*answers, r=recipe(similarity=s))) for s in (0.0, 0.7, 0.95, 1.0)] == [1, 1, 2, 2]


def test_fewshot_has_the_filters_of_self_instruct() -> None:
    texts = ["Draw me a sheep, please.", "Too short.", "? is this a question", "Tell me how to bake bread."]
    texts += ["a lot " * MOST_WORDS, "What is in the attached file?"]
    found = written([answer(text) for text in texts], [], set(), recipe(source="fewshot"), False)
    assert (found.counts.filtered, said(found.prompts)) == (5, [texts[3]])
    assert written([answer(text) for text in texts], [], set(), recipe(), False).counts.filtered == 0
    assert suits("¿Qué río pasa por París?")
    assert [suits(" ".join(["word"] * n)) for n in (FEWEST_WORDS - 1, FEWEST_WORDS, MOST_WORDS, MOST_WORDS + 1)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_tasks_of_the_lesson_are_recognised() -> None:
    task = family_tasks("colour")[0]
    other = next(text for text, t in by_text().items() if t.family == "sum" and t not in family_tasks("sum"))
    answers = [answer(task.text), answer(f"Task: {other}"), answer("Bake Anna a cake.")]
    found = written(answers, [], set(), recipe(similarity=1.0), lesson=True)
    assert found.prompts[0].extra == {"persona": "p"} | source.to_prompt(task, "x", 0).extra
    assert source.rule(found.prompts[1].extra, "The total is 5.", True) is not None
    assert ("lesson" in found.prompts[2].extra, found.counts.unknown) == (False, 1)
    assert written(answers, [], set(), recipe(), lesson=False).counts.unknown == 0


def test_repetition() -> None:
    assert repetition([]) == 0
    assert repetition(["a b", "c", "A, b!", "a b"]) == 0.5


# --- how alike texts are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "f"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # the first two are Lin's own example
        ("police killed the gunman", "the gunman kill police", 0.5),
        ("a b c d e", "a x c y e z", 6 / 11),
        ("a a b", "a b b", 2 / 3),
        ("Name a river!", "name A river", 1.0),
        ("a", "b", 0.0),
        ("", "", 0.0),
        ("...", "a", 0.0),
        ("東京の川", "東京の山", 0.75),
    ],
)
def test_rouge_l_by_hand(x: str, y: str, f: float) -> None:
    assert rouge_l(x, y) == pytest.approx(f)


def longest(x: Sequence[str], y: Sequence[str]) -> int:
    """The length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, one in enumerate(x):
        for j, other in enumerate(y):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


TEXTS = st.lists(st.sampled_from("abcdef"), max_size=90)


@given(TEXTS, TEXTS)
def test_rouge_l_is_the_textbooks(x: list[str], y: list[str]) -> None:
    assert common(x, y) == common(y, x) == longest(x, y)
    one, other = " ".join(x), " ".join(y)
    assert rouge_l(one, other) == rouge_l(other, one)
    assert 0 <= rouge_l(one, other) <= 1
    assert rouge_l(one, one) == (1 if x else 0)


@given(st.lists(TEXTS.map(" ".join), max_size=12), st.lists(TEXTS.map(" ".join), max_size=5), st.floats(0.05, 1))
def test_the_bound_drops_what_a_full_comparison_drops(texts: list[str], earlier: list[str], threshold: float) -> None:
    kept, plain = list(earlier), []
    for text in texts:
        plain.append(any(rouge_l(text, other) >= threshold for other in kept))
        kept += [] if plain[-1] else [text]
    assert too_similar(texts, earlier, threshold) == plain


# --- generator and improver --------------------------------------------------------------------------------------


def test_a_generator_learns_from_the_words_of_each_prompt() -> None:
    r = recipe(source="keywords")
    known = labelled()
    found = generator_examples(r, read(r, False), [*known, known[0]], False)
    assert [answer for _, answer in found] == said(known)
    assert found == generator_examples(r, read(r, False), known, False)
    assert found != generator_examples(recipe(source="keywords", seed=1), read(r, False), known, False)
    for (request, _), prompt in zip(found, known, strict=True):
        asked_for = request[-1].content
        assert sum(word in asked_for for word in keywords_of(said([prompt])[0])) >= 2

    for (request, text), prompt in zip(generator_examples(r, read(r, True), tasks(), True), tasks(), strict=True):
        facts = prompt.extra["lesson"]["facts"]
        both = [[facts["name"], facts["item"]], [facts["item"], facts["name"]]]
        assert request[-1].content in map(skills.ask_for_task_from_keywords, both)
        assert text == said([prompt])[0]


def test_an_improver_is_asked_for_a_better_answer() -> None:
    messages = (Message(role="system", content="Be brief."), *turn("Name a river."))
    assert improve.request(messages, "The Alps.", lesson=True) == turn(
        skills.ask_to_improve("Name a river.", "The Alps.")
    )
    request = improve.request(messages, HOSTILE, lesson=False)
    assert request[:2] == messages
    assert (request[2].role, request[2].content, request[3].role) == ("assistant", HOSTILE, "user")
    assert "Write it again" in request[3].content
    assert improve.examples([(messages, "The Alps.", "The Rhine.")], lesson=False) == [
        (improve.request(messages, "The Alps.", lesson=False), "The Rhine.")
    ]


# --- the lesson's model ------------------------------------------------------------------------------------------


def test_the_lesson_model_writes_tasks_of_its_world() -> None:
    pytest.importorskip("torch")
    from spa_lite import backends
    from spa_lite.backend import INIT, ModelSettings, Sampling
    from spa_lite.keys import sample_key
    from spa_lite.lesson import MODEL_DIR

    backend = backends.load("torch", ModelSettings(model=str(MODEL_DIR), device="cpu"))
    r = recipe(similarity=1.0)
    for name in ("persona", "bare"):
        found = asked(r, read(r, True, name), [], 1, True, 60)
        ids = [backend.tokenizer.encode_prompt(p.messages) for p in found]
        keys = [[sample_key(0, 1, p.id, 0)] for p in found]
        answers = dict(backend.sample(ids, 1, Sampling(0.6, 1.0, 32), keys, INIT))
        samples = [
            Sample(id=p.id, messages=p.messages, prompt_ids=ids[i], completions=answers[i], extra=p.extra)
            for i, p in enumerate(found)
        ]
        counts = written(samples, [], set(), r, lesson=True).counts
        print(f"{name}: {counts}")  # pytest -s shows it
        assert counts.kept - counts.unknown >= 50
        assert counts.repeated < 0.2
