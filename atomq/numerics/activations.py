"""Dynamic quantization of activations, per token and group (Atom sections 4.1-4.2).

All arithmetic is float32 (float64 stays float64, for oracles) whatever the model's dtype: the CUDA kernel
computes the same, so the simulation, the packed model and the kernel agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from atomq.config import ActivationScheme, OutlierPrecision
from atomq.numerics.grid import CodeGrid
from atomq.numerics.groups import join_groups, split_groups
from atomq.numerics.outliers import Outliers, encode_outliers
from atomq.numerics.scales import (
    F32_SMALLEST_NORMAL,
    asymmetric_scales,
    divide,
    progressive_base,
    progressive_factors,
    scale_divisor,
    symmetric_scales,
)


class QuantizedActivations(NamedTuple):
    """Codes of one activation tensor, T tokens and K channels of which the last k are outliers.

    Attributes:
        codes: [T, K-k] integer values in floating point, or code-book indices.
        scales: [T, G] one per token and group; exactly base * factor when progressive.
        zeros: [T, G] integer zero points if asymmetric, else None.
        outliers: the last k channels, or None if k is 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    outliers: Outliers | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that quantized arithmetic runs in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize_activations(
    x: torch.Tensor, scheme: ActivationScheme, n_outliers: int, precision: OutlierPrecision
) -> QuantizedActivations:
    """Quantize `x` [..., K] (already in the group's order and transformed).

    scale = clip_ratio * absmax / divisor (of `scale_span`) per token and group, code = round(x / scale). A
    group without a normal float32 scale gets scale 1 and codes 0.
    """
    x = x.to(compute_dtype(x.dtype))
    n_normal = x.shape[-1] - n_outliers
    codes, scales, zeros = _quantize_groups(x[..., :n_normal], scheme)
    outliers = encode_outliers(x[..., n_normal:], precision, stored=False) if n_outliers else None
    return QuantizedActivations(join_groups(codes, n_normal), scales, zeros, outliers)


def fake_quantize_activations(
    x: torch.Tensor, scheme: ActivationScheme, n_outliers: int, precision: OutlierPrecision
) -> torch.Tensor:
    """The values that `quantize_activations` stands for, [..., K] in the compute dtype."""
    x = x.to(compute_dtype(x.dtype))
    n_normal = x.shape[-1] - n_outliers
    codes, scales, zeros = _quantize_groups(x[..., :n_normal], scheme)
    grid = CodeGrid.of(scheme.number_format, scheme.n_bits, scheme.symmetric)
    values = grid.values(codes, None if zeros is None else zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    normal = join_groups(values, n_normal)
    if not n_outliers:
        return normal
    outliers = encode_outliers(x[..., n_normal:], precision, stored=False)
    return torch.cat((normal, outliers.decode(x.dtype)), dim=-1)


def _quantize_groups(
    x: torch.Tensor, scheme: ActivationScheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes [..., G, group], scales [..., G] and zeros [..., G] or None of the normal channels."""
    grid = CodeGrid.of(scheme.number_format, scheme.n_bits, scheme.symmetric)
    grouped = split_groups(x, scheme.group_size)  # (..., G, group)
    if not scheme.symmetric:
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales, zeros = asymmetric_scales(low, high, scheme.clip_ratio, scheme.n_bits)
        codes = grid.round(grouped / scales.unsqueeze(-1), zeros.unsqueeze(-1))
        return codes, scales, zeros
    largest = grouped.abs().amax(-1)
    divisor = scale_divisor(grid, scheme.scale_span)
    scales = symmetric_scales(largest, scheme.clip_ratio, divisor)
    if scheme.scale_mode == "progressive":
        # A zero group has no say in the base, and the factor 1.
        alive = divide(largest * scheme.clip_ratio, divisor) >= F32_SMALLEST_NORMAL
        base = progressive_base(torch.where(alive, scales, torch.zeros_like(scales)))
        factors = torch.where(alive, progressive_factors(scales, base), torch.ones_like(scales))
        scales = base.unsqueeze(-1) * factors
    return grid.round(grouped / scales.unsqueeze(-1)), scales, None
