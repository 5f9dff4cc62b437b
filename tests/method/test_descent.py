"""Coordinate descent against a loop over single codes in float64 that shares no code with it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from method.test_gptq import CASES
from numerics import naive

from atomq.config import SolverConfig
from atomq.method.descent import descend
from atomq.method.gptq import factorize_hessian, gptq_quantize
from atomq.method.hessian import damp, output_error

N_ROWS = 7
SOLVER = SolverConfig()


def problem(width: int, seed: int = 0):
    """A target [N, K], its damped Hessian in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(3 * width, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width))
    x *= torch.linspace(0.3, 3, width, dtype=torch.float64)
    weight = torch.randn(N_ROWS, width, generator=generator, dtype=torch.float64)
    return weight, damp(2 / len(x) * x.T @ x, 0.01)


def start_of(weight, hessian, scheme):
    factor = factorize_hessian(hessian, 1e-6)
    return gptq_quantize(weight, factor, scheme, SOLVER)


def values_of(quantized, scheme):
    return quantized.dequantize(scheme.weights, torch.float64).numpy()


def slow_sweep(target, hessian, start, scheme):
    """One sweep, code by code: the residual is made anew from all values before every step."""
    T, H = target.numpy(), hessian.numpy()
    V = values_of(start, scheme).copy()
    weights, cg = scheme.weights, scheme.weights.channel_group
    codes = start.codes.numpy().astype(int).copy()
    scales = start.scales.numpy().copy()
    zeros = None if start.zeros is None else start.zeros.numpy()
    n_rows, n_normal = codes.shape
    symmetric = weights.symmetric
    low = -(2 ** (weights.n_bits - 1)) if symmetric else 0
    high = low + 2**weights.n_bits - 1
    book = naive.CODEBOOKS.get(weights.number_format)
    for g, (first, last) in enumerate(naive.bounds(n_normal, weights.group_size)):
        for c in range(scales.shape[0]):
            rows = range(c * cg, min((c + 1) * cg, n_rows))
            slope = curvature = 0.0
            for r in rows:
                q = V[r, first:last] / scales[c, g]
                slope += q @ ((T[r] - V[r]) @ H[:, first:last])
                curvature += q @ H[first:last, first:last] @ q
            best = scales[c, g] + slope / curvature if curvature > 0 else scales[c, g]
            if weights.scale_mode == "progressive":
                factor = min(max(round(best / float(start.base[c])), 1), 16)
                new = float(start.base[c]) * factor
            else:
                new = float(np.float16(best)) if abs(best) >= 2**-14 else best
            if curvature > 0 and new > 0 and abs(new - best) < abs(scales[c, g] - best):
                for r in rows:
                    V[r, first:last] *= new / scales[c, g]
                scales[c, g] = new
        for j in range(first, last):
            for r in range(n_rows):
                scale = scales[r // cg, g]
                wish = (V[r, j] + (T[r] - V[r]) @ H[:, j] / H[j, j]) / scale
                if book is not None:
                    code = naive.nearest_code(wish, weights.number_format)
                    V[r, j] = book[code] * scale
                else:
                    zero = 0 if zeros is None else zeros[r // cg, g]
                    code = int(naive.clamp(np.rint(wish) + zero, low, high))
                    V[r, j] = (code - zero) * scale
                codes[r, j] = code
    if start.outliers is not None and start.outliers.scales is not None:
        for j in range(n_normal, V.shape[1]):
            for r in range(n_rows):
                scale = float(start.outliers.scales[r])
                wish = (V[r, j] + (T[r] - V[r]) @ H[:, j] / H[j, j]) / scale
                V[r, j] = naive.clamp(np.rint(wish), -128, 127) * scale
    return codes, scales, V


@pytest.mark.parametrize("span", [1, 40, 1024])
@pytest.mark.parametrize("case", CASES)
def test_a_sweep_is_the_slow_sweep_whatever_is_multiplied_at_once(case, span, monkeypatch):
    monkeypatch.setattr("atomq.method.descent.SPAN", span)
    scheme, width = CASES[case]
    weight, hessian = problem(width)
    start = start_of(weight, hessian, scheme)
    for sweep in range(2):
        codes, scales, values = slow_sweep(weight, hessian, start, scheme)
        start = descend(weight, hessian, start, scheme, 1)
        assert np.array_equal(start.codes.numpy(), codes), sweep
        np.testing.assert_allclose(start.scales.numpy(), scales, rtol=1e-12)
        np.testing.assert_allclose(values_of(start, scheme), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_no_sweep_raises_the_error_and_float32_does_the_same(case):
    scheme, width = CASES[case]
    weight, hessian = problem(width, seed=1)
    quantized = start_of(weight, hessian, scheme)
    single = descend(
        weight.float(), hessian.float(), start_of(weight.float(), hessian.float(), scheme), scheme, 3
    )
    errors = [output_error(weight - torch.from_numpy(values_of(quantized, scheme)), hessian)]
    for _ in range(3):
        quantized = descend(weight, hessian, quantized, scheme, 1)
        errors.append(output_error(weight - torch.from_numpy(values_of(quantized, scheme)), hessian))
    falls = [after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors)]
    assert all(falls), errors
    assert errors[-1] < errors[0]
    in_single = output_error(weight - torch.from_numpy(values_of(single, scheme)), hessian)
    assert in_single == pytest.approx(errors[-1], rel=0.05)


def test_descent_leaves_what_it_started_from_alone():
    scheme, width = CASES["ragged"]
    weight, hessian = problem(width)
    start = start_of(weight, hessian, scheme)
    before = dataclasses.replace(start, codes=start.codes.clone(), scales=start.scales.clone())
    outliers = start.outliers.values.clone()
    descend(weight, hessian, start, scheme, 2)
    assert torch.equal(start.codes, before.codes)
    assert torch.equal(start.scales, before.scales)
    assert torch.equal(start.outliers.values, outliers)
