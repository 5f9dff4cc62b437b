// A persistent Hopper GEMM without its multiplication: the list of work of a CTA, the ring of stages, the joining of
// split tiles and the store. sm90_w4a4_gemm.cu and sm90_w4a16_gemm.cu fill in the rest.
//
// A CTA walks over its list of work: first its share of the stream tiles, all of whose slots are dealt out evenly
// (stream-K; pieces meet in `partials`, and the piece that arrives last adds them up in order), then whole tiles.
// A tile is 64 * N_WARPGROUPS * ROW_BLOCKS channels x TILE_TOKENS tokens. A warpgroup holds ROW_BLOCKS panels of 64
// channels as `total[block][i]`: element i of a thread is channel 16 * warp + lane / 4 (+ 8 if i & 2), token
// 8 * (i / 4) + 2 * (lane & 3) + (i & 1), the D fragment of mma and of wgmma.
#pragma once

#include "gemm_layout.cuh"
#include "gemm_sm90.cuh"
#include "gemm_store.cuh"

constexpr int PANELS = N_WARPGROUPS * ROW_BLOCKS;  // of a tile
constexpr int CONSUMERS = 128 * N_WARPGROUPS;
constexpr int SUMS = TILE_TOKENS / 2;  // a thread's elements of 64 channels x TILE_TOKENS
constexpr int STORE_TOKENS = TILE_TOKENS < 32 ? TILE_TOKENS : 32;
constexpr int STORE_PITCH = PANEL_ROWS * 2 + 16;  // bytes; 16 more than the row keep stmatrix off bank conflicts
constexpr int STORE_BYTES = N_WARPGROUPS * STORE_TOKENS * STORE_PITCH;
constexpr int BAND_TILES = 16;  // token tiles that walk over the rows together, so that both operands stay in L2

struct Problem {
    int n_tokens, padded_tokens, n_channels, n_panels, n_slots, n_outlier_slots, n_token_tiles, n_tiles;
    int n_stream_tiles, slots_per_stream_tile, slots_per_cta;
};

struct Work {
    int tile, begin, end;  // slots [begin, end)
};

// The CTA's list of work; producer and consumers each walk over their own copy. The slots of the stream tiles lie on
// one line, slots_per_stream_tile for each (some of them empty if that makes pieces end where tiles do), and each CTA
// takes slots_per_cta of them.
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
            const int stream_tile = slot / p.slots_per_stream_tile,
                      begin = slot - stream_tile * p.slots_per_stream_tile;
            const int taken = min(slot_end - slot, p.slots_per_stream_tile - begin);
            slot += taken;
            work = {stream_tile, begin, min(begin + taken, p.n_slots + p.n_outlier_slots)};
            if (work.begin < work.end) return true;
        }
        work = {tile, 0, p.n_slots + p.n_outlier_slots};
        tile += gridDim.x;
        return work.tile < p.n_tiles;
    }
};

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

// A position in the ring of stages.
struct Ring {
    int stage = 0;
    unsigned parity = 0;
    __device__ void advance() {
        if (++stage == N_STAGES) stage = 0, parity ^= 1;
    }
};

// Leaves this piece of a split tile in `partials`. True for the piece that arrives last: it holds the whole sum then.
__device__ bool join_pieces(const Problem &p, const Work &work, float *partials, int *counters, int *is_last,
                            float (&total)[ROW_BLOCKS][SUMS]) {
    const int n_slots = p.n_slots + p.n_outlier_slots;
    const int tile_slot = work.tile * p.slots_per_stream_tile;
    const int first = tile_slot / p.slots_per_cta, last = (tile_slot + n_slots - 1) / p.slots_per_cta;
    constexpr int VECTORS = ROW_BLOCKS * SUMS / 4;
    // A CTA has at most two pieces: the end of one tile, then the beginning of another.
    auto piece = [&](int cta) {
        const bool begins_tile = cta * p.slots_per_cta <= tile_slot;
        return reinterpret_cast<float4 *>(partials) +
               static_cast<size_t>(2 * cta + begins_tile) * VECTORS * CONSUMERS + threadIdx.x;
    };
    float4 *mine = piece(blockIdx.x);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const float *x = &total[i / (SUMS / 4)][i % (SUMS / 4) * 4];
        __stcg(mine + i * CONSUMERS, make_float4(x[0], x[1], x[2], x[3]));
    }
    __threadfence();
    join_threads(1, CONSUMERS);
    if (threadIdx.x == 0) {
        *is_last = atomicAdd(counters + work.tile, 1) == last - first;
        if (*is_last) counters[work.tile] = 0;
    }
    join_threads(1, CONSUMERS);
    if (!*is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * SUMS; ++i) total[i / SUMS][i % SUMS] = 0.0f;
    for (int cta = first; cta <= last; ++cta) {
        const float4 *theirs = piece(cta);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const float4 x = __ldcg(theirs + i * CONSUMERS);
            float *sum = &total[i / (SUMS / 4)][i % (SUMS / 4) * 4];
            sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        }
    }
    return true;
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
