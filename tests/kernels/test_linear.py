"""`KernelLinear` on the CPU: twins in the place of the kernels show that everything is wired right."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import make_tiny_model

from atomq.block_loop import quantize_blocks
from atomq.config import override
from atomq.eval.verify import _count_wrong_codes, _quantize, _test_inputs
from atomq.kernels import gemm_reference
from atomq.kernels.linear import KernelLinear, kernel_heads
from atomq.numerics.exact import exact_outputs
from atomq.numerics.kv import fake_quantize_heads
from atomq.presets import find_preset

TOKENS = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(0))
PROGRESSIVE = {
    "weights.channel_group": 1,
    "weights.scale_mode": "progressive",
    "activations.scale_mode": "progressive",
}
CLIPS = {"solver.method": "gptq", "activations.clip_search": "output"}
RECIPES = {
    "atom": {},
    "no outliers": {"outliers.n_outliers": 0},
    "groups of 64": {"weights.group_size": 64, "activations.group_size": 64},
    "hadamard": {"transform": "hadamard"},
    "progressive": PROGRESSIVE,
    "progressive hadamard": {**PROGRESSIVE, "transform": "hadamard"},
    "original order": {"outliers.reorder": False},
    "searched clips": CLIPS,
    "searched clips, original order": {**CLIPS, "outliers.reorder": False},
}


@pytest.fixture(autouse=True)
def _twins(monkeypatch):
    monkeypatch.setattr("atomq.kernels.linear.w4a4_gemm", gemm_reference.w4a4_gemm)
    monkeypatch.setattr("atomq.kernels.linear.w4a16_gemm", gemm_reference.w4a16_gemm)


def quantized_block(settings):
    """A block with linears of 448 and 320 inputs, 40 of them outliers: short last groups, biases."""
    model = make_tiny_model(
        "llama-mha-bias", hidden_size=448, intermediate_size=320, num_attention_heads=7, num_key_value_heads=7
    )
    plain = {"outliers.n_outliers": 40, "kv.n_bits": 16, "solver.method": "rtn"}
    recipe = override(find_preset("atom"), {**plain, **settings})
    quantize_blocks(model, recipe, torch.device("cpu"), lambda *_: None, TOKENS)
    return model.model.layers[0]


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_it_computes_what_the_simulation_does(settings):
    block = quantized_block(settings)
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        linear = block.get_submodule(name)
        kernel = KernelLinear(linear)
        for inputs in _test_inputs(linear, seed=1):
            outputs, seen = kernel.multiply(inputs, torch.float32)
            assert _count_wrong_codes(linear, seen, _quantize(linear, linear.order_input(inputs))) == 0
            expected = exact_outputs(linear, seen)
            assert (outputs.double() - expected).norm() <= 1e-6 * expected.norm(), name
            simulated = linear.forward(inputs)
            limit = 0.02 if "transform" in settings else 1e-5  # a code on the edge may fall to either side
            assert (kernel(inputs) - simulated).norm() <= limit * simulated.norm(), name
        assert kernel(inputs.reshape(1, *inputs.shape)).shape == (1, inputs.shape[0], linear.out_features)


def test_weights_alone_are_multiplied_with_16_bit_activations():
    settings = {"activations.n_bits": 16, "outliers.n_outliers": 0}
    linear = quantized_block(settings).self_attn.q_proj
    kernel = KernelLinear(linear)
    inputs = torch.randn(5, 448, generator=torch.Generator().manual_seed(3)).half()
    outputs, seen = kernel.multiply(inputs, torch.float32)
    assert torch.equal(seen, inputs[:, linear.input_order().long()])
    expected = exact_outputs(linear, seen)
    assert (outputs.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("alter", ["nibble", "scale", "outlier", "order", "bias", "clip"])
def test_it_reads_every_stored_tensor(alter):
    linear = quantized_block(CLIPS if alter == "clip" else {}).self_attn.q_proj
    x = torch.randn(3, 448, generator=torch.Generator().manual_seed(2))
    before = KernelLinear(linear)(x)
    match alter:
        case "nibble":
            linear.qweight[2, 1] ^= 0x10
        case "scale":
            linear.scales[1, 0] *= 1.5
        case "outlier":
            linear.outlier_weight[0, 0] ^= 8
        case "order":
            linear.perm[[0, 447]] = linear.perm[[447, 0]]
        case "bias":
            linear.bias.data[1] += 1
        case "clip":
            linear.clip_ratio *= 0.9
    assert not torch.equal(KernelLinear(linear)(x), before)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_heads_go_through_the_kv_kernels_twins_as_through_the_simulation(rotation):
    scheme = dataclasses.replace(find_preset("atom").scheme.kv, rotation=rotation, clip_ratio=0.95)
    heads = torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(4))
    found, expected = kernel_heads(heads, scheme), fake_quantize_heads(heads, scheme)
    assert found.shape == heads.shape
    assert (found - expected).norm() <= (0.02 if rotation == "hadamard" else 1e-6) * expected.norm()
