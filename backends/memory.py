"""Memory as the frameworks and the machine tell of it: whether an error means that it ran out, and how much is free."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

PHRASES = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # PyTorch on the CPU
    "not enough memory",  # the same, on other systems
    "ALLOC_FAILED",  # CUDA's libraries
    "[malloc] Unable to allocate",  # MLX on the CPU
    "[metal::malloc]",  # MLX: a buffer that is too large, or too many of them
    "OutOfMemory",  # MLX: a GPU command that failed
)
"""What frameworks say in a RuntimeError when memory runs out."""
CGROUP = Path("/sys/fs/cgroup")


def ran_out(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, PyTorch or MLX means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def free() -> int:
    """Bytes of main memory that this process may still take: the machine's, or its container's if that has fewer."""
    return min([int(psutil.virtual_memory().available), *_container()])


def peak() -> int:
    """The most main memory that this process has held, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Let `peak` count from now on, where the system can: Linux, through this process's own entry."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _container() -> list[int]:
    """What a Linux container's limit leaves, in bytes; nothing where there is no limit."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # The page cache counts as used there, though it is given up when memory is short.
        return [] if limit == "max" else [max(0, int(limit) - int(used) + int(counts.get("inactive_file", 0)))]
    except (OSError, ValueError):
        return []
