// gptq_block: the inner loop of GPTQ (arXiv 2210.17323, algorithm 1) over one block of B columns.
//
//   for column j = 0 .. B-1, in every row:
//       value_j = dequantize(quantize(w_j / scale))
//       error_j = (w_j - value_j) / hinv_chol[j][j]
//       w_i     = w_i - error_j * hinv_chol[j][i]      for every i > j
//
//   weight     float32 [n_rows, n_columns], weight_stride elements between rows; not changed
//   scales     float32 [n_rows], normal and positive
//   zeros      float32 [n_rows], integers; null where the grid is symmetric and with a code book
//   hinv_chol  float32 [n_columns, n_columns], any two strides (LAPACK's factor is column-major); only the
//              diagonal and what lies above it are read
//   codes      int8 or uint8 (a byte) [n_rows, n_columns], contiguous
//   values     float32 [n_rows, n_columns], contiguous: what the codes stand for
//   errors     float32 [n_rows, n_columns], contiguous: for the caller's update of the later blocks
//
//   integer grid (CODEBOOK 0): code = clamp(rint(w / scale) + zero, q_min, q_max)
//                              value = (code - zero) * scale
//   code book (CODEBOOK 1):    index = number of midpoints strictly below w / scale (a tie: the smaller)
//                              value = book.values[index] * scale, code = book.codes[index]
//
// Every operation is rounded by itself (ieee.cuh), so codes, values and errors are bit for bit those of the
// torch twin. n_columns is 1 to 128, n_rows any; pointers need only their own type's alignment. Any arch.
//
// One warp holds one row at a time in registers, column c in lane c % 32, register c / 32; a CTA keeps the
// block of hinv_chol in shared memory: rows of 128 floats, zero below the diagonal and past n_columns.
//
//   launch: block = 32 * N_WARPS threads, any grid, 65536 bytes of dynamic shared memory

#include "ieee.cuh"

#ifndef CODEBOOK
#error "define CODEBOOK as 0 (integer grid) or 1 (code book)"
#endif
#ifndef N_WARPS
#error "define N_WARPS, the rows a CTA holds at a time"
#endif

constexpr int WARP = 32;
constexpr int MAX_COLUMNS = 128;
constexpr int SLOTS = MAX_COLUMNS / WARP;  // columns of a row in one lane
constexpr unsigned ALL_LANES = 0xffffffffu;

// A code book of up to 16 entries in ascending order; unused midpoints are +infinity.
struct CodeBook {
    float values[16];
    float midpoints[16];       // midpoints[i] lies between values[i] and values[i + 1]
    unsigned char codes[16];  // the code that stands for values[i]
};

struct Quantized {
    float value;
    int code;
};

__device__ __forceinline__ Quantized quantize(float weight, float scale, float zero, float q_min, float q_max,
                                              const CodeBook& book) {
    const float ratio = ieee::div(weight, scale);
#if CODEBOOK
    int index = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) index += book.midpoints[i] < ratio;
    return {ieee::mul(book.values[index], scale), book.codes[index]};
#else
    const float code = ieee::clamp(ieee::add(ieee::rint(ratio), zero), q_min, q_max);
    return {ieee::mul(ieee::sub(code, zero), scale), static_cast<int>(code)};
#endif
}

extern "C" __global__ void __launch_bounds__(WARP * N_WARPS)
gptq_block(const float* __restrict__ weight, int weight_stride, const float* __restrict__ scales,
           const float* __restrict__ zeros, const float* __restrict__ hinv_chol, int hinv_row_stride,
           int hinv_column_stride, unsigned char* __restrict__ codes, float* __restrict__ values,
           float* __restrict__ errors, int n_rows, int n_columns, float q_min, float q_max,
           const __grid_constant__ CodeBook book) {
    extern __shared__ float hinv[];  // [MAX_COLUMNS][MAX_COLUMNS]
    for (int i = threadIdx.x; i < MAX_COLUMNS * MAX_COLUMNS; i += WARP * N_WARPS) {
        const int row = i / MAX_COLUMNS, column = i % MAX_COLUMNS;
        const bool inside = row <= column && column < n_columns;
        const long long place = static_cast<long long>(row) * hinv_row_stride +
                                static_cast<long long>(column) * hinv_column_stride;
        hinv[i] = inside ? hinv_chol[place] : 0.0f;
    }
    __syncthreads();

    const int lane = threadIdx.x % WARP;
    for (int row = blockIdx.x * N_WARPS + threadIdx.x / WARP; row < n_rows; row += gridDim.x * N_WARPS) {
        const float scale = scales[row];
        const float zero = zeros ? zeros[row] : 0.0f;
        const float* source = weight + static_cast<long long>(row) * weight_stride;
        float running[SLOTS];
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int column = slot * WARP + lane;
            running[slot] = column < n_columns ? source[column] : 0.0f;
        }
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int first = slot * WARP;
            Quantized own = {0.0f, 0};
            float own_error = 0.0f;
            for (int j = first; j < min(first + WARP, n_columns); ++j) {
                const float* hinv_row = hinv + j * MAX_COLUMNS;
                const float current = __shfl_sync(ALL_LANES, running[slot], j - first);
                const Quantized now = quantize(current, scale, zero, q_min, q_max, book);
                const float error = ieee::div(ieee::sub(current, now.value), hinv_row[j]);
                if (lane == j - first) {
                    own = now;
                    own_error = error;
                }
                // Columns up to j change too, but nothing reads them any more.
#pragma unroll
                for (int later = slot; later < SLOTS; ++later) {
                    const float change = ieee::mul(error, hinv_row[later * WARP + lane]);
                    running[later] = ieee::sub(running[later], change);
                }
            }
            if (first + lane < n_columns) {
                const long long place = static_cast<long long>(row) * n_columns + first + lane;
                codes[place] = static_cast<unsigned char>(own.code);
                values[place] = own.value;
                errors[place] = own_error;
            }
        }
    }
}
