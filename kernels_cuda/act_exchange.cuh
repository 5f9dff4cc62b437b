// The transform of whole groups of 128 channels in groups of four lanes, for channels that may lie in any lane at first:
// the same additions as hadamard.cuh, and half its shuffles.
//
// Four lanes share a slot, lane = (b1, b0). A lane holds 32 of its channels as values[r4][8 * r3 + i], 8 channels c2 c1 c0
// = i of each run r4, r3 side by side. A channel is c6 .. c0 in bits:
//
//   before   c6 = b1, c5 = b0, c4 = r4 ^ b0, c3 = r3 ^ b1
//   after    c6 = r3, c5 = r4, c4 = b0,      c3 = b1
//
// Stages at distance 1 to 16 lie inside of a lane. For the one at 32, a lane sends the half of its channels that have
// r4 = 1 and keeps the others: with what it gets in return it holds both ends of 16 butterflies, for which a stage by
// shuffles alone would send all 32 and leave half of every butterfly to the other lane. Likewise at 64 with r3 = 1.
//
// Outliers pass through all that unchanged but for signs and places, as weight 0 instead of 1 makes of each butterfly
// a move; so a warp that has some needs no other path. Signs go into the last product; see `after` for the places.
#pragma once

#include "act_problem.cuh"
#include "hadamard.cuh"

static_assert(GROUP_SIZE == SLOT_CHANNELS && LANES == 4 && RUNS == 2 && RUN_CHANNELS == 16, "the layout above");

namespace exchange {

constexpr int SPAN = 8;  // channels side by side in a lane

// a * b - c and c - a * b, rounded once, without the instruction that a negation under flush-to-zero would take.
__device__ __forceinline__ float multiply_subtract(float a, float b, float c) {
    float result;
    asm("{\n.reg .f32 minus;\nneg.f32 minus, %3;\nfma.rn.f32 %0, %1, %2, minus;\n}" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}

__device__ __forceinline__ float subtract_product(float a, float b, float c) {
    float result;
    asm("{\n.reg .f32 minus;\nneg.f32 minus, %1;\nfma.rn.f32 %0, minus, %2, %3;\n}" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}

__device__ constexpr int parity(int bits) { return (bits ^ bits >> 1 ^ bits >> 2) & 1; }

// The first channel of a run, in its slot, before the transform.
__device__ __forceinline__ int before(const Place& place, int r4, int r3) {
    const int b0 = place.lane & 1, b1 = place.lane >> 1;
    return b1 << 6 | b0 << 5 | (r4 ^ b0) << 4 | (r3 ^ b1) << 3;
}

// And after it.
__device__ __forceinline__ int after(const Place& place, int r4, int r3) {
    const int b0 = place.lane & 1, b1 = place.lane >> 1, channel = r3 << 6 | r4 << 5 | b0 << 4 | b1 << 3;
    return place.is_outlier ? channel ^ (b1 << 6 | b0 << 5 | 1 << 4 | 1 << 3) : channel;
}

// low, high = low + high, low - high; weight 0: low, -high.
__device__ __forceinline__ void butterfly(float& low, float& high, float weight) {
    const float a = low, b = high;
    low = ieee::fma(b, weight, a);
    high = multiply_subtract(a, weight, b);
}

// The same where the ends have changed places: weight -1: low, high = high - low, low + high; weight 0: high, low.
__device__ __forceinline__ void turned_butterfly(float& low, float& high, float weight) {
    const float a = low, b = high;
    low = ieee::fma(a, weight, b);
    high = subtract_product(b, weight, a);
}

__device__ __forceinline__ void transform(const Place& place, Values& values) {
    const bool b0 = place.lane & 1, b1 = place.lane >> 1;
    const float one = place.is_outlier ? 0.0f : 1.0f;
    const float weight_of_r4 = b0 ? -one : one, weight_of_r3 = b1 ? -one : one;
    auto at = [&](int i) -> float& { return values[i / RUN_CHANNELS][i % RUN_CHANNELS]; };
#pragma unroll
    for (int distance = 1; distance < SPAN; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            if (!(i & distance)) butterfly(at(i), at(i + distance), one);
        }
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        if (!(i & 8)) turned_butterfly(at(i), at(i + 8), weight_of_r3);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) turned_butterfly(at(i), at(i + 16), weight_of_r4);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        at(i + 16) = __shfl_xor_sync(ALL_LANES, at(i + 16), 1);
        butterfly(at(i), at(i + 16), one);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        if (i & 8) continue;
        at(i + 8) = __shfl_xor_sync(ALL_LANES, at(i + 8), 2);
        butterfly(at(i), at(i + 8), one);
    }
    // Where a lane got the lower end, its difference has the wrong sign; an outlier has that of every `high` it was.
    const float factor = place.is_outlier ? 1.0f : orthogonal_factor(SLOT_CHANNELS);
#pragma unroll
    for (int run = 0; run < 4; ++run) {
        const int r4 = run >> 1, r3 = run & 1;
        const bool is_minus = place.is_outlier ? r4 ^ r3 : (r4 & b0) ^ (r3 & b1);
        const float even = is_minus ? -factor : factor, odd = place.is_outlier ? -even : even;
#pragma unroll
        for (int i = 0; i < SPAN; ++i) at(run * SPAN + i) = ieee::mul(at(run * SPAN + i), parity(i) ? odd : even);
    }
}

}  // namespace exchange
