"""`spa-lite doctor`: which backend and why, what only the machine can answer, and what was not tried."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_lite import backends
from spa_lite.backend import ModelSettings
from spa_lite.backends.toy import ToyBackend
from spa_lite.cli import main as cli


def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Exit code and standard output of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["spa-lite", "doctor", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().out


@pytest.mark.parametrize(
    ("system", "machine", "installed", "chosen", "reason"),
    [
        ("darwin", "arm64", {"torch", "mlx"}, "mlx", "Apple silicon"),
        ("darwin", "arm64", {"torch"}, "torch", "Apple silicon, but no_mlx is not installed"),
        ("darwin", "arm64", set(), "mlx", "Apple silicon"),
        ("darwin", "x86_64", {"torch", "mlx"}, "torch", "no Apple silicon: CUDA where there is one, else the CPU"),
        ("linux", "x86_64", {"torch", "mlx"}, "torch", "no Apple silicon: CUDA where there is one, else the CPU"),
        ("linux", "aarch64", {"mlx"}, "mlx", "no Apple silicon, but no_torch is not installed"),
        ("win32", "AMD64", set(), "torch", "no Apple silicon: CUDA where there is one, else the CPU"),
    ],
)
def test_the_choice_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, installed: set[str], chosen: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(backends, "missing", lambda name: () if name in installed else (f"no_{name}",))
    assert backends.choose() == (chosen, reason)
    assert backends.choose("toy") == ("toy", "asked for")


def test_what_the_machine_says_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[tuple[str, bool | None, str]] = [
        ("one thing", True, "fine"),
        ("another", None, "not tried: no such GPU"),
    ]
    monkeypatch.setattr(ToyBackend, "machine_checks", lambda self: iter(found))
    code, printed = doctor(monkeypatch, capsys, "--backend", "toy", "--model", "toy", "--json")
    assert code == 0
    checks = {check["name"]: check for check in json.loads(printed)["checks"]}
    assert checks["another"] == {"name": "another", "passed": None, "seen": "not tried: no such GPU"}
    found.append(("a third", False, "wrong"))
    code, printed = doctor(monkeypatch, capsys, "--backend", "toy", "--model", "toy")
    assert code == 1
    for word in ("one thing", "not tried", "note", "FAILED", "asked for"):
        assert word in printed


def test_torch_says_which_gpu_it_sees() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from spa_lite.backends.torch import TorchBackend

    [(_, passed, seen)] = TorchBackend.machine_checks(object.__new__(TorchBackend))
    assert (passed, seen) == (None, "none: the CPU is used") or passed


@pytest.fixture(scope="module")
def backend() -> Any:
    """The lesson model in MLX."""
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from spa_lite.lesson import MODEL_DIR

    return backends.load("mlx", ModelSettings(str(MODEL_DIR), device="cpu"))


class TestMlx:
    """What doctor adds for MLX."""

    def test_without_an_apple_gpu_it_says_what_was_not_tried(
        self, monkeypatch: pytest.MonkeyPatch, backend: Any
    ) -> None:
        import mlx.core as mx

        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
        found = {name: (passed, seen) for name, passed, seen in backend.machine_checks()}
        assert found["Metal agrees with the CPU"][0] is None
        assert "run doctor on the Mac" in found["Metal agrees with the CPU"][1]

    @pytest.mark.parametrize(("speed", "passed"), [(3.0, None), (80.0, True)])
    def test_a_slow_matrix_library_is_named_with_the_mend(
        self, monkeypatch: pytest.MonkeyPatch, backend: Any, speed: float, passed: bool | None
    ) -> None:
        from spa_lite.backends import mlx_checks, mlx_device

        for module in (mlx_device, mlx_checks):
            monkeypatch.setattr(module, "gigaflops", lambda: speed)
        monkeypatch.setattr(sys, "platform", "linux")
        found = {name: (state, seen) for name, state, seen in backend.machine_checks()}
        state, seen = found["the CPU's matrix library"]
        assert state is passed
        assert ("LD_PRELOAD=" in seen and "openblas" in seen.lower()) == (passed is None)

    def test_two_devices_are_compared(self, monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
        """There is no GPU here, so the CPU plays both; then the second is made to see something else."""
        import mlx.core as mx

        from spa_lite.backends import mlx_checks

        found = list(mlx_checks.agreement(backend, mx.cpu, mx.cpu))
        assert len(found) == 3
        assert all(passed for _, passed, _ in found)
        seen = mlx_checks._on(mx.cpu, backend)
        changes: list[dict[str, Any]] = [
            {"sums": seen.sums + 0.1},
            {"texts": [()] * 12},
            {"grad_norm": seen.grad_norm * 1.1},
        ]
        for place, change in enumerate(changes):
            sides = iter([seen, dataclasses.replace(seen, **change)])
            monkeypatch.setattr(mlx_checks, "_on", lambda device, subject, sides=sides: next(sides))
            passed = [passed for _, passed, _ in mlx_checks.agreement(backend, mx.cpu, mx.cpu)]
            assert passed == [index != place for index in range(3)]

    def test_the_longest_kernels_are_timed(self, monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
        from spa_lite.backends import mlx_checks

        name, passed, seen = mlx_checks.longest(backend.net)
        assert passed
        assert "per layer" in seen
        monkeypatch.setattr(mlx_checks, "PATIENCE", 0.0)
        assert mlx_checks.longest(backend.net)[1] is False
        assert name

    def test_on_metal_everything_is_tried(self, monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
        """Metal itself is not here: the path is walked with the CPU in its place."""
        import mlx.core as mx

        from spa_lite.backends import mlx_checks

        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "gpu", mx.cpu)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**40})
        found = list(mlx_checks.checks(backend, backend.net))
        assert [name for name, _, _ in found][-2:] == ["the longest kernels end in time", "memory"]
        assert all(passed is not False for _, passed, _ in found)

    def test_the_command_says_all_this(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: Any
    ) -> None:
        code, printed = doctor(monkeypatch, capsys, "--backend", "mlx", "--json")
        assert code == 0
        found = json.loads(printed)
        assert found["backend"]["name"] == "mlx"
        assert found["backend"]["why"] == "asked for"
        assert {"Metal agrees with the CPU", "a step moves the policy"} <= {check["name"] for check in found["checks"]}


def test_advice_is_heard_before_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.small import write_data

    files = write_data(tmp_path)
    monkeypatch.setattr(ToyBackend, "advice", property(lambda self: ("take an umbrella",)))
    arguments = ["run", "--backend", "toy", "--model", "toy", "--rounds", "0", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["spa-lite", *arguments, "--seed-pairs", files["inputs.seed_pairs"]])
    with pytest.raises(SystemExit):
        cli.main()
    assert "take an umbrella" in capsys.readouterr().err
