"""GGUF files: names, order, settings and tokens read back, what is refused, and llama.cpp's own opinion."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spa_lite.backends import gguf_tokenizer, gguf_writer
from spa_lite.backends.gguf_header import read_header
from spa_lite.backends.gguf_names import heads_of, name_of, permute
from spa_lite.backends.gguf_writer import Dtype, rope_factors, why_not, write_model
from spa_lite.errors import ModelError
from tests.tiny import LLAMA3, VOCABULARY, make_config, make_model, make_tokenizer, sentences

LESSON = Path("spa_lite/lesson/model")
Floats = NDArray[np.float32]


def test_rows_are_permuted_by_hand() -> None:
    rows = np.arange(12)[:, None] * [1, 10]
    assert permute(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert permute(rows, 1)[:, 1].tolist() == [0, 60, 10, 70, 20, 80, 30, 90, 40, 100, 50, 110]


@given(heads=st.integers(1, 4), half=st.integers(1, 8), seed=st.integers(0, 99))
def test_llama_cpp_rotates_permuted_rows_as_transformers_rotates_plain_ones(heads: int, half: int, seed: int) -> None:
    """Halves turned together, then permuted: the same as permuted first, then neighbours turned together."""
    rng = np.random.default_rng(seed)
    angle = np.tile(rng.uniform(0, 6, half), heads)
    x = rng.standard_normal(2 * half * heads)
    first, second = x.reshape(heads, 2, half).swapaxes(0, 1).reshape(2, -1)
    turned = np.stack([first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)])
    theirs = turned.reshape(2, heads, half).swapaxes(0, 1).ravel()
    even, odd = permute(x, heads).reshape(-1, 2).T
    ours = np.stack([even * np.cos(angle) - odd * np.sin(angle), odd * np.cos(angle) + even * np.sin(angle)], axis=1)
    np.testing.assert_allclose(ours.ravel(), permute(theirs, heads), atol=1e-12)


def test_names_and_heads() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert name_of("model.layers.13.self_attn.o_proj") == "blk.13.attn_output"
    assert name_of("lm_head") == "output"
    assert name_of("model.layers.0.self_attn.qkv_proj") is None
    assert name_of("transformer.h.0.attn.c_attn") is None
    assert heads_of("model.layers.0.self_attn.q_proj", config) == 4
    assert heads_of("model.layers.0.self_attn.k_proj", config) == 2
    assert heads_of("model.layers.0.self_attn.k_proj", {"num_attention_heads": 4}) == 4
    assert heads_of("model.layers.0.self_attn.v_proj", config) is None


# What is written


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries, no two norms alike."""
    return make_model(tmp_path_factory.mktemp("grouped") / "llama", uneven=True)


def describe(path: Path) -> dict[str, Any]:
    """What the file says of itself, by key, as gguf's own reader has it."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def written(model: Path, out: Path, dtype: Dtype = "f32") -> dict[str, Any]:
    """Write it, and return what the file says of itself."""
    write_model(model, out, dtype)
    return describe(out)


def tensors(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Names -> (dtype, numbers) of a GGUF file."""
    from gguf import GGUFReader

    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in GGUFReader(path).tensors}


def test_settings_read_back(grouped: Path, tmp_path: Path) -> None:
    said = written(grouped, tmp_path / "a.gguf")
    assert {key.removeprefix("llama."): said[key] for key in said if key.startswith("llama.")} == {
        "vocab_size": VOCABULARY,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }
    assert said["general.architecture"] == "llama"
    assert said["general.name"] == "llama"
    assert said["general.file_type"] == 0
    write_model(grouped, tmp_path / "b.gguf", "f16", name="Ours")
    assert describe(tmp_path / "b.gguf")["general.name"] == "Ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_weights_read_back(grouped: Path, tmp_path: Path) -> None:
    """Every tensor under its name, queries and keys permuted, nothing else."""
    write_model(grouped, tmp_path / "a.gguf", "f32")
    found, plain = tensors(tmp_path / "a.gguf"), safetensors.load_file(grouped / "model.safetensors")
    assert len(found) == len(plain) == 21
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2])
        kind, data = found[f"{name_of(module)}.weight"]
        assert kind == "F32"
        assert np.array_equal(data, permute(weight, heads) if heads else weight), key


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sixteen_bits(dtype: Dtype, grouped: Path, tmp_path: Path) -> None:
    """Rounded to nearest as torch does it; vectors stay in 32 bits."""
    torch = pytest.importorskip("torch")
    write_model(grouped, tmp_path / "a.gguf", dtype)
    found, plain = tensors(tmp_path / "a.gguf"), safetensors.load_file(grouped / "model.safetensors")
    kind, data = found["blk.1.ffn_down.weight"]
    assert kind == dtype.upper()
    wanted = torch.from_numpy(plain["model.layers.1.mlp.down_proj.weight"])
    there = torch.from_numpy(data.copy().view(np.int16)).view(torch.float16 if dtype == "f16" else torch.bfloat16)
    assert torch.equal(there.reshape(wanted.shape), wanted.to(there.dtype))
    assert found["blk.1.attn_norm.weight"][0] == "F32"
    assert describe(tmp_path / "a.gguf")["general.file_type"] == {"f16": 1, "bf16": 32}[dtype]


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tied", "smollm2")
    write_model(model, tmp_path / "a.gguf")
    assert "output.weight" not in tensors(tmp_path / "a.gguf")
    plain = safetensors.load_file(model / "model.safetensors")
    other = {"lm_head.weight": plain["model.embed_tokens.weight"] * 2}
    safetensors.save_file(plain | other, model / "model.safetensors")
    write_model(model, tmp_path / "b.gguf", "f32")
    found = tensors(tmp_path / "b.gguf")["output.weight"][1]
    assert np.array_equal(found, other["lm_head.weight"]), "a head that is there is what transformers reads"


def test_the_file_is_written_piece_by_piece(grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a piece, the same bytes."""
    write_model(grouped, tmp_path / "a.gguf", "bf16")
    monkeypatch.setattr("spa_lite.backends.weights.PIECE", 100)
    write_model(grouped, tmp_path / "b.gguf", "bf16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# Rotary settings


def changed(model: Path, to: Path, **config: Any) -> Path:
    """A copy of a model folder with another config; None takes a key out."""
    shutil.copytree(model, to)
    full = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({key: value for key, value in full.items() if value is not None}))
    return to


OLDER = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
SPELLINGS: dict[str, dict[str, Any]] = {
    "newer": {"rope_parameters": LLAMA3},
    "older": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": OLDER},
    "oldest": {
        "rope_parameters": None,
        "rope_theta": 5e5,
        "rope_scaling": {**OLDER, "type": "llama3", "rope_type": None},
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rotary_settings_in_every_spelling(spelling: str, grouped: Path, tmp_path: Path) -> None:
    said = written(changed(grouped, tmp_path / "model", **SPELLINGS[spelling]), tmp_path / "a.gguf")
    assert said["llama.rope.freq_base"] == 5e5
    kind, factors = tensors(tmp_path / "a.gguf")["rope_freqs.weight"]
    assert kind == "F32"
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert any(1 < factor < 8 for factor in factors)


def test_llama3_factors_are_transformers_own() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = make_config("llama3")
    theirs, strength = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = rope_factors(config.to_dict())
    assert strength == 1.0
    assert factors is not None
    np.testing.assert_allclose(5e5 ** -(np.arange(0, 16, 2) / 16) / factors, theirs.numpy(), rtol=1e-6)


def test_linear_scaling(grouped: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    said = written(changed(grouped, tmp_path / "model", rope_parameters=rope), tmp_path / "a.gguf")
    assert said["llama.rope.scaling.type"] == "linear"
    assert said["llama.rope.scaling.factor"] == 4.0


# Tokenizers


def test_tokens_and_what_they_are(grouped: Path, tmp_path: Path) -> None:
    from gguf import TokenType

    said = written(grouped, tmp_path / "a.gguf")
    tokenizer = make_tokenizer()
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == VOCABULARY
    named = len(tokenizer)
    assert tokens[:named] == tokenizer.convert_ids_to_tokens(range(named))
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert kinds == [TokenType.CONTROL] * 6 + [TokenType.NORMAL] * (named - 6) + [TokenType.UNUSED] * (
        VOCABULARY - named
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.bos_token_id"] == 1
    assert said["tokenizer.ggml.eos_token_id"] == 2
    assert said["tokenizer.ggml.eot_token_id"] == 2
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    assert "tokenizer.ggml.padding_token_id" not in said, "the tokenizer names none"


def test_a_bos_is_added_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    make_tokenizer(adds_bos=True).save_pretrained(tmp_path)
    assert gguf_tokenizer.vocabulary(tmp_path, {"vocab_size": VOCABULARY}).add_bos


def test_the_end_of_a_turn_is_an_end_that_the_template_writes(tmp_path: Path) -> None:
    """The text's end may be another token than the turn's."""
    make_tokenizer(eos="<|pad|>").save_pretrained(tmp_path)
    special = gguf_tokenizer.vocabulary(tmp_path, {"vocab_size": VOCABULARY, "eos_token_id": [0, 2, 97]}).special
    assert special == {"bos": 1, "eos": 0, "eot": 2}


def pre_tokenizers() -> dict[str, Any]:
    """llama.cpp's name -> a pre-tokenizer of that kind, as tokenizer.json files have them."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    plain, after = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
    tail = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    head = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"

    def split(pattern: str) -> Any:
        return Sequence([Split(Regex(pattern), "isolated"), after])

    return {
        "gpt-2": plain,
        "smollm": Sequence([Digits(individual_digits=True), plain]),
        "llama-bpe": split(head + r"\p{N}{1,3}|" + tail),
        "smaug-bpe": split(head + r"\p{N}{1,3}|" + tail),
        "qwen2": split(head + r"\p{N}|" + tail),
        "tekken": split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "gpt-4o": split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    }


PRES = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o")


def with_pre(folder: Path, pre: Any, ignore_merges: bool = False) -> Path:
    """A tokenizer whose merges come from made-up English, numbers and blanks, split in that way."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    texts = [f"{text} {i} {i * 137}  I'Ve\n\n   we'll {'=' * (i % 7)}" for i, text in enumerate(sentences(300))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PRES)
def test_the_way_text_is_split_has_a_name(name: str, tmp_path: Path) -> None:
    with_pre(tmp_path, pre_tokenizers()[name], name in ("llama-bpe", "tekken"))
    found = gguf_tokenizer.vocabulary(tmp_path, {"vocab_size": 500})
    assert found.pre == name
    assert found.special == {"eos": 0}


def test_ways_without_a_name_are_refused(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Whitespace

    plain = ByteLevel(add_prefix_space=False)
    odd = {
        "Digits with settings": (Sequence([Digits(individual_digits=False), plain]), False),
        "Punctuation with settings": (Sequence([Punctuation(), plain]), False),
        "ByteLevel with settings": (ByteLevel(add_prefix_space=True), False),
        "Whitespace with settings": (Whitespace(), False),
        "GPT-2's own rule": (plain, True),
    }
    for number, (said, (pre, ignore)) in enumerate(odd.items()):
        with_pre(tmp_path / str(number), pre, ignore)
        with pytest.raises(ModelError, match=f"no name for how its tokenizer splits text .{said}.*--llama-cpp DIR"):
            gguf_tokenizer.vocabulary(tmp_path / str(number), {"vocab_size": 500})


def sentencepiece(folder: Path, merges: Any = None, prefix: bool = True, **model: Any) -> Path:
    """A tokenizer as transformers makes one from sentencepiece's BPE: a byte fallback, every union of two a merge."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁t", "he", "▁the", "in", "▁m", "end", "▁mend", "s", "▁s", "song", "▁▁"]
    letters = sorted({letter for piece in pieces for letter in piece} | set("abcdefghijklmnopqrstuvwxyz."))
    grown = ["on", "ng", "ong", "so", "en", "nd", "me", "men"]
    ordered = list(dict.fromkeys(grown + [piece for piece in pieces if len(piece) > 1]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *ordered, *letters]
    reached = {*ordered, *letters}
    every = [
        [token[:cut], token[cut:]]
        for token in ordered
        for cut in range(1, len(token))
        if token[:cut] in reached and token[cut:] in reached
    ]
    blanks: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **special} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [*[{"type": "Prepend", "prepend": "▁"}] * prefix, *blanks]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(every) if merges else every,
            **model,
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_sentencepieces_scores_bytes_and_types(tmp_path: Path) -> None:
    from gguf import TokenType

    found = gguf_tokenizer.vocabulary(sentencepiece(tmp_path), {"vocab_size": 310})
    assert found.model == "llama"
    assert found.add_space_prefix
    assert found.merges is None
    assert found.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert found.types[258:260] == [TokenType.BYTE, TokenType.NORMAL]
    assert found.types[-1] == TokenType.UNUSED
    assert found.scores is not None
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert [score[token] for token in ("on", "ng", "ong", "so", "en")] == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert not gguf_tokenizer.vocabulary(
        sentencepiece(tmp_path / "b", prefix=False), {"vocab_size": 310}
    ).add_space_prefix


def test_merges_that_no_score_can_order_are_refused(tmp_path: Path) -> None:
    """One merge missing, or a token's merges on both sides of another's: greedy merging would give other ids."""
    for number, change in enumerate((lambda every: every[:-1], lambda every: every[1:3] + every[:1] + every[3:])):
        with pytest.raises(ModelError, match="not sentencepiece's, by score alone: give --llama-cpp DIR"):
            gguf_tokenizer.vocabulary(sentencepiece(tmp_path / str(number), change), {"vocab_size": 310})


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    lower = Tokenizer(models.BPE())
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.add_tokens(["a"])
    suffixed = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    for number, (core, said) in enumerate(
        ((unigram, "is Unigram, not plain BPE"), (lower, "no Lowercase before"), (suffixed, "has end_of_word_suffix"))
    ):
        folder = tmp_path / str(number)
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
        with pytest.raises(ModelError, match=rf"{said}.*--llama-cpp DIR"):
            gguf_tokenizer.vocabulary(folder, {"vocab_size": 10})


def test_ids_must_have_rows_and_texts_of_their_own(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"token 367 .* has no row in the embeddings, which have 300"):
        gguf_tokenizer.vocabulary(tmp_path, {"vocab_size": 300})
    make_tokenizer([f"[PAD{VOCABULARY - 1}]", "<|bos|>", "<|end|>"]).save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match=r"two ids of its tokenizer mean '\[PAD383\]'"):
        gguf_tokenizer.vocabulary(tmp_path / "b", {"vocab_size": VOCABULARY})


# What is refused

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
}
REFUSED: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM is not shaped as a Llama": {"architectures": ["Qwen2ForCausalLM"]},
    "a model without a named architecture is not": {"architectures": None},
    "the model is quantised": {"quantization_config": {"quant_method": "gptq"}},
    "does not say vocab_size": {"vocab_size": None},
    "attend to 12 tokens only": {"architectures": ["MistralForCausalLM"], "sliding_window": 12},
    r"it has biases \(attention_bias\)": {"attention_bias": True},
    r"it has biases \(mlp_bias\)": {"mlp_bias": True},
    "its activation is gelu, not silu": {"hidden_act": "gelu"},
    "its rotary scaling is yarn; default, linear, llama3": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "its rotary scaling does not say high_freq_factor": {
        "rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}
    },
    "only a part of each head": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_models_that_are_not_covered(said: str, grouped: Path, tmp_path: Path) -> None:
    """In a sentence, asked before or while writing; no file is left."""
    import re

    assert re.search(said, why_not(LLAMA | REFUSED[said]))
    model = changed(grouped, tmp_path / "model", **REFUSED[said])
    with pytest.raises(
        ModelError, match=f"cannot be written as GGUF here: .*{said}.*: give --llama-cpp DIR, a checkout"
    ):
        write_model(model, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_that_are_covered() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 4096}
    assert why_not(LLAMA) == ""
    assert why_not(LLAMA | mistral | {"sliding_window": None}) == ""
    assert why_not(LLAMA | mistral | {"sliding_window": 4096}) == "", "a window as wide as the context is none"


def test_folders_that_are_not_whole(grouped: Path, tmp_path: Path) -> None:
    plain = safetensors.load_file(grouped / "model.safetensors")
    norm = "model.norm.weight"
    cases = {
        "lacks model.norm.weight": {key: value for key, value in plain.items() if key != norm},
        "holds model.norm.bias, for which a Llama has no place": plain | {"model.norm.bias": plain[norm]},
        r"model.norm.weight is F32 \[32\], not \[64\]": plain | {norm: plain[norm][:32].copy()},
        "lm_head has numbers too large for float16": plain | {"lm_head.weight": plain["lm_head.weight"] * 1e7},
    }
    for number, (said, kept) in enumerate(cases.items()):
        model = changed(grouped, tmp_path / str(number))
        safetensors.save_file(kept, model / "model.safetensors")
        with pytest.raises(ModelError, match=said):
            write_model(model, tmp_path / "a.gguf")
    (model / "model.safetensors").write_bytes((grouped / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged .*cut short"):
        write_model(model, tmp_path / "a.gguf")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks weights"):
        write_model(model, tmp_path / "a.gguf")
    (model / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        write_model(model, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_tensors_that_older_folders_hold_are_left_out(grouped: Path, tmp_path: Path) -> None:
    model = changed(grouped, tmp_path / "model")
    plain = safetensors.load_file(model / "model.safetensors")
    plain["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, dtype=np.float32)
    safetensors.save_file(plain, model / "model.safetensors")
    write_model(model, tmp_path / "a.gguf")
    assert len(tensors(tmp_path / "a.gguf")) == 21


@pytest.fixture(scope="module")
def whole(grouped: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file's bytes."""
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    write_model(grouped, path)
    return path.read_bytes()


@settings(max_examples=25)
@given(share=st.floats(0, 0.999))
def test_a_file_cut_short_is_refused(whole: bytes, share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"is no GGUF file|damaged or cut short"):
        read_header(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        read_header(tmp_path / "a.gguf")


# llama.cpp's converters, by stand-ins


STAND_IN = """
import json, os, sys
out = sys.argv[sys.argv.index("--outfile") + 1]
if "fail" in out: print("loading"); sys.exit("Traceback\\n  File x\\nNotImplementedError: no such model")
if "mute" in out: sys.exit(3)
if "nothing" not in out: json.dump([sys.argv[1:], os.environ["HF_HUB_OFFLINE"]], open(out, "w"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with scripts under the names of llama.cpp's."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text(STAND_IN)
    return folder


def test_llama_cpps_converters_are_run(checkout: Path, tmp_path: Path) -> None:
    model, adapter, out = tmp_path / "model", tmp_path / "adapter", tmp_path / "out.gguf"
    gguf_writer.by_converter(checkout, model, out, "bf16")
    assert json.loads(out.read_text()) == [[str(model), "--outfile", str(out), "--outtype", "bf16"], "1"]
    gguf_writer.lora_by_converter(checkout, adapter, model, out)
    assert json.loads(out.read_text())[0] == ["--base", str(model), "--outfile", str(out), str(adapter)]


def test_what_a_converter_says_last_is_the_sentence(checkout: Path, tmp_path: Path) -> None:
    for name, said in (
        ("fail.gguf", "failed: NotImplementedError: no such model"),
        ("mute.gguf", "failed: exit status 3, and nothing said"),
        ("nothing.gguf", "failed: exit status 0"),
    ):
        with pytest.raises(ModelError, match=f"convert_hf_to_gguf.py of .*llama.cpp {said}"):
            gguf_writer.by_converter(checkout, tmp_path / "model", tmp_path / name, "f16")
    with pytest.raises(ModelError, match=r"is no checkout of llama\.cpp: it has no convert_lora_to_gguf\.py"):
        gguf_writer.lora_by_converter(tmp_path, tmp_path, tmp_path, tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_must_be_trusted(name: str, checkout: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / name).write_text(json.dumps({"auto_map": {}}))
    with pytest.raises(ModelError, match=f"brings its own code .{name}.: add --trust-remote-code"):
        gguf_writer.by_converter(checkout, model, tmp_path / "out.gguf", "f16")
    gguf_writer.by_converter(checkout, model, tmp_path / "out.gguf", "f16", trust_remote_code=True)
    assert (tmp_path / "out.gguf").is_file()


# llama.cpp's own opinion


@contextlib.contextmanager
def llama(path: Path, **options: Any) -> Iterator[Any]:
    """A GGUF file in llama.cpp, on one thread, its cache in float32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="gguf: llama-cpp-python is not installed")
    settings = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **(settings | options))
    try:
        yield model
    finally:
        model.close()


def logprobs(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-softmax over the vocabulary, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("llama", {}),
    "every query its own key": ("llama", {"num_key_value_heads": 4}),
    "theta": ("llama", THETA),
    "linear": ("llama", LINEAR),
    "llama3, wide heads": ("llama3", {}),
    "tied": ("smollm2", {}),
    "mistral": ("mistral-full", {}),
}


@pytest.mark.gguf
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_scores_as_transformers_does(shape: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    kind, changes = SHAPES[shape]
    folder = make_model(tmp_path / "model", kind, uneven=True, **changes)
    write_model(folder, tmp_path / "a.gguf", "f32")
    ids = np.random.default_rng(0).integers(3, 360, 100).tolist()
    with llama(tmp_path / "a.gguf") as model:
        model.eval(ids)
        ours = logprobs(np.array(model.scores[: len(ids)]))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        theirs = logprobs(plain(torch.tensor([ids])).logits[0].numpy())
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


TEXTS = (
    "Hello world",
    "  two  blanks\n\n\tand tabs ",
    "I've can't WE'LL 12345 3.14",
    "naïve café über Größe",
    "日本語 😀🦙 नमस्ते",
    "a\r\nb\r\n\r\nc   ",
    "---===!!!???",
    "\n",
    " ",
    "1st 22nd 333rd 4444",
    "\u00a0nbsp\u2003em",
    "'RE 'Ve 's iPhone",
)


def same_ids(path: Path, tokenizer: Any, texts: tuple[str, ...]) -> None:
    with llama(path, vocab_only=True) as model:
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert model.tokenize(text.encode(), add_bos=True, special=False) == ids, text


@pytest.mark.gguf
def test_llama_cpp_tokenizes_the_lesson_as_transformers_does(tmp_path: Path) -> None:
    """Texts, answers of the world, and a conversation through the template, special tokens included."""
    from transformers import AutoTokenizer

    from spa_lite.lesson import world

    tokenizer = AutoTokenizer.from_pretrained(LESSON)
    write_model(LESSON, tmp_path / "a.gguf", "f16")
    tasks = tuple(task.text for family in world.FAMILIES for task in world.family_tasks(family)[:20])
    same_ids(tmp_path / "a.gguf", tokenizer, TEXTS + tasks)
    messages = [{"role": "user", "content": tasks[0]}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with llama(tmp_path / "a.gguf", vocab_only=True) as model:
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id in ids


@pytest.mark.gguf
@pytest.mark.parametrize("name", [*PRES, "sentencepiece", "sentencepiece without a blank before"])
def test_llama_cpp_tokenizes_as_transformers_does(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_model(tmp_path / "model", "smollm2", vocab_size=500)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    if name in PRES:
        with_pre(folder, pre_tokenizers()[name], name in ("llama-bpe", "tekken"))
    else:
        sentencepiece(folder, prefix=not name.endswith("before"))
    write_model(folder, tmp_path / "a.gguf")
    same_ids(
        tmp_path / "a.gguf", AutoTokenizer.from_pretrained(folder), (*TEXTS, *sentences(20), "mends the  songs  in")
    )


def test_the_modules_import_no_framework_by_themselves() -> None:
    """gguf and torch are imported by who needs them."""
    import subprocess

    script = (
        "import sys; from spa_lite.backends import gguf_writer; sys.exit(bool({'gguf', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
