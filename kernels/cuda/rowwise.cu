// Operations that look at one row at a time. All are bound by memory: the floor of each is its bytes over the device's
// bandwidth, which at decoding's sizes is below a launch. A row's result depends on that row alone.

#include "common.cuh"

namespace rowwise {

constexpr int THREADS = 256;

/// Root mean square norm of a row; with `delta`, of `x + delta`, which is stored in `x`.
template <bool ADD>
__device__ __forceinline__ void rms_norm(float* x, const float* delta, const float* weight, float* out, int cols,
                                         float eps) {
    const size_t start = static_cast<size_t>(blockIdx.x) * padded(cols);
    follow();
    // Each thread reads what it has written itself.
    if (ADD) {
        for (int i = threadIdx.x; i < cols; i += THREADS) x[start + i] += delta[start + i];
    }
    const float scale = rms_scale<THREADS / WARP>(x + start, cols, eps);
    for (int i = threadIdx.x; i < cols; i += THREADS) out[start + i] = x[start + i] * scale * weight[i];
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
REGISTER(select_rows);
