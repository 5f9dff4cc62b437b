// The paged KV cache: one page holds PAGE_TOKENS tokens of one head, K and V, as the decode kernel's lanes read them.
//
//   pages   [n_pages][n_heads][PAGE_BYTES], 16-byte aligned:
//
//     | K: planes of chunks | V: planes of chunks | ranges half [PAGE_TOKENS][4]: K scale, K minimum, V scale, V minimum |
//
// A chunk is what one lane reads of 8 tokens x one of 32 places: CHUNK_WORDS words, cut into planes of PLANE_WORDS so
// that a warp's reads lie in a row: plane p, then chunk, then word. Chunk 32 * (token / 8) + lane. In mma's fragment
// order, lane = 4 g + t:
//
//   K: token g of the eight. Lane t has SLOTS slots of two codes; slot s < SLOTS / 2 is the channels t * SLOTS + 2 s and
//      the next of the head's first half, slot s + SLOTS / 2 the same of the second half: RoPE's partners share a lane.
//   V: tokens 2 t and 2 t + 1. Slot s is channel g * SLOTS + s of the two.
//
// Slot s lies in word s / SLOTS_PER_WORD, its codes at bit e * BITS and e * BITS + 16, e = s % SLOTS_PER_WORD. So a
// word masked by 0x000f000f is two halves, subnormal, that stand for code * 2^-24: operands of mma as they are.
// Heads of other than 32 n channels are filled up, each half of K and the end of V. With BITS 16 a code is a half and
// there are no ranges: value = code * scale + minimum otherwise.
#pragma once

#if !defined(HEAD_DIM) || !defined(BITS) || !defined(OFFSET_TOKENS)
#error "kv_pages.cuh needs HEAD_DIM, BITS and OFFSET_TOKENS"
#endif

constexpr int PAGE_TOKENS = 64;
constexpr int STORED_DIM = (HEAD_DIM + 31) / 32 * 32;
constexpr int SLOTS = STORED_DIM / 8;
constexpr int SLOTS_PER_WORD = 16 / BITS;
constexpr int CHUNK_WORDS = SLOTS / SLOTS_PER_WORD;
constexpr int PLANE_WORDS = CHUNK_WORDS % 4 == 0 ? 4 : CHUNK_WORDS % 3 == 0 ? 3 : 2;
constexpr int PLANES = CHUNK_WORDS / PLANE_WORDS;
constexpr int PAGE_CHUNKS = PAGE_TOKENS / 8 * 32;
constexpr int SIDE_WORDS = PAGE_CHUNKS * CHUNK_WORDS;  // of K or of V
constexpr int PAGE_WORDS = 2 * SIDE_WORDS + (BITS < 16 ? PAGE_TOKENS * 2 : 0);

static_assert(BITS == 4 || BITS == 8 || BITS == 16, "bits of a code");
static_assert(HEAD_DIM % 16 == 0 && PLANES * PLANE_WORDS == CHUNK_WORDS, "channels of a head: see kv_pages.py");

// Where word `word` of chunk `chunk` of a page's K or V lies.
__device__ __forceinline__ int chunk_word(int chunk, int word) {
    return word / PLANE_WORDS * (PAGE_CHUNKS * PLANE_WORDS) + chunk * PLANE_WORDS + word % PLANE_WORDS;
}

// The row of the offsets of K after RoPE that a position takes.
__device__ __forceinline__ int offset_row(int position, int n_rows) { return min(position / OFFSET_TOKENS, n_rows - 1); }

// The channel of the head at place `i` (0 .. STORED_DIM / 2 - 1) of a half of K, or -1 where it is filled up.
__device__ __forceinline__ int key_channel(int half, int i) {
    return HEAD_DIM == STORED_DIM || i < HEAD_DIM / 2 ? half * (HEAD_DIM / 2) + i : -1;
}

// Where the codes of a channel of K, or of V, lie: a word of a side, and a bit of it.
struct CodePlace {
    int word, bit;

    __device__ CodePlace(bool is_key, int token, int channel) {
        const int i = channel % (HEAD_DIM / 2), half = channel / (HEAD_DIM / 2);
        const int slot = is_key ? i % SLOTS / 2 + half * (SLOTS / 2) : channel % SLOTS;
        const int chunk = is_key ? token * 4 + i / SLOTS : token / 8 * 32 + channel / SLOTS * 4 + token % 8 / 2;
        word = chunk_word(chunk, slot / SLOTS_PER_WORD);
        bit = BITS * (slot % SLOTS_PER_WORD) + 16 * (is_key ? i % 2 : token % 2);
    }
};
