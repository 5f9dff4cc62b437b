// Integer codes of float32 values without a division, and vectors of equal items.
#pragma once

#include "ieee.cuh"

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T items[N];
};

// 1.5 * 2^23: a float of at most 2^22 plus this is rounded to an integer, half to even, in the low bits.
constexpr float ROUNDER = 12582912.0f;

// x / scale, given inverse = 1 / scale rounded. The estimate x * inverse is corrected once by its exact remainder:
// below 128 it lies on the same side of every k + 1/2 as the IEEE quotient, so it rounds to the same integer, and by
// a scale of 7, 15, 16 or 127 it is the IEEE quotient (tests/kernels/test_int_codes.py). For scales from 2^-100 on.
__device__ __forceinline__ float quotient(float x, float scale, float inverse) {
    const float estimate = ieee::mul(x, inverse);
    return ieee::fma(ieee::fma(estimate, -scale, x), inverse, estimate);
}

template <int DIVISOR>
__device__ __forceinline__ float divide_by(float x) {
    static_assert(DIVISOR == 7 || DIVISOR == 15 || DIVISOR == 16 || DIVISOR == 127, "tested divisors");
    return quotient(x, DIVISOR, 1.0f / DIVISOR);
}
