// Hopper's instructions by name: mbarriers, bulk copies, wgmma on INT8, stmatrix.
#pragma once

__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and of wgmma.
__device__ __forceinline__ void shared_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Predicated inside, since a branch while wgmma is in flight would serialize it.
__device__ __forceinline__ void barrier_arrive_if(bool condition, unsigned barrier) {
    asm volatile(
        "{\n.reg .pred elected;\nsetp.ne.b32 elected, %1, 0;\n"
        "@elected mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(barrier),
        "r"(static_cast<int>(condition))
        : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Global to shared, 16-byte multiples; `barrier` counts the bytes.
__device__ __forceinline__ void bulk_copy(unsigned destination, const void *source, unsigned bytes,
                                          unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     destination),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The same for data that is read once: it leaves the L2 cache first.
__device__ __forceinline__ void bulk_copy_once(unsigned destination, const void *source, unsigned bytes,
                                               unsigned barrier) {
    asm volatile(
        "{\n"
        ".reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], policy;\n"
        "}\n" ::"r"(destination),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// Joins `threads` threads at hardware barrier `id` (1..15).
__device__ __forceinline__ void join_threads(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Low half of the descriptor of a K-major tile in the 128-byte swizzle: 8-row atoms of 1024 bytes one after the other.
// The high half is the same for all tiles. Taking the address from lane 0 shows the compiler that it is uniform.
__device__ __forceinline__ unsigned swizzled_tile(unsigned address) {
    return __shfl_sync(0xFFFFFFFFu, (address & 0x3FFFF) >> 4 | 1u << 16, 0);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of wgmma's registers across this point.
template <int COUNT>
__device__ __forceinline__ void pin(int (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Keeps the compiler from moving loads across this point.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// D[64 x TOKENS] = A[64 x 32] * B[32 x TOKENS] (+ D): A in registers, B in shared memory.
template <int TOKENS>
struct Wgmma;

#define D4(o) "+r"(d[o]), "+r"(d[o + 1]), "+r"(d[o + 2]), "+r"(d[o + 3])
#define D16(o) D4(o), D4(o + 4), D4(o + 8), D4(o + 12)
#define WGMMA(TOKENS, LIST, A0, A1, A2, A3, DESC, PRED, ...)                                                  \
    template <>                                                                                               \
    struct Wgmma<TOKENS> {                                                                                    \
        static __device__ __forceinline__ void run(int (&d)[TOKENS / 2], const unsigned *a, unsigned tile,    \
                                                   int accumulate) {                                          \
            asm volatile("{\n.reg .pred add;\n.reg .b64 descriptor;\nsetp.ne.b32 add, " PRED                  \
                         ", 0;\n"                                                                             \
                         "mov.b64 descriptor, {" DESC                                                         \
                         ", 0x40000040};\n"                                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k32.s32.s8.s8 {" LIST "}, {" A0 ", " A1 \
                         ", " A2 ", " A3 "}, descriptor, add;\n}\n"                                           \
                         : __VA_ARGS__                                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tile), "r"(accumulate));           \
        }                                                                                                     \
    }

#define L4 "%0, %1, %2, %3"
#define L8 L4 ", %4, %5, %6, %7"
#define L16 L8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define L24 L16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define L32 L16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define L64                                                                                                           \
    L32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define L40 L32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define L48 L40 ", %40, %41, %42, %43, %44, %45, %46, %47"

WGMMA(8, L4, "%4", "%5", "%6", "%7", "%8", "%9", D4(0));
WGMMA(16, L8, "%8", "%9", "%10", "%11", "%12", "%13", D4(0), D4(4));
WGMMA(32, L16, "%16", "%17", "%18", "%19", "%20", "%21", D16(0));
WGMMA(48, L24, "%24", "%25", "%26", "%27", "%28", "%29", D16(0), D4(16), D4(20));
WGMMA(80, L40, "%40", "%41", "%42", "%43", "%44", "%45", D16(0), D16(16), D4(32), D4(36));
WGMMA(96, L48, "%48", "%49", "%50", "%51", "%52", "%53", D16(0), D16(16), D16(32));
WGMMA(64, L32, "%32", "%33", "%34", "%35", "%36", "%37", D16(0), D16(16));
WGMMA(128, L64, "%64", "%65", "%66", "%67", "%68", "%69", D16(0), D16(16), D16(32), D16(48));

// D[64 x TOKENS] = A[64 x 16] * B[16 x TOKENS] (+ D) in float16 or BF16, float32 sums: A in registers, B in shared memory.
template <int TOKENS, bool BF16>
struct WgmmaFloat;

#define F4(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define F16(o) F4(o), F4(o + 4), F4(o + 8), F4(o + 12)
#define WGMMA_FLOAT(TOKENS, BF16, TYPE, LIST, A0, A1, A2, A3, DESC, PRED, ...)                                \
    template <>                                                                                               \
    struct WgmmaFloat<TOKENS, BF16> {                                                                         \
        static __device__ __forceinline__ void run(float (&d)[TOKENS / 2], const unsigned *a, unsigned tile,  \
                                                   int accumulate) {                                          \
            asm volatile("{\n.reg .pred add;\n.reg .b64 descriptor;\nsetp.ne.b32 add, " PRED                  \
                         ", 0;\n"                                                                             \
                         "mov.b64 descriptor, {" DESC                                                         \
                         ", 0x40000040};\n"                                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." TYPE "." TYPE " {" LIST       \
                         "}, {" A0 ", " A1 ", " A2 ", " A3 "}, descriptor, add, 1, 1, 0;\n}\n"                \
                         : __VA_ARGS__                                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tile), "r"(accumulate));           \
        }                                                                                                     \
    }
#define WGMMA_FLOATS(TOKENS, ...)                        \
    WGMMA_FLOAT(TOKENS, false, "f16", __VA_ARGS__); \
    WGMMA_FLOAT(TOKENS, true, "bf16", __VA_ARGS__)

WGMMA_FLOATS(8, L4, "%4", "%5", "%6", "%7", "%8", "%9", F4(0));
WGMMA_FLOATS(16, L8, "%8", "%9", "%10", "%11", "%12", "%13", F4(0), F4(4));
WGMMA_FLOATS(32, L16, "%16", "%17", "%18", "%19", "%20", "%21", F16(0));
WGMMA_FLOATS(64, L32, "%32", "%33", "%34", "%35", "%36", "%37", F16(0), F16(16));

#undef WGMMA_FLOATS
#undef WGMMA_FLOAT
#undef F4
#undef F16
#undef WGMMA
#undef D4
#undef D16
#undef L4
#undef L8
#undef L16
#undef L32
#undef L64
#undef L24
#undef L40
#undef L48

// Stores two (COUNT = 2) or four 8 x 8 tiles of 16-bit values transposed; lane 8 * i + r gives the address of row r
// of the i-th transposed tile.
__device__ __forceinline__ void store_transposed(unsigned address, unsigned tile0, unsigned tile1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(tile0),
                 "r"(tile1)
                 : "memory");
}

__device__ __forceinline__ void store_transposed(unsigned address, unsigned tile0, unsigned tile1, unsigned tile2,
                                                 unsigned tile3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(tile0), "r"(tile1), "r"(tile2), "r"(tile3)
                 : "memory");
}
