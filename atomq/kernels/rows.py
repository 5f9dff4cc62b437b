"""Fronts of `rows.cu` and `scale_sums.cu`: norms and activations before products that are not W4A4.

The baselines of `bench-e2e` and the W4A16 stage use them, so that they launch as few kernels as W4A4 does.
CPU tensors are computed in torch, which is the twin.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from atomq.errors import KernelError
from atomq.kernels.loader import compile_kernel, launch
from atomq.kernels.operands import Strides, check_operand

_ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}


def prepare_rows(
    x: torch.Tensor, *, norm_weight: torch.Tensor | None = None, epsilon: float = 0.0, silu_mul: bool = False
) -> torch.Tensor:
    """RMS norm of `x` [T, K] by float32 `norm_weight` [K], or SiLU(gate) * up of [T, 2 K]; in `x`'s dtype.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_channels = _check(x, norm_weight, silu_mul)
    if not x.is_cuda:
        return _prepare(x, norm_weight, epsilon, silu_mul).to(x.dtype)
    out = torch.empty((x.shape[0], n_channels), dtype=x.dtype, device=x.device)
    _launch_rows(x, norm_weight, epsilon, silu_mul, out, None)
    return out


def quantize_rows(
    x: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
    silu_mul: bool = False,
    min_rows: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `prepare_rows`, then INT8 codes [max(T, min_rows), K] and float32 scales [T], one per row.

    Codes are rint(y / scale), scale = max |y| / 127; rows past the last token hold anything.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_channels = _check(x, norm_weight, silu_mul)
    shape = (max(x.shape[0], min_rows), n_channels)
    if not x.is_cuda:
        y = _prepare(x, norm_weight, epsilon, silu_mul)
        largest = y.abs().amax(-1)
        scales = torch.where(largest > 0, largest / torch.tensor(127.0), torch.ones_like(largest))
        codes = torch.zeros(shape, dtype=torch.int8)
        codes[: x.shape[0]] = (y / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        return codes, scales
    codes = torch.empty(shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch_rows(x, norm_weight, epsilon, silu_mul, codes, scales)
    return codes, scales


def scale_sums(
    sums: torch.Tensor, row_scales: torch.Tensor, channel_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """INT32 `sums` [T, N], N in fours, times float32 `row_scales` [T] and `channel_scales` [N], in `dtype`.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_rows, n_channels = sums.shape
    operands = (
        ("sums", sums, torch.int32, (n_rows, n_channels)),
        ("row_scales", row_scales, torch.float32, (n_rows,)),
        ("channel_scales", channel_scales, torch.float32, (n_channels,)),
    )
    for name, tensor, wanted, shape in operands:
        check_operand("scale_sums", name, tensor, dtype=wanted, shape=shape, device=sums.device)
    if n_channels % 4 or dtype not in _ELEMENTS:
        raise KernelError(f"scale_sums: {n_channels} channels to {dtype}; it takes fours and floats")
    if not sums.is_cuda:
        return (sums.float() * row_scales[:, None] * channel_scales).to(dtype)
    out = torch.empty((n_rows, n_channels), dtype=dtype, device=sums.device)
    if out.numel():
        kernel = compile_kernel("scale_sums", ELEMENT=_ELEMENTS[dtype])
        arguments = (sums, row_scales, channel_scales, out, n_channels)
        launch(kernel, (math.ceil(n_channels / 1024), n_rows), (256,), arguments, device=sums.device)
    return out


def _check(x: torch.Tensor, norm_weight: torch.Tensor | None, silu_mul: bool) -> int:
    n_channels = x.shape[-1] // 2 if silu_mul else x.shape[-1]
    shape = (x.shape[0], n_channels * (1 + silu_mul))
    alignment = 2 * x.element_size()
    check_operand(
        "rows",
        "x",
        x,
        dtype=tuple(_ELEMENTS),
        shape=shape,
        device=x.device,
        strides=Strides.ROWS_APART,
        alignment=alignment,
    )
    if n_channels % 2 or (silu_mul and norm_weight is not None):
        raise KernelError(f"rows: {n_channels} channels; it takes pairs, and a norm or SiLU * up")
    if norm_weight is not None:
        check_operand(
            "rows",
            "norm_weight",
            norm_weight,
            dtype=torch.float32,
            shape=(n_channels,),
            device=x.device,
        )
    return n_channels


def _prepare(
    x: torch.Tensor, norm_weight: torch.Tensor | None, epsilon: float, silu_mul: bool
) -> torch.Tensor:
    x = x.float()
    if silu_mul:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up
    if norm_weight is None:
        return x
    inverse: torch.Tensor = 1 / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return x * inverse * norm_weight


def _launch_rows(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    silu_mul: bool,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    if not x.numel():
        return
    prologue = 2 if silu_mul else 0 if norm_weight is None else 1
    defines: dict[str, int | str] = {"ELEMENT": _ELEMENTS[x.dtype], "PROLOGUE": prologue}
    kernel = compile_kernel("rows", **defines, QUANTIZE=int(scales is not None))
    arguments = (x, norm_weight, out, scales, out.shape[1], x.stride(0), epsilon)
    launch(kernel, (x.shape[0],), (256,), arguments, device=x.device)
