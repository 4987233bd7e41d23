"""The contract suite on every backend. `SPA_LITE_BACKENDS=toy,torch` chooses; the default is all that are installed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite import backends
from spa_lite.backend import ModelSettings
from spa_lite.errors import BackendError, BackendMissing
from tests.contract import Bookkeeping, Numerics, Subject
from tests.tiny import ARCHITECTURES, NARROW, VOCABULARY, make_adapter, make_gguf, make_model

ASKED = os.environ.get("SPA_LITE_BACKENDS")
INSTALLED = [name for name in backends.TABLE if not backends.missing(name)]
CHOSEN = [name.strip() for name in ASKED.split(",")] if ASKED else INSTALLED
MLX_SHAPES = ("llama3", "qwen2", "mistral-full", "gemma2-full", "phi3", "smollm2", "qwen3")
GGUF_SHAPES = ("llama", "llama3", "smollm2")
MODELS = {"toy": ("bigram",), "torch": ARCHITECTURES, "mlx": MLX_SHAPES, "llamacpp": GGUF_SHAPES}
MARKS = {"llamacpp": (pytest.mark.gguf,)}
CASES = [(name, model) for name in {**backends.TABLE, **dict.fromkeys(CHOSEN)} for model in MODELS.get(name, ("?",))]
ran: set[str] = set()


def torch_base(backend: Any) -> bytes:
    """Digest of all weights but the adapters'."""
    digest = hashlib.sha256()
    for name, parameter in backend.net.model.named_parameters():
        if "lora_" not in name:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.digest()


def mlx_base(backend: Any) -> bytes:
    """Digest of all weights but the adapters'."""
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    for name, array in tree_flatten(backend.net.model.parameters()):
        if "lora_" not in name:
            digest.update(np.array(array).tobytes())
    return digest.digest()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Numerics on every model, bookkeeping on the first model of each backend."""
    if "subject" in metafunc.fixturenames:
        first = dict(reversed(CASES))
        cases = CASES if metafunc.cls is TestNumerics else list(first.items())[::-1]
        marked = [pytest.param(case, marks=MARKS.get(case[0], ()), id="-".join(case)) for case in cases]
        metafunc.parametrize("subject", marked, indirect=True, scope="session")


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """One backend and one of its models."""
    name, model = request.param
    if name not in CHOSEN:
        pytest.skip(f"{name} is not in SPA_LITE_BACKENDS" if ASKED else f"{name} is not installed")
    if name not in backends.TABLE:
        pytest.fail(f"SPA_LITE_BACKENDS names {name}, which is not in the table")
    if backends.missing(name):
        pytest.fail(f"SPA_LITE_BACKENDS names {name}, but {', '.join(backends.missing(name))} cannot be imported")
    ran.add(name)
    if name == "toy":
        yield Subject(
            "toy", "toy", lambda: "toy:7", 261, rate=0.05, base_bytes=lambda it: it.base.tobytes(), tolerance=1e-9
        )
        return
    folder = tmp_path_factory.mktemp(model)
    if name == "llamacpp":
        yield Subject(
            f"{name}-{model}",
            name,
            lambda: str(make_gguf(folder, model)),
            VOCABULARY,
            rate=0.0,
            base_bytes=lambda _: b"",
            adapter=lambda: make_adapter(folder, folder / "adapter"),
        )
        return
    import torch

    torch.set_num_threads(1)  # for matrices this small a second thread only waits
    changes: dict[str, Any] = {"torch": {}, "mlx": NARROW}[name]

    def tiny() -> str:
        return str(make_model(Path(folder), model, **changes))

    base = {"torch": torch_base, "mlx": mlx_base}[name]
    yield Subject(f"{name}-{model}", name, tiny, VOCABULARY, rate=1e-2, base_bytes=base)


@pytest.fixture
def training(subject: Subject) -> None:
    """Skip what trains for a backend that cannot."""
    if subject.adapter is not None:
        pytest.skip(f"{subject.backend} cannot train")


class TestNumerics(Numerics):
    """Every backend, every model."""


class TestBookkeeping(Bookkeeping):
    """Every backend, one model."""


def test_each_chosen_backend_was_tested(request: pytest.FixtureRequest) -> None:
    """A backend that silently drops out of the suite would look healthy."""
    selected = {item.name for item in request.session.items if item.nodeid.endswith("]") and "::Test" in item.nodeid}
    if not selected:
        pytest.skip("no contract test was selected in this run")
    assert set(CHOSEN) <= ran


def test_the_table_names_what_exists() -> None:
    for name, entry in backends.TABLE.items():
        module = entry.target.partition(":")[0].rpartition(".")[2]
        assert (Path(backends.__file__).parent / f"{module}.py").is_file(), name


def test_a_choice_says_why() -> None:
    assert backends.choose("toy") == ("toy", "asked for")
    name, why = backends.choose(None)
    assert name in ("torch", "mlx")
    assert why
    assert backends.choose("auto") == (name, why)


def test_a_name_that_ends_with_gguf_chooses_the_backend() -> None:
    assert backends.choose(None, "x/model.gguf") == ("llamacpp", "the model is a GGUF file")
    assert backends.choose("auto", "model.gguf")[0] == "llamacpp"
    assert backends.choose("torch", "model.gguf") == ("torch", "asked for")
    assert backends.choose(None, "gguf-model")[0] != "llamacpp"


def test_an_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(BackendError, match=r"'torhc'.*'torch'"):
        backends.load("torhc", ModelSettings("toy"))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = backends.Entry("spa_lite.backends.torch:TorchBackend", ("no_such_library",), "torch")
    monkeypatch.setitem(backends.TABLE, "torch", entry)
    with pytest.raises(BackendMissing, match=r"no_such_library.*pip install 'spa-lite\[torch\]'"):
        backends.load("torch", ModelSettings("toy"))


def test_a_backend_may_come_from_outside() -> None:
    backend = backends.load("spa_lite.backends.toy:ToyBackend", ModelSettings("toy"))
    assert backend.name == "toy"
    for target in ("no_such_module:Thing", "spa_lite.backends.toy:Nothing"):
        with pytest.raises(BackendMissing, match="cannot be imported"):
            backends.load(target, ModelSettings("toy"))
