"""Experts as linears of their own, and the tokens that they are calibrated on."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import quantize_tiny, simulate_tiny, stored_tensors
from tiny_models import make_tiny_model, save_tiny_model

import atomq.hf
from atomq.block_loop import calibrate_blocks, quantize_blocks
from atomq.config import (
    ActivationScheme,
    CalibrationConfig,
    OutlierScheme,
    QuantScheme,
    Recipe,
    SolverConfig,
    WeightScheme,
)
from atomq.errors import CheckpointError, ConfigError
from atomq.models.experts import ExpertRouting, Experts, unfuse_experts
from atomq.models.families import find_family
from atomq.models.loading import load_float_model
from atomq.models.source import resolve_source

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 256, (4, 40), generator=torch.Generator().manual_seed(0))
KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe-dense-first"]
RECIPE = Recipe(
    QuantScheme(
        WeightScheme(group_size=16), ActivationScheme(8, group_size=16), OutlierScheme(8, reorder=True)
    ),
    SolverConfig(),
)


def quiet(_done: float, _total: int, _step: str) -> None:
    pass


def unfused(kind: str):
    model = make_tiny_model(kind)
    unfuse_experts(model, find_family(model.config.model_type))
    return model


def deserted_model():
    """A Mixtral whose routers never choose the last expert."""
    model = unfused("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight[3] = -block.mlp.gate.weight[:3].sum(0)
        block.mlp.gate.register_forward_hook(_never_the_last)
    return model


def _never_the_last(_module, _inputs, outputs):
    logits, weights, chosen = outputs
    return logits, weights, torch.where(chosen == 3, (chosen.sum(-1, keepdim=True) - 3 + 1) % 3, chosen)


def routed_counts(model) -> dict[str, list[int]]:
    """Tokens that every expert of a model gets on TOKENS."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):

            def count(_module, args, name=name):
                counts[name] = torch.bincount(args[1].flatten(), minlength=len(_module)).tolist()

            module.register_forward_pre_hook(count)
    model(TOKENS)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_unfused_experts_compute_what_fused_ones_do(kind):
    expected = make_tiny_model(kind)(TOKENS).logits
    model = unfused(kind)
    assert torch.allclose(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if isinstance(module, Experts):
            module.on_all = frozenset((0, 2))
    assert torch.allclose(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_share_the_memory_of_the_fused_parameters():
    model = make_tiny_model("qwen3_moe")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    unfuse_experts(model, find_family("qwen3_moe"))
    experts = model.model.layers[0].mlp.experts
    assert experts[2].up_proj.weight.data_ptr() == fused[2, 32:].data_ptr()
    assert torch.equal(experts[3].gate_proj.weight, fused[3, :32])


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_the_names_of_the_hub_are_read(kind, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    spelled = "block_sparse_moe.experts.3.w2" if kind == "mixtral" else "mlp.experts.3.down_proj"
    assert f"model.layers.1.{spelled}.weight" in names
    model = load_float_model(resolve_source(str(folder)))
    assert torch.allclose(model(TOKENS).logits, make_tiny_model(kind)(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, Experts) for m in model.modules()) == (1 if "dense" in kind else 2)


def test_every_expert_has_its_own_order_and_the_router_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("atomq.models.experts.STARVED_TOKENS", 1)
    source = save_tiny_model(tmp_path / "model", "qwen2_moe")
    quantize_tiny(source, tmp_path / "OUT")
    stored, original = stored_tensors(tmp_path / "OUT"), make_tiny_model("qwen2_moe").state_dict()
    for kind in ("gate_proj", "down_proj"):
        orders = {
            tuple(tensor.tolist())
            for name, tensor in stored.items()
            if name.endswith(f"{kind}.perm") and ".experts." in name
        }
        assert len(orders) == 8
    for name in ("gate", "shared_expert_gate"):
        full = f"model.layers.1.mlp.{name}.weight"
        assert torch.equal(stored[full], original[full])
    assert "model.layers.0.mlp.shared_expert.down_proj.qweight" in stored


def test_starved_experts_are_calibrated_on_all_tokens_and_named(monkeypatch):
    monkeypatch.setattr("atomq.models.experts.STARVED_TOKENS", 60)
    counts = routed_counts(unfused("mixtral"))
    expected = {f"{name}.{index}": n for name, ns in counts.items() for index, n in enumerate(ns) if n < 60}
    assert 0 < len(expected) < 8
    routing, model = ExpertRouting(), unfused("mixtral")
    statistics = calibrate_blocks(model, TOKENS, CPU, quiet, routing)
    assert routing.starved == expected
    assert not any(module.on_all for module in model.modules() if isinstance(module, Experts))
    seen: list[torch.Tensor] = []
    block = unfused("mixtral")
    block.model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(TOKENS)
    everything = 2 * seen[0].reshape(-1, 48).square().mean(0)
    for index in range(4):
        name = f"model.layers.0.mlp.experts.{index}"
        sees_all = torch.allclose(statistics[f"{name}.gate_proj"].hessian, everything, rtol=1e-3)
        assert sees_all == (name in expected)


def test_an_expert_without_any_token_keeps_its_weights():
    """Under a Hessian of nothing GPTQ would make all of them zero."""
    model, original = deserted_model(), deserted_model()
    report = quantize_blocks(model, RECIPE, CPU, quiet, TOKENS)
    assert report.starved_experts["model.layers.1.mlp.experts.3"] == 0
    expected = (
        f"{len(report.starved_experts)} experts saw fewer than 128 calibration tokens and were calibrated"
    )
    assert any(warning.startswith(expected) for warning in report.warnings)
    assert "least: model.layers.0.mlp.experts.3 with 0" in " ".join(report.warnings)
    for kind in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.3.{kind}"
        linear, weight = model.get_submodule(name), original.get_submodule(name).weight
        x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
        if kind == "down_proj":  # absorbed: its input comes in the stored order
            order = linear.input_order().long()
            actual = linear(x[:, order])
        else:
            down = model.get_submodule("model.layers.0.mlp.experts.3.down_proj")
            actual = linear(x)[:, down.input_order().long().argsort()]
        expected_output = x @ weight.T
        assert (actual - expected_output).norm() < 0.2 * expected_output.norm()


def test_with_all_experts_every_one_sees_every_token(monkeypatch):
    solved = []
    original = atomq.block_quantizer.solve_group

    def spy(weights, hessian, scheme, solver):
        solved.append(hessian.n_tokens)
        return original(weights, hessian, scheme, solver)

    monkeypatch.setattr("atomq.block_quantizer.solve_group", spy)
    for all_experts in (True, False):
        solved.clear()
        routing, model = ExpertRouting(all_experts), unfused("qwen3_moe")
        quantize_blocks(model, RECIPE, CPU, quiet, TOKENS, routing=routing)
        assert (set(solved) == {TOKENS.numel()}) == all_experts or routing.starved
        assert not (all_experts and routing.starved)
        assert len(solved) == 2 * (2 + 4 * 2)


def test_routed_experts_see_their_own_tokens_only(monkeypatch):
    monkeypatch.setattr("atomq.models.experts.STARVED_TOKENS", 1)
    counts = routed_counts(unfused("qwen3_moe"))["model.layers.0.mlp.experts"]
    solved = []
    original = atomq.block_quantizer.solve_group

    def spy(weights, hessian, scheme, solver):
        solved.append(hessian.n_tokens)
        return original(weights, hessian, scheme, solver)

    monkeypatch.setattr("atomq.block_quantizer.solve_group", spy)
    exact = QuantScheme(WeightScheme(8, group_size=16), ActivationScheme(16), OutlierScheme())
    quantize_blocks(unfused("qwen3_moe"), Recipe(exact, SolverConfig()), CPU, quiet, TOKENS)
    assert solved[:2] == [TOKENS.numel()] * 2
    assert solved[2:6] == solved[6:10] == counts


@pytest.mark.parametrize("scheme", ["kv only", "w16a4", "atom"])
def test_checkpoints_with_any_kind_of_expert_weight_open(scheme, tmp_path):
    """Float weights of experts have names that transformers would fuse."""
    source = save_tiny_model(tmp_path / "model", "qwen3_moe")
    quantize_tiny(source, tmp_path / "OUT", scheme)
    loaded = atomq.hf.load(tmp_path / "OUT")
    assert torch.equal(loaded(TOKENS).logits, simulate_tiny(source, tmp_path, scheme)(TOKENS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert stored_tensors(tmp_path / "again").keys() == stored_tensors(tmp_path / "OUT").keys()
    facts = atomq.checkpoints.describe(tmp_path / "OUT", check=True)
    assert facts["n_linears"] == 2 * (4 + 4 * 3)


def test_starved_experts_are_in_the_manifest_and_the_report(tmp_path):
    source = save_tiny_model(tmp_path / "model", "mixtral")
    result = quantize_tiny(source, tmp_path / "OUT")
    manifest = json.loads((tmp_path / "OUT" / "manifest.json").read_text())
    assert manifest["starved_experts"] == result.report.starved_experts != {}
    report = json.loads((tmp_path / "OUT" / "reports" / "quantize.json").read_text())
    assert report["starved_experts"] == result.report.starved_experts
    assert any("experts saw fewer than 128 calibration tokens" in warning for warning in manifest["warnings"])


def test_all_experts_is_refused_where_there_are_none_and_part_of_the_artefacts_key(tmp_path, text_file):
    llama = save_tiny_model(tmp_path / "llama")
    calibration = CalibrationConfig(str(text_file), 4, 32, all_experts=True)
    with pytest.raises(ConfigError, match="llama models have no experts; leave --moe-calibrate-all away"):
        atomq.pipeline.quantize(str(llama), tmp_path / "OUT", RECIPE, "cpu", calibration=calibration)
    mixtral, path = save_tiny_model(tmp_path / "mixtral", "mixtral"), tmp_path / "stats.safetensors"
    outliers = RECIPE.scheme.outliers
    found = atomq.pipeline.calibrate(str(mixtral), path, calibration, outliers, "cpu")
    assert found.facts["starved_experts"] == {}
    plain = CalibrationConfig(str(text_file), 4, 32)
    with pytest.raises(CheckpointError, match="all_experts is True but False is needed"):
        atomq.pipeline.quantize(
            str(mixtral), tmp_path / "OUT", RECIPE, "cpu", calibration=plain, calibration_file=path
        )


def test_a_deep_copy_of_experts_computes_the_same():
    model = unfused("qwen2_moe")
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, model(TOKENS).logits)
