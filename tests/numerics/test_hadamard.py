"""Hadamard blocks: against Sylvester's recursion, orthogonal, their own inverse."""

from __future__ import annotations

import pytest
import torch
from numerics import naive

from atomq.numerics.hadamard import block_size, hadamard_matrix, transform_blocks, transform_groups

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64, 128])
def test_matrix_equals_sylvesters_recursion_and_is_its_own_inverse(size):
    matrix = hadamard_matrix(size, torch.float64, CPU)
    assert torch.allclose(matrix, torch.tensor(naive.hadamard(size), dtype=torch.float64), atol=1e-15)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_matrix_of_four_is_the_one_written_out_by_hand():
    half = 0.5
    assert hadamard_matrix(4, torch.float32, CPU).tolist() == [
        [half, half, half, half],
        [half, -half, half, -half],
        [half, half, -half, -half],
        [half, -half, -half, half],
    ]


@pytest.mark.parametrize(
    ("width", "size"), [(128, 128), (64, 64), (448, 64), (112, 16), (36, 4), (80, 16), (13, 1), (1, 1)]
)
def test_blocks_are_the_largest_power_of_two_that_divides_the_width(width, size):
    assert block_size(width) == size
    x = torch.randn(3, width, dtype=torch.float64)
    expected = torch.stack([torch.from_numpy(naive.transform_row(row, None)) for row in x.tolist()])
    turned = transform_blocks(x)
    assert torch.allclose(turned, expected, atol=1e-12)
    assert torch.allclose(transform_blocks(turned), x, atol=1e-12)
    if size == 1:
        assert torch.equal(turned, x)
    for start in range(0, width, size):  # a block's change stays in the block
        other = x.clone()
        other[:, start] += 1
        changed = (transform_blocks(other) - turned).abs().amax(0) > 1e-9
        assert changed.nonzero().flatten().tolist() == list(range(start, start + size))


@pytest.mark.parametrize(
    ("width", "group_size", "blocks"),
    [
        (448, 128, [128, 128, 128, 64]),
        (128, 128, [128]),
        (64, 128, [64]),
        (56, 16, [16, 16, 16, 8]),
        (62, 16, [16, 16, 16, 2, 2, 2, 2, 2, 2, 2]),
        (57, 16, [16, 16, 16, *[1] * 9]),
        (448, None, [64] * 7),
        (36, 12, [4] * 9),
    ],
)
def test_groups_are_turned_one_by_one_and_the_short_one_in_its_own_blocks(width, group_size, blocks):
    x = torch.randn(2, 3, width, dtype=torch.float64)
    turned = transform_groups(x, group_size)
    expected = torch.empty_like(x)
    start = 0
    for size in blocks:
        matrix = torch.tensor(naive.hadamard(size), dtype=torch.float64)
        expected[..., start : start + size] = x[..., start : start + size] @ matrix
        start += size
    assert start == width
    assert torch.allclose(turned, expected, atol=1e-12)
    assert torch.allclose(transform_groups(turned, group_size), x, atol=1e-12)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))


def test_turning_inputs_and_weights_leaves_their_product():
    x, weight = torch.randn(5, 56), torch.randn(7, 56)
    product = transform_groups(x, 16) @ transform_groups(weight, 16).T
    assert torch.allclose(product, x @ weight.T, atol=1e-4)


def test_no_rows_and_half_precision_keep_shape_and_dtype():
    assert transform_groups(torch.empty(0, 56), 16).shape == (0, 56)
    assert transform_groups(torch.randn(2, 56, dtype=torch.bfloat16), 16).dtype == torch.bfloat16
