"""Compile the kernels of kernels_cuda/ with NVRTC through CuPy, and launch them on torch's stream.

A kernel is one file, `kernels_cuda/<name>.cu`, with one `extern "C"` function of the same name; its
parameters are upper-case preprocessor constants. CuPy is imported inside the functions only, so this module
loads anywhere. Nothing here checks operands: CuPy passes on whatever it is given, so each front does that.

CuPy adds `-ftz=true` to everything it compiles and so does `compile_for`; arithmetic that must round as torch
does on a CPU goes through `ieee.cuh`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from atomq.errors import KernelError
from atomq.kernels.driver import launch_overlapped
from atomq.resources import folder

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
"""The architectures every kernel is compiled for in the tests."""

_INSTALL = "install `pip install atomq[cuda13]` (driver 580 or newer) or `pip install atomq[cuda12]`"
_STATIC_SHARED_LIMIT = 48 * 1024  # more dynamic shared memory than this must be asked for per function

Argument = torch.Tensor | np.generic | np.ndarray[Any, Any] | bool | int | float | None


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler says of one kernel on one architecture; sizes in bytes, shared memory as static."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    cubin: bytes = field(repr=False)


@dataclass(frozen=True)
class DeviceLimits:
    """What launches are sized by: the number of SMs, and the shared memory of a CTA and of an SM."""

    n_sms: int
    shared_bytes_of_cta: int
    shared_bytes_of_sm: int


@functools.cache
def compile_kernel(name: str, **defines: int | str) -> Any:
    """Compile `kernels_cuda/<name>.cu` for the current CUDA device, with `-D<define>=<value>` each.

    Returns a `cupy.RawKernel` for `launch`. Compiled once per process and set of defines; CuPy keeps the
    binary on disk, under a key that holds the options and the source, to which the headers' hash is added.

    Raises:
        KernelError: no CuPy, NVRTC, driver or device here (it says what to install), or a source that does
            not compile (it shows the compiler's log).
    """
    cupy = _cupy()
    if not cupy.cuda.is_available():
        raise KernelError(f"CUDA kernel {name}: CuPy {cupy.__version__} finds no CUDA device or driver here")
    options = _options(defines)
    if cupy.cuda.Device().compute_capability == "90":
        major, minor = _nvrtc_version()
        if (major, minor) < (12, 9):
            raise KernelError(
                f"CUDA kernel {name}: NVRTC {major}.{minor} is older than the 12.9 it needs here: {_INSTALL}"
            )
        options += ("-arch=sm_90a",)  # overrides the sm_90 that CuPy adds: wgmma exists on sm_90a only
    try:
        kernel = cupy.RawModule(code=_source(name), options=options).get_function(name)
        kernel.compile()
    except cupy.cuda.compiler.CompileException as error:
        raise KernelError(f"CUDA kernel {name} does not compile with {options}:\n{error}") from error
    return kernel


def compile_for(name: str, arch: str, **defines: int | str) -> CompiledKernel:
    """Compile a kernel for `arch`, such as "sm_90a", with no GPU needed, and report its resources.

    Raises:
        KernelError: no CuPy or NVRTC here, or a source that does not compile.
    """
    _cupy()
    from cuda.pathfinder import find_nvidia_header_directory  # type: ignore[import-untyped]
    from cupy.cuda import nvrtc

    _nvrtc_version()
    options = (*_options(defines), "-ftz=true", f"-arch={arch}", "--ptxas-options=-v")
    headers = find_nvidia_header_directory("cudart")
    if headers:
        options += (f"-I{headers}",)
    program = nvrtc.createProgram(_source(name), f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        cubin = bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy drops the last byte, taking it for a NUL
        log = nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise KernelError(f"CUDA kernel {name} does not compile for {arch} with {options}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    return CompiledKernel(
        name=name,
        arch=arch,
        registers=_sum_in_log(r"Used (\d+) registers", log),
        shared_bytes=_sum_in_log(r"(\d+) bytes smem", log),
        spill_bytes=_sum_in_log(r"(\d+) bytes spill", log),
        cubin=cubin,
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: tuple[Argument, ...],
    *,
    device: torch.device,
    shared_bytes: int = 0,
    overlaps: bool = False,
) -> None:
    """Launch `kernel` on torch's current stream of `device`; it can be captured in a CUDA graph.

    Tensors go as the address of their first element (None as a null pointer), int as int32, float as float32;
    NumPy scalars and arrays of a structured type as they are. `overlaps`: it may begin while the kernel
    before it ends, where the device can (sm_90 on); for kernels that use `grid_order.cuh` only.
    """
    cupy = _cupy()
    if shared_bytes > _STATIC_SHARED_LIMIT:
        kernel.max_dynamic_shared_size_bytes = shared_bytes
    stream = torch.cuda.current_stream(device)
    parameters = tuple(map(_as_parameter, arguments))
    with cupy.cuda.Device(stream.device_index):
        if overlaps and torch.cuda.get_device_capability(device) >= (9, 0):
            launch_overlapped(kernel.kernel.ptr, grid, block, shared_bytes, stream.cuda_stream, parameters)
        else:
            with cupy.cuda.Stream.from_external(_Stream(stream)):
                kernel(grid, block, parameters, shared_mem=shared_bytes)


class _Stream:
    """A torch stream under CUDA's stream protocol, which CuPy takes."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device."""
    attributes = _cupy().cuda.Device(device.index).attributes
    return DeviceLimits(
        n_sms=attributes["MultiProcessorCount"],
        shared_bytes_of_cta=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_bytes_of_sm=attributes["MaxSharedMemoryPerMultiprocessor"],
    )


def _as_parameter(argument: Argument) -> np.generic | np.ndarray[Any, Any]:
    match argument:
        case None:
            return np.uint64(0)
        case torch.Tensor():
            return np.uint64(argument.data_ptr())
        case bool() | int():
            return np.int32(argument)
        case float():
            return np.float32(argument)
        case _:
            return argument


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise KernelError(
            f"atomq's CUDA kernels need CuPy, which is not installed here: {_INSTALL}"
        ) from error
    return cupy


def _nvrtc_version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    try:
        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise KernelError(
            f"CuPy cannot load the CUDA compiler library NVRTC ({error}): {_INSTALL}"
        ) from error
    return major, minor


def _options(defines: dict[str, int | str]) -> tuple[str, ...]:
    return (
        "-std=c++17",
        f"-I{folder('kernels_cuda')}",
        f"-DATOMQ_HEADERS=0x{_headers_hash()}",
        *(f"-D{key}={value}" for key, value in sorted(defines.items())),
    )


def _source(name: str) -> str:
    path = folder("kernels_cuda") / f"{name}.cu"
    if not path.is_file():
        raise KernelError(f"no kernel source {path}")
    return path.read_text(encoding="utf-8")


def _headers_hash() -> str:
    """A hash of every shared header: CuPy's cache does not look through #include, so it goes into the key."""
    digest = hashlib.sha256()
    for path in sorted(folder("kernels_cuda").glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _sum_in_log(pattern: str, log: str) -> int:
    return sum(map(int, re.findall(pattern, log)))
