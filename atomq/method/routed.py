"""The Hessian of an expert's inputs, whose number is not known before the last one has come."""

from __future__ import annotations

import torch

from atomq import distributed
from atomq.method.hessian import HessianAccumulator


class RoutedHessian:
    """Keeps input rows until there are as many as channels, and adds up their Hessian [K, K] from then on.

    So tokens are held out only of experts that saw few (`method.solve`), in the memory of one Hessian.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width, self._device = width, device
        self._rows: list[torch.Tensor] = []
        self._n_rows = 0
        self._hessian: HessianAccumulator | None = None

    def add(self, x: torch.Tensor) -> None:
        """Take in quantized inputs [n_tokens, K]."""
        if self._hessian is not None:
            self._hessian.add(x)
            return
        self._rows.append(x)
        self._n_rows += x.shape[0]
        if self._n_rows >= self._width:
            self._hessian = self._added_up(holdout=False)

    def result(self) -> HessianAccumulator:
        """The Hessian of this process's rows; the last quarter is held out if all processes together have
        fewer rows than channels.
        """
        n_rows = distributed.total(self._n_rows)
        if self._hessian is None:
            self._hessian = self._added_up(holdout=n_rows < self._width)
        return self._hessian

    def _added_up(self, *, holdout: bool) -> HessianAccumulator:
        hessian = HessianAccumulator(self._width, self._device, holdout=holdout)
        if self._rows:
            hessian.add(torch.cat(self._rows))
        self._rows = []
        return hessian
