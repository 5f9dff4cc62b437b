"""Block-wise refinement: the latent weight against the stored codes, and what learning does to a block."""

from __future__ import annotations

import pytest
import torch
from method.test_gptq import CASES
from tiny_models import make_tiny_model

from atomq.block_loop import quantize_blocks
from atomq.commands.quantize import build_recipe
from atomq.config import SolverConfig
from atomq.errors import ConfigError
from atomq.method.gptq import rtn_quantize
from atomq.method.refine import LatentWeight, block_loss
from atomq.numerics.linear import QuantizedLinear
from atomq.presets import PRESETS

CPU = torch.device("cpu")
INTEGER_CASES = [name for name in CASES if "fp4" not in name and name != "exponential"]
TOKENS = torch.randint(0, 128, (32, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", INTEGER_CASES)
def test_a_latent_weight_begins_as_what_it_started_from(case):
    scheme, width = CASES[case]
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    start = rtn_quantize(weight, scheme, SolverConfig())
    latent = LatentWeight(weight, start, scheme)
    torch.testing.assert_close(
        latent(), start.dequantize(scheme.weights, torch.float32), rtol=1e-6, atol=1e-6
    )
    again = latent.quantized()
    assert torch.equal(again.codes, start.codes.to(again.codes.dtype))
    assert torch.equal(again.scales, start.scales)


@pytest.mark.parametrize("case", INTEGER_CASES)
def test_a_moved_latent_weight_is_what_its_codes_are_worth(case):
    scheme, width = CASES[case]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, width, generator=generator)
    latent = LatentWeight(weight, rtn_quantize(weight, scheme, SolverConfig()), scheme)
    with torch.no_grad():
        for parameter in latent.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = latent.quantized().dequantize(scheme.weights, torch.float32)
    torch.testing.assert_close(latent(), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_rounding_counts_as_the_identity():
    scheme, width = CASES["ragged"]
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(2))
    start = rtn_quantize(weight, scheme, SolverConfig())
    latent = LatentWeight(weight, start, scheme)
    latent().sum().backward()
    n_normal = start.codes.shape[1]
    scales = start.scales.repeat_interleave(16, dim=1)[:, :n_normal]
    inside = (latent.normal >= -8) & (latent.normal <= 7)
    torch.testing.assert_close(latent.normal.grad, scales * inside)
    assert latent.log_scales.grad.abs().sum() > 0
    inside = (latent.outlier >= -128) & (latent.outlier <= 127)
    torch.testing.assert_close(latent.outlier.grad, start.outliers.scales.unsqueeze(-1) * inside)


def test_the_loss_is_each_tokens_squared_error_over_its_size():
    output, target = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert float(block_loss(output, target)) == pytest.approx((1 / 2 + 4 / 1) / 2)


def recipe_of(*settings: str):
    small = ["weights.group_size=16", "activations.group_size=16", "outliers.n_outliers=8"]
    small += ["solver.asymmetry=0", "solver.descent_sweeps=0", "kv.key_balance=false"]
    return build_recipe("atomq", {}, None, [*small, *settings])


def block_error(model, reference) -> float:
    with torch.no_grad():
        return float(block_loss(model(TOKENS).logits, reference(TOKENS).logits))


@pytest.mark.parametrize("settings", [(), ("weights.scale_mode=progressive", "weights.channel_group=1")])
def test_refining_lowers_the_error_and_stores_what_it_computes(settings):
    reference = make_tiny_model()
    plain, refined = make_tiny_model(), make_tiny_model()
    quantize_blocks(plain, recipe_of(*settings), CPU, lambda *_: None, TOKENS)
    steps = ("solver.refine_steps=60", "solver.refine_rate=0.02")
    quantize_blocks(refined, recipe_of(*settings, *steps), CPU, lambda *_: None, TOKENS)
    assert block_error(refined, reference) < block_error(plain, reference)
    for linear in refined.modules():
        if isinstance(linear, QuantizedLinear):
            assert linear.learned_weight is None
            stored = linear.quantized_weight()
            assert stored.codes.abs().max() <= 8
            learned = stored.scales if stored.base is None else stored.base
            assert torch.equal(learned, learned.half().float())
    assert not any(p.requires_grad for p in refined.parameters() if p.grad is not None)


def test_refining_gives_the_same_bytes_twice():
    states = []
    for _ in range(2):
        model = make_tiny_model()
        quantize_blocks(model, recipe_of("solver.refine_steps=5"), CPU, lambda *_: None, TOKENS)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_does_worse_on_held_out_windows_is_dropped():
    """A learning rate that throws all codes about must leave the solved ones in place."""
    plain, refined = make_tiny_model(), make_tiny_model()
    quantize_blocks(plain, recipe_of(), CPU, lambda *_: None, TOKENS)
    wild = ("solver.refine_steps=20", "solver.refine_rate=1.0")
    report = quantize_blocks(refined, recipe_of(*wild), CPU, lambda *_: None, TOKENS)
    assert {r.refined for r in report.linears} == {False}
    assert any("was dropped" in warning for warning in report.warnings)
    for (name, one), (_, two) in zip(plain.state_dict().items(), refined.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_presets_do_not_refine_unless_asked():
    assert all(recipe.solver.refine_steps == 0 for recipe in PRESETS.values())


def test_refining_needs_two_windows_and_integers():
    steps = recipe_of("solver.refine_steps=2")
    with pytest.raises(ConfigError, match="at least two calibration windows"):
        quantize_blocks(make_tiny_model(), steps, CPU, lambda *_: None, TOKENS[:1])
    with pytest.raises(ConfigError, match="code book"):
        recipe_of("solver.refine_steps=2", "weights.number_format=fp4-e2m1")
