"""Records as other tools write them (Alpaca's `instruction`, ShareGPT's `conversations`, a conversation that goes on to
its answer), put into this project's words."""

from __future__ import annotations

from spa_lite.sources import Fields

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's speakers."""


def ours(fields: Fields) -> tuple[Fields, str]:
    """The fields in this project's words, and the name of the form they came in ("" if it was ours already)."""
    for name, translate in (("alpaca", _alpaca), ("sharegpt", _sharegpt), ("conversation", _answered)):
        found = translate(fields)
        if found is not None:
            return _plain_answers(found), name
    return fields, ""


def _alpaca(fields: Fields) -> Fields | None:
    """`instruction` with an optional `input` is the prompt. `output`, the answer to imitate, stays where it is."""
    instruction, more = fields.get("instruction"), fields.get("input")
    if not isinstance(instruction, str) or "prompt" in fields or "messages" in fields:
        return None
    rest = {name: value for name, value in fields.items() if name not in ("instruction", "input")}
    return {"prompt": f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction} | rest


def _sharegpt(fields: Fields) -> Fields | None:
    """`conversations` of {from, value} are turns. An answer at their end goes into `output`."""
    turns = fields.get("conversations")
    if not isinstance(turns, list) or "prompt" in fields or "messages" in fields:
        return None
    rest = {name: value for name, value in fields.items() if name != "conversations"}
    return _split_answer({"messages": [_turn(turn) for turn in turns]} | rest)


def _answered(fields: Fields) -> Fields | None:
    """`messages` that go on to their answer, and nothing else to go by."""
    turns = fields.get("messages")
    alone = all(fields.get(name) is None for name in ("prompt", "chosen", "rejected", "a", "b", "responses"))
    if not (alone and isinstance(turns, list) and len(turns) > 1):
        return None
    last = turns[-1]
    return _split_answer(fields) if isinstance(last, dict) and last.get("role") == "assistant" else None


def _split_answer(fields: Fields) -> Fields:
    turns = fields["messages"]
    if len(turns) > 1 and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        return fields | {"messages": turns[:-1], "output": turns[-1].get("content")}
    return fields


def _turn(turn: object) -> object:
    if isinstance(turn, dict) and isinstance(turn.get("from"), str):
        return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return turn


def _plain_answers(fields: Fields) -> Fields:
    """`chosen` and `rejected` as {from, value} are texts."""
    plain = {
        name: fields[name]["value"]
        for name in ("chosen", "rejected")
        if isinstance(fields.get(name), dict) and isinstance(fields[name].get("value"), str)
    }
    return fields | plain
