"""GPTQ's inner loop: the twin against a naive float64 loop, the kernel against the twin."""

from __future__ import annotations

import bisect
import itertools

import pytest
import torch

from atomq.errors import KernelError
from atomq.kernels import reference
from atomq.kernels.gptq import gptq_block
from atomq.kernels.loader import ARCHITECTURES, compile_for
from atomq.numerics.grid import CODEBOOKS, CodeGrid

GRIDS = {
    "int4": CodeGrid(4),
    "int8": CodeGrid(8),
    "int4-asymmetric": CodeGrid(4, symmetric=False),
    "int8-asymmetric": CodeGrid(8, symmetric=False),
    "fp4": CodeGrid(4, codebook=CODEBOOKS["fp4-e2m1"]),
    "unequal-signs": CodeGrid(4, codebook=CODEBOOKS["exponential"]),
}


def make_operands(n_rows: int, n_columns: int, grid: CodeGrid, seed: int = 0, device: str = "cpu"):
    """Random weight, scales, zeros and a Cholesky factor; the matrices are cut out of wider ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_rows, n_columns + 3, generator=generator)[:, 1 : n_columns + 1]
    levels = grid.qmax - grid.qmin if grid.codebook is None else 2 * max(grid.codebook)
    scales = (0.5 + torch.rand(n_rows, generator=generator)) * 4 / levels
    zeros = None
    if not grid.symmetric:
        zeros = torch.randint(grid.qmin, grid.qmax + 1, (n_rows,), generator=generator).float()
    inputs = torch.randn(2 * n_columns + 8, n_columns + 5, generator=generator, dtype=torch.float64)
    inputs += 0.5 * inputs.roll(1, dims=1)
    inverse = torch.linalg.inv(inputs.T @ inputs)
    hinv_chol = torch.linalg.cholesky(inverse, upper=True).float()[2:-3, 2:-3]
    tensors = (weight, scales, zeros, hinv_chol)
    return *(None if tensor is None else tensor.to(device) for tensor in tensors), grid


def naive_loop(weight, scales, zeros, hinv_chol, grid):
    """One weight at a time in float64; also whether any ratio came near a tie, where float32 may differ."""
    weight, hinv = weight.double().tolist(), hinv_chol.double().tolist()
    codes, errors, near_tie = [], [], []
    book = sorted(set(grid.codebook or ()))
    for row, weights in enumerate(weight):
        scale, zero = scales[row].item(), 0 if zeros is None else int(zeros[row])
        row_codes, row_errors, tie = [], [], False
        for j in range(len(weights)):
            ratio = weights[j] / scale
            if book:
                midpoints = [(low + high) / 2 for low, high in itertools.pairwise(book)]
                value = book[bisect.bisect_left(midpoints, ratio)]
                code = grid.codebook.index(value)
                tie |= min(abs(ratio - midpoint) for midpoint in midpoints) < 1e-3
            else:
                code = min(max(round(ratio) + zero, grid.qmin), grid.qmax)
                value = code - zero
                tie |= abs(ratio % 1 - 0.5) < 1e-3
            error = (weights[j] - value * scale) / hinv[j][j]
            for i in range(j + 1, len(weights)):
                weights[i] -= error * hinv[j][i]
            row_codes.append(code)
            row_errors.append(error)
        codes.append(row_codes)
        errors.append(row_errors)
        near_tie.append(tie)
    return torch.tensor(codes), torch.tensor(errors), torch.tensor(near_tie)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("n_columns", [1, 2, 31, 32, 33, 64])
def test_twin_gives_the_codes_of_a_naive_float64_loop(grid, n_columns):
    operands = make_operands(60, n_columns, grid)
    before = operands[0].clone()
    codes, quantized, errors = gptq_block(*operands)
    expected_codes, expected_errors, near_tie = naive_loop(*operands)
    assert torch.equal(operands[0], before), "the weight must not change"
    settled = ~near_tie
    assert settled.sum() >= 10
    assert torch.equal(codes[settled].long(), expected_codes[settled])
    assert torch.allclose(errors[settled], expected_errors[settled].float(), rtol=1e-3, atol=1e-3)
    values = grid.values(codes.float(), None if operands[2] is None else operands[2][:, None])
    assert torch.equal(quantized, values * operands[1][:, None])


def test_a_tie_goes_to_the_even_code_and_in_a_code_book_to_the_smaller_value():
    ratios = torch.tensor([[-8.5], [-2.5], [-0.5], [0.5], [1.5], [2.5], [7.5]])
    ones, factor = torch.ones(len(ratios)), torch.ones(1, 1)
    codes, _, _ = gptq_block(ratios, ones, None, factor, CodeGrid(4))
    assert codes.flatten().tolist() == [-8, -2, 0, 0, 2, 2, 7]
    _, quantized, _ = gptq_block(ratios, ones, None, factor, GRIDS["fp4"])
    assert quantized.flatten().tolist() == [-6, -3, -0.5, 0.5, 1.5, 2, 6]


def test_codes_without_negatives_are_unsigned_bytes():
    for grid in GRIDS.values():
        codes, _, _ = gptq_block(*make_operands(5, 4, grid))
        assert codes.dtype == (torch.int8 if grid.signed else torch.uint8)


def test_float64_runs_on_the_cpu_and_gives_the_naive_loops_errors():
    weight, scales, zeros, hinv_chol, grid = make_operands(20, 48, CodeGrid(4))
    operands = (weight.double(), scales.double(), zeros, hinv_chol.double(), grid)
    codes, _, errors = gptq_block(*operands)
    expected_codes, expected_errors, _ = naive_loop(*operands)
    assert torch.equal(codes.long(), expected_codes)
    assert torch.allclose(errors, expected_errors.double(), rtol=1e-6, atol=1e-6)


def test_no_rows_give_empty_results():
    codes, quantized, errors = gptq_block(*make_operands(0, 16, CodeGrid(4)))
    assert codes.shape == quantized.shape == errors.shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, s, z, h, g: (w[:, 0], s, z, h, g), "1 to 128 columns"),
        (lambda w, s, z, h, g: (w[:, :0], s, z, h[:0, :0], g), "1 to 128 columns"),
        (lambda w, s, z, h, g: (w.repeat(1, 9), s, z, h, g), "1 to 128 columns"),
        (lambda w, s, z, h, g: (w.half(), s, z, h, g), "weight_block of torch.float16; float32 is allowed"),
        (lambda w, s, z, h, g: (w.T.contiguous().T, s, z, h, g), "weight_block of .* strides"),
        (lambda w, s, z, h, g: (w, s[1:], z, h, g), "scales of"),
        (lambda w, s, z, h, g: (w, s.half(), z, h, g), "scales of .* must be .*float32"),
        (lambda w, s, z, h, g: (w, s.repeat_interleave(2)[::2], z, h, g), "scales of .* contiguous"),
        (lambda w, s, z, h, g: (w, s, s, h, g), "zeros .* given"),
        (lambda w, s, z, h, g: (w, s, z, h, CodeGrid(4, symmetric=False)), "zeros are missing"),
        (lambda w, s, z, h, g: (w, s, z, h[1:], g), "hinv_chol of"),
        (lambda w, s, z, h, g: (w, s, z, h, CodeGrid(5, codebook=(0.0,) * 32)), "32 entries"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    with pytest.raises(KernelError, match=message):
        gptq_block(*change(*make_operands(4, 16, CodeGrid(4))))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("codebook", [0, 1])
def test_kernel_compiles_without_spilling(arch, codebook):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    report = compile_for("gptq_block", arch, CODEBOOK=codebook, N_WARPS=8)
    assert report.spill_bytes == 0, report
    assert 0 < report.registers <= 64, report  # three CTAs of 256 threads on an SM


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    ("n_rows", "n_columns"), [(1, 1), (7, 128), (129, 33), (1000, 127), (4099, 128), (9000, 5)]
)
def test_kernel_equals_twin_bit_for_bit(grid, n_rows, n_columns):
    operands = make_operands(n_rows, n_columns, grid, seed=n_rows)
    on_gpu = (*(None if tensor is None else tensor.cuda() for tensor in operands[:4]), grid)
    for actual, expected in zip(gptq_block(*on_gpu), reference.gptq_block(*operands), strict=True):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.gpu
def test_one_changed_factor_changes_the_kernels_codes():
    weight, scales, zeros, hinv_chol, grid = make_operands(64, 128, CodeGrid(4), device="cuda")
    before, _, _ = gptq_block(weight, scales, zeros, hinv_chol, grid)
    altered = hinv_chol.clone()
    altered[3, 100] += 0.5 * altered[3, 3]
    after, _, _ = gptq_block(weight, scales, zeros, altered, grid)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])
