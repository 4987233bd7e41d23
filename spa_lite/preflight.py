"""Checks on a loaded model that take seconds: each is a fault that has shipped somewhere and cost somebody hours."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from spa_lite.backend import INIT, POLICY, PREVIOUS, Backend, Lora, Optimizer, Sampling
from spa_lite.keys import sample_key
from spa_lite.objective import Dpo
from spa_lite.records import Message, Row

PROMPTS = ("Say hello.", "Name two colours and a fruit that is sweet.", "What is two plus three?")
ANSWERS = 8
TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 0.5, "float16": 0.5}
"""How far sums of a short answer may drift between batch shapes, in nats."""


class Check(msgspec.Struct, frozen=True):
    """One check: what it is, whether it holds (None: only something to know), and the number seen."""

    name: str
    passed: bool | None
    seen: str


def preflight(backend: Backend) -> list[Check]:
    """All checks, in order. Trains one step of a throw-away adapter and forgets it."""
    return list(_checks(backend))


def _checks(backend: Backend) -> Iterator[Check]:
    prompts = [backend.tokenizer.encode_prompt([Message(role="user", content=text)]) for text in PROMPTS]
    tolerance = TOLERANCE.get(str(backend.description.get("dtype")), 0.5)
    keys = [[sample_key(0, 0, text, k) for k in range(ANSWERS)] for text in PROMPTS]
    sampling = Sampling(temperature=1.0, max_tokens=8)
    backend.bind(POLICY, None, Lora(rank=4, alpha=8.0))
    backend.snapshot()

    together = dict(backend.sample(prompts, ANSWERS, sampling, keys))
    same = []
    for i, prompt in enumerate(prompts):
        alone = dict(backend.sample([prompt], ANSWERS, sampling, keys[i : i + 1]))[0]
        same += [a.ids == b.ids for a, b in zip(together[i], alone, strict=True)]
    # A draw within rounding of the boundary between two tokens may fall either way, in half precision more often.
    wanted = 0.9 if tolerance < 0.1 else 0.5
    yield Check(
        "a sample does not depend on its batch", sum(same) >= wanted * len(same), f"{sum(same)} of {len(same)} equal"
    )

    rows = [Row(prompt=p, responses=tuple(c.ids for c in together[i])) for i, p in enumerate(prompts)]
    sums = _sums(backend, rows, POLICY)
    single = np.concatenate([_sums(backend, [row], POLICY) for row in rows])
    recorded = np.array([sum(c.logprobs) for i in range(len(rows)) for c in together[i]])
    yield _close("batched scoring equals single scoring", sums, single, tolerance)
    yield _close("scoring equals what the sampler recorded", sums, recorded, tolerance)
    yield _close("policy equals previous before training", sums, _sums(backend, rows, PREVIOUS), 0.0)
    if backend.can_train:
        yield from _training(backend, rows, sums)


def _training(backend: Backend, rows: list[Row], before: np.ndarray) -> Iterator[Check]:
    """One optimizer step on pairs of different answers."""
    pairs = [
        Row(prompt=r.prompt, responses=(r.responses[0], (*r.responses[0][:-1], r.responses[0][-1] ^ 1))) for r in rows
    ]
    backend.bind(INIT, None)
    base = _sums(backend, rows, INIT)
    backend.start_training(Optimizer())
    stats = backend.dpo_step(pairs, Dpo(0.1), 1e-3)
    off = abs(stats.loss - math.log(2))
    yield Check("the first loss is ln 2", off < 1e-3, f"{stats.loss:.6f} ({off:.1e} off)")
    yield Check("the gradient is not zero", 0 < stats.grad_norm < math.inf, f"norm {stats.grad_norm:.3g}")
    moved = float(np.abs(_sums(backend, rows, POLICY) - before).max())
    yield Check("a step moves the policy", moved > 0, f"{moved:.3g} nats")
    yield _close("a step leaves the base as it was", _sums(backend, rows, INIT), base, 0.0)
    yield _close("a step leaves previous as it was", _sums(backend, rows, PREVIOUS), before, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        trained = _sums(backend, rows, POLICY)
        backend.save(Path(folder) / "adapter")
        backend.bind(POLICY, Path(folder) / "adapter")
        yield _close("an adapter reloads as it was saved", _sums(backend, rows, POLICY), trained, 1e-6)
    backend.bind(POLICY, None)


def _sums(backend: Backend, rows: list[Row], role: str) -> np.ndarray:
    found = dict(backend.logprob(rows, role))
    return np.array([score.logp for i in range(len(rows)) for score in found[i]])


def _close(name: str, a: np.ndarray, b: np.ndarray, tolerance: float) -> Check:
    worst = float(np.abs(a - b).max())
    return Check(name, worst <= tolerance, f"largest difference {worst:.2g} nats")
