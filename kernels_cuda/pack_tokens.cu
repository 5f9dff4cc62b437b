// float16 or bfloat16 activations laid out as sm90_w4a16_batch_gemm.cu takes them: bits are moved, nothing is rounded.
//
//   x       [M][n_inputs] of 16 bits, dense; n_inputs a multiple of 8; 16-byte aligned
//   packed  [halves of a slot: 2 * n_slots][Mp][64] of 16 bits, Mp = M rounded up to 8; zeros where x has no token or input
//
// Row m of a half is token m's 64 inputs: of every 16 the even ones, then the odd ones, and the 16-byte chunk c stored at
// c ^ (m & 7). So a tile of tokens is contiguous and already in the 128-byte swizzle of wgmma.
//
// Launch: grid (Mp; pieces of 16 inputs / 256, rounded up), block 256.

#include "grid_order.cuh"

extern "C" __global__ void __launch_bounds__(256)
    pack_tokens(const uint4 *__restrict__ x, uint4 *__restrict__ packed, const int n_tokens, const int n_inputs,
                const int n_slots) {
    const int piece = blockIdx.y * blockDim.x + threadIdx.x, token = blockIdx.x;
    let_next_grid_begin();
    wait_for_earlier_grids();
    if (piece >= 8 * n_slots) return;
    auto eight_inputs = [&](int first) {
        if (token >= n_tokens || first >= n_inputs) return make_uint4(0, 0, 0, 0);
        return x[(static_cast<size_t>(token) * n_inputs + first) / 8];
    };
    const uint4 a = eight_inputs(16 * piece), b = eight_inputs(16 * piece + 8);
    auto every_other = [&](unsigned selector) {
        return make_uint4(__byte_perm(a.x, a.y, selector), __byte_perm(a.z, a.w, selector),
                          __byte_perm(b.x, b.y, selector), __byte_perm(b.z, b.w, selector));
    };
    uint4 *row = packed + (static_cast<size_t>(piece / 4) * gridDim.x + token) * 8;
    const int chunk = piece % 4 * 2;
    row[chunk ^ (token & 7)] = every_other(0x5410);
    row[(chunk + 1) ^ (token & 7)] = every_other(0x7632);
}
