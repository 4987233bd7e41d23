"""Registers every command. One file per command; each imports what it needs when it runs."""

from spa_lite.cli import by_hand, doctor, export, recipes, run

__all__ = ["by_hand", "doctor", "export", "recipes", "run"]
