"""Stages of a decoder block: a group of linears stacked into one product, with what comes before it.

A block is four stages: RMS norm and q, k, v; o; RMS norm and gate, up; SiLU(gate) * up and down. Each kind of
stage is one way to compute that: W4A4 with the quantizer fused to what precedes it, W4A16, and the baselines
(float16 by cuBLAS, INT8 by `torch._int_mm`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from atomq.errors import KernelError
from atomq.kernels import gemm_reference
from atomq.kernels.activations import quantize_act, rms_norm_quantize, silu_mul_quantize
from atomq.kernels.gemm import w4a4_gemm, w4a16_gemm
from atomq.kernels.layout import ActivationFormat, Added, ChannelOrder, NormParameters
from atomq.kernels.repack import CanonicalWeight, PackedActivations, PackedWeight, repack_weight
from atomq.kernels.rows import prepare_rows, quantize_rows, scale_sums


class Before(enum.Enum):
    """What a stage does to its input before the product."""

    NOTHING = enum.auto()
    RMS_NORM = enum.auto()
    SILU_MUL = enum.auto()


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight [K] and epsilon."""

    weight: torch.Tensor
    epsilon: float


class Stage(Protocol):
    """[T, inputs] (`SILU_MUL`: [T, 2 * inputs], gate then up) to [T, outputs], in the dtype of the input.

    With `RMS_NORM`, `added` is what its kernel adds to the input first.
    """

    @property
    def n_bytes(self) -> int:
        """Memory that the weights take."""

    def __call__(self, x: torch.Tensor, added: Added | None = None) -> torch.Tensor:
        """On torch's current stream; can be captured in a CUDA graph."""


class W4A4Stage:
    """Quantizes with the kernel that is fused to what precedes, and multiplies by `w4a4_gemm`."""

    def __init__(
        self,
        weight: CanonicalWeight,
        activations: ActivationFormat,
        perm: torch.Tensor | None,
        before: Before,
        norm: Norm | None = None,
    ) -> None:
        self.weight, self.activations, self.before = repack_weight(weight), activations, before
        self.order = None if perm is None else ChannelOrder.of(perm, activations)
        self.norm: NormParameters | None = None
        if before is Before.RMS_NORM:
            assert norm is not None
            self.norm = NormParameters.of(norm.weight, None, norm.epsilon, activations, self.order)

    @property
    def n_bytes(self) -> int:
        return _bytes_of(self.weight)

    def __call__(self, x: torch.Tensor, added: Added | None = None) -> torch.Tensor:
        return _multiply(self._quantize(x, added), self.weight, x.dtype)

    def _quantize(self, x: torch.Tensor, added: Added | None) -> PackedActivations:
        match self.before:
            case Before.RMS_NORM:
                assert self.norm is not None
                return rms_norm_quantize(x, self.norm, self.activations, self.order, added)
            case Before.SILU_MUL:
                gate, up = x.chunk(2, dim=1)
                return silu_mul_quantize(gate, up, self.activations, self.order)
            case _:
                return quantize_act(x, self.activations, self.order)


class W4A16Stage:
    """INT4 weights on 16-bit activations by `w4a16_gemm`, which is made for few tokens; Hopper only."""

    def __init__(
        self, weight: CanonicalWeight, perm: torch.Tensor | None, before: Before, norm: Norm | None = None
    ) -> None:
        self.weight, self.before, self.norm = repack_weight(weight), before, norm
        self.perm = None if perm is None else perm.long()

    @property
    def n_bytes(self) -> int:
        return _bytes_of(self.weight)

    def __call__(self, x: torch.Tensor, added: Added | None = None) -> torch.Tensor:
        prepared = _prepare(x, self.before, self.norm, added)
        if self.perm is not None:
            prepared = prepared.index_select(1, self.perm)
        if not x.is_cuda:
            return gemm_reference.w4a16_gemm(prepared, self.weight, x.dtype)
        return w4a16_gemm(prepared, self.weight, x.dtype)


class FloatStage:
    """A product by cuBLAS in the input's dtype: the baseline without quantization."""

    def __init__(
        self,
        weight: torch.Tensor,
        before: Before,
        norm: Norm | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.weight, self.before, self.norm, self.bias = weight, before, norm, bias

    @property
    def n_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: torch.Tensor, added: Added | None = None) -> torch.Tensor:
        return functional.linear(_prepare(x, self.before, self.norm, added), self.weight, self.bias)


class Int8Stage:
    """W8A8: a scale per token and per channel, `torch._int_mm`, and one kernel that scales its sums."""

    MIN_TOKENS = 17  # _int_mm refuses fewer

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, before: Before, norm: Norm | None = None
    ) -> None:
        self.codes, self.scales, self.before, self.norm = codes, scales, before, norm

    @property
    def n_bytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()

    def __call__(self, x: torch.Tensor, added: Added | None = None) -> torch.Tensor:
        norm = self.norm if self.before is Before.RMS_NORM else None
        codes, scales = quantize_rows(
            x,
            norm_weight=None if norm is None else norm.weight,
            epsilon=0.0 if norm is None else norm.epsilon,
            silu_mul=self.before is Before.SILU_MUL,
            added=added,
            min_rows=self.MIN_TOKENS,
        )
        sums = torch._int_mm(codes, self.codes.T)
        return scale_sums(sums[: x.shape[0]], scales, self.scales, x.dtype)


def stack(weights: Sequence[CanonicalWeight]) -> CanonicalWeight:
    """Linears that read the same input as one: their output channels one after another.

    Raises:
        KernelError: they are not coded alike, or rows of two linears would share a scale.
    """
    first = weights[0]
    alike = {(w.n_inputs, w.group_size, w.channel_group, w.is_progressive, w.n_outliers) for w in weights}
    if len(alike) > 1 or any(w.qweight.shape[0] % w.channel_group for w in weights[:-1]):
        raise KernelError("these linears read one input but are not coded alike, so they cannot be stacked")
    if len(weights) == 1:
        return first

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(w, name) for w in weights]
        return None if parts[0] is None else torch.cat(parts)

    bias = None
    if any(w.bias is not None for w in weights):
        nothing = [w.qweight.new_zeros(w.qweight.shape[0], dtype=torch.float32) for w in weights]
        bias = torch.cat(
            [zeros if w.bias is None else w.bias.float() for w, zeros in zip(weights, nothing, strict=True)]
        )
    return CanonicalWeight(
        torch.cat([w.qweight for w in weights]),
        torch.cat([w.scales for w in weights]),
        first.n_inputs,
        first.group_size,
        first.channel_group,
        joined("scale_base"),
        joined("outlier_weight"),
        joined("outlier_scales"),
        bias,
    )


def _prepare(x: torch.Tensor, before: Before, norm: Norm | None, added: Added | None) -> torch.Tensor:
    if before is Before.NOTHING:
        return x
    weight = None if norm is None or before is not Before.RMS_NORM else norm.weight
    return prepare_rows(
        x,
        norm_weight=weight,
        epsilon=0.0 if norm is None else norm.epsilon,
        silu_mul=before is Before.SILU_MUL,
        added=added,
    )


def _multiply(activations: PackedActivations, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    if not weight.records.is_cuda:
        return gemm_reference.w4a4_gemm(activations, weight, dtype)
    return w4a4_gemm(activations, weight, dtype)


def _bytes_of(weight: PackedWeight) -> int:
    return weight.records.numel() + 4 * weight.channel_scales.numel()
