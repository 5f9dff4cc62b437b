"""Fronts of `quantize_kv.cu` and `dequantize_kv.cu`: INT4 heads, a scale and a minimum per token and head.

The arithmetic is that of `numerics.kv` at 4 bits. CPU tensors run the twin in torch, CUDA tensors the
kernels; they agree bit for bit.
"""

from __future__ import annotations

import math

import torch

from atomq.errors import KernelError
from atomq.kernels import reference
from atomq.kernels.layout import PackedHeads
from atomq.kernels.loader import compile_kernel, launch
from atomq.kernels.operands import check_operand

MAX_HEAD_DIM = 1024
_ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}
_THREADS = 256


def quantize_kv(x: torch.Tensor, *, clip_ratio: float = 1.0, hadamard: bool = False) -> PackedHeads:
    """Quantize heads `x` [T, H, head_dim], float16, bfloat16 or float32; only channels must be neighbours.

    Args:
        clip_ratio: the range is clip_ratio x [minimum, maximum].
        hadamard: transform each head first, in blocks of the largest power of two that divides head_dim.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    if x.ndim != 3 or x.dtype not in _ELEMENTS or not 1 <= x.shape[2] <= MAX_HEAD_DIM:
        raise KernelError(
            f"quantize_kv: x of {tuple(x.shape)} {x.dtype}; it must be tokens x heads x head_dim, "
            f"1 to {MAX_HEAD_DIM}, in float16, bfloat16 or float32"
        )
    if x.numel() and x.stride(2) != 1 and x.shape[2] > 1:
        raise KernelError(
            f"quantize_kv: x has strides {x.stride()}; the channels of a head must be neighbours"
        )
    if not 0 < clip_ratio <= 1:
        raise KernelError(f"quantize_kv: clip_ratio {clip_ratio}; it must lie above 0 and at most at 1")
    if not x.is_cuda:
        return reference.quantize_kv(x, clip_ratio=clip_ratio, hadamard=hadamard)
    n_tokens, n_heads, head_dim = x.shape
    row_bytes = math.ceil(head_dim / 2)
    codes = torch.empty((n_tokens, n_heads, row_bytes), dtype=torch.uint8, device=x.device)
    ranges = torch.empty((n_tokens, n_heads, 2), dtype=torch.float16, device=x.device)
    if x.numel():
        starts = (x.data_ptr() // x.element_size(), x.stride(0), x.stride(1))
        kernel = compile_kernel(
            "quantize_kv",
            ELEMENT=_ELEMENTS[x.dtype],
            HEAD_DIM=head_dim,
            HADAMARD=int(hadamard),
            LOAD_WIDTH=math.gcd(min(8, 16 // x.element_size()), head_dim, *starts),
            STORE_WIDTH=math.gcd(8, row_bytes),
            THREADS=_THREADS,
        )
        if x.stride(0) == n_heads * x.stride(1):  # one run of heads: no division by their number
            n_tokens, n_heads = 1, n_tokens * n_heads
        arguments = (x, codes, ranges, n_tokens, n_heads, x.stride(0), x.stride(1), clip_ratio)
        launch(kernel, _grid(n_tokens * n_heads, head_dim), (_THREADS,), arguments, device=x.device)
    return PackedHeads(codes, ranges, head_dim)


def dequantize_kv(heads: PackedHeads, dtype: torch.dtype, *, hadamard: bool = False) -> torch.Tensor:
    """The heads [T, H, head_dim] that `quantize_kv` stored, in `dtype`, float16, bfloat16 or float32.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    codes, ranges, head_dim = heads
    if dtype not in _ELEMENTS or codes.ndim != 3 or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise KernelError(
            f"dequantize_kv: codes of {tuple(codes.shape)}, head_dim {head_dim}, to {dtype}; it must be "
            f"tokens x heads x bytes, 1 to {MAX_HEAD_DIM} and float16, bfloat16 or float32"
        )
    n_tokens, n_heads, row_bytes = (*codes.shape[:2], math.ceil(head_dim / 2))
    shape = (n_tokens, n_heads, row_bytes)
    check_operand("dequantize_kv", "codes", codes, dtype=torch.uint8, shape=shape, device=codes.device)
    shape = (n_tokens, n_heads, 2)
    check_operand(
        "dequantize_kv", "ranges", ranges, dtype=torch.float16, shape=shape, device=codes.device, alignment=4
    )
    if not codes.is_cuda:
        return reference.dequantize_kv(heads, dtype, hadamard=hadamard)
    values = torch.empty((n_tokens, n_heads, head_dim), dtype=dtype, device=codes.device)
    if values.numel():
        kernel = compile_kernel(
            "dequantize_kv",
            ELEMENT=_ELEMENTS[dtype],
            HEAD_DIM=head_dim,
            HADAMARD=int(hadamard),
            LOAD_WIDTH=math.gcd(8, row_bytes, codes.data_ptr()),
            STORE_WIDTH=math.gcd(min(8, 16 // values.element_size()), head_dim),
            THREADS=_THREADS,
        )
        arguments = (codes, ranges, values, n_tokens * n_heads)
        launch(kernel, _grid(n_tokens * n_heads, head_dim), (_THREADS,), arguments, device=codes.device)
    return values


def _grid(n_heads: int, head_dim: int) -> tuple[int]:
    """CTAs that hold `n_heads` heads; the lanes of a head are those of head_lanes.cuh."""
    channels = 16 if head_dim <= 512 else _power_of_two_from(math.ceil(head_dim / 32))
    lanes = _power_of_two_from(math.ceil(head_dim / channels))
    return (math.ceil(n_heads / (_THREADS // lanes)),)


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()
