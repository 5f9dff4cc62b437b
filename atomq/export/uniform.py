"""What the formats that hold integer codes have in common: one scheme for all linears, equal groups."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from atomq.config import FLOAT_BITS, QuantScheme
from atomq.errors import ConfigError
from atomq.models.families import LinearShape
from atomq.numerics.packing import pack_codes


def check_weights(scheme: QuantScheme, format_name: str, n_bits: tuple[int, ...], preset: str) -> None:
    """Refuse what no format of integer codes and 16-bit scales can hold.

    Args:
        n_bits: the widths of codes that the format has.
        preset: what to tell the user to quantize with.

    Raises:
        ConfigError: what cannot be expressed, and what can.
    """
    weights, outliers = scheme.weights, scheme.outliers
    if weights.n_bits not in n_bits:
        allowed = " or ".join(map(str, n_bits))
        refuse(format_name, f"codes of {allowed} bits, not weights of {weights.n_bits}", preset)
    if weights.number_format != "int":
        refuse(format_name, f"integers, not {weights.number_format}", preset)
    if weights.scale_mode != "exact":
        refuse(format_name, "a scale for each group, not progressive scales", preset)
    if outliers.n_outliers:
        refuse(
            format_name,
            f"one precision for a whole linear, not {outliers.n_outliers} channels in {outliers.precision}",
            preset,
        )
    if scheme.transform != "none":
        refuse(format_name, "no transform of activations inside a group", preset)
    if scheme.kv.n_bits != FLOAT_BITS:
        refuse(format_name, f"no KV cache of {scheme.kv.n_bits} bits", preset)


def check_experts(shapes: Mapping[str, LinearShape], format_name: str) -> None:
    """Refuse mixtures of experts, whose experts the loaders of these formats fuse in ways of their own.

    Raises:
        ConfigError: the model has experts.
    """
    if any(".experts." in name for name in shapes):
        raise ConfigError(
            f"{format_name} is not written for mixtures of experts, whose loaders could not be tried; "
            f"export with --format hf"
        )


def refuse(format_name: str, expressible: str, preset: str) -> None:
    raise ConfigError(
        f"{format_name} has {expressible}; quantize with --preset {preset}, or export with --format hf"
    )


def uniform_group_size(group_size: int | None, shapes: Mapping[str, LinearShape]) -> int | None:
    """The largest group that divides `group_size` and the width of every linear; None for whole rows.

    Groups of 128 over 576 channels end with one of 64; written as groups of 64, each with the scale of the
    group it came from, they hold the same weights.
    """
    return None if group_size is None else math.gcd(group_size, *(s.n_in for s in shapes.values()))


def group_notes(scheme: QuantScheme, group_size: int | None) -> list[str]:
    """A sentence if groups had to be written smaller than they are."""
    if group_size == scheme.weights.group_size:
        return []
    return [
        f"groups of {scheme.weights.group_size} do not divide the model's widths; "
        f"they are written as groups of {group_size} with repeated scales, which are the same weights"
    ]


def pack_words(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Pack unsigned codes [R, width] into int32 [R, ceil(width * n_bits / 32)].

    Code j takes bits j * n_bits and up of its row, least significant first, as in `numerics.packing`; the
    last word is filled up with zero bits.
    """
    row_bytes = pack_codes(codes, n_bits)
    padding = -row_bytes.shape[-1] % 4
    return torch.nn.functional.pad(row_bytes, (0, padding)).contiguous().view(torch.int32)
