"""What can be seen in a text alone: how it ends, set phrases, think tags, language, strings of special tokens.

All of these are rules of thumb, short enough to be read here. They find what is worth a look; they prove nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

# --- how an answer ends ----------------------------------------------------------------------------------------

ENDS = ".!?…。！？．؟۔।॥:;)]}>\"'”’»›」』*_`~♪|"
"""Characters that an answer which was finished may end with; so may a symbol (an emoji)."""
LIST_LINE = re.compile(r"\s*(?:[-*+•‣–]|\d+[.)]|#+|>|\|)\s*\S")
"""A line of a list, a heading, a quotation or a table needs no full stop."""
LONG_ENOUGH = 80
"""Characters from which on an answer is expected to be a sentence."""
SHORT_LINE = 40
"""A last line of fewer characters may be a signature, a result, a label."""


def stops_short(text: str) -> bool | None:
    """Whether an answer stops in the middle of a sentence; None where it is too short or no prose to tell by."""
    text = text.rstrip()
    _, is_last, last = text.rpartition("\n")
    if len(text) < LONG_ENOUGH or LIST_LINE.match(last) or (is_last and len(last) < SHORT_LINE) or "/" in last[-20:]:
        return None
    return text[-1] not in ENDS and unicodedata.category(text[-1]) not in {"So", "Sk", "Sm"}


def open_block(text: str) -> bool:
    """Whether a code block was begun and not ended."""
    return len(re.findall(r"^\s*```", text, re.MULTILINE)) % 2 == 1


# --- set phrases -----------------------------------------------------------------------------------------------

BOILERPLATE = {
    "self-description": r"\bas an? (?:ai|large|artificial)\b[\w -]{0,30}\b(?:model|assistant|intelligence)\b"
    r"|\bI(?:'m| am) (?:just |only )?an? (?:ai|large language|language) (?:language )?(?:model|assistant)\b",
    "refusal": r"\bI(?:'m| am) (?:very |really |so )?sorry,? but I (?:can(?:'|no)t|am (?:not able|unable))\b"
    r"|\bI (?:can(?:'|no)t|am (?:unable|not able) to|won't) (?:help|assist|comply|fulfill|provide|answer)\b",
    "cutoff": r"\b(?:my|the) (?:knowledge|training)(?: data)? (?:cut-?off|only goes)\b"
    r"|\bas of my last (?:update|training)\b",
    "opener": r"\A\s*(?:certainly|sure|absolutely|of course)[!,.] (?:here|I)\b",
    "closer": r"\bI hope (?:this|that) helps\b|\blet me know if you (?:have|need) any\b",
}
"""Phrases that say nothing about the question."""
_PHRASES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in BOILERPLATE.items()}


def boilerplate(text: str) -> list[str]:
    """Names of the kinds of set phrases in a text."""
    text = text.replace("’", "'")
    return [name for name, pattern in _PHRASES.items() if pattern.search(text)]


# --- thinking --------------------------------------------------------------------------------------------------

THINK = ("think", "thinking", "thought", "reasoning", "scratchpad", "reflection")
_TAG = re.compile(rf"<(/?)({'|'.join(THINK)})>", re.IGNORECASE)


def think_tags(text: str) -> str | None:
    """`whole` if every think tag has its partner, `open` or `close` for the one that is left over; None without any."""
    depth: list[str] = []
    seen = False
    for tag in _TAG.finditer(text):
        seen, name = True, tag[2].lower()
        if not tag[1]:
            depth.append(name)
        elif depth and depth[-1] == name:
            depth.pop()
        else:
            return "close"
    return None if not seen else "open" if depth else "whole"


# --- language --------------------------------------------------------------------------------------------------

FEW_LETTERS = 20
"""A text with fewer letters has no script."""
FEW_WORDS = 8
"""A text with fewer words has no language."""
LOOKED_AT = 1000
"""Characters of a text that are looked at."""
STOP_WORDS = {
    "English": "the and is are was of to in that it you for with this have not they but what which from there would",
    "German": "der die das und ist nicht ein eine zu den von mit sich auf dem für auch sind wird aber wie wenn oder",
    "French": "le la les et est des une dans que qui pour pas sur avec vous ce sont mais nous être cette aux du",
    "Spanish": "el la los las y es una que en por con para del como más pero sus este está son al lo se",
    "Italian": "il lo gli e è una che di per con del della non sono come più ma anche questo nella dei si",
    "Portuguese": "o os as e é uma que em por com para do da não mais como mas também são ao dos isso você",
    "Dutch": "de het een en is van dat niet op te zijn met voor er aan ook maar als bij dit wordt naar of",
}
"""Small words that are frequent in a language. Words of two languages count for both."""
_LANGUAGES = {
    word: [name for name, words in STOP_WORDS.items() if word in words.split()]
    for word in {word for words in STOP_WORDS.values() for word in words.split()}
}
_LETTER, _WORD = re.compile(r"[A-Za-z]"), re.compile(r"[^\W\d_]+")
_KANA = {"HIRAGANA", "KATAKANA"}


@lru_cache(maxsize=8192)
def _script_of(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HANGUL, ..."""
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""


def script(text: str) -> str | None:
    """The script of most letters of a text (`Latin`, `Cyrillic`, ...); None where that is not clear."""
    text = text[:LOOKED_AT]
    if text.isascii():
        return "Latin" if len(_LETTER.findall(text)) >= FEW_LETTERS else None
    seen = Counter(map(_script_of, text))
    del seen[""]
    japanese = sum(seen[name] for name in _KANA)
    if japanese * 10 > japanese + seen["CJK"]:  # kanji with kana between them
        seen["JAPANESE"] = japanese + seen.pop("CJK", 0)
        for name in _KANA:
            seen.pop(name, None)
    total = sum(seen.values())
    if total < FEW_LETTERS:
        return None
    name, count = seen.most_common(1)[0]
    return name.title() if count >= 0.6 * total else None


def language(text: str) -> str | None:
    """The language of a text in Latin letters, by its small words; None where that is not clear."""
    words = _WORD.findall(text[:LOOKED_AT].lower())
    if len(words) < FEW_WORDS:
        return None
    counts = Counter(name for word in words for name in _LANGUAGES.get(word, ()))
    (first, most), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    return first if most >= 3 and most >= 0.1 * len(words) and most >= 1.5 * second else None


@lru_cache(maxsize=16)
def tongue(text: str) -> tuple[str | None, str | None]:
    """Script, and language where that is Latin."""
    found = script(text)
    return found, language(text) if found == "Latin" else None


def mix_up(prompt: str, answer: str) -> str | None:
    """What an answer does to its prompt's language: `Latin → Cyrillic`, `English → German`; None if it keeps it."""
    for asked, said in zip(tongue(prompt), tongue(answer), strict=True):
        if asked and said and asked != said:
            return f"{asked} → {said}"
    return None


# --- special tokens --------------------------------------------------------------------------------------------

SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_ -]{2,40}\|>|<｜[^<>｜]{2,40}｜>"
    r"|</?s>|<(?:bos|eos|pad|unk|mask|cls|sep|start_of_turn|end_of_turn|endoftext|fim_\w+)>"
    r"|\[/?INST\]|<</?SYS>>|\[(?:CLS|SEP|PAD|UNK|MASK|gMASK)\]"
)
"""Strings that the models of this time use as control tokens."""


def special_strings(text: str) -> list[str]:
    """The different strings of special tokens in a text."""
    return list(dict.fromkeys(SPECIAL.findall(text)))
