// K coded after RoPE less a static offset o: what the offset, turned by every token's position, adds to the scores.
//
// With a channel and its partner of RoPE as one complex number, query q at position m and token n = n0 + j of the page that
// begins at n0 have
//
//   (R(m) q) . (R(n) o) = sum of Re(W e^{i (m - n0) theta} e^{-i (j - 31.5) theta}),  W = q conj(o e^{i 31.5 theta})
//
// so `crossed` holds W (instead of the queries, whose operand is made), and a page turns it by the row m - n0 of `rotary`.
// In the page, places 32 + k and 31 - k have the same cosines and opposite sines: `turns` has both for k = 0 .. 31, and
// two sums of half the channels each, even and odd, give all 64 places. Columns of mma that no query takes hold the
// next pages (ABREAST at a time), so one query costs an eighth.
#pragma once

#include "kv_keys.cuh"

constexpr bool TURNS_OFFSET = KEY_MODE == 0 && KEY_OFFSET;
constexpr float CROSSED_UNIT = 256.0f;  // W over it is a half also where K's bias is in the hundreds
constexpr int CROSSED_PARTS = (HEAD_DIM / 2 + 31) / 32;  // channel pairs of a lane
constexpr int OFFSET_TURN_WORDS = 16 * STORED_DIM;  // [cosine, sine][k / 16][SLOTS / 4][lane][4]: mma's A operands
constexpr int BIAS_WORDS = HEAD_TILES * PAGE_TOKENS * 8;  // of a warp: [tile][place][column]

// A lane's part of the offset, turned to the middle of a page, over CROSSED_UNIT.
__device__ __forceinline__ void load_offset(const float* offset, float2 (&parts)[CROSSED_PARTS]) {
#pragma unroll
    for (int k = 0; k < CROSSED_PARTS; ++k) {
        const int i = threadIdx.x % 32 + 32 * k;
        if (i < HEAD_DIM / 2) parts[k] = make_float2(offset[i] / CROSSED_UNIT, offset[i + HEAD_DIM / 2] / CROSSED_UNIT);
    }
}

// A lane's part of W over CROSSED_UNIT, from a head that is not yet turned.
__device__ __forceinline__ void cross_head(const float* head, const float2 (&offset)[CROSSED_PARTS],
                                           float2 (&crossed)[CROSSED_PARTS]) {
#pragma unroll
    for (int k = 0; k < CROSSED_PARTS; ++k) {
        const int i = threadIdx.x % 32 + 32 * k;
        if (i >= HEAD_DIM / 2) continue;
        const float a = head[i], b = head[i + HEAD_DIM / 2], c = offset[k].x, d = offset[k].y;
        crossed[k] = make_float2(a * c + b * d, b * c - a * d);
    }
}

__device__ __forceinline__ void store_crossed(const float2 (&crossed)[CROSSED_PARTS], float* head) {
#pragma unroll
    for (int k = 0; k < CROSSED_PARTS; ++k) {
        const int i = threadIdx.x % 32 + 32 * k;
        if (i >= HEAD_DIM / 2) continue;
        head[i] = crossed[k].x;
        head[i + HEAD_DIM / 2] = crossed[k].y;
    }
}

// The biases of the pages' scores to `biases`: W turned by `turns` times the table, of which `table` is the lane's part.
__device__ __forceinline__ void offset_scores(const float* crossed, const float2* turns, unsigned table, int g, int t,
                                              float* biases) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        const float* head = head_of(crossed, tile, g);
        float sums[2][2][4] = {};  // even and odd ones, of k / 16
#pragma unroll 1
        for (int k = 0; k < SLOTS / 4; ++k) {
            unsigned operand[2][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) head_slot<true>(head, turns, 2 * k + i, t, operand[0][i], operand[1][i]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                unsigned a[4];
                read_shared<4>(table + (i * (SLOTS / 4) + k) * 512, a);
                mma_float16<false>(sums[i / 2][i % 2], a, operand[i / 2][0], operand[i / 2][1]);
            }
        }
        __syncwarp();  // all have read the last biases
        float2* middle = reinterpret_cast<float2*>(biases + (tile * PAGE_TOKENS + 32) * 8 + 2 * t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // columns 2 t and the next
            const int k = 8 * i + g;
            const float* even = sums[0][i / 2] + i % 2 * 2;
            const float* odd = sums[1][i / 2] + i % 2 * 2;
            middle[k * 4] = make_float2((even[0] + odd[0]) * CROSSED_UNIT, (even[1] + odd[1]) * CROSSED_UNIT);
            middle[(-1 - k) * 4] = make_float2((even[0] - odd[0]) * CROSSED_UNIT, (even[1] - odd[1]) * CROSSED_UNIT);
        }
    }
}
