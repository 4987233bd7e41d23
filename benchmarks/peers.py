"""What a user would otherwise run: transformers and PEFT in the ordinary way, TRL's DPOTrainer, a plain PyTorch loop.

Each comes as a user finds it (`default`) and as one who knows it sets it (`tuned`). All read the same model and
adapters as this program.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from contestants import ALPHA, LAMBDA, NO_CLIPPING, Text, texts_of
from machine import installed
from side_by_side import Options, Shown, Unavailable
from workloads import BETA, plain_model

from spa_lite.records import Ids, Row

MAKE_PEERS = "is not installed here (make peers installs it)"


# --- transformers and PEFT ---------------------------------------------------------------------------------------


def peft_model(options: Options, base: Path, policy: Path, previous: Path | None = None) -> Any:
    """The base with the policy's adapter (trainable, `default`) and the previous one (`ref`)."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain_model(base, options), str(policy), is_trainable=True)
    if previous:
        model.load_adapter(str(previous), "ref")
    model.set_adapter("default")
    return model.eval()


def padded(texts: Sequence[Text], device: str) -> tuple[Any, Any, Any]:
    """Ids, attention mask, and which positions after the first are an answer's; padded on the right."""
    import torch

    wide = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), wide, dtype=torch.long)
    kept = torch.zeros(len(texts), wide, dtype=torch.long)
    scored = torch.zeros(len(texts), wide, dtype=torch.bool)
    for line, (prompt, answer) in enumerate(texts):
        size = len(prompt) + len(answer)
        ids[line, :size] = torch.tensor([*prompt, *answer])
        kept[line, :size] = 1
        scored[line, len(prompt) : size] = True
    return ids.to(device), kept.to(device), scored[:, 1:].to(device)


def gathered(logits: Any, ids: Any, scored: Any) -> Any:
    """Log-probabilities of the ids after the first [rows, width - 1], 0 outside the answers: the usual lines."""
    found = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return found * scored


class Scorer:
    """Log-probabilities by padded forwards over all logits. Tuned: rows of like length, logits of answers only."""

    def __init__(self, model: Any, options: Options, tuned: bool = False) -> None:
        self.model, self.options, self.tuned = model, options, tuned

    def per_token(self, texts: Sequence[Text], base: bool = False, batch: int = 8) -> list[np.ndarray[Any, Any]]:
        """Log-probabilities of every answer's tokens under the adapter, or (`base`) without it."""
        import torch

        found: list[np.ndarray[Any, Any]] = [np.zeros(0)] * len(texts)
        off: AbstractContextManager[Any] = self.model.disable_adapter() if base else nullcontext()
        with torch.no_grad(), off:
            for some in self._batches(texts, batch):
                for index, values in zip(some, self._forward([texts[i] for i in some]), strict=True):
                    found[index] = values
        return found

    def _batches(self, texts: Sequence[Text], batch: int) -> Iterator[list[int]]:
        order = list(range(len(texts)))
        if self.tuned:
            order.sort(key=lambda index: len(texts[index][0]) + len(texts[index][1]))
        for start in range(0, len(order), batch):
            yield order[start : start + batch]

    def _forward(self, texts: Sequence[Text]) -> list[np.ndarray[Any, Any]]:
        ids, kept, scored = padded(texts, self.options.device)
        if not self.tuned:
            values = gathered(self.model(input_ids=ids, attention_mask=kept).logits, ids, scored)
        else:
            first = min(len(prompt) for prompt, _ in texts) - 1
            keep = ids.shape[1] - first
            logits = self.model(input_ids=ids, attention_mask=kept, logits_to_keep=keep).logits
            values = gathered(logits, ids[:, first:], scored[:, first:])
            scored = scored[:, first:]
        return [line[mask].double().cpu().numpy() for line, mask in zip(values, scored, strict=True)]


class Loop:
    """A DPO step as one writes it in PyTorch: separate rows, four forwards, full logits. `mixed`: the refined loss."""

    def __init__(self, options: Options, model: Any, mixed: bool, batch: int, ordered: bool) -> None:
        import torch

        self.options, self.model, self.mixed, self.batch, self.ordered = options, model, mixed, batch, ordered
        self.trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".default." in name}
        self.adamw = torch.optim.AdamW(self.trained.values(), lr=0.0, weight_decay=0.0)
        self.loss = 0.0
        self.margins: list[float] = []

    def step(self, rows: Sequence[Row]) -> None:
        """One optimizer step on the mean loss over rows."""
        import torch

        self.adamw.zero_grad()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt)) if self.ordered else list(range(len(rows)))
        self.loss = 0.0
        margins: dict[int, float] = {}
        for start in range(0, len(rows), self.batch):
            some = order[start : start + self.batch]
            losses, simulated = self._losses([rows[index] for index in some])
            (losses.sum() / len(rows)).backward()
            self.loss += float(losses.sum().detach()) / len(rows)
            margins |= dict(zip(some, simulated, strict=True))
        self.margins = [margins[index] for index in range(len(rows))]
        torch.nn.utils.clip_grad_norm_(self.trained.values(), NO_CLIPPING)
        self.adamw.step()

    def _losses(self, rows: Sequence[Row]) -> tuple[Any, list[float]]:
        import torch
        from torch.nn.functional import logsigmoid

        policy, reference, mixed = [], [], []
        for which in (0, 1):
            ids, kept, scored = padded(texts_of(rows, which), self.options.device)
            self.model.set_adapter("ref")
            with torch.no_grad():
                theirs = self.model(input_ids=ids, attention_mask=kept).logits
                reference.append(gathered(theirs, ids, scored).sum(1))
            self.model.set_adapter("default")
            mine = self.model(input_ids=ids, attention_mask=kept).logits
            policy.append(gathered(mine, ids, scored).sum(1))
            if self.mixed:
                with torch.no_grad():
                    both = (1 + LAMBDA) * mine.float() - LAMBDA * theirs.float()
                    mixed.append(gathered(both, ids, scored).sum(1))
        margin = BETA * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
        if not self.mixed:
            return -logsigmoid(margin), margin.tolist()
        simulated = BETA * ((mixed[0] - reference[0]) - (mixed[1] - reference[1]))
        doubt = ALPHA * (simulated < 0.0).float()
        return -(1 - doubt) * logsigmoid(margin) - doubt * logsigmoid(-margin), simulated.tolist()

    def shown(self) -> Shown:
        """The last step's."""
        gradients = {name: p.grad.float().cpu().numpy() for name, p in self.trained.items()}
        return Shown(self.loss, gradients, self.margins if self.mixed else None)


# --- TRL ---------------------------------------------------------------------------------------------------------


class Trl:
    """TRL's DPOTrainer. Its loss, its collator and its reference are called directly: no data loader, no logging.

    `known` hands it reference sums, as `precompute_ref_log_probs` does.
    """

    def __init__(
        self,
        options: Options,
        base: Path,
        policy: Path,
        previous: Path,
        batch: int,
        checkpointed: bool,
        ordered: bool = False,
        known: Sequence[Row] = (),
    ) -> None:
        if not installed("trl"):
            raise Unavailable(f"TRL {MAKE_PEERS}")
        import torch

        self.options, self.batch, self.ordered = options, batch, ordered
        self.trainer = self._trainer(base, policy, previous, checkpointed)
        self.model = self.trainer.model.train()
        if checkpointed:
            self.model.gradient_checkpointing_enable(self.trainer.args.gradient_checkpointing_kwargs)
        self.trained = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if ".default." in n}
        self.adamw = torch.optim.AdamW(self.trained.values(), lr=0.0, weight_decay=0.0)
        self.loss = 0.0
        self.sums = {row: self._reference(row) for row in known}
        self.trainer.precompute_ref_logps = bool(known)

    def _trainer(self, base: Path, policy: Path, previous: Path, checkpointed: bool) -> Any:
        from datasets import Dataset
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        from spa_lite.backends.quiet import quiet

        model = peft_model(self.options, base, policy)
        dummy = Dataset.from_dict({"prompt": ["the baker"], "chosen": [" mends"], "rejected": [" paints"]})
        wanted = DPOConfig(
            output_dir=tempfile.gettempdir(),
            beta=BETA,
            per_device_train_batch_size=self.batch,
            gradient_checkpointing=checkpointed,
            max_length=None,
            bf16=self.options.dtype == "bfloat16",
            use_cpu=self.options.device == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token_id = 0
        with quiet():
            trainer = DPOTrainer(model, args=wanted, train_dataset=dummy, processing_class=tokenizer)
        set_peft_model_state_dict(trainer.model, load_file(previous / "adapter_model.safetensors"), adapter_name="ref")
        return trainer

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        found = [
            {"prompt_ids": list(r.prompt), "chosen_ids": list(r.responses[0]), "rejected_ids": list(r.responses[1])}
            for r in rows
        ]
        for row, example in zip(rows, found, strict=True):
            if row in getattr(self, "sums", {}):
                example["ref_chosen_logps"], example["ref_rejected_logps"] = self.sums[row]  # type: ignore[assignment]
        made = self.trainer.data_collator(found)
        return {name: value.to(self.options.device) for name, value in made.items()}

    def _reference(self, row: Row) -> tuple[float, float]:
        chosen, rejected = self.trainer.compute_ref_log_probs(self.model, self._inputs([row]))
        return float(chosen[0]), float(rejected[0])

    def step(self, rows: Sequence[Row]) -> None:
        """One optimizer step on the mean loss over rows."""
        import torch

        self.adamw.zero_grad()
        order = sorted(rows, key=lambda row: len(row.prompt) + max(map(len, row.responses))) if self.ordered else rows
        self.loss = 0.0
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            with self.trainer.accelerator.autocast():
                loss = self.trainer.compute_loss(self.model, self._inputs(some)) * (len(some) / len(rows))
            loss.backward()
            self.loss += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained.values(), NO_CLIPPING)
        self.adamw.step()

    def shown(self) -> Shown:
        """The last step's."""
        return Shown(self.loss, {name: p.grad.float().cpu().numpy() for name, p in self.trained.items()})


# --- sampling with transformers ----------------------------------------------------------------------------------


def stops_of(base: Path) -> list[int]:
    """Ids that end an answer, as the model's folder says."""
    from transformers import GenerationConfig

    ends = GenerationConfig.from_pretrained(base).eos_token_id
    return sorted(ends) if isinstance(ends, list) else [ends]


class Generate:
    """`generate` with the adapter, n answers a prompt, and the untempered log-probability of every sampled token."""

    def __init__(
        self,
        options: Options,
        model: Any,
        stops: Sequence[int],
        temperature: float,
        most: int,
        batch: int,
        ordered: bool = False,
        **settings: Any,
    ) -> None:
        from transformers import GenerationConfig

        self.options, self.model, self.batch, self.ordered = options, model, batch, ordered
        self.stops = sorted(stops)
        self.settings = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=2,
            max_new_tokens=most,
            eos_token_id=self.stops,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )

    def answers(self, prompts: Sequence[Ids]) -> list[tuple[Ids, Ids]]:
        """Two answers a prompt, in the order of the prompts; with the log-probs taken of each."""
        order = list(range(len(prompts)))
        if self.ordered:
            order.sort(key=lambda index: len(prompts[index]))
        found: dict[int, tuple[Ids, Ids]] = {}
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            drawn = self._draw([prompts[index] for index in some])
            found |= {index: (drawn[2 * i], drawn[2 * i + 1]) for i, index in enumerate(some)}
        return [found[index] for index in range(len(prompts))]

    def _draw(self, prompts: Sequence[Ids]) -> list[Ids]:
        import torch

        wide = max(map(len, prompts))
        ids = torch.tensor([[0] * (wide - len(p)) + list(p) for p in prompts], device=self.options.device)
        kept = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts], device=self.options.device)
        with torch.inference_mode():
            out = self.model.generate(input_ids=ids, attention_mask=kept, generation_config=self.settings)
            drawn = out.sequences[:, wide:]
            steps = [logits.float().log_softmax(-1).gather(1, drawn[:, i, None]) for i, logits in enumerate(out.logits)]
            self.logprobs = torch.cat(steps, dim=1).cpu()
        return [self._ended(line) for line in drawn.tolist()]

    def _ended(self, line: Sequence[int]) -> Ids:
        ends = [place for place, token in enumerate(line) if token in self.stops]
        return tuple(line[: ends[0] + 1] if ends else line)
