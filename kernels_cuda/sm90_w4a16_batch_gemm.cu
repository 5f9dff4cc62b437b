// out[m][n] = sum over groups of scale * (INT4 weights . float16 or bfloat16 activations) + bias, on sm_90a, for many
// tokens: it streams the weights once per TILE_TOKENS tokens.
//
// NOT IN USE (gemm_tiles.choose_w4a16_tile): two results were wrong on a GPU, docs/LOG.md, 2026-11-28.
//
//   weights, channel_scales: see gemm_layout.cuh; exact scales, no outlier slots (only the bias row is read)
//   x         [M][n_inputs] float16 (IN_BF16: bfloat16), dense; n_inputs a multiple of 8; 16-byte aligned
//   out, partials, counters: as in sm90_w4a4_gemm.cu
//
// The transposed product by wgmma, as in sm90_w4a4_gemm.cu: weights are the A operand, turned into exact float16 or
// bfloat16 codes in registers; a group's products are summed in float32 and then multiplied by the group's scale.
// One warp feeds the ring of stages with weights by bulk copies, three warps with tokens: each thread copies its share of
// the slots to come to a place of its own (cp.async), and from there lays it out as wgmma reads it:
//
//   stage  | x [two halves of 64 inputs][TILE_TOKENS][128 bytes, swizzled] | record | ... |
//
// A thread of the A operand holds, of 16 inputs, the places 2t, 2t+1, 2t+8 and 2t+9 (t = lane % 4), and what a record
// gives it are the inputs 4t .. 4t+3, the even ones of a word apart from the odd ones. As K may be permuted, equally in
// A and B, the places 0..7 take the even inputs of 16 and the places 8..15 the odd ones.
//
// Parameters: GROUP_SIZE, SCALE_BYTES 2/4, IN_BF16 0/1, OUT_DTYPE, TILE_TOKENS 8..64, N_WARPGROUPS, ROW_BLOCKS (1),
// K_TEAMS (1), N_STAGES, N_AHEAD (slots of tokens on their way to a place of their own), CTAS_PER_SM (that fit), SHARED_BYTES. Launch: 128 * (N_WARPGROUPS + 1) threads, one CTA
// for each multiprocessor at most.
#if !defined(GROUP_SIZE) || !defined(SCALE_BYTES) || !defined(IN_BF16) || !defined(OUT_DTYPE) ||  \
    !defined(TILE_TOKENS) || !defined(N_WARPGROUPS) || !defined(ROW_BLOCKS) || !defined(K_TEAMS) || \
    !defined(N_STAGES) || !defined(N_AHEAD) || !defined(CTAS_PER_SM) || !defined(SHARED_BYTES)
#error "sm90_w4a16_batch_gemm.cu lacks one of its parameters"
#endif

#include "gemm_sm80.cuh"
#include "gemm_stream.cuh"

namespace {

using Weights = Record<GROUP_SIZE, SCALE_BYTES>;
constexpr int HALF_BYTES = TILE_TOKENS * 128;  // of 64 inputs
constexpr int TILE_BYTES = 2 * HALF_BYTES;
constexpr int STAGE_BYTES = (TILE_BYTES + PANELS * Weights::bytes + 1023) / 1024 * 1024;
constexpr int STORE_AT = N_STAGES * STAGE_BYTES;
constexpr int AHEAD_AT = STORE_AT + STORE_BYTES;
constexpr int N_STAGERS = 96;
constexpr int PIECE_INPUTS = 16;
constexpr int SLOT_PIECES = SLOT_INPUTS / PIECE_INPUTS;
constexpr int PIECES = (TILE_TOKENS * SLOT_PIECES + N_STAGERS - 1) / N_STAGERS;  // of a thread and slot
constexpr int BARRIERS_AT = AHEAD_AT + N_AHEAD * PIECES * N_STAGERS * PIECE_INPUTS * 2;

static_assert(ROW_BLOCKS == 1 && K_TEAMS == 1 && TILE_TOKENS <= 64, "what the registers leave room for");
static_assert(1024 + BARRIERS_AT + 16 * N_STAGES <= SHARED_BYTES, "SHARED_BYTES is too small");

// The CTA's slots one by one.
struct Walk {
    Schedule schedule;
    Work work = {0, 0, 0};

    __device__ explicit Walk(const Problem &p) : schedule(p) {}
    __device__ bool next(const Problem &p, Corner &corner, int &slot) {
        if (work.begin == work.end && !schedule.next(p, work)) {
            work.begin = work.end;  // there is none the next time either
            return false;
        }
        corner = tile_corner(work.tile, p);
        slot = work.begin++;
        return true;
    }
};

__device__ void produce_weights(const Problem &p, const unsigned char *weights, unsigned shared, unsigned full,
                                unsigned empty) {
    Walk walk(p);
    Corner corner;
    int slot;
    for (Ring ring(0); walk.next(p, corner, slot); ring.advance()) {
        const unsigned stage = shared + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
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
    }
}

// A staging thread's share of a slot: pieces of 16 inputs of one token, zeros where there is no input or token.
__device__ __forceinline__ void copy_share(const Problem &p, const unsigned short *x, int n_inputs,
                                           const Corner &corner, int slot, int thread, uint4 *place) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = thread + i * N_STAGERS, token = corner.token + piece / SLOT_PIECES;
        const int input = slot * SLOT_INPUTS + piece % SLOT_PIECES * PIECE_INPUTS;
        const bool is_token = token < p.n_tokens && piece < TILE_TOKENS * SLOT_PIECES;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const bool exists = is_token && input + 8 * j < n_inputs;
            const size_t from = exists ? static_cast<size_t>(token) * n_inputs + input + 8 * j : 0;
            copy_async_if(exists, place + (2 * i + j) * N_STAGERS, x + from);
        }
    }
}

// From there to the stage, the even inputs of every 16 before the odd ones.
__device__ __forceinline__ void lay_out_share(const uint4 *place, unsigned char *stage, int thread) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = thread + i * N_STAGERS, row = piece / SLOT_PIECES, chunk = piece % SLOT_PIECES * 2;
        if (piece >= TILE_TOKENS * SLOT_PIECES) break;
        const uint4 a = place[2 * i * N_STAGERS], b = place[(2 * i + 1) * N_STAGERS];
        uint4 *to = reinterpret_cast<uint4 *>(stage + chunk / 8 * HALF_BYTES + row * 128);
        auto half_of = [&](unsigned selector) {
            return make_uint4(__byte_perm(a.x, a.y, selector), __byte_perm(a.z, a.w, selector),
                              __byte_perm(b.x, b.y, selector), __byte_perm(b.z, b.w, selector));
        };
        to[(chunk % 8) ^ (row & 7)] = half_of(0x5410);
        to[(chunk % 8 + 1) ^ (row & 7)] = half_of(0x7632);
    }
}

__device__ void produce_tokens(const Problem &p, const unsigned short *x, int n_inputs, int thread,
                               unsigned char *shared, unsigned full, unsigned empty) {
    wait_for_earlier_grids();
    uint4 *places = reinterpret_cast<uint4 *>(shared + AHEAD_AT) + thread;
    constexpr int PLACE = 2 * PIECES * N_STAGERS;
    Walk walk(p);
    Ring ring(0);
    Corner corner;
    int slot, n_copied = 0;
    auto copy_next = [&](int place) {
        if (walk.next(p, corner, slot)) {
            copy_share(p, x, n_inputs, corner, slot, thread, places + place * PLACE);
            ++n_copied;
        }
        copy_commit();
    };
    for (int place = 0; place < N_AHEAD; ++place) copy_next(place);
    for (int i = 0, place = 0; i < n_copied; ++i) {
        copy_wait<N_AHEAD - 1>();
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        lay_out_share(places + place * PLACE, shared + ring.stage * STAGE_BYTES, thread);
        shared_writes_fence();
        __syncwarp();
        barrier_arrive_if(thread % 32 == 0, full + 8 * ring.stage);
        ring.advance();
        copy_next(place);
        if (++place == N_AHEAD) place = 0;
    }
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

__device__ __forceinline__ float2 load_scales(const unsigned char *record, int group, int pair) {
    const unsigned char *scales = record + CODE_BYTES + group * Weights::group_scale_bytes;
    if constexpr (SCALE_BYTES == 2) return __half22float2(reinterpret_cast<const __half2 *>(scales)[pair]);
    return reinterpret_cast<const float2 *>(scales)[pair];
}

// total += one slot.
__device__ __forceinline__ void run_slot(const unsigned char *stage, const unsigned char *record, int thread,
                                         float (&total)[1][SUMS]) {
    constexpr int HALVES_OF_GROUP = GROUP_SIZE / 64;
    const unsigned tile = swizzled_tile(shared_address(stage));
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
            const float2 scales = load_scales(record, half / HALVES_OF_GROUP, thread / 4);
            wgmma_wait<0>();
            pin(sums);
#pragma unroll
            for (int i = 0; i < SUMS; ++i) total[0][i] = fmaf(sums[i], i & 2 ? scales.y : scales.x, total[0][i]);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32 + N_STAGERS, CTAS_PER_SM)
    sm90_w4a16_batch_gemm(const unsigned char *__restrict__ weights, const float *__restrict__ channel_scales,
                    const unsigned short *__restrict__ x, Output<OUT_DTYPE>::type *__restrict__ out,
                    float *partials, int *counters, const int n_inputs, const Problem p) {
    extern __shared__ unsigned char dynamic_shared[];
    unsigned char *shared = dynamic_shared + ((1024 - (shared_address(dynamic_shared) & 1023)) & 1023);
    const unsigned full = shared_address(shared) + BARRIERS_AT, empty = full + 8 * N_STAGES;
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // uniform, and the compiler sees it

    let_next_grid_begin();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < N_STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1 + N_STAGERS / 32);
            barrier_init(empty + 8 * stage, CONSUMERS / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == N_WARPGROUPS) {
        const int thread = threadIdx.x - CONSUMERS - 32;
        if (thread == -32) produce_weights(p, weights, shared_address(shared), full, empty);
        if (thread >= 0) produce_tokens(p, x, n_inputs, thread, shared, full, empty);
    } else {
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
                __syncwarp();
                barrier_arrive_if(thread % 32 == 0, empty + 8 * ring.stage);
            }
            if (work.end - work.begin == p.n_slots + p.n_outlier_slots ||
                join_pieces(p, work, partials, counters, total))
                store<Output<OUT_DTYPE>>(p, corner, warpgroup,
                                         shared + STORE_AT + warpgroup * STORE_TOKENS * STORE_PITCH,
                                         channel_scales + 2 * p.n_panels * PANEL_ROWS, out, 1.0f, total);
        }
    }
}
