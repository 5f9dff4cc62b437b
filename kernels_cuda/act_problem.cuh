// What every part of quantize_act.cu goes by: its operands, sizes, and which channels a lane has. Parameters and contract
// stand there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "int_codes.cuh"

enum Prologue { NONE, RMS_NORM, LAYER_NORM, SILU_MUL, RELU };

constexpr int SLOT_CHANNELS = 128;
constexpr int LANES = SLOT_LANES;          // of a slot
constexpr int RUNS = LANES == 4 ? 2 : 1;  // of a lane
constexpr int RUN_CHANNELS = SLOT_CHANNELS / LANES / RUNS;
constexpr int SLOTS_PER_WARP = 32 / LANES;                      // a handful
constexpr int GROUPS = SLOT_CHANNELS / GROUP_SIZE;              // of a slot
constexpr int LANE_GROUPS = RUNS == 2 ? GROUPS : 1;             // of a lane: one of all it has, or one of each run
constexpr int GROUP_LANES = LANES * LANE_GROUPS / GROUPS;       // that have the same groups
constexpr int LOADS = RUN_CHANNELS / LOAD_WIDTH;                // of a run
constexpr int MAX_WARPS = LANES == 4 ? 8 : 16;
constexpr bool HAS_NORM = PROLOGUE == RMS_NORM || PROLOGUE == LAYER_NORM;
constexpr bool HAS_SECOND = PROLOGUE == SILU_MUL || ADDS;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// 24 warps share an SM at 80 registers a thread, 16 where a lane holds more (or the compiler needs more: sm_120).
constexpr bool IS_WIDE =
    sizeof(ELEMENT) == 4 || PROLOGUE == SILU_MUL || PROLOGUE == LAYER_NORM || __CUDA_ARCH__ >= 1000;
constexpr int MIN_CTAS = (LANES == 16 ? 32 : IS_WIDE ? 16 : 24) / MAX_WARPS;

static_assert(GROUP_SIZE == 64 || GROUP_SIZE == 128, "groups of 64 or 128 channels");
static_assert(LANES == 4 || LANES == 16, "many tokens and few");
static_assert(!ADDS || PROLOGUE == RMS_NORM, "only RMSNorm takes a sum");
static_assert(RUN_CHANNELS % LOAD_WIDTH == 0 && LOAD_WIDTH * sizeof(ELEMENT) <= 16, "at most 16 bytes a load");

#define STAGED (GATHER || PROLOGUE == 1 || PROLOGUE == 2)
#define BY_TOKEN (STAGED || PROGRESSIVE)  // a CTA makes one token

using Values = float[RUNS][RUN_CHANNELS];

// As the host passes them. first_outlier: of the slots in the order of the warps; two outlier slots begin at an even
// one, so that they lie side by side in one warp and can share a scale. n_handfuls: SLOTS_PER_WARP each, in that order.
struct Sizes {
    int n_tokens, padded_tokens, n_channels, n_normal, n_slots, n_outlier_slots, first_outlier, n_handfuls;
};

struct Problem : Sizes {
    const ELEMENT* input;
    const ELEMENT* second;  // up, or delta
    ELEMENT* total;
    const unsigned short* slots;
    const float* norm_weight;
    const float* norm_bias;
    uint4* codes;
    float* token_scales;
    long long input_stride, second_stride;
    float clip_ratio;
};

struct Moments {
    float mean, inverse;  // LayerNorm's mean (0 for RMSNorm) and 1 / the root of the mean square
};

// Where the lanes of a slot work. Past the last slot they do the first one over again and store nothing.
struct Place {
    int slot;  // among the normal slots or among the outlier slots
    int lane;  // of the slot
    bool is_outlier, exists;

    __device__ Place(const Problem& p, int handful) {
        const int number = handful * SLOTS_PER_WARP + threadIdx.x % 32 / LANES;
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

    // Which of the slot's groups the lane's are.
    __device__ int group(int of_lane) const { return RUNS == 2 ? of_lane : lane / GROUP_LANES; }

    // Channels of group `group` of the slot; not above 0 where it is empty.
    __device__ int group_width(const Problem& p, int group) const {
        return min(GROUP_SIZE, p.n_normal - slot * SLOT_CHANNELS - group * GROUP_SIZE);
    }
};
