"""A backend without its weights: what the plan of a run needs, known before anything is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.backend import Backend, ModelSettings
from spa_lite.backends import choose, load, ready
from spa_lite.errors import BackendError, ModelError
from spa_lite.shape import Shape, shape_of

if TYPE_CHECKING:
    from spa_lite.backends.model_folder import Known

LOADED_WHOLE = ("toy", "llamacpp")
"""Small enough, or read from the disk only as it is used, that its outline is the thing itself."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


def outline(name: str | None, settings: ModelSettings) -> Backend:
    """What `load` with the same arguments would give, without weights: every verb raises BackendError.

    `settings.model` is a folder, or a hub name in the cache, with a config.json; weights and tokenizer may be missing.
    Nothing is asked of the network. The toy, a GGUF file, and a backend given as "module:Class", are loaded.
    """
    name, _ = choose(name, settings.model)
    if name in LOADED_WHOLE or ":" in name:
        return load(name, settings)
    ready(name)
    return Outline(name, settings)


class Outline:
    """Name, tokenizer, limits, fingerprint and description of a backend, as the loaded one would give them."""

    can_train = True
    advice: tuple[str, ...] = ()

    def __init__(self, name: str, settings: ModelSettings) -> None:
        from spa_lite.backends.model_folder import at_hand

        self.name, self.settings, self.batching = name, settings, settings.batching
        self.folder: Path = at_hand(settings.model)
        self._known = _reader(name)(settings, self.folder)
        self.shape: Shape = shape_of(self._known.config)
        self.context, self.vocabulary = self._known.context, self.shape.vocabulary

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer and chat template. Raises ModelError if the folder holds none."""
        from transformers import AutoTokenizer

        from spa_lite.backends.chat import ChatTokenizer
        from spa_lite.backends.model_folder import fetch, offline
        from spa_lite.backends.quiet import quiet

        if not any(path for pattern in TOKENIZERS for path in self.folder.glob(pattern)):
            raise ModelError(
                f"{self.folder} holds no tokenizer, so no text can be counted: fetch its tokenizer files too"
            )
        extra = offline(self.settings)
        with quiet():
            found = fetch(str(self.folder), "tokenizer", lambda: AutoTokenizer.from_pretrained(self.folder, **extra))
        s = self.settings
        return ChatTokenizer(found, s.model, self._known.eos_ids, template=s.template, system=s.system)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer and template. Raises ModelError if the folder lacks any."""
        from spa_lite.backends.model_folder import digest_weights, fingerprint, weights_in

        if not weights_in(self.folder):
            raise ModelError(
                f"{self.folder} holds no weights, or not all, so there is no fingerprint: fetch them first"
            )
        return fingerprint(digest_weights(self.folder), self.tokenizer.fingerprint)

    @property
    def description(self) -> dict[str, Any]:
        """Device, dtype and bits that the loaded backend would have, and the size of the model."""
        return {
            "device": self._known.device,
            "dtype": self._known.dtype,
            "bits": self._known.bits,
            "architecture": self.shape.kind,
            "parameters": self.shape.parameters,
        }

    def free_memory(self) -> int | None:
        """Bytes that the backend might take, on its device."""
        return self._known.free_memory()

    def peak_memory(self, reset: bool = False) -> int | None:
        """Nothing was taken."""
        return None

    def machine_checks(self) -> Iterator[tuple[str, bool | None, str]]:
        """None: they need the model."""
        return iter(())

    def _refuse(self, *args: Any, **more: Any) -> Any:
        raise BackendError(f"{self.settings.model} was only outlined, without its weights: load the backend to use it")

    bind = sample = stream = logprob = start_training = dpo_step = activations = _refuse
    snapshot = save = restore = unbind = _refuse


def _reader(name: str) -> Callable[[ModelSettings, Path], Known]:
    """What reads a configuration as the named backend does."""
    if name == "torch":
        from spa_lite.backends.torch_model import known
    else:
        from spa_lite.backends.mlx_model import known
    return known
