"""The Hugging Face tokenizer of a GGUF file: from a `tokenizer.json` beside it, or in it, or from its vocabulary.

The last is left to transformers, and then compared with llama.cpp's own tokenizer: a file names the rule by which text
is split before merging, and not every rule is known to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spa_lite.backends.adapter_files import first_line
from spa_lite.backends.gguf_header import Header
from spa_lite.backends.quiet import quiet
from spa_lite.errors import ModelError

BESIDE = "tokenizer.json"
WITHIN = "tokenizer.huggingface.json"
UNUSED = 5
"""GGUF's type of ids that stand for no token."""
MEND = f"put the model's {BESIDE} into the same folder"

PROBES = (
    "Hello there, how's it going? I'LL DON'T",
    "1 22 333 4444 3.14 1,000,000",
    "  two  blanks\tand tabs\n\n\nand lines \r\n",
    "naïve café, 東京, привет, ¿qué?, 🙂👍🏽",
    "def f(x): return {'a': x ** 2}  # !!! ...",
)
"""Texts on which two tokenizers that split differently disagree."""


def tokenizer_of(path: Path, header: Header, theirs: Callable[[str], list[int]]) -> Any:
    """The tokenizer of a GGUF file; `theirs` is llama.cpp's. Raises ModelError if they do not agree."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    beside = path.parent / BESIDE
    extra: dict[str, Any] = {}
    with quiet():
        if beside.is_file():
            core = _read(beside, lambda: Tokenizer.from_file(str(beside)))
        elif WITHIN in header.values:
            core = _read(path, lambda: Tokenizer.from_str(str(header.values[WITHIN])))
        else:
            core = _read(path, lambda: _core(path, header))
            extra["add_bos_token"] = _adds_bos(header)
        found = PreTrainedTokenizerFast(
            tokenizer_object=core,
            chat_template=header.values.get("tokenizer.chat_template"),
            **_special(header),
            **extra,
        )
    check_vocabulary(found.get_vocab(), header, beside if beside.is_file() else path)
    if extra:
        check_splitting(found, theirs, path)
    return found


def stop_ids(header: Header) -> frozenset[int]:
    """Ids that end an answer: of the text, of a turn, of a message."""
    ids = {header.token(f"{name}_token_id") for name in ("eos", "eot", "eom")}
    return frozenset(index for index in ids if isinstance(index, int) and index < len(header.token("tokens")))


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # the libraries underneath raise whatever a file leads to
        raise ModelError(f"the tokenizer of {path} cannot be read ({first_line(error)}): {MEND}") from error


def _core(path: Path, header: Header) -> Any:
    """The vocabulary as transformers reads it, without a token that it adds of its own, split as the file says."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    spec = json.loads(read.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < len(header.token("tokens"))]
    if header.token("pre") == "smollm":
        digits, rest = {"type": "Digits", "individual_digits": True}, spec["pre_tokenizer"]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, rest]}
    return Tokenizer.from_str(json.dumps(spec))


def _adds_bos(header: Header) -> bool:
    said = header.token("add_bos_token")
    return header.token("model") == "llama" if said is None else bool(said)


def _special(header: Header) -> dict[str, str]:
    """The tokens with a meaning, by transformers' names."""
    tokens = header.token("tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: header.token(f"{short}_token_id") for name, short in names.items()}
    return {name: tokens[index] for name, index in ids.items() if isinstance(index, int) and index < len(tokens)}


def check_vocabulary(vocabulary: dict[str, int], header: Header, source: Path) -> None:
    """Raise ModelError unless every token has the same id in a tokenizer as in the GGUF file."""
    tokens: Sequence[str] = header.token("tokens")
    types = header.token("token_type") or [1] * len(tokens)
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != UNUSED and vocabulary.get(text) != index:
            raise ModelError(
                f"{source} is not this model's tokenizer: {text!r} is token {vocabulary.get(text)} in it, and {index}"
                " in the GGUF file"
            )


def check_splitting(tokenizer: Any, theirs: Callable[[str], list[int]], path: Path) -> None:
    """Raise ModelError if transformers reads ordinary text otherwise than llama.cpp."""
    for text in PROBES:
        if tokenizer.encode(text, add_special_tokens=False) != theirs(text):
            raise ModelError(f"transformers and llama.cpp read text differently with the tokenizer of {path}: {MEND}")
