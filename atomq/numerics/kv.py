"""Quantization of the KV cache: asymmetric, per token and head (Atom section 4.4).

Per token and head: codes 0 .. 2^b - 1, an F16 scale and an F16 minimum, both rounded before codes are made:
value = code * scale + minimum. With the Hadamard rotation the head is transformed before coding and back
after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from atomq.config import KVScheme
from atomq.numerics.activations import compute_dtype
from atomq.numerics.hadamard import transform_blocks
from atomq.numerics.scales import F16_LARGEST, divide

OFFSET_TOKENS = 1024  # positions of K after RoPE that share an offset


class QuantizedHeads(NamedTuple):
    """`codes` [..., head_dim] integer-valued floats, `scales` and `minima` [...] F16 values in the same
    dtype.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor


def quantize_heads(x: torch.Tensor, scheme: KVScheme) -> QuantizedHeads:
    """Quantize heads `x` [..., head_dim].

    lo, hi = clip_ratio * min, clip_ratio * max; scale = F16((hi - lo) / (2^b - 1)), 1 where that is zero;
    minimum = F16(lo); code = clamp(round((x - minimum) / scale), 0, 2^b - 1), half to even.
    """
    x = x.to(compute_dtype(x.dtype))
    if scheme.rotation == "hadamard":
        x = transform_blocks(x)
    low, high = x.amin(-1), x.amax(-1)  # aminmax has no derivative in every torch
    low, high = low * scheme.clip_ratio, high * scheme.clip_ratio
    scales = _round_f16(divide(high - low, 2**scheme.n_bits - 1))
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    minima = _round_f16(low)
    codes = ((x - minima.unsqueeze(-1)) / scales.unsqueeze(-1)).round_().clamp_(0, 2**scheme.n_bits - 1)
    return QuantizedHeads(codes, scales, minima)


def dequantize_heads(heads: QuantizedHeads, scheme: KVScheme) -> torch.Tensor:
    """The values [..., head_dim] that the codes stand for, in the compute dtype."""
    values = heads.codes * heads.scales.unsqueeze(-1) + heads.minima.unsqueeze(-1)
    return transform_blocks(values) if scheme.rotation == "hadamard" else values


def fake_quantize_heads(
    x: torch.Tensor, scheme: KVScheme, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` [..., head_dim] as the cache would give it back, in `x`'s dtype.

    `offset` [n_heads, head_dim] is taken off `x` [..., n_heads, head_dim] before it is coded and added back.
    """
    if offset is None:
        return dequantize_heads(quantize_heads(x, scheme), scheme).to(x.dtype)
    dtype = compute_dtype(x.dtype)
    offset = offset.to(dtype)
    centred = x.to(dtype) - offset
    return (dequantize_heads(quantize_heads(centred, scheme), scheme) + offset).to(x.dtype)


def offset_row(positions: torch.Tensor, n_rows: int) -> torch.Tensor:
    """The row of K's offset after RoPE that each of `positions` takes; all behind the last row take that."""
    return (positions // OFFSET_TOKENS).clamp(max=n_rows - 1)


def _round_f16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-F16_LARGEST, F16_LARGEST).to(torch.float16).to(x.dtype)
