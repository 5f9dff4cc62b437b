"""Channel statistics of the float model's activations, and the order of channels made from them.

Atom section 4.1: channels are sorted by a score, so the outliers come last and the groups before them hold
channels of like magnitude. Only the diagonal of the Hessian is ever formed.
"""

from __future__ import annotations

import torch

from atomq import distributed
from atomq.numerics.channels import ChannelStatistics


class StatisticsAccumulator:
    """Adds up `ChannelStatistics` over windows, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum_squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._abs_mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._n_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in activations [n_windows, seq_len, K], or [n_tokens, K], which all count as one window."""
        x = x.float()
        if x.dim() == 2:
            self._sum_squares += x.square().sum(0, dtype=torch.float64)
            self._abs_sum += x.abs().sum(0, dtype=torch.float64)
            self._n_tokens += x.shape[0]
            return
        self._sum_squares += x.square().sum((0, 1), dtype=torch.float64)
        largest = x.abs().mean(1, dtype=torch.float64).amax(0)
        self._abs_mean = torch.maximum(self._abs_mean, largest)
        self._n_tokens += x.shape[0] * x.shape[1]

    def result(self) -> ChannelStatistics:
        """Over all processes."""
        distributed.add_up(self._sum_squares, self._abs_sum)
        distributed.take_largest(self._abs_mean)
        n_tokens = max(distributed.total(self._n_tokens), 1)
        hessian = 2 * self._sum_squares / n_tokens
        abs_mean = torch.maximum(self._abs_mean, self._abs_sum / n_tokens)
        return ChannelStatistics(hessian.float().cpu(), abs_mean.float().cpu())


def channel_order(score: torch.Tensor) -> torch.Tensor:
    """The permutation [K] (new position -> old channel) that sorts channels by ascending score.

    Equal scores keep their order, so that equal statistics give equal permutations everywhere.
    """
    return torch.argsort(score, stable=True).to(torch.int32)
