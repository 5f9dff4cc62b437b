"""Products in tensor-core arithmetic, and the factor of an inverse."""

from __future__ import annotations

import pytest
import torch

from atomq.numerics import products
from atomq.numerics.products import add_gram, add_split_gram, half_products, inverse_factor


def rows_of(n: int, width: int) -> torch.Tensor:
    """Values as quantized activations have them: a few codes times a scale of each row."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (n, width), generator=generator)
    return codes * torch.rand(n, 1, generator=generator) * torch.linspace(0.1, 9, width)


@pytest.mark.parametrize(("add", "tolerance"), [(add_gram, 1e-6), (add_split_gram, 2e-5)])
def test_gram_matrices_are_added_up(add, tolerance):
    total = torch.full((24, 24), 3.0)
    parts = rows_of(300, 24).split(128)
    for part in parts:
        add(total, part)
    x = torch.cat(parts).double()
    expected = 2 * x.T @ x
    assert (total.double() - 3.0 - expected).norm() < tolerance * expected.norm()


def test_splitting_keeps_eight_more_bits_than_bfloat16_has():
    x = rows_of(300, 24)
    exact = 2 * x.double().T @ x.double()
    split = torch.zeros(24, 24)
    add_split_gram(split, x)
    half = 2 * x.bfloat16().float().T @ x.bfloat16().float()
    assert (split.double() - exact).norm() < 0.02 * (half.double() - exact).norm()
    assert torch.allclose(split, split.T, rtol=1e-6)


def positive_definite(width: int) -> torch.Tensor:
    x = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (
        x.T
        @ x
        * torch.linspace(0.01, 10, width, dtype=torch.float64).outer(
            torch.linspace(0.01, 10, width, dtype=torch.float64)
        )
    )


@pytest.mark.parametrize("rows_at_a_time", [3, 7, 4096])
@pytest.mark.parametrize("width", [1, 6, 20])
def test_the_factor_is_that_of_the_inverse(width, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(products, "_ROWS", rows_at_a_time)
    matrix = positive_definite(width)
    diagonal = matrix.diagonal() * 1.5
    expected = torch.linalg.cholesky(torch.linalg.inv(matrix.diagonal_scatter(diagonal)), upper=True)
    before = matrix.clone()
    factor = inverse_factor(matrix, diagonal)
    assert torch.allclose(factor, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())
    assert torch.equal(factor, factor.triu())
    assert torch.equal(matrix, before)


def test_the_factor_of_a_float32_matrix_is_as_good_as_float32_holds_it():
    matrix = positive_definite(20)
    exact = inverse_factor(matrix.float().double(), matrix.diagonal())
    single = inverse_factor(matrix.float(), matrix.diagonal())
    assert torch.equal(single, exact.float())


def test_a_matrix_that_is_not_positive_definite_has_no_factor():
    matrix = positive_definite(5).float()
    diagonal = matrix.diagonal().double()
    diagonal[2] = -1
    assert inverse_factor(matrix, diagonal) is None
    not_numbers = torch.full((2, 2), torch.nan)
    assert inverse_factor(not_numbers, not_numbers.diagonal().double()) is None
    assert inverse_factor(torch.zeros(2, 2), torch.tensor([1e-90, 1.0]).double()) is None


def test_on_the_cpu_products_stay_as_they_are():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with half_products(torch.device("cpu")):
        assert torch.equal(x @ x.T, torch.nn.functional.linear(x, x))
        assert (x @ x.T).dtype == torch.float32


@pytest.mark.gpu
def test_on_the_gpu_linears_multiply_in_bfloat16_and_gram_matrices_do_not_lose_by_it():
    x = rows_of(4000, 256).cuda()
    total = torch.zeros(256, 256, device="cuda")
    with half_products(torch.device("cuda")):
        add_gram(total, x)
        assert torch.nn.functional.linear(x, x[:8]).dtype == torch.bfloat16
    exact = 2 * x.double().T @ x.double()
    assert (total.double() - exact).norm() < 2e-5 * exact.norm()
