"""README.md and docs/ against the program: commands parse, files exist, the page of settings is fresh.

`python tests/test_readme.py --write` makes docs/settings.md anew. The Python blocks run in `test_docs.py`.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from spa_lite import recipe
from spa_lite.errors import SpaError
from spa_lite.recipe import SETTINGS, Setting, convert, load_layer, parse_set, read_text, shipped

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
WRITE = "python tests/test_readme.py --write"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPERATORS = {"|", ">", ">>", "<", "&&", "||", ";", "&"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --- command lines ---------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every `spa-lite ...` in shell blocks and in inline code."""
    pieces = [body for language, body in FENCE.findall(text) if language in {"sh", "bash", ""}]
    pieces += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for piece in pieces:
        for line in piece.replace("\\\n", " ").splitlines():
            yield from programs(line)


def programs(line: str) -> Iterator[list[str]]:
    """The words of each spa-lite in a line of shell."""
    if "spa-lite" not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        found = list(lexer)
    except ValueError:  # an apostrophe: prose, not shell
        return
    for word in [*found, ";"]:
        if word not in OPERATORS:
            words.append(word)
            continue
        if words[:1] == ["spa-lite"] and len(words) > 1:
            yield words[1:]
        words = []


@cache
def program() -> Any:
    """The commands of spa-lite, as Typer hands them to its parser."""
    typer: Any = pytest.importorskip("typer")
    importlib.import_module("spa_lite.cli.commands")  # registers them
    return typer.main.get_command(importlib.import_module("spa_lite.cli.main").app)


def parse(words: list[str]) -> None:
    """Parse a command line as the program does, without running it, and read the value of every setting in it."""
    group = program()
    name, *rest = words
    assert name in group.commands, f"there is no command {name}"
    values = group.commands[name].make_context(name, rest, **group.context_settings).params
    flat = {path.replace(".", "_"): path for path in SETTINGS}
    for given, value in values.items():
        if given in flat and isinstance(value, str):
            convert(flat[given], read_text(SETTINGS[flat[given]], value), "command line")
    for pair in values.get("set_") or []:
        convert(*parse_set(pair), "--set")
    for kind in ("recipe", "scale"):
        named = values.get(kind)
        if named and not named.endswith((".yaml", ".yml")):
            load_layer(typing.cast(Any, kind), named)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_command_lines_parse(page: Path) -> None:
    wrong = []
    for words in command_lines(text_of(page)):
        if re.fullmatch(r"[A-Z.]+", words[0]):  # `spa-lite COMMAND`
            continue
        try:
            parse(words)
        except SpaError as error:
            wrong.append(f"spa-lite {' '.join(words)}: {error}")
        except Exception as error:  # Typer and click have several
            wrong.append(f"spa-lite {' '.join(words)}: {getattr(error, 'message', '') or repr(error)}")
    assert wrong == []


def test_a_wrong_option_would_be_seen() -> None:
    words = next(programs("spa-lite sample --no-such-option 1 | spa-lite judge -"))
    with pytest.raises(Exception, match="no-such-option"):
        parse(words)
    with pytest.raises(SpaError, match="rounds"):
        parse(["run", "--rounds", "many"])
    parse(["run", "--learning_rate", "3e-4"])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page: Path) -> None:
    code = "\n".join([body for _, body in FENCE.findall(text_of(page))] + re.findall(r"`([^`\n]+)`", text_of(page)))
    targets = set(re.findall(r"^([a-z-]+):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) - targets == set()


# --- Python blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_python_block_is_run(page: Path) -> None:
    """Blocks marked as tested run in test_docs.py; an unmarked one would run nowhere."""
    marked = re.findall(r"^<!-- tested(?:: long)? -->\n+```python\n", text_of(page), re.MULTILINE)
    assert len(marked) == len(re.findall(r"^```python\n", text_of(page), re.MULTILINE))


def test_the_readme_has_a_python_example() -> None:
    assert "```python\n" in text_of(ROOT / "README.md")


# --- the file tree ---------------------------------------------------------------------------------------------


def tree() -> list[str]:
    """Paths of the README's file tree: two blanks of indentation per folder, the name, blanks, what it holds."""
    pattern = re.compile(r"^<!-- file tree -->\n+```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = pattern.search(text_of(ROOT / "README.md"))
    assert found, "README.md has no block marked <!-- file tree -->"
    paths: list[str] = []
    above: list[str] = []
    for line in found[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        assert len(line.split()) > 1, f"the file tree says nothing about {name}"
        above[depth:] = [name]
        paths.append("".join(above))
    return paths


def test_the_file_tree_names_what_exists() -> None:
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_the_file_tree_names_every_module() -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in ("spa_lite", "backends", "cli")
        for path in (ROOT / folder).rglob("*.py")  # does not follow the links to backends/ and cli/
        if path.name not in {"__init__.py", "__main__.py"}
    }
    assert sorted(modules - set(tree())) == []


# --- the lesson's page -----------------------------------------------------------------------------------------


def test_the_lesson_page_tells_of_this_world() -> None:
    from spa_lite.lesson import world

    page = text_of(ROOT / "docs" / "lesson.md")
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE))
    shown_tasks = {family: rows.get(family) for family in world.FAMILIES}
    assert [f for f, text in shown_tasks.items() if text not in {task.text for task in world.family_tasks(f)}] == []
    assert f"There are {COUNT_WORDS.get(len(world.FAMILIES))} families" in page
    assert {name: rows.get(name) for name in world.WEIGHTS} == {n: f"{w:.2f}" for n, w in world.WEIGHTS.items()}
    assert f"which is {' or '.join(f'{care:.2f}' for care in world.CARE_LEVELS)}" in page
    assert f"words beyond {world.BRIEF_WORDS}" in page
    for split, owned in world.SPLITS.items():
        assert f"`{split}` ({len(owned)} %" in page
    asked = next(task for task in world.family_tasks("sum") if task.text == rows["sum"])
    careful, careless = (
        world.gold_score(world.gold(asked, text)) for text in re.findall(r"^> (.+)$", page, re.MULTILINE)
    )
    assert careful == 1.0
    assert careless < 0.3


COUNT_WORDS = {9: "nine", 10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen"}


# --- the page of settings --------------------------------------------------------------------------------------


def values_of(wanted: Any) -> str:
    """What a setting may be, in words."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        meta = arguments[1]
        low = f"above {meta.gt:g}" if meta.gt is not None else f"from {meta.ge:g}" if meta.ge is not None else ""
        high = f" to {meta.le:g}" if meta.le is not None else ""
        return f"{values_of(arguments[0])} {low}{high}".strip()
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(values_of(part) if part is not type(None) else "none" for part in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list ({values_of(arguments[0])})"
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}[wanted]


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`{','.join(map(str, value))}`" if value else "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def flags(setting: Setting) -> str:
    """The flag, with its other spellings."""
    from spa_lite.cli.options import ALIASES

    if setting.flag is None:
        return "-"
    negative = [f"--no-{setting.flag[2:]}"] if setting.type is bool and not setting.flag.startswith("--no-") else []
    return ", ".join(f"`{name}`" for name in [setting.flag, *ALIASES.get(setting.flag, []), *negative])


def header(columns: str) -> list[str]:
    """The two lines above the rows of a table."""
    return [f"| {' | '.join(columns.split())} |", f"|{' --- |' * len(columns.split())}"]


def settings_page() -> str:
    """docs/settings.md as the code has it."""
    groups: dict[str, list[Setting]] = {}
    for setting in SETTINGS.values():
        groups.setdefault(setting.path.rpartition(".")[0], []).append(setting)
    hints = typing.get_type_hints(recipe.Recipe)
    lines = [HEAD]
    for group, settings in groups.items():
        about = (hints[group].__doc__ if group else "What belongs to the run as a whole.").strip()
        lines += [f"## {group or 'Top level'}\n", f"{about}\n", *header("setting flag values default stages about")]
        for s in settings:
            cells = (f"`{s.path}`", flags(s), values_of(s.type), shown(s.default), " ".join(s.stages) or "-", s.help)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    lines += ["## Shipped recipes and scales\n", SHIPPED, *header("file about changes")]
    kinds: tuple[Literal["recipe", "scale"], ...] = ("recipe", "scale")
    for kind in kinds:
        for name, file in shipped(kind).items():
            about = text_of(file).splitlines()[0].removeprefix("# ")
            changed = {path: value for path, value in load_layer(kind, name).items() if path not in {"name", "scale"}}
            list_ = ", ".join(f"`{path}={shown(value).strip('`')}`" for path, value in changed.items()) or "nothing"
            lines.append(f"| {kind} `{name}` | {about} | {list_} |")
    return "\n".join(lines) + "\n"


HEAD = f"""# Settings

Every setting, as the program has it. This page is generated: `{WRITE}` makes it anew, and a test
fails when it is stale.

- **Where a value comes from.** Default, then recipe, then scale, then the file given with `--config`, then the command
  line; the later one wins. `spa-lite run --dry-run` prints every value and where it came from.
- **How to set one.** With its flag (`--temp 0.5`; underscores work too: `--learning_rate 3e-4`), with
  `--set sampling.temp=0.5`, or in YAML, nested or dotted (`sampling: {{temp: 0.5}}`). A command shows only the flags it
  needs; `--set` takes any setting where the command has it (`run`, `sample`, `judge`, `train`). An unknown name is an
  error that names the nearest one.
- **stages** says whose result depends on the setting. A stage that is finished keeps its result, and a change of one of
  its settings is refused in that run folder. `-` means that no stage's key holds it: it changes where things are,
  memory or speed; the *content* of the inputs is part of the keys, their path is not.
- Lists are written `a,b,c`; `none` is no value.
"""

SHIPPED = """A recipe says what the method does, a scale how big it is. Both are YAML files of the settings that differ
from the defaults above; `spa-lite recipes` lists them, and a file of your own works in their place, as in
`--recipe mine.yaml`.
"""


def test_the_settings_page_is_fresh() -> None:
    assert SETTINGS_PAGE.exists(), f"docs/settings.md is missing; write it with: {WRITE}"
    assert text_of(SETTINGS_PAGE) == settings_page(), f"docs/settings.md is stale; write it anew with: {WRITE}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {WRITE}")
    SETTINGS_PAGE.parent.mkdir(exist_ok=True)
    SETTINGS_PAGE.write_text(settings_page(), encoding="utf-8")
