// scale_sums: INT32 sums of an INT8 product to output[m][n] = sum * row_scale[m] * channel_scale[n], rounded to ELEMENT.
//
//   sums int32 [n_rows, n_channels]; row_scales float32 [n_rows]; channel_scales float32 [n_channels]; n_channels a
//   multiple of 4, all 16-byte aligned.  launch: grid (ceil(n_channels / 1024), ceil(n_rows / 2)), block 256

#if !defined(ELEMENT)
#error "scale_sums.cu lacks its parameter"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grid_order.cuh"
#include "int_codes.cuh"

constexpr int ROWS = 2;  // of a thread, so that two reads are on their way

extern "C" __global__ void __launch_bounds__(256)
scale_sums(const int4* __restrict__ sums, const float* __restrict__ row_scales, const float4* __restrict__ channel_scales,
           ELEMENT* __restrict__ output, int n_rows, int n_channels) {
    const int quad = blockIdx.x * 256 + threadIdx.x, first_row = blockIdx.y * ROWS;
    if (4 * quad >= n_channels) return;
    const float4 scale = channel_scales[quad];
    let_next_grid_begin();
    wait_for_earlier_grids();
    int4 sum[ROWS];
    float row_scale[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = min(first_row + i, n_rows - 1);
        sum[i] = sums[static_cast<long long>(row) * (n_channels / 4) + quad];
        row_scale[i] = row_scales[row];
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (first_row + i >= n_rows) break;
        const float s = row_scale[i];
        const Vector<ELEMENT, 4> scaled = {
            static_cast<ELEMENT>(sum[i].x * s * scale.x), static_cast<ELEMENT>(sum[i].y * s * scale.y),
            static_cast<ELEMENT>(sum[i].z * s * scale.z), static_cast<ELEMENT>(sum[i].w * s * scale.w)};
        reinterpret_cast<Vector<ELEMENT, 4>*>(output)[static_cast<long long>(first_row + i) * (n_channels / 4) + quad] =
            scaled;
    }
}
