"""Coordinate descent on codes and scales, from GPTQ's result on: every step lowers the output error.

The error of a linear with target T [N, K] is tr((T - V) H (T - V)^T) over the values V of its codes. GPTQ
visits every column once and looks back at none. A sweep here visits them again, with the present codes of
all others: first each group's scale takes its least-squares value, then each column's codes, one column
after another (both are exact minimizers of a parabola, so neither can raise the error), the INT8 outlier
columns last.

Column j's best value is v_j + R_j / H_jj with R = (T - V) H, and changing v_j by d changes R by d H_j.
Inside a block this recursion is GPTQ's own with another matrix: with A_jk = H_jk / H_kk for k > j, it is
`gptq_block` on ``p (I + A)^-1`` with the factor ``(I + A)^-1``, where p = v + R / diag(H) + v A. The same
kernel runs both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atomq.config import QuantScheme
from atomq.kernels.gptq import MAX_COLUMNS, gptq_block
from atomq.numerics.grid import CodeGrid
from atomq.numerics.groups import group_bounds
from atomq.numerics.outliers import Outliers
from atomq.numerics.scales import MAX_FACTOR, round_to_stored
from atomq.numerics.weights import QuantizedWeight, spread_rows, weight_grid

OUTLIER_GRID = CodeGrid(8)


def descend(
    target: torch.Tensor,
    hessian: torch.Tensor,
    start: QuantizedWeight,
    scheme: QuantScheme,
    n_sweeps: int,
) -> QuantizedWeight:
    """Improve `start` by `n_sweeps` sweeps over scales and codes.

    Args:
        target: [N, K] what the weight should be, columns of dead channels zero.
        hessian: [K, K], damped: every diagonal entry is positive.
    """
    state = _State.of(start, target, scheme)
    n_normal = start.codes.shape[1]
    grid = weight_grid(scheme.weights)
    recursions = _Recursions(hessian)
    for _ in range(n_sweeps):
        for index, (first, last) in enumerate(group_bounds(n_normal, scheme.weights.group_size)):
            group = slice(first, last)
            residual = state.error @ hessian[:, group]
            state.refit_scale(residual, hessian[group, group], index, group, scheme)
            scales = state.per_row(state.scales[:, index], scheme)
            zeros = None if state.zeros is None else state.per_row(state.zeros[:, index], scheme)
            for block in _blocks(group):
                state.codes[:, block] = _redo_columns(
                    state, recursions, residual, group, block, scales, zeros, grid
                )
        if state.outliers is not None and state.outliers.scales is not None:
            scales = state.outliers.scales.to(target.dtype)
            for block in _blocks(slice(n_normal, target.shape[1])):
                residual = state.error @ hessian[:, block]
                own = slice(block.start - n_normal, block.stop - n_normal)
                state.outliers.values[:, own] = _redo_columns(
                    state, recursions, residual, block, block, scales, None, OUTLIER_GRID
                )
    return state.result()


def _blocks(columns: slice) -> list[slice]:
    """Runs of columns that the kernel takes at once."""
    starts = range(columns.start, columns.stop, MAX_COLUMNS)
    return [slice(start, min(start + MAX_COLUMNS, columns.stop)) for start in starts]


class _Recursions:
    """What a block's recursion needs of the Hessian, made once for all sweeps."""

    def __init__(self, hessian: torch.Tensor) -> None:
        self.hessian = hessian
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A [B, B] and (I + A)^-1 of the columns `block`; see above."""
        if block.start not in self._made:
            own = self.hessian[block, block]
            follow = torch.triu(own, 1) / own.diagonal()
            identity = torch.eye(len(own), dtype=torch.float64, device=own.device)
            factor = torch.linalg.solve_triangular(identity + follow.double(), identity, upper=True)
            self._made[block.start] = (follow, factor)
        return self._made[block.start]


def _redo_columns(
    state: _State,
    recursions: _Recursions,
    residual: torch.Tensor,
    group: slice,
    block: slice,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    grid: CodeGrid,
) -> torch.Tensor:
    """New codes [N, B] of the columns `block`, one after another, each the best given the rest.

    `residual` [N, width] is (T - V) H of the columns `group`, of which `block` is a part; it, and the values
    of `state`, are made those of the new codes as far as later columns need them.
    """
    hessian, (follow, factor) = recursions.hessian, recursions.of(block)
    own = slice(block.start - group.start, block.stop - group.start)
    present = state.values[:, block]
    best = present + residual[:, own] / hessian.diagonal()[block] + present @ follow
    start = (best.double() @ factor).to(best.dtype)
    codes, new, _ = gptq_block(start, scales, zeros, factor.to(best.dtype), grid)
    residual[:, own.stop :] -= (new - present) @ hessian[block, block.stop : group.stop]
    state.set_values(block, new)
    return codes


@dataclass
class _State:
    """The codes and scales of a `QuantizedWeight` in the works, the values V [N, K] they stand for, and their
    `error` T - V.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    outliers: Outliers | None
    base: torch.Tensor | None
    factors: torch.Tensor | None
    target: torch.Tensor
    values: torch.Tensor
    error: torch.Tensor

    @classmethod
    def of(cls, start: QuantizedWeight, target: torch.Tensor, scheme: QuantScheme) -> _State:
        outliers = start.outliers
        if outliers is not None:
            outliers = Outliers(outliers.values.clone(), outliers.scales)
        values = start.dequantize(scheme.weights, start.scales.dtype)
        return cls(
            start.codes.clone(),
            start.scales.clone(),
            start.zeros,
            outliers,
            start.base,
            None if start.factors is None else start.factors.clone(),
            target,
            values,
            target - values,
        )

    def set_values(self, columns: slice, values: torch.Tensor) -> None:
        """Give `columns` new `values` [N, width]."""
        self.values[:, columns] = values
        self.error[:, columns] = self.target[:, columns] - values

    def per_row(self, per_channel_group: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        """[N], contiguous, of one group's scales or zeros [ceil(N / channel_group)]."""
        return spread_rows(per_channel_group.contiguous(), len(self.codes), scheme.weights.channel_group)

    def refit_scale(
        self, residual: torch.Tensor, hessian: torch.Tensor, index: int, group: slice, scheme: QuantScheme
    ) -> None:
        """Give group `index` (the columns `group`) its least-squares scale under the present codes.

        With q the group's values over its scale: s + q R^T / (q H q^T), summed over the rows that share it.
        It is taken where, rounded as it is stored, it is nearer to that minimum than the present one.

        Args:
            residual: R [N, width] of the group, made that of the new scale.
            hessian: [width, width], the group's own part.
        """
        n_rows, channel_group = len(residual), scheme.weights.channel_group
        old, present = self.scales[:, index], self.values[:, group]
        q = present / spread_rows(old, n_rows, channel_group).unsqueeze(-1)
        slope = _sum_rows((q * residual).sum(1), channel_group)
        curvature = _sum_rows(((q @ hessian) * q).sum(1), channel_group)
        best = old + slope / curvature.clamp(min=torch.finfo(q.dtype).tiny)
        if self.base is not None and self.factors is not None:
            factors = (best / self.base).round().clamp_(1, MAX_FACTOR)
            new = self.base * factors
        else:
            new = round_to_stored(best)
        taken = (curvature > 0) & (new > 0) & ((new - best).abs() < (old - best).abs())
        self.scales[:, index] = torch.where(taken, new, old)
        if self.base is not None and self.factors is not None:
            self.factors[:, index] = torch.where(taken, factors, self.factors[:, index])
        values = q * spread_rows(self.scales[:, index], n_rows, channel_group).unsqueeze(-1)
        residual -= (values - present) @ hessian
        self.set_values(group, values)

    def result(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.zeros, self.outliers, self.base, self.factors)


def _sum_rows(per_row: torch.Tensor, channel_group: int) -> torch.Tensor:
    """Sums [ceil(N / channel_group)] over neighbouring rows; the last may be short."""
    padding = -len(per_row) % channel_group
    return torch.nn.functional.pad(per_row, (0, padding)).view(-1, channel_group).sum(1)
