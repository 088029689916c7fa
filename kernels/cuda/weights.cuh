// Weights as the device keeps them: rows of `padded(cols)` elements, zeros at the end, so laid out that eight elements
// are one aligned load. Quantised blocks are taken apart when they are loaded (src/cuda/weight.rs): all quants, row
// after row, then all scales. They are read in two steps, `fetch` and `unpack`, for those who have something to do
// while the bytes are on their way.
#pragma once

#include "common.cuh"

/// What a matrix is made of. `scales` is unused by floats.
template <class T>
struct Floats {
    const T* values;

    __device__ __forceinline__ Floats(const void* values, const void*) : values(static_cast<const T*>(values)) {}

    /// Elements `at ..` of a row that starts with element `start` of the matrix; `at` is a multiple of eight.
    __device__ __forceinline__ void load(size_t start, int at, float (&to)[8]) const { load8(values + start + at, to); }
};

/// Two f16: what a quant is multiplied by, and what is added then.
struct alignas(4) ScaleAndMinimum {
    F16 scale, minimum;
};

/// Four bits a quant, the first in the lowest; a scale and a minimum for 32. Q4_0, Q4_1 and Q4_K.
struct Nibbles {
    const uint32_t* quants;
    const ScaleAndMinimum* scales;

    __device__ __forceinline__ Nibbles(const void* quants, const void* scales)
        : quants(static_cast<const uint32_t*>(quants)), scales(static_cast<const ScaleAndMinimum*>(scales)) {}

    struct Eight {
        uint32_t quants;
        ScaleAndMinimum scale;
    };
    __device__ __forceinline__ Eight fetch(size_t start, int at) const {
        return {quants[(start + at) / 8], scales[(start + at) / 32]};
    }
    static __device__ __forceinline__ void unpack(Eight eight, float (&to)[8]) {
        const float scale = to_float(eight.scale.scale), minimum = to_float(eight.scale.minimum);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = fmaf(static_cast<float>(eight.quants >> 4 * i & 15), scale, minimum);
    }
    __device__ __forceinline__ void load(size_t start, int at, float (&to)[8]) const { unpack(fetch(start, at), to); }
};

/// Signed bytes, the quants of eight elements as two words.
__device__ __forceinline__ void signed_bytes(uint2 words, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[i] = static_cast<float>(static_cast<int8_t>(words.x >> 8 * i));
        to[4 + i] = static_cast<float>(static_cast<int8_t>(words.y >> 8 * i));
    }
}

/// Eight bits a quant, an f16 scale for 32. Q8_0, Q5_0, IQ4_NL and IQ4_XS.
struct Bytes {
    const uint2* quants;
    const F16* scales;

    __device__ __forceinline__ Bytes(const void* quants, const void* scales)
        : quants(static_cast<const uint2*>(quants)), scales(static_cast<const F16*>(scales)) {}

    struct Eight {
        uint2 quants;
        F16 scale;
    };
    __device__ __forceinline__ Eight fetch(size_t start, int at) const {
        return {quants[(start + at) / 8], scales[(start + at) / 32]};
    }
    static __device__ __forceinline__ void unpack(Eight eight, float (&to)[8]) {
        signed_bytes(eight.quants, to);
        const float scale = to_float(eight.scale);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] *= scale;
    }
    __device__ __forceinline__ void load(size_t start, int at, float (&to)[8]) const { unpack(fetch(start, at), to); }
};

/// Eight bits a quant, a scale and a minimum for 16. Q5_1, Q3_K, Q5_K and Q6_K.
struct FineBytes {
    const uint2* quants;
    const ScaleAndMinimum* scales;

    __device__ __forceinline__ FineBytes(const void* quants, const void* scales)
        : quants(static_cast<const uint2*>(quants)), scales(static_cast<const ScaleAndMinimum*>(scales)) {}

    struct Eight {
        uint2 quants;
        ScaleAndMinimum scale;
    };
    __device__ __forceinline__ Eight fetch(size_t start, int at) const {
        return {quants[(start + at) / 8], scales[(start + at) / 16]};
    }
    static __device__ __forceinline__ void unpack(Eight eight, float (&to)[8]) {
        signed_bytes(eight.quants, to);
        const float scale = to_float(eight.scale.scale), minimum = to_float(eight.scale.minimum);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = fmaf(to[i], scale, minimum);
    }
    __device__ __forceinline__ void load(size_t start, int at, float (&to)[8]) const { unpack(fetch(start, at), to); }
};

/// Four E4M3, none of them NaN, as floats, each F8_UNIT times too small. (Not by `halves_of`, which minds NaN, and
/// is an instruction on some devices only.)
constexpr float F8_UNIT = 256.0f;
__device__ __forceinline__ void small_f8(unsigned four, float& first, float& second, float& third,
                                         float& fourth) {
    const unsigned even = small_halves(four << 8), odd = small_halves(four);
    first = to_float(F16{static_cast<uint16_t>(even)}), third = to_float(F16{static_cast<uint16_t>(even >> 16)});
    second = to_float(F16{static_cast<uint16_t>(odd)}), fourth = to_float(F16{static_cast<uint16_t>(odd >> 16)});
}

/// E4M3, none of them NaN, and for 128 a scale: F8_UNIT times what they are multiplied by. Rows are a multiple of
/// 128 long. DType::F8.
struct ScaledF8 {
    const uint2* quants;
    const float* scales;

    __device__ __forceinline__ ScaledF8(const void* quants, const void* scales)
        : quants(static_cast<const uint2*>(quants)), scales(static_cast<const float*>(scales)) {}

    struct Eight {
        uint2 quants;
        float scale;
    };
    __device__ __forceinline__ Eight fetch(size_t start, int at) const {
        return {quants[(start + at) / 8], scales[(start + at) / 128]};
    }
    static __device__ __forceinline__ void unpack(Eight eight, float (&to)[8]) {
        small_f8(eight.quants.x, to[0], to[1], to[2], to[3]);
        small_f8(eight.quants.y, to[4], to[5], to[6], to[7]);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] *= eight.scale;
    }
    __device__ __forceinline__ void load(size_t start, int at, float (&to)[8]) const { unpack(fetch(start, at), to); }
};

/// Calls MACRO(suffix, type) for each kind of matrix; the suffixes are those of src/cuda/weight.rs.
#define FOR_EACH_MATRIX(MACRO)   \
    MACRO(f32, Floats<float>)    \
    MACRO(f16, Floats<F16>)      \
    MACRO(bf16, Floats<BF16>)    \
    MACRO(nibbles, Nibbles)      \
    MACRO(bytes, Bytes)          \
    MACRO(fine_bytes, FineBytes) \
    MACRO(f8, ScaledF8)
