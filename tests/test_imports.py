"""Imports point one way, and nothing heavy is loaded before it is asked for."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"accelerate", "bitsandbytes", "gguf", "llama_cpp", "mlx", "mlx_lm", "peft", "torch", "transformers"}
LIGHT = {"spa_lite", "numpy", "msgspec", "typing_extensions"}  # msgspec takes the last where it is installed

BUILD = "spa_lite.lesson.build"
"""The script that makes the lesson's model: the one module beside the backends that needs a framework."""

LIGHT_BACKENDS = {"spa_lite.backends", "spa_lite.backends.toy"}

# (module, function) pairs of spa_lite that may import a backend when called.
LAZY_BACKENDS: set[tuple[str, str]] = set()


def modules(folder: str) -> dict[str, Path]:
    """Every module of a folder of the repository, by the name it is imported by."""
    inside = [] if folder == "spa_lite" else ["spa_lite"]
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):  # does not follow the links to backends/ and cli/
        parts = [*inside, *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


METHOD, BACKENDS, CLI = modules("spa_lite"), modules("backends"), modules("cli")
EVERY = {**METHOD, **BACKENDS, **CLI}


def imports(name: str, path: Path) -> Iterator[tuple[str, str | None, int]]:
    """(imported name, innermost enclosing function or None, line) for every import statement; relative ones resolved.

    `from a import b` counts as `a.b`, since b may be a module. Imports for type checkers alone are left out.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def walk(node: ast.AST, function: str | None) -> Iterator[tuple[str, str | None, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        elif isinstance(node, ast.Import):
            yield from ((alias.name, function, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", function, node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), None)


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return name == package or name.startswith(package + ".")


def offences(sources: dict[str, Path], forbidden: set[str], allowed: Collection[tuple[str, str]] = ()) -> list[str]:
    """Import statements of `sources` that name a forbidden package, outside the allowed (module, function) pairs."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in sources.items()
        for target, function, line in imports(name, path)
        if any(within(target, package) for package in forbidden) and (name, function) not in allowed
    ]


def python(code: str, *args: str) -> str:
    """Standard output of a fresh interpreter, started in the repository."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_modules() -> None:
    assert METHOD, "no module found in spa_lite/"
    assert BACKENDS, "no module found in backends/"
    assert CLI, "no module found in cli/"


def test_method_imports_no_command_line() -> None:
    assert offences(METHOD, {"spa_lite.cli", "typer", "click", "rich"}) == []


def test_method_imports_backends_only_where_designed() -> None:
    assert offences(METHOD, {"spa_lite.backends"}, LAZY_BACKENDS) == []


def test_backends_import_no_command_line() -> None:
    assert offences(BACKENDS, {"spa_lite.cli", "typer", "click", "rich"}) == []


def test_one_name_per_module() -> None:
    assert offences(EVERY, {"backends", "cli"}) == []


def test_frameworks_live_in_backends() -> None:
    """Even inside functions: the method and the command line know no framework."""
    sources = {name: path for name, path in {**METHOD, **CLI}.items() if name != BUILD}
    assert offences(sources, FRAMEWORKS) == []


LOADED = """
import importlib, json, sys
blame, seen = {}, set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    for new in sorted({full.partition(".")[0] for full in set(sys.modules) - seen}):
        blame.setdefault(new, name)
    seen = set(sys.modules)
print(json.dumps({new: name for new, name in blame.items() if new not in sys.stdlib_module_names}))
"""


def third_party(*names: str) -> dict[str, str]:
    """Top-level packages outside the standard library that importing `names` loads, and which of them did so first."""
    found: dict[str, str] = json.loads(python(LOADED, *names))
    return {new: by for new, by in found.items() if not new.startswith(("_cython_", "cython_runtime"))}


def test_method_loads_numpy_and_msgspec_alone() -> None:
    loaded = third_party("spa_lite", *sorted(set(METHOD) - {BUILD}))
    assert {new: by for new, by in loaded.items() if new not in LIGHT} == {}


def test_toy_backend_loads_no_framework() -> None:
    loaded = third_party(*sorted(LIGHT_BACKENDS))
    assert {new: by for new, by in loaded.items() if new not in {*LIGHT, "safetensors"}} == {}


def test_command_line_loads_no_framework() -> None:
    loaded = third_party(*sorted(name for name in CLI if not name.endswith("__main__")))
    assert {new: by for new, by in loaded.items() if new in {*FRAMEWORKS, "datasets", "pandas", "jinja2", "yaml"}} == {}


HELP = """
import sys
from spa_lite.cli.main import main
sys.argv = ["spa-lite", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + " ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_help_loads_no_framework() -> None:
    loaded = set(python(HELP).splitlines()[-1].split())
    assert loaded & {*FRAMEWORKS, "datasets", "pandas"} == set()


BARE = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"
"""The smallest program that has a help page of this kind."""


def test_help_is_quick() -> None:
    """Half a second; on a slow or busy machine, 2.5 times what a bare Typer program takes there (1.5 to 1.9 were seen).

    Processor time, not the clock, and the best of a few: other programs may be busy.
    """
    resource = pytest.importorskip("resource")

    def spent(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return float(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    found = [(spent("-m", "spa_lite.cli", "--help"), spent("-c", BARE)) for _ in range(5)]
    ours, bare = (min(times) for times in zip(*found, strict=True))
    assert ours < max(0.5, 2.5 * bare), found


@pytest.mark.parametrize("name", sorted(name for name in EVERY if not name.endswith("__main__")))
def test_every_module_imports(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in FRAMEWORKS or importlib.util.find_spec(missing) is not None:
            raise
        pytest.skip(f"{missing} is not installed")
