"""Axis `prompts` as stages: X_i is given, or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import data, guards, prompts
from spa_lite.backend import Sampling
from spa_lite.errors import DataError
from spa_lite.events import Event
from spa_lite.files import lines_of
from spa_lite.journal import Journal
from spa_lite.recipe import Recipe
from spa_lite.records import Prompt, Sample
from spa_lite.sample import Encoded
from spa_lite.stages.workbench import Policy, Workbench, read_samples
from spa_lite.store import digest

WRITTEN = 400
"""Prompts that are written in a round unless the recipe says how many."""


def asked_for(recipe: Recipe, i: int) -> int:
    """Prompts that the model is asked for in round i."""
    return recipe.round_sizes[i - 1] if recipe.round_sizes else recipe.prompts.count or WRITTEN


@dataclass(frozen=True)
class Asked:
    """The prompts of a round: a digest of them or the key of the stage that wrote them, about how many there are, and
    what reads them."""

    key: str
    size: int
    read: Callable[[], list[Encoded]]


class Prompts(Workbench):
    """The prompts of each round."""

    def prompts(self, i: int, policy: Policy) -> Asked:
        """X_i: the round's share of what is given, or written by the policy or by pi_init."""
        if guards.is_written(self.recipe):
            return self._write_prompts(i, policy if self.recipe.prompts.by == "policy" else self.init)
        share = self.data.rounds[i - 1]
        return Asked(
            digest([share, [self.data.answers.get(prompt.id) for prompt, _ in share]]), len(share), lambda: share
        )

    def _write_prompts(self, i: int, writer: Policy) -> Asked:
        r, name, material = self.recipe, f"round {i} prompts", self.data.material
        assert material
        count = asked_for(r, i)
        if r.prompts.generator:
            writer = self._generator()

        def work(part: Path) -> dict[str, Any]:
            backend = self._bind(writer.adapter)
            how = Sampling(r.prompts.temp, r.prompts.top_p, r.prompts.max_tokens)

            def replies(material: prompts.Material, count: int, file: str, title: str) -> list[Sample]:
                requests = self._encoded(prompts.asked(r, material, self._labelled, i, self._in_lesson, count), title)
                if not requests:
                    raise DataError(
                        f"{title}: every request for a prompt is longer than lengths.max_prompt_length="
                        f"{r.lengths.max_prompt_length}; raise it, or ask for less (--prompt-template, --examples)"
                    )
                self._answer(backend, part / file, requests, i, title, n=1, sampling=how)
                return list(read_samples(part / file))

            told = replies(material, count, "written.jsonl", name)
            found = prompts.written(told, self._earlier(i), self._banned, r, self._in_lesson)
            summary: dict[str, Any] = msgspec.to_builtins(found.counts)
            summary["tokens"] = sum(len(s.completions[0].ids) for s in told)
            if r.prompts.source == "persona" and r.prompts.control:
                control = prompts.read(r, self._in_lesson, "bare")
                bare = replies(control, min(r.prompts.control, count), "control.jsonl", f"{name} control")
                without, with_ = prompts.texts_of(bare), prompts.texts_of(told)
                summary["control"] = len(without)
                # Of as many: the rate grows with their number.
                summary["repeated_with_personas"] = prompts.repetition(with_[: len(without)])
                summary["repeated_without_personas"] = prompts.repetition(without)
            fitting = [prompt for prompt, _ in self._encoded(self._judged_by_gold(found.prompts), name)]
            if not fitting:
                raise DataError(
                    f"{name}: of {len(told)} that were written none can be used ({sentence(summary)}); "
                    "raise --prompt-temp or --prompt-count, or ask otherwise with --prompt-template"
                )
            self.report(Event(name, note=sentence(summary)))
            if self._asks_gold and summary["unknown"]:
                note = f"{summary['unknown']} prompts are no tasks of the lesson, so gold cannot judge them: left out"
                self.report(Event(name, note=note))
            Journal(part / "prompts.jsonl").append(fitting)
            return summary | {"prompts": len(fitting)}

        inputs = {"writer": writer.key, "labelled": digest(self._labelled), "round": str(i)}
        inputs |= {"held out": digest(sorted(self._banned)), "requests": material.key.hex()}
        if self._asks_gold:
            inputs |= {"judge": "gold"}
        earlier = {k: self.stage_of(k, "prompts") for k in range(1, i)}
        inputs |= {f"prompts of round {k}": stage.key for k, stage in earlier.items()}
        stage = self._stage(
            f"rounds/{i}", "prompts", ("prompts.jsonl", "written.jsonl", "control.jsonl"), inputs, count
        )
        self._once(stage, work)
        return Asked(stage.key, count, lambda: self._encoded(self._read_prompts(i), name))

    @property
    def _asks_gold(self) -> bool:
        return "gold" in {self.recipe.judge.by, self.recipe.pairing.gap_judge}

    def _judged_by_gold(self, found: list[Prompt]) -> list[Prompt]:
        """The prompts that the judge can judge: gold knows the truth about tasks of the lesson alone."""
        return [p for p in found if "lesson" in p.extra] if self._asks_gold else found

    def _generator(self) -> Policy:
        """A writer of prompts from keywords, taught by SFT from pi_init on the labelled prompts (SynPO)."""
        assert self.data.material
        known = prompts.generator_examples(self.recipe, self.data.material, self._labelled, self._in_lesson)
        return self._taught(0, "generator", lambda _: known, {"labelled": digest(known)}, len(known))

    @property
    def _banned(self) -> set[bytes]:
        """Conversations that no round may ask: what is held out, and what is labelled."""
        held = [p.messages for p, _ in self.data.held_out_prompts] + [p.messages for p, _ in self.data.held_out_pairs]
        return {data.conversation_key(messages) for messages in held + [p.messages for p in self._labelled]}

    def _read_prompts(self, i: int) -> list[Prompt]:
        path = self.run.path(self.stage_of(i, "prompts"), "prompts.jsonl")
        return [msgspec.json.decode(line, type=Prompt) for line in lines_of(path)]

    def _earlier(self, i: int) -> list[str]:
        """Texts that a prompt of round i must not repeat."""
        written = [prompt for k in range(1, i) for prompt in self._read_prompts(k)]
        return [prompt.messages[-1].content for prompt in written]


def sentence(counts: Mapping[str, Any]) -> str:
    """What became of the prompts that were written, in words."""
    words = {
        "unreadable": "without a prompt in them",
        "filtered": "no task for a text model",
        "held_out": "held out or labelled",
        "similar": "too similar to an earlier one",
    }
    lost = [f"{counts[name]} {what}" for name, what in words.items() if counts[name]]
    told = f"{counts['kept']} of {counts['asked']} prompts kept" + (f" ({', '.join(lost)})" if lost else "")
    told += f"; {100 * counts['repeated']:.1f} % repeat an earlier one word for word"
    if "repeated_without_personas" in counts:
        told += f"; of {counts['control']}, {100 * counts['repeated_with_personas']:.1f} % do with personas and "
        told += f"{100 * counts['repeated_without_personas']:.1f} % without"
    return told
