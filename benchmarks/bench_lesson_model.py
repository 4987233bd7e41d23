"""Speed of the three verbs on the built-in model: tokens per second sampled and scored, pairs per second trained.

    python benchmarks/bench_lesson_model.py

Whole-verb wall times on whatever else the machine does: compare two versions in one go, and quote ratios.
"""

from __future__ import annotations

import time

from spa_lite import backends, prepare
from spa_lite.backend import INIT, POLICY, Optimizer, Sampling
from spa_lite.keys import sample_key
from spa_lite.objective import Dpo
from spa_lite.recipe import build, load_layer
from spa_lite.records import Row
from spa_lite.stages.workbench import lora_shape

PROMPTS, REPEATS = 128, 3


def main() -> None:
    """Print the median of a few repeats of each verb, after one that is not counted."""
    recipe, _ = build({"scale": load_layer("scale", "lesson")})
    models = prepare.models_of(recipe, backends.load)
    backend, data = models.backend, prepare.data_of(recipe, models)
    chosen = data.rounds[0][:PROMPTS]
    prompts, keys = [ids for _, ids in chosen], [[sample_key(0, 1, p.id, k) for k in (0, 1)] for p, _ in chosen]
    backend.bind(INIT, None)
    backend.bind(POLICY, None, lora_shape(recipe))
    backend.snapshot()
    backend.start_training(Optimizer())

    def sample() -> list[Row]:
        answers = dict(backend.sample(prompts, 2, Sampling(max_tokens=48), keys))
        return [Row(prompt=p, responses=tuple(c.ids for c in answers[i])) for i, p in enumerate(prompts)]

    rows = sample()
    sampled = sum(len(r) for row in rows for r in row.responses)
    scored = sum(len(row.prompt) + len(r) for row in rows for r in row.responses)
    step = rows[: recipe.train.batch_size]
    print(f"{PROMPTS} prompts, 2 answers each, {sampled} sampled tokens, {backend.description['device']}")
    print(f"sample    {sampled / median(sample):10,.0f} tokens/s")
    print(f"logprob   {scored / median(lambda: list(backend.logprob(rows, INIT))):10,.0f} tokens/s, prompts included")
    print(f"dpo_step  {len(step) / median(lambda: backend.dpo_step(step, Dpo(0.1), 1e-4)):10,.1f} pairs/s")


def median(work: object) -> float:
    """Median seconds of a few calls, after one that is not counted."""
    assert callable(work)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[REPEATS // 2]


if __name__ == "__main__":
    main()
