"""Step (a) of a round: pi_{i-1} answers every prompt n times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spa_lite.backend import POLICY, Backend, Sampling
from spa_lite.events import Report, Tick, silent, ticking, unheard
from spa_lite.fit import halving
from spa_lite.keys import sample_key
from spa_lite.recipe import Recipe
from spa_lite.records import Completion, Ids, Prompt, Sample
from spa_lite.states import Writer

Encoded = tuple[Prompt, Ids]


def chunk_size(recipe: Recipe) -> int:
    """Prompts whose lines are written together: sorting and refilling stay inside, and an interruption costs one."""
    return 4 * recipe.batching.sample


def sample(
    backend: Backend,
    prompts: Sequence[Encoded],
    recipe: Recipe,
    round_: int,
    report: Report = silent,
    stage: str = "sample",
    n: int | None = None,
    role: str = POLICY,
    skip: int = 0,
    keep: Writer | None = None,
    sampling: Sampling | None = None,
    first: int = 0,
) -> Iterator[list[Sample]]:
    """Yield the samples of a chunk of prompts after the other, in order; `skip` prompts are done already.

    A text depends on (seed, round, prompt id, index) alone; indices begin at `first`. `sampling` is the recipe's unless
    it is given. `keep` has written the chunk's hidden states by then.
    """
    numbers = range(first, first + (n or recipe.sampling.n))
    tick = ticking(report, stage, len(prompts), "prompts", skip)
    for start in range(skip, len(prompts), chunk_size(recipe)):
        chunk = prompts[start : start + chunk_size(recipe)]
        yield answer(backend, chunk, recipe, round_, numbers, role, tick, keep, sampling)


def answer(
    backend: Backend,
    prompts: Sequence[Encoded],
    recipe: Recipe,
    round_: int,
    numbers: Sequence[int],
    role: str = POLICY,
    tick: Tick = unheard,
    keep: Writer | None = None,
    sampling: Sampling | None = None,
) -> list[Sample]:
    """One Sample per prompt, in order, with the answers of these numbers; `tick` is called once per prompt."""
    n = len(numbers)
    how = sampling or Sampling(recipe.sampling.temp, recipe.sampling.top_p, recipe.sampling.max_tokens)
    keys = [[sample_key(recipe.seed, round_, prompt.id, k) for k in numbers] for prompt, _ in prompts]

    def once() -> dict[int, tuple[Completion, ...]]:
        found: dict[int, tuple[Completion, ...]] = {}
        if keep:
            keep.begin(n)
        for index, completions in backend.sample([ids for _, ids in prompts], n, how, keys, role, keep):
            found[index] = tuple(close(c, backend, recipe.sampling.append_eos) for c in completions)
            tick(sum(len(c.logprobs) for c in completions))
        return found

    answers = halving(backend, "sample", once)
    if keep:
        keep.end()
    return [
        Sample(id=prompt.id, messages=prompt.messages, prompt_ids=ids, completions=answers[i], extra=prompt.extra)
        for i, (prompt, ids) in enumerate(prompts)
    ]


def close(completion: Completion, backend: Backend, append_eos: bool) -> Completion:
    """An answer that hit the cap gets no end of turn, unless the recipe copies the released code, which adds one."""
    if not append_eos or completion.ended == "eos":
        return completion
    ids = (*completion.ids, backend.tokenizer.end_of_turn)
    return Completion(ids=ids, text=completion.text, ended=completion.ended, logprobs=completion.logprobs)
