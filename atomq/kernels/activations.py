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
from collections.abc import Sequence

import torch

from atomq.errors import KernelError
from atomq.kernels import reference
from atomq.kernels.act_shape import FEW_LANES, choose_lanes, choose_shape, pad, sizes
from atomq.kernels.layout import ActivationFormat, Added, ChannelOrder, NormParameters
from atomq.kernels.loader import compile_kernel, device_limits, launch
from atomq.kernels.operands import Strides, check_operand
from atomq.kernels.repack import SLOT_INPUTS, PackedActivations

_ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}


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
    x: torch.Tensor,
    norm: NormParameters,
    activations: ActivationFormat,
    order: ChannelOrder | None = None,
    added: Added | None = None,
) -> PackedActivations:
    """Quantize ``x / sqrt(mean(x^2) + epsilon) * weight``, `added` to x first."""
    _check(x, activations, order, norm=norm, added=added)
    if x.is_cuda:
        return _launch(Prologue.RMS_NORM, x, activations, order, norm=norm, added=added)
    return reference.rms_norm_quantize(x, norm, activations, order, added)


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
    added: Added | None = None,
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
    if added is not None:
        check("added.delta", added.delta, dtype=x.dtype, shape=shape)
        check("added.total", added.total, dtype=x.dtype, shape=shape)
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
    added: Added | None = None,
) -> PackedActivations:
    n_tokens, n_rows, device = x.shape[0], pad(x.shape[0]), x.device
    n_slots = activations.n_slots + activations.n_outlier_slots
    codes = torch.empty((n_slots, n_rows, SLOT_INPUTS), dtype=torch.int8, device=device)
    token_scales = torch.empty((activations.n_scale_rows, n_rows), dtype=torch.float32, device=device)
    if n_tokens == 0:
        return PackedActivations(codes, token_scales, n_tokens)
    limits, load_width = device_limits(device), _load_width([x, up, *(added or ())], activations)
    is_gathered_alone = order is not None and prologue is Prologue.NONE and _has_whole_groups(activations)
    is_gathered_alone &= load_width * x.element_size() == 16
    is_staged = order is not None or prologue in _NORMS
    shape = choose_shape(
        activations,
        n_tokens,
        limits,
        FEW_LANES if is_gathered_alone else choose_lanes(n_tokens, limits),
        staged_bytes=(4 if prologue is Prologue.SILU_MUL else x.element_size()) if is_staged else 0,
        is_wide=x.element_size() == 4 or prologue is Prologue.SILU_MUL,
        has_clusters=torch.cuda.get_device_capability(device) >= (9, 0),
    )
    places = sizes(n_tokens, activations, shape.lanes)
    if is_gathered_alone and order is not None:
        launch(
            compile_kernel("quantize_gathered", ELEMENT=_ELEMENTS[x.dtype]),
            (shape.n_ctas, shape.n_parts),
            (32 * shape.n_warps,),
            (x, order.slots, codes, token_scales, x.stride(0), activations.clip_ratio, places),
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
        ADDS=int(added is not None),
        PARTS=shape.n_parts if activations.progressive else 1,
        SLOT_LANES=shape.lanes,
    )
    second = up if added is None else added.delta
    launch(
        kernel,
        (shape.n_ctas, shape.n_parts),
        (32 * shape.n_warps,),
        (
            x,
            second,
            None if added is None else added.total,
            None if order is None else order.slots,
            None if norm is None else norm.stored_weight,
            None if norm is None else norm.stored_bias,
            codes,
            token_scales,
            x.stride(0),
            0 if second is None else second.stride(0),
            activations.clip_ratio,
            0.0 if norm is None else norm.epsilon,
            places,
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


def _load_width(operands: Sequence[torch.Tensor | None], activations: ActivationFormat) -> int:
    """The most elements, up to 16 bytes, on a multiple of which every row and the outliers start."""
    tensors = [tensor for tensor in operands if tensor is not None]
    numbers = [16 // tensors[0].element_size(), activations.n_channels, activations.n_outliers]
    numbers += [tensor.stride(0) for tensor in tensors if tensor.shape[0] > 1]
    numbers += [tensor.data_ptr() // tensor.element_size() for tensor in tensors]
    return math.gcd(*numbers)
