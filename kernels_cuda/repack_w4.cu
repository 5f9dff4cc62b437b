// Canonical checkpoint tensors of one linear -> the records of gemm_layout.cuh.
//
//   qweight         uint8 [N][ceil(INT4 inputs / 2)], two's complement nibbles, the low one the even input
//   scales          float16, float32 (SCALE_BYTES 2, 4) or uint8 factors (PROGRESSIVE), [ceil(N / CHANNEL_GROUP)]
//                   [groups]
//   outlier_weight  int8 [N][n_outliers], may be null when n_outliers is 0
//   records         uint8 [panels][slots][bytes], bytes as in Record; every byte is written, padding with zeros
//                   (progressive: codes of value 0, factor 1)
//
// Parameters: PROGRESSIVE, GROUP_SIZE, SCALE_BYTES, CHANNEL_GROUP 1/2. One CTA of 128 threads per record:
// grid (slots, panels). It runs once, when a checkpoint is loaded: simple rather than fast.
#if !defined(PROGRESSIVE) || !defined(GROUP_SIZE) || !defined(SCALE_BYTES) || !defined(CHANNEL_GROUP)
#error "repack_w4.cu lacks one of its parameters"
#endif

#include "gemm_layout.cuh"

namespace {

using Weights = Record<GROUP_SIZE, SCALE_BYTES>;

#if SCALE_BYTES == 4
using Scale = unsigned;
#elif SCALE_BYTES == 2
using Scale = unsigned short;
#else
using Scale = unsigned char;
#endif

}  // namespace

extern "C" __global__ void repack_w4(const unsigned char *__restrict__ qweight, const Scale *__restrict__ scales,
                                     const signed char *__restrict__ outlier_weight,
                                     unsigned char *__restrict__ records, int n_channels, int n_inputs, int n_slots,
                                     int n_outliers) {
    const int slot = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int panel_row = blockIdx.y * PANEL_ROWS;
    const int n_groups = (n_inputs + GROUP_SIZE - 1) / GROUP_SIZE;
    const int row_bytes = (n_inputs + 1) / 2;
    unsigned char *record = records + (static_cast<size_t>(blockIdx.y) * gridDim.x + slot) * Weights::bytes;

    auto code = [&](int row, int input) -> unsigned {
        if (row >= n_channels || input >= n_inputs) return PROGRESSIVE ? 8 : 0;
        const unsigned byte = qweight[static_cast<size_t>(row) * row_bytes + input / 2];
        return (input % 2 ? byte >> 4 : byte & 15) ^ (PROGRESSIVE ? 8 : 0);
    };
    for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
            const int row = panel_row + warp * 16 + lane / 4 + 8 * (r & 1);
            unsigned word = 0;
            for (int b = 0; b < 4; ++b) {
                const int input = 4 * (lane % 4) + 16 * (r >> 1) + b;
                if (slot < n_slots) {
                    const int first = slot * SLOT_INPUTS + half * 64 + input;
                    word |= (code(row, first) | code(row, first + 32) << 4) << 8 * b;
                } else {
                    const int outlier = (slot - n_slots) * 64 + half * 32 + input;
                    if (row < n_channels && outlier < n_outliers)
                        word |= static_cast<unsigned>(static_cast<unsigned char>(
                                    outlier_weight[static_cast<size_t>(row) * n_outliers + outlier]))
                                << 8 * b;
                }
            }
            reinterpret_cast<unsigned *>(record)[(half * 128 + thread) * 4 + r] = word;
        }
    }
    Scale *record_scales = reinterpret_cast<Scale *>(record + CODE_BYTES);
    for (int i = thread; i < Weights::groups * PANEL_ROWS; i += 128) {
        const int pair = i % PANEL_ROWS / 2;  // warp * 8 + lane / 4
        const int row = panel_row + pair / 8 * 16 + pair % 8 + i % 2 * 8,
                  group = slot * Weights::groups + i / PANEL_ROWS;
        const bool inside = row < n_channels && slot < n_slots && group < n_groups;
        record_scales[i] =
            inside ? scales[static_cast<size_t>(row / CHANNEL_GROUP) * n_groups + group] : Scale(PROGRESSIVE);
    }
}
