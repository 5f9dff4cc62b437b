"""A rotated model computes what the original does, family by family, and is refused where it would not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILY_MODELS, make_tiny_model, save_tiny_model

from atomq.errors import ConfigError
from atomq.models.families import RESIDUALS
from atomq.models.loading import load_float_model, open_float_model
from atomq.models.source import resolve_source
from atomq.numerics.rotation import random_signs, rotate

TOKENS = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TYPES = {kind: make_tiny_model(kind).config.model_type for kind in FAMILY_MODELS}
ROTATED = [kind for kind, model_type in TYPES.items() if model_type in RESIDUALS]


def rotated_model(source):
    model, weights = open_float_model(source, torch.float32, rotation="fused")
    weights.fill(model, "")
    return model


def test_the_usual_families_are_among_them():
    assert {TYPES[kind] for kind in ROTATED} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "granite",
        "smollm3",
        "phi3",
    }


@pytest.mark.parametrize("kind", ROTATED)
def test_logits_are_those_of_the_original(kind, tmp_path):
    source = resolve_source(str(save_tiny_model(tmp_path / "model", kind)))
    original = load_float_model(source, torch.float32)
    rotated = rotated_model(source)
    expected = original(TOKENS).logits
    assert (rotated(TOKENS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    before, after = dict(original.named_parameters()), dict(rotated.named_parameters())
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    kept = ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert {n for n in before if torch.equal(before[n], after[n])} == {n for n in before if n.endswith(kept)}
    assert rotated.config.tie_word_embeddings is False
    assert not torch.equal(after[head], after[embeddings])
    signs = random_signs(48, 1)
    assert torch.equal(after[embeddings], rotate(before[embeddings], signs))


def test_the_stream_of_a_rotated_model_has_no_outlier_channel(tmp_path):
    """The original's has one, which the tiny models' norms make."""
    source = resolve_source(str(save_tiny_model(tmp_path / "model")))
    inputs = {}
    for rotation, model in (("none", load_float_model(source)), ("fused", rotated_model(source))):
        seen = []
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0])
        )
        model(TOKENS)
        rms = seen[0].flatten(0, 1).square().mean(0).sqrt()
        inputs[rotation] = float(rms.max() / rms.median())
    assert inputs["none"] > 4
    assert inputs["fused"] < 3


@pytest.mark.parametrize("kind", sorted(FAMILY_MODELS.keys() - set(ROTATED)))
def test_other_families_are_refused(kind, tmp_path):
    source = resolve_source(str(save_tiny_model(tmp_path / "model", kind)))
    with pytest.raises(ConfigError, match=f"{TYPES[kind]} models cannot be rotated.*--rotate none"):
        open_float_model(source, rotation="fused")
