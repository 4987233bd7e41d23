"""Answers of a round drawn by another file of the same model: a GGUF, with llama.cpp.

Its weights may be quantised, and its arithmetic is not the trainer's. So the log-probabilities that it records are its
own: the judge scores every answer again under the policy in training, and nothing of the sampler's is a reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_lite.errors import ModelError, RecipeError
from spa_lite.recipe import Recipe

GGUF = "gguf:"
"""How `sampling.by` names a file."""
BACKEND = "llamacpp"
"""Whose samples they are: it trains nothing, so in a run it does nothing else."""


def file_of(recipe: Recipe) -> Path | None:
    """The GGUF file that draws a round's answers; None if the policy's own backend does.

    Raises RecipeError for another word, and ModelError if there is no such file.
    """
    word = recipe.sampling.by
    if word is None:
        return None
    if not word.startswith(GGUF):
        raise RecipeError(f"--sampler {word} is not understood; write {GGUF}FILE, with a GGUF file of the same model")
    path = Path(word.removeprefix(GGUF)).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no file {path}; --sampler {GGUF}FILE names a GGUF file of the same model")
    return path


def check(recipe: Recipe) -> None:
    """Raise RecipeError where a run would take the file's log-probabilities, or its states, for the policy's."""
    if file_of(recipe) is None:
        return
    if recipe.judge.rescore != "always":
        raise RecipeError(
            "--sampler needs --rescore always: the log-probs that a GGUF records are its own, not those of the policy"
        )
    if recipe.train.cache_reference:
        raise RecipeError("--cache-reference keeps states of the policy's own sampler: leave it or --sampler out")


def device(recipe: Recipe) -> str:
    """Where it works: on the CPU if the run does so by its user's word, else wherever llama.cpp can."""
    return "cpu" if recipe.inputs.device == "cpu" else "auto"


def made_by(recipe: Recipe) -> dict[str, Any]:
    """What such samples are computed on, as a stage records it, before the file is loaded."""
    return {"backend": BACKEND, "device": device(recipe), "dtype": "the file's own", "bits": None}
