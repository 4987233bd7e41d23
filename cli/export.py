"""`spa-lite export`: an adapter for elsewhere, in PEFT's or mlx-lm's format, with a check of what it does."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import command, resolve
from spa_lite.cli.run import default_scale
from spa_lite.errors import BackendError, ModelError, RecipeError, RunError, SpaError

if TYPE_CHECKING:
    from spa_lite.backend import Backend
    from spa_lite.recipe import Recipe

HOMES = {"peft": "torch", "mlx-lm": "mlx"}
"""Each format, and the backend whose own it is."""

OF_THE_MODEL = ("model.", "inputs.model", "inputs.backend")
"""Settings that say which model an adapter is for, by how their paths begin."""

CONFIG, RECORD = "adapter_config.json", "export.json"
OURS = {CONFIG, RECORD, "adapter_model.safetensors", "adapters.safetensors", "check.jsonl"}
"""All that --force may delete."""


@command(app, "export", ["inputs", "model"])
def export(
    given: dict[str, Any],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A run folder, or an adapter folder in either format.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new or empty.")],
    format_: Annotated[str, typer.Option("--format", metavar="peft|mlx-lm", help="Whose format to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the adapter that OUT holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print export.json.")] = False,
) -> None:
    """Write an adapter for PEFT or mlx-lm, checked with the other framework where that is installed.

    The model is --model; for a run folder, the run's; else the built-in one.
    """
    import msgspec

    from spa_lite import backends, exchange
    from spa_lite.cli import render
    from spa_lite.files import write_json

    check_format(format_)
    adapter = adapter_of(source)
    recipe, _ = resolve(_settings(source, given), default_scale=default_scale)
    check_free(out, force)
    name = backends.choose(recipe.inputs.backend)[0]
    if name == "toy":
        raise BackendError("adapters of the toy backend fit no other program: export one of a real model (--backend)")
    if recipe.inputs.model is None:
        render.note("the base is the built-in lesson model (give --model for another)")
    with whole_folder(out) as folder:
        record = write(folder, adapter, source, format_, recipe)
        record["checked"], said = check_elsewhere(folder, source, record, recipe)
        write_json(folder / RECORD, record)
    render.note(said)
    if record["dtype"] not in exchange.EXACT:
        render.note(f"a check in {record['dtype']} is only shown where it is loaded; --dtype float32 makes it binding")
    render.note(f"adapter: {out} ({format_})")
    if as_json:
        print(msgspec.json.encode(record).decode())


# What is asked


def check_format(name: str) -> None:
    """Raises RecipeError naming the nearest format."""
    if name not in HOMES:
        near = difflib.get_close_matches(name, HOMES, n=1, cutoff=0.0)[0]
        raise RecipeError(f"there is no format {name!r}; did you mean {near}? (--format takes {' or '.join(HOMES)})")


def adapter_of(source: Path) -> Path:
    """The adapter folder that a run folder holds, or that `source` is."""
    for folder in (source, source / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    if not source.is_dir():
        raise ModelError(f"there is no folder {source}; give a run folder or an adapter folder")
    raise ModelError(f"{source} holds no adapter ({CONFIG} or adapter/{CONFIG}); give a finished run or an adapter")


def check_free(out: Path, force: bool) -> None:
    """OUT is new or empty; or, with --force, a folder that holds an adapter and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    others = sorted({path.name for path in out.iterdir()} - OURS) if out.is_dir() else [out.name]
    if others:
        raise RunError(f"{out} is not empty and not only an adapter ({others[0]}); choose another folder")
    if not force:
        raise RunError(f"{out} already holds an adapter; choose another folder, or replace it with --force")


def _settings(source: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What the command line says, on top of the model of the run. Refuses what has no meaning here."""
    from spa_lite.recipe import SETTINGS, read_yaml

    odd = [path for path in given if not path.startswith((*OF_THE_MODEL, "inputs.device"))]
    if odd:
        raise RecipeError(f"export does not read {SETTINGS[odd[0]].flag}; the adapter is SOURCE, the base is --model")
    recipe = source / "recipe.yaml"
    of_run = read_yaml(recipe) if recipe.is_file() else {}
    kept = {path: value for path, value in of_run.items() if path.startswith(OF_THE_MODEL) and value is not None}
    return kept | given


# What is written


def write(folder: Path, adapter: Path, source: Path, format_: str, recipe: Recipe) -> dict[str, Any]:
    """Write adapter and check with the recipe's backend, read them back, and free the backend. Returns the record."""
    from spa_lite import backends, exchange, prepare
    from spa_lite.backend import POLICY
    from spa_lite.cli.checks import check_adapter

    backend = backends.load(recipe.inputs.backend, prepare.model_settings(recipe))
    check_adapter(backend, adapter)
    backend.bind(POLICY, adapter)
    _write_adapter(backend, folder, source, format_, base_name(recipe.inputs.model))
    dtype, bits = str(backend.description["dtype"]), int(backend.description["bits"])
    exchange.write_check(folder, exchange.check_rows(backend), backend.fingerprint, dtype, bits)
    backend.bind(POLICY, folder)
    verdict = exchange.verify(backend, folder)
    if verdict.comparable and not verdict.ok:
        raise ModelError(f"{source} was not exported: read back as {format_}, it {exchange.sentence(verdict)}")
    return {
        "format": format_,
        "source": source.resolve().name,
        "model": base_name(recipe.inputs.model),
        "base": backend.fingerprint,
        "backend": backend.name,
        "dtype": dtype,
        "bits": bits,
    }


def _write_adapter(backend: Backend, folder: Path, source: Path, format_: str, base: str) -> None:
    """What POLICY is bound to, through PEFT's format, which every backend writes."""
    import safetensors.numpy as safetensors

    from spa_lite.backends import adapter_files

    with tempfile.TemporaryDirectory() as saved:
        backend.save(Path(saved))
        stored = adapter_files.read(Path(saved), safetensors.load_file)
    if format_ == "peft":
        adapter_files.write_peft(folder, stored.config, stored.tensors, base)
    else:
        adapter_files.write_mlx_lm(folder, dataclasses.replace(stored, name=str(source)))


def base_name(model: str | None) -> str:
    """What to call the base in files that others read: a hub name, or a folder's own name without its place."""
    if model is None:
        return "spa-lite lesson model"
    path = Path(model).expanduser()
    local = path.is_dir() or path.is_absolute() or model.startswith((".", "~"))
    return path.resolve().name if local else model


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is gone when not."""
    made = out.resolve().parent / f".{out.resolve().name}.tmp"
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        yield made
        old = made.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.resolve().rename(old)
        made.rename(out.resolve())
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


# What the other framework says


def check_elsewhere(
    folder: Path, source: Path, record: dict[str, Any], recipe: Recipe
) -> tuple[dict[str, Any] | None, str]:
    """Check with the framework that did not write it: what it found (None: nothing), and a sentence about it.

    Raises ModelError if that framework computes something else, or cannot read a format of its own.
    """
    from spa_lite import backends, exchange, prepare
    from spa_lite.backend import POLICY
    from spa_lite.cli import render

    other = "torch" if record["backend"] == "mlx" else "mlx"
    later = "whoever loads it checks then"
    if other not in backends.TABLE or backends.missing(other):
        return None, f"not yet checked: {other} is not installed here; {later}"
    render.note(f"checking with {other}")
    settings = dataclasses.replace(prepare.model_settings(recipe), device="auto", dtype=record["dtype"])
    try:
        backend = backends.load(other, settings)
    except SpaError as error:
        return None, f"not yet checked: {other} cannot load this model ({error}); {later}"
    try:
        backend.bind(POLICY, folder)
    except ModelError as error:
        reason = str(error).replace(str(folder), "it")
        if HOMES[record["format"]] == other:
            raise ModelError(f"{source} was not exported: {other} refuses it ({reason})") from error
        return None, f"not yet checked: {other} refuses it ({reason}); {later}"
    verdict = exchange.verify(backend, folder)
    if verdict.comparable and not verdict.ok:
        raise ModelError(f"{source} was not exported: in {other} it {exchange.sentence(verdict)}")
    found = {
        "backend": other,
        "version": version(other),
        "rows": verdict.rows,
        "largest_difference": verdict.largest,
        "comparable": verdict.comparable,
        "ok": verdict.ok,
    }
    return found, f"in {other} it {exchange.sentence(verdict)}"
