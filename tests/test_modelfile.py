"""Chat templates as Ollama's: found by probing, said in Go, and put into a file that no text can break."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest

from spa_lite.errors import ModelError
from spa_lite.modelfile import CONVERSATIONS, Turns, go_template, modelfile, probe, quoted
from spa_lite.records import Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "a default system turn": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are \"Q{{ '{{' }}\".<|im_end|>\n{% endif %}"
        + CHATML
    ),
    "tags": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>",
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ s if loop.first else '' }}{{ m['content'] }} "
        "[/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']"
        " | trim + '<|eot_id|>' %}{{ '<|begin|>' + c if loop.first else c }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "no system turn": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise('no system turn') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<end_of_turn>\n"
        "{% endfor %}<start_of_turn>model\n"
    ),
    "plain": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% elif m['role'] == 'user' %}"
        "{{ 'User: ' + m['content'] + '\n' }}{% else %}{{ 'Assistant: ' + m['content'] + '</s>\n' }}{% endif %}"
        "{% endfor %}Assistant:"
    ),
    "no thinking": CHATML + "<think>\n\n</think>\n\n",
    "quotes and braces": (
        "{% for m in messages %}{{ '\"\"\"{{' + m['role'] + '}}\\\\ ' + m['content'] + '{\"\r' }}{% endfor %}{{ '{' }}"
    ),
}


def renderer(template: str) -> Any:
    """A Jinja chat template as the method renders it."""

    def refuse(reason: str) -> None:
        raise ModelError(reason)

    compiled = jinja2.Environment(keep_trailing_newline=True).from_string(template, {"raise": refuse})

    def render(messages: Sequence[Message], generate: bool = True) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return compiled.render(messages=turns, add_generation_prompt=generate)

    return render


# Ollama's side, as far as we use it


def go(template: str, messages: Sequence[Message]) -> str:
    """Evaluate the subset of Go's text/template that we write, over Ollama's `.System` and `.Messages`."""
    pieces = re.findall(r"\{\{ (.*?) \}\}|((?:(?!\{\{).)+)", template, flags=re.DOTALL)
    assert "".join(f"{{{{ {a} }}}}" if a else t for a, t in pieces) == template, "nothing is left over"
    system = "\n\n".join(m.content for m in messages if m.role == "system")

    def block(i: int, show: bool, item: Message | None) -> tuple[int, str]:
        """From piece i up to its `else` or `end`."""
        out = ""
        while i < len(pieces):
            action, text = pieces[i]
            if action == "end" or action.startswith("else "):
                return i, out
            i += 1
            if not action:
                out += text if show else ""
            elif action.startswith('"'):
                out += json.loads(action.replace("\\x22", "\\u0022")) if show else ""
            elif action == ".Content":
                assert item or not show
                out += item.content if show and item else ""
            elif action == "range .Messages":
                first = i
                for message in messages if show else ():
                    _, said = block(first, True, message)
                    out += said
                i, _ = block(first, False, None)
                i += 1
            else:
                i, said = branch(action, i, show, item)
                out += said
        return i, out

    def branch(action: str, i: int, show: bool, item: Message | None) -> tuple[int, str]:
        out, taken = "", False
        while True:
            holds = not system if action == "if not .System" else bool(item and action == f'if eq .Role "{item.role}"')
            assert action == "if not .System" or re.fullmatch(r'if eq \.Role "\w+"', action)
            i, said = block(i, show and holds and not taken, item)
            out, taken = out + said, taken or holds
            if pieces[i][0] == "end":
                return i + 1, out
            action, i = pieces[i][0].removeprefix("else "), i + 1

    end, out = block(0, True, None)
    assert end == len(pieces)
    return out


def parse(text: str) -> list[tuple[str, str]]:
    """A Modelfile as Ollama reads it: a value ends with its line, or where its three quotes end a line."""
    commands, rest = [], text
    while rest:
        line, _, rest = rest.partition("\n")
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            which, _, value = value.partition(" ")
            name += f" {which}"
        while value.startswith('"""') and not (len(value.strip()) >= 6 and value.strip().endswith('"""')):
            assert rest, "the quotes are closed"
            line, _, rest = rest.partition("\n")
            value += "\n" + line
        commands.append((name, value.strip()[3:-3] if value.startswith('"""') else value.strip()))
    return commands


# Tests


def conversations(system: bool) -> list[list[Message]]:
    """Conversations that end with a user turn; the contents hold what template languages obey."""
    found = []
    for words in [*CONVERSATIONS, ('say """hi"""\n\n"""', "{{ end }}", "{% raw %}")]:
        turns = [Message(role="assistant" if i % 2 else "user", content=word) for i, word in enumerate(words)]
        found += [turns, [Message(role="system", content='Be "kind".\n{{ .System }}'), *turns]] if system else [turns]
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_the_same_in_go(name: str) -> None:
    render = renderer(TEMPLATES[name])
    turns = probe(render, "m")
    assert (turns.system is None) == (name == "no system turn")
    assert turns.trims == (name in ("llama 3", "no system turn"))
    commands = dict(parse(modelfile(turns, [], {})))
    for messages in conversations(turns.system is not None):
        assert go(go_template(turns), messages) == render(messages)
        assert go(commands["TEMPLATE"], messages) == render(messages), "and so it stands in the file"


ODD_ONES = {
    "counts turns": "{% for m in messages %}[{{ loop.index }}]{{ m['content'] }}{% endfor %}",
    "escapes": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | e }}\n{% endfor %}",
    "JSON": "{{ messages | tojson }}",
    "says it twice": "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
    "forgets": "<s>{{ messages[-1]['content'] }}</s>",
    "looks at the length": "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages | length }}",
    "cuts one side": "{% for m in messages %}{{ m['content'].lstrip() }}|{% endfor %}",
}


@pytest.mark.parametrize("name", ODD_ONES)
def test_a_template_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"template of their/model does more than put text around turns.*--template"):
        probe(renderer(ODD_ONES[name]), "their/model")


def test_tokens_are_not_divided() -> None:
    """So that a person can read the file."""
    tokens = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|unused|>"]
    render = renderer(TEMPLATES["llama 3"])
    turns = probe(lambda messages, more: render(messages, more).removeprefix("<|begin|>"), "m", tokens)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert turns == Turns(
        bare="",
        system=(header.format("system"), "<|eot_id|>"),
        user=(header.format("user"), "<|eot_id|>"),
        assistant=(header.format("assistant"), "<|eot_id|>"),
        generation=header.format("assistant"),
        trims=True,
    )
    assert probe(render, "m", tokens).bare == "<|begin|>"


SYSTEMS = [
    "Be kind.",
    'Say "hi".\n\nFROM evil\nPARAMETER stop x',
    '"quoted"',
    'a """\nFROM evil\n""" b',
    '"""',
    "",
    " x\n",
]


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_system_turn_breaks_the_file(system: str) -> None:
    """It reads as it was written: as SYSTEM, or as what the template says when no system turn is given."""
    render = renderer(CHATML)
    text = modelfile(probe(render, "m"), ["<|im_end|>", 'a "b" c'], {"temperature": 0.7, "num_ctx": 512}, system)
    commands = parse(text)
    assert [name for name, _ in commands if name != "SYSTEM"] == [
        *("FROM", "TEMPLATE", "PARAMETER temperature", "PARAMETER num_ctx", "PARAMETER stop", "PARAMETER stop")
    ]
    found = dict(commands)
    assert (found["FROM"], found["PARAMETER temperature"], found["PARAMETER num_ctx"]) == ("./model.gguf", "0.7", "512")
    assert [value for name, value in commands if name == "PARAMETER stop"] == ["<|im_end|>", 'a "b" c']
    user = [Message(role="user", content="hi")]
    wanted = render([Message(role="system", content=system), *user])
    given = [Message(role="system", content=found["SYSTEM"])] if found.get("SYSTEM") else []
    if system:
        assert go(found["TEMPLATE"], [*given, *user]) == wanted
        assert system in go(found["TEMPLATE"], [*given, *user])


def test_what_cannot_be_quoted_is_refused() -> None:
    for text in ('a"""b', '"a', 'a"'):
        with pytest.raises(ModelError, match="holds quotes that a Modelfile cannot"):
            quoted(text)
    with pytest.raises(ModelError, match="--template"):
        modelfile(Turns("", None, ("", ""), ("", ""), ""), ['"'], {})
