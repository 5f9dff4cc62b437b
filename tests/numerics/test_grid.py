"""Grids: half to even, saturation, code books against a search over all entries."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import naive

from atomq.config import WeightScheme
from atomq.numerics.grid import CODEBOOKS, CodeGrid


@pytest.mark.parametrize(
    ("n_bits", "symmetric", "limits"),
    [
        (2, True, (-2, 1)),
        (3, True, (-4, 3)),
        (4, True, (-8, 7)),
        (8, True, (-128, 127)),
        (2, False, (0, 3)),
        (3, False, (0, 7)),
        (4, False, (0, 15)),
        (8, False, (0, 255)),
    ],
)
def test_integer_grids_span_all_codes_and_saturate(n_bits, symmetric, limits):
    grid = CodeGrid(n_bits, symmetric)
    assert (grid.qmin, grid.qmax) == limits
    assert grid.signed == symmetric
    zeros = None if symmetric else torch.zeros(3)
    assert grid.round(torch.tensor([-1e30, 0.0, 1e30]), zeros).tolist() == [limits[0], 0, limits[1]]


def test_ties_go_to_the_even_integer_before_the_zero_point_is_added():
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5])
    assert CodeGrid(4).round(ties).tolist() == [-2, -2, 0, 0, 2, 2, 6]
    zeros = torch.full_like(ties, 5)
    assert CodeGrid(4, symmetric=False).round(ties, zeros).tolist() == [3, 3, 5, 5, 7, 7, 11]


def test_zero_points_saturate_with_the_codes():
    grid = CodeGrid(4, symmetric=False)
    assert grid.round(torch.tensor([-9.0, 9.0]), torch.tensor([3.0, 12.0])).tolist() == [0, 15]
    assert grid.values(torch.tensor([0.0, 15.0]), torch.tensor([3.0, 12.0])).tolist() == [-3, 3]


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_code_book_takes_the_nearest_value_and_the_smaller_of_two(name, dtype):
    assert list(CODEBOOKS[name]) == naive.CODEBOOKS[name]
    grid = CodeGrid.of(name, 4)
    values = sorted(set(naive.CODEBOOKS[name]))
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    around = torch.tensor([*values, *midpoints], dtype=dtype)
    x = torch.cat(
        (
            around,
            torch.nextafter(around, torch.full_like(around, 1e9)),
            torch.nextafter(around, torch.full_like(around, -1e9)),
            torch.linspace(-1.3 * max(values), 1.3 * max(values), 999, dtype=dtype),
        )
    )
    codes = grid.round(x)
    assert codes.dtype == dtype
    assert codes.tolist() == [naive.nearest_code(value, name) for value in x.tolist()]
    assert grid.values(codes).tolist() == [naive.CODEBOOKS[name][int(code)] for code in codes]
    # A tie: the smaller value.
    lower = grid.values(grid.round(torch.tensor(midpoints, dtype=dtype)))
    assert lower.tolist() == values[:-1]


@pytest.mark.parametrize("name", ["fp4-bnb", "fp4-e2m1"])
def test_minus_zero_is_never_written_and_reads_as_zero(name):
    grid = CodeGrid.of(name, 4)
    assert not grid.signed
    codes = grid.round(torch.tensor([0.0, -0.0, -1e-30, 1e-30]))
    assert codes.tolist() == [0, 0, 0, 0]
    assert grid.values(torch.tensor([8.0])).item() == 0


def test_exponential_values_are_zero_and_powers_of_two():
    book = CODEBOOKS["exponential"]
    assert len(book) == len(set(book)) == 16
    assert {abs(value) for value in book} == {0.0, *(2.0**j for j in range(8))}


def test_format_names_give_the_grids_of_the_configuration():
    assert CodeGrid.of("int", 4).codebook is None
    assert CodeGrid.of("int", 3, False) == CodeGrid(3, symmetric=False)
    for name in CODEBOOKS:
        assert WeightScheme(number_format=name).number_format == name
