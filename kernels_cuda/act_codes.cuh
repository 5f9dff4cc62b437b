// The scales and codes of quantize_act.cu, and where they go.
#pragma once

#include "act_problem.cuh"
#include "hadamard.cuh"

// Largest magnitude of each group of the slot, or of the token's outliers.
__device__ __forceinline__ void find_largest(const Problem& p, const Place& place, const Values& values,
                                             float (&largest)[LANE_GROUPS]) {
    float of_run[RUNS];
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        of_run[run] = 0.0f;
#pragma unroll
        for (int i = 0; i < RUN_CHANNELS; ++i) of_run[run] = ieee::max_magnitude(of_run[run], values[run][i]);
    }
    const float of_all = ieee::max_magnitude(of_run[0], of_run[RUNS - 1]);
#pragma unroll
    for (int group = 0; group < LANE_GROUPS; ++group) {
        float mine = LANE_GROUPS == 1 || place.is_outlier ? of_all : of_run[group];
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            const float other = __shfl_xor_sync(ALL_LANES, mine, step);
            if (step < GROUP_LANES || place.is_outlier) mine = ieee::max_magnitude(mine, other);
        }
        const float neighbour = __shfl_xor_sync(ALL_LANES, mine, LANES);
        largest[group] = place.is_outlier && p.n_outlier_slots == 2 ? ieee::max_magnitude(mine, neighbour) : mine;
    }
}

__device__ __forceinline__ float normal_scale(const Problem& p, float largest) {
    return divide_by<7>(ieee::mul(largest, p.clip_ratio));
}

__device__ __forceinline__ float one_if_zero(float scale) { return scale >= SMALLEST_NORMAL ? scale : 1.0f; }

// The rule of progressive scales: rounded up, so that nothing is clipped more. A zero group has factor 1.
__device__ __forceinline__ int progressive_factor(float scale, float base) {
    if (scale < SMALLEST_NORMAL) return 1;
    return static_cast<int>(ieee::clamp(ceilf(ieee::div(scale, base)), 1.0f, 16.0f));
}

// How the codes of a group are made.
struct Coder {
    float scale, inverse, factor;
    unsigned low, high;  // bounds of code * factor, twice in a word of two 16-bit numbers

    __device__ Coder(const Problem& p, const Place& place, float largest, float base) {
        int lowest = -8, highest = 7, integer_factor = 1;
        if (place.is_outlier) {
            scale = one_if_zero(divide_by<127>(largest));
            lowest = -128;
            highest = 127;
        } else if (PROGRESSIVE) {
            integer_factor = progressive_factor(normal_scale(p, largest), base);
            scale = ieee::mul(base, static_cast<float>(integer_factor));
        } else {
            scale = one_if_zero(normal_scale(p, largest));
        }
        inverse = ieee::reciprocal(scale);
        factor = static_cast<float>(integer_factor);
        low = (lowest * integer_factor & 0xffff) * 0x10001u;
        high = (highest * integer_factor & 0xffff) * 0x10001u;
    }

    // Four operands: codes, times the factor where progressive.
    __device__ unsigned encode(const float* values) const {
        unsigned pairs[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float codes[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                codes[k] = ieee::add(quotient(values[2 * j + k], scale, inverse), ROUNDER);
                if (PROGRESSIVE) codes[k] = ieee::fma(ieee::sub(codes[k], ROUNDER), factor, ROUNDER);
            }
            // Fewer than 2^15 in magnitude, so the low halves hold them whole.
            pairs[j] = __byte_perm(__float_as_uint(codes[0]), __float_as_uint(codes[1]), 0x5410);
            pairs[j] = __vmins2(__vmaxs2(pairs[j], low), high);
        }
        return __byte_perm(pairs[0], pairs[1], 0x6420);
    }
};

// The scale of a group of the slot, or of the token's outliers, by one lane for all of them; zero past the last token.
__device__ __forceinline__ void store_scale(const Problem& p, const Place& place, int group, int token, float scale) {
    if (!place.exists || place.lane % GROUP_LANES != 0) return;
    int row = -1;
    if (place.is_outlier) {
        if (place.slot + group == 0) row = PROGRESSIVE ? 1 : p.n_slots * GROUPS;
    } else if (!PROGRESSIVE) {
        row = place.slot * GROUPS + group;
    }
    const bool is_group = place.is_outlier || place.group_width(p, group) > 0;
    if (row >= 0) p.token_scales[row * p.padded_tokens + token] = token < p.n_tokens && is_group ? scale : 0.0f;
}

