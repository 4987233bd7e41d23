"""A model's folder, or its name on the hub: what is in it, before any framework reads the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from transformers import GenerationConfig

from spa_lite.backend import ModelSettings
from spa_lite.errors import ModelError, SpaError
from spa_lite.files import feed
from spa_lite.keys import digest
from spa_lite.sources import reachable

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
"""What is fetched from the hub: never pickles, and code only where it is trusted."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Known:
    """What the framework that would load a model says of it before it reads the weights."""

    config: dict[str, Any]  # as transformers reads it, with its defaults
    device: str
    dtype: str
    bits: int
    context: int
    eos_ids: frozenset[int]
    free_memory: Callable[[], int]  # bytes that may be taken on the device


def check_name(name: str) -> str:
    """A folder that is there and holds safetensors, or a name that can be one on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is no model folder: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ModelError(f"{path} holds no *.safetensors weights: convert them with `save_pretrained` first")
        return str(path)
    if path.is_file() and path.suffix == ".gguf":
        raise ModelError(f"{path} is a GGUF file: leave --backend out, or give --backend llamacpp")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model folder {name}")
    if isinstance(try_to_load_from_cache(name, "config.json"), str) or constants.HF_HUB_OFFLINE or reachable():
        return name
    # Left to itself the library would retry for half a minute.
    raise ModelError(f"{name} is no folder here, and the model hub cannot be reached; give --model a folder")


def at_hand(name: str) -> Path:
    """The folder of a model whose weights may be missing: itself, or the hub cache's. Asks nothing of the network."""
    path = Path(name).expanduser()
    cached = None if path.is_dir() or name.count("/") > 1 else try_to_load_from_cache(name, "config.json")
    folder = path if path.is_dir() else Path(cached).parent if isinstance(cached, str) else None
    if folder is None:
        raise ModelError(
            f"{name} is no folder here and not in the hub's cache; its config is enough for an estimate: "
            f"hf download {name} config.json"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    return folder


def weights_in(folder: Path) -> list[Path]:
    """The weight files of a model folder, or none if one of them is missing."""
    found = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        return found if named <= {path.name for path in found} else []
    return found


def fetch(name: str, what: str, read: Callable[[], Any]) -> Any:
    """Run one `from_pretrained`; whatever it raises becomes one sentence."""
    try:
        return read()
    except SpaError:
        raise
    except Exception as error:  # damaged files make every library underneath raise its own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        if "trust_remote_code" in str(error):
            raise ModelError(f"{name} brings its own code: add --trust-remote-code if you trust it") from error
        if Path(name).is_dir():
            raise ModelError(f"the {what} of {name} cannot be used: {reason}") from error
        raise ModelError(f"{name} is no folder here, and its {what} cannot be had from the hub: {reason}") from error


def offline(settings: ModelSettings) -> dict[str, bool]:
    """How a `from_pretrained` is kept from the network."""
    return {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}


def generation_of(folder: Path) -> Any:
    """The generation config in a folder; None if there is none."""
    there = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder, local_files_only=True) if there else None


def eos_ids(config: Any, generation: Any) -> frozenset[int]:
    """End ids of the generation config and of the model's config (transformers objects; either may name none)."""
    found: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        found |= set() if value is None else {value} if isinstance(value, int) else {int(item) for item in value}
    return frozenset(found)


def folder_of(name: str) -> Path:
    """The folder of a model that has been loaded: the name itself, or the hub cache's snapshot of it."""
    if Path(name).is_dir():
        return Path(name)
    return Path(str(try_to_load_from_cache(name, "config.json"))).parent


def fetched(name: str, code: bool = False) -> Path:
    """The model's folder, fetched from the hub where it is only a name. `code`: Python files too."""
    if Path(name).is_dir():
        return Path(name)
    patterns = PATTERNS + ["*.py"] * code
    return Path(fetch(name, "files", lambda: snapshot_download(name, allow_patterns=patterns)))


def digest_weights(folder: Path) -> str:
    """Digest of config and weights from their files."""
    hasher = hashlib.blake2b(digest_size=16)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        hasher.update(path.name.encode())
        feed(hasher, path)
    return hasher.hexdigest()


def fingerprint(weights: str, tokenizer: str) -> str:
    """Digest of weights, tokenizer and template, from the digests of each."""
    return digest(weights, tokenizer).hex()


def context_of(config: Any) -> int:
    """Longest sequence of a model with this (text) config."""
    for field in ("max_position_embeddings", "max_sequence_length", "max_seq_len"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2**20
