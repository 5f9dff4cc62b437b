"""Coordinate descent on codes and scales, from GPTQ's result on: every step lowers the output error.

The error of a linear with target T [N, K] is tr((T - V) H (T - V)^T) over the values V of its codes. GPTQ
visits every column once and looks back at none. A sweep here visits them again, with the present codes of
all others: first each group's scale takes its least-squares value, then each column's codes, one column
after another (both are exact minimizers of a parabola, so neither can raise the error), the INT8 outlier
columns last.

Column j's best value is v_j + R_j / H_jj with R = (T - V) H, and changing v_j by d changes R by -d H_j.
Inside a block this recursion is GPTQ's own with another matrix: with A_jk = H_jk / H_kk for k > j, it is
`gptq_block` on ``v + R diag(H)^-1 (I + A)^-1`` with the factor ``(I + A)^-1``. The same kernel runs both.

R is made for a span of several groups by one product over all columns; what changes in a group reaches the
later ones of its span by a small product.
"""

from __future__ import annotations

from collections.abc import Iterator
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
SPAN = 1024  # columns: enough for a product of full speed


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
    groups = [slice(*bounds) for bounds in group_bounds(n_normal, scheme.weights.group_size)]
    for _ in range(n_sweeps):
        for span, indices in _spans(groups):
            residual = state.error @ hessian[:, span]
            for index in indices:
                group = groups[index]
                own = slice(group.start - span.start, group.stop - span.start)
                before = state.values[:, group].clone()
                state.refit_scale(residual[:, own], hessian[group, group], index, group, scheme)
                scales = state.per_row(state.scales[:, index], scheme)
                zeros = None if state.zeros is None else state.per_row(state.zeros[:, index], scheme)
                for block in _blocks(group):
                    state.codes[:, block] = _redo_columns(
                        state, recursions, residual[:, own], group, block, scales, zeros, grid
                    )
                if group.stop < span.stop:
                    change = state.values[:, group] - before
                    residual[:, own.stop :].addmm_(change, hessian[group, group.stop : span.stop], alpha=-1)
        if state.outliers is not None and state.outliers.scales is not None:
            columns = slice(n_normal, target.shape[1])
            residual = state.error @ hessian[:, columns]
            scales = state.outliers.scales.to(target.dtype)
            for block in _blocks(columns):
                own = slice(block.start - n_normal, block.stop - n_normal)
                state.outliers.values[:, own] = _redo_columns(
                    state, recursions, residual, columns, block, scales, None, OUTLIER_GRID
                )
    return state.result()


def _spans(groups: list[slice]) -> Iterator[tuple[slice, range]]:
    """Runs of groups of at most SPAN columns, but at least one group: their columns, and their numbers."""
    first = 0
    while first < len(groups):
        last = first
        while last + 1 < len(groups) and groups[last + 1].stop - groups[first].start <= SPAN:
            last += 1
        yield slice(groups[first].start, groups[last].stop), range(first, last + 1)
        first = last + 1


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
        """(I + A)^-1 of the columns `block` [B, B], and diag(H)^-1 times it; see above."""
        if block.start not in self._made:
            own = self.hessian[block, block].double()
            diagonal = own.diagonal()
            identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
            follow = identity + torch.triu(own, 1) / diagonal
            factor = torch.linalg.solve_triangular(follow, identity, upper=True)
            dtype = self.hessian.dtype
            self._made[block.start] = (factor.to(dtype), (factor / diagonal.unsqueeze(1)).to(dtype))
        return self._made[block.start]


def _redo_columns(
    state: _State,
    recursions: _Recursions,
    residual: torch.Tensor,
    columns: slice,
    block: slice,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    grid: CodeGrid,
) -> torch.Tensor:
    """New codes [N, B] of the columns `block`, one after another, each the best given the rest.

    `residual` [N, width] is R of `columns`, of which `block` is a part; it is kept true for those after the
    block, and `state` for the block.
    """
    factor, steps = recursions.of(block)
    own = slice(block.start - columns.start, block.stop - columns.start)
    present = state.values[:, block]
    codes, new, _ = gptq_block(torch.addmm(present, residual[:, own], steps), scales, zeros, factor, grid)
    if block.stop < columns.stop:
        later = recursions.hessian[block, block.stop : columns.stop]
        residual[:, own.stop :].addmm_(new - present, later, alpha=-1)
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
        torch.sub(self.target[:, columns], values, out=self.error[:, columns])

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
        old = self.scales[:, index]
        q = self.values[:, group] / self.per_row(old, scheme).unsqueeze(-1)
        response = q @ hessian
        slope = _sum_rows((q * residual).sum(1), scheme.weights.channel_group)
        curvature = _sum_rows((q * response).sum(1), scheme.weights.channel_group)
        best = old + slope / curvature.clamp(min=torch.finfo(q.dtype).tiny)
        if self.base is not None and self.factors is not None:
            factors = (best / self.base).round().clamp_(1, MAX_FACTOR)
            new = self.base * factors
        else:
            new = round_to_stored(best)
        taken = (curvature > 0) & (new > 0) & ((new - best).abs() < (old - best).abs())
        new = torch.where(taken, new, old)
        if self.base is not None and self.factors is not None:
            self.factors[:, index] = torch.where(taken, factors, self.factors[:, index])
        residual.addcmul_(response, self.per_row(old - new, scheme).unsqueeze(-1))
        self.set_values(group, q * self.per_row(new, scheme).unsqueeze(-1))
        self.scales[:, index] = new

    def result(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.zeros, self.outliers, self.base, self.factors)


def _sum_rows(per_row: torch.Tensor, channel_group: int) -> torch.Tensor:
    """Sums [ceil(N / channel_group)] over neighbouring rows; the last may be short."""
    if padding := -len(per_row) % channel_group:
        per_row = torch.nn.functional.pad(per_row, (0, padding))
    return per_row.view(-1, channel_group).sum(1)
