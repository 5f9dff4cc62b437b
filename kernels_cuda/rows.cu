// rows: RMSNorm, or SiLU(gate) * up, of each row, for products that are not W4A4: rounded to ELEMENT, or coded in INT8 with
// a scale per row. In float32.
//
//   PROLOGUE 0: y = x    1: y = x / sqrt(mean x^2 + epsilon) * weight    2: y = SiLU(x[:K]) * x[K:]
//   QUANTIZE 0: output ELEMENT [n_rows, K] = y
//            1: output int8 [n_rows, K], scales float32 [n_rows]: scale = max|y| / 127, 1 where zero; code = rint(y / scale)
//
//   input   ELEMENT [n_rows, K or 2 K], input_stride elements between rows; weight float32 [K] or null
//   K even; rows of input and output aligned to two elements
//
//   launch: grid n_rows, block 256

#if !defined(ELEMENT) || !defined(PROLOGUE) || !defined(QUANTIZE)
#error "rows.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "int_codes.cuh"

namespace {

constexpr int THREADS = 256;

struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

template <typename Join>
__device__ __forceinline__ float over_row(float x, Join join) {
    __shared__ float partial[THREADS / 32];
#pragma unroll
    for (int step = 16; step; step /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, step));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = partial[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; ++warp) x = join(x, partial[warp]);
    __syncthreads();
    return x;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
rows(const ELEMENT* __restrict__ input, const float* __restrict__ weight, void* __restrict__ output,
     float* __restrict__ scales, int n_channels, int input_stride, float epsilon) {
    using Pair = Vector<ELEMENT, 2>;
    const ELEMENT* row = input + static_cast<long long>(blockIdx.x) * input_stride;
    const long long target = static_cast<long long>(blockIdx.x) * n_channels;
    const int n_pairs = n_channels / 2;

    const auto value = [&](int pair, int i) {
        const float x = static_cast<float>(reinterpret_cast<const Pair*>(row)[pair].items[i]);
        if (PROLOGUE != 2) return x;
        const float up = static_cast<float>(reinterpret_cast<const Pair*>(row + n_channels)[pair].items[i]);
        return __fdividef(x, 1.0f + expf(-x)) * up;
    };
    float inverse = 1.0f;
    if (PROLOGUE == 1) {
        float square = 0.0f;
        for (int pair = threadIdx.x; pair < n_pairs; pair += THREADS) {
            const float x = value(pair, 0), y = value(pair, 1);
            square += x * x + y * y;
        }
        inverse = ieee::reciprocal(sqrtf(over_row(square, Sum()) / n_channels + epsilon));
    }
    const auto prepared = [&](int pair, int i) {
        const float x = value(pair, i);
        return PROLOGUE == 1 ? x * inverse * weight[2 * pair + i] : x;
    };
    float scale = 1.0f;
    if (QUANTIZE) {
        float largest = 0.0f;
        for (int pair = threadIdx.x; pair < n_pairs; pair += THREADS) {
            largest = fmaxf(largest, fmaxf(fabsf(prepared(pair, 0)), fabsf(prepared(pair, 1))));
        }
        largest = over_row(largest, Larger());
        scale = largest > 0.0f ? ieee::div(largest, 127.0f) : 1.0f;
        if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    }
    for (int pair = threadIdx.x; pair < n_pairs; pair += THREADS) {
        const float x = prepared(pair, 0), y = prepared(pair, 1);
        if (QUANTIZE) {
            const float low = ieee::rint(ieee::clamp(ieee::div(x, scale), -127.0f, 127.0f));
            const float high = ieee::rint(ieee::clamp(ieee::div(y, scale), -127.0f, 127.0f));
            const Vector<signed char, 2> codes = {static_cast<signed char>(low), static_cast<signed char>(high)};
            reinterpret_cast<Vector<signed char, 2>*>(static_cast<signed char*>(output) + target)[pair] = codes;
        } else {
            const Pair rounded = {static_cast<ELEMENT>(x), static_cast<ELEMENT>(y)};
            reinterpret_cast<Pair*>(static_cast<ELEMENT*>(output) + target)[pair] = rounded;
        }
    }
}
