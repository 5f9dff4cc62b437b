"""Every row of the table of families: a tiny random model of it goes from float weights to generated text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import quantize_tiny, simulate_tiny
from tiny_models import FAMILY_MODELS, TINY_MODELS, make_tiny_model, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import atomq.hf
from atomq.block_loop import calibrate_blocks, quantize_blocks
from atomq.config import (
    ActivationScheme,
    KVScheme,
    OutlierScheme,
    QuantScheme,
    Recipe,
    SolverConfig,
    WeightScheme,
)
from atomq.models.attention import attention_for
from atomq.models.blocks import block_groups, blocks_of, capture_block_inputs
from atomq.models.experts import unfuse_experts
from atomq.models.families import FAMILIES, find_family
from atomq.numerics.linear import QuantizedLinear

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 256, (4, 40), generator=torch.Generator().manual_seed(0))
NEW_KINDS = sorted(FAMILY_MODELS.keys() - TINY_MODELS.keys())  # the others are in test_block_loop.py too
REORDERED = OutlierScheme(8, reorder=True)
EIGHT_BITS = Recipe(
    QuantScheme(
        WeightScheme(8, group_size=16),
        ActivationScheme(8, group_size=16),
        REORDERED,
        KVScheme(n_bits=8, key_offset=True),
    )
)
FULL_PRECISION = {"mlp.shared_expert_gate"}  # routers beside those that are no linears
PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"


@pytest.fixture(autouse=True)
def _few_tokens_are_enough(monkeypatch):
    """Else all experts would be starved by so little text."""
    monkeypatch.setattr("atomq.models.experts.STARVED_TOKENS", 8)


def quiet(_done: float, _total: int, _step: str) -> None:
    pass


def float_model(kind: str) -> nn.Module:
    """A tiny model with the experts and the attention that the loader gives it, and no outliers in norms of
    heads and after a part: they would make attention so sharp that the smallest difference moves it.
    """
    model = make_tiny_model(kind)
    unfuse_experts(model, family_of(model))
    model.set_attn_implementation(attention_for(model.config))
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name or ".post_" in name:
            parameter[3] = parameter[4]
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def family_of(model):
    return find_family(model.config.model_type)


def test_every_family_of_the_table_has_a_tiny_model():
    assert {make_tiny_model(kind).config.model_type for kind in FAMILY_MODELS} == set(FAMILIES)


def test_the_table_of_the_families_page_is_that_of_the_code():
    section = PAGE.read_text(encoding="utf-8")
    rows = [line for line in section.splitlines() if line.startswith("| ") and "`" in line][1:]
    named = [re.findall(r"`([a-z0-9_]+)`", line.split("|")[2]) for line in rows]
    assert sorted(name for names in named for name in names) == sorted(FAMILIES)


@pytest.mark.parametrize("kind", FAMILY_MODELS)
def test_no_linear_of_a_block_is_forgotten(kind):
    model = float_model(kind)
    for block in blocks_of(model, family_of(model)):
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        linears -= FULL_PRECISION
        groups = block_groups(block, family_of(model))
        assert {name for group in groups for name in group.linears} == linears


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_blocks_one_by_one_give_the_hidden_states_of_the_model(kind):
    model = float_model(kind)
    inputs = capture_block_inputs(model, family_of(model), TOKENS, CPU)
    expected = model(TOKENS, output_hidden_states=True).hidden_states
    blocks = blocks_of(model, family_of(model))
    inputs.run(blocks[0])
    assert torch.allclose(inputs.hidden, expected[1], rtol=1e-4, atol=1e-4)
    assert len(blocks) == 2


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_reordered_model_that_rounds_nothing_equals_the_original(kind, transform, monkeypatch):
    """Orders gathered and absorbed, biases, fused rows, transforms; only what float32 rounds differs."""
    monkeypatch.setattr("atomq.numerics.linear.fake_quantize_activations", lambda x, *_scheme: x)
    scheme = QuantScheme(
        WeightScheme(16, group_size=16), ActivationScheme(8, group_size=16), REORDERED, transform=transform
    )
    model = float_model(kind)
    expected = float_model(kind)(TOKENS).logits
    quantize_blocks(model, Recipe(scheme, SolverConfig("rtn")), CPU, quiet, TOKENS)
    perms = [m.state_dict()["perm"] for m in model.modules() if "perm" in getattr(m, "_buffers", {})]
    assert perms
    assert all(not torch.equal(perm, torch.arange(len(perm), dtype=perm.dtype)) for perm in perms)
    assert relative_error(model(TOKENS).logits, expected) < 2e-5


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_eight_bits_stay_close_to_the_original(kind):
    model = float_model(kind)
    report = quantize_blocks(model, EIGHT_BITS, CPU, quiet, TOKENS)
    logits, expected = model(TOKENS).logits, float_model(kind)(TOKENS).logits
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-5 < errors.median() < 0.06  # not the mean: a router may send a token elsewhere
    groups = [
        group
        for block in blocks_of(model, family_of(model))
        for group in block_groups(block, family_of(model))
    ]
    assert len(report.linears) == sum(len(group.linears) for group in groups)
    assert {r.method for r in report.linears} == {"gptq"}


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_statistics_equal_those_of_hooks_on_a_forward_of_the_whole_model(kind):
    found = calibrate_blocks(float_model(kind), TOKENS, CPU, quiet)
    model = float_model(kind)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name in found:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(TOKENS)
    assert set(found) == set(seen)
    for name, x in seen.items():
        n_windows = 1 if ".experts." in name else len(TOKENS)
        x = x.double().reshape(n_windows, -1, x.shape[-1])
        assert torch.allclose(found[name].hessian.double(), 2 * x.square().mean((0, 1)), rtol=1e-3, atol=1e-9)
        assert torch.allclose(found[name].abs_mean.double(), x.abs().mean(1).amax(0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILY_MODELS)
def test_a_stored_model_is_the_simulation_and_generates(kind, tmp_path):
    """Pack, load, perplexity, generate: what comes off the disk computes exactly what was simulated."""
    source = save_tiny_model(tmp_path / "model", kind)
    quantize_tiny(source, tmp_path / "OUT")
    simulation, loaded = simulate_tiny(source, tmp_path), atomq.hf.load(tmp_path / "OUT")
    simulated, stored = simulation(TOKENS, labels=TOKENS), loaded(TOKENS, labels=TOKENS)
    assert torch.equal(simulated.logits, stored.logits)
    assert torch.equal(simulated.loss, stored.loss)
    assert stored.loss != AutoModelForCausalLM.from_pretrained(source)(TOKENS, labels=TOKENS).loss
    prompt = TOKENS[:1, :12]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = [
        m.generate(prompt, attention_mask=torch.ones_like(prompt), **settings) for m in (simulation, loaded)
    ]
    assert torch.equal(texts[0], texts[1])
    assert texts[0].shape == (1, 18)


@pytest.mark.parametrize("key_position", ["before_rope", "after_rope"])
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_one_token_steps_with_a_cache_give_the_logits_of_the_full_forward(kind, key_position):
    """In float64, where nothing lies so near a tie that the order of additions could move a code."""
    scheme = dataclasses.replace(EIGHT_BITS.scheme, kv=KVScheme(n_bits=8, key_position=key_position))
    model = float_model(kind)
    quantize_blocks(model, Recipe(scheme, SolverConfig("rtn")), CPU, quiet, TOKENS)
    model.double()
    tokens = TOKENS[:1, :14]
    with torch.inference_mode():
        full = model(tokens, use_cache=False).logits
        cache, steps = None, []
        for start, end in [(0, 5), *((i, i + 1) for i in range(5, 14))]:
            output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, 1), full) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2", "gemma3"])
def test_the_key_offset_is_the_mean_of_k_wherever_its_norm_lies(kind):
    model = float_model(kind)
    block, family = blocks_of(model, family_of(model))[0], family_of(model)
    inputs = capture_block_inputs(model, family, TOKENS, CPU)
    attention, n_heads = block.self_attn, model.config.num_key_value_heads
    normed = block.input_layernorm(inputs.hidden) if hasattr(block, "input_layernorm") else inputs.hidden
    keys = attention.k_proj(normed)
    if kind == "olmo2":
        keys = attention.k_norm(keys)
    keys = keys.unflatten(-1, (n_heads, -1))
    if kind in ("qwen3", "gemma3"):
        keys = attention.k_norm(keys)
    expected = keys.double().mean((0, 1)).flatten()
    quantize_blocks(model, EIGHT_BITS, CPU, quiet, TOKENS)
    assert torch.allclose(attention.key_offset.double(), expected, rtol=2**-8, atol=1e-4)


def test_capped_scores_are_those_of_transformers():
    model = make_tiny_model("gemma2")
    logits = []
    for attention in ("eager", attention_for(model.config)):
        model.set_attn_implementation(attention)
        logits.append(model(TOKENS).logits)
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key_position", ["before_rope", "after_rope"])
def test_fused_keys_and_values_are_cached_as_separate_ones_are(key_position):
    """Phi-3 is a Llama whose weights lie on top of each other; its cache must hold the same."""
    kv = KVScheme(n_bits=3, key_position=key_position, rotation="hadamard")
    recipe = Recipe(
        QuantScheme(WeightScheme(16), ActivationScheme(16), OutlierScheme(), kv), SolverConfig("rtn")
    )
    phi3, llama = make_tiny_model("phi3"), make_tiny_model("llama", rms_norm_eps=1e-5)
    weights = phi3.state_dict()
    for name in list(weights):
        if name.endswith("qkv_proj.weight"):
            parts = weights.pop(name).split([48, 24, 24])
            weights |= {name.replace("qkv", kind): part for kind, part in zip("qkv", parts, strict=True)}
        elif name.endswith("gate_up_proj.weight"):
            parts = weights.pop(name).chunk(2)
            weights |= {
                name.replace("gate_up", kind): p for kind, p in zip(("gate", "up"), parts, strict=True)
            }
    llama.load_state_dict(weights)
    assert torch.allclose(phi3(TOKENS).logits, llama(TOKENS).logits, atol=1e-4)
    for model in (phi3, llama):
        quantize_blocks(model.double(), recipe, CPU, quiet)
    assert torch.allclose(phi3(TOKENS).logits, llama(TOKENS).logits, atol=1e-9)
    assert not any(isinstance(m, QuantizedLinear) for m in phi3.modules())
