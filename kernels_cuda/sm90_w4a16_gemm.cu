// out[m][n] = sum over groups of scale * (INT4 weights . float16 or bfloat16 activations) + bias, on sm_90a, for few
// tokens: it streams the weights once per TILE_TOKENS tokens.
//
//   weights, channel_scales: see gemm_layout.cuh; exact scales, no outlier slots (only the bias row is read)
//   x         [M][n_inputs] float16 (IN_BF16: bfloat16), dense; n_inputs a multiple of 8; 16-byte aligned
//   out, partials, counters: as in sm90_w4a4_gemm.cu
//
// Codes become exact float16 or bfloat16 values; a group's products are summed in float32 by mma.sync and multiplied
// by the group's scale afterwards. As K is only permuted, equally in A and B, the record in INT8 fragment order serves:
// registers r and r + 1 of a k32 step hold four neighbouring inputs of two rows, which make one m16n8k16 step.
//
//   stage  | x [TILE_TOKENS][256 B + 32 B of padding, against bank conflicts] | record | ... |
//
// Parameters: GROUP_SIZE, SCALE_BYTES 2/4, IN_BF16 0/1, OUT_DTYPE, TILE_TOKENS 8..64, N_WARPGROUPS, ROW_BLOCKS (1), K_TEAMS (1),
// N_STAGES, SHARED_BYTES. Launch: 128 * N_WARPGROUPS + 32 threads.
#if !defined(GROUP_SIZE) || !defined(SCALE_BYTES) || !defined(IN_BF16) || !defined(OUT_DTYPE) ||     \
    !defined(TILE_TOKENS) || !defined(N_WARPGROUPS) || !defined(ROW_BLOCKS) || !defined(K_TEAMS) || \
    !defined(N_STAGES) || !defined(SHARED_BYTES)
#error "sm90_w4a16_gemm.cu lacks one of its parameters"
#endif

#include "gemm_sm80.cuh"
#include "gemm_stream.cuh"

namespace {

using Weights = Record<GROUP_SIZE, SCALE_BYTES>;
constexpr int TOKEN_BYTES = SLOT_INPUTS * 2;
constexpr int TOKEN_PITCH = TOKEN_BYTES + 32;
constexpr int TILE_BYTES = TILE_TOKENS * TOKEN_PITCH;
constexpr int STAGE_BYTES = TILE_BYTES + PANELS * Weights::bytes;
constexpr int STORE_AT = N_STAGES * STAGE_BYTES;
constexpr int BARRIERS_AT = STORE_AT + STORE_BYTES;
constexpr int HALF_STEPS = 2;  // k32 steps in half a record

static_assert(ROW_BLOCKS == 1 && K_TEAMS == 1 && TILE_TOKENS <= 64, "a warp holds 16 channels x TILE_TOKENS");
static_assert(1024 + BARRIERS_AT + 16 * N_STAGES + 16 <= SHARED_BYTES, "SHARED_BYTES is too small");

// The whole warp: every lane copies its tokens' rows.
__device__ void produce(const Problem &p, int n_inputs, const unsigned char *weights, const unsigned short *x,
                        unsigned shared, unsigned full, unsigned empty) {
    const int lane = threadIdx.x % 32;
    Schedule schedule(p);
    Work work;
    Ring ring(0);
    while (schedule.next(p, work)) {
        const Corner corner = tile_corner(work.tile, p);
        const int n_tokens = min(TILE_TOKENS, p.n_tokens - corner.token);
        for (int slot = work.begin; slot < work.end; ++slot, ring.advance()) {
            const unsigned stage = shared + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
            const unsigned row_bytes = min(SLOT_INPUTS, n_inputs - slot * SLOT_INPUTS) * 2;
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            if (lane == 0) barrier_arrive_expect(barrier, n_tokens * row_bytes + PANELS * Weights::bytes);
            __syncwarp();
            if (lane < PANELS) {
                const size_t panel = min(corner.panel + lane, p.n_panels - 1);
                const unsigned char *record = weights + (panel * p.n_slots + slot) * Weights::bytes;
                bulk_copy_once(stage + TILE_BYTES + lane * Weights::bytes, record, Weights::bytes, barrier);
            }
            for (int token = lane; token < n_tokens; token += 32) {
                const size_t first = static_cast<size_t>(corner.token + token) * n_inputs + slot * SLOT_INPUTS;
                bulk_copy(stage + token * TOKEN_PITCH, x + first, row_bytes, barrier);
            }
        }
    }
}

// Four codes 0..15, one per byte, less 8, as two pairs of float16 or bfloat16: a byte in the low mantissa bits of 1024
// (bfloat16: 128), which is then subtracted together with the 8.
__device__ __forceinline__ void to_float16(unsigned codes, unsigned &first_pair, unsigned &second_pair) {
    first_pair = __byte_perm(codes, IN_BF16 ? 0x43434343 : 0x64646464, 0x4140);
    second_pair = __byte_perm(codes, IN_BF16 ? 0x43434343 : 0x64646464, 0x4342);
    auto subtract = [](unsigned pair) -> unsigned {
        if constexpr (IN_BF16) {
            const __nv_bfloat162 codes_at_8 =
                __hsub2(reinterpret_cast<__nv_bfloat162 &>(pair), __float2bfloat162_rn(136.0f));
            return reinterpret_cast<const unsigned &>(codes_at_8);
        } else {
            const __half2 codes_at_8 = __hsub2(reinterpret_cast<__half2 &>(pair), __float2half2_rn(1032.0f));
            return reinterpret_cast<const unsigned &>(codes_at_8);
        }
    };
    first_pair = subtract(first_pair), second_pair = subtract(second_pair);
}

__device__ __forceinline__ float2 load_scales(const unsigned char *record, int group, int pair) {
    const unsigned char *scales = record + CODE_BYTES + group * Weights::group_scale_bytes;
    if constexpr (SCALE_BYTES == 2) return __half22float2(reinterpret_cast<const __half2 *>(scales)[pair]);
    return reinterpret_cast<const float2 *>(scales)[pair];
}

// total += one slot.
__device__ __forceinline__ void run_slot(const unsigned char *stage, const unsigned char *record, int thread,
                                         float (&total)[1][SUMS]) {
    const int lane = thread % 32;
    float sums[TILE_TOKENS / 8][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 words = *reinterpret_cast<const uint4 *>(record + half * (CODE_BYTES / 2) + thread * 16);
        const unsigned word[4] = {words.x ^ 0x88888888u, words.y ^ 0x88888888u, words.z ^ 0x88888888u,
                                  words.w ^ 0x88888888u};
#pragma unroll
        for (int step = 0; step < HALF_STEPS; ++step) {
#pragma unroll
            for (int part = 0; part < 2;
                 ++part) {  // 16 inputs: four from 4 * (lane % 4) + 16 * part on, in each quarter
                unsigned a[4];
                to_float16(word[2 * part] >> 4 * step & 0x0F0F0F0Fu, a[0], a[2]);
                to_float16(word[2 * part + 1] >> 4 * step & 0x0F0F0F0Fu, a[1], a[3]);
                const int input = (2 * half + step) * 32 + part * 16 + lane % 4 * 4;
#pragma unroll
                for (int j = 0; j < TILE_TOKENS / 8; ++j) {
                    const uint2 b =
                        *reinterpret_cast<const uint2 *>(stage + (8 * j + lane / 4) * TOKEN_PITCH + input * 2);
                    mma_float16<IN_BF16 != 0>(sums[j], a, b.x, b.y);
                }
            }
        }
        if (Weights::groups == 2 || half == 1) {
            const float2 scales = load_scales(record, half * Weights::groups / 2, thread / 4);
#pragma unroll
            for (int j = 0; j < TILE_TOKENS / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[0][4 * j + i] = fmaf(sums[j][i], i & 2 ? scales.y : scales.x, total[0][4 * j + i]);
                    sums[j][i] = 0.0f;
                }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128 * N_WARPGROUPS + 32, 1)
    sm90_w4a16_gemm(const unsigned char *__restrict__ weights, const float *__restrict__ channel_scales,
                    const unsigned short *__restrict__ x, Output<OUT_DTYPE>::type *__restrict__ out,
                    float *partials, int *counters, const int n_inputs, const Problem p) {
    extern __shared__ unsigned char dynamic_shared[];
    unsigned char *shared = dynamic_shared + ((1024 - (shared_address(dynamic_shared) & 1023)) & 1023);
    const unsigned full = shared_address(shared) + BARRIERS_AT, empty = full + 8 * N_STAGES;
    const int warpgroup = threadIdx.x / 128;

    // A short last slot leaves inputs of an earlier one in the stage, which meet codes of 0: they must be finite.
    for (int i = threadIdx.x; i < N_STAGES * TILE_BYTES / 16; i += blockDim.x) {
        const int stage = i / (TILE_BYTES / 16);
        reinterpret_cast<uint4 *>(shared + stage * STAGE_BYTES)[i % (TILE_BYTES / 16)] = make_uint4(0, 0, 0, 0);
    }
    shared_fence();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < N_STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, CONSUMERS / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == N_WARPGROUPS) {
        produce(p, n_inputs, weights, x, shared_address(shared), full, empty);
    } else {
        const int thread = threadIdx.x % 128;
        Schedule schedule(p);
        Work work;
        Ring ring(0);
        while (schedule.next(p, work)) {
            const Corner corner = tile_corner(work.tile, p);
            float total[1][SUMS] = {};
            for (int slot = work.begin; slot < work.end; ++slot, ring.advance()) {
                barrier_wait(full + 8 * ring.stage, ring.parity);
                const unsigned char *stage = shared + ring.stage * STAGE_BYTES;
                run_slot(stage, stage + TILE_BYTES + warpgroup * Weights::bytes, thread, total);
                release_stage(empty + 8 * ring.stage);
            }
            if (work.end - work.begin == p.n_slots + p.n_outlier_slots ||
                join_pieces(p, work, partials, counters, total))
                store<Output<OUT_DTYPE>>(p, corner, warpgroup,
                                         shared + STORE_AT + warpgroup * STORE_TOKENS * STORE_PITCH,
                                         channel_scales + 2 * p.n_panels * PANEL_ROWS, out, 1.0f, total);
        }
    }
}
