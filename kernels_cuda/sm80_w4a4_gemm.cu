// out[m][n] = sum over groups of (INT4 weights . activations) * scales + INT8 outliers * scales + bias, from sm_80 on.
//
// Operands: see gemm_layout.cuh; out [M][N] of OUT_DTYPE, row-major; bases 16-byte aligned; any M >= 1, N >= 1.
// The same sums in the same order as sm90_w4a4_gemm.cu without split tiles, whose fallback and check it is.
//
// A CTA of 8 warps makes 128 channels x TILE_TOKENS tokens, a warp 16 channels. Stages arrive by cp.async:
//
//   stage  | codes [TILE_TOKENS][128] | record of panel 0 | record of panel 1 | token scales |
//
// Weights are mma's A operand and come from a record in fragment order; tokens are B, by ldmatrix. With MMA_INT4 the
// two k32 steps that share a weight word are one m16n8k64 step: the word is the A register as it stands, and two
// registers of activations are packed into one the same way (K is only permuted, equally in A and B).
//
// Parameters: PROGRESSIVE 0/1 (weights), TOKEN_BASE 0/1 (progressive activations), GROUP_SIZE 64/128, SCALE_BYTES
// (exact weights 2 or 4, progressive 1), OUT_DTYPE, TILE_TOKENS 8..64, MMA_INT4 0/1 (INT4 activations, exact scales
// on both sides), SHARED_BYTES (the launch's dynamic shared memory); ALLOW_EMULATED_INT4 lets tests build MMA_INT4
// for sm_90. Launch: grid (token tiles, ceil(panels / 2)), 256 threads.
#if !defined(PROGRESSIVE) || !defined(TOKEN_BASE) || !defined(GROUP_SIZE) || !defined(SCALE_BYTES) || \
    !defined(OUT_DTYPE) || !defined(TILE_TOKENS) || !defined(MMA_INT4) || !defined(SHARED_BYTES)
#error "sm80_w4a4_gemm.cu lacks one of its parameters"
#endif
#if MMA_INT4 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(ALLOW_EMULATED_INT4)
#error "INT4 mma is emulated from sm_90 on; use MMA_INT4=0"
#endif

#include "gemm_layout.cuh"
#include "gemm_sm80.cuh"
#include "gemm_store.cuh"

namespace {

using Weights = Record<GROUP_SIZE, SCALE_BYTES>;
constexpr int PANELS = 2;
constexpr int THREADS = 256;
constexpr int N_STAGES = 3;
constexpr int N_TILES = TILE_TOKENS / 8;  // of mma's n, each thread has 4 elements of each
constexpr int TILE_BYTES = TILE_TOKENS * SLOT_INPUTS;
constexpr int SCALE_ROWS = TOKEN_BASE ? 1 : Weights::groups;
constexpr int SCALES_AT = TILE_BYTES + PANELS * Weights::bytes;
constexpr int STAGE_BYTES = SCALES_AT + SCALE_ROWS * TILE_TOKENS * 4;
constexpr float UNIT = PROGRESSIVE || MMA_INT4 ? 1.0f : EXACT_UNIT;

static_assert(PROGRESSIVE ? SCALE_BYTES == 1 : SCALE_BYTES == 2 || SCALE_BYTES == 4, "bytes of a group scale");
static_assert(!((PROGRESSIVE || TOKEN_BASE) && MMA_INT4), "code * factor is no INT4");
static_assert(N_STAGES * STAGE_BYTES <= SHARED_BYTES, "SHARED_BYTES is too small");

struct Problem {
    int n_tokens, padded_tokens, n_channels, n_panels, n_slots, n_outlier_slots;
};

// Starts the copies of one slot.
__device__ void load_stage(const Problem &p, const unsigned char *weights, const signed char *codes,
                           const float *token_scales, unsigned char *stage, int slot) {
    const bool outliers = slot >= p.n_slots;
    const int first_token = blockIdx.x * TILE_TOKENS;
    const int n_tokens = min(TILE_TOKENS, p.padded_tokens - first_token);
    const int code_slot = outliers ? p.n_slots + (slot - p.n_slots) / 2 : slot;
    const signed char *tile =
        codes + (static_cast<size_t>(code_slot) * p.padded_tokens + first_token) * SLOT_INPUTS;
    for (int i = threadIdx.x * 16; i < n_tokens * SLOT_INPUTS; i += THREADS * 16) copy_async(stage + i, tile + i);
    for (int i = threadIdx.x * 16; i < PANELS * Weights::bytes; i += THREADS * 16) {
        const int panel = min(static_cast<int>(blockIdx.y) * PANELS + i / Weights::bytes, p.n_panels - 1);
        const size_t record = static_cast<size_t>(panel) * (p.n_slots + p.n_outlier_slots) + slot;
        copy_async(stage + TILE_BYTES + i, weights + record * Weights::bytes + i % Weights::bytes);
    }
    const int n_rows = outliers ? 1 : SCALE_ROWS;
    const int first_row = outliers ? (TOKEN_BASE ? 1 : p.n_slots * SCALE_ROWS) : TOKEN_BASE ? 0 : slot * SCALE_ROWS;
    for (int i = threadIdx.x * 4; i < n_rows * TILE_TOKENS; i += THREADS * 4) {
        const int row = i / TILE_TOKENS, token = i % TILE_TOKENS;
        if (token < n_tokens)
            copy_async(stage + SCALES_AT + i * 4,
                       token_scales + static_cast<size_t>(first_row + row) * p.padded_tokens + first_token + token);
    }
}

// sums += the products of half a slot: two k32 steps of INT4, or one of INT8 outliers.
template <bool OUTLIERS>
__device__ __forceinline__ void multiply_half(const unsigned char *stage, const unsigned char *record, int half,
                                              int first_chunk, int (&sums)[N_TILES][4]) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const uint4 words = *reinterpret_cast<const uint4 *>(record + half * (CODE_BYTES / 2) + thread * 16);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
    unsigned low[4], high[4];
    if constexpr (!OUTLIERS && !MMA_INT4) {
        const int group = half * Weights::groups / 2;
        const uchar2 factors =
            reinterpret_cast<const uchar2 *>(record + CODE_BYTES + group * Weights::group_scale_bytes)[thread / 4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (PROGRESSIVE)
                unpack_times_factor(word[r], r & 1 ? factors.y : factors.x, low[r], high[r]);
            else
                unpack_times_16(word[r], low[r], high[r]);
        }
    }
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
        unsigned b[4];  // 4 chunks of 16 inputs: two k32 steps (of an outlier slot: both of its steps)
        const int chunk = first_chunk + (OUTLIERS ? 0 : half * 4) + lane / 8;
        load_tiles(stage + (j * 8 + lane % 8) * SLOT_INPUTS + (chunk ^ lane % 8) * 16, b);
        if constexpr (OUTLIERS) {
            mma_int8(sums[j], word, b[2 * half], b[2 * half + 1]);
        } else if constexpr (MMA_INT4) {
            mma_int4(sums[j], word, (b[0] & 0x0F0F0F0Fu) | (b[2] << 4 & 0xF0F0F0F0u),
                     (b[1] & 0x0F0F0F0Fu) | (b[3] << 4 & 0xF0F0F0F0u));
        } else {
            mma_int8(sums[j], low, b[0], b[1]);
            mma_int8(sums[j], high, b[2], b[3]);
        }
    }
}

__device__ __forceinline__ float2 load_scales(const unsigned char *record, int group) {
    const unsigned char *scales = record + CODE_BYTES + group * Weights::group_scale_bytes;
    const int pair = threadIdx.x % 128 / 4;
    if constexpr (SCALE_BYTES == 2) return __half22float2(reinterpret_cast<const __half2 *>(scales)[pair]);
    return reinterpret_cast<const float2 *>(scales)[pair];
}

// total += sums * channel scale * token scale; the sums begin again at zero. A scale that is not asked for is 1.
template <bool BY_CHANNEL, bool BY_TOKEN>
__device__ __forceinline__ void promote(float (&total)[N_TILES][4], int (&sums)[N_TILES][4], float2 channel_scales,
                                        const float *token_scales) {
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
        const float2 scales = *reinterpret_cast<const float2 *>(token_scales + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float sum = static_cast<float>(sums[j][i]);
            const float scaled = BY_CHANNEL ? sum * (i & 2 ? channel_scales.y : channel_scales.x) : sum;
            total[j][i] = BY_TOKEN ? fmaf(scaled, i & 1 ? scales.y : scales.x, total[j][i]) : total[j][i] + scaled;
            sums[j][i] = 0;
        }
    }
}

// total *= channel scale * token scale, once for a row's INT4 slots.
__device__ __forceinline__ void scale_total(float (&total)[N_TILES][4], float2 channel_scales,
                                            const float *token_scales) {
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
        const float2 scales = *reinterpret_cast<const float2 *>(token_scales + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (PROGRESSIVE) total[j][i] *= i & 2 ? channel_scales.y : channel_scales.x;
            if (TOKEN_BASE) total[j][i] *= i & 1 ? scales.y : scales.x;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sm80_w4a4_gemm(const unsigned char *__restrict__ weights, const float *__restrict__ channel_scales,
                   const signed char *__restrict__ codes, const float *__restrict__ token_scales,
                   Output<OUT_DTYPE>::type *__restrict__ out, const Problem p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int my_panel = blockIdx.y * PANELS + warp / 4;
    const int n_rows = p.n_panels * PANEL_ROWS, row = my_panel * PANEL_ROWS + warp % 4 * 16 + lane / 4;
    const int readable_row = min(row, n_rows - 9);  // a panel past the last one is computed and thrown away
    auto channel_pair = [&](int kind, float unit) {
        const float *scales = channel_scales + kind * n_rows + readable_row;
        return make_float2(scales[0] * unit, scales[8] * unit);
    };
    const int n_all = p.n_slots + p.n_outlier_slots;
    float total[N_TILES][4] = {};
    int sums[N_TILES][4] = {};

    for (int slot = 0; slot < N_STAGES - 1; ++slot) {
        if (slot < n_all) load_stage(p, weights, codes, token_scales, shared + slot * STAGE_BYTES, slot);
        copy_commit();
    }
    for (int slot = 0; slot < n_all; ++slot) {
        copy_wait<N_STAGES - 2>();
        __syncthreads();
        const int ahead = slot + N_STAGES - 1;
        if (ahead < n_all)
            load_stage(p, weights, codes, token_scales, shared + ahead % N_STAGES * STAGE_BYTES, ahead);
        copy_commit();

        const unsigned char *stage = shared + slot % N_STAGES * STAGE_BYTES;
        const unsigned char *record = stage + TILE_BYTES + warp / 4 * Weights::bytes;
        const float *tokens = reinterpret_cast<const float *>(stage + SCALES_AT);
        if (slot < p.n_slots) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                multiply_half<false>(stage, record, half, 0, sums);
                if constexpr (!PROGRESSIVE || !TOKEN_BASE) {
                    if (Weights::groups == 2 || half == 1) {
                        const int group = half * Weights::groups / 2;
                        const float2 scales = PROGRESSIVE ? float2{1.0f, 1.0f} : load_scales(record, group);
                        promote<!PROGRESSIVE, !TOKEN_BASE>(total, sums, scales, tokens + group * TILE_TOKENS);
                    }
                }
            }
            if ((PROGRESSIVE || TOKEN_BASE) && slot == p.n_slots - 1) {
                const float2 base = channel_pair(0, 1.0f);
                if (PROGRESSIVE && TOKEN_BASE)
                    promote<true, true>(total, sums, base, tokens);
                else
                    scale_total(total, base, tokens);
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply_half<true>(stage, record, half, (slot - p.n_slots & 1) * 4, sums);
            promote<true, true>(total, sums, channel_pair(1, 1.0f / UNIT), tokens);
        }
    }

    if (my_panel >= p.n_panels) return;
    const float2 bias = channel_pair(2, 1.0f);
#pragma unroll
    for (int j = 0; j < N_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int m = blockIdx.x * TILE_TOKENS + 8 * j + 2 * (lane % 4) + (i & 1), n = row + (i & 2 ? 8 : 0);
            if (m < p.n_tokens && n < p.n_channels)
                out[static_cast<size_t>(m) * p.n_channels + n] =
                    Output<OUT_DTYPE>::round(fmaf(total[j][i], UNIT, i & 2 ? bias.y : bias.x));
        }
}
