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

// x * cosine + rotate_half(x) * sine by the row of a position: (cosine, sine) of HEAD_DIM / 2 angles.
__device__ __forceinline__ void rotate_head(float* head, const float2* turns) {
    for (int i = threadIdx.x % 32; i < HEAD_DIM / 2; i += 32) {
        const float low = head[i], high = head[i + HEAD_DIM / 2];
        head[i] = ieee::sub(ieee::mul(low, turns[i].x), ieee::mul(high, turns[i].y));
        head[i + HEAD_DIM / 2] = ieee::add(ieee::mul(high, turns[i].x), ieee::mul(low, turns[i].y));
    }
    __syncwarp();
}

// x H in blocks of the largest power of two that divides HEAD_DIM; rounds as `butterflies` does.
__device__ __forceinline__ void transform_shared_head(float* head) {
    constexpr int SIZE = HEAD_DIM & -HEAD_DIM;
    const int lane = threadIdx.x % 32;
    for (int step = 1; step < SIZE; step *= 2) {
        for (int i = lane; i < HEAD_DIM / 2; i += 32) {
            const int first = i / step * 2 * step + i % step;
            const float low = head[first], high = head[first + step];
            head[first] = ieee::add(low, high);
            head[first + step] = ieee::sub(low, high);
        }
        __syncwarp();
    }
    for (int i = lane; i < HEAD_DIM; i += 32) head[i] = ieee::mul(head[i], orthogonal_factor(SIZE));
    __syncwarp();
}
