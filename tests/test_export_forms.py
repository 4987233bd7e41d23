"""The forms of `spa-lite export`, on the lesson model and its seed adapter: what they hold, and what they do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.numpy as safetensors
import yaml

from spa_lite import backends, exchange
from spa_lite.backend import POLICY, Lora, ModelSettings
from spa_lite.cli.export_source import source_of
from spa_lite.lesson import MODEL_DIR
from spa_lite.recipe import build, load_layer, write_recipe
from spa_lite.records import Message
from tests.test_export import export, mlx_works
from tests.test_modelfile import go, parse

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")),
    reason="torch, transformers or peft is not installed",
)
needs_mlx = pytest.mark.skipif(not mlx_works(), reason="mlx is not installed")
SEED = MODEL_DIR.parent / "seed_adapter"
WEIGHTS = "adapter_model.safetensors"


def needs_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="gguf: llama-cpp-python is not installed")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where only torch is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "missing", lambda name: () if name == "torch" else (name,))
    return tmp_path


@pytest.fixture
def with_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with whatever is really installed."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def run(here: Path) -> Path:
    """What a run of the lesson leaves, as far as an export looks: two stages, a recipe, a summary."""
    return a_run(here / "runs" / "spa-1a2b3c4d")


def a_run(folder: Path, **settings: Any) -> Path:
    """A run folder with a seed stage (B negated) and a round (the shipped adapter), finished."""
    layers = {"recipe": load_layer("recipe", "spa"), "scale": load_layer("scale", "lesson"), "mine": settings}
    shutil.copytree(SEED, folder / "rounds/1/adapter")
    shutil.copytree(SEED, folder / "rounds/0/adapter")
    other = {key: -v if "lora_B" in key else v for key, v in safetensors.load_file(SEED / WEIGHTS).items()}
    (folder / "rounds/0/adapter" / WEIGHTS).write_bytes(safetensors.save(other, metadata={"format": "pt"}))
    shutil.copytree(SEED, folder / "adapter")
    write_recipe(folder, build(layers)[0])
    (folder / "run.json").write_text('{"format": 2}')
    (folder / "rounds/0/seed.done.json").write_text('{"size": 100}')
    interval = {"value": 0.745, "low": 0.68, "high": 0.8, "n": 200}
    rows = [
        {"stage": "init", "pair_accuracy": {"value": 0.5, "low": 0.5, "high": 0.5, "n": 200}},
        {"stage": "seed", "pair_accuracy": interval, "win_rate": {**interval, "n": 400}},
        {"stage": "round 1", "pair_accuracy": interval, "sampled": {"prompts": 40}},
    ]
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "rows": rows,
                "warnings": ["round 1: <script>[x](y)", "seed: all is well"],
                "notes": ["/home/secret/pairs.jsonl"],
                "versions": {"spa-lite": "0.1.0"},
            }
        )
    )
    return folder


def scores(model: Path, adapter: Path | None, rows: Any, name: str = "torch") -> exchange.Difference:
    """How far a model (with an adapter) is from the log-probabilities of some check rows."""
    dtype = "auto" if name == "llamacpp" else "float32"
    backend = backends.load(name, ModelSettings(str(model), device="cpu", dtype=dtype))
    backend.bind(POLICY, adapter)
    return exchange.differ(backend, rows, POLICY)


def record_of(folder: Path) -> Any:
    return json.loads((folder / "export.json").read_text())


# Which adapter, and where to


def test_a_stage_of_a_run_is_picked(run: Path) -> None:
    """By number, by name, by the path of the stage; the last one by default."""
    for word, stage, name, adapter in [
        (run, None, "spa-1a2b3c4d-round-1", "adapter"),
        ("spa-1a2b", "0", "spa-1a2b3c4d-seed", "rounds/0/adapter"),
        (run, "seed", "spa-1a2b3c4d-seed", "rounds/0/adapter"),
        (run, "last", "spa-1a2b3c4d-round-1", "rounds/1/adapter"),
        (run / "rounds/0", None, "spa-1a2b3c4d-seed", "rounds/0/adapter"),
        (run / "rounds/1/adapter", None, "spa-1a2b3c4d-round-1", "rounds/1/adapter"),
    ]:
        found = source_of(str(word), stage, {})
        assert (found.name, found.adapter and found.adapter.resolve()) == (name, run / adapter)
        assert (found.recipe.scale, found.recipe.lora.rank) == ("lesson", 8)
    settings = (run / "recipe.yaml").read_text().replace("device: auto", "device: cuda:7")
    (run / "recipe.yaml").write_text(settings.replace("name: spa", "name: mine"))
    found = source_of(str(run), None, {"inputs.backend": "torch"})
    assert (found.recipe.inputs.device, found.recipe.inputs.backend, found.recipe.name) == ("auto", "torch", "mine")
    found = source_of(str(SEED), None, {})
    assert (found.name, found.adapter, found.run) == ("seed_adapter", SEED, None)


def test_the_folder_is_named_after_the_stage(run: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = export(capfd, run, "--round", "seed", "--to", "peft")
    assert code == 0, err
    assert "adapter for PEFT: spa-1a2b3c4d-seed-peft" in err
    folder = here / "spa-1a2b3c4d-seed-peft"
    assert (folder / WEIGHTS).read_bytes() == (run / "rounds/0/adapter" / WEIGHTS).read_bytes()
    assert record_of(folder)["source"] == "spa-1a2b3c4d-seed"


def test_a_stage_that_is_not_there(run: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    for stage, message, expected in [
        ("7", "has no stage '7'; it has init, seed, 1", 1),
        ("init", "init is the bare base, so there is no adapter to export; choose another stage, or --to gguf", 2),
    ]:
        code, _, err = export(capfd, run, "--to", "peft", "--round", stage)
        assert code == expected
        assert message in err
    shutil.rmtree(run / "adapter")
    code, _, err = export(capfd, run, "--to", "peft")
    assert code == 1
    assert "it is not finished; --round 1 takes what it has" in err
    assert not list(here.glob("spa*"))
    assert {p for p in before if p.exists()} == set(here.rglob("*"))


# PEFT, mlx-lm and back


def test_to_mlx_and_back_is_exact(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in ((SEED, "mlx", "--to", "mlx-lm"), ("mlx", "back", "--to", "peft")):
        code, _, err = export(capfd, *words)
        assert code == 0, err
    assert (here / "back" / WEIGHTS).read_bytes() == (SEED / WEIGHTS).read_bytes()


# Merged


@needs_mlx
def test_a_merged_folder_does_the_same_everywhere(with_all: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In torch and mlx by our backends, in plain transformers and plain mlx-lm by hand."""
    code, out, err = export(capfd, SEED, "merged", "--to", "merged", "--dtype", "float32", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert [check["with"] for check in record["checks"]] == ["torch", "mlx"]
    for check in record["checks"]:
        assert check["mean"] < 1e-5
        assert check["largest"] < 1e-4
        assert check["ok"]
    assert record["effect"] > 0.01
    assert (record["written"], round(record["merged"]["share"], 5)) == ("float32", 1.0)
    assert "written in float32: 100.00 % of the wanted change arrived" in err
    row = exchange.read_check(with_all / "merged/check.jsonl")[0]
    ids = [*row.prompt, *row.response]
    expected = np.array(row.logps)

    import mlx.core as mx
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = torch.log_softmax(plain(torch.tensor([ids])).logits[0], dim=-1).numpy()
    assert np.abs(_of_tokens(theirs, row) - expected).max() < 1e-4
    logits = mlx_lm.load("merged")[0](mx.array([ids]))[0].astype(mx.float32)
    theirs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert np.abs(_of_tokens(theirs, row) - expected).max() < 1e-4


def _of_tokens(table: Any, row: exchange.CheckRow) -> Any:
    start = len(row.prompt) - 1
    return np.array([table[start + i, token] for i, token in enumerate(row.response)])


def test_half_precision_says_what_is_left(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = {}
    for dtype in ("bfloat16", "float16"):
        code, out, err = export(capfd, SEED, dtype, "--to", "merged", "--dtype", dtype, "--json")
        assert code == 0, err
        found[dtype] = json.loads(out)
        cosine = found[dtype]["merged"]["cosine"]
        assert f"written in {dtype}: " in err
        assert f"cosine {cosine:.4f}" in err
        (check,) = found[dtype]["checks"]
        assert 1e-5 < check["mean"] < check["mean_allowed"]
        assert safetensors_dtype(here / dtype / "model.safetensors") == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert found["bfloat16"]["merged"]["cosine"] < 0.99 < found["float16"]["merged"]["cosine"]


def safetensors_dtype(path: Path) -> str:
    """The dtype of a file's largest tensor."""
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    entries = [value for key, value in json.loads(header).items() if key != "__metadata__"]
    return str(max(entries, key=lambda entry: entry["data_offsets"][1] - entry["data_offsets"][0])["dtype"])


@needs_mlx
def test_four_bits_only_by_force(with_all: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [SEED, "small", "--to", "merged", "--bits", "4"]
    code, _, err = export(capfd, *words)
    assert code == 1
    cosine = re.search(r"of the change, 4 bits keep: .*, cosine (\d\.\d+)", err)
    assert cosine
    assert f"has a cosine of {cosine[1]} with what was trained; leave --bits out" in err
    assert "--force" in err
    assert list(with_all.iterdir()) == []
    code, _, err = export(capfd, *words, "--force")
    assert code == 0, err
    assert "checked with mlx" in err
    assert float(cosine[1]) < 0.9
    assert json.loads((with_all / "small/config.json").read_text())["quantization"]["bits"] == 4
    assert not (with_all / "small/README.md").exists()
    assert [path.name for path in with_all.iterdir()] == ["small"]


def test_a_wrong_merge_is_not_exported(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, but the adapter at another strength; and nothing is left."""
    from spa_lite.backends import merging

    real = merging.merge

    def wrong(model: Path, stored: Any, *rest: Any) -> Any:
        return real(model, dataclasses.replace(stored, config=stored.config | {"lora_alpha": 16}), *rest)

    monkeypatch.setattr(merging, "merge", wrong)
    code, _, err = export(capfd, SEED, "out", "--to", "merged", "--dtype", "float32")
    assert code == 1
    assert re.search(r"was not exported: in torch its tokens are 0\.\d+ nats apart on average .* 5e-05 is allowed", err)
    assert list(here.iterdir()) == []


# A chain of adapters


def test_what_began_at_another_adapter_contains_it(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run with --init-adapter: its policy alone, on the bare base, is what was trained; and so it is merged."""
    shutil.copytree(SEED, here / "sft")
    run = a_run(here / "run", **{"inputs.init_adapter": str(here / "sft")})
    code, _, err = export(capfd, run, "out", "--to", "merged", "--dtype", "float32")
    assert code == 0, err
    rows = exchange.read_check(here / "out/check.jsonl")
    assert scores(here / "out", None, rows).largest < 1e-4
    assert scores(MODEL_DIR, SEED, rows).largest < 1e-4
    code, _, err = export(capfd, run, "shared", "--to", "hub-folder")
    assert code == 0, err
    assert "- began at the adapter: sft\n" in (here / "shared/README.md").read_text()
    code, _, err = export(capfd, run, "first", "--to", "peft", "--round", "init")
    assert code == 0, err
    assert (here / "first" / WEIGHTS).read_bytes() == (SEED / WEIGHTS).read_bytes()


def test_an_adapter_on_top_of_another_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It says so itself: its base is an adapter's folder."""
    shutil.copytree(SEED, here / "sft")
    shutil.copytree(SEED, here / "second")
    config = json.loads((here / "second/adapter_config.json").read_text())
    (here / "second/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(here / "sft")})
    )
    for form in ("merged", "peft"):
        code, _, err = export(capfd, "second", "out", "--to", form)
        assert code == 1
        assert "second was trained on top of another adapter (sft): merge that one into its base first" in err
    assert not (here / "out").exists()


# GGUF


def test_a_gguf_holds_what_was_meant(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where llama.cpp is not installed, this much is known all the same; and that is said."""
    pytest.importorskip("gguf")
    for form, dtype in (("gguf", "float16"), ("gguf", "bfloat16"), ("gguf", "float32")):
        code, out, err = export(capfd, SEED, dtype, "--to", form, "--dtype", dtype, "--json")
        assert code == 0, err
        assert "not yet checked: llama-cpp-python is not installed here" in err
        record = json.loads(out)
        assert (record["written"], record["merged"]["tensors"]) == (dtype, 39)
        assert "read back: 39 tensors are in the file as they were meant" in err
        assert record["merged"]["cosine"] > 0.98
        assert record["checks"] == []
    assert (here / "float32/model.gguf").stat().st_size > 1.9 * (here / "float16/model.gguf").stat().st_size
    code, out, err = export(capfd, SEED, "lora", "--to", "gguf-lora", "--json")
    assert code == 0, err
    assert json.loads(out)["matrices"] == 2 * 28
    assert sorted(p.name for p in (here / "lora").iterdir()) == ["adapter.gguf", "check.jsonl", "export.json"]


def test_a_damaged_gguf_is_noticed(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from spa_lite.backends import gguf_lora, gguf_writer

    write_model, write_lora = gguf_writer.write_model, gguf_lora.write_lora

    def bent(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-100] ^= 0x40
        path.write_bytes(content)

    def bent_model(model: Path, out: Path, *rest: Any, **more: Any) -> None:
        write_model(model, out, *rest, **more)
        bent(out)

    def bent_lora(stored: Any, config: Any, out: Path) -> None:
        write_lora(stored, config, out)
        bent(out)

    monkeypatch.setattr(gguf_writer, "write_model", bent_model)
    monkeypatch.setattr(gguf_lora, "write_lora", bent_lora)
    for form in ("gguf", "gguf-lora", "ollama"):
        code, _, err = export(capfd, SEED, "out", "--to", form)
        assert code == 1
        assert "the file is wrong" in err
        assert list(here.iterdir()) == []


def test_a_model_that_gguf_is_not_written_for(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import make_model

    make_model(here / "neo", "gpt_neo")
    backend = backends.load("torch", ModelSettings(str(here / "neo"), device="cpu"))
    backend.bind(POLICY, None, Lora(rank=2))
    backend.save(here / "adapter")
    for form in ("gguf", "gguf-lora", "ollama"):
        code, _, err = export(capfd, "adapter", "out", "--to", form, "--model", "neo")
        assert code == 1
        last = err.splitlines()[-1]
        assert "GPTNeoForCausalLM is not shaped as a Llama; give --llama-cpp DIR" in last
        code, _, err = export(capfd, "adapter", "out", "--to", form, "--model", "neo", "--llama-cpp", "nowhere")
        assert code == 1
        assert "nowhere is no checkout of llama.cpp" in err
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "neo"]


def test_the_users_converter_is_used(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A stand-in for llama.cpp's scripts: it copies what our own writer made."""
    pytest.importorskip("gguf")
    theirs = here / "llama.cpp"
    theirs.mkdir()
    for form, file, script in (
        ("gguf", "model.gguf", "convert_hf_to_gguf.py"),
        ("gguf-lora", "adapter.gguf", "convert_lora_to_gguf.py"),
    ):
        assert export(capfd, SEED, form, "--to", form)[0] == 0
        (theirs / script).write_text(
            "import shutil, sys\n"
            f"shutil.copy({str(here / form / file)!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
            f"open({str(theirs / 'said')!r}, 'a').write(' '.join(sys.argv) + '\\n')\n"
        )
        code, _, err = export(capfd, SEED, f"{form}-2", "--to", form, "--llama-cpp", theirs)
        assert code == 0, err
        assert (here / f"{form}-2" / file).read_bytes() == (here / form / file).read_bytes()
    first, second = (theirs / "said").read_text().splitlines()
    assert first.endswith("--outtype f16")
    assert f"--base {MODEL_DIR}" in second


@pytest.mark.gguf
def test_llama_cpp_says_the_same(with_all: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """PEFT -> GGUF, whole and as an adapter, scored by llama.cpp."""
    needs_llama_cpp()
    allowed = {"lora": 1e-5, "f32": 1e-5, "f16": 1e-3, "bf16": 1e-2}
    words = {
        "lora": ("gguf-lora",),
        "f32": ("gguf", "--dtype", "float32"),
        "f16": ("gguf",),
        "bf16": ("gguf", "--dtype", "bfloat16"),
    }
    seen = []
    for name, (form, *more) in words.items():
        code, out, err = export(capfd, SEED, name, "--to", form, *more, "--json")
        assert code == 0, err
        (check,) = json.loads(out)["checks"]
        seen.append(f"{name}: at most {check['largest']:.1g} and on average {check['mean']:.1g} nats per token")
        assert check["with"] == "llamacpp"
        assert check["mean"] < allowed[name]
        assert json.loads(out).get("read_otherwise", 0) == 0
    print(*seen, sep="\n")
    rows = exchange.read_check(with_all / "f32/check.jsonl")
    assert scores(with_all / "f32/model.gguf", None, rows, "llamacpp").largest < 1e-4
    assert scores(with_all / "f32/model.gguf", with_all / "lora", rows, "llamacpp").mean > 1e-3, "twice is too much"


def test_the_base_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a GGUF: what a run samples from, with the policy's adapter beside it."""
    pytest.importorskip("gguf")
    code, out, err = export(capfd, "init", "--to", "gguf", "--dtype", "float32", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert (record["source"], record["effect"]) == ("spa-lite-lesson-model", 0)
    assert (here / "spa-lite-lesson-model-gguf/model.gguf").is_file()
    assert "read back: 39 tensors are in the file as they were meant" in err
    assert "wanted change" not in err, "there was none"


@pytest.mark.gguf
@pytest.mark.parametrize("form", ["gguf", "gguf-lora", "ollama"])
def test_llama_cpp_notices_a_wrong_conversion(
    form: str, with_all: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys whose rows stayed in transformers' order, in half precision too."""
    needs_llama_cpp()
    from spa_lite.backends import gguf_check, gguf_lora, gguf_writer

    for module in (gguf_check, gguf_writer, gguf_lora) if form != "gguf-lora" else (gguf_lora,):
        monkeypatch.setattr(module, "permute", lambda weight, heads: weight)
    code, _, err = export(capfd, SEED, "out", "--to", form)
    assert code == 1
    assert re.search(r"was not exported: in llamacpp its tokens are [\d.e-]+ nats apart", err), err
    assert list(with_all.iterdir()) == []


# Ollama


def test_a_folder_for_ollama(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Template, stop texts, how answers are drawn, and the run's system turn."""
    pytest.importorskip("gguf")
    run = a_run(here / "run", **{"model.system": 'Say """hi""".', "sampling.temp": 0.6})
    code, _, err = export(capfd, run, "out", "--to", "ollama")
    assert code == 0, err
    names = ["Modelfile", "check.jsonl", "export.json", "model.gguf"]
    assert sorted(p.name for p in (here / "out").iterdir()) == names
    assert record_of(here / "out")["files"] == names
    commands = parse((here / "out/Modelfile").read_text())
    found = dict(commands)
    assert found["FROM"] == "./model.gguf"
    assert found["PARAMETER temperature"] == "0.6"
    assert found["PARAMETER num_ctx"] == "512"
    assert found["PARAMETER top_k"] == "0"
    assert [value for name, value in commands if name == "PARAMETER stop"] == ["<|end|>"]
    backend = backends.load("torch", ModelSettings(str(MODEL_DIR), device="cpu"))
    tokenizer: Any = backend.tokenizer
    asked = [Message(role="user", content="Name a {{ river }}.")]
    told = [Message(role="system", content="Be kind."), *asked]
    assert go(found["TEMPLATE"], told) == tokenizer.render(told)
    assert go(found["TEMPLATE"], asked) == tokenizer.render([Message(role="system", content='Say """hi""".'), *asked])


def test_a_template_that_ollama_cannot_have(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    (here / "odd.jinja").write_text(
        "{% for m in messages %}[{{ loop.index }}]{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
    )
    code, _, err = export(capfd, SEED, "out", "--to", "ollama", "--template", "odd.jinja")
    assert code == 1
    assert "does more than put text around turns" in err
    assert "--template" in err
    assert not (here / "out").exists()
    code, _, err = export(capfd, SEED, "out", "--to", "ollama", "--template", "plain")
    assert code == 0, err
    assert "User: " in (here / "out/Modelfile").read_text()


# A folder to share


def test_a_folder_to_share(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = a_run(
        here / "somebody-secret" / "spa-1a2b3c4d",
        **{
            "inputs.seed_pairs": "/home/somebody-secret/pairs.jsonl",
            "inputs.prompts": "hub:owner/prompts",
            "inputs.gold": "/home/somebody-secret/gold.jsonl",
            "prompts.personas": "/home/somebody-secret/who.txt",
            "prompts.keywords": "/home/somebody-secret/words.txt",
            "prompts.template": "/home/somebody-secret/ask.txt",
            "judge.adapter": "/home/somebody-secret/adapter",
            "judge.url": "http://token-secret@host-secret:8080/v1",
        },
    )
    code, _, err = export(capfd, run, "out", "--to", "hub-folder", "--round", "seed")
    assert code == 0, err
    folder = here / "out"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "adapter_config.json", WEIGHTS, "check.jsonl", "export.json", "recipe.yaml"]
    )
    for path in folder.iterdir():
        assert b"secret" not in path.read_bytes(), path
        assert str(here).encode() not in path.read_bytes()
    inputs = yaml.safe_load((folder / "recipe.yaml").read_text())["inputs"]
    assert (inputs["seed_pairs"], inputs["prompts"]) == ("pairs.jsonl", "hub:owner/prompts")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("peft", "apache-2.0"), "the lesson's is the project's"
    assert "base_model" not in front, "the built-in model has no name on the hub"
    assert {"lora", "dpo"} <= set(front["tags"])
    assert "| labelled pairs | 100 |" in card
    assert "| held-out prompts | 400 |" in card
    assert "| seed | 74.5 [68.0, 80.0] | 74.5 [68.0, 80.0] |" in card
    assert "round 1" not in card, "later stages say nothing of this one"
    assert "seed: all is well" in card
    assert "spa-lite 0.1.0" in card
    assert "from spa_lite.lesson import MODEL_DIR" in card
    code, _, err = export(capfd, run, "last", "--to", "hub-folder")
    assert code == 0, err
    card = (here / "last/README.md").read_text()
    assert r"&lt;script\>\[x\](y)" in card
    assert "| prompts of round 1 | 40 |" in card


CARDS = {
    "---\nlicense: mit\n---\n# x": "mit",
    "---\nlicense: [mit, '<b>']\n---\n": None,
    "---\nlicense: 'mit | <b>'\n---\n": None,
    "---\n: : [\n---\n": None,
    "no front matter, license: mit": None,
}


@pytest.mark.parametrize("text", CARDS)
def test_the_licence_is_the_bases(text: str, here: Path) -> None:
    from spa_lite import model_card

    model = here / "their-model"
    model.mkdir()
    (model / "README.md").write_text(text)
    recipe = build({"x": {"inputs.model": str(model)}})[0]
    assert model_card.licence_of(recipe, model) == CARDS[text]
    (model / "README.md").unlink()
    (model / "config.json").write_text('{"license": "bsd-3-clause"}')
    assert model_card.licence_of(recipe, model) == "bsd-3-clause"


def test_the_card_of_an_adapter_alone(here: Path) -> None:
    """Nothing is claimed that is not known; what the base is called cannot break out of its place."""
    from spa_lite import model_card

    model = here / "base"
    model.mkdir()
    recipe = build(
        {"x": {"inputs.model": "owner/na`me", "model.system": "a `b`\n# c", "model.template": "/x/t.jinja"}}
    )[0]
    record = {
        "model": "owner/na|me <b>\n# x",
        "source": "mine",
        "backend": "torch",
        "dtype": "float32",
        "effect": 0.0234,
        "checks": [{"with": "torch", "largest": 1e-6}],
    }
    model_card.write_card(here, recipe, None, None, model, record)
    card = (here / "README.md").read_text()
    assert "How it was trained is not known here." in card
    assert "Licence of the base: unknown: see the base model." in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert r"owner/na\|me &lt;b\>\\u000a# x" in card
    assert "the system turn `a 'b' # c`" in card
    assert "the chat template `t.jinja`" in card
    assert "moves a token by 0.023 nats" in card
    assert "## Measures" not in card
    assert not (here / "recipe.yaml").exists()
    assert yaml.safe_load(model_card.front("owner/name", "mit"))["base_model"] == "owner/name"


class Hub:
    """Stands for huggingface_hub's HfApi."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    fails = False

    def create_repo(self, repo: str, **words: Any) -> str:
        if self.fails:
            raise OSError("401 Unauthorized\nmore")
        self.calls.append(("create_repo", {"repo": repo, **words}))
        return f"https://hub.example/{repo}"

    def upload_folder(self, **words: Any) -> None:
        assert (Path(words["folder_path"]) / "README.md").is_file()
        self.calls.append(("upload_folder", words))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """The hub, as far as an upload sees it."""
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls, Hub.fails = [], False
    return Hub


def test_nothing_is_uploaded_unless_it_is_asked_for(
    here: Path, hub: type[Hub], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [SEED, "out", "--to", "hub-folder", "--force"]
    assert export(capfd, *words)[0] == 0
    assert hub.calls == []
    code, _, err = export(capfd, *words, "--upload", "me/mine")
    assert code == 0, err
    assert "uploaded to https://hub.example/me/mine" in err
    folder = {"repo_id": "me/mine", "folder_path": "out"}
    assert hub.calls == [
        ("create_repo", {"repo": "me/mine", "private": True, "exist_ok": True}),
        ("upload_folder", folder),
    ]
    hub.calls.clear()
    assert export(capfd, *words, "--upload", "me/mine", "--public")[0] == 0
    assert hub.calls[0][1]["private"] is False
    hub.fails = True
    code, _, err = export(capfd, *words, "--upload", "me/mine")
    assert code == 1
    assert "out was written, but not uploaded to me/mine: 401 Unauthorized; try: hf upload me/mine out" in err
    assert (here / "out/README.md").is_file()
