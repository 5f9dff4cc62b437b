"""Scales: F16 rounding, zero groups, progressive bases and factors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numerics import naive

from atomq.config import ActivationScheme
from atomq.numerics.grid import CODEBOOKS, CodeGrid
from atomq.numerics.scales import (
    asymmetric_scales,
    progressive_base,
    progressive_factors,
    replace_zero_scales,
    round_to_stored,
    scale_divisor,
    stored_dtype,
    symmetric_scales,
)


def test_divisors_are_sevens_and_the_largest_code_book_value():
    assert [scale_divisor(CodeGrid(n)) for n in (2, 3, 4, 8)] == [1, 3, 7, 127]
    assert [scale_divisor(CodeGrid(n), "half") for n in (2, 3, 4, 8)] == [1.5, 3.5, 7.5, 127.5]
    for name, largest in (("fp4-bnb", 12), ("fp4-e2m1", 6), ("exponential", 128)):
        grid = CodeGrid(4, codebook=CODEBOOKS[name])
        assert scale_divisor(grid) == scale_divisor(grid, "half") == largest


def test_symmetric_scale_is_clip_times_largest_over_the_divisor():
    largest = torch.tensor([7.0, 1.0, 0.0, 3.3e4])
    expected = [float(np.float32(v) * np.float32(0.9) / np.float32(7)) or 1.0 for v in largest.tolist()]
    assert symmetric_scales(largest, 0.9, 7.0).tolist() == expected


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_asymmetric_scales_and_zero_points_equal_a_loop_over_ranges(n_bits):
    low = torch.tensor([-3.0, 1.0, -5.0, 0.0, 0.1, -1e-42, -4e4])
    high = torch.tensor([4.0, 2.0, -1.0, 0.0, 0.1, 1e-42, 6e4])
    scales, zeros = asymmetric_scales(low, high, 0.9, n_bits)
    for index, values in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        clipped = naive.asymmetric_range(values, 0.9, np.float32)
        scale = naive.asymmetric_scale(*clipped, n_bits, np.float32)
        assert scales[index].item() == float(scale)
        assert zeros[index].item() == naive.zero_point(clipped[0], scale, n_bits)


def test_a_scale_that_is_no_normal_float32_becomes_one():
    smallest = 2.0**-126
    below = float(np.nextafter(np.float32(smallest), np.float32(0)))
    scales = torch.tensor([0.0, below, 1e-45, smallest, 2.0])
    assert replace_zero_scales(scales).tolist() == [1, 1, 1, smallest, 2]


def test_stored_scales_are_f16_unless_f16_has_no_normal_number_for_them():
    tiny = 2.0**-14
    below = float(np.nextafter(np.float32(tiny), np.float32(0)))
    beyond = float(np.nextafter(np.float32(65504), np.float32(np.inf)))
    scales = torch.tensor([0.1, 1 / 3, tiny, 65504.0, below, 1e-30, beyond, 1e6])
    rounded = round_to_stored(scales)
    assert rounded.dtype == torch.float32
    assert rounded[:4].tolist() == [float(np.float16(v)) for v in scales[:4].tolist()]
    assert rounded[:2].tolist() != scales[:2].tolist()
    assert torch.equal(rounded[4:], scales[4:])
    assert rounded.tolist() == [float(naive.stored_scale(np.float32(v), np.float32)) for v in scales.tolist()]


def test_stored_dtype_is_f16_only_if_no_scale_loses_a_bit():
    exact = round_to_stored(torch.rand(50) + 0.01)
    assert stored_dtype(exact) == torch.float16
    for spoiler in (1 / 3, 2.0**-15, 1e5, 1e-30):
        assert stored_dtype(torch.cat((exact, torch.tensor([spoiler])))) == torch.float32
    assert stored_dtype(torch.empty(0, 4)) == torch.float16


def test_progressive_factors_are_integers_1_to_16_and_never_make_a_scale_smaller():
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(200, 9, generator=generator) ** 3 + 1e-4
    base = progressive_base(scales)
    factors = progressive_factors(scales, base)
    for row in range(200):
        expected_base = np.float32(max(scales[row].tolist()) / 16)
        assert base[row].item() == float(expected_base)
        for column, scale in enumerate(scales[row].numpy()):
            factor = min(max(math.ceil(float(scale / expected_base)), 1), 16)
            assert factors[row, column].item() == factor
            assert float(expected_base) * factor >= scale
    assert factors.amin() == 1
    assert factors.amax(1).eq(16).all(), "the largest group of a row has the factor 16"


def test_a_tiny_change_above_a_multiple_takes_the_next_factor():
    base = torch.tensor([0.5])
    just_above = float(np.nextafter(np.float32(1.5), np.float32(2)))
    assert progressive_factors(torch.tensor([[1.5, just_above, 0.1, 9.0]]), base).tolist() == [[3, 4, 1, 16]]


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_code_times_factor_is_an_int8_operand(n_bits):
    grid = CodeGrid(n_bits)
    assert grid.qmin * 16 >= -128
    assert grid.qmax * 16 <= 127
    assert ActivationScheme(n_bits=n_bits, scale_mode="progressive").scale_mode == "progressive"


def test_base_of_a_row_without_normal_scales_is_one():
    assert progressive_base(torch.zeros(2, 3)).tolist() == [1, 1]
    assert progressive_base(torch.tensor([[2.0**-124, 0.0]])).tolist() == [1]  # /16 would be subnormal
