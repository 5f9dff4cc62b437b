"""Groups of channels: consecutive runs of `group_size` channels, the last of which may be short.

Groups are never padded on disk. In memory a ragged width is padded with zeros for the time of a reduction,
which changes no maximum of absolute values and no range that includes zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def n_groups(width: int, group_size: int | None) -> int:
    """Number of groups that `width` channels fill; None means one group for all of them."""
    if width == 0:
        return 0
    return 1 if group_size is None else -(-width // group_size)


def group_bounds(width: int, group_size: int | None) -> list[tuple[int, int]]:
    """First and last-plus-one channel of each group."""
    step = group_size or max(width, 1)
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def split_groups(x: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """View [..., width] as [..., n_groups, group_size]; a short last group is padded with zeros (a copy)."""
    width = x.shape[-1]
    size = min(group_size or width, width) or 1
    padding = -width % size
    if padding:
        x = F.pad(x, (0, padding))
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def join_groups(grouped: torch.Tensor, width: int) -> torch.Tensor:
    """Undo `split_groups`: [..., n_groups, group_size] back to [..., width], the padding dropped."""
    return grouped.flatten(-2)[..., :width]


def spread_groups(per_group: torch.Tensor, width: int, group_size: int | None) -> torch.Tensor:
    """Repeat one value per group for each of its channels: [..., n_groups] to [..., width]."""
    if group_size is None:
        return per_group.expand(*per_group.shape[:-1], width)
    return per_group.repeat_interleave(group_size, dim=-1)[..., :width]
