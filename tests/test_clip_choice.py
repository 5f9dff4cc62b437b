"""Clip ratios of a block: one for each linear group, searched on what the groups before it give."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny_model

from atomq import clip_choice
from atomq.block_loop import quantize_blocks
from atomq.config import override
from atomq.method.clip import search_clip
from atomq.models.experts import unfuse_experts
from atomq.models.families import find_family
from atomq.presets import find_preset

TOKENS = torch.randint(2, 256, (4, 40), generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "weights.group_size": 16,
    "activations.group_size": 16,
    "outliers.n_outliers": 5,
    "activations.clip_search": "output",
    "solver.descent_sweeps": 0,
}
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@pytest.fixture
def searches(monkeypatch) -> list[tuple[torch.Tensor, list[torch.Tensor], float]]:
    """Inputs, weights and result of every search, in order."""
    calls = []

    def search(x, weights, scheme):
        calls.append((x, weights, search_clip(x, weights, scheme)))
        return calls[-1][2]

    monkeypatch.setattr(clip_choice, "search_clip", search)
    return calls


def quantized(settings=None, kind="llama"):
    model = make_tiny_model(kind)
    unfuse_experts(model, find_family(model.config.model_type))
    recipe = override(find_preset("atomq"), SETTINGS | (settings or {}))
    report = quantize_blocks(model, recipe, torch.device("cpu"), lambda *_: None, TOKENS)
    return model, report


@pytest.mark.parametrize("calibration", ["block", "sequential"])
def test_every_group_has_a_ratio_of_its_own_that_all_its_linears_use(searches, calibration):
    model, report = quantized({"activations.n_bits": 3, "solver.calibration": calibration})
    found = iter(ratio for _, _, ratio in searches)
    reported = {linear.name: linear.clip_ratio for linear in report.linears}
    for index, block in enumerate(model.model.layers):
        for group in GROUPS:
            ratio = next(found)
            for name in group:
                linear = block.get_submodule(name)
                assert linear.input_scheme().activations.clip_ratio == ratio
                assert reported[f"model.layers.{index}.{name}"] == ratio
                assert ("clip_ratio" in linear._buffers) == (name == group[0])
    assert next(found, None) is None
    assert len(set(reported.values())) > 1
    assert max(reported.values()) <= find_preset("atomq").scheme.activations.clip_ratio + 1e-6


def test_a_group_is_searched_on_its_own_inputs_and_float_weights(searches):
    quantized()
    float_model = make_tiny_model()
    block = float_model.model.layers[0]
    seen = []
    block.self_attn.q_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    float_model(TOKENS)
    x, weights, _ = searches[0]
    projections = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    for weight, projection in zip(weights, projections, strict=True):
        # Order and transform cancel in the product.
        torch.testing.assert_close(x @ weight.T, projection(seen[0]).flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_group_sees_the_ratios_that_were_found_before_it(searches, monkeypatch):
    quantized()
    free = searches[1][0]
    first = {"left": True}

    def half_for_the_first(x, weights, scheme):
        searches.append((x, weights, 0.5))
        return 0.5 if first.pop("left", False) else 0.9

    searches.clear()
    monkeypatch.setattr(clip_choice, "search_clip", half_for_the_first)
    quantized()
    assert free.shape == searches[1][0].shape
    assert not torch.allclose(searches[1][0], free)


@pytest.mark.parametrize(("tokens", "windows"), [(80, 2), (119, 2), (120, 3), (1, 1), (4096, 4)])
def test_as_many_windows_are_looked_at_as_hold_the_tokens(searches, monkeypatch, tokens, windows):
    monkeypatch.setattr(clip_choice, "SEARCH_TOKENS", tokens)
    quantized()
    assert {len(x) for x, _, _ in searches} == {40 * windows}


@pytest.mark.parametrize("setting", [{"activations.clip_search": "none"}, {"activations.n_bits": 16}])
def test_without_the_setting_or_codes_of_activations_there_are_no_ratios(searches, setting):
    model, report = quantized(setting)
    assert not searches
    assert not any(name.endswith("clip_ratio") for name in model.state_dict())
    assert {linear.clip_ratio for linear in report.linears} == {None}


def test_every_expert_has_a_ratio_of_its_own_for_each_of_its_inputs(searches):
    model, _ = quantized({"activations.n_bits": 3}, kind="mixtral")
    found = iter(ratio for _, _, ratio in searches)
    for block in model.model.layers:
        for name in ("self_attn.q_proj", "self_attn.o_proj"):
            assert block.get_submodule(name).input_scheme().activations.clip_ratio == next(found)
        for part in ("gate_proj", "down_proj"):
            experts = {n: m for n, m in block.named_modules() if ".experts." in n and n.endswith(part)}
            assert len(experts) > 1
            assert [m.input_scheme().activations.clip_ratio for m in experts.values()] == [
                next(found) for _ in experts
            ]
