"""What is done to one block, and the only place where the steps of the method are put in order.

Permutation -> in-group transform -> clip ratios -> Hessians -> scales and codes, group of linears by group
of linears -> refinement of the whole block. The Hessians see the quantized activations and KV cache of the
block itself as well (Atom section 4.3). What the float model would do is computed beside it where a step aims
at that.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from atomq import distributed
from atomq.clip_choice import choose_clips
from atomq.config import FLOAT_BITS, QuantScheme, Recipe
from atomq.key_statistics import balance_keys, mean_key
from atomq.method.hessian import HessianAccumulator
from atomq.method.refine import Refinement, refine_block
from atomq.method.reorder import reorder_inputs, reorder_outputs
from atomq.method.routed import RoutedHessian
from atomq.method.solve import SolvedLinear, solve_group
from atomq.method.statistics import channel_order
from atomq.models.blocks import BlockInputs, InputSeen, block_groups, block_stages
from atomq.models.families import LinearGroup, ModelFamily
from atomq.models.quantized import (
    KVQuantizer,
    attention_name,
    install_kv_quantizer,
    install_linears,
    straight_through_heads,
)
from atomq.numerics.channels import ChannelStatistics
from atomq.numerics.linear import QuantizedLinear, transform_input
from atomq.numerics.products import halve_linears
from atomq.units import percent

# Told how much of the block is done, from 0 to 1, and what is being done.
OnStep = Callable[[float, str], None]


@dataclass(frozen=True)
class LinearReport:
    """How one linear was solved (see `method.solve.SolvedLinear`); the clip ratio of its input, None if that
    is the scheme's; and whether what its block learned was kept, None without refinement.
    """

    name: str
    method: str
    damp_frac: float | None
    damping_raised: bool
    relative_error: float | None
    n_dead: int
    clip_ratio: float | None = None
    refined: bool | None = None


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
    """Quantizes `block` in place: `prepare`, then `solve`, then `advance`."""

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
        self._floats: dict[str, torch.Tensor] = {}  # what the codes were solved from, for refinement
        self._inputs: BlockInputs | None = None
        self._reference: BlockInputs | None = None
        self._twin: nn.Module | None = None
        self._refinement: Refinement | None = None

    def prepare(
        self,
        statistics: dict[str, ChannelStatistics] | None,
        head_dim: int,
        inputs: BlockInputs | None,
        reference: BlockInputs | None,
    ) -> None:
        """Put quantized linears with float weights, permuted and transformed, and the KV quantizer into the
        block.

        Args:
            statistics: by full name, needed if the recipe reorders.
            inputs: what the block reads after quantized blocks; None if nothing is calibrated.
            reference: what it reads in the float model; None if the recipe does not need it.
        """
        self._inputs, self._reference = inputs, reference
        kv = self.recipe.scheme.kv
        of_keys = self._measure_keys(reference or inputs, head_dim)
        if inputs is not None and reference is not None:
            self._twin = copy.deepcopy(self.block)
            halve_linears(self._twin, inputs.device)
            reference.arguments[self._twin] = inputs.arguments[self.block]
        self._linears = _prepare_block(
            self.block, self.prefix, self.family, self.recipe.scheme, statistics, self._storage_dtype
        )
        install_kv_quantizer(self.block, self.family, kv, head_dim)
        for name, values in of_keys.items():
            self.block.get_submodule(attention_name(self.family)).register_buffer(name, values)

    def _measure_keys(self, inputs: BlockInputs | None, head_dim: int) -> dict[str, torch.Tensor]:
        """The buffers of the block's attention that the KV scheme asks for (`quantized.key_buffers`)."""
        kv = self.recipe.scheme.kv
        if not kv.has_key_offset:
            return {}
        assert inputs is not None
        if not kv.has_key_scale:
            return {"key_offset": mean_key(self.block, self.family, inputs, head_dim)}
        offset, scale = balance_keys(self.block, self.family, inputs, head_dim)
        return {"key_offset": offset, "key_scale": scale}

    def solve(self, on_step: OnStep) -> list[LinearReport]:
        """Find the codes of every linear; without calibration inputs by rounding to nearest."""
        stages = block_stages(self.block, self.family)
        rounds = (stages,) if self.recipe.solver.calibration == "block" else tuple((s,) for s in stages)
        reports: list[LinearReport] = []
        for parts in rounds:
            groups = tuple(group for part in parts for group in part)
            hessians: dict[str, HessianAccumulator] = {}
            if self._inputs is not None:
                if self.recipe.scheme.activations.has_own_clips:
                    on_step(0.0, "clip ratios")
                    choose_clips(self.block, parts, self._linears, self._inputs)
                    self.clock.lap("clip ratios")
                on_step(0.0, "Hessians")
                hessians = self._collect_hessians(groups, is_last=parts is rounds[-1])
                self.clock.lap("hessians")
            if self.recipe.scheme.weights.n_bits < FLOAT_BITS:
                reports += self._solve_groups(groups, hessians, on_step)
                self.clock.lap("solving")
        return reports

    def advance(self, on_step: OnStep) -> None:
        """Refine the block, and pass the calibration inputs through it, so that they are the next block's."""
        inputs, reference = self._inputs, self._reference
        assert inputs is not None
        if reference is not None and self.recipe.solver.refine_steps:
            self._refinement = self._refine(inputs, reference.hidden, on_step)
            self.clock.lap("refining")
        inputs.run(self.block, self.prefix)
        self.clock.lap("forward")

    def refined(self, reports: list[LinearReport]) -> list[LinearReport]:
        """`reports` of `solve` with what came of refining the block since."""
        refinement = self._refinement
        return [replace(r, refined=None if refinement is None else refinement.kept) for r in reports]

    def _refine(self, inputs: BlockInputs, targets: torch.Tensor, on_step: OnStep) -> Refinement:
        """Learn codes, scales, norms and biases together; norms and biases end as they will be stored."""
        attention: Any = self.block.get_submodule(attention_name(self.family))
        heads: KVQuantizer | None = getattr(attention, "atomq_kv", None)
        quantize = None if heads is None else heads.quantize
        if heads is not None:
            heads.quantize = straight_through_heads
        vectors = [p for p in self.block.parameters() if p.ndim == 1]
        result = refine_block(
            self._linears,
            self._floats,
            vectors,
            functools.partial(inputs.output, self.block),
            inputs.hidden,
            targets,
            self.recipe.solver,
            lambda share: on_step(0.6 + 0.4 * share, f"{self.prefix}: refining"),
        )
        if heads is not None and quantize is not None:
            heads.quantize = quantize
        for vector in vectors:
            vector.data = vector.data.to(self._storage_dtype).to(vector.dtype)
        self._floats = {}
        return result

    def _solve_groups(
        self, groups: tuple[LinearGroup, ...], hessians: dict[str, HessianAccumulator], on_step: OnStep
    ) -> list[LinearReport]:
        """Solve `groups`, each in one of the processes, and let all have the codes."""
        for group in groups if self.recipe.solver.refine_steps else ():
            self._floats |= {name: self._linears[name].dense_weight(torch.float32) for name in group.linears}
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

    def _collect_hessians(
        self, groups: tuple[LinearGroup, ...], *, is_last: bool
    ) -> dict[str, HessianAccumulator]:
        """Hessians of the quantized inputs of `groups` by owner, from passes as far as the last of them.

        An expert's have no asymmetric target: the float model may send a token to others. The last round of
        a block passes the float model on to the next one.
        """
        inputs, reference = self._inputs, self._reference
        assert inputs is not None
        twin = self._twin if self.recipe.solver.asymmetry else None
        n_tokens = distributed.total(inputs.hidden.shape[0] * inputs.hidden.shape[1])
        hessians: dict[str, HessianAccumulator | RoutedHessian] = {}
        kept: dict[str, torch.Tensor] = {}
        hooks = []
        for group in groups:
            name, ends = group.owner, group is groups[-1]
            linear = self._linears[name]
            width = linear.in_features
            if group.routed:
                hessians[name] = RoutedHessian(width, inputs.device)
            else:
                hessians[name] = HessianAccumulator(
                    width,
                    inputs.device,
                    holdout=n_tokens < width,
                    asymmetric=twin is not None and n_tokens >= width,
                )
            linear.observer = _adder(hessians[name], functools.partial(kept.get, name), ends=ends)
            if twin is not None:
                keeper = _keeper(linear, kept, name, ends=ends and not is_last)
                hooks.append(twin.get_submodule(name).register_forward_pre_hook(keeper))
        float_batches = inputs.batches() if reference is None else reference.batches()
        for batch, float_batch in zip(inputs.batches(), float_batches, strict=True):
            if is_last and reference is not None and self._twin is not None:
                reference.advance(self._twin, float_batch, self.prefix)
            elif reference is not None and twin is not None:
                reference.observe(twin, float_batch)
            inputs.observe(self.block, batch)
            kept.clear()
        for hook in hooks:
            hook.remove()
        for group in groups:
            self._linears[group.owner].observer = None
        if is_last and reference is not None and self._twin is not None:
            del reference.arguments[self._twin]
            self._twin = None
        found = {name: h.result() if isinstance(h, RoutedHessian) else h for name, h in hessians.items()}
        for hessian in found.values():
            hessian.finish()
        return found

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
        clip = None
        if self.recipe.scheme.activations.has_own_clips:
            clip = self._linears[group.owner].input_scheme().activations.clip_ratio
        return [
            _report(f"{self.prefix}.{name}", result, clip)
            for name, result in zip(group.linears, solved, strict=True)
        ]


def _last_error(found: dict[str, list[LinearReport]]) -> str:
    """What the linear before this one cost, for people who watch."""
    error = next((reports[-1].relative_error for reports in reversed(found.values()) if reports), None)
    return "" if error is None else f" (before it: error {percent(error)})"


def _report(name: str, solved: SolvedLinear, clip: float | None) -> LinearReport:
    facts = (solved.method, solved.damp_frac, solved.damping_raised, solved.relative_error, solved.n_dead)
    return LinearReport(name, *facts, clip)


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
    for group in groups if scheme.activations.has_own_clips else ():
        linears[group.owner].set_clip_ratio(scheme.activations.clip_ratio)  # where the search begins
    return linears


def _keeper(
    linear: QuantizedLinear, kept: dict[str, torch.Tensor], name: str, *, ends: bool
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    """Keeps the input of the twin's linear `name` as `linear` would order it, and `ends` the pass or not."""

    def observe(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept[name] = linear.order_channels(args[0])
        if ends:
            raise InputSeen

    return observe


def _adder(
    hessian: HessianAccumulator | RoutedHessian,
    float_input: Callable[[], torch.Tensor | None],
    *,
    ends: bool,
) -> Callable[[torch.Tensor], None]:
    """Adds what a linear sees to `hessian`, beside the twin's input of the same batch, and `ends` the pass or
    not.
    """

    def observe(x: torch.Tensor) -> None:
        if isinstance(hessian, RoutedHessian):
            hessian.add(x)
        else:
            hessian.add(x, float_input())
        if ends:
            raise InputSeen

    return observe
