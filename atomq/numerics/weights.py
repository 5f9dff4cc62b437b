"""Quantized weights: codes, scales and outliers of one linear, and the scales of a group of its columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from atomq.config import WeightScheme
from atomq.numerics.grid import CodeGrid
from atomq.numerics.groups import n_groups, spread_groups
from atomq.numerics.outliers import Outliers
from atomq.numerics.scales import (
    asymmetric_scales,
    find_zeros,
    progressive_base,
    progressive_factors,
    round_to_stored,
    scale_divisor,
    symmetric_scales,
)


@dataclass(frozen=True)
class QuantizedWeight:
    """Weight [N, K] in codes; the last k input channels are outliers.

    Attributes:
        codes: int16 [N, K-k].
        scales: [ceil(N / channel_group), G], exactly as stored; base * factor when progressive.
        zeros: like `scales`, integer-valued, if asymmetric, else None.
        outliers: encoded [N, k], or None if k is 0.
        base, factors: [N] and [N, G] of a progressive weight, else None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    outliers: Outliers | None
    base: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    def dequantize(self, scheme: WeightScheme, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that the codes stand for."""
        n_rows, n_normal = self.codes.shape
        grid = weight_grid(scheme)

        def per_code(per_group: torch.Tensor) -> torch.Tensor:
            rows = spread_rows(per_group.to(dtype), n_rows, scheme.channel_group)
            return spread_groups(rows, n_normal, scheme.group_size)

        zeros = None if self.zeros is None else per_code(self.zeros)
        normal = grid.values(self.codes.to(dtype), zeros)
        if n_normal:
            normal = normal * per_code(self.scales)
        return normal if self.outliers is None else torch.cat((normal, self.outliers.decode(dtype)), dim=1)

    def split(self, n_rows: list[int], scheme: WeightScheme) -> list[QuantizedWeight]:
        """The parts that `n_rows` rows each make; all but the last hold whole channel groups."""
        n_scales = [-(-n // scheme.channel_group) for n in n_rows]
        parts = []
        row = scale = 0
        for n, n_groups_of_rows in zip(n_rows, n_scales, strict=True):
            rows, groups = slice(row, row + n), slice(scale, scale + n_groups_of_rows)
            row, scale = row + n, scale + n_groups_of_rows
            outliers = self.outliers
            if outliers is not None:
                own_scales = None if outliers.scales is None else outliers.scales[rows]
                outliers = Outliers(outliers.values[rows], own_scales)
            parts.append(
                QuantizedWeight(
                    self.codes[rows],
                    self.scales[groups],
                    None if self.zeros is None else self.zeros[groups],
                    outliers,
                    None if self.base is None else self.base[rows],
                    None if self.factors is None else self.factors[rows],
                )
            )
        return parts


def weight_grid(scheme: WeightScheme) -> CodeGrid:
    return CodeGrid.of(scheme.number_format, scheme.n_bits, scheme.symmetric)


def spread_rows(per_rows: torch.Tensor, n_rows: int, channel_group: int) -> torch.Tensor:
    """Repeat [ceil(n_rows / channel_group), ...] for every row: [n_rows, ...]."""
    return per_rows if channel_group == 1 else per_rows.repeat_interleave(channel_group, dim=0)[:n_rows]


@dataclass(frozen=True)
class GroupScales:
    """Scales of one group of columns, one per channel group of rows, as stored; see `find_group_scales`."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    factors: torch.Tensor | None


def find_group_scales(
    columns: torch.Tensor,
    scheme: WeightScheme,
    clip_ratio: float | torch.Tensor,
    span: str,
    base: torch.Tensor | None = None,
) -> GroupScales:
    """Scales of one group of columns [N, width]: [ceil(N / channel_group)], rounded as they are stored.

    Args:
        clip_ratio: one for all, or [..., 1] to be tried side by side; the results are [..., ceil(N / ..)].
        base: [N] the rows' base scales if the scheme is progressive (`find_base_scales`), else None.
    """
    low, high = row_ranges(columns, scheme.channel_group)
    grid = weight_grid(scheme)
    if not scheme.symmetric:
        stored = round_to_stored(asymmetric_scales(low, high, clip_ratio, scheme.n_bits)[0])
        return GroupScales(stored, find_zeros(low.clamp(max=0) * clip_ratio, stored, scheme.n_bits), None)
    scales = symmetric_scales(torch.maximum(-low, high), clip_ratio, scale_divisor(grid, span))
    if base is not None:
        factors = progressive_factors(scales.unsqueeze(-1), base).squeeze(-1)
        factors = torch.where(torch.maximum(-low, high) > 0, factors, torch.ones_like(factors))
        return GroupScales(base * factors, None, factors)
    return GroupScales(round_to_stored(scales), None, None)


CLIP_STEPS = 21
CLIP_LOWEST = 0.5
_ELEMENTS_AT_ONCE = 2**26  # of all clip ratios together: 256 MiB in float32


def search_group_scales(
    columns: torch.Tensor,
    column_cost: torch.Tensor,
    scheme: WeightScheme,
    clip_ratio: float,
    span: str,
    base: torch.Tensor | None = None,
) -> GroupScales:
    """`find_group_scales` at the clip ratio, per channel group of rows, that costs least.

    Tries CLIP_STEPS ratios from `clip_ratio` down to CLIP_LOWEST of it and keeps, for each channel group, the
    one with the least sum of ``column_cost * (w - value of its code)^2``; of equal ones the largest.

    Args:
        column_cost: [width] what a squared error in each column costs.
    """
    n_rows, grid = columns.shape[0], weight_grid(scheme)
    ratios = clip_ratios(clip_ratio, columns.dtype, columns.device)
    tried = find_group_scales(columns, scheme, ratios, span, base)
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // (CLIP_STEPS * columns.shape[1]))
    row_cost = columns.new_empty(CLIP_STEPS, n_rows)
    scales = spread_rows(tried.scales.T, n_rows, scheme.channel_group).T  # (steps, N)
    zeros = None if tried.zeros is None else spread_rows(tried.zeros.T, n_rows, scheme.channel_group).T
    for first in range(0, n_rows, rows_at_once):
        part = slice(first, first + rows_at_once)
        scale = scales[:, part, None]
        zero = None if zeros is None else zeros[:, part, None]
        values = grid.values(grid.round(columns[part] / scale, zero), zero) * scale
        row_cost[:, part] = ((columns[part] - values).square() * column_cost).sum(-1)
    padding = -n_rows % scheme.channel_group
    padded = torch.nn.functional.pad(row_cost, (0, padding))
    cost = padded.view(CLIP_STEPS, -1, scheme.channel_group).sum(-1)
    # The first of equal ones, on every device: as many steps as there are before it.
    best = (cost > cost.amin(0)).long().cumprod(0).sum(0, keepdim=True)

    def chosen(tried: torch.Tensor) -> torch.Tensor:
        return tried.gather(0, best)[0]

    return GroupScales(
        chosen(tried.scales),
        None if tried.zeros is None else chosen(tried.zeros),
        None if tried.factors is None else chosen(tried.factors),
    )


@cache
def clip_ratios(highest: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The ratios [CLIP_STEPS, 1] to try, from `highest` down; kept, since a copy would wait for the GPU."""
    with torch.inference_mode(False):
        steps = torch.arange(CLIP_STEPS, dtype=torch.float64).unsqueeze(1)
        return (highest * (1 - (1 - CLIP_LOWEST) * steps / (CLIP_STEPS - 1))).to(dtype=dtype, device=device)


def find_base_scales(
    normal: torch.Tensor, scheme: WeightScheme, clip_ratio: float, span: str
) -> torch.Tensor | None:
    """Base scale of each row [N] from all normal columns [N, K-k], rounded as it is stored, if the scheme is
    progressive, else None.
    """
    if scheme.scale_mode == "exact" or not n_groups(normal.shape[1], scheme.group_size):
        return None
    largest = normal.abs().amax(-1)
    scales = symmetric_scales(largest, clip_ratio, scale_divisor(weight_grid(scheme), span))
    return round_to_stored(progressive_base(scales.unsqueeze(-1)))


def row_ranges(columns: torch.Tensor, channel_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each channel group of rows [ceil(N / channel_group)]; the last may be
    short.
    """
    low, high = columns.aminmax(dim=1)
    if channel_group == 1:
        return low, high
    padding = -columns.shape[0] % channel_group
    if padding:  # repeat the last row: it changes no range of its own group
        low = torch.cat((low, low[-1:].expand(padding)))
        high = torch.cat((high, high[-1:].expand(padding)))
    return low.view(-1, channel_group).amin(1), high.view(-1, channel_group).amax(1)
