"""Who is compared: how anybody goes, and this program's backend. The others are in peers.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import Done, Options, Ready, Shown
from workloads import BETA

from spa_lite.records import Ids, Row

LAMBDA, ALPHA = 0.5, 0.1
WINDOW = tuple(np.linspace(-1.0, 1.0, 9))
"""Margins seen before: the threshold among them is 0, so that some pairs are taken for noise and some are not."""
NO_CLIPPING = 1e9
Text = tuple[Ids, Ids]
"""Prompt and answer."""


def texts_of(rows: Sequence[Row], which: int) -> list[Text]:
    """The chosen (0) or the rejected (1) answers with their prompts."""
    return [(row.prompt, row.responses[which]) for row in rows]


def every_text(rows: Sequence[Row]) -> list[Text]:
    """Both answers of each row with their prompts, row by row."""
    return [(row.prompt, response) for row in rows for response in row.responses]


# --- how they go -------------------------------------------------------------------------------------------------


def stepping(
    rows: Sequence[Row], load: Callable[[], Any], before: Callable[[Any], None] = lambda held: None
) -> Callable[[], Ready]:
    """One optimizer step a go, of anything that has `step` and `shown`; `before` is called first in each."""

    def make() -> Ready:
        held = load()

        def go() -> Done:
            before(held)
            held.step(rows)
            return Done(len(rows))

        return Ready(go, held.shown)

    return make


def valued(units: float, work: Callable[[], Any], values: Callable[[Any], Sequence[float]] = list) -> Ready:
    """Does the work; what came out of it last is shown as values."""
    last: list[Any] = []

    def go() -> Done:
        last[:] = [work()]
        return Done(units)

    return Ready(go, lambda: Shown(values=values(last[0])))


# --- this program ------------------------------------------------------------------------------------------------


def ours(
    options: Options,
    base: Path,
    policy: Path | None,
    previous: Path | None = None,
    training: bool = True,
    framework: str = "torch",
    **settings: Any,
) -> Any:
    """The backend with its roles, ready to sample, score and train."""
    from spa_lite import backends
    from spa_lite.backend import INIT, POLICY, PREVIOUS, ModelSettings

    wanted = ModelSettings(str(base), device=options.device, dtype=options.dtype, **settings)
    backend: Any = backends.load(framework, wanted)
    backend.bind(INIT, None)
    backend.bind(PREVIOUS, previous)
    backend.bind(POLICY, policy)
    if training:
        start_training(backend)
    return backend


def start_training(backend: Any) -> None:
    """Anew, so that the optimizer has seen no other gradient."""
    from spa_lite.backend import Optimizer

    backend.start_training(Optimizer(max_grad_norm=NO_CLIPPING))


def plain() -> Any:
    """Plain DPO."""
    from spa_lite.objective import Dpo

    return Dpo(BETA)


def refined() -> Any:
    """The refined loss with extrapolation, past its warm-up."""
    from spa_lite.losses import dpo
    from spa_lite.objective import Refined, Window

    window = Window("paper", K=0.5, size=len(WINDOW))
    window.push(WINDOW)
    return Refined(dpo(BETA), ALPHA, LAMBDA, window, warmup=0.0, total_steps=1)


def gradients_of(backend: Any) -> dict[str, Any]:
    """The gradient of a step that was made some times over on unchanged weights: Adam's first moment, without bias."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as place:
        backend.save(Path(place))
        stored = load_file(Path(place) / "optimizer.safetensors")
    kept = {name.removesuffix(".exp_avg"): value for name, value in stored.items() if name.endswith(".exp_avg")}
    return {name: value / (1 - 0.9 ** float(stored[f"{name}.step"].item())) for name, value in kept.items()}


def recorded_sums(backend: Any, rows: Sequence[Row]) -> Any:
    """What the sampler and the judge leave of the reference."""
    from spa_lite.backend import PREVIOUS, Known

    found = dict(backend.logprob(rows, PREVIOUS))
    return Known(np.array([score.logp for index in range(len(rows)) for score in found[index]]))


class Step:
    """This program's DPO step, called as the peers' are. The learning rate is 0, so that all goes are the same.

    `known` is what is recorded of the reference; `margins`: whether those that decide over noise must agree.
    """

    def __init__(self, backend: Any, objective: Callable[[], Any], known: Any = None, margins: bool = True) -> None:
        self.backend, self.objective, self.known, self.margins = backend, objective, known, margins
        self.stats: Any = None

    def step(self, rows: Sequence[Row]) -> None:
        """One optimizer step on the mean loss over rows."""
        self.stats = self.backend.dpo_step(rows, self.objective(), 0.0, self.known)

    def shown(self) -> Shown:
        """The last step's."""
        margins = self.stats.metrics.get("extrapolated_margin") if self.margins else None
        return Shown(float(self.stats.loss), gradients_of(self.backend), margins)
