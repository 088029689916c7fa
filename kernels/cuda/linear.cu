// Products with weight matrices, and rows of them.
//
// This is for more rows than skinny.cu is for, in f32 alone, which tensor cores do not take whole: gemm.cu has the
// others. Each of the three promises that a row's result depends on that row alone, not on how many others there are;
// they add up in different orders, so between them results differ in the last bits.

#include "weights.cuh"

namespace linear {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

// Rows and output features of a block's tile, and input features it takes at a time.
constexpr int TILE_ROWS = 32;
constexpr int TILE_OUT = 64;
constexpr int TILE_IN = 32;

/// out[r][first + o] = weight[o] . x[r] + bias[first + o]: a block computes a tile of 32 rows by 64 features, a thread
/// 4 by 4 of it. Each sum is taken in the order of the input features.
template <class Matrix>
__device__ __forceinline__ void tiled(Matrix matrix, const float* x, const float* bias, float* out, int rows, int cols,
                                      int features, int width, int first) {
    __shared__ float w_tile[TILE_IN][TILE_OUT];
    __shared__ float x_tile[TILE_IN][TILE_ROWS];
    const int stride = padded(cols);
    const int tile_feature = blockIdx.x * TILE_OUT, tile_row = blockIdx.y * TILE_ROWS;
    const int my_feature = threadIdx.x % 16 * 4, my_row = threadIdx.x / 16 * 4;
    float sums[4][4] = {};
    follow();
    for (int start = 0; start < stride; start += TILE_IN) {
        __syncthreads();
        // Eights of the tile: four a feature (or row), the next thread takes the next feature.
        for (int eight = threadIdx.x; eight < TILE_OUT * 4; eight += THREADS) {
            const int feature = eight % TILE_OUT, at = eight / TILE_OUT * 8;
            float w[8] = {};
            if (tile_feature + feature < features && start + at < stride) {
                matrix.load(static_cast<size_t>(tile_feature + feature) * stride, start + at, w);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) w_tile[at + i][feature] = w[i];
        }
        {
            const int row = threadIdx.x % TILE_ROWS, at = threadIdx.x / TILE_ROWS * 8;
            float v[8] = {};
            if (tile_row + row < rows && start + at < stride) {
                load8(x + static_cast<size_t>(tile_row + row) * stride + start + at, v);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) x_tile[at + i][row] = v[i];
        }
        __syncthreads();
        for (int k = 0; k < TILE_IN; k++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
#pragma unroll
                for (int f = 0; f < 4; f++) {
                    sums[r][f] = fmaf(w_tile[k][my_feature + f], x_tile[k][my_row + r], sums[r][f]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int f = 0; f < 4; f++) {
            const int row = tile_row + my_row + r, feature = tile_feature + my_feature + f;
            if (row < rows && feature < features) {
                const float added = bias ? bias[first + feature] : 0.0f;
                out[static_cast<size_t>(row) * padded(width) + first + feature] = sums[r][f] + added;
            }
        }
    }
}

/// out[t] = rows[tokens[t]], between `first` and `first + features` the rows of this matrix. A token with its highest
/// bit set is that which was drawn in a row of the step before (`Batch::PLACEHOLDER` of src/batch.rs).
template <class Matrix>
__device__ __forceinline__ void embed(Matrix matrix, const int* tokens, const int* drawn, float* out, int cols,
                                      int features, int first) {
    follow();
    const int given = tokens[blockIdx.x];
    const int row = (given < 0 ? drawn[(given & 0x7fffffff) * OUTCOME_WORDS] : given) - first;
    if (row < 0 || row >= features) return;
    const size_t start = static_cast<size_t>(row) * padded(cols), to = static_cast<size_t>(blockIdx.x) * padded(cols);
    for (int at = threadIdx.x * 8; at < cols; at += THREADS * 8) {
        float values[8];
        matrix.load(start, at, values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (at + i < cols) out[to + at + i] = values[i];
        }
    }
}

}  // namespace linear

// tiled_f32: out[r][first + o] = weight[o] . x[r] + bias[first + o] for any number of rows.
// x: [rows, cols]; weight: [features, cols]; out: [rows, width].
// Grid: (features / 64, rows / 32). Bytes: the matrix once for 32 rows, x once for 64 features. Operations: 2 a weight
// and row, in single precision outside the tensor cores: the floor is that rate, 60 Tflop/s on an H100.
extern "C" __global__ void __launch_bounds__(linear::THREADS)
    tiled_f32(const void* values, const void* scales, const float* x, const float* bias, float* out, int rows, int cols,
              int features, int width, int first) {
    linear::tiled(Floats<float>(values, scales), x, bias, out, rows, cols, features, width, first);
}
REGISTER(tiled_f32);

// embed_{matrix}: out[t] = weight[token - first], where that is one of its rows: tokens[t], or one drawn before.
// Grid: tokens. Bytes: a row of the matrix and 4 a value of out. No arithmetic but unpacking.
#define EMBED(SUFFIX, MATRIX)                                                                                          \
    extern "C" __global__ void __launch_bounds__(linear::THREADS) embed_##SUFFIX(                                      \
        const void* values, const void* scales, const int* tokens, const int* drawn, float* out, int cols,             \
        int features, int first) {                                                                                     \
        linear::embed(MATRIX(values, scales), tokens, drawn, out, cols, features, first);                              \
    }                                                                                                                  \
    REGISTER(embed_##SUFFIX);

FOR_EACH_MATRIX(EMBED)
