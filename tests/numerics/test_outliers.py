"""Outliers in all four precisions, against loops over every value that the precision has."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numerics import naive

from atomq.numerics.outliers import OUTLIER_DTYPES, encode_outliers

LIMITS = {"fp16": 65504.0, "e5m2": 57344.0, "e4m3": 448.0}


def values_around(precision: str) -> list[float]:
    """Normal, subnormal, huge values, and every tie between neighbours of the precision."""
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(400, generator=generator) * 10).tolist()
    values += (torch.randn(200, generator=generator) * 2.0**-9).tolist()
    values += [0.0, 1e6, -1e6, LIMITS[precision], -LIMITS[precision], 3e38]
    if precision != "fp16":
        finite = sorted(
            {abs(v) for v in (naive.float8_value(b, precision) for b in range(256)) if np.isfinite(v)}
        )
        values += [(low + high) / 2 for low, high in itertools.pairwise(finite)]
        values += [-value for value in finite]
    else:
        values += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, 65519.0, 65520.0]
    return [float(np.float32(value)) for value in values]


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("stored", [True, False])
def test_casts_round_half_to_even_and_saturate(precision, stored):
    values = values_around(precision)
    encoded = encode_outliers(torch.tensor([values]), precision, stored=stored)
    assert encoded.scales is None
    assert encoded.values.dtype == OUTLIER_DTYPES[precision]
    expected = [
        naive.encode_f16(v) if precision == "fp16" else naive.encode_float8(v, precision) for v in values
    ]
    assert encoded.decode(torch.float32)[0].tolist() == expected
    assert encoded.decode(torch.float32).abs().max() == LIMITS[precision]


@pytest.mark.parametrize("precision", ["e5m2", "e4m3"])
def test_every_byte_means_what_the_format_says(precision):
    stored = torch.arange(256, dtype=torch.uint8).view(OUTLIER_DTYPES[precision]).float()
    expected = torch.tensor([naive.float8_value(byte, precision) for byte in range(256)])
    assert torch.equal(stored.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("stored", [True, False])
def test_int8_has_one_unclipped_scale_per_row(stored):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 8, generator=generator) * 10 ** torch.linspace(-6, 6, 40)[:, None]
    x[5] = 0
    x[6, 3] = -x[6].abs().max() * 4  # the largest magnitude is negative: -127, not -128
    encoded = encode_outliers(x, "int8", stored=stored)
    assert encoded.values.dtype == torch.int8
    for row in range(len(x)):
        codes, scale = naive.encode_int8(x[row].numpy(), stored)
        assert encoded.values[row].tolist() == codes
        assert encoded.scales[row].item() == float(scale)
    assert encoded.values[6, 3] == -127
    assert encoded.scales[5] == 1
    assert not encoded.values[5].any()
    decoded = encoded.decode(torch.float32)
    assert torch.equal(decoded, encoded.values.float() * encoded.scales[:, None])
    assert ((decoded - x).abs().amax(1) <= 0.51 * encoded.scales).all()


def test_int8_ties_go_to_the_even_code():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert encode_outliers(x, "int8", stored=True).values.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("precision", OUTLIER_DTYPES)
def test_no_rows_give_no_rows(precision):
    encoded = encode_outliers(torch.empty(0, 3), precision, stored=False)
    assert encoded.decode(torch.float32).shape == (0, 3)
