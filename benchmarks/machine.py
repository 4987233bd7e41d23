"""The machine: its clocks and gauges, what it can do at best, and what is installed on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    "spa-lite",
    "torch",
    "transformers",
    "peft",
    "trl",
    "mlx",
    "mlx-lm",
    "mlx-lm-lora",
    "llama-cpp-python",
    "numpy",
)


# --- clocks and gauges ---------------------------------------------------------------------------------------------


def now(device: str) -> float:
    """Seconds: of processor time, or of the clock once a GPU has done all it was asked for."""
    if device == "cpu":
        return time.process_time()
    at_rest(device)
    return time.perf_counter()


def at_rest(device: str) -> None:
    """Wait for a GPU: `cuda` is PyTorch's, `gpu` is MLX's."""
    if device == "gpu":
        import mlx.core as mx

        mx.synchronize()
    else:
        import torch

        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """How long one go takes."""
    begun = now(device)
    work()
    return now(device) - begun


def gauges(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """What reads the bytes in use, and the most so far, which starts here."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    if device == "gpu":
        import mlx.core as mx

        mx.reset_peak_memory()
        return mx.get_active_memory, mx.get_peak_memory
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the largest resident set so far
    return lambda: resident("VmRSS"), lambda: resident("VmHWM")


def resident(line: str) -> int:
    """Bytes, from a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"{line}:\s+(\d+) kB", status)[0]) * 1024


@contextmanager
def operations() -> Iterator[list[int]]:
    """Counts what PyTorch is asked to do inside the block, in this thread; into a list of one number."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    known = dict(flop_registry)  # which lacks the attention of the CPU
    known[aten._scaled_dot_product_flash_attention_for_cpu] = known[aten._scaled_dot_product_flash_attention]
    known[aten._scaled_dot_product_flash_attention_for_cpu_backward] = known[
        aten._scaled_dot_product_flash_attention_backward
    ]
    total = [0]

    @cache
    def composite(func: Any) -> bool:  # inside inference mode some operations arrive whole
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))

    class Counter(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count = known.get(func._overloadpacket)
            if count is None and composite(func):
                with self:
                    return func.decompose(*args, **kwargs or {})
            made = func(*args, **kwargs or {})
            total[0] += count(*args, **kwargs or {}, out_val=made) if count else 0
            return made

    with Counter():
        yield total


# --- at best -------------------------------------------------------------------------------------------------------


def ceiling(framework: str, device: str, dtype: str, quick: bool = False) -> dict[str, float]:
    """Operations per second of a matrix product, and bytes per second of a copy (read and written): best of five."""
    size, numbers = (256, 2**20) if quick else (1536, 2**26) if device == "cpu" else (8192, 2**30)
    product, copy = (mlx_probes if framework == "mlx" else torch_probes)(size, numbers, device, dtype)
    width = 4 if dtype == "float32" else 2
    return {"flops": 2 * size**3 / best(product, device), "bytes": 2 * width * numbers / best(copy, device)}


def best(work: Callable[[], Any], device: str) -> float:
    """The least seconds of five goes, after one that does not count."""
    return max(min([seconds_of(work, device) for _ in range(6)][1:]), 1e-9)


def torch_probes(size: int, numbers: int, device: str, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A product of two squares, and a copy."""
    import torch

    kind = {"dtype": getattr(torch, dtype), "device": device}
    a, b = torch.rand(size, size, **kind), torch.rand(size, size, **kind)
    source, target, out = torch.rand(numbers, **kind), torch.zeros(numbers, **kind), torch.empty(size, size, **kind)
    return lambda: torch.mm(a, b, out=out), lambda: target.copy_(source)


def mlx_probes(size: int, numbers: int, device: str, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same in MLX."""
    import mlx.core as mx

    kind = getattr(mx, dtype)
    a, b, source = (mx.random.uniform(shape=shape).astype(kind) for shape in ((size, size), (size, size), (numbers,)))
    mx.eval(a, b, source)
    return lambda: mx.eval(a @ b), lambda: mx.eval(source + 1)


# --- what it is ----------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """What the work ran on, in words."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    if device == "gpu":
        import mlx.core as mx

        return str(mx.device_info().get("device_name", platform.machine()))
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, of which one was used"


def versions() -> dict[str, str]:
    """Of Python and of every library that may matter, as far as it is installed."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES if installed(name)}
    return {"python": platform.python_version()} | found


def installed(package: str) -> bool:
    """Whether a package is there, by the name of its distribution."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
