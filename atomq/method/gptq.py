"""Weight codes: GPTQ (arXiv 2210.17323, Algorithm 1) as Atom uses it, and rounding to nearest.

Columns are taken in their stored order (the reordering has put salient channels last; no act-order). Column
blocks end where groups end, so every group's scale is found from fully compensated weights. Outlier columns
come last: they take up the compensation of all others and are then encoded in their own precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atomq.config import QuantScheme, SolverConfig
from atomq.errors import AtomqError
from atomq.kernels.gptq import gptq_block
from atomq.numerics.groups import group_bounds
from atomq.numerics.outliers import encode_outliers
from atomq.numerics.products import inverse_factor
from atomq.numerics.weights import (
    GroupScales,
    QuantizedWeight,
    find_base_scales,
    find_group_scales,
    search_group_scales,
    spread_rows,
    weight_grid,
)

MAX_COLUMN_BLOCK = 128
MAX_DAMP_FRAC = 100.0


@dataclass(frozen=True)
class DampedFactor:
    """`hinv_chol` [K, K]: upper Cholesky factor of the inverse of the damped Hessian; `dead` [K] bool
    channels.

    `damp_frac` is the fraction that was needed; above the configured one if the factorization failed at
    first.
    """

    hinv_chol: torch.Tensor
    dead: torch.Tensor
    damp_frac: float


def factorize_hessian(hessian: torch.Tensor, damp_frac: float) -> DampedFactor:
    """Damp and factorize `hessian` [K, K] in float64; the factor comes back in the Hessian's dtype.

    Channels that were never active get a unit diagonal. A failing factorization raises the damping tenfold.

    Raises:
        AtomqError: no damping up to MAX_DAMP_FRAC (or `damp_frac`, if larger) helps, so the Hessian is not
            finite.
    """
    dead = hessian.diagonal() == 0
    limit = max(damp_frac, MAX_DAMP_FRAC)  # a larger damping that was asked for is tried as it is
    diagonal = hessian.diagonal().double().masked_fill(dead, 1.0)
    while damp_frac <= limit:
        factor = inverse_factor(hessian, diagonal + damp_frac * diagonal.mean())
        if factor is not None:
            return DampedFactor(factor, dead, damp_frac)
        damp_frac *= 10
    raise AtomqError(
        f"the Hessian has no Cholesky factor even with damp_frac {damp_frac / 10:g}; "
        f"the activations are not finite"
    )


def gptq_quantize(
    weight: torch.Tensor, factor: DampedFactor, scheme: QuantScheme, solver: SolverConfig
) -> QuantizedWeight:
    """Quantize `weight` [N, K] (stored order and basis, not changed) column by column with compensation.

    Works in the weight's dtype: float32, or float64 on the CPU for oracles.
    """
    weights, n_outliers = scheme.weights, scheme.outliers.n_outliers
    W = weight.clone()
    W[:, factor.dead] = 0
    n_rows, n_normal = W.shape[0], W.shape[1] - n_outliers
    hinv_chol = factor.hinv_chol.to(W.dtype)
    grid = weight_grid(weights)
    base = find_base_scales(W[:, :n_normal], weights, solver.clip_ratio, solver.scale_span)
    codes = torch.empty(n_rows, n_normal, dtype=torch.int16, device=W.device)
    groups: list[GroupScales] = []
    for group_start, group_end in group_bounds(n_normal, weights.group_size):
        # An error in column j costs the output error^2 / hinv_chol[j, j]^2 after compensation (GPTQ, eq. 2).
        cost = hinv_chol.diagonal()[group_start:group_end] ** -2
        group = _find_scales(W[:, group_start:group_end], cost, scheme, solver, base)
        groups.append(group)
        scales = spread_rows(group.scales, n_rows, weights.channel_group)
        zeros = None if group.zeros is None else spread_rows(group.zeros, n_rows, weights.channel_group)
        for start in range(group_start, group_end, MAX_COLUMN_BLOCK):
            end = min(start + MAX_COLUMN_BLOCK, group_end)
            block, _, errors = gptq_block(
                W[:, start:end], scales, zeros, hinv_chol[start:end, start:end], grid
            )
            codes[:, start:end] = block
            W[:, end:] -= errors @ hinv_chol[start:end, end:]
    return _assemble(codes, groups, base, W[:, n_normal:], scheme)


def rtn_quantize(weight: torch.Tensor, scheme: QuantScheme, solver: SolverConfig) -> QuantizedWeight:
    """Quantize `weight` [N, K] by rounding every value to nearest; scales, clip and outliers as in GPTQ."""
    weights, n_outliers = scheme.weights, scheme.outliers.n_outliers
    n_rows, n_normal = weight.shape[0], weight.shape[1] - n_outliers
    grid = weight_grid(weights)
    base = find_base_scales(weight[:, :n_normal], weights, solver.clip_ratio, solver.scale_span)
    codes = torch.empty(n_rows, n_normal, dtype=torch.int16, device=weight.device)
    groups: list[GroupScales] = []
    for start, end in group_bounds(n_normal, weights.group_size):
        columns = weight[:, start:end]
        group = _find_scales(columns, columns.new_ones(end - start), scheme, solver, base)
        groups.append(group)
        scales = spread_rows(group.scales, n_rows, weights.channel_group).unsqueeze(-1)
        zeros = group.zeros
        if zeros is not None:
            zeros = spread_rows(zeros, n_rows, weights.channel_group).unsqueeze(-1)
        codes[:, start:end] = grid.round(columns / scales, zeros).to(torch.int16)
    return _assemble(codes, groups, base, weight[:, n_normal:], scheme)


def _find_scales(
    columns: torch.Tensor,
    cost: torch.Tensor,
    scheme: QuantScheme,
    solver: SolverConfig,
    base: torch.Tensor | None,
) -> GroupScales:
    """Scales of one group of columns as `solver.clip_search` says; `cost` [width] per squared error."""
    weights, clip_ratio, span = scheme.weights, solver.clip_ratio, solver.scale_span
    if solver.clip_search == "none":
        return find_group_scales(columns, weights, clip_ratio, span, base)
    if solver.clip_search == "mse":
        cost = torch.ones_like(cost)
    return search_group_scales(columns, cost, weights, clip_ratio, span, base)


def _assemble(
    codes: torch.Tensor,
    groups: list[GroupScales],
    base: torch.Tensor | None,
    outlier_columns: torch.Tensor,
    scheme: QuantScheme,
) -> QuantizedWeight:
    """Stack the groups' scales [.., G] and encode the outlier columns [N, k]."""

    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts, dim=1) if parts else codes.new_empty((0, 0), dtype=outlier_columns.dtype)

    outliers = None
    if scheme.outliers.n_outliers:
        outliers = encode_outliers(outlier_columns, scheme.outliers.precision, stored=True)
    return QuantizedWeight(
        codes,
        stack([group.scales for group in groups]),
        None if scheme.weights.symmetric else stack([g.zeros for g in groups if g.zeros is not None]),
        outliers,
        base,
        None if base is None else stack([g.factors for g in groups if g.factors is not None]),
    )
