"""The KV quantizer against a loop over heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import naive

from atomq.config import KVScheme
from atomq.numerics.kv import dequantize_heads, fake_quantize_heads, quantize_heads


def naive_head(head: np.ndarray, scheme: KVScheme, real=np.float32):
    """Codes, F16 scale and F16 minimum of one head of one token."""
    low, high = real(min(head)) * real(scheme.clip_ratio), real(max(head)) * real(scheme.clip_ratio)
    scale = real(np.float16((high - low) / real(2**scheme.n_bits - 1)))
    scale = scale if scale > 0 else real(1)
    minimum = real(np.float16(low))
    codes = [
        naive.clamp(round(float((real(value) - minimum) / scale)), 0, 2**scheme.n_bits - 1) for value in head
    ]
    return codes, scale, minimum


def make_heads(head_dim: int) -> torch.Tensor:
    """[batch 2, tokens 5, heads 3, head_dim]: offsets, a constant head, a zero head, one-signed heads."""
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 5, 3, head_dim, generator=generator)
    x = x * 10 ** torch.linspace(-4, 2, 5)[:, None, None] + torch.linspace(-3, 3, 3)[:, None]
    x[0, 1, 0] = 0.3
    x[0, 1, 1] = 0
    x[0, 2, 0] = x[0, 2, 0].abs() + 10
    x[0, 2, 1] = -x[0, 2, 1].abs() - 10
    x[0, 3] *= 1e-5
    return x


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.9])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_codes_scales_and_minima_equal_a_loop_over_heads(n_bits, clip_ratio, head_dim):
    scheme = KVScheme(n_bits=n_bits, clip_ratio=clip_ratio)
    x = make_heads(head_dim)
    quantized = quantize_heads(x, scheme)
    values = dequantize_heads(quantized, scheme)
    for index in np.ndindex(2, 5, 3):
        codes, scale, minimum = naive_head(x[index].numpy(), scheme)
        assert quantized.codes[index].tolist() == codes
        assert quantized.scales[index].item() == float(scale)
        assert quantized.minima[index].item() == float(minimum)
        expected = [float(np.float32(code) * scale + minimum) for code in codes]
        assert values[index].tolist() == expected
    assert torch.equal(fake_quantize_heads(x, scheme), values)


def test_scale_and_minimum_are_rounded_to_f16_before_codes_are_made():
    # -1.0004 is -1 in F16 and 4.5004 / 15 = 0.300027 is 0.300049: so 0.3499 lies at 4.499 and not at 4.5006.
    quantized = quantize_heads(torch.tensor([-1.0004, 3.5, 0.3499]), KVScheme(n_bits=4))
    assert quantized.minima.item() == -1
    assert quantized.scales.item() == 1229 / 4096
    assert quantized.codes.tolist() == [0, 15, 4]
    assert round((0.3499 + 1.0004) / (4.5004 / 15)) == 5


@pytest.mark.parametrize("head_dim", [16, 80])
def test_rotation_codes_the_turned_head_and_turns_back(head_dim):
    scheme = KVScheme(n_bits=4, rotation="hadamard")
    x = make_heads(head_dim).double()
    quantized = quantize_heads(x, scheme)
    values = dequantize_heads(quantized, scheme)
    for index in np.ndindex(2, 5, 3):
        turned = naive.transform_row(x[index].tolist(), None)
        codes, scale, minimum = naive_head(turned, scheme, np.float64)
        if x[index].unique().numel() > 1:  # a constant head turns into ties between rounding errors
            assert quantized.codes[index].tolist() == codes
        assert quantized.scales[index].item() == pytest.approx(float(scale), abs=1e-12)
        assert quantized.minima[index].item() == pytest.approx(float(minimum), abs=1e-12)
        back = naive.transform_row(
            [code * float(scale) + float(minimum) for code in quantized.codes[index].tolist()], None
        )
        assert np.allclose(values[index].numpy(), back, atol=1e-9)


def test_rotation_spreads_an_outlier_channel_over_its_block():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 30.0
    errors = {
        rotation: (fake_quantize_heads(x, KVScheme(n_bits=4, rotation=rotation)) - x).square().mean()
        for rotation in ("none", "hadamard")
    }
    assert errors["hadamard"] < 0.7 * errors["none"]


def test_a_constant_head_comes_back_as_its_f16_value():
    scheme = KVScheme(n_bits=4)
    x = torch.tensor([[0.3] * 8, [0.0] * 8, [-1e-9] * 8, [7e4] * 8])
    quantized = quantize_heads(x[:3], scheme)
    assert quantized.scales.tolist() == [1, 1, 1]
    assert not quantized.codes.any()
    expected = [float(np.float16(value)) for value in (0.3, 0.0, -1e-9)]
    assert fake_quantize_heads(x[:3], scheme)[:, 0].tolist() == expected
    assert torch.isfinite(fake_quantize_heads(x, scheme)).all()


def test_beyond_f16_scales_and_minima_saturate_and_stay_finite():
    quantized = quantize_heads(torch.tensor([-1e6, 1e30]), KVScheme(n_bits=4))
    assert quantized.scales.item() == 65504
    assert quantized.minima.item() == -65504
    assert torch.isfinite(quantized.codes).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_cache_is_kept(dtype):
    x = make_heads(16).to(dtype)
    scheme = KVScheme(n_bits=4)
    fake = fake_quantize_heads(x, scheme)
    assert fake.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(fake, fake_quantize_heads(x.float(), scheme).to(dtype))


def test_no_tokens_give_no_tokens():
    for rotation in ("none", "hadamard"):
        scheme = KVScheme(n_bits=4, rotation=rotation)
        assert fake_quantize_heads(torch.empty(1, 0, 2, 16), scheme).shape == (1, 0, 2, 16)
