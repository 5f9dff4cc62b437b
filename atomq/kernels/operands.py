"""Checks that the kernels' fronts make, since CuPy makes none: dtype, shape, strides, device, alignment."""

from __future__ import annotations

import enum

import torch

from atomq.errors import KernelError


class Strides(enum.Enum):
    """What a kernel can read: a contiguous tensor, a matrix whose rows are dense, or any view."""

    CONTIGUOUS = enum.auto()
    ROWS_APART = enum.auto()
    ANY = enum.auto()


def check_operand(
    kernel: str,
    name: str,
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    strides: Strides = Strides.CONTIGUOUS,
    alignment: int = 1,
) -> None:
    """Refuse `tensor` unless the kernel may read it as it stands.

    `alignment` is in bytes and holds for every row of a matrix.

    Raises:
        KernelError: it says what was given and what is allowed.
    """
    operand = f"{kernel}: {name} of {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape or tensor.device != device:
        allowed = " or ".join(map(str, dtypes))
        raise KernelError(f"{operand}; it must be {shape} {allowed} on {device}")
    if tensor.numel() == 0:
        return
    rows_are_dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    if not (
        strides is Strides.ANY
        or tensor.is_contiguous()
        or (strides is Strides.ROWS_APART and tensor.ndim == 2 and rows_are_dense)
    ):
        raise KernelError(f"{operand} has strides {tensor.stride()}; make it contiguous first")
    step = tensor.stride(0) * tensor.element_size() if tensor.ndim == 2 and tensor.shape[0] > 1 else 0
    if tensor.data_ptr() % alignment or step % alignment:
        raise KernelError(f"{operand} does not start on a multiple of {alignment} bytes; copy it first")
