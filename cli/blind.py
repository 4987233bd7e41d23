"""`compare --blind`: a person says which of two answers is better, without being told whose they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spa_lite.cli.compare import answered, opened, show
from spa_lite.cli.speakers import Speakers

if TYPE_CHECKING:
    from spa_lite.records import Prompt
    from spa_lite.votes import Question, Said, Tally, Votes

SAID: dict[str, Said] = {"a": "a", "b": "b", "e": "either", "n": "neither"}
ASKED = "A or B is better, (e)ither is fine, (n)either is, (s)kip, (u)ndo, (q)uit: "
DONE = "nothing is left to vote on; (u)ndo, (q)uit: "


def vote(
    who: Speakers, names: Sequence[str], prompts: Sequence[Prompt], home: Path, file: Path | None, as_json: bool
) -> None:
    """Have two stages answer, ask for votes until nothing is left or nobody answers, and say what they come to."""
    import msgspec

    from spa_lite.cli import render
    from spa_lite.stages.workbench import folder_digest
    from spa_lite.store import digest
    from spa_lite.votes import Match, Votes, file_name, questions_of

    models, pair = opened(who, names), (names[0], names[1])
    policies = digest([models.fingerprint, *(folder_digest(who.policies[name]) for name in names)])
    votes = Votes(file or home / file_name(pair), Match(pair, policies, who.recipe.seed))
    for path in votes.mended:
        render.note(f"{path}: the last line was cut short while it was written, so that vote is asked for again")
    questions = questions_of(votes.match, *answered(who, names, prompts, home, models))
    ask(questions, votes)
    tally, left = votes.tally(questions), sum(votes.asks(question) for question in questions)
    if as_json:
        places = {"votes": str(votes.pairs), "other": str(votes.others), "pairs": votes.trainable}
        print(msgspec.json.encode({**tally.to_dict(), "left": left, **places}).decode())
    else:
        for line in result(tally, left):
            render.out.print(render.safe(line))
    if votes.trainable:
        render.note(f"pairs for run --seed-pairs: {votes.trainable}, in {votes.pairs}")


def ask(questions: Sequence[Question], votes: Votes) -> None:
    """Show each question that is open, and keep what is said, until none is left or the user quits."""
    from spa_lite.cli import render

    asked = [question for question in questions if not question.identical]
    skipped: set[str] = set()
    shown: Question | None = None
    voted = False
    while (question := next((q for q in asked if votes.asks(q) and q.key not in skipped), None)) or voted:
        if question and question is not shown:
            a, b = question.answers
            place = f"{asked.index(question) + 1}/{len(asked)}"
            show(place, question.sample.messages, [("A", a), ("B", b)], on_stderr=True)
        shown = question
        word = heard(ASKED if question else DONE)
        if word in ("q", "quit"):
            return
        if word in ("u", "undo"):
            render.note("the last vote is taken back" if votes.take_back() else "there is no vote to take back")
            shown = None
        elif question and word in ("s", "skip"):
            skipped.add(question.key)
        elif question and word in SAID:
            votes.cast(question, SAID[word])
            voted = True
        else:
            render.note("one of the letters, please, and Enter")


def heard(prompt: str) -> str:
    """A line of standard input, in lower case; its end is `quit`."""
    from spa_lite.cli import render

    render.err.print(prompt, end="")
    line = sys.stdin.buffer.readline().decode(errors="replace")
    if not line.endswith("\n") or not sys.stdin.isatty():
        render.err.print()  # where no Enter was echoed
    return line.strip().lower() if line else "quit"


def result(tally: Tally, left: int) -> list[str]:
    """What the votes come to, in two lines."""
    from spa_lite.cli.render import percent

    (first, last), rate = tally.stages, tally.win_rate
    wins = f"wins {tally.wins} of {rate.n} decided votes, {percent(rate.to_dict())} %" if rate else "no decided vote"
    others = f"{tally.either} either, {tally.neither} neither, {tally.identical} with identical answers"
    return [f"{last} against {first}: {wins}", f"{others}, {left} not voted on"]
