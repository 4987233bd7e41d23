"""Named LoRA adapters on one GGUF base. They can be read and applied, not made or trained."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api

from spa_lite.backend import Lora
from spa_lite.backends import ONLY_SAMPLES, adapter_files, llamacpp_model
from spa_lite.backends.gguf_header import Header, read_header
from spa_lite.backends.gguf_lora import ARCHITECTURE, write_lora
from spa_lite.backends.llamacpp_model import Handle, Net
from spa_lite.errors import BackendError, ModelError

FILE = "adapter.gguf"
"""What a GGUF adapter is called in a folder of its own."""
FRESH = "fresh"
"""The adapter of zero effect is the bare base: nothing here can move it."""


@dataclass(frozen=True)
class Held:
    """One adapter in memory."""

    handle: Handle | None
    parameters: int


class Adapters:
    """The adapters on one base model, by internal name. `use(None)` is the bare base, bit for bit."""

    def __init__(self, net: Net, base_name: str) -> None:
        self.net, self.base_name = net, base_name
        self.held: dict[str, Held] = {}
        self.active: Handle | None = None
        self._made = 0

    def fresh(self, lora: Lora) -> str:
        """An adapter of zero effect. Its shape means nothing here."""
        return self._add(Held(None, 0))

    def load(self, folder: Path) -> str:
        """An adapter from a GGUF file, from a folder with one, or from PEFT's or mlx-lm's files, put into a GGUF file
        for the moment. Refused unless every tensor fits the base."""
        file = folder / FILE if folder.is_dir() else folder
        if file.is_file():
            return self._open(file, folder)
        if self.net.header.architecture != ARCHITECTURE:
            raise ModelError(
                f"{folder} cannot be put on a {self.net.header.architecture} in GGUF: only Llama's layers are known"
            )
        stored = adapter_files.read(folder, _numpy)
        with tempfile.TemporaryDirectory(prefix="spa-lite-") as made:
            write_lora(stored, self.net.header.config, Path(made) / FILE)
            return self._open(Path(made) / FILE, folder)

    def clone(self, source: str) -> str:
        """A frozen copy: the same, since nothing here changes an adapter."""
        return self._add(self.held[source])

    def save(self, name: str, folder: Path) -> None:
        """Refused: nothing was trained."""
        raise BackendError(ONLY_SAMPLES)

    def drop(self, name: str) -> None:
        """Forget an adapter. Its memory is free once no context uses it."""
        del self.held[name]
        self.active = None

    def use(self, name: str | None) -> None:
        """The adapter of contexts that are made from now on."""
        self.active = None if name is None else self.held[name].handle

    def _open(self, file: Path, folder: Path) -> str:
        header = read_header(file)
        check_fits(header, self.net.header, f"adapter {folder}", self.base_name)
        llamacpp_model.said.clear()
        pointer = api.llama_adapter_lora_init(self.net.model.pointer, os.fsencode(file))
        if not pointer:
            raise ModelError(f"adapter {folder} does not fit {self.base_name}: {llamacpp_model.reason()}")
        size = sum(a * b for a, b in (tensor.shape for tensor in header.tensors.values()))
        return self._add(Held(Handle(pointer, api.llama_adapter_lora_free, self.net.model), size))

    def _add(self, held: Held) -> str:
        name = f"spa{self._made}"
        self._made += 1
        self.held[name] = held
        return name


def check_fits(adapter: Header, base: Header, name: str, base_name: str) -> None:
    """Raise ModelError unless a GGUF file is a LoRA adapter whose every matrix fits one of the base."""
    if adapter.values.get("general.type") != "adapter" or adapter.values.get("adapter.type") != "lora":
        raise ModelError(f"{name} is no LoRA adapter: give a model as --model")
    if adapter.architecture != base.architecture:
        raise ModelError(f"{name} is for a {adapter.architecture}, and {base_name} is a {base.architecture}")
    if not adapter.tensors:
        raise ModelError(f"{name} holds no tensor at all: write it again")
    for key, tensor in adapter.tensors.items():
        of, _, side = key.rpartition(".lora_")
        if of not in base.tensors or side not in ("a", "b") or len(tensor.shape) != 2:
            raise ModelError(f"{name} does not fit {base_name}: tensor {key}: the base has no place for it")
        outputs, inputs = base.tensors[of].shape[-2:]
        fits = tensor.shape[1] == inputs if side == "a" else tensor.shape[0] == outputs
        if not fits:
            there = f"[r, {inputs}]" if side == "a" else f"[{outputs}, r]"
            raise ModelError(
                f"{name} does not fit {base_name}: tensor {key} is {list(tensor.shape)} where the base needs {there}"
            )


def _numpy(path: Path) -> Mapping[str, Any]:
    """The tensors of a safetensors file. NumPy has no bfloat16, so that such ones are widened."""
    import safetensors

    with safetensors.safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
