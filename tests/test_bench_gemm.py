"""bench-gemm as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from atomq.cli import main
from atomq.eval.gemm_bench import Result, Timing
from atomq.formats.gemm_plot import draw_speedups
from atomq.kernels.loader import ARCHITECTURES

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@needs_no_gpu
def test_without_a_gpu_it_says_what_can_be_done_instead(capsys):
    assert main(["bench-gemm", "--tokens", "1"]) == 1
    assert "no CUDA device here; use --compile-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-9"], "unknown model 'gpt-9'; shapes are known of llama-2-7b"),
        (["--shape", "12by3"], "--shape 12by3 must look like 4096x4096"),
        (["--shape", "64x128"], "inputs above 128"),
        (["--tokens", "1,none"], "--tokens 1,none must be numbers of at least 1"),
        (["--tokens", "0"], "--tokens 0 must be numbers of at least 1"),
        (["--save", "record.txt"], "record.txt must end in .json"),
        (["--plot", "figure.pdf"], "figure.pdf must end in .png or .svg"),
        (["--checkpoint", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    assert main(["bench-gemm", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_and_none_spills(capsys):
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    assert main(["bench-gemm", "--compile-only", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["architectures"] == list(ARCHITECTURES)
    built = record["kernels"]
    assert all(kernel["spill_bytes"] == 0 and kernel["registers"] > 0 for kernel in built)
    everywhere = {"gptq_block", "quantize_act", "quantize_kv", "dequantize_kv", "repack_w4", "sm80_w4a4_gemm"}
    for name in everywhere:
        assert {kernel["arch"] for kernel in built if kernel["name"] == name} == set(ARCHITECTURES)
    assert {k["arch"] for k in built if k["name"].startswith("sm90")} == {"sm_90a"}
    sources = {path.stem for path in (resources_folder()).glob("*.cu")}
    assert {kernel["name"] for kernel in built} == sources


def resources_folder():
    from atomq.resources import folder

    return folder("kernels_cuda")


def test_a_result_gives_its_rates():
    result = Result("w4a4", 1000, 2000, 10, 0.0, Timing(2.0, 1.9, 2.1, 5.0), 1.0, 6e6)
    assert result.tops == pytest.approx(2 * 1000 * 2000 * 10 / 2e-6 / 1e12)
    assert result.gigabytes_per_s == pytest.approx(6e6 / 2e-6 / 1e9)
    assert result.to_dict()["floor_fraction"] == 0.5


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_picture_is_drawn(tmp_path, ending):
    results = [
        Result(name, 64, 256, n_tokens, None, Timing(us, us, us, us), 1.0, 1.0).to_dict()
        for name, us in (("w4a4", 2.0), ("fp16", 6.0))
        for n_tokens in (1, 16)
    ]
    path = tmp_path / f"speed{ending}"
    draw_speedups(path, results, "a GPU")
    start = path.read_bytes()[:8]
    assert start.startswith(b"\x89PNG" if ending == ".png" else b"<?xml")


def test_asking_for_help_loads_no_torch():
    code = "import sys, atomq.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
