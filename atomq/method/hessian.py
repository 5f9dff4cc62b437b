"""The GPTQ Hessian of a linear group: H = 2/n sum x x^T over the quantized inputs (GPTQ, arXiv 2210.17323,
eq. 2).
"""

from __future__ import annotations

import torch

from atomq import distributed
from atomq.numerics.products import add_gram


class HessianAccumulator:
    """Adds up the Hessian [K, K] of one linear group in float32.

    With `holdout` a quarter of the tokens of every call goes to a second Hessian that no code is fitted to;
    it judges between candidates when there are fewer tokens than channels (`method.solve`).
    """

    def __init__(self, width: int, device: torch.device, *, holdout: bool) -> None:
        self._fit = torch.zeros(width, width, device=device)
        self._held_out = torch.zeros(width, width, device=device) if holdout else None
        self.n_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in quantized inputs [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.n_tokens += rows.shape[0]
        if self._held_out is not None:
            n_fit = rows.shape[0] - rows.shape[0] // 4
            add_gram(self._held_out, rows[n_fit:])
            rows = rows[:n_fit]
        add_gram(self._fit, rows)

    def add_up_processes(self) -> None:
        """Take in what the other processes have added."""
        distributed.add_up(*(value for value in vars(self).values() if isinstance(value, torch.Tensor)))
        self.n_tokens = distributed.total(self.n_tokens)

    @property
    def hessian(self) -> torch.Tensor:
        """Over all tokens, divided by their number."""
        total = self._fit if self._held_out is None else self._fit + self._held_out
        return total / max(self.n_tokens, 1)

    @property
    def fit(self) -> torch.Tensor:
        """Over the tokens that candidates are fitted to (unnormalized)."""
        return self._fit

    @property
    def held_out(self) -> torch.Tensor | None:
        """Over the held-out tokens (unnormalized), or None without holdout."""
        return self._held_out


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H D^T): squared error of the linear's outputs for a weight difference D [N, K], float64 sum."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))
