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

template <int N>
__device__ __forceinline__ void write(const float (&sums)[N / 2], float* out) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) out[Fragment::row(i) * N + Fragment::col(i)] = sums[i];
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
    write<N>(sums, out);
}

/// The same with an `a` that threads store themselves, where sums are something else at first.
template <class T, int N>
__device__ __forceinline__ void multiply_stored(const TensorMap& b, const uint4* a, float* out) {
    unsigned char* const stored = aligned_shared() + N * BOX_ROW;
    const unsigned char* const box = copied<1>({&b}, {N}, 0, 0);
    for (int i = threadIdx.x; i < GROUP_ROWS * 8; i += WARPGROUP) store_operand(stored, i / 8, i % 8, a[i]);
    show_operands();
    __syncthreads();
    const uint64_t rows = operand(shared_place(stored)), cols = operand(shared_place(box));
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums[i] = 1.0f;
    begin_products();
    multiply_boxes<T, false>(sums, rows, cols);
#pragma unroll
    for (int at = PRODUCT_COLS * 2; at < BOX_ROW; at += PRODUCT_COLS * 2) {
        multiply_boxes<T>(sums, rows + further(at), cols + further(at));
    }
    commit_products();
    wait_for_products(sums);
    write<N>(sums, out);
}

/// out = a b: a [64, 64] in registers, b [64, N] lying across, in boxes of 64 columns; out [64, N].
template <class T, int N>
__device__ __forceinline__ void multiply_across(const TensorMap& b, const unsigned* a, float* out) {
    constexpr int BOXES = (N + BOX_COLS - 1) / BOX_COLS;
    __shared__ Barrier barrier;
    unsigned char* const boxes = aligned_shared();
    follow();
    if (threadIdx.x == 0) {
        make_barrier(&barrier, 1);
        show_barriers();
        arrive_expecting(&barrier, BOXES * GROUP_ROWS * BOX_ROW);
        for (int i = 0; i < BOXES; i++) copy_box(boxes + i * GROUP_ROWS * BOX_ROW, b, 0, i * BOX_COLS, &barrier);
    }
    unsigned held[BOX_COLS / PRODUCT_COLS][4];
#pragma unroll
    for (int i = 0; i < BOX_COLS / 4; i++) {
        // Two elements side by side.
        const int j = i % 4 * 2;
        held[i / 4][i % 4] = a[(Fragment::row(j) * BOX_COLS + i / 4 * PRODUCT_COLS + Fragment::col(j)) / 2];
    }
    __syncthreads();
    wait_for(&barrier, 0);
    const uint64_t rows = operand_across(shared_place(boxes), GROUP_ROWS * BOX_ROW);
    float sums[N / 2] = {};
    begin_products(sums, held);
#pragma unroll
    for (int i = 0; i < BOX_COLS / PRODUCT_COLS; i++) {
        multiply_held<T>(sums, held[i], rows + further(i * PRODUCT_COLS * BOX_ROW));
    }
    commit_products();
    wait_for_products(sums);
    write<N>(sums, out);
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

WGMMA_CHECK(f16, F16, 64);
WGMMA_CHECK(f16, F16, 128);
WGMMA_CHECK(f16, F16, 192);
WGMMA_CHECK(bf16, BF16, 64);
WGMMA_CHECK(bf16, BF16, 128);
WGMMA_CHECK(bf16, BF16, 192);

// wgmma_check_stored_{type}: the same for N = 64, with an `a` that is not copied as a box. Grid as above.
#define WGMMA_CHECK_STORED(SUFFIX, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPGROUP)                                                            \
        wgmma_check_stored_##SUFFIX(const __grid_constant__ TensorMap b, const void* a, float* out) {                  \
        hopper_check::multiply_stored<T, 64>(b, static_cast<const uint4*>(a), out);                                    \
    }                                                                                                                  \
    REGISTER(wgmma_check_stored_##SUFFIX)

WGMMA_CHECK_STORED(f16, F16);
WGMMA_CHECK_STORED(bf16, BF16);

// wgmma_check_across_{type}_{N}: out = a b, for an `a` of [64, 64] that is in registers, b of [64, N] and out of [64,
// N]. Grid as above.
#define WGMMA_CHECK_ACROSS(SUFFIX, T, N)                                                                               \
    extern "C" __global__ void __launch_bounds__(WARPGROUP)                                                            \
        wgmma_check_across_##SUFFIX##_##N(const __grid_constant__ TensorMap b, const void* a, float* out) {            \
        hopper_check::multiply_across<T, N>(b, static_cast<const unsigned*>(a), out);                                  \
    }                                                                                                                  \
    REGISTER(wgmma_check_across_##SUFFIX##_##N)

WGMMA_CHECK_ACROSS(f16, F16, 64);
WGMMA_CHECK_ACROSS(f16, F16, 128);
WGMMA_CHECK_ACROSS(f16, F16, 256);
WGMMA_CHECK_ACROSS(bf16, BF16, 64);
WGMMA_CHECK_ACROSS(bf16, BF16, 128);
WGMMA_CHECK_ACROSS(bf16, BF16, 256);
