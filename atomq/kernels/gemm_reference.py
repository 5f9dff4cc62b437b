"""Twins of the GEMM kernels in torch: the same signatures on any device, and a float64 oracle for tests.

Both unpack the kernels' own operands, so they also prove the layouts. The integer part is exact: sums of a
group stay below 2^53 in float64 and below 2^24 in float32 (2,097,152 at most: 128 INT8 products); a
progressive row can exceed 2^24 and is summed in float64 in both.
"""

from __future__ import annotations

import torch

from atomq.kernels import reference
from atomq.kernels.layout import PackedHeads
from atomq.kernels.repack import (
    OUTLIERS_PER_SLOT,
    SLOT_INPUTS,
    PackedActivations,
    PackedWeight,
    unpack_activations,
    unpack_weight,
)


def w4a4_gemm(
    activations: PackedActivations, weight: PackedWeight, out_dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Twin of `atomq.kernels.gemm.w4a4_gemm`, which documents it: float32 across groups, in order."""
    return _multiply(activations, weight, torch.float32).to(out_dtype)


def w4a4_oracle(activations: PackedActivations, weight: PackedWeight) -> torch.Tensor:
    """The exact result, float64 [M, N]: integer group sums, scales as stored, everything else in float64."""
    return _multiply(activations, weight, torch.float64)


def w4a4_gemm_kv(
    activations: PackedActivations,
    weight: PackedWeight,
    head_dim: int,
    *,
    clip_ratio: float = 1.0,
    hadamard: bool = False,
    dtype: torch.dtype = torch.float16,
) -> PackedHeads:
    """Twin of `atomq.kernels.gemm_kv.w4a4_gemm_kv`, which documents it."""
    n_heads = weight.n_channels // head_dim
    heads = w4a4_gemm(activations, weight, dtype).view(activations.n_tokens, n_heads, head_dim)
    return reference.quantize_kv(heads, clip_ratio=clip_ratio, hadamard=hadamard)


def w4a16_gemm(x: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Twin of `atomq.kernels.gemm.w4a16_gemm`: float32 products of the dequantized weight."""
    return w4a16_oracle(x, weight, torch.float32).to(out_dtype or x.dtype)


def pack_tokens(x: torch.Tensor) -> torch.Tensor:
    """Twin of `atomq.kernels.gemm.pack_tokens`."""
    n_tokens, n_inputs = x.shape
    n_slots, n_rows = -(-n_inputs // SLOT_INPUTS), -(-n_tokens // 8) * 8
    padded = x.new_zeros(n_rows, n_slots * SLOT_INPUTS)
    padded[:n_tokens, :n_inputs] = x
    pieces = padded.view(n_rows, 2 * n_slots, 4, 8, 2)  # of 16 inputs: eight even ones, eight odd ones
    chunks = pieces.transpose(3, 4).reshape(n_rows, 2 * n_slots, 8, 8).transpose(0, 1)
    swizzled = torch.arange(8) ^ torch.arange(n_rows)[:, None] & 7  # its own inverse
    return chunks[:, torch.arange(n_rows)[:, None], swizzled].reshape(2 * n_slots, n_rows, SLOT_INPUTS // 2)


def w4a16_oracle(x: torch.Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The exact result [M, N]: everything in `dtype`, float64 unless asked."""
    codes, scales, _ = unpack_weight(weight)
    values = codes.to(dtype) * scales.to(dtype).repeat_interleave(weight.group_size, dim=1)
    total = x.to(dtype) @ values[:, : x.shape[1]].T + weight.channel_scales[2].to(dtype)
    result: torch.Tensor = total[:, : weight.n_channels]
    return result


def _multiply(activations: PackedActivations, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    weight_codes, weight_scales, outlier_weights = unpack_weight(weight)
    codes = unpack_activations(activations).double()
    n_tokens, n_slots = activations.n_tokens, weight.n_slots
    token_scales = activations.token_scales[:, :n_tokens].to(dtype)
    base_scales, outlier_scales, bias = weight.channel_scales.to(dtype)
    group = weight.group_size
    first_outlier = n_slots * SLOT_INPUTS
    factors = weight_scales if weight.is_progressive else torch.ones_like(weight_scales)
    operand = weight_codes.double() * factors.double().repeat_interleave(group, dim=1)
    if weight.is_progressive and activations.has_base_scales:
        total = (codes[:, :first_outlier] @ operand.T).to(dtype)
    else:
        total = torch.zeros(n_tokens, weight_codes.shape[0], dtype=dtype, device=codes.device)
        for index in range(n_slots * (SLOT_INPUTS // group)):
            part = slice(index * group, (index + 1) * group)
            sums = (codes[:, part] @ operand[:, part].T).to(dtype)  # (M, Np), exact integers
            if not weight.is_progressive:
                sums *= weight_scales[:, index].to(dtype)
            if not activations.has_base_scales:
                sums *= token_scales[index][:, None]
            total += sums
    if weight.is_progressive:
        total *= base_scales
    if activations.has_base_scales:
        total *= token_scales[0][:, None]
    n_outliers = weight.n_outlier_slots * OUTLIERS_PER_SLOT
    if n_outliers:
        sums = codes[:, first_outlier : first_outlier + n_outliers] @ outlier_weights.double().T
        total += sums.to(dtype) * outlier_scales * token_scales[-1][:, None]
    result: torch.Tensor = (total + bias)[:, : weight.n_channels]
    return result
