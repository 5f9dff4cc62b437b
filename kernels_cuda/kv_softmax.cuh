// The online softmax of kv_attention.cu, one warp's, and how the shares of warps and of splits are joined.
#pragma once

#include "kv_keys.cuh"

constexpr int JOIN_STRIDE = STORED_DIM + 2;  // numerators, then the largest score and the denominator
constexpr float WEIGHT_UNIT = BITS < 16 ? 64.0f : 1.0f;  // keeps P * scale of V away from subnormal halves

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

struct Softmax {
    float largest[HEAD_TILES][2], denominator[HEAD_TILES][2], minima[HEAD_TILES][2];
    float numerators[HEAD_TILES][SLOTS / 2][4];

    __device__ Softmax() : denominator{}, minima{}, numerators{} {
#pragma unroll
        for (int i = 0; i < 2 * HEAD_TILES; ++i) largest[i / 2][i % 2] = minus_infinity();
    }

    // Scores (in units of log 2) above the largest so far make a new reference; else all stays as it is.
    __device__ void refer(const float (&scores)[HEAD_TILES][4]) {
        bool exceeds = false;
#pragma unroll
        for (int i = 0; i < 4 * HEAD_TILES; ++i) exceeds |= scores[i / 4][i % 4] > largest[i / 4][i % 2];
        if (!__any_sync(ALL_LANES, exceeds)) return;
#pragma unroll
        for (int i = 0; i < 2 * HEAD_TILES; ++i) {
            const int tile = i / 2, j = i % 2;
            float found = fmaxf(fmaxf(scores[tile][j], scores[tile][j + 2]), largest[tile][j]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) found = fmaxf(found, __shfl_xor_sync(ALL_LANES, found, step));
            const float factor = exp2_approximate(largest[tile][j] - found);
            largest[tile][j] = found;
            denominator[tile][j] *= factor;
            minima[tile][j] *= factor;
#pragma unroll
            for (int k = 0; k < SLOTS / 2; ++k) {
                numerators[tile][k][j] *= factor;
                numerators[tile][k][j + 2] *= factor;
            }
        }
    }

    // Adds P V of 16 tokens; `ranges` are V's scale and minimum of the lane's tokens g and g + 8.
    __device__ void add(const float (&scores)[HEAD_TILES][4], const float2 (&ranges)[2], const Words (&words)[2]) {
        unsigned weights[HEAD_TILES][2];
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            float p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[i] = exp2_approximate(scores[tile][i] - largest[tile][i % 2]);
                denominator[tile][i % 2] += p[i];
                minima[tile][i % 2] += p[i] * ranges[i / 2].y;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float unit = ranges[i].x * WEIGHT_UNIT;
                const __half2 pair = __floats2half2_rn(fminf(p[2 * i] * unit, 65504.0f), fminf(p[2 * i + 1] * unit, 65504.0f));
                weights[tile][i] = transpose(as_word(pair));
            }
        }
#pragma unroll
        for (int k = 0; k < SLOTS / 2; ++k) {
            const unsigned a[4] = {subnormal_codes(words[0], 2 * k), subnormal_codes(words[0], 2 * k + 1),
                                   subnormal_codes(words[1], 2 * k), subnormal_codes(words[1], 2 * k + 1)};
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile) {
                mma_float16<false>(numerators[tile][k], a, weights[tile][0], weights[tile][1]);
            }
        }
    }

    // The warp's share to shared memory: [GROUP][JOIN_STRIDE].
    __device__ void store(float* share, int g, int t) {
#pragma unroll
        for (int i = 0; i < 2 * HEAD_TILES; ++i) {
            const int tile = i / 2, j = i % 2, head = tile * 8 + 2 * t + j;
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                denominator[tile][j] += __shfl_xor_sync(ALL_LANES, denominator[tile][j], step);
                minima[tile][j] += __shfl_xor_sync(ALL_LANES, minima[tile][j], step);
            }
            if (head >= GROUP) continue;
            float* row = share + head * JOIN_STRIDE;
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const float unit = CODE_UNIT / WEIGHT_UNIT / slot_unit(slot);
                row[g * SLOTS + slot] = numerators[tile][slot / 2][j + slot % 2 * 2] * unit + minima[tile][j];
            }
            if (g == 0) row[STORED_DIM] = largest[tile][j], row[STORED_DIM + 1] = denominator[tile][j];
        }
    }
};

// One head's output before its last transform, in a warp's registers (LANE_PARTS of head_shared.cuh).
struct Joined {
    float sums[STORED_DIM / 32], denominator, largest;
};

// Adds up `n` <= 64 shares of a head, `stride` apart, by one warp: always in the same order.
template <bool GLOBAL>
__device__ __forceinline__ Joined join(const float* shares, int n, int stride) {
    const auto read = [](const float* place) { return GLOBAL ? __ldcg(place) : *place; };
    const int lane = threadIdx.x % 32;
    float scores[2], denominators[2], weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // a lane looks at the shares lane and lane + 32
        const float* share = shares + (lane + 32 * i) * stride + STORED_DIM;
        const bool exists = lane + 32 * i < n;
        scores[i] = exists ? read(share) : minus_infinity();
        denominators[i] = exists ? read(share + 1) : 0.0f;
    }
    Joined result = {};
    result.largest = fmaxf(scores[0], scores[1]);
#pragma unroll
    for (int step = 16; step; step /= 2) {
        result.largest = fmaxf(result.largest, __shfl_xor_sync(ALL_LANES, result.largest, step));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        weights[i] = result.largest > minus_infinity() ? exp2_approximate(scores[i] - result.largest) : 0.0f;
        result.denominator += weights[i] * denominators[i];
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
        result.denominator += __shfl_xor_sync(ALL_LANES, result.denominator, step);
    }
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
        const float weight = __shfl_sync(ALL_LANES, i < 32 ? weights[0] : weights[1], i % 32);
#pragma unroll
        for (int k = 0; k < STORED_DIM / 32; ++k) {
            result.sums[k] += weight * read(shares + i * stride + lane + 32 * k);
        }
    }
    return result;
}
