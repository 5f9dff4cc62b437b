"""Whether numbers are numbers."""

from __future__ import annotations

import torch


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value of `values`, of any shape and floating-point dtype, is NaN or infinite.

    By the least and the largest one, which NaN passes through: no mask is made, and a CPU takes a tenth of
    the time.
    """
    if not values.numel():
        return True
    wide = values.float() if values.itemsize == 1 else values  # FP8 cannot be compared
    return bool(torch.stack(wide.aminmax()).isfinite().all())
