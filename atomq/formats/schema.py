"""What a checkpoint says about itself and which tensors it must hold (docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from atomq.config import FLOAT_BITS, QuantScheme, from_dict, to_dict
from atomq.errors import CheckpointError, ConfigError
from atomq.models.families import LinearGroup, LinearShape, ModelFamily
from atomq.numerics.finite import is_finite
from atomq.numerics.linear import TensorSpec, linear_specs

QUANT_METHOD = "atomq"
FORMAT_VERSION = 1
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def quantization_config(family: ModelFamily, scheme: QuantScheme) -> dict[str, Any]:
    """The `quantization_config` of config.json: enough to rebuild `family` and `scheme`."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "scheme": to_dict(scheme),
        "family": asdict(family),
    }


def parse_quantization_config(config: Mapping[str, Any]) -> tuple[ModelFamily, QuantScheme]:
    """Undo `quantization_config`.

    Raises:
        CheckpointError: another method or version, or a mode that this version does not know.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"quant_method is {config.get('quant_method')!r}, not {QUANT_METHOD!r}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format_version {version!r}; this atomq reads {FORMAT_VERSION}: "
            f"update atomq, or quantize the model again"
        )
    try:
        scheme = from_dict(QuantScheme, _as_written_now(config.get("scheme")), "scheme.")
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from error
    return _parse_family(config.get("family")), scheme


def _as_written_now(scheme: Any) -> Any:
    """A scheme with what files of before these settings came do not say: they had none of them.

    Raises:
        CheckpointError: progressive scales of that time, which had a byte for each factor. Where rows are of
            one group, their tensors look like those of now.
    """
    if not isinstance(scheme, dict):
        return scheme
    weights, activations = scheme.get("weights"), scheme.get("activations")
    is_progressive = isinstance(weights, dict) and weights.get("scale_mode") == "progressive"
    if is_progressive and isinstance(activations, dict) and "clip_search" not in activations:
        raise CheckpointError(
            "config.json: an early build wrote these progressive scales, a byte for each factor, which are "
            "not read any more; quantize the model again"
        )
    newer: dict[str, dict[str, Any]] = {
        "kv": {"key_offset": False, "key_balance": False},
        "activations": {"scale_span": "full", "clip_search": "none"},
    }
    tables = [part for part in newer if isinstance(scheme.get(part), dict)]
    return {**scheme, **{part: {**newer[part], **scheme[part]} for part in tables}}


def _parse_family(value: Any) -> ModelFamily:
    try:
        groups = tuple(
            LinearGroup(
                tuple(map(str, group["linears"])),
                tuple(map(str, group["absorbed_by"])),
                _boolean(group["transformed"]),
            )
            for group in value["groups"]
        )
        names = {name: str(value[name]) for name in asdict(ModelFamily("", ())) if name != "groups"}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"config.json: the table of linear groups is not readable ({error!r})"
        ) from None
    if not groups or not all(group.linears for group in groups):
        raise CheckpointError("config.json: the table of linear groups is empty")
    return ModelFamily(groups=groups, **names)


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def linear_tensors(
    family: ModelFamily, scheme: QuantScheme, shapes: Mapping[str, LinearShape]
) -> dict[str, TensorSpec]:
    """Name -> dtypes and shape of every tensor that replaces the weight of a linear.

    Args:
        shapes: the unquantized linears of all blocks by full name, such as "model.layers.0.mlp.up_proj".
    """
    if not scheme.quantizes_linears:
        return {}
    tensors: dict[str, TensorSpec] = {}
    for name, shape in shapes.items():
        specs = linear_specs(shape.n_out, shape.n_in, scheme)
        if not specs:
            specs = {"weight": TensorSpec(FLOAT_DTYPES, (shape.n_out, shape.n_in))}
        if shape.has_bias:
            specs["bias"] = TensorSpec(FLOAT_DTYPES, (shape.n_out,))
        if scheme.outliers.reorder and family.owns_group(name):
            specs["perm"] = TensorSpec((torch.int32,), (shape.n_in,))
        if scheme.activations.has_own_clips and family.owns_group(name):
            specs["clip_ratio"] = TensorSpec((torch.float32,), (1,))
        tensors |= {f"{name}.{suffix}": spec for suffix, spec in specs.items()}
    return tensors


def check_values(name: str, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> None:
    """Refuse values that no writer makes in the tensors of the module `name`, given by their last names.

    Raises:
        CheckpointError: naming the tensor, the first such value and its row, and the rule.
    """
    for sentence in wrong_values(name, tensors, scheme):
        raise CheckpointError(f"{sentence}; the file is broken")


def wrong_values(name: str, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> Iterator[str]:
    """A sentence for each tensor of the module `name` with values that no writer makes."""
    rules: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "zeros": (f"below {2**scheme.weights.n_bits}", lambda t: t <= 2**scheme.weights.n_bits - 1),
        "perm": ("a permutation", _occur_once),
    }
    positive = ("positive and finite", lambda t: t.isfinite() & (t > 0))
    rules |= dict.fromkeys(("scales", "scale_base", "outlier_scales", "key_scale"), positive)
    rules["clip_ratio"] = ("above 0 and at most 1", lambda t: (t > 0) & (t <= 1))
    for suffix, tensor in sorted(tensors.items()):
        rule, holds = rules.get(suffix, ("finite", _finite))
        if suffix in rules or (tensor.is_floating_point() and not is_finite(tensor)):
            right = holds(tensor)
            if not bool(right.all()):
                place = (~right).nonzero()[0].tolist()  # empty of a tensor that is one number
                value = float(tensor[tuple(place)])
                row = f" in row {place[0]} of {len(tensor)}" if place else ""
                yield f"{name}.{suffix} holds values that are not {rule}, first {value:g}{row}"


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.itemsize == 1 else tensor).isfinite()  # FP8 has none


def _occur_once(perm: torch.Tensor) -> torch.Tensor:
    """Which entries of `perm` are channels that occur in no other entry."""
    channels, entry_of, counts = torch.unique(perm.long(), return_inverse=True, return_counts=True)
    right: torch.Tensor = ((counts == 1) & (channels >= 0) & (channels < len(perm)))[entry_of]
    return right


def code_bytes(scheme: QuantScheme, shapes: Mapping[str, LinearShape]) -> int:
    """Bytes that all weights take: codes, scales, zeros and outliers, scales counted as F16."""
    total = 0
    for shape in shapes.values():
        specs = linear_specs(shape.n_out, shape.n_in, scheme)
        total += sum(torch.Size(s.shape).numel() * s.dtypes[0].itemsize for s in specs.values())
        if not specs:
            total += 2 * shape.n_out * shape.n_in
    return total


def effective_bits(scheme: QuantScheme, shapes: Mapping[str, LinearShape], head_dim: int) -> dict[str, float]:
    """Bits per weight, per activation (mean over linear inputs) and per KV entry, scales included.

    The tables that K is balanced by are the model's and not an entry's, so they are in its size alone.
    """
    n_weights = sum(shape.n_out * shape.n_in for shape in shapes.values())
    inputs = [shape.n_in for shape in shapes.values()]
    activation_bits = sum(_activation_bits(scheme, n_in) for n_in in inputs)
    kv_bits = scheme.kv.n_bits + (32 / head_dim if scheme.kv.n_bits < FLOAT_BITS else 0)
    return {
        "weight": 8 * code_bytes(scheme, shapes) / n_weights,
        "activation": activation_bits / sum(inputs),
        "kv": float(kv_bits),
    }


def _activation_bits(scheme: QuantScheme, n_in: int) -> float:
    """Bits of one token's input of width `n_in`: codes, float32 scales (or base and factors), outliers."""
    activations, outliers = scheme.activations, scheme.outliers
    if activations.n_bits == FLOAT_BITS:
        return 16.0 * n_in
    n_normal = n_in - outliers.n_outliers
    n_groups = -(-n_normal // (activations.group_size or n_normal))
    bits = float(n_normal * activations.n_bits)
    bits += 32 + 8 * n_groups if activations.scale_mode == "progressive" else 32 * n_groups
    bits += 0 if activations.symmetric else 8 * n_groups
    if outliers.n_outliers:
        bits += outliers.n_outliers * {"int8": 8, "fp16": 16, "e5m2": 8, "e4m3": 8}[outliers.precision]
        bits += 32 if outliers.precision == "int8" else 0
    return bits
