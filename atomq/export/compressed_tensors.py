"""compressed-tensors, `pack-quantized`: what vLLM, SGLang and transformers read.

A linear [N, K] becomes `weight_packed` int32 [N, ceil(K * n_bits / 32)] (code + 2^(n_bits-1), least
significant bits first), `weight_scale` [N, G] and `weight_shape` int64 [2]. Zero points of weights exist in
the format, but version 0.20 of the library does not load them: refused.

The format does not say by what the largest magnitude of an activation's group is divided, and its loaders
differ: vLLM's INT4 and INT8 kernels (Humming) divide by 2^(n_bits-1) - 1, which is atomq's rule without
clipping; the library, in transformers, by (2^n_bits - 1) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from atomq.config import FLOAT_BITS, QuantScheme
from atomq.errors import ConfigError
from atomq.export.stored import StoredLinear
from atomq.export.uniform import (
    check_experts,
    check_weights,
    group_notes,
    pack_words,
    refuse,
    uniform_group_size,
)
from atomq.models.families import LinearShape

NAME = "compressed-tensors"


@dataclass(frozen=True)
class CompressedTensors:
    """The format for one scheme and model; making it refuses what it cannot express (ConfigError)."""

    scheme: QuantScheme
    shapes: Mapping[str, LinearShape]

    dtype: ClassVar[None] = None
    config_file: ClassVar[None] = None

    def __post_init__(self) -> None:
        scheme, activations = self.scheme, self.scheme.activations
        preset = {FLOAT_BITS: "w4a16", 8: "w8a8"}.get(activations.n_bits, "ct-w4a4")
        check_experts(self.shapes, NAME)
        check_weights(scheme, NAME, (2, 3, 4, 8), preset)
        if not scheme.weights.symmetric:
            raise ConfigError(
                f"{NAME} is written with symmetric weights only: its library does not load zero points; "
                f"quantize with --preset {preset}, or export with --format gptq_v2 or hf"
            )
        if scheme.outliers.reorder and scheme.weights.group_size is not None:
            refuse(NAME, "groups of neighbouring channels only, and these were reordered", preset)
        if activations.n_bits == FLOAT_BITS:
            return
        if activations.number_format != "int" or not activations.symmetric:
            refuse(NAME, "symmetric integers for the activations that its loaders compute", preset)
        if activations.scale_mode != "exact":
            refuse(NAME, "no progressive scales of activations", preset)
        self._check_groups()
        self._check_range()

    def _check_groups(self) -> None:
        group_size = self.scheme.activations.group_size
        for name, shape in self.shapes.items():
            if group_size is not None and shape.n_in % group_size:
                raise ConfigError(
                    f"{NAME} has equal groups of activations, and {group_size} does not divide the "
                    f"{shape.n_in} inputs of {name}; quantize with "
                    f"--group-size {uniform_group_size(group_size, self.shapes)}"
                )

    def _check_range(self) -> None:
        activations = self.scheme.activations
        if activations.has_own_clips or activations.clip_ratio != 1.0:
            given = "one for each input" if activations.has_own_clips else activations.clip_ratio
            raise ConfigError(
                f"{NAME} has no clip ratio of activations, and this checkpoint has {given}; quantize with "
                f"--set activations.clip_ratio=1 --set activations.clip_search=none"
            )

    @property
    def group_size(self) -> int | None:
        return uniform_group_size(self.scheme.weights.group_size, self.shapes)

    def notes(self) -> list[str]:
        notes = group_notes(self.scheme, self.group_size)
        if self.scheme.activations.n_bits != FLOAT_BITS:
            is_half = self.scheme.activations.scale_span == "half"
            ours, others = ("the library", "vLLM's kernels") if is_half else ("vLLM's kernels", "the library")
            notes.append(
                f"activations are rounded as in {ours}; {others} divide the largest magnitude by another "
                f"number (7 or 7.5 at 4 bits), so the figures there differ a little"
            )
        return notes

    def linear_tensors(self, stored: StoredLinear) -> dict[str, torch.Tensor]:
        """The tensors of one linear by their last names."""
        n_bits, model = self.scheme.weights.n_bits, stored.model_codes(self.group_size)
        tensors = {
            "weight_packed": pack_words(model.codes + (1 << (n_bits - 1)), n_bits),
            "weight_scale": model.scales,
            "weight_shape": torch.tensor(model.codes.shape),
        }
        bias = stored.model_bias()
        return tensors if bias is None else tensors | {"bias": bias}

    def quantization_config(self, unquantized: list[str]) -> dict[str, Any]:
        """The entry of config.json; `unquantized` names the linears that stay as they are."""
        weights, activations = self.scheme.weights, self.scheme.activations
        inputs = None
        if activations.n_bits != FLOAT_BITS:
            inputs = _arguments(activations.n_bits, activations.group_size, "token", dynamic=True)
        group = {
            "targets": ["Linear"],
            "format": "pack-quantized",  # named here, or loaders take int8 weights for granted
            "weights": _arguments(weights.n_bits, self.group_size, "channel", dynamic=False),
            "input_activations": inputs,
            "output_activations": None,
        }
        return {
            "quant_method": NAME,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": {"group_0": group},
            "ignore": unquantized,
            "kv_cache_scheme": None,
        }


def _arguments(n_bits: int, group_size: int | None, whole: str, *, dynamic: bool) -> dict[str, Any]:
    """One operand; `whole` is the strategy without groups."""
    return {
        "num_bits": n_bits,
        "type": "int",
        "symmetric": True,
        "strategy": whole if group_size is None else "group",
        "group_size": group_size,
        "dynamic": dynamic,
    }
