"""Command-line options made from the recipe's settings, so that no setting is written down twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from spa_lite.recipe import SETTINGS, Recipe, Setting, build, layers_of, parse_set, read_text, read_yaml, shipped

ALIASES = {
    "--model": ["-m", "--model-name-or-path"],
    "--learning-rate": ["--lr"],
    "--max-tokens": ["--max-new-tokens"],
    "--temp": ["--temperature"],
    "--max-seq-length": ["--max-length"],
    "--judge-reference": ["--reference"],
}
"""Other tools' words for the same thing."""

Config = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings; the command line wins.")]
Named = Annotated[
    str | None, typer.Option(help=f"The method: {', '.join(shipped('recipe'))}, or a YAML file (default: spa).")
]
Scale = Annotated[str | None, typer.Option(help="Scale: lesson, laptop, paper, or a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Override any setting.")]
Round = Annotated[int, typer.Option("--round", min=1, help="Which round this is (1, 2, ...).")]
Output = Annotated[str, typer.Option("-o", "--output", help="File to write; - is stdout.")]
"""Options of the commands that work by hand."""

PANELS = {
    "inputs": "Model and data",
    "model": "Model and data",
    "lengths": "Lengths",
    "lora": "Adapter",
    "seed_dpo": "Seed stage",
    "sft": "Supervised fine-tuning",
    "prompts": "Prompts and candidates",
    "candidates": "Prompts and candidates",
    "sampling": "Sampling",
    "judge": "Judging",
    "pairing": "Judging",
    "loss": "Training",
    "noise": "Training",
    "refine": "Self-refinement",
    "train": "Training",
    "carry": "Training",
    "batching": "Memory and speed",
    "measure": "Measuring",
    "stop": "Measuring",
    "lesson": "Lesson",
}


def command(
    app: typer.Typer, name: str, groups: Iterable[str] | None = None, short: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that takes `given` (path -> command-line word) as a command with the settings as options.

    `groups` are the setting groups and single settings it shows; None shows all. Every setting can also be given with
    --set. `short` are flags that settings have here beside their own, by path: --epochs, where it is clear of what.
    """
    shown = [s for s in SETTINGS.values() if s.flag and (groups is None or {_group(s), s.path} & set(groups))]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "given"]
        made = [_parameter(s.path, short.get(s.path)) for s in shown]

        def call(**values: Any) -> Any:
            given = {s.path: values.pop(_name(s)) for s in shown}
            return function(given={path: value for path, value in given.items() if value is not None}, **values)

        call.__doc__ = function.__doc__
        call.__signature__ = inspect.Signature(own + made)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in own + made}
        app.command(name)(call)
        return function

    return register


def _group(s: Setting) -> str:
    return s.path.rpartition(".")[0]


def _name(s: Setting) -> str:
    return s.path.replace(".", "_")


@cache
def _parameter(path: str, short: str | None = None) -> inspect.Parameter:
    """A Typer option: bare words are read by the recipe itself, so that every wrong value gets the same sentence."""
    s = SETTINGS[path]
    assert s.flag
    is_switch = s.type is bool
    names = [f"{s.flag}/--no-{s.flag.removeprefix('--')}" if is_switch and not s.flag.startswith("--no-") else s.flag]
    if short:
        names = [short, *ALIASES.get(short, []), *names]
    default = "" if s.default is None or s.default is False else f" (default: {_plain(s.default)})"
    option = typer.Option(
        *names,
        *ALIASES.get(s.flag, []),
        help=s.help + default,
        show_default=False,
        rich_help_panel=PANELS.get(_group(s), "Run"),
        metavar=None if is_switch else "VALUE",
    )
    annotation: Any = Annotated[bool | None, option] if is_switch else Annotated[str | None, option]
    return inspect.Parameter(_name(s), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def resolve(
    given: dict[str, Any],
    sets: Iterable[str] = (),
    config: Path | None = None,
    recipe: str | None = None,
    scale: str | None = None,
    default_scale: Callable[[dict[str, Any]], str] = lambda flat: "paper",
    study: tuple[str, Mapping[str, Any]] | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a command (default < recipe < scale < study < file < command line), and each value's source.

    A study may name its recipe, too.
    """
    file = read_yaml(config) if config else {}
    line = {path: read_text(SETTINGS[path], v) if isinstance(v, str) else v for path, v in given.items()}
    line |= dict(parse_set(text) for text in sets)
    own = dict(study[1]) if study else {}
    recipe = recipe or file.get("name") or own.get("recipe") or "spa"
    scale = scale or file.get("scale") or default_scale(file | line)
    layers = layers_of(recipe, scale)
    if study:
        layers[f"study {study[0]}"] = {path: value for path, value in own.items() if path != "recipe"}
    if config:
        layers[str(config)] = {k: v for k, v in file.items() if k not in {"name", "scale"}}
    return build(layers | {"command line": line})
