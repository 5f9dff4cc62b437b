"""GPTQ's inner loop over one block of columns, on the CPU in torch and on a GPU by `gptq_block.cu`."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from atomq.errors import KernelError
from atomq.kernels import reference
from atomq.kernels.loader import compile_kernel, launch
from atomq.kernels.operands import Strides, check_operand
from atomq.numerics.grid import CodeGrid

MAX_COLUMNS = 128  # the block of hinv_chol that fits into shared memory, and four columns per lane
_N_WARPS = 8
_SHARED_BYTES = MAX_COLUMNS * MAX_COLUMNS * 4
_CTAS_PER_SM = 3  # by shared memory; each walks over its rows, so the block is loaded no more often than that
_CODE_BOOK = np.dtype([("values", "<f4", 16), ("midpoints", "<f4", 16), ("codes", "u1", 16)])


def gptq_block(
    weight_block: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    hinv_chol: torch.Tensor,
    grid: CodeGrid,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a block of columns one by one, each error compensated in the columns after it.

    Args:
        weight_block: float32 [N, B], B from 1 to 128, N >= 0; rows may lie apart. Not changed.
        scales: float32 [N], positive.
        zeros: float32 [N] of integers, or None where `grid` is symmetric.
        hinv_chol: float32 [B, B], the block on the diagonal of the upper Cholesky factor; any
            strides.
        grid: the codes.

    Returns:
        codes [N, B] int8 (uint8 where the grid has no negative codes), quantized [N, B] float32 (what they
        stand for) and errors [N, B] float32. The caller's update of the later columns is
        ``W[:, rest] -= errors @ hinv_chol[block, rest]``.

    CPU tensors run the twin in torch, CUDA tensors the kernel; they agree bit for bit. On the CPU all that is
    float32 here may be float64, for oracles.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    _check(weight_block, scales, zeros, hinv_chol, grid)
    if not weight_block.is_cuda:
        return reference.gptq_block(weight_block, scales, zeros, hinv_chol, grid)
    n_rows, n_columns = weight_block.shape
    device = weight_block.device
    codes = torch.empty((n_rows, n_columns), dtype=torch.int8 if grid.signed else torch.uint8, device=device)
    quantized = torch.empty((n_rows, n_columns), dtype=torch.float32, device=device)
    errors = torch.empty_like(quantized)
    if n_rows == 0:
        return codes, quantized, errors
    kernel = compile_kernel("gptq_block", CODEBOOK=int(grid.codebook is not None), N_WARPS=_N_WARPS)
    n_sms = torch.cuda.get_device_properties(device).multi_processor_count
    launch(
        kernel,
        (min(math.ceil(n_rows / _N_WARPS), n_sms * _CTAS_PER_SM),),
        (32 * _N_WARPS,),
        (
            weight_block,
            weight_block.stride(0),
            scales,
            zeros,
            hinv_chol,
            hinv_chol.stride(0),
            hinv_chol.stride(1),
            codes,
            quantized,
            errors,
            n_rows,
            n_columns,
            float(grid.qmin),
            float(grid.qmax),
            _code_book(grid),
        ),
        device=device,
        shared_bytes=_SHARED_BYTES,
    )
    return codes, quantized, errors


def _check(
    weight_block: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    hinv_chol: torch.Tensor,
    grid: CodeGrid,
) -> None:
    if weight_block.ndim != 2 or not 1 <= weight_block.shape[1] <= MAX_COLUMNS:
        raise KernelError(
            f"gptq_block: weight_block of {tuple(weight_block.shape)}; 1 to {MAX_COLUMNS} columns are allowed"
        )
    if (zeros is None) != (grid.symmetric or grid.codebook is not None):
        raise KernelError(
            "gptq_block: zeros must be given for an asymmetric integer grid, and for no other; "
            f"zeros are {'missing' if zeros is None else 'given'} with {grid}"
        )
    if grid.codebook is not None and not 1 <= len(grid.codebook) <= 16:
        raise KernelError(f"gptq_block: a code book of {len(grid.codebook)} entries; 1 to 16 are allowed")
    n_rows, n_columns = weight_block.shape
    device = weight_block.device
    dtype = weight_block.dtype if device.type == "cpu" else torch.float32
    check = functools.partial(check_operand, "gptq_block", dtype=dtype, device=device)
    if dtype not in (torch.float32, torch.float64):
        raise KernelError(f"gptq_block: weight_block of {dtype}; float32 is allowed, and float64 on the CPU")
    check("weight_block", weight_block, shape=(n_rows, n_columns), strides=Strides.ROWS_APART)
    check("scales", scales, shape=(n_rows,))
    check("hinv_chol", hinv_chol, shape=(n_columns, n_columns), strides=Strides.ANY)
    if zeros is not None:
        check("zeros", zeros, shape=(n_rows,))


def _code_book(grid: CodeGrid) -> np.ndarray:
    """The kernel's struct CodeBook: values in ascending order, midpoints between them, and their codes."""
    book = np.zeros((), dtype=_CODE_BOOK)
    book["midpoints"] = np.inf
    if grid.codebook is not None:
        values = np.array(sorted(set(grid.codebook)))
        book["values"][: len(values)] = values
        book["midpoints"][: len(values) - 1] = (values[1:] + values[:-1]) / 2
        book["codes"][: len(values)] = grid.round(torch.from_numpy(values)).numpy()
    return book
