// rows: RMSNorm, or SiLU(gate) * up, of each row, for products that are not W4A4: rounded to ELEMENT, or coded in INT8 with
// a scale per row. In float32.
//
//   ADDS     1: x = ELEMENT(x + delta), which goes to `total`, too; not with PROLOGUE 2
//   PROLOGUE 0: y = x    1: y = x / sqrt(mean x^2 + epsilon) * weight    2: y = SiLU(x[:K]) * x[K:]
//   QUANTIZE 0: output ELEMENT [n_rows, K] = y
//            1: output int8 [n_rows, K], scales float32 [n_rows]: scale = max|y| / 127, 1 where zero; code = rint(y / scale)
//
//   input         ELEMENT [n_rows, K or 2 K], input_stride elements between rows
//   delta, total  ELEMENT [n_rows, K] or null;  weight  float32 [K] or null
//   K a multiple of LOAD_WIDTH, and all rows aligned to it; codes as the quotient's for scales from 2^-100 on
//
// A thread holds VECTORS vectors of LOAD_WIDTH channels, so a row is read once.
//
//   launch: grid n_rows, block THREADS, whole warps, of which VECTORS * THREADS * LOAD_WIDTH are K or more

#if !defined(ELEMENT) || !defined(PROLOGUE) || !defined(QUANTIZE) || !defined(ADDS) || !defined(LOAD_WIDTH) || \
    !defined(VECTORS) || !defined(THREADS)
#error "rows.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grid_order.cuh"
#include "int_codes.cuh"

static_assert(!ADDS || PROLOGUE != 2, "SiLU takes its input as it is");

namespace {

using Items = Vector<ELEMENT, LOAD_WIDTH>;
using Values = float[VECTORS][LOAD_WIDTH];

struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// Once for each Join, which has shared memory of its own.
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
    return x;
}

// What the thread has of `row`, in vectors.
template <typename Item>
__device__ __forceinline__ void load(const void* row, int n_vectors, Item (&items)[VECTORS]) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = i * THREADS + threadIdx.x;
        items[i] = {};
        if (vector < n_vectors) items[i] = static_cast<const Item*>(row)[vector];
    }
}

template <typename Item>
__device__ __forceinline__ void store(void* row, int n_vectors, const Item (&items)[VECTORS]) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = i * THREADS + threadIdx.x;
        if (vector < n_vectors) static_cast<Item*>(row)[vector] = items[i];
    }
}

template <typename Function>
__device__ __forceinline__ void for_each(Function function) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
        for (int j = 0; j < LOAD_WIDTH; ++j) function(i, j);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
rows(const ELEMENT* __restrict__ input, const ELEMENT* __restrict__ delta, ELEMENT* __restrict__ total,
     const float* __restrict__ weight, void* __restrict__ output, float* __restrict__ scales, int n_channels,
     int input_stride, float epsilon) {
    const ELEMENT* row = input + static_cast<long long>(blockIdx.x) * input_stride;
    const long long target = static_cast<long long>(blockIdx.x) * n_channels;
    const int n_vectors = n_channels / LOAD_WIDTH;
    Vector<float, LOAD_WIDTH> factors[VECTORS];
    if (PROLOGUE == 1) load(weight, n_vectors, factors);
    let_next_grid_begin();
    wait_for_earlier_grids();

    Items items[VECTORS], others[VECTORS];
    load(row, n_vectors, items);
    if (PROLOGUE == 2) load(row + n_channels, n_vectors, others);
    if (ADDS) load(delta + target, n_vectors, others);
    Values values;
    for_each([&](int i, int j) {
        float& x = values[i][j];
        x = static_cast<float>(items[i].items[j]);
        const float other = PROLOGUE == 2 || ADDS ? static_cast<float>(others[i].items[j]) : 0.0f;
        if (PROLOGUE == 2) x = __fdividef(x, 1.0f + expf(-x)) * other;
        if (ADDS) {
            items[i].items[j] = static_cast<ELEMENT>(ieee::add(x, other));
            x = static_cast<float>(items[i].items[j]);
        }
    });
    if (ADDS) store(total + target, n_vectors, items);
    if (PROLOGUE == 1) {
        float square = 0.0f;
        for_each([&](int i, int j) { square += values[i][j] * values[i][j]; });
        const float inverse = ieee::reciprocal(sqrtf(over_row(square, Sum()) / n_channels + epsilon));
        for_each([&](int i, int j) { values[i][j] = values[i][j] * inverse * factors[i].items[j]; });
    }
    if (QUANTIZE) {
        float largest = 0.0f;
        for_each([&](int i, int j) { largest = ieee::max_magnitude(largest, values[i][j]); });
        largest = over_row(largest, Larger());
        const float scale = largest > 0.0f ? divide_by<127>(largest) : 1.0f, inverse = ieee::reciprocal(scale);
        if (threadIdx.x == 0) scales[blockIdx.x] = scale;
        Vector<signed char, LOAD_WIDTH> codes[VECTORS];
        for_each([&](int i, int j) {
            const float code = ieee::add(quotient(values[i][j], scale, inverse), ROUNDER);
            codes[i].items[j] = static_cast<signed char>(__float_as_int(code));  // 127 at most, as the scale is
        });
        store(static_cast<signed char*>(output) + target, n_vectors, codes);
    } else {
        for_each([&](int i, int j) { items[i].items[j] = static_cast<ELEMENT>(values[i][j]); });
        store(static_cast<ELEMENT*>(output) + target, n_vectors, items);
    }
}
