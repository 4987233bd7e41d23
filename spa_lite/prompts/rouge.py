"""How alike two texts are, word by word: ROUGE-L (Lin, 2004).

The F value of two texts is 2 LCS / (m + n), with the length of the longest common subsequence of their m and n words:
words in common, in the same order, with others between them. Libraries have it (rapidfuzz: Indel similarity of lists of
words); among thousands of texts what counts is how few pairs must be looked at, and that is below.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
"""A run of letters and digits. Scripts that put no blanks between words (Han, kana, Thai, ...) count by character."""


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without case and punctuation."""
    return tuple(_WORD.findall(text.casefold()))


def rouge_l(x: str, y: str) -> float:
    """F value of two texts in [0, 1]: 1 for the same words in the same order, 0 without a word in common."""
    return _f(words(x), words(y))


def _f(x: Sequence[str], y: Sequence[str]) -> float:
    return 2 * common(x, y) / (len(x) + len(y)) if x and y else 0.0


def common(x: Sequence[str], y: Sequence[str]) -> int:
    """Length of the longest common subsequence, a whole row of the table at a time in the bits of one number.

    (M. Crochemore et al., 2001.) A zero at bit i says that the subsequence grows at word i of x.
    """
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(x):
        places[word] |= 1 << place
    every = (1 << len(x)) - 1
    row = every
    for word in y:
        if found := row & places.get(word, 0):
            row = ((row + found) | (row - found)) & every
    return len(x) - row.bit_count()


def too_similar(texts: Sequence[str], earlier: Sequence[str], threshold: float) -> list[bool]:
    """Of each text, whether its F value with an earlier text, or with a text that was kept before it, reaches the
    threshold. At 1 these are the texts of the same words.

    A word in common counts once for each time it stands in both, which bounds the subsequence: only pairs that reach
    the threshold so are looked at in full.
    """
    every = [words(text) for text in (*earlier, *texts)]
    lengths = np.array([len(found) for found in every])
    counted = [Counter(found) for found in every]
    postings = _postings(counted)
    kept = np.arange(len(every)) < len(earlier)
    similar = []
    for new in range(len(earlier), len(every)):
        shared = np.zeros(len(every), np.int64)
        for word, count in counted[new].items():
            rows, counts = postings[word]
            shared[rows] += np.minimum(counts, count)
        bound = 2 * shared / np.maximum(lengths + lengths[new], 1)
        near = np.flatnonzero(kept & (bound >= threshold))
        near = near[np.argsort(-shared[near], kind="stable")]  # the likeliest first
        found = any(_f(every[new], every[old]) >= threshold for old in near)
        similar.append(found)
        kept[new] = not found
    return similar


def _postings(counted: Sequence[Counter[str]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per word the rows of the texts that have it, and how often each does."""
    found: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, counts in enumerate(counted):
        for word, count in counts.items():
            rows, times = found[word]
            rows.append(row)
            times.append(count)
    return {word: (np.array(rows), np.array(times)) for word, (rows, times) in found.items()}
