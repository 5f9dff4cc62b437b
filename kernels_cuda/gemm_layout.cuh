// Operand layouts that every GEMM kernel here shares, and the unpacking of weights. No PTX, no architecture.
//
// K is cut into slots of 128 INT4 channels, then slots of 64 INT8 outlier channels; N into panels of 64 rows.
//
// weights  uint8 [panels][slots][RECORD_BYTES]: everything the kernel needs of 64 rows x one slot, in one piece
//
//            4096 B of codes: [half 0..1][thread 0..127][4 words], thread = 32 * warp + lane
//            then [groups of the slot][warp][lane / 4] pairs (row, row + 8) of group scales
//              exact scales: float16 or float32; progressive: integer factors 1..16, uint8
//
//          Word r of half h belongs to row 16*warp + lane/4 + 8*(r & 1) and to four inputs from
//          4*(lane & 3) + 16*(r >> 1) on: exactly register r of the INT8 A fragment of mma m16n8k32 and of
//          wgmma m64nNk32. Byte b of an INT4 word holds two k32 steps:
//
//            bit 7..4: code of step 2h+1, input b         bit 3..0: code of step 2h, input b
//
//          two's complement with exact scales, offset by 8 (0..15) with progressive ones. In an INT8 slot byte
//          b of word r of half h is the outlier code itself, and the scale area is unused.
//
// codes    int8 [slots of 128][Mp][128], Mp = M rounded up to 8: row m of a slot is token m's 128 inputs, 16-byte
//          chunk c stored at c ^ (m & 7). The outliers follow in ceil(outliers / 128) slots of their own. So a
//          tile of tokens is contiguous and already in the 128-byte swizzle of wgmma.
// token_scales float32 [rows][Mp]: one row per INT4 group (progressive activations: one of base scales, and codes are
//          multiplied by their group's factor), then one for the outliers
// channel_scales float32 [3][64 * panels]: base scale (progressive weights only), outlier scale, bias
#pragma once

constexpr int PANEL_ROWS = 64;
constexpr int SLOT_INPUTS = 128;
constexpr int CODE_BYTES = PANEL_ROWS * SLOT_INPUTS / 2;

// Unpacking exact scales' codes leaves them times 16 in the top of each byte: 3 instructions for 8 codes, exact.
constexpr float EXACT_UNIT = 1.0f / 16.0f;

template <int GROUP_INPUTS, int BYTES_PER_SCALE>
struct Record {
    static_assert(GROUP_INPUTS == 64 || GROUP_INPUTS == 128, "groups of 64 or 128 inputs");
    static constexpr int groups = SLOT_INPUTS / GROUP_INPUTS;
    static constexpr int group_scale_bytes = PANEL_ROWS * BYTES_PER_SCALE;
    static constexpr int bytes = CODE_BYTES + groups * group_scale_bytes;
};

// Two's complement nibbles to int8 * 16: `low` is k32 step 2h, `high` is step 2h+1.
__device__ __forceinline__ void unpack_times_16(unsigned word, unsigned &low, unsigned &high) {
    low = (word << 4) & 0xF0F0F0F0u;
    high = word & 0xF0F0F0F0u;
}

// Offset nibbles n = code + 8 to code * factor, factor 1..16. No byte ever carries into the next one:
// n * factor + (128 - 8 * factor) lies in 0..240, and flipping the top bit subtracts the 128.
__device__ __forceinline__ void unpack_times_factor(unsigned word, unsigned factor, unsigned &low, unsigned &high) {
    const unsigned offset = 0x80808080u - factor * 0x08080808u;
    low = ((word & 0x0F0F0F0Fu) * factor + offset) ^ 0x80808080u;
    high = (((word >> 4) & 0x0F0F0F0Fu) * factor + offset) ^ 0x80808080u;
}
