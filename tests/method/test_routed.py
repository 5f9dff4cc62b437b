"""The Hessian of inputs whose number is known only at the end."""

from __future__ import annotations

import pytest
import torch

from atomq.method.hessian import HessianAccumulator
from atomq.method.routed import RoutedHessian

CPU = torch.device("cpu")


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


def routed(parts: list[torch.Tensor]) -> HessianAccumulator:
    hessian = RoutedHessian(6, CPU)
    for part in parts:
        hessian.add(part)
    found = hessian.result()
    found.finish()
    return found


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4, 1, 9), (30,), (3, 3, 3)])
def test_with_as_many_rows_as_channels_it_is_the_plain_hessian(sizes):
    parts = batches(*sizes)
    x = torch.cat(parts).double()
    found = routed(parts)
    assert torch.allclose(found.hessian.double(), 2 * x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    assert found.n_tokens == sum(sizes)
    assert found.held_out is None


def test_of_fewer_rows_the_last_quarter_is_held_out():
    parts = batches(2, 3)
    x = torch.cat(parts).double()
    found = routed(parts)
    assert torch.allclose(found.fit.double(), 2 / 5 * x[:4].T @ x[:4], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.held_out.double(), 2 / 5 * x[4:].T @ x[4:], rtol=1e-5, atol=1e-6)
    assert found.n_tokens == 5


def test_without_any_row_it_is_zero():
    found = routed([])
    assert found.n_tokens == 0
    assert not found.hessian.any()
