// Instructions of the decode kernel by name, beside those of gemm_sm80.cuh.
#pragma once

#include "gemm_sm80.cuh"

// Global to shared, WORDS words of 4 bytes, aligned to a power of two of them.
template <int WORDS>
__device__ __forceinline__ void copy_words_async(unsigned* destination, const unsigned* source) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(destination));
    if constexpr (WORDS == 4) {
        copy_async(destination, source);
    } else if constexpr (WORDS == 2) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(source) : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address + 4 * i), "l"(source + i)
                         : "memory");
        }
    }
}

// D[16 x 8] += A[16 x 16] * B[16 x 8], float16 sums too.
__device__ __forceinline__ void mma_float16_sums(unsigned (&d)[2], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit items transposed: lane l holds row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ unsigned transpose(unsigned items) {
    unsigned result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(items));
    return result;
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
