"""An adapter at home: the backend that holds it, its check, and all that the forms of an export are made from."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.export_source import Source

if TYPE_CHECKING:
    from spa_lite.backend import Backend, ModelSettings
    from spa_lite.backends.adapter_files import Stored
    from spa_lite.exchange import CheckRow


@dataclass(frozen=True)
class Order:
    """What is to be written. `dtype`: of the weights, None for the form's own choice."""

    source: Source
    form: str
    dtype: str | None = None
    bits: int | None = None
    force: bool = False
    llama_cpp: Path | None = None


@dataclass(frozen=True)
class Home:
    """What the backend that the adapter is at home in has left: its check, and the adapter as PEFT holds it."""

    rows: list[CheckRow]
    stored: Stored
    model: Path
    settings: ModelSettings
    backend: str
    fingerprint: str
    dtype: str
    bits: int
    context: int
    tokenizer: Any
    stops: list[str]
    effect: float

    @property
    def precision(self) -> str:
        """The word by which differences are allowed."""
        return "4 bits" if self.bits < 16 else self.dtype


@contextmanager
def at_home(folder: Path, order: Order) -> Iterator[tuple[Backend, Home]]:
    """The backend with POLICY bound to the adapter, its check written into the folder."""
    import safetensors.numpy as safetensors

    from spa_lite import backends, exchange, prepare
    from spa_lite.backend import INIT, POLICY, Lora
    from spa_lite.backends import adapter_files, model_folder
    from spa_lite.cli.checks import check_adapter

    source = order.source
    settings = prepare.model_settings(source.recipe)
    backend = backends.load(source.recipe.inputs.backend, settings)
    if source.adapter:
        check_adapter(backend, source.adapter)
    backend.bind(POLICY, source.adapter, None if source.adapter else Lora(rank=1))  # one of no effect
    with tempfile.TemporaryDirectory() as saved:
        backend.save(Path(saved))
        stored = adapter_files.read(Path(saved), safetensors.load_file)
    rows = exchange.check_rows(backend)
    dtype, bits = str(backend.description["dtype"]), int(backend.description["bits"])
    exchange.write_check(folder, rows, backend.fingerprint, dtype, bits)
    yield (
        backend,
        Home(
            rows=rows,
            stored=dataclasses.replace(stored, name=source.what),
            model=model_folder.folder_of(settings.model),
            settings=settings,
            backend=backend.name,
            fingerprint=backend.fingerprint,
            dtype=dtype,
            bits=bits,
            context=backend.context,
            tokenizer=backend.tokenizer,
            stops=_stops(backend),
            effect=exchange.differ(backend, rows, INIT).mean,
        ),
    )


def _stops(backend: Backend) -> list[str]:
    """What ends an answer, as text."""
    tokenizer: Any = backend.tokenizer
    names: dict[int, str] = getattr(tokenizer, "control_tokens", {})
    return [names[i] for i in sorted(tokenizer.stop_ids) if i in names]
