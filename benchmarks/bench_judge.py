"""The judge's scores against a plain transformers loop: equal to 1e-4 nats first, then the time of both.

    python benchmarks/bench_judge.py [--pairs 200] [--repeats 5] [--table FILE]

Two models: a random Llama made on the spot, and the built-in lesson model with its seed adapter. Equality is against
one response at a time (log-softmax of all logits, sum). Time is against the usual loop: batches of 8, padded, in the
order of the file. Both sides score the same token ids in one process, in turn, with one thread, in float32.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from spa_lite import backends, judging, prepare
from spa_lite.backend import INIT, POLICY, Backend
from spa_lite.data import write_jsonl
from spa_lite.events import Event
from spa_lite.lesson import MODEL_DIR, source
from spa_lite.recipe import Recipe, build, load_layer
from spa_lite.records import Judgement, Message, Pair, Row

TOLERANCE = 1e-4
BATCH = 8
ADAPTER = MODEL_DIR.parent / "seed_adapter"
WORDS = ["the", "baker", "carries", "a", "blue", "door", "heron", "paints", "seven", "plums", "quietly", "and", "waits"]


def main() -> None:
    """Compare, time, print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    with tempfile.TemporaryDirectory() as folder:
        lines = [line for case in cases(Path(folder), args.pairs) for line in compared(*case, args.repeats)]
    text = "\n".join([*header(args), *lines]) + "\n"
    print(text)
    if args.table:
        args.table.write_text(text)


def header(args: argparse.Namespace) -> list[str]:
    """What was measured where, and the head of the table."""
    import torch
    import transformers

    said = f"`python benchmarks/bench_judge.py --pairs {args.pairs} --repeats {args.repeats}`"
    return [
        "# Judging against a plain transformers loop",
        "",
        f"{said} on a virtual machine with {os.cpu_count()} CPU cores that other programs used, too; "
        f"{platform.machine()}, PyTorch {torch.__version__}, transformers {transformers.__version__}, one thread, "
        "float32. Seconds of processor time: median (least to most). A repeat is one go of each side, in turn.",
        "",
        "- plain: batches of 8 responses in the order of the file, padded, log-softmax over all logits",
        "- scoring: the same sums by the judge's scorer",
        "- judging: `spa-lite judge` from texts to a file, with reading, tokenizing and writing",
        "",
        "| model | pairs | response tokens | largest difference, nats | plain, s | scoring, s | judging, s "
        "| plain / scoring | plain / judging |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]


def cases(folder: Path, count: int) -> Iterator[tuple[str, Path, Path, Path | None]]:
    """(name, file of pairs, model, adapter or None)."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests import tiny

    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    shape |= {"max_position_embeddings": 512, "vocab_size": 32_000}
    model = tiny.make_model(folder / "llama", "llama", **shape)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 60))) for _ in range(2 * count)]
    pairs = [
        Pair(
            id=str(i),
            messages=(Message(role="user", content=f"What of number {i}?"),),
            chosen=texts[2 * i],
            rejected=f"{texts[2 * i + 1]}!",
        )
        for i in range(count)
    ]
    write_jsonl(folder / "random.jsonl", pairs)
    yield "random Llama, 6 layers of 256, vocabulary of 32,000", folder / "random.jsonl", model, None
    write_jsonl(folder / "lesson.jsonl", source.pairs("heldout", count, 0))
    yield "lesson model with its seed adapter, both roles", folder / "lesson.jsonl", MODEL_DIR, ADAPTER


def compared(name: str, pairs: Path, model: Path, adapter: Path | None, repeats: int) -> list[str]:
    """A row of the table. Stops if the two sides do not agree."""
    import torch

    torch.set_num_threads(1)
    output = pairs.with_suffix(".out")
    judgements = judged(pairs, model, adapter, output, full=True)
    rows = [Row(prompt=j.prompt_ids, responses=(j.a.ids, j.b.ids)) for j in judgements]
    plain = Plain(model, adapter)
    differences = [
        abs(ours - theirs)
        for role in roles_of(adapter)
        for j, sums in zip(judgements, plain.singly(rows, role), strict=True)
        for ours, theirs in zip(sums_of(j, role), sums, strict=True)
    ]
    if max(differences) > TOLERANCE:
        sys.exit(f"{name}: the scores differ by {max(differences):.2g} nats, so nothing is timed")
    work = job(pairs, model, adapter)
    models = work.models
    work.backend()
    sides: dict[str, Callable[[], Any]] = {
        "plain": lambda: [plain.batched(rows, role) for role in roles_of(adapter)],
        "scoring": lambda: [models.scorer(role)(rows) for role in roles_of(adapter)],
        "judging": lambda: judging.to_file(job(pairs, model, adapter, models), output),
    }
    spent = alternating(sides, repeats)
    ratios = [median(spent["plain"]) / median(spent[side]) for side in ("scoring", "judging")]
    times = [f"{median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in spent.values()]
    tokens = sum(len(r) for row in rows for r in row.responses)
    cells = [name, f"{len(rows)}", f"{tokens:,}", f"{max(differences):.1e}", *times, *(f"{r:.2f}" for r in ratios)]
    return [f"| {' | '.join(cells)} |"]


def alternating(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of processor time of each side, taken in turn, after one go that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for go in range(repeats + 1):
        for name, work in sides.items():
            begun = time.process_time()
            work()
            if go:
                spent[name].append(time.process_time() - begun)
    return spent


def roles_of(adapter: Path | None) -> list[str]:
    """Roles that are scored."""
    return [POLICY, INIT] if adapter else [POLICY]


def sums_of(judgement: Judgement, role: str) -> tuple[float, float]:
    """Sums of both answers under a role."""
    a, b = judgement.a, judgement.b
    return (a.policy, b.policy) if role == POLICY else (a.reference, b.reference)


def job(pairs: Path, model: Path, adapter: Path | None, models: Any = None, full: bool = False) -> judging.Job:
    """What `spa-lite judge` does with that model: the implicit reward, or the likelihood where there is no adapter."""
    changes = {
        "inputs.backend": "torch",
        "inputs.model": str(model),
        "inputs.device": "cpu",
        "inputs.adapter_path": str(adapter) if adapter else None,
        "judge.by": "implicit" if adapter else "likelihood",
        "lengths.max_length": 256,
        "lengths.max_prompt_length": 128,
    }
    recipe: Recipe = build({"spa": load_layer("recipe", "spa"), "bench": changes})[0]

    def bind(backend: Backend) -> None:
        backend.bind(INIT, None)
        backend.bind(POLICY, adapter)

    return judging.Job(pairs, recipe, models or prepare.models_of(recipe, backends.load), bind, full=full, report=quiet)


def quiet(event: Event) -> None:
    """Tell nobody."""


def judged(pairs: Path, model: Path, adapter: Path | None, output: Path, full: bool) -> list[Judgement]:
    """Whole judgements of a file."""
    import msgspec

    judging.to_file(job(pairs, model, adapter, full=full), output)
    return [msgspec.json.decode(line, type=Judgement) for line in output.read_bytes().splitlines()]


class Plain:
    """The loop that everybody writes. With an adapter the reference is the same model with it switched off."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(adapter))
        self.model.eval()

    def _in(self, role: str) -> AbstractContextManager[Any]:
        off: AbstractContextManager[Any] = self.model.disable_adapter() if role == INIT else nullcontext()
        return off

    def singly(self, rows: Sequence[Row], role: str = POLICY) -> list[tuple[float, ...]]:
        """Summed log-probability (nats) of each response, one forward pass each."""
        import torch

        with torch.no_grad(), self._in(role):
            return [tuple(self._one(row.prompt, response) for response in row.responses) for row in rows]

    def _one(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        import torch

        logits = self.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        return float(logprobs.gather(1, torch.tensor(response)[:, None]).sum())

    def batched(self, rows: Sequence[Row], role: str = POLICY) -> list[float]:
        """The same for all responses in a row, 8 at a time, padded."""
        flat = [(row.prompt, response) for row in rows for response in row.responses]
        found: list[float] = []
        for start in range(0, len(flat), BATCH):
            found += self._batch(flat[start : start + BATCH], role)
        return found

    def _batch(self, batch: Sequence[tuple[Sequence[int], Sequence[int]]], role: str) -> list[float]:
        import torch

        width = max(len(prompt) + len(response) for prompt, response in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        kept = torch.zeros(len(batch), width, dtype=torch.long)
        scored = torch.zeros(len(batch), width, dtype=torch.bool)
        for i, (prompt, response) in enumerate(batch):
            size = len(prompt) + len(response)
            ids[i, :size] = torch.tensor([*prompt, *response])
            kept[i, :size] = 1
            scored[i, len(prompt) : size] = True
        with torch.no_grad(), self._in(role):
            logits = self.model(ids, attention_mask=kept).logits
        logprobs = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        return [float(value) for value in (logprobs * scored[:, 1:]).sum(dim=1)]


def plain_scores(model: Path, rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """Sums of each row's responses by the plain loop, one response at a time."""
    return Plain(model).singly(rows)


if __name__ == "__main__":
    main()
