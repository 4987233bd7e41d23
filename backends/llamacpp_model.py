"""llama.cpp through its C functions: the model in a GGUF file, and contexts that feed it tokens of many sequences.

llama-cpp-python's own `Llama` works on one sequence at a time, has a context of 512 tokens unless told, and its
`create_completion(echo=True, logprobs=k)` lists each token's log-prob from the position after the right one.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import psutil
from numpy.typing import NDArray

from spa_lite.backend import Floats, ModelSettings
from spa_lite.backends.gguf_header import Header, read_header
from spa_lite.errors import BackendError, ModelError

SEQUENCES = 256
"""The most sequences that a context of llama.cpp may hold."""
BATCH = 512
"""Tokens in a forward pass, as llama.cpp's own programs have it: its attention grows with this times the context."""
LOGITS = 2**25
"""Numbers of logits that a forward pass may make: 128 MiB, whatever the vocabulary."""
CACHE = 2**31
"""Bytes that the keys and values of all sequences may take, where there is a choice."""
PAD = 256
"""llama.cpp rounds the length of sequences up to a multiple of this."""
WHOLE = {"F32", "F16", "BF16"}
"""Kinds of tensors that are not quantised."""
DEVICES = ("auto", "cpu", "gpu")

Line = tuple[int, Sequence[int]]
"""A sequence's number, and the tokens that are put at its end."""

said: list[str] = []
"""The last errors that llama.cpp spoke of: it prints them, and tells its callers only that something failed."""


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _listen(level: int, text: bytes, _: Any) -> None:
    if level in (3, 4) and text.strip():  # warnings and errors
        said.append(" ".join(text.decode("utf-8", "replace").split()))
        del said[:-8]


def load(settings: ModelSettings) -> Net:
    """The model in a GGUF file. Raises ModelError where the file, or BackendError where a setting cannot be used."""
    check_settings(settings)
    path = Path(settings.model).expanduser()
    header = check_file(path)
    api.llama_log_set(_listen, ctypes.c_void_p(0))
    api.llama_backend_init()
    wanted = api.llama_model_default_params()
    wanted.n_gpu_layers = -1 if on_gpu(settings.device) else 0
    said.clear()
    with unpacked(path, header, settings) as source:
        wanted.use_mmap = source == path
        model = api.llama_model_load_from_file(os.fsencode(source), wanted)
    if not model:
        raise ModelError(f"llama.cpp cannot load {path}: {reason()}")
    if api.llama_model_has_encoder(model):
        api.llama_model_free(model)
        raise ModelError(f"{path} has an encoder, which is not used here: take a model that only decodes")
    return Net(model, header, settings)


def check_settings(settings: ModelSettings) -> None:
    """Raise BackendError for a setting that means nothing with a GGUF file."""
    if settings.device not in DEVICES:
        raise BackendError(f"--device {settings.device} means nothing to llama.cpp: give auto, cpu or gpu")
    if settings.device == "gpu" and not api.llama_supports_gpu_offload():
        raise BackendError("this llama-cpp-python was built without a GPU: build it for one, or leave --device out")
    if settings.dtype not in ("auto", "float32"):
        raise BackendError("a GGUF file has its own precision: leave --dtype out, or give float32, which unpacks it")
    if settings.load_in_4bit:
        raise BackendError("a GGUF file has its own precision: leave --load-in-4bit out, or quantise the file")


def check_file(path: Path) -> Header:
    """The header of a file that holds a whole language model. Raises ModelError if it does not."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder, and llama.cpp reads one file: give --model FILE.gguf")
    header = read_header(path)
    if header.values.get("general.type") == "adapter":
        raise ModelError(f"{path} is an adapter, not a model: give the model as --model and this as --adapter-path")
    if int(header.values.get("split.count", 1)) > 1:
        raise ModelError(f"{path} is one part of a model: join the parts with `llama-gguf-split --merge` first")
    if not header.setting("block_count") or not header.token("tokens"):
        raise ModelError(f"{path} holds no language model with its tokenizer: export or download another file")
    if header.setting("attention.causal") is False:
        raise ModelError(
            f"{path} is a {header.architecture}, which reads whole texts and writes none: take another model"
        )
    return header


@contextmanager
def unpacked(path: Path, header: Header, settings: ModelSettings) -> Iterator[Path]:
    """The file itself; for float32 a copy of it that has all weights in float32, and is gone afterwards.

    On a CPU llama.cpp rounds what it multiplies with 16-bit or quantised weights as coarsely as these are.
    """
    if settings.dtype == "auto" or header.kind == "F32":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="spa-lite-") as folder:
        copy = Path(folder) / path.name
        wanted = api.llama_model_quantize_default_params()
        wanted.ftype, wanted.allow_requantize = api.LLAMA_FTYPE_ALL_F32, True
        if api.llama_model_quantize(os.fsencode(path), os.fsencode(copy), ctypes.byref(wanted)):
            raise ModelError(f"{path} cannot be unpacked to float32 in {folder}: {reason()}")
        yield copy


def reason() -> str:
    """What llama.cpp said last, without the names of its functions."""
    errors = [line.partition(": ")[2] or line for line in said if "failed to load model" not in line]
    return (errors or ["it does not say why"])[-1].rstrip(".")[:200]


def on_gpu(device: str) -> bool:
    """Whether all layers go to a GPU."""
    return device != "cpu" and bool(api.llama_supports_gpu_offload())


def threads() -> int:
    """Threads of a forward pass: what OMP_NUM_THREADS says, else one for each core."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else psutil.cpu_count(logical=False) or os.cpu_count() or 1


class Handle:
    """A thing of llama.cpp's that is freed once nobody holds it, and never before what is built on it."""

    def __init__(self, pointer: Any, free: Any, *needs: Any) -> None:
        self.pointer = pointer
        weakref.finalize(self, _free, free, pointer, *needs)


def _free(free: Any, pointer: Any, *needs: Any) -> None:
    if not sys.is_finalizing():
        free(pointer)


class Net:
    """A loaded model."""

    def __init__(self, pointer: Any, header: Header, settings: ModelSettings) -> None:
        self.model, self.header = Handle(pointer, api.llama_model_free), header
        self.gpu, self.kind = on_gpu(settings.device), "F32" if settings.dtype == "float32" else header.kind
        self.context = int(api.llama_model_n_ctx_train(pointer))
        self.vocabulary = api.llama_model_get_vocab(pointer)
        self.vocab = int(api.llama_vocab_n_tokens(self.vocabulary))
        self.shared = self.context  # packing counts a row's prompt once, as it is read
        self.parameters = int(api.llama_model_n_params(pointer))
        # Keys and values in half precision put log-probs 1e-3 off, which is less than quantising does.
        self.cache_kind = "F32" if self.kind in WHOLE else "F16"

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own ids of a text, in which nothing is a control token."""
        data = text.encode()
        found = (api.llama_token * (len(data) + 8))()
        count = api.llama_tokenize(self.vocabulary, data, len(data), found, len(found), False, False)
        return list(found[: max(0, count)])

    def sequences(self, width: int, least: int) -> int:
        """How many sequences of so many tokens a context holds, at least `least`."""
        each = self.cache_bytes(width)
        return max(least, min(SEQUENCES, CACHE // each if each else SEQUENCES))

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of one sequence of so many tokens; 0 where the file does not say enough."""
        shape = self.header.config
        heads = shape.get("num_key_value_heads") or shape.get("num_attention_heads")
        if not isinstance(heads, int):
            return 0
        wide = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        room = -(-tokens // PAD) * PAD
        return int(2 * room * shape["num_hidden_layers"] * heads * wide * (4 if self.cache_kind == "F32" else 2))


class Context:
    """Sequences 0, 1, ... of up to `width` tokens each, with one adapter for good.

    Each has a cache of its own: in a common one every token would look at, and mask, what all the others wrote.
    """

    def __init__(self, net: Net, sequences: int, width: int, adapter: Handle | None = None) -> None:
        self.net, self.adapter = net, adapter
        self.most = max(1, min(BATCH, LOGITS // net.vocab))
        wanted = api.llama_context_default_params()
        wanted.n_seq_max, wanted.n_ctx = sequences, sequences * -(-width // PAD) * PAD
        wanted.n_batch = wanted.n_ubatch = max(BATCH, sequences)
        wanted.n_threads = wanted.n_threads_batch = threads()
        wanted.type_k = wanted.type_v = {"F32": api.GGML_TYPE_F32, "F16": api.GGML_TYPE_F16}[net.cache_kind]
        wanted.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED  # slower on a CPU, and it rounds
        wanted.kv_unified, wanted.no_perf = False, True
        wanted.offload_kqv = wanted.op_offload = net.gpu
        said.clear()
        made = api.llama_init_from_model(net.model.pointer, wanted)
        if not made:
            raise MemoryError(f"no room for {sequences} sequences of {width} tokens ({reason()})")
        self.handle = Handle(made, api.llama_free, net.model, adapter)
        self.memory = api.llama_get_memory(made)
        if adapter:
            one, scale = (api.llama_adapter_lora_p_ctypes * 1)(adapter.pointer), (ctypes.c_float * 1)(1.0)
            if api.llama_set_adapters_lora(made, one, 1, scale):
                raise BackendError("llama.cpp refused the adapter")

    def read(self, lines: Sequence[Line]) -> NDArray[np.float32]:
        """Put tokens at the end of sequences; the logits [lines, vocabulary] after the last of each line.

        Lines by ascending sequence, which llama.cpp wants to compute them together, and best by falling length.
        """
        found = [logits.copy() for logits in self._feed(lines, False, max(BATCH, len(lines)))]
        return np.concatenate(found)

    def score(self, lines: Sequence[Line]) -> Iterator[NDArray[np.float32]]:
        """The same, but yield the logits [tokens, vocabulary] after each token, in the order of the lines, piece by
        piece. A piece is gone when the next one comes."""
        return self._feed(lines, True, self.most)

    def copy(self, source: int, target: int) -> None:
        """Make a sequence what another one is."""
        api.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def forget(self, sequence: int) -> None:
        """Empty a sequence."""
        api.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def _feed(self, lines: Sequence[Line], every: bool, most: int) -> Iterator[NDArray[np.float32]]:
        tokens = np.concatenate([np.asarray(line, np.int32) for _, line in lines])
        sizes = [len(line) for _, line in lines]
        owner = np.repeat(np.array([sequence for sequence, _ in lines], np.int32), sizes)
        wanted = np.full(len(tokens), every, np.int8)
        wanted[np.cumsum(sizes) - 1] = True
        start = 0
        for stop in _cuts(sizes, most):
            logits = self._decode(tokens[start:stop], owner[start:stop], wanted[start:stop])
            if len(logits):
                yield logits
            start = stop

    def _decode(
        self, tokens: NDArray[np.int32], owner: NDArray[np.int32], wanted: NDArray[np.int8]
    ) -> NDArray[np.float32]:
        """One forward pass; positions go on from what each sequence holds."""
        count = np.ones(len(tokens), np.int32)
        owners = owner.ctypes.data + owner.itemsize * np.arange(len(owner), dtype=np.uintp)
        batch = api.llama_batch(
            n_tokens=len(tokens),
            token=_pointer(tokens, api.llama_token),
            n_seq_id=_pointer(count, ctypes.c_int32),
            seq_id=_pointer(owners, ctypes.POINTER(api.llama_seq_id)),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        said.clear()
        status = api.llama_decode(self.handle.pointer, batch)
        if status:
            raise BackendError(f"llama.cpp could not compute {len(tokens)} tokens ({status}: {reason()})")
        shape = (int(wanted.sum()), self.net.vocab)
        if not shape[0]:
            return np.zeros(shape, np.float32)
        return np.ctypeslib.as_array(api.llama_get_logits(self.handle.pointer), shape)


def _cuts(sizes: Sequence[int], most: int) -> Iterator[int]:
    """Where to cut lines that lie behind each other: between lines if they fit, else within a long one."""
    start = end = 0
    for size in sizes:
        if end + size - start > most and end > start:
            yield end
            start = end
        end += size
        while end - start > most:
            start += most
            yield start
    yield end


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def log_softmax(logits: NDArray[np.float32], tokens: NDArray[Any]) -> Floats:
    """Log-prob [N] of a token after each row of logits [N, vocabulary], summed in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64)
    return shifted[np.arange(len(tokens)), tokens].astype(np.float64) - np.log(total)
