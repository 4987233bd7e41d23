"""An adapter that leaves the house carries its own check: what it made of a few prompts where it was exported.

`check.jsonl` lies beside the adapter: 16 prompts, an answer sampled from the adapted model to each, and the
log-probability of every token of it. Whoever loads the adapter scores the same ids and sees whether base, conversion
and arithmetic are what the exporter had, before anything is built on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from spa_lite.backend import POLICY, Backend, Sampling
from spa_lite.errors import ModelError
from spa_lite.keys import sample_key
from spa_lite.records import Ids, Message, Record, Row

FILE = "check.jsonl"
ROLE = "check"
"""What an adapter is bound to while it is checked."""

MAX_TOKENS = 300
TOLERANCE = 1e-3
"""Nats by which a response of up to 300 tokens may differ. PyTorch and MLX, in float32, were seen 1e-4 apart."""

ROUNDING = {"float32": 5e-5, "float16": 5e-3, "bfloat16": 3e-2, "4 bits": 0.5}
"""Nats per token, on average, by which another form of the same model may differ, by the coarser precision of the two.

Seen on models of up to 3 million parameters: 4e-6, 1e-3, 7e-3 and 0.14. Queries and keys in the wrong order: 1.3."""

EXACT = ("float32", "float64")
"""In these a difference is a fault; in half precision two machines differ by more than a wrong adapter may."""

PROMPTS = (
    "Name three things that float on water.",
    "Write a polite note that declines an invitation.",
    "What is the difference between weather and climate?",
    "Explain to a child why the sky is blue.",
    "List the steps to make a cup of tea.",
    "What is 17 times 6? Show how you get there.",
    "Suggest a title for a story about a lighthouse.",
    "Translate 'good morning, my friend' into French.",
    "Write one sentence that contains the word 'umbrella'.",
    "Why do people sleep?",
    "Give me two reasons to learn to play an instrument.",
    "Describe an apple without saying its colour.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Write a function in Python that adds two numbers.",
    "Who wrote the play Hamlet, and when?",
    "How can I say sorry to somebody I have kept waiting?",
)

TokenId = Annotated[int, Meta(ge=0)]
Tokens = Annotated[tuple[TokenId, ...], Meta(min_length=1)]


class CheckRow(Record, frozen=True, kw_only=True):
    """One prompt, an answer to it, and the log-probability (nats) of each of its tokens. `text` is for people."""

    prompt: Tokens
    response: Tokens
    logps: tuple[float, ...]
    text: str


class Line(CheckRow, frozen=True, kw_only=True):
    """One line of `check.jsonl`: a row, and what it was computed with."""

    base: str
    dtype: str
    bits: int


class Difference(Record, frozen=True, kw_only=True):
    """How far the log-probabilities of the same tokens are apart, in nats: `largest` and `mean` per token, `answer` the
    largest of a response's sum (of a longer one than 300 tokens, per 300)."""

    rows: int
    tokens: int
    largest: float
    mean: float
    answer: float


class Verdict(Record, frozen=True, kw_only=True):
    """What a check found.

    `largest` is the largest difference of a response's summed log-probability, in nats (of a longer one, per 300
    tokens). It is a fault only where it is `comparable`: same base, same full precision; else `why` says why not.
    `token` and `mean` are the largest and the mean difference of a single token.
    """

    rows: int
    largest: float
    comparable: bool
    ok: bool
    why: str = ""
    token: float = 0.0
    mean: float = 0.0
    tokens: int = 0


def check_rows(backend: Backend, prompts: Sequence[str] = PROMPTS, seed: int = 0) -> list[CheckRow]:
    """An answer of POLICY to each prompt and its log-probabilities. A prompt that is too long loses its beginning."""
    room = max(1, backend.context // 2)
    asked = [backend.tokenizer.encode_prompt([Message(role="user", content=text)])[-room:] for text in prompts]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=MAX_TOKENS)
    keys = [[sample_key(seed, 0, f"check {i}", 0)] for i in range(len(asked))]
    drawn = {i: completions[0].ids for i, completions in backend.sample(asked, 1, sampling, keys)}
    answers = [drawn[i][: backend.context - len(prompt)] for i, prompt in enumerate(asked)]
    rows = [Row(prompt=prompt, responses=(answer,)) for prompt, answer in zip(asked, answers, strict=True)]
    return [
        CheckRow(prompt=row.prompt, response=row.responses[0], logps=logps, text=_text(backend, row.responses[0]))
        for row, logps in zip(rows, _logps(backend, rows, POLICY), strict=True)
    ]


def write_check(folder: Path, rows: Sequence[CheckRow], base_fingerprint: str, dtype: str, bits: int) -> None:
    """Write `check.jsonl` into an adapter's folder."""
    used: dict[str, Any] = {"base": base_fingerprint, "dtype": dtype, "bits": bits}
    lines = [Line(**msgspec.structs.asdict(row), **used) for row in rows]
    (folder / FILE).write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def check_adapter(backend: Backend, folder: Path) -> Verdict | None:
    """Check an adapter that is about to be used; None if it brought no check.

    Raises ModelError if this base and precision are the exporter's and the log-probabilities are not.
    """
    if not (folder / FILE).is_file():
        return None
    backend.bind(ROLE, folder)
    try:
        verdict = verify(backend, folder, ROLE)
    finally:
        backend.unbind(ROLE)
    if verdict.comparable and not verdict.ok:
        raise ModelError(
            f"{folder} {sentence(verdict)}: the base or the conversion is not what the exporter had; export it again"
        )
    return verdict


def verify(backend: Backend, folder: Path, role: str = POLICY) -> Verdict:
    """Score the rows of a folder's `check.jsonl` under a role and compare. Raises ModelError if they cannot be."""
    path = folder / FILE
    lines = read_check(path)
    _fits(backend, path, lines)
    try:
        off = differ(backend, lines, role)
    except ModelError as error:  # an id beyond the vocabulary
        raise ModelError(f"{path} cannot be scored by this model: it was written for another base") from error
    why = _why_not(backend, lines[0])
    return Verdict(
        rows=off.rows,
        largest=off.answer,
        comparable=not why,
        ok=off.answer <= TOLERANCE,
        why=why,
        token=off.largest,
        mean=off.mean,
        tokens=off.tokens,
    )


def differ(backend: Backend, lines: Sequence[CheckRow], role: str) -> Difference:
    """Score the tokens of some rows under a role and compare. What is not a number is infinitely far."""
    found = _logps(backend, [Row(prompt=line.prompt, responses=(line.response,)) for line in lines], role)
    tokens = np.abs(np.concatenate([np.subtract(now, line.logps) for line, now in zip(lines, found, strict=True)]))
    tokens = np.where(np.isfinite(tokens), tokens, np.inf)
    return Difference(
        rows=len(lines),
        tokens=len(tokens),
        largest=float(tokens.max()),
        mean=float(tokens.mean()),
        answer=max(_difference(line.logps, logps) for line, logps in zip(lines, found, strict=True)),
    )


def allowed(*precisions: str) -> float:
    """Nats per token by which two forms in these precisions may differ on average. An unknown one counts as coarse."""
    return max(ROUNDING.get({"float64": "float32"}.get(name, name), ROUNDING["4 bits"]) for name in precisions)


def sentence(verdict: Verdict) -> str:
    """What a person reads, after the name of the adapter."""
    if verdict.comparable and verdict.ok:
        return f"agrees with its check: {verdict.rows} answers within {verdict.largest:.1g} nats"
    if verdict.comparable:
        return f"differs from its check by {verdict.largest:.2g} nats, where {TOLERANCE:g} is allowed"
    return f"differs from its check by {verdict.largest:.2g} nats; {verdict.why}, so this is only shown"


def read_check(path: Path) -> list[Line]:
    """The lines of a check, whole and made with one model. Raises ModelError naming file and line."""
    lines = []
    try:
        for number, text in enumerate(path.read_bytes().splitlines(), start=1):
            lines.append(msgspec.json.decode(text, type=Line))
            if len(lines[-1].logps) != len(lines[-1].response):
                raise ModelError(_damaged(path, f"line {number} has not one log-probability per token"))
    except msgspec.DecodeError as error:
        raise ModelError(_damaged(path, f"line {number}: {error}")) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; check the path") from error
    if len(lines) != len(PROMPTS):
        raise ModelError(_damaged(path, f"{len(lines)} lines instead of {len(PROMPTS)}"))
    if len({(line.base, line.dtype, line.bits) for line in lines}) != 1:
        raise ModelError(_damaged(path, "its lines come from different models"))
    return lines


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged ({what}); export the adapter again, or delete the file to go without a check"


def _fits(backend: Backend, path: Path, lines: Sequence[Line]) -> None:
    """Refuse rows that are too long for this model, or that read otherwise in its vocabulary."""
    for number, line in enumerate(lines, start=1):
        size = len(line.prompt) + len(line.response)
        if size > backend.context:
            raise ModelError(
                f"{path}, line {number} has {size} tokens and this model takes {backend.context}: it was written for"
                " another base"
            )
        if line.base != backend.fingerprint and _text(backend, line.response) != line.text:
            raise ModelError(f"{path}, line {number} reads otherwise in this model's vocabulary: its base is another")


def _text(backend: Backend, ids: Ids) -> str:
    """The text of ids; nothing where the tokenizer knows one of them not at all."""
    try:
        return backend.tokenizer.decode(ids)
    except (IndexError, ValueError, OverflowError, TypeError):
        return ""


def _logps(backend: Backend, rows: Sequence[Row], role: str) -> list[tuple[float, ...]]:
    found = {i: scores[0].per_token or () for i, scores in backend.logprob(rows, role, per_token=True)}
    return [found[i] for i in range(len(rows))]


def _difference(before: Sequence[float], now: Sequence[float]) -> float:
    """Nats between two sums over the tokens of a response; of more than 300 tokens, per 300. Not a number: infinite."""
    off = abs(math.fsum(np.subtract(now, before).tolist())) / max(1.0, len(before) / MAX_TOKENS)
    return off if math.isfinite(off) else math.inf


def _why_not(backend: Backend, line: Line) -> str:
    """Why a difference would prove nothing; empty if it would."""
    return "; ".join(_differences(backend.fingerprint, backend.description, line))


def _differences(fingerprint: str, description: dict[str, Any], line: Line) -> Iterator[str]:
    here, there = (description.get("dtype"), description.get("bits")), (line.dtype, line.bits)
    if line.base != fingerprint:
        yield "the base, its tokenizer or its template is not the exporter's"
    if here != there:
        yield f"the precision is {here[0]} in {here[1]} bits here and was {there[0]} in {there[1]} bits"
    elif line.dtype not in EXACT:
        yield f"{line.dtype} rounds too coarsely to tell"
