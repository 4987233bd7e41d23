"""From records to token ids, within the limits of the recipe and of the model.

Prompt and answer are encoded apart, so that no token ever spans the boundary between them. What does not fit
is skipped or cut, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from spa_lite.backend import Tokenizer
from spa_lite.errors import RecipeError
from spa_lite.records import Ids, Message, Pair, Prompt, Row

LongPrompts = Literal["skip", "cut"]


class EncodeReport(msgspec.Struct, frozen=True):
    """What encoding came to. All counts are of prompts or pairs, but `cut_responses` is of single answers."""

    kept: int = 0
    long_prompts: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    empty: int = 0
    identical: int = 0

    @property
    def skipped(self) -> int:
        """Number of records left out."""
        return self.long_prompts + self.empty + self.identical

    def lines(self) -> list[str]:
        """The report in sentences for a person."""
        said = (
            (self.long_prompts, "skipped: the prompt is too long."),
            (self.cut_prompts, "lost the beginning of a prompt that is too long."),
            (self.cut_responses, "answers lost their end and their end-of-turn token: too long."),
            (self.empty, "skipped: no token is left to learn or to answer."),
            (self.identical, "dropped: both answers are the same tokens."),
        )
        return [f"{self.kept} encoded.", *(f"{count} {words}" for count, words in said if count)]


def encode_prompts(
    prompts: Iterable[Prompt],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    long_prompts: LongPrompts,
    max_tokens: int,
    context: int,
) -> tuple[list[tuple[Prompt, Ids]], EncodeReport]:
    """Prompts with their ids. Those over `max_prompt_length` tokens are skipped, or lose their beginning ("cut").

    Raises RecipeError, before any work, if a prompt and `max_tokens` of answer can exceed the model's context.
    """
    check_sampling(max_prompt_length, max_tokens, context)
    counts: Counter[str] = Counter()
    encoded = []
    for prompt in prompts:
        ids = _prompt_ids(prompt.messages, tokenizer, max_prompt_length, long_prompts, counts)
        if ids:
            encoded.append((prompt, ids))
    return encoded, EncodeReport(kept=len(encoded), **counts)


def encode_pairs(
    pairs: Iterable[Pair],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_length: int,
    long_prompts: LongPrompts,
    context: int,
    keep_identical: bool = False,
) -> tuple[list[tuple[Pair, Row]], EncodeReport]:
    """Pairs with their training rows, chosen first. Prompt and answer together take `max_length` tokens at most.

    Two answers of the same tokens are dropped and counted, unless `keep_identical`: nothing can be learned from
    them, but they can be judged. Raises RecipeError, before any work, if `max_length` exceeds the model's context.
    """
    check_training(max_prompt_length, max_length, context)
    counts: Counter[str] = Counter()
    encoded = []
    for pair in pairs:
        more: Counter[str] = Counter()
        row = encode_answers(
            pair.messages,
            (pair.chosen, pair.rejected),
            tokenizer,
            more,
            max_prompt_length=max_prompt_length,
            max_length=max_length,
            long_prompts=long_prompts,
        )
        if row and row.responses[0] == row.responses[1] and not keep_identical:
            counts["identical"] += 1
            del more["cut_responses"]
        elif row:
            encoded.append((pair, row))
        counts.update(more)
    return encoded, EncodeReport(kept=len(encoded), **counts)


def encode_answers(
    messages: tuple[Message, ...],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    counts: Counter[str],
    *,
    max_prompt_length: int,
    max_length: int,
    long_prompts: LongPrompts,
) -> Row | None:
    """A prompt with its answers as ids; None if it is skipped. What happened goes into `counts`."""
    prompt = _prompt_ids(messages, tokenizer, max_prompt_length, long_prompts, counts)
    if not prompt:
        return None
    whole = [answer_ids(messages, text, tokenizer) for text in texts]
    room = max(max_length - len(prompt), 0)
    fitting = tuple(ids[:room] for ids in whole)
    if not all(any(token != tokenizer.end_of_turn for token in ids) for ids in fitting):
        counts["empty"] += 1
        return None
    # Cut answers end without an end-of-turn token: the model must not learn to stop there.
    counts["cut_responses"] += sum(len(ids) > room for ids in whole)
    return Row(prompt=prompt, responses=fitting)


def answer_ids(messages: tuple[Message, ...], text: str, tokenizer: Tokenizer) -> Ids:
    """A human answer as ids, ending with exactly one end-of-turn token, also if the text spells one out."""
    ids, end = tuple(tokenizer.encode_answer(messages, text)), tokenizer.end_of_turn
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return (*ids, end)


def _prompt_ids(
    messages: tuple[Message, ...],
    tokenizer: Tokenizer,
    max_prompt_length: int,
    long_prompts: LongPrompts,
    counts: Counter[str],
) -> Ids:
    """A prompt's ids within the limit, or none; what happened goes into `counts`."""
    ids = tuple(tokenizer.encode_prompt(messages))
    if not ids:
        counts["empty"] += 1
    elif len(ids) > max_prompt_length:
        if long_prompts == "skip":
            counts["long_prompts"] += 1
            return ()
        counts["cut_prompts"] += 1
        return ids[-max_prompt_length:]  # the end holds the question and the header of the answer
    return ids


def check_sampling(max_prompt_length: int, max_tokens: int, context: int) -> None:
    """Raise RecipeError if the longest prompt and the longest answer do not fit into the model's context."""
    _at_least_one(max_prompt_length=max_prompt_length, max_tokens=max_tokens)
    if max_prompt_length + max_tokens > context:
        raise RecipeError(
            f"max_prompt_length {max_prompt_length} and max_tokens {max_tokens} make {max_prompt_length + max_tokens} "
            f"tokens, but the model's context is {context}; lower one of the two"
        )


def check_training(max_prompt_length: int, max_length: int, context: int) -> None:
    """Raise RecipeError if prompt and answer together may exceed the model's context."""
    _at_least_one(max_prompt_length=max_prompt_length, max_length=max_length)
    if max_length > context:
        raise RecipeError(f"max_length is {max_length}, but the model's context is {context}; lower it to {context}")


def _at_least_one(**limits: int) -> None:
    for name, limit in limits.items():
        if limit < 1:
            raise RecipeError(f"{name} is {limit}; it must be at least 1")
