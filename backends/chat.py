"""Conversations to token ids, once, through a Hugging Face tokenizer and its chat template.

The template is rendered to text and the text tokenised without adding special tokens, so nothing is doubled.
Where a tokenizer normally puts a BOS in front and the template renders none, one BOS is added; a tokenizer
that adds none (GPT-2) gets none. What people write never becomes a control token: a special token's string
inside a message or an answer is tokenised as plain text. Thinking is switched off where a template can, and a
template that prints today's date gets a fixed one, so that the same conversation gives the same ids tomorrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from spa_lite.errors import DataError, ModelError
from spa_lite.keys import digest
from spa_lite.records import Ids, Message

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN}
"""Fallbacks for models without a chat template; used only when asked for by name."""

FIXED_DATE = "26 Jul 2024"
FIXED_CLOCK = "{% macro strftime_now(form) %}{{ '26 July 2024' if '%B' in form else '26 Jul 2024' }}{% endmacro %}"
PROBE_QUESTION, PROBE_ANSWER = "Which colour?", "Ultramarine-4711"
NO_LIMIT = 2**40
"""Tokens of a text. Whoever runs the model or counts tokens looks at lengths, so the library need not warn of them."""
MARK = "\ue000{}\ue001"
"""Stands for a special token's string in somebody's text while the template is rendered (private-use characters)."""


class ChatTokenizer:
    """The contract's Tokenizer over a transformers tokenizer.

    `name` is the model's, for messages; `eos_ids` come from the generation config; `template` is a Jinja file or
    the name of a fallback; `system` is put before conversations that have no system turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        eos_ids: Iterable[int] = (),
        *,
        template: str | None = None,
        system: str | None = None,
    ) -> None:
        self._tokenizer, self._name, self._system = tokenizer, name, system
        self._template = _without_calendar(read_template(tokenizer, name, template))
        self._extra = _template_settings(self._template)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._specials = set(tokenizer.all_special_ids) | {int(i) for i, token in added.items() if token.special}
        strings = set(tokenizer.all_special_tokens) | {str(token) for token in added.values() if token.special}
        self._strings = sorted(strings, key=lambda text: (-len(text), text))
        self._find = re.compile("|".join(map(re.escape, self._strings)) or r"(?!)")
        tokenizer.model_max_length = NO_LIMIT
        self._adds_bos = _adds_bos(tokenizer)
        self._lead, tail = self._probe()
        self._end = self._end_of_turn(tail)
        eos = {tokenizer.eos_token_id} - {None}
        self._stops = frozenset({int(i) for i in eos_ids} | eos | {self._end})

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the generation config's, the tokenizer's EOS and the end of turn."""
        return self._stops

    @property
    def end_of_turn(self) -> int:
        """The id the template puts after an assistant turn, or EOS where it puts none."""
        return self._end

    @property
    def fingerprint(self) -> str:
        """Digest of vocabulary, template and system turn."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return digest(words, self._template, self._system, sorted(self._stops), self._adds_bos).hex()

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        """Ids of a conversation that ends with a user turn, generation prompt included."""
        text, quoted = self._prompt_text(messages)
        return self._encode(text, quoted)

    def encode_answer(self, messages: Sequence[Message], text: str) -> Ids:
        """Ids of a human answer to that conversation, ending with exactly one end-of-turn id.

        The answer is tokenised where it stands, after the prompt, unless a token would straddle the border.
        """
        before, both = self.together(messages, text)
        if both[: len(before)] == before:
            return (*both[len(before) :], self._end)
        _, answer, quoted = self._texts(messages, text)
        return (*self._encode(answer, quoted, bos=False), self._end)

    def together(self, messages: Sequence[Message], text: str) -> tuple[Ids, Ids]:
        """Ids of a prompt alone, and of prompt and answer as one text, without an end-of-turn id.

        Where the first is not the beginning of the second, a token would straddle the border between the two.
        """
        prompt, answer, quoted = self._texts(messages, text)
        return self._encode(prompt, quoted), self._encode(prompt + answer, quoted)

    @property
    def control_tokens(self) -> dict[int, str]:
        """Id and string of every special token."""
        return {i: str(self._tokenizer.convert_ids_to_tokens(i)) for i in sorted(self._specials)}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _texts(self, messages: Sequence[Message], text: str) -> tuple[str, str, list[str]]:
        """The rendered prompt, the answer as it follows it, and the special-token strings in both."""
        prompt, quoted = self._prompt_text(messages)
        return prompt, self._lead + self._quote(self._without_end(text), quoted), quoted

    def _prompt_text(self, messages: Sequence[Message]) -> tuple[str, list[str]]:
        """The rendered prompt, with marks for special-token strings in what people wrote, and those strings."""
        if not messages or messages[-1].role != "user":
            raise DataError("a conversation must end with a user turn")
        if self._system is not None and all(message.role != "system" for message in messages):
            messages = (Message(role="system", content=self._system), *messages)
        quoted: list[str] = []
        turns = [Message(role=turn.role, content=self._quote(turn.content, quoted)) for turn in messages]
        text = self.render(turns, generate=True)
        for turn in turns:
            if turn.role == "system" and turn.content.strip() not in text:
                raise ModelError(
                    f"the chat template of {self._name} drops system turns: put that text into the first user turn,"
                    " or choose another template with --template"
                )
        return text, quoted

    def render(self, messages: Sequence[Message], generate: bool = True) -> str:
        """What the template makes of turns, as text: no system turn of the settings, no BOS of the tokenizer's.

        Raises ModelError if the template refuses them.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=generate, **self._extra
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            roles = ", ".join(message.role for message in messages)
            has_system = any(message.role == "system" for message in messages)
            mend = "put the system turn's text into the first user turn" if has_system else "change the turns"
            raise ModelError(
                f"the chat template of {self._name} refuses the turns {roles} ({reason}): {mend},"
                " or choose another template with --template"
            ) from error
        return text

    def _quote(self, text: str, quoted: list[str]) -> str:
        def mark(found: re.Match[str]) -> str:
            quoted.append(found.group())
            return MARK.format(len(quoted) - 1)

        return self._find.sub(mark, text)

    def _encode(self, text: str, quoted: Sequence[str], bos: bool = True) -> Ids:
        """Ids of rendered text. The template's special tokens are control tokens, marked strings are plain text."""
        ids: list[int] = []
        for part in re.split("(\ue000\\d+\ue001)", text) if quoted else [text]:
            if quoted and part.startswith("\ue000") and part[1:-1].isdigit() and int(part[1:-1]) < len(quoted):
                ids += self._plain_ids(quoted[int(part[1:-1])])
            elif part:
                ids += self._tokenizer.encode(part, add_special_tokens=False)
        first = self._tokenizer.bos_token_id
        if bos and self._adds_bos and ids[:1] != [first]:
            ids.insert(0, first)
        return tuple(ids)

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of a special token's string as plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self._specials.isdisjoint(ids):
            return ids
        # Tokenizers that cannot switch special tokens off: cut the string, so that none is recognised.
        return [i for letter in text for i in self._tokenizer.encode(letter, add_special_tokens=False)]

    def _probe(self) -> tuple[str, str]:
        """What the template puts between prompt and answer (a space, or nothing) and after the answer."""
        question = [Message(role="user", content=PROBE_QUESTION)]
        if self._system is not None:
            question.insert(0, Message(role="system", content=self._system))
        prompt = self.render(question, generate=True)
        full = self.render([*question, Message(role="assistant", content=PROBE_ANSWER)], generate=False)
        before, found, tail = full.rpartition(PROBE_ANSWER)
        if not found or PROBE_QUESTION not in prompt:
            raise ModelError(
                f"the chat template of {self._name} leaves out what was said: choose another with --template"
            )
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        return (lead if not lead.strip() else ""), tail

    def _end_of_turn(self, tail: str) -> int:
        for token in self._tokenizer.encode(tail, add_special_tokens=False) if tail else ():
            if token in self._specials:
                return int(token)
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {self._name} has neither an end-of-turn token nor an EOS token")
        return int(self._tokenizer.eos_token_id)

    def _without_end(self, text: str) -> str:
        """The text without an end-of-turn (or EOS) string that its writer put at the end."""
        ends = [self._tokenizer.convert_ids_to_tokens(i) for i in self._stops if i in self._specials]
        while True:
            shorter = text.rstrip()
            cut = next((end for end in ends if end and shorter.endswith(end)), None)
            if cut is None:
                return text
            text = shorter[: -len(cut)]


def read_template(tokenizer: Any, name: str, wanted: str | None) -> str:
    """The chat template: a file or a named fallback if asked for, else the tokenizer's own."""
    if wanted is not None:
        if wanted in TEMPLATES:
            return TEMPLATES[wanted]
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise ModelError(f"--template {wanted} is neither a file nor one of {', '.join(TEMPLATES)}")
        return path.read_text()
    try:
        own: str = tokenizer.get_chat_template()
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{name} has no chat template: add --template plain (User: ... Assistant: ...) or --template FILE.jinja"
        ) from error
    return own


def _template_settings(template: str) -> dict[str, Any]:
    """Variables for the template: no thinking, a fixed date."""
    fixed: dict[str, Any] = {"enable_thinking": False, "date_string": FIXED_DATE}
    return {name: value for name, value in fixed.items() if name in template}


def _without_calendar(template: str) -> str:
    """The template with its clock replaced: a macro hides the function of the same name."""
    return FIXED_CLOCK + template if "strftime_now" in template else template


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS in front of ordinary text."""
    encode: Callable[..., list[int]] = tokenizer.encode
    bos = tokenizer.bos_token_id
    return bos is not None and encode("a", add_special_tokens=True)[:1] == [bos]
