"""The machine code of compiled kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def disassemble(cubin: bytes, folder: Path) -> str:
    """SASS, by nvdisasm from the PATH or from NVIDIA's wheel; skips the test where there is none."""
    wheel = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin/nvdisasm")
    tool = shutil.which("nvdisasm") or next(map(str, wheel), None)
    if tool is None:
        pytest.skip("nvdisasm is not installed here")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def stages_are_given_back_behind_a_fence(sass: str) -> bool:
    """Whether a fence lies between any read of shared memory and the arrival after it.

    Without one, reads are on their way when the copy engine fills the stage anew (docs/LOG.md, 2026-11-28).
    """
    *before, _ = re.split(r"SYNCS\.ARRIVE\.TRANS64\.A1T0", sass)
    return bool(before) and all("FENCE.VIEW.ASYNC" in text[text.rfind("LDS") :] for text in before)
