"""Step (a) of a round: pi_{i-1} answers every prompt n times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spa_lite.backend import POLICY, Backend, Sampling
from spa_lite.events import Event, Report, silent
from spa_lite.keys import sample_key
from spa_lite.recipe import Recipe
from spa_lite.records import Completion, Ids, Prompt, Sample

CHUNK = 256
"""Prompts handed to the backend together. Sorting and refilling stay inside a chunk; its lines are written together."""


def sample(
    backend: Backend,
    prompts: Sequence[tuple[Prompt, Ids]],
    recipe: Recipe,
    round_: int,
    report: Report = silent,
    stage: str = "sample",
    n: int | None = None,
    role: str = POLICY,
) -> Iterator[Sample]:
    """Yield one Sample per prompt, in order. A text depends on (seed, round, prompt id, index) alone."""
    n = n or recipe.sampling.n
    sampling = Sampling(recipe.sampling.temp, recipe.sampling.top_p, recipe.sampling.max_tokens)
    done = 0
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        keys = [[sample_key(recipe.seed, round_, prompt.id, k) for k in range(n)] for prompt, _ in chunk]
        answers: dict[int, tuple[Completion, ...]] = {}
        for index, completions in backend.sample([ids for _, ids in chunk], n, sampling, keys, role):
            answers[index] = completions
            done += 1
            report(Event(stage, done, len(prompts), "prompts"))
        for index, (prompt, ids) in enumerate(chunk):
            closed = tuple(close(c, backend, recipe.sampling.append_eos) for c in answers[index])
            yield Sample(id=prompt.id, messages=prompt.messages, prompt_ids=ids, completions=closed, extra=prompt.extra)


def close(completion: Completion, backend: Backend, append_eos: bool) -> Completion:
    """An answer that hit the cap gets no end of turn, unless the recipe copies the released code, which adds one."""
    if not append_eos or completion.ended == "eos":
        return completion
    ids = (*completion.ids, backend.tokenizer.end_of_turn)
    return Completion(ids=ids, text=completion.text, ended=completion.ended, logprobs=completion.logprobs)
