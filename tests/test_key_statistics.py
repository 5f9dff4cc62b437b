"""Offset and scale of K after RoPE of whole attentions, against what transformers attends with."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import FAMILY_MODELS, make_tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.masking_utils import eager_mask
from two_processes import in_two_processes

from atomq import distributed, key_statistics
from atomq.key_statistics import balance_keys
from atomq.models import quantized
from atomq.models.attention import Rotary, attention_for, turn
from atomq.models.blocks import blocks_of, capture_block_inputs
from atomq.models.experts import unfuse_experts
from atomq.models.families import find_family
from atomq.models.quantized import attention_name, head_dim_of
from atomq.numerics import kv
from atomq.numerics.kv import OFFSET_TOKENS

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 256, (4, 30), generator=torch.Generator().manual_seed(0))


class Kept(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor


def keep(module, query, key, value, mask, scaling=None, softcap=None, **_kwargs: Any):
    """An attention that leaves what it saw in `module.kept`, in float64."""
    q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    module.kept = Kept(q, key.double(), (scores + mask).softmax(-1))
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register("keep", keep)
AttentionMaskInterface.register("keep", eager_mask)


def make_model(kind: str, **changes):
    model = make_tiny_model(kind, **changes)
    family = find_family(model.config.model_type)
    unfuse_experts(model, family)
    model.set_attn_implementation(attention_for(model.config))
    return model, family


def balance_of(model, family, tokens=TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset [n_rows, n_heads, head_dim] and scale [n_heads, head_dim] of the first block."""
    inputs = capture_block_inputs(model, family, tokens, CPU)
    head_dim = head_dim_of(model.config)
    offset, scale = balance_keys(blocks_of(model, family)[0], family, inputs, head_dim)
    return offset.unflatten(-1, (-1, head_dim)), scale.view(-1, head_dim)


def kept_at(model, family, tokens: torch.Tensor, positions: torch.Tensor) -> Kept:
    """What the first block attends with where the tokens [n, T] lie at `positions` [n or 1, T]."""
    own = model.config._attn_implementation
    model.set_attn_implementation("keep")
    model(tokens, position_ids=positions.expand(len(tokens), -1), use_cache=False)
    model.set_attn_implementation(own)
    return blocks_of(model, family)[0].get_submodule(attention_name(family)).kept


@pytest.fixture
def short_rows(monkeypatch):
    """Rows of 16 positions, and scales for 100."""
    monkeypatch.setattr(key_statistics, "BALANCE_POSITIONS", 100)
    monkeypatch.setattr(key_statistics, "OFFSET_TOKENS", 16)
    monkeypatch.setattr(quantized, "OFFSET_TOKENS", 16)
    monkeypatch.setattr(kv, "OFFSET_TOKENS", 16)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 4.0, 9.0],
    "original_max_position_embeddings": 64,  # texts that are longer turn all of their tokens by the long ones
}
STRETCHED = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", sorted([*FAMILY_MODELS, *STRETCHED]))
def test_offset_and_scale_are_those_of_what_transformers_attends_with(name):
    """By the same rule, from scores, queries and K that the model's own code turned wherever they were put.

    OPT, which has no RoPE, but learned positions, is looked at where its tokens are.
    """
    kind, changes = STRETCHED.get(name, (name, {}))
    model, family = make_model(kind, **changes)
    offset, scale = balance_of(model, family)
    n_rows, n_heads = offset.shape[:2]
    assert n_rows == 256 // 16
    places = torch.arange(30)[None]
    w = kept_at(model, family, TOKENS, places).weights
    w = (w * (1 - w)).unflatten(1, (n_heads, -1))
    total = w.sum((0, 2, 3, 4))[:, None]
    with_end = torch.cat((TOKENS, TOKENS[:, :1]), 1)
    for row in (0, 5):  # the mean as each of the row's positions turns it, where a text ends with the row
        at = torch.arange(16 * row, 16 * row + 16)
        moves = [places if kind.startswith("opt") else torch.full((1, 30), n) for n in at.tolist()]
        moves = [torch.cat((move, at[None, -1:]), 1) for move in moves]
        keys = torch.stack([kept_at(model, family, with_end, move).key[:, :, :30] for move in moves]).mean(0)
        mean = torch.einsum("bhgqt,bhtd->hd", w, keys) / total
        assert torch.allclose(offset[row].double(), mean, rtol=2**-8, atol=1e-4)
    squares = of_queries = torch.zeros(())
    for start in [place * 70 // 7 for place in range(8)]:
        moved = torch.where(places > 0, places + start, places)
        kept = kept_at(model, family, TOKENS, places if kind.startswith("opt") else moved)
        off = kept.key - offset[moved[0] // 16].double().transpose(0, 1)
        squares = squares + torch.einsum("bhgqt,bhtd->hd", w, off.square())
        queries = kept.query.unflatten(1, (n_heads, -1)).square()
        of_queries = of_queries + torch.einsum("bhgq,bhgqd->hd", w.sum(-1), queries)
    assert torch.allclose(scale.double(), (squares / of_queries) ** 0.25, rtol=2**-7)


def test_windows_are_spread_over_the_text_and_no_more_are_looked_at_than_were_asked_for(monkeypatch):
    model, family = make_model("llama")
    few = balance_of(model, family, TOKENS[::2])
    monkeypatch.setattr(key_statistics, "BALANCE_TOKENS", 60)
    for found, expected in zip(balance_of(model, family), few, strict=True):
        assert torch.equal(found, expected)


def test_the_longest_models_share_the_last_row_and_every_model_has_one():
    config = make_tiny_model("llama").config
    config.max_position_embeddings = 10**6
    assert quantized.offset_rows(config) == quantized.MAX_OFFSET_ROWS == 128
    config.max_position_embeddings = OFFSET_TOKENS + 1
    assert quantized.offset_rows(config) == 2
    config.max_position_embeddings = 0
    assert quantized.offset_rows(config) == 1
    assert quantized.offset_rows(make_tiny_model("gemma3").config) == 1  # its RoPE is told by kind of layer
    positions = torch.tensor([[0, OFFSET_TOKENS - 1, OFFSET_TOKENS, 5 * OFFSET_TOKENS]])
    assert kv.offset_row(positions, 2).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("rope", "n_rows"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 128),
        ({"type": "yarn", "factor": 1.5, "original_max_position_embeddings": 32768}, 48),
        ({"type": "linear", "factor": 4.0}, 40),
        ({"type": "yarn", "factor": "many", "original_max_position_embeddings": 32768}, 40),
        (None, 40),
    ],
)
def test_a_context_that_rope_alone_stretches_has_rows_of_its_own(rope, n_rows, tmp_path):
    """As Qwen's files have it, where max_position_embeddings is left as it was."""
    settings = {
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rope_scaling": rope,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert quantized.offset_rows(AutoConfig.from_pretrained(tmp_path)) == n_rows


def _balance_of_own_share(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model, family = make_model("llama")
    return balance_of(model, family, distributed.own_share(windows))


@pytest.mark.usefixtures("short_rows")
def test_two_processes_find_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(key_statistics, "BALANCE_TOKENS", 30)  # one window: the second process has none
    expected = _balance_of_own_share(TOKENS)
    for found in in_two_processes(tmp_path, _balance_of_own_share, TOKENS):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = [
    ("llama-3.1", {}),
    ("phi3", {}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("gemma3", {}),
    ("qwen3", {}),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),  # cosines and sines have a factor
    ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}),
]


@pytest.mark.parametrize(("kind", "changes"), ROPES)
def test_rope_is_known_at_every_position_from_how_it_turns_the_second(kind, changes):
    model, family = make_model(kind, **changes)
    attention = blocks_of(model, family)[0].get_submodule(attention_name(family))
    inputs = capture_block_inputs(model, family, TOKENS, CPU)
    seen = key_statistics._attended(blocks_of(model, family)[0], attention, inputs, inputs.hidden[:1])
    places = torch.arange(30)
    rotary = Rotary(attention, seen.turns)
    heads = torch.randn(1, 30, 2, head_dim_of(model.config), generator=torch.Generator().manual_seed(1))
    expected = turn(attention, heads, seen.turns)
    assert torch.allclose(rotary.turn(heads, places), expected, atol=1e-5)
    assert torch.allclose(rotary.turn_back(expected, places), heads, atol=1e-5)
