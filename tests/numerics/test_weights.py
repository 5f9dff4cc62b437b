"""Weights: ranges and scales of row groups, bases, and the values that codes stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import naive

from atomq.config import WeightScheme
from atomq.numerics.outliers import encode_outliers
from atomq.numerics.weights import (
    CLIP_LOWEST,
    CLIP_STEPS,
    QuantizedWeight,
    find_base_scales,
    find_group_scales,
    row_ranges,
    search_group_scales,
    spread_rows,
    weight_grid,
)

SCHEMES = {
    **{f"int{n}": WeightScheme(n_bits=n, group_size=16) for n in (2, 3, 4, 8)},
    "asym": WeightScheme(group_size=16, symmetric=False),
    "asym-pairs": WeightScheme(group_size=16, symmetric=False, channel_group=2),
    "pairs": WeightScheme(group_size=16, channel_group=2),
    "triples-per-row": WeightScheme(group_size=None, channel_group=3),
    "fp4-bnb": WeightScheme(group_size=16, number_format="fp4-bnb"),
    "fp4-e2m1-pairs": WeightScheme(group_size=5, number_format="fp4-e2m1", channel_group=2),
    "exponential": WeightScheme(group_size=16, number_format="exponential"),
    "progressive": WeightScheme(group_size=16, scale_mode="progressive"),
}
N_ROWS, N_NORMAL, N_OUTLIERS = 7, 24, 3


def make_weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(N_ROWS, N_NORMAL, generator=generator) * torch.linspace(1, 0.01, N_ROWS)[:, None]
    weight[2, :16] = 0
    weight[3] = 0
    weight[4] = weight[4].abs()
    return weight


@pytest.mark.parametrize("channel_group", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_row_ranges_equal_a_loop_also_where_the_last_group_of_rows_is_short(channel_group, n_rows):
    columns = make_weight()[:n_rows]
    low, high = row_ranges(columns, channel_group)
    starts = range(0, n_rows, channel_group)
    assert low.tolist() == [columns[i : i + channel_group].min().item() for i in starts]
    assert high.tolist() == [columns[i : i + channel_group].max().item() for i in starts]
    spread = spread_rows(low, n_rows, channel_group)
    assert spread.tolist() == [low[row // channel_group].item() for row in range(n_rows)]


@pytest.mark.parametrize("span", ["half", "full"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_group_scales_equal_a_loop(scheme, span):
    weight = make_weight()
    base = find_base_scales(weight, scheme, 0.85, span)
    expected_base = None
    if scheme.scale_mode == "progressive":
        expected_base = naive.base_scales(weight.numpy(), scheme, 0.85, span, np.float32)
        assert base.tolist() == [float(value) for value in expected_base]
    else:
        assert base is None
    for columns in (weight[:, :16], weight[:, 16:]):
        found = find_group_scales(columns, scheme, 0.85, span, base)
        scales, zeros, factors = naive.group_scales(
            columns.numpy(), scheme, 0.85, span, expected_base, np.float32
        )
        assert found.scales.tolist() == [float(scale) for scale in scales]
        assert (found.zeros is None) == scheme.symmetric
        if found.zeros is not None:
            assert found.zeros.tolist() == zeros
        assert (found.factors is None) == (expected_base is None)
        if found.factors is not None:
            assert found.factors.tolist() == factors


def test_zero_points_are_made_from_the_scales_as_they_are_stored():
    """The rounding of a scale to F16 moves about one zero point of eight bits in ten."""
    scheme = WeightScheme(8, symmetric=False, group_size=16)
    columns = torch.randn(300, 16, generator=torch.Generator().manual_seed(6))
    found = find_group_scales(columns, scheme, 1.0, "full")
    _, zeros, _ = naive.group_scales(columns.numpy(), scheme, 1.0, "full", real=np.float32)
    assert found.zeros.tolist() == zeros
    low, high = columns.aminmax(dim=1)
    assert (found.zeros != (-low / ((high - low) / 255)).round()).sum() > 5


@pytest.mark.parametrize("precision", ["int8", "fp16", "e5m2", "e4m3"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dequantized_weights_are_codes_times_their_scales(scheme, precision):
    grid = weight_grid(scheme)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (N_ROWS, N_NORMAL), generator=generator).to(torch.int16)
    bounds = naive.bounds(N_NORMAL, scheme.group_size)
    rows = -(-N_ROWS // scheme.channel_group)
    scales = torch.rand(rows, len(bounds), generator=generator)
    zeros = None if scheme.symmetric else torch.randint(0, 16, (rows, len(bounds)), generator=generator)
    outliers = encode_outliers(torch.randn(N_ROWS, N_OUTLIERS, generator=generator), precision, stored=True)
    weight = QuantizedWeight(codes, scales, zeros, outliers)
    dense = weight.dequantize(scheme, torch.float32)
    assert dense.shape == (N_ROWS, N_NORMAL + N_OUTLIERS)
    for row in range(N_ROWS):
        group_row = row // scheme.channel_group
        for index, (a, b) in enumerate(bounds):
            zero = 0 if zeros is None else int(zeros[group_row, index])
            expected = [
                float(np.float32(naive.value_of(code, scheme, zero)) * scales[group_row, index].numpy())
                for code in codes[row, a:b].tolist()
            ]
            assert dense[row, a:b].tolist() == expected
    assert torch.equal(dense[:, N_NORMAL:], outliers.decode(torch.float32))


def test_a_weight_of_outliers_alone_is_its_outliers():
    outliers = encode_outliers(torch.randn(4, 3), "int8", stored=True)
    weight = QuantizedWeight(torch.empty(4, 0, dtype=torch.int16), torch.empty(4, 0), None, outliers)
    for group_size in (16, None):
        dense = weight.dequantize(WeightScheme(group_size=group_size), torch.float32)
        assert torch.equal(dense, outliers.decode(torch.float32))


def test_no_base_without_normal_channels():
    assert find_base_scales(torch.empty(4, 0), SCHEMES["progressive"], 1.0, "full") is None


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_clip_search_equals_a_loop_over_ratios(scheme):
    weight = make_weight().double()
    cost = torch.linspace(0.1, 3, 16, dtype=torch.float64).flip(0)
    base = find_base_scales(weight, scheme, 1.0, "full")
    expected_base = None if base is None else naive.base_scales(weight.numpy(), scheme, 1.0, "full")
    columns = weight[:, :16].numpy()
    found = search_group_scales(weight[:, :16], cost, scheme, 1.0, "full", base)
    for index, start in enumerate(range(0, N_ROWS, scheme.channel_group)):
        rows = columns[start : start + scheme.channel_group]
        own_base = None if expected_base is None else expected_base[start : start + scheme.channel_group]
        best = (float("inf"), 0.0)
        for step in range(CLIP_STEPS):
            ratio = 1.0 - (1 - CLIP_LOWEST) * step / (CLIP_STEPS - 1)
            scales, zeros, _ = naive.group_scales(rows, scheme, ratio, "full", own_base)
            zero = zeros[0] if zeros else 0
            total = 0.0
            for row in rows:
                for column, value in enumerate(row):
                    code = naive.code_of(value / scales[0], scheme, zero)
                    total += (
                        float(cost[column]) * (value - naive.value_of(code, scheme, zero) * scales[0]) ** 2
                    )
            if total < best[0] * (1 - 1e-12):
                best = (total, float(scales[0]))
        assert float(found.scales[index]) == best[1], (index, best)


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_of_a_weight_are_what_its_rows_are_worth(name):
    scheme = SCHEMES[name]
    weight, (n_first, n_last) = make_weight(), (6, N_ROWS - 6)
    base = find_base_scales(weight, scheme, 1.0, "full")
    groups = [find_group_scales(weight[:, s : s + 16], scheme, 1.0, "full", base) for s in (0, 16)]
    if scheme.group_size != 16:
        groups = [find_group_scales(weight, scheme, 1.0, "full", base)] * (
            1 if scheme.group_size is None else -(-N_NORMAL // scheme.group_size)
        )

    def stacked(parts):
        return None if parts[0] is None else torch.stack(parts, dim=1)

    whole = QuantizedWeight(
        torch.arange(N_ROWS * N_NORMAL, dtype=torch.int16).reshape(N_ROWS, N_NORMAL) % 4,
        stacked([g.scales for g in groups]),
        stacked([g.zeros for g in groups]),
        encode_outliers(torch.randn(N_ROWS, N_OUTLIERS), "int8", stored=True),
        base,
        stacked([g.factors for g in groups]),
    )
    values = whole.dequantize(scheme, torch.float32)
    parts = [part.dequantize(scheme, torch.float32) for part in whole.split([n_first, n_last], scheme)]
    assert torch.equal(torch.cat(parts), values)
