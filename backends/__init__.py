"""Where a model lives. One module per framework; none is imported before it is asked for.

A new backend is one file here, one row in `TABLE`, and one extra in pyproject.toml. A backend outside this
package needs none of that: pass "module:Class" as its name.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spa_lite.backend import GGUF, Backend, ModelSettings
from spa_lite.errors import BackendError, BackendMissing

if TYPE_CHECKING:
    from spa_lite.judges.reward import Classifier


@dataclass(frozen=True)
class Entry:
    """One backend: where its class is, which libraries it needs and which extra brings them."""

    target: str
    needs: tuple[str, ...]
    extra: str | None
    trains: bool = True


THREADS = {"GOMP_SPINCOUNT": "1000"}
"""Set before a framework is imported, unless the user has: threads that wait for each other soon give up the core.

GNU OpenMP otherwise keeps them spinning, and one other busy program makes small models 30 times slower.
"""

TABLE = {
    "toy": Entry("spa_lite.backends.toy:ToyBackend", (), None),
    "torch": Entry("spa_lite.backends.torch:TorchBackend", ("torch", "transformers", "peft"), "torch"),
    "mlx": Entry("spa_lite.backends.mlx:MlxBackend", ("mlx", "mlx_lm", "transformers"), "mlx"),
    "llamacpp": Entry(
        "spa_lite.backends.llamacpp:LlamaCppBackend", ("llama_cpp", "gguf", "transformers"), "gguf", False
    ),
}
ONLY_SAMPLES = (
    "llama.cpp only samples and scores: train in torch or MLX, and use the GGUF to sample (--sampler gguf:FILE) "
    "with --rescore always"
)


def missing(name: str) -> tuple[str, ...]:
    """Libraries that the named backend needs and that are not installed. Imports none of them."""
    return tuple(library for library in TABLE[name].needs if importlib.util.find_spec(library) is None)


def choose(name: str | None = None, model: str | None = None) -> tuple[str, str]:
    """Which backend to use, and why, in a few words. A given name is kept as it is."""
    if name is not None and name != "auto":
        return name, "asked for"
    if model is not None and model.endswith(GGUF):
        return "llamacpp", "the model is a GGUF file"
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    first, second = ("mlx", "torch") if apple else ("torch", "mlx")
    machine = "Apple silicon" if apple else "no Apple silicon"
    if missing(first) and not missing(second):
        return second, f"{machine}, but {', '.join(missing(first))} is not installed"
    return first, machine if apple else f"{machine}: CUDA where there is one, else the CPU"


def check_trains(name: str | None, model: str | None = None) -> None:
    """Raise BackendError if the backend of this model cannot train: asked before any work is done."""
    found = TABLE.get(choose(name, model)[0])
    if found and not found.trains:
        raise BackendError(ONLY_SAMPLES)


def load(name: str | None, settings: ModelSettings) -> Backend:
    """Import the named backend (a row of `TABLE`, or "module:Class"; None: as `choose` says) and give it its model."""
    name, _ = choose(name, settings.model)
    target = ready(name)
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendMissing(f"backend {name!r} cannot be imported from {target}: {error}") from error
    backend: Backend = found(settings)
    return backend


def load_classifier(name: str, device: str = "auto", trust_remote_code: bool = False) -> Classifier:
    """A reward model or an encoder of pairs, by folder or hub name; PyTorch is imported only here."""
    from spa_lite.backends import classifiers

    return classifiers.load(name, device, trust_remote_code)


def ready(name: str) -> str:
    """Where the class of the named backend is, as module:Class, once its libraries can be imported."""
    target = name if ":" in name else _row(name).target
    for variable, value in THREADS.items():
        os.environ.setdefault(variable, value)
    return target


def _row(name: str) -> Entry:
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=1, cutoff=0.0)[0]
        known = ", ".join(sorted(TABLE))
        raise BackendError(f"there is no backend {name!r} (nearest: {near!r}; known: {known}; or pass 'module:Class')")
    lacking = missing(name)
    if lacking:
        mend = f"pip install 'spa-lite[{TABLE[name].extra}]'"
        raise BackendMissing(f"backend {name!r} needs {', '.join(lacking)}, not installed here: {mend}")
    return TABLE[name]
