// Products with f16 and bf16 weights for more than 16 rows, on devices that have wgmma (compute capability 9.0): what
// gemm.cu is to the others. Rows are rounded to what the weights are by the same kernels, and the sums of segments that
// are computed side by side added up by the same kernel.
//
// A block computes a tile of 128 features by 64, 128 or 192 rows: features are the rows of a product of wgmma, which
// has 64 of them always, and the rows of the activations its columns, of which there may be few. Two groups of four
// warps take 64 features each. Boxes of 64 input features come into shared memory, several steps of them at a time: the
// groups wait until a stage is filled (`full`), and the warp that has a stage filled anew until all are done with it
// (`empty`). Nothing else passes between the groups, so that one multiplies while the other adds up. That warp belongs
// to one of them: one of its own would leave the others fewer registers than the largest tile takes. Weights of the
// first steps are on their way before the kernel ahead has ended, activations only then.
//
// As in gemm.cu, input features are added up in segments of 512, each from zero, and segments in order, whoever adds
// them up. A thread therefore holds what it sums twice, which is why tiles end at 192 rows.

#include "hopper.cuh"
#include "tiles.cuh"

namespace hopper_gemm {

constexpr int GROUPS = 2;
constexpr int THREADS = GROUPS * WARPGROUP;
/// Steps of a segment.
constexpr int STEPS = SEGMENT / BOX_COLS;
/// A stage is filled anew this many steps after its own: by then the other group is done with it too, as a rule.
constexpr int REST = 2;

/// A block's tile: ROWS by OUT features, STAGES of BOX_COLS input features. BLOCKS of them fit on a multiprocessor.
template <int ROWS_, int STAGES_, int BLOCKS_>
struct Tile {
    static constexpr int ROWS = ROWS_, OUT = GROUPS * GROUP_ROWS, STAGES = STAGES_, BLOCKS = BLOCKS_;
    /// Bytes of a stage: weights, then activations.
    static constexpr int WEIGHTS = OUT * BOX_ROW, STAGE = WEIGHTS + ROWS * BOX_ROW;
    static_assert(STAGES > REST && (STAGES * STAGE + BOX_ALIGNMENT) * BLOCKS <= 226 << 10, "shared memory there is");
};

// src/cuda/hopper_gemm.rs chooses among them, and asks for their shared memory.
using Tall = Tile<192, 5, 1>;
using Middle = Tile<128, 6, 1>;
using Flat = Tile<64, 4, 2>;

/// The stage whose turn it is, and the last bit of how often it was its turn before.
template <class Tile>
struct Turn {
    int stage = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void pass() {
        if (++stage == Tile::STAGES) stage = 0, parity ^= 1;
    }
};

/// out[r][first + o] = scales[r] (weight[o] . x[r]) + bias[first + o]. With more than one segment in the grid: the sums
/// of a segment, to `segments` [segments, rows, features].
template <class T, class Tile>
__device__ __forceinline__ void product(const TensorMap& weights, const TensorMap& x, const float* row_scales,
                                        const float* bias, float* out, float* segments, int rows, int cols,
                                        int features, int width, int first) {
    __shared__ Barrier full[Tile::STAGES], empty[Tile::STAGES];
    unsigned char* const stages = aligned_shared();
    const Place place = Place::of<Tile>(rows, features);
    const bool splits = gridDim.z > 1;
    const int all = (padded(cols) + BOX_COLS - 1) / BOX_COLS;
    const int begin = splits ? static_cast<int>(blockIdx.z) * STEPS : 0;
    const int end = splits ? min(all, begin + STEPS) : all;
    const auto fill_weights = [&](int stage, int step) {
        arrive_expecting(full + stage, Tile::STAGE);
        copy_box(stages + stage * Tile::STAGE, weights, place.feature, step * BOX_COLS, full + stage);
    };
    const auto fill_x = [&](int stage, int step) {
        copy_box(stages + stage * Tile::STAGE + Tile::WEIGHTS, x, place.row, step * BOX_COLS, full + stage);
    };
    if (threadIdx.x == 0) {
        announce(weights);
        announce(x);
        for (int i = 0; i < Tile::STAGES; i++) {
            make_barrier(full + i, 1);
            make_barrier(empty + i, THREADS / WARP);
        }
        show_barriers();
        for (int i = 0; i < Tile::STAGES && begin + i < end; i++) fill_weights(i, begin + i);
    }
    follow();
    if (threadIdx.x == 0) {
        show_rows();
        for (int i = 0; i < Tile::STAGES && begin + i < end; i++) fill_x(i, begin + i);
    }
    __syncthreads();

    // Where lanes of a warp could part, as far as the compiler knows, it has each product waited for.
    const int warp = __shfl_sync(ALL_LANES, warp_id(), 0), group = warp / 4 * GROUP_ROWS;
    Turn<Tile> turn, rested;
    const uint64_t all_weights = operand(shared_place(stages + group * BOX_ROW));
    const uint64_t all_x = operand(shared_place(stages + Tile::WEIGHTS));
    // No sum is -0, as it begins at 0: adding the first one to 0 changes no bit.
    float totals[Tile::ROWS / 2] = {};
#pragma unroll 1
    for (int segment = begin; segment < end; segment += STEPS) {
        float sums[Tile::ROWS / 2] = {};
        const int segment_end = min(end, segment + STEPS);
        int before = 0;
#pragma unroll 1
        for (int step = segment; step < segment_end; step++, turn.pass()) {
            wait_for(full + turn.stage, turn.parity);
            begin_products();
#pragma unroll
            for (int at = 0; at < BOX_ROW; at += PRODUCT_COLS * 2) {
                const uint64_t from = further(turn.stage * Tile::STAGE + at);
                multiply_boxes<T>(sums, all_weights + from, all_x + from);
            }
            commit_products();
            if (step > segment) {
                // What this warp reads of the step before has been multiplied.
                wait_for_products_but_one();
                if (lane_id() == 0) arrive(empty + before);
            }
            before = turn.stage;
            const int next = step - REST + Tile::STAGES;
            if (warp == 0 && step - REST >= begin && next < end) {
                wait_for(empty + rested.stage, rested.parity);
                if (lane_id() == 0) {
                    fill_weights(rested.stage, next);
                    fill_x(rested.stage, next);
                }
                rested.pass();
            }
        }
        wait_for_products(sums);
        if (lane_id() == 0) arrive(empty + before);
#pragma unroll
        for (int i = 0; i < Tile::ROWS / 2; i++) totals[i] += sums[i];
    }

    // All loads before the first store: the compiler cannot know that stores leave alone what is loaded.
    const int row = place.row + Fragment::col(0), feature = place.feature + group + Fragment::row(0);
    float added[2], scales[Tile::ROWS / 4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        added[i] = !splits && bias && feature + 8 * i < features ? bias[first + feature + 8 * i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Tile::ROWS / 4; i++) {
        const int here = row + 8 * (i / 2) + i % 2;
        scales[i] = !splits && row_scales && here < rows ? row_scales[here] : 1.0f;
    }
    const size_t stride = splits ? features : padded(width);
    float* const to = (splits ? segments + static_cast<size_t>(blockIdx.z) * rows * features : out + first) +
                      static_cast<size_t>(row) * stride + feature;
#pragma unroll
    for (int i = 0; i < Tile::ROWS / 2; i++) {
        const int down = 8 * (i / 4) + i % 2, across = 8 * (i / 2 % 2);
        if (row + down < rows && feature + across < features) {
            to[down * stride + across] = totals[i] * scales[i / 4 * 2 + i % 2] + added[i / 2 % 2];
        }
    }
}

}  // namespace hopper_gemm

// hopper_gemm_{size of tiles}_{type}: out[r][first + o] = scales[r] (weight[o] . x[r]) + bias[first + o], without
// scales 1 and without bias 0. x: [rows, cols] and weight: [features, cols], both in that type; out: [rows, width].
// With a third dimension of the grid, the sums of each segment without scales and bias. Grid: (tiles, 1, segments or
// 1). Shared memory: 201 KiB, 193 KiB and 97 KiB a block; an SM holds one block of the tall and the middle tile, two of
// the flat. Bytes: the matrix once for up to 16 tiles of rows (3,072 rows by the tall tile), x once for a wave of
// blocks. Operations: 2 a weight and row. Floor: the larger of the matrix's bytes over the bandwidth and the operations
// over the rate of wgmma, 990 Tflop/s on an H100 at its highest clock and some 800 as its power allows. Where it should
// end up: for 16 input features the tall tile's products are 192 cycles of an SM's tensor cores; reading their operands
// from shared memory takes 128, and copies fill it in 80. If these two take turns, that is 92 % of the peak (the middle
// tile 80 %, and the flat one 57 %, which is for as few rows as take less time than the weights do). Besides, a block
// multiplies nothing while it begins and while it writes its tile: some 7 % of its time with 4,096 input features.
#define HOPPER_GEMM(SIZE, TILE, SUFFIX, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(hopper_gemm::THREADS, hopper_gemm::TILE::BLOCKS)                      \
        hopper_gemm_##SIZE##_##SUFFIX(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x,  \
                                      const float* row_scales, const float* bias, float* out, float* segments,         \
                                      int rows, int cols, int features, int width, int first) {                        \
        hopper_gemm::product<T, hopper_gemm::TILE>(weights, x, row_scales, bias, out, segments, rows, cols, features,  \
                                                   width, first);                                                      \
    }                                                                                                                  \
    REGISTER(hopper_gemm_##SIZE##_##SUFFIX);

#define HOPPER_GEMMS(SUFFIX, T)            \
    HOPPER_GEMM(tall, Tall, SUFFIX, T)     \
    HOPPER_GEMM(middle, Middle, SUFFIX, T) \
    HOPPER_GEMM(flat, Flat, SUFFIX, T)

HOPPER_GEMMS(f16, F16)
HOPPER_GEMMS(bf16, BF16)
