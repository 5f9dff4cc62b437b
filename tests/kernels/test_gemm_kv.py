"""The GEMM that writes INT4 heads: its twin against plain arithmetic, its kernel against the two-step way."""

from __future__ import annotations

import pytest
import torch
from gemm_operands import make_inputs, make_weight, move, pack_inputs, plain_product

from atomq.errors import KernelError
from atomq.kernels import gemm_reference, gemm_tiles
from atomq.kernels.gemm import tile_for, w4a4_gemm
from atomq.kernels.gemm_kv import FUSED_HEAD_DIMS, heads_tile, w4a4_gemm_kv
from atomq.kernels.kv import quantize_kv
from atomq.kernels.loader import compile_for
from atomq.kernels.repack import repack_weight


def test_the_twin_codes_each_head_of_the_product():
    weight = make_weight(192, 448, 64, 128)
    inputs = make_inputs(5, weight)
    packed = gemm_reference.w4a4_gemm_kv(pack_inputs(inputs, weight), repack_weight(weight), 64)
    rows = plain_product(inputs, weight).float().half().double()
    for token in range(5):
        for head in range(3):
            values = rows[token, 64 * head : 64 * head + 64].tolist()
            scale, minimum = packed.ranges[token, head].tolist()
            assert minimum == pytest.approx(min(values), rel=2e-3)
            assert scale == pytest.approx((max(values) - min(values)) / 15, rel=2e-3)
            codes = [code for byte in packed.codes[token, head].tolist() for code in (byte & 15, byte >> 4)]
            for value, code in zip(values, codes, strict=True):
                assert abs((value - minimum) / scale - code) <= 0.52  # float32 sums, rounded to float16


@pytest.mark.parametrize("head_dim", FUSED_HEAD_DIMS)
def test_the_epilogue_compiles_without_spills(head_dim):
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    for n_tokens, n_panels, progressive, token_base in (
        (1, 64, False, False),
        (1, 448, True, False),  # two panels in two teams
        (1, 448, True, True),
        (64, 64, True, True),
        (96, 64, False, False),
        (147, 64, False, False),
        (192, 64, False, False),
        (1000, 64, True, True),
    ):
        tile = gemm_tiles.choose_tile(
            n_tokens, 128, progressive, token_base=token_base, n_panels=n_panels, n_slots=33
        )
        scale_bytes = 1 if progressive else 2
        defines = gemm_tiles.sm90_defines(heads_tile(tile), 128, scale_bytes, token_base, torch.bfloat16)
        defines |= {"HEAD_DIM": head_dim, "HEAD_HADAMARD": 1}
        kernel = compile_for("sm90_w4a4_gemm", "sm_90a", **defines)
        assert kernel.spill_bytes == 0, (n_tokens, n_panels, progressive, token_base)


def test_operands_on_a_cpu_are_refused():
    weight = make_weight(128, 448, 0, 128)
    activations = pack_inputs(make_inputs(3, weight), weight)
    with pytest.raises(KernelError, match="CUDA"):
        w4a4_gemm_kv(activations, repack_weight(weight), 64)


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize("n_tokens", [0, 1, 7, 16, 33, 64, 100, 129, 300])
def test_one_kernel_gives_the_bits_of_two(n_tokens, head_dim, hadamard):
    for n_heads, progressive, dtype in ((5, False, torch.float16), (2, True, torch.bfloat16)):
        weight = make_weight(n_heads * head_dim, 1216, 128, 128, progressive=progressive, device="cuda")
        activations = move(pack_inputs(make_inputs(n_tokens, weight), weight), "cuda")
        packed = repack_weight(weight)
        options = {"clip_ratio": 0.95, "hadamard": hadamard}
        tile = heads_tile(tile_for(activations, packed, dtype))
        heads = w4a4_gemm(
            activations, packed, dtype, tile=tile if head_dim in FUSED_HEAD_DIMS else None
        ).view(n_tokens, n_heads, head_dim)
        expected = quantize_kv(heads, **options)
        result = w4a4_gemm_kv(activations, packed, head_dim, dtype=dtype, **options)
        assert torch.equal(result.codes, expected.codes)
        assert torch.equal(result.ranges, expected.ranges)


@pytest.mark.gpu
def test_partial_heads_are_refused():
    weight = make_weight(130, 448, 0, 128, device="cuda")
    activations = move(pack_inputs(make_inputs(3, weight), weight), "cuda")
    with pytest.raises(KernelError, match="130 outputs in heads of 64"):
        w4a4_gemm_kv(activations, repack_weight(weight), 64)
