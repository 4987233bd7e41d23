"""What `spa-lite doctor` can only find out on the machine itself: whether Metal computes what the CPU does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from spa_lite.backend import POLICY, Backend, Floats, Lora, Optimizer, Sampling
from spa_lite.backends.mlx_device import SLOW_BLAS, advice, gigaflops
from spa_lite.backends.mlx_model import Net
from spa_lite.backends.mlx_sampling import PREFILL
from spa_lite.keys import sample_key
from spa_lite.objective import Dpo
from spa_lite.preflight import PROMPTS, TOLERANCE
from spa_lite.records import Ids, Message, Row

Finding = tuple[str, bool | None, str]
PATIENCE = 2.0
"""Seconds a layer may take for the longest piece of a prompt: a GPU that also drives a screen stops long kernels."""


@dataclass(frozen=True)
class Seen:
    """What one device makes of the same few prompts, answers and training step."""

    sums: Floats
    texts: list[Ids]
    loss: float
    grad_norm: float


def checks(backend: Backend, net: Net) -> Iterator[Finding]:
    """All checks for this machine; where there is no Apple GPU they say that they were not tried."""
    if mx.default_device() == mx.cpu:
        slow = advice()
        seen = slow[0] if slow else f"{gigaflops():.0f} GFLOP/s in float32 (slow would be under {SLOW_BLAS:.0f})"
        yield "the CPU's matrix library", None if slow else True, seen
    if not mx.metal.is_available():
        yield "Metal agrees with the CPU", None, "not tried: there is no Apple GPU here; run doctor on the Mac"
        yield "Metal keeps within time and memory", None, "not tried: there is no Apple GPU here; run doctor on the Mac"
        return
    yield from agreement(backend, mx.cpu, mx.gpu)
    yield longest(net)
    memory = int(mx.device_info().get("max_recommended_working_set_size", 0))
    peak = mx.get_peak_memory()
    yield "memory", peak < memory, f"peak {peak / 2**30:.1f} GiB of the {memory / 2**30:.1f} GiB that the GPU may use"


def agreement(backend: Backend, first: mx.Device, second: mx.Device) -> Iterator[Finding]:
    """The same work on two devices: log-probs, sampled texts, and one training step."""
    a, b = (_on(device, backend) for device in (first, second))
    tolerance = TOLERANCE.get(str(backend.description["dtype"]), 0.5)
    off = float(np.abs(a.sums - b.sums).max())
    yield "log-probs are the same on both devices", off <= tolerance, f"largest difference {off:.2g} nats"
    same = sum(x == y for x, y in zip(a.texts, b.texts, strict=True))
    wanted = 0.9 if tolerance < 0.1 else 0.5
    yield "sampled texts are the same on both devices", same >= wanted * len(a.texts), f"{same} of {len(a.texts)} equal"
    apart = abs(a.grad_norm - b.grad_norm) / max(a.grad_norm, 1e-12)
    close = apart <= (1e-3 if tolerance < 0.1 else 0.2) and abs(a.loss - b.loss) <= tolerance
    yield (
        "a training step is the same on both devices",
        close,
        f"losses {a.loss:.6f} and {b.loss:.6f}, gradients {apart:.2g} apart",
    )


def longest(net: Net) -> Finding:
    """How long a layer works on the largest piece of a prompt, the second time."""
    ids = mx.zeros((1, min(PREFILL, net.context)), mx.int32)
    for _ in range(2):
        start = time.perf_counter()
        mx.eval(net.hidden(ids))
        seconds = time.perf_counter() - start
    layer = seconds / max(1, len(net.model.layers))
    return "the longest kernels end in time", layer < PATIENCE, f"{ids.shape[1]} tokens in {layer:.3f} s per layer"


def _on(device: mx.Device, backend: Backend) -> Seen:
    """Do it all on one device, with a throw-away adapter."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        prompts = [backend.tokenizer.encode_prompt([Message(role="user", content=text)]) for text in PROMPTS]
        keys = [[sample_key(0, 0, text, k) for k in range(4)] for text in PROMPTS]
        backend.bind(POLICY, None, Lora(rank=4, alpha=8.0))
        backend.snapshot()
        drawn = dict(backend.sample(prompts, 4, Sampling(temperature=1.0, max_tokens=8), keys))
        fixed = tuple(prompts[-1][:8])
        rows = [Row(prompt=prompt, responses=(fixed, fixed[::-1])) for prompt in prompts]
        scored = dict(backend.logprob(rows, POLICY))
        backend.start_training(Optimizer())
        backend.dpo_step(rows, Dpo(0.1), 1e-3)
        stats = backend.dpo_step(rows, Dpo(0.1), 1e-3)
        backend.bind(POLICY)
    finally:
        mx.set_default_device(before)
    return Seen(
        sums=np.array([score.logp for i in range(len(rows)) for score in scored[i]]),
        texts=[one.ids for i in range(len(prompts)) for one in drawn[i]],
        loss=stats.loss,
        grad_norm=stats.grad_norm,
    )
