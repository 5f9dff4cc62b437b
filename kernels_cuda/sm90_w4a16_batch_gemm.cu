// out[m][n] = sum over groups of scale * (INT4 weights . float16 or bfloat16 activations) + bias, on sm_90a, for many
// tokens: it streams the weights once per TILE_TOKENS tokens.
//
//   weights, channel_scales: see gemm_layout.cuh; exact scales, no outlier slots (only the bias row is read)
//   tokens    [2 * slots][Mp][64] float16 (IN_BF16: bfloat16): see pack_tokens.cu; 16-byte aligned
//   out, partials, counters: as in sm90_w4a4_gemm.cu
//
// The transposed product by wgmma, as in sm90_w4a4_gemm.cu: weights are the A operand, turned into exact float16 or
// bfloat16 codes in registers; a group's products are summed in float32 and then multiplied by the group's scale.
// Two warps feed the ring of stages by bulk copies, one with weights, one with tokens:
//
//   stage  | tokens [two halves of 64 inputs][TILE_TOKENS][128 bytes, swizzled] | record | ... |
//
// A thread of the A operand holds, of 16 inputs, the places 2t, 2t+1, 2t+8 and 2t+9 (t = lane % 4), and what a record
// gives it are the inputs 4t .. 4t+3, the even ones of a word apart from the odd ones. As K may be permuted, equally in
// A and B, the places 0..7 take the even inputs of 16 and the places 8..15 the odd ones.
//
// Parameters: GROUP_SIZE, SCALE_BYTES 2/4, IN_BF16 0/1, OUT_DTYPE, TILE_TOKENS 8..64, N_WARPGROUPS, ROW_BLOCKS (1),
// K_TEAMS (1), N_STAGES, CONSUMER_REGISTERS (0: as compiled), SHARED_BYTES. Launch: 128 * (N_WARPGROUPS + 1) threads, one
// CTA for each multiprocessor at most.
#if !defined(GROUP_SIZE) || !defined(SCALE_BYTES) || !defined(IN_BF16) || !defined(OUT_DTYPE) ||     \
    !defined(TILE_TOKENS) || !defined(N_WARPGROUPS) || !defined(ROW_BLOCKS) || !defined(K_TEAMS) || \
    !defined(N_STAGES) || !defined(CONSUMER_REGISTERS) || !defined(SHARED_BYTES)
#error "sm90_w4a16_batch_gemm.cu lacks one of its parameters"
#endif

#include "gemm_stream.cuh"

namespace {

using Weights = Record<GROUP_SIZE, SCALE_BYTES>;
constexpr int HALF_BYTES = TILE_TOKENS * 128;  // of 64 inputs
constexpr int TILE_BYTES = 2 * HALF_BYTES;
constexpr int STAGE_BYTES = (TILE_BYTES + PANELS * Weights::bytes + 1023) / 1024 * 1024;
constexpr int STORE_AT = N_STAGES * STAGE_BYTES;
constexpr int FULL_AT = STORE_AT + STORE_BYTES;  // a barrier for each stage that says it is full
constexpr int EMPTY_AT = FULL_AT + 8 * N_STAGES;  // and one that says it is empty

static_assert(ROW_BLOCKS == 1 && K_TEAMS == 1 && TILE_TOKENS <= 64, "what the registers leave room for");
// More registers than the launch came with would be waited for without end.
constexpr int PRODUCER_REGISTERS = 40, THREADS = CONSUMERS + 128;
static_assert(CONSUMERS * CONSUMER_REGISTERS + 128 * PRODUCER_REGISTERS <= 65536 / THREADS / 8 * 8 * THREADS,
              "CONSUMER_REGISTERS is too large");
static_assert(1024 + EMPTY_AT + 8 * N_STAGES <= SHARED_BYTES, "SHARED_BYTES is too small");

// Calls visit(corner, slot, stage, barrier) for every slot, as soon as its stage is free.
template <typename Visit>
__device__ __forceinline__ void produce(const Problem &p, unsigned shared, Visit visit) {
    Schedule schedule(p);
    Work work;
    Ring ring(0);
    while (schedule.next(p, work)) {
        const Corner corner = tile_corner(work.tile, p);
        for (int slot = work.begin; slot < work.end; ++slot, ring.advance()) {
            barrier_wait(shared + EMPTY_AT + 8 * ring.stage, ring.parity ^ 1);
            visit(corner, slot, shared + ring.stage * STAGE_BYTES, shared + FULL_AT + 8 * ring.stage);
        }
    }
}

__device__ void produce_weights(const Problem &p, const unsigned char *weights, unsigned shared) {
    produce(p, shared, [&](const Corner &corner, int slot, unsigned stage, unsigned barrier) {
        barrier_arrive_expect(barrier, PANELS * Weights::bytes);
#pragma unroll 1
        for (int i = 0; i < PANELS; ++i) {
            const size_t panel = min(corner.panel + i, p.n_panels - 1);
            const unsigned char *record = weights + (panel * p.n_slots + slot) * Weights::bytes;
            if (p.n_token_tiles == 1) {
                bulk_copy_once(stage + TILE_BYTES + i * Weights::bytes, record, Weights::bytes, barrier);
            } else {
                bulk_copy(stage + TILE_BYTES + i * Weights::bytes, record, Weights::bytes, barrier);
            }
        }
    });
}

__device__ void produce_tokens(const Problem &p, const unsigned char *tokens, unsigned shared) {
    wait_for_earlier_grids();
    produce(p, shared, [&](const Corner &corner, int slot, unsigned stage, unsigned barrier) {
        const unsigned bytes = min(TILE_TOKENS, p.padded_tokens - corner.token) * 128;
        barrier_arrive_expect(barrier, 2 * bytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const size_t row = static_cast<size_t>(2 * slot + half) * p.padded_tokens + corner.token;
            bulk_copy(stage + half * HALF_BYTES, tokens + row * 128, bytes, barrier);
        }
    });
}

// Eight codes to exact values: `low` and `high` are the two k32 steps of a word, each with the word's even inputs and
// its odd ones. A nibble in the low mantissa bits of 1024 (bfloat16: 128) is that much above it; flipping its top
// bit adds 8, and both are subtracted.
__device__ __forceinline__ void to_values(unsigned word, unsigned (&low)[2], unsigned (&high)[2]) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        if constexpr (IN_BF16) {
            auto value = [](unsigned nibbles) {
                const unsigned raised = (nibbles & 0x000F000Fu) ^ 0x43084308u;
                const __nv_bfloat162 code = __hsub2(reinterpret_cast<const __nv_bfloat162 &>(raised),
                                                    __float2bfloat162_rn(136.0f));
                return reinterpret_cast<const unsigned &>(code);
            };
            low[odd] = value(word >> 8 * odd);
            high[odd] = value(word >> (8 * odd + 4));
        } else {
            const unsigned shifted = word >> 8 * odd;
            const unsigned raised = (shifted & 0x000F000Fu) ^ 0x64086408u;  // 1024 + 8 + code
            const unsigned raised_16 = (shifted & 0x00F000F0u) ^ 0x64806480u;  // 1024 + 16 * (8 + code)
            const __half2 code =
                __hsub2(reinterpret_cast<const __half2 &>(raised), __float2half2_rn(1032.0f));
            const __half2 other = __hfma2(reinterpret_cast<const __half2 &>(raised_16),
                                          __float2half2_rn(1.0f / 16.0f), __float2half2_rn(-72.0f));
            low[odd] = reinterpret_cast<const unsigned &>(code);
            high[odd] = reinterpret_cast<const unsigned &>(other);
        }
    }
}

// Four k16 steps of A from half a record.
__device__ __forceinline__ void load_weights(const unsigned char *half, int thread, unsigned (&a)[4][4]) {
    const uint4 words = *reinterpret_cast<const uint4 *>(half + thread * 16);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        unsigned low[2], high[2];
        to_values(word[r], low, high);
        a[r / 2][r % 2] = low[0], a[r / 2][r % 2 + 2] = low[1];
        a[2 + r / 2][r % 2] = high[0], a[2 + r / 2][r % 2 + 2] = high[1];
    }
}

// Volatile, since the compiler would move it to where the scales are used, and the stage would wait for it.
__device__ __forceinline__ float2 load_scales(const unsigned char *record, int group, int pair) {
    const unsigned char *scales = record + CODE_BYTES + group * Weights::group_scale_bytes;
    if constexpr (SCALE_BYTES == 2) {
        const unsigned both = reinterpret_cast<const volatile unsigned *>(scales)[pair];
        return __half22float2(reinterpret_cast<const __half2 &>(both));
    }
    const volatile float *both = reinterpret_cast<const volatile float *>(scales) + 2 * pair;
    return make_float2(both[0], both[1]);
}

// total += one slot.
__device__ __forceinline__ void run_slot(const unsigned char *stage, const unsigned char *record, int thread,
                                         float (&total)[1][SUMS]) {
    constexpr int HALVES_OF_GROUP = GROUP_SIZE / 64;
    const unsigned tile = swizzled_tile(shared_address(stage));
    float2 scales[Weights::groups];
#pragma unroll
    for (int group = 0; group < Weights::groups; ++group) scales[group] = load_scales(record, group, thread / 4);
    float sums[SUMS];
    unsigned a[2][4][4];  // the second half is unpacked while the first one is multiplied
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        load_weights(record + half * (CODE_BYTES / 2), thread, a[half]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            WgmmaFloat<TILE_TOKENS, IN_BF16 != 0>::run(sums, a[half][step],
                                                       tile + half * (HALF_BYTES / 16) + 2 * step,
                                                       half % HALVES_OF_GROUP > 0 || step > 0);
        wgmma_commit();
        if (half % HALVES_OF_GROUP == HALVES_OF_GROUP - 1) {
            const float2 factors = scales[half / HALVES_OF_GROUP];
            wgmma_wait<0>();
            pin(sums);
#pragma unroll
            for (int i = 0; i < SUMS; ++i) total[0][i] = fmaf(sums[i], i & 2 ? factors.y : factors.x, total[0][i]);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sm90_w4a16_batch_gemm(const unsigned char *__restrict__ weights, const float *__restrict__ channel_scales,
                          const unsigned char *__restrict__ tokens, Output<OUT_DTYPE>::type *__restrict__ out,
                          float *partials, int *counters, const Problem p) {
    extern __shared__ unsigned char dynamic_shared[];
    unsigned char *shared = dynamic_shared + ((1024 - (shared_address(dynamic_shared) & 1023)) & 1023);
    const unsigned full = shared_address(shared) + FULL_AT, empty = shared_address(shared) + EMPTY_AT;
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // uniform, and the compiler sees it

    let_next_grid_begin();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < N_STAGES; ++stage) {
            barrier_init(full + 8 * stage, 2);
            barrier_init(empty + 8 * stage, CONSUMERS / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == N_WARPGROUPS) {
        if constexpr (CONSUMER_REGISTERS > 0) lower_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS) produce_weights(p, weights, shared_address(shared));
        if (threadIdx.x == CONSUMERS + 32) produce_tokens(p, tokens, shared_address(shared));
    } else {
        if constexpr (CONSUMER_REGISTERS > 0) raise_registers<CONSUMER_REGISTERS>();
        const int thread = threadIdx.x % 128;
        Schedule schedule(p);
        Work work;
        Ring ring(0);
        wait_for_earlier_grids();
        while (schedule.next(p, work)) {
            const Corner corner = tile_corner(work.tile, p);
            float total[1][SUMS] = {};
            for (int slot = work.begin; slot < work.end; ++slot, ring.advance()) {
                barrier_wait(full + 8 * ring.stage, ring.parity);
                const unsigned char *stage = shared + ring.stage * STAGE_BYTES;
                run_slot(stage, stage + TILE_BYTES + warpgroup * Weights::bytes, thread, total);
                release_stage(empty + 8 * ring.stage);
            }
            if (work.end - work.begin == p.n_slots || join_pieces(p, work, partials, counters, total))
                store<Output<OUT_DTYPE>>(p, corner, warpgroup,
                                         shared + STORE_AT + warpgroup * STORE_TOKENS * STORE_PITCH,
                                         channel_scales + 2 * p.n_panels * PANEL_ROWS, out, 1.0f, total);
        }
    }
}
