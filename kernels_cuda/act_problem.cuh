// What every part of quantize_act.cu goes by: its operands, sizes, and which channels a lane has. Parameters and contract
// stand there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "int_codes.cuh"

enum Prologue { NONE, RMS_NORM, LAYER_NORM, SILU_MUL, RELU };

constexpr int SLOT_CHANNELS = 128;
constexpr int LANES = 4;  // of a slot
constexpr int RUNS = 2;   // of a lane
constexpr int RUN_CHANNELS = SLOT_CHANNELS / LANES / RUNS;
constexpr int SLOTS_PER_WARP = 32 / LANES;
constexpr int GROUPS = SLOT_CHANNELS / GROUP_SIZE;  // of a slot: one of both runs, or one of each run
constexpr int LOADS = RUN_CHANNELS / LOAD_WIDTH;    // of a run
constexpr int MAX_WARPS = 8;
constexpr bool HAS_NORM = PROLOGUE == RMS_NORM || PROLOGUE == LAYER_NORM;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// 24 warps share an SM at 80 registers a thread, 16 where a lane holds more (or the compiler needs more: sm_120).
constexpr bool IS_WIDE =
    sizeof(ELEMENT) == 4 || PROLOGUE == SILU_MUL || PROLOGUE == LAYER_NORM || __CUDA_ARCH__ >= 1000;
constexpr int MIN_CTAS = (IS_WIDE ? 16 : 24) / MAX_WARPS;

static_assert(GROUP_SIZE == 64 || GROUP_SIZE == 128, "groups of 64 or 128 channels");
static_assert(RUN_CHANNELS % LOAD_WIDTH == 0 && LOAD_WIDTH * sizeof(ELEMENT) <= 16, "at most 16 bytes a load");

#define STAGED (GATHER || PROGRESSIVE || PROLOGUE == 1 || PROLOGUE == 2)

using Values = float[RUNS][RUN_CHANNELS];

// As the host passes them. first_outlier: of the slots in the order of the warps; two outlier slots begin at an even
// one, so that they lie side by side in one warp and can share a scale. n_octets: eights of slots in that order.
struct Sizes {
    int n_tokens, padded_tokens, n_channels, n_normal, n_slots, n_outlier_slots, first_outlier, n_octets;
};

struct Problem : Sizes {
    const ELEMENT* input;
    const ELEMENT* up;
    const unsigned short* slots;
    const float* norm_weight;
    const float* norm_bias;
    uint4* codes;
    float* token_scales;
    long long input_stride, up_stride;
    float clip_ratio;
};

struct Moments {
    float mean, inverse;  // LayerNorm's mean (0 for RMSNorm) and 1 / the root of the mean square
};

// Where four lanes work. Past the last slot they do the first one over again and store nothing.
struct Place {
    int slot;  // among the normal slots or among the outlier slots
    int lane;  // 0..3
    bool is_outlier, exists;

    __device__ Place(const Problem& p, int octet) {
        const int number = octet * SLOTS_PER_WARP + threadIdx.x % 32 / LANES;
        lane = threadIdx.x % LANES;
        is_outlier = number >= p.first_outlier;
        slot = is_outlier ? number - p.first_outlier : number;
        exists = slot < (is_outlier ? p.n_outlier_slots : p.n_slots);
        if (!exists) slot = 0, is_outlier = false;
    }

    // Among all slots.
    __device__ int slot_number(const Problem& p) const { return (is_outlier ? p.n_slots : 0) + slot; }

    // Channels before the first one of a run, in its slot.
    __device__ int offset(int run) const { return run * (SLOT_CHANNELS / RUNS) + lane * RUN_CHANNELS; }

    // Channels of group `group` of the slot; not above 0 where it is empty.
    __device__ int group_width(const Problem& p, int group) const {
        return min(GROUP_SIZE, p.n_normal - slot * SLOT_CHANNELS - group * GROUP_SIZE);
    }
};
