// The usual mistakes with the instructions of hopper.cuh, to see that they are found. One block of 128 threads each;
// `map` is of 64 rows by 64 columns, in boxes as large.

#include "../../cuda/hopper.cuh"
#include "../../cuda/mma.cuh"

namespace faulty {

enum class Mistake {
    None,
    NoWait,         // reads what it has not waited for
    WrongParity,    // waits for the phase before
    PhaseNeverEnds, // waits for the phase after
    Unshown,        // the barrier is not shown to what copies boxes
    Unaligned,      // a box goes to the middle of a row
    TooManyBytes,   // announces more than comes
    NobodyWaits,    // the block ends before the box has come
    Overwritten,    // somebody writes where the barrier is
    NoFence,        // multiplies without a fence
    NoWaitForSums,  // looks at sums that it has not waited for
    Touched,        // changes sums that are added to
    LeavesProducts, // ends while it multiplies
    OneWarpLess,    // one warp does not multiply with the others
    ReusesStage,    // has a stage filled anew that is being read
    NoSwizzle,      // says that operands are not swizzled
    WrongStride,    // says that rows are nearer to each other than they are
    WrongPlace,     // reads from beyond the shared memory there is
    HeldTouched,    // changes registers that products read
    HeldLate,       // changes them between the fence and products
    HeldUnfenced,   // has no fence before products that read them
    NotAcross,      // says that an operand lies across that does not begin where it should
    NotShown,       // stores an operand and does not show it
    ShownLate,      // shows it when it has been multiplied
};

/// out[i] = the sum of the products of rows i and 0 of the matrix.
template <Mistake MISTAKE>
__device__ void multiply(const TensorMap& map, float* out) {
    __shared__ Barrier barrier;
    unsigned char* const box = aligned_shared();
    follow();
    if (threadIdx.x == 0) {
        make_barrier(&barrier, 1);
        if (MISTAKE != Mistake::Unshown) show_barriers();
        arrive_expecting(&barrier, GROUP_ROWS * BOX_ROW + (MISTAKE == Mistake::TooManyBytes ? 16 : 0));
        copy_box(box + (MISTAKE == Mistake::Unaligned ? 64 : 0), map, 0, 0, &barrier);
        if (MISTAKE == Mistake::Overwritten) barrier.word = 1;
    }
    __syncthreads();
    if (MISTAKE == Mistake::NobodyWaits) return;
    if (MISTAKE != Mistake::NoWait) wait_for(&barrier, MISTAKE == Mistake::WrongParity);
    if (MISTAKE == Mistake::PhaseNeverEnds) wait_for(&barrier, 1);
    uint64_t rows = operand(shared_place(box));
    if (MISTAKE == Mistake::NoSwizzle) rows &= ~(uint64_t{3} << 62);
    if (MISTAKE == Mistake::WrongStride) rows ^= uint64_t{(BOX_ALIGNMENT ^ BOX_ALIGNMENT / 2) >> 4} << 32;
    if (MISTAKE == Mistake::WrongPlace) rows &= ~uint64_t{0x3fff};
    float sums[32] = {};
    if (MISTAKE != Mistake::NoFence) begin_products();
    for (int at = 0; at < BOX_ROW; at += PRODUCT_COLS * 2) {
        if (MISTAKE == Mistake::OneWarpLess && warp_id() == 3) continue;
        multiply_boxes<F16>(sums, rows + further(at), rows + further(at));
    }
    commit_products();
    if (MISTAKE == Mistake::Touched) sums[threadIdx.x % 32] = 0.0f;
    if (MISTAKE == Mistake::LeavesProducts) return;
    if (MISTAKE == Mistake::ReusesStage) {
        if (threadIdx.x == 0) {
            arrive_expecting(&barrier, GROUP_ROWS * BOX_ROW);
            copy_box(box, map, 0, 0, &barrier);
        }
        wait_for_products_but_one();
    }
    if (MISTAKE != Mistake::NoWaitForSums) wait_for_products(sums);
    for (int i = 0; i < 32; i++) {
        if (Fragment::col(i) == 0) out[Fragment::row(i)] = sums[i];
    }
    if (MISTAKE == Mistake::NoWaitForSums) wait_for_products(sums);
    if (MISTAKE == Mistake::ReusesStage || MISTAKE == Mistake::NoWait) wait_for(&barrier, MISTAKE != Mistake::NoWait);
    if (MISTAKE == Mistake::WrongParity) wait_for(&barrier, 0);
}

/// out[i] = the sum of row 0's products with column 0, of a matrix that is all ones but for what a mistake makes of it.
template <Mistake MISTAKE>
__device__ void multiply_ones(const TensorMap& map, float* out) {
    __shared__ Barrier barrier;
    unsigned char* const box = aligned_shared();
    follow();
    if (threadIdx.x == 0) {
        make_barrier(&barrier, 1);
        show_barriers();
        arrive_expecting(&barrier, GROUP_ROWS * BOX_ROW);
        copy_box(box, map, 0, 0, &barrier);
    }
    __syncthreads();
    wait_for(&barrier, 0);
    // The first sixteen rows become ones.
    const unsigned two = pair<F16>(1.0f, 1.0f);
    store_operand(box, threadIdx.x / 8, threadIdx.x % 8, uint4{two, two, two, two});
    if (MISTAKE != Mistake::NotShown && MISTAKE != Mistake::ShownLate) show_operands();
    __syncthreads();
    float sums[32] = {};
    unsigned held[1][4] = {{two, two, two, two}};
    if (MISTAKE != Mistake::HeldUnfenced) begin_products(sums, held);
    if (MISTAKE == Mistake::HeldUnfenced) begin_products();
    if (MISTAKE == Mistake::HeldLate) held[0][threadIdx.x % 4] = 0;
    multiply_held<F16>(sums, held[0], operand_across(shared_place(box), 0) + (MISTAKE == Mistake::NotAcross ? 8 : 0));
    if (MISTAKE == Mistake::HeldTouched) held[0][threadIdx.x % 4] = 0;
    commit_products();
    wait_for_products(sums);
    if (MISTAKE == Mistake::ShownLate) {
        __syncthreads();
        show_operands();
    }
    for (int i = 0; i < 32; i++) {
        if (Fragment::col(i) == 0) out[Fragment::row(i)] = sums[i];
    }
}

}  // namespace faulty

#define FAULTY_HELD(NAME, MISTAKE)                                                                          \
    extern "C" __global__ void faulty_##NAME(const __grid_constant__ TensorMap map, float* out) {           \
        faulty::multiply_ones<faulty::Mistake::MISTAKE>(map, out);                                          \
    }                                                                                                       \
    REGISTER(faulty_##NAME)

FAULTY_HELD(held_nothing, None);
FAULTY_HELD(held_touched, HeldTouched);
FAULTY_HELD(held_late, HeldLate);
FAULTY_HELD(held_unfenced, HeldUnfenced);
FAULTY_HELD(not_across, NotAcross);
FAULTY_HELD(not_shown, NotShown);
FAULTY_HELD(shown_late, ShownLate);

#define FAULTY(NAME, MISTAKE)                                                                               \
    extern "C" __global__ void faulty_##NAME(const __grid_constant__ TensorMap map, float* out) {           \
        faulty::multiply<faulty::Mistake::MISTAKE>(map, out);                                               \
    }                                                                                                       \
    REGISTER(faulty_##NAME)

FAULTY(nothing, None);
FAULTY(no_wait, NoWait);
FAULTY(wrong_parity, WrongParity);
FAULTY(endless_phase, PhaseNeverEnds);
FAULTY(unshown, Unshown);
FAULTY(unaligned_box, Unaligned);
FAULTY(too_many_bytes, TooManyBytes);
FAULTY(nobody_waits, NobodyWaits);
FAULTY(overwritten, Overwritten);
FAULTY(no_fence, NoFence);
FAULTY(no_wait_for_sums, NoWaitForSums);
FAULTY(touched, Touched);
FAULTY(left_products, LeavesProducts);
FAULTY(one_warp_less, OneWarpLess);
FAULTY(reused_stage, ReusesStage);
FAULTY(no_swizzle, NoSwizzle);
FAULTY(wrong_stride, WrongStride);
FAULTY(wrong_place, WrongPlace);
