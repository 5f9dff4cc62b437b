"""Activations: codes and scales against a loop over tokens and groups; fake values against the codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import naive

from atomq.config import ActivationScheme
from atomq.numerics.activations import fake_quantize_activations, quantize_activations

SCHEMES = {
    **{f"int{n}": ActivationScheme(n_bits=n, group_size=16) for n in (2, 3, 4, 8)},
    **{f"int{n}-asym": ActivationScheme(n_bits=n, group_size=16, symmetric=False) for n in (2, 3, 4, 8)},
    "clip": ActivationScheme(group_size=16, clip_ratio=0.9),
    "clip-asym": ActivationScheme(group_size=16, symmetric=False, clip_ratio=0.8),
    "per-token": ActivationScheme(n_bits=8, group_size=None),
    "per-token-asym": ActivationScheme(group_size=None, symmetric=False, clip_ratio=0.95),
    "fp4-bnb": ActivationScheme(group_size=16, number_format="fp4-bnb", clip_ratio=0.9),
    "fp4-e2m1": ActivationScheme(group_size=7, number_format="fp4-e2m1"),
    "progressive": ActivationScheme(group_size=16, scale_mode="progressive", clip_ratio=0.9),
    "progressive-int2": ActivationScheme(n_bits=2, group_size=5, scale_mode="progressive"),
    "wide-group": ActivationScheme(group_size=512),
    "half-span": ActivationScheme(group_size=16, scale_span="half"),
    "half-span-int8": ActivationScheme(n_bits=8, group_size=None, scale_span="half", clip_ratio=0.95),
    "half-span-progressive": ActivationScheme(group_size=16, scale_mode="progressive", scale_span="half"),
}
N_OUTLIERS = 8
WIDTH = 64  # 56 normal channels: groups of 16, 16, 16 and 8


def make_inputs(n_tokens: int = 23) -> torch.Tensor:
    """Tokens of very different sizes, channels with offsets, a zero token and zero groups."""
    generator = torch.Generator().manual_seed(n_tokens)
    x = torch.randn(n_tokens, WIDTH, generator=generator)
    x = x * 10 ** torch.linspace(-3, 3, n_tokens)[:, None] * torch.linspace(0.1, 3, WIDTH)
    if n_tokens > 8:
        x[1] = 0
        x[2, :16] = 0
        x[3, 48:] = 0
        x[4] = x[4].abs() + 1  # one-signed: asymmetric ranges still begin at zero
        x[5] = -x[5].abs()
        x[6, 17] = 500.0
        x[7, :-N_OUTLIERS] = 1e-41  # no scale that float32 holds as a normal number
    return x


def naive_outliers(row: torch.Tensor, precision: str) -> list[float]:
    if precision == "int8":
        codes, scale = naive.encode_int8(row.numpy(), stored=False)
        return [float(np.float32(code) * scale) for code in codes]
    if precision == "fp16":
        return [naive.encode_f16(value) for value in row.tolist()]
    return [naive.encode_float8(value, precision) for value in row.tolist()]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_scales_and_zeros_equal_a_loop_over_float32(scheme):
    x = make_inputs()
    quantized = quantize_activations(x, scheme, N_OUTLIERS, "int8")
    for token, row in enumerate(x[:, :-N_OUTLIERS].numpy()):
        codes, scales, zeros = naive.quantize_token(row, scheme)
        assert quantized.codes[token].tolist() == codes
        assert quantized.scales[token].tolist() == [float(scale) for scale in scales]
        assert (quantized.zeros is None) == (zeros is None) == scheme.symmetric
        if zeros is not None:
            assert quantized.zeros[token].tolist() == zeros


@pytest.mark.parametrize("precision", ["int8", "fp16", "e5m2", "e4m3"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_fake_quantized_inputs_are_exactly_the_codes_times_their_scales(scheme, precision):
    x = make_inputs()
    fake = fake_quantize_activations(x, scheme, N_OUTLIERS, precision)
    assert fake.dtype == torch.float32
    for token, row in enumerate(x):
        codes, scales, zeros = naive.quantize_token(row[:-N_OUTLIERS].numpy(), scheme)
        expected = []
        for index, (a, b) in enumerate(naive.bounds(len(codes), scheme.group_size)):
            zero = 0 if zeros is None else zeros[index]
            expected += [
                float(np.float32(naive.value_of(code, scheme, zero)) * scales[index]) for code in codes[a:b]
            ]
        assert fake[token].tolist() == expected + naive_outliers(row[-N_OUTLIERS:], precision)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_float64_inputs_are_quantized_in_float64(scheme):
    x = make_inputs().double()
    quantized = quantize_activations(x, scheme, 0, "int8")
    assert quantized.outliers is None
    assert quantized.scales.dtype == torch.float64
    for token, row in enumerate(x.numpy()):
        codes, scales, _ = naive.quantize_token(row, scheme, np.float64)
        assert quantized.codes[token].tolist() == codes
        assert quantized.scales[token].tolist() == [float(scale) for scale in scales]


def test_progressive_scales_are_a_base_times_1_to_16_and_codes_fit_int8():
    scheme = SCHEMES["progressive"]
    x = make_inputs()
    quantized = quantize_activations(x, scheme, 0, "int8")
    for token in range(len(x)):
        if not x[token].any():
            continue
        scales = quantized.scales[token].numpy()
        base = scales.max() / np.float32(16)
        factors = np.round(scales / base)
        assert (scales == base * factors).all()
        assert factors.min() >= 1
        assert factors.max() == 16
        operand = quantized.codes[token].numpy() * np.repeat(factors, 16)[: x.shape[1]]
        assert operand.min() >= -128
        assert operand.max() <= 127


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_zero_groups_have_scale_one_and_give_zeros(scheme):
    fake = fake_quantize_activations(torch.zeros(2, WIDTH), scheme, N_OUTLIERS, "int8")
    quantized = quantize_activations(torch.zeros(2, WIDTH), scheme, N_OUTLIERS, "int8")
    assert not fake.any()
    assert not quantized.codes.any()
    assert quantized.outliers.scales.eq(1).all()
    assert quantized.scales.eq(1).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_token_alone_is_coded_like_a_token_among_others(scheme):
    x = make_inputs()
    everyone = fake_quantize_activations(x, scheme, N_OUTLIERS, "int8")
    for token in (0, 6):
        assert torch.equal(
            fake_quantize_activations(x[token : token + 1], scheme, N_OUTLIERS, "int8")[0], everyone[token]
        )
        assert torch.equal(fake_quantize_activations(x[token], scheme, N_OUTLIERS, "int8"), everyone[token])
    assert torch.equal(
        fake_quantize_activations(x[:20].view(4, 5, WIDTH), scheme, N_OUTLIERS, "int8"),
        everyone[:20].view(4, 5, WIDTH),
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_tokens_give_no_tokens(scheme):
    empty = torch.empty(0, WIDTH)
    assert fake_quantize_activations(empty, scheme, N_OUTLIERS, "int8").shape == (0, WIDTH)
    assert quantize_activations(empty, scheme, N_OUTLIERS, "e4m3").codes.shape == (0, WIDTH - N_OUTLIERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_quantized_in_float32_and_left_alone(dtype):
    x = make_inputs()[8:15].to(dtype)
    before = x.clone()
    scheme = SCHEMES["clip"]
    fake = fake_quantize_activations(x, scheme, N_OUTLIERS, "int8")
    assert torch.equal(fake, fake_quantize_activations(x.float(), scheme, N_OUTLIERS, "int8"))
    assert torch.equal(x, before)


def test_an_outlier_channel_does_not_coarsen_the_others():
    x = make_inputs()[9:12].clone()
    with_outlier = x.clone()
    with_outlier[:, -1] = 1e4
    for scheme in (SCHEMES["int4"], SCHEMES["per-token"]):
        normal = fake_quantize_activations(x, scheme, N_OUTLIERS, "int8")[:, :-N_OUTLIERS]
        again = fake_quantize_activations(with_outlier, scheme, N_OUTLIERS, "int8")[:, :-N_OUTLIERS]
        assert torch.equal(normal, again)
