"""Which tokens of an answer earned its reward: the log-ratio of each token. They sum to the answer's log-ratio.

The implicit reward of an answer (Eq. 7, without beta) is log pi/pi_ref, and that is a sum over its tokens. So each
token's share is exact, and no approximation: what this token adds, given all that stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from spa_lite.backend import Backend, Tokenizer
from spa_lite.records import Ids, Record, Row

END = "⟨end⟩"
"""Shown for a token that ends an answer and has no text of its own."""
LONGEST = 32
"""Tokens that one character may be spread over before the text is taken as it stands (U+FFFD)."""
BROKEN = "\ufffd"


class Credit(Record, frozen=True, kw_only=True):
    """One token of an answer: its text, and its log-probability (nats) under policy and reference.

    `piece` is empty for a token that holds only the beginning of a character: the token that completes it has it.
    """

    piece: str
    policy: float
    reference: float

    @property
    def logratio(self) -> float:
        """log pi/pi_ref of this token, in nats: above 0 where the policy likes it better than the reference does."""
        return self.policy - self.reference


def credit(
    backend: Backend, prompt_ids: Ids, response_ids: Ids, policy_role: str, reference_role: str | None = None
) -> list[Credit]:
    """Credit of each token of one answer; without a reference, whose log-probabilities are then 0, the likelihood."""
    row = Row(prompt=prompt_ids, responses=(response_ids,))
    reference = token_logprobs(backend, row, reference_role)[0] if reference_role is not None else None
    return credits_of(backend.tokenizer, response_ids, token_logprobs(backend, row, policy_role)[0], reference)


def token_logprobs(backend: Backend, row: Row, role: str) -> list[tuple[float, ...]]:
    """Log-probability (nats) of each token of each response of a row under a role."""
    ((_, scores),) = backend.logprob([row], role, per_token=True)
    return [score.per_token or () for score in scores]


def credits_of(
    tokenizer: Tokenizer, ids: Ids, policy: Sequence[float], reference: Sequence[float] | None = None
) -> list[Credit]:
    """Credit from log-probabilities per token that are known already; `reference` None: 0 each."""
    known = reference if reference is not None else [0.0] * len(ids)
    return [
        Credit(piece=piece, policy=own, reference=other)
        for piece, own, other in zip(pieces(tokenizer, ids), policy, known, strict=True)
    ]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token. Joined they are the whole text, with a sign for each token that has none.

    Such a token is shown as `END` if it ends an answer, else as its id in ⟨⟩. A character that is spread over tokens
    belongs to the one that completes it. Time is linear in the number of tokens.
    """
    marks = _marks(tokenizer, ids)
    texts = iter(_spelled(tokenizer, [i for i in ids if i not in marks]))
    return [marks[i] if i in marks else next(texts) for i in ids]


def _spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Pieces of ids that all have text: what each adds to that of the few before it.

    A token is not decoded alone: in front of a text some tokenizers drop a space, and a part of a character is none.
    """
    found: list[str] = []
    start = done = 0  # what lies between is spelled out already and is context only
    before = ""
    for here in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:here])
        waits = text.endswith(BROKEN) and here < len(ids) and here - done < LONGEST
        found.append("" if waits else text[len(before) :])
        if not waits:
            start, done = done, here
            before = tokenizer.decode(ids[start:done])
    return found


def _marks(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, str]:
    """A sign for each id that has no text, such as the end of a turn. A space that is dropped at the front has text."""
    distinct = dict.fromkeys(ids)
    silent = [i for i in distinct if not tokenizer.decode([i])]
    beside = next((i for i in distinct if tokenizer.decode([i]).strip()), None)

    def has_text(i: int) -> bool:
        return beside is not None and tokenizer.decode([beside, i, beside]) != tokenizer.decode([beside, beside])

    return {i: END if i in tokenizer.stop_ids else f"⟨{i}⟩" for i in silent if not has_text(i)}
