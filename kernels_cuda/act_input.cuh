// quantize_act.cu's channels as they lie in global memory: vectors of LOAD_WIDTH, and SiLU * up or + delta on them.
#pragma once

#include "act_problem.cuh"

using Loaded = Vector<ELEMENT, LOAD_WIDTH>;

// What was loaded, in words: where it stays zero, that costs a word each and not an element.
struct Raw {
    Vector<unsigned, (sizeof(Loaded) + 3) / 4> input;
    Vector<unsigned, HAS_SECOND ? (sizeof(Loaded) + 3) / 4 : 1> second;
};

// LOAD_WIDTH channels of a token as they lie; past the last token, that one's: what comes of them is not stored.
__device__ __forceinline__ Raw load(const Problem& p, int token, int channel) {
    const long long row = min(token, p.n_tokens - 1);
    Raw raw;
    reinterpret_cast<Loaded&>(raw.input) = *reinterpret_cast<const Loaded*>(p.input + row * p.input_stride + channel);
    if constexpr (HAS_SECOND) {
        reinterpret_cast<Loaded&>(raw.second) =
            *reinterpret_cast<const Loaded*>(p.second + row * p.second_stride + channel);
    }
    return raw;
}

// Element i of what was loaded, after SiLU * up or + delta but before all else.
__device__ __forceinline__ float value_of(const Raw& raw, int i) {
    const float x = static_cast<float>(reinterpret_cast<const Loaded&>(raw.input).items[i]);
    if constexpr (HAS_SECOND) {
        const float second = static_cast<float>(reinterpret_cast<const Loaded&>(raw.second).items[i]);
        if (ADDS) return static_cast<float>(static_cast<ELEMENT>(ieee::add(x, second)));
        return __fdividef(x, 1.0f + expf(-x)) * second;
    }
    return x;
}

// The lane's part of the row as it lies: where a run begins, and where it must end.
struct Span {
    int first[RUNS], end;

    __device__ Span(const Problem& p, const Place& place) {
        end = place.is_outlier ? p.n_channels : p.n_normal;
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            first[run] = (place.is_outlier ? p.n_normal : 0) + place.slot * SLOT_CHANNELS + place.offset(run);
        }
    }
};

using RawRuns = Raw[RUNS][LOADS];

__device__ __forceinline__ void load_runs(const Problem& p, int token, const Span& span, RawRuns& raw) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int channel = span.first[run] + i * LOAD_WIDTH;
            raw[run][i] = {};
            if (channel < span.end) raw[run][i] = load(p, token, channel);
        }
    }
}

__device__ __forceinline__ void values_of(const RawRuns& raw, Values& values) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
        for (int i = 0; i < RUN_CHANNELS; ++i) values[run][i] = value_of(raw[run][i / LOAD_WIDTH], i % LOAD_WIDTH);
    }
}
