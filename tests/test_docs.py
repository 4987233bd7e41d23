"""What the pages say is so: commands exist, links resolve, examples run, and nothing private is named.

In README.md and docs/, a Python block runs as a test when the line above it is `<!-- tested -->`, or
`<!-- tested: long -->` where it takes more than a few seconds. The tested blocks of a page run in order, share their
names, and start in an empty folder.
"""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *sorted({*ROOT.glob("*.md"), *DOCS, ROOT / "benchmarks" / "README.md"} - {README})]
COMMAND = re.compile(r"(?:^|[|;&(])[ $]*spa-lite ([a-z][a-z-]*)", re.MULTILINE)
FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1\s*$", re.MULTILINE | re.DOTALL)


def short(path: Path) -> str:
    """A path as a test's name."""
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    """A page's text; a page that is not there fails by name."""
    assert path.is_file(), f"{short(path)} is missing"
    return path.read_text(encoding="utf-8")


def commands() -> set[str]:
    """Names of the commands of `spa-lite`, hidden ones left out."""
    typer = pytest.importorskip("typer")
    importlib.import_module("spa_lite.cli.commands")  # registers them
    group: Any = typer.main.get_command(importlib.import_module("spa_lite.cli.main").app)
    return {name for name, command in group.commands.items() if not command.hidden}


def named_commands(text: str) -> set[str]:
    """Words that follow `spa-lite` where a command line begins: in code, at the start of a line or after | ; & (."""
    code = [match[0] for match in FENCE.finditer(text)] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return {word for piece in code for word in COMMAND.findall(piece)}


@pytest.mark.parametrize("page", [README, *DOCS], ids=short)
def test_named_commands_exist(page: Path) -> None:
    assert sorted(named_commands(read(page)) - commands()) == []


def test_every_command_is_documented() -> None:
    named = set().union(*(named_commands(read(page)) for page in [README, *DOCS]))
    assert sorted(commands() - named) == []


def anchors(text: str) -> set[str]:
    """Names that the headings of a page can be linked by, made as GitHub makes them."""
    found: dict[str, int] = {}
    names = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
    return names


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", read(page)))
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text)
    targets += re.findall(r"^\[[^\]]+\]: <?(\S+?)>?$", text, re.MULTILINE)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    broken = []
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):  # another site, or mail
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        found = path.exists() and path.is_relative_to(ROOT)
        if found and anchor and path.suffix == ".md":
            found = anchor in anchors(read(path))
        if not found:
            broken.append(target)
    assert broken == []


def marked_blocks() -> list[Any]:
    """One test per page that has marked blocks; long if any of its blocks is."""
    found = []
    for page in PAGES:
        if page.is_file():
            pattern = r"^<!-- tested(: long)? -->\n+```python\n(.*?)^```"
            blocks = re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
            marks = [pytest.mark.long] if any(long for long, _ in blocks) else []
            if blocks:
                found.append(pytest.param([code for _, code in blocks], id=short(page), marks=marks))
    return found


@pytest.mark.parametrize("blocks", marked_blocks())
def test_examples_run(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"<example {number}>", "exec"), names)


def test_the_memory_table_is_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of docs/mac.md is what the block below it prints."""
    page = read(ROOT / "docs" / "mac.md")
    blocks = re.findall(r"^<!-- tested -->\n+```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), "<docs/mac.md>", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out in page


WITH_DOCTESTS = sorted(
    path
    for folder in ("spa_lite", "backends")
    for path in (ROOT / folder).rglob("*.py")
    if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
)


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=short)
def test_docstring_examples(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name if name.startswith("spa_lite") else f"spa_lite.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


PRIVATE = {
    "a path of one machine": r"(?<![\w.])/(work|tmp/dev|opt/wheels|opt/pypi)\b",
    "a folder beside the repository": r"\.\./shared\b",
    "a package registry": r"\b(py" + r"pi\.org|pythonhosted\.org|registry\.npmjs\.org)",
    "a number of a tracker": r"\b[Ii]ssue #?\d",
}


def test_nothing_private_is_named() -> None:
    """Every file that is in the repository, or would be with the next commit."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = {ROOT / name for name in listing.stdout.decode().split("\0") if name} - {Path(__file__)}
    found = []
    for path in sorted(path for path in files if path.is_file() and not path.is_symlink()):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for what, pattern in PRIVATE.items():
            found += [f"{short(path)}: {what}: {match[0]!r}" for match in re.finditer(pattern, text)]
    assert found == []
