"""The kernels' twins in torch: the same signatures and arithmetic on any device, for CPU runs and for tests.

Operands are the fronts' business to check.
"""

from __future__ import annotations

import torch

from atomq.numerics.grid import CodeGrid


def gptq_block(
    weight_block: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    hinv_chol: torch.Tensor,
    grid: CodeGrid,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of `atomq.kernels.gptq.gptq_block`, which documents it.

    The product and the difference of an update are rounded one after the other, as in the kernel.
    """
    running = weight_block.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(
        weight_block.shape, dtype=torch.int8 if grid.signed else torch.uint8, device=running.device
    )
    quantized = torch.empty_like(running)
    errors = torch.empty_like(running)
    for j in range(running.shape[1]):
        column_codes = grid.round(running[:, j] / scales, zeros)
        column = grid.values(column_codes, zeros) * scales
        error = (running[:, j] - column) / hinv_chol[j, j]
        running[:, j + 1 :] -= error[:, None] * hinv_chol[j, j + 1 :]
        codes[:, j], quantized[:, j], errors[:, j] = column_codes, column, error
    return codes, quantized, errors
