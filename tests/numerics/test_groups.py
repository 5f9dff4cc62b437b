"""Groups: splitting, joining and spreading over widths that the group size does not divide."""

from __future__ import annotations

import pytest
import torch
from numerics import naive

from atomq.numerics.groups import group_bounds, join_groups, n_groups, split_groups, spread_groups

SHAPES = [(72, 16), (56, 16), (64, 16), (5, 16), (16, 16), (17, 16), (1, 16), (7, 1), (10, None), (1, None)]


@pytest.mark.parametrize(("width", "group_size"), SHAPES)
def test_bounds_cover_every_channel_once_and_only_the_last_group_is_short(width, group_size):
    bounds = group_bounds(width, group_size)
    assert bounds == naive.bounds(width, group_size)
    assert len(bounds) == n_groups(width, group_size)
    assert [channel for a, b in bounds for channel in range(a, b)] == list(range(width))
    assert {b - a for a, b in bounds[:-1]} <= {group_size}


@pytest.mark.parametrize(("width", "group_size"), SHAPES)
def test_split_holds_each_group_and_pads_only_with_zeros(width, group_size):
    x = torch.randn(3, 2, width) + 5
    grouped = split_groups(x, group_size)
    bounds = naive.bounds(width, group_size)
    assert grouped.shape[:-1] == (3, 2, len(bounds))
    for index, (a, b) in enumerate(bounds):
        assert torch.equal(grouped[..., index, : b - a], x[..., a:b])
        assert not grouped[..., index, b - a :].any()
    assert torch.equal(join_groups(grouped, width), x)


@pytest.mark.parametrize(("width", "group_size"), SHAPES)
def test_spread_gives_every_channel_the_value_of_its_group(width, group_size):
    bounds = naive.bounds(width, group_size)
    per_group = torch.randn(2, len(bounds))
    expected = torch.empty(2, width)
    for index, (a, b) in enumerate(bounds):
        expected[:, a:b] = per_group[:, index : index + 1]
    assert torch.equal(spread_groups(per_group, width, group_size), expected)


def test_no_channels_make_no_groups():
    assert n_groups(0, 16) == n_groups(0, None) == 0
    assert group_bounds(0, 16) == group_bounds(0, None) == []
    assert split_groups(torch.empty(4, 0), 16).shape[1] == 0
    assert join_groups(split_groups(torch.empty(4, 0), 16), 0).shape == (4, 0)


def test_no_rows_keep_their_shape():
    grouped = split_groups(torch.empty(0, 72), 16)
    assert grouped.shape == (0, 5, 16)
    assert join_groups(grouped, 72).shape == (0, 72)
