// out[m][n] = sum over groups of (INT4 weights . activations) * scales + INT8 outliers * scales + bias, on sm_90a.
//
// Operands: see gemm_layout.cuh (weights, codes, token_scales, channel_scales; bases 16-byte aligned), and
//   out       [M][N] of OUT_DTYPE, row-major; or, with HEAD_DIM 64 or 128, instead of it
//   head_codes, head_ranges  INT4 heads of the [M][N / HEAD_DIM][HEAD_DIM] rounded to OUT_DTYPE (1 or 2), as
//             quantize_kv.cu makes them with `clip_ratio`, HEAD_HADAMARD 0/1; N a multiple of HEAD_DIM
//   partials  float32, 2 * gridDim.x * N_WARPGROUPS * 64 * ROW_BLOCKS * TILE_TOKENS; only for split tiles
//   counters  int32 [n_stream_tiles], zero before the first launch; every launch leaves them zero
// Any M >= 1, N >= 1. Sums are INT32 inside a group (both sides progressive: over the whole row) and float32 across
// groups, in an order that depends on the shape alone: equal inputs give equal bits.
//
// It computes the transposed product: weights are wgmma's A operand, unpacked in registers, and tokens lie along its
// n, so a tile of 8 tokens wastes nothing. Two warps feed a team's ring of stages by bulk copies, one with weights, which
// it may read before the grids before this one have ended (grid_order.cuh), and one with tokens; K_TEAMS teams of
// N_WARPGROUPS warpgroups of ROW_BLOCKS panels each consume it in turns:
//
//   stage  | codes [TILE_TOKENS][128] | record of panel 0 | ... | record of the last panel | token scales |
//
// Parameters: PROGRESSIVE 0/1 (weights), TOKEN_BASE 0/1 (progressive activations), GROUP_SIZE 64/128, SCALE_BYTES
// (exact weights 2 or 4, progressive 1), OUT_DTYPE, HEAD_DIM (0: a matrix), HEAD_HADAMARD, TILE_TOKENS 8..256,
// CHUNK_TOKENS (tokens per wgmma, 8..128), N_WARPGROUPS, ROW_BLOCKS 1/2, K_TEAMS 1/2, N_STAGES (of a team),
// CONSUMER_REGISTERS (0: as compiled), MAX_REGISTERS (of a thread at launch; 0: as compiled), SHARED_BYTES (the launch's
// dynamic shared memory).
// Launch: 128 * (N_WARPGROUPS * K_TEAMS + 1) threads, one CTA for each multiprocessor at most.
#if !defined(PROGRESSIVE) || !defined(TOKEN_BASE) || !defined(GROUP_SIZE) || !defined(SCALE_BYTES) ||   \
    !defined(OUT_DTYPE) || !defined(TILE_TOKENS) || !defined(CHUNK_TOKENS) || !defined(N_WARPGROUPS) || \
    !defined(ROW_BLOCKS) || !defined(K_TEAMS) || !defined(N_STAGES) || !defined(CONSUMER_REGISTERS) ||   \
    !defined(MAX_REGISTERS) || !defined(SHARED_BYTES) || !defined(HEAD_DIM) || !defined(HEAD_HADAMARD)
#error "sm90_w4a4_gemm.cu lacks one of its parameters"
#endif

#include "gemm_stream.cuh"
#if HEAD_DIM
#include "gemm_heads.cuh"
#endif

namespace {

using Weights = Record<GROUP_SIZE, SCALE_BYTES>;
constexpr int TILE_BYTES = TILE_TOKENS * SLOT_INPUTS;
constexpr int SCALE_ROWS = TOKEN_BASE ? 1 : Weights::groups;  // of token scales in an INT4 slot
constexpr int SCALES_AT = TILE_BYTES + PANELS * Weights::bytes;
constexpr int STAGE_BYTES = (SCALES_AT + SCALE_ROWS * TILE_TOKENS * 4 + 1023) / 1024 * 1024;
constexpr int ALL_STAGES = K_TEAMS * N_STAGES;
constexpr int STORE_AT = ALL_STAGES * STAGE_BYTES;
constexpr int TEAM_SUMS_AT = STORE_AT + STORE_BYTES;
constexpr int FULL_AT = TEAM_SUMS_AT + TEAM_SUM_BYTES;  // a barrier for each stage that says it is full
constexpr int EMPTY_AT = FULL_AT + 8 * ALL_STAGES;      // and one that says it is empty
// Three tall warpgroups hide each other's promotion; others promote one buffer of sums while the next is filled.
constexpr bool THREE_TALL = N_WARPGROUPS == 3 && TILE_TOKENS > 96;
constexpr int SUM_BUFFERS = THREE_TALL ? 1 : 2;
constexpr int OUTLIER_LIMIT = ROW_BLOCKS > 1 || THREE_TALL ? 32 : 80;  // what the registers leave room for
constexpr int OUTLIER_CHUNK = CHUNK_TOKENS <= OUTLIER_LIMIT       ? CHUNK_TOKENS
                              : CHUNK_TOKENS / 2 <= OUTLIER_LIMIT ? CHUNK_TOKENS / 2
                                                                  : CHUNK_TOKENS / 4;
constexpr bool READS_PAIRS = TILE_TOKENS > 64 && GROUP_SIZE == 128 && ROW_BLOCKS == 1;  // others would spill
constexpr float UNIT = PROGRESSIVE ? 1.0f : EXACT_UNIT;

static_assert(PROGRESSIVE ? SCALE_BYTES == 1 : SCALE_BYTES == 2 || SCALE_BYTES == 4, "bytes of a group scale");
static_assert(TILE_TOKENS % CHUNK_TOKENS == 0 && TILE_TOKENS <= 256, "tile");
// More registers than the launch came with would be waited for without end.
constexpr int PRODUCER_REGISTERS = 40, THREADS = CONSUMERS + 128;
static_assert(CONSUMERS * CONSUMER_REGISTERS + 128 * PRODUCER_REGISTERS <= 65536 / THREADS / 8 * 8 * THREADS,
              "CONSUMER_REGISTERS is too large");
static_assert(K_TEAMS == 1 || K_TEAMS == 2, "a producing warpgroup has four warps");
static_assert(1024 + EMPTY_AT + 8 * ALL_STAGES <= SHARED_BYTES, "SHARED_BYTES is too small");

// Calls visit(corner, slot, stage, barrier) for every slot of the team, as soon as its stage is free.
template <typename Visit>
__device__ __forceinline__ void produce(const Problem &p, int team, unsigned shared, Visit visit) {
    Schedule schedule(p);
    Work work;
    Ring ring(team);
    while (schedule.next(p, work)) {
        const Corner corner = tile_corner(work.tile, p);
        for (int slot = own_slot(work.begin, team); slot < work.end; slot += K_TEAMS, ring.advance()) {
            barrier_wait(shared + EMPTY_AT + 8 * ring.stage, ring.parity ^ 1);
            visit(corner, slot, shared + ring.stage * STAGE_BYTES, shared + FULL_AT + 8 * ring.stage);
        }
    }
}

__device__ void produce_weights(const Problem &p, const unsigned char *weights, int team, unsigned shared) {
    const size_t panel_bytes = static_cast<size_t>(p.n_slots + p.n_outlier_slots) * Weights::bytes;
    produce(p, team, shared, [&](const Corner &corner, int slot, unsigned stage, unsigned barrier) {
        barrier_arrive_expect(barrier, PANELS * Weights::bytes);
#pragma unroll 1
        for (int i = 0; i < PANELS; ++i) {
            const int panel = min(corner.panel + i, p.n_panels - 1);
            const unsigned char *record = weights + panel * panel_bytes + static_cast<size_t>(slot) * Weights::bytes;
            if (p.n_token_tiles == 1) {
                bulk_copy_once(stage + TILE_BYTES + i * Weights::bytes, record, Weights::bytes, barrier);
            } else {
                bulk_copy(stage + TILE_BYTES + i * Weights::bytes, record, Weights::bytes, barrier);
            }
        }
    });
}

__device__ void produce_tokens(const Problem &p, const signed char *codes, const float *token_scales, int team,
                               unsigned shared) {
    wait_for_earlier_grids();
    produce(p, team, shared, [&](const Corner &corner, int slot, unsigned stage, unsigned barrier) {
        const unsigned n_tokens = min(TILE_TOKENS, p.padded_tokens - corner.token);
        const bool outliers = slot >= p.n_slots;
        const int code_slot = outliers ? p.n_slots + (slot - p.n_slots) / 2 : slot;
        const int n_rows = outliers ? 1 : SCALE_ROWS;
        const int first_row = outliers     ? (TOKEN_BASE ? 1 : p.n_slots * SCALE_ROWS)
                              : TOKEN_BASE ? 0
                                           : slot * SCALE_ROWS;
        barrier_arrive_expect(barrier, n_tokens * (SLOT_INPUTS + 4 * n_rows));
        const size_t token = static_cast<size_t>(code_slot) * p.padded_tokens + corner.token;
        bulk_copy(stage, codes + token * SLOT_INPUTS, n_tokens * SLOT_INPUTS, barrier);
#pragma unroll 1
        for (int row = 0; row < n_rows; ++row) {
            bulk_copy(stage + SCALES_AT + row * TILE_TOKENS * 4,
                      token_scales + static_cast<size_t>(first_row + row) * p.padded_tokens + corner.token,
                      n_tokens * 4, barrier);
        }
    });
}

// What a consumer thread knows of itself and of its team's ring.
struct Consumer {
    const unsigned char *shared;
    unsigned full, empty;
    int record;  // where the warpgroup's first record lies in a stage
    int words;   // where the thread's words lie in a record
    int pair;    // the thread's (row, row + 8) pair of the panel
    int token;   // the thread's first token of every eight
    int team;
    Ring ring;

    __device__ const unsigned char *wait() const {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        return shared + ring.stage * STAGE_BYTES;
    }
    __device__ void release() {
        release_stage(empty + 8 * ring.stage);
        ring.advance();
    }
};

// Steps of k32 in registers, from a record of INT4 codes (OUTLIERS: of INT8 codes).
template <bool OUTLIERS>
__device__ __forceinline__ void load_weights(const unsigned char *record, const Consumer &self,
                                             unsigned (&a)[4][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 words = *reinterpret_cast<const uint4 *>(record + half * (CODE_BYTES / 2) + self.words);
        const unsigned word[4] = {words.x, words.y, words.z, words.w};
        if constexpr (OUTLIERS) {
#pragma unroll
            for (int r = 0; r < 4; ++r) a[half][r] = word[r];
        } else if constexpr (PROGRESSIVE) {
            const int group = half * Weights::groups / 2;
            const auto factors = reinterpret_cast<const uchar2 *>(record + CODE_BYTES +
                                                                  group * Weights::group_scale_bytes)[self.pair];
#pragma unroll
            for (int r = 0; r < 4; ++r)
                unpack_times_factor(word[r], r & 1 ? factors.y : factors.x, a[2 * half][r], a[2 * half + 1][r]);
        } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) unpack_times_16(word[r], a[2 * half][r], a[2 * half + 1][r]);
        }
    }
}

__device__ __forceinline__ float2 load_scales(const unsigned char *record, int group, const Consumer &self) {
    const unsigned char *scales = record + CODE_BYTES + group * Weights::group_scale_bytes;
    if constexpr (SCALE_BYTES == 2) return __half22float2(reinterpret_cast<const __half2 *>(scales)[self.pair]);
    return reinterpret_cast<const float2 *>(scales)[self.pair];
}

// The scales of a thread's two tokens for sums 4 * quad to 4 * quad + 3. In one read where registers allow: a read
// for each, which the compiler makes of a pair that is not used as one, costs 2 to 4 % from 128 tokens on.
__device__ __forceinline__ float2 two_scales(const float *token_scales, int quad) {
    const float *pair = token_scales + 8 * quad;
    if constexpr (READS_PAIRS) return *reinterpret_cast<const float2 *>(pair);
    return make_float2(pair[0], pair[1]);
}

// total += sums * channel scale * token scale, for the two rows of a thread; a scale that is not asked for is 1.
template <bool BY_CHANNEL, bool BY_TOKEN, int COUNT>
__device__ __forceinline__ void promote(float *total, const int (&sums)[COUNT], float2 channel_scales,
                                        const float *token_scales) {
#pragma unroll
    for (int quad = 0; quad < COUNT / 4; ++quad) {
        const float2 tokens = BY_TOKEN ? two_scales(token_scales, quad) : float2{1.0f, 1.0f};
#pragma unroll
        for (int i = 4 * quad; i < 4 * quad + 4; ++i) {
            const float channel_scale = BY_CHANNEL ? i & 2 ? channel_scales.y : channel_scales.x : 1.0f;
            const float token_scale = i & 1 ? tokens.y : tokens.x;
            const float sum = static_cast<float>(sums[i]);
            total[i] = BY_CHANNEL && BY_TOKEN ? fmaf(sum * channel_scale, token_scale, total[i])
                                              : fmaf(sum, BY_TOKEN ? token_scale : channel_scale, total[i]);
        }
    }
}

// total *= channel scale * token scale, once for a row's INT4 slots; a scale that is not asked for is 1.
template <bool BY_CHANNEL, bool BY_TOKEN>
__device__ __forceinline__ void scale_total(float (&total)[SUMS], float2 channel_scales,
                                            const float *token_scales) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const float2 tokens = BY_TOKEN ? two_scales(token_scales, i / 4) : float2{1.0f, 1.0f};
        if constexpr (BY_CHANNEL) total[i] *= i & 2 ? channel_scales.y : channel_scales.x;
        if constexpr (BY_TOKEN) total[i] *= i & 1 ? tokens.y : tokens.x;
        if (i % 16 == 15) keep_order();  // loading all token scales first would spill
    }
}

// Slots whose sums are promoted group by group: INT4 with exact scales, and the outliers of both modes. A quantum is
// one group x one panel x CHUNK tokens; with two buffers, one is promoted while the tensor cores work on the next. The
// pipeline drains where a panel's weights are unpacked, which saves 16 registers and leaves the tensor cores to the
// other warpgroup for a moment. `fixed_scales` are the channel scales that groups do not have: the outliers' scales, or
// the base scales of progressive weights.
template <bool OUTLIERS, int CHUNK>
__device__ __forceinline__ void run_promoted(Consumer &self, int n_slots, int begin, int end,
                                             float (&total)[ROW_BLOCKS][SUMS],
                                             const float2 (&fixed_scales)[ROW_BLOCKS]) {
    constexpr int GROUPS = OUTLIERS ? 1 : Weights::groups;
    constexpr int STEPS = (OUTLIERS ? 2 : 4) / GROUPS;
    constexpr int CHUNKS = TILE_TOKENS / CHUNK;
    constexpr int PER_BLOCK = GROUPS * CHUNKS, LAST = ROW_BLOCKS * PER_BLOCK - 1;
    for (int slot = own_slot(begin, self.team); slot < end; slot += K_TEAMS) {
        const unsigned char *stage = self.wait();
        const float *tokens = reinterpret_cast<const float *>(stage + SCALES_AT) + self.token;
        const unsigned tile = swizzled_tile(shared_address(stage)) + (OUTLIERS ? (slot - n_slots & 1) * 4 : 0);
        int sums[SUM_BUFFERS][CHUNK / 2];
        float2 scales[ROW_BLOCKS][GROUPS] = {};
        auto promote_quantum = [&](int q) {
            const int block = q / PER_BLOCK, group = q / CHUNKS % GROUPS, chunk = q % CHUNKS;
            pin(sums[q % SUM_BUFFERS]);
            promote<OUTLIERS || !PROGRESSIVE, OUTLIERS || !TOKEN_BASE>(
                &total[block][chunk * (CHUNK / 2)], sums[q % SUM_BUFFERS], scales[block][group],
                tokens + group * TILE_TOKENS + chunk * CHUNK);
        };
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            const unsigned char *record = stage + self.record + block * Weights::bytes;
            unsigned a[4][4];
            load_weights<OUTLIERS>(record, self, a);
#pragma unroll
            for (int g = 0; g < GROUPS; ++g)
                scales[block][g] = OUTLIERS || PROGRESSIVE ? fixed_scales[block] : load_scales(record, g, self);
#pragma unroll
            for (int i = 0; i < PER_BLOCK; ++i) {
                const int q = block * PER_BLOCK + i, group = i / CHUNKS, chunk = i % CHUNKS;
                wgmma_fence();
#pragma unroll
                for (int step = group * STEPS; step < (group + 1) * STEPS; ++step)
                    Wgmma<CHUNK>::run(sums[q % SUM_BUFFERS], a[step],
                                      tile + chunk * (CHUNK * SLOT_INPUTS / 16) + 2 * step, step > group * STEPS);
                wgmma_commit();
                if constexpr (SUM_BUFFERS == 1) {
                    wgmma_wait<0>();
                    if (q < LAST) promote_quantum(q);
                } else {
                    if (i > 0) wgmma_wait<1>();
                    if (q > 0) promote_quantum(q - 1);
                }
            }
            wgmma_wait<0>();
        }
        promote_quantum(LAST);
        if (!OUTLIERS && (PROGRESSIVE || TOKEN_BASE) && slot + K_TEAMS >= end) {
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block)
                scale_total<PROGRESSIVE != 0, TOKEN_BASE != 0>(total[block], fixed_scales[block], tokens);
        }
        self.release();
    }
}

// INT4 slots with progressive scales on both sides: one INT32 sum over all of them, promoted once.
__device__ __forceinline__ void run_progressive(Consumer &self, int begin, int end,
                                                float (&total)[ROW_BLOCKS][SUMS],
                                                const float2 (&base_scales)[ROW_BLOCKS]) {
    constexpr int CHUNKS = TILE_TOKENS / CHUNK_TOKENS;
    int sums[ROW_BLOCKS][CHUNKS][CHUNK_TOKENS / 2] = {};
    const float *tokens;
    int slot = own_slot(begin, self.team);
    if (slot >= end) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * SUMS; ++i) total[i / SUMS][i % SUMS] = 0.0f;
        return;
    }
    do {
        const unsigned char *stage = self.wait();
        const unsigned tile = swizzled_tile(shared_address(stage));
        tokens = reinterpret_cast<const float *>(stage + SCALES_AT) + self.token;
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            unsigned a[4][4];
            load_weights<false>(stage + self.record + block * Weights::bytes, self, a);
            wgmma_fence();
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    Wgmma<CHUNK_TOKENS>::run(sums[block][chunk], a[step],
                                             tile + chunk * (CHUNK_TOKENS * SLOT_INPUTS / 16) + 2 * step, 1);
            wgmma_commit();
        }
        wgmma_wait<0>();
        if ((slot += K_TEAMS) >= end) break;
        self.release();
    } while (true);
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i)
            total[block][i] = static_cast<float>(sums[block][i / (CHUNK_TOKENS / 2)][i % (CHUNK_TOKENS / 2)]);
        scale_total<true, true>(total[block], base_scales[block], tokens);
    }
    self.release();
}

}  // namespace

#if MAX_REGISTERS
#define BOUNDS __maxnreg__(MAX_REGISTERS)
#else
#define BOUNDS __launch_bounds__(THREADS, 1)
#endif

extern "C" __global__ void BOUNDS
    sm90_w4a4_gemm(const unsigned char *__restrict__ weights, const float *__restrict__ channel_scales,
                   const signed char *__restrict__ codes, const float *__restrict__ token_scales,
#if HEAD_DIM
                   unsigned char *__restrict__ head_codes, __half2 *__restrict__ head_ranges, const float clip_ratio,
#else
                   Output<OUT_DTYPE>::type *__restrict__ out,
#endif
                   float *partials, int *counters, const Problem p) {
    extern __shared__ unsigned char dynamic_shared[];
    unsigned char *shared = dynamic_shared + ((1024 - (shared_address(dynamic_shared) & 1023)) & 1023);
    const unsigned full = shared_address(shared) + FULL_AT, empty = shared_address(shared) + EMPTY_AT;
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // uniform, and the compiler sees it

    let_next_grid_begin();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < ALL_STAGES; ++stage) {
            barrier_init(full + 8 * stage, 2);
            barrier_init(empty + 8 * stage, TEAM / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == N_WARPGROUPS * K_TEAMS) {
        if constexpr (CONSUMER_REGISTERS > 0) lower_registers<PRODUCER_REGISTERS>();
        const int warp = (threadIdx.x - CONSUMERS) / 32, team = warp / 2;
        if (threadIdx.x % 32 == 0 && team < K_TEAMS) {
            if (warp % 2 == 0) produce_weights(p, weights, team, shared_address(shared));
            if (warp % 2 == 1) produce_tokens(p, codes, token_scales, team, shared_address(shared));
        }
    } else {
        if constexpr (CONSUMER_REGISTERS > 0) raise_registers<CONSUMER_REGISTERS>();
        const int thread = threadIdx.x % 128, team = K_TEAMS == 1 ? 0 : warpgroup / N_WARPGROUPS;
        const int first_panel = (K_TEAMS == 1 ? warpgroup : warpgroup % N_WARPGROUPS) * ROW_BLOCKS;  // of a tile
        Consumer self{shared,
                      full,
                      empty,
                      TILE_BYTES + first_panel * Weights::bytes,
                      thread * 16,
                      thread / 4,
                      thread % 4 * 2,
                      team,
                      Ring(team)};
        Schedule schedule(p);
        Work work;
        const int n_rows = p.n_panels * PANEL_ROWS;
        wait_for_earlier_grids();
        while (schedule.next(p, work)) {
            const Corner corner = tile_corner(work.tile, p);
            float total[ROW_BLOCKS][SUMS];
            float2 fixed[ROW_BLOCKS];
            auto load_fixed = [&](int kind, float unit) {
#pragma unroll
                for (int block = 0; block < ROW_BLOCKS; ++block) {
                    const int panel = min(corner.panel + first_panel + block, p.n_panels - 1);
                    const float *scales =
                        channel_scales + kind * n_rows + panel * PANEL_ROWS + thread / 32 * 16 + thread % 32 / 4;
                    fixed[block] = make_float2(scales[0] * unit, scales[8] * unit);
                }
            };
            const int middle =
                min(max(p.n_slots, work.begin), work.end);  // INT4 slots before, outliers from here on
            if (PROGRESSIVE) load_fixed(0, 1.0f);
            if (PROGRESSIVE && TOKEN_BASE && work.begin < middle) {
                run_progressive(self, work.begin, middle, total, fixed);
            } else {
#pragma unroll
                for (int i = 0; i < ROW_BLOCKS * SUMS; ++i) total[i / SUMS][i % SUMS] = 0.0f;
            }
            if constexpr (!PROGRESSIVE || !TOKEN_BASE)
                run_promoted<false, CHUNK_TOKENS>(self, p.n_slots, work.begin, middle, total, fixed);
            if (middle < work.end) {
                load_fixed(1, 1.0f / UNIT);
                run_promoted<true, OUTLIER_CHUNK>(self, p.n_slots, middle, work.end, total, fixed);
            }
            if (!join_teams(team, shared + TEAM_SUMS_AT, total)) continue;
            if (work.end - work.begin < p.n_slots + p.n_outlier_slots &&
                !join_pieces(p, work, partials, counters, total))
                continue;
            const float *bias = channel_scales + 2 * n_rows;
#if HEAD_DIM
            store_heads<Output<OUT_DTYPE>>(p, corner, warpgroup, shared + STORE_AT, bias, head_codes, head_ranges,
                                           clip_ratio, UNIT, total);
#else
            store<Output<OUT_DTYPE>>(p, corner, warpgroup,
                                     shared + STORE_AT + warpgroup * STORE_TOKENS * STORE_PITCH, bias, out, UNIT,
                                     total);
#endif
        }
    }
}
