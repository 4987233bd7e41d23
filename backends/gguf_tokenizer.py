"""A Hugging Face tokenizer as llama.cpp reads one, such that it cuts ordinary text into the same ids.

llama.cpp knows a byte-level BPE by the name of its pre-tokenizer, the rule that splits a text before merging. Its
"llama" tokenizer is sentencepiece's BPE: always merge the neighbours whose union has the highest score. What is neither
is refused. Two things llama.cpp does in its own way for every model: it does not compose Unicode (NFC), and its "llama"
tokenizer puts a blank after each special token within a text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spa_lite.backends.model_folder import eos_ids, fetch, generation_of
from spa_lite.backends.quiet import quiet
from spa_lite.errors import ModelError

MEND = "give --llama-cpp DIR, a checkout of llama.cpp, to use its converter"

BLANK = "▁"
SUFFIX = r"|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*END|NUMBER"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
WORDS = r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES, DIGITS = "GPT-2's own rule", "single digits"

NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((BYTES,), False): "gpt-2",
    (("'(?:[sdmt]|ll|ve|re)" + WORDS,), False): "gpt-2",
    (("'s|'t|'re|'ve|'m|'ll|'d" + WORDS,), False): "gpt-2",
    ((DIGITS, BYTES), False): "smollm",
    ((CONTRACTIONS + SUFFIX.replace("NUMBER", r"\p{N}{1,3}"),), True): "llama-bpe",
    ((CONTRACTIONS + SUFFIX.replace("NUMBER", r"\p{N}{1,3}"),), False): "smaug-bpe",
    ((CONTRACTIONS + SUFFIX.replace("NUMBER", r"\p{N}"),), False): "qwen2",
    ((CASED.replace("END", "").replace("NUMBER", r"\p{N}"),), True): "tekken",
    ((CASED.replace("END", CONTRACTIONS + "?").replace("NUMBER", r"\p{N}{1,3}"),), False): "gpt-4o",
}
"""Rules by which a text is split, and whether words of the vocabulary skip the merges: llama.cpp's name for both."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; `special` by llama.cpp's names: bos, eos, eot, unk, pad."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    template: str | None


def vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer in a model folder. Raises ModelError if llama.cpp would cut ordinary text into other ids."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = fetch(
            str(folder), "tokenizer", lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True)
        )
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ModelError(f"the tokenizer of {folder} has no fast version to read the vocabulary from: {MEND}")
    spec = json.loads(core.to_str())
    model = spec["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        raise ModelError(
            f"the tokenizer of {folder} is {_kind(model)}, not plain BPE, which alone is written here: {MEND}"
        )
    marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if marks:
        raise ModelError(f"the tokenizer of {folder} has {' and '.join(marks)}, which llama.cpp cannot do: {MEND}")
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    tokens, types = _tokens(folder, config, model, added)
    ids, template = tokenizer("a")["input_ids"], tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return Vocabulary(
        tokens=tokens,
        types=types,
        special=_special(folder, config, tokenizer, template or ""),
        add_bos=bool(ids) and ids[0] == tokenizer.bos_token_id,
        add_eos=len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
        template=template,
        **(_sentencepiece if model.get("byte_fallback") else _byte_level)(folder, spec, tokens),
    )


def write(writer: Any, found: Vocabulary) -> None:
    """Put a tokenizer's keys into a GGUFWriter."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    for name, index in found.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)
    writer.add_add_space_prefix(found.add_space_prefix)
    if found.template is not None:
        writer.add_chat_template(found.template)


def _kind(model: Mapping[str, Any]) -> str:
    return f"{model.get('type')} with dropout" if model.get("dropout") else str(model.get("type"))


def _tokens(
    folder: Path, config: Mapping[str, Any], model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]
) -> tuple[list[str], list[int]]:
    """Text and type of every id up to the model's vocabulary; ids without a token are unused padding."""
    from gguf import TokenType

    size = int(config["vocab_size"])
    texts = {index: token for token, index in model["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    if max(texts) >= size:
        raise ModelError(
            f"{folder}: token {max(texts)} ({texts[max(texts)]!r}) has no row in the embeddings, which have {size}:"
            " resize them with transformers, or take the added token out"
        )
    kinds: list[int] = []
    for index in range(size):
        entry, text = added.get(index), texts.get(index)
        if text is None:
            kinds.append(TokenType.UNUSED)
        elif model.get("unk_token") == text:
            kinds.append(TokenType.UNKNOWN)
        elif entry is not None:
            kinds.append(TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED)
        else:
            is_byte = model.get("byte_fallback") and _is_byte(text)
            kinds.append(TokenType.BYTE if is_byte else TokenType.NORMAL)
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(size)]
    if len(set(tokens)) < size:
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise ModelError(f"{folder}: two ids of its tokenizer mean {twice!r}, which llama.cpp refuses: save it again")
    return tokens, [int(kind) for kind in kinds]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _special(folder: Path, config: Mapping[str, Any], tokenizer: Any, template: str) -> dict[str, int]:
    """Ids with a meaning. `eot` is the first end token, the tokenizer's own before others, that the template writes."""
    ends = sorted(eos_ids(SimpleNamespace(eos_token_id=config.get("eos_token_id")), generation_of(folder)))
    own = tokenizer.eos_token_id
    eos = own if own is not None else ends[0] if ends else None
    texts = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    written = [i for i in sorted(ends, key=lambda i: i != eos) if i in texts and texts[i] in template]
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        "eot": written[0] if written else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: int(index) for name, index in found.items() if index is not None}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in the order of merging, in either spelling of tokenizer.json."""
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


# Byte-level BPE


def _byte_level(folder: Path, spec: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What a Vocabulary says of a byte-level BPE."""
    return {
        "model": "gpt2",
        "pre": _pre(folder, spec, bool(spec["model"].get("ignore_merges"))),
        "scores": None,
        "merges": [f"{left} {right}" for left, right in _merges(spec["model"])],
        "add_space_prefix": False,
    }


def _pre(folder: Path, spec: Mapping[str, Any], ignore_merges: bool) -> str:
    """llama.cpp's name of how text is split before merging."""
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # composed text, as all ordinary text is, stays
        raise ModelError(f"{folder}: llama.cpp has no {normalizer.get('type')} before byte-level BPE: {MEND}")
    steps = _flat(spec.get("pre_tokenizer"))
    rule = tuple(filter(None, (_rule(step) for step in steps)))
    name = NAMES.get((rule, ignore_merges))
    if name is None or not steps or steps[-1].get("type") != "ByteLevel":
        said = " + ".join(rule) or "no rule"
        raise ModelError(f"{folder}: llama.cpp has no name for how its tokenizer splits text ({said[:120]}): {MEND}")
    return name


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [one for part in step["pretokenizers"] for one in _flat(part)] if step["type"] == "Sequence" else [step]


def _rule(step: Mapping[str, Any]) -> str | None:
    """What one step does, as NAMES has it; None if it splits nothing."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return BYTES if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", f"the text {step['pattern'].get('String')!r}"))
    return f"{kind} with settings of its own"


# sentencepiece's BPE


def _sentencepiece(folder: Path, spec: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What a Vocabulary says of sentencepiece's BPE. What is never made by merging needs no score of its own."""
    prefix, scores = _prefix(folder, spec), _scores(folder, spec)
    return {
        "model": "llama",
        "pre": "default",
        "scores": [scores.get(token, -1000.0) for token in tokens],
        "merges": None,
        "add_space_prefix": prefix,
    }


def _prefix(folder: Path, spec: Mapping[str, Any]) -> bool:
    """Whether a blank is put before the text. Raises ModelError if text is prepared otherwise than in sentencepiece."""
    normalizer, steps = spec.get("normalizer"), _flat(spec.get("pre_tokenizer"))
    changes = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepended = {"type": "Prepend", "prepend": BLANK}
    if not steps and changes in ([replaced], [prepended, replaced]):
        return len(changes) == 2
    if not changes and len(steps) == 1 and steps[0]["type"] == "Metaspace" and steps[0].get("replacement") == BLANK:
        inner = any(BLANK in token[1:] for token in spec["model"]["vocab"])
        if not (steps[0].get("split", True) and inner):
            return steps[0].get("prepend_scheme", "always") != "never"
    raise ModelError(f"{folder}: its tokenizer prepares text otherwise than sentencepiece's BPE does: {MEND}")


def _scores(folder: Path, spec: Mapping[str, Any]) -> dict[str, float]:
    """Scores under which greedy merging does what the merges say: minus a token's place among what is merged first.

    llama.cpp merges any two neighbours whose union is a token. So all such pairs must be merges, and the merges that
    make one token must not lie on both sides of another's.
    """
    vocab, merges = spec["model"]["vocab"], _merges(spec["model"])
    made: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        made.setdefault(left + right, []).append(rank)
    ordered = sorted(made.values())
    known, special = set(merges), {entry["content"] for entry in spec["added_tokens"]}
    whole = all(
        (token[:cut], token[cut:]) in known
        for token in vocab
        if token not in special and not _is_byte(token)
        for cut in range(1, len(token))
        if _reached(token[:cut], vocab, made) and _reached(token[cut:], vocab, made)
    )
    if not whole or any(one[-1] > other[0] for one, other in itertools.pairwise(ordered)):
        raise ModelError(f"{folder}: the merges of its tokenizer are not sentencepiece's, by score alone: {MEND}")
    places = {token: -float(place) for place, token in enumerate(sorted(made, key=lambda token: made[token][0]))}
    return {token: 0.0 for token in vocab if _is_byte(token)} | places


def _reached(piece: str, vocab: Mapping[str, int], made: Mapping[str, list[int]]) -> bool:
    """Whether a piece can stand in a text that is being merged."""
    return piece in made or (len(piece) == 1 and piece in vocab)
