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
from spa_lite.backend import POLICY, Backend, Lora, Optimizer, Sampling
from spa_lite.estimate import Case, Place, held, longest_of, memory, tokens_of
from spa_lite.fit import batching_of, measured
from spa_lite.keys import sample_key
from spa_lite.lesson import MODEL_DIR
from spa_lite.losses import dpo
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
LAPTOP = {"lengths.max_prompt_length": 128, "lengths.max_length": 192, "sampling.max_tokens": 64}


def sizes(micro: int, score: int, checkpointed: int = 0) -> dict[str, int]:
    """Tokens per forward in training and scoring, and checkpointed layers."""
    names = ("micro_tokens", "score_tokens", "checkpointed_layers")
    return {f"batching.{name}": size for name, size in zip(names, (micro, score, checkpointed), strict=True)}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lesson", load_layer("scale", "lesson") | sizes(2048, 4096)),
    ("30M", LAPTOP | sizes(512, 2048)),
    ("30M", LAPTOP | sizes(2048, 4096)),
    ("30M", LAPTOP | sizes(2048, 4096, 7)),
    ("55M, three wide layers", LAPTOP | sizes(1024, 4096)),
    ("135M (SmolLM2)", LAPTOP | sizes(1024, 4096)),
    ("135M (SmolLM2)", LAPTOP | sizes(1024, 4096, 15)),
    ("135M (SmolLM2)", LAPTOP | sizes(1024, 4096, 29)),
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
            f"{os.environ.get('OMP_NUM_THREADS', 'unset')}{openblas}. Four forwards are trained on (refined, with all "
            "that is ever computed), one batch is sampled and one scored. `By probe` is what a run itself goes by: "
            "the same, with what was measured on one row in place of the formula. Not measured: CUDA, MPS, Metal and 4 "
            "bits, for want of the machines.",
            "",
            "| backend | model | together | checkpointed | stage | measured | estimate | off | by probe | off |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    )


def rows(backend: str, name: str, changes: dict[str, Any], place: Path) -> Iterator[tuple[str, float]]:
    """A line per stage, and how far off the estimate is."""
    folder = MODEL_DIR if name == "lesson" else place / str(list(LLAMAS).index(name))
    if not folder.exists():
        make(folder, LLAMAS[name])
    layers = changes | {"inputs.model": str(folder), "inputs.device": "cpu", "model.dtype": "float32"}
    recipe, batching = recipe_of(layers), batching_of(recipe_of(layers))
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    stages = memory(shape, recipe, batching, Place(backend, "cpu", "float32", 32)).stages
    for kind in KINDS:
        if kind != "train" and batching.checkpointed:
            continue
        spec = json.dumps({"backend": backend, "kind": kind, "layers": layers})
        done = subprocess.run([sys.executable, __file__, "--one", spec], check=True, capture_output=True, text=True)
        peak, probed = map(int, done.stdout.split()[-2:])
        at_once = {"train": batching.micro_tokens, "judge": batching.score_tokens, "sample": batching.sample}[kind]
        what = f"{at_once:,} {'prompts' if kind == 'sample' else 'tokens'}"
        layers_ = f"{batching.checkpointed} of {shape.layers}" if kind == "train" else ""
        numbers = [f"{peak / 2**20:.0f}", *off_by(stages[kind], peak), *off_by(probed, peak)]
        line = " | ".join([backend, name, what, layers_, kind, *numbers])
        yield f"| {line} |", stages[kind] / peak - 1


def off_by(estimate: int, peak: int) -> tuple[str, str]:
    """An estimate in MiB, and how far off it is; nothing where there is none."""
    return (f"{estimate / 2**20:.0f}", f"{100 * (estimate / peak - 1):+.0f} %") if estimate else ("", "")


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

    def texts(tokens: int) -> Sequence[Row]:
        row = tokens_of(Row(prompt=ids(prompt), responses=(ids(answer), ids(answer))))
        return [Row(prompt=ids(prompt), responses=(ids(answer), ids(answer))) for _ in range(max(1, tokens // row))]

    backend.bind(POLICY, None, Lora(lora.rank, lora.alpha, tuple(lora.targets)))
    backend.snapshot()
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far
    if case["kind"] == "train":
        backend.start_training(Optimizer())
        refined = Refined(dpo(0.1), 0.1, 0.5, Window(), 0.2, 10)
        backend.dpo_step(texts(4 * backend.batching.micro_tokens), refined, 1e-4)
    elif case["kind"] == "judge":
        list(backend.logprob(texts(backend.batching.score_tokens), POLICY))
    else:
        backend.tokenizer._stops = frozenset()  # type: ignore[attr-defined]  # no answer ends early
        sampling, count = Sampling(0.7, 1.0, recipe.sampling.max_tokens), recipe.batching.sample
        keys = [[sample_key(0, 0, str(i), k) for k in range(recipe.sampling.n)] for i in range(count)]
        list(backend.sample([ids(prompt) for _ in range(count)], recipe.sampling.n, sampling, keys))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024, by_probe(backend, recipe) if case["kind"] == "train" else 0)


def by_probe(backend: Backend, recipe: Recipe) -> int:
    """What a run would say of its training: everything by formula but what the step itself holds."""
    assert backend.shape
    longest, place = longest_of(recipe, backend.shape), Place.of(backend)
    kept, case = measured(backend, longest, lambda _: True), Case(backend.shape, recipe, place, longest)
    assert kept
    tokens = case.together(backend.batching.micro_tokens)
    return int(case.fixed + case.optimizer + held(kept, tokens, backend.batching.checkpointed, place))


if __name__ == "__main__":
    main()
