"""Axis `prompts`, for the sources that are written: what the model is asked for, and what is kept of what it writes.

material   personas, keywords and the request's text, read once from files or from what is shipped
requests   the conversations that are put to the writer, drawn by (seed, round)
keywords   words that a prompt is to be about
generator  what teaches a writer to use them
cleaning   from an answer to the one prompt in it
rouge      how alike two texts are, word by word
hygiene    what is kept, and what is counted

kept = written(answers, ...)   for answers to   asked(recipe, material, labelled, round_, ...)
"""

from spa_lite.prompts.generator import generator_examples
from spa_lite.prompts.hygiene import Counts, Written, repetition, texts_of, written
from spa_lite.prompts.material import Material, read
from spa_lite.prompts.requests import asked

__all__ = ["Counts", "Material", "Written", "asked", "generator_examples", "read", "repetition", "texts_of", "written"]
