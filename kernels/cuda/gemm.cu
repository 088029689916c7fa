// Products with weight matrices on tensor cores, for more rows than it takes to stream the weights (linear.cu).
//
// A block computes a tile of rows by features. Activations and weights come into shared memory in steps of 32 or 64
// input features, several of which are on their way at a time; warps multiply parts of the tile in registers. Weights
// that are f16 or bf16 are copied as they are. Quantised ones are unpacked on the way, and rounded to f16: a scale is a
// multiple of f16's smallest number, so that below its normal range nothing is lost, and beyond its largest number no
// real model has weights. E4M3 has scales in f32, which change with every 128 input features, so they too are
// multiplied here: in real models they are 1e-5 to 1e-2, and weights, up to 448 times that, amid f16's range. What
// rounding takes is 2^-12 of a weight, which was itself rounded to 2^-4, or half of f16's smallest number, 3e-8.
//
// Activations are rounded to what the weights are (rounding.cuh) before the product: a tile's rows are read by as many
// blocks as there are tiles of features, for which converting them once, and reading half the bytes, pays. What makes
// them does it, where it can (rowwise.cu, attention.cu); `round_rows` is for the rest.
//
// A row's bits depend on that row alone. Input features are added up in segments of 512, at fixed places, each segment
// in order, and segments in order. Whether one block goes through all segments, or each is a block's and
// `add_segments` adds them up, are the same operations; so are all sizes of tiles.

#include "mma.cuh"
#include "rounding.cuh"
#include "tiles.cuh"
#include "weights.cuh"

namespace gemm {

constexpr int THREADS = 128;

/// A block's tile: ROWS by OUT features, IN input features a step, of which STAGES - 1 are under way. Warps share it
/// DOWN by ACROSS.
template <int ROWS_, int OUT_, int IN_, int STAGES_, int DOWN_, int ACROSS_>
struct Tile {
    static constexpr int ROWS = ROWS_, OUT = OUT_, IN = IN_, STAGES = STAGES_, ACROSS = ACROSS_;
    static constexpr int THREADS = DOWN_ * ACROSS_ * WARP;
    /// Products of mma a warp computes side by side: 16 rows by 8 features each.
    static constexpr int DOWN_A_WARP = ROWS / DOWN_ / 16, ACROSS_A_WARP = OUT / ACROSS_ / 8;
    /// Chunks of a row, and those of rows and features a thread brings in.
    static constexpr int WIDTH = IN / CHUNK, ROW_CHUNKS = ROWS * WIDTH / THREADS, OUT_CHUNKS = OUT * WIDTH / THREADS;
    static constexpr int STAGE = (ROWS + OUT) * WIDTH;
    static_assert(ROW_CHUNKS * THREADS == ROWS * WIDTH && OUT_CHUNKS * THREADS == OUT * WIDTH, "threads share evenly");
    static_assert(ACROSS_A_WARP % 2 == 0 && SEGMENT % IN == 0 && STAGES > 1, "pairs of products, whole steps");
};

// src/cuda/gemm.rs chooses among them.
using Large = Tile<128, 128, 32, 3, 2, 4>;
using Medium = Tile<64, 64, 64, 3, 2, 2>;
using Small = Tile<64, 32, 64, 4, 4, 1>;

/// What tensor cores make of a matrix, and how its chunks come into shared memory: asynchronously,
template <class Matrix>
struct Operand {};

template <class T>
struct Operand<Floats<T>> {
    using Element = T;
    struct Eight {};

    static __device__ __forceinline__ Eight begin(const Floats<T>& matrix, size_t start, int at, bool valid,
                                                  Chunk* to) {
        copy_async(to, matrix.values + (valid ? start + at : 0), valid);
        return {};
    }
    static __device__ __forceinline__ void end(Eight, bool, Chunk*) {}
};

/// or through registers: fetched before a step's products, unpacked after them.
template <class Matrix>
struct Quantised {
    using Element = F16;
    using Eight = typename Matrix::Eight;

    static __device__ __forceinline__ Eight begin(const Matrix& matrix, size_t start, int at, bool valid, Chunk*) {
        return matrix.fetch(valid ? start : 0, valid ? at : 0);
    }
    static __device__ __forceinline__ void end(Eight eight, bool valid, Chunk* to) {
        float w[8];
        Matrix::unpack(eight, w);
        const Chunk chunk = {pair<F16>(w[0], w[1]), pair<F16>(w[2], w[3]), pair<F16>(w[4], w[5]),
                             pair<F16>(w[6], w[7])};
        *to = valid ? chunk : Chunk{0, 0, 0, 0};
    }
};
template <>
struct Operand<Nibbles> : Quantised<Nibbles> {};
template <>
struct Operand<Bytes> : Quantised<Bytes> {};
template <>
struct Operand<FineBytes> : Quantised<FineBytes> {};
template <>
struct Operand<ScaledF8> : Quantised<ScaledF8> {};

/// out[r][first + o] = scales[r] (weight[o] . x[r]) + bias[first + o]. With more than one segment in the grid: the sums
/// of a segment, to `segments` [segments, rows, features].
template <class Matrix, class Tile>
__device__ __forceinline__ void product(Matrix matrix, const uint16_t* x, const float* row_scales, const float* bias,
                                        float* out, float* segments, int rows, int cols, int features, int width,
                                        int first) {
    using Weights = Operand<Matrix>;
    using Element = typename Weights::Element;
    constexpr int WIDTH = Tile::WIDTH, STAGES = Tile::STAGES, THREADS = Tile::THREADS, STEPS = SEGMENT / Tile::IN;
    constexpr int DOWN = Tile::DOWN_A_WARP, ACROSS = Tile::ACROSS_A_WARP;
    Chunk* const stages = shared_chunks<STAGES * Tile::STAGE>();
    const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), stride = padded(cols);
    const Place place = Place::of<Tile>(rows, features);
    const int warp_row = warp_id() / Tile::ACROSS * DOWN * 16, warp_feature = warp_id() % Tile::ACROSS * ACROSS * 8;
    const bool splits = gridDim.z > 1;
    const int all = (stride + Tile::IN - 1) / Tile::IN;
    const int begin = splits ? static_cast<int>(blockIdx.z) * STEPS : 0;
    const int end = splits ? min(all, begin + STEPS) : all;

    typename Weights::Eight eights[Tile::OUT_CHUNKS];
    // Chunks of a step go to the stage whose turn it is: neighbours to neighbouring threads.
    const auto bring = [&](int step) {
        Chunk* const stage = stages + step % STAGES * Tile::STAGE;
#pragma unroll
        for (int i = 0; i < Tile::ROW_CHUNKS; i++) {
            const int row = (thread + i * THREADS) / WIDTH, chunk = (thread + i * THREADS) % WIDTH;
            const int at = step * Tile::IN + chunk * CHUNK;
            const bool valid = place.row + row < rows && at < stride;
            const size_t from = valid ? static_cast<size_t>(place.row + row) * stride + at : 0;
            copy_async(stage + swizzled<WIDTH>(row, chunk), x + from, valid);
        }
#pragma unroll
        for (int i = 0; i < Tile::OUT_CHUNKS; i++) {
            const int feature = (thread + i * THREADS) / WIDTH, chunk = (thread + i * THREADS) % WIDTH;
            const int at = step * Tile::IN + chunk * CHUNK;
            const bool valid = place.feature + feature < features && at < stride;
            eights[i] = Weights::begin(matrix, static_cast<size_t>(place.feature + feature) * stride, at, valid,
                                       stage + Tile::ROWS * WIDTH + swizzled<WIDTH>(feature, chunk));
        }
    };
    const auto unpack = [&](int step) {
        Chunk* const weights = stages + step % STAGES * Tile::STAGE + Tile::ROWS * WIDTH;
#pragma unroll
        for (int i = 0; i < Tile::OUT_CHUNKS; i++) {
            const int feature = (thread + i * THREADS) / WIDTH, chunk = (thread + i * THREADS) % WIDTH;
            const bool valid = place.feature + feature < features && step * Tile::IN + chunk * CHUNK < stride;
            Weights::end(eights[i], valid, weights + swizzled<WIDTH>(feature, chunk));
        }
    };

    follow();
    for (int step = begin; step < begin + STAGES - 1; step++) {
        if (step < end) {
            bring(step);
            unpack(step);
        }
        commit_copies();
    }
    float totals[DOWN][ACROSS][4] = {};
    for (int segment = begin; segment < end; segment += STEPS) {
        float sums[DOWN][ACROSS][4] = {};
        const int segment_end = min(end, segment + STEPS);
#pragma unroll 1
        for (int step = segment; step < segment_end; step++) {
            wait_for_copies<STAGES - 2>();
            // Everybody's part of this step is there, and nobody reads the stage that is refilled now.
            __syncthreads();
            const int next = step + STAGES - 1;
            if (next < end) bring(next);
            commit_copies();

            const Chunk* const stage = stages + step % STAGES * Tile::STAGE;
#pragma unroll
            for (int chunk = 0; chunk < WIDTH; chunk += 2) {
                unsigned a[DOWN][4], b[ACROSS / 2][4];
#pragma unroll
                for (int i = 0; i < DOWN; i++) load_matrices(a[i], upright<WIDTH>(stage, warp_row + i * 16, chunk));
#pragma unroll
                for (int j = 0; j < ACROSS / 2; j++) {
                    load_matrices(b[j], lying<WIDTH>(stage + Tile::ROWS * WIDTH, warp_feature + j * 16, chunk));
                }
#pragma unroll
                for (int i = 0; i < DOWN; i++) {
#pragma unroll
                    for (int j = 0; j < ACROSS; j++) {
                        multiply_add<Element>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                    }
                }
            }
            if (next < end) unpack(next);
        }
#pragma unroll
        for (int i = 0; i < DOWN * ACROSS * 4; i++) {
            const float sum = sums[i / 4 / ACROSS][i / 4 % ACROSS][i % 4];
            float& total = totals[i / 4 / ACROSS][i / 4 % ACROSS][i % 4];
            total = segment == begin ? sum : total + sum;
        }
    }

#pragma unroll
    for (int i = 0; i < DOWN; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = place.row + warp_row + i * 16 + half * 8 + lane / 4;
            if (row >= rows) continue;
            const float scale = row_scales ? row_scales[row] : 1.0f;
#pragma unroll
            for (int j = 0; j < ACROSS * 2; j++) {
                const int feature = place.feature + warp_feature + j / 2 * 8 + lane % 4 * 2 + j % 2;
                if (feature >= features) continue;
                const float total = totals[i][j / 2][half * 2 + j % 2];
                if (splits) {
                    segments[(static_cast<size_t>(blockIdx.z) * rows + row) * features + feature] = total;
                } else {
                    const float added = bias ? bias[first + feature] : 0.0f;
                    out[static_cast<size_t>(row) * padded(width) + first + feature] = total * scale + added;
                }
            }
        }
    }
}

}  // namespace gemm

// product_{size of tiles}_{matrix}: out[r][first + o] = scales[r] (weight[o] . x[r]) + bias[first + o], without scales
// 1 and without bias 0. x: [rows, cols] in the type of the weights, f16 for quantised ones; weight: [features, cols];
// out: [rows, width]. With a third dimension of the grid, the sums of each segment without scales and bias.
// Grid: (tiles, 1, segments or 1). Shared memory: 48 KiB a block; by registers an SM holds one block of the large
// tile, three of the medium, four of the small. Bytes: the matrix once for up to 16 tiles of rows (2,048 rows by the
// large tile), x once for a wave of blocks. Operations: 2 a weight and row. Floor: the larger of the matrix's bytes
// over the bandwidth and the operations over the rate of mma, about 600 Tflop/s on an H100, whose wgmma reaches 800 to
// 990. Where it should end up: with the large tile a warp reads 3 KiB of shared memory for 16 mma, 24 cycles of an
// SM's bandwidth, in which its tensor cores can do just about as many by mma (16 at their peak).
#define PRODUCT(SIZE, TILE, SUFFIX, MATRIX)                                                                            \
    extern "C" __global__ void __launch_bounds__(gemm::TILE::THREADS) product_##SIZE##_##SUFFIX(                       \
        const void* values, const void* scales, const void* x, const float* row_scales, const float* bias, float* out, \
        float* segments, int rows, int cols, int features, int width, int first) {                                     \
        gemm::product<MATRIX, gemm::TILE>(MATRIX(values, scales), static_cast<const uint16_t*>(x), row_scales, bias,   \
                                          out, segments, rows, cols, features, width, first);                          \
    }                                                                                                                  \
    REGISTER(product_##SIZE##_##SUFFIX);

#define PRODUCTS(SUFFIX, MATRIX)             \
    PRODUCT(large, Large, SUFFIX, MATRIX)    \
    PRODUCT(medium, Medium, SUFFIX, MATRIX)  \
    PRODUCT(small, Small, SUFFIX, MATRIX)

PRODUCTS(f16, Floats<F16>)
PRODUCTS(bf16, Floats<BF16>)
PRODUCTS(nibbles, Nibbles)
PRODUCTS(bytes, Bytes)
PRODUCTS(fine_bytes, FineBytes)
PRODUCTS(f8, ScaledF8)

// What `product` does behind the last segment, for segments that were computed side by side.
// Grid: (features / 128, rows). Bytes: 4 a segment and result, and 4 a result. Operations: an addition each.
extern "C" __global__ void __launch_bounds__(gemm::THREADS)
    add_segments(const float* segments, const float* row_scales, const float* bias, float* out, int rows, int count,
                 int features, int width, int first) {
    follow();
    const int feature = static_cast<int>(blockIdx.x) * gemm::THREADS + static_cast<int>(threadIdx.x);
    const size_t row = blockIdx.y, all = static_cast<size_t>(rows) * features;
    if (feature >= features) return;
    const float* sum = segments + row * features + feature;
    float total = sum[0];
    for (int segment = 1; segment < count; segment++) total += sum[segment * all];
    const float scale = row_scales ? row_scales[row] : 1.0f, added = bias ? bias[first + feature] : 0.0f;
    out[row * padded(width) + first + feature] = total * scale + added;
}
REGISTER(add_segments);

// round_rows_{type}: rows of [rows, cols] in a type of 16 bits, as `product` takes them; for f16 with a scale each.
// Grid: rows. Bytes: 6 a value (f16: 10, of which 4 from the cache). No arithmetic to speak of. Floor: a launch, up to
// some hundred rows.
#define ROUND_ROWS(SUFFIX, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(gemm::THREADS)                                                        \
        round_rows_##SUFFIX(const float* x, void* out, float* scales, int cols) {                                      \
        follow();                                                                                                      \
        const float* const row = x + static_cast<size_t>(blockIdx.x) * padded(cols);                                   \
        RoundedRows<T>(out, scales).template store<gemm::THREADS / WARP>(static_cast<int>(blockIdx.x), cols,           \
                                                                         [&](int i) { return row[i]; });               \
    }                                                                                                                  \
    REGISTER(round_rows_##SUFFIX)

ROUND_ROWS(f16, F16);
ROUND_ROWS(bf16, BF16);
