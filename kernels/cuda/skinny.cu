// Products of 1 to 16 rows with weight matrices: what decoding spends its time with, and bound by the weights' bytes.
//
// How much is on its way from memory at a time decides (Little's law: 3 TB/s and 1 us are some 24 KiB for each of 132
// processors). So loads of weights are begun before anything else, even before the end of the kernel ahead, several for
// each lane, and pass by the L1 cache, which is left to the rows of x that all warps read. Products are taken in single
// precision with x as it is: up to 8 rows, arithmetic is beside the loads; 16 rows take about as long to multiply as an
// H100 takes to load, and an H200 reaches 50 to 60 % of its bandwidth with them, by what can be counted.
//
// Each sum is cut in the same way whatever the number of rows, features and blocks is: chunks of 256 input features,
// every fourth of them to the same warp, in it an eight to a lane; a lane adds up in order, lanes are added up as a
// tree, the four warps in order. So a row's bits depend on that row and the matrix alone.

#include "streamed.cuh"

namespace skinny {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
/// Warps that share the input features of an output feature.
constexpr int SHARES = 4;
/// Sets of output features of a block.
constexpr int SETS = WARPS / SHARES;
/// Input features a warp takes at a time.
constexpr int CHUNK = WARP * 8;
/// Most rows for which each block takes the norm of x by itself.
constexpr int NORMED_ROWS_MAX = 4;

/// What becomes of the sums; src/cuda/skinny.rs counts alike.
enum Then {
    /// out = sum
    STORE = 0,
    /// out += sum
    ADD = 1,
    /// out = silu(sum of a feature of the first half) * (sum of the same of the second half)
    GATE = 2,
};

/// FEATURES output features a warp, for ROWS rows.
template <class Matrix, int ROWS, int FEATURES>
__device__ __forceinline__ void skinny(Matrix matrix, const float* x, const float* norm, float eps, const float* bias,
                                       float* out, int cols, int features, int width, int first, int then) {
    using Eight = Streamed<Matrix>;
    using Raw = typename Eight::Raw;
    constexpr int SUMS = ROWS * FEATURES, STEP = SHARES * CHUNK, WORDS = FEATURES * sizeof(Raw) / 4;
    // Chunks a lane loads before it uses the first: as many as 32 registers hold, or 16 where unpacking takes some.
    constexpr int ROOM = ROWS >= 4 && sizeof(Raw) < 16 ? 16 : 32;
    constexpr int AT_A_TIME = WORDS < ROOM ? ROOM / WORDS : 1;
    __shared__ float shares[WARPS][SUMS];

    // With a gate, one set of warps takes gates and the other the same features' factors.
    const int share = warp_id() % SHARES, set = warp_id() / SHARES;
    const int begin = (then == GATE ? blockIdx.x : blockIdx.x * SETS + set) * FEATURES;
    const int skipped = then == GATE ? set * features : 0, stride = padded(cols);
    size_t starts[FEATURES];
#pragma unroll
    for (int f = 0; f < FEATURES; f++) {
        // Beyond the end the last one again, which nobody looks at.
        starts[f] = static_cast<size_t>(skipped + min(begin + f, features - 1)) * stride;
    }

    Raw raw[AT_A_TIME][FEATURES];
    int at = share * CHUNK + lane_id() * 8;
    auto fetch = [&] {
#pragma unroll
        for (int u = 0; u < AT_A_TIME; u++) {
            if (at + u * STEP < stride) {
#pragma unroll
                for (int f = 0; f < FEATURES; f++) raw[u][f] = Eight::fetch(matrix, starts[f], at + u * STEP);
            }
        }
    };
    fetch();
    follow();

    float scales[ROWS];
    const bool normed = ROWS <= NORMED_ROWS_MAX && norm;
    if (normed) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            scales[r] = rms_scale<WARPS>(x + static_cast<size_t>(r) * stride, cols, eps);
        }
    }

    float sums[SUMS] = {};
    while (at < stride) {
#pragma unroll
        for (int u = 0; u < AT_A_TIME; u++) {
            const int here = at + u * STEP;
            if (here < stride) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float w[FEATURES][4];
#pragma unroll
                    for (int f = 0; f < FEATURES; f++) Eight::unpack(raw[u][f], half, w[f]);
                    float4 factors = {};
                    if (normed) factors = *reinterpret_cast<const float4*>(norm + here + 4 * half);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        float4 v = *reinterpret_cast<const float4*>(x + r * stride + here + 4 * half);
                        if (normed) {
                            v.x = v.x * scales[r] * factors.x, v.y = v.y * scales[r] * factors.y;
                            v.z = v.z * scales[r] * factors.z, v.w = v.w * scales[r] * factors.w;
                        }
#pragma unroll
                        for (int f = 0; f < FEATURES; f++) {
                            float& sum = sums[f * ROWS + r];
                            sum = fmaf(w[f][0], v.x, sum), sum = fmaf(w[f][1], v.y, sum);
                            sum = fmaf(w[f][2], v.z, sum), sum = fmaf(w[f][3], v.w, sum);
                        }
                    }
                }
            }
        }
        at += AT_A_TIME * STEP;
        fetch();
    }

    transposed_sum<SUMS, WARP>(sums);
    constexpr int LANES = SUMS < WARP ? WARP / SUMS : 1, EACH = SUMS < WARP ? 1 : SUMS / WARP;
    if (lane_id() % LANES == 0) {
#pragma unroll
        for (int i = 0; i < EACH; i++) shares[warp_id()][lane_id() / LANES * EACH + i] = sums[i];
    }
    __syncthreads();

    auto total = [&](int of_set, int which) {
        float sum = shares[of_set * SHARES][which];
#pragma unroll
        for (int i = 1; i < SHARES; i++) sum += shares[of_set * SHARES + i][which];
        return sum;
    };
    const int i = threadIdx.x;
    if (then == GATE) {
        const int feature = blockIdx.x * FEATURES + i / ROWS;
        if (i >= SUMS || feature >= features) return;
        const float gate = total(0, i) + (bias ? bias[feature] : 0.0f);
        const float up = total(1, i) + (bias ? bias[features + feature] : 0.0f);
        out[static_cast<size_t>(i % ROWS) * padded(width) + feature] = gated(gate, up);
    } else {
        const int feature = blockIdx.x * SETS * FEATURES + i / ROWS;
        if (i >= SETS * SUMS || feature >= features) return;
        const float sum = total(i / SUMS, i % SUMS) + (bias ? bias[first + feature] : 0.0f);
        float* to = out + static_cast<size_t>(i % ROWS) * padded(width) + first + feature;
        *to = then == ADD ? *to + sum : sum;
    }
}

/// Blocks of a kernel that a processor is to hold: what that leaves for registers.
template <class Matrix>
constexpr int blocks(int rows, int features) {
    const bool is_quantised = sizeof(typename Streamed<Matrix>::Raw) < 16;
    if (rows == 1) return features == 8 ? 2 : 3;
    return rows == 16 || (rows == 8 && is_quantised) ? 1 : 2;
}

}  // namespace skinny

// skinny_{rows}x{features of a warp}_{matrix}: y[r][first + o] = weight[o] . x[r] + bias[first + o], and `then`
// out = y, or out += y, or out[r][o] = silu(y[r][o]) * y[r][features + o]. With `norm`, of [cols], and up to 4 rows, of
// rms_norm(x[r]) instead of x[r]: bit for bit what the kernel rms_norm makes of it.
// x: [rows, cols]; weight: [features, cols], with a gate [2 * features, cols]; out: [rows, width].
// Grid: features / (2 * features of a warp), with a gate twice as many. Bytes: the matrix, once. Operations: 2 a weight
// and row, unpacking apart. Floor: the matrix's bytes over the bandwidth.
#define SKINNY(ROWS, FEATURES, SUFFIX, MATRIX)                                                                         \
    extern "C" __global__ void __launch_bounds__(skinny::THREADS, skinny::blocks<MATRIX>(ROWS, FEATURES))              \
        skinny_##ROWS##x##FEATURES##_##SUFFIX(const void* values, const void* scales, const float* x,                  \
                                              const float* norm, float eps, const float* bias, float* out, int cols,   \
                                              int features, int width, int first, int then) {                          \
        skinny::skinny<MATRIX, ROWS, FEATURES>(MATRIX(values, scales), x, norm, eps, bias, out, cols, features, width, \
                                               first, then);                                                           \
    }                                                                                                                  \
    REGISTER(skinny_##ROWS##x##FEATURES##_##SUFFIX);

// Many features a warp, so that its loads are many too; fewer where there would be too few blocks to fill the device.
#define ALL_SKINNY(SUFFIX, MATRIX)  \
    SKINNY(1, 2, SUFFIX, MATRIX)    \
    SKINNY(1, 4, SUFFIX, MATRIX)    \
    SKINNY(2, 2, SUFFIX, MATRIX)    \
    SKINNY(2, 4, SUFFIX, MATRIX)    \
    SKINNY(4, 2, SUFFIX, MATRIX)    \
    SKINNY(4, 4, SUFFIX, MATRIX)    \
    SKINNY(8, 2, SUFFIX, MATRIX)    \
    SKINNY(8, 4, SUFFIX, MATRIX)    \
    SKINNY(16, 2, SUFFIX, MATRIX)   \
    SKINNY(16, 4, SUFFIX, MATRIX)

FOR_EACH_MATRIX(ALL_SKINNY)

SKINNY(1, 8, f16, Floats<F16>)
SKINNY(2, 8, f16, Floats<F16>)
SKINNY(1, 8, bf16, Floats<BF16>)
SKINNY(2, 8, bf16, Floats<BF16>)
SKINNY(1, 8, f8, ScaledF8)
SKINNY(2, 8, f8, ScaledF8)
