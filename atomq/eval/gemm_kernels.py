"""atomq's GEMM kernels as candidates of `bench-gemm`: random operands, and the float64 oracle of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from atomq.errors import VerificationError
from atomq.eval.gemm_candidates import Work
from atomq.eval.gemm_timing import n_copies
from atomq.kernels import gemm, gemm_reference
from atomq.kernels.activations import quantize_act
from atomq.kernels.layout import ActivationFormat, ChannelOrder
from atomq.kernels.repack import (
    CanonicalWeight,
    PackedActivations,
    PackedWeight,
    pack_activations,
    repack_weight,
)

Mode = Literal["w4a4", "w4a4-mixed", "w4a4-progressive", "w4a16"]
"""W4A4 with exact scales; with progressive activations only; with progressive scales on both sides; W4A16."""

MODES: tuple[Mode, ...] = ("w4a4", "w4a4-mixed", "w4a4-progressive", "w4a16")
FROBENIUS_LIMIT = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
MAX_W4A16_TOKENS = 64  # that kernel is made for decoding
CLIP_RATIO = 0.9


@dataclass(frozen=True)
class KernelCandidate:
    """One mode of our kernels, float16 out. W4A16 has no outliers."""

    mode: Mode
    group_size: int = 128
    n_outliers: int = 128

    @property
    def name(self) -> str:
        return self.mode

    @property
    def is_peer(self) -> bool:
        return False

    def problem(self) -> str:
        """W4A16 has a kernel for Hopper only."""
        if self.mode == "w4a16" and torch.cuda.get_device_capability() != (9, 0):
            return "the W4A16 kernel takes a Hopper GPU (sm_90)"
        return ""

    def prepare(self, n_channels: int, n_inputs: int, max_tokens: int) -> PreparedW4A4 | PreparedW4A16:
        if self.mode == "w4a16":
            return PreparedW4A16(n_channels, n_inputs, min(max_tokens, MAX_W4A16_TOKENS), self.group_size)
        return PreparedW4A4(
            self.mode, n_channels, n_inputs, max_tokens, self.group_size, min(self.n_outliers, n_inputs - 1)
        )


class PreparedW4A4:
    """Random weights and activations; the first of many tokens serve where fewer are asked for."""

    def __init__(
        self, mode: Mode, n_channels: int, n_inputs: int, max_tokens: int, group_size: int, n_outliers: int
    ) -> None:
        self.mode, self.n_inputs = mode, n_inputs
        self.format = ActivationFormat(
            n_inputs, n_outliers, group_size, CLIP_RATIO, progressive=mode != "w4a4"
        )
        self.order = ChannelOrder.of(torch.randperm(n_inputs, device="cuda"), self.format)
        self.weights = [
            random_weight(n_channels, n_inputs, n_outliers, group_size, mode == "w4a4-progressive")
            for _ in range(n_copies(n_channels * n_inputs / 2))
        ]
        self.floats = torch.randn(max_tokens, n_inputs, device="cuda", dtype=torch.float16)
        self.activations = _Activations.random(max_tokens, self.format)
        self.oracle = gemm_reference.w4a4_oracle(self.activations.pack(max_tokens), self.weights[0])

    def work(self, n_tokens: int) -> Work:
        activations, floats = self.activations.pack(n_tokens), self.floats[:n_tokens]
        n_channels = self.weights[0].n_channels
        out = torch.full((n_tokens, n_channels), math.nan, dtype=torch.float16, device="cuda")

        def from_floats(weight: PackedWeight) -> None:
            gemm.w4a4_gemm(quantize_act(floats, self.format, self.order), weight, out=out)

        launches = [functools.partial(gemm.w4a4_gemm, activations, w, out=out) for w in self.weights]
        launches[0]()
        error = frobenius_error(f"{self.mode} {n_channels}x{self.n_inputs}", out, self.oracle[:n_tokens])
        moved = self.weights[0].records.numel() + n_tokens * (self.n_inputs + 2 * n_channels)
        whole = [functools.partial(from_floats, w) for w in self.weights]
        return Work(launches, whole, moved, 8, error)


@dataclass(frozen=True)
class _Activations:
    """Quantized activations in plain order, many tokens of them; `group_size` None has a scale per token."""

    codes: torch.Tensor
    scales: torch.Tensor
    outliers: torch.Tensor | None
    outlier_scales: torch.Tensor | None
    group_size: int | None

    @classmethod
    def random(cls, n_tokens: int, form: ActivationFormat) -> _Activations:
        group_size, n_groups = form.group_size, math.ceil(form.n_normal / form.group_size)
        codes = torch.randint(-8, 8, (n_tokens, form.n_normal), device="cuda", dtype=torch.int8)
        if form.progressive:
            factors = torch.randint(1, 17, (n_tokens, n_groups), device="cuda", dtype=torch.int8)
            codes *= factors.repeat_interleave(group_size, dim=1)[:, : form.n_normal]
        scales = torch.rand(n_tokens, 1 if form.progressive else n_groups, device="cuda") * 0.05 + 0.005
        outliers = outlier_scales = None
        if form.n_outliers:
            outliers = torch.randint(-127, 128, (n_tokens, form.n_outliers), device="cuda", dtype=torch.int8)
            outlier_scales = torch.rand(n_tokens, device="cuda") * 0.01 + 0.001
        return cls(codes, scales, outliers, outlier_scales, None if form.progressive else group_size)

    def pack(self, n_tokens: int) -> PackedActivations:
        """The first tokens as the GEMM reads them."""
        outliers = None if self.outliers is None else self.outliers[:n_tokens]
        outlier_scales = None if self.outlier_scales is None else self.outlier_scales[:n_tokens]
        return pack_activations(
            self.codes[:n_tokens], self.scales[:n_tokens], outliers, outlier_scales, self.group_size
        )


class PreparedW4A16:
    """Random INT4 weights in groups, without outliers, and float16 activations."""

    def __init__(self, n_channels: int, n_inputs: int, max_tokens: int, group_size: int) -> None:
        self.weights = [
            random_weight(n_channels, n_inputs, 0, group_size, progressive=False)
            for _ in range(n_copies(n_channels * n_inputs / 2))
        ]
        self.x = torch.randn(max_tokens, n_inputs, device="cuda", dtype=torch.float16)
        self.oracle = gemm_reference.w4a16_oracle(self.x, self.weights[0])

    def work(self, n_tokens: int) -> Work | None:
        if n_tokens > self.x.shape[0]:
            return None
        x, n_channels = self.x[:n_tokens], self.weights[0].n_channels
        out = torch.full((n_tokens, n_channels), math.nan, dtype=torch.float16, device="cuda")
        launches = [functools.partial(gemm.w4a16_gemm, x, w, out=out) for w in self.weights]
        launches[0]()
        error = frobenius_error(f"w4a16 {n_channels}x{x.shape[1]}", out, self.oracle[:n_tokens])
        moved = self.weights[0].records.numel() + n_tokens * (2 * x.shape[1] + 2 * n_channels)
        return Work(launches, None, moved, 16, error)


def random_weight(
    n_channels: int, n_inputs: int, n_outliers: int, group_size: int, progressive: bool
) -> PackedWeight:
    """Random codes, and a different scale for every group and channel."""
    n_normal = n_inputs - n_outliers
    shape = (n_channels, math.ceil(n_normal / group_size))
    scales = (torch.rand(shape, device="cuda") * 0.02 + 0.001).half()
    factors = torch.randint(1, 17, shape, device="cuda", dtype=torch.uint8)
    packed_shape = (n_channels, (n_normal + 1) // 2)
    outlier_shape = (n_channels, n_outliers)
    return repack_weight(
        CanonicalWeight(
            qweight=torch.randint(0, 256, packed_shape, device="cuda", dtype=torch.uint8),
            scales=factors if progressive else scales,
            n_inputs=n_normal,
            group_size=group_size,
            scale_base=torch.rand(n_channels, device="cuda") * 0.002 + 1e-4 if progressive else None,
            outlier_weight=torch.randint(-127, 128, outlier_shape, device="cuda", dtype=torch.int8)
            if n_outliers
            else None,
            outlier_scales=torch.rand(n_channels, device="cuda") * 0.001 + 1e-4 if n_outliers else None,
        )
    )


def frobenius_error(what: str, out: torch.Tensor, oracle: torch.Tensor) -> float:
    """The relative Frobenius distance of `out` from the float64 `oracle`.

    Raises:
        VerificationError: it is larger than what rounding to `out`'s dtype explains.
    """
    distance, limit = float((out.double() - oracle).norm() / oracle.norm()), FROBENIUS_LIMIT[out.dtype]
    if not distance <= limit:  # NaN, too
        raise VerificationError(
            f"{what}, {out.shape[0]} tokens: the result is {distance:.1e} off the float64 oracle; "
            f"the limit is {limit:.1e}"
        )
    return distance
