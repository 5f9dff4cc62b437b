"""Oracles: the format's rules as plain loops over Python and NumPy numbers, sharing no code with `atomq`.

`real` is the NumPy type that a rule is computed in, float32 or float64. Configurations are read for their
fields only.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

_BNB = [0, 0.0625, 2, 3, 4, 6, 8, 12]
_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
CODEBOOKS = {
    "fp4-bnb": [*_BNB, *(-value for value in _BNB)],
    "fp4-e2m1": [*_E2M1, *(-value for value in _E2M1)],
    "exponential": [0, 1, 2, 4, 8, 16, 32, 64, 128, -2, -4, -8, -16, -32, -64, -128],
}
TINIEST = 2.0**-126  # smallest normal float32


def bounds(width: int, group_size: int | None) -> list[tuple[int, int]]:
    """First and last-plus-one channel of each group."""
    if group_size is None:
        return [(0, width)] if width else []
    return [(start, min(start + group_size, width)) for start in range(0, width, group_size)]


def unpack_row(row: bytes, n_bits: int, width: int, signed: bool) -> list[int]:
    """Codes of one row, bit by bit: bit i of the row is bit i % 8 of byte i // 8."""
    codes = []
    for j in range(width):
        code = 0
        for bit in range(n_bits):
            i = j * n_bits + bit
            code += ((row[i // 8] >> (i % 8)) & 1) << bit
        codes.append(code - 2**n_bits if signed and code >= 2 ** (n_bits - 1) else code)
    return codes


def pack_row(codes: list[int], n_bits: int) -> bytes:
    """The bytes of one row, bit by bit."""
    row = bytearray(-(-len(codes) * n_bits // 8))
    for j, code in enumerate(codes):
        for bit in range(n_bits):
            i = j * n_bits + bit
            row[i // 8] |= ((code >> bit) & 1) << (i % 8)  # Python's >> keeps the sign: two's complement
    return bytes(row)


def clamp(value, low, high):
    return min(max(value, low), high)


def nearest_code(ratio, number_format: str) -> int:
    """Code of the nearest value of a code book; the smaller value wins a tie; minus zero is never written."""
    book = CODEBOOKS[number_format]
    value = min(book, key=lambda candidate: (abs(float(ratio) - candidate), candidate))
    return book.index(value)


def code_of(ratio, config, zero: int = 0) -> int:
    """Code of a value that is already divided by its scale."""
    if config.number_format != "int":
        return nearest_code(ratio, config.number_format)
    if config.symmetric:
        return clamp(round(float(ratio)), -(2 ** (config.n_bits - 1)), 2 ** (config.n_bits - 1) - 1)
    return clamp(round(float(ratio)) + zero, 0, 2**config.n_bits - 1)


def value_of(code: int, config, zero: int = 0):
    """What a code is worth before the multiplication by its scale."""
    return CODEBOOKS[config.number_format][code] if config.number_format != "int" else code - zero


def symmetric_scale(largest, config, clip_ratio: float, span: str, real, zero_group=1):
    """clip * largest / divisor, or `zero_group` where that is no normal float32."""
    if config.number_format != "int":
        divisor = max(CODEBOOKS[config.number_format])
    elif span == "full":
        divisor = 2 ** (config.n_bits - 1) - 1
    else:
        divisor = (2**config.n_bits - 1) / 2
    scale = real(largest) * real(clip_ratio) / real(divisor)
    return scale if scale >= TINIEST else real(zero_group)


def asymmetric_range(values, clip_ratio: float, real):
    """Clipped lowest and highest of some values and zero."""
    lowest, highest = min(0, *values), max(0, *values)
    return real(lowest) * real(clip_ratio), real(highest) * real(clip_ratio)


def asymmetric_scale(low, high, n_bits: int, real):
    scale = (high - low) / real(2**n_bits - 1)
    return scale if scale >= TINIEST else real(1)


def zero_point(low, scale, n_bits: int) -> int:
    return clamp(round(float(-low / scale)), 0, 2**n_bits - 1)


def stored_scale(scale, real):
    """A weight's scale as it lies on disk: F16, unless it is no normal number there."""
    return real(np.float16(scale)) if 2.0**-14 <= scale <= 65504 else real(scale)


def quantize_token(row, scheme, real=np.float32):
    """Codes [K], scales [G] and zero points [G] (or None) of one token's normal channels."""
    groups = [[real(value) for value in row[a:b]] for a, b in bounds(len(row), scheme.group_size)]
    codes, scales, zeros = [], [], []
    if not scheme.symmetric:
        for group in groups:
            low, high = asymmetric_range(group, scheme.clip_ratio, real)
            scale = asymmetric_scale(low, high, scheme.n_bits, real)
            zero = zero_point(low, scale, scheme.n_bits)
            codes += [code_of(value / scale, scheme, zero) for value in group]
            scales.append(scale)
            zeros.append(zero)
        return codes, scales, zeros
    largest = [max(abs(value) for value in group) for group in groups]
    progressive = scheme.scale_mode == "progressive"
    scales = [
        symmetric_scale(
            value, scheme, scheme.clip_ratio, scheme.scale_span, real, zero_group=0 if progressive else 1
        )
        for value in largest
    ]
    if progressive:  # a zero group has no say in the base, and the factor 1
        base = np.float32(max(scales) / real(16))
        base = base if base >= TINIEST else np.float32(1)
        scales = [real(base) * real(clamp(int(np.ceil(scale / real(base))), 1, 16)) for scale in scales]
    for group, scale in zip(groups, scales, strict=True):
        codes += [code_of(value / scale, scheme) for value in group]
    return codes, scales, None


def group_scales(columns, config, clip_ratio: float, span: str, base=None, real=np.float64):
    """Scales, zero points and factors of one group of columns [N][width], one per channel group of rows."""
    scales, zeros, factors = [], [], []
    for start in range(0, len(columns), config.channel_group):
        values = [value for row in columns[start : start + config.channel_group] for value in row]
        if not config.symmetric:
            low, high = asymmetric_range(values, clip_ratio, real)
            scales.append(stored_scale(asymmetric_scale(low, high, config.n_bits, real), real))
            zeros.append(zero_point(low, scales[-1], config.n_bits))
            continue
        scale = symmetric_scale(max(abs(value) for value in values), config, clip_ratio, span, real)
        if base is not None:
            is_zero = not any(values)
            factors.append(1 if is_zero else clamp(int(np.ceil(scale / real(base[start]))), 1, 16))
            scales.append(real(base[start]) * real(factors[-1]))
        else:
            scales.append(stored_scale(scale, real))
    return scales, zeros, factors


def base_scales(rows, config, clip_ratio: float, span: str, real=np.float64):
    """Base of each row as it is stored: the scale of the whole row over 16, in float32, then F16."""
    return [
        stored_scale(
            real(np.float32(symmetric_scale(max(map(abs, row)), config, clip_ratio, span, real) / real(16))),
            real,
        )
        for row in rows
    ]


def encode_int8(values, stored: bool, real=np.float32):
    """INT8 codes of a row of outliers and their scale."""
    scale = max(abs(real(value)) for value in values) / real(127)
    scale = scale if scale >= TINIEST else real(1)
    if stored:
        scale = stored_scale(scale, real)
    return [clamp(round(float(real(value) / scale)), -128, 127) for value in values], scale


def float8_value(byte: int, precision: str) -> float:
    """The number that a byte of F8_E5M2 or OCP F8_E4M3 stands for; nan and inf included."""
    n_mantissa, bias = (2, 15) if precision == "e5m2" else (3, 7)
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> n_mantissa, byte & (2**n_mantissa - 1)
    if precision == "e4m3" and byte & 0x7F == 0x7F:
        return float("nan")
    if precision == "e5m2" and exponent == 31:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - n_mantissa)
    return sign * (1 + mantissa / 2**n_mantissa) * 2.0 ** (exponent - bias)


@functools.cache
def float8_magnitudes(precision: str) -> list[float]:
    """All finite values from zero up; the index is the byte."""
    values = [float8_value(byte, precision) for byte in range(0x80)]
    return [value for value in values if math.isfinite(value)]


def encode_float8(value: float, precision: str) -> float:
    """The nearest finite value, the one with an even mantissa winning a tie; large values saturate."""
    magnitudes = float8_magnitudes(precision)
    magnitude = min(abs(value), magnitudes[-1])
    byte = min(range(len(magnitudes)), key=lambda b: (abs(magnitude - magnitudes[b]), b % 2))
    return math.copysign(magnitudes[byte], value)


def encode_f16(value: float) -> float:
    return float(np.float16(clamp(value, -65504.0, 65504.0)))


def hadamard(size: int) -> list[list[float]]:
    """Sylvester's recursion [[H, H], [H, -H]] with its rows of norm 1."""

    def entry(i: int, j: int, n: int) -> int:
        if n == 1:
            return 1
        half = n // 2
        sign = -1 if i >= half and j >= half else 1
        return sign * entry(i % half, j % half, half)

    return [[entry(i, j, size) / size**0.5 for j in range(size)] for i in range(size)]


def hadamard_blocks(width: int) -> int:
    """Block size for a run of `width` channels: the largest power of two that divides it."""
    size = 1
    while width % (2 * size) == 0:
        size *= 2
    return size


def transform_row(row, group_size: int | None) -> np.ndarray:
    """One row [width] with every group turned in blocks, in float64."""
    turned = np.array(row, dtype=np.float64)
    for start, end in bounds(len(row), group_size):
        size = hadamard_blocks(end - start)
        matrix = np.array(hadamard(size))
        for block in range(start, end, size):
            turned[block : block + size] = turned[block : block + size] @ matrix
    return turned


def tie_distance(ratio, config) -> float:
    """How far `ratio` is from the nearest place where its code changes."""
    if config.number_format == "int":
        return abs(float(ratio) % 1 - 0.5)
    values = sorted(set(CODEBOOKS[config.number_format]))
    return min(abs(float(ratio) - (low + high) / 2) for low, high in itertools.pairwise(values))
