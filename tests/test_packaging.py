"""The wheel holds each file once, under one name, and works where it is installed, without the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]
VERSION: str = PROJECT["project"]["version"]
SOURCES = ("spa_lite", "backends", "cli")

# Arguments of `spa-lite` for the first stage of the built-in lesson, as small as the command allows.
LESSON_FIRST_STAGE = ["run", "--rounds", "0", "--device", "cpu", "--out", "run", "--seed-epochs", "1"]
LESSON_FIRST_STAGE += ["--lesson-seed-pairs", "16", "--lesson-prompts", "8", "--lesson-held-out", "8"]


def installed_name(path: Path) -> str:
    """Where a file of the repository lies in an installation: backends/x.py becomes spa_lite/backends/x.py."""
    name = path.relative_to(ROOT).as_posix()
    return name if name.startswith("spa_lite/") else f"spa_lite/{name}"


def source_files() -> list[Path]:
    """Every file of the package folders. rglob does not follow the links spa_lite/backends and spa_lite/cli."""
    found = (path for folder in SOURCES for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def test_packages_are_the_folders() -> None:
    """Packages are named by hand in pyproject.toml: this is what notices a forgotten one."""
    files = (installed_name(path) for path in source_files() if path.name == "__init__.py")
    folders = {name.removesuffix("/__init__.py").replace("/", ".") for name in files}
    assert sorted(PACKAGES) == sorted(folders)
    assert len(PACKAGES) == len(set(PACKAGES))


def test_package_directories_exist() -> None:
    mapping: dict[str, str] = SETUPTOOLS["package-dir"]
    assert mapping == {"spa_lite": "spa_lite", "spa_lite.backends": "backends", "spa_lite.cli": "cli"}
    assert (ROOT / "spa_lite" / "py.typed").is_file()


@pytest.mark.parametrize("name", ["backends", "cli"])
def test_links_for_tools(name: str) -> None:
    """spa_lite/NAME is a relative link to NAME/ (or, in a checkout without links, a file that says so)."""
    link = ROOT / "spa_lite" / name
    target = str(link.readlink()) if link.is_symlink() else link.read_text(encoding="utf-8").strip()
    assert target == f"../{name}"


def test_constraints_hold_for_every_requirement() -> None:
    """Each requirement of pyproject.toml has a tested version in constraints.txt, and it is one line."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [normal(line) for line in lines if line and not line.startswith("#")]
    assert [name for name, count in Counter(pinned).items() if count > 1] == []
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert sorted({normal(line) for line in asked} - set(pinned) - UNPINNED) == []
    assert not any("+" in line for line in lines if not line.startswith("#")), "a local version fits one machine only"


UNPINNED = {"spa-lite", "bitsandbytes"}
"""The project itself (in the extra `all`), and what only a CUDA machine can test."""


def normal(requirement: str) -> str:
    """The distribution's name in a requirement, in the one spelling that compares equal."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


MACHINES = {
    "darwin-arm64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    "darwin-x86_64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "x86_64"},
    "linux-x86_64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "linux-aarch64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "win32-amd64": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
}
TORCH, MLX, MLX_CPU = {"torch", "peft"}, {"mlx", "mlx-lm"}, {"mlx[cpu]", "mlx-lm[cpu]"}


def frameworks(machine: str, extra: str | None = None) -> set[str]:
    """Which of torch, peft, mlx and mlx-lm an extra asks for on a machine; None: the plain install."""
    lines = PROJECT["project"]["dependencies"]
    lines = lines if extra is None else PROJECT["project"]["optional-dependencies"][extra]
    found: set[str] = set()
    for asked in map(Requirement, lines):
        if asked.marker is not None and not asked.marker.evaluate(MACHINES[machine]):
            continue
        if asked.name == "spa-lite":
            found |= {name for inner in asked.extras for name in frameworks(machine, inner)}
        elif asked.name in TORCH | MLX:
            found.add(asked.name + "".join(f"[{name}]" for name in sorted(asked.extras)))
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_the_plain_install_brings_one_backend(machine: str) -> None:
    assert frameworks(machine) == (MLX if machine == "darwin-arm64" else TORCH)


@pytest.mark.parametrize("machine", MACHINES)
def test_extras_bring_the_other_backend(machine: str) -> None:
    system = MACHINES[machine]["sys_platform"]
    mlx = {"darwin": MLX, "linux": MLX_CPU}.get(system, set())
    assert frameworks(machine, "torch") == TORCH
    assert frameworks(machine, "mlx") == mlx
    assert frameworks(machine, "all") == TORCH | mlx
    assert frameworks(machine, "dev") == TORCH, "MLX has no wheels for an older glibc: the Makefile asks for it apart"
    assert frameworks(machine, "gguf") == frameworks(machine, "4bit") == frameworks(machine, "alpaca") == set()


def test_a_framework_has_the_same_bounds_everywhere() -> None:
    """A requirement that is written in several places is the same in each."""
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    bounds: dict[str, set[str]] = {}
    for line in [*PROJECT["project"]["dependencies"], *extras["torch"], *extras["mlx"]]:
        bounds.setdefault(Requirement(line).name, set()).add(str(Requirement(line).specifier))
    assert {name: sorted(found) for name, found in bounds.items() if len(found) > 1} == {}
    assert all("<" in next(iter(bounds[name])) for name in MLX), (
        "the MLX backend uses what may change in any minor version"
    )


def test_every_backend_has_its_libraries_in_its_extra() -> None:
    """What `backends.TABLE` says is needed comes with the extra it names, on a machine that the extra is for."""
    from spa_lite import backends

    plain = {normal(line) for line in PROJECT["project"]["dependencies"]}
    named_otherwise = {"llama_cpp": "llama-cpp-python"}
    for entry in backends.TABLE.values():
        extra = PROJECT["project"]["optional-dependencies"][entry.extra] if entry.extra else ()
        brought = {normal(line) for line in extra}
        assert {normal(named_otherwise.get(name, name)) for name in entry.needs} <= plain | brought, entry


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), the wheel built from the sdist, from a copy of the sources: the checkout stays as it is."""
    pytest.importorskip("build", reason="the package `build` is not installed: pip install -e '.[dev]'")
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_has_each_file_once(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = wheel.namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name.partition("/")[0] for name in names} == {"spa_lite", f"spa_lite-{VERSION}.dist-info"}
    held = sorted(name for name in names if name.startswith("spa_lite/"))
    assert held == sorted(installed_name(path) for path in source_files())


def test_wheel_has_the_lesson(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"spa_lite-{VERSION}.dist-info/METADATA").decode()
        scripts = wheel.read(f"spa_lite-{VERSION}.dist-info/entry_points.txt").decode()
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f"spa_lite/lesson/model/{name}" for name in model} - names == set()
    assert any(re.fullmatch(r"spa_lite/recipes/.+\.yaml", name) for name in names)
    assert f"spa_lite-{VERSION}.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "spa-lite = spa_lite.cli.main:main" in scripts


OFFLINE = '''"""Refuses every connection and look-up, from Python's first line on."""
import sys

def refuse(event, args):
    local = event in ("socket.connect", "socket.sendto") and isinstance(args[1], (str, bytes))
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname") and not local:
        raise OSError(f"no network here: {event} {args[1:]}")

sys.addaudithook(refuse)
'''


class Installed:
    """The wheel in an environment of its own, which sees this one's packages (but `hidden` ones) and no checkout."""

    def __init__(self, folder: Path, wheel: Path, hidden: frozenset[str] = frozenset()) -> None:
        self.folder, self.elsewhere = folder / "env", folder / "elsewhere"
        self.elsewhere.mkdir()
        venv.create(self.folder, with_pip=False, symlinks=os.name != "nt")
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(self.bin / "python")]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
        self.site = Path(self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "sitecustomize.py").write_text(OFFLINE, encoding="utf-8")
        seen = folder / "packages"
        seen.mkdir()
        for site in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
            for path in Path(site).iterdir():
                if normal(path.name.partition("-")[0]) not in hidden:
                    (seen / path.name).symlink_to(path)
        (self.site / "zz_tests.pth").write_text(f"{seen}\n", encoding="utf-8")

    def run(self, program: str, *args: str, code: int = 0) -> str:
        """Output of a program of the environment, started in an empty folder."""
        env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        command = [str(self.bin / program), *args]
        done = subprocess.run(command, cwd=self.elsewhere, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{args}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed."""
    return Installed(tmp_path_factory.mktemp("installed"), distributions[0])


def test_installed_is_the_wheel(installed: Installed) -> None:
    where = installed.run("python", "-c", "import spa_lite, spa_lite.cli, spa_lite.backends as b; print(b.__file__)")
    assert Path(where.strip()).is_relative_to(installed.site)
    for name in ("backends", "cli"):
        installed.run("python", "-c", f"import {name}", code=1)


def test_installed_has_no_network(installed: Installed) -> None:
    """The guard that the other tests rely on does refuse."""
    attempt = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
    installed.run("python", "-c", attempt, code=1)


def test_installed_help(installed: Installed) -> None:
    assert "run" in installed.run("spa-lite", "--help")
    assert installed.run("python", "-m", "spa_lite.cli", "--version").strip().endswith(VERSION)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "hidden"), [("torch", MLX), ("mlx", TORCH)])
def test_installed_lesson_first_stage(
    backend: str, hidden: set[str], distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each backend does without the other one's libraries, as after a plain install."""
    from spa_lite import backends

    lacking = backends.missing(backend)
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    alone = Installed(tmp_path, distributions[0], frozenset(hidden))
    for name in hidden:
        alone.run("python", "-c", f"import {name.replace('-', '_')}", code=1)
    alone.run("spa-lite", *LESSON_FIRST_STAGE, "--backend", backend)
    assert any((alone.elsewhere / "run").rglob("*.done.json")), "no stage was finished"
