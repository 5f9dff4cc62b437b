// quantize_act.cu's row of a token in shared memory: its copy, the sums of the norms over it, and the channels that a
// lane reads from it.
#pragma once

#include "act_input.cuh"
#include "gemm_sm80.cuh"
#include "hadamard.cuh"

#if PROLOGUE == 3
using Staged = float;
#else
using Staged = ELEMENT;
#endif

// The channels whose sums this CTA writes to `total`, of a token that others have parts of: none past the last token.
struct Share {
    int first, end;

    __device__ Share(const Problem& p, int token) {
        const int n_vectors = p.n_channels / LOAD_WIDTH, width = (n_vectors + gridDim.y - 1) / gridDim.y * LOAD_WIDTH;
        first = blockIdx.y * width;
        end = token < p.n_tokens ? first + width : 0;
    }
};

// What the thread has read, to shared memory; with ADDS the sums of the CTA's share to `total`, too. Adds to the sum of
// squares.
__device__ __forceinline__ void stage(const Problem& p, const Share& share, int token, int channel, const Raw& raw,
                                      Staged* staged, float& square) {
    Vector<Staged, LOAD_WIDTH> values;
#pragma unroll
    for (int i = 0; i < LOAD_WIDTH; ++i) {
        const float value = value_of(raw, i);
        values.items[i] = static_cast<Staged>(value);
        square += value * value;
    }
    *reinterpret_cast<Vector<Staged, LOAD_WIDTH>*>(staged + channel) = values;
    if constexpr (ADDS) {
        const long long place = static_cast<long long>(token) * p.n_channels + channel;
        if (channel >= share.first && channel < share.end) {
            *reinterpret_cast<Vector<Staged, LOAD_WIDTH>*>(p.total + place) = values;
        }
    }
}

// Starts the copy of a token's row to shared memory, a zero after its last channel; the thread's sum of squares where
// the row goes through registers.
__device__ __forceinline__ float start_staging(const Problem& p, const Share& share, int token, Staged* staged) {
    constexpr bool ASYNC = !HAS_SECOND && PROLOGUE != RMS_NORM && LOAD_WIDTH * sizeof(ELEMENT) == 16;
    constexpr int AHEAD = ASYNC ? 1 : LANES == 16 ? 2 : 4;  // reads that are on their way
    const ELEMENT* row = p.input + min(token, p.n_tokens - 1) * p.input_stride;
    const int step = blockDim.x * LOAD_WIDTH;
    float square = 0.0f;
    for (int first = threadIdx.x * LOAD_WIDTH; first < p.n_channels; first += AHEAD * step) {
        if (ASYNC) {
            copy_async(staged + first, row + first);
        } else {
            Raw raw[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (first + i * step < p.n_channels) raw[i] = load(p, token, first + i * step);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (first + i * step < p.n_channels) stage(p, share, token, first + i * step, raw[i], staged, square);
            }
        }
    }
    if (threadIdx.x == 0) staged[p.n_channels] = static_cast<Staged>(0.0f);
    return square;
}

__device__ __forceinline__ float sum_over_cta(float sum) {
    __shared__ float partial[MAX_WARPS];
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < MAX_WARPS; ++warp) sum += warp * 32 < blockDim.x ? partial[warp] : 0.0f;
    return sum;
}

// The mean of function(value) over the staged row.
template <typename Function>
__device__ __forceinline__ float mean_over_row(const Problem& p, const Staged* staged, Function function) {
    float sum = 0.0f;
    for (int channel = threadIdx.x * LOAD_WIDTH; channel < p.n_channels; channel += blockDim.x * LOAD_WIDTH) {
        const auto loaded = *reinterpret_cast<const Vector<Staged, LOAD_WIDTH>*>(staged + channel);
#pragma unroll
        for (int i = 0; i < LOAD_WIDTH; ++i) sum += function(static_cast<float>(loaded.items[i]));
    }
    sum = sum_over_cta(sum) / p.n_channels;
    __syncthreads();  // LayerNorm needs two
    return sum;
}

// `square`: the thread's part of RMSNorm's sum.
__device__ __forceinline__ Moments find_moments(const Problem& p, const Staged* staged, float square, float epsilon) {
    float mean = 0.0f;
    if (PROLOGUE == RMS_NORM) {
        square = sum_over_cta(square) / p.n_channels;
    } else {
        mean = mean_over_row(p, staged, [](float x) { return x; });
        square = mean_over_row(p, staged, [mean](float x) { return (x - mean) * (x - mean); });
    }
    return {mean, ieee::reciprocal(sqrtf(square + epsilon))};
}

// A read that stays where it is written: ahead of the waits for earlier grids and for the row.
__device__ __forceinline__ Vector<unsigned, 4> read_now(const void* source) {
    Vector<unsigned, 4> words;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.items[0]), "=r"(words.items[1]), "=r"(words.items[2]), "=r"(words.items[3])
                 : "l"(source));
    return words;
}

// Where the lane's channels lie in the row, GATHER only. Zeros' place where there is no channel.
struct Sources {
    Vector<unsigned, 4> pairs[RUNS][RUN_CHANNELS / 8];

    __device__ Sources(const Problem& p, const Place& place) {
        if (!GATHER) return;
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const unsigned short* first = p.slots + place.slot_number(p) * SLOT_CHANNELS + place.offset(run);
#pragma unroll
            for (int i = 0; i < RUN_CHANNELS / 8; ++i) pairs[run][i] = read_now(first + 8 * i);
        }
    }

    __device__ unsigned channel(int run, int i) const {
        const unsigned pair = pairs[run][i / 8].items[i % 8 / 2];
        return i % 2 ? pair >> 16 : pair & 0xffffu;
    }
};

// The lane's channels from the staged row; zeros where there is none.
__device__ __forceinline__ void fetch(const Problem& p, const Place& place, const Sources& sources,
                                      const Staged* staged, Values& values) {
#if GATHER
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
        for (int i = 0; i < RUN_CHANNELS; ++i) values[run][i] = static_cast<float>(staged[sources.channel(run, i)]);
    }
#else
    const Span span(p, place);
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
        for (int i = 0; i < RUN_CHANNELS; i += LOAD_WIDTH) {
            Vector<Staged, LOAD_WIDTH> loaded = {};
            const int channel = span.first[run] + i;
            if (channel < span.end) loaded = *reinterpret_cast<const Vector<Staged, LOAD_WIDTH>*>(staged + channel);
#pragma unroll
            for (int j = 0; j < LOAD_WIDTH; ++j) values[run][i + j] = static_cast<float>(loaded.items[j]);
        }
    }
#endif
}
