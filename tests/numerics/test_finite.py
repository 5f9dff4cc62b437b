"""NaN and infinity are found wherever they are, in every dtype that is stored or computed with."""

from __future__ import annotations

import math

import pytest
import torch

from atomq.numerics.finite import is_finite

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 517, 1022, 1023])  # in a vector's first, last and inner lanes
def test_one_value_is_found_among_others(dtype, value, place):
    values = torch.linspace(-300, 300, 1023 + 1).to(dtype)
    assert is_finite(values)
    values[place] = value
    assert not is_finite(values)
    assert not is_finite(values.view(32, 32).T)


def test_both_infinities_do_not_make_up_for_each_other():
    assert not is_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_are_finite_and_so_is_nothing(dtype):
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([limits.max, limits.min], dtype=torch.float64).to(dtype))
    assert is_finite(torch.empty(0, 5, dtype=dtype))


def test_nan_of_a_dtype_without_infinity_is_found():
    assert not is_finite(torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn))
