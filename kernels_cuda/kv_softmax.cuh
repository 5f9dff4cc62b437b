// The online softmax of kv_attention.cu, one warp's, and how the shares of warps and of splits are joined.
#pragma once

#include "kv_keys.cuh"

constexpr int JOIN_STRIDE = STORED_DIM + 2;  // of a split's share: numerators, then the reference and the denominator
// Of a warp's share in shared memory: the same, channel g * SLOTS + slot at 9 * slot + g, so that lanes meet on few banks.
constexpr int SHARE_STRIDE = (SLOTS * 9 + 13) / 16 * 16 + 4;
// Weights are 2^(score - reference + WEIGHT_LIFT): lifted, P * scale of V is no subnormal half.
constexpr float WEIGHT_LIFT = BITS < 16 ? 4.0f : 0.0f;
constexpr float LARGEST_POWER = WEIGHT_LIFT + 4.0f;  // of a weight, before a new reference is made

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// Columns of mma are the queries of a page; with TOGETHER pages side by side, those of other pages have scores of minus
// infinity, and all columns of a query share one reference. GROUP 1: `odd` says which of a lane's two columns is looked at.
struct Softmax {
    static constexpr int FIRST = GROUP == 1 ? 1 : TOGETHER > 1 ? GROUP / 2 : 4;  // lanes so far apart have the same query
    float log_scale, reference[HEAD_TILES][LANE_COLUMNS], shift[HEAD_TILES][LANE_COLUMNS];
    float missing[HEAD_TILES][LANE_COLUMNS];  // of the scores that `weigh` gets, and of the reference
    float denominator[HEAD_TILES][LANE_COLUMNS], minima[HEAD_TILES][LANE_COLUMNS], numerators[HEAD_TILES][SLOTS / 2][4];

    __device__ explicit Softmax(float scale) : log_scale(scale), missing{}, denominator{}, minima{}, numerators{} {
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS * HEAD_TILES; ++i) {
            reference[i / LANE_COLUMNS][i % LANE_COLUMNS] = minus_infinity();
            shift[i / LANE_COLUMNS][i % LANE_COLUMNS] = -minus_infinity();
        }
    }

    // Weights' powers of two; whether any of the warp lies far above its reference, or `is_due` is true of one of its lanes.
    __device__ bool weigh(const float (&scores)[HEAD_TILES][2][LANE_COLUMNS], bool is_due,
                          float (&powers)[HEAD_TILES][2][LANE_COLUMNS]) const {
#pragma unroll
        for (int i = 0; i < 2 * LANE_COLUMNS * HEAD_TILES; ++i) {
            const int tile = i / 2 / LANE_COLUMNS, j = i / 2 % LANE_COLUMNS;
            powers[tile][i % 2][j] = scores[tile][i % 2][j] * log_scale + shift[tile][j];
            is_due |= powers[tile][i % 2][j] > LARGEST_POWER;
        }
        return __any_sync(ALL_LANES, is_due);
    }

    // The reference becomes the largest score so far. Not at every larger one: that would be more than half of eight queries'
    // steps of 1024 tokens.
    __device__ void refer(const float (&scores)[HEAD_TILES][2][LANE_COLUMNS],
                          float (&powers)[HEAD_TILES][2][LANE_COLUMNS]) {
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS * HEAD_TILES; ++i) {
            const int tile = i / LANE_COLUMNS, j = i % LANE_COLUMNS;
            float found = fmaxf(fmaxf(scores[tile][0][j], scores[tile][1][j]), reference[tile][j]);
#pragma unroll
            for (int step = FIRST; step < 32; step *= 2) found = fmaxf(found, __shfl_xor_sync(ALL_LANES, found, step));
            const float factor = exp2_approximate((reference[tile][j] - found) * log_scale);
            reference[tile][j] = found;
            shift[tile][j] = WEIGHT_LIFT - found * log_scale;
            denominator[tile][j] *= factor;
            minima[tile][j] *= factor;
#pragma unroll
            for (int k = 0; k < SLOTS / 2; ++k) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    if (LANE_COLUMNS == 1 || n % 2 == j) numerators[tile][k][n] *= factor;
                }
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) powers[tile][row][j] = (scores[tile][row][j] - found) * log_scale + WEIGHT_LIFT;
        }
    }

    // From here on `short_of` is missing from all scores.
    __device__ void move(const float (&short_of)[HEAD_TILES][LANE_COLUMNS]) {
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS * HEAD_TILES; ++i) {
            const int tile = i / LANE_COLUMNS, j = i % LANE_COLUMNS;
            reference[tile][j] += missing[tile][j] - short_of[tile][j];
            missing[tile][j] = short_of[tile][j];
            shift[tile][j] = WEIGHT_LIFT - reference[tile][j] * log_scale;
        }
    }

    // Adds P V of 16 tokens, P as powers of two; `ranges` are V's scale and minimum of the lane's tokens g and g + 8.
    __device__ void add(const float (&powers)[HEAD_TILES][2][LANE_COLUMNS], const unsigned (&ranges)[2], bool odd,
                        const Words (&words)[2]) {
        unsigned weights[HEAD_TILES][2];
        float2 values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) values[i] = __half22float2(as_half2(ranges[i]));
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float p[2] = {};
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; ++j) {
                    p[j] = exp2_approximate(powers[tile][i][j]);
                    denominator[tile][j] += p[j];
                    minima[tile][j] += p[j] * values[i].y;
                    p[j] *= values[i].x;
                }
                unsigned pair = saturated_halves(p[0], p[1]);
                if (LANE_COLUMNS == 1 && TOGETHER > 1) pair <<= odd ? 16 : 0;
                weights[tile][i] = transpose(pair);
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

    // The warp's share to shared memory: [GROUP][SHARE_STRIDE].
    __device__ void store(float* share, int g, int t) {
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS * HEAD_TILES; ++i) {
            const int tile = i / LANE_COLUMNS, j = i % LANE_COLUMNS;
            const int head = TOGETHER > 1 ? (2 * t + j) % GROUP : tile * 8 + 2 * t + j;
            float sums[SLOTS];
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const float* own = numerators[tile][slot / 2] + slot % 2 * 2;
                sums[slot] = own[j] + (TOGETHER > 1 && GROUP == 1 ? own[1] : 0.0f);
#pragma unroll
                for (int step = FIRST; TOGETHER > 1 && step < 4; step *= 2) {
                    sums[slot] += __shfl_xor_sync(ALL_LANES, sums[slot], step);
                }
            }
#pragma unroll
            for (int step = TOGETHER > 1 ? FIRST : 4; step < 32; step *= 2) {
                denominator[tile][j] += __shfl_xor_sync(ALL_LANES, denominator[tile][j], step);
                minima[tile][j] += __shfl_xor_sync(ALL_LANES, minima[tile][j], step);
            }
            if (TOGETHER > 1 ? t * 2 >= GROUP : head >= GROUP) continue;
            float* row = share + head * SHARE_STRIDE;
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                row[slot * 9 + g] = sums[slot] * (CODE_UNIT / slot_unit(slot)) + minima[tile][j];
            }
            if (g == 0) row[SLOTS * 9] = (reference[tile][j] + missing[tile][j]) * log_scale, row[SLOTS * 9 + 1] = denominator[tile][j];
        }
    }
};

// One head's output before its last transform, in a warp's registers (LANE_PARTS of head_shared.cuh).
struct Joined {
    float sums[STORED_DIM / 32], denominator, largest;
};

// Adds up the warps' shares of a head, by one warp.
__device__ __forceinline__ Joined join_warps(const float* shares) {
    const int lane = threadIdx.x % 32;
    float scores[N_WARPS];
    Joined result = {};
    result.largest = minus_infinity();
#pragma unroll
    for (int i = 0; i < N_WARPS; ++i) {
        scores[i] = shares[i * GROUP * SHARE_STRIDE + SLOTS * 9];
        result.largest = fmaxf(result.largest, scores[i]);
    }
#pragma unroll
    for (int i = 0; i < N_WARPS; ++i) {
        const float* share = shares + i * GROUP * SHARE_STRIDE;
        const float weight = result.largest > minus_infinity() ? exp2_approximate(scores[i] - result.largest) : 0.0f;
        result.denominator += weight * share[SLOTS * 9 + 1];
#pragma unroll
        for (int k = 0; k < STORED_DIM / 32; ++k) {
            const int channel = lane + 32 * k;
            result.sums[k] += weight * share[channel % SLOTS * 9 + channel / SLOTS];
        }
    }
    return result;
}

// Adds up `n` <= 64 splits' shares of a head, by one warp: always in the same order.
__device__ __forceinline__ Joined join_splits(const float* shares, int n) {
    constexpr int stride = GROUP * JOIN_STRIDE;
    const int lane = threadIdx.x % 32;
    float scores[2], denominators[2], weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // a lane looks at the shares lane and lane + 32
        const float* share = shares + (lane + 32 * i) * stride + STORED_DIM;
        const bool exists = lane + 32 * i < n;
        scores[i] = exists ? __ldcg(share) : minus_infinity();
        denominators[i] = exists ? __ldcg(share + 1) : 0.0f;
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
            result.sums[k] += weight * __ldcg(shares + i * stride + lane + 32 * k);
        }
    }
    return result;
}
