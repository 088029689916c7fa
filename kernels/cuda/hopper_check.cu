// The instructions of hopper.cuh by themselves: what a test compares with plain loops, on the emulation, which is only
// as right as the PTX ISA was read, and on a device, which knows.

#include "hopper.cuh"

namespace hopper_check {

/// Has boxes copied to shared memory one behind the other, and waits for them: where they are.
template <int COUNT>
__device__ __forceinline__ const unsigned char* copied(const TensorMap* const (&maps)[COUNT],
                                                       const int (&box_rows)[COUNT], int row, int col) {
    __shared__ Barrier barrier;
    unsigned char* const boxes = aligned_shared();
    follow();
    if (threadIdx.x == 0) {
        make_barrier(&barrier, 1);
        show_barriers();
        int bytes = 0;
        for (int i = 0; i < COUNT; i++) bytes += box_rows[i] * BOX_ROW;
        arrive_expecting(&barrier, bytes);
        unsigned char* to = boxes;
        for (int i = 0; i < COUNT; i++) {
            copy_box(to, *maps[i], row, col, &barrier);
            to += box_rows[i] * BOX_ROW;
        }
    }
    __syncthreads();
    wait_for(&barrier, 0);
    return boxes;
}

/// out = a bᵀ by one group of warps: a [64, 64], b [N, 64], out [64, N].
template <class T, int N>
__device__ __forceinline__ void multiply(const TensorMap& a, const TensorMap& b, float* out) {
    const unsigned char* const boxes = copied<2>({&a, &b}, {GROUP_ROWS, N}, 0, 0);
    const uint64_t rows = operand(shared_place(boxes)), cols = operand(shared_place(boxes + GROUP_ROWS * BOX_ROW));
    float sums[N / 2] = {};
    begin_products();
#pragma unroll
    for (int at = 0; at < BOX_ROW; at += PRODUCT_COLS * 2) {
        multiply_boxes<T>(sums, rows + further(at), cols + further(at));
    }
    commit_products();
    wait_for_products(sums);
#pragma unroll
    for (int i = 0; i < N / 2; i++) out[Fragment::row(i) * N + Fragment::col(i)] = sums[i];
}

}  // namespace hopper_check

// box_check: the box of 64 rows by 64 columns of 16 bits that begins at (row, col), as it lies in shared memory.
// Grid: one block of 128 threads.
extern "C" __global__ void __launch_bounds__(WARPGROUP)
    box_check(const __grid_constant__ TensorMap map, uint4* out, int row, int col) {
    const unsigned char* const box = hopper_check::copied<1>({&map}, {GROUP_ROWS}, row, col);
    for (int i = threadIdx.x; i < GROUP_ROWS * BOX_ROW / 16; i += WARPGROUP) {
        out[i] = reinterpret_cast<const uint4*>(box)[i];
    }
}
REGISTER(box_check);

// wgmma_check_{type}_{N}: out = a bᵀ, for a of [64, 64], b of [N, 64] and out of [64, N]. Grid: one block of 128
// threads.
#define WGMMA_CHECK(SUFFIX, T, N)                                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPGROUP) wgmma_check_##SUFFIX##_##N(                                \
        const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* out) {                        \
        hopper_check::multiply<T, N>(a, b, out);                                                                       \
    }                                                                                                                  \
    REGISTER(wgmma_check_##SUFFIX##_##N)

WGMMA_CHECK(f16, Half, 64);
WGMMA_CHECK(f16, Half, 128);
WGMMA_CHECK(f16, Half, 192);
WGMMA_CHECK(bf16, Brain, 64);
WGMMA_CHECK(bf16, Brain, 128);
WGMMA_CHECK(bf16, Brain, 192);
