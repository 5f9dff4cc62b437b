"""Compiling kernels: what ends up in the cache key, and what a user without CuPy, NVRTC or a GPU reads."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from atomq.errors import KernelError
from atomq.kernels import loader
from atomq.resources import folder


@pytest.fixture
def kernel_folder(tmp_path, monkeypatch):
    """A folder with one kernel and one header in place of kernels_cuda."""
    (tmp_path / "factor.cuh").write_text("constexpr float factor = 2.0f;\n")
    (tmp_path / "scale_by.cu").write_text(
        '#include "factor.cuh"\n'
        'extern "C" __global__ void scale_by(float* x) {\n'
        "    volatile __shared__ float y[N_FLOATS];\n"
        "    y[0] = x[0];\n"
        "    x[0] = factor * y[0];\n"
        "}\n"
    )
    monkeypatch.setattr(loader, "folder", lambda _: tmp_path)
    return tmp_path


def test_missing_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    loader.compile_kernel.cache_clear()
    for compile_ in (
        lambda: loader.compile_kernel("gptq_block"),
        lambda: loader.compile_for("gptq_block", "sm_80"),
    ):
        with pytest.raises(KernelError, match=r"need CuPy.*pip install atomq\[cuda13\].*atomq\[cuda12\]"):
            compile_()


def test_missing_nvrtc_says_what_to_install(monkeypatch):
    pytest.importorskip("cupy", reason="stands in for a CuPy without NVRTC")
    from cupy.cuda import nvrtc

    def fail():
        raise RuntimeError("CuPy failed to load libnvrtc.so")

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    with pytest.raises(KernelError, match=r"libnvrtc.*pip install atomq\[cuda13\]"):
        loader.compile_for("gptq_block", "sm_80")


def test_missing_gpu_is_named(monkeypatch):
    cupy = pytest.importorskip("cupy", reason="stands in for a machine without a GPU")
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: False)
    loader.compile_kernel.cache_clear()
    with pytest.raises(KernelError, match=r"gptq_block: CuPy .* finds no CUDA device"):
        loader.compile_kernel("gptq_block", CODEBOOK=0, N_WARPS=8)


def test_report_gives_registers_shared_memory_and_spills(kernel_folder):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    report = loader.compile_for("scale_by", "sm_90a", N_FLOATS=256)
    assert (report.name, report.arch, report.shared_bytes, report.spill_bytes) == (
        "scale_by",
        "sm_90a",
        1024,
        0,
    )
    assert report.registers > 0
    assert report.cubin.startswith(b"\x7fELF")


def test_a_source_that_does_not_compile_shows_the_compilers_log(kernel_folder):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    with pytest.raises(KernelError, match=r'(?s)sm_80.*scale_by.cu.*identifier "N_FLOATS" is undefined'):
        loader.compile_for("scale_by", "sm_80")
    with pytest.raises(KernelError, match=r"no kernel source .*absent\.cu"):
        loader.compile_for("absent", "sm_80")


def test_an_edited_header_changes_the_options(kernel_folder):
    before = loader._options({"N_FLOATS": 1})
    assert before == loader._options({"N_FLOATS": 1})
    (kernel_folder / "factor.cuh").write_text("constexpr float factor = 3.0f;\n")
    assert before != loader._options({"N_FLOATS": 1})


def test_every_kernel_file_defines_the_function_of_its_name():
    for path in folder("kernels_cuda").glob("*.cu"):
        source = path.read_text(encoding="utf-8")
        assert source.count('extern "C"') == 1, path
        assert re.search(rf'extern "C" __global__ void [^;{{]*\b{path.stem}\(', source), path


def test_arguments_are_passed_as_the_kernel_declares_them():
    tensor = torch.zeros(3)
    record = np.zeros((), dtype=[("a", "f4")])
    arguments = [
        loader._as_parameter(argument) for argument in (tensor, None, 7, True, 0.5, record, np.int64(9))
    ]
    assert [argument.dtype for argument in arguments[:5]] == [
        np.uint64,
        np.uint64,
        np.int32,
        np.int32,
        np.float32,
    ]
    assert arguments[0] == tensor.data_ptr()
    assert arguments[5] is record
    assert arguments[6].dtype == np.int64


@pytest.mark.gpu
def test_kernel_runs_on_torchs_stream_and_in_a_graph(kernel_folder):
    loader.compile_kernel.cache_clear()
    kernel = loader.compile_kernel("scale_by", N_FLOATS=1)
    x = torch.ones(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    loader.launch(kernel, (1,), (1,), (x,), device=x.device)
    with torch.cuda.graph(graph):
        loader.launch(kernel, (1,), (1,), (x,), device=x.device)
    graph.replay()
    graph.replay()
    assert x.item() == 8.0
