// kv_attention: one new token of every sequence attends to its cached ones, read from INT4 or INT8 pages (or float16
// ones, the baseline) with one pass over the cache: out = softmax(q K^T * softmax_scale) V, float32 online softmax.
//
//   query      ELEMENT [n_sequences, n_heads * GROUP, HEAD_DIM], query_stride elements between sequences: before the
//              norm (norm_weight) and before RoPE, which are applied here at position length - 1
//   pages, page_table, rotary, norm_weight   as in kv_append.cu
//   page_turns half2 [SLOTS / 4][PAGE_TOKENS][4][2][2]: cosines, sines of rotary's first page for two channels each, by
//              two slots, place, lane t and slot; KEY_MODE 2: cosine - sine and cosine + sine
//   key_offset, key_scale, n_offset_rows   as in kv_append.cu; the query is multiplied by key_scale after RoPE
//   lengths    int32 [n_sequences], the new token included; 0 for an empty slot, whose output is 0
//   is_settled promises that lengths, page_table and all tokens but each sequence's newest were written by grids that had
//              ended before some grid ahead on the stream began
//   out        ELEMENT [n_sequences, n_heads * GROUP, HEAD_DIM], contiguous
//   partials   float32 [n_sequences, n_heads, n_splits, GROUP, STORED_DIM + 2], counters uint32 [n_sequences, n_heads],
//              zero and left zero; n_splits > 1 only
//
// KEY_MODE says what is stored of K: 0 K after RoPE (with KEY_HADAMARD the query is transformed once instead), 1 K
// before RoPE, 2 K before RoPE under the Hadamard; KEY_OFFSET: K before RoPE less a static offset. V under the
// Hadamard (VALUE_HADAMARD): the output is transformed.
//
// How it works. A CTA has one head of one sequence, or one split of its pages; a warp takes every N_WARPS-th page, 16
// tokens a step, copied STAGES - 1 steps ahead into shared memory of its own, each lane what it reads itself. K is mma's
// A operand, the GROUP queries (up to 8, or 16) its B; P is transposed in registers and multiplies V^T. Scale and
// minimum stay outside of both products where they can: q K = scale (q c) + minimum sum(q), P V = (P scale) c + sum(P
// minimum), so codes go into mma as they are stored, as subnormal halves. Before RoPE, K must be rebuilt: the query
// is turned by the page's first position, K by its place in the page, whose 64 turns lie in shared memory; the
// Hadamard is mma on blocks of 16 channels, then butterflies across registers (exact: sums of codes stay below 2048).
//
// It may begin while grids ahead of it run (grid_order.cuh), and all of those began after the one that is_settled speaks of. So
// what it promises may be read at once, and the first pages are on their way when the query comes; a page with the newest
// token, which the grid before this one may be writing, is left until all have ended. query, page_table and lengths
// are not __restrict__: the compiler moves loads of what no one writes to before the wait.
//
//   launch: grid (n_heads, n_sequences, n_splits), block 32 * N_WARPS, dynamic shared memory SHARED_BYTES

#if !defined(ELEMENT) || !defined(GROUP) || !defined(KEY_MODE) || !defined(KEY_HADAMARD) || !defined(VALUE_HADAMARD) || \
    !defined(KEY_OFFSET) || !defined(N_WARPS) || !defined(STAGES) || !defined(MIN_CTAS) || !defined(SHARED_BYTES)
#error "kv_attention.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grid_order.cuh"
#include "head_shared.cuh"
#include "kv_softmax.cuh"

namespace {

constexpr int STEP_TOKENS = 16;
constexpr int PAGE_STEPS = PAGE_TOKENS / STEP_TOKENS;
constexpr int OFFSET_PAGES = OFFSET_TOKENS / PAGE_TOKENS;
constexpr int STAGE_WORDS = 4 * 32 * CHUNK_WORDS;
constexpr int RANGE_WORDS = BITS < 16 ? 2 * PAGE_TOKENS : 0;  // of a page; of two, as no copy is more than a page ahead
constexpr int ROWS = (QUERY_ROWS + N_WARPS - 1) / N_WARPS;  // of the queries, of a warp
constexpr int GROUP_ROWS = (GROUP + N_WARPS - 1) / N_WARPS;  // those of them that exist
constexpr int QUERY_WORDS = QUERY_ROWS * QUERY_STRIDE;
constexpr int TURN_WORDS = KEY_MODE ? PAGE_TOKENS * STORED_DIM / 2 : 0;
constexpr int OFFSET_WORDS = KEY_OFFSET ? STORED_DIM / 2 : 0;
constexpr bool PARKS_OPERAND = KEY_MODE && STORED_DIM > 128;  // registers are short: the query's operand lies in shared
constexpr int PARKED_WORDS = PARKS_OPERAND ? N_WARPS * 32 * HEAD_TILES * SLOTS : 0;
constexpr int RING_WORDS = N_WARPS * (STAGES * STAGE_WORDS + 2 * RANGE_WORDS);
constexpr int JOIN_WORDS = N_WARPS * GROUP * SHARE_STRIDE;
constexpr int SHARED_WORDS = QUERY_WORDS + TURN_WORDS + OFFSET_WORDS + PARKED_WORDS +
                             (RING_WORDS > JOIN_WORDS ? RING_WORDS : JOIN_WORDS);
constexpr float LOG2_E = 1.44269504f;
constexpr float SCORE_UNIT = KEY_MODE == 0 ? CODE_UNIT : 1.0f;  // scores are over it, so that none is multiplied by CODE_UNIT
constexpr int RESIDENT_CTAS =  // compilers for sm_100 and later need more registers
    MIN_CTAS * N_WARPS > 8 && __CUDA_ARCH__ >= 1000 ? 8 / N_WARPS : MIN_CTAS;

static_assert(KEY_MODE || !KEY_OFFSET, "after RoPE key_offset goes with key_scale");
static_assert(OFFSET_TOKENS % PAGE_TOKENS == 0, "a page has one offset");
static_assert(KEY_MODE == 0 || BITS < 16, "a float16 cache holds K after RoPE");
static_assert(KEY_MODE != 2 || (BITS == 4 && (HEAD_DIM & (HEAD_DIM - 1)) == 0 && HEAD_DIM >= 64), "exact sums");
static_assert(STAGES <= PAGE_STEPS + 1, "ranges of two pages; the first copies are of one");
static_assert(GROUP >= 1 && GROUP <= 16 && SHARED_BYTES == SHARED_WORDS * 4, "see attention_defines");

// The pages that a warp walks over, and the copies of its steps, which are started one after the other.
struct Walk {
    const unsigned* pages;
    const int* table;  // of the warp's pages, N_WARPS apart
    int lane, n_heads, head;
    unsigned ranges;  // shared memory: the lane's part of two pages' ranges
    int ids;          // of 32 pages
    int n_pages = 0, n_steps = 0, step = 0;
    const unsigned* source = nullptr;

    // The copy of the next of `n_steps` steps to `stage`.
    __device__ void start_copy(unsigned stage) {
        if (step < n_steps) {
            if (step % PAGE_STEPS == 0) {
                const int page = step / PAGE_STEPS;
                if (page && page % 32 == 0) ids = table[min(page + lane, n_pages - 1) * N_WARPS];
                const long long id = __shfl_sync(ALL_LANES, ids, page % 32);
                source = pages + (id * n_heads + head) * PAGE_WORDS + lane * PLANE_WORDS;
                const unsigned to = ranges + page % 2 * RANGE_WORDS * 4;
                if (BITS < 16) copy_words_async<4, 0, 2 * SIDE_WORDS * 4>(to, source + lane * (4 - PLANE_WORDS));
            }
            copy_part<0>(stage);
            source += 64 * PLANE_WORDS;
        }
        ++step;
        copy_commit();
    }

    // K of 8 tokens, K of the next 8, V, V: planes I, I + 1, .. of them all.
    template <int I>
    __device__ void copy_part(unsigned stage) const {
        constexpr int PLANE = I % PLANES, SIDE = I / PLANES / 2, EIGHT = I / PLANES % 2;
        constexpr int FROM = SIDE * SIDE_WORDS + (PLANE * PAGE_CHUNKS + EIGHT * 32) * PLANE_WORDS;
        copy_words_async<PLANE_WORDS, I * 32 * PLANE_WORDS * 4, FROM * 4>(stage, source);
        if constexpr (I + 1 < 4 * PLANES) copy_part<I + 1>(stage);
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, RESIDENT_CTAS)
kv_attention(const ELEMENT* query, const unsigned* __restrict__ pages, const int* page_table, const int* lengths,
             const float2* __restrict__ rotary, const unsigned* __restrict__ page_turns,
             const float* __restrict__ norm_weight, const float* __restrict__ key_offset, const float* __restrict__ key_scale,
             ELEMENT* __restrict__ out, float* __restrict__ partials, unsigned* __restrict__ counters, int query_stride,
             int table_stride, int n_offset_rows, int is_settled, float epsilon, float softmax_scale) {
    extern __shared__ __align__(16) unsigned shared[];
    float* queries = reinterpret_cast<float*>(shared);
    unsigned* turns = shared + QUERY_WORDS;
    unsigned* offsets = turns + TURN_WORDS;
    unsigned* parked = offsets + OFFSET_WORDS + threadIdx.x * (PARKED_WORDS != 0);
    unsigned* ring = offsets + OFFSET_WORDS + PARKED_WORDS;
    float* shares = reinterpret_cast<float*>(ring);

    const int head = blockIdx.x, n_heads = gridDim.x, sequence = blockIdx.y, split = blockIdx.z, n_splits = gridDim.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    let_next_grid_begin();
    float scales[LANE_PARTS];
#pragma unroll
    for (int k = 0; k < LANE_PARTS; ++k) {
        const bool exists = KEY_MODE == 0 && key_scale != nullptr && lane + 32 * k < HEAD_DIM;
        scales[k] = exists ? key_scale[head * HEAD_DIM + lane + 32 * k] : 1.0f;
    }
    for (int i = threadIdx.x * 4; i < TURN_WORDS; i += 32 * N_WARPS * 4) copy_async(turns + i, page_turns + i);
    copy_commit();
    if (!is_settled) wait_for_earlier_grids();

    // Page ids are asked for before anything is known of the sequence.
    const int length = lengths[sequence], position = length - 1;
    const int* table = page_table + sequence * table_stride;
    const int column = warp + lane * N_WARPS;
    const int first_ids = n_splits == 1 && column < table_stride ? table[column] : 0;
    ELEMENT* target = out + (static_cast<long long>(sequence) * n_heads + head) * GROUP * HEAD_DIM;
    if (length <= 0) {
        wait_for_earlier_grids();
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM && split == 0; i += 32 * N_WARPS) {
            target[i] = static_cast<ELEMENT>(0.0f);
        }
        copy_wait<0>();
        return;
    }

    // This CTA's pages, this warp's among them, and the first copies.
    const int n_pages = (length + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const int first = n_pages * split / n_splits + warp, end = n_pages * (split + 1) / n_splits;
    const unsigned own_ranges = shared_address(ring + N_WARPS * STAGES * STAGE_WORDS + warp * 2 * RANGE_WORDS);
    Walk walk{pages, table + first, lane, n_heads, head, own_ranges + lane * 16, first_ids};
    walk.n_pages = first < end ? (end - first + N_WARPS - 1) / N_WARPS : 0;
    if (n_splits > 1 && walk.n_pages) walk.ids = walk.table[min(lane, walk.n_pages - 1) * N_WARPS];
    const int last_tokens = length - (first + (walk.n_pages - 1) * N_WARPS) * PAGE_TOKENS;
    walk.n_steps = walk.n_pages ? (walk.n_pages - 1) * PAGE_STEPS + min(PAGE_STEPS, (last_tokens + 15) / STEP_TOKENS) : 0;
    float2 query_turns[PAIR_PARTS];
    if (KEY_MODE == 0) load_turns(rotary + static_cast<long long>(position) * (HEAD_DIM / 2), query_turns);
    const unsigned own_ring = shared_address(ring + warp * STAGES * STAGE_WORDS + lane * PLANE_WORDS);
    if (first == n_pages - 1) wait_for_earlier_grids();  // it has the newest token; the first copies are of one page
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        walk.start_copy(own_ring + step * STAGE_WORDS * 4);
    }

    wait_for_earlier_grids();  // for the query, queries warp, warp + N_WARPS, .. of it, and all that is written
    const ELEMENT* source = query + static_cast<long long>(sequence) * query_stride + head * GROUP * HEAD_DIM;
    float rows[ROWS][LANE_PARTS];
#pragma unroll
    for (int i = 0; i < ROWS * LANE_PARTS; ++i) {
        const int row = warp + i / LANE_PARTS * N_WARPS, channel = lane + i % LANE_PARTS * 32;
        const bool exists = row < GROUP && channel < HEAD_DIM;
        rows[i / LANE_PARTS][i % LANE_PARTS] = exists ? static_cast<float>(source[row * HEAD_DIM + channel]) : 0.0f;
    }
    for (int i = threadIdx.x; i < OFFSET_WORDS; i += 32 * N_WARPS) {  // [slot / 4][t][slot % 4]
        const int slot = i / 16 * 4 + i % 4, half = slot / (SLOTS / 2);
        const int channel = key_channel(half, i / 4 % 4 * SLOTS + slot % (SLOTS / 2) * 2);
        const float* row = key_offset + head * HEAD_DIM;
        float pair[2] = {};
        for (int j = 0; j < 2 && channel >= 0; ++j) {
            const int low = (channel + j) % (HEAD_DIM / 2);  // KEY_MODE 2: as a and -b, see `rebuild`
            pair[j] = KEY_MODE == 1 ? row[channel + j]
                                    : 0.5f / KEY_UNIT * (row[low + HEAD_DIM / 2] + (half ? -row[low] : row[low]));
        }
        offsets[i] = as_word(__floats2half2_rn(pair[0], pair[1]));
    }
    const auto has_row = [warp](int i) { return (i + 1) * N_WARPS <= GROUP || warp + i * N_WARPS < GROUP; };
    const auto row_of = [queries, warp](int i) { return queries + (warp + i * N_WARPS) * QUERY_STRIDE; };
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {  // zeros, too, where mma wants more rows
        if (warp + i * N_WARPS < QUERY_ROWS) store_lane_head(rows[i], row_of(i));
    }
    if (norm_weight != nullptr) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (has_row(i)) norm_head(row_of(i), norm_weight, epsilon);
        }
    }
    if (KEY_MODE == 0) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (has_row(i)) rotate_head(row_of(i), query_turns);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (!has_row(i)) continue;
            load_lane_head(row_of(i), rows[i]);
#pragma unroll
            for (int k = 0; k < LANE_PARTS; ++k) rows[i][k] *= scales[k];
            if (KEY_HADAMARD) transform_lane_head(rows[i]);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (has_row(i)) store_lane_head(rows[i], row_of(i));
        }
    }
    copy_wait<STAGES - 1>();
    __syncthreads();

    unsigned operand[HEAD_TILES][SLOTS];
    float sums[HEAD_TILES][2] = {};
    if (KEY_MODE == 0) {
        query_operand<false>(queries, nullptr, g, t, operand);
        query_sums(operand, t, 1.0f / SCORE_UNIT, sums);
    }
    const Hadamard16 hadamard(g, t);
    Softmax softmax(__shfl_sync(ALL_LANES, softmax_scale * (LOG2_E * KEY_UNIT * SCORE_UNIT), lane));
    const __half2 spike_unit = __floats2half2_rn(t == 0 ? SPIKE_UNIT : 0.0f, 0.0f);
    const unsigned lane_offsets = shared_address(offsets + t * 4), lane_turns = shared_address(turns + (g * 4 + t) * 4);
    const unsigned lane_ranges = kept(own_ranges + g * 8);
    const unsigned last_stage = own_ring + (STAGES - 1) * STAGE_WORDS * 4;
    unsigned free_stage = last_stage;
    int left = length - first * PAGE_TOKENS;
    // K after RoPE less offsets: each adds the same to all scores of its positions, so the first one is left out of all.
    const bool has_offsets = KEY_MODE == 0 && key_scale != nullptr;
    const int last_row = has_offsets ? offset_row(position, n_offset_rows) : 0;
    int row = 0;

#pragma unroll 1
    for (int page = 0; page < walk.n_pages; ++page, left -= N_WARPS * PAGE_TOKENS) {
        const int slot = page % TOGETHER;
        if (KEY_MODE && slot == 0) {
            const int next = TOGETHER > 1 ? min(g / GROUP, walk.n_pages - 1 - page) : 0;
            const int turn = position - (first + (page + next) * N_WARPS) * PAGE_TOKENS;
            const float2* turned_by = rotary + static_cast<long long>(turn) * (HEAD_DIM / 2);
            query_operand<true>(queries, turned_by, g, t, operand);
#pragma unroll
            for (int i = 0; PARKS_OPERAND && i < HEAD_TILES * SLOTS; ++i) {
                parked[i * 32 * N_WARPS] = operand[i / SLOTS][i % SLOTS];
            }
        }
        if (KEY_MODE == 0 && row != min((first + page * N_WARPS) / OFFSET_PAGES, last_row)) {
            row = min((first + page * N_WARPS) / OFFSET_PAGES, last_row);
            float missing[HEAD_TILES][LANE_COLUMNS];
            const float *first_offset = key_offset + head * HEAD_DIM, *offset = first_offset + row * n_heads * HEAD_DIM;
            offset_scores(queries, offset, first_offset, key_scale + head * HEAD_DIM, t, 1.0f / SCORE_UNIT, missing);
            softmax.move(missing);
        }
        const bool odd = TOGETHER == 8 && slot % 2;  // one query: which of the lane's columns may be this page's
        int lane_left = TOGETHER == 1 || (2 * t + odd) / GROUP == slot ? left - g : 0;
        unsigned ranges = lane_ranges + page % 2 * RANGE_WORDS * 4, page_turn = lane_turns;
        int step_left = min(left, PAGE_TOKENS);
        copy_wait<STAGES - 2>();
        __syncwarp();  // the page's ranges were copied by other lanes
#pragma unroll 1
        do {
            copy_wait<STAGES - 2>();
            walk.start_copy(free_stage);
            free_stage = free_stage == last_stage ? own_ring : free_stage + STAGE_WORDS * 4;
            const unsigned stage = free_stage;  // it is the next one that will be
            unsigned key_ranges[2] = {}, value_ranges[2] = {0x3c00u, 0x3c00u};
            Words words[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (BITS < 16) {
                    unsigned loaded[2];
                    read_shared<2>(ranges + 8 * i * 8, loaded);
                    key_ranges[i] = loaded[0];
                    value_ranges[i] = loaded[1];
                }
                load_chunk(stage + i * 32 * CHUNK_WORDS * 4, words[i]);
            }

            float products[HEAD_TILES][4] = {}, others[HEAD_TILES][4] = {};  // two chains of mma, half as long
            if constexpr (KEY_MODE == 0) {
#pragma unroll
                for (int k = 0; k < SLOTS / 2; ++k) {
                    const unsigned a[4] = {subnormal_codes(words[0], 2 * k), subnormal_codes(words[1], 2 * k),
                                           subnormal_codes(words[0], 2 * k + 1), subnormal_codes(words[1], 2 * k + 1)};
#pragma unroll
                    for (int tile = 0; tile < HEAD_TILES; ++tile) {
                        float (&own)[4] = k % 2 ? others[tile] : products[tile];
                        mma_float16<false>(own, a, operand[tile][2 * k], operand[tile][2 * k + 1]);
                    }
                }
            } else {
                __half2 keys[2][SLOTS];
                if constexpr (KEY_MODE == 2) {
                    hadamard.multiply(words, keys);
                } else {
#pragma unroll
                    for (int i = 0; i < 2 * SLOTS; ++i) keys[i % 2][i / 2] = exact_codes(words[i % 2], i / 2);
                }
                rebuild(keys, key_ranges, spike_unit, lane_offsets, page_turn);
#pragma unroll
                for (int k = 0; k < SLOTS / 2; ++k) {
                    const unsigned a[4] = {as_word(keys[0][2 * k]), as_word(keys[1][2 * k]), as_word(keys[0][2 * k + 1]),
                                           as_word(keys[1][2 * k + 1])};
#pragma unroll
                    for (int tile = 0; tile < HEAD_TILES; ++tile) {
                        const unsigned* own = parked + (tile * SLOTS + 2 * k) * 32 * N_WARPS;
                        const unsigned b0 = PARKS_OPERAND ? own[0] : operand[tile][2 * k];
                        const unsigned b1 = PARKS_OPERAND ? own[32 * N_WARPS] : operand[tile][2 * k + 1];
                        mma_float16<false>(k % 2 ? others[tile] : products[tile], a, b0, b1);
                    }
                }
            }
            float scores[HEAD_TILES][2][LANE_COLUMNS];
#pragma unroll
            for (int i = 0; i < 2 * LANE_COLUMNS * HEAD_TILES; ++i) {
                const int tile = i / 2 / LANE_COLUMNS, row = i % 2, j = i / 2 % LANE_COLUMNS, n = 2 * row + j;
                float score = products[tile][n] + others[tile][n];
                if (LANE_COLUMNS == 1 && odd) score = products[tile][n + 1] + others[tile][n + 1];
                if (KEY_MODE == 0 && BITS < 16) {
                    const float2 range = __half22float2(as_half2(key_ranges[row]));
                    score = score * range.x + range.y * sums[tile][j];
                }
                scores[tile][row][j] = score;
            }
            const auto leave_out = [&]() {  // places that are not used may hold anything
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (lane_left > 8 * i) continue;
                    value_ranges[i] = 0;
#pragma unroll
                    for (int j = 0; j < HEAD_TILES * LANE_COLUMNS; ++j) {
                        scores[j / LANE_COLUMNS][i][j % LANE_COLUMNS] = minus_infinity();
                    }
                }
            };
            float powers[HEAD_TILES][2][LANE_COLUMNS];
            if (TOGETHER > 1) leave_out();
            if (softmax.weigh(scores, TOGETHER == 1 && step_left < STEP_TOKENS, powers)) {
                if (TOGETHER == 1) leave_out();
                softmax.refer(scores, powers);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_chunk(stage + (2 + i) * 32 * CHUNK_WORDS * 4, words[i]);
                const int tokens = step_left - 8 * i - 2 * t;  // V's tokens: 2 t and the next
                if (BITS == 16 && tokens < 2) {  // weight 0 times what an unused place may hold is not 0
#pragma unroll
                    for (int j = 0; j < CHUNK_WORDS; ++j) words[i][j] &= tokens < 1 ? 0u : 0x0000ffffu;
                }
            }
            softmax.add(powers, value_ranges, odd, words);
            lane_left -= STEP_TOKENS;
            step_left -= STEP_TOKENS;
            ranges += STEP_TOKENS * 8;
            page_turn += STEP_TOKENS * 64;
        } while (step_left > 0);
    }

    // The warps' shares, then the splits', in a fixed order.
    copy_wait<0>();
    __syncthreads();
    softmax.store(shares + warp * GROUP * SHARE_STRIDE, g, t);
    __syncthreads();
    const long long item = static_cast<long long>(sequence) * n_heads + head;
    float* partial = partials + item * n_splits * GROUP * JOIN_STRIDE;
    const auto finish = [&](int row, Joined& joined) {
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) joined.sums[k] /= joined.denominator;
        if (VALUE_HADAMARD) transform_lane_head(joined.sums);
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) {
            if (lane + 32 * k < HEAD_DIM) target[row * HEAD_DIM + lane + 32 * k] = static_cast<ELEMENT>(joined.sums[k]);
        }
    };
    Joined joined[GROUP_ROWS];
#pragma unroll
    for (int i = 0; i < GROUP_ROWS; ++i) {
        if (has_row(i)) joined[i] = join_warps(shares + (warp + i * N_WARPS) * SHARE_STRIDE);
    }
    if (n_splits == 1) {
#pragma unroll
        for (int i = 0; i < GROUP_ROWS; ++i) {
            if (has_row(i)) finish(warp + i * N_WARPS, joined[i]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP_ROWS; ++i) {
        if (!has_row(i)) continue;
        float* place = partial + (split * GROUP + warp + i * N_WARPS) * JOIN_STRIDE;
#pragma unroll
        for (int k = 0; k < LANE_PARTS; ++k) place[lane + 32 * k] = joined[i].sums[k];
        if (lane == 0) place[STORED_DIM] = joined[i].largest, place[STORED_DIM + 1] = joined[i].denominator;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared[0] = atomicInc(counters + item, n_splits - 1);  // the last one leaves it at 0
    __syncthreads();
    if (shared[0] != n_splits - 1) return;
    __threadfence();
    for (int row = warp; row < GROUP; row += N_WARPS) {
        Joined whole = join_splits(partial + row * JOIN_STRIDE, n_splits);
        finish(row, whole);
    }
}
