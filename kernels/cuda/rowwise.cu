// Operations that look at one row at a time. All are bound by memory: the floor of each is its bytes over the device's
// bandwidth, which at decoding's sizes is below a launch. A row's result depends on that row alone.

#include "rounding.cuh"

namespace rowwise {

constexpr int THREADS = 256;
/// Of a block that has a long row to itself.
constexpr int ROW_THREADS = 1024;

/// Root mean square norm of a row; with `delta`, of `x + delta`, which is stored in `x`. Passes on what its elements
/// are, for all threads of the block.
template <bool ADD, class Store>
__device__ __forceinline__ void norm_row(float* x, const float* delta, const float* weight, int cols, float eps,
                                         Store store) {
    const size_t start = static_cast<size_t>(blockIdx.x) * padded(cols);
    follow();
    // Each thread reads what it has written itself; what others have, behind the barriers of the sum.
    if (ADD) {
        for (int i = threadIdx.x; i < cols; i += THREADS) x[start + i] += delta[start + i];
    }
    const float scale = rms_scale<THREADS / WARP>(x + start, cols, eps);
    store([&](int i) { return x[start + i] * scale * weight[i]; });
}

/// As f32, [rows, cols].
template <bool ADD>
__device__ __forceinline__ void rms_norm(float* x, const float* delta, const float* weight, float* out, int cols,
                                         float eps) {
    out += static_cast<size_t>(blockIdx.x) * padded(cols);
    norm_row<ADD>(x, delta, weight, cols, eps, [&](auto at) {
        for (int i = threadIdx.x; i < cols; i += THREADS) out[i] = at(i);
    });
}

/// As a product takes them.
template <bool ADD, class T>
__device__ __forceinline__ void rms_norm(float* x, const float* delta, const float* weight, RoundedRows<T> out,
                                         int cols, float eps) {
    norm_row<ADD>(x, delta, weight, cols, eps, [&](auto at) {
        out.template store<THREADS / WARP>(static_cast<int>(blockIdx.x), cols, at);
    });
}

}  // namespace rowwise

// out = x / sqrt(mean(x^2) + eps) * weight, for x and out of [rows, cols].
// Grid: rows. Bytes: 8 a value (4 more if a row outgrows the L1 cache between its two passes). Operations: 4 a value.
extern "C" __global__ void __launch_bounds__(rowwise::THREADS)
    rms_norm(float* x, const float* weight, float* out, int cols, float eps) {
    rowwise::rms_norm<false>(x, nullptr, weight, out, cols, eps);
}

// residual += delta; out = rms_norm(residual), for [rows, cols].
// Grid: rows. Bytes: 16 a value. Operations: 5 a value.
extern "C" __global__ void __launch_bounds__(rowwise::THREADS)
    add_rms_norm(float* residual, const float* delta, const float* weight, float* out, int cols, float eps) {
    rowwise::rms_norm<true>(residual, delta, weight, out, cols, eps);
}

// rms_norm_{type}, add_rms_norm_{type}: the same, rounded as a product takes it, with a scale for each row of f16.
// Grid: rows. Bytes: 6 a value, or 14 (f16: 4 more, from the cache).
#define ROUNDED_NORMS(SUFFIX, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(rowwise::THREADS)                                                   \
        rms_norm_##SUFFIX(float* x, const float* weight, void* out, float* scales, int cols, float eps) {            \
        rowwise::rms_norm<false>(x, nullptr, weight, RoundedRows<T>(out, scales), cols, eps);                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(rowwise::THREADS)                                                   \
        add_rms_norm_##SUFFIX(float* residual, const float* delta, const float* weight, void* out, float* scales,    \
                              int cols, float eps) {                                                                 \
        rowwise::rms_norm<true>(residual, delta, weight, RoundedRows<T>(out, scales), cols, eps);                    \
    }                                                                                                                \
    REGISTER(rms_norm_##SUFFIX);                                                                                     \
    REGISTER(add_rms_norm_##SUFFIX)

ROUNDED_NORMS(f16, F16);
ROUNDED_NORMS(bf16, BF16);

// out = silu(gate) * up, for gate_up of [rows, 2 * ffn], gate first, and out of [rows, ffn].
// Grid: (rows, ffn / 256). Bytes: 12 a value of out. Operations: an exponential and a division a value.
extern "C" __global__ void __launch_bounds__(rowwise::THREADS)
    silu_mul(const float* gate_up, float* out, int ffn) {
    follow();
    const int i = blockIdx.y * rowwise::THREADS + threadIdx.x;
    const size_t row = blockIdx.x;
    if (i >= ffn) return;
    const float* both = gate_up + row * padded(2 * ffn) + i;
    out[row * padded(ffn) + i] = gated(both[0], both[ffn]);
}

// silu_mul_{type}: the same, rounded as a product takes it. To bf16 two values a thread; to f16, which takes a row's
// largest magnitude, a block a row.
// Grid: (rows, ffn / 512), or rows. Bytes: 10 a value of out (f16: 8 more, from the cache). Operations: an exponential
// and a division a value (f16: two).
extern "C" __global__ void __launch_bounds__(rowwise::THREADS)
    silu_mul_bf16(const float* gate_up, void* out, float*, int ffn) {
    follow();
    const int i = 2 * (blockIdx.y * rowwise::THREADS + threadIdx.x);
    const size_t row = blockIdx.x;
    if (i >= padded(ffn)) return;
    const float* both = gate_up + row * padded(2 * ffn) + i;
    const float low = i < ffn ? gated(both[0], both[ffn]) : 0.0f;
    const float high = i + 1 < ffn ? gated(both[1], both[ffn + 1]) : 0.0f;
    *reinterpret_cast<unsigned*>(static_cast<uint16_t*>(out) + row * padded(ffn) + i) = pair<BF16>(low, high);
}
extern "C" __global__ void __launch_bounds__(rowwise::ROW_THREADS)
    silu_mul_f16(const float* gate_up, void* out, float* scales, int ffn) {
    follow();
    const int row = static_cast<int>(blockIdx.x);
    const float* both = gate_up + static_cast<size_t>(row) * padded(2 * ffn);
    RoundedRows<F16>(out, scales).store<rowwise::ROW_THREADS / WARP>(
        row, ffn, [&](int i) { return gated(both[i], both[ffn + i]); });
}

// out[i] = x[rows[i]], for x of [?, cols] and out of [count, cols]; without `rows`, out[i] = x[i].
// Grid: count. Bytes: 8 a value. No arithmetic. What pads a row is copied too, zeros on zeros.
extern "C" __global__ void __launch_bounds__(rowwise::THREADS)
    select_rows(const float* x, const int* rows, float* out, int cols) {
    follow();
    const size_t row = rows ? rows[blockIdx.x] : blockIdx.x;
    const float4* from = reinterpret_cast<const float4*>(x + row * padded(cols));
    float4* to = reinterpret_cast<float4*>(out + static_cast<size_t>(blockIdx.x) * padded(cols));
    // Some loads at a time, before any store: the compiler cannot know that they are of other memory.
    constexpr int AT_ONCE = 4;
    for (int first = threadIdx.x; first < padded(cols) / 4; first += AT_ONCE * rowwise::THREADS) {
        float4 values[AT_ONCE];
        for (int k = 0, i = first; k < AT_ONCE && i < padded(cols) / 4; k++, i += rowwise::THREADS) values[k] = from[i];
        for (int k = 0, i = first; k < AT_ONCE && i < padded(cols) / 4; k++, i += rowwise::THREADS) to[i] = values[k];
    }
}

REGISTER(rms_norm);
REGISTER(add_rms_norm);
REGISTER(silu_mul);
REGISTER(silu_mul_f16);
REGISTER(silu_mul_bf16);
REGISTER(select_rows);
