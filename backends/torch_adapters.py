"""Named LoRA adapters on one frozen base, held by PEFT. A role is a switch between them, never a second model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from spa_lite import keys
from spa_lite.backend import Lora
from spa_lite.backends import adapter_files
from spa_lite.backends.adapter_files import PREFIX, Stored, first_line
from spa_lite.backends.quiet import quiet
from spa_lite.backends.targets import choose_layers, short_names
from spa_lite.backends.torch_lora import make_lean
from spa_lite.errors import ModelError


class Adapters:
    """The adapters on one base model, by internal name. `use(None)` is the bare base."""

    def __init__(self, model: nn.Module, base_name: str) -> None:
        self.model = model
        self.base_name = base_name
        self.peft: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []
        self._active: str | None = None
        self._made = 0
        self._trained: str | None = None
        model.requires_grad_(False)

    def fresh(self, lora: Lora) -> str:
        """A new adapter of zero effect: A from the seed and the module's name, B = 0."""
        chosen = linear_layers(self.model, lora.targets)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT means a number
            lora_dropout=0.0,
            target_modules=short_names([name for name, _ in _bare_modules(self.model)], chosen),
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in chosen.values()),
            task_type="CAUSAL_LM",
        )
        name = self._add(config)
        with torch.no_grad():
            for key, tensor in self.tensors(name).items():
                module, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
                if matrix == "lora_A":
                    tensor.copy_(torch.from_numpy(keys.lora_a(lora.seed, module, *tensor.shape)))
                else:
                    tensor.zero_()
        return name

    def load(self, folder: Path) -> str:
        """An adapter from a folder of PEFT or mlx-lm, refused unless every tensor fits the base."""
        stored = adapter_files.read(folder, load_file)
        name = self._add(lora_config(stored), folder)
        try:
            self._fill(name, stored.tensors, folder)
        except ModelError:
            self.drop(name)
            raise
        return name

    def clone(self, source: str) -> str:
        """A frozen copy of an adapter."""
        assert self.peft is not None
        name = self._add(copy.deepcopy(self.peft.peft_config[source]))
        theirs = self.tensors(source)
        with torch.no_grad():
            for key, tensor in self.tensors(name).items():
                tensor.copy_(theirs[key])
        return name

    def save(self, name: str, folder: Path) -> None:
        """Write the adapter in PEFT format, float32. The same adapter gives the same bytes."""
        assert self.peft is not None
        tensors = {key: tensor.detach().float().cpu().numpy() for key, tensor in self.tensors(name).items()}
        adapter_files.write_peft(folder, self.peft.peft_config[name].to_dict(), tensors, self.base_name)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names they have in a PEFT file, sorted."""
        assert self.peft is not None
        found = {}
        for path, parameter in self.peft.named_parameters():
            parts = path.split(".")
            if name in parts:
                parts.remove(name)
                key = ".".join(parts)
                # PEFT keeps this one (DoRA) in a module but writes it without the module's ".weight"
                found[key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key] = parameter
        return dict(sorted(found.items()))

    def use(self, name: str | None) -> None:
        """Switch the base to this adapter.

        PEFT's own `set_adapter` also flips `requires_grad`, which would cut a graph built under another
        role; so the two fields that its layers read are set directly.
        """
        if name == self._active:
            return
        for layer in self._layers:
            layer._disable_adapters = name is None
            layer._active_adapter = [name] if name is not None else []
        self._active = name

    def train_only(self, name: str | None) -> list[nn.Parameter]:
        """Give gradients to this adapter's parameters and to nothing else; return them in order of name."""
        self._trained = name
        self.model.requires_grad_(False)
        parameters = list(self.tensors(name).values()) if name is not None else []
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def drop(self, name: str) -> None:
        """Remove an adapter and free its memory."""
        assert self.peft is not None
        with quiet():
            self.peft.delete_adapter(name)
        self._settle(None if name == self._trained else self._trained)

    def _add(self, config: LoraConfig, folder: Path | None = None) -> str:
        name = f"spa{self._made}"
        self._made += 1
        try:
            with quiet(), torch.random.fork_rng():
                if self.peft is None:
                    self.peft = get_peft_model(self.model, config, adapter_name=name)  # type: ignore[arg-type,assignment]
                else:
                    self.peft.add_adapter(name, config)
        except (ValueError, RuntimeError, TypeError) as error:
            origin = f"adapter {folder}" if folder else f"an adapter on {', '.join(config.target_modules or ())}"
            raise ModelError(f"{origin} does not fit {self.base_name}: {first_line(error)}") from error
        for parameter in self.tensors(name).values():
            parameter.data = parameter.data.float()
        self._settle(self._trained)
        return name

    def _settle(self, trained: str | None) -> None:
        """After PEFT has changed something: find its layers again, and undo what it did to roles and gradients."""
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            make_lean(layer)
        self._active = "unknown"
        self.use(None)
        self.train_only(trained)
        self.model.eval()

    def _fill(self, name: str, stored: Mapping[str, torch.Tensor], folder: Path) -> None:
        mine = self.tensors(name)
        for key in [*(stored.keys() - mine.keys()), *(mine.keys() - stored.keys())]:
            where = "the base has no place for it" if key in stored else "it is not in the file"
            raise ModelError(f"adapter {folder} does not fit {self.base_name}: tensor {key}: {where}")
        for key, tensor in mine.items():
            if tensor.shape != stored[key].shape:
                shapes = f"{list(stored[key].shape)} where the base needs {list(tensor.shape)}"
                raise ModelError(f"adapter {folder} does not fit {self.base_name}: tensor {key} is {shapes}")
        with torch.no_grad():
            for key, tensor in mine.items():
                tensor.copy_(stored[key])


def linear_layers(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers that the targets name, by name."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {name: module for name, module in _bare_modules(model) if _is_linear(module)}
    head = next((name for name, module in linear.items() if module is output), None)
    return {name: linear[name] for name in choose_layers(linear, head, targets)}


def lora_config(stored: Stored) -> LoraConfig:
    """PEFT's configuration of a stored adapter, dropout off. Fields of a later PEFT are left out, as PEFT does."""
    fields = {name: value for name, value in stored.config.items() if name != "runtime_config"}
    try:
        with quiet():
            config: LoraConfig = LoraConfig.from_peft_type(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ModelError(f"the configuration of {stored.name} cannot be used: {first_line(error)}") from error
    config.lora_dropout, config.inference_mode, config.init_lora_weights = 0.0, False, True
    return config


def _bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules as the base names them: PEFT's wrapper stands for the layer it wraps, its own parts are left out."""
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name + ".")
            yield name, module.get_base_layer()
        else:
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
