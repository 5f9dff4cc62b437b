"""Kernels that follow one another without a pause give the same bits as with one: nobody reads too early."""

from __future__ import annotations

import pytest
import torch

from atomq.eval.gemm_kernels import random_weight
from atomq.kernels.activations import quantize_act
from atomq.kernels.gemm import w4a4_gemm
from atomq.kernels.layout import ActivationFormat, ChannelOrder

N_CHANNELS, N_OUTLIERS, N_LAYERS = 1024, 128, 6


def make_layers(progressive: bool):
    form = ActivationFormat(N_CHANNELS, N_OUTLIERS, clip_ratio=0.9, progressive=progressive)
    weights = [random_weight(N_CHANNELS, N_CHANNELS, N_OUTLIERS, 128, progressive) for _ in range(N_LAYERS)]
    return form, ChannelOrder.of(torch.randperm(N_CHANNELS, device="cuda"), form), weights


def run_layer(x, out, layer, form, order):
    """Quantize, multiply, and leave numbers of about 1 for the next layer."""
    w4a4_gemm(quantize_act(x, form, order), layer, out=out)
    out.mul_(out.float().std().reciprocal().half())


@pytest.mark.gpu
@pytest.mark.parametrize("progressive", [False, True], ids=["exact", "progressive"])
@pytest.mark.parametrize("n_tokens", [1, 16, 64, 130, 1000])
def test_a_chain_of_layers_in_a_graph_equals_one_with_pauses(n_tokens, progressive):
    form, order, weights = make_layers(progressive)
    x = torch.randn(n_tokens, N_CHANNELS, device="cuda", dtype=torch.float16)
    outputs = [torch.empty_like(x) for _ in weights]

    def run_all(pause):
        for before, out, weight in zip([x, *outputs], outputs, weights, strict=False):
            run_layer(before, out, weight, form, order)
            if pause:
                torch.cuda.synchronize()

    run_all(pause=True)
    expected = [out.clone() for out in outputs]
    assert all(bool(out.isfinite().all()) for out in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(pause=False)
    for _ in range(20):
        for out in outputs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [1, 16, 64, 130])
def test_products_that_share_an_output_follow_one_another(n_tokens):
    """Each writes where the one before it wrote, with split tiles' workspace in between."""
    form, order, weights = make_layers(progressive=False)
    x = torch.randn(n_tokens, N_CHANNELS, device="cuda", dtype=torch.float16)
    activations = quantize_act(x, form, order)
    last = w4a4_gemm(activations, weights[-1]).clone()
    out, copies = torch.empty_like(last), [torch.empty_like(last) for _ in weights]
    expected = [w4a4_gemm(activations, weight).clone() for weight in weights]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight, copy in zip(weights, copies, strict=True):
            w4a4_gemm(activations, weight, out=out)
            copy.copy_(out)
        for weight in weights:
            w4a4_gemm(activations, weight, out=out)
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, last)
        assert all(torch.equal(*pair) for pair in zip(copies, expected, strict=True))
