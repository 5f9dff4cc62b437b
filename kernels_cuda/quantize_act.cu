// quantize_act: activations to INT4 codes per token and group, the outlier channels to INT8, in the layout that
// the GEMM kernels read (gemm_layout.cuh). Per token, all in float32:
//
//   y = prologue(x)      PROLOGUE 0 x | 1 RMSNorm | 2 LayerNorm | 3 SiLU(x) * up | 4 ReLU
//   y = y[perm]          GATHER: the last n_outliers channels of the stored order are the outliers
//   y = y H              HADAMARD: each group in blocks of the largest power of two p that divides its width,
//                        butterflies at distance 1, 2, 4, .. p/2, then one product with 1/sqrt(p)
//   scale = clip * max|y| / 7 per group (outliers: max|y| / 127 per token); 1 if that is no normal float32
//   code = clamp(rint(y / scale), -8, 7) (outliers: -128, 127)
//
//   PROGRESSIVE: base = max over groups of scale / 16 per token, factor = progressive_factor() per group,
//                scale = base * factor, and what is stored is code * factor (fits INT8)
//
//   input, up      ELEMENT [n_tokens, n_channels], input_stride and up_stride elements between rows; rows and the
//                  first outlier aligned to LOAD_WIDTH elements (or up null)
//   slots          uint16 [n_slots + n_outlier_slots][128]: the channel at each place of the stored order, or
//                  n_channels where there is none; GATHER only. 16-byte aligned
//   norm_weight,   float32 [n_slots + n_outlier_slots][128], in the stored order, 0 where there is no channel;
//   norm_bias      prologues 1 and 2 only, the bias 2 only. 16-byte aligned
//   codes          int8 [n_slots + n_outlier_slots][Mp][128], Mp = n_tokens rounded up to 8, 16-byte chunk c of
//                  row m at c ^ (m & 7). 16-byte aligned
//   token_scales   float32 [rows][Mp]: 128 / GROUP_SIZE rows per slot (PROGRESSIVE: one in all), then one for the
//                  outliers. Codes and scales are 0 where there is no channel, group, outlier or token
//
// n_slots = ceil((n_channels - n_outliers) / 128), at least 1; n_outliers 0 to 256; with GATHER n_channels is at
// most 65535. clip_ratio from 0.01 to 1. n_slots * Mp below 2^28.
//
// Without the norms, codes and scales are bit for bit those of the torch twin for scales of at least 2^-100 (see
// quotient() in int_codes.cuh). The norms' sums and SiLU's exponential round in their own way.
//
// A warp makes eight slots of a token at a time, four lanes a slot; a lane holds two runs of 16 channels, run r of
// lane l from channel 64 r + 16 l of the slot on. As channels lie, a warp makes the same slots of one token after
// the other, the next one's loads on their way meanwhile. STAGED, where channels are gathered or needed twice
// (norms, PROGRESSIVE), a CTA copies one token's row to shared memory first.
//
//   launch: grid (tokens at a time, parts of a row), block up to 256, whole warps
//     as channels lie  x from 1 to Mp; y such that each warp has one octet of slots
//     STAGED           x = Mp; y any, PROGRESSIVE 1. Dynamic shared memory: (n_channels rounded up to 8, + 8) * bytes
//                      of an ELEMENT (prologue 3: 4 bytes)

#if !defined(ELEMENT) || !defined(PROLOGUE) || !defined(GATHER) || !defined(HADAMARD) || !defined(GROUP_SIZE) || \
    !defined(PROGRESSIVE) || !defined(LOAD_WIDTH)
#error "quantize_act.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm_sm80.cuh"
#include "grid_order.cuh"
#include "hadamard.cuh"
#include "int_codes.cuh"

namespace {

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

#if PROLOGUE == 3
using Staged = float;
#else
using Staged = ELEMENT;
#endif
using Loaded = Vector<ELEMENT, LOAD_WIDTH>;
using Values = float[RUNS][RUN_CHANNELS];

// What was loaded, in words: where it stays zero, that costs a word each and not an element.
struct Raw {
    Vector<unsigned, (sizeof(Loaded) + 3) / 4> input;
#if PROLOGUE == 3
    Vector<unsigned, (sizeof(Loaded) + 3) / 4> up;
#endif
};

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

// LOAD_WIDTH channels of a token as they lie; past the last token, that one's: what comes of them is not stored.
__device__ __forceinline__ Raw load(const Problem& p, int token, int channel) {
    const long long row = min(token, p.n_tokens - 1);
    Raw raw;
    reinterpret_cast<Loaded&>(raw.input) = *reinterpret_cast<const Loaded*>(p.input + row * p.input_stride + channel);
#if PROLOGUE == 3
    reinterpret_cast<Loaded&>(raw.up) = *reinterpret_cast<const Loaded*>(p.up + row * p.up_stride + channel);
#endif
    return raw;
}

// Element i of what was loaded, after SiLU * up but before all else.
__device__ __forceinline__ float value_of(const Raw& raw, int i) {
    const float x = static_cast<float>(reinterpret_cast<const Loaded&>(raw.input).items[i]);
#if PROLOGUE == 3
    return __fdividef(x, 1.0f + expf(-x)) * static_cast<float>(reinterpret_cast<const Loaded&>(raw.up).items[i]);
#else
    return x;
#endif
}

// Starts the copy of a token's row to shared memory, a zero after its last channel.
__device__ __forceinline__ void start_staging(const Problem& p, int token, Staged* staged) {
    constexpr bool ASYNC = PROLOGUE != SILU_MUL && LOAD_WIDTH * sizeof(ELEMENT) == 16;
    const ELEMENT* row = p.input + min(token, p.n_tokens - 1) * p.input_stride;
    for (int channel = threadIdx.x * LOAD_WIDTH; channel < p.n_channels; channel += blockDim.x * LOAD_WIDTH) {
        if (ASYNC) {
            copy_async(staged + channel, row + channel);
        } else {
            const Raw raw = load(p, token, channel);
#pragma unroll
            for (int i = 0; i < LOAD_WIDTH; ++i) staged[channel + i] = static_cast<Staged>(value_of(raw, i));
        }
    }
    if (threadIdx.x == 0) staged[p.n_channels] = static_cast<Staged>(0.0f);
}

__device__ __forceinline__ float sum_over_cta(float sum) {
    __shared__ float partial[MAX_WARPS];
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
    __syncthreads();
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
    return sum_over_cta(sum) / p.n_channels;
}

__device__ __forceinline__ Moments find_moments(const Problem& p, const Staged* staged, float epsilon) {
    float mean = 0.0f;
    if (PROLOGUE == LAYER_NORM) mean = mean_over_row(p, staged, [](float x) { return x; });
    const float square = mean_over_row(p, staged, [mean](float x) { return (x - mean) * (x - mean); });
    return {mean, ieee::reciprocal(sqrtf(square + epsilon))};
}

// A read that stays where it is written: ahead of the wait for the row.
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

// The largest power of two that divides the group's width; 1 where nothing is to be transformed.
__device__ __forceinline__ int block_size(const Problem& p, const Place& place, int group) {
    const int width = place.group_width(p, group);
    return place.is_outlier || width <= 0 ? 1 : width & -width;
}

template <bool WHOLE>
__device__ __forceinline__ void transform(const Problem& p, const Place& place, Values& values) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int size = WHOLE ? GROUP_SIZE : block_size(p, place, run % GROUPS);
        butterflies<WHOLE, LANES>(values[run], size);
        if (run == 1 && GROUP_SIZE == 128 && size == 128) {
#pragma unroll
            for (int i = 0; i < RUN_CHANNELS; ++i) {
                const float low = values[0][i], high = values[1][i];
                values[0][i] = ieee::add(low, high);
                values[1][i] = ieee::sub(low, high);
            }
        }
    }
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const float factor = orthogonal_factor(WHOLE ? GROUP_SIZE : block_size(p, place, run % GROUPS));
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

// Largest magnitude of each group of the slot, or of the token's outliers.
__device__ __forceinline__ void find_largest(const Problem& p, const Place& place, const Values& values,
                                             float (&largest)[GROUPS]) {
    float of_run[RUNS];
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        of_run[run] = 0.0f;
#pragma unroll
        for (int i = 0; i < RUN_CHANNELS; ++i) of_run[run] = ieee::max_magnitude(of_run[run], values[run][i]);
    }
    const float of_both = ieee::max_magnitude(of_run[0], of_run[1]);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float mine = GROUPS == 1 || place.is_outlier ? of_both : of_run[group];
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            mine = ieee::max_magnitude(mine, __shfl_xor_sync(ALL_LANES, mine, step));
        }
        const float neighbour = __shfl_xor_sync(ALL_LANES, mine, LANES);
        largest[group] = place.is_outlier && p.n_outlier_slots == 2 ? ieee::max_magnitude(mine, neighbour) : mine;
    }
}

__device__ __forceinline__ float normal_scale(const Problem& p, float largest) {
    return divide_by<7>(ieee::mul(largest, p.clip_ratio));
}

__device__ __forceinline__ float one_if_zero(float scale) { return scale >= SMALLEST_NORMAL ? scale : 1.0f; }

// The rule of progressive scales: rounded up, so that nothing is clipped more. A zero group has factor 1.
__device__ __forceinline__ int progressive_factor(float scale, float base) {
    if (scale < SMALLEST_NORMAL) return 1;
    return static_cast<int>(ieee::clamp(ceilf(ieee::div(scale, base)), 1.0f, 16.0f));
}

// How the codes of a group are made.
struct Coder {
    float scale, inverse, factor;
    unsigned low, high;  // bounds of code * factor, twice in a word of two 16-bit numbers

    __device__ Coder(const Problem& p, const Place& place, float largest, float base) {
        int lowest = -8, highest = 7, integer_factor = 1;
        if (place.is_outlier) {
            scale = one_if_zero(divide_by<127>(largest));
            lowest = -128;
            highest = 127;
        } else if (PROGRESSIVE) {
            integer_factor = progressive_factor(normal_scale(p, largest), base);
            scale = ieee::mul(base, static_cast<float>(integer_factor));
        } else {
            scale = one_if_zero(normal_scale(p, largest));
        }
        inverse = ieee::reciprocal(scale);
        factor = static_cast<float>(integer_factor);
        low = (lowest * integer_factor & 0xffff) * 0x10001u;
        high = (highest * integer_factor & 0xffff) * 0x10001u;
    }

    // 16 operands: codes, times the factor where progressive.
    __device__ uint4 encode(const float (&values)[RUN_CHANNELS]) const {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            unsigned pairs[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float codes[2];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    codes[k] = ieee::add(quotient(values[4 * i + 2 * j + k], scale, inverse), ROUNDER);
                    if (PROGRESSIVE) codes[k] = ieee::fma(ieee::sub(codes[k], ROUNDER), factor, ROUNDER);
                }
                // Fewer than 2^15 in magnitude, so the low halves hold them whole.
                pairs[j] = __byte_perm(__float_as_uint(codes[0]), __float_as_uint(codes[1]), 0x5410);
                pairs[j] = __vmins2(__vmaxs2(pairs[j], low), high);
            }
            words[i] = __byte_perm(pairs[0], pairs[1], 0x6420);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

// The codes and scales of the lane's channels, zeros past the last token.
__device__ __forceinline__ void store(const Problem& p, const Place& place, int token, const Values& values,
                                      const float (&largest)[GROUPS], float base) {
    const bool is_token = token < p.n_tokens;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const Coder coder(p, place, largest[group], base);
        if (place.exists && place.lane == 0) {
            int row = -1;
            if (place.is_outlier) {
                if (place.slot + group == 0) row = PROGRESSIVE ? 1 : p.n_slots * GROUPS;
            } else if (!PROGRESSIVE) {
                row = place.slot * GROUPS + group;
            }
            const bool is_group = place.is_outlier || place.group_width(p, group) > 0;
            if (row >= 0) p.token_scales[row * p.padded_tokens + token] = is_token && is_group ? coder.scale : 0.0f;
        }
#pragma unroll
        for (int run = group; run < RUNS; run += GROUPS) {
            const uint4 words = is_token ? coder.encode(values[run]) : make_uint4(0, 0, 0, 0);
            const unsigned row = place.slot_number(p) * p.padded_tokens + token;
            if (place.exists) p.codes[row * 8 + ((run * LANES + place.lane) ^ (token & 7))] = words;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, MIN_CTAS)
quantize_act(const ELEMENT* __restrict__ input, const ELEMENT* __restrict__ up,
             const unsigned short* __restrict__ slots, const float* __restrict__ norm_weight,
             const float* __restrict__ norm_bias, uint4* __restrict__ codes, float* __restrict__ token_scales,
             int input_stride, int up_stride, float clip_ratio, float epsilon, const Sizes sizes) {
    const Problem p = {sizes, input,        up,           slots,     norm_weight, norm_bias,
                       codes, token_scales, input_stride, up_stride, clip_ratio};
    let_next_grid_begin();
    wait_for_earlier_grids();
    const int n_warps = blockDim.x / 32;
    const int first_octet = blockIdx.y * n_warps + threadIdx.x / 32, octet_step = gridDim.y * n_warps;

    if (p.n_outlier_slots == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        float* row = token_scales + (PROGRESSIVE ? 1 : p.n_slots * GROUPS) * p.padded_tokens;
        for (int token = blockIdx.x; token < p.padded_tokens; token += gridDim.x) row[token] = 0.0f;
    }

    Place place(p, first_octet);
    Values values;
    float largest[GROUPS];
    float base = 1.0f;
#if STAGED
    extern __shared__ uint4 dynamic_shared[];
    Staged* staged = reinterpret_cast<Staged*>(dynamic_shared);
    const int token = blockIdx.x;
    const bool one_walk = p.n_octets <= octet_step;
    start_staging(p, token, staged);
    Sources sources(p, place);  // on their way while the row is
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    Moments moments = {};
    if (HAS_NORM) moments = find_moments(p, staged, epsilon);
#if PROGRESSIVE
    __shared__ int largest_scale;  // as bits: positive floats and their bits have one order
    if (threadIdx.x == 0) largest_scale = 0;
    __syncthreads();
    for (int octet = first_octet; octet < p.n_octets; octet += octet_step) {
        if (octet != first_octet) {
            place = Place(p, octet);
            sources = Sources(p, place);
        }
        fetch(p, place, sources, staged, values);
        prepare(p, place, moments, values);
        find_largest(p, place, values, largest);
        const float scale = normal_scale(p, ieee::max_magnitude(largest[0], largest[GROUPS - 1]));
        if (place.exists && place.lane == 0 && !place.is_outlier && scale >= SMALLEST_NORMAL) {
            atomicMax(&largest_scale, __float_as_int(scale));
        }
    }
    __syncthreads();
    base = one_if_zero(ieee::mul(__int_as_float(largest_scale), 1.0f / 16.0f));
    if (threadIdx.x == 0) token_scales[token] = token < p.n_tokens ? base : 0.0f;
#endif
    for (int octet = first_octet; octet < p.n_octets; octet += octet_step) {
        if (!PROGRESSIVE || !one_walk) {  // else the values of the first walk are still here
            if (PROGRESSIVE || octet != first_octet) {
                place = Place(p, octet);
                sources = Sources(p, place);
            }
            fetch(p, place, sources, staged, values);
            prepare(p, place, moments, values);
            find_largest(p, place, values, largest);
        }
        store(p, place, token, values, largest, base);
    }
#else
    if (first_octet >= p.n_octets) return;
    const Span span(p, place);
    RawRuns raw;
    load_runs(p, blockIdx.x, span, raw);
    for (int token = blockIdx.x; token < p.padded_tokens; token += gridDim.x) {
        values_of(raw, values);
        if (token + gridDim.x < p.padded_tokens) load_runs(p, token + gridDim.x, span, raw);
        prepare(p, place, {}, values);
        find_largest(p, place, values, largest);
        store(p, place, token, values, largest, base);
    }
#endif
}
