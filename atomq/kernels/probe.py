"""What the GPU side of this machine is: driver, CuPy, NVRTC, and which kernels its architecture runs.

Nothing here fails where something is missing: that is what it is asked for.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

from atomq.resources import folder

LEAST_CAPABILITY = (8, 0)  # of the kernels without an architecture in their name
_LEAST_NVRTC_OF_HOPPER = (12, 9)


@dataclass(frozen=True)
class GpuStack:
    """Versions as (major, minor), None where there is none; `problem` says why CuPy or NVRTC is not there."""

    driver: tuple[int, int] | None
    cupy: str | None
    nvrtc: tuple[int, int] | None
    problem: str


def probe() -> GpuStack:
    """Look at the CUDA driver, CuPy and the compiler library that CuPy loads."""
    driver = _driver_version()
    try:
        import cupy
        from cupy.cuda import nvrtc
    except ImportError as error:
        return GpuStack(driver, None, None, f"CuPy is not installed ({error})")
    try:
        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return GpuStack(driver, cupy.__version__, None, f"CuPy cannot load NVRTC ({error})")
    return GpuStack(driver, cupy.__version__, (major, minor), "")


def kernel_names() -> list[str]:
    """Every kernel there is, by the name of its file."""
    return sorted(path.stem for path in folder("kernels_cuda").glob("*.cu"))


def why_not(name: str, capability: tuple[int, int], stack: GpuStack) -> str:
    """Why the kernel `name` does not run on a device of that compute capability; "" if it does.

    A name that starts with sm90 is for 9.0 alone, whose instructions other architectures lack.
    """
    if stack.problem:
        return stack.problem
    own = re.match(r"sm(\d)(\d)_", name)
    least = (int(own[1]), int(own[2])) if own else LEAST_CAPABILITY
    if least == (9, 0) and capability != least:
        return f"made for compute capability 9.0, not {capability[0]}.{capability[1]}"
    if capability < least:
        return f"needs compute capability {least[0]}.{least[1]}, this is {capability[0]}.{capability[1]}"
    if capability == (9, 0) and (stack.nvrtc or (0, 0)) < _LEAST_NVRTC_OF_HOPPER:
        return "needs NVRTC 12.9 or newer on compute capability 9.0"
    return ""


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the installed driver supports."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10
