"""Votes of a person on the answers of two stages: one line each, on the disk before the next question is asked.

A vote for one of two answers is a labelled pair: its file is one that `run --seed-pairs` takes as it is. All other
votes lie in a second file beside it. The two files are all there is: a line that somebody deletes is asked again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from spa_lite import files, keys
from spa_lite.answers import paired, prompts_of_answers
from spa_lite.data import conversation_key
from spa_lite.errors import DataError, RunError
from spa_lite.intervals import Interval, wilson
from spa_lite.records import Completion, Message, Record, Sample

FORMAT = 1
ENDING = ".jsonl"
Said = Literal["a", "b", "either", "neither"]


class Ballot(Record, frozen=True, kw_only=True):
    """What was asked, and what was said. `stages` are in the order of their making, `shown` as A and B.

    `policies` and `answers` are digests: of the two policies, and of the conversation with both answers. `number`
    counts the votes of both files.
    """

    format: int
    stages: tuple[str, str]
    shown: tuple[str, str]
    said: Said
    prompt: str
    seed: int
    policies: str
    answers: str
    number: int


class Vote(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One line: a labelled pair, or the two answers as they were shown."""

    messages: tuple[Message, ...]
    chosen: str | None = None
    rejected: str | None = None
    a: str | None = None
    b: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    vote: Ballot

    @property
    def winner(self) -> str | None:
        """The stage whose answer is better; None if neither is."""
        said = self.vote.said
        return self.vote.shown["ab".index(said)] if said in ("a", "b") else None


@dataclass(frozen=True)
class Match:
    """Two stages, the earlier first; a digest of their policies; and the seed of the order in which they are shown."""

    stages: tuple[str, str]
    policies: str
    seed: int


@dataclass(frozen=True)
class Question:
    """The answers of both stages to one prompt."""

    match: Match
    sample: Sample

    @cached_property
    def order(self) -> tuple[int, int]:
        """Which stage is A and which is B: by chance, but always the same for this seed, prompt and pair of stages."""
        key = conversation_key(self.sample.messages)
        first = int(keys.shuffled(2, "blind", self.match.seed, *self.match.stages, key)[0])
        return first, 1 - first

    @property
    def answers(self) -> tuple[Completion, Completion]:
        """Answer A and answer B."""
        first, second = self.order
        return self.sample.completions[first], self.sample.completions[second]

    @property
    def identical(self) -> bool:
        """Whether there is nothing to choose from."""
        a, b = self.answers
        return a.text == b.text

    @cached_property
    def key(self) -> str:
        """Digest of the conversation and both answers, in the order of the stages."""
        answers = [completion.text for completion in self.sample.completions]
        return keys.digest(conversation_key(self.sample.messages), *answers).hex()


@dataclass(frozen=True)
class Tally:
    """What the votes come to: `wins` are those of the later stage. `identical` answers were not asked about."""

    stages: tuple[str, str]
    wins: int
    losses: int
    either: int
    neither: int
    identical: int

    @property
    def win_rate(self) -> Interval | None:
        """Share of the decided votes that the later stage won (Wilson); None without such votes."""
        return wilson(self.wins, self.wins + self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rate = self.win_rate
        counts = {name: getattr(self, name) for name in ("wins", "losses", "either", "neither", "identical")}
        return {"stages": self.stages, **counts, "win_rate": rate.to_dict() if rate else None}


class Votes:
    """The votes on a match, in a file of pairs and one of other votes beside it.

    A last line that was cut short while it was written is cut off; `mended` names the files of which that is true.
    Raises RunError for a file that cannot be written, DataError for one that holds something else.
    """

    def __init__(self, path: Path, match: Match) -> None:
        _check(path)
        self.match, self.pairs, self.others = match, path, beside(path)
        found = [(file, _read(file)) for file in (self.pairs, self.others)]
        for file, (votes, _) in found:
            for place, vote in votes:
                _check_vote(f"{file}, line {place}", vote, match)
        self.mended = [file for file, (_, tail) in found if tail is not None and _mend(file, tail)]
        self.votes = sorted((vote for _, (votes, _) in found for _, vote in votes), key=lambda v: v.vote.number)

    def asks(self, question: Question) -> bool:
        """Whether a vote is wanted: the answers differ, and nobody has voted on these two."""
        return not question.identical and all(vote.vote.answers != question.key for vote in self.votes)

    def cast(self, question: Question, said: Said) -> None:
        """Keep a vote. When this returns it is on the disk."""
        vote = _vote(question, said, self.votes[-1].vote.number + 1 if self.votes else 1)
        path = self._file(vote)
        new = not path.exists()
        files.write(path, msgspec.json.encode(vote) + b"\n", at=0 if new else path.stat().st_size)
        if new:
            files.sync(path.parent)
        self.votes.append(vote)

    def take_back(self) -> Vote | None:
        """Undo the last vote, of this session or an earlier one, and return it; None if there is none."""
        if not self.votes:
            return None
        vote = self.votes.pop()
        path = self._file(vote)
        kept = [line for line in files.lines_of(path) if line.strip() and _decode(line) != vote]
        files.write_atomic(path, b"".join(line + b"\n" for line in kept))
        return vote

    def tally(self, questions: Sequence[Question]) -> Tally:
        """All votes of the files, and how many of these questions are none because both answers are the same."""
        winners = [vote.winner for vote in self.votes]
        said = [vote.vote.said for vote in self.votes]
        return Tally(
            stages=self.match.stages,
            wins=winners.count(self.match.stages[1]),
            losses=winners.count(self.match.stages[0]),
            either=said.count("either"),
            neither=said.count("neither"),
            identical=sum(question.identical for question in questions),
        )

    @property
    def trainable(self) -> int:
        """How many of the votes are labelled pairs."""
        return sum(vote.chosen is not None for vote in self.votes)

    def _file(self, vote: Vote) -> Path:
        return self.others if vote.chosen is None else self.pairs


def questions_of(match: Match, earlier: Sequence[Sample], later: Sequence[Sample]) -> list[Question]:
    """A question per prompt, from the answers of both stages to the same prompts."""
    return [Question(match, sample) for sample in paired(prompts_of_answers(earlier), earlier, later)[0]]


def beside(path: Path) -> Path:
    """The file of the votes that are no pairs."""
    return path.with_name(f"{path.name.removesuffix(ENDING)}.other{ENDING}")


def file_name(stages: Sequence[str]) -> str:
    """`votes-init-round-3.jsonl`."""
    return f"votes-{'-'.join(stages)}{ENDING}".replace(" ", "-")


def _vote(question: Question, said: Said, number: int) -> Vote:
    """The line of a vote. No pair can be made of an empty answer: the reader of pairs refuses it."""
    match, sample, (a, b) = question.match, question.sample, [answer.text for answer in question.answers]
    decided = said in ("a", "b") and all(text.strip() and "\0" not in text for text in (a, b))
    ballot = Ballot(
        format=FORMAT,
        stages=match.stages,
        shown=(match.stages[question.order[0]], match.stages[question.order[1]]),
        said=said,
        prompt=sample.id,
        seed=match.seed,
        policies=match.policies,
        answers=question.key,
        number=number,
    )
    if not decided:
        return Vote(messages=sample.messages, a=a, b=b, extra=sample.extra, vote=ballot)
    chosen, rejected = (a, b) if said == "a" else (b, a)
    return Vote(messages=sample.messages, chosen=chosen, rejected=rejected, extra=sample.extra, vote=ballot)


# --- reading ---------------------------------------------------------------------------------------------------

_decode = msgspec.json.Decoder(Vote).decode
_BEGINS = b'{"messages":[{"role":"'


def _check(path: Path) -> None:
    """Refuse a name under which votes cannot be kept, before anybody has voted."""
    if path.suffix != ENDING:
        raise RunError(f"votes cannot be kept in {path}: the name must end with {ENDING}, as run --seed-pairs reads it")
    if not path.parent.is_dir():
        raise RunError(f"votes cannot be kept in {path}: there is no folder {path.parent}; make it, or mend the path")
    for file in (path, beside(path)):
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            why = "it is a folder" if file.is_dir() else "it may not be written"
            raise RunError(f"votes cannot be kept in {file}: {why}; name another file with --votes")


def _read(path: Path) -> tuple[list[tuple[int, Vote]], bytes | None]:
    """The votes of a file with their lines' numbers, and its last line if that has no end."""
    if not path.exists():
        return [], None
    content = path.read_bytes()
    whole, _, tail = content.rpartition(b"\n")
    votes = list(_votes(path, whole.split(b"\n")))
    if not tail:
        return votes, None
    if not _half(tail):
        votes += _votes(path, [tail], content.count(b"\n") + 1)
    return votes, tail


def _votes(path: Path, lines: Sequence[bytes], first: int = 1) -> Iterator[tuple[int, Vote]]:
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            yield number, _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise DataError(
                f"{path}, line {number}: this is no vote of `compare --blind`; name another file with --votes"
            ) from None


def _half(tail: bytes) -> bool:
    """Whether a line without an end is the beginning of a vote, rather than a line of somebody else's file."""
    try:
        msgspec.json.decode(tail)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return tail.startswith(_BEGINS) or _BEGINS.startswith(tail)
    return False


def _mend(path: Path, tail: bytes) -> bool:
    """End the last line, or cut it off where it is only half a vote; whether it was."""
    half, size = _half(tail), path.stat().st_size
    files.write(path, b"" if half else b"\n", at=size - len(tail) if half else size)
    return half


def _check_vote(place: str, vote: Vote, match: Match) -> None:
    ballot = vote.vote
    if ballot.format != FORMAT:
        raise DataError(f"{place}: a vote in form {ballot.format}, which this version of spa-lite does not know")
    if ballot.stages != match.stages:
        raise DataError(
            f"{place}: a vote on {' and '.join(ballot.stages)}, not on {' and '.join(match.stages)}; "
            "name another file with --votes"
        )
    if ballot.policies != match.policies:
        raise DataError(
            f"{place}: a vote on other policies that are called {' and '.join(ballot.stages)}, too; "
            "name another file with --votes"
        )
