"""Weights of a checkpoint in the model's own order: whatever the scheme, they make the same float model."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoints import SCHEMES, quantize_tiny
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

import atomq.hf
from atomq.checkpoints import open_checkpoint
from atomq.export.stored import read_blocks
from atomq.numerics.linear import QuantizedLinear

TOKENS = torch.arange(5, 29)[None]


def with_float_activations(model):
    """The checkpoint's own simulation with nothing quantized but the weights."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.quantize_input = module.order_input
        if hasattr(module, "atomq_kv"):
            module.atomq_kv.quantize = lambda heads, _scheme, _offset: heads
    return model


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A model with biases on every linear."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "biased", "llama-mha-bias")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_model_with_the_stored_weights_computes_as_the_checkpoint(biased, tmp_path, scheme):
    out = tmp_path / "OUT"
    quantize_tiny(biased, out, scheme)
    plain = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.float32)
    with torch.no_grad():
        for block in read_blocks(out, open_checkpoint(out, check_hashes=False)):
            for name, stored in block.linears.items():
                plain.get_submodule(name).weight.copy_(stored.model_weight())
                plain.get_submodule(name).bias.copy_(stored.model_bias())
        expected = with_float_activations(atomq.hf.load(out))(TOKENS).logits
        found = plain(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_fused_linear_has_the_order_in_each_of_its_parts(tmp_path):
    phi = save_tiny_model(tmp_path / "phi", "phi3")
    out = tmp_path / "OUT"
    quantize_tiny(phi, out, "atom")
    plain = AutoModelForCausalLM.from_pretrained(phi, dtype=torch.float32)
    with torch.no_grad():
        for block in read_blocks(out, open_checkpoint(out, check_hashes=False)):
            for name, stored in block.linears.items():
                plain.get_submodule(name).weight.copy_(stored.model_weight())
        expected = with_float_activations(atomq.hf.load(out))(TOKENS).logits
        torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_a_block_is_read_once(biased, tmp_path):
    out = tmp_path / "OUT"
    quantize_tiny(biased, out, "atom")
    for index, block in enumerate(read_blocks(out, open_checkpoint(out, check_hashes=False))):
        prefix = f"model.layers.{index}."
        assert set(block.others) == {
            f"{prefix}input_layernorm.weight",
            f"{prefix}post_attention_layernorm.weight",
        }
        assert len(block.linears) == 7
