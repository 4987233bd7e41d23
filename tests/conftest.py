"""What holds for every test: no network, no writing into the user's caches, few threads, no GPU where there is none."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from typing import Any

import hypothesis
import pytest

# The same examples every time, and no clock: a busy machine is no failure.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")

CACHES = tempfile.mkdtemp(prefix="spa-lite-tests-")

# Before any framework is imported, and inherited by the programs that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=CACHES,
    XDG_CACHE_HOME=CACHES,
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a thread that waits should not keep a core
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # several small processes: more threads only wait for each other


os.fsync = lambda fd: None
"""Waiting for a disk takes milliseconds, hundreds of times; programs that tests start do wait."""


def pytest_unconfigure() -> None:
    """Remove the caches of this session."""
    shutil.rmtree(CACHES, ignore_errors=True)
    opened = sys.modules.get("llama_cpp._utils")  # it leaves /dev/null open, which is a warning at the end
    for name in ("outnull_file", "errnull_file") if opened else ():
        getattr(opened, name).close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch", reason="gpu: PyTorch is not installed")
        if not torch.cuda.is_available():
            pytest.skip("gpu: no CUDA device here")


class NetworkTouched(AssertionError):
    """A test tried to leave its process by a socket."""


def _is_loopback(host: object) -> bool:
    if host in ("localhost", "", None):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections and look-ups; tests marked `loopback` may reach this machine itself."""
    loopback = request.node.get_closest_marker("loopback") is not None

    def check(what: str, family: int, address: Any) -> None:
        if family == getattr(socket, "AF_UNIX", None):
            return
        host = address[0] if isinstance(address, tuple) else address
        if not (loopback and _is_loopback(host)):
            raise NetworkTouched(f"{what} {address!r}: tests use no network (a server of their own: mark `loopback`)")

    # Class attributes, so that sockets made by urllib, httpx, asyncio and ssl are covered too.
    for name in ("connect", "connect_ex", "sendto"):
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, *args: Any, _real: Any = real, _name: str = name) -> Any:
            check(_name, self.family, args[-1])
            return _real(self, *args)

        monkeypatch.setattr(socket.socket, name, guarded)

    real_lookup = socket.getaddrinfo

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        check("getaddrinfo", -1, (host,))
        return real_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
