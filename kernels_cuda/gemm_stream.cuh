// A persistent Hopper GEMM without its multiplication: the list of work of a CTA, the ring of stages, the joining of
// split tiles and the store. sm90_w4a4_gemm.cu and sm90_w4a16_gemm.cu fill in the rest.
//
// A CTA walks over its list of work: first its share of the stream tiles, all of whose slots are dealt out evenly
// (stream-K; the CTA with a tile's last slot adds up the others' pieces), then whole tiles.
// A tile is 64 * N_WARPGROUPS * ROW_BLOCKS channels x TILE_TOKENS tokens. A warpgroup holds ROW_BLOCKS panels of 64
// channels as `total[block][i]`: element i of a thread is channel 16 * warp + lane / 4 (+ 8 if i & 2), token
// 8 * (i / 4) + 2 * (lane & 3) + (i & 1), the D fragment of mma and of wgmma. K_TEAMS teams of N_WARPGROUPS
// warpgroups take a piece's slots in turns, the slots with slot % K_TEAMS == team, each from a ring of stages of its
// own, and the first team adds them up.
#pragma once

#include "gemm_layout.cuh"
#include "gemm_sm90.cuh"
#include "gemm_store.cuh"
#include "grid_order.cuh"

constexpr int PANELS = N_WARPGROUPS * ROW_BLOCKS;  // of a tile
constexpr int TEAM = 128 * N_WARPGROUPS;  // threads
constexpr int CONSUMERS = TEAM * K_TEAMS;
constexpr int SUMS = TILE_TOKENS / 2;  // a thread's elements of 64 channels x TILE_TOKENS
constexpr int STORE_TOKENS = TILE_TOKENS < 32 ? TILE_TOKENS : TILE_TOKENS % 32 ? 16 : 32;
constexpr int STORE_PITCH = PANEL_ROWS * 2 + 16;  // bytes; 16 more than the row keep stmatrix off bank conflicts
constexpr int STORE_BYTES = N_WARPGROUPS * STORE_TOKENS * STORE_PITCH;
constexpr int TEAM_SUM_BYTES = (K_TEAMS - 1) * TEAM * ROW_BLOCKS * SUMS * 4;
constexpr int BAND_TILES = 4;  // token tiles that walk over the rows together, so that both operands stay in L2

struct Problem {
    int n_tokens, padded_tokens, n_channels, n_panels, n_slots, n_outlier_slots, n_token_tiles, n_tiles;
    int n_stream_tiles, slots_per_stream_tile, slots_per_cta;
};

struct Work {
    int tile, begin, end;  // slots [begin, end)
};

// The CTA's list of work; producer and consumers each walk over their own copy. The slots of the stream tiles lie on
// one line, slots_per_stream_tile for each (some of them empty if that makes pieces end where tiles do), and each CTA
// takes slots_per_cta of them: from the back, so that it leaves its piece of a tile that another CTA adds up before it
// waits for the pieces of a tile of its own.
struct Schedule {
    int slot, slot_end, tile;

    __device__ explicit Schedule(const Problem &p) {
        const int n_stream_slots = p.n_stream_tiles * p.slots_per_stream_tile;
        slot = min(static_cast<int>(blockIdx.x) * p.slots_per_cta, n_stream_slots);
        slot_end = min(slot + p.slots_per_cta, n_stream_slots);
        tile = p.n_stream_tiles + blockIdx.x;
    }

    __device__ bool next(const Problem &p, Work &work) {
        while (slot < slot_end) {
            const int stream_tile = (slot_end - 1) / p.slots_per_stream_tile,
                      first = stream_tile * p.slots_per_stream_tile, begin = max(slot, first);
            work = {stream_tile, begin - first, min(slot_end - first, p.n_slots + p.n_outlier_slots)};
            slot_end = begin;
            if (work.begin < work.end) return true;
        }
        work = {tile, 0, p.n_slots + p.n_outlier_slots};
        tile += gridDim.x;
        return work.tile < p.n_tiles;
    }
};

// The team's first slot from `slot` on.
__device__ __forceinline__ int own_slot(int slot, int team) {
    return K_TEAMS == 1 ? slot : slot + (team - slot % K_TEAMS + K_TEAMS) % K_TEAMS;
}

struct Corner {
    int panel, token;
};

__device__ Corner tile_corner(int tile, const Problem &p) {
    const int n_row_tiles = (p.n_panels + PANELS - 1) / PANELS;
    const int band = tile / (BAND_TILES * n_row_tiles);
    const int width = min(BAND_TILES, p.n_token_tiles - band * BAND_TILES);
    const int inside = tile - band * BAND_TILES * n_row_tiles;
    return {inside / width * PANELS, (band * BAND_TILES + inside % width) * TILE_TOKENS};
}

// A position in a team's ring of stages: N_STAGES of them from team * N_STAGES on.
struct Ring {
    int stage, end;
    unsigned parity = 0;
    __device__ explicit Ring(int team) : stage(team * N_STAGES), end((team + 1) * N_STAGES) {}
    __device__ void advance() {
        if (++stage == (K_TEAMS == 1 ? N_STAGES : end)) stage -= N_STAGES, parity ^= 1;
    }
};

// A warp gives a stage back, when what it read there has come: an arrival does not wait for reads that are on their way,
// and the copy engine may overtake them (docs/LOG.md, 2026-11-28: the scales of the slot N_STAGES later).
__device__ __forceinline__ void release_stage(unsigned empty) {
    shared_fence();
    __syncwarp();
    barrier_arrive_if(threadIdx.x % 32 == 0, empty);
}

// Joins the pieces of a split tile in float32, in a fixed order: the CTA with the tile's last slot adds up the others'
// pieces, which they leave in `partials`, and its own. True for that CTA: it holds the whole sum then. It waits only
// for CTAs that have begun, since a launch has no more CTAs than run at a time, and those wait for nobody before.
// Larger tiles leave their own piece, too, and read it back: with sums that live across the reads of others' pieces
// ptxas needs two more moves for every wgmma, 10 % of the time.
__device__ bool join_pieces(const Problem &p, const Work &work, float *partials, int *counters,
                            float (&total)[ROW_BLOCKS][SUMS]) {
    constexpr bool READS_BACK = TILE_TOKENS > 128;
    constexpr int VECTORS = ROW_BLOCKS * SUMS / 4;
    const int n_slots = p.n_slots + p.n_outlier_slots;
    const int tile_slot = work.tile * p.slots_per_stream_tile;
    const int first = tile_slot / p.slots_per_cta, last = (tile_slot + n_slots - 1) / p.slots_per_cta;
    const bool is_last = work.end == n_slots;
    // A CTA leaves two pieces at most: of a tile whose last slot it has, and of one whose last slot it has not.
    auto piece = [&](int cta) {
        const size_t number = READS_BACK ? 2 * cta + (cta == last) : cta;
        return reinterpret_cast<float4 *>(partials) + number * VECTORS * TEAM + threadIdx.x;
    };
    if (READS_BACK || !is_last) {
        float4 *mine = piece(blockIdx.x);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const float *x = &total[i / (SUMS / 4)][i % (SUMS / 4) * 4];
            __stcg(mine + i * TEAM, make_float4(x[0], x[1], x[2], x[3]));
        }
        __threadfence();
    }
    if (!is_last) {
        join_threads(1, TEAM);
        if (threadIdx.x == 0) atomicAdd(counters + work.tile, 1);
        return false;
    }
    if (threadIdx.x == 0) {
        volatile int *arrived = counters + work.tile;
        while (*arrived < last - first) {}
        *arrived = 0;
        __threadfence();
    }
    join_threads(1, TEAM);
    if constexpr (READS_BACK) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * SUMS; ++i) total[i / SUMS][i % SUMS] = 0.0f;
    }
    for (int cta = READS_BACK ? last : last - 1; cta >= first; --cta) {
        const float4 *theirs = piece(cta);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const float4 x = __ldcg(theirs + i * TEAM);
            float *sum = &total[i / (SUMS / 4)][i % (SUMS / 4) * 4];
            sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        }
    }
    return true;
}

// Adds the other teams' sums of a piece to the first team's, through `buffer` (TEAM_SUM_BYTES). True for that team.
__device__ bool join_teams(int team, unsigned char *buffer, float (&total)[ROW_BLOCKS][SUMS]) {
    if constexpr (K_TEAMS == 1) return true;
    constexpr int VECTORS = ROW_BLOCKS * SUMS / 4;
    float4 *sums = reinterpret_cast<float4 *>(buffer) + threadIdx.x % TEAM;
    if (team > 0) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const float *x = &total[i / (SUMS / 4)][i % (SUMS / 4) * 4];
            sums[((team - 1) * VECTORS + i) * TEAM] = make_float4(x[0], x[1], x[2], x[3]);
        }
    }
    join_threads(6, CONSUMERS);
    if (team == 0) {
#pragma unroll
        for (int other = 0; other < K_TEAMS - 1; ++other) {
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) {
                const float4 x = sums[(other * VECTORS + i) * TEAM];
                float *sum = &total[i / (SUMS / 4)][i % (SUMS / 4) * 4];
                sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
            }
        }
    }
    join_threads(6, CONSUMERS);  // the buffer is free again
    return team == 0;
}

// The tile's sums, times `unit`, plus bias, to out: transposed through shared memory to 16 bytes along the channels.
template <typename Out>
__device__ void store(const Problem &p, const Corner &corner, int warpgroup, unsigned char *buffer,
                      const float *bias, typename Out::type *out, float unit, float (&total)[ROW_BLOCKS][SUMS]) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
        const int panel = corner.panel + warpgroup * ROW_BLOCKS + block;
        if (panel >= p.n_panels) break;
        const int row = panel * PANEL_ROWS + warp * 16 + lane / 4;
        const float low_bias = bias[row], high_bias = bias[row + 8];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) total[block][i] = fmaf(total[block][i], unit, i & 2 ? high_bias : low_bias);
        if constexpr (sizeof(typename Out::type) == 4) {
#pragma unroll
            for (int i = 0; i < SUMS; ++i) {
                const int m = corner.token + i / 4 * 8 + 2 * (lane & 3) + (i & 1), n = row + (i & 2 ? 8 : 0);
                if (m < p.n_tokens && n < p.n_channels)
                    out[static_cast<size_t>(m) * p.n_channels + n] = total[block][i];
            }
        } else {
            const int valid = min(PANEL_ROWS, p.n_channels - panel * PANEL_ROWS);
            const bool whole_vectors = p.n_channels % 8 == 0;
#pragma unroll
            for (int part = 0; part < TILE_TOKENS / STORE_TOKENS; ++part) {
                const int token = corner.token + part * STORE_TOKENS;
                if (token >= p.n_tokens) break;
                join_threads(2 + warpgroup, 128);
#pragma unroll
                for (int j = 0; j < STORE_TOKENS / 8; j += 2) {
                    const float *x = &total[block][(part * STORE_TOKENS / 8 + j) * 4];
                    const unsigned address = shared_address(buffer) +
                                             (8 * j + lane / 16 * 8 + lane % 8) * STORE_PITCH +
                                             (warp * 16 + lane / 8 % 2 * 8) * 2;
                    if constexpr (STORE_TOKENS >= 16) {
                        store_transposed(address, Out::pair(x[0], x[1]), Out::pair(x[2], x[3]),
                                         Out::pair(x[4], x[5]), Out::pair(x[6], x[7]));
                    } else {  // lanes 16..31 give no address
                        store_transposed(
                            shared_address(buffer) + lane % 8 * STORE_PITCH + (warp * 16 + lane / 8 % 2 * 8) * 2,
                            Out::pair(x[0], x[1]), Out::pair(x[2], x[3]));
                    }
                }
                join_threads(2 + warpgroup, 128);
                for (int i = thread; i < STORE_TOKENS * 8; i += 128) {
                    const int m = token + i / 8, n = i % 8 * 8;
                    if (m >= p.n_tokens || n >= valid) continue;
                    const unsigned char *from = buffer + i / 8 * STORE_PITCH + n * 2;
                    auto *to = out + static_cast<size_t>(m) * p.n_channels + panel * PANEL_ROWS + n;
                    if (whole_vectors) {
                        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
                    } else {
                        for (int k = 0; k < min(8, valid - n); ++k)
                            to[k] = reinterpret_cast<const typename Out::type *>(from)[k];
                    }
                }
            }
        }
    }
}
