"""`spa-lite export`: an adapter for other programs, in the form they take, with a check of what it does there."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import command
from spa_lite.errors import BackendError, RecipeError, RunError

FORMS = ("peft", "mlx", "gguf-lora", "gguf", "merged", "ollama", "hub-folder")
OTHER_WORDS = {"mlx-lm": "mlx"}
OF_THE_BASE = ("gguf", "ollama")
OF_WEIGHTS = ("merged", *OF_THE_BASE)
"""Forms that hold the base's weights too, for which --dtype is what they are written in."""


@command(app, "export", ["inputs.model", "inputs.backend", "inputs.device", "model"])
def export(
    given: dict[str, Any],
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|ADAPTER|init", help="A run, an adapter in PEFT's or mlx-lm's format, or init: the base."
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="|".join(FORMS), help="What to write.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write: new or empty (default: named here).")
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--round", metavar="N", help="Stage of a run: a number, seed, or last (default).")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="With --to merged: 4, as mlx-lm has them.")] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="Checkout of llama.cpp, for its converters.")
    ] = None,
    upload: Annotated[
        str | None, typer.Option("--upload", metavar="REPO", help="With --to hub-folder: put it there, private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --upload: for all to see.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the export that OUT holds; write 4 bits all the same.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print export.json.")] = False,
) -> None:
    """Write an adapter for PEFT, mlx-lm, llama.cpp, Ollama or the hub, and check that it does the same there.

    The base is --model; for a run, the run's; else the built-in one.

    With merged, gguf and ollama, --dtype is what they are written in (default: the base's own, for GGUF float16).
    """
    import msgspec

    from spa_lite import backends
    from spa_lite.cli import render
    from spa_lite.cli.export_forms import export_into
    from spa_lite.cli.export_home import Order
    from spa_lite.cli.export_source import RECORD, check_alone, check_free, source_of
    from spa_lite.files import write_json

    form = check_form(to)
    check_upload(form, upload, public)
    dtype = given.pop("model.dtype", None) if form in OF_WEIGHTS else None
    found = source_of(source, stage, given)
    check_adapter_wanted(found.adapter, form)
    check_alone(found.adapter)
    out = out or Path(f"{found.name}-{form}")
    check_free(out, force)
    name = backends.choose(found.recipe.inputs.backend, found.recipe.inputs.model)[0]
    if name == "llamacpp":
        raise BackendError(
            "an adapter is exported from the base as a model folder: give that as --model, not a GGUF file"
        )
    if name == "toy":
        raise BackendError("adapters of the toy backend fit no other program: export one of a real model (--backend)")
    if found.recipe.inputs.model is None:
        render.note("the base is the built-in lesson model (give --model for another)")
    with whole_folder(out) as folder:
        record = export_into(folder, Order(found, form, dtype, bits, force, llama_cpp))
        record["files"] = sorted([*(path.name for path in folder.iterdir()), RECORD])
        write_json(folder / RECORD, record)
    say(record)
    render.note(f"{WHAT[form]}: {out}")
    if upload:
        render.note(f"uploaded to {upload_folder(out, upload, public)}")
    if as_json:
        print(msgspec.json.encode(record).decode())


WHAT = {
    "peft": "adapter for PEFT",
    "mlx": "adapter for mlx-lm",
    "gguf-lora": "adapter for llama.cpp",
    "gguf": "model for llama.cpp",
    "merged": "merged model",
    "ollama": "folder for Ollama (ollama create NAME -f Modelfile, in it)",
    "hub-folder": "folder to share",
}


def check_form(word: str) -> str:
    """The form that a word means. Raises RecipeError naming the nearest."""
    form = OTHER_WORDS.get(word, word)
    if form not in FORMS:
        near = difflib.get_close_matches(word, FORMS, n=1, cutoff=0.0)[0]
        raise RecipeError(f"there is no form {word!r}; did you mean {near}? (--to takes {', '.join(FORMS)})")
    return form


def check_adapter_wanted(adapter: Path | None, form: str) -> None:
    """Only the forms that hold the base's weights, and are not what it is already, can be made without an adapter."""
    if adapter is None and form not in OF_THE_BASE:
        raise RecipeError(
            f"init is the bare base, so there is no adapter to export; choose another stage, or --to {OF_THE_BASE[0]}"
        )


def check_upload(form: str, upload: str | None, public: bool) -> None:
    """Nothing is sent anywhere unless it is asked for, and only what was made for it."""
    if upload and form != "hub-folder":
        raise RecipeError(f"--upload sends a folder made for sharing: add --to hub-folder, not {form}")
    if public and not upload:
        raise RecipeError("--public is about --upload REPO; add that, or leave it out")


def say(record: dict[str, Any]) -> None:
    """The numbers of the checks, and what they mean."""
    from spa_lite import exchange
    from spa_lite.cli import render

    for check in record["checks"]:
        render.note(
            f"checked with {check['with']}: {check['rows']} answers, {check['tokens']} tokens, at most"
            f" {check['largest']:.1g} and on average {check['mean']:.1g} nats apart"
            + ("" if check.get("comparable", True) else " (only shown: another base or precision)")
        )
        if check["mean"] > record["effect"] / 2 > 0 and record["form"] in OF_WEIGHTS:
            render.note(
                f"warning: the adapter itself moves a token by only {record['effect']:.1g} nats on average: in this"
                " form there is more rounding than adapter"
            )
    for reason in record["not_checked"]:
        render.note(f"not yet checked: {reason}")
    merged = record.get("merged")
    if count := record.get("matrices") or (merged or {}).get("tensors"):
        render.note(f"read back: {count} tensors are in the file as they were meant")
    if merged and record["effect"]:
        render.note(
            f"written in {record['written']}: {100 * merged['share']:.2f} % of the wanted change arrived, cosine"
            f" {merged['cosine']:.4f} (1: and nothing else changed)"
        )
    if record["dtype"] not in exchange.EXACT and record["form"] not in OF_WEIGHTS:
        render.note(f"a check in {record['dtype']} is only shown where it is loaded; --dtype float32 makes it binding")
    if record.get("read_otherwise"):
        render.note(f"warning: llama.cpp reads {record['read_otherwise']} of 16 prompts as other tokens than here")
    if record.get("stops_left_out"):
        render.note(
            f"{record['stops_left_out']} tokens that end an answer are ordinary text; the Modelfile leaves them out"
        )
    if record.get("trims"):
        render.note("the model's template cuts spaces around what is said; Ollama's cannot")
    if record.get("system_turns") is False:
        render.note("the model's template takes no system turn; Ollama will leave one out")


def upload_folder(folder: Path, repo: str, public: bool) -> str:
    """Put a folder on the hub, private unless `public`. Returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        place = str(api.create_repo(repo, private=not public, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except Exception as error:  # no token, no network, a name that is taken: each library layer has its own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(
            f"{folder} was written, but not uploaded to {repo}: {reason}; try: hf upload {repo} {folder}"
        ) from error
    return place


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
