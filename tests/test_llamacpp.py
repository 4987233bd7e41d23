"""The llama.cpp backend beside PyTorch: log-probs, samples, adapters, tokenizers, and what is refused."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_lite import backends
from spa_lite.backend import INIT, POLICY, Backend, Lora, ModelSettings, Sampling
from spa_lite.backends import adapter_files
from spa_lite.backends.gguf_header import read_header
from spa_lite.backends.gguf_lora import write_lora
from spa_lite.backends.gguf_writer import write_model
from spa_lite.errors import BackendError, ModelError, SpaError
from spa_lite.lesson import MODEL_DIR
from spa_lite.records import Message, Row
from tests.contract import conversation, draw, names, pairs, prompts, score, sums, texts
from tests.tiny import make_adapter, make_gguf, make_model, make_tokenizer

pytestmark = [
    pytest.mark.gguf,
    pytest.mark.skipif(bool(backends.missing("llamacpp")), reason="llama-cpp-python is not installed"),
    pytest.mark.skipif(bool(backends.missing("torch")), reason="PyTorch, which it is compared with, is not installed"),
]

TEXTS = (
    "Hello there, it's 12345 o'clock; 3.14 + 22 = 25.14",
    "naïve café, 東京, привет, 🙂👍🏽, ¿qué?",
    "  two  blanks,\ta tab\n\n\nlines \r\n",
    "the baker paints <|end|> seven plums <|user|>",
    "DON'T I'll we've",
    "٣٤٥ ½ ² x²",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in PyTorch's and in GGUF form, and an adapter."""
    made = tmp_path_factory.mktemp("tiny")
    make_gguf(made)
    make_adapter(made, made / "adapter")
    return made


@pytest.fixture(scope="module")
def in_torch(folder: Path) -> Backend:
    return backends.load("torch", ModelSettings(str(folder), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def in_gguf(folder: Path) -> Backend:
    return loaded(folder / "gguf" / "llama-f32.gguf")


def loaded(path: Path, **settings: Any) -> Backend:
    return backends.load(None, ModelSettings(str(path), **settings))


def drawn_rows(backend: Backend) -> list[Row]:
    """Prompts and two sampled answers to each."""
    asked = prompts(backend)
    drawn = draw(backend, asked, names(4, 2), Sampling(temperature=1.0, max_tokens=40))
    return [Row(prompt=ids, responses=tuple(c.ids for c in some)) for ids, some in zip(asked, drawn, strict=True)]


def per_token(backend: Backend, rows: Sequence[Row], role: str = POLICY) -> np.ndarray:
    return np.array([p for some in score(backend, rows, role, True) for one in some for p in one.per_token or ()])


def off(one: Backend, other: Backend, rows: Sequence[Row]) -> float:
    """The largest difference of a token's log-prob, in nats."""
    return float(np.abs(per_token(one, rows) - per_token(other, rows)).max())


def bound(backend: Backend, adapter: Path | None) -> Backend:
    backend.bind(POLICY, adapter)
    return backend


# Numbers


@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_log_probs_and_samples_are_pytorchs(
    folder: Path, in_torch: Backend, in_gguf: Backend, adapter: str | None
) -> None:
    for backend in (in_torch, in_gguf):
        bound(backend, folder / adapter if adapter else None)
    rows = drawn_rows(in_torch)
    assert off(in_torch, in_gguf, rows) < 2e-5
    asked, key = prompts(in_torch), names(4, 3)
    for sampling in (Sampling(1.0, 1.0, 30), Sampling(0.7, 0.9, 30), Sampling(0.0, 1.0, 12)):
        assert texts(draw(in_gguf, asked, key, sampling)) == texts(draw(in_torch, asked, key, sampling))
    if adapter:
        assert np.abs(sums(in_gguf, rows) - sums(in_gguf, rows, INIT)).min() > 0.01, "the adapter does something"


@pytest.mark.parametrize(("dtype", "mean"), [("f16", 3e-3), ("bf16", 3e-2)])
def test_half_precision_is_near(folder: Path, in_torch: Backend, dtype: str, mean: float) -> None:
    """On a CPU llama.cpp rounds what goes into a product as it does the weights: most of the difference is that."""
    backend = loaded(make_gguf(folder, dtype=dtype))
    rows = drawn_rows(bound(in_torch, folder / "adapter"))
    found = np.abs(per_token(in_torch, rows) - per_token(bound(backend, folder / "adapter"), rows))
    print(f"{dtype}: {found.mean():.1e} nats off on average, {found.max():.1e} at most")
    assert 0 < found.mean() < mean
    assert found.max() < 10 * mean
    assert backend.description["dtype"] == {"f16": "float16", "bf16": "bfloat16"}[dtype]
    assert backend.description["keys_and_values"] == "float32"


def test_a_file_unpacked_to_float32_is_exact(folder: Path, tmp_path: Path) -> None:
    """The lesson's weights are 16-bit numbers, so that nothing is lost in the file: what is off without --dtype float32
    is llama.cpp's arithmetic."""
    path = tmp_path / "lesson.gguf"
    write_model(MODEL_DIR, path, "f16")
    torch = backends.load("torch", ModelSettings(str(MODEL_DIR), device="cpu"))
    rows = drawn_rows(torch)
    rounded, exact = loaded(path), loaded(path, dtype="float32")
    print(f"f16 as it is: {off(torch, rounded, rows):.1e} nats off at most, unpacked: {off(torch, exact, rows):.1e}")
    assert off(torch, exact, rows) < 1e-4 < off(torch, rounded, rows)
    assert (exact.description["dtype"], exact.description["bits"]) == ("float32", 32)
    assert exact.fingerprint == rounded.fingerprint, "the same file"


def test_a_quantised_file_is_scored_as_it_is(folder: Path, in_torch: Backend, tmp_path: Path) -> None:
    import llama_cpp.llama_cpp as api

    asked = api.llama_model_quantize_default_params()
    asked.ftype, out = api.LLAMA_FTYPE_MOSTLY_Q8_0, tmp_path / "q8.gguf"
    source = folder / "gguf" / "llama-f32.gguf"
    assert api.llama_model_quantize(bytes(source), bytes(out), ctypes.byref(asked)) == 0
    shutil.copy(folder / "tokenizer.json", tmp_path)
    backend = bound(loaded(out), folder / "adapter")
    found = off(bound(in_torch, folder / "adapter"), backend, drawn_rows(in_torch))
    print(f"q8_0: largest difference {found:.1e} nats")
    assert 1e-4 < found < 1
    about = backend.description
    assert (about["dtype"], about["bits"], about["keys_and_values"]) == ("q8_0", 8, "float16")


def test_the_packages_own_log_probs_are_one_place_off(folder: Path, in_gguf: Backend) -> None:
    """Why `create_completion(echo=True, logprobs=...)` is not used: what it lists is the next position's."""
    from llama_cpp import Llama

    model = Llama(
        str(folder / "gguf" / "llama-f32.gguf"), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    try:
        text = "the baker paints seven plums and forgets the blue door"
        ids = tuple(model.tokenize(text.encode(), add_bos=False))
        listed: Any = model.create_completion(text, max_tokens=1, echo=True, logprobs=1, temperature=0.0)
        theirs = listed["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
        model.reset()
        model.eval(list(ids))
        raw = np.array(model.scores[: len(ids)], dtype=np.float64)
    finally:
        model.close()
    table = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    right = np.array([table[i - 1, ids[i]] for i in range(1, len(ids))])
    ours = per_token(bound(in_gguf, None), [Row(prompt=ids[:1], responses=(ids[1:],))])
    assert ours == pytest.approx(right, abs=1e-5)
    assert np.abs(np.array(theirs, dtype=np.float64) - right).max() > 0.1


def test_a_zero_adapter_has_log_ratio_zero(in_gguf: Backend) -> None:
    """Policy and init are the same file, so nothing but an adapter can tell them apart."""
    in_gguf.bind(POLICY, None, Lora())
    in_gguf.bind(INIT)
    rows = pairs(in_gguf)
    assert (sums(in_gguf, rows, POLICY) == sums(in_gguf, rows, INIT)).all()


def test_the_sequences_in_use_stay_neighbours(in_gguf: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else llama.cpp would compute them one by one. And a room for few gives what a room for all gives."""
    from spa_lite.backends import llamacpp_model as module

    seen: list[list[int]] = []
    real = module.Context._decode

    def spy(self: Any, tokens: Any, owner: Any, wanted: Any) -> Any:
        seen.append(list(owner))
        return real(self, tokens, owner, wanted)

    monkeypatch.setattr(module.Context, "_decode", spy)
    backend = bound(in_gguf, None)
    asked, key, sampling = prompts(backend) * 3, names(12, 3), Sampling(1.0, 1.0, 30)
    whole = texts(draw(backend, asked, key, sampling))
    steps = [owner for owner in seen if len(set(owner)) == len(owner)]
    assert len(steps) > 10
    assert all(owner == list(range(len(owner))) for owner in steps)
    assert {len(owner) for owner in steps} > {36}
    monkeypatch.setattr(module, "CACHE", 1)
    seen.clear()
    assert texts(draw(backend, asked, key, sampling)) == whole
    assert max(max(owner) for owner in seen) == 2, "three at a time"


def test_answers_beyond_what_a_context_holds(in_gguf: Backend) -> None:
    backend = bound(in_gguf, None)
    with pytest.raises(BackendError, match="at most 256 answers"):
        draw(backend, prompts(backend)[:1], names(1, 257), Sampling(max_tokens=2))
    row = pairs(backend)[0]
    many = Row(prompt=row.prompt, responses=row.responses * 150)
    found = sums(backend, [many]).reshape(-1, 2)
    assert found == pytest.approx(np.tile(sums(backend, [row]), (150, 1)), abs=1e-4)


# Adapters


def test_adapters_of_every_form_do_the_same(folder: Path, in_gguf: Backend, tmp_path: Path) -> None:
    import safetensors.numpy as safetensors

    rows = pairs(in_gguf)
    expected = sums(bound(in_gguf, folder / "adapter"), rows)
    stored = adapter_files.read(folder / "adapter", safetensors.load_file)
    adapter_files.write_mlx_lm(tmp_path / "mlx", stored)
    (tmp_path / "own").mkdir()
    write_lora(stored, json.loads((folder / "config.json").read_text()), tmp_path / "own" / "adapter.gguf")
    for form in ("mlx", "own", "own/adapter.gguf"):
        assert sums(bound(in_gguf, tmp_path / form), rows) == pytest.approx(expected, abs=1e-6), form
    again = tmp_path / "again.gguf"
    write_lora(stored, json.loads((folder / "config.json").read_text()), again)
    assert again.read_bytes() == (tmp_path / "own" / "adapter.gguf").read_bytes()


def test_any_number_of_adapters_share_the_base(folder: Path, in_torch: Backend, in_gguf: Backend) -> None:
    rows, expected = pairs(in_torch), {}
    changes: list[dict[str, Any]] = [{}, {"lora_alpha": 3.0}, {"use_rslora": True}, {"lora_alpha": -4.0}]
    for i, change in enumerate(changes):
        path = make_adapter(folder, folder / f"role{i}", seed=i, rank=2 + i, **change)
        expected[path] = sums(bound(in_torch, path), rows)
        in_gguf.bind(path.name, path)
    in_gguf.bind(INIT)
    base = sums(in_gguf, rows, INIT)
    for path, found in reversed(expected.items()):
        assert sums(in_gguf, rows, path.name) == pytest.approx(found, abs=2e-4)
        assert (sums(in_gguf, rows, INIT) == base).all()
    one = in_gguf.stream(prompts(in_gguf)[0], Sampling(1.0, 1.0, 20), b"0" * 16, "role0")
    begun = next(one)
    for path in expected:
        in_gguf.unbind(path.name)
    with pytest.raises(BackendError, match="role0"):
        list(one)  # the adapter is still there for whoever uses it, but the role is gone
    assert begun >= 0


def test_what_a_gguf_adapter_cannot_hold_is_refused(folder: Path, in_gguf: Backend, tmp_path: Path) -> None:
    import safetensors.numpy as safetensors

    other = make_model(tmp_path / "other", hidden_size=32, intermediate_size=48)
    deep = make_model(tmp_path / "deep", num_hidden_layers=3)
    embedded = make_adapter(folder, tmp_path / "embedded")
    weights = embedded / "adapter_model.safetensors"
    tensors = safetensors.load_file(weights)
    prefix = "base_model.model.model.embed_tokens"
    tensors[f"{prefix}.lora_A.weight"] = np.ones((4, 64), np.float32)
    tensors[f"{prefix}.lora_B.weight"] = np.ones((384, 4), np.float32)
    safetensors.save_file(tensors, weights)
    cases: dict[str, Path] = {
        "use_dora": make_adapter(folder, tmp_path / "dora", use_dora=True),
        "rank_pattern": make_adapter(folder, tmp_path / "ranks", rank_pattern={"q_proj": 2}),
        "lora_alpha of 0": make_adapter(folder, tmp_path / "zero", lora_alpha=0),
        "has rank 5, but 4 in": make_adapter(folder, tmp_path / "five", r=5),
        "does not fit .* where the base needs": make_adapter(other, tmp_path / "narrow"),
        "the base has only 2 layers": make_adapter(deep, tmp_path / "third"),
        "embed_tokens, which is no linear layer": embedded,
        "is no LoRA adapter": folder / "gguf" / "llama-f32.gguf",
        "is no adapter folder": tmp_path,
        "is no GGUF file": weights,
    }
    rows = pairs(in_gguf)
    before, temporary = sums(bound(in_gguf, folder / "adapter"), rows), set(Path(tempfile.gettempdir()).iterdir())
    for said, path in cases.items():
        with pytest.raises(ModelError, match=said) as caught:
            in_gguf.bind(POLICY, path)
        assert len(str(caught.value).splitlines()) == 1
    left = set(Path(tempfile.gettempdir()).iterdir()) - temporary
    assert not [path for path in left if path.name.startswith("spa-lite-")]
    assert (sums(in_gguf, rows) == before).all(), "the role is what it was"


# Tokenizers


def same_ids(one: Backend, other: Backend) -> None:
    for text in TEXTS:
        talk = [Message(role="user", content=text)]
        assert one.tokenizer.encode_prompt(talk) == other.tokenizer.encode_prompt(talk), text
        ids = one.tokenizer.encode_answer(talk, text)
        assert ids == other.tokenizer.encode_answer(talk, text), text
        assert one.tokenizer.decode(ids) == other.tokenizer.decode(ids)
    assert one.tokenizer.stop_ids == other.tokenizer.stop_ids


def test_the_lesson_model_is_read_as_pytorch_reads_it(tmp_path: Path) -> None:
    write_model(MODEL_DIR, tmp_path / "lesson.gguf", "f16")
    backend = loaded(tmp_path / "lesson.gguf")
    same_ids(backend, backends.load("torch", ModelSettings(str(MODEL_DIR), device="cpu")))
    assert backend.shape == backends.load("torch", ModelSettings(str(MODEL_DIR), device="cpu")).shape
    shutil.copy(tmp_path / "lesson.gguf", tmp_path / "other name.gguf")
    assert loaded(tmp_path / "other name.gguf").fingerprint == backend.fingerprint


def split_digits(folder: Path) -> None:
    """Give a model folder a tokenizer that splits as SmolLM2's does: each digit alone."""
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')


def test_a_tokenizer_like_smollm2s_is_read_from_the_file(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "smollm2")
    split_digits(folder)
    write_model(folder, tmp_path / "smol.gguf", "f32")
    assert read_header(tmp_path / "smol.gguf").token("pre") == "smollm"
    same_ids(loaded(tmp_path / "smol.gguf"), backends.load("torch", ModelSettings(str(folder), device="cpu")))


def test_a_tokenizer_beside_the_file_wins_if_it_is_the_models(folder: Path, tmp_path: Path) -> None:
    file, beside = tmp_path / "model.gguf", tmp_path / "tokenizer.json"
    shutil.copy(folder / "gguf" / "llama-f32.gguf", file)
    spec = json.loads((folder / "tokenizer.json").read_text())
    talk, within = conversation("A Heron"), loaded(file).tokenizer
    beside.write_text(json.dumps(spec | {"normalizer": {"type": "Lowercase"}}))
    assert loaded(file).tokenizer.encode_prompt(talk) == within.encode_prompt(conversation("a heron"))
    words = spec["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    beside.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match=r"is not this model's tokenizer: '[ab]' is token"):
        loaded(file)
    beside.write_text("{")
    with pytest.raises(ModelError, match=r"cannot be read .*tokenizer\.json"):
        loaded(file)


def test_a_tokenizer_that_two_libraries_read_differently_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spa_lite.backends.llamacpp_model import Net

    real = Net.tokenize
    monkeypatch.setattr(Net, "tokenize", lambda self, text: real(self, text)[:-1])
    with pytest.raises(ModelError, match=r"read text differently.*put the model's tokenizer\.json"):
        loaded(folder / "gguf" / "llama-f32.gguf")


# Files and settings


def test_the_header_is_what_ggufs_own_reader_reads(folder: Path) -> None:
    from gguf import GGUFReader

    path = folder / "gguf" / "llama-f32.gguf"
    ours, theirs = read_header(path), GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.values == expected
    assert {name: (t.kind, list(t.shape)) for name, t in ours.tensors.items()} == {
        t.name: (t.tensor_type.name, t.shape.tolist()[::-1]) for t in theirs.tensors
    }


def test_a_damaged_file_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    whole, path, rng = (folder / "gguf" / "llama-f32.gguf").read_bytes(), tmp_path / "x.gguf", random.Random(0)
    for case in range(60):
        cut = bytearray(whole[: rng.randrange(len(whole))] if case % 2 else whole)
        for _ in range(3) if not case % 2 else ():
            cut[rng.randrange(min(len(cut), 9000))] = rng.randrange(256)
        path.write_bytes(cut)
        said = refusal(path)
        assert len(said.splitlines()) <= 1
        assert said or not case % 2, "a file that is cut short is noticed"


def refusal(path: Path) -> str:
    """Why a file's header cannot be read; "" if it can."""
    try:
        read_header(path)
    except ModelError as error:
        return str(error)
    return ""


def rewritten(source: Path, out: Path, changes: dict[bytes, bytes]) -> Path:
    data = source.read_bytes()
    for before, after in changes.items():
        assert len(before) == len(after)
        assert before in data
        data = data.replace(before, after)
    out.write_bytes(data)
    return out


def test_what_cannot_be_loaded_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    import safetensors.numpy as safetensors

    source = folder / "gguf" / "llama-f32.gguf"
    stored = adapter_files.read(folder / "adapter", safetensors.load_file)
    write_lora(stored, json.loads((folder / "config.json").read_text()), tmp_path / "lora.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "short.gguf").write_bytes(source.read_bytes()[:-1000])
    rewritten(
        source, tmp_path / "kind.gguf", {b"llama.": b"lamma.", b"\5\0\0\0\0\0\0\0llama": b"\5\0\0\0\0\0\0\0lamma"}
    )
    rewritten(source, tmp_path / "norm.gguf", {b"output_norm.weight": b"output_morn.weight"})
    cases = {
        "lora.gguf": "is an adapter, not a model",
        "text.gguf": "is no GGUF file",
        "folder.gguf": "is a folder, and llama.cpp reads one file",
        "short.gguf": "damaged or cut short",
        "kind.gguf": "llama.cpp cannot load .*unknown model architecture",
        "norm.gguf": "llama.cpp cannot load .*output_norm",
        "absent.gguf": "there is no file",
    }
    for name, said in cases.items():
        with pytest.raises(ModelError, match=said) as caught:
            loaded(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    settings: list[tuple[dict[str, Any], str]] = [
        ({"device": "cuda"}, "auto, cpu or gpu"),
        ({"dtype": "float16"}, "leave --dtype out"),
        ({"load_in_4bit": True}, "leave --load-in-4bit out"),
    ]
    for given, said in settings:
        with pytest.raises(BackendError, match=said):
            loaded(source, **given)
    with pytest.raises(SpaError, match="is a GGUF file: leave --backend out"):
        backends.load("torch", ModelSettings(str(source)))


def test_threads_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_lite.backends.llamacpp_model import threads

    for said, expected in (("3", 3), ("2,4", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert threads() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads() >= 1


# The command line


def said_by(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr (its lines joined) of a command in this process."""
    from spa_lite.cli.main import main

    monkeypatch.setattr(sys, "argv", ["spa-lite", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code, out, " ".join(err.split())


def test_the_commands_that_sample_and_score(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first in a program of its own: neither llama.cpp nor the end of the program prints anything."""
    model = ["--model", str(folder / "gguf" / "llama-f32.gguf"), "--adapter-path", str(folder / "adapter")]
    asked, samples, pairs_ = (tmp_path / name for name in ("prompts.jsonl", "samples.jsonl", "pairs.jsonl"))
    asked.write_text("".join(json.dumps({"id": str(i), "prompt": f"a heron {i}"}) + "\n" for i in range(3)))
    pairs_.write_text(json.dumps({"prompt": "a heron", "chosen": "two plums", "rejected": "no"}) + "\n")
    room = ["--set", "lengths.max_prompt_length=100", "--set", "sampling.max_tokens=8", "--set", "rounds=1"]
    program = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "spa_lite.cli"]
    sampled = subprocess.run(
        [*program, "sample", *model, "--prompts", str(asked), *room, "-o", str(samples)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert sampled.returncode == 0, sampled.stderr
    assert all(line.startswith((str(asked), "round 1 sample")) for line in sampled.stderr.splitlines()), sampled.stderr
    code, out, err = said_by(capsys, monkeypatch, "judge", str(samples), *model, *room)
    assert code == 0, err
    assert [json.loads(line)["judge"] for line in out.splitlines()] == ["implicit"] * 3
    held = ("eval", *model, "--held-out", str(pairs_), *room, "--out", str(tmp_path / "eval"), "--json")
    code, out, err = said_by(capsys, monkeypatch, *held)
    assert code == 0, err
    code, out, err = said_by(capsys, monkeypatch, "doctor", *model[:2], "--json")
    found = json.loads(out)
    assert (code, found["backend"]["why"]) == (0, "the model is a GGUF file")
    assert {check["passed"] for check in found["checks"]} == {True}


def test_a_file_is_judged_against_itself_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Beside any other model the difference of the roundings would be taken for a reward."""
    file, half, pair = folder / "gguf" / "llama-f32.gguf", make_gguf(folder, dtype="f16"), tmp_path / "pair.jsonl"
    pair.write_text(json.dumps({"prompt": "a heron", "a": "two plums", "b": "no"}) + "\n")
    for model, other in ((file, folder), (folder, file), (file, half)):
        both = ("--model", str(model), "--init-model", str(other))
        code, _, err = said_by(capsys, monkeypatch, "judge", str(pair), *both)
        assert code == 2
        assert "the policy and its reference must be the same file" in err


def test_gguf_adapters_and_models_are_named_as_any_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import safetensors.numpy as safetensors

    config, pair = json.loads((folder / "config.json").read_text()), tmp_path / "pair.jsonl"
    pair.write_text(json.dumps({"prompt": "a heron", "a": "two plums", "b": "no"}) + "\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        stored = adapter_files.read(make_adapter(folder, tmp_path / "peft", seed=len(name)), safetensors.load_file)
        stored.config["lora_alpha"] = {"one": 4.0, "two": 8.0}[name]
        write_lora(stored, config, tmp_path / name / "adapter.gguf")
    model = str(folder / "gguf" / "llama-f32.gguf")
    adapters = ("--adapter-path", str(tmp_path / "one"), "--init-adapter", str(tmp_path / "two" / "adapter.gguf"))
    code, out, err = said_by(capsys, monkeypatch, "judge", str(pair), "--model", model, *adapters)
    assert code == 0, err
    assert abs(json.loads(out)["logratio_a"]) > 1e-3
    same = (*adapters[:3], str(tmp_path / "one"))
    code, _, err = said_by(capsys, monkeypatch, "judge", str(pair), "--model", model, *same)
    assert (code, "policy equals its reference" in err) == (2, True)
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"id": str(i), "prompt": f"a heron {i}"}) + "\n" for i in range(3)))
    sides = (
        "--a",
        model,
        "--b",
        str(tmp_path / "one"),
        "--model",
        model,
        "--prompts",
        str(asked),
        "--judge",
        "longest",
    )
    room = ["--set", "lengths.max_prompt_length=100", "--set", "lengths.max_length=200", "--max-tokens", "8"]
    code, out, err = said_by(capsys, monkeypatch, "eval", *sides, *room, "--out", str(tmp_path / "eval"), "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[0])


def test_hidden_states_are_refused(in_gguf: Backend) -> None:
    asked = prompts(in_gguf)[:1]
    with pytest.raises(BackendError, match="keeps no hidden states"):
        list(in_gguf.sample(asked, 1, Sampling(), names(1, 1), POLICY, lambda *_: None))


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--model", "x.gguf"],
        ["run", "--model", "x.gguf", "--dry-run"],
        ["run", "--backend", "llamacpp"],
        ["train", "pairs.jsonl", "--out", "adapter", "--model", "x.gguf"],
        ["ablate", "--vary", "seed_dpo.epochs=1,2", "--model", "x.gguf"],
    ],
)
def test_training_is_refused_before_any_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even before it is looked whether the files are there."""
    monkeypatch.chdir(tmp_path)
    code, _, err = said_by(capsys, monkeypatch, *words)
    assert "llama.cpp only samples and scores: train in torch or MLX" in err
    assert code == 1
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_other_library(folder: Path) -> None:
    """Of a GGUF file the outline is the thing itself: its tokens can be counted, its memory estimated."""
    from spa_lite.backends.outline import outline

    found = outline(None, ModelSettings(str(folder / "gguf" / "llama-f32.gguf")))
    assert found.name == "llamacpp"
    assert found.shape is not None
    assert (found.shape.layers, found.shape.kv_heads, found.shape.tied) == (2, 2, False)
    assert found.tokenizer.encode_prompt(conversation("a heron"))
