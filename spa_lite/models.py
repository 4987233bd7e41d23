"""The one model in memory, and, for the no-seed study, a whole other one that takes its place while it scores."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spa_lite.backend import INIT, Backend
from spa_lite.errors import ModelError
from spa_lite.events import Tick, unheard
from spa_lite.judge import Scorer, scorer
from spa_lite.records import Ids, Message, Row


class Models:
    """Loads the policy's base on first use, and a reference model only alone: never two at a time."""

    def __init__(
        self,
        load: Callable[[], Backend],
        init_adapter: Path | None = None,
        policy_adapter: Path | None = None,
        load_reference: Callable[[], Backend] | None = None,
        load_classifier: Callable[[str, str, bool], Any] | None = None,
        load_sampler: Callable[[], Backend] | None = None,
        judge_adapter: Path | None = None,
    ) -> None:
        self._load, self._load_reference, self._load_sampler = load, load_reference, load_sampler
        self._backend: Backend | None = None
        self._fingerprint, self._reference_fingerprint = "", ""
        self._made_by: dict[str, Any] = {}
        self.init_adapter, self.policy_adapter, self.load_classifier = init_adapter, policy_adapter, load_classifier
        self.judge_adapter = judge_adapter

    @property
    def backend(self) -> Backend:
        """The model that is sampled, scored and trained. Do not keep it: it may be released and loaded anew."""
        if self._backend is None:
            self._backend = self._load()
            used = self._backend.description
            self._made_by = {"backend": self._backend.name} | {k: used.get(k) for k in ("device", "dtype", "bits")}
        return self._backend

    @property
    def loaded(self) -> Backend | None:
        """The same, if it is in memory now."""
        return self._backend

    @property
    def made_by(self) -> dict[str, Any]:
        """What results are computed on: backend, device, dtype and bits. Recorded with every stage."""
        if not self._made_by:
            _ = self.backend
        return self._made_by

    @property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer and template."""
        if not self._fingerprint:
            self._fingerprint = self.backend.fingerprint
        return self._fingerprint

    @property
    def has_other_reference(self) -> bool:
        """Whether pi_init is a whole other model."""
        return self._load_reference is not None

    @property
    def reference_fingerprint(self) -> str:
        """Digest of the other model."""
        if not self._reference_fingerprint:
            with self._reference_alone() as other:
                self._reference_fingerprint = other.fingerprint
        return self._reference_fingerprint

    def scorer(self, role: str, tick: Tick = unheard) -> Scorer:
        """Score rows under a role of whatever model is in memory then."""
        return lambda rows: scorer(self.backend, role, tick)(rows)

    @contextmanager
    def other_scorer(self, tick: Tick = unheard) -> Iterator[Scorer]:
        """Score rows under the other model, alone in memory inside the block. Raises ModelError if its vocabulary
        differs."""
        ours = vocabulary(self.backend)
        with self._reference_alone() as other:
            check_vocabulary(ours, other, "--init-model")
            other.bind(INIT, None)
            yield scorer(other, INIT, tick)

    def other_alone(self, rows: Sequence[Row]) -> list[tuple[float, ...]]:
        """The same in one go."""
        with self.other_scorer() as score:
            return score(rows)

    @contextmanager
    def sampler(self) -> Iterator[Backend]:
        """What draws answers: the model itself, or another file of it, alone in memory inside the block."""
        if self._load_sampler is None:
            yield self.backend
            return
        ours = vocabulary(self.backend)
        with self._alone(self._load_sampler) as other:
            check_vocabulary(ours, other, "--sampler")
            yield other

    @contextmanager
    def _reference_alone(self) -> Iterator[Backend]:
        assert self._load_reference is not None
        with self._alone(self._load_reference) as other:
            self._reference_fingerprint = other.fingerprint
            yield other

    @contextmanager
    def _alone(self, load: Callable[[], Backend]) -> Iterator[Backend]:
        self._backend = None
        gc.collect()
        other = load()
        yield other
        del other
        gc.collect()


def check_vocabulary(ours: tuple[Ids, frozenset[int]], other: Backend, flag: str) -> None:
    """Raise ModelError unless the other model, which that flag names, reads text as ours does."""
    if vocabulary(other) != ours:
        raise ModelError(f"{flag} reads text differently from --model; both need the same tokenizer")


def vocabulary(backend: Backend) -> tuple[Ids, frozenset[int]]:
    """What two models must agree on before one may score the other's ids."""
    probe = "The quick brown fox, 1234567890; naïve 東京 🙂"
    asked = [Message(role="user", content="?")]
    return backend.tokenizer.encode_answer(asked, probe), backend.tokenizer.stop_ids
