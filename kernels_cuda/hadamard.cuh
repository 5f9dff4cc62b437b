// The transform of numerics/hadamard.py in registers: LANES neighbouring lanes hold CHANNELS channels each.
//
// A block of `size` channels (a power of two) goes through butterflies at distance 1, 2, 4, .. size / 2, then through
// one product with 1/sqrt(size): that order is part of the arithmetic.
#pragma once

#include "ieee.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;

// The butterflies of blocks of up to LANES * CHANNELS; larger ones go on from there. All 32 lanes must call it;
// `size` may differ between groups of LANES lanes. WHOLE: it is known to be LANES * CHANNELS or more everywhere.
template <bool WHOLE, int LANES, int CHANNELS>
__device__ __forceinline__ void butterflies(float (&values)[CHANNELS], int size) {
#pragma unroll
    for (int step = 1; step < CHANNELS; step *= 2) {
        if (!WHOLE && step >= size) continue;
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            if (i & step) continue;
            const float low = values[i], high = values[i + step];
            values[i] = ieee::add(low, high);
            values[i + step] = ieee::sub(low, high);
        }
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const float sign = threadIdx.x & step ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            const float other = __shfl_xor_sync(ALL_LANES, values[i], step);
            const float sum = ieee::fma(values[i], sign, other);
            values[i] = WHOLE || step * CHANNELS < size ? sum : values[i];
        }
    }
}

// 1/sqrt(size), rounded: a power of two, or that of 1/sqrt(2) over one. 1 for size 1.
__device__ __forceinline__ float orthogonal_factor(int size) {
    const int exponent = __ffs(size) - 1;
    const float power = __int_as_float((127 - exponent / 2) << 23);
    return exponent % 2 ? 0.70710678118654752f * power : power;
}
