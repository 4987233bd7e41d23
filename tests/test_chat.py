"""Conversations to ids, over generated tokenizers with the shapes of chat template that are in use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from spa_lite.backends.chat import ChatTokenizer
from spa_lite.errors import DataError, ModelError
from spa_lite.records import Message
from tests.tiny import make_tokenizer

# Each template is written anew in the shape its family uses; the special tokens are the family's.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\\nA:' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "specials": ["<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "template": LLAMA3,
        "bos": "<|begin|>",
        "eos": "<|end_of_text|>",
        "adds_bos": True,
    },
    "chatml": {
        "specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "template": CHATML,
        "bos": None,
        "eos": "<|im_end|>",
    },
    "mistral": {"specials": ["<s>", "</s>", "[INST]", "[/INST]"], "template": MISTRAL, "bos": "<s>", "eos": "</s>",
                "adds_bos": True},
    "gemma": {
        "specials": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "template": GEMMA,
        "bos": "<bos>",
        "eos": "<eos>",
        "adds_bos": True,
    },
    "zephyr": {"specials": ["<s>", "</s>"], "template": ZEPHYR, "bos": "<s>", "eos": "</s>", "adds_bos": True},
    "spaced": {"specials": ["<|endoftext|>"], "template": SPACED, "bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    "gpt2": {"specials": ["<|endoftext|>"], "template": None, "bos": "<|endoftext|>", "eos": "<|endoftext|>"},
}  # fmt: skip
END = {
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "zephyr": "</s>",
    "spaced": "<|endoftext|>",
    "gpt2": "<|endoftext|>",
}
PROMPT = {
    "llama3": "<|begin|><|start_header_id|>user<|end_header_id|>\n\nhi there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n",
    "mistral": "<s>[INST] hi there [/INST]",
    "gemma": "<bos><start_of_turn>user\nhi there<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<s><|user|>\nhi there</s>\n<|assistant|>\n",
    "spaced": "Q: hi there\nA:",
    "gpt2": "User: hi there\nAssistant:",
}
TALK = (Message(role="user", content="hi there"),)
LONGER = (*TALK, Message(role="assistant", content="hello"), Message(role="user", content="two plums?"))


def chat(family: str, **settings: Any) -> tuple[ChatTokenizer, Any]:
    """A family's tokenizer, wrapped and bare."""
    bare = make_tokenizer(**FAMILIES[family])
    if family == "gpt2":
        settings.setdefault("template", "plain")
    return ChatTokenizer(bare, family, **settings), bare


def shown(bare: Any, ids: Sequence[int]) -> str:
    """Ids as text, special tokens included."""
    text: str = bare.decode(list(ids), skip_special_tokens=False)
    return text


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One family of templates."""
    return str(request.param)


def test_a_prompt_is_the_template_with_one_bos_at_most(family: str) -> None:
    tokenizer, bare = chat(family)
    ids = tokenizer.encode_prompt(TALK)
    assert shown(bare, ids) == PROMPT[family]
    assert ids.count(bare.bos_token_id) <= 1 or family in ("spaced", "gpt2")
    assert (ids[0] == bare.bos_token_id) == (FAMILIES[family].get("adds_bos", False))


def test_the_end_of_turn_is_what_the_template_writes(family: str) -> None:
    tokenizer, bare = chat(family, eos_ids=[5])
    assert tokenizer.end_of_turn == bare.convert_tokens_to_ids(END[family])
    assert tokenizer.stop_ids == {5, bare.eos_token_id, tokenizer.end_of_turn}


@pytest.mark.parametrize("text", ["the baker paints seven plums.", "  indented\n\nlines ", "Grüße, 東京 🙂", ""])
def test_an_answer_is_the_text_and_one_end(family: str, text: str) -> None:
    tokenizer, _ = chat(family)
    for talk in (TALK, LONGER):
        ids = tokenizer.encode_answer(talk, text)
        assert ids[-1] == tokenizer.end_of_turn
        assert ids.count(tokenizer.end_of_turn) == 1
        lead = " " if family in ("spaced", "gpt2") else ""
        assert tokenizer.decode(ids) == lead + text


def test_prompt_and_answer_together_are_the_rendered_conversation(family: str) -> None:
    tokenizer, bare = chat(family)
    ids = (*tokenizer.encode_prompt(TALK), *tokenizer.encode_answer(TALK, "hello"))
    turns = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    template = tokenizer._template
    rendered = bare.apply_chat_template(turns, chat_template=template, tokenize=False)
    if family != "chatml":  # the switched-off thinking is in the generation prompt only
        start = "<s>" if family == "zephyr" else ""
        assert (start + rendered).startswith(shown(bare, ids))
        assert tuple(bare.encode(start + rendered, add_special_tokens=False)[: len(ids)]) == ids


def test_a_written_end_is_not_doubled(family: str) -> None:
    tokenizer, _ = chat(family)
    plain = tokenizer.encode_answer(TALK, "hello")
    assert tokenizer.encode_answer(TALK, "hello" + END[family]) == plain
    assert tokenizer.encode_answer(TALK, f"hello{END[family]}\n{END[family]} ") == plain


def test_what_people_write_is_never_a_control_token(family: str) -> None:
    tokenizer, bare = chat(family)
    specials = FAMILIES[family]["specials"]
    hostile = "a".join(specials) + "b"
    control = {bare.convert_tokens_to_ids(token) for token in specials}
    answer = tokenizer.encode_answer(TALK, hostile)
    assert control.isdisjoint(answer[:-1])
    assert tokenizer.decode(answer).strip() == hostile
    honest = tokenizer.encode_prompt([Message(role="user", content="x")])
    attacked = tokenizer.encode_prompt([Message(role="user", content="x" + hostile)])
    assert [i for i in attacked if i in control] == [i for i in honest if i in control]
    assert "x" + hostile in shown(bare, attacked)
    history = [Message(role="user", content="x"), Message(role="assistant", content=hostile), *TALK]
    tamer = [Message(role="user", content="x"), Message(role="assistant", content="y"), *TALK]
    found, expected = ([i for i in tokenizer.encode_prompt(talk) if i in control] for talk in (history, tamer))
    assert found == expected


def test_a_system_turn_is_added_only_where_there_is_none() -> None:
    tokenizer, bare = chat("llama3", system="Be brief.")
    head = "<|begin|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
    assert shown(bare, tokenizer.encode_prompt(TALK)).startswith(head.format("Be brief."))
    own = (Message(role="system", content="Be long."), *TALK)
    assert shown(bare, tokenizer.encode_prompt(own)).startswith(head.format("Be long."))


@pytest.mark.parametrize("refusing", ["mistral", "gemma"])
def test_a_template_without_system_turns_says_so(refusing: str) -> None:
    tokenizer, _ = chat(refusing)
    with pytest.raises(ModelError, match=r"refuses the turns system, user .*first user turn"):
        tokenizer.encode_prompt((Message(role="system", content="Be brief."), *TALK))
    with pytest.raises(ModelError, match="first user turn"):
        chat(refusing, system="Be brief.")


def test_a_template_that_drops_system_turns_says_so() -> None:
    dropping = make_tokenizer(specials=["<s>", "</s>"], bos="<s>", eos="</s>", template=ZEPHYR.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    ))  # fmt: skip
    with pytest.raises(ModelError, match="drops system turns"):
        ChatTokenizer(dropping, "dropping").encode_prompt((Message(role="system", content="Be brief."), *TALK))


def test_a_model_without_a_template_names_the_mend() -> None:
    bare = make_tokenizer(**FAMILIES["gpt2"])
    with pytest.raises(ModelError, match=r"no chat template.*--template plain"):
        ChatTokenizer(bare, "gpt2")


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(SPACED.replace("Q:", "Ask:"))
    tokenizer, bare = chat("gpt2", template=str(path))
    assert shown(bare, tokenizer.encode_prompt(TALK)) == "Ask: hi there\nA:"
    with pytest.raises(ModelError, match="neither a file nor one of plain"):
        chat("gpt2", template="fancy")
    path.write_text("{% for")
    with pytest.raises(ModelError, match="refuses"):
        chat("gpt2", template=str(path))
    path.write_text("nothing")
    with pytest.raises(ModelError, match="leaves out"):
        chat("gpt2", template=str(path))


def test_the_plain_fallback_takes_whole_conversations() -> None:
    tokenizer, bare = chat("gpt2", system="Be brief.")
    text = "Be brief.\n\nUser: hi there\nAssistant: hello<|endoftext|>\nUser: two plums?\nAssistant:"
    assert shown(bare, tokenizer.encode_prompt(LONGER)) == text


@pytest.mark.parametrize("talk", [(), LONGER[:2]])
def test_a_conversation_ends_with_a_user_turn(talk: tuple[Message, ...]) -> None:
    tokenizer, _ = chat("llama3")
    with pytest.raises(DataError, match="user turn"):
        tokenizer.encode_prompt(talk)


def test_a_template_sees_no_calendar() -> None:
    bare = make_tokenizer(**{**FAMILIES["llama3"], "template": "{{ strftime_now('%d %B %Y') }}" + LLAMA3})
    text = shown(bare, ChatTokenizer(bare, "dated").encode_prompt(TALK))
    assert "26 July 2024<|begin|>" in text


def test_the_fingerprint_tells_templates_and_system_turns_apart() -> None:
    found = {
        chat("llama3")[0].fingerprint,
        chat("llama3", system="Be brief.")[0].fingerprint,
        chat("llama3", template="plain")[0].fingerprint,
        chat("chatml")[0].fingerprint,
    }
    assert len(found) == 4
    assert chat("llama3")[0].fingerprint == chat("llama3")[0].fingerprint


def test_a_tokenizer_without_any_end_is_refused() -> None:
    bare = make_tokenizer(
        specials=["<s>"], bos="<s>", eos=None, template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ModelError, match="neither an end-of-turn token nor an EOS"):
        ChatTokenizer(bare, "endless")
