// The instructions of mma.cuh by themselves: what a test compares with plain loops, on the emulation, whose fragments
// are only as right as the PTX ISA was read, and on a device, which knows.

#include "mma.cuh"

namespace mma_check {

/// out = a b, by one warp: a [16, 16], b [8, 16] (with columns as rows) or, if it is loaded transposed, [16, 8];
/// out [16, 8].
template <class T, bool TRANSPOSED>
__device__ __forceinline__ void multiply(const uint16_t* a, const uint16_t* b, float* out) {
    // Rows of four chunks, of which two (or one) are used: tiles are swizzled as large ones are.
    constexpr int WIDTH = 4;
    Chunk* const tile = shared_chunks<2 * 16 * WIDTH>();
    Chunk* const b_tile = tile + 16 * WIDTH;
    const int lane = lane_id();
    follow();
    copy_async(tile + swizzled<WIDTH>(lane / 2, lane % 2), a + lane * CHUNK, true);
    commit_copies();
    const bool valid = lane < 16;
    const int row = TRANSPOSED ? lane % 16 : lane % 16 / 2, chunk = TRANSPOSED ? lane / 16 : lane % 2 + lane / 16 * 2;
    copy_async(b_tile + swizzled<WIDTH>(row, chunk), b + lane % 16 * CHUNK, valid);
    // The rows of b that nobody asks for, but that are loaded with the others.
    if (!TRANSPOSED) copy_async(b_tile + swizzled<WIDTH>(8 + lane / 4, lane % 4), b, false);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    unsigned a_parts[4], b_parts[4];
    load_matrices(a_parts, upright<WIDTH>(tile, 0, 0));
    wait_for_copies<0>();
    __syncthreads();
    if (TRANSPOSED) {
        load_transposed(b_parts, upright<WIDTH>(b_tile, 0, 0));
    } else {
        load_matrices(b_parts, lying<WIDTH>(b_tile, 0, 0));
    }
    float c[4] = {};
    multiply_add<T>(c, a_parts, b_parts[0], b_parts[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

}  // namespace mma_check

// mma_check_{type}, mma_check_{type}_transposed: out = a b, for a of [16, 16], b of [16, 8] (with columns as rows, but
// for those that transpose it), and out of [16, 8]. Grid: one block of one warp.
#define MMA_CHECK(NAME, T, TRANSPOSED)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARP) mma_check_##NAME(const void* a, const void* b, float* out) {    \
        mma_check::multiply<T, TRANSPOSED>(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), out);     \
    }                                                                                                                  \
    REGISTER(mma_check_##NAME)

MMA_CHECK(f16, F16, false);
MMA_CHECK(f16_transposed, F16, true);
MMA_CHECK(bf16, BF16, false);
MMA_CHECK(bf16_transposed, BF16, true);
