// The K side of kv_attention.cu: codes of a chunk (kv_pages.cuh) as operands of mma, K rebuilt from them where it was
// coded before RoPE, and the queries that meet them.
#pragma once

#include "head_shared.cuh"
#include "kv_mma.cuh"
#include "kv_pages.cuh"

constexpr int HEAD_TILES = (GROUP + 7) / 8;
constexpr int QUERY_STRIDE = STORED_DIM + 8;  // words, so that eight heads lie on different banks
// Pages whose scores lie in columns of their own: K before RoPE meets queries turned for its page, and those of the next
// pages are turned with them, in columns of mma that no other query takes.
constexpr int TOGETHER = KEY_MODE && (GROUP == 1 || GROUP == 2 || GROUP == 4) ? 8 / GROUP : 1;
constexpr int QUERY_ROWS = TOGETHER > 1 ? GROUP : HEAD_TILES * 8;
constexpr int LANE_COLUMNS = GROUP == 1 ? 1 : 2;  // columns of mma that a lane looks at
// KEY_MODE 2 rebuilds K over KEY_UNIT, so that the transform's factors are powers of two: a half holds them.
constexpr float KEY_UNIT = KEY_MODE == 2 && HEAD_DIM == 128 ? 1.41421356f : 1.0f;
constexpr float SCALE_UNIT = KEY_MODE != 2 ? 1.0f : HEAD_DIM == 64 ? 64.0f : 32.0f;  // 512 / sqrt(HEAD_DIM) / KEY_UNIT
constexpr float SPIKE_UNIT = HEAD_DIM == 256 ? 8.0f : 4.0f;  // sqrt(HEAD_DIM) / 2 / KEY_UNIT

using Words = unsigned[CHUNK_WORDS];

__device__ __forceinline__ __half2 as_half2(unsigned word) { return reinterpret_cast<const __half2&>(word); }
__device__ __forceinline__ unsigned as_word(__half2 pair) { return reinterpret_cast<const unsigned&>(pair); }

// How much more than a code * 2^-24 the masked nibble stands for.
__device__ constexpr float slot_unit(int slot) { return BITS == 4 && slot % 2 ? 16.0f : 1.0f; }
constexpr float CODE_UNIT = BITS < 16 ? 16777216.0f : 1.0f;

// Both codes of a slot as subnormal halves (BITS 16: as they are).
__device__ __forceinline__ unsigned subnormal_codes(const Words& words, int slot) {
    const unsigned word = words[slot / SLOTS_PER_WORD];
    if (BITS == 16) return word;
    if (BITS == 8) return slot % 2 ? __byte_perm(word, 0, 0x4341) : word & 0x00ff00ffu;
    return (word >> (slot % 4 / 2 * 8)) & (slot % 2 ? 0x00f000f0u : 0x000f000fu);
}

// Both codes of a slot as halves of their value: placed below the exponent of a power of two, which is subtracted.
__device__ __forceinline__ __half2 exact_codes(const Words& words, int slot) {
    const unsigned base = BITS == 4 && slot % 2 ? 0x54005400u : 0x64006400u;  // 64 or 1024
    return __hsub2(as_half2(subnormal_codes(words, slot) | base), as_half2(base));
}

__device__ __forceinline__ void load_chunk(unsigned address, Words& words) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        read_shared<PLANE_WORDS>(address + plane * 32 * PLANE_WORDS * 4, words + plane * PLANE_WORDS);
    }
}

// The transform by mma in blocks of 16 channels, the rest by butterflies. Its B operand takes codes as subnormals, times
// +-2^15 over the slot's unit.
struct Hadamard16 {
    unsigned b[2][2];  // of the block's slots: out, in

    __device__ Hadamard16(int g, int t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int in = i % 2, out = i / 2, parity = __popc(t & (g / 2)) + __popc(in & out);
            const unsigned size = in ? 0x6800u : 0x7800u;
            b[out][in] = kept((size | parity % 2 << 15) | (size | (parity + g % 2) % 2 << 15) << 16);
        }
    }

    __device__ void multiply(const Words (&words)[2], __half2 (&keys)[2][SLOTS]) const {
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot += 2) {
            const unsigned a[4] = {subnormal_codes(words[0], slot), subnormal_codes(words[1], slot),
                                   subnormal_codes(words[0], slot + 1), subnormal_codes(words[1], slot + 1)};
#pragma unroll
            for (int out = 0; out < 2; ++out) {
                unsigned sums[2] = {};
                mma_float16_sums(sums, a, b[out][0], b[out][1]);
                keys[0][slot + out] = as_half2(sums[0]);
                keys[1][slot + out] = as_half2(sums[1]);
            }
        }
#pragma unroll
        for (int step = 2; step < SLOTS / 2; step *= 2) {  // the last one, of the head's halves, is left to the turns
#pragma unroll
            for (int i = 0; i < 2 * SLOTS; ++i) {
                if (i / 2 & step) continue;
                const __half2 low = keys[i % 2][i / 2], high = keys[i % 2][i / 2 + step];
                keys[i % 2][i / 2] = __hadd2(low, high);
                keys[i % 2][i / 2 + step] = __hsub2(low, high);
            }
        }
    }
};

// K from codes: scale and minimum, the static offset, and the turn of each token by its place in the page.
//
// KEY_MODE 2 has the transforms a and b of the halves' codes: K's halves are a + b and a - b. With c = cos - sin and
// s = cos + sin their turn is (a c + b s, a s - b c), which is the turn of (a, -b) by c and s; so `turns` holds those, and
// scale, minimum and offset make a and -b. The transform of a constant is a spike in its first channel: `spike_unit`
// times the minimum. Codes under the transform are 2^-9 * their sums.
//
// Rounding, to halves: a KEY_MODE 2 channel once for scale and offset, the spike once more, each turned channel twice (one
// product, one fma); sums of codes, scale times its unit and the spike itself are exact.
__device__ __forceinline__ void rebuild(__half2 (&keys)[2][SLOTS], const unsigned (&ranges)[2], __half2 spike_unit,
                                        unsigned offsets, unsigned turns) {
    unsigned offset_words[4];
    const __half2 scale_unit = __float2half2_rn(SCALE_UNIT);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const __half2 range = as_half2(ranges[i]), minimum = __high2half2(range), spike = __hmul2_rn(minimum, spike_unit);
        const __half2 scale = KEY_MODE == 2 ? __hmul2_rn(__low2half2(range), scale_unit) : __low2half2(range);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            __half2& key = keys[i][slot];
            if (KEY_OFFSET && slot % 4 == 0) read_shared<4>(offsets + slot * 16, offset_words);
            const __half2 offset = KEY_OFFSET ? as_half2(offset_words[slot % 4]) : __float2half2_rn(0.0f);
            const __half2 factor = slot < SLOTS / 2 ? scale : __hneg2(scale);
            if (KEY_MODE == 1) key = __hfma2(key, scale, minimum);
            if (KEY_MODE == 1 && KEY_OFFSET) key = __hadd2(key, offset);
            if (KEY_MODE == 2) key = KEY_OFFSET ? __hfma2(key, factor, offset) : __hmul2(key, factor);
            if (KEY_MODE == 2 && slot == 0) key = __hadd2(key, spike);
            if (KEY_MODE == 2 && slot == SLOTS / 2) key = __hsub2(key, spike);
        }
#pragma unroll
        for (int pair = 0; pair < SLOTS / 4; ++pair) {
            unsigned turn[4];
            read_shared<4>(turns + (pair * PAGE_TOKENS + 8 * i) * 64, turn);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const __half2 cosine = as_half2(turn[2 * j]), sine = as_half2(turn[2 * j + 1]);
                __half2 &low = keys[i][2 * pair + j], &high = keys[i][2 * pair + j + SLOTS / 2];
                const __half2 turned = __hfma2(__hneg2(high), sine, __hmul2(low, cosine));
                high = __hfma2(low, sine, __hmul2(high, cosine));
                low = turned;
            }
        }
    }
}

// A slot of a half and its partner in the other as halves of mma's B operand, lane (g, t): head g's channels of t. TURNED:
// turned by `turns`, else as they are, over the slots' units.
template <bool TURNED>
__device__ __forceinline__ void head_slot(const float* head, const float2* turns, int slot, int t, unsigned& low_pair,
                                          unsigned& high_pair) {
    float low[2], high[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int channel = key_channel(0, t * SLOTS + 2 * slot + j);
        const float2 turn = TURNED ? turns[channel < 0 ? 0 : channel] : float2{};
        const float x = channel < 0 ? 0.0f : head[channel];
        const float y = channel < 0 ? 0.0f : head[channel + HEAD_DIM / 2];
        low[j] = TURNED ? x * turn.x - y * turn.y : x / slot_unit(slot);
        high[j] = TURNED ? y * turn.x + x * turn.y : y / slot_unit(slot);
    }
    low_pair = as_word(__floats2half2_rn(low[0], low[1]));
    high_pair = as_word(__floats2half2_rn(high[0], high[1]));
}

// The head whose channels a lane gives to mma's column g.
__device__ __forceinline__ const float* head_of(const float* heads, int tile, int g) {
    return heads + (TOGETHER > 1 ? g % GROUP : tile * 8 + g) * QUERY_STRIDE;
}

template <bool TURNED>
__device__ __forceinline__ void query_operand(const float* queries, const float2* turns, int g, int t,
                                              unsigned (&operand)[HEAD_TILES][SLOTS]) {
#pragma unroll
    for (int slot = 0; slot < SLOTS / 2; ++slot) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            unsigned(&own)[SLOTS] = operand[tile];
            head_slot<TURNED>(head_of(queries, tile, g), turns, slot, t, own[slot], own[slot + SLOTS / 2]);
        }
    }
}

// Sum of a head's channels as `query_operand` rounded them, times `unit`, for the lane's heads 2 t and 2 t + 1 of each tile.
__device__ __forceinline__ void query_sums(const unsigned (&operand)[HEAD_TILES][SLOTS], int t, float unit,
                                           float (&sums)[HEAD_TILES][2]) {
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        float sum = 0.0f;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const float2 pair = __half22float2(as_half2(operand[tile][slot]));
            sum += (pair.x + pair.y) * slot_unit(slot);
        }
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
#pragma unroll
        for (int j = 0; j < 2; ++j) sums[tile][j] = __shfl_sync(ALL_LANES, sum * unit, (2 * t + j) * 4);
    }
}

// What an offset o of K after RoPE adds to the scores of the lane's columns more than the offset p, times `unit`: q . (o - p). The
// queries lie in shared memory as they meet the codes, times the scales and under the Hadamard, so o - p goes over the
// scales and under it, too.
__device__ __forceinline__ void offset_scores(const float* queries, const float* offset, const float* first_offset,
                                              const float* scale, int t, float unit,
                                              float (&scores)[HEAD_TILES][LANE_COLUMNS]) {
    const int lane = threadIdx.x % 32;
    float x[LANE_PARTS];
#pragma unroll
    for (int k = 0; k < LANE_PARTS; ++k) {
        const int channel = lane + 32 * k;
        x[k] = channel < HEAD_DIM ? (offset[channel] - first_offset[channel]) / scale[channel] : 0.0f;
    }
    if (KEY_HADAMARD) transform_lane_head(x);
#pragma unroll
    for (int i = 0; i < HEAD_TILES * LANE_COLUMNS; ++i) scores[i / LANE_COLUMNS][i % LANE_COLUMNS] = 0.0f;
#pragma unroll 4
    for (int head = 0; head < GROUP; ++head) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) {
            if (lane + 32 * k < HEAD_DIM) sum += queries[head * QUERY_STRIDE + lane + 32 * k] * x[k];
        }
        sum = sum_of_warp(sum) * unit;
#pragma unroll
        for (int i = 0; i < HEAD_TILES * LANE_COLUMNS; ++i) {
            const int tile = i / LANE_COLUMNS, j = i % LANE_COLUMNS;
            if (tile * 8 + 2 * t + j == head) scores[tile][j] = sum;
        }
    }
}
