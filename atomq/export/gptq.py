"""GPTQ checkpoints, as gptqmodel, vLLM and SGLang read them: weights only, activations in 16 bits.

A linear [N, K] becomes `qweight` int32 [K * n_bits / 32, N] (unsigned codes packed along the input channels),
`qzeros` int32 [G, N * n_bits / 32], `scales` F16 [G, N] and `g_idx` int32 [K], the group of every input
channel. Version 1 stores each zero point less one, version 2 as it is. Symmetric codes are stored plus
2^(n_bits-1), which is their zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from atomq import __version__
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

WORD_BITS = 32


@dataclass(frozen=True)
class Gptq:
    """The format for one scheme and model; making it refuses what it cannot express (ConfigError)."""

    scheme: QuantScheme
    shapes: Mapping[str, LinearShape]
    version: Literal["gptq", "gptq_v2"]

    dtype: ClassVar[None] = None
    config_file: ClassVar[str] = "quantize_config.json"

    def __post_init__(self) -> None:
        check_experts(self.shapes, self.version)
        check_weights(self.scheme, self.version, (2, 4, 8), "w4a16")
        if self.scheme.activations.n_bits != FLOAT_BITS:
            refuse(self.version, f"no activations of {self.scheme.activations.n_bits} bits", "w4a16")
        if self.version == "gptq" and not self.scheme.weights.symmetric:
            raise ConfigError(
                "gptq stores zero points less one, and has no place for the zero points 0 of asymmetric "
                "weights; export with --format gptq_v2, or quantize with --preset w4a16"
            )
        n_bits = self.scheme.weights.n_bits
        for name, shape in self.shapes.items():
            if shape.n_in * n_bits % WORD_BITS or shape.n_out * n_bits % WORD_BITS:
                raise ConfigError(
                    f"{self.version} fills whole words of {WORD_BITS // n_bits} codes in both directions; "
                    f"{name} is [{shape.n_out}, {shape.n_in}]; export with --format compressed-tensors"
                )

    @property
    def group_size(self) -> int | None:
        return uniform_group_size(self.scheme.weights.group_size, self.shapes)

    def notes(self) -> list[str]:
        return group_notes(self.scheme, self.group_size)

    def linear_tensors(self, stored: StoredLinear) -> dict[str, torch.Tensor]:
        """The tensors of one linear by their last names."""
        weights, model = self.scheme.weights, stored.model_codes(self.group_size)
        middle = 1 << (weights.n_bits - 1)
        codes, zeros = model.codes, model.zeros
        if zeros is None:
            codes, zeros = codes + middle, torch.full(model.scales.shape, middle)
        if self.version == "gptq":
            zeros = zeros - 1
        tensors = {
            "qweight": pack_words(codes, weights.n_bits).T,
            "qzeros": pack_words(zeros.T.contiguous(), weights.n_bits),
            "scales": model.scales.T.to(torch.float16),
            "g_idx": model.group_index.to(torch.int32),
        }
        bias = stored.model_bias()
        return tensors if bias is None else tensors | {"bias": bias}

    def quantization_config(self, unquantized: list[str]) -> dict[str, Any]:
        """The entry of config.json, which is quantize_config.json too; `unquantized` is implied."""
        return {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": self.scheme.weights.n_bits,
            "group_size": -1 if self.group_size is None else self.group_size,
            "desc_act": self.scheme.outliers.reorder and self.group_size is not None,
            "sym": self.scheme.weights.symmetric,
            "lm_head": False,
            "checkpoint_format": self.version,
            "format": self.version,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"atomq:{__version__}"]},
        }
