// How rows of activations become what tensor cores multiply with weights: bf16, which has f32's range, or f16, which
// has not. Some models' activations go beyond it, so each row is multiplied by a power of two that brings its largest
// magnitude to 2^14, and its results by the inverse; both are exact. Whatever kernel makes the row, its bits are those
// that `round_rows` (gemm.cu) makes of it in f32.
#pragma once

#include "mma.cuh"

template <class T>
constexpr bool HAS_SCALES = false;
template <>
constexpr bool HAS_SCALES<F16> = true;

/// Rows rounded to T, which is F16 or BF16: `[rows, padded(cols)]`, what pads them zero; of F16 with a scale each,
/// which results are to be multiplied by.
template <class T>
struct RoundedRows {
    uint16_t* values;
    float* scales;

    __device__ __forceinline__ RoundedRows(void* values, float* scales)
        : values(static_cast<uint16_t*>(values)), scales(scales) {}

    /// A block of WARPS warps stores a row, of which `at(i)` is element i, the same whenever it is asked for.
    template <int WARPS, class At>
    __device__ __forceinline__ void store(int row, int cols, At at) const {
        constexpr int THREADS = WARPS * WARP;
        const int thread = static_cast<int>(threadIdx.x);
        float inverse = 1.0f;
        if constexpr (HAS_SCALES<T>) {
            float most = 0.0f;
            for (int i = thread; i < cols; i += THREADS) most = fmaxf(most, fabsf(at(i)));
            most = block_max<WARPS>(most);
            // Numbers' exponents are off by 127. A row of zeros, or one with infinities, stays as it is.
            const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
            const int up = exponent == 0 || exponent == 255 ? 127 : min(127 + 127 + 14 - exponent, 253);
            inverse = __uint_as_float(static_cast<unsigned>(up) << 23);
            if (thread == 0) scales[row] = __uint_as_float(static_cast<unsigned>(254 - up) << 23);
        }
        uint16_t* const out = values + static_cast<size_t>(row) * padded(cols);
        for (int i = thread * 2; i < padded(cols); i += THREADS * 2) {
            const float low = i < cols ? at(i) : 0.0f, high = i + 1 < cols ? at(i + 1) : 0.0f;
            // Times 1, for BF16: the same bits.
            *reinterpret_cast<unsigned*>(out + i) = pair<T>(low * inverse, high * inverse);
        }
    }
};
