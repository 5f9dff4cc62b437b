"""Quantized linears and the KV quantizer inside a block, against attention written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from tiny_models import TINY_MODELS, make_tiny_model
from torch import nn
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig

from atomq.config import ActivationScheme, KVScheme, OutlierScheme, QuantScheme, WeightScheme
from atomq.errors import UnsupportedModelError
from atomq.models.attention import ATTENTION_CAPPED, attention_for, inverse_turn, turn
from atomq.models.families import find_family
from atomq.models.quantized import head_dim_of, install_kv_quantizer, install_linears
from atomq.numerics.kv import OFFSET_TOKENS, fake_quantize_heads
from atomq.numerics.linear import QuantizedLinear

N_TOKENS = 9
PLACES = torch.arange(OFFSET_TOKENS - 4, OFFSET_TOKENS - 4 + N_TOKENS)[None]  # of two rows of K's offset
KV_SCHEMES = {
    "before-rope": KVScheme(n_bits=4),
    "after-rope": KVScheme(n_bits=4, key_position="after_rope"),
    "before-rope-turned": KVScheme(n_bits=3, rotation="hadamard"),
    "after-rope-turned-clipped": KVScheme(
        n_bits=3, clip_ratio=0.9, key_position="after_rope", rotation="hadamard"
    ),
    "before-rope-offset": KVScheme(n_bits=3, rotation="hadamard", key_offset=True),
    "after-rope-balanced": KVScheme(
        n_bits=3, key_position="after_rope", rotation="hadamard", key_balance=True
    ),
}


def attention_by_hand(attention, hidden, positions, kv: KVScheme | None, key_position: str | None = None):
    """One attention layer on `hidden` [batch, tokens, width], head by head and token by token."""
    config, cosine, sine = attention.config, *positions
    head_dim, n_heads, n_kv = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
    key_position = key_position or (kv.key_position if kv else None)

    def heads(projection, norm=None):
        x = projection(hidden).unflatten(-1, (-1, head_dim))  # (batch, tokens, heads, head_dim)
        return x if norm is None else norm(x)

    def turned(x):
        first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        rotated = torch.cat((-second, first), dim=-1)
        return x * cosine.unsqueeze(2) + rotated * sine.unsqueeze(2)

    query = turned(heads(attention.q_proj, getattr(attention, "q_norm", None)))
    key = heads(attention.k_proj, getattr(attention, "k_norm", None))
    value = heads(attention.v_proj)
    if kv is not None:
        value = fake_quantize_heads(value, kv)
        offset, scale = (x.to(key) for x in balance_of(kv, n_kv, head_dim))
        if key_position == "before_rope":
            key = turned(fake_quantize_heads(key - offset[0], kv) + offset[0])
        else:
            of_token = torch.stack([offset[int(place >= OFFSET_TOKENS)] for place in PLACES[0]])
            key = fake_quantize_heads((turned(key) - of_token) / scale, kv) * scale + of_token
    else:
        key = turned(key)
    output = torch.zeros(*hidden.shape[:2], n_heads, head_dim, dtype=hidden.dtype)
    for head in range(n_heads):
        shared = head // (n_heads // n_kv)
        for token in range(hidden.shape[1]):
            scores = (query[:, token, head, None] * key[:, : token + 1, shared]).sum(-1) / head_dim**0.5
            weights = scores.softmax(-1)
            output[:, token, head] = (weights.unsqueeze(-1) * value[:, : token + 1, shared]).sum(1)
    return attention.o_proj(output.flatten(2))


def balance_of(kv: KVScheme, n_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The offset [2, n_heads, head_dim] and scale [n_heads, head_dim] of K in the blocks of these tests."""
    shape, generator = (n_heads, head_dim), torch.Generator().manual_seed(5)
    offset, scale = torch.randn(2, *shape, generator=generator), torch.rand(shape, generator=generator) + 0.5
    return (
        offset if kv.has_key_offset else torch.zeros(2, *shape),
        scale if kv.has_key_scale else torch.ones(shape),
    )


def make_attention(kind: str):
    """A float64 model, its first block, hidden states [2, 9, 48] and their position embeddings."""
    model = make_tiny_model(kind).double()
    hidden = torch.randn(2, N_TOKENS, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = model.model.rotary_emb(hidden, PLACES)
    return model, model.model.layers[0], hidden, positions


def attend(model, block, kv: KVScheme, hidden, positions):
    head_dim = head_dim_of(model.config)
    install_kv_quantizer(block, find_family(model.config.model_type), kv, head_dim)
    offset, scale = balance_of(kv, model.config.num_key_value_heads, head_dim)
    if kv.has_key_scale:
        block.self_attn.register_buffer("key_scale", scale.flatten())
        block.self_attn.register_buffer("key_offset", offset.flatten(1))
    elif kv.has_key_offset:
        block.self_attn.register_buffer("key_offset", offset[0].flatten())
    model.set_attn_implementation(attention_for(model.config))
    return block.self_attn(hidden, position_embeddings=positions, attention_mask=None, position_ids=PLACES)[0]


@pytest.mark.parametrize("kv", KV_SCHEMES.values(), ids=KV_SCHEMES)
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_attention_computes_with_exactly_the_quantized_k_and_v(kind, kv):
    model, block, hidden, positions = make_attention(kind)
    untouched = copy.deepcopy(block.self_attn)
    expected = attention_by_hand(untouched, hidden, positions, kv)
    actual = attend(model, block, kv, hidden, positions)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    # The comparison tells the positions of K apart, and quantized from float.
    other = {"before_rope": "after_rope", "after_rope": "before_rope"}[kv.key_position]
    for wrong in (
        attention_by_hand(untouched, hidden, positions, kv, other),
        attention_by_hand(untouched, hidden, positions, None),
    ):
        assert (actual - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_float_cache_changes_nothing(kind):
    model, block, hidden, positions = make_attention(kind)
    expected = attention_by_hand(block.self_attn, hidden, positions, None)
    actual = attend(model, block, KVScheme(), hidden, positions)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert not any(module._forward_hooks for module in block.modules())


@pytest.mark.parametrize("key_position", ["before_rope", "after_rope"])
def test_one_token_is_attended_to_as_its_own_quantized_value(key_position):
    """With a single token attention is V itself."""
    kv = KVScheme(n_bits=2, key_position=key_position)
    model, block, hidden, _ = make_attention("llama")
    token = hidden[:1, :1]
    positions = model.model.rotary_emb(token, torch.tensor([[3]]))
    value = fake_quantize_heads(block.self_attn.v_proj(token).unflatten(-1, (2, 12)), kv)
    expected = block.self_attn.o_proj(value.repeat_interleave(2, dim=2).flatten(2))
    assert torch.allclose(attend(model, block, kv, token, positions), expected, atol=1e-9)


def test_qwen3_keys_are_quantized_after_their_norm():
    kv = KVScheme(n_bits=4)
    _, block, hidden, _ = make_attention("qwen3")
    family = find_family("qwen3")
    key = block.self_attn.k_norm(block.self_attn.k_proj(hidden).unflatten(-1, (2, 16)))
    install_kv_quantizer(block, family, kv, 16)
    projected = block.self_attn.k_proj(hidden)
    assert torch.equal(block.self_attn.k_norm(projected.unflatten(-1, (2, 16))), fake_quantize_heads(key, kv))


@pytest.mark.parametrize("kv", KV_SCHEMES.values(), ids=KV_SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3"])
def test_padded_batches_give_what_their_rows_give_alone(kind, kv):
    """Also where scores are capped: a padding token sees nothing, and what it becomes must not spread."""
    model = make_tiny_model(kind).double()
    for block in model.model.layers:
        install_kv_quantizer(block, find_family(model.config.model_type), kv, head_dim_of(model.config))
    model.set_attn_implementation(attention_for(model.config))
    tokens = torch.arange(2, 12)[None]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(14) >= 4).long()[None]
    positions = (torch.arange(14) - 4).clamp(min=0)[None]
    alone = model(tokens).logits
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(logits[:, 4:], alone, atol=1e-5)


def test_the_attention_of_a_model_is_named():
    assert attention_for(LlamaConfig()) == "sdpa"
    assert attention_for(Gemma2Config(attn_logit_softcapping=50.0)) == ATTENTION_CAPPED
    assert attention_for(Gemma2Config(attn_logit_softcapping=None)) == "sdpa"
    assert attention_for(Gemma3TextConfig(attn_logit_softcapping=50.0)) == "sdpa"  # it has the key alone


def turned_by_hand(heads, cosine, sine, n_turned):
    """Channel i and its partner half a turn on, [batch, tokens, n_heads, head_dim], in float64 loops."""
    out = heads.double().clone()
    half = n_turned // 2
    for batch, token, head, i in itertools.product(*(range(n) for n in heads.shape[:3]), range(half)):
        low, high = (heads[batch, token, head, j].double() for j in (i, i + half))
        c, s = cosine[0, token, i].double(), sine[0, token, i].double()
        out[batch, token, head, i], out[batch, token, head, i + half] = low * c - high * s, high * c + low * s
    return out


@pytest.mark.parametrize(("kind", "n_turned"), [("llama", 12), ("phi3", 12), ("gemma2", 16), ("opt", 0)])
@pytest.mark.parametrize("length", [1.0, 1.3])
def test_a_turn_is_the_models_and_its_inverse_takes_it_back(kind, n_turned, length):
    """With cosines and sines as long as YaRN makes them, and rounded to bfloat16."""
    model = make_tiny_model(kind)
    attention = next(m for name, m in model.named_modules() if name.endswith("self_attn"))
    keys = torch.randn(2, 5, 2, head_dim_of(model.config), generator=torch.Generator().manual_seed(0))
    turns = None
    if n_turned:
        angles = torch.arange(5)[:, None] * torch.logspace(0, -2, n_turned // 2).repeat(2)
        turns = tuple((length * f(angles)).bfloat16()[None] for f in (torch.cos, torch.sin))
    turned = turn(attention, keys, turns)
    expected = turned_by_hand(keys, *turns, n_turned) if n_turned else keys
    assert torch.allclose(turned.double(), expected.double(), atol=1e-5)
    assert torch.allclose(inverse_turn(attention, turned, turns), keys, atol=1e-5)


def test_a_layer_without_rope_is_not_turned():
    attention = make_tiny_model("smollm3").model.layers[0].self_attn
    attention.use_rope = False
    keys = torch.randn(1, 3, 2, 12, generator=torch.Generator().manual_seed(0))
    turns = (torch.zeros(1, 3, 12), torch.ones(1, 3, 12))
    assert torch.equal(turn(attention, keys, turns), keys)
    assert torch.equal(inverse_turn(attention, keys, turns), keys)


def test_an_attention_that_is_not_told_the_turns_is_refused():
    _, block, hidden, _ = make_attention("llama")
    install_kv_quantizer(block, find_family("llama"), KVScheme(n_bits=4, key_position="after_rope"), 12)
    refusal = r"without position_embeddings.*kv\.key_position=before_rope"
    with pytest.raises(UnsupportedModelError, match=refusal):
        block.self_attn.k_proj(hidden)


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [("llama", 12), ("llama-mha-bias", 16), ("mistral", 8), ("qwen2", 12), ("qwen3", 16)],
)
def test_head_dim_is_the_configured_one_or_width_over_heads(kind, head_dim):
    assert head_dim_of(make_tiny_model(kind).config) == head_dim


SCHEME = QuantScheme(
    WeightScheme(group_size=16), ActivationScheme(group_size=16), OutlierScheme(8, reorder=True)
)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_every_linear_of_the_table_is_replaced_and_keeps_its_bias(kind):
    model = make_tiny_model(kind)
    block, family = model.model.layers[0], find_family(model.config.model_type)
    before = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    installed = install_linears(block, family, SCHEME)
    assert set(installed) == set(before)
    for name, linear in installed.items():
        assert block.get_submodule(name) is linear
        assert (linear.out_features, linear.in_features) == tuple(before[name].weight.shape)
        assert linear.bias is before[name].bias
    assert not any(isinstance(module, nn.Linear) for module in block.modules())


def gathers(linear: QuantizedLinear, channel: int, position: int) -> bool:
    """Whether an input at `channel` is multiplied at `position`; else it must stay where it is."""
    one = torch.zeros(1, linear.in_features)
    one[0, channel] = 1.0
    found = linear.quantize_input(one).nonzero()[:, 1].tolist()
    assert found in ([channel], [position])
    return found == [position]


def test_orders_are_owned_by_the_first_linear_and_gathered_unless_absorbed():
    block = make_tiny_model().model.layers[0]
    installed = install_linears(block, find_family("llama"), SCHEME)
    orders = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        orders[name] = torch.arange(installed[name].in_features).roll(len(orders) + 1)
        installed[name].set_perm(orders[name])
    owners = {
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "mlp.up_proj": "mlp.gate_proj",
    }
    for name, linear in installed.items():
        order = orders[owners.get(name, name)]
        assert torch.equal(linear.input_order().long(), order)
        assert gathers(linear, int(order[7]), 7) == (name != "mlp.down_proj")


def test_without_an_order_nothing_is_gathered_and_without_linears_nothing_is_replaced():
    block = make_tiny_model().model.layers[0]
    kept = copy.deepcopy(block)
    plain = QuantScheme(WeightScheme(group_size=16), ActivationScheme(group_size=16))
    for linear in install_linears(block, find_family("llama"), plain).values():
        assert not gathers(linear, 3, 7)
    kv_only = QuantScheme(WeightScheme(16), ActivationScheme(16), OutlierScheme(), KVScheme(4))
    assert install_linears(kept, find_family("llama"), kv_only) == {}
    assert not any(isinstance(module, QuantizedLinear) for module in kept.modules())


@pytest.mark.parametrize("key_position", ["before_rope", "after_rope"])
def test_a_deep_copy_of_a_block_quantizes_its_cache_too(key_position):
    kv = KVScheme(n_bits=3, key_position=key_position)
    model, block, hidden, positions = make_attention("qwen3")
    expected = attend(model, block, kv, hidden, positions)
    twin = copy.deepcopy(block).self_attn
    again = twin(hidden, position_embeddings=positions, attention_mask=None, position_ids=PLACES)[0]
    assert torch.equal(again, expected)


def test_a_group_that_is_flagged_so_is_not_transformed():
    model = make_tiny_model()
    family = find_family("llama")
    first, *others = family.groups
    partly = dataclasses.replace(family, groups=(dataclasses.replace(first, transformed=False), *others))
    activations, weights = ActivationScheme(group_size=16), WeightScheme(group_size=16)
    scheme = QuantScheme(weights, activations, transform="hadamard")
    linears = install_linears(model.model.layers[0], partly, scheme)
    assert {name for name, linear in linears.items() if linear.scheme.transform == "none"} == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    }


@pytest.mark.parametrize("key_position", ["before_rope", "after_rope"])
def test_keys_that_come_by_head_are_coded_as_those_that_come_by_token(key_position):
    """Gemma 3's k norm comes after the transpose; with as many tokens as heads shapes tell nothing."""
    model = make_tiny_model("gemma3")
    block, family, head_dim = model.model.layers[0], find_family("gemma3_text"), head_dim_of(model.config)
    balanced = {"key_offset": key_position == "before_rope", "key_balance": key_position == "after_rope"}
    kv = KVScheme(n_bits=4, key_position=key_position, rotation="hadamard", **balanced)
    norm = copy.deepcopy(block.self_attn.k_norm)
    install_kv_quantizer(block, family, kv, head_dim)
    n_heads = model.config.num_key_value_heads
    offset = torch.randn(n_heads, head_dim, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(n_heads, head_dim, generator=torch.Generator().manual_seed(2)) + 0.5
    of_rows = offset if key_position == "before_rope" else offset.repeat(2, 1, 1)
    block.self_attn.register_buffer("key_offset", of_rows.flatten(-2))
    if key_position == "after_rope":
        block.self_attn.register_buffer("key_scale", scale.flatten())
    keys = torch.randn(2, n_heads, n_heads, head_dim, generator=torch.Generator().manual_seed(1))
    angles = torch.arange(n_heads)[None, :, None] * torch.logspace(0, -2, head_dim // 2).repeat(2)
    cosine, sine = angles.cos(), angles.sin()
    if key_position == "after_rope":
        seen = {"position_embeddings": (cosine, sine), "position_ids": torch.arange(n_heads)[None]}
        block.self_attn.atomq_kv.on_attention(block.self_attn, (), seen)
    back = block.self_attn.k_norm(keys)
    for token in range(n_heads):
        x = norm(keys[:, :, token])
        if key_position == "before_rope":
            expected = fake_quantize_heads(x - offset, kv) + offset
        else:
            x, place = x[:, None], (cosine[:, token, None], sine[:, token, None])
            turned = turned_by_hand(x, *place, head_dim).float()
            coded = fake_quantize_heads((turned - offset) / scale, kv) * scale + offset
            expected = turned_by_hand(coded, place[0], -place[1], head_dim)[:, 0].float()
        assert torch.allclose(back[:, :, token], expected, atol=1e-5)


@pytest.mark.parametrize("family_name", ["llama", "qwen3", "phi3"])
def test_the_key_offset_is_taken_off_k_before_it_is_coded_and_added_back(family_name):
    model = make_tiny_model(family_name)
    family, block = find_family(family_name), model.model.layers[0]
    head_dim, kv = head_dim_of(model.config), KVScheme(n_bits=4, rotation="hadamard", key_offset=True)
    plain = copy.deepcopy(block)
    install_kv_quantizer(block, family, kv, head_dim)
    n_keys = model.config.num_key_value_heads
    offset = torch.randn(n_keys * head_dim, generator=torch.Generator().manual_seed(0))
    block.self_attn.register_buffer("key_offset", offset)
    hidden = torch.randn(1, N_TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for inner in dict.fromkeys((family.key, family.value)):
        seen = hidden
        if inner.endswith("k_norm"):
            seen = plain.self_attn.k_proj(hidden).unflatten(-1, (-1, head_dim))
        before, after = plain.get_submodule(inner)(seen), block.get_submodule(inner)(seen)
        heads = before.reshape(1, N_TOKENS, -1, head_dim)
        expected = heads.clone()
        first = model.config.num_attention_heads if family.key == family.value else 0
        if inner == family.key:
            keys = heads[:, :, first : first + n_keys] - offset.view(-1, head_dim)
            back = fake_quantize_heads(keys, kv) + offset.view(-1, head_dim)
            expected[:, :, first : first + n_keys] = back
        if inner == family.value:
            start = first + n_keys if first else 0
            expected[:, :, start:] = fake_quantize_heads(heads[:, :, start:], kv)
        assert torch.equal(after.reshape(expected.shape), expected), inner
