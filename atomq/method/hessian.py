"""The GPTQ Hessian of a linear group: H = 2/n sum x x^T over the quantized inputs x (GPTQ, arXiv 2210.17323,
eq. 2), and the asymmetric target.

With x~ the float model's input of the same token, a linear is to give W x~ and not W x. The weight that comes
nearest is W + W D H^-1 with D = 2/n sum (x~ - x) x^T (GPTAQ, arXiv 2504.02692). What a linear corrects for
others it fits to the calibration text, so the H of that correction is damped far more than GPTQ's, and a
share of it may do better than all.
"""

from __future__ import annotations

import torch

from atomq import distributed
from atomq.numerics.products import add_cross_gram, add_gram


class HessianAccumulator:
    """Adds up the Hessian [K, K] of one linear group in float32; after `finish` it is the mean that H is.

    With `holdout` a quarter of the tokens of every call goes to a second Hessian that no code is fitted to;
    it judges between candidates when there are fewer tokens than channels (`method.solve`).
    """

    def __init__(self, width: int, device: torch.device, *, holdout: bool, asymmetric: bool = False) -> None:
        self._fit = torch.zeros(width, width, device=device)
        self._shift = torch.zeros(width, width, device=device) if asymmetric else None
        self._held_out = torch.zeros(width, width, device=device) if holdout else None
        self.n_tokens = 0

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None = None) -> None:
        """Take in quantized inputs [..., K] and, for the asymmetric target, the float model's."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if self._shift is not None:
            assert x_float is not None
            add_cross_gram(self._shift, x_float.reshape(rows.shape).float() - rows, rows)
        self.n_tokens += rows.shape[0]
        if self._held_out is not None:
            n_fit = rows.shape[0] - rows.shape[0] // 4
            add_gram(self._held_out, rows[n_fit:])
            rows = rows[:n_fit]
        add_gram(self._fit, rows)

    @torch.inference_mode()  # the sums of an expert are begun within a pass
    def finish(self) -> None:
        """Take in what the other processes have added, and divide by the number of tokens."""
        self.n_tokens = distributed.total(self.n_tokens)
        for total in (self._fit, self._shift, self._held_out):
            if total is not None:
                distributed.add_up(total)
                total.div_(max(self.n_tokens, 1))

    @property
    def hessian(self) -> torch.Tensor:
        """H over all tokens; not to be changed."""
        return self._fit if self._held_out is None else self._fit + self._held_out

    @property
    def shift(self) -> torch.Tensor | None:
        """D [K, K] over all tokens, or None if no float inputs were given; not to be changed."""
        return self._shift

    @property
    def fit(self) -> torch.Tensor:
        """The part of H of the tokens that candidates are fitted to."""
        return self._fit

    @property
    def held_out(self) -> torch.Tensor | None:
        """The part of H of the held-out tokens, or None without holdout."""
        return self._held_out


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H D^T): squared error of the linear's outputs for a weight difference D [N, K], float64 sum."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def damp(hessian: torch.Tensor, damp_frac: float) -> torch.Tensor:
    """`hessian` [K, K] plus `damp_frac` of its mean diagonal; channels that were never active count as 1."""
    diagonal = hessian.diagonal()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    return hessian.diagonal_scatter(diagonal + damp_frac * diagonal.mean())


def asymmetric_target(
    weight: torch.Tensor, hessian: torch.Tensor, shift: torch.Tensor, strength: float, damp_frac: float
) -> torch.Tensor:
    """W + strength * W D (H + damping)^-1, [N, K], for D = `shift` and the damping of `damp`.

    It solves min |W x~ - V x|^2 over the calibration tokens plus damp_frac * mean(diag H) |V - W|^2: along
    directions that they seldom take, the target stays at W.
    """
    factor = torch.linalg.cholesky(damp(hessian, damp_frac))
    return weight + strength * torch.cholesky_solve((weight @ shift).T, factor).T
