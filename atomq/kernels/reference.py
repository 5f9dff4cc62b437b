"""The kernels' twins in torch: the same signatures and arithmetic on any device, for CPU runs and for tests.

Operands are the fronts' business to check.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from atomq.kernels.layout import ActivationFormat, Added, ChannelOrder, NormParameters, PackedHeads
from atomq.kernels.repack import SLOT_INPUTS, PackedActivations, pack_activations
from atomq.numerics.grid import CodeGrid
from atomq.numerics.groups import join_groups, split_groups
from atomq.numerics.hadamard import block_size
from atomq.numerics.packing import pack_codes, unpack_codes
from atomq.numerics.scales import (
    F16_LARGEST,
    F32_SMALLEST_NORMAL,
    progressive_base,
    progressive_factors,
    replace_zero_scales,
)


def gptq_block(
    weight_block: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    hinv_chol: torch.Tensor,
    grid: CodeGrid,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of `atomq.kernels.gptq.gptq_block`, which documents it.

    The product and the difference of an update are rounded one after the other, as in the kernel.
    """
    running = weight_block.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(
        weight_block.shape, dtype=torch.int8 if grid.signed else torch.uint8, device=running.device
    )
    quantized = torch.empty_like(running)
    errors = torch.empty_like(running)
    for j in range(running.shape[1]):
        column_codes = grid.round(running[:, j] / scales, zeros)
        column = grid.values(column_codes, zeros) * scales
        error = (running[:, j] - column) / hinv_chol[j, j]
        running[:, j + 1 :] -= error[:, None] * hinv_chol[j, j + 1 :]
        codes[:, j], quantized[:, j], errors[:, j] = column_codes, column, error
    return codes, quantized, errors


def quantize_act(
    x: torch.Tensor, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Twin of `atomq.kernels.activations.quantize_act`."""
    n_tokens, n_normal, group_size = x.shape[0], activations.n_normal, activations.group_size
    if n_tokens == 0:
        n_slots = activations.n_slots + activations.n_outlier_slots
        codes = x.new_empty((n_slots, 0, SLOT_INPUTS), dtype=torch.int8)
        return PackedActivations(codes, x.new_empty((activations.n_scale_rows, 0), dtype=torch.float32), 0)
    x = x.float() if order is None else x.float()[:, order.perm]
    normal, outliers = x[:, :n_normal], x[:, n_normal:]
    if activations.hadamard:
        starts = range(0, n_normal, group_size)
        normal = torch.cat([butterflies(normal[:, i : i + group_size]) for i in starts], dim=1)
    groups = split_groups(normal, group_size)  # (M, G, group)
    unclipped = groups.abs().amax(-1) * activations.clip_ratio / _divisor(7, x)
    scales = replace_zero_scales(unclipped)
    factors, scale_rows = torch.ones_like(scales), scales
    if activations.progressive:
        alive = unclipped >= F32_SMALLEST_NORMAL
        base = progressive_base(torch.where(alive, scales, torch.zeros_like(scales)))
        factors = torch.where(alive, progressive_factors(scales, base), factors)
        scale_rows = base[:, None]
        scales = scale_rows * factors
    codes = (groups / scales[..., None]).round().clamp(-8, 7) * factors[..., None]
    largest = functional.pad(outliers, (0, 1)).abs().amax(-1, keepdim=True)
    outlier_scales = replace_zero_scales(largest / _divisor(127, x))
    outlier_codes = (outliers / outlier_scales).round().clamp(-128, 127)

    packed = pack_activations(
        join_groups(codes, n_normal).to(torch.int8), scales, outlier_codes.to(torch.int8), None, group_size
    )
    token_scales = x.new_zeros(activations.n_scale_rows, packed.codes.shape[1])
    token_scales[: scale_rows.shape[1], :n_tokens] = scale_rows.T
    if activations.n_outliers:
        token_scales[-1:, :n_tokens] = outlier_scales.T
    return PackedActivations(packed.codes, token_scales, n_tokens)


def rms_norm_quantize(
    x: torch.Tensor,
    norm: NormParameters,
    activations: ActivationFormat,
    order: ChannelOrder | None = None,
    added: Added | None = None,
) -> PackedActivations:
    """Twin of `atomq.kernels.activations.rms_norm_quantize`."""
    x = (x if added is None else torch.add(x, added.delta, out=added.total)).float()
    inverse = 1 / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
    return quantize_act(x * inverse * norm.weight.float(), activations, order)


def layer_norm_quantize(
    x: torch.Tensor, norm: NormParameters, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Twin of `atomq.kernels.activations.layer_norm_quantize`."""
    assert norm.bias is not None
    centred = x.float() - x.float().mean(-1, keepdim=True)
    inverse = 1 / (centred.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
    return quantize_act(centred * inverse * norm.weight.float() + norm.bias.float(), activations, order)


def silu_mul_quantize(
    gate: torch.Tensor, up: torch.Tensor, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Twin of `atomq.kernels.activations.silu_mul_quantize`."""
    return quantize_act(functional.silu(gate.float()) * up.float(), activations, order)


def relu_quantize(
    x: torch.Tensor, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Twin of `atomq.kernels.activations.relu_quantize`."""
    return quantize_act(x.relu(), activations, order)


def quantize_kv(x: torch.Tensor, *, clip_ratio: float = 1.0, hadamard: bool = False) -> PackedHeads:
    """Twin of `atomq.kernels.kv.quantize_kv`."""
    x = x.float()
    if hadamard:
        x = butterflies(x)
    low, high = (end * clip_ratio for end in x.aminmax(dim=-1))
    scales = ((high - low) / _divisor(15, x)).clamp(max=F16_LARGEST).half()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    minima = low.clamp(-F16_LARGEST, F16_LARGEST).half()
    codes = ((x - minima.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15)
    return PackedHeads(pack_codes(codes, 4), torch.stack((scales, minima), dim=-1), x.shape[-1])


def dequantize_kv(heads: PackedHeads, dtype: torch.dtype, *, hadamard: bool = False) -> torch.Tensor:
    """Twin of `atomq.kernels.kv.dequantize_kv`."""
    codes = unpack_codes(heads.codes, 4, heads.head_dim, signed=False).float()
    scales, minima = heads.ranges.float().unbind(-1)
    values = codes * scales[..., None] + minima[..., None]
    return (butterflies(values) if hadamard else values).to(dtype)


def butterflies(x: torch.Tensor) -> torch.Tensor:
    """`numerics.hadamard.transform_blocks` in the kernels' order: distances 1, 2, 4 .., then 1/sqrt(p)."""
    size, step = block_size(x.shape[-1]), 1
    while step < size:
        pairs = x.reshape(-1, 2, step)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1).reshape(x.shape)
        step *= 2
    return x * torch.tensor(size**-0.5, dtype=x.dtype, device=x.device)


def _divisor(value: float, like: torch.Tensor) -> torch.Tensor:
    """A tensor, since on CUDA torch divides by a number through its reciprocal, which rounds differently."""
    return torch.tensor(value, dtype=like.dtype, device=like.device)
