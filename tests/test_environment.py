"""`atomq doctor`: what it asks for is what pyproject.toml asks for, and every verdict has its case."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atomq import environment
from atomq.cli import main
from atomq.kernels import probe
from atomq.kernels.probe import GpuStack, why_not

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = GpuStack(None, None, None, "CuPy is not installed")
WHOLE = GpuStack((13, 0), "14.2.0", (13, 0), "")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with that GPU stack, and with GPUs of these compute capabilities."""

    def pretend(stack: GpuStack, *capabilities: tuple[int, int]) -> environment.Diagnosis:
        monkeypatch.setattr(environment, "probe", lambda: stack)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        gpus = [SimpleNamespace(name="H100", major=a, minor=b, total_memory=80e9) for a, b in capabilities]
        monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
        return environment.diagnose()

    return pretend


def found(diagnosis: environment.Diagnosis, name: str) -> environment.Finding:
    return next(finding for finding in diagnosis.findings if finding.name == name)


def test_it_asks_for_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dict(d.split(">=") for d in project["dependencies"]) == environment.NEEDED
    low, high = environment.PYTHON_RANGE
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"


def test_a_machine_without_gpu_is_usable_and_told_so(machine, capsys):
    diagnosis = machine(NO_GPU)
    assert diagnosis.usable
    assert "There is no CUDA device, so the kernels do not run." in diagnosis.sentence
    assert set(diagnosis.kernels.values()) == {"no CUDA device"}
    assert found(diagnosis, "CuPy").advice.endswith('pip install "atomq[cuda13]"')
    assert main(["doctor"]) == 0
    assert diagnosis.sentence in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["usable"] is True
    assert document["kernels"] == diagnosis.kernels


def test_a_hopper_runs_every_kernel(machine):
    diagnosis = machine(WHOLE, (9, 0))
    assert set(diagnosis.kernels) == {path.stem for path in (ROOT / "kernels_cuda").glob("*.cu")}
    assert set(diagnosis.kernels.values()) == {""}
    n = len(diagnosis.kernels)
    assert diagnosis.sentence == f"Everything is here: the GPU runs {n} of {n} kernels."
    assert found(diagnosis, "GPU 0").found == "H100, compute capability 9.0, 80.0 GB"


def test_without_cupy_the_gpu_works_in_torch_only(machine):
    diagnosis = machine(GpuStack((12, 4), None, None, "CuPy is not installed"), (8, 0))
    assert "the INT4 kernels do not run yet" in diagnosis.sentence
    assert diagnosis.usable
    assert 'pip install "atomq[cuda12]"' in found(diagnosis, "CuPy").advice


@pytest.mark.parametrize(("built", "advice"), [(None, "CPU build"), ("13.0", "update the driver")])
def test_a_torch_that_sees_no_gpu_is_told_why(machine, monkeypatch, built, advice):
    monkeypatch.setattr(torch.version, "cuda", built)
    assert advice in found(machine(WHOLE), "GPU").advice


@pytest.mark.parametrize(
    ("name", "capability", "stack", "reason"),
    [
        ("sm90_w4a4_gemm", (9, 0), WHOLE, ""),
        ("sm90_w4a4_gemm", (8, 0), WHOLE, "made for compute capability 9.0, not 8.0"),
        ("sm90_w4a4_gemm", (12, 0), WHOLE, "made for compute capability 9.0, not 12.0"),
        ("sm80_w4a4_gemm", (12, 0), WHOLE, ""),
        ("sm80_w4a4_gemm", (7, 5), WHOLE, "needs compute capability 8.0, this is 7.5"),
        ("quantize_act", (7, 5), WHOLE, "needs compute capability 8.0, this is 7.5"),
        ("quantize_act", (8, 6), WHOLE, ""),
        ("quantize_act", (9, 0), GpuStack((12, 8), "14.2.0", (12, 8), ""), "needs NVRTC 12.9 or newer"),
        ("quantize_act", (8, 0), NO_GPU, "CuPy is not installed"),
    ],
)
def test_a_kernel_runs_or_says_why_not(name, capability, stack, reason):
    answer = why_not(name, capability, stack)
    assert answer.startswith(reason)
    assert bool(answer) == bool(reason)


@pytest.mark.parametrize("version", [None, "2.9.1"])
def test_a_library_that_is_missing_or_too_old_makes_it_unusable(machine, monkeypatch, capsys, version):
    real = metadata.version

    def pretended(name: str) -> str:
        if name != "torch":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(environment.metadata, "version", pretended)
    diagnosis = machine(NO_GPU)
    assert not diagnosis.usable
    assert found(diagnosis, "torch").advice == 'pip install "torch>=2.11"'
    assert main(["doctor"]) == 1
    assert re.search(
        r"error: something that atomq needs is missing or too old: torch$", capsys.readouterr().err
    )


def test_the_probe_never_fails(monkeypatch):
    stack = probe.probe()
    assert bool(stack.problem) == (stack.nvrtc is None)
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert probe.probe().problem.startswith("CuPy is not installed")
