// quantize_act: activations to INT4 codes per token and group, the outlier channels to INT8, in the layout that the
// GEMM kernels read (gemm_layout.cuh). Per token, all in float32:
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
//   input, up      ELEMENT [n_tokens, n_channels], input_stride and up_stride elements between rows; rows aligned
//                  to LOAD_WIDTH elements (or up null)
//   slots          uint16 [n_slots + n_outlier_slots][128]: the channel at each place of the stored order, or
//                  n_channels where there is none; GATHER only. 16-byte aligned
//   norm_weight,   float32 [n_slots + n_outlier_slots][128], in the stored order, 0 where there is no channel;
//   norm_bias      prologues 1 and 2 only, the bias 2 only. 16-byte aligned
//   codes          PACKED 0: int8 [n_slots][Mp][128], Mp = n_tokens rounded up to 8, 16-byte chunk c of row m at
//                  c ^ (m & 7), zeros where there is no channel or token.
//                  PACKED 1: two codes a byte, low nibble = even channel: uint8 [n_slots][Mp][64], 16-byte chunk c
//                  of row m at c ^ (m >> 1 & 3)
//   outlier_codes  int8 [n_outlier_slots][Mp][128], swizzled like PACKED 0. Both 16-byte aligned
//   scales         float32 [rows][Mp]: 128 / GROUP_SIZE rows per slot (PROGRESSIVE: one in all), then one for the
//                  outliers if there are any
//
// n_slots = ceil((n_channels - n_outliers) / 128), at least 1; n_outliers 0 to 256; with GATHER n_channels is at most
// 65535.
//
// Without the norms, codes and scales are bit for bit those of the torch twin as long as scale >= 2^-100: the quotient
// comes from a reciprocal and two fused steps, which tests/kernels/test_quantize_act.py shows to round to the same
// code as a division. The norms' sums and SiLU's exponential round in their own way.
//
// Eight lanes hold one slot (16 channels each) of TOKENS tokens, a warp four neighbouring slots. GATHER: the CTA
// first copies TOKENS whole rows to shared memory, the tokens of a channel side by side, so that one index and
// one read serve them all. PROGRESSIVE walks over the row twice.
//
//   launch: grid (ceil(Mp / TOKENS), parts of a row), block 32 * N_WARPS; PROGRESSIVE: one part.
//           dynamic shared memory, GATHER only: (n_channels rounded up to 8, + 8) * TOKENS * (PROLOGUE 3: 4, else
//           the size of ELEMENT) bytes

#if !defined(ELEMENT) || !defined(PROLOGUE) || !defined(GATHER) || !defined(HADAMARD) || !defined(GROUP_SIZE) || \
    !defined(PROGRESSIVE) || !defined(PACKED) || !defined(TOKENS) || !defined(LOAD_WIDTH) || !defined(N_WARPS)
#error "quantize_act.cu lacks one of its parameters"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ieee.cuh"

namespace {

enum Prologue { NONE, RMS_NORM, LAYER_NORM, SILU_MUL, RELU };

constexpr int SLOT_CHANNELS = 128;
constexpr int LANES = 8;  // of a slot
constexpr int CHANNELS = SLOT_CHANNELS / LANES;
constexpr int GROUPS = SLOT_CHANNELS / GROUP_SIZE;  // of a slot
constexpr int GROUP_LANES = LANES / GROUPS;
constexpr int SLOTS_PER_WARP = 32 / LANES;
constexpr int THREADS = 32 * N_WARPS;
constexpr bool HAS_NORM = PROLOGUE == RMS_NORM || PROLOGUE == LAYER_NORM;
constexpr unsigned ALL = 0xffffffffu;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low byte then holds

static_assert(GROUP_SIZE == 64 || GROUP_SIZE == 128, "groups of 64 or 128 channels");
static_assert(TOKENS == 1 || TOKENS == 2 || TOKENS == 4, "tokens of a CTA");
static_assert(CHANNELS % LOAD_WIDTH == 0 && LOAD_WIDTH * sizeof(ELEMENT) <= 16, "a load has at most 16 bytes");
static_assert(!(PROGRESSIVE && PACKED), "progressive operands are INT8");

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T items[N];
};

// What a row in shared memory holds of a channel: the tokens side by side.
#if PROLOGUE == 3
using Staged = float;
#else
using Staged = ELEMENT;
#endif
using Column = Vector<Staged, TOKENS>;
using Loaded = Vector<Staged, LOAD_WIDTH>;

struct Problem {
    const ELEMENT* input;
    const ELEMENT* up;
    const unsigned short* slots;
    const float* norm_weight;
    const float* norm_bias;
    int n_tokens, n_channels, n_normal, n_outliers, n_slots, n_outlier_slots, first_token;
    long long input_stride, up_stride;
};

struct Moments {
    float mean, inverse;  // LayerNorm's mean (0 for RMSNorm) and 1 / the root of the mean square
};

// Where a group of eight lanes works.
struct Place {
    int slot;  // among the normal slots or among the outlier slots
    int lane;  // 0..7
    bool is_outlier, exists;

    // Two outlier slots lie in one warp, side by side: they share a scale.
    __device__ Place(const Problem& p, int quad) {
        const int number = quad * SLOTS_PER_WARP + threadIdx.x % 32 / LANES;
        const int first_outlier = p.n_outlier_slots == 2 ? (p.n_slots + 1) / 2 * 2 : p.n_slots;
        lane = threadIdx.x % LANES;
        is_outlier = number >= first_outlier;
        slot = is_outlier ? number - first_outlier : number;
        exists = slot < (is_outlier ? p.n_outlier_slots : p.n_slots);
    }

    // Of the lane's first channel, in the stored order with every slot filled up.
    __device__ int position(const Problem& p) const {
        return ((is_outlier ? p.n_slots : 0) + slot) * SLOT_CHANNELS + lane * CHANNELS;
    }

    // Channels of the lane's group; not above 0 where a slot's second group is empty.
    __device__ int group_width(const Problem& p) const {
        return min(GROUP_SIZE, p.n_normal - slot * SLOT_CHANNELS - lane / GROUP_LANES * GROUP_SIZE);
    }
};

// LOAD_WIDTH channels of a token from `channel` on, after SiLU * up but before all else; zeros past the last token.
__device__ __forceinline__ Loaded load(const Problem& p, int token, int channel) {
    Vector<ELEMENT, LOAD_WIDTH> input = {};
    if (p.first_token + token >= p.n_tokens) return {};
    const long long row = p.first_token + token;
    input = *reinterpret_cast<const Vector<ELEMENT, LOAD_WIDTH>*>(p.input + row * p.input_stride + channel);
#if PROLOGUE == 3
    const auto up = *reinterpret_cast<const Vector<ELEMENT, LOAD_WIDTH>*>(p.up + row * p.up_stride + channel);
    Loaded product;
#pragma unroll
    for (int i = 0; i < LOAD_WIDTH; ++i) {
        const float x = static_cast<float>(input.items[i]);
        product.items[i] = __fdividef(x, 1.0f + expf(-x)) * static_cast<float>(up.items[i]);
    }
    return product;
#else
    return input;
#endif
}

// Sums over the CTA, one per token, for every thread.
__device__ __forceinline__ void sum_over_cta(float (&sums)[TOKENS]) {
    __shared__ float partial[N_WARPS][TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int step = 16; step; step /= 2) sums[t] += __shfl_xor_sync(ALL, sums[t], step);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][t] = sums[t];
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        sums[t] = 0.0f;
        for (int warp = 0; warp < N_WARPS; ++warp) sums[t] += partial[warp][t];
    }
    __syncthreads();
}

// Calls visit(token, value) for all of the CTA's tokens and the thread's share of their channels.
template <typename Visit>
__device__ __forceinline__ void visit_rows(const Problem& p, Visit visit) {
    for (int channel = threadIdx.x * LOAD_WIDTH; channel < p.n_channels; channel += THREADS * LOAD_WIDTH) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const Loaded values = load(p, t, channel);
#pragma unroll
            for (int i = 0; i < LOAD_WIDTH; ++i) visit(t, static_cast<float>(values.items[i]));
        }
    }
}

__device__ __forceinline__ void find_moments(const Problem& p, float epsilon, Moments (&moments)[TOKENS]) {
    float sums[TOKENS] = {};
    if (PROLOGUE == LAYER_NORM) {
        visit_rows(p, [&](int t, float value) { sums[t] += value; });
        sum_over_cta(sums);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        moments[t].mean = sums[t] / p.n_channels;
        sums[t] = 0.0f;
    }
    visit_rows(p, [&](int t, float value) { sums[t] += (value - moments[t].mean) * (value - moments[t].mean); });
    sum_over_cta(sums);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        moments[t].inverse = ieee::div(1.0f, sqrtf(sums[t] / p.n_channels + epsilon));
    }
}

// Copies the CTA's rows to shared memory, and a column of zeros after the last channel.
__device__ __forceinline__ void stage_rows(const Problem& p, Column* staged) {
    for (int channel = threadIdx.x * LOAD_WIDTH; channel < p.n_channels; channel += THREADS * LOAD_WIDTH) {
        Vector<Staged, LOAD_WIDTH * TOKENS> columns;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const Loaded values = load(p, t, channel);
#pragma unroll
            for (int i = 0; i < LOAD_WIDTH; ++i) columns.items[i * TOKENS + t] = values.items[i];
        }
        *reinterpret_cast<Vector<Staged, LOAD_WIDTH * TOKENS>*>(staged + channel) = columns;
    }
    if (threadIdx.x == 0) staged[p.n_channels] = {};
    __syncthreads();
}

// The lane's 16 channels of every token before the transform; zeros where there is no channel.
__device__ __forceinline__ void fetch(const Problem& p, const Place& place, const Column* staged,
                                      const Moments (&moments)[TOKENS], float (&values)[TOKENS][CHANNELS]) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) values[t][i] = 0.0f;
    }
    if (!place.exists) return;
    const int position = place.position(p);
#if GATHER
    const auto slots = *reinterpret_cast<const Vector<unsigned short, CHANNELS>*>(p.slots + position);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        const Column column = staged[slots.items[i]];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) values[t][i] = static_cast<float>(column.items[t]);
    }
#else
    const int gap = place.is_outlier ? p.n_slots * SLOT_CHANNELS - p.n_normal : 0;
    const int first = position - gap, end = place.is_outlier ? p.n_channels : p.n_normal;
#pragma unroll
    for (int i = 0; i < CHANNELS; i += LOAD_WIDTH) {
        if (first + i >= end) continue;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const Loaded loaded = load(p, t, first + i);
#pragma unroll
            for (int j = 0; j < LOAD_WIDTH; ++j) values[t][i + j] = static_cast<float>(loaded.items[j]);
        }
    }
#endif
    if (PROLOGUE == RELU) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
            for (int i = 0; i < CHANNELS; ++i) values[t][i] = fmaxf(values[t][i], 0.0f);
        }
    }
    if constexpr (HAS_NORM) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 4) {
            const auto weight = *reinterpret_cast<const Vector<float, 4>*>(p.norm_weight + position + i);
            Vector<float, 4> bias = {};
            if (PROLOGUE == LAYER_NORM) bias = *reinterpret_cast<const Vector<float, 4>*>(p.norm_bias + position + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    const float centred = PROLOGUE == LAYER_NORM ? values[t][i + j] - moments[t].mean : values[t][i + j];
                    values[t][i + j] = centred * moments[t].inverse * weight.items[j] + bias.items[j];
                }
            }
        }
    }
}

// The transform in blocks of `size`; EQUAL: every lane of the warp has size == GROUP_SIZE, known when compiled.
template <bool EQUAL>
__device__ __forceinline__ void transform(float (&values)[CHANNELS], int size) {
    if (EQUAL) size = GROUP_SIZE;
#pragma unroll
    for (int step = 1; step < CHANNELS; step *= 2) {
        if (step >= size) continue;
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            if (i & step) continue;
            const float low = values[i], high = values[i + step];
            values[i] = low + high;
            values[i + step] = low - high;
        }
    }
#pragma unroll
    for (int step = 1; step < GROUP_LANES; step *= 2) {
        const float sign = threadIdx.x & step ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            const float other = __shfl_xor_sync(ALL, values[i], step);
            const float sum = fmaf(values[i], sign, other);
            values[i] = step * CHANNELS < size ? sum : values[i];
        }
    }
    // 1/sqrt(2^e), rounded: exact for even e, else that of 1/sqrt(2) over a power of two.
    const int exponent = __ffs(size) - 1;
    const float power = __int_as_float((127 - exponent / 2) << 23);
    const float norm = exponent % 2 ? 0.70710678118654752f * power : power;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) values[i] = ieee::mul(values[i], norm);
}

__device__ __forceinline__ void transform_groups(const Problem& p, const Place& place,
                                                 float (&values)[TOKENS][CHANNELS]) {
    const int width = place.group_width(p);
    const int size = place.is_outlier || width <= 0 ? 1 : width & -width;
    const bool is_equal = __all_sync(ALL, size == GROUP_SIZE);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (is_equal) {
            transform<true>(values[t], size);
        } else {
            transform<false>(values[t], size);
        }
    }
}

// Largest magnitude of the lane's group, or of the token's outliers.
__device__ __forceinline__ float largest_magnitude(const Problem& p, const Place& place,
                                                   const float (&values)[CHANNELS]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const float other = __shfl_xor_sync(ALL, largest, step);
        if (step < GROUP_LANES || place.is_outlier) largest = fmaxf(largest, other);
    }
    const float other = __shfl_xor_sync(ALL, largest, LANES);
    return place.is_outlier && p.n_outlier_slots == 2 ? fmaxf(largest, other) : largest;
}

__device__ __forceinline__ float one_if_zero(float scale) { return scale >= SMALLEST_NORMAL ? scale : 1.0f; }

// The rule of progressive scales: rounded up, so that nothing is clipped more. A zero group has factor 1.
__device__ __forceinline__ float progressive_factor(float scale, float base) {
    if (scale < SMALLEST_NORMAL) return 1.0f;
    return ieee::clamp(ceilf(ieee::div(scale, base)), 1.0f, 16.0f);
}

// Four codes in a word, times `factor` where progressive. The quotient is x * (1/scale), corrected once by its
// exact remainder.
__device__ __forceinline__ unsigned encode(const float* values, float scale, float inverse, float low, float high,
                                           float factor) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float estimate = ieee::mul(values[i], inverse);
        const float quotient = fmaf(fmaf(-estimate, scale, values[i]), inverse, estimate);
        float code = ieee::add(ieee::clamp(quotient, low, high), MAGIC);
        if (PROGRESSIVE) code = fmaf(ieee::sub(code, MAGIC), factor, MAGIC);
        word |= (__float_as_uint(code) & 0xffu) << (8 * i);
    }
    return word;
}

// Two words of four nibbles in the low halves of their bytes to one word of eight.
__device__ __forceinline__ unsigned pack_nibbles(unsigned low, unsigned high) {
    low = (low & 0x000f000fu) | (low >> 4 & 0x00f000f0u);
    high = (high & 0x000f000fu) | (high >> 4 & 0x00f000f0u);
    return __byte_perm(low, high, 0x6420);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_act(const ELEMENT* __restrict__ input, const ELEMENT* __restrict__ up,
             const unsigned short* __restrict__ slots, const float* __restrict__ norm_weight,
             const float* __restrict__ norm_bias, unsigned char* __restrict__ codes,
             unsigned char* __restrict__ outlier_codes, float* __restrict__ scales, int n_tokens, int n_channels,
             int n_outliers, int input_stride, int up_stride, float clip_ratio, float epsilon) {
    const int n_normal = n_channels - n_outliers;
    const Problem p = {
        input,     up,
        slots,     norm_weight,
        norm_bias, n_tokens,
        n_channels, n_normal,
        n_outliers, (n_normal + SLOT_CHANNELS - 1) / SLOT_CHANNELS,
        (n_outliers + SLOT_CHANNELS - 1) / SLOT_CHANNELS, static_cast<int>(blockIdx.x) * TOKENS,
        input_stride, up_stride,
    };
    const int padded_tokens = (n_tokens + 7) / 8 * 8;
    const int first_outlier = p.n_outlier_slots == 2 ? (p.n_slots + 1) / 2 * 2 : p.n_slots;
    const int n_quads = (first_outlier + p.n_outlier_slots + SLOTS_PER_WARP - 1) / SLOTS_PER_WARP;
    const int first_quad = blockIdx.y * N_WARPS + threadIdx.x / 32, quad_step = gridDim.y * N_WARPS;

    extern __shared__ uint4 dynamic_shared[];
    Column* staged = reinterpret_cast<Column*>(dynamic_shared);
    Moments moments[TOKENS];
    if (HAS_NORM) find_moments(p, epsilon, moments);
    if (GATHER) stage_rows(p, staged);

    float values[TOKENS][CHANNELS];
    float base[TOKENS];
#if PROGRESSIVE
    __shared__ int largest_scale[TOKENS];  // as bits: positive floats and their bits have one order
    if (threadIdx.x < TOKENS) largest_scale[threadIdx.x] = 0;
    __syncthreads();
    for (int quad = first_quad; quad < n_quads; quad += quad_step) {
        const Place place(p, quad);
        fetch(p, place, staged, moments, values);
        if (HADAMARD) transform_groups(p, place, values);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float largest = largest_magnitude(p, place, values[t]);
            const float scale = ieee::div(ieee::mul(largest, clip_ratio), 7.0f);
            if (place.lane % GROUP_LANES == 0 && !place.is_outlier && scale >= SMALLEST_NORMAL) {
                atomicMax(&largest_scale[t], __float_as_int(scale));
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        base[t] = one_if_zero(ieee::mul(__int_as_float(largest_scale[t]), 1.0f / 16.0f));
        const int token = p.first_token + t;
        if (threadIdx.x == 0 && token < padded_tokens) scales[token] = base[t];
    }
#endif

    for (int quad = first_quad; quad < n_quads; quad += quad_step) {
        const Place place(p, quad);
        if (!PROGRESSIVE || n_quads > quad_step) {  // else the values of the first walk are still here
            fetch(p, place, staged, moments, values);
            if (HADAMARD) transform_groups(p, place, values);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float largest = largest_magnitude(p, place, values[t]);
            const int token = p.first_token + t;
            float scale = ieee::div(place.is_outlier ? largest : ieee::mul(largest, clip_ratio),
                                    place.is_outlier ? 127.0f : 7.0f);
            float factor = 1.0f;
            if (PROGRESSIVE && !place.is_outlier) {
                factor = progressive_factor(scale, base[t]);
                scale = ieee::mul(base[t], factor);
            } else {
                scale = one_if_zero(scale);
            }
            if (!place.exists || token >= padded_tokens) continue;

            if (place.is_outlier) {
                const int row = PROGRESSIVE ? 1 : p.n_slots * GROUPS;
                if (place.lane == 0 && place.slot == 0) scales[static_cast<size_t>(row) * padded_tokens + token] = scale;
            } else if (!PROGRESSIVE && place.lane % GROUP_LANES == 0) {
                const int row = place.slot * GROUPS + place.lane / GROUP_LANES;
                scales[static_cast<size_t>(row) * padded_tokens + token] = scale;
            }

            const float inverse = ieee::div(1.0f, scale);
            const float low = place.is_outlier ? -128.0f : -8.0f, high = place.is_outlier ? 127.0f : 7.0f;
            uint4 words;
            words.x = encode(values[t], scale, inverse, low, high, factor);
            words.y = encode(values[t] + 4, scale, inverse, low, high, factor);
            words.z = encode(values[t] + 8, scale, inverse, low, high, factor);
            words.w = encode(values[t] + 12, scale, inverse, low, high, factor);
            const size_t row = static_cast<size_t>(place.slot) * padded_tokens + token;
            const int chunk = place.lane ^ (token & 7);
            if (place.is_outlier) {
                *reinterpret_cast<uint4*>(outlier_codes + row * 128 + chunk * 16) = words;
            } else if (PACKED) {
                const int half_chunk = (place.lane / 2 ^ (token >> 1 & 3)) * 2 + place.lane % 2;
                *reinterpret_cast<uint2*>(codes + row * 64 + half_chunk * 8) =
                    make_uint2(pack_nibbles(words.x, words.y), pack_nibbles(words.z, words.w));
            } else {
                *reinterpret_cast<uint4*>(codes + row * 128 + chunk * 16) = words;
            }
        }
    }
}
