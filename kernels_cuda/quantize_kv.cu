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

    float low = __int_as_float(0x7f800000), high = -low;  // infinity
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        if (first + i >= HEAD_DIM) continue;
        low = fminf(low, values[i]);
        high = fmaxf(high, values[i]);
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        low = fminf(low, __shfl_xor_sync(ALL_LANES, low, step));
        high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, step));
    }
    low = ieee::mul(low, clip_ratio);
    high = ieee::mul(high, clip_ratio);
    constexpr float F16_LARGEST = 65504.0f;
    const float span = divide_by<15>(ieee::sub(high, low));
    __half2 range = __floats2half2_rn(fminf(span, F16_LARGEST), ieee::clamp(low, -F16_LARGEST, F16_LARGEST));
    if (__low2float(range) == 0.0f) range.x = __float2half_rn(1.0f);
    const float scale = __low2float(range), minimum = __high2float(range), inverse = ieee::reciprocal(scale);
    if (!exists) return;
    if (lane == 0) ranges[head] = range;

    // Eight codes a word. Each still has ROUNDER's bits above its own; they add up to a constant.
    constexpr unsigned ROUNDERS = 0x4b400000u * 0x11111111u;
    constexpr int ROW_BYTES = (HEAD_DIM + 1) / 2;
    unsigned char* row = codes + static_cast<long long>(head) * ROW_BYTES + first / 2;
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i += STORE_WIDTH) {
        Vector<unsigned, (STORE_WIDTH + 3) / 4> words;
#pragma unroll
        for (int w = 0; w < (STORE_WIDTH + 3) / 4; ++w) {
            unsigned sum = 0;
#pragma unroll
            for (int j = min(8, 2 * STORE_WIDTH) - 1; j >= 0; --j) {
                const int channel = 2 * i + 8 * w + j;
                const float ratio = quotient(ieee::sub(values[channel], minimum), scale, inverse);
                const float code = ieee::add(ieee::clamp(ratio, 0.0f, 15.0f), ROUNDER);
                sum = (sum << 4) + __float_as_uint(first + channel < HEAD_DIM ? code : ROUNDER);
            }
            words.items[w] = sum - ROUNDERS;
        }
        if (first / 2 + i < ROW_BYTES) {
            using Bytes = Vector<unsigned char, STORE_WIDTH>;
            *reinterpret_cast<Bytes*>(row + i) = reinterpret_cast<const Bytes&>(words);
        }
    }
}
