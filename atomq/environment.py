"""What atomq needs and what this machine has: the findings of `atomq doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from atomq.kernels.probe import GpuStack, kernel_names, probe, why_not
from atomq.units import human_bytes

Verdict = Literal["good", "absent", "wrong"]  # absent: only a part of atomq needs it

# The libraries and least versions that pyproject.toml asks for; a test holds them against it.
NEEDED = {
    "torch": "2.11",
    "transformers": "5.17",
    "datasets": "4.0",
    "safetensors": "0.6",
    "gguf": "0.17",
    "typer": "0.29",
    "rich": "14.0",
    "matplotlib": "3.10",
    "numpy": "2.0",
}
PYTHON_RANGE = ((3, 11), (3, 14))  # from, and below


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, whether it will do, and what to do if not."""

    name: str
    found: str
    verdict: Verdict
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the kernels with "" or the reason why they do not run here, and a sentence."""

    findings: list[Finding]
    kernels: dict[str, str]
    sentence: str

    @property
    def usable(self) -> bool:
        """Whether everything that atomq cannot do without is there."""
        return all(finding.verdict != "wrong" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usable": self.usable}


def diagnose() -> Diagnosis:
    """Look at Python, libraries, memory and the GPU."""
    stack = probe()
    findings = [_python(), *(_library(*item) for item in NEEDED.items()), _memory(), _driver(stack)]
    gpus, capability = _gpus(stack)
    findings += [*gpus, _cupy(stack), _nvrtc(stack)]
    reasons = {
        name: "no CUDA device" if capability is None else why_not(name, capability, stack)
        for name in kernel_names()
    }
    return Diagnosis(findings, reasons, _sentence(findings, reasons, capability is not None))


def _sentence(findings: list[Finding], reasons: dict[str, str], has_gpu: bool) -> str:
    wrong = [finding.name for finding in findings if finding.verdict == "wrong"]
    if wrong:
        return f"something that atomq needs is missing or too old: {', '.join(wrong)}"
    if not has_gpu:
        return (
            "Everything that the CPU needs is here: atomq quantizes, evaluates and verifies on it, by "
            "simulation. There is no CUDA device, so the kernels do not run."
        )
    running = [name for name, reason in reasons.items() if not reason]
    if not running:
        return (
            "Quantizing and evaluating run on the GPU in torch; the INT4 kernels do not run yet: see below."
        )
    return f"Everything is here: the GPU runs {len(running)} of {len(reasons)} kernels."


def _python() -> Finding:
    (low, high), version = PYTHON_RANGE, platform.python_version()
    good = low <= tuple(map(int, platform.python_version_tuple()[:2])) < high
    advice = f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    return Finding("Python", f"{version} on {platform.machine()}", *_judge(good, advice))


def _library(name: str, least: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", "wrong", f'pip install "{name}>={least}"')
    good = _numbers(version) >= _numbers(least)
    return Finding(name, version, *_judge(good, f'pip install "{name}>={least}"'))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{os.cpu_count()} cores, {human_bytes(total)} of memory, {human_bytes(free)} free on this disk"
    return Finding("machine", found, "good")


def _driver(stack: GpuStack) -> Finding:
    if stack.driver is None:
        return Finding("CUDA driver", "none", "absent", "needed for a GPU only: install NVIDIA's driver")
    return Finding("CUDA driver", f"for CUDA {_dotted(stack.driver)}", "good")


def _gpus(stack: GpuStack) -> tuple[list[Finding], tuple[int, int] | None]:
    """The GPUs that torch sees, and the compute capability of the first."""
    if stack.driver is None:
        advice = "work on the CPU, or on a machine with an NVIDIA GPU"
        return [Finding("GPU", "none", "absent", advice)], None
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("GPU", f"torch does not load ({error})", "wrong", "install torch again")], None
    if not torch.cuda.is_available():
        built = torch.version.cuda
        advice = (
            "this torch is a CPU build: install torch's CUDA build"
            if built is None
            else f"torch is built for CUDA {built}, the driver for {_dotted(stack.driver)}: update the driver"
        )
        return [Finding("GPU", "torch sees none", "absent", advice)], None
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = _dotted((properties.major, properties.minor))
        found = f"{properties.name}, compute capability {capability}, {human_bytes(properties.total_memory)}"
        findings.append(Finding(f"GPU {index}", found, "good"))
    return findings, torch.cuda.get_device_capability(0)


def _cupy(stack: GpuStack) -> Finding:
    if stack.cupy is None:
        return Finding("CuPy", "not installed", "absent", f"needed for the kernels only: {_extra(stack)}")
    return Finding("CuPy", stack.cupy, "good")


def _nvrtc(stack: GpuStack) -> Finding:
    if stack.nvrtc is None:
        advice = f"needed for the kernels only: {_extra(stack)}"
        return Finding("NVRTC", "not found" if stack.cupy else "comes with CuPy's extra", "absent", advice)
    return Finding("NVRTC", _dotted(stack.nvrtc), "good")


def _extra(stack: GpuStack) -> str:
    """What to install for the kernels, by what the driver supports."""
    old = stack.driver is not None and stack.driver < (13, 0)
    return 'pip install "atomq[cuda12]"' if old else 'pip install "atomq[cuda13]"'


def _judge(good: bool, advice: str) -> tuple[Verdict, str]:
    return ("good", "") if good else ("wrong", advice)


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(map(int, re.match(r"[\d.]*\d", version)[0].split(".")))  # type: ignore[index] # a version


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
