// quantize_act: activations to INT4 codes per token and group, the outlier channels to INT8, in the layout that
// the GEMM kernels read (gemm_layout.cuh). Per token, all in float32:
//
//   x = ELEMENT(x + delta), which goes to `total`, too: ADDS, with RMSNorm alone
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
//   input, second  ELEMENT [n_tokens, n_channels], input_stride and second_stride elements between rows; rows and the
//                  first outlier aligned to LOAD_WIDTH elements. second: up or delta, or null
//   total          ELEMENT [n_tokens, n_channels], as aligned, or null
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
// Of a slot 4 lanes have 32 channels each, in two runs of 16 (run r of lane l from channel 64 r + 16 l on), or 16 lanes (SLOT_LANES)
// 8 each: more instructions in all, but for few tokens a quarter of the way. A warp makes a handful of slots at a time.
//
// As channels lie, warps make the same slots of one token after the other, the next one's loads on their way meanwhile. Where
// channels are gathered or needed twice a CTA makes one token or a part of it: STAGED (GATHER, norms) it copies the
// token's row to shared memory first. With PROGRESSIVE the PARTS of a token are a cluster, since its base is of the whole row.
//
//   launch: grid (tokens at a time, parts of a row), block up to 32 MAX_WARPS, whole warps
//     as channels lie  x from 1 to Mp; y such that each warp has one handful of slots
//     else             x = Mp; y any, PROGRESSIVE PARTS. Dynamic shared memory if STAGED: (n_channels rounded up to 8,
//                      + 8) * bytes of an ELEMENT (prologue 3: 4 bytes)

#if !defined(ELEMENT) || !defined(PROLOGUE) || !defined(GATHER) || !defined(HADAMARD) || !defined(GROUP_SIZE) || \
    !defined(PROGRESSIVE) || !defined(LOAD_WIDTH) || !defined(ADDS) || \
    !defined(PARTS) || !defined(SLOT_LANES)
#error "quantize_act.cu lacks one of its parameters"
#endif

#include "act_codes.cuh"
#include "act_input.cuh"
#include "act_row.cuh"
#include "act_transform.cuh"
#include "cluster.cuh"
#include "grid_order.cuh"

namespace {

// The codes and scales of the lane's channels, zeros past the last token.
__device__ __forceinline__ void store(const Problem& p, const Place& place, int token, const Values& values,
                                      const float (&largest)[LANE_GROUPS], float base) {
    using Words = Vector<unsigned, RUN_CHANNELS / 4>;
    const bool is_token = token < p.n_tokens;
    const unsigned row = place.slot_number(p) * p.padded_tokens + token;
    unsigned char* codes = reinterpret_cast<unsigned char*>(p.codes + row * 8);
#pragma unroll
    for (int group = 0; group < LANE_GROUPS; ++group) {
        const Coder coder(p, place, largest[group], base);
        store_scale(p, place, place.group(group), token, coder.scale);
#pragma unroll
        for (int run = group; run < RUNS; run += LANE_GROUPS) {
            Words words = {};
            if (is_token) {
#pragma unroll
                for (int i = 0; i < RUN_CHANNELS / 4; ++i) words.items[i] = coder.encode(&values[run][4 * i]);
            }
            const int target = place.offset(run) ^ (token & 7) << 4;
            if (place.exists) *reinterpret_cast<Words*>(codes + target) = words;
        }
    }
}

}  // namespace

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(32 * MAX_WARPS, MIN_CTAS)
quantize_act(const ELEMENT* __restrict__ input, const ELEMENT* __restrict__ second, ELEMENT* __restrict__ total,
             const unsigned short* __restrict__ slots, const float* __restrict__ norm_weight,
             const float* __restrict__ norm_bias, uint4* __restrict__ codes, float* __restrict__ token_scales,
             int input_stride, int second_stride, float clip_ratio, float epsilon, const Sizes sizes) {
    const Problem p = {sizes, input,        second,       total,         slots,     norm_weight, norm_bias,
                       codes, token_scales, input_stride, second_stride, clip_ratio};
    const int n_warps = blockDim.x / 32;
    const int first_handful = blockIdx.y * n_warps + threadIdx.x / 32, handful_step = gridDim.y * n_warps;
    Place place(p, first_handful);
#if STAGED
    // What no earlier grid writes is on its way before they end.
    Sources sources(p, place);
    const Share share(p, blockIdx.x);
    if (HAS_NORM) ask_for_norm(p, place);
#endif
    let_next_grid_begin();
    wait_for_earlier_grids();

    if (p.n_outlier_slots == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        float* row = token_scales + (PROGRESSIVE ? 1 : p.n_slots * GROUPS) * p.padded_tokens;
        for (int token = blockIdx.x; token < p.padded_tokens; token += gridDim.x) row[token] = 0.0f;
    }

    Values values;
    float largest[LANE_GROUPS];
#if BY_TOKEN
    const int token = blockIdx.x;
    Moments moments = {};
#if STAGED
    extern __shared__ uint4 dynamic_shared[];
    Staged* staged = reinterpret_cast<Staged*>(dynamic_shared);
    const float square = start_staging(p, share, token, staged);
    copy_commit();
    copy_wait<0>();
    if (PROLOGUE != RMS_NORM) __syncthreads();
    if (HAS_NORM) moments = find_moments(p, staged, square, epsilon);
#endif
    int handful_here = first_handful;
    const auto take = [&](int handful) {  // into place, values and largest
        if (handful != handful_here) {
            handful_here = handful;
            place = Place(p, handful);
#if STAGED
            sources = Sources(p, place);
#endif
        }
#if STAGED
        fetch(p, place, sources, staged, values);
#else
        RawRuns raw;
        load_runs(p, token, Span(p, place), raw);
        values_of(raw, values);
#endif
        prepare(p, place, moments, values);
        find_largest(p, place, values, largest);
    };
    float base = 1.0f;
#if PROGRESSIVE
    __shared__ int largest_scale;  // as bits: positive floats and their bits have one order
    if (threadIdx.x == 0) largest_scale = 0;
    __syncthreads();
    for (int handful = first_handful; handful < p.n_handfuls; handful += handful_step) {
        take(handful);
        const float scale = normal_scale(p, ieee::max_magnitude(largest[0], largest[LANE_GROUPS - 1]));
        if (place.exists && place.lane % GROUP_LANES == 0 && !place.is_outlier && scale >= SMALLEST_NORMAL) {
            atomicMax(&largest_scale, __float_as_int(scale));
        }
    }
    base = one_if_zero(ieee::mul(__int_as_float(largest_of_cluster(&largest_scale)), 1.0f / 16.0f));
    if (blockIdx.y == 0 && threadIdx.x == 0) token_scales[token] = token < p.n_tokens ? base : 0.0f;
    const bool one_walk = p.n_handfuls <= handful_step;  // so the values are still here
#else
    const bool one_walk = false;
#endif
    for (int handful = first_handful; handful < p.n_handfuls; handful += handful_step) {
        if (!one_walk) take(handful);
        store(p, place, token, values, largest, base);
    }
    if (PROGRESSIVE) leave_cluster();
#else
    if (first_handful >= p.n_handfuls) return;
    const Span span(p, place);
    RawRuns raw;
    load_runs(p, blockIdx.x, span, raw);
    for (int token = blockIdx.x; token < p.padded_tokens; token += gridDim.x) {
        values_of(raw, values);
        if (token + gridDim.x < p.padded_tokens) load_runs(p, token + gridDim.x, span, raw);
        prepare(p, place, {}, values);
        find_largest(p, place, values, largest);
        store(p, place, token, values, largest, 1.0f);
    }
#endif
}
