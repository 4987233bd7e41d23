"""From what a model wrote to the one prompt in it: no thinking, announcement, number, fence or quotation marks.

Rules of thumb, short enough to be read here. What is inside the prompt stays as it was written.
"""

from __future__ import annotations

import re

from spa_lite.asking import without_thinking

RULE = "-----"
"""What stands between examples, and shows where a writer that goes on has begun another one."""

_MARKER = re.compile(
    r"[*_#\s]*(?:(?:(?:user|new|my|the|your|example)\s+)?(?:prompt|message|request|task|question|instruction)"
    r"\s*(?:no\.?\s*)?\d*|user)[*_]*\s*:[*_]*\s*",
    re.IGNORECASE,
)
"""`User prompt:`, `**Prompt 1:**`, `Task:`"""
_ANNOUNCED = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^\n:]{0,80}|here(?:'s|’s| is| are)\b[^\n:]{0,120}):\s*\n\s*",
    re.IGNORECASE,
)
"""`Sure! Here is a prompt:` on a line of its own."""
_NUMBER = re.compile(r"\(?(\d{1,2})[.):]\s+")
_BULLET = re.compile(r"[-*•+]\s+")
_NEXT = re.compile(
    r"\n[*_# \t]{0,8}(?:(?:user|new)\s)?prompt\s?\d*[*_]*:|\n\s?\n[*_# ]{0,8}(?:user|assistant|response|answer)[*_]*:"
    rf"|\n{RULE}(?:\n|\Z)",
    re.IGNORECASE,
)
"""Where something else begins: another prompt, the model's own answer to this one, the rule between examples."""
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```.*|$)", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "`": "`"}


def cleaned(answer: str) -> str:
    """The first prompt in an answer; empty where there is none."""
    text = without_thinking(answer)
    while (shorter := _peeled(text)) != text:
        text = shorter
    return text


def _peeled(text: str) -> str:
    """The text without the outermost of what is not the prompt; itself where nothing is left to take off."""
    text = text.strip().removeprefix(RULE + "\n").lstrip()
    for opening in (_ANNOUNCED, _MARKER):
        if found := opening.match(text):
            return text[found.end() :]
    if found := _FENCED.match(text):
        return found[1]
    if found := _NUMBER.match(text):
        second = re.search(rf"\n[ \t]{{0,8}}\(?{int(found[1]) + 1}[.):]\s", text)
        return text[found.end() : second.start() if second else None]
    if "\n" not in text and (found := _BULLET.match(text)):
        return text[found.end() :]
    if found := _NEXT.search(text):
        return text[: found.start()]
    return _unquoted(text)


def _unquoted(text: str) -> str:
    """Without the quotation marks around the whole text."""
    close = _QUOTES.get(text[:1])
    inner = text[1:-1]
    if close and len(text) > 1 and text.endswith(close) and close not in inner and text[0] not in inner:
        return inner
    return text
