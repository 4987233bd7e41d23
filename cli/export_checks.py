"""What other programs make of an export: the same tokens through both forms, and how far they are apart."""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.export_home import Home, Order
from spa_lite.errors import ModelError, SpaError

if TYPE_CHECKING:
    from spa_lite.backend import Backend, ModelSettings
    from spa_lite.exchange import Difference, Verdict
    from spa_lite.modelfile import Render

HOMES = {"peft": "torch", "hub-folder": "torch", "mlx": "mlx"}
"""Each adapter format, and the backend whose own it is."""


# Adapters


def read_back(backend: Backend, folder: Path, order: Order) -> dict[str, Any]:
    """Check what was written with the backend that wrote it."""
    from spa_lite import exchange
    from spa_lite.backend import POLICY

    backend.bind(POLICY, folder)
    verdict = exchange.verify(backend, folder)
    if verdict.comparable and not verdict.ok:
        said = exchange.sentence(verdict)
        raise ModelError(f"{order.source.what} was not exported: read back as {order.form}, it {said}")
    return _of_verdict(backend.name, verdict)


def check_elsewhere(folder: Path, order: Order, home: Home) -> tuple[dict[str, Any] | None, str]:
    """What the other framework makes of an adapter; or why it cannot be asked.

    Raises ModelError if that framework computes something else, or cannot read a format of its own.
    """
    from spa_lite import backends, exchange
    from spa_lite.backend import POLICY
    from spa_lite.cli import render

    other = "torch" if home.backend == "mlx" else "mlx"
    later = "whoever loads it checks then"
    if other not in backends.TABLE or backends.missing(other):
        return None, f"{other} is not installed here; {later}"
    render.note(f"checking with {other}")
    settings = dataclasses.replace(home.settings, device="auto", dtype=home.dtype)
    try:
        backend = backends.load(other, settings)
    except SpaError as error:
        return None, f"{other} cannot load this model ({error}); {later}"
    try:
        backend.bind(POLICY, folder)
    except ModelError as error:
        reason = str(error).replace(str(folder), "it")
        if HOMES[order.form] == other:
            raise ModelError(f"{order.source.what} was not exported: {other} refuses it ({reason})") from error
        return None, f"{other} refuses it ({reason}); {later}"
    verdict = exchange.verify(backend, folder)
    if verdict.comparable and not verdict.ok:
        said = exchange.sentence(verdict)
        raise ModelError(f"{order.source.what} was not exported: in {other} it {said}")
    return _of_verdict(other, verdict), ""


# Models


def score(name: str, model: Path, home: Home, record: dict[str, Any], adapter: Path | None = None) -> Backend | None:
    """Score the check's tokens with another form and keep what came out. Returns what scored it; None: it cannot.

    Raises ModelError if it is too far away, or if the program that the form is for cannot load it.
    """
    from spa_lite import backends, exchange
    from spa_lite.backend import POLICY
    from spa_lite.cli import render

    render.note(f"checking with {name}")
    try:
        backend = backends.load(name, _settings_for(name, model, home))
    except SpaError as error:
        reason = str(error).replace(str(model), "it")
        if name in (home.backend, "llamacpp"):
            raise ModelError(
                f"{home.stored.name} was not exported: {name} cannot load what was written ({reason})"
            ) from error
        record["not_checked"].append(f"{name} cannot load it ({reason})")
        return None
    backend.bind(POLICY, adapter)
    off = exchange.differ(backend, home.rows, POLICY)
    found = _checked(name, off, exchange.allowed(home.precision, record["written"]))
    record["checks"].append(found)
    if not found["ok"]:
        raise ModelError(
            f"{home.stored.name} was not exported: in {name} its tokens are {off.mean:.2g} nats apart on average (at"
            f" most {off.largest:.2g}), where {found['mean_allowed']:g} is allowed; the conversion is wrong for this"
            " model"
        )
    return backend


def _settings_for(name: str, model: Path, home: Home) -> ModelSettings:
    """How another form is loaded: in the precision of home, but a GGUF file has its own."""
    device = home.settings.device if name == home.backend or home.settings.device == "cpu" else "auto"
    dtype = "auto" if name == "llamacpp" else home.dtype
    return dataclasses.replace(home.settings, model=str(model), device=device, dtype=dtype, load_in_4bit=False)


def llama_cpp_missing(record: dict[str, Any]) -> bool:
    from spa_lite import backends

    missing = "llamacpp" not in backends.TABLE or bool(backends.missing("llamacpp"))
    if missing:
        record["not_checked"].append("llama-cpp-python is not installed here")
    return missing


def check_reading(backend: Any, render: Render, order: Order, home: Home, record: dict[str, Any]) -> None:
    """Count the prompts that llama.cpp reads as other tokens. Raises ModelError if it reads none as it should."""
    from spa_lite import exchange
    from spa_lite.backends import gguf_check
    from spa_lite.records import Message

    system = order.source.recipe.model.system
    lead = [Message(role="system", content=system)] if system is not None else []
    texts = [render([*lead, Message(role="user", content=text)], True) for text in exchange.PROMPTS]
    found = gguf_check.tokenised(backend.net.vocabulary, texts)
    meant = [row.prompt for row in home.rows]  # a long one lost its beginning
    other = sum(ids[-len(right) :] != right for ids, right in zip(found, meant, strict=True))
    record["read_otherwise"] = other
    if other == len(meant):
        raise ModelError(
            f"{order.source.what} was not exported: llama.cpp reads every prompt as other tokens than the model's"
            " own tokenizer"
        )


# What is kept


def _checked(name: str, off: Difference, allowed: float) -> dict[str, Any]:
    return {
        "with": name,
        "version": version_of(name),
        "rows": off.rows,
        "tokens": off.tokens,
        "largest": off.largest,
        "mean": off.mean,
        "mean_allowed": allowed,
        "ok": off.mean <= allowed,
    }


def _of_verdict(name: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "with": name,
        "version": version_of(name),
        "rows": verdict.rows,
        "tokens": verdict.tokens,
        "largest": verdict.token,
        "mean": verdict.mean,
        "largest_answer": verdict.largest,
        "comparable": verdict.comparable,
        "ok": verdict.ok,
    }


def version_of(name: str) -> str | None:
    """The installed version of a backend's library."""
    try:
        return version({"llamacpp": "llama-cpp-python"}.get(name, name))
    except PackageNotFoundError:
        return None
