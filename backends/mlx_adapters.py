"""Named LoRA adapters on one frozen base, in mlx-lm's own LoRA layers. A role is a switch between parameter trees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from spa_lite import keys
from spa_lite.backend import Lora
from spa_lite.backends import adapter_files
from spa_lite.backends.mlx_device import same_random_state
from spa_lite.backends.targets import ALL, choose_layers, is_named, short_names
from spa_lite.errors import ModelError

HEAD = "lm_head"
Tree = dict[str, mx.array]
"""An adapter's arrays by module and matrix: `M.lora_a` [inputs, rank] and `M.lora_b` [rank, outputs], float32."""


@dataclass
class Held:
    """One adapter: what PEFT says of it, the scale of each module, and its arrays."""

    config: dict[str, Any]
    scales: dict[str, float]
    tree: Tree


class Adapters:
    """The adapters on one base model, by internal name. `use(None)` is the bare base, bit for bit."""

    def __init__(self, model: Any, base_name: str) -> None:
        self.model, self.base_name = model, base_name
        self.held: dict[str, Held] = {}
        self._sites: dict[str, LoRALinear] = {}
        self._active: str | None = None
        self._made = 0

    def fresh(self, lora: Lora) -> str:
        """A new adapter of zero effect: A from the seed and the module's name, B = 0."""
        linear = linear_layers(self.model)
        chosen = choose_layers(linear, HEAD, lora.targets)
        tree: Tree = {}
        for module in chosen:
            outputs, inputs = size_of(linear[module])
            tree[f"{module}.lora_a"] = mx.array(keys.lora_a(lora.seed, module, lora.rank, inputs).T)
            tree[f"{module}.lora_b"] = mx.zeros((lora.rank, outputs))
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "target_modules": short_names(linear, chosen),
        }
        return self._add(config, tree)

    def load(self, folder: Path) -> str:
        """An adapter from a PEFT or mlx-lm folder, refused unless every tensor fits the base."""
        stored = adapter_files.read(folder, mx.load)
        adapter_files.check_plain(stored, "the mlx backend")
        tree: Tree = {}
        for module, (a, b) in adapter_files.modules(stored).items():
            tree[f"{module}.lora_a"], tree[f"{module}.lora_b"] = a.T, b.T
        self._check(tree, stored.config, folder)
        return self._add(stored.config, {key: array.astype(mx.float32) for key, array in tree.items()})

    def clone(self, source: str) -> str:
        """A frozen copy of an adapter."""
        held = self.held[source]
        return self._add(dict(held.config), {key: mx.array(array) for key, array in held.tree.items()})

    def save(self, name: str, folder: Path) -> None:
        """Write the adapter in PEFT format, float32. The same adapter gives the same bytes."""
        held = self.held[name]
        tensors = {peft_key(key): np.ascontiguousarray(np.array(array).T) for key, array in held.tree.items()}
        adapter_files.write_peft(folder, held.config, tensors, self.base_name)

    def drop(self, name: str) -> None:
        """Forget an adapter and free its memory."""
        del self.held[name]
        self.use(None)

    def use(self, name: str | None) -> None:
        """Switch the base to this adapter."""
        if name != self._active:
            self.place({} if name is None else self.held[name].scales, {} if name is None else self.held[name].tree)
            self._active = name

    def place(self, scales: Mapping[str, float], tree: Mapping[str, mx.array]) -> None:
        """Put these arrays (which may stand for others, in a function being differentiated) into the layers."""
        self._active = "unknown"
        for module, site in self._sites.items():
            if module in scales:
                site.scale, site.lora_a, site.lora_b = (
                    scales[module],
                    tree[f"{module}.lora_a"],
                    tree[f"{module}.lora_b"],
                )
            else:
                outputs, inputs = size_of(site.linear)
                site.scale, site.lora_a, site.lora_b = 0.0, mx.zeros((inputs, 1)), mx.zeros((1, outputs))

    def _add(self, config: dict[str, Any], tree: Tree) -> str:
        name = f"spa{self._made}"
        self._made += 1
        modules = _modules(tree)
        self._wrap(modules)
        scale = adapter_files.scale_of(config)
        # In one layout, wherever they come from: a transposed view takes another way through the matrix library, and
        # an adapter that was saved and loaded would round otherwise.
        whole = {key: mx.contiguous(array) for key, array in sorted(tree.items())}
        mx.eval(whole)
        self.held[name] = Held(config, dict.fromkeys(sorted(modules), scale), whole)
        return name

    def _wrap(self, modules: set[str]) -> None:
        """Give these linear layers a place for an adapter. The base was frozen before, so only that is trainable."""
        linear = linear_layers(self.model)
        with same_random_state():
            new = {
                module: LoRALinear.from_base(linear[module], r=1, scale=0.0)
                for module in sorted(modules - self._sites.keys())
            }
        if new:
            self.model.update_modules(tree_unflatten(list(new.items())))
            self.model.eval()
            self._sites |= new
            self.place({}, {})

    def _check(self, tree: Tree, config: Mapping[str, Any], folder: Path) -> None:
        linear = linear_layers(self.model)
        modules = [m for m in linear if _targeted(m, config)] if _is_plain(config) else linear.keys() & _modules(tree)
        wanted = {f"{module}.{side}" for module in modules for side in ("lora_a", "lora_b")}
        for key in sorted(tree.keys() ^ wanted):
            where = "target_modules does not name it" if key in tree else "it is not in the file"
            where = "the base has no place for it" if key.rpartition(".")[0] not in linear else where
            raise ModelError(f"adapter {folder} does not fit {self.base_name}: tensor {peft_key(key)}: {where}")
        rank = config.get("r", 8)
        for key, array in tree.items():
            outputs, inputs = size_of(linear[key.rpartition(".")[0]])
            fits = [inputs, rank] if key.endswith("lora_a") else [rank, outputs]
            if list(array.shape) != fits:
                shapes = f"{list(array.T.shape)} where the base needs {fits[::-1]}"
                raise ModelError(f"adapter {folder} does not fit {self.base_name}: tensor {peft_key(key)} is {shapes}")


def peft_key(key: str) -> str:
    """The name that an array of a tree has in a PEFT file."""
    return adapter_files.PREFIX + key.replace(".lora_a", ".lora_A.weight").replace(".lora_b", ".lora_B.weight")


def linear_layers(model: Any) -> dict[str, Any]:
    """All linear layers by name, the output head too where it is one."""
    return {
        name: module
        for name, module in sorted(_bare_modules(model), key=lambda found: found[0])
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }


def size_of(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, quantised or not."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs


def _bare_modules(model: Any) -> list[tuple[str, Any]]:
    """Modules as the base names them: a LoRA layer stands for the one it wraps, its own parts are left out."""
    found = dict(model.named_modules())
    wrapped = {name for name, module in found.items() if isinstance(module, LoRALinear)}
    return [
        (name, module.linear if name in wrapped else module)
        for name, module in found.items()
        if name.rpartition(".")[0] not in wrapped
    ]


def _modules(keys: Iterable[str]) -> set[str]:
    """The modules that some keys of a tree belong to."""
    return {key.rpartition(".")[0] for key in keys}


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether target_modules alone says what is adapted, and not also PEFT's rules on layers: then the file says it."""
    some_layers = config.get("layers_to_transform") not in (None, [])
    return bool(config.get("target_modules")) and not some_layers and not config.get("exclude_modules")


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt this module, by target_modules alone."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        return module != HEAD if targets == ALL else re.fullmatch(targets, module) is not None
    return any(is_named(module, target) for target in targets)
