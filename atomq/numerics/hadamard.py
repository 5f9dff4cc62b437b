"""Block-diagonal Hadamard transforms in Sylvester order, scaled by 1/sqrt(p) so that they are orthogonal.

A transform of a run of channels uses equal blocks of p channels, p being the largest power of two that
divides the run's width: one block of 128 for a full group, one of 64 for a last group of 64, seven of 16 for
a head of 112. H is symmetric and its own inverse, so the same function turns activations (rows x) and folds
into weights: ``(x H)(W H)^T = x W^T``.
"""

from __future__ import annotations

from functools import cache

import torch


def block_size(width: int) -> int:
    """Largest power of two that divides `width` (at least 1)."""
    return width & -width


@cache
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The Sylvester-Hadamard matrix [size, size] over sqrt(size); `size` is a power of two."""
    assert size & (size - 1) == 0, size
    with torch.inference_mode(False):  # it is kept, and a tensor of inference mode could not be used outside
        matrix: torch.Tensor = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        scaled: torch.Tensor = matrix / size**0.5
        return scaled.to(dtype=dtype, device=device)


def transform_blocks(x: torch.Tensor) -> torch.Tensor:
    """Transform the last axis [..., width] in blocks of `block_size(width)`. Its own inverse."""
    size = block_size(x.shape[-1])
    if size <= 1:
        return x
    # One product of all blocks: torch would make a batch of small ones of a slice that does not lie together.
    return torch.mm(x.reshape(-1, size), hadamard_matrix(size, x.dtype, x.device)).reshape(x.shape)


def transform_groups(x: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """Transform each group of the last axis [..., width] by itself, a short last group in its own blocks."""
    width = x.shape[-1]
    if group_size is None or width <= group_size:
        return transform_blocks(x)
    whole = width - width % group_size
    full = transform_blocks(x[..., :whole].reshape(*x.shape[:-1], whole // group_size, group_size)).flatten(
        -2
    )
    return full if whole == width else torch.cat((full, transform_blocks(x[..., whole:])), dim=-1)
