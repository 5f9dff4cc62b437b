"""Rotations against the matrix written out entry by entry."""

from __future__ import annotations

import math
import random

import pytest
import torch

from atomq.numerics.rotation import random_signs, rotate

WIDTHS = [1, 2, 3, 9, 12, 48, 64, 128, 576, 4096]


def naive_matrix(width: int, seed: int) -> torch.Tensor:
    """diag(signs) (H (x) C) float64 by its definition."""
    draw = random.Random(seed)
    signs = [draw.choice((1.0, -1.0)) for _ in range(width)]
    n_odd = width
    while n_odd % 2 == 0:
        n_odd //= 2
    size = width // n_odd
    matrix = torch.empty(width, width, dtype=torch.float64)
    for i in range(width):
        for j in range(width):
            hadamard = (-1) ** ((i // n_odd) & (j // n_odd)).bit_count() / math.sqrt(size)
            angle = 2 * math.pi * (i % n_odd) * (j % n_odd) / n_odd
            matrix[i, j] = signs[i] * hadamard * (math.cos(angle) + math.sin(angle)) / math.sqrt(n_odd)
    return matrix


@pytest.mark.parametrize("width", [w for w in WIDTHS if w <= 128])
def test_rows_times_the_matrix(width):
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    expected = (x.double() @ naive_matrix(width, seed=4)).float()
    torch.testing.assert_close(rotate(x, random_signs(width, 4)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_and_no_entry_is_large(width):
    matrix = rotate(torch.eye(width), random_signs(width, 7))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), rtol=0, atol=1e-5)
    assert matrix.abs().max() <= math.sqrt(2 / width) + 1e-6


def test_scales_are_folded_in_by_the_signs(monkeypatch):
    """And rows in many pieces are the same as in one."""
    x, scales = torch.randn(7, 24), torch.rand(24, dtype=torch.float64)
    signs = random_signs(24, 0)
    expected = rotate((x.double() * scales).float(), signs)
    torch.testing.assert_close(rotate(x, signs * scales), expected, rtol=0, atol=1e-6)
    monkeypatch.setattr("atomq.numerics.rotation._PIECE", 48)
    assert torch.equal(rotate(x, signs), torch.cat([rotate(row, signs)[None] for row in x]))


def test_signs_are_those_of_the_seed():
    assert random_signs(8, 1).tolist() == random_signs(8, 1).tolist() != random_signs(8, 2).tolist()
    assert abs(random_signs(4096, 1).sum()) < 256
