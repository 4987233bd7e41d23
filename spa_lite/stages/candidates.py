"""Axis `candidates` as stages: the answers to the prompts of a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_lite import candidates, improve, sampler, states
from spa_lite.events import Event
from spa_lite.files import digest_of_weights
from spa_lite.journal import Journal
from spa_lite.lint.samples import Tally
from spa_lite.records import Message, Prompt, Sample
from spa_lite.sample import Encoded
from spa_lite.stages.prompts import Asked
from spa_lite.stages.workbench import Policy, Workbench, read_samples
from spa_lite.store import Stage, digest


class Candidates(Workbench):
    """The candidates of each round."""

    def sample(self, i: int, asked: Asked, policy: Policy) -> Stage:
        """The candidates for each prompt of X_i: SPA's are two answers from pi_{i-1}."""
        name, kinds = f"round {i} sample", self.recipe.candidates.kinds
        drawing = sampler.file_of(self.recipe)
        improver = self._improver(i, policy) if "improve" in kinds else None

        def work(part: Path) -> dict[str, Any]:
            encoded = asked.read()
            if kinds == ["sample"]:
                with self._drawing(policy.adapter) as backend:
                    keep = states.wanted(self.recipe, i)
                    if keep and (size := states.room(self.recipe, backend, len(encoded), i, part)):
                        self.report(Event(name, note=size))
                    self._answer(backend, part / "samples.jsonl", encoded, i, name, keep=keep)
            else:
                found = {
                    kind: {s.id: s for s in self._drawn(kind, part, encoded, i, name, policy, improver)}
                    for kind in candidates.drawn(self.recipe)
                }
                whole = candidates.together(encoded, found, self.data.answers, self.recipe)
                if len(whole) < len(encoded):
                    lost = len(encoded) - len(whole)
                    self.report(Event(name, note=f"{lost} of {len(encoded)} prompts lack a candidate and are left out"))
                Journal(part / "samples.jsonl").append(whole)
            return sampled(part / "samples.jsonl", len(encoded))

        inputs = {"policy": policy.key, "prompts": asked.key, "round": str(i)}
        if {"init", "improve"} & set(kinds):
            inputs |= {"pi_init": self.init.key}
        if improver:
            inputs |= {"improver": improver.key}
        if drawing:
            inputs["sampler"] = digest_of_weights(drawing)
        stage = self._stage(f"rounds/{i}", "sample", ("samples.jsonl", states.NAME), inputs, asked.size)
        return self._once(stage, work, sampler.made_by(self.recipe) if drawing else None)

    def _drawn(
        self, kind: str, part: Path, encoded: list[Encoded], i: int, name: str, policy: Policy, improver: Policy | None
    ) -> list[Sample]:
        """The candidates of one kind, one Sample per prompt."""
        how, first = candidates.sampling_of(self.recipe, kind), candidates.STREAMS[kind]
        path, title = part / f"{kind}.jsonl", name if kind == "sample" else f"{name} {kind}"
        if kind == "improve":
            assert improver
            drafts = self._drafts(part, encoded, i, f"{title} drafts", policy)
            requests = [
                Prompt(
                    id=draft.id, messages=improve.request(draft.messages, draft.completions[0].text, self._in_lesson)
                )
                for draft in drafts
            ]
            encoded = self._encoded(requests, title)
            policy = improver
        backend = self._bind((self.init if kind == "init" else policy).adapter)
        n = self.recipe.sampling.n if kind == "sample" else 1
        self._answer(backend, path, encoded, i, title, n=n, sampling=how, first=first)
        return list(read_samples(path))

    def _drafts(self, part: Path, encoded: list[Encoded], i: int, name: str, policy: Policy) -> list[Sample]:
        """One answer of the policy per prompt, to be improved."""
        how = candidates.sampling_of(self.recipe, "sample")
        backend = self._bind(policy.adapter)
        self._answer(
            backend, part / "drafts.jsonl", encoded, i, name, n=1, sampling=how, first=candidates.STREAMS["draft"]
        )
        return list(read_samples(part / "drafts.jsonl"))

    def _improver(self, i: int, policy: Policy) -> Policy:
        """What rewrites answers, taught by SFT from pi_init: a prompt and the policy's answer -> the good answer."""

        def known(part: Path) -> list[tuple[tuple[Message, ...], str]]:
            encoded = [(pair.prompt, row.prompt) for pair, row in self.data.seed_pairs]
            drafts = self._drafts(part, encoded, i, f"round {i} improver drafts", policy)
            good = [pair.chosen for pair, _ in self.data.seed_pairs]
            told = [(d.messages, d.completions[0].text, answer) for d, answer in zip(drafts, good, strict=True)]
            return improve.examples(told, self._in_lesson)

        inputs = {
            "policy": policy.key,
            "labelled": digest([[pair.messages, pair.chosen] for pair, _ in self.data.seed_pairs]),
        }
        return self._taught(i, "improver", known, inputs, len(self.data.seed_pairs))


def sampled(path: Path, prompts: int) -> dict[str, Any]:
    """Summary of a round's samples: sizes, answers that hit the cap, what the lint found."""
    tokens = capped = 0
    seen = Tally()
    for answer in read_samples(path):
        tokens += sum(len(c.ids) for c in answer.completions if c.ended != "human")
        capped += sum(c.ended == "cap" for c in answer.completions)
        seen.add(answer)
    return {"prompts": prompts, "tokens": tokens, "capped": capped, "lint": seen.findings().to_dict()}
