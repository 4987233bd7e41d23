"""A model named as on the hub, found in the hub's cache on this machine: the same on every backend, and no network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spa_lite import backends
from spa_lite.backend import ModelSettings
from tests.tiny import make_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub_name() -> Iterator[tuple[str, Path]]:
    """A tiny model in the cache's layout, and the folder it was copied from."""
    pytest.importorskip("torch", reason="tiny models are made with PyTorch")
    constants = pytest.importorskip("huggingface_hub.constants")
    place = Path(constants.HF_HUB_CACHE) / "models--somebody--tiny"
    folder = make_model(place / "blobs" / "made")
    shutil.copytree(folder, place / "snapshots" / REVISION)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(REVISION)
    yield "somebody/tiny", folder
    shutil.rmtree(place)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_hub_name_is_the_model_in_the_cache(backend: str, hub_name: tuple[str, Path]) -> None:
    if backends.missing(backend):
        pytest.skip(f"{backend} is not installed")
    name, folder = hub_name
    found = backends.load(backend, ModelSettings(name, device="cpu"))
    assert found.fingerprint == backends.load(backend, ModelSettings(str(folder), device="cpu")).fingerprint
