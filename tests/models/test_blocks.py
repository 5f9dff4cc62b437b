"""Running a model block by block gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY_MODELS, make_tiny_model

from atomq.models.blocks import BlockInputs, InputSeen, blocks_of, capture_block_inputs, linear_shapes
from atomq.models.families import LinearShape, find_family
from atomq.numerics.products import waiting_dtype

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 256, (5, 20), generator=torch.Generator().manual_seed(0))


def capture(model) -> BlockInputs:
    return capture_block_inputs(model, find_family(model.config.model_type), TOKENS, CPU)


@pytest.mark.parametrize("tokens_per_batch", [1, 45, 8192])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_blocks_one_by_one_give_the_hidden_states_of_the_model(kind, tokens_per_batch, monkeypatch):
    monkeypatch.setattr("atomq.models.blocks.TOKENS_PER_BATCH", tokens_per_batch)
    model = make_tiny_model(kind)
    inputs = capture(model)
    assert torch.equal(inputs.hidden, model.model.embed_tokens(TOKENS))
    expected = model(TOKENS, output_hidden_states=True).hidden_states
    blocks = blocks_of(model, find_family(model.config.model_type))
    assert len(blocks) == 2
    for index, block in enumerate(blocks):
        inputs.run(block)
        hidden = inputs.hidden if index + 1 < len(blocks) else model.model.norm(inputs.hidden)
        assert torch.allclose(hidden, expected[index + 1], rtol=1e-4, atol=1e-4)


def test_sliding_windows_narrower_than_the_text_are_kept():
    model = make_tiny_model("mistral", sliding_window=4)
    inputs = capture(model)
    for block in model.model.layers:
        inputs.run(block)
    expected = model.model(TOKENS).last_hidden_state
    assert torch.allclose(model.model.norm(inputs.hidden), expected, rtol=1e-4, atol=1e-4)
    wide = make_tiny_model("mistral").model(TOKENS).last_hidden_state
    assert not torch.allclose(expected, wide, atol=1e-2)


def test_blocks_of_different_masks_get_their_own():
    model = make_tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    inputs = capture(model)
    for block in model.model.layers:
        inputs.run(block)
    expected = model.model(TOKENS).last_hidden_state
    assert torch.allclose(model.model.norm(inputs.hidden), expected, rtol=1e-4, atol=1e-4)


def test_activations_wait_in_bfloat16_on_a_gpu_and_blocks_compute_with_them_in_float32(monkeypatch):
    cuda = torch.device("cuda")
    assert waiting_dtype(torch.float32, cuda) == torch.bfloat16
    assert waiting_dtype(torch.float32, CPU) == torch.float32
    monkeypatch.setattr(
        "atomq.models.blocks.waiting_dtype", lambda dtype, _device: waiting_dtype(dtype, cuda)
    )
    model = make_tiny_model()
    inputs = capture(model)
    first = inputs.hidden.float()
    assert inputs.hidden.dtype == torch.bfloat16
    assert torch.equal(first, model.model.embed_tokens(TOKENS).bfloat16().float())
    exact = BlockInputs(first, inputs.arguments, CPU)
    inputs.run(model.model.layers[0])
    exact.run(model.model.layers[0])
    assert torch.equal(inputs.hidden, exact.hidden.bfloat16())


def test_observing_leaves_the_inputs_alone_and_ends_where_an_observer_has_seen_enough():
    model = make_tiny_model()
    inputs = capture(model)
    before, seen, block = inputs.hidden.clone(), [], model.model.layers[0]

    def stop(_module, args):
        seen.append(args[0].shape[0])
        raise InputSeen

    def never(*_):
        raise AssertionError("the pass went on")

    hooks = [
        block.mlp.gate_proj.register_forward_pre_hook(stop),
        block.mlp.up_proj.register_forward_pre_hook(never),
    ]
    inputs.observe(block, inputs.hidden)
    for hook in hooks:
        hook.remove()
    assert sum(seen) == len(before)
    assert torch.equal(inputs.hidden, before)


def test_batches_hold_as_many_windows_as_the_tokens_allow(monkeypatch):
    monkeypatch.setattr("atomq.models.blocks.TOKENS_PER_BATCH", 45)
    model = make_tiny_model()
    told: list[int] = []
    capture(model).run(model.model.layers[0], on_batch=told.append)
    assert told == [2, 2, 1]


def test_capturing_leaves_no_hook_behind_and_runs_no_block():
    model = make_tiny_model()
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = capture(model)
    hook.remove()
    assert not calls
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all("hidden_states" not in rest for rest in inputs.arguments.values())
    assert model(TOKENS).logits.shape == (5, 20, 256)


def test_a_failing_model_leaves_no_hook_behind():
    model = make_tiny_model()
    with pytest.raises(IndexError):
        capture_block_inputs(model, find_family("llama"), torch.full((1, 4), 999), CPU)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shapes_of_all_linears_are_read_off_the_model():
    shapes = linear_shapes(make_tiny_model("llama-mha-bias"), find_family("llama"))
    assert len(shapes) == 14
    assert shapes["model.layers.1.self_attn.o_proj"] == LinearShape(48, 64, True)
    assert shapes["model.layers.0.mlp.down_proj"] == LinearShape(48, 80, True)
    shapes = linear_shapes(make_tiny_model("qwen2"), find_family("qwen2"))
    assert shapes["model.layers.0.self_attn.k_proj"] == LinearShape(24, 48, True)
    assert shapes["model.layers.0.self_attn.o_proj"] == LinearShape(48, 48, False)
