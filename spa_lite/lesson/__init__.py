"""A small world whose truth is known, and the tiny chat model built for it: the tool's default, network-free lesson.

`world` holds the tasks, the writers and the gold rule; `skills` what else the model was taught; `build` makes the model
anew. The built model lies in `MODEL_DIR`.
"""

from __future__ import annotations

from pathlib import Path

from .world import FAMILIES, WEIGHTS, Task, gold, gold_score, pair, tasks, write

MODEL_DIR = Path(__file__).parent / "model"
SEED_ADAPTER = Path(__file__).parent / "seed_adapter"
"""The adapter that the seed stage of the lesson gives (100 pairs, seed 0): a policy to start from."""


def adapter_folder(name: str | None) -> Path | None:
    """The folder of an adapter as settings name it: a path, or `lesson` for the one that comes with the lesson."""
    return SEED_ADAPTER if name == "lesson" else Path(name) if name else None


__all__ = [
    "FAMILIES",
    "MODEL_DIR",
    "SEED_ADAPTER",
    "WEIGHTS",
    "Task",
    "adapter_folder",
    "gold",
    "gold_score",
    "pair",
    "tasks",
    "write",
]
