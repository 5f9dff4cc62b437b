"""How quantize_act is launched: every slot has its lanes, within what the kernel takes."""

from __future__ import annotations

import pytest

from atomq.errors import KernelError
from atomq.kernels.act_shape import FEW_LANES, MANY_LANES, choose_lanes, choose_shape, count_handfuls
from atomq.kernels.layout import ActivationFormat
from atomq.kernels.loader import DeviceLimits

HOPPER = DeviceLimits(132, 227 * 1024, 228 * 1024)
WIDTHS = (5, 576, 1536, 4096, 11008, 28672, 65536)


def shape_of(n_channels, n_tokens, progressive, staged_bytes, lanes, has_clusters=True):
    form = ActivationFormat(n_channels, min(128, n_channels - 1), progressive=progressive)
    options = {"staged_bytes": staged_bytes, "is_wide": False, "has_clusters": has_clusters}
    return form, choose_shape(form, n_tokens, HOPPER, lanes, **options)


@pytest.mark.parametrize("lanes", [FEW_LANES, MANY_LANES])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("staged_bytes", [0, 2])
def test_every_handful_has_a_warp(lanes, progressive, staged_bytes):
    for n_channels in WIDTHS:
        for n_tokens in (1, 8, 33, 128, 147, 1000, 10000):
            form, shape = shape_of(n_channels, n_tokens, progressive, staged_bytes, lanes)
            case = (n_channels, n_tokens, shape)
            n_handfuls = count_handfuls(form, lanes)
            assert n_handfuls * 32 >= (form.n_slots + form.n_outlier_slots) * lanes, case
            assert 1 <= shape.n_warps <= (16 if lanes == MANY_LANES else 8), case
            assert shape.n_parts <= n_handfuls or progressive, case
            if progressive:
                assert shape.n_parts in (1, 2, 4), case
            if staged_bytes or progressive:
                assert shape.n_ctas == -(-n_tokens // 8) * 8, case
            else:  # a warp makes one handful, and no part is empty
                assert (shape.n_parts - 1) * shape.n_warps < n_handfuls <= shape.n_parts * shape.n_warps, case
                assert 1 <= shape.n_ctas <= -(-n_tokens // 8) * 8, case


def test_few_tokens_have_many_lanes_and_fill_the_gpu():
    assert [choose_lanes(n, HOPPER) for n in (1, 264, 265)] == [MANY_LANES, MANY_LANES, FEW_LANES]
    _, few = shape_of(4096, 32, False, 2, MANY_LANES)
    assert (few.n_parts, few.n_warps) == (2, 8)
    _, many = shape_of(4096, 2000, False, 2, FEW_LANES)
    assert many.n_parts == 1


def test_without_clusters_a_token_with_progressive_scales_is_one_cta():
    _, shape = shape_of(11008, 1, True, 0, MANY_LANES, has_clusters=False)
    assert shape.n_parts == 1


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(KernelError, match="65536 channels take 262176 bytes of shared memory"):
        shape_of(65536, 1, False, 4, FEW_LANES)
