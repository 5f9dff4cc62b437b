"""Fronts of `quantize_act.cu` and `quantize_gathered.cu`: quantize the input of a linear.

Alone or with the operation before it; the second kernel makes some of what the first one does, faster.

Every function takes float16, bfloat16 or float32 tokens [M, K] (rows may lie apart, M may be 0), an
`ActivationFormat` and, to gather by, a `ChannelOrder`; the result is the GEMM kernels' operand. Arithmetic is
float32, and nothing is rounded to the input's dtype before it is coded. CPU tensors run the twin in torch,
CUDA tensors the kernel.

All raise KernelError for operands that do not fit, and on CUDA where CuPy is missing.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from atomq.errors import KernelError
from atomq.kernels import reference
from atomq.kernels.layout import ActivationFormat, ChannelOrder, NormParameters
from atomq.kernels.loader import compile_kernel, device_limits, launch
from atomq.kernels.operands import Strides, check_operand
from atomq.kernels.repack import SLOT_INPUTS, PackedActivations

_ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}
_SLOTS_PER_WARP = 8
_MAX_WARPS = 8  # of a CTA; the kernel's own limit
_FEW_WARPS = 4
_WARPS_OF_SM = (24, 16)  # by registers: in general, and where what is loaded ahead is wider
_CTAS_PER_PLACE = 4  # that walk over tokens, for each that runs at a time: measured best from 2 to 4
_STATIC_SHARED_BYTES = 256  # no less than the kernel's own arrays take
_SIZES = np.dtype([(f"size{i}", "<i4") for i in range(8)])


class Prologue(enum.IntEnum):
    """What precedes the quantization; the numbers are the kernel's."""

    NONE = 0
    RMS_NORM = 1
    LAYER_NORM = 2
    SILU_MUL = 3
    RELU = 4


_NORMS = (Prologue.RMS_NORM, Prologue.LAYER_NORM)


def quantize_act(
    x: torch.Tensor, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Quantize `x` [M, K]."""
    _check(x, activations, order)
    if x.is_cuda:
        return _launch(Prologue.NONE, x, activations, order)
    return reference.quantize_act(x, activations, order)


def rms_norm_quantize(
    x: torch.Tensor, norm: NormParameters, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Quantize ``x / sqrt(mean(x^2) + epsilon) * weight``."""
    _check(x, activations, order, norm=norm)
    if x.is_cuda:
        return _launch(Prologue.RMS_NORM, x, activations, order, norm=norm)
    return reference.rms_norm_quantize(x, norm, activations, order)


def layer_norm_quantize(
    x: torch.Tensor, norm: NormParameters, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Quantize ``(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias``."""
    if norm.stored_bias is None:
        raise KernelError("quantize_act: LayerNorm needs a bias; give zeros where the model has none")
    _check(x, activations, order, norm=norm)
    if x.is_cuda:
        return _launch(Prologue.LAYER_NORM, x, activations, order, norm=norm)
    return reference.layer_norm_quantize(x, norm, activations, order)


def silu_mul_quantize(
    gate: torch.Tensor, up: torch.Tensor, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Quantize ``silu(gate) * up``."""
    _check(gate, activations, order, up=up)
    if gate.is_cuda:
        return _launch(Prologue.SILU_MUL, gate, activations, order, up=up)
    return reference.silu_mul_quantize(gate, up, activations, order)


def relu_quantize(
    x: torch.Tensor, activations: ActivationFormat, order: ChannelOrder | None = None
) -> PackedActivations:
    """Quantize ``max(x, 0)``."""
    _check(x, activations, order)
    if x.is_cuda:
        return _launch(Prologue.RELU, x, activations, order)
    return reference.relu_quantize(x, activations, order)


def _check(
    x: torch.Tensor,
    activations: ActivationFormat,
    order: ChannelOrder | None,
    *,
    up: torch.Tensor | None = None,
    norm: NormParameters | None = None,
) -> None:
    if x.ndim != 2:
        raise KernelError(
            f"quantize_act: x of {tuple(x.shape)}; it must be tokens x {activations.n_channels}"
        )
    check = functools.partial(check_operand, "quantize_act", device=x.device)
    shape = (x.shape[0], activations.n_channels)
    slots = (activations.n_slots + activations.n_outlier_slots, SLOT_INPUTS)
    check("x", x, dtype=tuple(_ELEMENTS), shape=shape, strides=Strides.ROWS_APART)
    if up is not None:
        check("up", up, dtype=x.dtype, shape=shape, strides=Strides.ROWS_APART)
    if order is not None:
        check("order.slots", order.slots, dtype=torch.int16, shape=slots, alignment=16)
    if norm is not None:
        check("norm.stored_weight", norm.stored_weight, dtype=torch.float32, shape=slots, alignment=16)
        if norm.stored_bias is not None:
            check("norm.stored_bias", norm.stored_bias, dtype=torch.float32, shape=slots, alignment=16)


def _launch(
    prologue: Prologue,
    x: torch.Tensor,
    activations: ActivationFormat,
    order: ChannelOrder | None,
    *,
    up: torch.Tensor | None = None,
    norm: NormParameters | None = None,
) -> PackedActivations:
    n_tokens, n_rows, device = x.shape[0], math.ceil(x.shape[0] / 8) * 8, x.device
    n_slots = activations.n_slots + activations.n_outlier_slots
    codes = torch.empty((n_slots, n_rows, SLOT_INPUTS), dtype=torch.int8, device=device)
    token_scales = torch.empty((activations.n_scale_rows, n_rows), dtype=torch.float32, device=device)
    if n_tokens == 0:
        return PackedActivations(codes, token_scales, n_tokens)
    shape = _choose_shape(prologue, x, activations, order is not None)
    load_width = _load_width(x, up, activations)
    whole_vectors = load_width * x.element_size() == 16
    if order is not None and prologue is Prologue.NONE and whole_vectors and _has_whole_groups(activations):
        sizes = _sizes(n_tokens, activations)
        launch(
            compile_kernel("quantize_gathered", ELEMENT=_ELEMENTS[x.dtype]),
            (shape.n_ctas, shape.n_parts),
            (32 * shape.n_warps,),
            (x, order.slots, codes, token_scales, x.stride(0), activations.clip_ratio, sizes),
            device=device,
            shared_bytes=shape.shared_bytes,
            overlaps=True,
        )
        return PackedActivations(codes, token_scales, n_tokens)
    kernel = compile_kernel(
        "quantize_act",
        ELEMENT=_ELEMENTS[x.dtype],
        PROLOGUE=int(prologue),
        GATHER=int(order is not None),
        HADAMARD=int(activations.hadamard),
        GROUP_SIZE=activations.group_size,
        PROGRESSIVE=int(activations.progressive),
        LOAD_WIDTH=load_width,
    )
    launch(
        kernel,
        (shape.n_ctas, shape.n_parts),
        (32 * shape.n_warps,),
        (
            x,
            up,
            None if order is None else order.slots,
            None if norm is None else norm.stored_weight,
            None if norm is None else norm.stored_bias,
            codes,
            token_scales,
            x.stride(0),
            0 if up is None else up.stride(0),
            activations.clip_ratio,
            0.0 if norm is None else norm.epsilon,
            _sizes(n_tokens, activations),
        ),
        device=device,
        shared_bytes=shape.shared_bytes,
        overlaps=True,
    )
    return PackedActivations(codes, token_scales, n_tokens)


def _has_whole_groups(activations: ActivationFormat) -> bool:
    """Whether all groups have 128 channels, transformed and with exact scales, as in `quantize_gathered`."""
    is_exact = activations.hadamard and not activations.progressive
    return is_exact and activations.group_size == SLOT_INPUTS and activations.n_normal % SLOT_INPUTS == 0


@dataclass(frozen=True)
class _Shape:
    """A launch of `n_ctas` x `n_parts` CTAs of `n_warps`, each on one token or more, a part of their row."""

    n_ctas: int
    n_parts: int
    n_warps: int
    shared_bytes: int = 0


def _sizes(n_tokens: int, activations: ActivationFormat) -> np.ndarray:
    """The kernel's struct Sizes."""
    return np.array(
        (
            n_tokens,
            math.ceil(n_tokens / 8) * 8,
            activations.n_channels,
            activations.n_normal,
            activations.n_slots,
            activations.n_outlier_slots,
            _first_outlier(activations),
            _count_octets(activations),
        ),
        dtype=_SIZES,
    )


def _first_outlier(activations: ActivationFormat) -> int:
    """The warps' place of the first outlier slot; two of them begin at an even one, to lie in one warp."""
    if activations.n_outlier_slots == 2:
        return math.ceil(activations.n_slots / 2) * 2
    return activations.n_slots


def _count_octets(activations: ActivationFormat) -> int:
    return math.ceil((_first_outlier(activations) + activations.n_outlier_slots) / _SLOTS_PER_WARP)


def _choose_shape(
    prologue: Prologue, x: torch.Tensor, activations: ActivationFormat, gathers: bool
) -> _Shape:
    """How to cut the work.

    As channels lie, CTAs walk over tokens, each on a part of the row that its warps make at once. Where a row
    goes through shared memory (gather, norm, progressive scales) a CTA makes one token. A part would have to
    read all of the row, so rows are cut only if the tokens are too few to fill the GPU, and never with
    progressive scales, whose base needs the row.
    """
    limits, n_tokens = device_limits(x.device), math.ceil(x.shape[0] / 8) * 8
    n_octets = _count_octets(activations)
    if not (gathers or activations.progressive or prologue in _NORMS):
        n_parts = math.ceil(n_octets / _MAX_WARPS)
        n_warps = math.ceil(n_octets / n_parts)
        warps_of_sm = _WARPS_OF_SM[x.element_size() == 4 or prologue is Prologue.SILU_MUL]
        n_places = limits.n_sms * (warps_of_sm // n_warps)
        n_ctas = max(1, _CTAS_PER_PLACE * n_places // n_parts)
        return _Shape(min(n_tokens, n_ctas), n_parts, n_warps)
    shared_bytes = math.ceil(activations.n_channels / 8 + 1) * 8
    shared_bytes *= 4 if prologue is Prologue.SILU_MUL else x.element_size()
    room = limits.shared_bytes_of_cta - _STATIC_SHARED_BYTES
    if shared_bytes > room:
        raise KernelError(
            f"quantize_act: {activations.n_channels} channels take {shared_bytes} bytes of shared memory, of "
            f"{room} here; fold the order into what produces x, and use exact scales"
        )
    n_parts = 1 if activations.progressive else min(n_octets, max(1, limits.n_sms // n_tokens))
    n_walks = math.ceil(n_octets / n_parts / _MAX_WARPS)
    n_warps = max(_FEW_WARPS, math.ceil(n_octets / n_parts / n_walks))
    return _Shape(n_tokens, n_parts, n_warps, shared_bytes)


def _load_width(x: torch.Tensor, up: torch.Tensor | None, activations: ActivationFormat) -> int:
    """The most elements, up to 16 bytes, on a multiple of which every row and the outliers start."""
    tensors = [x] if up is None else [x, up]
    numbers = [16 // x.element_size(), activations.n_channels, activations.n_outliers]
    numbers += [tensor.stride(0) for tensor in tensors if tensor.shape[0] > 1]
    numbers += [tensor.data_ptr() // tensor.element_size() for tensor in tensors]
    return math.gcd(*numbers)
