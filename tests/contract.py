"""What every backend must do. One class of tests; `test_backends.py` says which backends and models it runs on.

Nothing here knows a framework: a model's next-token distribution, for instance, is had by scoring every
one-token answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite import keys
from spa_lite.backend import (
    INIT,
    POLICY,
    PREVIOUS,
    Backend,
    Batch,
    Batching,
    Floats,
    Known,
    Lora,
    ModelSettings,
    Objective,
    Optimizer,
    Outcome,
    Sampling,
)
from spa_lite.backends import load
from spa_lite.errors import BackendError, ModelError, SpaError
from spa_lite.losses import dpo, pair_loss
from spa_lite.objective import Dpo, Plain, Refined, Window
from spa_lite.recipe import build
from spa_lite.records import Completion, Ids, Message, Row, Score

QUESTIONS = (
    "the baker paints?",
    "a heron",
    "my sister mends the long bridge and answers nothing at all",
    "two letters!",
)
LORA = Lora(rank=4, alpha=8.0, seed=3)
OPTIMIZER = Optimizer(eps=1e-4, weight_decay=0.01)
"""A larger eps than usual: AdamW's first step is the gradient's sign, which rounding may flip where it is near 0."""


needs_training = pytest.mark.usefixtures("training")
"""Skipped for a backend that cannot train."""


@dataclass
class Subject:
    """A backend with one model to test it on. Backends are made once per batching and given fresh roles by `fresh`."""

    name: str
    backend: str
    make_model: Callable[[], str]
    vocabulary: int
    rate: float
    base_bytes: Callable[[Any], bytes]
    tolerance: float = 1e-4
    adapter: Callable[[], Path] | None = None  # trained elsewhere, for a backend that cannot train
    _model: str | None = None
    _made: dict[Batching, Backend] = field(default_factory=dict)

    def settings(self, batching: Batching | None = None) -> ModelSettings:
        """Settings of this model on the CPU."""
        self._model = self._model or self.make_model()
        return ModelSettings(model=self._model, device="cpu", batching=batching or Batching())

    def another(self) -> Backend:
        """A new backend, as after a restart."""
        return load(self.backend, self.settings())

    def fresh(self, **batching: Any) -> Backend:
        """A backend with a zero-effect policy and the other roles on the base."""
        wanted = Batching(**batching)
        if wanted not in self._made:
            self._made[wanted] = load(self.backend, self.settings(wanted))
        backend = self._made[wanted]
        backend.bind(INIT)
        backend.bind(PREVIOUS)
        backend.bind(POLICY, None, LORA)
        return backend

    def moved(self, **batching: Any) -> Backend:
        """The same with a policy that two steps have moved away from PREVIOUS."""
        backend = self.fresh(**batching)
        backend.snapshot()
        if self.adapter:
            backend.bind(POLICY, self.adapter())
            return backend
        backend.start_training(OPTIMIZER)
        for _ in range(2):
            backend.dpo_step(pairs(backend), Dpo(0.5), self.rate)
        return backend


@dataclass
class Linear:
    """An objective whose coefficients are given per response; remembers the batches it saw. Sees rows in order."""

    coefficients: Sequence[float]
    reference: bool = True
    extrapolation: float = 0.0
    sequential: bool = True
    seen: list[Batch] = field(default_factory=list)

    def __call__(self, batch: Batch) -> Outcome:
        """loss[row] = sum over its responses of coefficient * logp."""
        start = sum(len(other.logp) for other in self.seen)
        self.seen.append(batch)
        chosen = np.array(self.coefficients[start : start + len(batch.logp)], dtype=np.float64)
        loss = np.bincount(batch.row, weights=chosen * batch.logp).astype(np.float64)
        return Outcome(loss, chosen)


class Mixed(Dpo):
    """DPO that asks for extrapolated log-probabilities and keeps what it saw."""

    def __init__(self, extrapolation: float) -> None:
        super().__init__(0.1)
        self.extrapolation = extrapolation
        self.seen: list[Batch] = []

    def __call__(self, batch: Batch) -> Outcome:
        """The loss of DPO; extrapolated sums, if any, as metrics of a row."""
        self.seen.append(batch)
        found = super().__call__(batch)
        sides = {name: batch.extrapolated[i::2] for i, name in enumerate(("mixed_chosen", "mixed_rejected"))}
        return replace(found, metrics=found.metrics | (sides if self.extrapolation else {}))


@dataclass
class Broken:
    """An objective whose loss or coefficients are not finite."""

    loss: float
    coefficient: float
    reference: bool = True
    extrapolation: float = 0.0
    sequential: bool = False

    def __call__(self, batch: Batch) -> Outcome:
        """The same number for all rows and responses."""
        return Outcome(np.full(batch.row[-1] + 1, self.loss), np.full(len(batch.row), self.coefficient))


def conversation(text: str) -> tuple[Message, ...]:
    """One user turn."""
    return (Message(role="user", content=text),)


def prompts(backend: Backend) -> list[Ids]:
    """Four prompts of different lengths."""
    return [backend.tokenizer.encode_prompt(conversation(text)) for text in QUESTIONS]


def pairs(backend: Backend, count: int = 4) -> list[Row]:
    """Rows of two human answers of different lengths."""
    answers = (
        "two plums.",
        "the blue door carries seven letters",
        "no",
        "an old map paints a quiet song!",
        "yes, again",
    )
    rows = []
    for index in range(count):
        talk = conversation(QUESTIONS[index % 4])
        two = [backend.tokenizer.encode_answer(talk, answers[(index + side) % 5]) for side in (0, 1)]
        rows.append(Row(prompt=backend.tokenizer.encode_prompt(talk), responses=tuple(two)))
    return rows


def names(count: int, n: int) -> list[list[bytes]]:
    """Keys of n samples for each of some prompts."""
    return [[keys.sample_key(0, 1, f"p{index}", k) for k in range(n)] for index in range(count)]


def draw(
    backend: Backend, asked: Sequence[Ids], key: Sequence[Sequence[bytes]], sampling: Sampling, role: str = POLICY
) -> list[tuple[Completion, ...]]:
    """All samples, in the order of the prompts."""
    found = dict(backend.sample(asked, len(key[0]), sampling, key, role))
    return [found[index] for index in range(len(asked))]


def score(
    backend: Backend, rows: Sequence[Row], role: str = POLICY, per_token: bool = False
) -> list[tuple[Score, ...]]:
    """All scores, in row order."""
    found = dict(backend.logprob(rows, role, per_token))
    return [found[index] for index in range(len(rows))]


def sums(backend: Backend, rows: Sequence[Row], role: str = POLICY) -> Floats:
    """All summed log-probs, in row order."""
    return np.array([one.logp for several in score(backend, rows, role) for one in several])


def distributions(backend: Backend, vocabulary: int, contexts: Sequence[Ids], role: str = POLICY) -> Floats:
    """Next-token log-probs [context, vocabulary]."""
    every = tuple((token,) for token in range(vocabulary))
    return sums(backend, [Row(prompt=ids, responses=every) for ids in contexts], role).reshape(-1, vocabulary)


def texts(drawn: Sequence[Sequence[Completion]]) -> list[list[tuple[Ids, str]]]:
    """Ids and endings: what must not depend on batching."""
    return [[(one.ids, one.ended) for one in several] for several in drawn]


class Numerics:
    """What may depend on a model's architecture: run on every model."""

    def test_a_long_prompt_beside_a_short_one(self, subject: Subject) -> None:
        """Together they would be padded beyond the context, where some models have no positions."""
        backend = subject.fresh()
        short = prompts(backend)[0]
        asked = [(short * backend.context)[: backend.context - 3], short]
        sampling, key = Sampling(1.0, 1.0, 8), names(2, 1)
        alone = [draw(backend, [prompt], [own], sampling)[0] for prompt, own in zip(asked, key, strict=True)]
        assert texts(draw(backend, asked, key, sampling)) == texts(alone)

    def test_a_score_is_what_the_sampler_recorded(self, subject: Subject) -> None:
        backend = subject.moved()
        asked = prompts(backend)
        drawn = draw(backend, asked, names(4, 2), Sampling(temperature=0.7, max_tokens=24))
        rows = [Row(prompt=ids, responses=tuple(c.ids for c in some)) for ids, some in zip(asked, drawn, strict=True)]
        for some, scores in zip(drawn, score(backend, rows, per_token=True), strict=True):
            for completion, found in zip(some, scores, strict=True):
                assert found.tokens == len(completion.ids) == len(completion.logprobs)
                assert found.per_token == pytest.approx(completion.logprobs, abs=subject.tolerance)
                assert found.logp == pytest.approx(math.fsum(found.per_token or ()), abs=1e-9)
                assert completion.text == backend.tokenizer.decode(completion.ids)

    def test_a_text_depends_on_its_key_alone(self, subject: Subject) -> None:
        backend, asked, key = subject.moved(), [], names(4, 3)
        asked = prompts(backend)
        sampling = Sampling(temperature=1.0, max_tokens=20)
        whole = texts(draw(backend, asked, key, sampling))
        assert len({ids for some in whole for ids, _ in some}) > 6, "different keys give different texts"
        assert texts(draw(backend, asked[::-1], key[::-1], sampling)) == whole[::-1]
        assert texts(draw(backend, asked[1:3], key[1:3], sampling)) == whole[1:3]
        assert texts(draw(backend, asked, [some[:1] for some in key], sampling)) == [some[:1] for some in whole]
        single = subject.moved(sample=1)
        assert texts(draw(single, asked, key, sampling)) == whole

    def test_a_stream_is_what_sampling_gives(self, subject: Subject) -> None:
        backend, key = subject.moved(), names(4, 1)
        asked, sampling = prompts(backend), Sampling(temperature=1.0, max_tokens=20)
        whole = [some[0].ids for some in draw(backend, asked, key, sampling)]
        assert [tuple(backend.stream(ids, sampling, name)) for ids, (name,) in zip(asked, key, strict=True)] == whole
        one, two = (backend.stream(ids, sampling, name) for ids, (name,) in zip(asked[:2], key[:2], strict=True))
        first = [(next(one), next(two)) for _ in range(min(map(len, whole[:2])))]
        assert tuple(zip(*first, strict=True)) == tuple(ids[: len(first)] for ids in whole[:2]), "two at once"
        one.close()  # heard enough: nothing is left behind
        assert [some[0].ids for some in draw(backend, asked, key, sampling)] == whole
        base = draw(backend, asked[:1], key[:1], sampling, INIT)[0][0].ids
        assert tuple(backend.stream(asked[0], sampling, key[0][0], INIT)) == base
        assert tuple(backend.stream(asked[0], Sampling(1.0, 1.0, 0), key[0][0])) == ()

    def test_the_next_token_distribution_sums_to_one(self, subject: Subject) -> None:
        backend = subject.moved()
        found = distributions(backend, subject.vocabulary, prompts(backend)[:2])
        assert np.exp(found).sum(axis=1) == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 1.0), (1.0, 0.5), (0.7, 0.9)])
    def test_a_token_is_the_inverse_cdf_of_the_tempered_distribution(
        self, subject: Subject, temperature: float, top_p: float
    ) -> None:
        backend = subject.moved()
        asked = prompts(backend)[:1]
        probabilities = np.exp(distributions(backend, subject.vocabulary, asked)[0] / temperature)
        probabilities /= probabilities.sum()
        if top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
            probabilities = np.where(np.isin(np.arange(subject.vocabulary), kept), probabilities, 0.0)
            probabilities /= probabilities.sum()
        cumulative = probabilities.cumsum()
        names_ = [[keys.digest("cdf", k) for k in range(40)]]
        drawn = draw(backend, asked, names_, Sampling(temperature=temperature, top_p=top_p, max_tokens=1))[0]
        checked = 0
        for key, completion in zip(names_[0], drawn, strict=True):
            uniform = float(keys.uniforms(key, 0)[0])
            if np.abs(cumulative - uniform).min() > 1e-5:  # else rounding may decide
                assert completion.ids == (int(np.searchsorted(cumulative, uniform, side="right")),)
                checked += 1
        assert checked > 30

    def test_temperature_zero_takes_the_likeliest_token(self, subject: Subject) -> None:
        backend = subject.moved()
        asked = prompts(backend)[:2]
        for ids, some in zip(asked, draw(backend, asked, names(2, 2), Sampling(0.0, 1.0, 5)), strict=True):
            assert some[0].ids == some[1].ids
            before = [(*ids, *some[0].ids[:step]) for step in range(len(some[0].ids))]
            assert some[0].ids == tuple(distributions(backend, subject.vocabulary, before).argmax(axis=1))

    def test_end_and_cap_are_told_apart(self, subject: Subject) -> None:
        backend = subject.fresh()
        drawn = draw(backend, prompts(backend), names(4, 8), Sampling(temperature=1.0, max_tokens=12))
        endings = {completion.ended for some in drawn for completion in some}
        assert endings == {"eos", "cap"}
        for completion in (one for some in drawn for one in some):
            stops = [token in backend.tokenizer.stop_ids for token in completion.ids]
            assert not any(stops[:-1]), "nothing follows an end"
            assert stops[-1] == (completion.ended == "eos")
            assert len(completion.ids) == 12 or completion.ended == "eos"

    def test_batching_and_padding_change_no_score(self, subject: Subject) -> None:
        backend = subject.moved()
        rows = pairs(backend, 8)
        together = sums(backend, rows)
        assert sums(subject.moved(score_tokens=1), rows) == pytest.approx(together, abs=subject.tolerance)
        alone = [sums(backend, [Row(prompt=row.prompt, responses=(one,))])[0] for row in rows for one in row.responses]
        assert alone == pytest.approx(together, abs=subject.tolerance)

    @needs_training
    @pytest.mark.parametrize("extrapolation", [0.0, 0.125, 0.5, 3.0])
    def test_a_round_starts_at_margin_zero(self, subject: Subject, extrapolation: float) -> None:
        backend = subject.moved()
        for _ in range(2):
            backend.snapshot()
            objective = Mixed(extrapolation)
            stats = backend.dpo_step(pairs(backend), objective, subject.rate)
            assert stats.loss == pytest.approx(math.log(2), abs=1e-5)
            assert stats.metrics["margin"] == pytest.approx(0.0, abs=1e-4)
            assert stats.reference == pytest.approx(stats.logp, abs=subject.tolerance)
            for batch in objective.seen:
                expected = batch.logp if extrapolation else np.zeros(0)
                assert batch.extrapolated == pytest.approx(expected, abs=subject.tolerance)

    @needs_training
    @pytest.mark.parametrize("extrapolation", [0.25, 2.0])
    def test_extrapolated_logprobs_are_those_of_the_mixed_logits(self, subject: Subject, extrapolation: float) -> None:
        backend = subject.moved()
        talk = conversation("a heron")
        answers = tuple(backend.tokenizer.encode_answer(talk, text) for text in ("no", "two"))
        row = Row(prompt=backend.tokenizer.encode_prompt(talk), responses=answers)
        objective = Mixed(extrapolation)
        expected = []
        for response in row.responses:
            before = [(*row.prompt, *response[:step]) for step in range(len(response))]
            policy = distributions(backend, subject.vocabulary, before)
            mixed = (1 + extrapolation) * policy - extrapolation * distributions(
                backend, subject.vocabulary, before, PREVIOUS
            )
            mixed -= np.log(np.exp(mixed).sum(axis=1, keepdims=True))
            expected.append(mixed[np.arange(len(response)), response].sum())
        backend.dpo_step([row], objective, subject.rate)
        assert objective.seen[0].extrapolated == pytest.approx(expected, abs=10 * subject.tolerance)
        assert abs(objective.seen[0].extrapolated - objective.seen[0].logp).max() > 1e-3

    @needs_training
    def test_a_step_raises_its_pairs_margin(self, subject: Subject) -> None:
        backend = subject.fresh()
        backend.snapshot()
        backend.start_training(OPTIMIZER)
        row = pairs(backend)[:1]
        margins = [backend.dpo_step(row, Dpo(0.1), subject.rate).metrics["margin"][0] for _ in range(4)]
        assert margins[0] == pytest.approx(0.0, abs=1e-5)
        assert margins[0] < margins[1] < margins[2] < margins[3]

    @needs_training
    def test_only_the_policys_adapter_moves(self, subject: Subject) -> None:
        backend = subject.moved()
        backend.snapshot()
        rows = pairs(backend)
        base, init, previous = subject.base_bytes(backend), sums(backend, rows, INIT), sums(backend, rows, PREVIOUS)
        before = sums(backend, rows, POLICY)
        backend.dpo_step(rows, Mixed(0.5), subject.rate)
        backend.dpo_step(rows, Mixed(0.5), subject.rate)
        assert subject.base_bytes(backend) == base
        assert (sums(backend, rows, INIT) == init).all()
        assert (sums(backend, rows, PREVIOUS) == previous).all()
        assert np.abs(sums(backend, rows, POLICY) - before).min() > 1e-4

    @needs_training
    def test_micro_batches_change_memory_only(self, subject: Subject) -> None:
        """Rows are sorted by length inside a step: what is reported is in row order all the same."""
        results = []
        for tokens in (1, 150, 10**6):
            backend = subject.moved(micro_tokens=tokens)
            objective = Mixed(0.5)
            stats = backend.dpo_step(pairs(backend, 8), objective, subject.rate)
            results.append((stats, sums(backend, pairs(backend, 8)), len(objective.seen)))
        whole, after, once = results[-1]
        assert [micro for _, _, micro in results][::2] == [8, once]
        assert once == 1
        for stats, found, _ in results[:-1]:
            assert stats.loss == pytest.approx(whole.loss, abs=1e-5)
            assert stats.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)
            assert stats.logp == pytest.approx(whole.logp, abs=subject.tolerance)
            assert stats.reference == pytest.approx(whole.reference, abs=20 * subject.tolerance)
            for name, values in whole.metrics.items():
                assert stats.metrics[name] == pytest.approx(values, abs=10 * subject.tolerance), name
            assert found == pytest.approx(after, abs=20 * subject.tolerance)

    @needs_training
    def test_known_reference_sums_are_used_as_they_are(self, subject: Subject) -> None:
        """Micro-batch by micro-batch, and whether or not the objective extrapolates."""
        found = []
        for given in ("none", "right", "wrong"):
            backend = subject.moved(micro_tokens=100)
            rows = pairs(backend, 5)
            right = sums(backend, rows, PREVIOUS)
            known = {"none": None, "right": Known(right), "wrong": Known(right + np.arange(len(right)))}[given]
            stats = backend.dpo_step(rows, Linear([0.1, -0.1] * 5), subject.rate, known)
            assert stats.reference == pytest.approx(known.sums if known else right, abs=20 * subject.tolerance)
            found.append((stats.loss, sums(backend, rows)))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
        assert found[0][1] == pytest.approx(found[1][1], abs=20 * subject.tolerance)
        assert known
        for extrapolation in (0.0, 0.5):
            stats = subject.moved(micro_tokens=100).dpo_step(rows, Mixed(extrapolation), subject.rate, known)
            assert (stats.reference == known.sums).all()

    @needs_training
    @pytest.mark.parametrize("extrapolation", [0.0, 0.5])
    def test_kept_states_give_the_step_that_a_reference_pass_gives(
        self, subject: Subject, extrapolation: float
    ) -> None:
        """What the sampler kept of its answers is what PREVIOUS would compute for them."""
        backend = subject.moved()
        backend.snapshot()
        asked = prompts(backend)
        sampling, states = Sampling(temperature=1.0, max_tokens=12), dict[tuple[int, int], Any]()
        drawn: list[Any] = [None] * len(asked)
        for index, some in backend.sample(
            asked, 2, sampling, names(4, 2), PREVIOUS, lambda i, k, h: states.__setitem__((i, k), h.copy())
        ):
            assert all((index, k) in states for k in range(2)), "states come before the answer"
            drawn[index] = some
        rows = [Row(prompt=ids, responses=tuple(c.ids for c in some)) for ids, some in zip(asked, drawn, strict=True)]
        kept = tuple(states[index, k] for index in range(len(rows)) for k in range(2))
        assert [len(h) for h in kept] == [len(ids) for row in rows for ids in row.responses]
        assert len({h.shape[1:] for h in kept}) == len({h.dtype for h in kept}) == 1
        known = Known(np.array([math.fsum(c.logprobs) for some in drawn for c in some]), kept)
        results = []
        for given in (None, known):
            backend = subject.moved(micro_tokens=60)
            backend.snapshot()
            backend.dpo_step(pairs(backend), Dpo(0.5), subject.rate)  # policy and reference differ
            stats = backend.dpo_step(rows, Mixed(extrapolation), subject.rate, given)
            results.append((stats, sums(backend, rows)))
        (plain, after), (cached, found) = results
        assert cached.loss == pytest.approx(plain.loss, abs=1e-5)
        assert cached.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3)
        for name, values in plain.metrics.items():
            assert cached.metrics[name] == pytest.approx(values, abs=20 * subject.tolerance), name
        assert found == pytest.approx(after, abs=20 * subject.tolerance)

    @needs_training
    def test_rows_may_have_any_number_of_responses(self, subject: Subject) -> None:
        """One prompt before several responses scores and pulls as each response behind a prompt of its own does."""
        backend = subject.moved()
        talk = conversation(QUESTIONS[0])
        prompt = backend.tokenizer.encode_prompt(talk)
        answers = [backend.tokenizer.encode_answer(talk, text) for text in ("one", "two plums", "three songs again")]
        rows = [Row(prompt=prompt, responses=tuple(answers[:count])) for count in (1, 3, 2)]
        alone = [Row(prompt=prompt, responses=(answer,)) for row in rows for answer in row.responses]
        expected = score(backend, alone, per_token=True)
        found = score(backend, rows, per_token=True)
        assert [len(several) for several in found] == [1, 3, 2]
        for one, (other,) in zip([one for several in found for one in several], expected, strict=True):
            assert one.per_token == pytest.approx(other.per_token, abs=subject.tolerance)
        weights, results = [1.0, -1.0, 0.5, 2.0, 0.0, 1.0], []
        for some in (rows, alone):
            backend = subject.moved()
            objective = Linear(weights, extrapolation=0.5)
            stats = backend.dpo_step(some, objective, subject.rate)
            seen = [np.concatenate([getattr(b, n) for b in objective.seen]) for n in ("logp", "extrapolated")]
            results.append((stats.grad_norm * len(some), *seen))
            assert stats.tokens == sum(len(one) for row in rows for one in row.responses)
            assert not stats.skipped
        (together, *values), (apart, *others) = results
        assert together == pytest.approx(apart, rel=1e-3)
        for left, right in zip(values, others, strict=True):
            assert left == pytest.approx(right, abs=10 * subject.tolerance)

    @needs_training
    def test_a_batch_says_which_rows_it_holds(self, subject: Subject) -> None:
        """Rows are sorted by length inside a step; their places are those among the rows given."""
        backend = subject.moved(micro_tokens=1)
        rows = pairs(backend, 6)
        objective = Linear([0.1, -0.1] * 6, sequential=False)
        backend.dpo_step(rows, objective, 0.0)
        places = [int(place) for batch in objective.seen for place in batch.index]
        assert sorted(places) == list(range(6))
        assert places != sorted(places)
        tokens = np.concatenate([batch.tokens for batch in objective.seen]).reshape(6, 2)
        assert [[len(ids) for ids in rows[place].responses] for place in places] == tokens.tolist()

    @needs_training
    def test_a_third_response_is_pulled_by_optimism(self, subject: Subject) -> None:
        """SELM's term: a pair's loss, and the third answer becomes less likely than it was."""
        backend = subject.fresh()
        backend.snapshot()
        backend.start_training(OPTIMIZER)
        rows = [
            Row(prompt=row.prompt, responses=(*row.responses, other.responses[0]))
            for row, other in zip(pairs(backend, 3), pairs(backend, 5)[2:], strict=True)
        ]
        before = sums(backend, rows)
        loss = Plain(pair_loss(build({"test": {"loss.optimism": 5.0, "loss.beta": 0.5}})[0]))
        stats = backend.dpo_step(rows, loss, subject.rate)
        assert stats.loss == pytest.approx(math.log(2), abs=1e-4)
        assert stats.logp == pytest.approx(before, abs=20 * subject.tolerance)
        assert (sums(backend, rows)[2::3] < before[2::3]).all()
        plain = Plain(pair_loss(build({"test": {"loss.beta": 0.5}})[0]))
        assert backend.dpo_step(rows, plain, 0.0).loss == pytest.approx(
            backend.dpo_step([Row(prompt=r.prompt, responses=r.responses[:2]) for r in rows], plain, 0.0).loss, abs=1e-4
        )

    @needs_training
    @pytest.mark.parametrize("rule", ["paper", "official"])
    def test_flags_do_not_depend_on_micro_batches(self, subject: Subject, rule: Any) -> None:
        """Whatever is sorted and forwarded together, thresholds and flags are those of the rows' own order."""
        results = []
        for tokens in (1, 10**6):
            backend = subject.moved(micro_tokens=tokens)
            loss = Refined(dpo(0.5), 0.3, 0.5, Window(rule, 0.4, 4, "zero"), 0.0, 3)
            found: list[Floats] = []
            for _ in range(3):
                stats = backend.dpo_step(pairs(backend, 6), loss, subject.rate)
                loss.end_step(stats)
                found += [stats.metrics["noisy"], stats.metrics["softened"]]
            results.append((np.concatenate(found), list(loss.window.margins)))
        (flags, margins), (others, those) = results
        assert (flags == others).all()
        assert 0 < flags.sum() < len(flags)
        assert margins == pytest.approx(those, abs=20 * subject.tolerance)

    @needs_training
    def test_padding_changes_no_gradient(self, subject: Subject) -> None:
        norms = []
        for company in (False, True):
            backend = subject.moved()
            rows = pairs(backend, 4)
            long_rows = rows if company else rows[:1]
            weights = [1.0, -0.5] + [0.0] * (2 * len(long_rows) - 2)
            stats = backend.dpo_step(long_rows, Linear(weights), 0.0)
            norms.append(stats.grad_norm * len(long_rows))
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)

    @needs_training
    def test_saving_and_restoring_is_the_identity(self, subject: Subject, tmp_path: Path) -> None:
        backend = subject.moved()
        rows = pairs(backend)
        backend.save(tmp_path / "one")
        backend.save(tmp_path / "previous", PREVIOUS)
        other = subject.another()
        other.restore(tmp_path / "one")
        other.bind(PREVIOUS, tmp_path / "previous")
        assert (sums(other, rows) == sums(backend, rows)).all()
        other.save(tmp_path / "two")
        files = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert "optimizer.safetensors" in files
        assert not (tmp_path / "previous" / "optimizer.safetensors").exists()
        backend.save(tmp_path / "alone", optimizer=False)
        assert not (tmp_path / "alone" / "optimizer.safetensors").exists()
        for name in files:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
        for _ in range(2):
            expected = backend.dpo_step(rows, Mixed(0.5), subject.rate)
            found = other.dpo_step(rows, Mixed(0.5), subject.rate)
            assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
        assert (sums(other, rows) == sums(backend, rows)).all()

    def test_a_fresh_adapter_is_the_base(self, subject: Subject) -> None:
        backend = subject.fresh()
        rows = pairs(backend)
        assert sums(backend, rows) == pytest.approx(sums(backend, rows, INIT), abs=1e-6)


class Bookkeeping:
    """What does not: run on one model of each backend."""

    def test_the_caller_may_do_other_things_between_two_samples(self, subject: Subject) -> None:
        backend = subject.moved(sample=2)
        asked, key, sampling = prompts(backend), names(4, 2), Sampling(temperature=1.0, max_tokens=20)
        expected = texts(draw(backend, asked, key, sampling))
        found = {}
        for index, some in backend.sample(asked, 2, sampling, key):
            found[index] = some
            score(backend, pairs(backend, 1), INIT)
        assert texts([found[index] for index in range(4)]) == expected

    def test_no_token_may_be_asked_for(self, subject: Subject) -> None:
        backend = subject.fresh()
        assert texts(draw(backend, prompts(backend), names(4, 1), Sampling(max_tokens=0))) == [[((), "cap")]] * 4

    @needs_training
    def test_what_is_not_asked_for_is_left_empty(self, subject: Subject) -> None:
        backend = subject.moved()
        objective = Linear([1.0, -1.0], reference=False)
        stats = backend.dpo_step(pairs(backend, 1), objective, subject.rate)
        assert objective.seen[0].reference.size == objective.seen[0].extrapolated.size == stats.reference.size == 0

    @needs_training
    def test_the_reported_loss_is_the_objectives(self, subject: Subject) -> None:
        backend = subject.moved(micro_tokens=100)
        rows = pairs(backend, 8)
        expected = sums(backend, rows), sums(backend, rows, PREVIOUS)
        stats = backend.dpo_step(rows, Dpo(0.3), subject.rate)
        assert stats.logp == pytest.approx(expected[0], abs=subject.tolerance)
        assert stats.reference == pytest.approx(expected[1], abs=subject.tolerance)
        again = Dpo(0.3)(
            Batch(
                stats.logp,
                stats.reference,
                np.zeros(0),
                np.zeros(16, np.int64),
                np.repeat(np.arange(8), 2),
                np.arange(8),
            )
        )
        assert stats.loss == pytest.approx(again.loss.mean(), abs=1e-12)
        assert stats.metrics["margin"] == pytest.approx(again.metrics["margin"], abs=1e-12)

    @needs_training
    def test_the_gradient_is_clipped_but_reported_whole(self, subject: Subject) -> None:
        norms, moved = [], []
        for limit in (1e-3, 1e9):
            backend = subject.fresh()
            backend.start_training(replace(OPTIMIZER, eps=10.0, max_grad_norm=limit, weight_decay=0.0))
            before = sums(backend, pairs(backend))
            norms.append(backend.dpo_step(pairs(backend), Dpo(0.5), 100 * subject.rate).grad_norm)
            moved.append(np.abs(sums(backend, pairs(backend)) - before).max())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 1e-3
        assert moved[0] < 0.5 * moved[1]

    @needs_training
    def test_any_number_of_roles_share_the_base(self, subject: Subject, tmp_path: Path) -> None:
        backend = subject.fresh()
        rows = pairs(backend)
        expected = {}
        backend.start_training(OPTIMIZER)
        for name in ("one", "two", "three", "four"):
            backend.dpo_step(rows, Dpo(0.5), subject.rate)
            backend.save(tmp_path / name)
            expected[name] = sums(backend, rows)
        base = sums(backend, rows, INIT)
        for name in expected:
            backend.bind(name, tmp_path / name)
        backend.bind(POLICY)
        for name in reversed(expected):
            assert (sums(backend, rows, name) == expected[name]).all()
            assert (sums(backend, rows, INIT) == base).all()
        backend.unbind("two")
        assert (sums(backend, rows, "three") == expected["three"]).all()
        with pytest.raises(BackendError, match="two"):
            sums(backend, rows, "two")
        for name in ("one", "three", "four"):
            backend.unbind(name)

    @needs_training
    def test_init_may_be_an_adapter_too(self, subject: Subject, tmp_path: Path) -> None:
        backend = subject.moved()
        rows = pairs(backend)
        backend.save(tmp_path)
        expected = sums(backend, rows)
        for role in (INIT, PREVIOUS, POLICY):
            backend.bind(role, tmp_path)
        for role in (INIT, PREVIOUS, POLICY):
            assert (sums(backend, rows, role) == expected).all()

    @needs_training
    def test_equal_seeds_give_equal_adapters(self, subject: Subject, tmp_path: Path) -> None:
        backend = subject.fresh()
        for folder in ("one", "two"):
            backend.bind(POLICY, None, LORA)
            backend.save(tmp_path / folder)
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

    @needs_training
    @pytest.mark.parametrize(("loss", "coefficient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
    def test_a_step_that_is_not_finite_is_skipped(self, subject: Subject, loss: float, coefficient: float) -> None:
        left, right = subject.moved(), subject.moved(micro_tokens=10**6)
        rows = pairs(left)
        before = sums(left, rows)
        stats = left.dpo_step(rows, Broken(loss, coefficient), subject.rate)
        assert stats.skipped
        assert (sums(left, rows) == before).all()
        expected = right.dpo_step(rows, Dpo(0.5), subject.rate)
        found = left.dpo_step(rows, Dpo(0.5), subject.rate)
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
        assert sums(left, rows) == pytest.approx(sums(right, rows), abs=1e-9), "the optimizer had not moved either"

    def test_every_refusal_is_one_sentence(self, subject: Subject, tmp_path: Path) -> None:
        backend = subject.fresh()
        rows, asked = pairs(backend), prompts(backend)
        objective: Objective = Dpo(0.1)
        too_long = (asked[0] * backend.context)[: backend.context]
        refused: list[tuple[type[SpaError], Callable[[], Any]]] = [
            (BackendError, lambda: backend.dpo_step(rows, objective, 0.1)),
            (BackendError, lambda: sums(backend, rows, "nobody")),
            (BackendError, lambda: draw(backend, asked, names(4, 1), Sampling(), "nobody")),
            (BackendError, lambda: list(backend.sample(asked, 2, Sampling(), names(4, 1)))),
            (BackendError, lambda: backend.unbind("nobody")),
            (BackendError, lambda: backend.save(tmp_path / "base", INIT)),
            (ModelError, lambda: backend.bind("x", tmp_path / "absent")),
            (ModelError if backend.can_train else BackendError, lambda: backend.restore(tmp_path)),
            (ModelError, lambda: draw(backend, [too_long], names(1, 1), Sampling())),
            (ModelError, lambda: sums(backend, [Row(prompt=too_long, responses=((1, 2),))])),
            (ModelError, lambda: sums(backend, [Row(prompt=(), responses=((1, 2),))])),
            (ModelError, lambda: sums(backend, [Row(prompt=asked[0], responses=((1, 10**6),))])),
        ]
        for kind, act in refused:
            with pytest.raises(kind) as caught:
                act()
            assert len(str(caught.value).splitlines()) == 1
        backend.bind(POLICY)
        with pytest.raises(BackendError, match="adapter" if backend.can_train else "only samples"):
            backend.start_training(OPTIMIZER)

    def test_a_backend_that_cannot_train_says_so(self, subject: Subject, tmp_path: Path) -> None:
        backend = subject.moved()
        if backend.can_train:
            pytest.skip("it can")
        rows, before = pairs(backend), sums(backend, pairs(backend))
        verbs: list[Callable[[], Any]] = [
            lambda: backend.start_training(OPTIMIZER),
            lambda: backend.dpo_step(rows, Dpo(0.1), 0.1),
            lambda: backend.activations(rows[0]),
            lambda: backend.save(tmp_path / "adapter"),
            lambda: backend.restore(tmp_path),
        ]
        for verb in verbs:
            with pytest.raises(BackendError, match="only samples and scores: train in ") as caught:
                verb()
            assert len(str(caught.value).splitlines()) == 1
        assert not list(tmp_path.iterdir())
        assert (sums(backend, rows) == before).all()

    @needs_training
    def test_batch_sizes_may_change_between_calls(self, subject: Subject) -> None:
        backend = subject.moved()
        rows, before = pairs(backend), backend.batching
        whole = draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 8)), sums(backend, rows)
        for tokens, checkpointed in ((1, 1), (10**6, 0)):
            backend.batching = Batching(1, 1, tokens, checkpointed)
            seen = Mixed(0.0)
            backend.dpo_step(rows, seen, 0.0)
            assert [int(batch.row[-1]) + 1 for batch in seen.seen] == ([1] * 4 if tokens == 1 else [4])
        apart = draw(backend, prompts(backend), names(4, 2), Sampling(1.0, 1.0, 8)), sums(backend, rows)
        backend.batching = before
        assert texts(apart[0]) == texts(whole[0])
        np.testing.assert_allclose(apart[1], whole[1], atol=subject.tolerance)

    def test_it_knows_its_memory(self, subject: Subject) -> None:
        backend = subject.fresh()
        found = [backend.free_memory(), backend.peak_memory()]
        assert found == [None, None] or all(size is not None and size > 0 for size in found)
        most = backend.peak_memory(reset=True)
        since = backend.peak_memory()
        assert (most is None) == (since is None)
        assert most is None or since is None or since <= most

    def test_it_describes_itself(self, subject: Subject) -> None:
        backend = subject.fresh()
        assert isinstance(backend, Backend)
        assert {"device", "dtype", "bits", "parameters", "adapter_parameters"} <= backend.description.keys()
        assert subject.moved().description["adapter_parameters"] > 0
        assert backend.fingerprint == subject.another().fingerprint
        assert backend.context > 0
        assert backend.can_train == (subject.adapter is None)

    def test_answers_end_once(self, subject: Subject) -> None:
        tokenizer = subject.fresh().tokenizer
        talk = conversation(QUESTIONS[0])
        ids = tokenizer.encode_answer(talk, "seven plums.")
        assert ids[-1] == tokenizer.end_of_turn
        assert ids.count(tokenizer.end_of_turn) == 1
        assert tokenizer.end_of_turn in tokenizer.stop_ids
        assert tokenizer.decode(ids).strip() == "seven plums."
