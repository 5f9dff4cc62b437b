"""Codes without a division: `quotient` and `divide_by` of int_codes.cuh against IEEE division."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest


def round_float32(x: Fraction) -> Fraction:
    """`x`, a normal positive or negative number, rounded to 24 bits, half to even."""
    if not x:
        return x
    exponent = math.frexp(float(abs(x)))[1]
    unit = Fraction(2) ** (exponent - 24)
    return round(x / unit) * unit  # Python rounds half to even


def corrected_quotient(x: Fraction, scale: Fraction) -> Fraction:
    """The kernel's arithmetic, each operation rounded once."""
    inverse = round_float32(1 / scale)
    estimate = round_float32(x * inverse)
    remainder = round_float32(x - estimate * scale)
    return round_float32(estimate + remainder * inverse)


def hardest_pairs():
    """Float32 pairs (x, scale) whose quotient lies next to where rounding to a tie k + 1/2 begins or ends.

    The code can only differ if the corrected and the IEEE quotient lie on different sides of a tie k + 1/2,
    so if x / scale is closer to a neighbouring midpoint of the float32 grid than the corrected quotient errs.
    With x = X 2^a and scale = B 2^b of 24 bits and that midpoint of 25 bits, M 2^c, this means
    |X 2^s - B M| < 6, which is solved here for every residue (a midpoint itself is no quotient).
    """
    for k in range(128):
        tie = Fraction(2 * k + 1, 2)
        unit = Fraction(2) ** (math.floor(math.log2(tie)) - 23)
        below = unit / 2 if k == 0 else unit  # 1/2 begins a binade
        for midpoint in (tie + unit / 2, tie - below / 2):
            odd = midpoint.numerator
            assert odd % 2 == 1
            for shift in range(20, 28):
                modulus = 1 << shift
                for residue in (-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6):
                    smallest = -residue * pow(odd, -1, modulus) % modulus
                    first = smallest + -(-((1 << 23) - smallest) // modulus) * modulus
                    for scale in range(max(first, smallest), 1 << 24, modulus):
                        numerator = (scale * odd + residue) // modulus
                        if 1 << 23 <= numerator < 1 << 24:
                            yield Fraction(numerator) * modulus * midpoint / odd, Fraction(scale), tie


def test_corrected_quotient_never_crosses_a_tie_that_the_ieee_quotient_does_not_cross():
    n_pairs = 0
    for x, scale, tie in hardest_pairs():
        n_pairs += 1
        corrected, quotient = corrected_quotient(x, scale), round_float32(x / scale)
        assert (corrected > tie) == (quotient > tie), (x, scale, tie)
        assert (corrected < tie) == (quotient < tie), (x, scale, tie)
    assert n_pairs > 1000


def test_corrected_quotient_rounds_like_a_division_on_random_values():
    generator = np.random.default_rng(0)
    scales = generator.uniform(0.5, 1, 200).astype(np.float32)
    values = (
        scales * (generator.integers(0, 8, 200) + 0.5) * (1 + generator.integers(-2, 3, 200) * 2.0**-24)
    ).astype(np.float32)
    for x, scale in zip(values, scales, strict=True):
        quotient = corrected_quotient(Fraction(float(x)), Fraction(float(scale)))
        assert np.rint(np.float32(float(quotient))) == np.rint(x / scale)


@pytest.mark.parametrize("divisor", [7, 15, 16, 127])
def test_corrected_quotient_is_the_ieee_quotient_for_the_kernels_divisors(divisor):
    for start in range(1 << 23, 1 << 24, 1 << 20):  # every mantissa
        x = np.arange(start, start + (1 << 20)).astype(np.float32)
        inverse = np.float32(1) / np.float32(divisor)
        estimate = x * inverse
        # Both fused steps are exact in 64 bits of mantissa before they are rounded.
        remainder = (x.astype(np.longdouble) - estimate.astype(np.longdouble) * divisor).astype(np.float32)
        corrected = remainder.astype(np.longdouble) * inverse + estimate.astype(np.longdouble)
        assert np.array_equal(corrected.astype(np.float32), x / np.float32(divisor))
