"""How each form of an export is written."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_lite.cli.export_checks import HOMES, check_elsewhere, check_reading, llama_cpp_missing, read_back, score
from spa_lite.cli.export_home import Home, Order, at_home
from spa_lite.cli.export_source import base_name
from spa_lite.errors import ModelError, RecipeError
from spa_lite.files import share

if TYPE_CHECKING:
    from spa_lite.backends.merging import Survival
    from spa_lite.modelfile import Render
    from spa_lite.records import Message

DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Precisions that weights can be written in, and GGUF's words for them."""

GGUF, LORA = "model.gguf", "adapter.gguf"
CONVERTER = "give --llama-cpp DIR, a checkout of llama.cpp, and its own converter is used"
CONTEXT = 4096
"""Tokens that Ollama keeps room for, of models that take more: it takes the memory at once."""
DRAWN_PLAINLY = {"top_k": 0, "min_p": 0, "repeat_penalty": 1}
"""Ollama's defaults would cut and bend what the model was trained to say."""


def export_into(folder: Path, order: Order) -> dict[str, Any]:
    """Write and check a form. Returns what export.json holds. Raises SpaError where it does not do the same."""
    write = WRITERS[order.form]
    check_dtype(order)
    with at_home(folder, order) as (backend, home):
        record: dict[str, Any] = {
            "form": order.form,
            "source": order.source.name,
            "model": base_name(order.source.recipe.inputs.model),
            "base": home.fingerprint,
            "backend": home.backend,
            "dtype": home.dtype,
            "bits": home.bits,
            "effect": home.effect,
            "checks": [],
            "not_checked": [],
        }
        if order.form in HOMES:
            _write_adapter(folder, order, home)
            record["checks"].append(read_back(backend, folder, order))
    del backend
    gc.collect()
    return write(folder, order, home, record)


def check_dtype(order: Order) -> None:
    """Refuse what a form cannot be written in."""
    if order.dtype and order.dtype not in DTYPES:
        raise RecipeError(f"--dtype {order.dtype} is no precision of a file: float32, float16 or bfloat16")
    if order.bits and order.form != "merged":
        raise RecipeError(
            "--bits is for --to merged (4 bits as mlx-lm has them); for a GGUF in 4 bits give --to gguf, and that file"
            " to llama-quantize of llama.cpp"
        )
    if order.bits not in (None, 4):
        raise RecipeError(f"--bits {order.bits} is not offered: 4, or leave it out")
    if order.bits and order.dtype:
        raise RecipeError("--bits 4 and --dtype exclude each other; leave one out")


@contextmanager
def working(folder: Path) -> Iterator[Path]:
    """A place beside the folder, on the same disk, that is gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# Adapters


def _write_adapter(folder: Path, order: Order, home: Home) -> None:
    from spa_lite.backends import adapter_files

    if order.form == "mlx":
        adapter_files.write_mlx_lm(folder, home.stored)
    else:
        name = base_name(order.source.recipe.inputs.model)
        adapter_files.write_peft(folder, home.stored.config, home.stored.tensors, name)


def _adapter(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """PEFT's or mlx-lm's format, read by the framework that did not write it."""
    found, reason = check_elsewhere(folder, order, home)
    record["checks"] += [found] if found else []
    record["not_checked"] += [reason] if reason else []
    return record


def _hub_folder(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """An adapter with its card and its recipe."""
    from spa_lite import model_card

    record = _adapter(folder, order, home, record)
    source = order.source
    model_card.write_card(folder, source.recipe, source.run, source.stage, home.model, record)
    return record


# Merged


def _merged(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """A whole model folder, scored by every framework that is installed."""
    from spa_lite import backends

    if order.bits:
        return _merged_in_4bit(folder, order, home, record)
    record["merged"] = _merge(home, folder, order.dtype or "keep")
    record["written"] = record["merged"]["dtype"]
    for name in ("torch", "mlx"):
        if backends.missing(name):
            record["not_checked"].append(f"{name} is not installed here")
        else:
            score(name, folder, home, record)
    return record


def _merge(home: Home, out: Path, dtype: Any) -> dict[str, Any]:
    """Base + adapter in a folder, with the template that the adapter was trained with. Returns what became of it."""
    from spa_lite.backends import merging

    done = merging.merge(home.model, home.stored, out, dtype)
    if home.settings.template is not None:
        from spa_lite.backends.chat import TEMPLATES

        wanted = home.settings.template
        text = TEMPLATES[wanted] if wanted in TEMPLATES else Path(wanted).expanduser().read_text(encoding="utf-8")
        (out / "chat_template.jinja").write_text(text, encoding="utf-8")
    return {
        "dtype": done.dtype,
        "modules": done.modules,
        "share": done.survived.share,
        "cosine": done.survived.cosine,
        "worst": done.worst,
        "worst_share": done.at_worst.share,
        "worst_cosine": done.at_worst.cosine,
    }


def _merged_in_4bit(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """The same in mlx-lm's 4 bits; only if that is wanted after what is lost was seen."""
    from spa_lite.backends import merging
    from spa_lite.cli import render

    with working(folder) as place:
        _merge(home, place / "merged", "float32")
        left = merging.survival_in_4bit(home.model, place / "merged")
        render.note(f"of the change, 4 bits keep: {_survival(left)}")
        if not order.force:
            raise ModelError(
                f"{order.source.what} was not exported: in 4 bits the change has a cosine of {left.cosine:.3f} with"
                " what was trained; leave --bits out and keep the adapter in 16 bits, or add --force"
            )
        merging.to_4bit(place / "merged", place / "small")
        for path in (place / "small").iterdir():
            if path.name == "README.md":  # mlx-lm's, about the folder that it was made from
                continue
            path.rename(folder / path.name)
    record["merged"] = {"dtype": "4 bits", "share": left.share, "cosine": left.cosine}
    record["written"] = "4 bits"
    score("mlx", folder, home, record)
    return record


def _survival(left: Survival) -> str:
    return f"{100 * left.share:.1f} % of its length in its own direction, cosine {left.cosine:.3f}"


# GGUF


def _gguf(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """One file for llama.cpp, read back, and scored by llama.cpp where it is installed."""
    from spa_lite.backends import gguf_check

    file, dtype = folder / GGUF, order.dtype or "float16"
    with working(folder) as place:
        _merge(home, place / "merged", "float32")
        _write_gguf(place / "merged", file, dtype, order)
        tensors, left = gguf_check.read_back(file, place / "merged", home.stored)
        record["written"] = dtype
        if tensors:
            record["merged"] = {"dtype": dtype, "tensors": tensors, "share": left.share, "cosine": left.cosine}
        if not llama_cpp_missing(record):
            scorer = score("llamacpp", beside_its_tokenizer(file, home, place), home, record)
            check_reading(scorer, renderer(file, home), order, home, record)
    return record


def renderer(file: Path, home: Home) -> Render:
    """Prompts as text, as a program must write them that puts BOS in front itself where the file asks for that.

    Raises ModelError if the file asks for one that the model was not trained with.
    """
    from spa_lite.backends.gguf_header import read_header
    from spa_lite.records import Message

    said = read_header(file)
    first = home.tokenizer.encode_prompt([Message(role="user", content="?")])[0]
    bos, added = said.token("bos_token_id"), bool(said.token("add_bos_token"))
    if added and first != bos:
        raise ModelError(f"{file.name} asks for a BOS token that the model was not trained with: the file is wrong")
    token = home.tokenizer.control_tokens.get(first, "") if first == bos else ""

    def render(messages: Sequence[Message], generate: bool) -> str:
        text: str = home.tokenizer.render(messages, generate)
        return ("" if added else token) + text.removeprefix(token)

    return render


def beside_its_tokenizer(file: Path, home: Home, place: Path) -> Path:
    """The same file where the model's own tokenizer lies too: for reading texts, llama.cpp's may differ."""
    there = place / "scored"
    there.mkdir()
    share(file, there / file.name)
    if (home.model / "tokenizer.json").is_file():
        share(home.model / "tokenizer.json", there / "tokenizer.json")
    return there / file.name


def _write_gguf(model: Path, out: Path, dtype: str, order: Order) -> None:
    """Through our writer where it covers the model, else through the user's llama.cpp."""
    from spa_lite.backends import gguf_writer, weights

    form: Any = DTYPES[dtype]
    if order.llama_cpp:
        gguf_writer.by_converter(order.llama_cpp, model, out, form, order.source.recipe.model.trust_remote_code)
        return
    reason = gguf_writer.why_not(weights.read_json(model / "config.json"))
    if reason:
        raise ModelError(f"{order.source.what} was not exported: {reason}; {CONVERTER}")
    gguf_writer.write_model(model, out, form, name=order.source.name)


def _gguf_lora(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """The adapter alone for llama.cpp, read back, and scored by it on the base in float32."""
    from spa_lite.backends import adapter_files, gguf_check, gguf_lora, gguf_writer, weights

    config = weights.read_json(home.model / "config.json")
    with working(folder) as place:
        if order.llama_cpp:
            adapter_files.write_peft(place / "peft", home.stored.config, home.stored.tensors, str(home.model))
            gguf_writer.lora_by_converter(order.llama_cpp, place / "peft", home.model, folder / LORA)
        else:
            if reason := gguf_writer.why_not(config | {"quantization": None, "quantization_config": None}):
                raise ModelError(f"{order.source.what} was not exported: {reason}; {CONVERTER}")
            gguf_lora.write_lora(home.stored, config, folder / LORA)
            record["matrices"] = gguf_check.read_lora_back(folder / LORA, home.stored, config)
        record["written"] = "float32"
        if config.get("quantization") or config.get("quantization_config"):
            record["not_checked"].append("the base is quantised, and llama.cpp would need it in GGUF")
        elif not llama_cpp_missing(record):
            _write_gguf(home.model, place / GGUF, "float32", order)
            base = beside_its_tokenizer(place / GGUF, home, place)
            score("llamacpp", base, home, record, adapter=folder / LORA)
    return record


def _ollama(folder: Path, order: Order, home: Home, record: dict[str, Any]) -> dict[str, Any]:
    """A GGUF with a Modelfile: the template, what ends an answer, and how answers are drawn."""
    from spa_lite import modelfile

    recipe, tokens = order.source.recipe, list(home.tokenizer.control_tokens.values())
    name, sampling = base_name(recipe.inputs.model), recipe.sampling
    modelfile.probe(home.tokenizer.render, name, tokens)  # refused before the long work
    record = _gguf(folder, order, home, record)
    turns = modelfile.probe(renderer(folder / GGUF, home), name, tokens)
    drawn = {"num_ctx": min(home.context, CONTEXT), "temperature": sampling.temp, "top_p": sampling.top_p}
    text = modelfile.modelfile(turns, home.stops, drawn | DRAWN_PLAINLY, recipe.model.system)
    (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    record["stops_left_out"] = len(home.tokenizer.stop_ids) - len(home.stops)
    record |= {"trims": turns.trims, "system_turns": turns.system is not None}
    return record


WRITERS: dict[str, Callable[[Path, Order, Home, dict[str, Any]], dict[str, Any]]] = {
    "peft": _adapter,
    "mlx": _adapter,
    "gguf-lora": _gguf_lora,
    "gguf": _gguf,
    "merged": _merged,
    "ollama": _ollama,
    "hub-folder": _hub_folder,
}
