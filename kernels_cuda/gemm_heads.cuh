// The epilogue of a GEMM that makes K or V: its sums, rounded to the output type first, as INT4 heads, bit for bit what
// quantize_kv.cu makes of the rounded matrix. A tile holds whole heads: HEAD_DIM is 64 or 128, and a panel begins one.
#pragma once

#include "gemm_stream.cuh"
#include "head_lanes.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "heads of 64 or 128 channels");
static_assert(ROW_BLOCKS == 1 && N_WARPGROUPS * PANEL_ROWS % HEAD_DIM == 0, "whole heads in a tile");

constexpr int TILE_HEADS = N_WARPGROUPS * PANEL_ROWS / HEAD_DIM;
constexpr int HEADS_PITCH = N_WARPGROUPS * PANEL_ROWS * 2 + 16;  // bytes, of a token
static_assert(STORE_TOKENS * HEADS_PITCH <= STORE_BYTES, "the store's buffer holds them");

// codes  uint8 [n_tokens][heads][HEAD_DIM / 2], ranges  float16 pairs [n_tokens][heads], as in quantize_kv.cu
template <typename Out>
__device__ void store_heads(const Problem &p, const Corner &corner, int warpgroup, unsigned char *buffer,
                            const float *bias, unsigned char *codes, __half2 *ranges, float clip_ratio, float unit,
                            float (&total)[1][SUMS]) {
    using Element = typename Out::type;
    static_assert(sizeof(Element) == 2, "heads are made of float16 or bfloat16 sums");
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int panel = min(corner.panel + warpgroup, p.n_panels - 1), row = panel * PANEL_ROWS + warp * 16 + lane / 4;
    const float low_bias = bias[row], high_bias = bias[row + 8];
    const int n_heads = p.n_channels / HEAD_DIM;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) total[0][i] = fmaf(total[0][i], unit, i & 2 ? high_bias : low_bias);
#pragma unroll
    for (int part = 0; part < TILE_TOKENS / STORE_TOKENS; ++part) {
        join_threads(1, TEAM);  // the buffer is free
        const unsigned panel_address = shared_address(buffer) + (warpgroup * PANEL_ROWS + warp * 16) * 2;
#pragma unroll
        for (int j = 0; j < STORE_TOKENS / 8; ++j) {
            const float *x = &total[0][(part * STORE_TOKENS / 8 + j) * 4];
            store_transposed(panel_address + (8 * j + lane % 8) * HEADS_PITCH + lane / 8 % 2 * 16,
                             Out::pair(x[0], x[1]), Out::pair(x[2], x[3]));
        }
        join_threads(1, TEAM);
        for (int i = threadIdx.x; i < STORE_TOKENS * TILE_HEADS * LANES; i += TEAM) {  // whole warps
            const int first = i % LANES * CHANNELS, in_tile = i / LANES % TILE_HEADS, token = i / LANES / TILE_HEADS;
            const int m = corner.token + part * STORE_TOKENS + token;
            const int head = corner.panel * PANEL_ROWS / HEAD_DIM + in_tile;
            const auto *from = reinterpret_cast<const Vector<Element, 8> *>(buffer + token * HEADS_PITCH +
                                                                            (in_tile * HEAD_DIM + first) * 2);
            float values[CHANNELS];
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) values[k] = static_cast<float>(from[k / 8].items[k % 8]);
            if (HEAD_HADAMARD) transform_head(values);
            const __half2 range = find_range(values, first, clip_ratio);
            if (m >= p.n_tokens || head >= n_heads) continue;
            const size_t place = static_cast<size_t>(m) * n_heads + head;
            if (first == 0) ranges[place] = range;
            store_codes<8>(values, first, range, codes + place * (HEAD_DIM / 2) + first / 2);
        }
    }
}
