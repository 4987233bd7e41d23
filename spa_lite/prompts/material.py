"""What requests are made of: personas, keywords and the request's text. Read once, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from spa_lite import keys, sources
from spa_lite.data import IsFree, Parsed, Reading, ReadReport
from spa_lite.errors import DataError, RecipeError
from spa_lite.recipe import Recipe
from spa_lite.records import Record
from spa_lite.sources import BadRecord, Fields

PLACES: dict[str, str | None] = {"persona": "persona", "fewshot": "examples", "keywords": "keywords", "bare": None}
"""The sources that the model writes for, and the place that each one's text must have."""
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


class Material(Record, frozen=True, kw_only=True):
    """What the requests of a source are made of. `template` is None where the lesson's own wordings are asked."""

    source: str
    personas: tuple[str, ...] = ()
    keywords: tuple[tuple[str, ...], ...] = ()
    """Groups of a file; none: words of the labelled prompts."""
    template: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> bytes:
        """16 bytes that change with what is asked."""
        groups = tuple(part for group in self.keywords for part in (len(group), *group))
        return keys.digest("requests", self.source, self.template, len(self.personas), *self.personas, *groups)


def read(recipe: Recipe, lesson: bool, source: str | None = None) -> Material:
    """What the recipe's source needs, or another: `bare` for the control, whose text is never the recipe's own file.

    In the lesson the personas are the names of its people. Raises DataError for a file that cannot be used,
    RecipeError for a request's text that cannot, or for a source that is not written by the model.
    """
    p, name = recipe.prompts, source or recipe.prompts.source
    if name not in PLACES:
        raise RecipeError(f"prompts={name} is not written by the model; choose {', '.join(PLACES)}")
    personas, notes = _personas(p.personas, lesson, recipe.inputs.skip_bad) if name == "persona" else ((), ())
    groups = _groups(p.keywords) if name == "keywords" and p.keywords else ()
    own = p.template if name == p.source else None
    template = None if lesson and own is None else template_of(name, own)
    return Material(source=name, personas=personas, keywords=groups, template=template, notes=notes)


# --- the request's text ------------------------------------------------------------------------------------------


def shipped(name: str) -> str:
    """The text of a shipped file of requests."""
    return resources.files("spa_lite.prompts").joinpath(f"texts/{name}.txt").read_text(encoding="utf-8").strip()


def template_of(source: str, path: str | None = None) -> str:
    """The text that asks for a prompt: a file, or the shipped one. Raises RecipeError for one that cannot be used."""
    if path is None:
        return shipped(source)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read ({_reason(error)}): check --prompt-template") from None
    return checked(text, source)


def checked(template: str, source: str) -> str:
    """The text, if it has the place that the source needs and no other. Raises RecipeError."""
    found, place = set(PLACE.findall(template)), PLACES[source]
    if not template.strip():
        raise RecipeError("the request for a prompt is empty: write one into the file of --prompt-template")
    if place and place not in found:
        raise RecipeError(f"the request for a prompt lacks {{{place}}}: add it to the file of --prompt-template")
    if unknown := sorted(found - {place}):
        may = f"it may use {{{place}}}" if place else f"prompts={source} has no places"
        raise RecipeError(
            f"the request for a prompt has a place {{{unknown[0]}}} that nothing fills: {may}; "
            "change the file of --prompt-template"
        )
    return template.strip()


# --- lists -------------------------------------------------------------------------------------------------------


def _personas(source: str | None, lesson: bool, skip_bad: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(personas, notes): each persona once."""
    if source is None and lesson:
        from spa_lite.lesson.world import NAMES

        return tuple(NAMES), ()
    if source is None:
        text = resources.files("spa_lite.prompts").joinpath("personas.txt").read_text(encoding="utf-8")
        return tuple(_without_comments(text.splitlines())), ()
    if source.startswith(sources.HUB) or source.lower().endswith(tuple(sources.KNOWN.split(", "))):
        reading = Reading(source, _persona, skip_bad)
        return tuple(reading), tuple(reading.report.lines())
    lines = _lines(source, "--personas")
    different = tuple(dict.fromkeys(lines))
    return different, tuple(ReadReport(source, len(different), len(lines) - len(different)).lines())


def _persona(fields: Fields, is_free: IsFree, number: int) -> Parsed[str]:
    """A record with a `persona`, as Persona-Hub has it. Raises BadRecord."""
    found = fields.get("persona")
    if not isinstance(found, str) or not found.strip():
        raise BadRecord("missing", "there is no `persona`, or no text in it; add one, or drop the record")
    text = " ".join(found.split())
    return Parsed(text, keys.digest("persona", text), None)


def _groups(path: str) -> tuple[tuple[str, ...], ...]:
    """Keywords, a group a line, in any order."""
    split = (tuple(word.strip() for word in line.split(",") if word.strip()) for line in _lines(path, "--keywords"))
    found = tuple(group for group in split if group)
    if not found:
        raise DataError(f"{path}: there is no keyword in it; write some a line, with commas between them")
    return found


def _lines(path: str, flag: str) -> list[str]:
    """Lines of a text file that say something, with single blanks. Raises DataError if there are none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); check {flag}") from None
    found = _without_comments(text.split("\n"))
    if not found:
        raise DataError(f"{path}: the file of {flag} is empty; write something on each line")
    return found


def _without_comments(lines: Iterable[str]) -> list[str]:
    """Blank lines and those that begin with # say nothing."""
    tidy = (" ".join(line.split()) for line in lines)
    return [line for line in tidy if line and not line.startswith("#")]


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else "it is no UTF-8 text"
