"""What only the PyTorch backend promises: its numerics against naive code, PEFT folders, devices, refusals."""

# ruff: noqa: E402 (what follows can be imported only if the libraries are there)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from spa_lite import keys
from spa_lite.backend import INIT, POLICY, PREVIOUS, Batching, Lora, ModelSettings, Optimizer, Sampling
from spa_lite.backends import load, torch_head, torch_sampling
from spa_lite.backends.quiet import quiet
from spa_lite.backends.torch import TorchBackend
from spa_lite.errors import BackendError, ModelError
from spa_lite.objective import Dpo
from spa_lite.records import Row
from spa_lite.stages.workbench import read_judgements
from tests.contract import LORA, OPTIMIZER, Mixed, draw, names, pairs, prompts, score, sums, texts
from tests.crash import recipe_of
from tests.small import run_small
from tests.tiny import make_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """For matrices this small a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


def settings(folder: Path, **more: Any) -> ModelSettings:
    """Settings for the CPU."""
    return ModelSettings(**{"model": str(folder), "device": "cpu"} | more)


def moved(folder: Path, steps: int = 2, **more: Any) -> TorchBackend:
    """A backend whose policy has made a few steps away from PREVIOUS."""
    backend = TorchBackend(settings(folder, **more))
    backend.bind(POLICY, None, LORA)
    backend.snapshot()
    backend.start_training(OPTIMIZER)
    for _ in range(steps):
        backend.dpo_step(pairs(backend), Dpo(0.5), 1e-2)
    return backend


@pytest.fixture(scope="module")
def backend(folder: Path) -> TorchBackend:
    """One such backend for tests that change nothing."""
    return moved(folder)


# Drawing


def test_draws_on_four_probabilities() -> None:
    """Worked by hand: 0.1, 0.2, 0.3, 0.4."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(6, 1)
    uniforms = torch.tensor([0.05, 0.15, 0.31, 0.59, 0.61, 0.99])
    assert torch_sampling.draw(logits, Sampling(1.0), uniforms).tolist() == [0, 1, 2, 2, 3, 3]
    # Temperature 0.5 squares them: 1, 4, 9, 16 of 30, cumulative 0.033, 0.167, 0.467, 1.
    assert torch_sampling.draw(logits, Sampling(0.5), uniforms).tolist() == [1, 1, 2, 3, 3, 3]
    # The nucleus of 0.6 is {3, 2}, renormalised to 3/7 and 4/7 in vocabulary order: cumulative 0, 0, 0.429, 1.
    assert torch_sampling.draw(logits, Sampling(1.0, 0.6), uniforms).tolist() == [2, 2, 2, 3, 3, 3]
    assert torch_sampling.draw(logits, Sampling(1.0, 0.4), uniforms).tolist() == [3] * 6
    assert torch_sampling.draw(logits, Sampling(0.0), uniforms).tolist() == [3] * 6


def test_a_nucleus_breaks_ties_by_the_lower_id() -> None:
    kept = torch_sampling.nucleus(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), 0.5)
    assert kept.tolist() == [[0.25, 0.25, 0.0, 0.0]]


@pytest.mark.parametrize("size", [5, 256, 257, 5000])
def test_the_blocked_cdf_is_the_plain_one(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = rng.random((400, size)) * (rng.random((400, size)) < 0.3)
    weights[:, size // 2] += 1e-3
    uniforms = rng.random(400)
    cumulative = weights.cumsum(axis=1)
    target = uniforms * cumulative[:, -1]
    clear = np.abs(cumulative - target[:, None]).min(axis=1) > 1e-5 * cumulative[:, -1]
    expected = np.array([np.searchsorted(row, u, side="right") for row, u in zip(cumulative, target, strict=True)])
    found = torch_sampling.inverse_cdf(torch.tensor(weights, dtype=torch.float32), torch.tensor(uniforms).float())
    assert (found.numpy() == expected)[clear].all()
    assert (weights[np.arange(400), found.numpy()] > 0).all(), "a token of no weight is never drawn"


@pytest.mark.parametrize("uniform", [1e-7, 1 - 1e-7])
def test_the_ends_of_the_unit_interval_are_safe(uniform: float) -> None:
    weights = torch.zeros(1, 600)
    weights[0, [3, 300, 550]] = torch.tensor([0.2, 0.3, 0.5])
    expected = 3 if uniform < 0.5 else 550
    assert torch_sampling.inverse_cdf(weights, torch.tensor([np.float32(uniform)])).item() == expected


# Caches, heads and tiles: other ways to the same numbers


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_model_run_whole_gives_the_same_numbers(architecture: str, tmp_path: Path) -> None:
    """The slow way for models whose logits are not head(body(ids))."""
    make_model(tmp_path, architecture)
    halves, whole = moved(tmp_path, 0), moved(tmp_path, 0)
    assert not halves.net.whole
    whole.net.whole, whole.net._entry = True, whole.net.model
    for _ in range(2):
        left = halves.dpo_step(pairs(halves), Mixed(0.5), 1e-2)
        right = whole.dpo_step(pairs(whole), Mixed(0.5), 1e-2)
        assert right.loss == pytest.approx(left.loss, abs=1e-5)
        assert right.grad_norm == pytest.approx(left.grad_norm, rel=1e-3)
    sampling = Sampling(1.0, 1.0, 20)
    found = [texts(draw(one, prompts(one), names(4, 2), sampling)) for one in (halves, whole)]
    assert found[0] == found[1]


def test_a_head_that_leaves_something_out_is_noticed(tmp_path: Path) -> None:
    """Gemma-2's soft cap, hidden from the code that looks for it."""
    backend = moved(make_model(tmp_path, "gemma2"), 0)
    backend.net._cap = None
    assert not backend.net._halves_agree()


def test_tiles_and_checkpointing_change_memory_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = moved(folder)
    rows = pairs(plain, 8)
    others = [moved(folder, batching=Batching(checkpointed=layers)) for layers in (1, 9)]
    results = [(backend.dpo_step(rows, Mixed(0.5), 1e-2), sums(backend, rows)) for backend in (plain, *others)]
    monkeypatch.setattr(torch_head, "tile_size", lambda net: 5)
    tiled = moved(folder)
    results.append((tiled.dpo_step(rows, Mixed(0.5), 1e-2), sums(tiled, rows)))
    for stats, after in results[1:]:
        assert stats.loss == pytest.approx(results[0][0].loss, abs=1e-5)
        assert stats.grad_norm == pytest.approx(results[0][0].grad_norm, rel=1e-3)
        assert after == pytest.approx(results[0][1], abs=2e-3)


def test_a_step_is_that_of_naive_code(folder: Path, tmp_path: Path) -> None:
    """Full logits, autograd through the loss itself, PEFT and AdamW as anybody would write it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backend = moved(folder)
    backend.save(tmp_path / "policy")
    backend.save(tmp_path / "previous", PREVIOUS)
    rows = pairs(backend)
    backend.start_training(Optimizer(eps=1e-4, weight_decay=0.1, max_grad_norm=0.5))
    stats = backend.dpo_step(rows, Dpo(0.3), 1e-2)
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / "policy", "policy", is_trainable=True)
        model.load_adapter(tmp_path / "previous", "previous")

    def total(row: Row, side: int) -> Any:
        ids = torch.tensor([[*row.prompt, *row.responses[side]]])
        logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return logps[len(row.prompt) - 1 :].sum()

    model.set_adapter("previous")
    with torch.no_grad():
        reference = [[total(row, side) for side in (0, 1)] for row in rows]
    model.set_adapter("policy")
    ratios = [[total(row, side) - reference[i][side] for side in (0, 1)] for i, row in enumerate(rows)]
    loss = torch.stack([-torch.nn.functional.logsigmoid(0.3 * (one - two)) for one, two in ratios]).mean()
    loss.backward()
    mine = [p for n, p in model.named_parameters() if ".policy." in n]
    norm = torch.nn.utils.clip_grad_norm_(mine, 0.5)
    torch.optim.AdamW(mine, lr=1e-2, eps=1e-4, weight_decay=0.1).step()
    with torch.no_grad():
        after = [float(total(row, side)) for row in rows for side in (0, 1)]
    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert sums(backend, rows) == pytest.approx(after, abs=2e-3)


def test_low_precision_models_are_scored_in_float32(folder: Path) -> None:
    """bfloat16 holds 8 bits: sums of bfloat16 log-probs would lie on a coarse grid."""
    low = moved(folder, dtype="bfloat16")
    high = moved(folder, dtype="float32")
    assert low.description["dtype"] == "bfloat16"
    assert low.description["bits"] == 16
    assert all(tensor.dtype == torch.float32 for tensor in low.adapters.tensors(low._roles[POLICY] or "").values())
    scores = [one for some in score(low, pairs(low), per_token=True) for one in some]
    values = torch.tensor([value for one in scores for value in one.per_token or ()], dtype=torch.float64)
    assert (values != values.bfloat16().double()).double().mean() > 0.9
    assert sums(low, pairs(low)) == pytest.approx(sums(high, pairs(high)), rel=0.1)
    drawn = draw(low, prompts(low), names(4, 2), Sampling(1.0, 1.0, 20))
    rows = [Row(prompt=p, responses=tuple(c.ids for c in some)) for p, some in zip(prompts(low), drawn, strict=True)]
    recorded = [value for some in drawn for c in some for value in c.logprobs]
    again = [value for some in score(low, rows, per_token=True) for one in some for value in one.per_token or ()]
    assert np.abs(np.array(recorded) - np.array(again)).mean() < 0.05


# Adapters


def test_a_fresh_adapter_comes_from_the_named_streams(backend: TorchBackend) -> None:
    backend.bind("fresh", None, Lora(rank=3, alpha=6.0, targets=("q_proj", "mlp.down_proj"), seed=11))
    found = backend.adapters.tensors(backend._roles["fresh"] or "")
    backend_names = {key.rpartition(".lora_")[0] for key in found}
    expected = {
        f"base_model.model.model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert backend_names == expected
    for key, tensor in found.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").partition(".lora_A")[0]
            assert (tensor.detach().numpy() == keys.lora_a(11, module, 3, tensor.shape[1])).all()
        else:
            assert not tensor.any()
    backend.unbind("fresh")


def test_all_linear_leaves_the_head_alone(backend: TorchBackend) -> None:
    adapted = {key.split(".")[-3] for key in backend.adapters.tensors(backend._roles[POLICY] or "")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_head_may_be_adapted_if_asked(folder: Path) -> None:
    backend = TorchBackend(settings(folder))
    backend.bind(POLICY, None, Lora(rank=2, targets=("lm_head", "q_proj")))
    backend.snapshot()
    backend.start_training(OPTIMIZER)
    for _ in range(3):
        stats = backend.dpo_step(pairs(backend), Mixed(0.5), 1e-2)
    assert stats.loss < 0.69
    rows = pairs(backend)
    assert sums(backend, rows, PREVIOUS) == pytest.approx(sums(backend, rows, INIT), abs=1e-6)


def test_an_unknown_target_lists_the_known(backend: TorchBackend) -> None:
    with pytest.raises(ModelError, match=r"'c_attn'.*down_proj.*q_proj"):
        backend.bind("x", None, Lora(targets=("c_attn",)))


def test_peft_reads_our_folders_and_we_read_peft(folder: Path, tmp_path: Path, backend: TorchBackend) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    backend.save(tmp_path / "ours")
    ids = torch.tensor([pairs(backend)[0].prompt])
    with quiet(), torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "ours")
        backend._enter(POLICY)
        assert torch.allclose(theirs(input_ids=ids).logits, backend.net.model(input_ids=ids).logits, atol=1e-5)
        config = LoraConfig(r=4, target_modules=["v_proj", "o_proj"], use_rslora=True, init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        model.save_pretrained(tmp_path / "theirs")
        backend.bind("theirs", tmp_path / "theirs")
        backend._enter("theirs")
        assert torch.allclose(model(input_ids=ids).logits, backend.net.model(input_ids=ids).logits, atol=1e-5)
    backend.unbind("theirs")


def test_lean_layers_are_pefts_to_rounding(folder: Path, tmp_path: Path) -> None:
    """Outputs and gradients; with the adapter off the base's own bits. What is unusual (here DoRA) stays PEFT's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    backend = moved(folder)
    with quiet():
        config = LoraConfig(r=4, target_modules=["v_proj"], use_dora=True, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path)
    backend.bind("dora", tmp_path)
    for layer in backend.adapters._layers:
        x = torch.randn(2, 5, layer.base_layer.in_features, requires_grad=True)
        for role, exact in ((INIT, True), (POLICY, False), ("dora", True)):
            backend._enter(role)
            found = []
            for forward in (layer.forward, lambda x, layer=layer: type(layer).forward(layer, x)):
                y = forward(x)
                (y * y).sum().backward()
                found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
                x.grad = None
                layer.zero_grad(set_to_none=True)
            assert len(found[0]) == len(found[1]) == (4 if role == POLICY else 2)
            for mine, theirs in zip(*found, strict=True):
                assert torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs, rtol=1e-5, atol=1e-4)


def damaged(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Rewrite an adapter folder after changing its config and tensors."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "a tensor too few": (lambda _, tensors: tensors.popitem(), "it is not in the file"),
    "a tensor too many": (lambda _, tensors: tensors.update(extra=torch.zeros(2)), "extra: the base has no place"),
    "another shape": (
        lambda _, tensors: tensors.update(
            {k: v[:, :32].clone() for k, v in tensors.items() if k.endswith("q_proj.lora_A.weight")}
        ),
        r"\[4, 32\] where the base needs \[4, 64\]",
    ),
    "other modules": (lambda config, _: config.update(target_modules=["c_attn"]), "does not fit"),
    "whole modules": (lambda config, _: config.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda config, _: config.update(bias="all"), "bias"),
    "another method": (lambda config, _: config.update(peft_type="IA3"), "IA3"),
    "a changed base": (lambda config, _: config.update(init_lora_weights="pissa"), "pissa"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused(kind: str, backend: TorchBackend, tmp_path: Path) -> None:
    backend.save(tmp_path)
    change, message = DAMAGE[kind]
    expected = sums(backend, pairs(backend))
    with pytest.raises(ModelError, match=message) as caught:
        backend.bind("x", damaged(tmp_path, change))
    assert len(str(caught.value).splitlines()) == 1
    assert "x" not in backend._roles
    assert (sums(backend, pairs(backend)) == expected).all(), "the other roles are unharmed"


def test_a_pickle_is_never_read(backend: TorchBackend, tmp_path: Path) -> None:
    backend.save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        backend.bind("x", tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ModelError, match="damaged"):
        backend.bind("x", tmp_path)


def test_a_damaged_optimizer_is_refused(folder: Path, tmp_path: Path) -> None:
    backend = moved(folder)
    backend.save(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="optimizer"):
        backend.restore(tmp_path)


def test_training_ends_when_the_policy_is_bound_anew(folder: Path) -> None:
    backend = moved(folder)
    backend.bind(POLICY, None, LORA)
    with pytest.raises(BackendError, match="start_training"):
        backend.dpo_step(pairs(backend), Dpo(0.1), 1e-2)


def test_roles_share_one_base(backend: TorchBackend) -> None:
    """A role costs its adapter and nothing else."""
    assert backend.adapters.peft is not None
    base = [p for n, p in backend.adapters.peft.named_parameters() if "lora_" not in n]
    assert sum(p.numel() for p in base) == backend.description["parameters"]
    assert not any(p.requires_grad for p in base)
    assert not backend.net.model.training


def test_the_random_state_of_the_program_is_left_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    backend = moved(folder)
    draw(backend, prompts(backend), names(4, 1), Sampling(1.0, 1.0, 5))
    assert torch.equal(torch.random.get_rng_state(), before)


# Loading


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backend = moved(folder)
    backend.save(tmp_path)
    backend.restore(tmp_path)
    draw(backend, prompts(backend), names(4, 1), Sampling(1.0, 1.0, 5))
    assert capfd.readouterr() == ("", "")


def test_dropout_is_off(tmp_path: Path) -> None:
    make_model(tmp_path, "gpt2")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["resid_pdrop"] > 0
    backend = moved(tmp_path, batching=Batching(checkpointed=2))
    assert backend.net.model.config.resid_pdrop == 0
    assert all(m.p == 0 for m in backend.net.model.modules() if isinstance(m, torch.nn.Dropout))


def test_models_that_cannot_be_loaded_say_why(folder: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], Any]) -> str:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        return str(copy)

    cases = [
        (str(tmp_path / "absent"), "there is no model folder"),
        ("./absent", "there is no model folder"),
        ("nobody/no-such-model", "cannot be had from the hub"),
        (broken("bare", lambda f: (f / "model.safetensors").unlink()), "no .*safetensors"),
        (broken("cut", lambda f: (f / "model.safetensors").write_bytes(b"x" * 100)), "weights of .*cut"),
        (broken("unconfigured", lambda f: (f / "config.json").unlink()), "no config.json"),
        (broken("misconfigured", lambda f: (f / "config.json").write_text("{")), "config of .*misconfigured"),
        (broken("mute", lambda f: (f / "tokenizer.json").write_text("{")), "tokenizer"),
        (broken("untemplated", lambda f: (f / "chat_template.jinja").unlink()), "--template plain"),
    ]
    for model, message in cases:
        with pytest.raises(ModelError, match=message) as caught:
            TorchBackend(ModelSettings(model=model, device="cpu"))
        assert len(str(caught.value).splitlines()) == 1


def test_weights_that_are_missing_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "holed")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "holed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: model\.layers\.1\.mlp\.up_proj\.weight"):
        TorchBackend(settings(tmp_path / "holed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"dtype": "float8"}, "no dtype 'float8'"),
        ({"load_in_4bit": True}, "4-bit weights need CUDA"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        TorchBackend(settings(folder, **change))


def test_the_fingerprint_follows_weights_and_template(folder: Path, tmp_path: Path, backend: TorchBackend) -> None:
    other = TorchBackend(settings(make_model(tmp_path / "other", seed=1)))
    plain = TorchBackend(settings(folder, template="plain"))
    same = TorchBackend(settings(Path(shutil.copytree(folder, tmp_path / "copy"))))
    assert len({backend.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    assert same.fingerprint == backend.fingerprint, "it is the content that counts, not the place"


# On a GPU


@pytest.mark.gpu
def test_gpu_bfloat16_scores_agree_with_the_sampler(folder: Path) -> None:
    backend = moved(folder, device="cuda")
    assert backend.description["dtype"] == "bfloat16"
    drawn = draw(backend, prompts(backend), names(4, 4), Sampling(0.7, 1.0, 40))
    rows = [Row(prompt=p, responses=tuple(c.ids for c in s)) for p, s in zip(prompts(backend), drawn, strict=True)]
    recorded = np.array([value for some in drawn for c in some for value in c.logprobs])
    again = np.array([v for some in score(backend, rows, per_token=True) for one in some for v in one.per_token or ()])
    assert np.abs(recorded - again).mean() < 0.05


@pytest.mark.gpu
def test_gpu_float32_gives_the_texts_of_the_cpu(folder: Path, backend: TorchBackend, tmp_path: Path) -> None:
    backend.save(tmp_path)
    gpu = TorchBackend(settings(folder, device="cuda", dtype="float32"))
    gpu.bind(POLICY, tmp_path)
    sampling = Sampling(0.7, 1.0, 30)
    found = [texts(draw(one, prompts(one), names(4, 4), sampling)) for one in (backend, gpu)]
    assert found[0] == found[1]
    assert sums(gpu, pairs(gpu)) == pytest.approx(sums(backend, pairs(backend)), abs=1e-3)


@pytest.mark.gpu
def test_gpu_four_bit_trains(folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="gpu: bitsandbytes is not installed")
    backend = moved(folder, steps=0, device="cuda", load_in_4bit=True)
    assert backend.description["bits"] == 4
    losses = [backend.dpo_step(pairs(backend), Mixed(0.5), 1e-2).loss for _ in range(4)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)
    assert losses[-1] < losses[0]


def test_a_whole_other_model_may_be_pi_init(tmp_path: Path) -> None:
    """The no-seed study with real models: two of one tokenizer, one in memory at a time."""
    for name, seed in (("policy", 0), ("other", 1)):
        make_model(tmp_path / name, seed=seed)
    asked = {"inputs.no_seed_pairs": True, "inputs.seed_pairs": None, "inputs.init_model": str(tmp_path / "other")}
    recipe = recipe_of(f"torch:{tmp_path / 'policy'}", tmp_path, asked)
    run_small(tmp_path / "run", recipe)
    judged = read_judgements(tmp_path / "run/rounds/1/judgements.jsonl")
    other = load("torch", ModelSettings(str(tmp_path / "other"), device="cpu"))
    for j in judged[:4]:
        ((_, scores),) = other.logprob([j.row], INIT)
        assert scores[0].logp == pytest.approx(j.chosen.reference, abs=1e-3)
        assert abs(j.chosen.policy - j.chosen.reference) > 1e-3
