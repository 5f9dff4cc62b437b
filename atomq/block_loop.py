"""The block loops, and the only place where the steps of the method are put in order.

`calibrate_blocks` gathers statistics of the float model. `quantize_blocks`: statistics -> permutation ->
in-group transform -> scales and GPTQ -> pack, block by block. The Hessians of a block see the quantized
activations and KV cache of all blocks before it and of its own (Atom section 4.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq.config import FLOAT_BITS, QuantScheme, Recipe
from atomq.errors import AtomqError, ConfigError
from atomq.method.hessian import HessianAccumulator
from atomq.method.reorder import reorder_inputs, reorder_outputs
from atomq.method.solve import SolvedLinear, solve_group
from atomq.method.statistics import StatisticsAccumulator, channel_order
from atomq.models.blocks import BlockInputs, InputSeen, blocks_of, capture_block_inputs, linear_shapes
from atomq.models.families import LinearGroup, ModelFamily, find_family
from atomq.models.quantized import attention_for, head_dim_of, install_kv_quantizer, install_linears
from atomq.numerics.channels import ChannelStatistics
from atomq.numerics.linear import QuantizedLinear, transform_input
from atomq.progress import OnProgress

# Told each finished block's name and module.
OnBlock = Callable[[str, nn.Module], None]


@dataclass(frozen=True)
class LinearReport:
    """How one linear came out; see `method.solve.SolvedLinear`."""

    name: str
    method: str
    damp_frac: float | None
    damping_raised: bool
    relative_error: float | None
    n_dead: int


@dataclass(frozen=True)
class QuantizationReport:
    """What happened: one entry per linear, the widest linear's inputs, warnings for people, seconds per
    phase.
    """

    linears: tuple[LinearReport, ...]
    widest_input: int
    warnings: tuple[str, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate_blocks(
    model: PreTrainedModel, token_ids: torch.Tensor, device: torch.device, on_progress: OnProgress
) -> dict[str, ChannelStatistics]:
    """Statistics of every linear group's input in the float model, by the full name of the group's first
    linear.

    Args:
        model: float model on the CPU; blocks visit `device` one at a time.
        token_ids: int64 [n_windows, seq_len].
    """
    family = find_family(model.config.model_type)
    inputs = capture_block_inputs(model, family, token_ids, device)
    blocks = blocks_of(model, family)
    statistics = {}
    for index, block in enumerate(blocks):
        on_progress(index, len(blocks), "channel statistics")
        block.to(device)
        accumulators = _watch_inputs(block, family)
        inputs.run(block, _within_block(on_progress, index, len(blocks), inputs))
        for name, (accumulator, hook) in accumulators.items():
            hook.remove()
            statistics[f"{family.blocks}.{index}.{name}"] = accumulator.result()
        block.cpu()
    on_progress(len(blocks), len(blocks), "channel statistics")
    return statistics


def quantize_blocks(
    model: PreTrainedModel,
    recipe: Recipe,
    device: torch.device,
    on_progress: OnProgress,
    token_ids: torch.Tensor | None = None,
    statistics: dict[str, ChannelStatistics] | None = None,
    on_block: OnBlock | None = None,
) -> QuantizationReport:
    """Quantize the blocks of `model` in place; it then is the simulation of the checkpoint.

    Args:
        token_ids: calibration windows int64 [n_windows, seq_len]; needed if `recipe.needs_calibration`.
        statistics: `calibrate_blocks`'s result; made here if it is None and the recipe reorders.
        on_block: called with each block as soon as it is packed.

    Raises:
        ConfigError: a linear is too narrow for the outliers, or calibration tokens are missing.
    """
    family, scheme = find_family(model.config.model_type), recipe.scheme
    check_widths(model, family, scheme)
    if recipe.needs_calibration and token_ids is None:
        raise ConfigError("this recipe looks at activations; give calibration windows")
    clock = _Clock()
    if scheme.outliers.reorder and statistics is None:
        assert token_ids is not None
        statistics = calibrate_blocks(model, token_ids, device, on_progress)
        clock.lap("statistics")
    solves = recipe.solver.method == "gptq" and scheme.weights.n_bits < FLOAT_BITS
    inputs = None
    if solves:
        assert token_ids is not None
        inputs = capture_block_inputs(model, family, token_ids, device)
    model.set_attn_implementation(attention_for(scheme.kv))
    blocks = blocks_of(model, family)
    named = model.config.dtype  # what the weights are stored in; a model made in memory may not say
    storage_dtype = named if isinstance(named, torch.dtype) else torch.float32
    reports: list[LinearReport] = []
    for index, block in enumerate(blocks):
        prefix = f"{family.blocks}.{index}"
        block.to(device)
        linears = _prepare_block(block, prefix, family, scheme, statistics, storage_dtype)
        install_kv_quantizer(block, family, scheme.kv, head_dim_of(model.config))
        hessians: dict[str, HessianAccumulator] = {}
        if inputs is not None:
            on_progress(index, len(blocks), "Hessians")
            if recipe.solver.calibration == "block":
                hessians = _collect_hessians(block, linears, family.groups, inputs)
            clock.lap("hessians")
        if scheme.weights.n_bits < FLOAT_BITS:
            for group in family.groups:
                if inputs is not None and recipe.solver.calibration == "sequential":
                    hessians = _collect_hessians(block, linears, (group,), inputs)
                    clock.lap("hessians")
                on_progress(index + 0.5, len(blocks), f"{prefix}.{group.owner}")
                solved = _solve(group, linears, hessians.get(group.owner), recipe)
                reports += [
                    LinearReport(
                        f"{prefix}.{name}",
                        s.method,
                        s.damp_frac,
                        s.damping_raised,
                        s.relative_error,
                        s.n_dead,
                    )
                    for name, s in zip(group.linears, solved, strict=True)
                ]
                clock.lap("solving")
        if inputs is not None:
            on_progress(index + 0.8, len(blocks), "forward")
            inputs.run(block)
            if not bool(torch.isfinite(inputs.hidden).all()):
                raise AtomqError(f"{prefix} gives values that are not finite on the calibration text")
            clock.lap("forward")
        block.cpu()
        if on_block is not None:
            on_block(prefix, block)
        clock.lap("writing")
    on_progress(len(blocks), len(blocks), "done")
    widest = max(shape.n_in for shape in linear_shapes(model, family).values())
    return QuantizationReport(tuple(reports), widest, _warnings(reports, recipe), clock.seconds)


def check_widths(model: PreTrainedModel, family: ModelFamily, scheme: QuantScheme) -> None:
    """Refuse more outliers than a linear has inputs; at least one normal channel must remain.

    Raises:
        ConfigError: naming the linear and the most that it allows.
    """
    block = blocks_of(model, family)[0]
    for group in family.groups:
        width = block.get_submodule(group.owner).in_features
        assert isinstance(width, int)
        if scheme.outliers.n_outliers >= width:
            raise ConfigError(
                f"n_outliers {scheme.outliers.n_outliers} leaves no normal channel of the "
                f"{width} inputs of {family.blocks}.0.{group.owner}; use at most {width - 1}"
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
    floats: dict[str, Any] = {name: block.get_submodule(name) for g in family.groups for name in g.linears}
    linears = install_linears(block, family, scheme)
    weights: dict[str, torch.Tensor] = {name: linear.weight.detach() for name, linear in floats.items()}
    if scheme.outliers.reorder:
        assert statistics is not None
        own = {name: s for name, s in statistics.items() if name.startswith(f"{prefix}.")}
        orders = group_orders(own, scheme)
        for group in family.groups:
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
    n_tokens = inputs.hidden.shape[0] * inputs.hidden.shape[1]
    hessians = {}
    for group in groups:
        linear = linears[group.owner]
        width = linear.in_features
        accumulator = HessianAccumulator(width, inputs.hidden.device, holdout=n_tokens < width)
        hessians[group.owner] = accumulator
        linear.observer = accumulator.add if group is not groups[-1] else _add_and_stop(accumulator)
    inputs.observe(block)
    for group in groups:
        linears[group.owner].observer = None
    return hessians


def _add_and_stop(accumulator: HessianAccumulator) -> Callable[[torch.Tensor], None]:
    def observe(x: torch.Tensor) -> None:
        accumulator.add(x)
        raise InputSeen

    return observe


def _solve(
    group: LinearGroup,
    linears: dict[str, QuantizedLinear],
    hessian: HessianAccumulator | None,
    recipe: Recipe,
) -> list[SolvedLinear]:
    weights = [linears[name].dense_weight(torch.float32) for name in group.linears]
    solved = solve_group(weights, hessian, recipe.scheme, recipe.solver)
    for name, result in zip(group.linears, solved, strict=True):
        linears[name].set_codes(result.weight)
    return solved


def _watch_inputs(block: nn.Module, family: ModelFamily) -> dict[str, tuple[StatisticsAccumulator, Any]]:
    """Attach an accumulator to the input of each group's first linear; answer it with its hook."""
    watched = {}
    for group in family.groups:
        linear = block.get_submodule(group.owner)
        assert isinstance(linear, nn.Linear)
        accumulator = StatisticsAccumulator(linear.in_features, linear.weight.device)

        def watch(_module: nn.Module, args: tuple[torch.Tensor], add: Any = accumulator.add) -> None:
            add(args[0])

        watched[group.owner] = (accumulator, linear.register_forward_pre_hook(watch))
    return watched


def _within_block(
    on_progress: OnProgress, index: int, n_blocks: int, inputs: BlockInputs
) -> Callable[[int], None]:
    """Progress by windows inside block `index`."""
    done = 0

    def on_batch(n_windows: int) -> None:
        nonlocal done
        done += n_windows
        on_progress(index + done / inputs.hidden.shape[0], n_blocks, "channel statistics")

    return on_batch


def _warnings(reports: list[LinearReport], recipe: Recipe) -> tuple[str, ...]:
    """What a careful user should know about the run."""
    warnings = []
    rounded = [r.name for r in reports if r.method == "rtn"]
    if recipe.solver.method == "gptq" and rounded:
        warnings.append(
            f"{len(rounded)} of {len(reports)} linears were rounded to nearest: "
            f"there were too few calibration tokens for GPTQ to do better"
        )
    asked = recipe.solver.damp_frac
    careful = [r for r in reports if r.damp_frac not in (None, asked) and not r.damping_raised]
    if careful:
        warnings.append(
            f"{len(careful)} of {len(reports)} linears were solved with more damping than {asked:g}, "
            f"which did better on held-out tokens"
        )
    damped = [r for r in reports if r.damping_raised]
    if damped:
        worst = max(damped, key=lambda r: r.damp_frac or 0)
        warnings.append(
            f"{len(damped)} linears needed more damping than {recipe.solver.damp_frac:g}; "
            f"most: {worst.name} with {worst.damp_frac:g}"
        )
    dead = [r for r in reports if r.n_dead]
    if dead:
        worst = max(dead, key=lambda r: r.n_dead)
        warnings.append(
            f"{len(dead)} linears have input channels that were never active; "
            f"most: {worst.name} with {worst.n_dead}"
        )
    return tuple(warnings)


class _Clock:
    """Adds up wall seconds per phase; on CUDA a phase ends when its work is queued, which sums up all the
    same.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
