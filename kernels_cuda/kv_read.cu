// kv_read: K after RoPE and V of cached tokens, as attention over a whole prompt reads them. Per token and head, in
// float32: x = code * scale + minimum; x = x H where it was coded so; before RoPE k = k + key_offset, turned; after it
// k = k * key_scale + key_offset[row].
//
//   pages, page_table, rows, positions, rotary, key_offset, key_scale   as in kv_append.cu; no position may be negative
//   keys, values   ELEMENT [n_tokens, n_heads, HEAD_DIM], contiguous
//
//   launch: block 128, grid ceil(2 * n_tokens * n_heads / 4): a warp makes one head of K or of V

#if !defined(ELEMENT) || !defined(KEY_AFTER_ROPE) || !defined(KEY_HADAMARD) || !defined(VALUE_HADAMARD)
#error "kv_read.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "head_shared.cuh"
#include "kv_pages.cuh"

namespace {

constexpr int WARPS = 4;

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS)
kv_read(const unsigned* __restrict__ pages, const int* __restrict__ page_table, const int* __restrict__ rows,
        const int* __restrict__ positions, const float2* __restrict__ rotary, const float* __restrict__ key_offset,
        const float* __restrict__ key_scale, ELEMENT* __restrict__ keys, ELEMENT* __restrict__ values, int n_tokens,
        int n_heads, int table_stride, int n_offset_rows) {
    __shared__ float heads[WARPS][HEAD_DIM];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int item = blockIdx.x * WARPS + warp;
    const int token = item / (2 * n_heads), head = item / 2 % n_heads;
    const bool is_key = item % 2 == 0;
    if (token >= n_tokens) return;
    const int position = positions[token], place = position % PAGE_TOKENS;
    const int page = page_table[rows[token] * table_stride + position / PAGE_TOKENS];
    const unsigned* source = pages + (static_cast<long long>(page) * n_heads + head) * PAGE_WORDS;
    float* x = heads[warp];

    float2 range = {};
    if (BITS < 16) {
        const __half2* ranges = reinterpret_cast<const __half2*>(source + 2 * SIDE_WORDS);
        range = __half22float2(ranges[2 * place + (is_key ? 0 : 1)]);
    }
    for (int i = lane; i < HEAD_DIM; i += 32) {
        const CodePlace at(is_key, place, i);
        const unsigned code = source[(is_key ? 0 : SIDE_WORDS) + at.word] >> at.bit;
        if (BITS == 16) {
            x[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(code)));
        } else {
            x[i] = ieee::add(ieee::mul(static_cast<float>(code & ((1u << BITS % 16) - 1)), range.x), range.y);
        }
    }
    __syncwarp();
    if (is_key ? KEY_HADAMARD : VALUE_HADAMARD) transform_shared_head(x);
    if (is_key && key_offset != nullptr) {
        const int row = KEY_AFTER_ROPE ? offset_row(position, n_offset_rows) : 0;
        const float* offset = key_offset + (row * n_heads + head) * HEAD_DIM;
        for (int i = lane; i < HEAD_DIM; i += 32) {
            x[i] = ieee::add(KEY_AFTER_ROPE ? ieee::mul(x[i], key_scale[head * HEAD_DIM + i]) : x[i], offset[i]);
        }
        __syncwarp();
    }
    if (is_key && !KEY_AFTER_ROPE) rotate_head(x, rotary + static_cast<long long>(position) * (HEAD_DIM / 2));
    ELEMENT* target = (is_key ? keys : values) + (static_cast<long long>(token) * n_heads + head) * HEAD_DIM;
    for (int i = lane; i < HEAD_DIM; i += 32) target[i] = static_cast<ELEMENT>(x[i]);
}
