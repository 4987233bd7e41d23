"""Registers every command. One file per command; each imports what it needs when it runs."""

from spa_lite.cli import ablate, by_hand, doctor, export, recipes, run, runs

__all__ = ["ablate", "by_hand", "doctor", "export", "recipes", "run", "runs"]
