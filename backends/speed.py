"""How fast a device is at best: one matrix product and one copy, measured in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from spa_lite.backend import Backend
from spa_lite.effort import Speed

SIZES = {"cpu": (768, 2**24), "cuda": (6144, 2**27)}
"""Side of the squares, and numbers copied: more than caches hold, and little beside a model."""
OTHER = (2048, 2**26)
GOES = 5


def speed(backend: Backend) -> Speed | None:
    """FLOP/s and bytes/s (read and written) of a backend's device in its precision.

    None for a backend that has no such device, and where the device cannot do it, be it for want of memory.
    """
    used = backend.description
    device, dtype = str(used.get("device", "cpu")), str(used.get("dtype", "float32"))
    size, numbers = SIZES.get(device.partition(":")[0], OTHER)
    try:
        if backend.name == "torch":
            return rates(size, numbers, *torch_work(size, numbers, device, dtype))
        if backend.name == "mlx":
            return rates(size, numbers, *mlx_work(size, numbers, dtype))
    except (MemoryError, RuntimeError):
        pass
    return None


def rates(size: int, numbers: int, product: Callable[[], Any], copy: Callable[[], Any], width: int) -> Speed:
    """Of a product of squares, and of a copy of so many numbers of `width` bytes."""
    return Speed(2 * size**3 / least_seconds(product), 2 * width * numbers / least_seconds(copy))


def least_seconds(work: Callable[[], Any]) -> float:
    """The shortest of a few goes, behind one that does not count."""
    found = []
    for _ in range(GOES + 1):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return max(min(found[1:]), 1e-9)


def torch_work(size: int, numbers: int, device: str, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """A product and a copy that are done when they return, and the bytes of a number. Random: zeros are faster."""
    import torch

    made = {"device": device, "dtype": getattr(torch, dtype)}
    a, b = torch.rand(size, size, **made), torch.rand(size, size, **made)
    source, out = torch.rand(numbers, **made), torch.empty(size, size, **made)
    target = torch.zeros_like(source)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(torch.device(device).type, lambda: None)
    return (
        lambda: (torch.mm(a, b, out=out), wait()),
        lambda: (target.copy_(source), wait()),
        source.element_size(),
    )


def mlx_work(size: int, numbers: int, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """The same in MLX, where a sum with one number makes the copy."""
    import mlx.core as mx

    a, b, source = (
        mx.random.uniform(shape=s).astype(getattr(mx, dtype)) for s in ((size, size), (size, size), (numbers,))
    )
    mx.eval(a, b, source)
    return lambda: mx.eval(a @ b), lambda: mx.eval(source + 1), source.itemsize
