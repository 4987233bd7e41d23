"""`spa-lite doctor`: what is here, what would be used and why, and whether the chosen model behaves."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import command, resolve
from spa_lite.cli.run import default_scale

LIBRARIES = (
    "spa-lite",
    "numpy",
    "torch",
    "transformers",
    "peft",
    "mlx",
    "mlx-lm",
    "llama-cpp-python",
    "bitsandbytes",
    "datasets",
)

RESULTS = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]note[/]"}


@command(app, "doctor", ["inputs", "model"])
def doctor(given: dict[str, Any], as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what is installed and used, and check the chosen model before hours are spent on it."""
    import msgspec

    from spa_lite import backends, prepare
    from spa_lite.cli import render
    from spa_lite.preflight import Check, preflight

    recipe, _ = resolve(given, default_scale=default_scale)
    name, why = backends.choose(recipe.inputs.backend, recipe.inputs.model)
    backend = prepare.models_of(recipe, backends.load).backend
    checks = preflight(backend) + [Check(*found) for found in backend.machine_checks()]
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "installed": {library: _version(library) for library in LIBRARIES},
        "backend": {"name": name, "why": why, **backend.description},
        "model": recipe.inputs.model or "built-in lesson model",
        "checks": [msgspec.structs.asdict(check) for check in checks],
    }
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(found)
    if any(check.passed is False for check in checks):
        render.note("a check failed: do not trust results of this model on this machine")
        raise typer.Exit(1)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    from spa_lite.cli.render import safe, show

    facts = Table(show_header=False, box=None)
    facts.add_row("python", f"{found['python']} on {found['system']}")
    for library, number in found["installed"].items():
        facts.add_row(library, number)
    facts.add_row("model", safe(str(found["model"])))
    for key, value in found["backend"].items():
        facts.add_row({"name": "backend", "why": "because"}.get(key, key.replace("_", " ")), safe(str(value)))
    show(facts)
    checks = Table(title="preflight", title_justify="left")
    for column in ("check", "result", "seen"):
        checks.add_column(column)
    for check in found["checks"]:
        checks.add_row(check["name"], RESULTS[check["passed"]], safe(check["seen"]))
    show(checks)
