// dequantize_kv: what quantize_kv.cu wrote, back to heads: value = code * scale + minimum in float32 (two
// roundings), with HADAMARD transformed back (the transform is its own inverse), then rounded to ELEMENT.
//
//   codes   uint8 [n_heads, ceil(HEAD_DIM / 2)], low nibble first; aligned to LOAD_WIDTH bytes
//   ranges  float16 [n_heads, 2]: scale, minimum; 4-byte aligned
//   output  ELEMENT [n_heads, HEAD_DIM]; rows aligned to STORE_WIDTH elements. n_heads counts all tokens' heads
//
// Any HEAD_DIM. Bit for bit the torch twin's values. A head lies in LANES lanes, CHANNELS each.
//
//   launch: block THREADS, grid ceil(n_heads / (THREADS / LANES))

#if !defined(ELEMENT) || !defined(HEAD_DIM) || !defined(HADAMARD) || !defined(LOAD_WIDTH) || \
    !defined(STORE_WIDTH) || !defined(THREADS)
#error "dequantize_kv.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "head_lanes.cuh"

static_assert(THREADS % 32 == 0, "whole warps");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
dequantize_kv(const unsigned char* __restrict__ codes, const __half2* __restrict__ ranges,
              ELEMENT* __restrict__ output, int n_heads) {
    constexpr int ROW_BYTES = (HEAD_DIM + 1) / 2;
    const int first = threadIdx.x % LANES * CHANNELS;
    const int head = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const bool exists = head < n_heads;

    float values[CHANNELS] = {};
    if (exists) {
        const float2 range = __half22float2(ranges[head]);
        const unsigned char* row = codes + static_cast<long long>(head) * ROW_BYTES + first / 2;
#pragma unroll
        for (int i = 0; i < CHANNELS / 2; i += LOAD_WIDTH) {
            if (first / 2 + i >= ROW_BYTES) continue;
            const auto loaded = *reinterpret_cast<const Vector<unsigned char, LOAD_WIDTH>*>(row + i);
#pragma unroll
            for (int j = 0; j < 2 * LOAD_WIDTH; ++j) {
                // A small integer below the mantissa of 2^23 is that much above it: cheaper than a conversion.
                const unsigned code = loaded.items[j / 2] >> (4 * (j % 2)) & 15u;
                const float exact = ieee::sub(__uint_as_float(0x4b000000u | code), 8388608.0f);
                const float value = ieee::add(ieee::mul(exact, range.x), range.y);
                if (first + 2 * i + j < HEAD_DIM) values[2 * i + j] = value;
            }
        }
    }
    if (HADAMARD) transform_head(values);
    if (!exists) return;
    ELEMENT* target = output + static_cast<long long>(head) * HEAD_DIM + first;
#pragma unroll
    for (int i = 0; i < CHANNELS; i += STORE_WIDTH) {
        if (first + i >= HEAD_DIM) continue;
        Vector<ELEMENT, STORE_WIDTH> rounded;
#pragma unroll
        for (int j = 0; j < STORE_WIDTH; ++j) rounded.items[j] = static_cast<ELEMENT>(values[i + j]);
        *reinterpret_cast<Vector<ELEMENT, STORE_WIDTH>*>(target + i) = rounded;
    }
}
