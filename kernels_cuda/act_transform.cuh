// What comes between the channels' values and their codes in quantize_act.cu: ReLU or a norm, and the transform.
#pragma once

#include "act_problem.cuh"
#include "hadamard.cuh"

// The largest power of two that divides the group's width; 1 where nothing is to be transformed.
__device__ __forceinline__ int block_size(const Problem& p, const Place& place, int group) {
    const int width = place.group_width(p, group);
    return place.is_outlier || width <= 0 ? 1 : width & -width;
}

template <bool WHOLE>
__device__ __forceinline__ void transform(const Problem& p, const Place& place, Values& values) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int size = WHOLE ? GROUP_SIZE : block_size(p, place, place.group(run % LANE_GROUPS));
        butterflies<WHOLE, GROUP_LANES>(values[run], size);
        if (run == 1 && GROUP_SIZE == 128 && size == 128) {
#pragma unroll
            for (int i = 0; i < RUN_CHANNELS; ++i) {
                const float low = values[0][i], high = values[run][i];
                values[0][i] = ieee::add(low, high);
                values[run][i] = ieee::sub(low, high);
            }
        }
    }
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int size = WHOLE ? GROUP_SIZE : block_size(p, place, place.group(run % LANE_GROUPS));
        const float factor = orthogonal_factor(size);
#pragma unroll
        for (int i = 0; i < RUN_CHANNELS; ++i) values[run][i] = ieee::mul(values[run][i], factor);
    }
}

__device__ __forceinline__ void transform_groups(const Problem& p, const Place& place, Values& values) {
    const bool is_whole = block_size(p, place, 0) == GROUP_SIZE && block_size(p, place, GROUPS - 1) == GROUP_SIZE;
    if (__all_sync(ALL_LANES, is_whole)) {
        transform<true>(p, place, values);
    } else {
        transform<false>(p, place, values);
    }
}

// Has a norm's weights for the lane's channels on their way to the L2 cache.
__device__ __forceinline__ void ask_for_norm(const Problem& p, const Place& place) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int position = place.slot_number(p) * SLOT_CHANNELS + place.offset(run);
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm_weight + position));
        if (PROLOGUE == LAYER_NORM) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm_bias + position));
    }
}

// What comes between the channels' values and their codes: ReLU or a norm, and the transform.
__device__ __forceinline__ void prepare(const Problem& p, const Place& place, const Moments& moments,
                                        Values& values) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        if (PROLOGUE == RELU) {
#pragma unroll
            for (int i = 0; i < RUN_CHANNELS; ++i) values[run][i] = fmaxf(values[run][i], 0.0f);
        }
        if constexpr (HAS_NORM) {
            const int position = place.slot_number(p) * SLOT_CHANNELS + place.offset(run);
#pragma unroll
            for (int i = 0; i < RUN_CHANNELS; i += 4) {
                const auto weight = *reinterpret_cast<const Vector<float, 4>*>(p.norm_weight + position + i);
                Vector<float, 4> bias = {};
                if (PROLOGUE == LAYER_NORM) {
                    bias = *reinterpret_cast<const Vector<float, 4>*>(p.norm_bias + position + i);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float& value = values[run][i + j];
                    value = (value - moments.mean) * moments.inverse * weight.items[j] + bias.items[j];
                }
            }
        }
    }
    if (HADAMARD) transform_groups(p, place, values);
}
