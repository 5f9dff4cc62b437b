"""Plain weights in the Hugging Face layout: what the codes stand for, for any tool that reads a float model.

Outliers, transforms and channel orders are undone. Activations and KV cache run in floating point there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from atomq.config import FLOAT_BITS, QuantScheme
from atomq.export.stored import StoredLinear
from atomq.models.families import LinearShape


@dataclass(frozen=True)
class PlainWeights:
    """The format for one scheme and model; there is no scheme that it refuses."""

    scheme: QuantScheme
    shapes: Mapping[str, LinearShape]
    dtype: torch.dtype

    config_file: ClassVar[None] = None

    def notes(self) -> list[str]:
        """What of the scheme is not in the weights."""
        lost = []
        if self.scheme.activations.n_bits != FLOAT_BITS:
            lost.append("activations")
        if self.scheme.kv.n_bits != FLOAT_BITS:
            lost.append("the KV cache")
        if not lost:
            return []
        return [
            f"hf holds weights only: {' and '.join(lost)} will not be quantized by what loads it, "
            f"and its quality is not that of the checkpoint"
        ]

    def linear_tensors(self, stored: StoredLinear) -> dict[str, torch.Tensor]:
        """The tensors of one linear by their last names, rounded to `dtype` (to nearest, ties to even)."""
        tensors = {"weight": stored.model_weight().to(self.dtype)}
        bias = stored.model_bias()
        return tensors if bias is None else tensors | {"bias": bias.to(self.dtype)}

    def quantization_config(self, _unquantized: list[str]) -> None:
        return None
