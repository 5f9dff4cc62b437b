// scale_sums: INT32 sums of an INT8 product to output[m][n] = sum * row_scale[m] * channel_scale[n], rounded to ELEMENT.
//
//   sums int32 [n_rows, n_channels]; row_scales float32 [n_rows]; channel_scales float32 [n_channels]; n_channels a
//   multiple of 4, all 16-byte aligned.  launch: grid (ceil(n_channels / 1024), n_rows), block 256

#if !defined(ELEMENT)
#error "scale_sums.cu lacks its parameter"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "int_codes.cuh"

extern "C" __global__ void __launch_bounds__(256)
scale_sums(const int4* __restrict__ sums, const float* __restrict__ row_scales, const float4* __restrict__ channel_scales,
           ELEMENT* __restrict__ output, int n_channels) {
    const int quad = blockIdx.x * 256 + threadIdx.x;
    if (4 * quad >= n_channels) return;
    const long long place = static_cast<long long>(blockIdx.y) * (n_channels / 4) + quad;
    const int4 sum = sums[place];
    const float4 scale = channel_scales[quad];
    const float row = row_scales[blockIdx.y];
    const Vector<ELEMENT, 4> scaled = {
        static_cast<ELEMENT>(sum.x * row * scale.x), static_cast<ELEMENT>(sum.y * row * scale.y),
        static_cast<ELEMENT>(sum.z * row * scale.z), static_cast<ELEMENT>(sum.w * row * scale.w)};
    reinterpret_cast<Vector<ELEMENT, 4>*>(output)[place] = scaled;
}
