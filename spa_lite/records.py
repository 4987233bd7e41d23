"""The records that pass between stages and lie in a run folder: frozen, typed, one JSON line each.

Token ids are the truth: a sampled answer is judged and trained on as exactly the ids that were sampled.
Texts are there for people to read.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Ids = tuple[int, ...]
Ended = Literal["eos", "cap", "stop", "human"]
"""How an answer ended: the model stopped, the length cap cut it, a stop string did, or a person wrote it."""


Kind = Literal["sample", "greedy", "gold", "chosen", "rejected", "init", "improve"]
"""Where an answer comes from: `candidates.kinds`, where `pair` stands for the chosen and the rejected answer."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Base of all records."""


class Message(Record, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str


class Prompt(Record, frozen=True, kw_only=True):
    """A conversation that ends with a user turn. `extra` keeps whatever other fields the record had."""

    id: str
    messages: tuple[Message, ...]
    extra: dict[str, Any] = {}


class Pair(Record, frozen=True, kw_only=True):
    """A prompt with two answers, the first preferred by a person."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    extra: dict[str, Any] = {}

    @property
    def prompt(self) -> Prompt:
        """The pair's prompt alone."""
        return Prompt(id=self.id, messages=self.messages, extra=self.extra)


class Demonstration(Record, frozen=True, kw_only=True):
    """A prompt with one good answer, to imitate."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    extra: dict[str, Any] = {}


class Rated(Record, frozen=True, kw_only=True):
    """A prompt with one answer that is desirable or not."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    desirable: bool
    extra: dict[str, Any] = {}


class Completion(Record, frozen=True, kw_only=True):
    """One answer.

    `logprobs` are per token, in nats, at temperature 1 whatever the sampling temperature was. The
    end-of-turn token is part of `ids` exactly when `ended` is "eos".
    """

    ids: Ids
    text: str
    ended: Ended
    logprobs: tuple[float, ...] = ()
    kind: Kind = "sample"


class Sample(Record, frozen=True, kw_only=True):
    """A prompt, the ids it was rendered to, and its n sampled answers. One line of `samples.jsonl`."""

    id: str
    messages: tuple[Message, ...]
    prompt_ids: Ids
    completions: tuple[Completion, ...]
    extra: dict[str, Any] = {}


class Row(Record, frozen=True, kw_only=True):
    """What a backend scores and trains on: one prompt and 1 to n responses, as token ids."""

    prompt: Ids
    responses: tuple[Ids, ...]


class Score(Record, frozen=True, kw_only=True):
    """Summed log-probability (nats) of one response and the number of its tokens."""

    logp: float
    tokens: int
    per_token: tuple[float, ...] | None = None


class Side(Record, frozen=True, kw_only=True):
    """One of the two judged answers: text, ids and both sums (nats, no beta)."""

    text: str
    ids: Ids
    ended: Ended
    policy: float
    reference: float

    @property
    def logratio(self) -> float:
        """log pi_policy / pi_reference of the whole response, in nats."""
        return self.policy - self.reference


class Judgement(Record, frozen=True, kw_only=True):
    """Two answers to one prompt and which one the judge prefers. One line of `judgements.jsonl`.

    `margin` is beta * (logratio_a - logratio_b), `p` its sigmoid: the probability that a is better
    (Eq. 7). `label` is "a" or "b". Judges other than implicit label by numbers of their own, `score_a`
    and `score_b` (higher is better; None in files of older versions); margin and p still report the
    log-ratios. `confidence` is the judge's probability that the chosen answer is the better one, None from a judge
    that gives none; `gap` how far apart the scores are that `pairing.min_gap` looks at; `third` are the ids of the
    policy's own greedy answer, for a loss that is optimistic about it.
    """

    id: str
    messages: tuple[Message, ...]
    prompt_ids: Ids
    a: Side
    b: Side
    logratio_a: float
    logratio_b: float
    margin: float
    p: float
    label: Literal["a", "b"]
    tie: bool
    tokens_a: int
    tokens_b: int
    judge: str = "implicit"
    score_a: float | None = None
    score_b: float | None = None
    confidence: float | None = None
    gap: float | None = None
    third: Ids = ()
    extra: dict[str, Any] = {}

    @property
    def chosen(self) -> Side:
        """The preferred answer."""
        return self.a if self.label == "a" else self.b

    @property
    def rejected(self) -> Side:
        """The other answer."""
        return self.b if self.label == "a" else self.a

    @property
    def row(self) -> Row:
        """The training row: chosen first, then rejected, then the third if there is one."""
        third = (self.third,) if self.third else ()
        return Row(prompt=self.prompt_ids, responses=(self.chosen.ids, self.rejected.ids, *third))
