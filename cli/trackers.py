"""`--report-to`: a run's numbers for TensorBoard, Weights & Biases and Trackio, each through its own library.

Off unless asked for, and nothing here is imported before. What leaves the run are finite numbers and the settings, with
anything that looks like a secret masked; no text, no ids, no code, no output of the program. Nothing uses the network
unless the library's own environment variables ask for it: WANDB_MODE=online, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL.

The x axis is the number of optimizer steps in the run so far. A stage that was finished in an earlier attempt reports
its summary again, and with it its steps, so that a run that goes on also goes on in its chart.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import io
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from numbers import Real
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from spa_lite.errors import BackendError, BackendMissing, RecipeError
from spa_lite.events import Event, Report

PROJECT = "spa-lite"


class Tracker(Protocol):
    """Where numbers go. Made from the run folder and the (masked) settings; `hint` says how to look at them."""

    hint: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers by name; `step` never falls within one attempt at a run."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in `<folder>/tensorboard`, by tensorboard's own writer: needs neither PyTorch nor TensorFlow."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writer.EventFileWriter(str(folder / "tensorboard"), flush_secs=10)
        self.hint = f"to look at it: tensorboard --logdir {quote(str(folder / 'tensorboard'))}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        numbers = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=numbers)))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project spa-lite, kept in `<folder>/wandb` and sent nowhere unless WANDB_MODE says online."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own telemetry; read when its service starts
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")  # the setting below comes too late for one call of git
        wandb = importlib.import_module("wandb")
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_save_requirements=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
        )
        mode = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=identity(folder),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            mode=mode,
            settings=quiet,
        )
        later = f"wandb sync {quote(str(folder / 'wandb'))}/offline-run-*"
        offline = f"nothing is sent (WANDB_MODE=online would send); to send it later: {later}"
        self.hint = offline if mode == "offline" else str(self._run.url or f"mode {mode}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of the project spa-lite in a database in `<folder>/trackio` (or TRACKIO_DIR), on this machine."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._trackio = _import_trackio(folder)
        away = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        with redirect_stdout(io.StringIO()), _hub_offline(not away):
            self._run = self._trackio.init(
                project=PROJECT,
                name=identity(folder),
                resume="allow",
                config=dict(settings),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        show = f"TRACKIO_DIR={quote(str(self._trackio.TRACKIO_DIR))} trackio show --project {PROJECT}"
        self.hint = f"sent to {masked(away)}" if away else f"to look at it: {show}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):  # stdout is for the run's result
            self._trackio.finish()


def _import_trackio(folder: Path) -> Any:
    """Trackio fixes its folder when it is imported."""
    unset = "TRACKIO_DIR" not in os.environ
    os.environ.setdefault("TRACKIO_DIR", str(folder.absolute() / "trackio"))
    try:
        return importlib.import_module("trackio")
    finally:
        if unset:
            del os.environ["TRACKIO_DIR"]


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Even a local Trackio run asks the hub for the name of the user whose token it finds; not here."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
"""The names are those of the libraries, and of the extras that bring them."""


def check(names: Sequence[str]) -> None:
    """Raise RecipeError for a name that is no tracker, BackendMissing for one that is not installed. Imports none."""
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.0)[0]
            raise RecipeError(
                f"--report-to: there is no tracker {name!r} (nearest: {near!r}; known: {', '.join(TRACKERS)})"
            )
        if importlib.util.find_spec(name) is None:
            raise BackendMissing(f"--report-to {name} needs {name}, not installed here: pip install 'spa-lite[{name}]'")


@contextmanager
def tracked(report: Report, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[Report]:
    """A Report that hands every event on to `report` and logs the numbers in it to each named tracker.

    With no names it is `report` itself. A tracker that fails later is dropped with a note. Raises what `check` raises,
    and BackendError if a tracker does not start.
    """
    check(names)
    if not names:
        yield report
        return
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[str, Tracker] = {}
    try:
        for name in dict.fromkeys(names):
            running[name] = _start(name, folder, masked(settings))
            report(Event(name, note=running[name].hint))
        yield _logging(report, running)
    finally:
        for name, tracker in running.items():
            try:
                tracker.close()
            except Exception as error:
                report(Event(name, note=f"its last numbers may be missing ({_reason(error)})"))


def _start(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    try:
        return TRACKERS[name](folder, settings)
    except Exception as error:
        raise BackendError(
            f"--report-to {name} did not start ({_reason(error)}); mend that, or leave {name} out"
        ) from error


def _logging(report: Report, running: dict[str, Tracker]) -> Report:
    """`running` loses the trackers that fail."""
    before = at = 0  # optimizer steps of the training stages that are finished, and now

    def log(event: Event) -> None:
        nonlocal before, at
        report(event)
        if event.unit == "steps":
            at = before + event.done
        elif event.unit == "stage":
            before = at = before + int(event.metrics.get("steps", at - before))
        values = numbers(event)
        for name in list(running) if values else ():
            try:
                running[name].log(values, at)
            except Exception as error:
                with suppress(Exception):
                    running.pop(name).close()
                report(Event(name, note=f"dropped, because it failed ({_reason(error)}); the run goes on without it"))

    return log


def numbers(event: Event) -> dict[str, float]:
    """The finite numbers of an event by chart name, switches as 0 and 1.

    A step of stage `round 1 train` gives `round 1 train/loss`. The summary of stage `rounds/1 judge` gives
    `round 1/judge/mean_tokens`; that of `rounds/1 measure` gives `round 1/win_rate`, `round 1/win_rate/low` and so on,
    and the same once more as `over the run/win_rate`, which is a curve over the rounds.
    """
    if event.unit == "steps":
        return flat({name: value for name, value in event.metrics.items() if name != "step"}, event.stage)
    folder, _, kind = event.stage.replace("rounds/", "round ").rpartition(" ")
    if kind == "measure":
        return flat(event.metrics, folder) | flat(event.metrics, "over the run")
    return flat(event.metrics, f"{folder}/{kind}" if folder else kind)


def flat(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Nested numbers under names with slashes. An interval's `value` goes by the name of the interval."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        path = prefix if name == "value" else f"{prefix}/{name}"
        if isinstance(value, Mapping):
            found |= flat(value, path)
        elif isinstance(value, Real) and math.isfinite(value):
            found[path] = float(value)
    return found


def identity(folder: Path) -> str:
    """The run's id for trackers: the folder's name and eight hex digits that lie in the folder.

    So it stays when a run goes on, and is another after --fresh, where the old chart would refuse the early steps.
    """
    path = folder / "tracker-id"
    if not path.exists():
        path.write_text(
            f"{re.sub(r'[^A-Za-z0-9_-]+', '-', folder.name)[:50]}-{secrets.token_hex(4)}\n", encoding="utf-8"
        )
    return path.read_text(encoding="utf-8").strip()


SECRETS = [
    (re.compile(r"://[^/?#\s]+@"), "://***@"),  # user:password@ in a URL
    (re.compile(r"([?&][^=&\s]*(?:token|key|secret|sig|password|credential)[^=&\s]*=)[^&#\s]+", re.I), r"\1***"),
    (re.compile(r"\bbearer\s+\S+", re.I), "Bearer ***"),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:hf_|api_org_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|wandb_v\d+_|AKIA|AIza)[\w-]{8,}"
        ),
        "***",
    ),
]
"""What looks like a secret in a text, and what stands there instead."""

SECRET_NAME = re.compile(r"(?:token|password|secret|api_?key|credentials?)$", re.I)
"""Names whose text is a secret whatever it looks like."""


def masked(value: Any, name: str = "") -> Any:
    """Settings as plain JSON values, with every secret in a text replaced by ***."""
    if isinstance(value, Mapping):
        return {str(key): masked(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner, name) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    if SECRET_NAME.search(name):
        return "***"
    text = str(value)
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


def _reason(error: Exception) -> str:
    """An error of somebody else's library in one short line, without secrets."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return masked(f"{type(error).__name__}: {first}" if first else type(error).__name__)  # type: ignore[no-any-return]
