"""Outlier channels: INT8 with a scale per row, or a direct cast to F16, F8_E5M2 or F8_E4M3 (OCP).

The same encoding serves both operands: a row is a token of the activations or an output channel of the weight
(Atom section 4.1; the paper keeps INT8).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from atomq.config import OutlierPrecision
from atomq.numerics.scales import round_to_stored, symmetric_scales

OUTLIER_DTYPES: dict[OutlierPrecision, torch.dtype] = {
    "int8": torch.int8,
    "fp16": torch.float16,
    "e5m2": torch.float8_e5m2,
    "e4m3": torch.float8_e4m3fn,
}


class Outliers(NamedTuple):
    """Encoded outliers: `values` [..., k] in a dtype of OUTLIER_DTYPES, `scales` [...] for INT8 else None."""

    values: torch.Tensor
    scales: torch.Tensor | None

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        decoded = self.values.to(dtype)
        return decoded if self.scales is None else decoded * self.scales.to(dtype).unsqueeze(-1)


def encode_outliers(x: torch.Tensor, precision: OutlierPrecision, *, stored: bool) -> Outliers:
    """Encode `x` [..., k]. INT8: scale = absmax / 127 per row, not clipped; casts saturate, half to even.

    Args:
        stored: the scales go to disk (weights), so they are rounded to F16 before codes are made.
    """
    if precision != "int8":
        dtype = OUTLIER_DTYPES[precision]
        limit = torch.finfo(dtype).max
        return Outliers(x.clamp(-limit, limit).to(dtype), None)
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scales = symmetric_scales(largest, 1.0, 127.0)
    if stored:
        scales = round_to_stored(scales)
    codes = (x / scales.unsqueeze(-1)).round_().clamp_(-128, 127)
    return Outliers(codes.to(torch.int8), scales)
