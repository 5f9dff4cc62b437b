// quantize_act.cu where channels are gathered and whole groups of 128 transformed: the same operands, the same bits.
//
//   y = x[perm], each group of 128 times H; codes and scales as there, exact ones
//
//   operands as there; rows and their length whole multiples of 16 bytes, n_channels - n_outliers a multiple of 128
//
// A CTA copies one token's row to shared memory and makes its slots from there, eight a warp at a time, four lanes a slot.
// The transform exchanges channels between lanes (act_exchange.cuh). A warp's first indices are asked for before the row,
// in registers: fetched after it, they cost 4-5 % (docs/LOG.md, 2026-11-28).
//
//   launch: grid (Mp, parts of a row), block up to 256, whole warps. Dynamic shared memory: bytes of a row + 16
//
// Parameter: ELEMENT.

#if !defined(ELEMENT)
#error "quantize_gathered.cu lacks its parameter"
#endif

#define PROLOGUE 0
#define GATHER 1
#define HADAMARD 1
#define GROUP_SIZE 128
#define PROGRESSIVE 0
#define LOAD_WIDTH 1
#define ADDS 0
#define SLOT_LANES 4

#include "act_codes.cuh"
#include "act_exchange.cuh"
#include "gemm_sm80.cuh"
#include "grid_order.cuh"

namespace {

constexpr int CTAS_OF_SM = IS_WIDE ? MIN_CTAS : 4;  // 64 registers, so 32 warps: 8 % less time at 4096 channels

using Indices = uint4[4];  // of a lane's channels: eight 16-bit ones for each run

// Volatile, or the compiler would move the loads to where their values are used.
__device__ __forceinline__ void read_indices(const Problem& p, const Place& place, Indices& indices) {
#pragma unroll
    for (int run = 0; run < 4; ++run) {
        const unsigned short* first =
            p.slots + place.slot_number(p) * SLOT_CHANNELS + exchange::before(place, run >> 1, run & 1);
        uint4& words = indices[run];
        asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                     : "l"(first));
    }
}

__device__ __forceinline__ void gather(const Indices& indices, const ELEMENT* row, Values& values) {
#pragma unroll
    for (int run = 0; run < 4; ++run) {
        const uint4& words = indices[run];
        const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const unsigned channel = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffffu;
            values[run / 2][run % 2 * 8 + i] = static_cast<float>(row[channel]);
        }
    }
}

__device__ __forceinline__ void store(const Problem& p, const Place& place, int token, const Values& values) {
    float largest[LANE_GROUPS];
    find_largest(p, place, values, largest);
    const Coder coder(p, place, largest[0], 1.0f);
    store_scale(p, place, 0, token, coder.scale);
    if (!place.exists) return;
    const unsigned slot_row = place.slot_number(p) * p.padded_tokens + token;
    unsigned char* codes = reinterpret_cast<unsigned char*>(p.codes + slot_row * 8);
#pragma unroll
    for (int run = 0; run < 4; ++run) {
        const float* first = &values[run / 2][run % 2 * 8];
        uint2 words = make_uint2(0, 0);
        if (token < p.n_tokens) words = {coder.encode(first), coder.encode(first + 4)};
        const int place_in_row = exchange::after(place, run >> 1, run & 1) ^ (token & 7) << 4;
        *reinterpret_cast<uint2*>(codes + place_in_row) = words;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, CTAS_OF_SM)
quantize_gathered(const ELEMENT* __restrict__ input, const unsigned short* __restrict__ slots,
                  uint4* __restrict__ codes, float* __restrict__ token_scales, int input_stride, float clip_ratio,
                  const Sizes sizes) {
    extern __shared__ uint4 dynamic_shared[];
    const Problem p = {sizes, input, nullptr, nullptr, slots, nullptr, nullptr,
                       codes, token_scales, input_stride, 0, clip_ratio};
    ELEMENT* row = reinterpret_cast<ELEMENT*>(dynamic_shared);
    constexpr int ELEMENTS = 16 / sizeof(ELEMENT);  // of a copy
    const int token = blockIdx.x, n_warps = blockDim.x / 32;
    int first_handful = blockIdx.y * n_warps;  // of the CTA's warps
    Place place(p, first_handful + threadIdx.x / 32);
    Indices indices;
    read_indices(p, place, indices);
    let_next_grid_begin();
    wait_for_earlier_grids();
    const ELEMENT* source = input + min(token, p.n_tokens - 1) * p.input_stride;
    for (int channel = threadIdx.x * ELEMENTS; channel < p.n_channels; channel += blockDim.x * ELEMENTS) {
        copy_async(row + channel, source + channel);
    }
    copy_commit();
    if (threadIdx.x == 0) {
        row[p.n_channels] = static_cast<ELEMENT>(0.0f);
        if (p.n_outlier_slots == 0 && blockIdx.y == 0) token_scales[p.n_slots * p.padded_tokens + token] = 0.0f;
    }
    copy_wait<0>();
    __syncthreads();
    // All warps go round equally often, so the compiler knows that their lanes are together.
    while (true) {
        Values values;
        gather(indices, row, values);
        exchange::transform(place, values);
        store(p, place, token, values);
        first_handful += gridDim.y * n_warps;
        if (first_handful >= p.n_handfuls) break;
        place = Place(p, first_handful + threadIdx.x / 32);
        read_indices(p, place, indices);
    }
}
