"""Operands of the GEMM kernels for tests, and the product of plain tensors that they stand for."""

from __future__ import annotations

import dataclasses

import torch

from atomq.kernels.repack import CanonicalWeight, pack_activations


def make_weight(
    n_channels: int,
    n_inputs: int,
    n_outliers: int,
    group_size: int,
    channel_group: int = 1,
    *,
    progressive: bool = False,
    float32_scales: bool = False,
    power_of_two: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> CanonicalWeight:
    """Random codes over all of -8..7, a different scale for every group and row, a bias."""
    generator = torch.Generator().manual_seed(seed)
    n_groups = -(-n_inputs // group_size)

    def scales(*shape: int) -> torch.Tensor:
        if power_of_two:
            return torch.randint(-2, 0, shape, generator=generator).float().exp2()
        return torch.rand(*shape, generator=generator) * 0.02 + 0.001

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    group_scales = scales(-(-n_channels // channel_group), n_groups)
    weight = CanonicalWeight(
        qweight=integers(0, 256, n_channels, -(-n_inputs // 2)).to(torch.uint8),
        scales=integers(1, 17, n_channels, n_groups).to(torch.uint8)
        if progressive
        else group_scales.to(torch.float32 if float32_scales else torch.float16),
        n_inputs=n_inputs,
        group_size=group_size,
        channel_group=1 if progressive else channel_group,
        scale_base=scales(n_channels) if progressive else None,
        outlier_weight=integers(-128, 128, n_channels, n_outliers).to(torch.int8) if n_outliers else None,
        outlier_scales=scales(n_channels).half() if n_outliers else None,
        bias=torch.zeros(n_channels) if power_of_two else torch.randn(n_channels, generator=generator),
    )
    return move(weight, device)


def move(operand, device):
    """A dataclass of tensors on another device."""
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(operand)
        if isinstance(value := getattr(operand, field.name), torch.Tensor)
    }
    return dataclasses.replace(operand, **tensors)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element after a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def make_inputs(
    n_tokens,
    weight: CanonicalWeight,
    *,
    base_scales: bool | None = None,
    n_bits: int = 4,
    power_of_two: bool = False,
    seed: int = 1,
):
    """Plain activations for a weight: codes, scales, outlier codes, outlier scales (CPU).

    `base_scales` makes them progressive; None does as the weight does.
    """
    base_scales = weight.is_progressive if base_scales is None else base_scales
    generator = torch.Generator().manual_seed(seed)
    n_groups = -(-weight.n_inputs // weight.group_size)
    low, high = (-8, 8) if n_bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (n_tokens, weight.n_inputs), generator=generator)
    if base_scales:
        factors = torch.randint(1, 17, (n_tokens, n_groups), generator=generator)
        codes *= factors.repeat_interleave(weight.group_size, 1)[:, : weight.n_inputs] if n_bits == 4 else 1
    shape = (n_tokens, 1 if base_scales else n_groups)
    if power_of_two:
        scales = torch.randint(-2, 0, shape, generator=generator).float().exp2()
        outlier_scales = torch.randint(-2, 0, shape[:1], generator=generator).float().exp2()
    else:
        scales = torch.rand(shape, generator=generator) * 0.05 + 0.005
        outlier_scales = torch.rand(n_tokens, generator=generator) * 0.01 + 0.001
    outliers = torch.randint(-128, 128, (n_tokens, weight.n_outliers), generator=generator).to(torch.int8)
    return codes.to(torch.int8), scales, outliers, outlier_scales


def pack_inputs(inputs, weight: CanonicalWeight, n_bits: int = 4):
    codes, scales, outliers, outlier_scales = inputs
    has_group_scales = scales.shape[1] * weight.group_size >= weight.n_inputs
    group_size = weight.group_size if has_group_scales else None
    if not weight.n_outliers:
        return pack_activations(codes, scales, None, None, group_size, n_bits)
    return pack_activations(codes, scales, outliers, outlier_scales, group_size, n_bits)


def plain_product(inputs, weight: CanonicalWeight) -> torch.Tensor:
    """The definition, from canonical tensors, in float64."""
    codes, scales, outliers, outlier_scales = (x.double() for x in inputs)
    nibbles = torch.stack((weight.qweight & 15, weight.qweight >> 4), dim=2).flatten(1)[:, : weight.n_inputs]
    weight_codes = ((nibbles.int() ^ 8) - 8).double()
    by_row = weight.scales.double().repeat_interleave(weight.channel_group, 0)[: weight.qweight.shape[0]]
    spread = by_row.repeat_interleave(weight.group_size, 1)[:, : weight.n_inputs]
    if weight.scale_base is not None:
        spread = spread * weight.scale_base.double()[:, None]
    token_spread = scales.repeat_interleave(weight.n_inputs if scales.shape[1] == 1 else weight.group_size, 1)
    total = (codes * token_spread[:, : weight.n_inputs]) @ (weight_codes * spread).T
    if weight.outlier_weight is not None:
        outlier_weight = weight.outlier_weight.double() * weight.outlier_scales.double()[:, None]
        total += (outliers * outlier_scales[:, None]) @ outlier_weight.T
    return total + weight.bias.double()
