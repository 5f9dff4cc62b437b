"""Folding an order of channels into the weights around an activation (Atom section 4.1).

If x' = x[perm], then W' = W[:, perm] reads x' and gives what W gives on x; and a linear whose outputs are to
come out in the order perm has its rows, bias included, permuted by it.
"""

from __future__ import annotations

import torch


def reorder_inputs(weight: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Weight [N, K] with its input channels in the order `perm` [K]."""
    return weight.index_select(1, perm.to(weight.device))


def reorder_outputs(
    weight: torch.Tensor, bias: torch.Tensor | None, perm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [N, K] and bias [N] with their output channels in the order `perm`.

    A fused linear stacks several outputs as wide as `perm`, such as gate and up: each takes the order.
    """
    perm = perm.to(weight.device)
    starts = torch.arange(0, weight.shape[0], len(perm), device=perm.device)
    perm = (starts.unsqueeze(1) + perm).flatten()  # (N,)
    return weight.index_select(0, perm), None if bias is None else bias.index_select(0, perm)
