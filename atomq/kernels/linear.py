"""`KernelLinear`: a quantized linear computed by the GPU kernels, in place of the simulation in torch."""

from __future__ import annotations

import torch
from torch import nn

from atomq.config import FLOAT_BITS, KVScheme
from atomq.errors import KernelError
from atomq.kernels.activations import quantize_act
from atomq.kernels.gemm import w4a4_gemm, w4a16_gemm
from atomq.kernels.kv import dequantize_kv, quantize_kv
from atomq.kernels.layout import ActivationFormat, ChannelOrder
from atomq.kernels.repack import (
    MAX_OUTLIERS,
    SLOT_INPUTS,
    CanonicalWeight,
    PackedActivations,
    repack_weight,
    unpack_activations,
)
from atomq.numerics.activations import QuantizedActivations
from atomq.numerics.groups import n_groups
from atomq.numerics.linear import QuantizedLinear
from atomq.numerics.outliers import Outliers
from atomq.numerics.packing import unpack_factors

GROUP_SIZES = (64, 128)


def envelope_problem(linear: QuantizedLinear) -> str:
    """Why the kernels do not take this linear, or "" if they do."""
    scheme = linear.scheme
    weights, activations, outliers = scheme.weights, scheme.activations, scheme.outliers
    if (weights.n_bits, weights.number_format, weights.symmetric) != (4, "int", True):
        return "the kernels take symmetric INT4 weights"
    if weights.group_size not in GROUP_SIZES or weights.channel_group > 2:
        return f"the kernels take weight groups of {GROUP_SIZES} and channel groups of 1 or 2"
    if activations.n_bits == FLOAT_BITS:
        plain = weights.scale_mode == "exact" and scheme.transform == "none"
        if outliers.n_outliers or not plain or linear.in_features % 8:
            return "the W4A16 kernel takes exact scales, no outliers, no transform, and inputs in eights"
        return ""
    if (activations.n_bits, activations.number_format, activations.symmetric) != (4, "int", True):
        return "the kernels take symmetric INT4 activations"
    if activations.scale_span != "full":
        return "the kernels divide the largest activation of a group by 7 (scale_span full)"
    if activations.group_size != weights.group_size or activations.scale_mode != weights.scale_mode:
        return "the kernels take activations with the weights' group size and scale mode"
    if outliers.n_outliers > MAX_OUTLIERS or (outliers.n_outliers and outliers.precision != "int8"):
        return f"the kernels take up to {MAX_OUTLIERS} outliers in INT8"
    return ""


def canonical_weight(linear: QuantizedLinear) -> CanonicalWeight:
    """The codes of a linear inside the envelope, as they lie in the checkpoint."""
    weights, tensors = linear.scheme.weights, dict(linear.named_buffers())
    n_normal = linear.in_features - linear.scheme.outliers.n_outliers
    base, scales = None, tensors.get("scales")
    if weights.scale_mode == "progressive":
        base = tensors["scale_base"].float()
        scales = unpack_factors(tensors["scale_factors"], n_groups(n_normal, weights.group_size))
    assert scales is not None
    return CanonicalWeight(
        tensors["qweight"],
        scales,
        n_normal,
        weights.group_size or 0,  # never None inside the envelope
        weights.channel_group,
        base,
        tensors.get("outlier_weight"),
        tensors.get("outlier_scales"),
        linear.bias,
    )


class KernelLinear(nn.Module):
    """Computes what `linear` does by `quantize_act` and `w4a4_gemm`, or by `w4a16_gemm`.

    The codes are repacked for the GPU's kernels once; the checkpoint's own tensors are not kept.

    Raises:
        KernelError: the linear lies outside the kernels' envelope, or not on a GPU.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        problem = envelope_problem(linear)
        if problem:
            raise KernelError(f"this linear cannot run on the kernels: {problem}; use the simulation")
        scheme = linear.scheme
        self.out_features, self.n_outliers = linear.out_features, scheme.outliers.n_outliers
        self.n_normal = linear.in_features - self.n_outliers
        self.group_size = scheme.weights.group_size or 0  # never None inside the envelope
        self.quantizes = scheme.activations.n_bits < FLOAT_BITS
        self.weight = repack_weight(canonical_weight(linear))
        perm = linear.input_order() if linear.is_gathered else None
        self.perm = None if self.quantizes else perm
        self.activations = ActivationFormat.of(linear.input_scheme(), linear.in_features)
        self.order = ChannelOrder.of(perm, self.activations) if perm is not None and self.quantizes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features] in the dtype of `x`."""
        outputs = self._run(x.reshape(-1, x.shape[-1]), x.dtype)[0]
        return outputs.reshape(*x.shape[:-1], self.out_features)

    def multiply(
        self, x: torch.Tensor, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, QuantizedActivations | torch.Tensor]:
        """Outputs [T, out] for `x` [T, in], and what the GEMM read of `x`, for checks."""
        outputs, operand = self._run(x, out_dtype)
        return outputs, operand if isinstance(operand, torch.Tensor) else self._unpack(operand)

    def _run(
        self, x: torch.Tensor, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, PackedActivations | torch.Tensor]:
        if self.quantizes:
            packed = quantize_act(x, self.activations, self.order)
            return w4a4_gemm(packed, self.weight, out_dtype), packed
        if x.dtype == torch.float32:
            raise KernelError("w4a16_gemm takes float16 or bfloat16 activations; run with --dtype float16")
        ordered = x if self.perm is None else x.index_select(1, self.perm)
        return w4a16_gemm(ordered.contiguous(), self.weight, out_dtype), ordered

    def _unpack(self, packed: PackedActivations) -> QuantizedActivations:
        plain = unpack_activations(packed)
        first_outlier = -(-self.n_normal // SLOT_INPUTS) * SLOT_INPUTS
        scales = packed.token_scales[:, : packed.n_tokens].T
        groups = n_groups(self.n_normal, self.group_size)
        normal_scales = scales[:, :1].expand(-1, groups) if packed.has_base_scales else scales[:, :groups]
        outliers = None
        if self.n_outliers:
            outliers = Outliers(plain[:, first_outlier : first_outlier + self.n_outliers], scales[:, -1])
        return QuantizedActivations(plain[:, : self.n_normal], normal_scales, None, outliers)


def kernel_heads(heads: torch.Tensor, scheme: KVScheme, offset: torch.Tensor | None = None) -> torch.Tensor:
    """`fake_quantize_heads` at 4 bits by the KV kernels, on a GPU."""
    centred = heads if offset is None else heads.float() - offset.float()
    flat = centred.reshape(-1, 1, heads.shape[-1])
    hadamard = scheme.rotation == "hadamard"
    stored = quantize_kv(flat, clip_ratio=scheme.clip_ratio, hadamard=hadamard)
    values = dequantize_kv(stored, centred.dtype, hadamard=hadamard).reshape(heads.shape)
    return values if offset is None else (values + offset.float()).to(heads.dtype)


def use_kernels(model: nn.Module) -> int:
    """Let the GPU's kernels compute every quantized linear of `model` and its INT4 KV cache.

    Answers the number of linears. KV at other bit widths stays with torch.

    Raises:
        KernelError: there is none, or one of them lies outside the kernels' envelope; it is named.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not linears:
        raise KernelError("the model has no quantized linears; --backend kernels runs checkpoints of atomq")
    for name, linear in linears.items():
        if linear.device.type != "cuda":
            raise KernelError(
                f"{name} lies on {linear.device}; the kernels need a CUDA device: move the model to one, or "
                "keep the simulation (--backend simulation)"
            )
        problem = envelope_problem(linear)
        if problem:
            raise KernelError(f"{name} cannot run on the kernels: {problem}; use --backend simulation")
    for name, linear in linears.items():
        kernel = KernelLinear(linear)
        for hook in linear._forward_hooks.values():  # the KV cache's quantizers
            kernel.register_forward_hook(hook)
        model.set_submodule(name, kernel)
    for module in model.modules():
        quantizer = getattr(module, "atomq_kv", None)
        if quantizer is not None and quantizer.scheme.n_bits == 4:
            quantizer.quantize = kernel_heads
    return len(linears)
