// Instructions of the decode kernel by name, beside those of gemm_sm80.cuh.
#pragma once

#include "gemm_sm80.cuh"

// Addresses of shared memory, in bytes, are passed from lane to lane once: the compiler then keeps them, where it would
// make them anew from the thread's number at every use.
__device__ __forceinline__ unsigned kept(unsigned word) { return __shfl_sync(0xffffffffu, word, threadIdx.x % 32); }
__device__ __forceinline__ unsigned shared_address(const unsigned* place) {
    return kept(static_cast<unsigned>(__cvta_generic_to_shared(place)));
}

template <int WORDS>
__device__ __forceinline__ void read_shared(unsigned address, unsigned* words) {
    if constexpr (WORDS == 4) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
    } else if constexpr (WORDS == 2) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[i]) : "r"(address + 4 * i) : "memory");
        }
    }
}

// Global to shared, WORDS words of 4 bytes, aligned to a power of two of them, TO and FROM bytes behind the addresses.
template <int WORDS, int TO, int FROM>
__device__ __forceinline__ void copy_words_async(unsigned address, const unsigned* source) {
    if constexpr (WORDS == 4) {
        asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(address), "l"(source), "n"(TO), "n"(FROM)
                     : "memory");
    } else if constexpr (WORDS == 2) {
        asm volatile("cp.async.ca.shared.global [%0 + %2], [%1 + %3], 8;" ::"r"(address), "l"(source), "n"(TO), "n"(FROM)
                     : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            asm volatile("cp.async.ca.shared.global [%0 + %2], [%1 + %3], 4;" ::"r"(address + 4 * i), "l"(source + i),
                         "n"(TO), "n"(FROM)
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

// Two halves, the largest one for what no half can hold.
__device__ __forceinline__ unsigned saturated_halves(float low, float high) {
    unsigned result;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
