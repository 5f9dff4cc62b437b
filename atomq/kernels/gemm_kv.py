"""GEMM that writes K or V straight into the cache's format: INT4 heads with a scale and a minimum each.

Atom's INT4-output GEMM meant to do so; here the range is the true one of every token and head, as
`quantize_kv` finds it.
"""

from __future__ import annotations

import dataclasses

import torch

from atomq.errors import KernelError
from atomq.kernels.gemm import (
    Engine,
    Tile,
    check_operands,
    default_engine,
    run_sm90,
    tile_for,
    w4a4_gemm,
)
from atomq.kernels.kv import quantize_kv
from atomq.kernels.layout import PackedHeads
from atomq.kernels.repack import PackedActivations, PackedWeight

FUSED_HEAD_DIMS = (64, 128)
"""Heads that the epilogue of the Hopper kernel makes; others take `w4a4_gemm`, then `quantize_kv`."""


def w4a4_gemm_kv(
    activations: PackedActivations,
    weight: PackedWeight,
    head_dim: int,
    *,
    clip_ratio: float = 1.0,
    hadamard: bool = False,
    dtype: torch.dtype = torch.float16,
) -> PackedHeads:
    """`quantize_kv` of the heads of `w4a4_gemm`, in one kernel where Hopper has one.

    The bits are those of the two kernels with the tile of `heads_tile`.

    Args:
        activations, weight: as `w4a4_gemm` takes them; the weight's N outputs are heads of `head_dim`.
        clip_ratio, hadamard: as `quantize_kv` takes them.
        dtype: float16 or bfloat16, to which the outputs are rounded before they are coded.

    Raises:
        KernelError: operands that do not fit, no CUDA device, or a device older than sm_80.
    """
    n_tokens, n_channels = check_operands(activations, weight, dtype)
    if head_dim < 1 or n_channels % head_dim or dtype == torch.float32 or not 0 < clip_ratio <= 1:
        raise KernelError(
            f"w4a4_gemm_kv: {n_channels} outputs in heads of {head_dim}, {dtype}, clip_ratio {clip_ratio}; "
            "it takes whole heads, float16 or bfloat16, and a clip_ratio above 0 and at most 1"
        )
    device, n_heads = weight.records.device, n_channels // head_dim
    engine = default_engine(torch.cuda.get_device_capability(device), activations, weight)
    if engine is not Engine.WGMMA_INT8 or head_dim not in FUSED_HEAD_DIMS or n_tokens == 0:
        heads = w4a4_gemm(activations, weight, dtype).view(n_tokens, n_heads, head_dim)
        return quantize_kv(heads, clip_ratio=clip_ratio, hadamard=hadamard)
    codes = torch.empty((n_tokens, n_heads, head_dim // 2), dtype=torch.uint8, device=device)
    ranges = torch.empty((n_tokens, n_heads, 2), dtype=torch.float16, device=device)
    tile = heads_tile(tile_for(activations, weight, dtype))
    outputs = (codes, ranges, clip_ratio)
    run_sm90(activations, weight, dtype, tile, outputs, HEAD_DIM=head_dim, HEAD_HADAMARD=int(hadamard))
    return PackedHeads(codes, ranges, head_dim)


def heads_tile(tile: Tile) -> Tile:
    """The Hopper kernel's tile for whole heads: one of 128 channels takes two panels side by side."""
    if tile.panels == 2 and tile.row_blocks == 1:
        would_spill = tile.max_registers > 0
        return dataclasses.replace(tile, has_neighbour=False) if would_spill else tile
    registers = 232 if tile.tokens > 64 else 0
    return dataclasses.replace(tile, n_warpgroups=2, row_blocks=1, k_teams=1, consumer_registers=registers)
