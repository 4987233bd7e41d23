"""Which device MLX runs on, how much memory it may keep, and what can be checked only on the machine itself."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from spa_lite.backends import memory
from spa_lite.errors import BackendError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
SLOW_BLAS = 15.0
"""GFLOP/s in float32 under which the CPU's matrix library is the slow one (3 to 7); OpenBLAS gives 70 and more."""
OPENBLAS = "*/openblas-pthread/libopenblas.so.0"
"""Where, under /usr/lib, Debian and Ubuntu put the package libopenblas0-pthread."""


def pick_device(wanted: str) -> str:
    """cpu or gpu; auto is MLX's own choice, the GPU on Apple silicon. Sets it for this process."""
    if wanted not in ("auto", "cpu", "gpu"):
        raise BackendError(f"the mlx backend has no device {wanted!r}: use auto, cpu or gpu")
    if wanted == "gpu" and not mx.is_available(mx.gpu):
        raise BackendError("device 'gpu' is not here: this MLX sees no Apple GPU; use cpu")
    if wanted != "auto":
        mx.set_default_device(mx.gpu if wanted == "gpu" else mx.cpu)
    device = device_in_use()
    if device == "gpu" and mx.metal.is_available():
        _limit_memory()
    return device


def device_in_use() -> str:
    """cpu or gpu."""
    return "gpu" if mx.default_device() == mx.gpu else "cpu"


def _limit_memory() -> None:
    """On Apple silicon memory is shared with the screen and everything else: keep the weights in, hoard nothing.

    The wired limit keeps the model from being paged out: three quarters of what the system recommends, since others
    report that all of it can bring the machine down. Buffers kept for reuse get a tenth.
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        mx.set_cache_limit(int(recommended) // 10)
        try:
            mx.set_wired_limit(int(recommended) * 3 // 4)
        except (ValueError, RuntimeError):  # before macOS 15 there is no such limit
            return


def free_memory(device: str) -> int:
    """Bytes that may still be taken: on a GPU of what the system recommends, else of main memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size") if device == "gpu" else None
    return max(0, int(recommended) - int(mx.get_active_memory())) if recommended else memory.free()


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave MLX's random numbers as they were: its layers draw their first weights, though others take their place."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


@functools.cache
def gigaflops() -> float:
    """Speed of a float32 matrix product on the CPU, in GFLOP/s: the best of three, a few milliseconds."""
    a = mx.ones((384, 384), stream=mx.cpu)
    mx.eval(a)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(mx.matmul(a, a, stream=mx.cpu))
        best = max(best, 2 * 384**3 / (time.perf_counter() - start) / 1e9)
    return best


def advice() -> tuple[str, ...]:
    """What a user should know before a long run on this machine."""
    if sys.platform != "linux" or mx.default_device() != mx.cpu or gigaflops() > SLOW_BLAS:
        return ()
    found = sorted(Path("/usr/lib").glob(OPENBLAS))
    install = "" if found else "install OpenBLAS (apt install libopenblas0-pthread) and "
    library = found[0] if found else "PATH/libopenblas.so.0"
    return (
        f"MLX's matrix library on Linux is slow here ({gigaflops():.0f} GFLOP/s), OpenBLAS is many times faster: "
        f"{install}start as LD_PRELOAD={library} spa-lite ...",
    )
