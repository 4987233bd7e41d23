"""Peak memory of each stage, measured in a process of its own, against the estimate of `spa_lite.estimate`.

    python benchmarks/bench_memory.py > benchmarks/results/memory.md

The models are the built-in one and random Llamas; all work is in float32 on the CPU, on random tokens as long as the
recipe allows. Measured is the largest resident set of the process from the start of the stage on (Linux).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa_lite import backends
from spa_lite.backend import POLICY, Lora, Optimizer, Sampling
from spa_lite.estimate import memory
from spa_lite.keys import sample_key
from spa_lite.lesson import MODEL_DIR
from spa_lite.objective import Refined, Window
from spa_lite.prepare import model_settings
from spa_lite.recipe import Recipe, build, load_layer
from spa_lite.records import Ids, Row
from spa_lite.shape import shape_of

LLAMAS: dict[str, dict[str, Any]] = {
    "30M": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    | {"intermediate_size": 1024, "vocab_size": 16384, "tie_word_embeddings": False},
    "55M, three wide layers": {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16}
    | {"num_key_value_heads": 16, "intermediate_size": 2816, "vocab_size": 8192, "tie_word_embeddings": False},
    "135M (SmolLM2)": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
}
LAPTOP = {"lengths.max_prompt_length": 128, "lengths.max_length": 192, "sampling.max_tokens": 64, "batching.micro": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lesson", load_layer("scale", "lesson") | {"batching.gradient_checkpointing": False}),
    ("30M", LAPTOP),
    ("30M", LAPTOP | {"batching.gradient_checkpointing": False, "batching.micro": 4}),
    ("55M, three wide layers", LAPTOP),
    ("135M (SmolLM2)", LAPTOP),
]
"""Model, and what is changed in scale `laptop`."""
KINDS = ("train", "sample", "judge")


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose backend and model hold this text")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(json.loads(args.one))
        return
    print(head())
    off: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        for backend in (name for name in ("torch", "mlx") if not backends.missing(name)):
            for name, changes in CASES:
                if args.only in f"{backend} {name}":
                    for line, error in rows(backend, name, changes, Path(place)):
                        print(line, flush=True)
                        off.append(error)
    print(f"\n{sum(abs(error) <= 0.25 for error in off)} of {len(off)} estimates are within 25 % of what was measured.")


def head() -> str:
    """What stands above the rows."""
    openblas = ", OpenBLAS preloaded" if "openblas" in os.environ.get("LD_PRELOAD", "") else ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "mlx", "transformers"))
    return "\n".join(
        [
            "# Memory: measured and estimated (float32, Linux CPU)",
            "",
            f"MiB of the whole process, libraries included. {versions}, OMP_NUM_THREADS="
            f"{os.environ.get('OMP_NUM_THREADS', 'unset')}{openblas}. Four micro-batches are trained on, one batch is "
            "sampled and one scored. Not measured: CUDA, MPS, Metal and 4 bits, for want of the machines.",
            "",
            "| backend | model | checkpointing | pairs, prompts, rows at a time | stage | measured | estimate | off |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    )


def rows(backend: str, name: str, changes: dict[str, Any], place: Path) -> Iterator[tuple[str, float]]:
    """A line per stage, and how far off the estimate is."""
    folder = MODEL_DIR if name == "lesson" else place / str(list(LLAMAS).index(name))
    if not folder.exists():
        make(folder, LLAMAS[name])
    layers = changes | {"inputs.model": str(folder), "inputs.device": "cpu", "model.dtype": "float32"}
    recipe = recipe_of(layers)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    stages = memory(shape, recipe, backend=backend, device="cpu", dtype="float32", bits=32).stages
    b = recipe.batching
    for kind in KINDS:
        spec = json.dumps({"backend": backend, "kind": kind, "layers": layers})
        done = subprocess.run([sys.executable, __file__, "--one", spec], check=True, capture_output=True, text=True)
        measured, estimate = int(done.stdout.split()[-1]), stages[kind]
        kept = "yes" if b.gradient_checkpointing else "no"
        off = estimate / measured - 1
        yield (
            f"| {backend} | {name} | {kept} | {b.micro}, {b.sample}, {b.score} | {kind} | {measured / 2**20:.0f} "
            f"| {estimate / 2**20:.0f} | {100 * off:+.0f} % |",
            off,
        )


def recipe_of(layers: dict[str, Any]) -> Recipe:
    """Scale `laptop` with changes."""
    return build({"laptop": load_layer("scale", "laptop"), "case": layers})[0]


def make(folder: Path, shape: dict[str, Any]) -> None:
    """A random Llama with the lesson's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=2048, eos_token_id=4, pad_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for path in MODEL_DIR.iterdir():
        if path.name not in {"config.json", "model.safetensors"}:
            shutil.copy(path, folder)


def one(case: dict[str, Any]) -> None:
    """Do one stage in this process and print the largest resident set since its start."""
    recipe = recipe_of(case["layers"])
    backend = backends.load(case["backend"], model_settings(recipe))
    lora, rng = recipe.lora, np.random.default_rng(0)
    prompt, answer = recipe.lengths.max_prompt_length, recipe.lengths.max_length - recipe.lengths.max_prompt_length
    vocabulary = json.loads((Path(str(recipe.inputs.model)) / "config.json").read_text())["vocab_size"]

    def ids(size: int) -> Ids:
        return tuple(int(token) for token in rng.integers(5, vocabulary, size))

    def texts(count: int) -> Sequence[Row]:
        return [Row(prompt=ids(prompt), responses=(ids(answer), ids(answer))) for _ in range(count)]

    backend.bind(POLICY, None, Lora(lora.rank, lora.alpha, tuple(lora.targets)))
    backend.snapshot()
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far
    if case["kind"] == "train":
        backend.start_training(Optimizer())
        refined = Refined(0.1, 0.1, 0.5, Window(), 0.2, 10)
        backend.dpo_step(texts(4 * recipe.batching.micro), refined, 1e-4)
    elif case["kind"] == "judge":
        list(backend.logprob(texts(recipe.batching.score), POLICY))
    else:
        backend.tokenizer._stops = frozenset()  # type: ignore[attr-defined]  # no answer ends early
        sampling, count = Sampling(0.7, 1.0, recipe.sampling.max_tokens), recipe.batching.sample
        keys = [[sample_key(0, 0, str(i), k) for k in range(recipe.sampling.n)] for i in range(count)]
        list(backend.sample([ids(prompt) for _ in range(count)], recipe.sampling.n, sampling, keys))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024)


if __name__ == "__main__":
    main()
