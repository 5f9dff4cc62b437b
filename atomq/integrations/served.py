"""A linear of a serving engine, which fuses q, k and v, or gate and up: from stored tensors to what computes.

Nothing here knows an engine. On a GPU the kernels compute, on the CPU the simulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from atomq.config import FLOAT_BITS, KVScheme, QuantScheme
from atomq.errors import CheckpointError, ConfigError
from atomq.formats.schema import check_values
from atomq.kernels.linear import KernelLinear, kernel_heads
from atomq.models.families import LinearGroup, ModelFamily
from atomq.numerics.kv import fake_quantize_heads
from atomq.numerics.linear import GroupInput, QuantizedLinear, linear_specs

Tensors = Mapping[str, torch.Tensor]
SHARED = ("perm", "clip_ratio")  # tensors of a linear group, which its first linear holds


def stored_names(n_out: int, n_in: int, scheme: QuantScheme) -> tuple[str, ...]:
    """Last names of the tensors that a fused linear takes from a checkpoint; those of SHARED are the first
    part's.
    """
    present = (scheme.outliers.reorder, scheme.activations.has_own_clips)
    shared = (name for name, there in zip(SHARED, present, strict=True) if there)
    return (*linear_specs(n_out, n_in, scheme), *shared)


def check_servable(scheme: QuantScheme, family: ModelFamily) -> None:
    """Refuse what a serving engine could only compute as something else.

    Raises:
        ConfigError: what, and how to quantize instead.
    """
    if family.has_experts:
        raise ConfigError("mixtures of experts are not served yet; export with --format compressed-tensors")
    if scheme.weights.n_bits == FLOAT_BITS:
        raise ConfigError("serving needs weights in codes; quantize with --preset atomq --kv-bits 16")
    plain_keys = family.key.endswith("k_proj") and family.key != family.value
    plain_keys &= scheme.kv.key_position == "before_rope" and not scheme.kv.has_key_offset
    if scheme.kv.n_bits < FLOAT_BITS and not plain_keys:
        raise ConfigError(
            "a serving engine can quantize K only where k_proj puts it out, and as it is there, without "
            "offsets or scales of its channels; quantize with --kv-bits 16, or for Llama, Mistral and Qwen2 "
            "with --set kv.key_position=before_rope --set kv.key_offset=false --set kv.key_balance=false"
        )


def find_group(family: ModelFamily, parts: Sequence[str]) -> LinearGroup | None:
    """The linear group that holds all `parts` (names relative to a block), or None if it holds none.

    Raises:
        ConfigError: an engine fuses linears that read different activations.
    """
    for group in family.groups:
        if parts[0] in group.linears:
            if not set(parts) <= set(group.linears):
                raise ConfigError(
                    f"{', '.join(parts)} are fused, but are not one linear group of the checkpoint"
                )
            return group
    return None


def fuse(parts: Sequence[Tensors], n_out: int, scheme: QuantScheme) -> dict[str, torch.Tensor]:
    """The tensors of linears that read one activation as those of one linear [n_out, n_in], rows under rows.

    Args:
        parts: in order; all but the first are empty if the checkpoint's own linear is fused.

    Raises:
        CheckpointError: parts with different tensors, another number of rows, or channel groups that would
            straddle two parts.
    """
    parts = [part for part in parts if part]
    if sum(len(part.get("qweight", ())) for part in parts) != n_out:
        raise CheckpointError(f"not all {n_out} rows of a linear were loaded; the checkpoint is not whole")
    names = parts[0].keys() - SHARED
    if any(part.keys() - SHARED != names for part in parts):
        raise CheckpointError("the fused linears do not have the same tensors; the checkpoint is not whole")
    if any(len(part["qweight"]) % scheme.weights.channel_group for part in parts[:-1]):
        raise CheckpointError(f"channel groups of {scheme.weights.channel_group} rows straddle two linears")
    fused = {name: torch.cat([part[name] for part in parts]) for name in names}
    return fused | {name: parts[0][name] for name in SHARED if name in parts[0]}


def served_linear(tensors: Tensors, group: LinearGroup, scheme: QuantScheme, n_in: int) -> nn.Module:
    """What computes a (fused) linear from its stored `tensors`, without bias, on their device.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or holds values that no writer makes.
        KernelError: on a GPU, a scheme outside the kernels' envelope.
    """
    n_out = len(tensors["qweight"])
    shapes = {name: spec.shape for name, spec in linear_specs(n_out, n_in, scheme).items()}
    shapes = {"perm": (n_in,), "clip_ratio": (1,)} | shapes
    for name in stored_names(n_out, n_in, scheme):
        if name not in tensors or tuple(tensors[name].shape) != shapes[name]:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise CheckpointError(f"{group.owner}.{name} is {found}; it must be {list(shapes[name])}")
    of_group = scheme if group.transformed else dataclasses.replace(scheme, transform="none")
    gathered = scheme.outliers.reorder and not group.absorbed_by
    linear = QuantizedLinear(n_in, n_out, of_group, None, GroupInput(None, gathered))
    for name, tensor in tensors.items():
        linear.register_buffer(name, tensor)
    check_values(group.owner, tensors, scheme)
    return KernelLinear(linear) if linear.device.type == "cuda" else linear


def quantize_cached(outputs: torch.Tensor, n_queries: int, head_dim: int, kv: KVScheme) -> torch.Tensor:
    """`outputs` [..., q + k + v] with K and V as the quantized cache gives them back.

    Args:
        n_queries: channels of q, which stay.
    """
    cached = outputs[..., n_queries:]
    heads = cached.reshape(*cached.shape[:-1], cached.shape[-1] // head_dim, head_dim)
    on_kernels = outputs.is_cuda and kv.n_bits == 4
    quantized = (kernel_heads if on_kernels else fake_quantize_heads)(heads, kv)
    return torch.cat((outputs[..., :n_queries], quantized.flatten(-2)), dim=-1)
