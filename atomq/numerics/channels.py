"""Statistics of the input channels of one linear group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atomq.config import Metric


@dataclass(frozen=True)
class ChannelStatistics:
    """Scores of channels, float32 [K] each (Atom section 4.1).

    Attributes:
        hessian: mean over tokens of 2 x^2, the diagonal of GPTQ's Hessian.
        abs_mean: largest over windows of the mean over tokens of |x|.
    """

    hessian: torch.Tensor
    abs_mean: torch.Tensor

    def score(self, metric: Metric) -> torch.Tensor:
        return self.hessian if metric == "hessian" else self.abs_mean
