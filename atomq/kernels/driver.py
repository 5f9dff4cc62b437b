"""One call of the CUDA driver that CuPy does not make: `cuLaunchKernelEx`, for launches that may overlap.

Structures and numbers are those of cuda.h (CUDA 12.0 and newer). A launch with programmatic stream
serialization may begin while the kernel before it on the stream still runs; the kernel waits by itself
(`kernels_cuda/grid_order.cuh`). In a captured CUDA graph it becomes an edge of that kind.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from atomq.errors import KernelError

_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 15),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


_OVERLAP = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)


def launch_overlapped(
    function: int,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    stream: int,
    parameters: Sequence[np.generic | np.ndarray[Any, Any]],
) -> None:
    """Launch a CUfunction so that it may begin while the kernel before it on the stream ends.

    `function` and `stream` are handles; the function's context must be current. `parameters` are what the
    kernel takes, one after the other, with the kernel's own types.

    Raises:
        KernelError: the driver refuses.
    """
    storage = [np.ascontiguousarray(parameter) for parameter in parameters]
    pointers = (ctypes.c_void_p * len(storage))(*(array.ctypes.data for array in storage))
    config = _Config(
        (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
        (ctypes.c_uint * 3)(*block, *(1,) * (3 - len(block))),
        shared_bytes,
        stream,
        ctypes.pointer(_OVERLAP),
        1,
    )
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    if status:
        raise KernelError(
            f"the CUDA driver refuses a launch of {tuple(grid)} x {tuple(block)}: error {status}"
        )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
