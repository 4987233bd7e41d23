"""A small world whose truth is known, and the tiny chat model built for it: the tool's default, network-free lesson.

`world` holds the tasks, the writers and the gold rule; `skills` what else the model was taught; `build` makes the model
anew. The built model lies in `MODEL_DIR`.
"""

from __future__ import annotations

from pathlib import Path

from .world import FAMILIES, WEIGHTS, Task, gold, gold_score, pair, tasks, write

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["FAMILIES", "MODEL_DIR", "WEIGHTS", "Task", "gold", "gold_score", "pair", "tasks", "write"]
