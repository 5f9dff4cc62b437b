"""Channel statistics against a loop over windows and tokens, and the order made from them."""

from __future__ import annotations

import pytest
import torch

from atomq.method.statistics import StatisticsAccumulator, channel_order
from atomq.numerics.channels import ChannelStatistics

CPU = torch.device("cpu")


def make_windows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, 4, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0])


def collect(batches) -> ChannelStatistics:
    accumulator = StatisticsAccumulator(4, CPU)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result()


def test_statistics_equal_a_loop_over_windows_and_tokens():
    windows = make_windows()
    found = collect([windows])
    for channel in range(4):
        squares, means = 0.0, []
        for window in windows[:, :, channel].double().tolist():
            squares += sum(value**2 for value in window)
            means.append(sum(abs(value) for value in window) / len(window))
        assert found.hessian[channel].item() == pytest.approx(2 * squares / 35, rel=1e-6)
        assert found.abs_mean[channel].item() == pytest.approx(max(means), rel=1e-6)
    assert found.hessian.dtype == found.abs_mean.dtype == torch.float32


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_batches_do_not_change_the_statistics(sizes):
    whole, parts = collect([make_windows()]), collect(make_windows().split(sizes))
    assert torch.allclose(whole.hessian, parts.hessian, rtol=1e-6)
    assert torch.allclose(whole.abs_mean, parts.abs_mean, rtol=1e-6)


def test_the_metric_chooses_the_score():
    found = collect([make_windows()])
    assert found.score("hessian") is found.hessian
    assert found.score("abs_mean") is found.abs_mean


def test_nothing_seen_gives_zeros():
    found = collect([])
    assert not found.hessian.any()
    assert not found.abs_mean.any()


def test_channels_are_ordered_by_ascending_score_and_ties_keep_their_place():
    score = torch.tensor([2.0, 0.0, 5.0, 0.0, 2.0, 0.0, 5.0])
    order = channel_order(score)
    assert order.dtype == torch.int32
    assert order.tolist() == [1, 3, 5, 0, 4, 2, 6]
    assert channel_order(torch.zeros(2000)).tolist() == list(range(2000))
