"""Loading a Hugging Face causal LM, and the two halves of its forward pass: hidden states, then the head."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from spa_lite.backend import ModelSettings
from spa_lite.backends import memory
from spa_lite.backends.model_folder import (
    Known,
    check_name,
    context_of,
    digest_weights,
    eos_ids,
    fetch,
    folder_of,
    generation_of,
    offline,
)
from spa_lite.backends.packing import Packed, pack
from spa_lite.backends.quiet import quiet
from spa_lite.backends.torch_attention import LONG, by_response, with_parts
from spa_lite.errors import BackendError, BackendMissing, ModelError
from spa_lite.records import Row

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """What came out of a model folder or a hub name."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    weights_digest: str


def load(settings: ModelSettings) -> Loaded:
    """Model and tokenizer in evaluation mode, dropout off in the config too. Safetensors only, never pickle."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    name = check_name(settings.model)
    extra: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    with quiet():
        config = fetch(name, "config", lambda: AutoConfig.from_pretrained(name, **extra))
        _no_dropout(config)
        tokenizer = fetch(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(name, **extra))
        extra |= {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        if settings.load_in_4bit:
            extra |= {"quantization_config": _four_bit(device, dtype), "device_map": {"": device}}
        model, info = fetch(name, "weights", lambda: AutoModelForCausalLM.from_pretrained(name, **extra))
        if info["missing_keys"]:
            raise ModelError(f"the weights of {name} are incomplete: {sorted(info['missing_keys'])[0]} is missing")
        ends = eos_ids(config, getattr(model, "generation_config", None))
    # With a pad id set, transformers warns about batches without a mask; causal attention needs none on the right.
    model.config.pad_token_id = None
    if not settings.load_in_4bit:
        model.to(device)
    return Loaded(model.eval(), tokenizer, ends, device, dtype, digest_weights(folder_of(name)))


def known(settings: ModelSettings, folder: Path) -> Known:
    """What `load` would say of the model in a folder, from its configuration alone."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    if settings.load_in_4bit:
        _four_bit(device, dtype)
    with quiet():
        config = fetch(str(folder), "config", lambda: AutoConfig.from_pretrained(folder, **offline(settings)))
        generation = generation_of(folder) or GenerationConfig.from_model_config(config)
    return Known(
        config=config.to_dict(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        bits=bits_of(settings, dtype),
        context=context_of(config.get_text_config()),
        eos_ids=eos_ids(config, generation),
        free_memory=lambda: free_memory(device),
    )


def bits_of(settings: ModelSettings, dtype: torch.dtype) -> int:
    """Bits per weight of the linear layers."""
    return 4 if settings.load_in_4bit else torch.finfo(dtype).bits


def pick_device(wanted: str) -> torch.device:
    """auto: CUDA, then MPS, then CPU. A device that is not there is refused."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise BackendError(f"there is no device {wanted!r}: use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {wanted!r} is not here: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BackendError("device 'mps' is not here: it needs Apple silicon; use cpu or cuda")
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA devices that have it, float32 elsewhere."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if wanted not in DTYPES:
        raise BackendError(f"there is no dtype {wanted!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[wanted]


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device; what PyTorch holds there for later use counts as free."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type == "mps":
        return max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory()))
    return memory.free()


def trim_heap(device: torch.device) -> None:
    """Give the unused pages of glibc's heap back to the system, if `device` is the CPU and glibc is there.

    They are taken again when next needed. Twice per micro-batch that added 10 % to the CPU time of training a Llama of
    30 M parameters, and 1 % at 135 M, whose peak fell by a third.
    """
    trim = getattr(LIBC, "malloc_trim", None)
    if device.type == "cpu" and trim is not None:
        trim(0)


def _no_dropout(config: Any) -> None:
    """Zero every dropout rate, so that a step's log-probs are those of the sampler and the judge."""
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        for field, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in field):
                setattr(part, field, 0.0)


def _four_bit(device: torch.device, dtype: torch.dtype) -> Any:
    if device.type != "cuda":
        raise BackendError(f"4-bit weights need CUDA; on {device.type} leave --load-in-4bit out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BackendMissing("4-bit weights need bitsandbytes: pip install 'spa-lite[4bit]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # type: ignore[no-untyped-call]


class Net:
    """The forward pass in two halves, so that logits are made only where they are wanted.

    `hidden` gives what the head reads, [batch, time, width]; `head` turns any rows of it into float32 logits.
    A model whose logits are not its head of its body's output (checked once on a few tokens) is run whole:
    then "hidden" is already the logits and `head` changes nothing. `whole` says so.

    `shared` is the longest line on which several responses may follow one prompt, each with restarted positions and a
    mask of its own; 0 where the model cannot do that (tried once, too), and `apart` says why.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.body = model.base_model
        self.vocab = int(model.get_output_embeddings().weight.shape[0])
        self.text = model.config.get_text_config()
        self.context = context_of(self.text)
        self._multiply = float(getattr(self.text, "logit_scale", None) or 1.0) / float(
            getattr(self.text, "logits_scaling", None) or 1.0
        )
        self._cap = getattr(self.text, "final_logit_softcapping", None)
        self.whole = False
        self.whole = not self._halves_agree()
        self._entry = self.model if self.whole else self.body
        self._takes_positions = "position_ids" in inspect.signature(self._entry.forward).parameters
        self.attention = str(getattr(model.config, "_attn_implementation", None))
        self.split_from: int | None = None  # tokens of a line that is attended to response by response; None: none is
        self.apart = self._why_apart()
        self.shared = 0 if self.apart else min([self.context, *_windows(self.text)])
        if self.shared and self.attention == "sdpa" and device.type == "cpu":
            self.split_from = 0 if by_response(model) else None  # the lines that are tried out are short
            self.split_from = None if self.split_from is None or self._why_apart() else LONG

    def hidden(
        self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """What the head reads, [batch, time, width], for ids [batch, time]; `mask` covers cache and ids."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if positions is not None and self._takes_positions:
            inputs["position_ids"] = positions
        out = self._entry(**inputs)
        found: Tensor = out.logits if self.whole else out.last_hidden_state
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., vocabulary] of rows of `hidden`: `finish` of `project`."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        """The head's product alone, in its own precision."""
        # Asked for anew each time: an adapter may have wrapped it.
        made: Tensor = hidden if self.whole else self.model.get_output_embeddings()(hidden)
        return made

    def finish(self, made: Tensor) -> Tensor:
        """Float32 logits of what `project` made: scaled, then capped."""
        logits = made.float()
        if self.whole:
            return logits
        if self._multiply != 1.0:
            logits = logits * self._multiply
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def unfinish(self, slope: Tensor, logits: Tensor) -> Tensor:
        """From d / d logits to d / d what `project` made, given the logits; both tensors are used up."""
        if self.whole:
            return slope
        if self._cap is not None:
            slope *= logits.div_(self._cap).square_().neg_().add_(1.0)
        return slope if self._multiply == 1.0 else slope.mul_(self._multiply)

    @property
    def capped(self) -> bool:
        """Whether logits are not linear in what the head reads."""
        return self._cap is not None and not self.whole

    @property
    def head_adapted(self) -> bool:
        """Whether some adapter is on the head, so that it is not the same for all roles."""
        head = self.model.get_output_embeddings()
        return not self.whole and any(isinstance(module, BaseTunerLayer) for module in head.modules())

    def tensor(self, values: Any, dtype: torch.dtype = torch.long) -> Tensor:
        """A tensor on the model's device."""
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def mask(self, packed: Packed) -> Tensor | None:
        """What each position of packed lines may see, [L, 1, W, W], in the form that this model's attention takes; None
        where attention is plainly causal."""
        if not packed.branching:
            return None
        seen = self.tensor(packed.mask(), torch.bool)[:, None]
        if self.split_from is not None and packed.ids.shape[1] >= self.split_from:
            return with_parts(seen, packed, self.model.dtype)
        if self.attention == "sdpa":
            return seen
        added = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
        return added.masked_fill_(~seen, torch.finfo(self.model.dtype).min)

    @torch.inference_mode()
    def _halves_agree(self) -> bool:
        ids = self.tensor([[token % self.vocab for token in (1, 5, 2, 7, 3)]])
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        self._entry, self._takes_positions = self.body, False
        try:
            mine = self.head(self.hidden(ids))
        except (AttributeError, TypeError, RuntimeError):
            return False
        if mine.shape != expected.shape:
            return False
        # Loose on purpose: a head that leaves something out is off by far more than rounding.
        return bool((mine - expected).abs().max() <= 1e-2 * expected.abs().max())

    @torch.inference_mode()
    def _why_apart(self) -> str:
        """Why responses cannot share their prompt's line; empty if they can: then what the head reads is the same."""
        if not self._takes_positions:
            return "the model takes no positions"
        if self.attention not in ("sdpa", "eager"):
            return f"{self.attention} attention takes no mask of this kind"
        row = Row(prompt=(1, 5, 2), responses=((7, 3, 1, 9), (4, 8, 6)))
        try:
            one, two = (self._at_responses(pack([row], shared)) for shared in (self.context, 0))
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"the model cannot: {type(error).__name__}"
        loose = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        same = (one - two).abs().max() <= loose * two.abs().max()
        return "" if same else "the model sees more than its mask"

    def _at_responses(self, laid: Packed) -> Tensor:
        ids, positions = self.tensor(laid.ids % self.vocab), self.tensor(laid.positions)
        hidden = self.hidden(ids, self.mask(laid), positions if laid.branching else None)
        return hidden.flatten(0, 1)[self.tensor(laid.places)].float()


def _windows(text: Any) -> list[int]:
    """How far back layers look that do not see everything: up to there a mask is all that decides."""
    names = [name for name in vars(text) if name.endswith(("window", "window_size", "chunk_size"))]
    found = [getattr(text, name) for name in names]
    return [size for size in found if isinstance(size, int) and not isinstance(size, bool) and size > 0]


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers; packed 4-bit weights count as what they stand for."""
    total = 0
    for parameter in parameters:
        packed = type(parameter).__name__ == "Params4bit"
        total += parameter.numel() * (2 if packed else 1)
    return total
