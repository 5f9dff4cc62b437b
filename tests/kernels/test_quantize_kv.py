"""INT4 heads: the twin is the simulation's arithmetic, packed; the kernels are the twins."""

from __future__ import annotations

import pytest
import torch

from atomq.config import KVScheme
from atomq.errors import KernelError
from atomq.kernels import reference
from atomq.kernels.kv import dequantize_kv, quantize_kv
from atomq.kernels.layout import PackedHeads
from atomq.kernels.loader import ARCHITECTURES, compile_for
from atomq.numerics.hadamard import transform_blocks
from atomq.numerics.kv import dequantize_heads, quantize_heads
from atomq.numerics.packing import unpack_codes

HEAD_DIMS = (1, 7, 64, 80, 96, 112, 128, 256, 300, 576)


def make_heads(n_tokens: int, n_heads: int, head_dim: int, dtype: torch.dtype = torch.float16):
    """Heads off centre and of different sizes, cut out of a fused projection; some constant, zero or huge."""
    generator = torch.Generator().manual_seed(n_tokens + head_dim)
    fused = torch.randn(n_tokens, 3, n_heads, head_dim, generator=generator)
    fused = (fused + torch.randn(n_tokens, 3, n_heads, 1, generator=generator)) * 3
    if n_tokens > 3:
        fused[0], fused[1], fused[2, :, 0], fused[3, 1, 0, 0] = 0, 2.5, 1e-6, 6e4
    return fused.to(dtype)[:, 1]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.95])
def test_codes_and_ranges_are_the_simulations(head_dim, clip_ratio):
    x, scheme = make_heads(9, 3, head_dim), KVScheme(n_bits=4, clip_ratio=clip_ratio)
    heads = quantize_kv(x, clip_ratio=clip_ratio)
    expected = quantize_heads(x, scheme)
    assert torch.equal(unpack_codes(heads.codes, 4, head_dim, signed=False).float(), expected.codes)
    assert torch.equal(heads.ranges.float(), torch.stack((expected.scales, expected.minima), dim=-1))
    assert torch.equal(dequantize_kv(heads, torch.float32), dequantize_heads(expected, scheme))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_transformed_heads_come_back(head_dim):
    x = make_heads(9, 3, head_dim)[4:]
    assert torch.allclose(reference.butterflies(x.float()), transform_blocks(x.float()), rtol=1e-4, atol=1e-4)
    heads = quantize_kv(x, hadamard=True)
    restored = dequantize_kv(heads, torch.float32, hadamard=True)
    largest_step = heads.ranges[..., :1].float()
    assert ((restored - x.float()).abs().mean(-1, keepdim=True) <= largest_step).all()


def test_no_heads_give_empty_results():
    heads = quantize_kv(torch.empty(0, 4, 96))
    assert (heads.codes.shape, heads.ranges.shape) == ((0, 4, 48), (0, 4, 2))
    assert dequantize_kv(heads, torch.float16).shape == (0, 4, 96)


def test_operands_that_do_not_fit_are_refused():
    x = torch.zeros(2, 3, 64)
    for call, message in (
        (lambda: quantize_kv(x[0]), "tokens x heads x head_dim"),
        (lambda: quantize_kv(x.double()), "float16, bfloat16 or float32"),
        (lambda: quantize_kv(torch.zeros(1, 1, 2000)), "1 to 1024"),
        (lambda: quantize_kv(x.transpose(1, 2)), "must be neighbours"),
        (lambda: quantize_kv(x, clip_ratio=0.0), "clip_ratio 0.0"),
        (lambda: dequantize_kv(quantize_kv(x), torch.int8), "to torch.int8"),
        (
            lambda: dequantize_kv(quantize_kv(x)._replace(head_dim=96), torch.float16),
            r"codes of .*\(2, 3, 48\)",
        ),
        (
            lambda: dequantize_kv(PackedHeads(*quantize_kv(x)[:1], torch.zeros(2, 3, 2), 64), torch.half),
            "ranges",
        ),
    ):
        with pytest.raises(KernelError, match=message):
            call()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 576])
@pytest.mark.parametrize("hadamard", [0, 1])
def test_kernels_compile_without_spilling(arch, head_dim, hadamard):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    defines = {"ELEMENT": "__half", "HEAD_DIM": head_dim, "HADAMARD": hadamard, "THREADS": 256}
    reports = [
        compile_for("quantize_kv", arch, **defines, LOAD_WIDTH=8, STORE_WIDTH=8),
        compile_for("dequantize_kv", arch, **defines, LOAD_WIDTH=8, STORE_WIDTH=8),
    ]
    assert not any(report.spill_bytes for report in reports), reports


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("hadamard", [False, True])
def test_kernels_equal_their_twins_bit_for_bit(head_dim, hadamard):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for n_tokens, n_heads in ((1, 1), (5, 3), (701, 5)):
            x = make_heads(n_tokens, n_heads, head_dim, dtype)
            for layout in (x, x.transpose(0, 1)):  # tokens first, heads first
                expected = reference.quantize_kv(layout, clip_ratio=0.95, hadamard=hadamard)
                actual = quantize_kv(layout.cuda(), clip_ratio=0.95, hadamard=hadamard)
                assert torch.equal(actual.ranges.cpu(), expected.ranges), (dtype, n_tokens)
                assert torch.equal(actual.codes.cpu(), expected.codes), (dtype, n_tokens)
                restored = dequantize_kv(actual, dtype, hadamard=hadamard)
                assert torch.equal(
                    restored.cpu(), reference.dequantize_kv(expected, dtype, hadamard=hadamard)
                )
