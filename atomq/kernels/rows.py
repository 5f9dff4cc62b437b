"""Fronts of `rows.cu` and `scale_sums.cu`: norms and activations before products that are not W4A4.

The baselines of `bench-e2e` and the W4A16 stage use them, so that they launch as few kernels as W4A4 does.
CPU tensors are computed in torch, which is the twin.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional

from atomq.errors import KernelError
from atomq.kernels.layout import Added
from atomq.kernels.loader import compile_kernel, launch
from atomq.kernels.operands import Strides, check_operand

MAX_CHANNELS = 2**16  # 64 in each of 1024 threads
_ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}
_THREADS, _MAX_THREADS = 512, 1024
_VECTORS = 4  # of a thread, before more threads are taken
_ROWS_OF_THREAD = 2  # of scale_sums


def prepare_rows(
    x: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
    silu_mul: bool = False,
    added: Added | None = None,
) -> torch.Tensor:
    """RMS norm of `x` [T, K] by float32 `norm_weight` [K], or SiLU(gate) * up of [T, 2 K]; in `x`'s dtype.

    `added` goes to `x` first, before a norm only.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_channels = _check(x, norm_weight, silu_mul, added)
    if not x.is_cuda:
        return _prepare(x, norm_weight, epsilon, silu_mul, added).to(x.dtype)
    out = torch.empty((x.shape[0], n_channels), dtype=x.dtype, device=x.device)
    _launch_rows(x, norm_weight, epsilon, silu_mul, added, out, None)
    return out


def quantize_rows(
    x: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
    silu_mul: bool = False,
    added: Added | None = None,
    min_rows: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `prepare_rows`, then INT8 codes [max(T, min_rows), K] and float32 scales [T], one per row.

    Codes are rint(y / scale), scale = max |y| / 127; rows past the last token hold anything.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_channels = _check(x, norm_weight, silu_mul, added)
    shape = (max(x.shape[0], min_rows), n_channels)
    if not x.is_cuda:
        y = _prepare(x, norm_weight, epsilon, silu_mul, added)
        largest = y.abs().amax(-1)
        scales = torch.where(largest > 0, largest / torch.tensor(127.0), torch.ones_like(largest))
        codes = torch.zeros(shape, dtype=torch.int8)
        codes[: x.shape[0]] = (y / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        return codes, scales
    codes = torch.empty(shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch_rows(x, norm_weight, epsilon, silu_mul, added, codes, scales)
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
        arguments = (sums, row_scales, channel_scales, out, n_rows, n_channels)
        grid = (math.ceil(n_channels / 1024), math.ceil(n_rows / _ROWS_OF_THREAD))
        launch(kernel, grid, (256,), arguments, device=sums.device, overlaps=True)
    return out


def _check(x: torch.Tensor, norm_weight: torch.Tensor | None, silu_mul: bool, added: Added | None) -> int:
    n_channels = x.shape[-1] // 2 if silu_mul else x.shape[-1]
    n_inputs = n_channels * (1 + silu_mul)
    check = functools.partial(check_operand, "rows", device=x.device)
    check("x", x, dtype=tuple(_ELEMENTS), shape=(x.shape[0], n_inputs), strides=Strides.ROWS_APART)
    if n_channels > MAX_CHANNELS or (silu_mul and (norm_weight is not None or added is not None)):
        raise KernelError(
            f"rows: {n_channels} channels; it takes {MAX_CHANNELS} at most, and a norm or SiLU * up"
        )
    if norm_weight is not None:
        check("norm_weight", norm_weight, dtype=torch.float32, shape=(n_channels,))
    if added is not None:
        for name, tensor in added._asdict().items():
            check(f"added.{name}", tensor, dtype=x.dtype, shape=(x.shape[0], n_channels))
    return n_channels


def _prepare(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    silu_mul: bool,
    added: Added | None,
) -> torch.Tensor:
    x = (x if added is None else torch.add(x, added.delta, out=added.total)).float()
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
    added: Added | None,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    if not x.numel():
        return
    n_channels = out.shape[1]
    delta, total = (None, None) if added is None else added
    given = [tensor for tensor in (x, norm_weight, delta, total) if tensor is not None]
    places = [tensor.data_ptr() // tensor.element_size() for tensor in given]
    width = math.gcd(16 // x.element_size(), n_channels, x.stride(0), *places)
    n_vectors = n_channels // width
    most = _THREADS if n_vectors <= _VECTORS * _THREADS else _MAX_THREADS
    vectors = math.ceil(n_vectors / most)
    n_threads = 32 * math.ceil(n_vectors / vectors / 32)
    kernel = compile_kernel(
        "rows",
        ELEMENT=_ELEMENTS[x.dtype],
        PROLOGUE=2 if silu_mul else 0 if norm_weight is None else 1,
        QUANTIZE=int(scales is not None),
        ADDS=int(added is not None),
        LOAD_WIDTH=width,
        VECTORS=vectors,
        THREADS=n_threads,
    )
    arguments = (x, delta, total, norm_weight, out, scales, n_channels, x.stride(0), epsilon)
    launch(kernel, (x.shape[0],), (n_threads,), arguments, device=x.device, overlaps=True)
