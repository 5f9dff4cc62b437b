"""Norms and activations of the baselines, and the scaling of INT8 sums: twins here, kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from atomq.errors import KernelError
from atomq.kernels.layout import Added
from atomq.kernels.loader import ARCHITECTURES, compile_for
from atomq.kernels.rows import prepare_rows, quantize_rows, scale_sums

CASES = {
    "plain": {},
    "norm": {"norm_weight": torch.linspace(0.5, 2, 326), "epsilon": 1e-5},
    "silu": {"silu_mul": True},
}


def make_rows(case: str, n_rows: int = 5) -> torch.Tensor:
    width = 652 if case == "silu" else 326
    x = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(n_rows)) * 3
    x[0] = 0
    return x


def on(device, settings):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


def expected_rows(case: str, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if case == "silu":
        return functional.silu(x[:, :326]) * x[:, 326:]
    if case == "norm":
        return functional.rms_norm(x, (326,), CASES["norm"]["norm_weight"].double(), 1e-5)
    return x


@pytest.mark.parametrize("case", CASES)
def test_rows_are_prepared_and_coded(case):
    x = make_rows(case)
    expected = expected_rows(case, x)
    assert torch.allclose(prepare_rows(x, **CASES[case]).double(), expected, rtol=1e-5, atol=1e-6)
    codes, scales = quantize_rows(x, **CASES[case], min_rows=17)
    assert codes.shape == (17, 326)
    largest = expected.abs().amax(-1)
    assert torch.allclose(scales[1:].double(), largest[1:] / 127, rtol=1e-5)
    assert scales[0] == 1
    assert ((codes[:5] * scales[:, None]).double() - expected).abs().max() <= 0.51 * scales.max()
    assert codes.abs().max() == 127


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_added_first_is_rounded_and_kept(dtype):
    x, delta = (make_rows("norm", n).to(dtype) for n in (5, 6))
    added = Added.to(delta[:5])
    prepared = prepare_rows(x, **CASES["norm"], added=added)
    total = (x.double() + delta[:5].double()).to(dtype)  # two 16-bit floats' sum is exact in float64
    assert torch.equal(added.total, total)
    assert torch.equal(prepared, prepare_rows(total, **CASES["norm"]))
    coded = quantize_rows(x, **CASES["norm"], added=added)
    for found, expected in zip(coded, quantize_rows(total, **CASES["norm"]), strict=True):
        assert torch.equal(found, expected)


def test_sums_are_scaled_by_row_and_channel():
    sums = torch.arange(-12, 12, dtype=torch.int32).reshape(3, 8) * 1000
    rows, channels = torch.tensor([0.5, 2, 3]), torch.linspace(0.1, 1, 8)
    expected = sums.double() * rows.double()[:, None] * channels.double()
    assert torch.allclose(scale_sums(sums, rows, channels, torch.float32).double(), expected, rtol=1e-6)


def test_operands_that_do_not_fit_are_refused():
    x = make_rows("plain")
    for call, message in (
        (lambda: prepare_rows(x.double()), "float64"),
        (lambda: prepare_rows(torch.zeros(1, 2**17 + 2), silu_mul=True), "65537 channels"),
        (lambda: prepare_rows(x, added=Added.to(x[:, :3].contiguous())), "added.delta"),
        (lambda: prepare_rows(x, added=Added(x, x.half())), "added.total"),
        (lambda: prepare_rows(x, silu_mul=True, added=Added.to(x)), "a norm or SiLU"),
        (lambda: prepare_rows(x, norm_weight=torch.ones(3)), "norm_weight"),
        (
            lambda: scale_sums(
                torch.zeros(2, 6, dtype=torch.int32), torch.ones(2), torch.ones(6), torch.half
            ),
            "6 channels",
        ),
    ):
        with pytest.raises(KernelError, match=message):
            call()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spilling(arch):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    sizes = {"ELEMENT": "__half", "LOAD_WIDTH": 8}
    reports = [
        compile_for(
            "rows",
            arch,
            **sizes,
            PROLOGUE=prologue,
            QUANTIZE=quantize,
            ADDS=int(prologue == 1),
            VECTORS=vectors,
            THREADS=512,
        )
        for prologue in (0, 1, 2)
        for quantize in (0, 1)
        for vectors in (1, 4)
    ]
    reports.append(compile_for("scale_sums", arch, ELEMENT="__half"))
    assert not any(report.spill_bytes for report in reports), reports


@pytest.mark.gpu
@pytest.mark.parametrize("n_channels", [1, 6, 331, 4096, 11008, 28672])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_every_width_are_the_twins_bits(dtype, n_channels):
    x, delta = torch.randn(2, 19, n_channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.linspace(0.5, 2, n_channels)
    here, there = Added.to(delta), Added.to(delta.cuda())
    expected = prepare_rows(x, norm_weight=weight, epsilon=1e-5, added=here)
    found = prepare_rows(x.cuda(), norm_weight=weight.cuda(), epsilon=1e-5, added=there).cpu()
    assert torch.equal(there.total.cpu(), here.total)
    assert torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_agree_with_their_twins(case, dtype):
    x, settings = make_rows(case, 67).to(dtype), CASES[case]
    expected = prepare_rows(x, **settings).float()
    found = prepare_rows(x.cuda(), **on("cuda", settings)).float().cpu()
    limit = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    assert torch.allclose(found, expected, rtol=limit, atol=limit * 0.1)
    codes, scales = quantize_rows(x.cuda(), **on("cuda", settings))
    twin_codes, twin_scales = quantize_rows(x, **settings)
    assert torch.allclose(scales.cpu(), twin_scales, rtol=1e-5)
    assert (codes.cpu().int() - twin_codes.int()).abs().max() <= 1
    sums = torch.randint(-(10**6), 10**6, (67, 1032), dtype=torch.int32)
    channels = torch.rand(1032)
    scaled = scale_sums(sums.cuda(), scales, channels.cuda(), dtype).float().cpu()
    wanted = scale_sums(sums, scales.cpu(), channels, dtype).float()
    assert torch.allclose(scaled, wanted, rtol=limit)
