// Float32 arithmetic that rounds exactly as torch does on a CPU: IEEE nearest-even, never contracted into a
// fused multiply-add, subnormals kept. CuPy compiles everything with -ftz=true, which turns even __fdiv_rn
// into its flushing form, so these are PTX instructions without .ftz.
#pragma once

namespace ieee {

__device__ __forceinline__ float add(float a, float b) {
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float sub(float a, float b) {
    float result;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float mul(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float div(float a, float b) {
    float result;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ __forceinline__ float fma(float a, float b, float c) {
    float result;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}

// 1 / a.
__device__ __forceinline__ float reciprocal(float a) {
    float result;
    asm("rcp.rn.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
}

// max(largest, |a|)
__device__ __forceinline__ float max_magnitude(float largest, float a) {
    float result;
    asm("{\n.reg .f32 magnitude;\nabs.f32 magnitude, %2;\nmax.f32 %0, %1, magnitude;\n}"
        : "=f"(result)
        : "f"(largest), "f"(a));
    return result;
}

// To the nearest integer, a tie to the even one.
__device__ __forceinline__ float rint(float a) {
    float result;
    asm("cvt.rni.f32.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
}

// NaN gives `low`.
__device__ __forceinline__ float clamp(float a, float low, float high) {
    return fminf(fmaxf(a, low), high);
}

}  // namespace ieee
