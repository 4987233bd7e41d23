"""A judge's reply in words, read: the last clear verdict or grade in it, or nothing.

Thinking is left out. What states a verdict ("Verdict: A", a line of one letter) goes before prose ("I prefer A"), and
prose that doubts or denies ("A is not better") is no verdict. Better unread, and counted, than misread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

from spa_lite.asking import without_thinking
from spa_lite.judges.wording import GRADES

EMPHASIS = re.compile(r"[*_`\"]+")
LETTER = (
    r"(?:(?i:answer|response|option)\s+)?([AB])\b(?!\s+(?!(?:because|since|over|as|for|due|by|is|and|but|than)\b)\w)"
)
"""A or B, and not the article: \"A tie\" names no answer."""
STATED = re.compile(
    r"\[\[\s*(?:(?i:answer)\s+)?([AB])\s*\]\]"  # [[A]]
    r"|^[^\w\n]*\(([AB])\)[^\w\n:]*$|^[^\w\n]*([AB])[^\w\n:)]*$"  # a line of its own; "A:" and "A)" are headings
    rf"|\b(?i:verdict|winner|choice|decision|answer|better|best)(?:\s+(?i:answer|one|response))?(?:\s+is)?\s*[:=]\s*{LETTER}",
    re.MULTILINE,
)
LAST_LINE = re.compile(r"(?:^|\n)[^\w\n]*(?i:answer|response|option)\s+([AB])[^\w\n]*$")
PROSE = re.compile(
    rf"\b(?i:verdict|winner|choice|decision|(?:better|best)\s+(?:answer|one|response))\s+is\s+{LETTER}"
    rf"|\b(?i:choose|prefer|pick|select)\s+{LETTER}"
    r"|\b([AB])\s+(?i:(?:is|was)\s+(?:\w+\s+){0,2}(?:better|best|winner|superior|stronger|preferable)|wins)\b"
)
DOUBT = re.compile(r"\b(?:not|never|neither|nor|cannot|whether|if)\b|n['\u2019]t\b", re.IGNORECASE)
CLAUSE = re.compile(r"[.;!?\n]|\b(?:but|however)\b", re.IGNORECASE)
FAR = 300
"""Letters in which the beginning of a clause is looked for."""

NUMBER = r"(?<![\d.,-])([0-9]{{1,3}}(?:\.[0-9]+)?)(?![0-9%]|[.,-][0-9]|\s*/\s*(?!{top}\b))"
"""A number that is not a part of another one, of a range, or of a fraction of something else than the top grade."""


def verdict(reply: str) -> float | None:
    """1 if the last clear verdict is A, 0 if it is B, None if there is none."""
    text = EMPHASIS.sub("", without_thinking(reply))
    found = list(STATED.finditer(text))
    found += [m] if (m := LAST_LINE.search(text)) else []
    found = found or [m for m in PROSE.finditer(text) if not _doubted(text, m.end())]
    return float(_taken(found[-1]) == "A") if found else None


def grade(reply: str, grades: Sequence[str] = GRADES) -> float | None:
    """The last clear grade; None if there is none, or it lies outside of `grades`, which ascend."""
    found = list(_grades(grades[-1]).finditer(EMPHASIS.sub("", without_thinking(reply))))
    value = float(_taken(found[-1])) if found else math.nan
    return value if int(grades[0]) <= value <= int(grades[-1]) else None


@cache
def _grades(top: str) -> re.Pattern[str]:
    """How a grade is written where `top` is the best one."""
    number = NUMBER.format(top=top)
    return re.compile(
        rf"\[\[\s*{number}(?:\s*/\s*{top})?\s*\]\]"  # [[8]]
        rf"|{number}\s*(?:/|(?i:out\s+of))\s*{top}(?![0-9])"  # 8/10
        rf"|\b(?i:grade|score|rating)(?:\s+(?i:is|of))?\s*[:=]?\s*{number}"  # the grade is 8
        rf"|^[ \t(\[]*{number}[^\w\n]*$",  # a line of its own
        re.MULTILINE,
    )


def _doubted(text: str, end: int) -> bool:
    """Whether the clause that ends there doubts or denies."""
    return DOUBT.search(CLAUSE.split(text[max(0, end - FAR) : end])[-1]) is not None


def _taken(match: re.Match[str]) -> str:
    """What the one group of the alternative that matched holds."""
    return next(group for group in match.groups() if group is not None)
