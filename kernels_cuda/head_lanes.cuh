// How the lanes of a warp share the HEAD_DIM channels of a head: LANES lanes, CHANNELS neighbouring channels each.
#pragma once

#include "hadamard.cuh"
#include "int_codes.cuh"

__host__ __device__ constexpr int power_of_two_from(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

constexpr int CHANNELS = HEAD_DIM <= 512 ? 16 : power_of_two_from((HEAD_DIM + 31) / 32);
constexpr int LANES = power_of_two_from((HEAD_DIM + CHANNELS - 1) / CHANNELS);

static_assert(LANES <= 32 && THREADS % 32 == 0, "a head lies in one warp");

__device__ __forceinline__ void transform_head(float (&values)[CHANNELS]) {
    constexpr int SIZE = HEAD_DIM & -HEAD_DIM;
    butterflies<SIZE == LANES * CHANNELS, LANES>(values, SIZE);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) values[i] = ieee::mul(values[i], orthogonal_factor(SIZE));
}
