"""Adapters on their way out and in: `spa-lite export`, and the check that travels with what it writes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors

from spa_lite import backends, exchange
from spa_lite.backend import POLICY, Lora, ModelSettings
from spa_lite.backends.toy import VOCABULARY, ToyBackend
from spa_lite.errors import BackendError, ModelError
from spa_lite.recipe import build, write_recipe
from tests.small import lines, write_data
from tests.test_cli import call
from tests.tiny import make_model

# The check, on the toy


def toy(seed: int = 0, scale: float = 0.0) -> ToyBackend:
    """A toy model whose policy is a random matrix of that scale."""
    backend = ToyBackend(ModelSettings(f"toy:{seed}"))
    delta = scale * np.random.default_rng(1).standard_normal((VOCABULARY, VOCABULARY))
    backend.bind(POLICY, None, Lora())
    backend._set(POLICY, delta)
    return backend


def checked(folder: Path, backend: ToyBackend) -> Path:
    """Its adapter in a folder, with a check."""
    backend.save(folder)
    used = backend.description
    exchange.write_check(folder, exchange.check_rows(backend), backend.fingerprint, used["dtype"], used["bits"])
    return folder


def test_a_check_holds_what_the_model_said() -> None:
    backend = toy(scale=0.5)
    rows = exchange.check_rows(backend)
    assert len(rows) == len(set(exchange.PROMPTS)) == 16
    for row in rows:
        assert len(row.logps) == len(row.response) <= exchange.MAX_TOKENS
        steps = zip((row.prompt[-1], *row.response), row.response, strict=False)
        table = backend.logits(POLICY)
        table = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
        assert row.logps == pytest.approx([table[last, token] for last, token in steps])
        assert row.text == backend.tokenizer.decode(row.response)
    assert exchange.check_rows(backend) == rows, "the same adapter gives the same check"
    assert exchange.check_rows(backend, seed=1) != rows


def test_a_check_fits_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are too long lose their beginning; answers end where the model does."""
    backend = toy()
    monkeypatch.setattr(backend, "context", 9)
    rows = exchange.check_rows(backend)
    assert len(rows) == 16
    assert {len(row.prompt) for row in rows} == {4}
    assert max(len(row.prompt) + len(row.response) for row in rows) <= 9


def test_an_adapter_that_is_what_it_was_agrees(tmp_path: Path) -> None:
    backend = toy(scale=0.5)
    folder = checked(tmp_path, backend)
    assert len(lines(folder / "check.jsonl")) == 16
    verdict = exchange.check_adapter(toy(), folder)
    assert verdict is not None
    assert (verdict.rows, verdict.largest, verdict.token, verdict.mean) == (16, 0.0, 0.0, 0.0)
    assert (verdict.comparable, verdict.ok, verdict.tokens) == (True, True, 370)
    assert exchange.sentence(verdict) == "agrees with its check: 16 answers within 0 nats"
    before = (folder / "check.jsonl").read_bytes()
    assert before == (checked(tmp_path, backend) / "check.jsonl").read_bytes()


def test_an_adapter_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    folder = checked(tmp_path, toy(scale=0.5))
    toy(scale=0.51).save(folder)
    backend = toy()
    with pytest.raises(ModelError, match=r"differs from its check by .* nats, where 0.001 is allowed.*base") as caught:
        exchange.check_adapter(backend, folder)
    assert str(folder) in str(caught.value)
    assert exchange.ROLE not in backend._roles, "the role it was checked in is gone"


def test_another_base_or_precision_is_only_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a difference proves nothing, nothing is refused."""
    folder = checked(tmp_path, toy(scale=0.5))
    verdict = exchange.check_adapter(toy(7), folder)
    assert verdict is not None
    assert (verdict.comparable, verdict.ok) == (False, False)
    assert "the base, its tokenizer or its template is not the exporter's, so this is only shown" in exchange.sentence(
        verdict
    )
    for dtype, bits, why in (
        ("float32", 32, "the precision is float64 in 64 bits here and was float32 in 32 bits"),
        ("float64", 4, "the precision is float64 in 64 bits here and was float64 in 4 bits"),
    ):
        relabel(folder, dtype, bits)
        verdict = exchange.check_adapter(toy(), folder)
        assert verdict is not None
        assert (verdict.comparable, verdict.ok, verdict.why) == (False, True, why)
    coarse = toy()
    monkeypatch.setattr(ToyBackend, "description", {"dtype": "bfloat16", "bits": 16})
    relabel(folder, "bfloat16", 16)
    verdict = exchange.check_adapter(coarse, folder)
    assert verdict is not None
    assert (verdict.comparable, verdict.why) == (False, "bfloat16 rounds too coarsely to tell")


def test_the_tolerance_grows_with_the_answer() -> None:
    """A difference is a sum over 300 tokens; shorter answers get no less room, longer ones in proportion."""
    assert exchange._difference([0.0] * 10, [1e-3] * 10) == pytest.approx(1e-2)
    assert exchange._difference([0.0] * 600, [1e-5] * 600) == pytest.approx(3e-3)
    assert exchange._difference([0.0], [float("nan")]) == float("inf")


def test_no_check_is_no_verdict(tmp_path: Path) -> None:
    toy().save(tmp_path)
    assert exchange.check_adapter(toy(), tmp_path) is None
    with pytest.raises(ModelError, match=r"check.jsonl cannot be read"):
        exchange.verify(toy(), tmp_path)


def change_lines(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the records of a check."""
    found = lines(folder / "check.jsonl")
    change(found)
    (folder / "check.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


def relabel(folder: Path, dtype: str, bits: int) -> None:
    """Say that a check was computed in another precision."""
    change_lines(folder, lambda found: [line.update(dtype=dtype, bits=bits) for line in found])


def cut(folder: Path) -> None:
    """A copy that broke off."""
    (folder / "check.jsonl").write_bytes((folder / "check.jsonl").read_bytes()[:-40])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, r"damaged \(line 16: "),
    "too few": (lambda f: change_lines(f, lambda x: x.pop()), "15 lines instead of 16"),
    "empty": (lambda f: (f / "check.jsonl").write_text(""), "0 lines instead of 16"),
    "no text at all": (lambda f: (f / "check.jsonl").write_bytes(b"\xff\xfe\n"), r"damaged \(line 1: "),
    "a field too few": (lambda f: change_lines(f, lambda x: x[2].pop("logps")), r"line 3: .*logps"),
    "a token too many": (
        lambda f: change_lines(f, lambda x: x[4]["response"].append(5)),
        "line 5 has not one log-prob",
    ),
    "no answer": (lambda f: change_lines(f, lambda x: x[0].update(response=[], logps=[])), "line 1: .*response"),
    "a negative id": (lambda f: change_lines(f, lambda x: x[0]["prompt"].append(-1)), "line 1: .*prompt"),
    "words": (lambda f: change_lines(f, lambda x: x[0].update(prompt="hello")), "line 1: .*prompt"),
    "two models": (lambda f: change_lines(f, lambda x: x[3].update(base="other")), "come from different models"),
    "an unknown id": (
        lambda f: change_lines(f, lambda x: (x[0]["response"].append(9999), x[0]["logps"].append(-1.0))),
        "cannot be scored by this model: it was written for another base",
    ),
    "too long": (
        lambda f: change_lines(f, lambda x: x[1].update(prompt=[5] * 5000)),
        "line 2 has .* tokens and this model takes 4096: it was written for another base",
    ),
    "another vocabulary": (
        lambda f: change_lines(f, lambda x: [line.update(base="other", text="other words") for line in x]),
        "line 1 reads otherwise in this model's vocabulary",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_check_that_cannot_be_used_is_one_sentence(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGE[kind]
    folder = checked(tmp_path, toy(scale=0.5))
    change(folder)
    backend = toy()
    with pytest.raises(ModelError, match=message) as caught:
        exchange.check_adapter(backend, folder)
    assert len(str(caught.value).splitlines()) == 1
    assert "check.jsonl" in str(caught.value)
    assert exchange.ROLE not in backend._roles


COMMANDS: dict[str, list[str]] = {
    "sample": ["--prompts", "prompts.jsonl", "--adapter-path", "good"],
    "judge": ["pairs.jsonl", "--adapter-path", "good"],
    "train": ["pairs.jsonl", "--adapter-path", "good", "--out", "trained", "--max-prompt-length", "100"],
    "run": ["--no-seed-pairs", "--prompts", "prompts.jsonl", "--adapter-path", "good", "--rounds", "1", "--out", "run"],
}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, an adapter that agrees with its check, and one that does not."""
    write_data(tmp_path, pairs=4, prompts=4)
    monkeypatch.chdir(tmp_path)
    checked(tmp_path / "good", toy(scale=0.5))
    checked(tmp_path / "bad", toy(scale=0.5))
    toy(scale=0.6).save(tmp_path / "bad")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_whoever_loads_an_adapter_checks_it(command: str, toys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [command, *COMMANDS[command], "--backend", "toy", "--model", "toy"]
    code, _, err = call(capfd, *words)
    assert code == 0, err
    assert err.count("good agrees with its check: 16 answers within 0 nats") == 1
    code, out, err = call(capfd, *[word.replace("good", "bad") for word in words])
    assert code == 1
    assert out == ""
    assert err.splitlines()[-1].startswith("error: bad differs from its check by ")


def test_both_adapters_are_checked(toys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--init-adapter as well; the same folder once."""
    words = ["judge", "pairs.jsonl", "--backend", "toy", "--model", "toy", "--adapter-path", "good"]
    words += ["--judge-reference", "none"]  # a policy is not compared with itself
    shutil.copytree("good", "start")
    code, _, err = call(capfd, *words, "--init-adapter", "start")
    assert code == 0
    assert [line.partition(":")[0] for line in err.splitlines() if "check" in line] == [
        "start agrees with its check",
        "good agrees with its check",
    ]
    assert err.count("agrees") == 2
    assert call(capfd, *words, "--init-adapter", "good")[2].count("agrees") == 1


# The command, on a tiny real model

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")),
    reason="torch, transformers or peft is not installed",
)


def mlx_works() -> bool:
    """Whether there is an MLX backend and its library can be imported (on Linux a wheel without it installs, too)."""
    if "mlx" not in backends.TABLE or backends.missing("mlx"):
        return False
    try:
        importlib.import_module("mlx.core")
    except ImportError:
        return False
    return True


needs_mlx = pytest.mark.skipif(not mlx_works(), reason="there is no MLX backend here, or mlx is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in `llama`, an adapter for it in `adapter`, and the same as a run in `run`."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("secret-place")
    make_model(folder / "llama")
    backend = backends.load("torch", ModelSettings(str(folder / "llama"), device="cpu"))
    backend.bind(POLICY, None, Lora(rank=4, alpha=10.0, seed=3))
    backend.save(folder / "adapter")
    path = folder / "adapter/adapter_model.safetensors"
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal(value.shape).astype(np.float32) / 10 if "lora_B" in key else value
        for key, value in safetensors.load_file(path).items()
    }
    path.write_bytes(safetensors.save(tensors, metadata={"format": "pt"}))
    shutil.copytree(folder / "adapter", folder / "run/adapter")
    write_recipe(folder / "run", build({"x": {"inputs.model": str(folder / "llama"), "inputs.backend": "torch"}})[0])
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; other frameworks than torch count as not installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "missing", lambda name: ("mlx",) if name == "mlx" else ())
    return tmp_path


def export(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run `spa-lite export` in this process."""
    return call(capfd, "export", *map(str, words))


def logps(folder: Path, model: Path) -> list[float]:
    """What the torch backend makes of an adapter's check rows."""
    backend = backends.load("torch", ModelSettings(str(model), device="cpu"))
    backend.bind(POLICY, folder)
    return [value for row in exchange.check_rows(backend) for value in row.logps]


FILES = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}


@needs_torch
@pytest.mark.parametrize("form", FILES)
def test_export(form: str, world: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The files, what they say, and what they do not; the adapter itself is exactly the one that went in."""
    code, out, err = export(capfd, world / "adapter", "out", "--to", form, "--model", world / "llama")
    assert code == 0, err
    assert out == ""
    assert "not yet checked: mlx is not installed here; whoever loads it checks then" in err
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted(
        ["adapter_config.json", FILES[form], "check.jsonl", "export.json"]
    )
    assert sorted(path.name for path in here.iterdir()) == ["out"]
    record = json.loads((here / "out/export.json").read_text())
    base = backends.load("torch", ModelSettings(str(world / "llama"), device="cpu")).fingerprint
    effect, (check,) = record.pop("effect"), record.pop("checks")
    assert record == {
        "form": form,
        "source": "adapter",
        "model": "llama",
        "base": base,
        "backend": "torch",
        "dtype": "float32",
        "bits": 32,
        "not_checked": ["mlx is not installed here; whoever loads it checks then"],
        "files": sorted(path.name for path in (here / "out").iterdir()),
    }
    assert effect > 0.01
    assert (check["with"], check["rows"], check["largest"], check["mean"], check["ok"]) == ("torch", 16, 0.0, 0.0, True)
    assert check["tokens"] == sum(len(line["response"]) for line in lines(here / "out/check.jsonl"))
    assert f"checked with torch: 16 answers, {check['tokens']} tokens, at most 0 and on average 0 nats apart" in err
    for path in (here / "out").iterdir():
        content = path.read_bytes()
        assert b"secret-place" not in content
        assert str(Path.home()).encode() not in content
    assert len(lines(here / "out/check.jsonl")) == 16
    assert logps(here / "out", world / "llama") == logps(world / "adapter", world / "llama")


@needs_torch
def test_there_and_back_is_the_same_adapter(world: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = ("--model", world / "llama")
    assert export(capfd, world / "adapter", "mlx", "--to", "mlx", *model)[0] == 0
    code, _, err = export(capfd, "mlx", "deep/back", "--to", "peft", *model)
    assert code == 0, err
    assert "mlx agrees with its check" in err, "what is exported again is checked first"
    path = "adapter_model.safetensors"
    assert (here / "deep/back" / path).read_bytes() == (world / "adapter" / path).read_bytes()
    config = json.loads((here / "deep/back/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 10, "llama")
    assert (here / "mlx/check.jsonl").read_bytes() == (here / "deep/back/check.jsonl").read_bytes()


@needs_torch
def test_a_run_brings_its_model(world: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And --json is what a program reads."""
    (here / "out").mkdir()
    code, out, err = export(capfd, world / "run", "out", "--to", "mlx", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads((here / "out/export.json").read_text())
    assert json.loads(out)["source"] == "run"
    assert "lesson" not in err


@needs_torch
def test_what_was_exported_is_checked_when_it_is_loaded(
    world: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(capfd, world / "adapter", "out", "--to", "mlx", "--model", world / "llama")
    (here / "prompts.jsonl").write_text('{"prompt": "the baker mends"}\n')
    words = ["sample", "--prompts", "prompts.jsonl", "--adapter-path", "out", "--rounds", "1"]
    words += ["--max-tokens", "4", "--max-prompt-length", "100", "--model"]
    code, _, err = call(capfd, *words, str(world / "llama"))
    assert code == 0, err
    assert "out agrees with its check: 16 answers within 0 nats" in err
    other = make_model(here / "other", seed=5)
    code, _, err = call(capfd, *words, str(other))
    assert code == 0, err
    assert "is not the exporter's, so this is only shown" in err
    config = here / "out/adapter_config.json"
    config.write_text(config.read_text().replace('"scale": 2.5', '"scale": 2.4'))
    code, _, err = call(capfd, *words, str(world / "llama"))
    assert code == 1
    assert "error: out differs from its check by" in err


@needs_torch
def test_force_replaces_an_adapter_and_nothing_else(world: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [world / "adapter", "out", "--model", world / "llama", "--to"]
    assert export(capfd, *words, "peft")[0] == 0
    before = (here / "out/export.json").read_bytes()
    code, _, err = export(capfd, *words, "mlx")
    assert code == 1
    assert "error: out already holds an export; choose another folder, or replace it with --force" in err
    assert (here / "out/export.json").read_bytes() == before
    assert export(capfd, *words, "mlx", "--force")[0] == 0
    assert (here / "out/adapters.safetensors").exists()
    assert not (here / "out/adapter_model.safetensors").exists()
    (here / "out/thesis.tex").write_text("x")
    code, _, err = export(capfd, *words, "peft", "--force")
    assert code == 1
    assert "out is not empty and not only an export (thesis.tex)" in err
    assert (here / "out/adapters.safetensors").exists()
    assert sorted(path.name for path in here.iterdir()) == ["out"]


@needs_torch
def test_half_precision_says_that_its_check_binds_nobody(
    world: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [world / "adapter", "out", "--to", "peft", "--model", world / "llama", "--dtype", "bfloat16"]
    code, _, err = export(capfd, *words)
    assert code == 0, err
    assert "a check in bfloat16 is only shown where it is loaded; --dtype float32 makes it binding" in err
    assert lines(here / "out/check.jsonl")[0]["dtype"] == "bfloat16"


def crooked(settings: ModelSettings) -> Any:
    """Stands for another framework that computes something else."""
    from spa_lite.backends.torch import TorchBackend

    class Crooked(TorchBackend):
        name = "mlx"

        def logprob(self, rows: Any, role: str, per_token: bool = False) -> Any:
            for index, scores in super().logprob(rows, role, per_token):
                yield (
                    index,
                    tuple(
                        type(one)(
                            logp=one.logp, tokens=one.tokens, per_token=tuple(v + 1e-3 for v in one.per_token or ())
                        )
                        for one in scores
                    ),
                )

    return Crooked(settings)


def straight(settings: ModelSettings) -> Any:
    """Stands for another framework that computes the same."""
    from spa_lite.backends.torch import TorchBackend

    assert (settings.device, settings.dtype) == ("auto", "float32")
    return TorchBackend(settings)


def absent(settings: ModelSettings) -> Any:
    """Stands for another framework that does not know this model."""
    raise BackendError(f"no such architecture as that of {settings.model}")


def picky(settings: ModelSettings) -> Any:
    """Stands for another framework that cannot use this adapter."""
    backend = straight(settings)

    def bind(role: str, adapter: Path | None = None, lora: Lora | None = None) -> None:
        raise ModelError(f"{adapter} is too rich")

    backend.bind = bind
    return backend


@pytest.fixture
def other(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a function of this file the other framework."""
    monkeypatch.setattr(backends, "missing", lambda name: ())
    monkeypatch.setattr("spa_lite.cli.export_checks.version", lambda name: "1.2.3")

    def use(name: str) -> None:
        monkeypatch.setitem(backends.TABLE, "mlx", backends.Entry(f"tests.test_export:{name}", (), None))

    return use


@needs_torch
def test_the_other_framework_is_asked(
    world: Path, here: Path, capfd: pytest.CaptureFixture[str], other: Callable[[str], None]
) -> None:
    """What it finds is recorded; what it cannot do is said; what it computes otherwise stops the export."""
    words = [world / "adapter", "out", "--force", "--model", world / "llama", "--to"]
    other("straight")
    code, out, err = export(capfd, *words, "mlx", "--json")
    assert code == 0, err
    assert "checked with mlx: 16 answers" in err
    found = json.loads(out)["checks"][1]
    assert found.pop("tokens") > 16
    assert found == {
        "with": "mlx",
        "version": "1.2.3",
        "rows": 16,
        "largest": 0.0,
        "mean": 0.0,
        "largest_answer": 0.0,
        "comparable": True,
        "ok": True,
    }
    other("absent")
    code, out, err = export(capfd, *words, "mlx", "--json")
    assert code == 0, err
    assert "not yet checked: mlx cannot load this model (no such architecture" in err
    assert len(json.loads(out)["checks"]) == 1
    other("picky")
    code, out, err = export(capfd, *words, "peft", "--json")
    assert code == 0, err
    assert "not yet checked: mlx refuses it (it is too rich)" in err
    before = (here / "out/export.json").read_bytes()
    code, _, err = export(capfd, *words, "mlx")
    assert code == 1, "mlx must be able to read mlx-lm's format"
    assert "was not exported: mlx refuses it (it is too rich)" in err
    other("crooked")
    code, _, err = export(capfd, *words, "mlx")
    assert code == 1
    assert "was not exported: in mlx it differs from its check by" in err
    assert (here / "out/export.json").read_bytes() == before, "what was there is untouched"
    assert sorted(path.name for path in here.iterdir()) == ["out"]


@needs_torch
@needs_mlx
@pytest.mark.parametrize("writer", ["torch", "mlx"])
@pytest.mark.parametrize("form", FILES)
def test_torch_and_mlx_agree(
    form: str, writer: str, world: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whoever writes, and whatever the format, the other one computes the same."""
    words = [world / "adapter", tmp_path / "out", "--to", form, "--model", world / "llama", "--backend", writer]
    code, out, err = export(capfd, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["backend"] == writer
    assert found["checks"][0]["with"] == writer
    other = found["checks"][1]
    assert other["with"] != writer
    assert other["ok"]
    assert other["comparable"]
    assert other["largest_answer"] < exchange.TOLERANCE


WRONG: list[tuple[list[str], int, str]] = [
    (["nowhere", "out"], 1, "nowhere is no folder here: there is no run 'nowhere'"),
    (["empty", "out"], 1, "empty holds no adapter (adapter_config.json or adapter/adapter_config.json)"),
    (["good", "out", "--to", "gguff"], 2, "there is no form 'gguff'; did you mean gguf?"),
    (["good", "out", "--round", "1"], 1, "--round 1 picks a stage of a run, and good is an adapter"),
    (["good", "out", "--to", "gguf", "--bits", "4"], 2, "--bits is for --to merged"),
    (["good", "out", "--to", "merged", "--bits", "3"], 2, "--bits 3 is not offered"),
    (["good", "out", "--to", "merged", "--bits", "4", "--dtype", "float16"], 2, "exclude each other"),
    (["good", "out", "--to", "merged", "--dtype", "auto"], 2, "--dtype auto is no precision of a file"),
    (["good", "out", "--upload", "me/mine"], 2, "add --to hub-folder, not peft"),
    (["good", "out", "--public"], 2, "--public is about --upload REPO"),
    (["good", "out", "--adapter-path", "x"], 2, "--adapter-path"),
    (["good", "out", "--init-adapter", "x"], 2, "--init-adapter"),
    (["good", "out", "--model", "x.gguf"], 1, "not a GGUF file"),
    (["good", "out", "--to", "pefft"], 2, "did you mean peft?"),
    (["good", "full"], 1, "full is not empty and not only an export (thesis.tex)"),
    (["good", "full", "--force"], 1, "full is not empty and not only an export (thesis.tex)"),
    (["good", "prompts.jsonl"], 1, "prompts.jsonl is not empty and not only an export"),
    (["good", "bad"], 1, "bad already holds an export; choose another folder, or replace it with --force"),
    (["good", "out", "--backend", "toy", "--model", "toy"], 1, "adapters of the toy backend fit no other program"),
    (["good", "out", "--backend", "tourch"], 1, "there is no backend 'tourch'"),
]


@pytest.mark.parametrize(
    ("words", "code", "names"), WRONG, ids=[" ".join(words[:1] + words[2:]) or words[0] for words, _, _ in WRONG]
)
def test_wrong_input_gets_one_sentence(
    toys: Path, capfd: pytest.CaptureFixture[str], words: list[str], code: int, names: str
) -> None:
    """Nothing is loaded for it, and nothing is written."""
    (toys / "empty").mkdir()
    (toys / "full").mkdir()
    (toys / "full/thesis.tex").write_text("x")
    before = sorted(toys.rglob("*"))
    found, _, err = export(capfd, *words, *([] if "--to" in words else ["--to", "peft"]))
    assert found == code, err
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert names in last[0]
    assert sorted(toys.rglob("*")) == before


def test_a_form_must_be_named(toys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = export(capfd, "good", "out")
    assert code == 2
    assert "--to" in err


def test_a_run_of_the_toy_is_refused(toys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its recipe says which backend it was."""
    (toys / "run").mkdir()
    shutil.copytree("good", "run/adapter")
    write_recipe(toys / "run", build({"x": {"inputs.model": "toy", "inputs.backend": "toy"}})[0])
    code, _, err = export(capfd, "run", "out", "--to", "peft")
    assert code == 1
    assert "adapters of the toy backend" in err


@needs_torch
def test_an_adapter_for_another_model_is_refused(world: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By name, and without a half-written folder."""
    code, _, err = export(capfd, world / "adapter", "out", "--to", "peft")
    assert code == 1
    assert "the base is the built-in lesson model" in err
    assert f"error: adapter {world / 'adapter'} does not fit" in err
    assert list(here.iterdir()) == []


@needs_torch
def test_what_a_format_cannot_say_is_refused(world: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The adapter is named, and the other format takes it."""
    shutil.copytree(world / "adapter", "rich")
    config = json.loads((here / "rich/adapter_config.json").read_text())
    (here / "rich/adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 3}}))
    words = ["rich", "out", "--model", world / "llama", "--to"]
    code, _, err = export(capfd, *words, "mlx")
    assert code == 1
    assert "error: rich uses alpha_pattern, which mlx-lm's format cannot hold: use plain LoRA instead" in err
    assert not (here / "out").exists()
    assert export(capfd, *words, "peft")[0] == 0
    assert logps(here / "out", world / "llama") == logps(here / "rich", world / "llama")


@needs_torch
def test_a_place_that_cannot_be_written_is_one_sentence(
    world: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("x")
    words = [world / "adapter", "file/out", "--to", "peft", "--model", world / "llama"]
    code, _, err = export(capfd, *words)
    assert code == 1
    assert "error: cannot write file/out: " in err
