"""Scales: from the values of a group to the factor between codes and values.

Rules of the format (docs/format.md): weight and KV scales are rounded to F16 before codes are made, unless
F16 cannot hold them as normal numbers; a group whose scale would be zero or subnormal in float32 is a zero
group, with scale 1 and codes 0; all rounding is half to even.
"""

from __future__ import annotations

import torch

from atomq.numerics.grid import CodeGrid

F16_SMALLEST_NORMAL = 2.0**-14
F16_LARGEST = 65504.0
F32_SMALLEST_NORMAL = 2.0**-126
MAX_FACTOR = 16


def scale_divisor(grid: CodeGrid, span: str = "full") -> float:
    """What a symmetric group's largest magnitude is divided by.

    `span` "full" is 2^(b-1) - 1 (7 for 4 bits), "half" is (2^b - 1) / 2 (7.5, GPTQ's); a code book is
    divided by its largest value.
    """
    if grid.codebook is not None:
        return max(grid.codebook)
    return float(2 ** (grid.n_bits - 1) - 1) if span == "full" else (2**grid.n_bits - 1) / 2


def divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """``x / divisor`` rounded once. On CUDA torch multiplies by the reciprocal of a Python number instead."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)  # a copy would wait for the GPU


def symmetric_scales(largest: torch.Tensor, clip_ratio: float | torch.Tensor, divisor: float) -> torch.Tensor:
    """``largest * clip_ratio / divisor`` with zero groups at 1. `largest` holds magnitudes, any shape."""
    return replace_zero_scales(divide(largest * clip_ratio, divisor))


def asymmetric_scales(
    lowest: torch.Tensor, highest: torch.Tensor, clip_ratio: float | torch.Tensor, n_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and integer zero points of groups that span [lowest, highest]; zero is made part of the span.

    scale = (hi - lo) * clip_ratio / (2^b - 1), zero = clamp(round(-lo * clip_ratio / scale), 0, 2^b - 1).
    """
    low, high = lowest.clamp(max=0) * clip_ratio, highest.clamp(min=0) * clip_ratio
    scales = replace_zero_scales(divide(high - low, 2**n_bits - 1))
    return scales, find_zeros(low, scales, n_bits)


def find_zeros(low: torch.Tensor, scales: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Zero points of ranges that start at `low` (<= 0), as integer-valued floats."""
    return (-low / scales).round().clamp_(0, 2**n_bits - 1)


def replace_zero_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales that float32 cannot hold as normal numbers become 1: their group is a zero group."""
    return torch.where(scales >= F32_SMALLEST_NORMAL, scales, torch.ones_like(scales))


def round_to_stored(scales: torch.Tensor) -> torch.Tensor:
    """Round scales to F16 where F16 holds them as normal numbers, else leave them (they force F32 on
    disk).
    """
    fits = (scales >= F16_SMALLEST_NORMAL) & (scales <= F16_LARGEST)
    return torch.where(fits, scales.to(torch.float16).to(scales.dtype), scales)


def stored_dtype(scales: torch.Tensor) -> torch.dtype:
    """float16 if every scale is a normal F16 number exactly, else float32."""
    exact = scales.to(torch.float16).to(scales.dtype) == scales
    return torch.float16 if bool((exact & (scales >= F16_SMALLEST_NORMAL)).all()) else torch.float32


def progressive_base(scales: torch.Tensor) -> torch.Tensor:
    """Base of each row: its largest group scale over 16. [..., G] -> [...], float32 precision."""
    return replace_zero_scales((scales.amax(-1) / MAX_FACTOR).float()).to(scales.dtype)


def progressive_factors(scales: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Integer factors 1..16 of group scales [..., G] over `base` [...]: rounded up, so that nothing is
    clipped more.

    The scale that a reader uses is ``base * factor`` in float32.
    """
    return (scales / base.unsqueeze(-1)).ceil().clamp_(1, MAX_FACTOR)


def straight_through(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized` with the gradient of `x`: rounding counts as the identity (arXiv 1308.3432)."""
    return x + (quantized - x).detach()
