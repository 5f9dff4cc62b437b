// kv_append: K and V of new tokens into the pages of the cache (kv_pages.cuh), for prefill and decode alike. Per token
// and head, in float32:
//
//   K:  k = k / sqrt(mean k^2 + epsilon) * norm_weight    with norm_weight
//       k = k - key_offset                                before RoPE with key_offset
//       k = k * cos + rotate_half(k) * sin                KEY_AFTER_ROPE, by the token's row of `rotary`
//       k = (k - key_offset[row]) / key_scale             KEY_AFTER_ROPE with key_scale; row: see offset_row
//   both: x = x H                                         KEY_HADAMARD, VALUE_HADAMARD: as in quantize_kv.cu
//       low, high = clip * min x, clip * max x;  scale = F16((high - low) / (2^BITS - 1)), 1 where zero;
//       minimum = F16(low);  code = clamp(rint((x - minimum) / scale), 0, 2^BITS - 1)
//       BITS 16: code = F16(x), and no ranges
//
//   keys, values  ELEMENT [n_tokens, n_heads, HEAD_DIM], token_stride elements between tokens
//   pages         see kv_pages.cuh;  page_table int32 [rows, table_stride]: the pages of a sequence, in order
//   rows          int32 [n_tokens]: the sequence of each token;  positions int32 [n_tokens]: its place there; tokens
//                 of a negative position are left out
//   rotary        float32 [positions, HEAD_DIM / 2, 2]: cosine, sine (may be null before RoPE)
//   norm_weight   float32 [HEAD_DIM] or null;  key_scale float32 [n_heads, HEAD_DIM] or null
//   key_offset    float32 [n_heads, HEAD_DIM], after RoPE [n_offset_rows, n_heads, HEAD_DIM], or null
//
// Bit for bit the torch twin's pages without norm_weight, whose sum rounds in its own way. Words that tokens share
// (V: two tokens) are written by halves, never read.
//
//   launch: block 128, grid ceil(2 * n_tokens * n_heads / 4): a warp makes one head of K or of V

#if !defined(ELEMENT) || !defined(KEY_AFTER_ROPE) || !defined(KEY_HADAMARD) || !defined(VALUE_HADAMARD)
#error "kv_append.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grid_order.cuh"
#include "head_shared.cuh"
#include "int_codes.cuh"
#include "kv_pages.cuh"

namespace {

constexpr int WARPS = 4;
constexpr float LARGEST_CODE = BITS < 16 ? (1 << BITS) - 1 : 0;
constexpr float F16_LARGEST = 65504.0f;

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

__device__ __forceinline__ unsigned code_of(float x, float minimum, float scale, float inverse) {
    if (BITS == 16) return __half_as_ushort(__float2half_rn(ieee::clamp(x, -F16_LARGEST, F16_LARGEST)));
    const float above = ieee::sub(x, minimum);  // an F16 scale is 2^-24 at least
    const float ratio = BITS == 4 ? quotient(above, scale, inverse) : ieee::div(above, scale);
    return static_cast<unsigned>(ieee::rint(ieee::clamp(ratio, 0.0f, LARGEST_CODE)));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS)
kv_append(const ELEMENT* __restrict__ keys, const ELEMENT* __restrict__ values, unsigned* __restrict__ pages,
          const int* __restrict__ page_table, const int* __restrict__ rows, const int* __restrict__ positions,
          const float2* __restrict__ rotary, const float* __restrict__ norm_weight,
          const float* __restrict__ key_offset, const float* __restrict__ key_scale, int n_tokens, int n_heads,
          int token_stride, int table_stride, int n_offset_rows, float epsilon, float clip_ratio) {
    __shared__ float heads[WARPS][STORED_DIM];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int item = blockIdx.x * WARPS + warp;
    const int token = item / (2 * n_heads), head = item / 2 % n_heads;
    const bool is_key = item % 2 == 0;
    float* x = heads[warp];
    // Everything is asked for as early as its address is known: each of these reads may have to go to memory, and one after
    // the other they took longer than all the rest.
    float scales[LANE_PARTS], offsets[LANE_PARTS];
    if (is_key && key_scale != nullptr) load_lane_head(key_scale + head * HEAD_DIM, scales);
    let_next_grid_begin();
    wait_for_earlier_grids();
    if (token >= n_tokens) return;
    const int position = positions[token], row = rows[token];
    const ELEMENT* source = (is_key ? keys : values) + static_cast<long long>(token) * token_stride + head * HEAD_DIM;
    ELEMENT items[LANE_PARTS];
#pragma unroll
    for (int k = 0; k < LANE_PARTS; ++k) {
        if (lane + 32 * k < HEAD_DIM) items[k] = source[lane + 32 * k];
    }
    if (position < 0) return;
    const int page = page_table[row * table_stride + position / PAGE_TOKENS];
    float2 turns[PAIR_PARTS];
    if (is_key && KEY_AFTER_ROPE) load_turns(rotary + static_cast<long long>(position) * (HEAD_DIM / 2), turns);
    if (is_key && key_offset != nullptr) {
        const int offset = KEY_AFTER_ROPE ? offset_row(position, n_offset_rows) * n_heads + head : head;
        load_lane_head(key_offset + offset * HEAD_DIM, offsets);
    }

#pragma unroll
    for (int k = 0; k < (STORED_DIM + 31) / 32; ++k) {
        const int i = lane + 32 * k;
        if (i < STORED_DIM) x[i] = i < HEAD_DIM ? static_cast<float>(items[min(k, LANE_PARTS - 1)]) : 0.0f;
    }
    __syncwarp();
    if (is_key && norm_weight != nullptr) norm_head(x, norm_weight, epsilon);
    if (is_key && KEY_AFTER_ROPE) rotate_head(x, turns);
    if (is_key && key_offset != nullptr) {
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) {
            const int i = lane + 32 * k;
            if (i >= HEAD_DIM) continue;
            x[i] = ieee::sub(x[i], offsets[k]);
            if (KEY_AFTER_ROPE) x[i] = ieee::div(x[i], scales[k]);
        }
        __syncwarp();
    }
    if (is_key ? KEY_HADAMARD : VALUE_HADAMARD) transform_shared_head(x);

    float minimum = 0.0f, scale = 1.0f;
    __half2 range = {};
    if (BITS < 16) {
        float low = -F16_LARGEST * F16_LARGEST, high = low;  // of -x and of x
        for (int i = lane; i < HEAD_DIM; i += 32) {
            low = fmaxf(low, -x[i]);
            high = fmaxf(high, x[i]);
        }
        low = ieee::mul(-largest_of_warp(low), clip_ratio);
        high = ieee::mul(largest_of_warp(high), clip_ratio);
        const float span = ieee::div(ieee::sub(high, low), LARGEST_CODE);
        range = __floats2half2_rn(fminf(span, F16_LARGEST), ieee::clamp(low, -F16_LARGEST, F16_LARGEST));
        if (__low2float(range) == 0.0f) range.x = __float2half_rn(1.0f);
        scale = __low2float(range);
        minimum = __high2float(range);
    }

    const float inverse = ieee::reciprocal(scale);
    const int place = position % PAGE_TOKENS;
    unsigned* target = pages + (static_cast<long long>(page) * n_heads + head) * PAGE_WORDS;
    if (BITS < 16 && lane == 0) {
        reinterpret_cast<__half2*>(target + 2 * SIDE_WORDS)[2 * place + (is_key ? 0 : 1)] = range;
    }
    if (is_key) {
        for (int i = lane; i < 4 * CHUNK_WORDS; i += 32) {
            const int t = i / CHUNK_WORDS, word = i % CHUNK_WORDS;
            unsigned packed = 0;
#pragma unroll
            for (int e = 0; e < SLOTS_PER_WORD; ++e) {
                const int slot = word * SLOTS_PER_WORD + e, half = slot / (SLOTS / 2);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int channel = key_channel(half, t * SLOTS + slot % (SLOTS / 2) * 2 + j);
                    const unsigned code = channel < 0 ? 0u : code_of(x[channel], minimum, scale, inverse);
                    packed |= code << (BITS * e + 16 * j);
                }
            }
            target[chunk_word(place * 4 + t, word)] = packed;
        }
    } else {
        unsigned short* halves = reinterpret_cast<unsigned short*>(target + SIDE_WORDS);
        for (int i = lane; i < 8 * CHUNK_WORDS; i += 32) {
            const int g = i / CHUNK_WORDS, word = i % CHUNK_WORDS;
            unsigned packed = 0;
#pragma unroll
            for (int e = 0; e < SLOTS_PER_WORD; ++e) {
                const int channel = g * SLOTS + word * SLOTS_PER_WORD + e;
                const unsigned code = channel < HEAD_DIM ? code_of(x[channel], minimum, scale, inverse) : 0u;
                packed |= code << (BITS * e);
            }
            const int chunk = place / 8 * 32 + g * 4 + place % 8 / 2;
            halves[2 * chunk_word(chunk, word) + place % 2] = static_cast<unsigned short>(packed);
        }
    }
}
