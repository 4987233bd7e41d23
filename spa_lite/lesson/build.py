"""Build the lesson model from nothing: tokenizer, weights, and the files that make it a chat model.

    python -m spa_lite.lesson.build [--out DIR] [--steps N] [--threads N] [--seed N]

The same arguments and number of threads on the same machine give the same files. Nothing is downloaded.
This is the one file of the package that needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spa_lite.lesson import MODEL_DIR, world
from spa_lite.lesson.skills import Message, conversation

PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# Every turn is its role's token, the text, and the end token. The assistant's end token is the model's EOS.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY = 1024
LONGEST_TEXT = 512
BATCH = 64
PEAK_RATE = 3e-3
WARM_STEPS = 60
STEADY_SHARE = 0.4  # of all steps at the peak rate, before it falls in a straight line
CONTEXT_WEIGHT = 0.1  # what a token outside the assistant's turn counts in the loss

Example = tuple[list[int], list[float]]  # token ids, and the weight of predicting each


def build_tokenizer(seed: int, texts: int = 20_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on texts of the world. All 256 bytes are in it, so any text can be written."""
    rng = random.Random(f"tokenizer {seed}")
    train_tasks = every_train_task()
    samples = (message["content"] for _ in range(texts) for message in conversation(train_tasks, rng))
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(samples, trainer)
    if core.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the world gave {core.get_vocab_size()} tokens, not {VOCABULARY}")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST_TEXT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 1.3 million weights, every width a multiple of 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST_TEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def every_train_task() -> list[world.Task]:
    return [task for family in world.FAMILIES for task in world.family_tasks(family) if is_train(task)]


def is_train(task: world.Task) -> bool:
    return world.split_of(task.text) == "train"


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Example:
    """Token ids of a conversation, with full weight on the assistant's text and end token."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        content = tokenizer.encode(message["content"], add_special_tokens=False)
        weight = 1.0 if message["role"] == "assistant" else CONTEXT_WEIGHT
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *content, tokenizer.eos_token_id]
        weights += [0.0] + [weight] * (len(content) + 1)
    return ids, weights


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless padded batches of fresh conversations; those of a batch have like lengths."""
    rng = random.Random(f"batches {seed}")
    train_tasks = every_train_task()
    while True:
        examples = [encode(tokenizer, conversation(train_tasks, rng)) for _ in range(BATCH * 16)]
        examples.sort(key=lambda example: len(example[0]))
        pool = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
        rng.shuffle(pool)
        for rows in pool:
            yield pad_rows(rows, tokenizer.pad_token_id)


def pad_rows(rows: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
    return ids, weights


def rate(step: int, steps: int) -> float:
    """The learning rate: up, steady, then down in a straight line."""
    warm = min(1.0, (step + 1) / WARM_STEPS)
    left = (steps - step) / (steps * (1 - STEADY_SHARE))
    return PEAK_RATE * min(warm, 1.0, max(left, 0.02))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> float:
    """Train in place; returns the smoothed loss at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    smooth, started = 0.0, time.time()
    model.train()
    for step, (ids, weights) in zip(range(steps), batches(tokenizer, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # padding is on the right: causal is enough
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {smooth:.3f}, {time.time() - started:.0f} s", flush=True)
    return smooth


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder that AutoTokenizer and AutoModelForCausalLM read, weights in float16."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=0.7
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    spell_config_both_ways(out / "config.json")


def spell_config_both_ways(path: Path) -> None:
    """Older and newer readers look for the rotary base and the number type under different names: give both.

    The named type is float32, so that a plain load computes in full precision though the file holds float16.
    """
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["dtype"] = config["torch_dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2, help="the shipped model was made with 2")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(arguments.seed)
    model = build_model(tokenizer)
    loss = train(model, tokenizer, arguments.steps, arguments.seed)
    save(model, tokenizer, arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, loss {loss:.3f}, in {arguments.out}")


if __name__ == "__main__":
    main()
