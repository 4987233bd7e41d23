"""The exception tree. Every message names the thing and the mend; the command line prints the message alone.

SpaError
├── RecipeError      a setting is unknown, of the wrong type, or contradicts another
├── DataError        a record cannot be used: which file, which line, what to change
├── BackendError     a backend cannot do what was asked
│   ├── BackendMissing   its library is not installed: which extra brings it
│   └── OutOfMemory      a batch does not fit into memory: which setting makes it smaller
├── ModelError       a model, tokenizer, template or adapter cannot be used
├── RunError         a run folder cannot be used
│   └── StaleRun         a changed setting touches a stage that is already finished
├── ServeError       the endpoint cannot be opened
└── TrainingDiverged the loss or its gradient stayed non-finite
"""

from __future__ import annotations


class SpaError(Exception):
    """Anything spa-lite explains in one sentence."""


class RecipeError(SpaError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(SpaError):
    """A record or a data source cannot be used."""


class BackendError(SpaError):
    """A backend cannot do what was asked of it."""


class BackendMissing(BackendError):
    """The library behind a backend is not installed."""


class OutOfMemory(BackendError):
    """A batch does not fit into memory. Nothing has changed: a smaller one may be tried after the `except` block, which
    holds what is left of this one."""


class ModelError(SpaError):
    """A model, tokenizer, chat template or adapter cannot be used."""


class RunError(SpaError):
    """A run folder cannot be used."""


class StaleRun(RunError):
    """A changed setting touches a stage that is already finished."""


class TrainingDiverged(SpaError):
    """The loss or its gradient was not finite several steps in a row."""


class JudgeError(SpaError):
    """A judge cannot judge: its server does not answer, or its replies cannot be read."""


class ServeError(SpaError):
    """The endpoint cannot be opened: its port, its libraries or its key."""
