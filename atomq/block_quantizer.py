"""What is done to one block, and the only place where the steps of the method are put in order.

Permutation -> in-group transform -> Hessians -> scales and codes, group of linears by group of linears.
The Hessians see the quantized activations and KV cache of the block itself as well (Atom section 4.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atomq import distributed
from atomq.config import FLOAT_BITS, QuantScheme, Recipe
from atomq.method.hessian import HessianAccumulator
from atomq.method.reorder import reorder_inputs, reorder_outputs
from atomq.method.routed import RoutedHessian
from atomq.method.solve import SolvedLinear, solve_group
from atomq.method.statistics import channel_order
from atomq.models.blocks import BlockInputs, InputSeen, block_groups, block_stages
from atomq.models.families import LinearGroup, ModelFamily
from atomq.models.quantized import install_kv_quantizer, install_linears
from atomq.numerics.channels import ChannelStatistics
from atomq.numerics.linear import QuantizedLinear, transform_input
from atomq.units import percent

# Told how much of the block is done, from 0 to 1, and what is being done.
OnStep = Callable[[float, str], None]


@dataclass(frozen=True)
class LinearReport:
    """How one linear came out; see `method.solve.SolvedLinear`."""

    name: str
    method: str
    damp_frac: float | None
    damping_raised: bool
    relative_error: float | None
    n_dead: int


class Clock:
    """Adds up wall seconds per phase; on CUDA a phase ends when its work is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class BlockQuantizer:
    """Quantizes `block` in place: first `prepare`, then `solve`."""

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        family: ModelFamily,
        recipe: Recipe,
        storage_dtype: torch.dtype,
        clock: Clock,
    ) -> None:
        """`prefix`: the block's full name. `storage_dtype`: of weights that stay in floating point."""
        self.block, self.prefix, self.family, self.recipe = block, prefix, family, recipe
        self.clock = clock
        self._storage_dtype = storage_dtype
        self._linears: dict[str, QuantizedLinear] = {}

    def prepare(self, statistics: dict[str, ChannelStatistics] | None, head_dim: int) -> None:
        """Put quantized linears with float weights, permuted and transformed, and the KV quantizer into the
        block. `statistics` by full name, needed if the recipe reorders.
        """
        self._linears = _prepare_block(
            self.block, self.prefix, self.family, self.recipe.scheme, statistics, self._storage_dtype
        )
        install_kv_quantizer(self.block, self.family, self.recipe.scheme.kv, head_dim)

    def solve(self, inputs: BlockInputs | None, on_step: OnStep) -> list[LinearReport]:
        """Find the codes of every linear; without `inputs` by rounding to nearest."""
        rounds = block_stages(self.block, self.family)
        if self.recipe.solver.calibration == "block":
            rounds = (tuple(group for stage in rounds for group in stage),)
        reports: list[LinearReport] = []
        for groups in rounds:
            hessians: dict[str, HessianAccumulator] = {}
            if inputs is not None:
                on_step(0.0, "Hessians")
                hessians = _collect_hessians(self.block, self._linears, groups, inputs)
                self.clock.lap("hessians")
            if self.recipe.scheme.weights.n_bits < FLOAT_BITS:
                reports += self._solve_groups(groups, hessians, on_step)
                self.clock.lap("solving")
        return reports

    def _solve_groups(
        self, groups: tuple[LinearGroup, ...], hessians: dict[str, HessianAccumulator], on_step: OnStep
    ) -> list[LinearReport]:
        """Solve `groups`, each in one of the processes, and let all have the codes."""
        owners = distributed.share_work([self._work_of(group) for group in groups])
        found: dict[str, list[LinearReport]] = {}
        for group, process in zip(groups, owners, strict=True):
            hessian = hessians.pop(group.owner, None)
            if process == distributed.rank():
                on_step(0.5, f"{self.prefix}.{group.owner}{_last_error(found)}")
                found[group.owner] = self._solve_group(group, hessian)
        reports: list[LinearReport] = []
        for group, process in zip(groups, owners, strict=True):
            for name in group.linears if distributed.n_processes() > 1 else ():
                linear = self._linears[name]
                linear.set_stored(distributed.tensors_from(process, linear.stored(), linear.device))
            reports += distributed.from_process(process, found.get(group.owner, []))
        return reports

    def _work_of(self, group: LinearGroup) -> float:
        """What solving `group` costs, roughly: its Hessian is factorized, and every row updated column by
        column.
        """
        linears = [self._linears[name] for name in group.linears]
        width = linears[0].in_features
        return float(width**2 * (width + sum(linear.out_features for linear in linears)))

    def _solve_group(self, group: LinearGroup, hessian: HessianAccumulator | None) -> list[LinearReport]:
        weights = [self._linears[name].dense_weight(torch.float32) for name in group.linears]
        solved = solve_group(weights, hessian, self.recipe.scheme, self.recipe.solver)
        for name, result in zip(group.linears, solved, strict=True):
            self._linears[name].set_codes(result.weight)
        return [
            _report(f"{self.prefix}.{name}", result)
            for name, result in zip(group.linears, solved, strict=True)
        ]


def _last_error(found: dict[str, list[LinearReport]]) -> str:
    """What the linear before this one cost, for people who watch."""
    error = next((reports[-1].relative_error for reports in reversed(found.values()) if reports), None)
    return "" if error is None else f" (before it: error {percent(error)})"


def _report(name: str, solved: SolvedLinear) -> LinearReport:
    return LinearReport(
        name, solved.method, solved.damp_frac, solved.damping_raised, solved.relative_error, solved.n_dead
    )


def group_orders(statistics: dict[str, ChannelStatistics], scheme: QuantScheme) -> dict[str, torch.Tensor]:
    """The permutation int32 [K] of every linear group, by the full name of its first linear."""
    return {name: channel_order(s.score(scheme.outliers.metric)) for name, s in statistics.items()}


def _prepare_block(
    block: nn.Module,
    prefix: str,
    family: ModelFamily,
    scheme: QuantScheme,
    statistics: dict[str, ChannelStatistics] | None,
    storage_dtype: torch.dtype,
) -> dict[str, QuantizedLinear]:
    """Put quantized linears with float weights, permuted and transformed, into `block`.

    Weights that stay in floating point are rounded to `storage_dtype` as they will be stored.
    """
    if not scheme.quantizes_linears:
        return {}
    groups = block_groups(block, family)
    floats: dict[str, Any] = {name: block.get_submodule(name) for g in groups for name in g.linears}
    linears = install_linears(block, family, scheme)
    weights: dict[str, torch.Tensor] = {name: linear.weight.detach() for name, linear in floats.items()}
    if scheme.outliers.reorder:
        assert statistics is not None
        own = {name: s for name, s in statistics.items() if name.startswith(f"{prefix}.")}
        orders = group_orders(own, scheme)
        for group in groups:
            perm = orders[f"{prefix}.{group.owner}"].to(weights[group.owner].device)
            linears[group.owner].set_perm(perm)
            for name in group.linears:
                weights[name] = reorder_inputs(weights[name], perm)
            for name in group.absorbed_by:
                bias = linears[name].bias
                weights[name], reordered = reorder_outputs(weights[name], bias, perm)
                if bias is not None and reordered is not None:
                    bias.data = reordered
    for name, linear in linears.items():
        weight = weights[name]
        weight = transform_input(weight, scheme) if linear.scheme.transform != "none" else weight
        linear.set_float_weight(weight.to(storage_dtype) if scheme.weights.n_bits == FLOAT_BITS else weight)
    return linears


def _collect_hessians(
    block: nn.Module,
    linears: dict[str, QuantizedLinear],
    groups: tuple[LinearGroup, ...],
    inputs: BlockInputs,
) -> dict[str, HessianAccumulator]:
    """Hessians of the quantized inputs of `groups` by owner, from one pass as far as the last of them."""
    n_tokens = distributed.total(inputs.hidden.shape[0] * inputs.hidden.shape[1])
    hessians: dict[str, HessianAccumulator | RoutedHessian] = {}
    for group in groups:
        linear = linears[group.owner]
        width, device = linear.in_features, inputs.device
        accumulator: HessianAccumulator | RoutedHessian
        if group.routed:
            accumulator = RoutedHessian(width, device)
        else:
            accumulator = HessianAccumulator(width, device, holdout=n_tokens < width)
        hessians[group.owner] = accumulator
        linear.observer = accumulator.add if group is not groups[-1] else _add_and_stop(accumulator)
    inputs.observe(block)
    for group in groups:
        linears[group.owner].observer = None
    found = {name: h.result() if isinstance(h, RoutedHessian) else h for name, h in hessians.items()}
    for hessian in found.values():
        hessian.add_up_processes()
    return found


def _add_and_stop(accumulator: HessianAccumulator | RoutedHessian) -> Callable[[torch.Tensor], None]:
    def observe(x: torch.Tensor) -> None:
        accumulator.add(x)
        raise InputSeen

    return observe
