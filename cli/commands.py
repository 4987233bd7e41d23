"""Registers every command. One file per command; each imports what it needs when it runs."""

from spa_lite.cli import (
    ablate,
    by_hand,
    chat,
    compare,
    data,
    doctor,
    eval,
    explain,
    export,
    judge,
    lint,
    recipes,
    report,
    run,
    runs,
    serve,
)

__all__ = [
    "ablate",
    "by_hand",
    "chat",
    "compare",
    "data",
    "doctor",
    "eval",
    "explain",
    "export",
    "judge",
    "lint",
    "recipes",
    "report",
    "run",
    "runs",
    "serve",
]
