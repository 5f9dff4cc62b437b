// quantize_kv: heads of K or V to INT4 codes with a scale and a minimum per token and head. Per head, in float32:
//
//   x = x H                                HADAMARD: in blocks of the largest power of two that divides HEAD_DIM
//   low, high = clip * min x, clip * max x
//   scale = F16((high - low) / 15), 1 where that is zero;  minimum = F16(low)   (F16 saturates at 65504)
//   code = clamp(rint((x - minimum) / scale), 0, 15)
//
//   input   ELEMENT [n_tokens, n_heads, HEAD_DIM], token_stride and head_stride elements apart; heads aligned to
//           LOAD_WIDTH elements
//   codes   uint8 [n_tokens, n_heads, ceil(HEAD_DIM / 2)]: channel 2i in the low nibble of byte i, channel 2i+1 in
//           the high one, which is 0 after an odd HEAD_DIM; aligned to STORE_WIDTH bytes
//   ranges  float16 [n_tokens, n_heads, 2]: scale, minimum; 4-byte aligned
//
// Any HEAD_DIM. Codes and ranges are bit for bit those of the torch twin. A head lies in LANES lanes, CHANNELS each.
//
//   launch: block THREADS, grid ceil(n_tokens * n_heads / (THREADS / LANES))

#if !defined(ELEMENT) || !defined(HEAD_DIM) || !defined(HADAMARD) || !defined(LOAD_WIDTH) || \
    !defined(STORE_WIDTH) || !defined(THREADS)
#error "quantize_kv.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "head_lanes.cuh"

static_assert(THREADS % 32 == 0, "whole warps");

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_kv(const ELEMENT* __restrict__ input, unsigned char* __restrict__ codes, __half2* __restrict__ ranges,
            int n_tokens, int n_heads, int token_stride, int head_stride, float clip_ratio) {
    const int lane = threadIdx.x % LANES;
    const int head = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;  // among all tokens' heads
    const bool exists = head < n_tokens * n_heads;
    const int first = lane * CHANNELS;

    float values[CHANNELS] = {};
    if (exists) {
        const int token = n_tokens == 1 ? 0 : head / n_heads;
        const ELEMENT* source = input + static_cast<long long>(token) * token_stride +
                                static_cast<long long>(head - token * n_heads) * head_stride;
#pragma unroll
        for (int i = 0; i < CHANNELS; i += LOAD_WIDTH) {
            if (first + i >= HEAD_DIM) continue;
            const auto loaded = *reinterpret_cast<const Vector<ELEMENT, LOAD_WIDTH>*>(source + first + i);
#pragma unroll
            for (int j = 0; j < LOAD_WIDTH; ++j) values[i + j] = static_cast<float>(loaded.items[j]);
        }
    }
    if (HADAMARD) transform_head(values);

    const __half2 range = find_range(values, first, clip_ratio);
    if (!exists) return;
    if (lane == 0) ranges[head] = range;
    constexpr int ROW_BYTES = (HEAD_DIM + 1) / 2;
    store_codes<STORE_WIDTH>(values, first, range, codes + static_cast<long long>(head) * ROW_BYTES + first / 2);
}
