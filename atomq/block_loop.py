"""The block loops: a model passes block by block, with the activations of all calibration windows.

`calibrate_blocks` gathers statistics of the float model. `quantize_blocks` hands one block after another
to `block_quantizer`; each sees the quantized activations and KV cache of all blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq import distributed
from atomq.block_quantizer import BlockQuantizer, Clock, LinearReport
from atomq.config import FLOAT_BITS, QuantScheme, Recipe
from atomq.errors import ConfigError
from atomq.method.statistics import StatisticsAccumulator
from atomq.models.attention import attention_for
from atomq.models.blocks import BlockInputs, block_groups, blocks_of, capture_block_inputs, linear_shapes
from atomq.models.experts import STARVED_TOKENS, ExpertRouting
from atomq.models.families import ModelFamily, find_family
from atomq.models.quantized import head_dim_of, restore_block
from atomq.models.streaming import StoredWeights, empty, empty_parameters
from atomq.numerics.channels import ChannelStatistics
from atomq.progress import OnProgress

# Told each finished block's name, the block and how its linears came out.
OnBlock = Callable[[str, nn.Module, list[LinearReport]], None]


@dataclass(frozen=True)
class FinishedBlock:
    """A block that an earlier run quantized; `read` gives its stored tensors by names relative to it."""

    reports: tuple[LinearReport, ...]
    read: Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class QuantizationReport:
    """What happened: one entry per linear, the widest linear's inputs, warnings for people, seconds per
    phase, and the tokens of each expert that saw too few.
    """

    linears: tuple[LinearReport, ...]
    widest_input: int
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    starved_experts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate_blocks(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    device: torch.device,
    on_progress: OnProgress,
    routing: ExpertRouting | None = None,
    weights: StoredWeights | None = None,
    scratch: Path | None = None,
) -> dict[str, ChannelStatistics]:
    """Statistics of every linear group's input in the float model, by the full name of the group's first
    linear.

    Args:
        model: float model on the CPU; blocks visit `device` one at a time.
        token_ids: int64 [n_windows, seq_len].
        routing: which tokens experts see; it takes note of starved ones.
        weights: where the blocks' weights are, if `model` is a skeleton without them.
        scratch: a folder for the activations; None keeps them on `device`.
    """
    routing = routing or ExpertRouting()
    family = find_family(model.config.model_type)
    token_ids = distributed.own_share(token_ids)
    inputs = first_inputs(model, family, token_ids, device, weights, scratch)
    blocks = blocks_of(model, family)
    statistics = {}
    for index, block in enumerate(blocks):
        on_progress(index, len(blocks), "channel statistics")
        _enter(block, f"{family.blocks}.{index}.", device, weights)
        routing.open(block, f"{family.blocks}.{index}", family, inputs)
        accumulators = _watch_inputs(block, family, token_ids.shape[1])
        inputs.run(block, f"{family.blocks}.{index}", _within_block(on_progress, index, len(blocks), inputs))
        for name, (accumulator, hook) in accumulators.items():
            hook.remove()
            statistics[f"{family.blocks}.{index}.{name}"] = accumulator.result()
        routing.close(block)
        block.cpu() if weights is None else empty_parameters(block)
    on_progress(len(blocks), len(blocks), "channel statistics")
    return statistics


def pass_float_blocks(
    model: PreTrainedModel, inputs: BlockInputs, device: torch.device, weights: StoredWeights
) -> None:
    """Pass `inputs` through all blocks of `model`, a skeleton; each is filled for its turn and emptied."""
    family = find_family(model.config.model_type)
    for index, block in enumerate(blocks_of(model, family)):
        prefix = f"{family.blocks}.{index}"
        _enter(block, f"{prefix}.", device, weights)
        inputs.run(block, prefix)
        empty_parameters(block)


def quantize_blocks(
    model: PreTrainedModel,
    recipe: Recipe,
    device: torch.device,
    on_progress: OnProgress,
    token_ids: torch.Tensor | None = None,
    statistics: dict[str, ChannelStatistics] | None = None,
    on_block: OnBlock | None = None,
    routing: ExpertRouting | None = None,
    weights: StoredWeights | None = None,
    finished: Mapping[int, FinishedBlock] | None = None,
    scratch: Path | None = None,
) -> QuantizationReport:
    """Quantize the blocks of `model` in place; it then is the simulation of the checkpoint.

    With `weights` the model is a skeleton: each block is filled when its turn comes and emptied after
    `on_block`, so that never more than one is in memory.

    Args:
        token_ids: calibration windows int64 [n_windows, seq_len]; needed if `recipe.needs_calibration`.
        statistics: `calibrate_blocks`'s result; made here if it is None and the recipe reorders.
        on_block: called with each block as soon as it is packed, and its reports.
        routing: which calibration tokens experts see.
        weights: where the blocks' weights are, if `model` is a skeleton without them.
        finished: blocks of an earlier run, which are only passed through.
        scratch: a folder for the activations; None keeps them on `device`.

    Raises:
        ConfigError: a linear is too narrow for the outliers, or calibration tokens are missing.
    """
    family, scheme, routing = find_family(model.config.model_type), recipe.scheme, routing or ExpertRouting()
    check_widths(model, family, scheme)
    if recipe.needs_calibration and token_ids is None:
        raise ConfigError("this recipe looks at activations; give calibration windows")
    clock = Clock()
    if scheme.outliers.reorder and statistics is None:
        assert token_ids is not None
        statistics = calibrate_blocks(model, token_ids, device, on_progress, routing, weights, scratch)
        clock.lap("statistics")
    solves = recipe.solver.method == "gptq" and scheme.weights.n_bits < FLOAT_BITS
    inputs = None
    if solves:
        assert token_ids is not None
        own_ids = distributed.own_share(token_ids)
        if recipe.solver.refine_steps and len(own_ids) < 2:
            raise ConfigError(
                "--refine learns on some windows and judges on others, in every process; "
                f"give it at least two calibration windows, not {len(own_ids)}"
            )
        inputs = first_inputs(model, family, own_ids, device, weights, scratch)
    reference = inputs.copy(scratch) if inputs is not None and recipe.solver.needs_reference else None
    model.set_attn_implementation(attention_for(model.config))
    blocks = blocks_of(model, family)
    named = model.config.dtype  # what the weights are stored in; a model made in memory may not say
    storage_dtype = named if isinstance(named, torch.dtype) else torch.float32
    reports: list[LinearReport] = []
    for index, block in enumerate(blocks):
        prefix = f"{family.blocks}.{index}"

        def within(share: float, doing: str, index: int = index) -> None:
            on_progress(index + share, len(blocks), doing)

        within(0.0, f"{prefix}: reading")
        done = (finished or {}).get(index)
        if done is not None:
            own = list(done.reports)
            if reference is not None:
                _enter(block, f"{prefix}.", device, weights)
                reference.run(block, prefix)
            if inputs is not None:
                restore_block(block, family, scheme, head_dim_of(model.config), done.read())
                block.to(device)
                within(0.8, "forward")
                inputs.run(block, prefix)
                clock.lap("forward")
        else:
            _enter(block, f"{prefix}.", device, weights)
            quantizer = BlockQuantizer(block, prefix, family, recipe, storage_dtype, clock)
            quantizer.prepare(statistics, head_dim_of(model.config), inputs, reference)
            if inputs is not None:
                routing.open(block, prefix, family, inputs)
            own = quantizer.solve(within)
            routing.close(block)
            if inputs is not None:
                quantizer.advance(within)
            own = quantizer.refined(own)
        reports += own
        if weights is None:
            block.cpu()
        if on_block is not None and done is None:
            on_block(prefix, block, own)
        if weights is not None:
            empty(block)
        clock.lap("writing")
    on_progress(len(blocks), len(blocks), "done")
    widest = max(shape.n_in for shape in linear_shapes(model, family).values())
    warnings = _warnings(reports, recipe) + _starving_warnings(routing)
    return QuantizationReport(tuple(reports), widest, warnings, clock.seconds, routing.starved)


def first_inputs(
    model: PreTrainedModel,
    family: ModelFamily,
    token_ids: torch.Tensor,
    device: torch.device,
    weights: StoredWeights | None,
    scratch: Path | None,
) -> BlockInputs:
    """Inputs of the first block, whether or not the model has its weights."""
    if weights is None:
        return capture_block_inputs(model, family, token_ids, device, scratch)
    with weights.before_blocks(model, family, token_ids) as ids:
        return capture_block_inputs(model, family, ids, device, scratch)


def _enter(block: nn.Module, prefix: str, device: torch.device, weights: StoredWeights | None) -> None:
    if weights is not None:
        weights.fill(block, prefix, device)
    block.to(device)


def check_widths(model: PreTrainedModel, family: ModelFamily, scheme: QuantScheme) -> None:
    """Refuse more outliers than a linear has inputs; at least one normal channel must remain.

    Raises:
        ConfigError: naming the linear and the most that it allows.
    """
    for name, shape in linear_shapes(model, family).items():
        if scheme.outliers.n_outliers >= shape.n_in:
            raise ConfigError(
                f"n_outliers {scheme.outliers.n_outliers} leaves no normal channel of the "
                f"{shape.n_in} inputs of {name}; use at most {shape.n_in - 1}"
            )


def _watch_inputs(
    block: nn.Module, family: ModelFamily, seq_len: int
) -> dict[str, tuple[StatisticsAccumulator, Any]]:
    """Attach an accumulator to the input of each group's first linear; answer it with its hook."""
    watched = {}
    for group in block_groups(block, family):
        linear = block.get_submodule(group.owner)
        assert isinstance(linear, nn.Linear)
        accumulator = StatisticsAccumulator(linear.in_features, linear.weight.device)

        def watch(
            _module: nn.Module,
            args: tuple[torch.Tensor],
            add: Any = accumulator.add,
            routed: bool = group.routed,
        ) -> None:
            # Some blocks flatten windows into rows; an expert sees tokens of many windows.
            add(args[0] if routed else args[0].reshape(-1, seq_len, args[0].shape[-1]))

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
    dropped = [r for r in reports if r.refined is False]
    if dropped:
        warnings.append(
            f"what was learned of the blocks of {len(dropped)} of {len(reports)} linears did no better on "
            f"held-out windows and was dropped"
        )
    dead = [r for r in reports if r.n_dead]
    if dead:
        worst = max(dead, key=lambda r: r.n_dead)
        warnings.append(
            f"{len(dead)} linears have input channels that were never active; "
            f"most: {worst.name} with {worst.n_dead}"
        )
    return tuple(warnings)


def _starving_warnings(routing: ExpertRouting) -> tuple[str, ...]:
    if not routing.starved:
        return ()
    least = min(routing.starved, key=lambda name: routing.starved[name])
    return (
        f"{len(routing.starved)} experts saw fewer than {STARVED_TOKENS} calibration tokens "
        f"and were calibrated on all of them; least: {least} with {routing.starved[least]}",
    )
