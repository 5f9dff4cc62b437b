"""Matrix products for calibration in the arithmetic of a GPU's tensor cores, and what it costs in accuracy.

On the CPU everything here is plain float32.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn

from atomq.numerics.finite import is_finite

_ROWS = 4096  # factor columns that are solved for at a time


def half_products(device: torch.device) -> AbstractContextManager[object]:
    """Inside, linears and attention on CUDA multiply in bfloat16 and add in float32; nothing else changes.

    The products err by 2^-9 at most, where four-bit inputs err by 2^-4.
    """
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def waiting_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What activations of `dtype` are kept in between blocks: bfloat16 on CUDA, half the memory of float32.

    A model that runs in bfloat16 rounds them so after every addition, and not only between blocks.
    """
    return torch.bfloat16 if device.type == "cuda" else dtype


def halve_linears(module: nn.Module, device: torch.device) -> None:
    """Keep the weights of `module`'s linears as `half_products` multiplies them, in half of the memory."""
    for linear in module.modules() if device.type == "cuda" else ():
        if isinstance(linear, nn.Linear):
            linear.weight.data = linear.weight.data.bfloat16()


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add 2 X^T X to `total` [K, K] float32, in place, for `rows` X [n, K] float32.

    On CUDA each value is split into two of bfloat16, high + low, and the product of the low parts is left
    away. What is lost is 2^-17 of a product, about what float32 sums of many tokens lose by themselves.
    """
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (8, 0):
        add_split_gram(total, rows)
    else:
        total.addmm_(rows.T, rows, alpha=2.0)


def add_split_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """`add_gram` by products of bfloat16, also inside `half_products`."""
    with torch.autocast(rows.device.type, enabled=False):
        high = rows.bfloat16()
        low = (rows - high).bfloat16()
        total.add_(_product(high.T, high), alpha=2.0)
        cross = _product(high.T, low)
        total.add_(cross, alpha=2.0).add_(cross.T, alpha=2.0)


def add_cross_gram(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add 2 L^T R to `total` [K, K] float32, in place, for `left` and `right` [n, K] float32.

    On CUDA by one product of bfloat16: for a correction, which need not be as exact as a Hessian.
    """
    if left.is_cuda:
        total.add_(_product(left.bfloat16().T, right.bfloat16()), alpha=2.0)
    else:
        total.addmm_(left.T, right, alpha=2.0)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """bfloat16 operands multiplied and added up in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def inverse_factor(matrix: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor | None:
    """The upper Cholesky factor [K, K] of the inverse of a symmetric `matrix` with `diagonal` [K] in place of
    its own. Computed in float64; it comes back in the dtype of `matrix`.

    With the order of channels turned round (J), J A J = L L^T gives A^-1 = U^T U for U = J L^-1 J. So one
    factorization and half a triangular inverse do it, with two matrices of float64 in memory at most.

    Returns:
        None if the matrix is not positive definite, or the factor not finite.
    """
    lower, failed = torch.linalg.cholesky_ex(_turned(matrix, diagonal))
    if int(failed) or not is_finite(lower.diagonal()):
        return None
    width = len(matrix)
    factor = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    for start in range(0, width, _ROWS):
        end = min(start + _ROWS, width)
        unit = torch.zeros(width - start, end - start, dtype=lower.dtype, device=matrix.device)
        unit.diagonal().fill_(1.0)
        columns = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
        factor[: width - start, width - end : width - start] = columns.flip(0, 1)
    return factor if is_finite(factor) else None


def _turned(matrix: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """J A J in float64 for `inverse_factor`, in memory of its own."""
    turned = matrix.flip(0, 1).double()
    turned.diagonal().copy_(diagonal.flip(0))
    return turned
