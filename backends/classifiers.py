"""Sequence classifiers as judges: reward models with one output, and encoders that read two answers at once.

A reward model reads the conversation as its own chat template renders it; one without a template reads question and
answer as a pair of texts. An encoder that compares reads one line of text made from a template, with the question and
both answers in it, and its one output is the log-odds that the first is better. PairRM, whose head is its own, is
known by its config. Weights are safetensors, never pickle.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Model

from spa_lite.backends import memory
from spa_lite.backends.chat import ChatTokenizer
from spa_lite.backends.model_folder import check_name, context_of, digest_weights, fetch, fetched
from spa_lite.backends.quiet import quiet
from spa_lite.backends.torch_model import pick_device, pick_dtype
from spa_lite.errors import BackendError, ModelError, OutOfMemory
from spa_lite.judges.reward import Classifier, Question
from spa_lite.keys import digest
from spa_lite.opinion import Tick
from spa_lite.records import Message

PAIR = "pair:"
"""Before a folder's name: the classifier in it compares two answers, though its config does not say so."""
TEMPLATE = "spa_lite_pair_template"
"""The key of config.json that says so, and how: a text with {question}, {first} and {second} in it."""
SLOTS = re.compile(r"\{(question|first|second)\}")
MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
PAIRRM = "[CLS]<|source|>{question}[SEP][CLS]<|candidate1|>{first}[SEP][CLS]<|candidate2|>{second}[SEP]"
PAIRRM_CONTEXT, PAIRRM_QUESTION = 2048, 1224
"""What PairRM was trained with; its config has DeBERTa's 512, which relative positions do not need."""
BATCH = 16
"""Texts read together, at most; half as many where memory runs out."""


def load(folder_or_hub_name: str, device: str = "auto", trust_remote_code: bool = False) -> Classifier:
    """A classifier from a model folder or the hub; `pair:` before the name says that it compares.

    Raises ModelError where it is no classifier, has several outputs, or has no safetensors weights.
    """
    name = folder_or_hub_name.removeprefix(PAIR)
    folder = _folder(name, trust_remote_code)
    with quiet():
        extra = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        config = fetch(name, "config", lambda: AutoConfig.from_pretrained(folder, **extra))
        tokenizer = fetch(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(folder, **extra))
        where = pick_device("auto" if device == "gpu" else device)  # gpu is MLX's word
        if is_pairrm(config):
            marks = [tokenizer.convert_tokens_to_ids(mark) for mark in MARKS]
            net: nn.Module = fetch(name, "weights", lambda: PairRM.load(folder, config, marks))
        else:
            net = _sequence_classifier(name, folder, config, extra | {"dtype": pick_dtype("auto", where)})
        net = net.to(where).eval()
    reader = _Reader(name, net, config, tokenizer, where)
    template = PAIRRM if is_pairrm(config) else getattr(config, TEMPLATE, None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    prints = digest(digest_weights(folder), words, tokenizer.chat_template).hex()
    if template is None and not folder_or_hub_name.startswith(PAIR):
        return RewardModel(reader, prints)
    return PairEncoder(reader, prints, template or _plain_template(tokenizer))


def _folder(name: str, code: bool) -> Path:
    """The folder of a classifier, fetched if need be. Raises ModelError without safetensors weights."""
    try:
        folder = fetched(check_name(name), code)
    except ModelError as error:
        raise ModelError(f"the judge's model: {str(error).replace('--model', '--judge-model')}") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name} has no *.safetensors weights, and pickled ones are not read: they may run any program; "
            "convert them with `save_pretrained` first, or name another --judge-model"
        )
    if not (folder / "config.json").is_file() or "model_type" not in json.loads((folder / "config.json").read_text()):
        raise ModelError(
            f"{name} is not in transformers' format: its config.json names no model type "
            "(of PairRM there is a version that is: llm-blender/PairRM-hf)"
        )
    return folder


def _sequence_classifier(name: str, folder: Path, config: Any, extra: dict[str, Any]) -> nn.Module:
    """The model with its head, both read from the folder: an absent head would be filled with random numbers."""
    kinds = getattr(config, "architectures", None) or ()
    if config.num_labels != 1 and kinds and not any("Classification" in kind for kind in kinds):
        raise ModelError(f"{name} is no reward model but a {kinds[0]}; give --judge-model a sequence classifier")
    if config.num_labels != 1:
        labels = ", ".join(str(config.id2label[i]) for i in sorted(config.id2label))
        raise ModelError(
            f"{name} has {config.num_labels} outputs ({labels}), and which of them is a reward cannot be known; "
            "give --judge-model a classifier with one output (num_labels = 1)"
        )
    extra = extra | {"use_safetensors": True, "output_loading_info": True}
    net, info = fetch(
        name, "weights", lambda: AutoModelForSequenceClassification.from_pretrained(folder, config=config, **extra)
    )
    if info["missing_keys"]:
        raise ModelError(
            f"{name} is no reward model: its weights have no {sorted(info['missing_keys'])[0]}; "
            "give --judge-model a sequence classifier"
        )
    found: nn.Module = net
    return found


def is_pairrm(config: Any) -> bool:
    """Whether a config is that of PairRM in transformers' format."""
    return config.model_type == "deberta-v2" and hasattr(config, "source_prefix_id")


class PairRM(nn.Module):
    """DeBERTa and a small head that scores each candidate from its own mark and the question's."""

    def __init__(self, config: Any, marks: Sequence[int]) -> None:
        super().__init__()
        self.marks = marks
        self.pretrained_model = DebertaV2Model(config)
        width, tasks = config.hidden_size, getattr(config, "n_tasks", 1)
        idle = nn.Identity()  # dropout in training; the weights are numbered with it
        self.head_layer = nn.Sequential(idle, nn.Linear(2 * width, width), nn.Tanh(), idle, nn.Linear(width, tasks))

    @classmethod
    def load(cls, folder: Path, config: Any, marks: Sequence[int]) -> PairRM:
        """Raises RuntimeError if a tensor is missing, left over or of another shape."""
        net = cls(config, marks)
        tensors = {
            name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        tensors.pop("pretrained_model.embeddings.position_ids", None)  # written by older versions; no weight
        net.load_state_dict(tensors)
        return net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds [batch, 1] that the first candidate is better, for ids [batch, time] with the three marks."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = (self._at(states, input_ids, mark) for mark in self.marks)
        scores = [self.head_layer(torch.cat([source, one], dim=-1)) for one in (first, second)]
        return (scores[0] - scores[1]).mean(dim=-1, keepdim=True)

    def _at(self, states: Tensor, ids: Tensor, mark: int) -> Tensor:
        """States [batch, width] at the first place of a mark."""
        places = (ids == mark).int().argmax(dim=1)
        return states[torch.arange(len(ids), device=ids.device), places]


@dataclass(frozen=True)
class Text:
    """Ids of one text. `types` (segment of each token) is empty where the model has no segments."""

    ids: list[int]
    types: list[int]


class _Reader:
    """Texts in, one number each out: what both kinds of classifier share."""

    def __init__(self, name: str, net: nn.Module, config: Any, tokenizer: Any, device: torch.device) -> None:
        self.name, self.net, self.tokenizer, self.device = name, net, tokenizer, device
        self.config = getattr(net, "config", config).get_text_config()  # the model keeps a copy of its own
        self.pad = self.config.pad_token_id
        self.limit = PAIRRM_CONTEXT if is_pairrm(config) else _limit(config, tokenizer)
        self.batch, self.cut = BATCH, 0

    def plain(self, text: str) -> list[int]:
        """Ids of what people wrote: a special token's string in it is plain text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return ids

    def read(self, texts: Sequence[Text], tick: Tick) -> list[float]:
        """The output for each text, those of like length together."""
        found: dict[int, float] = {}
        waiting = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
        while waiting:
            some = waiting[: self.batch]
            values = self._outputs([texts[i] for i in some])
            if values is None:
                if len(some) == 1:
                    raise OutOfMemory(f"memory ran out when {self.name} read one text; use a smaller --judge-model")
                self.batch = max(1, len(some) // 2)
                gc.collect()
                continue
            for i, value in zip(some, values, strict=True):
                if not math.isfinite(value):
                    raise BackendError(f"{self.name} gave a reward that is not a number; use another --judge-model")
                found[i] = value
                tick()
            waiting = waiting[len(some) :]
        return [found[i] for i in range(len(texts))]

    def _outputs(self, texts: Sequence[Text]) -> list[float] | None:
        """The outputs of one batch; None where memory ran out."""
        try:
            with torch.inference_mode(), quiet():
                out = self.net(**self._padded(texts))
                values: list[float] = (out if isinstance(out, Tensor) else out.logits).float()[:, 0].tolist()
                return values
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
        return None

    def _padded(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """A right-padded batch with its mask.

        A decoder reads its reward at the last token that is not padding, and refuses a batch if its config knows no
        such id. Then an id that occurs in none of the texts is made one, so that the last token stays the last.
        """
        pad = self.pad
        if pad is None:
            used = {i for text in texts for i in text.ids}
            pad = next(i for i in range(len(used) + 1) if i not in used)
            self.config.pad_token_id = pad
        width = max(len(text.ids) for text in texts)

        def grid(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows]).to(self.device)

        found = {
            "input_ids": grid([text.ids for text in texts], pad),
            "attention_mask": grid([[1] * len(text.ids) for text in texts], 0),
        }
        if texts[0].types:
            found["token_type_ids"] = grid([text.types for text in texts], 0)
        return found


class _Named:
    """What both kinds say of themselves."""

    def __init__(self, reader: _Reader, fingerprint: str) -> None:
        self._reader, self.fingerprint = reader, fingerprint
        self.name = reader.name

    @property
    def cut(self) -> int:
        """How many texts lost a part."""
        return self._reader.cut

    def tokens(self, text: str) -> int:
        """Length of a text in this model's tokens."""
        return len(self._reader.plain(text))


class RewardModel(_Named):
    """A reward per conversation. What is too long loses the beginning of the question, never of the answer."""

    compares = False

    def __init__(self, reader: _Reader, fingerprint: str) -> None:
        super().__init__(reader, fingerprint)
        has_template = reader.tokenizer.chat_template is not None
        self._chat = _Conversations(reader.tokenizer, reader.name) if has_template else None

    def scores(self, conversations: Sequence[Sequence[Message]], tick: Tick = lambda: None) -> list[float]:
        """The reward of each conversation's last turn."""
        return self._reader.read([self._text(turns) for turns in conversations], tick)

    def comparisons(self, questions: Sequence[Question], tick: Tick = lambda: None) -> list[float]:
        """The difference of two rewards."""
        told = [(*turns, Message(role="assistant", content=text)) for turns, *both in questions for text in both]
        found = self.scores(told, lambda: None)
        for _ in questions:
            tick()
        return [first - second for first, second in zip(found[0::2], found[1::2], strict=True)]

    def _text(self, turns: Sequence[Message]) -> Text:
        if self._chat is None:
            return self._two_segments(question_of(turns[:-1]), turns[-1].content)
        ids, limit = self._chat.encode_conversation(turns), self._reader.limit
        if len(ids) > limit:
            self._reader.cut += 1
            ids = [ids[0], *ids[len(ids) - limit + 1 :]]  # the first is the beginning of text
        return Text(ids, [])

    def _two_segments(self, question: str, answer: str) -> Text:
        """Question and answer with whatever the tokenizer puts around and between two texts."""
        tokenizer, limit = self._reader.tokenizer, self._reader.limit
        extra: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
        told = tokenizer(question, answer, **extra)
        excess = len(told["input_ids"]) - limit
        if excess > 0:
            self._reader.cut += 1
            fits = excess < len(self._reader.plain(question))
            tokenizer.truncation_side = "left" if fits else "right"
            how = "only_first" if fits else "longest_first"
            told = tokenizer(question, answer, truncation=how, max_length=limit, **extra)
        return Text(told["input_ids"], told.get("token_type_ids", []))


class PairEncoder(_Named):
    """Reads a question and two answers at once. What is too long loses its end: the question beyond three fifths of
    the room, then the answers beyond half of what is left each."""

    compares = True

    def __init__(self, reader: _Reader, fingerprint: str, template: str) -> None:
        super().__init__(reader, digest(fingerprint, template).hex())
        parts = SLOTS.split(template)
        if sorted(parts[1::2]) != ["first", "question", "second"]:
            raise ModelError(
                f"{TEMPLATE} in the config.json of {reader.name} needs each of {{question}}, {{first}} and {{second}} "
                "once"
            )
        self._slots = parts[1::2]
        self._between = [reader.tokenizer.encode(part, add_special_tokens=False) for part in parts[0::2]]

    def scores(self, conversations: Sequence[Sequence[Message]], tick: Tick = lambda: None) -> list[float]:
        """Raises BackendError: one answer alone has no reward here."""
        raise BackendError(f"{self.name} compares two answers and has no reward for one")

    def comparisons(self, questions: Sequence[Question], tick: Tick = lambda: None) -> list[float]:
        """The log-odds that the answer shown first is better."""
        return self._reader.read([self._text(*question) for question in questions], tick)

    def _text(self, turns: Sequence[Message], first: str, second: str) -> Text:
        plain, limit = self._reader.plain, self._reader.limit
        ids = {"question": plain(question_of(turns)), "first": plain(first), "second": plain(second)}
        marks = [len(part) for part in self._between]
        own = marks[0] + marks[-1]  # in PairRM's template: what stands around the question
        room = limit - sum(marks)
        most = min(len(ids["question"]), max(0, limit * PAIRRM_QUESTION // PAIRRM_CONTEXT - own))
        limits = {"question": most, "first": (room - most) // 2, "second": (room - most) // 2}
        if any(len(ids[slot]) > limits[slot] for slot in ids):
            self._reader.cut += 1
        found = list(self._between[0])
        for slot, after in zip(self._slots, self._between[1:], strict=True):
            found += ids[slot][: limits[slot]] + after
        return Text(found, [])


class _Conversations(ChatTokenizer):
    """A whole conversation with its answer, as the chat template renders it."""

    def encode_conversation(self, turns: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with an answer."""
        quoted: list[str] = []
        marked = [Message(role=turn.role, content=self._quote(turn.content, quoted)) for turn in turns]
        with quiet():
            return list(self._encode(self.render(marked, generate=False), quoted))


def question_of(turns: Sequence[Message]) -> str:
    """What was asked, as plain text: the one turn itself, or every turn after its role."""
    return turns[0].content if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _plain_template(tokenizer: Any) -> str:
    """Question and answers with the tokenizer's own marks: [CLS] question [SEP] first [SEP] second [SEP]."""
    begin = tokenizer.cls_token or tokenizer.bos_token or ""
    end = tokenizer.sep_token or tokenizer.eos_token or "\n"
    return f"{begin}{{question}}{end}{{first}}{end}{{second}}{end}"


def _limit(config: Any, tokenizer: Any) -> int:
    """The most tokens a model takes: what its tokenizer says, else its positions (RoBERTa's count from its padding)."""
    context = context_of(config.get_text_config())
    if hasattr(config, "type_vocab_size") and "roberta" in config.model_type:
        context -= (config.pad_token_id or 0) + 1
    return int(min(context, tokenizer.model_max_length))
