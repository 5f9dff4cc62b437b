// How the lanes of a warp share the HEAD_DIM channels of a head: LANES lanes, CHANNELS neighbouring channels each; and
// how they make INT4 codes of it, as drawn in quantize_kv.cu.
#pragma once

#include <cuda_fp16.h>

#include "hadamard.cuh"
#include "int_codes.cuh"

__host__ __device__ constexpr int power_of_two_from(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

constexpr int CHANNELS = HEAD_DIM <= 512 ? 16 : power_of_two_from((HEAD_DIM + 31) / 32);
constexpr int LANES = power_of_two_from((HEAD_DIM + CHANNELS - 1) / CHANNELS);

static_assert(LANES <= 32, "a head lies in one warp");

__device__ __forceinline__ void transform_head(float (&values)[CHANNELS]) {
    constexpr int SIZE = HEAD_DIM & -HEAD_DIM;
    butterflies<SIZE == LANES * CHANNELS, LANES>(values, SIZE);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) values[i] = ieee::mul(values[i], orthogonal_factor(SIZE));
}

// Scale and minimum of the head whose channels from `first` on a lane holds. All lanes of the warp must call it.
__device__ __forceinline__ __half2 find_range(const float (&values)[CHANNELS], int first, float clip_ratio) {
    float low = __int_as_float(0x7f800000), high = -low;  // infinity
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        if (first + i >= HEAD_DIM) continue;
        low = fminf(low, values[i]);
        high = fmaxf(high, values[i]);
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        low = fminf(low, __shfl_xor_sync(ALL_LANES, low, step));
        high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, step));
    }
    low = ieee::mul(low, clip_ratio);
    high = ieee::mul(high, clip_ratio);
    constexpr float F16_LARGEST = 65504.0f;
    const float span = divide_by<15>(ieee::sub(high, low));
    __half2 range = __floats2half2_rn(fminf(span, F16_LARGEST), ieee::clamp(low, -F16_LARGEST, F16_LARGEST));
    if (__low2float(range) == 0.0f) range.x = __float2half_rn(1.0f);
    return range;
}

// Stores the lane's codes, WIDTH bytes at a time; `row` is where the codes of channel `first` go.
template <int WIDTH>
__device__ __forceinline__ void store_codes(const float (&values)[CHANNELS], int first, __half2 range,
                                            unsigned char* row) {
    const float scale = __low2float(range), minimum = __high2float(range), inverse = ieee::reciprocal(scale);
    // Eight codes a word. Each still has ROUNDER's bits above its own; they add up to a constant.
    constexpr unsigned ROUNDERS = 0x4b400000u * 0x11111111u;
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i += WIDTH) {
        Vector<unsigned, (WIDTH + 3) / 4> words;
#pragma unroll
        for (int w = 0; w < (WIDTH + 3) / 4; ++w) {
            unsigned sum = 0;
#pragma unroll
            for (int j = (WIDTH < 4 ? 2 * WIDTH : 8) - 1; j >= 0; --j) {
                const int channel = 2 * i + 8 * w + j;
                const float ratio = quotient(ieee::sub(values[channel], minimum), scale, inverse);
                const float code = ieee::add(ieee::clamp(ratio, 0.0f, 15.0f), ROUNDER);
                sum = (sum << 4) + __float_as_uint(first + channel < HEAD_DIM ? code : ROUNDER);
            }
            words.items[w] = sum - ROUNDERS;
        }
        if (first + 2 * i < HEAD_DIM) {
            using Bytes = Vector<unsigned char, WIDTH>;
            *reinterpret_cast<Bytes*>(row + i) = reinterpret_cast<const Bytes&>(words);
        }
    }
}
