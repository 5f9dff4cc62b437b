// What happens to a head of HEAD_DIM channels in shared memory, by one warp, in float32: norm, RoPE, Hadamard.
#pragma once

#include "hadamard.cuh"

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// x / sqrt(mean x^2 + epsilon) * weight
__device__ __forceinline__ void norm_head(float* head, const float* weight, float epsilon) {
    const int lane = threadIdx.x % 32;
    float square = 0.0f;
    for (int i = lane; i < HEAD_DIM; i += 32) square += head[i] * head[i];
    const float inverse = ieee::reciprocal(sqrtf(sum_of_warp(square) / HEAD_DIM + epsilon));
    for (int i = lane; i < HEAD_DIM; i += 32) head[i] = ieee::mul(ieee::mul(head[i], inverse), weight[i]);
    __syncwarp();
}

constexpr int PAIR_PARTS = (HEAD_DIM / 2 + 31) / 32;  // pairs of channels of a lane: lane + 32 k and its partner

// A lane's part of a position's (cosine, sine) of HEAD_DIM / 2 angles.
__device__ __forceinline__ void load_turns(const float2* row, float2 (&turns)[PAIR_PARTS]) {
#pragma unroll
    for (int k = 0; k < PAIR_PARTS; ++k) {
        const int i = threadIdx.x % 32 + 32 * k;
        if (i < HEAD_DIM / 2) turns[k] = row[i];
    }
}

// x * cosine + rotate_half(x) * sine
__device__ __forceinline__ void rotate_head(float* head, const float2 (&turns)[PAIR_PARTS]) {
#pragma unroll
    for (int k = 0; k < PAIR_PARTS; ++k) {
        const int i = threadIdx.x % 32 + 32 * k;
        if (i >= HEAD_DIM / 2) continue;
        const float low = head[i], high = head[i + HEAD_DIM / 2];
        head[i] = ieee::sub(ieee::mul(low, turns[k].x), ieee::mul(high, turns[k].y));
        head[i + HEAD_DIM / 2] = ieee::add(ieee::mul(high, turns[k].x), ieee::mul(low, turns[k].y));
    }
    __syncwarp();
}

__device__ __forceinline__ void rotate_head(float* head, const float2* row) {
    float2 turns[PAIR_PARTS];
    load_turns(row, turns);
    rotate_head(head, turns);
}

// A head in a warp's registers: part k of a lane is channel lane + 32 k.
constexpr int LANE_PARTS = (HEAD_DIM + 31) / 32;

// x H in blocks of the largest power of two that divides HEAD_DIM; rounds as `butterflies` does.
__device__ __forceinline__ void transform_lane_head(float (&x)[LANE_PARTS]) {
    constexpr int SIZE = HEAD_DIM & -HEAD_DIM;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < SIZE && step < 32; step *= 2) {
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) {
            const float other = __shfl_xor_sync(ALL_LANES, x[k], step);
            x[k] = lane & step ? ieee::sub(other, x[k]) : ieee::add(x[k], other);
        }
    }
#pragma unroll
    for (int step = 1; step < SIZE / 32; step *= 2) {
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) {
            if (k & step) continue;
            const float low = x[k], high = x[k + step];
            x[k] = ieee::add(low, high);
            x[k + step] = ieee::sub(low, high);
        }
    }
#pragma unroll
    for (int k = 0; k < LANE_PARTS; ++k) x[k] = ieee::mul(x[k], orthogonal_factor(SIZE));
}

__device__ __forceinline__ void load_lane_head(const float* head, float (&x)[LANE_PARTS]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < LANE_PARTS; ++k) x[k] = lane + 32 * k < HEAD_DIM ? head[lane + 32 * k] : 0.0f;
}

__device__ __forceinline__ void store_lane_head(const float (&x)[LANE_PARTS], float* head) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < LANE_PARTS; ++k) {
        if (lane + 32 * k < HEAD_DIM) head[lane + 32 * k] = x[k];
    }
    __syncwarp();
}

__device__ __forceinline__ void transform_shared_head(float* head) {
    float x[LANE_PARTS];
    load_lane_head(head, x);
    transform_lane_head(x);
    store_lane_head(x, head);
}
