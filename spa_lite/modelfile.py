"""A chat template as Ollama needs it, found by probing, and the Modelfile around it.

A model's own template is a Jinja program; Ollama takes a Go template. Most programs only put fixed text around each
turn. What that text is, is seen by rendering a few conversations; that it is all, by rendering a few more.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spa_lite.errors import ModelError
from spa_lite.records import Message

Render = Callable[[Sequence[Message], bool], str]
"""(turns, whether the beginning of an answer follows) -> text. Raises ModelError where a template refuses turns."""

Around = tuple[str, str]

SYSTEM, USER, ANSWER, AGAIN = "Weigh-every-word", "Which-colour", "Ultramarine-4711", "And-which-shade"
ODD = "two  lines,\nthe second with {braces}, {{ .Content }} and \"quotes\" in '''three''' <b>&amp;</b> %s"
CONVERSATIONS = (
    (ODD,),
    (USER, ODD, AGAIN),
    (ODD, ANSWER, ODD, ODD, "1", ANSWER, "2"),
)
"""Turns of user and assistant in turn, to compare what a template renders with what was found of it."""

TRIPLE = '"""'


@dataclass(frozen=True)
class Turns:
    """The text that a template puts before and after each turn.

    `bare` begins a conversation without system turn, `generation` ends every prompt. `system` is None where the
    template takes none. `trims` says that it cuts spaces at both ends of what is said.
    """

    bare: str
    system: Around | None
    user: Around
    assistant: Around
    generation: str
    trims: bool = False


def probe(render: Render, name: str, tokens: Iterable[str] = ()) -> Turns:
    """What a template puts around turns. Raises ModelError naming the model where that is not all it does.

    `tokens`: strings that are one token each (`<|end|>`), to be kept in one piece where the text is divided.
    """
    seen = render(_turns(USER, ANSWER, AGAIN), True)
    marks = {token: chr(0xE000 + i) for i, token in enumerate(sorted({t for t in tokens if t in seen}, key=len)[::-1])}
    turns = _probe(lambda messages, more: _replaced(render(messages, more), marks), name)
    back = {mark: token for token, mark in marks.items()}

    def whole(around: Around) -> Around:
        return _replaced(around[0], back), _replaced(around[1], back)

    return Turns(
        _replaced(turns.bare, back),
        turns.system and whole(turns.system),
        whole(turns.user),
        whole(turns.assistant),
        _replaced(turns.generation, back),
        turns.trims,
    )


def _replaced(text: str, words: Mapping[str, str]) -> str:
    for word, other in words.items():
        text = text.replace(word, other)
    return text


def _probe(render: Render, name: str) -> Turns:
    start, end = _between(render(_turns(USER), True), [USER], name)
    _, middle, again, _ = _between(render(_turns(USER, ANSWER, AGAIN), True), [USER, ANSWER, AGAIN], name)
    _, _, closed = _between(render(_turns(USER, ANSWER), False), [USER, ANSWER], name)
    system = _system(render, name)
    before_user = _common([start, again, *([system[1]] if system else [])], ending=True)
    after_user = _common([end, middle])
    if again.startswith(closed) and before_user.endswith(again.removeprefix(closed)):
        before_user = again.removeprefix(closed)  # what ends an answer does not begin the next question
    if after_user.startswith(closed):
        after_user = closed
    turns = Turns(
        bare=_cut(start, before_user),
        system=(system[0], _cut(system[1], before_user)) if system else None,
        user=(before_user, after_user),
        assistant=(middle.removeprefix(after_user), _cut(again, before_user)),
        generation=end.removeprefix(after_user),
    )
    turns = replace(turns, trims=render(_turns(f" {USER}\n"), True) == said(turns, _turns(USER)))
    for words in (*CONVERSATIONS, *(() if turns.trims else ((f" {USER}\n",),))):
        for lead in (None, SYSTEM) if system else (None,):
            messages = _turns(*words, system=lead)
            if render(messages, True) != said(turns, messages):
                raise ModelError(_refusal(name))
    return turns


def said(turns: Turns, messages: Sequence[Message]) -> str:
    """The prompt of a conversation, as these turns make it."""
    around = {"system": turns.system or ("", ""), "user": turns.user, "assistant": turns.assistant}
    lead = "" if messages[0].role == "system" else turns.bare
    parts = [around[m.role][0] + m.content + around[m.role][1] for m in messages]
    return lead + "".join(parts) + turns.generation


def _turns(*words: str, system: str | None = None) -> list[Message]:
    lead = [Message(role="system", content=system)] if system is not None else []
    return [*lead, *(Message(role="assistant" if i % 2 else "user", content=word) for i, word in enumerate(words))]


def _system(render: Render, name: str) -> Around | None:
    """What stands before a system turn, and between it and the user's; None where the template refuses or drops it."""
    try:
        text = render(_turns(USER, system=SYSTEM), True)
    except ModelError:
        return None
    if SYSTEM not in text:
        return None
    before, between, _ = _between(text, [SYSTEM, USER], name)
    return before, between


def _between(text: str, words: Sequence[str], name: str) -> list[str]:
    """The text before, between and after words that must occur once each, in order."""
    found = []
    for word in words:
        if text.count(word) != 1:
            raise ModelError(_refusal(name))
        before, _, text = text.partition(word)
        found.append(before)
    return [*found, text]


def _common(texts: Sequence[str], ending: bool = False) -> str:
    """The longest beginning (or ending) that all have."""
    if ending:
        return _common([text[::-1] for text in texts])[::-1]
    alike = itertools.takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return "".join(chars[0] for chars in alike)


def _cut(text: str, ending: str) -> str:
    return text[: len(text) - len(ending)]


def _refusal(name: str) -> str:
    return (
        f"the chat template of {name} does more than put text around turns, and no more can be told to Ollama here:"
        " choose another with --template, or export --to gguf, which keeps the template itself"
    )


# In Go


def go_template(turns: Turns) -> str:
    """The same as a template of Go's text/template, over Ollama's `.System` and `.Messages`."""
    bare = _literal(turns.bare)
    if bare and turns.system:
        bare = f"{{{{ if not .System }}}}{bare}{{{{ end }}}}"
    around = {"system": turns.system, "user": turns.user, "assistant": turns.assistant}
    branches = [
        f'if eq .Role "{role}" }}}}{_literal(parts[0])}{{{{ .Content }}}}{_literal(parts[1])}'
        for role, parts in around.items()
        if parts
    ]
    cases = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    return f"{bare}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{_literal(turns.generation)}"


def _literal(text: str) -> str:
    """Text that a Go template prints as it is: as a string constant where it holds what template or Modelfile obey."""
    if not any(char in '{"' or (char < " " and char != "\n") for char in text):
        return text
    constant = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', "\\x22")
    return f'{{{{ "{constant}" }}}}'


# The file


def modelfile(
    turns: Turns, stops: Sequence[str], parameters: Mapping[str, float | int], system: str | None = None
) -> str:
    """A Modelfile for `model.gguf` beside it. Raises ModelError if a stop text cannot be written down."""
    if system is not None and (TRIPLE in system or '"' in (system[:1], system[-1:])):
        assert turns.system  # a tokenizer whose template takes no system turn refuses to load with one
        turns, system = replace(turns, bare=turns.system[0] + system + turns.system[1]), None  # no quoting holds it
    lines = ["# ollama create NAME -f Modelfile", "FROM ./model.gguf", f"TEMPLATE {quoted(go_template(turns))}"]
    lines += [f"SYSTEM {quoted(system)}"] if system is not None else []
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A value in a Modelfile, in three quotes: the only form that may hold quotes and several lines."""
    if TRIPLE in text or text.endswith('"') or text.startswith('"'):
        raise ModelError(f"{text[:40]!r} holds quotes that a Modelfile cannot: choose another template with --template")
    return f"{TRIPLE}{text}{TRIPLE}"
