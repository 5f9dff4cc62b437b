// Output types of the GEMM kernels: OUT_DTYPE 0 = float32, 1 = float16, 2 = bfloat16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <int KIND>
struct Output;

template <>
struct Output<0> {
    using type = float;
    static __device__ __forceinline__ float round(float x) { return x; }
};

template <>
struct Output<1> {
    using type = __half;
    static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ unsigned pair(float x, float y) {
        const __half2 both = __floats2half2_rn(x, y);
        return reinterpret_cast<const unsigned &>(both);
    }
};

template <>
struct Output<2> {
    using type = __nv_bfloat16;
    static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
    static __device__ __forceinline__ unsigned pair(float x, float y) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
        return reinterpret_cast<const unsigned &>(both);
    }
};
